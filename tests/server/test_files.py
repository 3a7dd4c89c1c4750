"""Files by names of our own: in a folder, and on a file system that is not local."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from omni.server.files import FileStore
from omni.server.jobs import JobOrder, StoreError
from tests.server.conftest import WAIT_SECONDS, MakeService

BAD_NAMES = ["", "a", "../a/b", "a/../b", "/etc/passwd", "a/b/c", "a/b\n", "a//b", "a/", "job_1/..", "job_1/.part-x"]


@pytest.fixture(params=["folder", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path / "files" if request.param == "folder" else "memory://omni-files")
    yield store
    store.close()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def content(value: Path | bytes) -> bytes:
    return value.read_bytes() if isinstance(value, Path) else value


def test_what_is_written_is_read(files: FileStore) -> None:
    with files.writing("job_1/out-1.bin") as path:
        assert path.suffix == ".bin"
        path.write_bytes(b"\x00\xff")
    assert content(files.open_sync("job_1/out-1.bin")) == b"\x00\xff"
    with files.reading("job_1/out-1.bin") as path:
        assert path.read_bytes() == b"\x00\xff"
    assert files.folders() == ["job_1"]


def test_a_file_is_there_whole_or_not_at_all(files: FileStore) -> None:
    with contextlib.suppress(RuntimeError), files.writing("job_1/out-1.bin") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    with pytest.raises(FileNotFoundError):
        files.open_sync("job_1/out-1.bin")
    if files.folder is not None:
        assert list((files.folder / "job_1").iterdir()) == []


def test_removed_files_are_gone(files: FileStore) -> None:
    for name in ("job_1/a.bin", "job_1/b.bin", "job_2/a.bin"):
        with files.writing(name) as path:
            path.write_bytes(b"x")
    files.remove(["job_1/a.bin", "job_1/never.bin"])
    with pytest.raises(FileNotFoundError):
        files.open_sync("job_1/a.bin")
    files.remove_folder("job_1")
    files.remove_folder("job_1")
    assert files.folders() == ["job_2"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_refused(files: FileStore, name: str) -> None:
    for use in (files.open_sync, lambda name: files.remove([name])):
        with pytest.raises(StoreError, match="is no name of the file store"):
            use(name)
    for use in (files.reading, files.writing):
        with pytest.raises(StoreError, match="is no name of the file store"), use(name):
            pass


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/"])
def test_other_folders_are_refused(files: FileStore, name: str) -> None:
    with pytest.raises(StoreError, match="is no job id"):
        files.remove_folder(name)


@pytest.mark.parametrize("url", ["nothing://bucket", "/proc/nowhere"])
def test_a_store_that_cannot_be_opened_says_so(url: str) -> None:
    with pytest.raises(StoreError, match="the file store cannot be opened: "):
        FileStore(url)


async def test_a_disk_that_fails_fails_the_job(make_service: MakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = {"stages": {"work": {"kind": "function", "call": "stages.function.library:add_border"}}}
    service = make_service({"g": graph})
    await service.start()
    job = await service.submit(JobOrder(graph="g", inputs={"image": Image.new("RGB", (4, 4))}))

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("omni.server.files.os.replace", full)
    async with asyncio.timeout(WAIT_SECONDS):
        events = [event async for event in service.events(job.id)]
    error = events[-1].data["error"]
    assert error["code"] == "output_failed"
    assert "No space left on device" in error["cause"]


async def test_jobs_with_files_elsewhere(make_service: MakeService) -> None:
    graph = {"stages": {"work": {"kind": "function", "call": "stages.function.library:add_border"}}}
    service = make_service({"g": graph}, files="memory://bucket/omni")
    await service.start()
    job = await service.submit(JobOrder(graph="g", inputs={"image": Image.new("RGB", (4, 4))}))
    async with asyncio.timeout(WAIT_SECONDS):
        assert [event async for event in service.events(job.id)][-1].type == "done"
    found = await service.open_output(job.id, "image")
    assert found is not None
    assert isinstance(found[1], bytes)
    assert found[1].startswith(b"\x89PNG")
    assert len(found[1]) == found[0].bytes
    assert len(service.files.folders()) == 1
    await service.delete(job.id)
    assert service.files.folders() == []
