"""`omni validate` and `omni schema`: output, exit codes, and that they stay light."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from omni.cli import schema, validate

ROOT = Path(__file__).resolve().parents[2]
GOOD = "stages:\n  say: {kind: llm, model: owner/name}\n"
BAD = "stages:\n  say: {kind: llm, modl: owner/name}\n  draw: {kind: diffusio}\n"
HEAVY = ("torch", "ray", "diffusers", "transformers", "numpy", "PIL", "fastapi")


def run(module: object, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return int(module.command(parser.parse_args(arguments)))  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(GOOD)
    Path("bad.yaml").write_text(BAD)


def test_good_files_give_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(validate, "good.yaml", "good.yaml") == 0
    assert capsys.readouterr().out == "good.yaml: ok: 1 stage, outputs text\n" * 2


def test_mistakes_are_printed_and_the_other_files_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(validate, "bad.yaml", "good.yaml", "none.yaml") == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "bad.yaml:2:3",
        "bad.yaml:2:20",
        "bad.yaml:3:16",
        "good.yaml",
        "none.yaml",
    ]


def test_overrides_hold_for_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(validate, "good.yaml", "--set", "outputs.answer=say.text", "--set", "name=x") == 0
    assert capsys.readouterr().out == "good.yaml: ok: 1 stage, outputs answer\n"
    assert run(validate, "good.yaml", "--set", "stages.say.temperature=1") == 2
    assert capsys.readouterr().out.startswith("--set stages.say.temperature=1: stages.say.temperature: unknown key")


def test_schema_prints_json_or_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(schema) == 0
    assert json.loads(capsys.readouterr().out)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert run(schema, "--markdown") == 0
    assert capsys.readouterr().out.startswith("### The file\n")


def test_validate_imports_nothing_heavy() -> None:
    graphs = [str(path) for path in sorted(ROOT.glob("configs/examples/*.yaml"))]
    code = (
        "import sys\nfrom omni.cli.main import main\n"
        f"code = main(['validate', *{graphs!r}])\n"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr + done.stdout
    assert done.stdout.count(": ok: ") == len(graphs)
