"""Hostile requests: JSON in the fields of forms."""

from __future__ import annotations

from tests.server.hostile import ANNA, NUMBERS, PNG, Case
from tests.server.raw_http import form, part

LOOKER = "/v1/graphs/looker/jobs"
CASES = (
    Case(
        "form too many values",
        form(
            LOOKER,
            part("request", b'{"inputs": {"sound": [' + b"[]," * 20_000 + b"1]}}"),
            part("details", b"[" + b"[]," * 32_000 + b"1]"),
            key=ANNA,
        ),
        400,
        "'details' has more than 100000 JSON values, the limit of this server",
    ),
    Case(
        "form no JSON",
        form("/v1/graphs/echo/jobs", part("request", b"prompt=x"), key=ANNA),
        400,
        "the form's field 'request' is not JSON: Expecting value, line 1, column 1",
    ),
    Case(
        "form twice the key",
        form(LOOKER, part("details", b'{"a": 1, "a": 2}'), part("image", PNG, "a"), key=ANNA),
        400,
        "'details' has the field 'a' twice",
    ),
    Case(
        "form huge number",
        form(LOOKER, part("details", b"[1e999]"), part("image", PNG, "a"), key=ANNA),
        400,
        f"'details' has the number 1e999, {NUMBERS}",
    ),
)
