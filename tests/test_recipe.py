"""What a picture remembers, and what is refused when it is to be made again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from omni.errors import UsageError
from omni.files import write_output
from omni.recipe import (
    MAX_FILE_BYTES,
    Recipe,
    SourceFile,
    changed_versions,
    check_files,
    digest_file,
    encode_recipe,
    installed_versions,
    needs_trust,
    read_recipe,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


def png(path: Path, metadata: str) -> Path:
    return write_output(Image.new("RGB", (2, 2)), path, metadata=metadata)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=3), st.integers(0, 2**32 - 1))
def test_a_recipe_comes_back(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Any], seed: int) -> None:
    recipe = Recipe(graph={"stages": {}}, graph_path="a/b.yaml", inputs=inputs, seed=seed)
    path = png(tmp_path_factory.getbasetemp() / "a.png", encode_recipe(recipe))
    assert read_recipe(path) == recipe


def test_a_foreign_picture_has_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"was not written by `omni run`"):
        read_recipe(png(tmp_path / "a.png", ""))


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 1}', '{"seed": "x", "graph": {}}'])
def test_broken_metadata_is_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="metadata cannot be read"):
        read_recipe(png(tmp_path / "a.png", text))


def test_what_is_no_png_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(UsageError, match="not a PNG"):
        read_recipe(tmp_path / "a.png")
    with pytest.raises(UsageError, match="No such file"):
        read_recipe(tmp_path / "gone.png")


def test_half_a_png_is_told(tmp_path: Path) -> None:
    path = write_output(Image.effect_noise((99, 99), 50), tmp_path / "a.png", metadata="{}")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UsageError, match=r"a\.png"):
        read_recipe(path)


def test_a_bomb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_output(Image.new("RGB", (20, 20)), tmp_path / "a.png", metadata="{}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UsageError, match=r"a\.png is a broken PNG: .*decompression bomb"):
        read_recipe(path)


def test_a_graph_with_a_base_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(graph={"base": "evil.yaml", "stages": {}}, seed=1)
    with pytest.raises(UsageError, match=r"a\.png: its graph has a `base`"):
        read_recipe(png(tmp_path / "a.png", encode_recipe(recipe)))


def test_a_name_that_is_no_text_is_told() -> None:
    with pytest.raises(UsageError, match=r"'\\udcff.yaml' is not valid UTF-8 text; rename the file"):
        encode_recipe(Recipe(graph={}, graph_path="\udcff.yaml", seed=1))


def test_devices_and_pipes_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        with pytest.raises(UsageError, match=f"cannot read {path}: not a regular file"):
            check_files({"image": [SourceFile(path, "")]})


def test_huge_files_are_not_hashed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UsageError, match="larger than 8 GiB"):
        digest_file(str(path))


def test_changed_files_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"one")
    files = {"image": [SourceFile(str(path), digest_file(str(path)))]}
    check_files(files)
    path.write_bytes(b"two")
    with pytest.raises(UsageError, match=r"not the file that the picture was made from; .*--input image=FILE"):
        check_files(files)
    path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        check_files(files)


@pytest.mark.parametrize(
    ("stage", "found"),
    [
        ({"kind": "diffusion"}, []),
        ({"kind": "llm", "trust_remote_code": False}, []),
        ({"kind": "llm", "trust_remote_code": True}, ["stages.s.trust_remote_code"]),
        ({"kind": "llm", "api_key_env": "KEY"}, ["stages.s.api_key_env"]),
        ({"kind": "function", "call": "os:system"}, ["stages.s.kind: function"]),
        ({"kind": "llm", "engine": "transformers", "base_url": ""}, []),
        ({"kind": "llm", "engine": "openai"}, ["stages.s.engine: openai"]),
        ({"kind": "llm", "base_url": "http://x"}, ["stages.s.base_url"]),
        ({"kind": "a\x1b[2J"}, ["'stages.s.kind: a\\x1b[2J'"]),
        ("nonsense", ["stages.s.kind: None"]),
    ],
)
def test_what_could_do_harm_needs_trust(stage: Any, found: list[str]) -> None:
    assert needs_trust(Recipe(graph={"stages": {"s": stage}}, seed=0)) == found


def test_versions_name_installed_libraries() -> None:
    assert "torch" in installed_versions()


def test_other_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.recipe.installed_versions", lambda: {"torch": "2", "diffusers": "1"})
    then = {"torch": "1\x1b", "diffusers": "1", "transformers": "5", "os": "3"}
    assert changed_versions(Recipe(graph={}, seed=0, versions=then)) == [
        "torch '1\\x1b' (here '2')",
        "transformers '5' (here 'none')",
    ]
