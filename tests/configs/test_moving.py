"""The painter of clips in configs/models/moving: prompts, renderer, judge, training script, and the shipped weights."""

import random
import sys
from pathlib import Path

import pytest
import torch

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDER = CONFIGS / "models" / "moving"
sys.path.insert(0, str(FOLDER))

from clips import ALL_CLIPS, FPS, NUM_FRAMES, SIZE, Clip, draw, is_held_out, judge, write  # noqa: E402

RED_CIRCLE = Clip("red", "circle", "left", "white")


def to_frames(pictures):
    return ((pictures + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


def test_prompts_say_which_clip():
    assert write(RED_CIRCLE) == "a red circle moving left on white"
    assert len({write(clip) for clip in ALL_CLIPS}) == len(ALL_CLIPS)
    wordings = {write(RED_CIRCLE, random.Random(seed)) for seed in range(200)}
    assert len(wordings) > 10
    assert all(word in text for text in wordings for word in ("red", "circle", "left", "white"))
    assert 10 < sum(map(is_held_out, ALL_CLIPS)) < len(ALL_CLIPS) / 5


def test_the_judge_accepts_what_the_renderer_draws():
    clips = random.Random(0).sample(ALL_CLIPS, 24)
    drawn = to_frames(draw(clips, torch.Generator().manual_seed(0)))
    assert drawn.shape == (24, NUM_FRAMES, SIZE, SIZE, 3)
    assert all(judge(frames, clip).right for frames, clip in zip(drawn, clips, strict=True))


@pytest.mark.parametrize(
    ("other", "wrong"),
    [
        (Clip("blue", "circle", "left", "white"), "colour"),
        (Clip("red", "square", "left", "white"), "shape"),
        (Clip("red", "circle", "up", "white"), "direction"),
        (Clip("red", "circle", "right", "white"), "direction"),
        (Clip("red", "circle", "left", "cyan"), "background"),
    ],
)
def test_the_judge_names_what_is_wrong(other, wrong):
    verdict = judge(to_frames(draw([other]))[0], RED_CIRCLE)
    assert not verdict.right
    assert [name for name in ("colour", "shape", "direction", "background") if not getattr(verdict, name)] == [wrong]


def test_a_clip_that_stands_still_is_wrong():
    frames = to_frames(draw([RED_CIRCLE]))[0]
    assert not judge(frames[:1].expand(NUM_FRAMES, -1, -1, -1), RED_CIRCLE).direction


def test_an_empty_clip_is_wrong():
    assert not judge(torch.full((NUM_FRAMES, SIZE, SIZE, 3), 252, dtype=torch.uint8), RED_CIRCLE).right


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_runs_end_to_end_and_its_folder_loads(tmp_path):
    from diffusers import DiffusionPipeline
    from train_clips import main

    tiny = ["--dim", "32", "--layers", "1", "--text-layers", "1", "--variants", "1", "--clips", "2"]
    main([*tiny, "--batch", "2", "--steps", "2", "--output", str(tmp_path)])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    frames = pipeline(
        "a red circle",
        height=SIZE,
        width=SIZE,
        video_length=NUM_FRAMES,
        num_inference_steps=2,
        guidance_scale=2.0,
        clean_caption=False,
    ).frames
    assert len(frames[0]) == NUM_FRAMES
    assert frames[0][0].size == (SIZE, SIZE)


def test_shipped_files_are_small_and_hold_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    weights = [path for path in files if "painter" in path.parts]
    assert sum(path.stat().st_size for path in weights) < 10_000_000
    assert sum(path.stat().st_size for path in files) < 10 * 2**20
    assert {path.suffix for path in files} <= {".py", ".md", ".png", ".json", ".jinja", ".safetensors"}
    assert sum(path.suffix == ".safetensors" for path in files) == 3


def test_the_shipped_painter_draws_held_out_prompts_right(tmp_path):
    """Through Omni, as `omni run configs/video.yaml` does, with an MP4 at the end."""
    from omni import Omni
    from omni.files import read_media, write_output

    held_out = [clip for clip in ALL_CLIPS if is_held_out(clip)]
    clips = [*random.Random(1).sample(held_out, 5), RED_CIRCLE]
    with Omni(CONFIGS / "video.yaml") as omni:
        videos = [omni.generate(prompt=write(clip), seed=seed).video for seed, clip in enumerate(clips)]
    assert {(video.frames.shape, video.fps) for video in videos} == {((NUM_FRAMES, SIZE, SIZE, 3), float(FPS))}
    verdicts = [judge(torch.from_numpy(video.frames), clip) for video, clip in zip(videos, clips, strict=True)]
    assert sum(verdict.right for verdict in verdicts) >= len(clips) - 1, verdicts
    write_output(videos[-1], tmp_path / "clip.mp4")
    again = read_media(str(tmp_path / "clip.mp4"), "video")
    assert (again.frames.shape, again.fps) == (videos[-1].frames.shape, videos[-1].fps)
    assert judge(torch.from_numpy(again.frames), RED_CIRCLE).direction
