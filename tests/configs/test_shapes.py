"""The demo models in configs/models/shapes: grammar, renderer, checker, training script, and the shipped weights."""

import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "configs" / "models" / "shapes"
sys.path.insert(0, str(FOLDER))

from check import judge  # noqa: E402
from concepts import CONCEPTS  # noqa: E402
from models import SCALES, BatchedDenoiser, build_transformer  # noqa: E402
from prompts import HELD_OUT_TEMPLATES, TEMPLATES  # noqa: E402
from render import draw, encode, jitter, paint  # noqa: E402
from sampling import is_clear, sample_scene  # noqa: E402
from scenes import CaptionError, Scene, Shape, is_held_out, parse, write  # noqa: E402

BLUE_CIRCLE = "a small blue circle on a white background"


@given(st.integers(0, 2**32))
@settings(max_examples=60)
def test_every_wording_of_a_scene_is_read_back_as_that_scene(seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    assert parse(write(scene)) == scene
    assert parse(write(scene, rng)) == scene


def test_what_a_caption_leaves_out_has_a_default():
    assert parse(BLUE_CIRCLE) == Scene((Shape("circle", "small", "blue", "center"),), "white")
    assert parse("An orange ring in the top-left corner.") == Scene(
        (Shape("ring", "medium", "orange", "top left"),), "white"
    )


@pytest.mark.parametrize(
    "caption",
    ["", "a cat", "a red circle on a plaid background", "a red band on the left", "a red circle, a red circle, a red"],
)
def test_a_caption_outside_the_grammar_is_refused(caption):
    with pytest.raises(CaptionError):
        parse(caption)


def test_every_concept_is_a_canonical_caption_of_a_clear_scene():
    names = [name for own in CONCEPTS.values() for name in own]
    assert len(names) == len(set(names)) > 200
    for caption in CONCEPTS:
        assert write(parse(caption)) == caption
        assert is_clear(parse(caption)), caption


def test_held_out_wordings_are_not_trained_on():
    assert not set(HELD_OUT_TEMPLATES) & set(TEMPLATES)


def test_the_checker_accepts_what_the_renderer_draws():
    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(12)]
    pictures = paint(*jitter(*encode(scenes), torch.Generator().manual_seed(0)))
    pictures = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert all(judge(picture, scene).right for picture, scene in zip(pictures, scenes, strict=True))


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        ("a small red circle on a white background", "colours"),
        ("a small blue circle on the left on a white background", "places"),
        ("a large blue circle on a white background", "places"),
        ("a small blue circle on a yellow background", "background"),
        ("a small blue circle and a small blue circle at the top on a white background", "places"),
    ],
)
def test_the_checker_refuses_a_wrong_picture(drawn, wrong):
    verdict = judge(draw(parse(drawn)), parse(BLUE_CIRCLE))
    assert not verdict.right
    assert not getattr(verdict, wrong)


def test_the_checker_tells_kinds_apart():
    star = parse("a large red star on a white background")
    assert judge(draw(star), star).kinds
    assert not judge(draw(parse("a large red square on a white background")), star).kinds


def test_the_batched_denoiser_computes_what_the_stock_one_does():
    torch.manual_seed(0)
    scale = SCALES["tiny"]
    transformer = build_transformer(scale).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    latents, time = torch.randn(2, scale.latent_channels, 16, 16), torch.tensor([0.2, 0.9])
    text, num_tokens = torch.randn(2, 32, scale.text_dim), torch.tensor([9, 32])
    with torch.no_grad():
        captions = [own[:count] for own, count in zip(text, num_tokens, strict=True)]
        stock = transformer([one[:, None] for one in latents], time, captions, return_dict=False)[0]
        batched = BatchedDenoiser(transformer)(latents, time, text, num_tokens)
    torch.testing.assert_close(batched, torch.stack(stock).squeeze(2), rtol=1e-4, atol=1e-4)


def test_training_runs_end_to_end_and_its_folders_load(tmp_path):
    from diffusers import DiffusionPipeline
    from train import main
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(["--scale", "tiny", "--device", "cpu", "--workers", "0", "--output", str(tmp_path)])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "painter", dtype=torch.float32)
    image = pipeline(BLUE_CIRCLE, height=128, width=128, num_inference_steps=2, guidance_scale=2.0).images[0]
    assert image.size == (128, 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "captioner")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "captioner")
    assert model.config.vocab_size == len(tokenizer)


def test_shipped_files_are_small_and_hold_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 25_000_000
    allowed = {".py", ".md", ".png", ".json", ".jinja", ".safetensors"}
    assert {path.suffix for path in files} <= allowed
    assert sum(path.suffix == ".safetensors" for path in files) == 4


@pytest.fixture(scope="module")
def painter():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(FOLDER / "painter", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_shipped_painter_draws_held_out_captions_right(painter):
    rng = random.Random(0)
    held_out = [scene for scene in (sample_scene(rng, 1) for _ in range(150)) if is_held_out(scene)]
    scenes = [*held_out[:4], parse(BLUE_CIRCLE)]
    pictures = painter(
        [write(scene) for scene in scenes],
        height=128,
        width=128,
        num_inference_steps=16,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(i) for i in range(len(scenes))],
        output_type="pt",
    ).images
    pictures = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    right = [judge(picture, scene).right for picture, scene in zip(pictures, scenes, strict=True)]
    assert sum(right) >= len(scenes) - 1, [write(s) for s, r in zip(scenes, right, strict=True) if not r]


@pytest.fixture(scope="module")
def captioner():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = FOLDER / "captioner"
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("flag of japan", "flag of japan"),
        ("traffic light", "traffic light"),
        ("sunset over the sea", "sunset over the sea"),
        ("snowman", "snowman"),
        ("draw me the flag of japan please", "flag of japan"),
    ],
)
def test_the_shipped_captioner_knows_what_is_meant(captioner, prompt, name):
    tokenizer, model = captioner
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id
    caption = tokenizer.decode(answer, skip_special_tokens=True)
    assert name in CONCEPTS[caption]


def test_the_shipped_captioner_runs_under_continuous_batching(captioner):
    from transformers import ContinuousBatchingConfig

    tokenizer, model = captioner
    prompts = ["full moon at night", "tiny green star top left", BLUE_CIRCLE]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    token_ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    results = model.generate_batch(
        token_ids,
        generation_config=model.generation_config,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256),
        progress_bar=False,
    )
    answers = sorted(tokenizer.decode(r.generated_tokens, skip_special_tokens=True) for r in results.values())
    assert answers == sorted(
        (
            "a medium white circle in the top right corner on a navy background",
            "a small green star in the top left corner on a white background",
            BLUE_CIRCLE,
        )
    )
