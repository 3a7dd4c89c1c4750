"""The chat messages of a request, the same for every engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni.errors import StageError
from omni.spec import LlmSpec
from stages.llm.template import fill_template, template_fields


def build_messages(spec: LlmSpec, inputs: Mapping[str, Any], stage: str) -> list[dict[str, str]]:
    """System (when there is one) and user message. Raises StageError for an input that is missing or empty."""
    for name in template_fields(spec.template):
        if name not in inputs or inputs[name] is None or not str(inputs[name]).strip():
            raise StageError(
                stage, f"its input '{name}' is empty", f"give '{name}' a text, or take it off the template"
            )
    messages = [{"role": "system", "content": spec.system}] if spec.system else []
    return [*messages, {"role": "user", "content": fill_template(spec.template, inputs)}]
