"""What `omni run` finds out before anything loads: about pictures from elsewhere, and clusters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omni.cli.main import main
from omni.files import write_output
from omni.recipe import Recipe, encode_recipe, read_recipe
from omni.testing import doubles

Omni = Callable[..., Any]


def test_relative_paths_of_the_graph_stay_where_they_were(omni: Omni) -> None:
    Path("there").mkdir()
    code = (
        "from PIL import Image\ndef paint(prompt: str) -> Image.Image:\n    return Image.new('L', (len(prompt), 1))\n"
    )
    Path("there/paint_of_run.py").write_text(code)
    Path("there/g.yaml").write_text("stages: {paint: {kind: function, call: 'paint_of_run:paint'}}")
    assert omni("run", "there/g.yaml", "--prompt", "abc", "-o", "a.png").code == 0
    assert omni("run", "a.png", "--trust", "-o", "b.png").code == 0
    with Image.open("a.png") as first, Image.open("b.png") as second:
        assert first.size == second.size == (3, 1)
    assert read_recipe("b.png").graph_path == "there/g.yaml"


def test_a_picture_elsewhere_says_where_its_graph_was(omni: Omni) -> None:
    graph = {"stages": {"draw": {"kind": "diffusion", "model": "models/shapes/painter"}}}
    recipe = Recipe(graph=graph, graph_path="configs/draw.yaml", seed=7)
    write_output(Image.new("RGB", (3, 3)), "a.png", metadata=encode_recipe(recipe))
    ran = omni("run", "a.png")
    first, second = ran.err.splitlines()
    assert ran.code == 2
    assert first == "a.png: its graph, which was configs/draw.yaml, from the current folder, cannot be used:"
    assert "configs/models/shapes/painter does not exist" in second


def test_an_address_where_nobody_answers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While requests are prepared there is no plan yet: it will be made of the cluster's nodes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.yaml").write_text("stages: {a: {kind: double, isolation: actor}}")
    with doubles():
        assert main(["run", "g.yaml", "--prompt", "x", "--address", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
