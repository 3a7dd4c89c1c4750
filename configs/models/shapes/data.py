"""Training data as tensors: scenes with tokenized captions for the painter, prompts with answers for the captioner."""

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from concepts import CONCEPTS
from models import END, TEXT_MULTIPLE, chat
from prompts import sample_prompt
from render import encode
from sampling import sample_scene
from scenes import Scene, is_held_out, parse, write
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_CHUNK = 4096
_CONCEPT_SHARE = 0.04
"""Part of the painter's scenes that are concepts, so that what the captioner can ask for is well known."""
_MAX_CAPTION_TOKENS = 2 * TEXT_MULTIPLE


@dataclass
class SceneBank:
    """Scenes whose captions pad to one length."""

    shapes: Tensor
    """(scenes, 3, 4) float32, as `render.encode` gives them."""
    colours: Tensor
    """(scenes, 4, 3) float32."""
    token_ids: Tensor
    """(scenes, length) int16."""
    num_tokens: Tensor
    """(scenes,) int16: how many tokens are not padding."""


@dataclass
class PromptBank:
    """Prompts with their answers, padded to one length."""

    token_ids: Tensor
    """(prompts, length) int16."""
    labels: Tensor
    """(prompts, length) int16: the answer's tokens, -100 elsewhere."""


def pad_length(num_tokens: int, multiple: int = TEXT_MULTIPLE) -> int:
    """The length that a sequence pads to."""
    return -(-num_tokens // multiple) * multiple


def sample_training_scene(rng: random.Random) -> Scene:
    """A scene outside the held-out part."""
    while True:
        concept = rng.random() < _CONCEPT_SHARE
        scene = parse(rng.choice(tuple(CONCEPTS))) if concept else sample_scene(rng)
        if not is_held_out(scene):
            return scene


def sample_texts(count: int, seed: int) -> list[str]:
    """Prompts and captions to learn a tokenizer from."""
    rng = random.Random(seed)
    return [text for _ in range(count) for text in sample_prompt(rng)]


def _pad(sequences: list[list[int]], length: int, value: int) -> Tensor:
    """Sequences padded on the right: (sequences, length) int16."""
    return torch.tensor([s + [value] * (length - len(s)) for s in sequences], dtype=torch.int16)


def _scene_chunk(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> dict[int, SceneBank]:
    """Some scenes, by the padded length of their captions."""
    rng = random.Random(seed)
    scenes = [sample_training_scene(rng) for _ in range(count)]
    token_ids = tokenizer([chat(write(scene, rng)) for scene in scenes]).input_ids
    lengths = [pad_length(len(ids)) for ids in token_ids]
    banks = {}
    for length in sorted(set(lengths)):
        if length > _MAX_CAPTION_TOKENS:
            continue
        chosen = [i for i, own in enumerate(lengths) if own == length]
        shapes, colours = encode([scenes[i] for i in chosen])
        chosen_ids = [token_ids[i] for i in chosen]
        num_tokens = torch.tensor([len(ids) for ids in chosen_ids], dtype=torch.int16)
        padded = _pad(chosen_ids, length, tokenizer.pad_token_id)
        banks[length] = SceneBank(shapes, colours, padded, num_tokens)
    return banks


def _prompt_chunk(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> dict[int, PromptBank]:
    """Some prompts with answers, by their padded length."""
    rng = random.Random(seed)
    pairs = [sample_prompt(rng) for _ in range(count)]
    asked = tokenizer([chat(prompt) for prompt, _ in pairs]).input_ids
    answered = tokenizer([caption + END for _, caption in pairs]).input_ids
    lengths = [pad_length(len(a) + len(b)) for a, b in zip(asked, answered, strict=True)]
    banks = {}
    for length in sorted(set(lengths)):
        chosen = [i for i, own in enumerate(lengths) if own == length]
        token_ids = _pad([asked[i] + answered[i] for i in chosen], length, tokenizer.pad_token_id)
        labels = _pad([[-100] * len(asked[i]) + answered[i] for i in chosen], length, -100)
        banks[length] = PromptBank(token_ids, labels)
    return banks


def _gather(make_chunk: Callable, tokenizer: PreTrainedTokenizerBase, count: int, seed: int, workers: int) -> dict:
    """Chunks made here or by worker processes, joined by padded length; the result depends on the seed alone."""
    sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
    seeds = [seed * 1_000_003 + i for i in range(len(sizes))]
    arguments = (itertools.repeat(tokenizer), sizes, seeds)
    if workers:
        # A forked child would inherit the locks of PyTorch's threads; a spawned one starts clean.
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            chunks = list(pool.map(make_chunk, *arguments))
    else:
        chunks = list(map(make_chunk, *arguments))
    joined = {}
    for length in sorted({length for chunk in chunks for length in chunk}):
        parts = [chunk[length] for chunk in chunks if length in chunk]
        names = vars(parts[0])
        joined[length] = type(parts[0])(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    return joined


def build_scene_banks(
    tokenizer: PreTrainedTokenizerBase, count: int, seed: int, workers: int = 0
) -> dict[int, SceneBank]:
    """The painter's scenes, by padded caption length."""
    return _gather(_scene_chunk, tokenizer, count, seed, workers)


def build_prompt_banks(
    tokenizer: PreTrainedTokenizerBase, count: int, seed: int, workers: int = 0
) -> dict[int, PromptBank]:
    """The captioner's prompts, by padded length."""
    return _gather(_prompt_chunk, tokenizer, count, seed + 1, workers)
