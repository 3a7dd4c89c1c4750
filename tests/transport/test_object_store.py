"""What crosses processes arrives equal, in place and unharmed."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omni.errors import SharedInputError
from omni.media import Video
from omni.transport import object_store
from omni.transport.payload import SharedInputGuard

LARGE = 300_000
"""Elements enough for an object of its own in the store, whatever their size."""
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]


class Pair(msgspec.Struct):
    left: Any
    right: Any


@dataclasses.dataclass
class Conditioning:
    embeds: Any
    mask: Any


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def random_tensor(dtype: torch.dtype, count: int) -> torch.Tensor:
    data = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0))
    return data.to(dtype)


def in_the_store(tensor: torch.Tensor) -> bool:
    """Whether the data lies in the memory that the store shares between processes."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "plasma" in line]
    areas = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    return any(low <= tensor.data_ptr() < high for low, high in areas)


def hop(value: Any) -> Any:
    """Through the object store and back into this process."""
    import ray

    object_store.install()
    return ray.get(ray.put(object_store.to_host(value)))


def pickled(value: Any) -> Any:
    """Through pickle alone, in band."""
    packed = object_store.pack(value)
    assert packed is not None
    return packed.unpack()


# Tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_in_place(ray_cluster: object, dtype: torch.dtype) -> None:
    tensor = random_tensor(dtype, LARGE)
    arrived = hop(tensor)
    assert equal(arrived, tensor)
    assert in_the_store(arrived)
    assert not in_the_store(tensor)


def test_views_and_strides_are_kept(ray_cluster: object) -> None:
    base = torch.arange(2 * 64 * 64 * 32, dtype=torch.float32).reshape(2, 64, 64, 32)
    for view in (
        base.permute(0, 3, 1, 2),
        base.to(memory_format=torch.channels_last),
        base[1],
        base.transpose(0, 3),
        base.unsqueeze(1),
    ):
        arrived = hop(view)
        assert equal(arrived, view)
        assert arrived.stride() == view.stride()
        assert in_the_store(arrived)


def test_a_slice_ships_only_itself(ray_cluster: object) -> None:
    batch = torch.zeros(64, LARGE)
    assert hop(batch[3]).untyped_storage().nbytes() == LARGE * 4
    every_other = hop(batch[:, ::2])
    assert every_other.is_contiguous()
    assert every_other.untyped_storage().nbytes() == 64 * LARGE * 2


def test_nested_payloads_are_read_in_place(ray_cluster: object) -> None:
    tensor = random_tensor(torch.bfloat16, LARGE)
    arrived = hop({"a": [tensor, (tensor, 1)], "b": Pair(tensor, "x"), "c": Conditioning(tensor, None)})
    copies = [arrived["a"][0], arrived["a"][1][0], arrived["b"].left, arrived["c"].embeds]
    assert all(equal(copy, tensor) and in_the_store(copy) for copy in copies)
    assert len({copy.data_ptr() for copy in copies}) == 1, "the same tensor must be written once"


def test_arrays_and_frames_are_read_in_place_and_cannot_be_written_to(ray_cluster: object) -> None:
    frames = np.arange(4 * 64 * 64 * 3, dtype=np.uint8).reshape(4, 64, 64, 3).repeat(20, axis=0)
    video = hop({"video": Video(frames, 16.0)})["video"]
    assert np.array_equal(video.frames, frames)
    assert not video.frames.flags.writeable
    assert in_the_store(torch.from_numpy(object_store.own(video.frames))) is False


def test_an_own_copy_can_be_written_to(ray_cluster: object) -> None:
    tensor = torch.zeros(LARGE)
    shared = hop({"t": tensor})
    mine = object_store.own(shared)
    mine["t"].fill_(1)
    assert not in_the_store(mine["t"])
    assert shared["t"].sum() == 0


@pytest.mark.parametrize("through", [pickled, hop], ids=["packed", "stored"])
def test_small_and_odd_tensors(ray_cluster: object, through: Callable[[Any], Any]) -> None:
    for tensor in (
        torch.tensor(3.5),
        torch.tensor(True),
        torch.empty(0, 4),
        torch.empty((2, 0, 3), dtype=torch.float8_e4m3fn),
        torch.arange(5).expand(3, 5),
        torch.arange(12).reshape(3, 4).T,
        torch.randn(3, 3, dtype=torch.complex64).conj(),
        torch.randn(4, requires_grad=True),
        torch.nn.Parameter(torch.randn(4)),
        torch.arange(10)[2:7:2],
    ):
        arrived = through(tensor)
        assert equal(arrived, tensor.detach().resolve_conj())
        assert not arrived.requires_grad


