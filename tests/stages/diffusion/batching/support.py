"""docs/support.md: what joined calls of each family look like, as the tests see it."""

from __future__ import annotations

from typing import Any

from stages.diffusion.batching.join import Form, Items, Numbers, Parts, Rows, Rule, Same
from tests.stages.diffusion import tiny

TOLERANCE = 2
"""What pixels, and samples of sound in 1/255 of full scale, may differ by from those of a request alone."""
BEGIN, END = "<!-- step batching: tests/stages/diffusion/batching -->\n", "<!-- end of step batching -->"


def row(family: str, denoiser: str, form: Form, calls_per_step: int) -> str:
    """A line of the table. `form`: of any call of the denoiser."""
    recipe = {**tiny.FAMILIES, **tiny.MORE_FAMILIES}[family]
    arguments = form.arguments
    rows = [f"`{name}`" for name, rule in form.rules if _has(rule, Rows, Numbers)]
    lists = [f"`{name}`" for name, rule in form.rules if _has(rule, Items)]
    shared = [f"`{name}`" for name, rule in form.rules if _is_shared(rule, arguments[name])]
    guidance = {(1, 1): "none, or in the model", (2, 1): "one call of two samples", (1, 2): "two calls"}
    cells = (
        f"{recipe.pipeline or recipe.saved}",
        denoiser,
        guidance[form.size, calls_per_step],
        ", ".join(rows),
        ", ".join(lists),
        ", ".join(shared),
    )
    return "| " + " | ".join(cells) + " |"


def render(rows: list[str]) -> str:
    """The table."""
    head = (
        "| pipeline | denoiser | guidance | joined by rows | joined as lists | equal, passed once |",
        "|---|---|---|---|---|---|",
    )
    return "\n".join((*head, *sorted(rows)))


def _has(rule: Rule, *kinds: type) -> bool:
    return isinstance(rule, kinds) or (isinstance(rule, Parts) and any(_has(part, *kinds) for part in rule.rules))


def _is_shared(rule: Rule, value: Any) -> bool:
    """Whether it is a tensor that all samples share."""
    if isinstance(rule, Parts):
        parts = list(value.values()) if isinstance(value, dict) else value
        return any(_is_shared(part, item) for part, item in zip(rule.rules, parts, strict=True))
    return isinstance(rule, Same) and isinstance(rule.token, bytes)
