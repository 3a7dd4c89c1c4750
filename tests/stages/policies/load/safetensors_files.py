"""Safetensors files with any content, sound or damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_raw(file: Path, tensors: Mapping[str, Mapping[str, Any]], data: bytes, *, pad: int = 0) -> Path:
    """A file with this header and this data; `pad` spaces at the end of the header move where the data begins."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode() + b" " * pad
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
