"""The `omni` command as a whole: light help, exit codes, one line per mistake, and the docs that show it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import omni.cli.validate
from omni.cli.main import COMMANDS, build_parser
from omni.errors import RunnerError, StageError, UsageError

LIGHT = """
import sys
from omni.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "ray", "numpy", "rich", "diffusers", "transformers", "PIL", "yaml", "asyncio"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["bench", "hop", "--help"]]
)
def test_help_is_light(arguments: list[str], root: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("usage: ")


def test_every_command_is_listed(omni: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = omni("--help")
    assert code == 0
    for name, text in COMMANDS.items():
        assert f"{name:10}{text}" in out


def test_the_version_is_looked_up(omni: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2.3 of {name}")
    assert omni("--version") == (0, "omni 1.2.3 of omni-stages\n", "")


@pytest.mark.parametrize("arguments", [[], ["paint"], ["run"], ["run", "g.yaml", "--n", "x"], ["bench"]])
def test_wrong_usage_is_2(omni: Callable[..., tuple[int, str, str]], arguments: list[str]) -> None:
    code, out, err = omni(*arguments)
    assert (code, out) == (2, "")
    assert "error: " in err


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (UsageError("do it otherwise"), 2, "do it otherwise\n"),
        (RunnerError("no cluster"), 1, "omni validate: no cluster\n"),
        (StageError("a", "broke", "mend it", "frames"), 1, "omni validate: stage 'a': broke (mend it)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_one_line_and_a_code(
    omni: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    err: str,
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr("omni.cli.validate.command", fail)
    assert omni("validate", "g.yaml") == (code, "", err)


def test_verbose_shows_where_it_happened(
    omni: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> int:
        raise StageError("a", "broke", details="frames of the actor")

    monkeypatch.setattr("omni.cli.validate.command", fail)
    code, _, err = omni("validate", "g.yaml", "--verbose")
    assert code == 1
    assert "Traceback" in err
    assert "frames of the actor" in err


def test_a_fault_of_ours_keeps_its_traceback(
    omni: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> int:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("omni.cli.validate.command", fail)
    code, _, err = omni("validate", "g.yaml")
    assert code == 1
    assert "ZeroDivisionError: oh" in err


def test_a_closed_pipe_is_quiet(root: Path) -> None:
    command = f"{sys.executable} -c 'from omni.cli.main import entry; entry()' schema | head -c 10"
    ran = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, check=False)
    assert (len(ran.stdout), ran.stderr) == (10, "")


def test_help_in_the_docs_is_the_help(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/cli.md holds the help of every command, 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")
    text = squeezed((root / "docs" / "cli.md").read_text())
    parsers = [build_parser()]
    while parsers:
        parser = parsers.pop(0)
        assert squeezed(f"`{parser.prog}` ``` {parser.format_help()}```") in text
        choices = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        parsers += [child for group in choices for child in group.values()]


def squeezed(text: str) -> str:
    """Without what differs between Python versions: line breaks, and metavars of short options."""
    return re.sub(r"(--\w+) \w+, (-\w) ", r"\1, \2 ", " ".join(text.split()))


assert omni.cli.validate  # so that its `command` can be replaced
