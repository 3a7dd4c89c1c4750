"""Everything a graph file may say, as frozen, closed structs. Imports neither torch nor ray.

Defaults live here and nowhere else. `omni schema` prints these types as JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

PORT_TYPES = ("text", "image", "video", "audio", "tensor", "json", "any")
"""What a port may carry; `list[T]` of each is a type too."""

Seconds = Annotated[float, Meta(gt=0)]
Source = str | list[str]
"""Where an input comes from: `stage.port`, the name of a graph input, or a list of these (fan-in)."""


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base: immutable, keyword-only, and an unknown key is an error."""


class InputSpec(Spec, frozen=True, kw_only=True):
    """One field that a request may carry."""

    type: str = "text"
    """One of PORT_TYPES, or `list[TYPE]`."""
    default: Any = msgspec.UNSET
    """Used when a request leaves the field out; without it the field is required where a stage needs it."""
    description: str = ""


class ResourcesSpec(Spec, frozen=True, kw_only=True):
    """What a stage's process reserves; the planner fills in what is left out."""

    cpus: Annotated[float, Meta(ge=0)] | None = None
    gpus: Annotated[float, Meta(ge=0)] | None = None
    """Whole GPUs, or a fraction below 1 to share one."""


class TimeoutsSpec(Spec, frozen=True, kw_only=True):
    """Deadlines of a stage, in seconds."""

    setup_seconds: Seconds = 1800
    run_seconds: Seconds = 3600
    abort_seconds: Seconds = 60
    """How long an aborted run may take to stop before its process is given up."""


class StageSpec(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """What every kind of stage may say. Plug-in kinds subclass this with a `tag` of their own."""

    inputs: dict[str, Source] = {}
    """Input port -> where its value comes from. A port left out takes the request's field of that name."""
    resources: ResourcesSpec = ResourcesSpec()
    isolation: Literal["auto", "inline", "actor"] = "auto"
    """`inline` keeps the stage in the driver process, `actor` gives it a process of its own."""
    timeouts: TimeoutsSpec = TimeoutsSpec()


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="one of auto, cpu, cuda, cuda:N")]


Size = Annotated[
    str,
    Meta(pattern=r"^\s*[0-9]+(\.[0-9]+)?\s*([KkMmGgTt][Ii]?)?[Bb]?\s*$", description="a size such as 24GiB or 512MB"),
]


class LoadSpec(Spec, frozen=True, kw_only=True):
    """How weights arrive: chunks of all components at once, through one pool of reader threads."""

    enabled: bool = True
    """False loads as diffusers and transformers do by themselves."""
    threads: Annotated[int, Meta(ge=1, le=256)] = 4
    reader: Literal["auto", "buffered", "direct", "mmap"] = "auto"
    """`buffered` reads through the page cache, `direct` past it, `mmap` maps files in place; `auto` looks first."""
    chunk: Size = "16MiB"
    """What a thread reads at once."""


class OffloadSpec(Spec, frozen=True, kw_only=True):
    """Where weights live while the stage runs on a GPU."""

    policy: Literal["auto", "none", "component", "layerwise", "disk"] = "auto"
    """`none` keeps all on the GPU, `component` lets text encoders, denoiser and VAE take turns, `layerwise` streams
    blocks from host memory, `disk` streams them from the checkpoint; `auto` takes the first that fits."""
    vram: Size | None = None
    """GPU memory that the stage may take; left out, what the device has."""
    resident: Size | None = None
    """Weights of streamed blocks that stay on the GPU; left out, as many as fit, or none where `layerwise` or `disk` is
    asked for without `vram`."""
    ahead: Annotated[int, Meta(ge=1, le=16)] = 2
    """Blocks fetched before they are needed."""


Duration = Annotated[
    str, Meta(pattern=r"^\s*[0-9]+(\.[0-9]+)?\s*(ms|s)\s*$", description="a duration such as 5ms or 1.5s")
]


class BatchingSpec(Spec, frozen=True, kw_only=True):
    """Requests at the same time: they go through their denoise steps together, in joined calls of the denoiser."""

    max_requests: Annotated[int, Meta(ge=1, le=256)] = 1
    """Requests that the stage works on at once, and the most in one call; 1 is one after another."""
    max_pixels: Annotated[int, Meta(ge=1)] = 4_194_304
    """Height x width x frames of all pictures in one call; guidance that doubles the batch counts twice. One request
    always fits."""
    wait: Duration = "5ms"
    """How long a call waits for the next one that is about to come."""


class SamplingSpec(Spec, frozen=True, kw_only=True):
    """How an LLM picks tokens, under transformers' names."""

    max_new_tokens: Annotated[int, Meta(ge=1)] = 128
    temperature: Annotated[float, Meta(ge=0)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    """0 keeps all tokens."""
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    stop: list[str] = []
    """Text that ends the answer; it is cut off."""


class LlmSpec(StageSpec, frozen=True, kw_only=True, tag="llm"):
    """A causal language model: fills `template`, answers in text. Output port: text."""

    model: str
    """A folder (relative to the graph file), a hub id, or the model's name at `base_url`."""
    engine: Literal["transformers", "openai"] = "transformers"
    base_url: str = ""
    """`engine: openai` only: address of the server, e.g. http://localhost:8000/v1."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key for `base_url`."""
    template: str = "{prompt}"
    """The user message; each {name} is an input port."""
    system: str = ""
    sampling: SamplingSpec = SamplingSpec()
    load: LoadSpec = LoadSpec()
    offload: OffloadSpec = OffloadSpec()
    revision: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: bool = False


class DiffusionSpec(StageSpec, frozen=True, kw_only=True, tag="diffusion"):
    """A stock diffusers pipeline. Output port: images, video or audio, as the pipeline gives."""

    model: str
    """A folder (relative to the graph file) or a hub id."""
    pipeline: str | None = None
    """Name of the diffusers pipeline class; left out, the model's model_index.json decides."""
    call: dict[str, Any] = {}
    """Arguments of the pipeline's own call; a request's field of the same name wins."""
    fps: Annotated[float, Meta(gt=0)] = 16.0
    """Frames per second written with a video when the call has no frame_rate."""
    batching: BatchingSpec = BatchingSpec()
    load: LoadSpec = LoadSpec()
    offload: OffloadSpec = OffloadSpec()
    revision: str | None = None
    variant: str | None = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: bool = False


class FunctionSpec(StageSpec, frozen=True, kw_only=True, tag="function"):
    """The user's own Python function, sync or async; ports come from its type hints or from here."""

    call: Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="package.module:callable as text")]
    """package.module:callable"""
    arguments: dict[str, Any] = {}
    """Constant arguments."""
    input_types: dict[str, str] = {}
    """Port types, where type hints are missing."""
    outputs: dict[str, str] = {}
    """Output port -> type; left out, the return hint decides."""
    mutates_inputs: bool = False
    """True gives the function private copies of its inputs, so that it may write into them."""


class GraphSpec(Spec, frozen=True, kw_only=True):
    """A whole graph file."""

    name: str = "graph"
    description: str = ""
    inputs: dict[str, InputSpec] = {}
    stages: dict[str, StageSpec]
    outputs: dict[str, str] = {}
    """Output name -> `stage.port`; left out, each stage that nobody reads gives its main port."""
