"""What a language model takes beside its weights."""

from __future__ import annotations

import pytest

from omni.checkpoint import CheckpointFacts
from omni.component_facts import ComponentFacts
from omni.spec import LlmSpec, SamplingSpec
from stages.llm.memory import uses

CONFIG = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 64,
    "vocab_size": 100,
}  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, {"text_config": CONFIG}])
def test_cache_hidden_states_and_logits(config: dict[str, object]) -> None:
    facts = CheckpointFacts({"model": 8}, parts={"model": ComponentFacts({"BF16": 8}, config=config)})
    spec = LlmSpec(model="m", dtype="bfloat16", sampling=SamplingSpec(max_new_tokens=88))
    use = uses(spec, facts)["model"]
    assert use.num_runs == 88
    assert use.activation_bytes == 2 * (16 * 600 * 2 * 2 * (2 * 8) + 1024 * (16 * 64 + 100))


def test_without_a_config() -> None:
    assert uses(LlmSpec(model="m"), CheckpointFacts({"model": 8}))["model"].activation_bytes == 0
