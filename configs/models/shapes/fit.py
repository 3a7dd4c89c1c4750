"""The three training loops: autoencoder, painter (text encoder and denoiser together), captioner."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from data import PromptBank, SceneBank
from diffusers import AutoencoderKL
from models import BatchedDenoiser, chat
from render import jitter, paint
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM, Qwen3Model

_KL_WEIGHT = 2e-4
_EMPTY_PROMPT_RATE = 0.12
"""Part of the captions replaced by the empty prompt, which is what guidance is measured against."""
_EMA_DECAY = 0.999
_NUM_UNTIMED_STEPS = 20


@dataclass
class Budget:
    """How long a loop runs: until its steps or its seconds are used up, whichever comes first."""

    num_steps: int
    seconds: float
    batch_size: int
    deadline: float = float("inf")
    """The reading of time.perf_counter() at which the loop ends in any case."""
    step: int = 0
    started: float = field(default_factory=time.perf_counter)

    def progress(self) -> float:
        """From 0 at the start to 1 at the end; the learning rate follows it."""
        # The first steps compile; their seconds say nothing about the rest.
        if self.step <= _NUM_UNTIMED_STEPS:
            self.started = time.perf_counter()
        seconds = min(self.seconds, self.deadline - self.started)
        return max(self.step / self.num_steps, (time.perf_counter() - self.started) / seconds) if seconds > 0 else 1.0

    def run(self, name: str, optimizer: torch.optim.Optimizer, peak: float) -> Iterator[dict]:
        """Yields a dict for the loop to put its losses into, sets the learning rate, and prints the progress."""
        shown = 0.0
        while (progress := self.progress()) < 1:
            warm = min((self.step + 1) / min(300, self.num_steps), 1)
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
            losses: dict[str, Tensor] = {}
            yield losses
            self.step += 1
            if progress >= shown:
                shown = progress + 0.04
                values = " ".join(f"{key} {value.detach().item():.5f}" for key, value in losses.items())
                elapsed = time.perf_counter() - self.started
                print(f"{name}: step {self.step}, {progress:.0%}, {elapsed:.0f} s, {values}", flush=True)


def _precision(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on an accelerator, plain float32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def _adamw(modules: list[nn.Module], device: torch.device) -> torch.optim.AdamW:
    """AdamW over all parameters of some modules."""
    parameters = [p for module in modules for p in module.parameters()]
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type != "cpu")


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimizer step with the gradient's norm limited to 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def _pick(banks: dict[int, object], shares: Tensor, generator: torch.Generator) -> int:
    """A padded length, drawn by how many samples have it."""
    return list(banks)[int(torch.multinomial(shares, 1, generator=generator))]


def fit_vae(vae: AutoencoderKL, bank: SceneBank, device: torch.device, budget: Budget, compiled: bool) -> None:
    """Trains the autoencoder on pictures drawn on the fly; it ends with latents of mean 0 and deviation 1."""
    vae.to(device, memory_format=torch.channels_last).train()
    generator = torch.Generator(device).manual_seed(1)
    shapes, colours = bank.shapes.to(device), bank.colours.to(device)
    optimizer = _adamw([vae], device)

    def compute_losses(pictures: Tensor) -> tuple[Tensor, Tensor]:
        with _precision(device):
            posterior = vae.encode(pictures).latent_dist
            restored = vae.decode(posterior.sample()).sample
        error = F.l1_loss(restored.float(), pictures) + F.mse_loss(restored.float(), pictures)
        return error, posterior.kl().mean() / posterior.mean[0].numel()

    step = torch.compile(compute_losses, dynamic=False) if compiled else compute_losses
    for losses in budget.run("vae", optimizer, 8e-4):
        rows = torch.randint(len(shapes), (budget.batch_size,), device=device, generator=generator)
        pictures = paint(*jitter(shapes[rows], colours[rows], generator))
        error, divergence = step(pictures.contiguous(memory_format=torch.channels_last))
        _update(optimizer, error + _KL_WEIGHT * divergence)
        losses |= {"error": error, "divergence": divergence}
    vae.eval()


@torch.no_grad()
def encode_bank(vae: AutoencoderKL, bank: SceneBank, device: torch.device, seed: int) -> Tensor:
    """Latents of every scene of a bank, one jittered picture each: (scenes, channels, 16, 16) float16 on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, len(bank.shapes), 1024):
        shapes, colours = (x[start : start + 1024].to(device) for x in (bank.shapes, bank.colours))
        pictures = paint(*jitter(shapes, colours, generator)).contiguous(memory_format=torch.channels_last)
        with _precision(device):
            parts.append(vae.encode(pictures).latent_dist.mode().half())
    return torch.cat(parts).contiguous()


