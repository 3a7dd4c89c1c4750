"""The reader threads: every byte arrives, progress adds up, and one failure ends all."""

from __future__ import annotations

import errno
import functools
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni.errors import UsageError
from stages.policies.load import files as loaded_files
from stages.policies.load import reader
from stages.policies.load.catalog import Entry
from stages.policies.load.chunks import Chunk, Piece, plan_chunks
from stages.policies.load.files import Files
from stages.policies.load.reader import ConvertRoute, FillRoute, Job, Lane, PopulateRoute, Route, StagedRoute, read_all
from stages.policies.load.staging import Destination, HostStaging, RingStaging
from tests.stages.policies.load.test_staging import LateLink


def quiet(*_: object) -> None:
    """No progress."""


def make_file(folder: str, counts: list[int], lead: int) -> tuple[list[Entry], dict[str, torch.Tensor]]:
    """A file of random bfloat16 tensors that begin at byte `lead`."""
    numbers = torch.Generator().manual_seed(len(counts))
    tensors = {f"t{n}": torch.randn(count, generator=numbers).bfloat16() for n, count in enumerate(counts)}
    file, entries = f"{folder}/weights", []
    with open(file, "wb") as stream:
        stream.write(bytes(lead))
        for name, tensor in tensors.items():
            data = tensor.view(torch.uint8).numpy().tobytes()
            entries.append(Entry(name, file, stream.tell(), len(data), "BF16", tuple(tensor.shape)))
            stream.write(data)
    return entries, tensors


@given(
    counts=st.lists(st.integers(0, 900), min_size=1, max_size=12),
    lead=st.integers(8, 80),
    num_threads=st.integers(1, 5),
    chunk_bytes=st.integers(64, 2500),
    way=st.sampled_from(["fill", "copy", "convert", "staged", "direct", "ring"]),
)
def test_every_tensor_arrives(counts: list[int], lead: int, num_threads: int, chunk_bytes: int, way: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entries, tensors = make_file(folder, counts, lead)
        dtype = torch.float32 if way in ("convert", "staged", "ring") else torch.bfloat16
        targets = {name: torch.full(tensor.shape, -1.0, dtype=dtype) for name, tensor in tensors.items()}
        staging: Callable[[], HostStaging | RingStaging] = functools.partial(HostStaging, chunk_bytes)
        if way == "ring":
            staging = lambda: RingStaging(LateLink(), chunk_bytes, pin=False)  # noqa: E731
        changed = {name: Destination.of(torch.bfloat16, target) for name, target in targets.items()}
        route: Route = StagedRoute(changed, staging)
        if way in ("fill", "copy"):
            route = FillRoute(changed)
        elif way == "convert":
            route = ConvertRoute(changed)
        chunks = plan_chunks(entries, chunk_bytes)
        files, told = Files("direct" if way == "direct" else "buffered", cached=way == "copy"), []
        total = sum(entry.num_bytes for entry in entries)
        read_all(
            [Job("part", chunk, route) for chunk in chunks],
            files,
            num_threads,
            {"part": total},
            lambda *report: told.append(report),
        )
        files.close()
    for name, tensor in tensors.items():
        assert torch.equal(targets[name], tensor.to(dtype)), name
    assert told[-1] == ("part", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


class Counting(Route):
    """Counts what it carries, and may fail, or hang until it is let go."""

    def __init__(self, failure: BaseException | None = None, gate: threading.Event | None = None) -> None:
        self.failure = failure
        self.gate = gate
        self.carried: list[int] = []

    def carry(self, chunk: Chunk, lane: Lane) -> None:
        if self.gate is not None:
            self.gate.wait(60)
        self.carried.append(chunk.offset)
        if self.failure is not None and chunk.offset == 1:
            raise self.failure


def jobs_of(route: Route, count: int) -> list[Job]:
    return [Job("part", Chunk("file", number, 1, (Piece("w", number, 1),)), route) for number in range(count)]


@pytest.mark.parametrize("failure", [UsageError("broken"), OSError("gone"), RuntimeError("CUDA"), MemoryError()])
def test_a_failure_stops_the_rest(failure: BaseException) -> None:
    route = Counting(failure)
    with pytest.raises(type(failure)) as caught:
        read_all(jobs_of(route, 100), Files("buffered"), 1, {"part": 100}, quiet)
    assert caught.value is failure
    assert route.carried == [0, 1]


def test_a_failure_among_threads_ends_them_all() -> None:
    with pytest.raises(UsageError, match="broken"):
        read_all(jobs_of(Counting(UsageError("broken")), 1000), Files("buffered"), 4, {"part": 1000}, quiet)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load-")]


def test_a_caller_that_is_interrupted_stops_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "REPORT_SECONDS", 0.001)
    gate = threading.Event()
    route = Counting(gate=gate)

    def interrupt(*_: object) -> None:
        gate.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_all(jobs_of(route, 1), Files("buffered"), 2, {"part": 1}, interrupt)


def test_a_load_that_stands_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "REPORT_SECONDS", 0.001)
    monkeypatch.setattr(reader, "STALL_SECONDS", 0.01)
    gate = threading.Event()
    with pytest.raises(UsageError, match=r"^file: nothing was read for"):
        read_all(jobs_of(Counting(gate=gate), 3), Files("buffered"), 2, {"part": 3}, quiet)
    gate.set()


