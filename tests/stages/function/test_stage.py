"""Calling the user's function: arguments, items, errors, aborts."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import textwrap
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omni.errors import RequestAborted, StageError, StageSetupError
from omni.messages import Output, Progress, StageItem, Started
from omni.spec import FunctionSpec
from omni.stage import StageCall, StageContext
from stages.function.stage import FunctionStage

WAIT_SECONDS = 30
CODE = """
    from __future__ import annotations
    import asyncio
    import threading
    from typing import NamedTuple
    from PIL import Image

    meeting = threading.Barrier(3)
    begun, go_on, log = threading.Event(), threading.Event(), []

    def greet(name: str, times: int = 1, mark: str | None = None) -> str:
        return " ".join([name] * times) + (mark or "")

    async def greet_later(name: str) -> str:
        await asyncio.sleep(0)
        return name

    def need_none(a: str | None) -> str:
        return repr(a)

    def positional(a: str, b: str, /, c: str) -> str:
        return a + b + c

    def open_to_all(**values) -> dict:
        return values

    def draw(seed: int) -> int:
        return seed

    def meet(name: str) -> str:
        meeting.wait(30)
        return name

    def split(image: Image.Image) -> list[Image.Image]:
        return [image, image]

    class Parts(NamedTuple):
        size: dict
        text: str

    def measure(image: Image.Image) -> Parts:
        return Parts({"width": image.width}, "text")

    def forgets(image):
        return {"imag": image}

    def lies(image) -> Image.Image:
        return "no image"

    def says_nothing(name: str) -> None:
        log.append(name)

    def spoil(items: dict, image: Image.Image) -> dict:
        items["list"].append(1)
        image.putpixel((0, 0), (9, 9, 9))
        return items

    def inner(name):
        raise KeyError(f"no {name}")

    def fails(name: str) -> str:
        return inner(name)

    async def fails_later(name: str) -> str:
        return inner(name)

    def exits(name: str) -> str:
        raise SystemExit(4)

    async def exits_later(name: str) -> str:
        raise SystemExit(4)

    async def interrupts(name: str) -> str:
        raise KeyboardInterrupt

    def runs_out(name: str) -> str:
        return next(iter(()))

    def collect(name: str, names: list) -> dict:
        names.append(name)
        return names

    def lazy(name: str) -> str:
        import beside_mine
        return beside_mine.name

    def waits(name: str) -> str:
        begun.set()
        go_on.wait(30)
        log.append(name)
        return name

    async def waits_for_ever(name: str) -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            log.append("cancelled")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder with the module `mine`."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(textwrap.dedent(CODE))
    yield tmp_path
    for name in ("mine", "beside_mine"):
        sys.modules.pop(name, None)


@contextlib.asynccontextmanager
async def running(folder: Path, name: str, **fields: Any) -> AsyncGenerator[FunctionStage, None]:
    spec = FunctionSpec(call=f"mine:{name}", **fields)
    stage = FunctionStage(StageContext(name="frame", spec=spec, base_dir=str(folder)))
    await stage.setup(lambda progress: None)
    try:
        yield stage
    finally:
        await stage.teardown()


async def items_of(stage: FunctionStage, request_id: str = "r", **inputs: Any) -> list[StageItem]:
    return [item async for item in stage.run(StageCall(request_id=request_id, inputs=inputs, seed=5))]


async def payload_of(stage: FunctionStage, request_id: str = "r", **inputs: Any) -> dict[str, Any]:
    return (await items_of(stage, request_id, **inputs))[-1].payload


async def call(folder: Path, name: str, fields: dict[str, Any] | None = None, /, **inputs: Any) -> dict[str, Any]:
    async with running(folder, name, **(fields or {})) as stage:
        return await payload_of(stage, **inputs)


# Arguments ---------------------------------------------------------------------------------------------------------


async def test_items_of_a_run(mine: Path) -> None:
    async with running(mine, "greet") as stage:
        assert await items_of(stage, name="Ada") == [Started(), Output(payload={"text": "Ada"})]


async def test_arguments(mine: Path) -> None:
    assert await call(mine, "greet", {"arguments": {"times": 2}}, name="Ada", mark="!") == {"text": "Ada Ada!"}
    assert await call(mine, "greet_later", name="Ada") == {"text": "Ada"}
    assert await call(mine, "need_none") == {"text": "None"}
    assert await call(mine, "positional", a="1", b="2", c="3") == {"text": "123"}
    assert await call(mine, "open_to_all", {"arguments": {"x": 1}}, y=2) == {"json": {"x": 1, "y": 2}}


