"""The models' shapes and tokenizer, and a batched forward of the denoiser for training."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

PAD, END, USER, ASSISTANT, SYSTEM = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT_MULTIPLE = 32
"""The denoiser pads each caption to a multiple of this many tokens."""
PATCH = 2


@dataclass(frozen=True)
class Scale:
    """Sizes of all models; heads divide by two and four, so that tensor and context parallelism can split them."""

    vae_channels: tuple[int, ...]
    vae_groups: int
    latent_channels: int
    dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_layers: int
    captioner_layers: int
    vocab_size: int


SCALES = {
    "tiny": Scale((8, 8, 8, 8), 4, 4, 48, 4, 1, 32, 2, 1, 384),
    "full": Scale((32, 64, 96, 96), 8, 16, 192, 8, 6, 192, 3, 4, 768),
}


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from texts; any string can be encoded."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return wrap_tokenizer(core)


def wrap_tokenizer(core: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with this folder's special tokens and chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        padding_side="right",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def chat(prompt: str) -> str:
    """A prompt as the chat template writes it for a turn of the assistant."""
    return f"{USER}{prompt}{END}{ASSISTANT}"


def build_vae(scale: Scale) -> AutoencoderKL:
    """An 8x autoencoder: (batch, 3, 128, 128) to (batch, latent_channels, 16, 16)."""
    levels = len(scale.vae_channels)
    return AutoencoderKL(
        block_out_channels=scale.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=scale.vae_groups,
        latent_channels=scale.latent_channels,
        sample_size=128,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def build_transformer(scale: Scale) -> ZImageTransformer2DModel:
    """The denoiser. It starts as the identity: every gate and the last layer are zero."""
    head_dim = scale.dim // scale.num_heads
    axis = head_dim // 3 // 2 * 2
    transformer = ZImageTransformer2DModel(
        in_channels=scale.latent_channels,
        dim=scale.dim,
        n_layers=scale.num_layers,
        n_refiner_layers=1,
        n_heads=scale.num_heads,
        n_kv_heads=scale.num_heads,
        cap_feat_dim=scale.text_dim,
        axes_dims=[head_dim - 2 * axis, axis, axis],
        axes_lens=[512, 64, 64],
    )
    for block in (*transformer.noise_refiner, *transformer.layers):
        nn.init.zeros_(block.adaLN_modulation[0].weight)
        nn.init.zeros_(block.adaLN_modulation[0].bias)
    for layer in transformer.all_final_layer.values():
        nn.init.zeros_(layer.linear.weight)
        nn.init.zeros_(layer.linear.bias)
    return transformer


def _qwen_config(scale: Scale, vocab_size: int, num_layers: int) -> Qwen3Config:
    """A small Qwen3; token 0 pads and token 1 ends a turn."""
    head_dim = 32
    num_heads = scale.text_dim // head_dim
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=scale.text_dim,
        intermediate_size=scale.text_dim * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(num_heads // 2, 1),
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def build_text_encoder(scale: Scale, vocab_size: int) -> Qwen3Model:
    """The painter's text encoder; the pipeline reads the states before its last layer."""
    return Qwen3Model(_qwen_config(scale, vocab_size, scale.text_layers))


def build_captioner(scale: Scale, vocab_size: int) -> Qwen3ForCausalLM:
    """The causal language model that rewrites loose prompts."""
    return Qwen3ForCausalLM(_qwen_config(scale, vocab_size, scale.captioner_layers))


def build_noise_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Flow matching with a fixed shift of the noise levels towards the noisy end."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)


class _RealRotaryProcessor:
    """The stock attention with its rotation in real numbers, which torch.compile can fuse."""

    def __call__(self, attn, hidden_states: Tensor, attention_mask=None, freqs_cis: Tensor = None, **_) -> Tensor:
        """Attention over (batch, tokens, dim); freqs_cis (tokens, head_dim / 2, 2) holds cosines and sines."""
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        cos, sin = freqs_cis[:, None].unbind(-1)

        def rotate(x: Tensor) -> Tensor:
            real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
            return rotated.flatten(-2).to(value.dtype)

        query, key = rotate(attn.norm_q(query)), rotate(attn.norm_k(key))
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


class BatchedDenoiser(nn.Module):
    """The transformer's forward on whole tensors: what the stock one computes for captions of one padded length.

    The stock forward walks through lists, sample by sample, which would cost more than the arithmetic in training.
    """

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
            block.attention.set_processor(_RealRotaryProcessor())

    def compile_blocks(self) -> None:
        """Fuses each block's kernels; blocks of one kind share the compiled code, which keeps the wait short."""
        model = self.transformer
        for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
            block.compile(dynamic=False)

    def _rotations(self, positions: Tensor) -> Tensor:
        """Cosines and sines at positions (tokens, 3) int: (tokens, head_dim / 2, 2) float32."""
        model, parts = self.transformer, []
        for axis, dim in enumerate(model.axes_dims):
            steps = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
            angles = positions[:, axis, None] * model.rope_theta ** (-steps / dim)
            parts.append(torch.stack((angles.cos(), angles.sin()), -1))
        return torch.cat(parts, 1)

    def _positions(self, length: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of caption tokens (length, 3) and of patches (height * width, 3): the caption comes first."""
        caption = torch.zeros(length, 3, device=device)
        caption[:, 0] = torch.arange(1, length + 1, device=device)
        rows, columns = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        patches = torch.stack((torch.full_like(rows, length + 1), rows, columns), -1).flatten(0, 1)
        return caption, patches.float()

    def forward(self, latents: Tensor, time: Tensor, text: Tensor, num_tokens: Tensor) -> Tensor:
        """Predicts data minus noise.

        latents (batch, channels, height, width); time (batch,) from 0, noise, to 1, data; text (batch, length, text
        dim) with length a multiple of 32; num_tokens (batch,) int: how many of them are the caption's own.
        """
        model = self.transformer
        batch, channels, height, width = latents.shape
        rows, columns, length = height // PATCH, width // PATCH, text.shape[1]
        adaln = model.t_embedder(time * model.t_scale)
        caption_positions, patch_positions = self._positions(length, rows, columns, latents.device)
        caption_freqs, patch_freqs = self._rotations(caption_positions), self._rotations(patch_positions)

        patches = latents.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))
        x = model.all_x_embedder["2-1"](patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1))
        for block in model.noise_refiner:
            x = block(x, None, patch_freqs, adaln)

        padding = torch.arange(length, device=text.device)[None] >= num_tokens[:, None]
        caption = torch.where(padding[..., None], model.cap_pad_token, model.cap_embedder(text))
        for block in model.context_refiner:
            caption = block(caption, None, caption_freqs)

        x = torch.cat((x, caption), 1)
        freqs = torch.cat((patch_freqs, caption_freqs), 0)
        for block in model.layers:
            x = block(x, None, freqs, adaln)
        x = model.all_final_layer["2-1"](x, c=adaln)[:, : rows * columns]
        x = x.view(batch, rows, columns, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, channels, height, width)
