"""Measures a painter of clips on prompts that training never saw, and writes quality.json.

    python measure_clips.py --folder FOLDER

draws held-out combinations through the stock pipeline, one call a clip, and judges each.
"""

import argparse
import json
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch
from clips import ALL_CLIPS, NUM_FRAMES, SIZE, Clip, is_held_out, judge, write
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

_SHEET = (
    Clip("red", "circle", "left", "white"),
    Clip("yellow", "triangle", "up", "black"),
    Clip("blue", "square", "right", "gray"),
    Clip("purple", "circle", "down", "cyan"),
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "painter", help="the pipeline")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where quality.json goes")
    parser.add_argument("--count", type=int, default=96, help="clips to draw (96)")
    parser.add_argument("--steps", type=int, default=10, help="num_inference_steps (10)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (2)")
    parser.add_argument("--seed", type=int, default=7, help="of the wordings and the noise")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet into this PNG file")
    return parser.parse_args(arguments)


def draw(pipeline: DiffusionPipeline, prompt: str, seed: int, options: argparse.Namespace) -> Tensor:
    """The clip of a prompt: (frames, 64, 64, 3) uint8."""
    frames = pipeline(
        prompt,
        height=SIZE,
        width=SIZE,
        video_length=NUM_FRAMES,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        clean_caption=False,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
    ).frames[0]
    return (frames.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes quality.json."""
    options = parse_arguments(arguments)
    pipeline = DiffusionPipeline.from_pretrained(options.folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    held_out = [clip for clip in ALL_CLIPS if is_held_out(clip)]
    verdicts, seconds = [], []
    for number in range(options.count):
        clip = held_out[number % len(held_out)]
        prompt = write(clip, random.Random(options.seed + number) if number >= len(held_out) else None)
        started = time.perf_counter()
        verdict = judge(draw(pipeline, prompt, options.seed + number, options), clip)
        seconds.append(time.perf_counter() - started)
        verdicts.append({**asdict(verdict), "right": verdict.right})
        if not verdict.right:
            print(f"  wrong: {prompt}: {verdict}", flush=True)
    report = {
        "clips": options.count,
        "combinations": len(held_out),
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "rates": {name: round(sum(own[name] for own in verdicts) / len(verdicts), 4) for name in verdicts[0]},
        "seconds_per_clip": round(sorted(seconds)[len(seconds) // 2], 3),
    }
    print(json.dumps(report, indent=2), flush=True)
    (options.output / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="ascii")
    if options.sheet:
        rows = [draw(pipeline, write(clip), options.seed, options).transpose(0, 1).flatten(1, 2) for clip in _SHEET]
        Image.fromarray(torch.cat(rows).numpy()).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
