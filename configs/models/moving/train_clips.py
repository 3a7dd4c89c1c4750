"""Trains the painter of clips on data that it generates, and writes a LattePipeline.

    python train_clips.py --output FOLDER --seconds 2400

The autoencoder is that of the painter of still pictures and is not trained; the text encoder begins as that painter's
first layers. Latents of all clips are made first: they are few, and every step then costs only the models trained.
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from clips import ALL_CLIPS, NUM_FRAMES, SIZE, Clip, draw, is_held_out, write
from diffusers import AutoencoderKL, LattePipeline, LatteTransformer3DModel, UniPCMultistepScheduler
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

_PAINTER = Path(__file__).resolve().parents[1] / "shapes" / "painter"
_END, _PAD = "<|end|>", "<|pad|>"
_EMPTY_PROMPT_RATE = 0.12
"""Part of the prompts replaced by the empty one, which is what guidance is measured against."""
_EMA_DECAY = 0.99
_WORDINGS = 40


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "painter", help="folder to write to")
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the first weights (0)")
    parser.add_argument("--start-from", type=Path, help="folder of an earlier run: go on from its weights")
    parser.add_argument("--variants", type=int, default=3, help="drawings of each clip, a little off each other (3)")
    parser.add_argument("--clips", type=int, help="train on so many of the clips only")
    parser.add_argument("--dim", type=int, default=128, help="width of the denoiser (128)")
    parser.add_argument("--layers", type=int, default=3, help="layers of the denoiser, in space and in time each (3)")
    parser.add_argument("--text-layers", type=int, default=2, help="layers of the text encoder (2)")
    parser.add_argument("--batch", type=int, default=16, help="clips a step (16)")
    parser.add_argument("--steps", type=int, default=100_000, help="most steps")
    parser.add_argument("--seconds", type=float, default=1800, help="most seconds of the steps (1800)")
    parser.add_argument(
        "--high-noise", type=float, default=0.7, help="part of the samples that is close to noise (0.7)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate (0.002)")
    return parser.parse_args(arguments)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The painter's tokenizer, which ends each text with a token, so that an empty one has something to say."""
    core = Tokenizer.from_file(str(_PAINTER / "tokenizer" / "tokenizer.json"))
    core.post_processor = TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, core.token_to_id(_END))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_PAD,
        eos_token=_END,
        padding_side="right",
        model_max_length=120,
        clean_up_tokenization_spaces=False,
    )


def build_text_encoder(num_layers: int) -> Qwen3Model:
    """The first layers of the painter's text encoder."""
    whole = Qwen3Model.from_pretrained(_PAINTER / "text_encoder", dtype=torch.float32)
    config = Qwen3Config.from_dict(
        {**whole.config.to_dict(), "num_hidden_layers": num_layers, "layer_types": ["full_attention"] * num_layers}
    )
    encoder = Qwen3Model(config)
    encoder.load_state_dict(whole.state_dict(), strict=False)
    return encoder


