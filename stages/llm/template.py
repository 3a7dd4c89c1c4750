"""Prompt templates: plain `{name}` placeholders, so that what a template needs can be told without running it."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any


def template_fields(template: str) -> tuple[str, ...]:
    """Names of the placeholders, each once, in order. Raises ValueError with the fault and what is allowed."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; write {{name}} for an input, {{{{ and }}}} for braces") from error
    fields = [part for part in parts if part[1] is not None]
    for _, name, format_spec, conversion in fields:
        if not (name or "").isidentifier():
            raise ValueError(
                f"'{{{name}}}' is not allowed: only {{name}}, with a plain name and no attribute or index; "
                "write {{ and }} for braces"
            )
        if format_spec or conversion:
            raise ValueError(f"'{{{name}}}' cannot have a format or conversion, only {{{name}}}")
    return tuple(dict.fromkeys(str(name) for _, name, _, _ in fields))


def fill_template(template: str, values: Mapping[str, Any]) -> str:
    """The template with its placeholders replaced; values that are not text are written with `str`."""
    return "".join(
        literal + ("" if name is None else str(values[name]))
        for literal, name, _, _ in string.Formatter().parse(template)
    )
