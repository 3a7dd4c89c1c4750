"""One host copy for several processes: real processes, some of which are killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.memory import shared
from stages.memory.shared import NoRoom, SharedFile, sweep

NUM_BYTES = 10_000
PROGRAM = textwrap.dedent("""
    import sys
    from pathlib import Path
    from stages.memory.shared import SharedFile

    folder, key = Path(sys.argv[1]), sys.argv[2]
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "open":
            file = SharedFile(key, 10_000, 30.0, folder)
            print("filled" if file.is_filled else "empty", flush=True)
        elif word == "write":
            file.map[: len(rest[0])] = rest[0].encode()
            print("ok", flush=True)
        elif word == "read":
            print(file.map[: int(rest[0])].decode(), flush=True)
        elif word == "done":
            file.filled()
            print("ok", flush=True)
        elif word == "close":
            file.close()
            print("ok", flush=True)
""")


class User:
    """A process that does with a shared file what it is told."""

    def __init__(self, folder: Path, root: Path, key: str = "weights") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), key],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, line: str) -> str:
        self.ask(line)
        return self.hear()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


@pytest.fixture
def user(tmp_path: Path, root: Path) -> Iterator[Callable[..., User]]:
    """Starts processes, and ends them with the test."""
    users: list[User] = []

    def start(key: str = "weights") -> User:
        users.append(User(tmp_path, root, key))
        return users[-1]

    yield start
    for one in users:
        one.end()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_process_finds_what_the_first_has_filled(user: Callable[..., User], tmp_path: Path) -> None:
    first, second = user(), user()
    assert first.do("open") == "empty"
    second.ask("open")  # waits
    assert first.do("write hello") == "ok"
    assert first.do("done") == "ok"
    assert second.hear() == "filled"
    assert second.do("read 5") == "hello"
    assert first.do("write again") == "ok"
    assert second.do("read 5") == "again", "not the same pages"
    assert len(files(tmp_path)) == 1
    assert first.do("close") == "ok"
    assert len(files(tmp_path)) == 1, "removed under a user"
    assert second.do("close") == "ok"
    assert files(tmp_path) == []


def test_other_keys_are_other_files(user: Callable[..., User], tmp_path: Path) -> None:
    first, second = user("a"), user("b")
    assert first.do("open") == second.do("open") == "empty"
    assert len(files(tmp_path)) == 2


def test_a_killed_filler_is_followed_by_a_waiting_process(user: Callable[..., User], tmp_path: Path) -> None:
    first, second = user(), user()
    assert first.do("open") == "empty"
    assert first.do("write half") == "ok"
    second.ask("open")
    first.kill()
    assert second.hear() == "empty"
    assert second.do("read 4") == "\0\0\0\0", "a dead process's bytes"
    second.do("done")
    second.do("close")
    assert files(tmp_path) == []


def test_a_filler_that_gives_up_lets_the_next_one_fill(user: Callable[..., User]) -> None:
    first, second = user(), user()
    assert first.do("open") == "empty"
    second.ask("open")
    assert first.do("close") == "ok"
    assert second.hear() == "empty"


def test_killed_users_leave_a_file_that_the_next_start_removes(user: Callable[..., User], tmp_path: Path) -> None:
    first, second, third = user(), user(), user("other")
    first.do("open")
    first.do("done")
    assert second.do("open") == "filled"
    first.kill()
    assert third.do("open") == "empty"
    assert len(files(tmp_path)) == 2, "removed under a user"
    second.kill()
    assert len(files(tmp_path)) == 2
    assert len(sweep(tmp_path)) == 1
    assert third.do("close") == "ok"
    assert files(tmp_path) == []


def test_what_killed_users_left_whole_is_used_again(user: Callable[..., User], tmp_path: Path) -> None:
    first, second = user(), user()
    first.do("open")
    first.do("write hello")
    first.do("done")
    first.kill()
    assert second.do("open") == "filled"
    assert second.do("read 5") == "hello"
    second.do("close")
    assert files(tmp_path) == []


def test_a_filler_that_takes_too_long_is_an_error(user: Callable[..., User], tmp_path: Path) -> None:
    first = user()
    assert first.do("open") == "empty"
    with pytest.raises(TimeoutError, match=str(tmp_path)):
        SharedFile("weights", NUM_BYTES, 0.05, tmp_path)


def test_a_folder_without_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoRoom, match="has room for"):
        SharedFile("weights", 1 << 60, 1.0, tmp_path)
    assert files(tmp_path) == []
    monkeypatch.setattr(shared.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(NoRoom, match="No space left"):
        SharedFile("weights", NUM_BYTES, 1.0, tmp_path)
    assert files(tmp_path) == []


def test_a_file_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.getuid()
    SharedFile("weights", NUM_BYTES, 1.0, tmp_path).filled()
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / path.name.replace(f"-{user}-", f"-{user + 1}-"))
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(NoRoom, match="belongs to another user"):
        SharedFile("weights", NUM_BYTES, 1.0, tmp_path)


def test_only_the_user_may_read_the_file(tmp_path: Path) -> None:
    file = SharedFile("weights", NUM_BYTES, 1.0, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.name.startswith(f"omni-{os.getuid()}-")
    file.close()
