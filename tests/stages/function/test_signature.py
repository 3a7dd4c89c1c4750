"""Ports from type hints, and what is told about functions that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omni.registry import Port, Ports, find_kind
from omni.spec import FunctionSpec

ROOT = Path(__file__).parents[3]
KIND = find_kind("function")
IMAGE, TEXT, JSON = Port("image", each=True), Port("text", each=True), Port("json", many=True)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes a module next to the graph file; modules imported in the test are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path.parent)

    def write(code: str, name: str = "mine") -> None:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code))

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def ports(folder: Path, call: str = "mine:f", **fields: object) -> Ports:
    spec = FunctionSpec(call=call, **fields)
    assert KIND.check(spec, str(folder)) == []
    return KIND.ports(spec, str(folder))


def faults(folder: Path, call: str = "mine:f", **fields: object) -> list[str]:
    return [str(mistake) for mistake in KIND.check(FunctionSpec(call=call, **fields), str(folder))]


HEADER = """
    from __future__ import annotations
    from collections.abc import Sequence
    from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Optional, TypedDict
    from dataclasses import dataclass
    import omni.media
    from omni.media import Video, Audio
    if TYPE_CHECKING:
        import torch
        import numpy as np
        from PIL import Image
"""


@pytest.mark.parametrize(
    ("hint", "port"),
    [
        ("str", TEXT),
        ("Image.Image", IMAGE),
        ("Video", Port("video", each=True)),
        ("omni.media.Audio", Port("audio", each=True)),
        ("torch.Tensor", Port("tensor", each=True)),
        ("np.ndarray", Port("tensor", each=True)),
        ("int", JSON),
        ("bool", JSON),
        ("dict[str, float]", JSON),
        ("list", JSON),
        ("list[int]", JSON),
        ("tuple[int, int]", JSON),
        ("int | float", JSON),
        ("Literal['a', 'b']", TEXT),
        ("Literal[1, 'b']", JSON),
        ("Annotated[str, 'x']", TEXT),
        ("list[Image.Image]", Port("list[image]")),
        ("Sequence[str]", Port("list[text]")),
        ("tuple[Image.Image, ...]", Port("list[image]")),
        ("Image.Image | list[Image.Image]", Port("image", many=True)),
        ("str | int", Port("any")),
        ("list[str | int]", Port("any")),
        ("Any", Port("any")),
        ("object", Port("any")),
        ("Unknown[int]", Port("any")),
    ],
)
def test_port_types(hint: str, port: Port, tmp_path: Path, write: Callable[..., None]) -> None:
    write(f"{HEADER}\n    def f(a: {hint}, b: {hint} = None, c: Optional[{hint}] = None, d: {hint} | None = None): ...")
    required = Port(port.type, required=True, many=port.many, each=port.each)
    assert ports(tmp_path).inputs == {"a": required, "b": port, "c": port, "d": port}


def test_reading_hints_imports_nothing(tmp_path: Path, write: Callable[..., None]) -> None:
    write(f"{HEADER}\n    def f(a: torch.Tensor) -> list[Image.Image]: ...")
    code = (
        "import sys; from omni.registry import find_kind; from omni.spec import FunctionSpec;"
        f"print(find_kind('function').ports(FunctionSpec(call='mine:f'), {str(tmp_path)!r}).outputs);"
        "print([name for name in ('torch', 'PIL', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "list[image]" in done.stdout


def test_real_classes_are_known_too(tmp_path: Path, write: Callable[..., None]) -> None:
    write("""
        from PIL.Image import Image
        import numpy
        class Sketch(Image): ...
        def f(a: Image, b: Sketch, c: numpy.ndarray, d) -> Sketch: ...
    """)
    found = ports(tmp_path)
    assert [port.type for port in found.inputs.values()] == ["image", "image", "tensor", "any"]
    assert found.outputs == {"image": Port("image")}


@pytest.mark.parametrize(
    ("hint", "outputs"),
    [
        ("str", {"text": "text"}),
        ("Image.Image", {"image": "image"}),
        ("list[Image.Image]", {"images": "list[image]"}),
        ("list[str]", {"text": "list[text]"}),
        ("dict[str, int]", {"json": "json"}),
        ("Image.Image | None", {"image": "image"}),
        ("None", {}),
        ("Any", {"any": "any"}),
        ("Pair", {"image": "image", "note": "text"}),
        ("Named", {"masks": "list[image]", "count": "json"}),
        ("Classy", {"video": "video"}),
    ],
)
def test_output_ports(hint: str, outputs: dict[str, str], tmp_path: Path, write: Callable[..., None]) -> None:
    classes = """
    class Pair(TypedDict):
        image: Image.Image
        note: str
    class Named(NamedTuple):
        masks: list[Image.Image]
        count: int
    @dataclass
    class Classy:
        video: Video
    """
    write(f"{HEADER}{classes}\n    async def f() -> {hint}: ...")
    assert {name: port.type for name, port in ports(tmp_path).outputs.items()} == outputs


def test_without_hints_everything_is_any(tmp_path: Path, write: Callable[..., None]) -> None:
    write("def f(a, b=1): ...")
    assert ports(tmp_path) == Ports({"a": Port("any", required=True), "b": Port("any")}, {"any": Port("any")})


def test_the_graph_overrides_hints(tmp_path: Path, write: Callable[..., None]) -> None:
    write("def f(a, b: int, c=3) -> str: ...")
    found = ports(tmp_path, input_types={"a": "image"}, outputs={"x": "list[image]", "y": "text"}, arguments={"c": 1})
    assert found.inputs == {"a": Port("image", required=True, each=True), "b": Port("json", required=True, many=True)}
    assert found.outputs == {"x": Port("list[image]"), "y": Port("text")}


def test_open_inputs(tmp_path: Path, write: Callable[..., None]) -> None:
    write("def f(a: str, *more, **rest): ...")
    found = ports(tmp_path, input_types={"extra": "image"})
    assert found.open_inputs
    assert set(found.inputs) == {"a", "extra"}


def test_seed_is_a_port_only_when_the_graph_gives_it(tmp_path: Path, write: Callable[..., None]) -> None:
    write("def f(seed: int): ...")
    assert ports(tmp_path).inputs == {}
    assert ports(tmp_path, inputs={"seed": "number"}).inputs == {"seed": Port("json", required=True, many=True)}
    assert ports(tmp_path, arguments={"seed": 1}).inputs == {}


def test_decorated_and_callable_objects(tmp_path: Path, write: Callable[..., None]) -> None:
    write("""
        import functools
        def twice(function):
            @functools.wraps(function)
            def wrapper(*args, **kwargs):
                return function(*args, **kwargs)
            return wrapper
        @twice
        def wrapped(a: str) -> str: ...
        def two(a: str, b: int) -> str: ...
        part = functools.partial(two, b=1)
        class Caller:
            async def __call__(self, a: str) -> str: ...
        caller = Caller()
    """)
    for name in ("wrapped", "part", "caller"):
        found = ports(tmp_path, f"mine:{name}")
        assert found.inputs["a"] == Port("text", required=True, each=True)
        assert found.outputs == {"text": Port("text")}


def test_packages_and_the_current_folder(
    tmp_path: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("def f(a: str): ...", "studio.frames")
    current = tmp_path / "current"
    current.mkdir()
    (current / "mine_too.py").write_text("def f(b: str): ...")
    monkeypatch.chdir(current)
    before = list(sys.path)
    assert set(ports(tmp_path, "studio.frames:f").inputs) == {"a"}
    assert set(ports(tmp_path, "mine_too:f").inputs) == {"b"}
    assert sys.path == before


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("mine:add_bordr", "call: module 'mine' has no 'add_bordr', did you mean 'add_border'?"),
        ("mine:zzz", "call: module 'mine' has no 'zzz'; it has Class, add_border, items"),
        ("mine:Class", "call: 'mine:Class' is a class; name a function"),
        ("mine:NUMBER", "call: 'mine:NUMBER' is of type int; name a function"),
        ("mine:items", "call: 'mine:items' is a generator; return a list instead"),
        ("mime:f", "call: there is no module 'mime' in"),
        ("studio.frame:f", "call: there is no module 'studio.frame' in"),
        ("broken:f", "call: importing 'broken' failed: ZeroDivisionError: division by zero"),
        ("wrong:f", "call: importing 'wrong' failed: SyntaxError: "),
        ("exits:f", "call: importing 'exits' failed: SystemExit: 3"),
        ("needs:f", "call: importing 'needs' failed: No module named 'not_installed'; install what it needs"),
    ],
)
def test_functions_that_cannot_be_found(call: str, fault: str, tmp_path: Path, write: Callable[..., None]) -> None:
    write("NUMBER = 1\nclass Class: ...\ndef add_border(): ...\ndef items():\n    yield 1")
    write("def f(): ...", "studio.frames")
    write("1 / 0", "broken")
    write("def f(:", "wrong")
    write("raise SystemExit(3)", "exits")
    write("import not_installed", "needs")
    (found,) = faults(tmp_path, call)
    assert found.startswith(fault)


def test_a_missing_module_names_the_folders_and_the_nearest(tmp_path: Path, write: Callable[..., None]) -> None:
    write("def f(): ...")
    write("def f(): ...", "studio.frames")
    (found,) = faults(tmp_path, "mime:f")
    assert found == (
        f"call: there is no module 'mime' in {tmp_path}, {os.getcwd()} or among the installed packages, "
        "did you mean 'mine'?"
    )
    assert faults(tmp_path, "studio.frame:f")[0].endswith("did you mean 'frames'?")


def test_a_module_hidden_by_another_is_refused(tmp_path: Path, write: Callable[..., None]) -> None:
    write("def f(): ...", "json")
    (found,) = faults(tmp_path, "json:f")
    assert found.startswith(f"call: {tmp_path / 'json.py'} cannot be imported: 'json' is loaded from ")
    assert found.endswith("already; rename one of them")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"arguments": {"pixel": 1}}, "arguments.pixel: 'mine:f' has no parameter 'pixel', did you mean 'pixels'?"),
        ({"input_types": {"x": "text"}}, "input_types.x: 'mine:f' has no parameter 'x'; it has image, pixels"),
        ({"input_types": {"image": "imag"}}, "input_types.image: unknown type 'imag', did you mean 'image'?"),
        ({"outputs": {"x": "list[picture]"}}, "outputs.x: unknown type 'list[picture]'"),
        (
            {"arguments": {"pixels": 1}, "inputs": {"pixels": "n"}},
            "arguments.pixels: 'pixels' is given by inputs.pixels too; remove one of them",
        ),
    ],
)
def test_fields_that_do_not_fit(
    fields: dict[str, object], fault: str, tmp_path: Path, write: Callable[..., None]
) -> None:
    write("def f(image, pixels=3): ...")
    (found,) = faults(tmp_path, **fields)
    assert found.startswith(fault)


def test_all_faults_are_told_at_once(tmp_path: Path, write: Callable[..., None]) -> None:
    write("def f(image): ...")
    assert len(faults(tmp_path, arguments={"a": 1}, input_types={"b": "text"}, outputs={"c": "no"})) == 3


def test_hints_that_cannot_be_read(tmp_path: Path, write: Callable[..., None]) -> None:
    write("def f(a: 'list['): ...")
    (found,) = faults(tmp_path)
    assert found.startswith("call: the signature of 'mine:f' cannot be read: ")
