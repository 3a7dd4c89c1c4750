"""Measures the painter and the captioner of a folder on what training never saw, and writes quality.json.

    python measure.py --folder FOLDER --device cpu

draws held-out combinations through the stock pipeline and judges each picture; asks the captioner held-out prompts.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from check import Verdict, judge
from diffusers import DiffusionPipeline
from PIL import Image
from prompts import sample_held_out_prompt
from render import RESOLUTION
from sampling import sample_scene
from scenes import CaptionError, Scene, is_held_out, parse, write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

_SHEET_CAPTIONS = (
    "a small blue circle on a white background",
    "a large red circle on a white background",
    "a small red circle at the top, a small yellow circle in the center and a small green circle at the bottom "
    "on a black background",
    "a medium orange circle in the center and a large blue band at the bottom on a pink background",
    "a large white circle at the bottom, a medium white circle in the center and a small white circle at the top "
    "on a cyan background",
    "a large red circle in the center, a medium white circle in the center and a small red circle in the center "
    "on a blue background",
    "a small green star in the top left corner on a navy background",
    "a large pink heart on a purple background",
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="holds painter and captioner")
    parser.add_argument("--output", type=Path, help="where quality.json goes (the same folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    parser.add_argument("--count", type=int, default=240, help="scenes to draw (240)")
    parser.add_argument("--prompts", type=int, default=600, help="prompts to ask the captioner (600)")
    parser.add_argument("--steps", type=int, default=20, help="num_inference_steps (20)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="guidance scales to try (2)")
    parser.add_argument("--shift", type=float, help="the noise scheduler's shift, instead of the folder's")
    parser.add_argument("--batch", type=int, default=8, help="pictures a call (8)")
    parser.add_argument("--seed", type=int, default=7, help="of the scenes, the prompts and the noise")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet into this PNG file")
    return parser.parse_args(arguments)


def sample_held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes with a combination that training never saw: half of one shape, a quarter each of two and of three."""
    rng = random.Random(seed)
    scenes = []
    while len(scenes) < count:
        scene = sample_scene(rng, (1, 2, 1, 3)[len(scenes) % 4])
        if is_held_out(scene):
            scenes.append(scene)
    return scenes


def draw_all(pipeline: DiffusionPipeline, captions: list[str], options: argparse.Namespace, guidance: float) -> Tensor:
    """Pictures of captions, each from its own seed: (captions, 128, 128, 3) uint8."""
    pictures = []
    for start in range(0, len(captions), options.batch):
        own = captions[start : start + options.batch]
        generators = [torch.Generator("cpu").manual_seed(options.seed + start + i) for i in range(len(own))]
        drawn = pipeline(
            own,
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=options.steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        pictures.append((drawn.float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(pictures)


def _rates(verdicts: list[Verdict]) -> dict[str, float]:
    """Parts of the pictures in which each judgement is right."""
    names = ("right", "background", "colours", "places", "kinds")
    return {name: round(sum(getattr(v, name) for v in verdicts) / len(verdicts), 4) for name in names}


def measure_painter(pipeline: DiffusionPipeline, options: argparse.Namespace, guidance: float) -> dict:
    """Quality on held-out scenes: rates over all of them, and the rate of right ones by number of shapes."""
    scenes = sample_held_out_scenes(options.count, options.seed)
    captions = [write(scene, random.Random(options.seed + i)) for i, scene in enumerate(scenes)]
    started = time.perf_counter()
    pictures = draw_all(pipeline, captions, options, guidance)
    seconds = time.perf_counter() - started
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    for verdict, caption in zip(verdicts, captions, strict=True):
        if not verdict.right:
            print(f"  wrong: {caption}: {verdict}")
    by_count = {}
    for count in (1, 2, 3):
        chosen = [v for v, s in zip(verdicts, scenes, strict=True) if len(s.shapes) == count]
        by_count[count] = round(sum(v.right for v in chosen) / max(len(chosen), 1), 4)
    return {
        "scenes": len(scenes),
        "num_inference_steps": options.steps,
        "guidance_scale": guidance,
        "rates": _rates(verdicts),
        "right_by_number_of_shapes": by_count,
        "seconds_per_picture_in_batches": round(seconds / len(scenes), 3),
    }


def time_one_call(pipeline: DiffusionPipeline, options: argparse.Namespace) -> float:
    """Seconds of one call for one picture, after a first call that warms up: the median of three."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        draw_all(pipeline, list(_SHEET_CAPTIONS[:1]), options, options.guidance[0])
        seconds.append(time.perf_counter() - started)
    return round(sorted(seconds[1:])[1], 3)


def measure_captioner(folder: Path, options: argparse.Namespace) -> dict:
    """Parts of the held-out prompts that are answered by a valid caption, and by the right scene."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).to(options.device).eval()
    rng = random.Random(options.seed)
    asked = [sample_held_out_prompt(rng) for _ in range(options.prompts)]
    valid, right = [], []
    for start in range(0, len(asked), 100):
        own = asked[start : start + 100]
        chats = [[{"role": "user", "content": prompt}] for prompt, _, _ in own]
        inputs = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "left"},
        ).to(options.device)
        answers = model.generate(**inputs)[:, inputs.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        for (prompt, caption, _), text in zip(own, texts, strict=True):
            try:
                scene = parse(text)
            except CaptionError:
                scene = None
            valid.append(scene is not None)
            right.append(scene == parse(caption))
            if not right[-1]:
                print(f"  wrong: {prompt!r}: {text!r} instead of {caption!r}")
    sources = [source for _, _, source in asked]
    by_source = {
        name: round(sum(r for r, s in zip(right, sources, strict=True) if s == name) / sources.count(name), 4)
        for name in sorted(set(sources))
    }
    rate = {"valid": round(sum(valid) / len(valid), 4), "right": round(sum(right) / len(right), 4)}
    return {"prompts": len(asked), "rates": rate, "right_by_source": by_source}


def main(arguments: list[str] | None = None) -> None:
    """Measures both models and writes quality.json."""
    options = parse_arguments(arguments)
    dtype = getattr(torch, options.dtype)
    report = {"device": options.device, "dtype": options.dtype, "seed": options.seed}
    if options.prompts:
        report["captioner"] = measure_captioner(options.folder / "captioner", options)
        print(json.dumps(report["captioner"], indent=2), flush=True)
    if options.count:
        pipeline = DiffusionPipeline.from_pretrained(options.folder / "painter", dtype=dtype).to(options.device)
        pipeline.set_progress_bar_config(disable=True)
        if options.shift:
            pipeline.scheduler.register_to_config(shift=options.shift)
            pipeline.scheduler.set_shift(options.shift)
        report["seconds_per_call_of_one_picture"] = time_one_call(pipeline, options)
        report["painter"] = [measure_painter(pipeline, options, guidance) for guidance in options.guidance]
        print(json.dumps(report["painter"], indent=2), flush=True)
        if options.sheet:
            pictures = draw_all(pipeline, list(_SHEET_CAPTIONS), options, options.guidance[0])
            rows = pictures.view(2, 4, RESOLUTION, RESOLUTION, 3).permute(0, 2, 1, 3, 4)
            Image.fromarray(rows.reshape(2 * RESOLUTION, 4 * RESOLUTION, 3).numpy()).save(options.sheet, optimize=True)
    output = options.output or options.folder
    (output / "quality.json").write_text(json.dumps(report, indent=2) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
