"""The shipped graphs on a CUDA GPU: inline, and as Ray actors that share it. Run with `pytest -m gpu`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from omni import Omni

CONFIGS = Path(__file__).parent.parent / "configs"
RED, WHITE = (220, 40, 40), (255, 255, 255)
CAPTIONER = {
    "stages": {"rewrite": {"kind": "llm", "model": "models/shapes/captioner"}},
    "outputs": {"text": "rewrite.text"},
}
LOOSE_PROMPTS = ["flag of japan", "traffic light", "sunset over the sea", "snowman", "moon", "flag of italy"]
SCENES = ["a red circle on a white background", "a small blue square on a yellow background", "a green triangle"]

pytestmark = pytest.mark.gpu


def near(pixel: tuple[int, int, int], colour: tuple[int, int, int]) -> bool:
    """Whether two RGB colours differ by less than 60 in each channel."""
    return all(abs(a - b) < 60 for a, b in zip(pixel, colour, strict=True))


def test_the_painter_draws_inline_on_the_gpu() -> None:
    with Omni(CONFIGS / "draw.yaml") as omni:
        assert omni.plan.runner == "inline"
        assert omni.plan.stage("draw").device == "cuda"
        prompt = "a large red circle on a white background"
        first, again = (omni.generate(prompt=prompt, seed=7).image[0] for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert near(first.getpixel((64, 64)), RED)
    assert near(first.getpixel((4, 4)), WHITE)


def test_two_actors_share_one_gpu() -> None:
    overrides = ["stages.rewrite.resources.gpus=0.3", "stages.draw.resources.gpus=0.5"]
    with Omni(CONFIGS / "demo.yaml", overrides=overrides) as omni:
        assert [process.gpus for process in omni.plan.processes if process.stages] == [0.3, 0.5]
        result = omni.generate(prompt="flag of japan", seed=7)
    assert "red circle" in result.caption
    assert near(result.image[0].getpixel((64, 64)), RED)
    assert {hop.transport for hop in result.timings.hops} == {"object_store"}


def test_texts_do_not_depend_on_what_else_runs() -> None:
    with Omni(CAPTIONER, base_dir=CONFIGS) as omni, ThreadPoolExecutor(len(LOOSE_PROMPTS)) as pool:
        assert omni.plan.stage("rewrite").device == "cuda"

        def write(prompt: str) -> str:
            return omni.generate(prompt=prompt, seed=7).text

        alone = [write(prompt) for prompt in LOOSE_PROMPTS]
        together = list(pool.map(write, LOOSE_PROMPTS))
    assert together == alone
    assert len(set(alone)) > 1


def test_pictures_depend_neither_on_the_runner_nor_on_what_else_runs() -> None:
    drawn = []
    for runner in ("inline", "ray"):
        with Omni(CONFIGS / "draw.yaml", runner=runner) as omni, ThreadPoolExecutor(len(SCENES)) as pool:
            assert omni.plan.stage("draw").device == "cuda"

            def draw(prompt: str, omni: Omni = omni) -> bytes:
                return omni.generate(prompt=prompt, seed=7).image[0].tobytes()

            drawn.append([draw(prompt) for prompt in SCENES])
            drawn.append(list(pool.map(draw, SCENES)))
    assert drawn == [drawn[0]] * 4
    assert len(set(drawn[0])) == len(SCENES)
