"""Files in the page cache and out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni.bench import page_cache
from omni.bench.page_cache import cached_share, make_cold, make_warm, wake_memory


@pytest.fixture
def file(root: Path, tmp_path: Path) -> Path:
    """Some MiB on a disk."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(8 << 20))
    return path


def test_files_are_made_warm_and_cold(file: Path) -> None:
    make_warm([file])
    assert cached_share([file]) == 1.0
    doubt = make_cold([file])
    share = cached_share([file])
    assert share is not None
    assert (doubt == "") == (share <= page_cache.COLD_SHARE)
    make_warm([file])
    assert cached_share([file]) == 1.0


def test_files_that_stay_are_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "Path", lambda path: file.parent / "no such folder" / "drop_caches")
    monkeypatch.setattr(page_cache, "_reads_cold", lambda files: False)
    monkeypatch.setattr(page_cache, "cached_share", lambda files: 0.75)
    assert make_cold([file]) == "not cold: 75% of the files stayed cached"
    monkeypatch.setattr(page_cache, "cached_share", lambda files: None)
    assert make_cold([file]) == "not cold: read as fast as before"


def test_empty_files_have_no_share(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert cached_share([tmp_path / "empty"]) is None
    make_warm([tmp_path / "empty"])


def test_free_memory_is_touched_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    run = page_cache.subprocess.run

    def listen(command: list[str], **options: object) -> object:
        asked.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(page_cache.subprocess, "run", listen)
    wake_memory(8 << 20)
    wake_memory(0)
    assert [command[-1] for command in asked] == [str(8 << 20)]
    monkeypatch.setattr(page_cache.subprocess, "run", lambda command, **_: asked.append(command))
    wake_memory(1 << 60)
    assert 0 < int(asked[-1][-1]) < 1 << 50, "never more than what is free"
