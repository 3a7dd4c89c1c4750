"""A job's inputs and outputs as JSON and files: what is stored is what every run of the job gets, to the last bit.

In stored inputs a medium is `{"blob": NAME, "type": PORT TYPE, ...}`, and so is a text or JSON that is long. A client's
own JSON object that could be taken for one is wrapped as `{"json": OBJECT}`. Clips are stored as lossless H.264, sounds
and tensors as safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec

from omni.errors import InputError, UsageError
from omni.files import SUFFIXES, items_of, kind_of, write_output
from omni.graph import Graph, base_type
from omni.media import Audio, Video
from omni.server.files import FileStore
from omni.server.jobs import OutputFile
from omni.transport.payload import is_array, is_image, is_tensor

MAX_DEPTH = 64
"""Of lists and objects inside each other."""
MAX_INLINE_BYTES = 64 * 1024
"""Texts and JSON up to this size are kept in the job itself."""
PNG_MODES = ("1", "L", "LA", "RGB", "RGBA", "I;16")
"""Pictures of other modes are stored as their bytes, those with a palette as RGBA."""
MEDIA_TYPES = {
    ".png": "image/png",
    ".mp4": "video/mp4",
    ".wav": "audio/wav",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
    ".safetensors": "application/octet-stream",
}
INPUT_SUFFIXES = {"image": ".png", "video": ".mkv", "audio": ".safetensors", "tensor": ".safetensors"}


# Checks -----------------------------------------------------------------------------------------------------------


def check_plain(name: str, value: Any, depth: int = 0) -> None:
    """Raise InputError unless an input is made of JSON values and media, not too deep."""
    if depth > MAX_DEPTH:
        raise InputError(f"input '{name}' has lists or objects inside each other, more than {MAX_DEPTH} deep")
    if isinstance(value, (list, tuple)):
        for item in value:
            check_plain(name, item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"input '{name}' has an object whose key is no text: {key!r}")
            check_plain(name, item, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"input '{name}' holds {value}, which JSON does not have")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InputError(f"input '{name}' holds a whole number of more than 64 bits")
    elif not (value is None or isinstance(value, str) or _is_medium(value)):
        raise InputError(f"input '{name}' holds a {type(value).__name__}, which cannot be stored")


def _is_medium(value: Any) -> bool:
    return isinstance(value, (Video, Audio)) or is_image(value) or is_tensor(value) or is_array(value)


def digest_of(order: dict[str, Any]) -> str:
    """Hex digest of an order: equal for equal values, pictures and clips by their content."""
    sha = hashlib.sha256()

    def fingerprint(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fingerprint(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [fingerprint(item) for item in value]
        if isinstance(value, Video):
            return ["video", value.fps, value.frames.shape, hashlib.sha256(value.frames.tobytes()).hexdigest()]
        if isinstance(value, Audio):
            return ["audio", value.rate, value.samples.shape, hashlib.sha256(value.samples.tobytes()).hexdigest()]
        if is_image(value):
            return ["image", value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
        if is_tensor(value) or is_array(value):
            array = value.numpy() if is_tensor(value) else value
            return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(array.tobytes()).hexdigest()]
        return value

    sha.update(json.dumps(fingerprint(order), sort_keys=True).encode())
    return sha.hexdigest()


# Inputs -----------------------------------------------------------------------------------------------------------


def store_inputs(files: FileStore, job_id: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """JSON of the inputs, whose media are files now, and the size of these files. Blocks."""
    size = 0

    def store(value: Any) -> Any:
        nonlocal size
        if isinstance(value, dict):
            stored = {key: store(item) for key, item in value.items()}
            return {"json": stored} if "blob" in value or value.keys() == {"json"} else stored
        if isinstance(value, (list, tuple)):
            return [store(item) for item in value]
        if not _is_medium(value):
            return value
        kind = kind_of(value)
        name = f"{job_id}/in-{secrets.token_hex(6)}{INPUT_SUFFIXES[kind]}"
        with files.writing(name) as path:
            details = _write_input(value, kind, path)
            size += path.stat().st_size
        return {"blob": name, "type": kind, **details}

    def keep(value: Any) -> Any:
        nonlocal size
        content = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        if len(content) <= MAX_INLINE_BYTES:
            return value
        name = f"{job_id}/in-{secrets.token_hex(6)}.json"
        with files.writing(name) as path:
            path.write_bytes(content)
        size += len(content)
        return {"blob": name, "type": "text" if isinstance(value, str) else "json"}

    return {name: keep(store(value)) for name, value in inputs.items()}, size


def read_inputs(files: FileStore, inputs: dict[str, Any]) -> dict[str, Any]:
    """What `store_inputs` has stored. Blocks; raises FileNotFoundError or StoreError for a file that is gone."""

    def read(value: Any, plain: bool = False) -> Any:
        if isinstance(value, list):
            return [read(item) for item in value]
        if not isinstance(value, dict):
            return value
        if not plain and value.keys() == {"json"}:
            return read(value["json"], plain=True)
        if not plain and "blob" in value:
            if value["type"] in ("text", "json"):
                return read(read_long(files, value))
            with files.reading(value["blob"]) as path:
                return _read_input(value, path)
        return {key: read(item) for key, item in value.items()}

    return {name: read(value) for name, value in inputs.items()}


def read_long(files: FileStore, reference: dict[str, Any]) -> Any:
    """A long text or JSON as it would lie in the job itself. Blocks; raises as `read_inputs`."""
    with files.reading(reference["blob"]) as path:
        return json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))


def _write_input(value: Any, kind: str, path: Path) -> dict[str, Any]:
    """Write a medium without loss; returns what the file does not tell."""
    if kind == "image":
        value = value.convert("RGBA") if value.mode in ("P", "PA") else value
        if value.mode in PNG_MODES:
            value.save(path, format="PNG", compress_level=1)
            return {}
        path.write_bytes(value.tobytes())
        return {"mode": value.mode, "size": list(value.size)}
    if kind == "video":
        _write_clip(value, path)
        return {"fps": value.fps}
    write_output(value.samples if kind == "audio" else value, path)
    return {"rate": value.rate} if kind == "audio" else {"array": is_array(value)}


def _read_input(reference: dict[str, Any], path: Path) -> Any:
    kind = reference["type"]
    if kind == "image":
        from PIL import Image

        if "mode" in reference:
            return Image.frombytes(reference["mode"], tuple(reference["size"]), path.read_bytes())
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return image
    if kind == "video":
        from omni.files import read_media

        return msgspec.structs.replace(read_media(path, "video"), fps=reference["fps"])
    if kind == "audio" or reference.get("array"):
        from safetensors.numpy import load_file

        array = load_file(path)["tensor"]
        return Audio(array, reference["rate"]) if kind == "audio" else array
    from omni.files import read_media

    return read_media(path, "tensor")


def _write_clip(video: Video, path: Path) -> None:
    """RGB, quantizer 0: no loss, and no colour space between."""
    import av

    options = {"qp": "0", "preset": "ultrafast"}
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(video.fps).limit_denominator(1001), options=options)
        stream.height, stream.width = video.frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for picture in video.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


# Outputs ----------------------------------------------------------------------------------------------------------


def sounds_of(graph: Graph) -> dict[str, str]:
    """Video output -> the audio output of the same stage, which becomes its sound track."""
    kinds = {n: base_type(graph.ports[s.stage].outputs[s.port].type) for n, s in graph.outputs.items()}
    return {
        video: sound
        for video in kinds
        for sound in kinds
        if (kinds[video], kinds[sound]) == ("video", "audio")
        and graph.outputs[video].stage == graph.outputs[sound].stage
    }


def store_outputs(
    files: FileStore, job_id: str, outputs: dict[str, Any], sounds: dict[str, str]
) -> tuple[OutputFile, ...]:
    """Write a job's outputs; short texts stay inside. Blocks; raises UsageError for what no file can hold."""
    stored: list[OutputFile] = []
    try:
        for name, value in outputs.items():
            tracks = items_of(outputs[sounds[name]]) if name in sounds else []
            for index, item in enumerate(items_of(value)):
                track = tracks[index] if index < len(tracks) and isinstance(tracks[index], Audio) else None
                stored.append(_store_output(files, job_id, OutputPlace(name, index), item, track))
    except BaseException:
        files.remove([output.blob for output in stored if output.blob])
        raise
    return tuple(stored)


