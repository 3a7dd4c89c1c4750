"""How a language model works in a request, and what it takes beside its weights. Light: no torch here."""

from __future__ import annotations

from typing import Any

from omni.checkpoint import CheckpointFacts
from omni.component_facts import FLOAT_SIZES, auto_dtype
from omni.memory import ComponentUse
from omni.spec import LlmSpec

BATCH_REQUESTS = 16
"""Requests for whose prompts and answers the batch's cache has room; more wait for their turn."""
PROMPT_TOKENS = 512
"""Length of a usual prompt, for the size of that cache; a batch takes twice as many tokens at once."""
VALUES = 16
"""Hidden states' worth of values that a block holds at its peak."""


def uses(spec: LlmSpec, facts: CheckpointFacts) -> dict[str, ComponentUse]:
    """The model runs once a token. It takes its cache of keys and values, one batch's hidden states, and the logits."""
    size = FLOAT_SIZES.get(auto_dtype("cuda") if spec.dtype == "auto" else spec.dtype, 2)
    found = {}
    for name in facts.components:
        config = facts.part(name).config
        config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        tokens = BATCH_REQUESTS * (PROMPT_TOKENS + spec.sampling.max_new_tokens)
        cache = tokens * _int(config, "num_hidden_layers") * 2 * _kv_width(config)
        batch = 2 * PROMPT_TOKENS * (VALUES * _int(config, "hidden_size") + _int(config, "vocab_size"))
        taken = (cache + batch) * size
        found[name] = ComponentUse(num_runs=spec.sampling.max_new_tokens, activation_bytes=taken)
    return found


def _kv_width(config: dict[str, Any]) -> int:
    """Values that a layer keeps of a token, keys only."""
    heads = _int(config, "num_attention_heads")
    width = _int(config, "head_dim") or (_int(config, "hidden_size") // heads if heads else 0)
    return (_int(config, "num_key_value_heads") or heads) * width


def _int(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0