class _Average:
    """An exponential moving average of parameters."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        self.values = [p.detach().clone() for p in self.parameters]

    def update(self, step: int) -> None:
        """Moves the average towards the parameters; early on it follows them closely."""
        weight = 1 - min(_EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], weight)

    @torch.no_grad()
    def copy_back(self) -> None:
        """Puts the average into the models."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)


def _noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels from 0, data, to 1, noise: (count,) float32, half of them uniform, half around the middle."""
    device = generator.device
    uniform = torch.rand(count, device=device, generator=generator)
    middle = torch.sigmoid(torch.randn(count, device=device, generator=generator))
    return torch.where(torch.rand(count, device=device, generator=generator) < 0.5, uniform, middle)


def fit_painter(
    models: tuple[Qwen3Model, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    banks: dict[int, SceneBank],
    latents: dict[int, Tensor],
    budget: Budget,
    peak: float,
    compiled: bool,
) -> None:
    """Trains text encoder and denoiser by flow matching; `latents` are normalised and lie on the device."""
    device = next(iter(latents.values())).device
    text_encoder, transformer = (model.to(device).train() for model in models)
    denoiser = BatchedDenoiser(transformer)
    if compiled:
        denoiser.compile_blocks()
    token_ids = {length: bank.token_ids.to(device) for length, bank in banks.items()}
    num_tokens = {length: bank.num_tokens.to(device) for length, bank in banks.items()}
    empty = tokenizer(chat("")).input_ids
    shortest = min(banks)
    empty_ids = F.pad(torch.tensor(empty, device=device), (0, shortest - len(empty)), value=tokenizer.pad_token_id)
    optimizer, average = _adamw(list(models), device), _Average(list(models))
    generator, choice = torch.Generator(device).manual_seed(2), torch.Generator().manual_seed(2)
    shares = torch.tensor([float(len(bank.shapes)) for bank in banks.values()])
    count = budget.batch_size

    for losses in budget.run("painter", optimizer, peak):
        length = _pick(banks, shares, choice)
        rows = torch.randint(len(latents[length]), (count,), device=device, generator=generator)
        data, ids, own = latents[length][rows].float(), token_ids[length][rows].long(), num_tokens[length][rows]
        if length == shortest:
            dropped = torch.rand(count, device=device, generator=generator) < _EMPTY_PROMPT_RATE
            ids = torch.where(dropped[:, None], empty_ids, ids)
            own = torch.where(dropped, len(empty), own)
        noise = torch.randn(data.shape, device=device, generator=generator)
        level = _noise_levels(count, generator)
        noisy = torch.lerp(data, noise, level[:, None, None, None])
        with _precision(device):
            text = text_encoder(ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
            predicted = denoiser(noisy, 1 - level, text, own)
        loss = F.mse_loss(predicted.float(), data - noise)
        _update(optimizer, loss)
        average.update(budget.step)
        losses["loss"] = loss
    average.copy_back()


def fit_captioner(model: Qwen3ForCausalLM, banks: dict[int, PromptBank], device: torch.device, budget: Budget) -> None:
    """Trains the captioner on the answers; the prompts themselves are not predicted."""
    model.to(device).train()
    optimizer = _adamw([model], device)
    choice = torch.Generator().manual_seed(3)
    shares = torch.tensor([float(len(bank.token_ids)) for bank in banks.values()])
    for losses in budget.run("captioner", optimizer, 2e-3):
        bank = banks[_pick(banks, shares, choice)]
        rows = torch.randint(len(bank.token_ids), (budget.batch_size,), generator=choice)
        token_ids, labels = bank.token_ids[rows].to(device).long(), bank.labels[rows].to(device).long()
        with _precision(device):
            logits = model(token_ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        _update(optimizer, loss)
        losses["loss"] = loss
    model.eval()