class OutputPlace(msgspec.Struct, frozen=True):
    """Which value of which output."""

    name: str
    index: int


def _store_output(files: FileStore, job_id: str, place: OutputPlace, item: Any, track: Audio | None) -> OutputFile:
    kind = kind_of(item)
    suffix = SUFFIXES[kind][0]
    output = OutputFile(name=place.name, index=place.index, type=kind, media_type=MEDIA_TYPES[suffix], blob="", bytes=0)
    content = _text_of(kind, item)
    if content is not None and len(content) <= MAX_INLINE_BYTES:
        return msgspec.structs.replace(output, bytes=len(content), text=content.decode())
    blob = f"{job_id}/out-{secrets.token_hex(6)}{suffix}"
    with files.writing(blob) as path:
        if content is not None:
            path.write_bytes(content)
        else:
            sound = track if track is not None and len(track.samples) <= 2 else None
            try:
                write_output(item, path, sound=sound)
            except UsageError as error:  # clients do not learn where files lie
                raise UsageError(str(error).replace(str(path), f"output '{place.name}'")) from error
        size = path.stat().st_size
    return msgspec.structs.replace(output, blob=blob, bytes=size)


def _text_of(kind: str, item: Any) -> bytes | None:
    """The bytes of a text or of JSON; None for media."""
    try:
        if kind == "text":
            return str(item).encode()
        if kind == "json":
            return json.dumps(item, ensure_ascii=False, default=repr).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"a text or JSON output cannot be written: {error}") from error
    return None
