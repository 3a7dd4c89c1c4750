"""Prompt templates."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.llm.template import fill_template, template_fields

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
PLAIN = st.text(max_size=20)


def test_fields_come_once_and_in_order() -> None:
    assert template_fields("{b} and {a}, {b}; {{not}} {{}}") == ("b", "a")


@given(st.lists(st.tuples(PLAIN, NAMES, st.text()), max_size=5), PLAIN)
def test_any_text_around_and_inside_the_fields_is_kept(parts: list[tuple[str, str, str]], tail: str) -> None:
    values = {name: value for _, name, value in parts}
    escape = {ord("{"): "{{", ord("}"): "}}"}
    template = "".join(f"{text.translate(escape)}{{{name}}}" for text, name, _ in parts) + tail.translate(escape)
    assert template_fields(template) == tuple(dict.fromkeys(name for _, name, _ in parts))
    assert fill_template(template, values) == "".join(text + values[name] for text, name, _ in parts) + tail


def test_values_that_are_not_text_are_written_out() -> None:
    assert fill_template("{n}: {items}", {"n": 3, "items": ["a"]}) == "3: ['a']"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{prompt", "expected '}' before end of string; write {name} for an input, {{ and }} for braces"),
        ("prompt}", "Single '}' encountered in format string; write {name} for an input"),
        ("{}", "'{}' is not allowed: only {name}"),
        ("{0}", "'{0}' is not allowed"),
        ("{a.b}", "'{a.b}' is not allowed: only {name}, with a plain name and no attribute or index"),
        ("{a[0]}", "'{a[0]}' is not allowed"),
        ("{a b}", "'{a b}' is not allowed"),
        ("{a:>10}", "'{a}' cannot have a format or conversion"),
        ("{a!r}", "'{a}' cannot have a format or conversion"),
    ],
)
def test_other_placeholders_are_refused(template: str, fault: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(fault)):
        template_fields(template)
