"""The stage kind `llm`: a causal language model that fills a template and answers in text. Light: no torch here."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from omni.errors import Mistake
from omni.model_paths import is_path, missing_folder, resolve_model_path
from omni.registry import CheckpointRef, Port, Ports, StageKind
from omni.spec import LlmSpec
from omni.stage import Stage, StageContext
from stages.llm.memory import uses
from stages.llm.template import template_fields


def ports(spec: LlmSpec, base_dir: str) -> Ports:
    """One required text input for each name in a template without faults (`check`)."""
    fields = template_fields(spec.template)
    return Ports(inputs={name: Port("text", required=True) for name in fields}, outputs={"text": Port("text")})


def check(spec: LlmSpec, base_dir: str) -> list[Mistake]:
    """Faults that can be seen without loading the model."""
    mistakes = []
    try:
        template_fields(spec.template)
    except ValueError as error:
        mistakes.append(Mistake("template", str(error)))
    if not spec.template.strip():
        mistakes.append(Mistake("template", "is empty; write the user message, for example {prompt}"))
    if "" in spec.sampling.stop:
        mistakes.append(Mistake("sampling.stop", "holds an empty text, which would end every answer at once"))
    return mistakes + (_check_server(spec) if spec.engine == "openai" else _check_local(spec, base_dir))


def checkpoint(spec: LlmSpec) -> CheckpointRef | None:
    """The model's checkpoint; None when a server holds the model."""
    return CheckpointRef(spec.model, spec.revision) if spec.engine == "transformers" else None


def build_stage(context: StageContext) -> Stage:
    """The stage of the spec's engine."""
    spec = context.spec
    assert isinstance(spec, LlmSpec)
    if spec.engine == "openai":
        from stages.llm.openai import OpenAiStage

        return OpenAiStage(context)
    from stages.llm.stage import LlmStage

    return LlmStage(context)


def _check_server(spec: LlmSpec) -> list[Mistake]:
    if not spec.base_url:
        return [Mistake("base_url", "is needed with engine 'openai', for example http://localhost:8000/v1")]
    try:
        url = urlsplit(spec.base_url)
        host, _ = url.hostname, url.port
    except ValueError as error:
        return [Mistake("base_url", f"'{spec.base_url}' is not an address: {error}")]
    if url.scheme not in ("http", "https") or not host:
        return [Mistake("base_url", f"'{spec.base_url}' must be like http://localhost:8000/v1 or https://HOST/v1")]
    if url.username or url.password or url.query:
        return [Mistake("base_url", "must hold no key or query; name the variable with the key: api_key_env")]
    return []


def _check_local(spec: LlmSpec, base_dir: str) -> list[Mistake]:
    mistakes = [
        Mistake(key, "is for engine 'openai' only; set engine: openai, or remove it")
        for key in ("base_url", "api_key_env")
        if getattr(spec, key)
    ]
    folder = resolve_model_path(spec.model, base_dir)
    if not os.path.isdir(folder):
        if is_path(spec.model):
            mistakes.append(Mistake("model", missing_folder(spec.model, base_dir)))
        return mistakes
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        mistakes.append(
            Mistake(
                "model",
                f"{folder} holds no *.safetensors file, and other weight formats are not loaded; convert it once "
                "where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)",
            )
        )
    return mistakes


KIND = StageKind(
    name="llm",
    spec_type=LlmSpec,
    stage="stages.llm:build_stage",
    ports=ports,
    check=check,
    checkpoint=checkpoint,
    uses=uses,
)