@given(data=st.data())
@settings(max_examples=100)
def test_any_view_arrives_equal(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(tensor.dim()))))
    for dim, size in enumerate(tensor.shape):
        start = data.draw(st.integers(0, size))
        step = data.draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
    arrived = pickled(tensor)
    assert torch.equal(arrived, tensor)
    assert tensor.numel() == 0 or not object_store._is_dense(tensor) or arrived.stride() == tensor.stride()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(3).to_sparse(), r"a sparse_coo tensor cannot cross processes; make it dense with \.to_dense\(\)"),
        (torch.empty(2, device="meta"), "a tensor on meta cannot cross processes"),
    ],
    ids=["sparse", "meta"],
)
def test_what_cannot_cross_says_so(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        object_store.pack({"t": tensor})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_says_so() -> None:
    with pytest.raises(TypeError, match="a quantized tensor cannot cross processes"):
        object_store.pack({"t": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})


# Images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
@pytest.mark.parametrize("size", [(5, 3), (400, 300)])
def test_images_of_every_mode(ray_cluster: object, mode: str, size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 50).convert(mode if mode != "I;16" else "I").convert(mode)
    image.info["note"] = "kept"
    arrived = hop([image])[0]
    assert (arrived.mode, arrived.size, arrived.info) == (image.mode, image.size, image.info)
    assert arrived.tobytes() == image.tobytes()
    assert arrived.getpalette() == image.getpalette()
    arrived.putpixel((0, 0), 1 if isinstance(image.getpixel((0, 0)), int | float) else (1,) * len(image.getbands()))


def test_an_image_that_was_opened_from_a_file(ray_cluster: object, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((40, 30), 50).save(path)
    with Image.open(path) as image:
        arrived = hop({"image": image})["image"]
        path.unlink()
        assert type(arrived) is Image.Image
        assert arrived.tobytes() == image.tobytes()


def test_an_empty_image() -> None:
    assert pickled(Image.new("RGB", (0, 4))).size == (0, 4)


# Sharing --------------------------------------------------------------------------------------------------------


class Reader:
    """A consumer in a process of its own."""

    def read(self, payload: dict[str, Any], write: bool) -> tuple[bool, float, str]:
        tensor, guard, caught = payload["t"], SharedInputGuard({"x": payload}), ""
        inside, total = in_the_store(tensor), float(tensor.double().sum())
        if write:
            tensor[0] += 0
        try:
            guard.check("reader")
        except SharedInputError as error:
            caught = str(error)
        return inside, total, caught


def test_fan_out_writes_once_and_a_writer_is_caught(ray_cluster: object) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    readers = [ray.remote(num_cpus=0)(Reader).remote() for _ in range(2)]
    object_store.install()
    ref = ray.put({"t": torch.ones(LARGE * 10)})
    size = LARGE * 10 * 4
    eventually(lambda: size <= stored_bytes() < size + 1_000_000)
    answers = ray.get([reader.read.remote(ref, write=False) for reader in readers], timeout=60)
    assert answers == [(True, LARGE * 10.0, "")] * 2
    assert stored_bytes() < size + 1_000_000
    _, _, caught = ray.get(readers[0].read.remote(ref, write=True), timeout=60)
    assert caught.startswith("stage 'reader': wrote into its input 'x['t']', which other readers share")
    del ref
    eventually(lambda: stored_bytes() < size)


def stored_bytes() -> int:
    """Bytes of all objects in the store; Ray updates it every second or so."""
    import ray

    name = "object_store_memory"
    return int(ray.cluster_resources()[name] - ray.available_resources()[name])


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# CUDA -----------------------------------------------------------------------------------------------------------


def test_host_payloads_are_left_as_they_are() -> None:
    payload = {"t": torch.zeros(3), "n": np.zeros(2), "i": Image.new("RGB", (2, 2)), "s": "text"}
    ready = object_store.to_host(payload)
    assert all(ready[key] is payload[key] for key in payload)


@pytest.mark.gpu
def test_device_tensors_cross_through_pinned_memory() -> None:
    tensor = torch.randn(8, 1024, 1024, device="cuda")
    views = {"whole": tensor, "again": tensor, "view": tensor[:, ::2], "turned": tensor.permute(2, 0, 1)}
    host = object_store.to_host(views)
    assert host["whole"] is host["again"]
    assert all(value.is_pinned() for value in host.values())
    assert host["turned"].stride() == views["turned"].stride()
    for key, value in host.items():
        assert torch.equal(value, views[key].cpu())
    for _ in range(20):  # work still queued on the device is waited for
        busy = tensor
        for _ in range(10):
            busy = busy * 1.5 - busy * 0.5
        assert torch.allclose(object_store.to_host({"t": busy})["t"], tensor.cpu(), rtol=1e-3, atol=1e-3)
