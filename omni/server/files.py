"""The file store: inputs and outputs of jobs in a local folder, or anywhere that fsspec reaches (S3 and others).

Names are made here and in omni/server/values.py, never by clients: `JOB_ID/in-NUMBER.SUFFIX` and
`JOB_ID/ATTEMPT-OUTPUT-INDEX.SUFFIX`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from omni.server.jobs import Draining, StoreError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
NUM_WORKERS = 4
"""Threads that encode, decode and copy files."""
MARK = "omni-store"
"""File that names the job store to which the files belong."""
NAME = re.compile(r"[A-Za-z0-9_]+/[A-Za-z0-9_][A-Za-z0-9_.-]*")


class FileStore:
    """Files by name, in a folder (`/var/lib/omni/files`) or under a URL (`s3://bucket/omni`, `memory://omni`).

    `options` go to the fsspec file system (keys, endpoint). Raises StoreError.
    """

    def __init__(self, url_or_folder: str | Path, **options: Any) -> None:
        url = str(url_or_folder)
        try:
            self._fs, self._root = fsspec.url_to_fs(url, **options)
            self.folder = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None
            """The local folder, or None for a remote store."""
            if self.folder is not None:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what clients sent is nobody else's affair
            self._fs.makedirs(self._root, exist_ok=True)
        except (ImportError, OSError, ValueError) as error:
            raise StoreError(f"{url}: the file store cannot be opened: {error}") from error
        self._workers = ThreadPoolExecutor(NUM_WORKERS, "omni-files")
        self._closed = False

    def close(self) -> None:
        """End the threads, after what they do."""
        self._closed = True
        self._workers.shutdown()

    async def call(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Do blocking work on files in a thread of the store. Raises Draining after `close`."""
        if self._closed:
            raise Draining("the server has stopped; ask another, or again later")
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *arguments)

    # blocking, for `call` -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write the file to; it is in the store, whole, when the block ends well."""
        path = self._path(name)
        with _told(name):
            if self.folder is not None:
                local = self.folder / name
                local.parent.mkdir(parents=True, exist_ok=True)
                # The suffix stays last: writers choose the format by it.
                part = local.with_name(f".part-{os.urandom(4).hex()}-{local.name}")
                try:
                    yield part
                    os.replace(part, local)
                finally:
                    part.unlink(missing_ok=True)
                return
            with tempfile.TemporaryDirectory(prefix="omni-") as folder:
                part = Path(folder) / Path(name).name
                yield part
                self._fs.put_file(str(part), path)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A local path of the file, inside the block."""
        path = self._path(name)
        with _told(name):
            if self.folder is not None:
                yield Path(path)
                return
            with tempfile.TemporaryDirectory(prefix="omni-") as folder:
                part = Path(folder) / Path(name).name
                self._fs.get_file(path, str(part))
                yield part

    def open_sync(self, name: str) -> Path | bytes:
        """The local path of a file, or the content of a remote one."""
        path = self._path(name)
        with _told(name):
            if self.folder is None:
                return bytes(self._fs.cat_file(path))
            if not Path(path).is_file():
                raise FileNotFoundError(name)
            return Path(path)

    def mark(self, store_id: str) -> None:
        """Note to which job store the files belong. Raises StoreError when they are another's.

        Each store removes files whose jobs it does not know, so that two of them would remove each other's.
        """
        path = f"{self._root}/{MARK}"
        with _told(MARK):
            owner = self._owner(path)
            if owner is None:
                self._claim(path, store_id)
                owner = self._owner(path)
        if owner != store_id:
            raise StoreError(
                f"the files in {self._root} belong to another job store ({(owner or '')[:40]}); give each store a "
                f"folder of its own, or remove {path} if that store is gone"
            )

    def _owner(self, path: str) -> str | None:
        try:
            return bytes(self._fs.cat_file(path)).decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return None

    def _claim(self, path: str, store_id: str) -> None:
        """Write the mark, whole at once where files are local: another server may read it at this moment."""
        if self.folder is None:
            self._fs.pipe_file(path, store_id.encode())
            return
        draft = Path(f"{path}.{uuid.uuid4().hex}")
        draft.write_text(store_id)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another server was first
        finally:
            draft.unlink()

    def remove_folder(self, job_id: str) -> None:
        """Remove all files of a job."""
        if not re.fullmatch(r"[A-Za-z0-9_]+", job_id):
            raise StoreError(f"{job_id!r} is no job id")
        with contextlib.suppress(FileNotFoundError), _told(job_id):
            self._fs.rm(f"{self._root}/{job_id}", recursive=True)

    def remove(self, names: list[str]) -> None:
        """Remove single files."""
        for name in names:
            with contextlib.suppress(FileNotFoundError), _told(name):
                self._fs.rm_file(self._path(name))

    def folders(self) -> list[str]:
        """The jobs that have files."""
        with _told(self._root):
            try:
                found = self._fs.ls(self._root, detail=False, refresh=True)
            except FileNotFoundError:
                return []
            return [name for path in found if (name := Path(path).name) != MARK]

    def _path(self, name: str) -> str:
        if not NAME.fullmatch(name):
            raise StoreError(f"{name!r} is no name of the file store")
        return f"{self._root}/{name}"


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Faults of the file system become a StoreError; a missing file stays one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"the file store cannot handle {name}: {error.strerror or error}") from error
