"""What can be said about a diffusion stage before its model is loaded: ports and mistakes. Light: no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omni.errors import Mistake
from omni.graph import nearest
from omni.registry import CheckpointRef, Port, Ports
from omni.spec import DiffusionSpec
from stages.diffusion.checkpoint import checkpoint_mistakes, find_folder, pipeline_name
from stages.diffusion.signature import (
    ANY_OUTPUTS,
    Parameter,
    Signature,
    find_signature,
    owned_reason,
    pipeline_names,
    value_fault,
)

FROM_PICTURES = ("Img2Img", "Inpaint")
"""In the names of pipelines that need a picture."""


def ports(spec: DiffusionSpec, base_dir: str) -> Ports:
    """The pipeline's call parameters and media; any name when the pipeline is not known on this machine."""
    signature = _known_signature(spec, find_folder(spec, base_dir))
    if signature is None:
        return Ports(inputs={}, outputs=ANY_OUTPUTS, open_inputs=True)
    return Ports(inputs=_inputs(signature, spec), outputs=signature.outputs)


def check(spec: DiffusionSpec, base_dir: str) -> list[Mistake]:
    """Faults of the model, the pipeline's name and the call that can be seen without loading the model."""
    folder = find_folder(spec, base_dir)
    mistakes = checkpoint_mistakes(spec, base_dir, folder)
    name = pipeline_name(spec, folder)
    if name and pipeline_names() and find_signature(name) is None and not spec.trust_remote_code:
        return [*mistakes, _unknown_pipeline(name, "pipeline" if spec.pipeline else "model")]
    return mistakes + call_mistakes(spec.call, _known_signature(spec, folder))


def checkpoint(spec: DiffusionSpec) -> CheckpointRef:
    """The checkpoint of the pipeline."""
    return CheckpointRef(spec.model, spec.revision, spec.variant)


def call_mistakes(call: dict[str, Any], signature: Signature | None) -> list[Mistake]:
    """Faults of the spec's `call`: names that Omni owns, unknown names, values of a wrong type."""
    mistakes = []
    for name, value in call.items():
        if reason := owned_reason(name):
            mistakes.append(Mistake(f"call.{name}", f"cannot be set: {reason}"))
        elif signature is not None and name not in signature.parameters:
            mistakes.append(Mistake(f"call.{name}", unknown_parameter(name, signature)))
        elif signature is not None and (fault := _constant_fault(signature.parameters[name], value)):
            mistakes.append(Mistake(f"call.{name}", fault))
    return mistakes


def unknown_parameter(name: str, signature: Signature) -> str:
    """The message for a name that the pipeline's call does not have."""
    allowed = ", ".join(sorted(signature.parameters))
    return f"{signature.pipeline} takes no '{name}'{nearest(name, signature.parameters)} (it takes: {allowed})"


def _constant_fault(parameter: Parameter, value: Any) -> str:
    kind = parameter.port.type
    if kind in ("image", "video", "audio", "tensor") and value is not None:
        return f"a graph file cannot hold this {kind}; send it with the request, or wire it in the stage's inputs"
    return value_fault(parameter, value)


def _unknown_pipeline(name: str, path: str) -> Mistake:
    remedy = nearest(name, pipeline_names()) if path == "pipeline" else " (named in its model_index.json)"
    return Mistake(
        path,
        f"diffusers has no pipeline class '{name}'{remedy}; take a class of diffusers.pipelines, or set "
        "trust_remote_code: true to run code that comes with the model",
    )


def _known_signature(spec: DiffusionSpec, folder: Path | None) -> Signature | None:
    name = pipeline_name(spec, folder)
    return find_signature(name) if name else None


def _inputs(signature: Signature, spec: DiffusionSpec) -> dict[str, Port]:
    # Every pipeline gives `prompt` the default None, and then refuses a call that has neither text nor embeddings.
    # Those that start from a picture do the same with `image`.
    embedded = any("prompt_embeds" in name for name in (*spec.inputs, *spec.call))
    pictured = any(word in signature.pipeline for word in FROM_PICTURES)

    def port(parameter: Parameter) -> Port:
        needed = (parameter.name == "prompt" and not embedded) or (parameter.name == "image" and pictured)
        required = parameter.port.required or needed
        return Port(
            parameter.port.type, required=required and parameter.name not in spec.call, many=parameter.port.many
        )

    return {name: port(parameter) for name, parameter in signature.parameters.items()}
