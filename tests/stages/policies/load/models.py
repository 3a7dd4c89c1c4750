"""Tiny transformers models of many architectures, and what it means for two modules to be the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
CLIP = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen2_tied() -> Any:
    import transformers as t

    return t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, tie_word_embeddings=True))


def qwen3() -> Any:
    import transformers as t

    return t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, head_dim=8))


def llama() -> Any:
    import transformers as t

    return t.LlamaForCausalLM(t.LlamaConfig(**TEXT))


def experts_merged() -> Any:
    """Its checkpoint has each expert by itself; the model has all experts in one tensor."""
    import transformers as t

    return t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    )


def experts_renamed() -> Any:
    """Experts that have other names in the checkpoint, too."""
    import transformers as t

    return t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4))


def t5_encoder() -> Any:
    import transformers as t

    return t.T5EncoderModel(t.T5Config(**ENCODER))


def clip_text() -> Any:
    import transformers as t

    return t.CLIPTextModelWithProjection(t.CLIPTextConfig(**CLIP))


def vision_language() -> Any:
    import transformers as t

    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 2,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    }
    text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=1, eos_token_id=2)
    return t.Qwen2_5_VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    build.__name__: build
    for build in (
        qwen2_tied,
        qwen3,
        llama,
        experts_merged,
        experts_renamed,
        t5_encoder,
        clip_text,
        vision_language,
    )
}


def save(name: str, root: Path) -> Path:
    """Save the model with random weights under `root`, once."""
    folder = root / name
    if not folder.exists():
        model = MODELS[name]()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    return folder


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Same class, names, dtypes, values, and ties, of parameters and of buffers, saved or not."""
    assert type(ours) is type(theirs)
    assert not any(module.training for module in ours.modules())
    own, other = (dict(module.named_parameters(remove_duplicate=False)) for module in (ours, theirs))
    for mine, yours in ((own, other), (dict(ours.named_buffers()), dict(theirs.named_buffers()))):
        assert list(mine) == list(yours)
        for name, tensor in mine.items():
            assert tensor.dtype == yours[name].dtype, name
            assert torch.equal(tensor, yours[name]), name
    assert not any(parameter.requires_grad for parameter in own.values())
    assert _ties(own) == _ties(other)


def _ties(parameters: dict[str, torch.nn.Parameter]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    return sorted(names for names in groups.values() if len(names) > 1)
