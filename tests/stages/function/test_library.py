"""The ready-made functions."""

import pytest
from PIL import Image

from omni.registry import find_kind
from omni.spec import FunctionSpec
from stages.function import library

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def test_add_border() -> None:
    framed = library.add_border(Image.new("RGB", (4, 2), RED), pixels=3, colour="#0000ff")
    assert framed.size == (10, 8)
    assert framed.getpixel((2, 2)) == BLUE
    assert framed.getpixel((3, 3)) == RED


def test_upscale() -> None:
    assert library.upscale(Image.new("RGB", (4, 2)), 2.5).size == (10, 5)
    assert library.upscale(Image.new("RGB", (4, 2)), 0.01).size == (1, 1)


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [(1, 0, (4, 4)), (2, 0, (9, 4)), (4, 0, (9, 9)), (5, 0, (14, 9)), (5, 2, (9, 14)), (2, 9, (9, 4))],
)
def test_grid_size(count: int, columns: int, size: tuple[int, int]) -> None:
    images = [Image.new("RGB", (4, 4)) for _ in range(count)]
    assert library.grid(images, columns, gap=1).size == size


def test_grid_centres_smaller_images() -> None:
    sheet = library.grid([Image.new("RGB", (4, 4), RED), Image.new("L", (2, 2), 0)], columns=1, gap=0)
    assert [sheet.getpixel(place) for place in ((0, 0), (0, 4), (1, 5))] == [RED, WHITE, (0, 0, 0)]


def test_side_by_side_keeps_the_order() -> None:
    row = library.side_by_side([Image.new("RGB", (1, 1), colour) for colour in (RED, BLUE, RED)], gap=0)
    assert [row.getpixel((x, 0)) for x in range(3)] == [RED, BLUE, RED]


@pytest.mark.parametrize(
    ("name", "arguments", "fault"),
    [
        ("add_border", (Image.new("RGB", (1, 1)), -1), "pixels must be 0 or more, not -1"),
        ("upscale", (Image.new("RGB", (1, 1)), 0), "factor must be above 0, not 0"),
        ("grid", ([],), "grid needs at least one image"),
        ("grid", ([Image.new("RGB", (1, 1))], -1), "columns and gap must be 0 or more, not -1 and 4"),
    ],
)
def test_wrong_arguments(name: str, arguments: tuple[object, ...], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        getattr(library, name)(*arguments)


@pytest.mark.parametrize("name", ["add_border", "upscale", "grid", "side_by_side"])
def test_they_are_functions_for_graphs(name: str) -> None:
    kind, spec = find_kind("function"), FunctionSpec(call=f"stages.function.library:{name}")
    assert kind.check(spec, ".") == []
    assert {output: port.type for output, port in kind.ports(spec, ".").outputs.items()} == {"image": "image"}
