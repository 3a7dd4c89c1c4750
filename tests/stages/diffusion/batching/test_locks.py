"""One thread at a time in what several requests share, and an abort while waiting for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from omni.errors import RequestAborted
from omni.stage import Work
from stages.diffusion.batching.locks import Locks, lock_components
from stages.diffusion.denoiser import DenoiseRun
from stages.diffusion.stage import DiffusionStage

SECONDS = 30.0


class Vae(torch.nn.Module):
    """Waits inside of decode until the test lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.door = threading.Event(), threading.Event()
        self.num_inside = self.most_inside = 0

    def decode(self, value: int) -> int:
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        self.inside.set()
        assert self.door.wait(SECONDS)
        self.num_inside -= 1
        return value


def test_one_thread_at_a_time() -> None:
    vae, locks = Vae(), Locks()
    locks.add_module("vae", vae)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(vae.decode, n) for n in range(4)]
        vae.door.set()
        assert [future.result(SECONDS) for future in futures] == [0, 1, 2, 3]
    assert vae.most_inside == 1
    locks.remove()
    assert "decode" not in vars(vae)


def test_an_aborted_request_does_not_wait() -> None:
    vae, locks, work = Vae(), Locks(), Work("gone", lambda _: None)
    locks.add_module("vae", vae)

    def wait_for_it() -> None:
        with DenoiseRun(work).active():
            vae.decode(2)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(vae.decode, 1)
        assert vae.inside.wait(SECONDS)
        second = pool.submit(wait_for_it)
        work.stop.set()
        with pytest.raises(RequestAborted):
            second.result(SECONDS)
        vae.door.set()
        assert first.result(SECONDS) == 1


def test_tokenizers_take_other_lengths_from_many_threads() -> None:
    """Without the lock, fast tokenizers raise 'Already borrowed' when padding changes under another thread."""
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "small", "blue", "circle"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    before, locks = type(tokenizer), Locks()
    locks.add_text("tokenizer", tokenizer)
    assert isinstance(tokenizer, before)
    assert type(tokenizer).__name__ == before.__name__

    def read(length: int) -> int:
        found = tokenizer("a small blue circle", padding="max_length", max_length=length, truncation=True)
        return len(found["input_ids"])

    lengths = [2 + n % 7 for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, lengths)) == lengths
    locks.remove()
    assert type(tokenizer) is before


def test_all_but_denoisers_are_locked(loaded: Callable[[str], DiffusionStage]) -> None:
    built = loaded("ltx2").built
    assert built is not None
    pipeline: Any = built.pipeline
    locks = lock_components(pipeline)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    gated = {name for name, part in modules.items() if hasattr(vars(part).get("forward"), "__wrapped__")}
    locks.remove()
    assert {"vae", "audio_vae", "connectors", "vocoder"} <= gated
    assert built.locks is None