async def test_the_seed_is_given(mine: Path) -> None:
    assert await call(mine, "draw") == {"json": 5}
    assert await call(mine, "draw", {"arguments": {"seed": 8}}) == {"json": 8}
    assert await call(mine, "draw", {"inputs": {"seed": "number"}}, seed=9) == {"json": 9}


async def test_a_missing_input(mine: Path) -> None:
    with pytest.raises(StageError, match="stage 'frame': its input 'name' is missing"):
        await call(mine, "greet")


async def test_functions_run_side_by_side(mine: Path) -> None:
    async with running(mine, "meet") as stage:
        payloads = await asyncio.gather(*(payload_of(stage, name, name=name) for name in "abc"))
    assert payloads == [{"text": name} for name in "abc"]


async def test_inputs_are_shared_unless_the_function_writes_into_them(mine: Path) -> None:
    items, image = {"list": [0]}, Image.new("RGB", (1, 1))
    fields = {"mutates_inputs": True, "outputs": {"json": "json"}}
    assert await call(mine, "spoil", fields, items=items, image=image) == {"json": {"list": [0, 1]}}
    assert (items, image.getpixel((0, 0))) == ({"list": [0]}, (0, 0, 0))
    async with running(mine, "open_to_all") as stage:
        assert (await payload_of(stage, image=image))["json"]["image"] is image


async def test_what_a_function_writes_into_its_arguments_is_gone_with_the_request(mine: Path) -> None:
    async with running(mine, "collect", arguments={"names": ["x"]}) as stage:
        assert [(await payload_of(stage, name=name))["json"] for name in "ab"] == [["x", "a"], ["x", "b"]]


async def test_imports_inside_the_function(mine: Path) -> None:
    (mine / "beside_mine.py").write_text("name = 'beside'")
    async with running(mine, "lazy") as stage:
        assert await payload_of(stage, name="x") == {"text": "beside"}
    async with running(mine, "lazy"):
        assert sys.path.count(str(mine)) == 1


# Items -------------------------------------------------------------------------------------------------------------


async def test_a_list_makes_one_run_per_item(mine: Path) -> None:
    async with running(mine, "greet") as stage:
        *items, output = await items_of(stage, name=["a", "b"], times=2, mark=("!", "?"))
    assert output == Output(payload={"text": ["a a!", "b b?"]})
    assert [(item.step, item.num_steps, item.unit) for item in items if isinstance(item, Progress)] == [
        (1, 2, "item"),
        (2, 2, "item"),
    ]


async def test_an_empty_list_makes_empty_lists(mine: Path) -> None:
    assert await call(mine, "measure", image=[]) == {"size": [], "text": []}


async def test_lists_of_lists_are_joined(mine: Path) -> None:
    first, second = Image.new("RGB", (1, 1)), Image.new("RGB", (2, 2))
    assert await call(mine, "split", image=[first, second]) == {"images": [first, first, second, second]}


async def test_lists_of_different_lengths(mine: Path) -> None:
    fault = "mine:greet runs once per item, but its lists have different lengths: 'name' has 2, 'mark' has 1"
    with pytest.raises(StageError, match=fault):
        await call(mine, "greet", name=["a", "b"], mark=["!"])


# Outputs -----------------------------------------------------------------------------------------------------------


async def test_several_outputs(mine: Path) -> None:
    image = Image.new("RGB", (3, 3))
    assert await call(mine, "measure", image=image) == {"size": {"width": 3}, "text": "text"}
    outputs = {"outputs": {"x": "json", "y": "text"}}
    assert await call(mine, "open_to_all", outputs, x=1, y="2", z=3) == {"x": 1, "y": "2"}


async def test_no_output(mine: Path) -> None:
    assert await call(mine, "says_nothing", name="Ada") == {}
    assert sys.modules["mine"].log == ["Ada"]


async def test_a_missing_field(mine: Path) -> None:
    fault = r"mine:forgets returned no 'image', did you mean 'imag'\?; it returned imag .return a dict with image, mask"
    with pytest.raises(StageError, match=fault):
        await call(mine, "forgets", {"outputs": {"image": "image", "mask": "image"}}, image=1)