def build_transformer(dim: int, num_layers: int, caption_channels: int) -> LatteTransformer3DModel:
    """The denoiser; its answer begins as zero. Half of its channels are for a variance that is not used."""
    transformer = LatteTransformer3DModel(
        num_attention_heads=dim // 32,
        attention_head_dim=32,
        in_channels=16,
        out_channels=32,
        num_layers=num_layers,
        cross_attention_dim=dim,
        sample_size=SIZE // 8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=caption_channels,
        video_length=NUM_FRAMES,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


@torch.no_grad()
def encode_clips(vae: AutoencoderKL, clips: list[Clip], variants: int, device: str, seed: int) -> dict[Clip, Tensor]:
    """Clip -> its latents (variants, channels, frames, 8, 8) float32; a way back is the way there in reverse."""
    generator = torch.Generator().manual_seed(seed)
    latents: dict[Clip, Tensor] = {}
    started = time.perf_counter()
    for clip in clips:
        forth = {"left": "right", "up": "down"}.get(clip.direction, clip.direction)
        there = Clip(clip.colour, clip.shape, forth, clip.background)
        if there not in latents:
            frames = draw([there] * variants, generator).flatten(0, 1).to(device)
            encoded = torch.cat([vae.encode(part).latent_dist.mean for part in frames.split(32)])
            encoded = encoded.unflatten(0, (variants, NUM_FRAMES)).transpose(1, 2)
            latents[there] = (encoded * vae.config.scaling_factor).cpu()
        latents[clip] = latents[there] if clip == there else latents[there].flip(2)
    print(f"{len(clips)} clips encoded in {time.perf_counter() - started:.0f} s", flush=True)
    return latents


class _Prompts:
    """Tokens of the clips' prompts in several wordings each, by their number, so that no batch needs padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, clips: list[Clip], seed: int) -> None:
        rng = random.Random(seed)
        self._end, self._pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self._by_length: dict[int, list[tuple[int, list[int]]]] = {}
        for row, clip in enumerate(clips):
            texts = {write(clip), *(write(clip, rng) for _ in range(_WORDINGS))}
            for ids in tokenizer(sorted(texts)).input_ids:
                self._by_length.setdefault(len(ids), []).append((row, ids))

    def batch(self, count: int, rng: random.Random) -> tuple[list[int], Tensor, Tensor]:
        """Rows of clips, token ids of their prompts (count, length), and which of them the text encoder sees.

        The denoiser sees the padding of an empty prompt too: the pipeline pads it to the length of the other one.
        """
        lengths = list(self._by_length)
        (length,) = rng.choices(lengths, [len(self._by_length[length]) for length in lengths])
        chosen = rng.choices(self._by_length[length], k=count)
        empty = [self._end] + [self._pad] * (length - 1)
        ids = torch.tensor([empty if rng.random() < _EMPTY_PROMPT_RATE else own for _, own in chosen])
        return [row for row, _ in chosen], ids, (ids != self._pad).long()


def _optimizers(models: tuple[nn.Module, ...]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns from fewer samples, and AdamW for the rest."""
    named = [item for model in models for item in model.named_parameters() if item[1].requires_grad]
    layers = [(name, parameter) for name, parameter in named if "layers." in name or "blocks." in name]
    matrices = [parameter for name, parameter in layers if parameter.ndim == 2 and "table" not in name]
    inside = {id(parameter) for parameter in matrices}
    rest = [parameter for _, parameter in named if id(parameter) not in inside]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _noise_levels(count: int, high_rate: float, draws: torch.Generator) -> Tensor:
    """Noise levels from 0, data, to 1, noise: (count,) float32, a part of them above 0.94.

    Only up there does the prompt decide which way a shape goes; below, it can be seen in what is drawn already.
    """
    middle = torch.sigmoid(1.2 * torch.randn(count, generator=draws) + 0.3)
    high = 1 - 0.06 * torch.rand(count, generator=draws)
    return torch.where(torch.rand(count, generator=draws) < high_rate, high, middle)


def _loss(
    models: tuple[Qwen3Model, LatteTransformer3DModel],
    data: Tensor,
    ids: Tensor,
    read: Tensor,
    high_rate: float,
    draws: torch.Generator,
) -> Tensor:
    """The error of the predicted way from data (clips, channels, frames, 8, 8) to noise, at random noise levels."""
    text_encoder, transformer = models
    noise = torch.randn(data.shape, generator=draws).to(data.device)
    level = _noise_levels(len(data), high_rate, draws).to(data.device)
    noisy = torch.lerp(data, noise, level[:, None, None, None, None])
    with torch.autocast(data.device.type, torch.bfloat16):
        text = text_encoder(ids, attention_mask=read, use_cache=False)[0]
        answer = transformer(noisy, level * 1000, text, return_dict=False)[0]
    return F.mse_loss(answer[:, : data.shape[1]].float(), noise - data)


def train(
    models: tuple[Qwen3Model, LatteTransformer3DModel],
    prompts: _Prompts,
    latents: Tensor,
    options: argparse.Namespace,
) -> None:
    """Flow matching on `latents` (clips, variants, channels, frames, 8, 8); the models end as moving averages."""
    for model in models:
        model.to(options.device).train()
    parameters = [parameter for model in models for parameter in model.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizers = _optimizers(models)
    rng, draws = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    started, shown_at, recent = time.perf_counter(), 0.0, []
    for step in range(options.steps):
        progress = max(step / options.steps, (time.perf_counter() - started) / options.seconds)
        if progress >= 1:
            break
        rate = options.lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * min(1, 2 * (1 - progress)))
        rows, ids, read = prompts.batch(options.batch, rng)
        variants = torch.randint(latents.shape[1], (options.batch,), generator=draws)
        data = latents[torch.tensor(rows), variants].to(options.device)
        loss = _loss(models, data, ids.to(options.device), read.to(options.device), options.high_noise, draws)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weight = 1 - min(_EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], weight)
        recent.append(loss.item())
        if progress >= shown_at:
            seconds = time.perf_counter() - started
            print(f"step {step + 1}, {progress:.0%}, {seconds:.0f} s, loss {sum(recent) / len(recent):.4f}", flush=True)
            shown_at, recent = progress + 0.02, []
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)


def main(arguments: list[str] | None = None) -> None:
    """Trains and writes what the command line asks for."""
    options = parse_arguments(arguments)
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(_PAINTER / "vae", dtype=torch.float32).to(options.device).eval()
    clips = [clip for clip in ALL_CLIPS if not is_held_out(clip)][: options.clips]
    by_clip = encode_clips(vae, clips, options.variants, options.device, options.seed)
    latents = torch.stack([by_clip[clip] for clip in clips])
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(options.text_layers)
    transformer = build_transformer(options.dim, options.layers, text_encoder.config.hidden_size)
    if options.start_from:
        loaded = LattePipeline.from_pretrained(options.start_from, dtype=torch.float32)
        text_encoder.load_state_dict(loaded.text_encoder.state_dict())
        transformer.load_state_dict(loaded.transformer.state_dict())
    train((text_encoder, transformer), _Prompts(tokenizer, clips, options.seed), latents, options)
    parts = {"vae": vae, "text_encoder": text_encoder, "transformer": transformer}
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    pipeline = LattePipeline(
        tokenizer=tokenizer,
        scheduler=scheduler,
        **{name: part.to("cpu", torch.bfloat16).eval() for name, part in parts.items()},
    )
    vae.register_to_config(_name_or_path="")  # where it was read from is a path of this machine
    pipeline.save_pretrained(options.output)


if __name__ == "__main__":
    main()