def test_a_file_that_hangs_while_it_is_opened_does_not_hang_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_files, "CLOSE_SECONDS", 0.01)
    files, gate, opening = Files("buffered"), threading.Event(), threading.Event()

    def hang(file: str, flags: int) -> int:
        opening.set()
        gate.wait(60)
        raise UsageError("gone")

    monkeypatch.setattr(loaded_files, "_open", hang)
    chunk = Chunk("file", 0, 1, (Piece("w", 0, 1),))

    def read() -> None:
        with pytest.raises(UsageError, match="gone"):
            files.scatter(chunk, [memoryview(bytearray(1))])

    thread = threading.Thread(target=read)
    thread.start()
    assert opening.wait(60)
    files.close()
    gate.set()
    thread.join(60)
    files.close()


def test_nothing_to_read() -> None:
    told: list[tuple[str, int, int]] = []
    read_all([], Files("buffered"), 4, {"part": 0}, lambda *report: told.append(report))
    assert told == [("part", 0, 0)]


FAULTS = [
    (OSError(errno.EIO, os.strerror(errno.EIO)), "tensor 't1' cannot be read: Input/output error"),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), "tensor 't1' cannot be read: Permission denied"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "tensor 't1' cannot be read: No space left on device"),
    (None, "cut short in tensor 't1': fetch the file again"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
@pytest.mark.parametrize("staged", [False, True])
def test_faults_of_reading_name_file_and_tensor(
    fault: OSError | None, message: str, staged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, tensors = make_file(str(tmp_path), [100, 100, 100], 8)
    real = os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        """Reads the first 250 bytes of data, in the middle of the second tensor, and no more."""
        if offset < 8 + 250:
            head = views[0][: 258 - offset]
            return real(descriptor, [head, *(view[: 250 - len(head)] for view in views[1:2])], offset)
        if fault is not None:
            raise fault
        return 0

    monkeypatch.setattr(os, "preadv", preadv)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    places = {name: Destination.of(torch.bfloat16, target) for name, target in targets.items()}
    route: Route = StagedRoute(places, functools.partial(HostStaging, 1 << 16)) if staged else FillRoute(places)
    jobs = [Job("part", chunk, route) for chunk in plan_chunks(entries, 1 << 16)]
    with pytest.raises(UsageError) as caught:
        read_all(jobs, Files("buffered"), 2, {"part": 600}, quiet)
    assert str(caught.value) == f"{tmp_path}/weights: {message}"


def test_populating_reads_the_mapped_file(tmp_path: Path) -> None:
    entries, tensors = make_file(str(tmp_path), [1000, 5000], 8)
    files = Files("buffered")
    jobs = [Job("part", chunk, PopulateRoute()) for chunk in plan_chunks(entries, 4096)]
    told: list[tuple[str, int, int]] = []
    read_all(jobs, files, 2, {"part": 12000}, lambda *report: told.append(report))
    assert told[-1] == ("part", 12000, 12000)
    mapped = torch.frombuffer(files.mapping(entries[1].file).map, dtype=torch.bfloat16, count=5000, offset=2008)
    assert torch.equal(mapped, tensors["t1"])
    files.close()


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    chunk = Chunk(str(tmp_path / "gone"), 0, 1, (Piece("w", 0, 1),))
    for call in (
        lambda: Files("buffered").populate(chunk),
        lambda: Files("buffered").scatter(chunk, [memoryview(b"x")]),
    ):
        with pytest.raises(UsageError, match=r"gone: cannot be read: No such file or directory"):
            call()


def test_a_thread_that_ends_in_an_unknown_way_fails_the_load(tmp_path: Path) -> None:
    class Broken(Route):
        def carry(self, chunk: Chunk, lane: Lane) -> None:
            raise KeyError("nobody thought of this")

    jobs = [Job("part", Chunk("file", 0, 4, (Piece("t", 0, 4),)), Broken())]
    before, threading.excepthook = threading.excepthook, lambda _: None
    try:
        with pytest.raises(UsageError, match="only 0 of 4 bytes were read"):
            read_all(jobs, Files("buffered"), 1, {"part": 4}, quiet)
    finally:
        threading.excepthook = before