@pytest.mark.parametrize("outputs", [{}, {"picture": "list[image]"}])
async def test_a_value_of_another_type(outputs: dict[str, str], mine: Path) -> None:
    name, kind = next(iter(outputs.items()), ("image", "image"))
    with pytest.raises(StageError) as caught:
        await call(mine, "lies", {"outputs": outputs}, image=1)
    assert caught.value.cause == f"mine:lies returned str for the output '{name}', which is {kind}"


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fails", "fails_later"])
async def test_an_exception_names_the_function_and_keeps_the_users_frames(name: str, mine: Path) -> None:
    with pytest.raises(StageError) as caught:
        await call(mine, name, name="Ada")
    error = caught.value
    assert str(error) == f"stage 'frame': mine:{name}: KeyError: 'no Ada'"
    frames = [line.strip() for line in error.details.splitlines() if line.startswith("  File")]
    assert len(frames) == 2
    assert frames[0].startswith(f'File "{mine / "mine.py"}", line')
    assert frames[0].endswith(f"in {name}")
    assert frames[1].endswith("in inner")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("exits", "SystemExit: 4"),
        ("exits_later", "SystemExit: 4"),
        ("interrupts", "KeyboardInterrupt"),
        ("runs_out", "StopIteration"),
    ],
)
async def test_no_exception_does_more_than_fail_its_request(name: str, cause: str, mine: Path) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        with pytest.raises(StageError) as caught:
            await call(mine, name, name="x")
    assert caught.value.cause == f"mine:{name}: {cause}"


async def test_a_function_that_is_not_there(mine: Path) -> None:
    with pytest.raises(StageSetupError, match="module 'mine' has no 'gret', did you mean 'greet'"):
        await call(mine, "gret", name="x")


# Aborts ------------------------------------------------------------------------------------------------------------


async def abort_once_begun(stage: FunctionStage) -> asyncio.Future[Any]:
    run = asyncio.ensure_future(items_of(stage, "a", name="Ada"))
    begun: threading.Event = sys.modules["mine"].begun
    assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)
    await stage.abort("a")
    return run


async def test_an_async_function_is_cancelled(mine: Path) -> None:
    async with running(mine, "waits_for_ever") as stage:
        run = await abort_once_begun(stage)
        with pytest.raises(RequestAborted):
            await run
    assert sys.modules["mine"].log == ["cancelled"]


async def test_an_aborted_sync_function_goes_on_alone_and_its_result_is_dropped(mine: Path) -> None:
    async with running(mine, "waits") as stage:
        run = await abort_once_begun(stage)
        with pytest.raises(RequestAborted):
            await run
        assert sys.modules["mine"].log == []
        again = asyncio.ensure_future(payload_of(stage, "a", name="Bob"))
        sys.modules["mine"].go_on.set()
        assert await again == {"text": "Bob"}
        await stage.abort("unknown")
    await asyncio.to_thread(stage._pool.shutdown)
    assert sorted(sys.modules["mine"].log) == ["Ada", "Bob"]


async def test_a_run_that_waits_for_a_thread_has_not_started(mine: Path) -> None:
    async with running(mine, "waits") as stage:
        stage._pool = ThreadPoolExecutor(1)
        first = stage.run(StageCall(request_id="first", inputs={"name": "Ada"}, seed=0))
        assert await anext(first) == Started()
        second = asyncio.ensure_future(items_of(stage, "second", name="Bob"))
        third = stage.run(StageCall(request_id="third", inputs={"name": "Eve"}, seed=0))
        item = asyncio.ensure_future(anext(third))
        while "third" not in stage._work:
            await asyncio.sleep(0)
        await stage.abort("third")
        with pytest.raises(RequestAborted):
            await item
        sys.modules["mine"].go_on.set()
        assert (await second)[0] == Started()
        assert [item async for item in first] == [Output(payload={"text": "Ada"})]
    assert sys.modules["mine"].log == ["Ada", "Bob"]


async def test_an_abort_between_items_starts_no_further_one(mine: Path) -> None:
    async with running(mine, "says_nothing") as stage:
        run = stage.run(StageCall(request_id="a", inputs={"name": ["x", "y", "z"]}, seed=0))

        async def abort_after_the_first() -> None:
            async for item in run:
                if isinstance(item, Progress):
                    await stage.abort("a")

        with pytest.raises(RequestAborted):
            await abort_after_the_first()
    assert sys.modules["mine"].log == ["x"]
