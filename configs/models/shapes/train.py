"""Trains everything in this folder on data that it generates: autoencoder, painter and captioner.

    python train.py --output FOLDER --device cuda --seed 0 --scale full

writes FOLDER/painter, a diffusers pipeline, and FOLDER/captioner, a transformers model.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from data import build_prompt_banks, build_scene_banks, sample_texts
from diffusers import ZImagePipeline
from fit import Budget, encode_bank, fit_captioner, fit_painter, fit_vae
from models import (
    SCALES,
    build_captioner,
    build_noise_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    wrap_tokenizer,
)
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3ForCausalLM, set_seed

_STEPS = {"tiny": (3, 3, 3), "full": (6000, 40_000, 6000)}
_BATCHES = {"tiny": (2, 4, 4), "full": (96, 512, 512)}
_SAMPLES = {"tiny": (64, 64), "full": (400_000, 400_000)}
PARTS = ("vae", "painter", "captioner")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to (this one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the first weights (0)")
    parser.add_argument("--scale", choices=SCALES, default="full", help="tiny only shows that everything runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to train (all)")
    parser.add_argument("--start-from", type=Path, help="folder of an earlier run: go on from its weights")
    parser.add_argument("--samples", type=int, help="scenes for the painter; the default goes with the scale")
    parser.add_argument("--painter-lr", type=float, default=1e-3, help="the painter's highest learning rate")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that make data; 0: this one")
    parser.add_argument("--compile", action="store_true", help="fuse kernels with torch.compile: faster on a GPU")
    parser.add_argument("--shift", type=float, default=1.0, help="the noise scheduler's shift (1)")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no part goes on")
    for index, part in enumerate(PARTS):
        steps = ", ".join(f"{scale}: {counts[index]}" for scale, counts in _STEPS.items())
        parser.add_argument(f"--{part}-steps", type=int, help=f"most steps ({steps})")
        parser.add_argument(f"--{part}-seconds", type=float, default=float("inf"), help="most seconds (no limit)")
        parser.add_argument(f"--{part}-batch", type=int, help="samples a step; the default goes with the scale")
    return parser.parse_args(arguments)


def _budget(options: argparse.Namespace, part: str) -> Budget:
    """The budget that the command line gives a part."""
    index = PARTS.index(part)
    values = vars(options)
    num_steps = values[f"{part}_steps"] or _STEPS[options.scale][index]
    batch_size = values[f"{part}_batch"] or _BATCHES[options.scale][index]
    return Budget(num_steps, values[f"{part}_seconds"], batch_size, options.deadline)


def train_painter(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
    """Trains the autoencoder if asked to, then the painter, and writes the pipeline."""
    scale, device = SCALES[options.scale], torch.device(options.device)
    count = options.samples or _SAMPLES[options.scale][0]
    banks = build_scene_banks(tokenizer, count, options.seed, options.workers)
    print(f"scenes: { {length: len(bank.shapes) for length, bank in banks.items()} }", flush=True)
    vae, transformer = build_vae(scale), build_transformer(scale)
    text_encoder = build_text_encoder(scale, len(tokenizer))
    if options.start_from:
        loaded = ZImagePipeline.from_pretrained(options.start_from / "painter", dtype=torch.float32)
        vae.register_to_config(**{key: loaded.vae.config[key] for key in ("shift_factor", "scaling_factor")})
        for name, part in (("vae", vae), ("transformer", transformer), ("text_encoder", text_encoder)):
            part.load_state_dict(getattr(loaded, name).state_dict())
    if "vae" in options.parts:
        fit_vae(vae, banks[min(banks)], device, _budget(options, "vae"), options.compile)
    vae.to(device)
    latents = {length: encode_bank(vae, bank, device, options.seed + length) for length, bank in banks.items()}
    sample = next(iter(latents.values()))[:20_000].float()
    if "vae" in options.parts:
        vae.register_to_config(shift_factor=float(sample.mean()), scaling_factor=float(1 / sample.std()))
    shift, scaling = vae.config.shift_factor, vae.config.scaling_factor
    latents = {length: ((own.float() - shift) * scaling).half() for length, own in latents.items()}
    print(f"latents: shift {shift:.4f}, scaling {scaling:.4f}", flush=True)
    if "painter" in options.parts:
        models, budget = (text_encoder, transformer), _budget(options, "painter")
        fit_painter(models, tokenizer, banks, latents, budget, options.painter_lr, options.compile)
    parts = {"vae": vae, "text_encoder": text_encoder, "transformer": transformer}
    parts = {name: part.to("cpu", torch.bfloat16).eval() for name, part in parts.items()}
    # Convolution weights may be laid out channels last, which a safetensors file cannot hold.
    for parameter in parts["vae"].parameters():
        parameter.data = parameter.data.contiguous()
    noise_scheduler = build_noise_scheduler(options.shift)
    ZImagePipeline(noise_scheduler, tokenizer=tokenizer, **parts).save_pretrained(options.output / "painter")


def train_captioner(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
    """Trains the captioner and writes it with its tokenizer."""
    count = _SAMPLES[options.scale][1]
    banks = build_prompt_banks(tokenizer, count, options.seed, options.workers)
    print(f"prompts: { {length: len(bank.token_ids) for length, bank in banks.items()} }", flush=True)
    model = build_captioner(SCALES[options.scale], len(tokenizer))
    if options.start_from:
        loaded = Qwen3ForCausalLM.from_pretrained(options.start_from / "captioner", dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
    fit_captioner(model, banks, torch.device(options.device), _budget(options, "captioner"))
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = options.output / "captioner"
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    """Trains what the command line asks for."""
    options = parse_arguments(arguments)
    started = time.perf_counter()
    options.deadline += started
    set_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    if options.start_from:
        tokenizer = wrap_tokenizer(Tokenizer.from_file(str(options.start_from / "painter/tokenizer/tokenizer.json")))
    else:
        texts = sample_texts(2000 if options.scale == "tiny" else 40_000, options.seed)
        tokenizer = build_tokenizer(texts, SCALES[options.scale].vocab_size)
    if {"vae", "painter"} & set(options.parts):
        train_painter(options, tokenizer)
    if "captioner" in options.parts:
        train_captioner(options, tokenizer)
    print(f"wrote {options.output} in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
