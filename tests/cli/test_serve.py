"""`omni serve` before models load: wrong usage is one line, and what it will say when it is ready."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omni.cli.main import build_parser
from omni.cli.progress import View
from omni.cli.serve import build_graphs, build_service, build_settings, is_loopback, warn, welcome
from omni.errors import UsageError
from omni.server.access import ANY_ADDRESS, LOOPBACK_NAMES
from omni.server.hosting import bind
from omni.testing import doubles

GRAPH = "stages:\n  shout: {kind: double}\n"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a graph `a.yaml`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMNI_API_KEYS", raising=False)
    (tmp_path / "a.yaml").write_text(GRAPH)
    return tmp_path


@pytest.fixture
def known() -> Iterator[None]:
    """The kind `double` is known."""
    with doubles():
        yield


def parsed(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(["serve", "a.yaml", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.yaml"], "gone.yaml"),
        (["a.yaml", "a.yaml"], "a.yaml: there is a graph 'a' already"),
        (["a.yaml", "--host", "no.such.host.invalid"], "--host no.such.host.invalid: there is no such address"),
        (["a.yaml", "--port", "99999"], "--port 99999: ports go from 0 to 65535"),
        (["a.yaml", "--max-running", "0"], "--max-running 0"),
        (["a.yaml", "--drain-seconds", "-1"], "--drain-seconds -1.0"),
        (["a.yaml", "--api-key", "short=x"], "secret of API key 'short'"),
        (["a.yaml", "--state-dir", "a.yaml"], "--state-dir a.yaml: cannot be made"),
        (["a.yaml", "--store", "postgresql+psycopg://omni@db/omni"], "--store without --files"),
        (["a.yaml", "--set", "stages.shout.step=1"], "did you mean 'steps'?"),
    ],
)
def test_wrong_usage_is_one_line(omni: Command, folder: Path, arguments: list[str], message: str) -> None:
    port = [] if "--port" in arguments else ["--port", "0"]
    code, out, err = omni("serve", *arguments, *port)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_port_in_use_is_one_line(omni: Command, folder: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = omni("serve", "a.yaml", "--port", str(port))
    assert code == 2
    assert err == f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port or --host\n"


@pytest.mark.usefixtures("known")
def test_names_of_graphs_go_into_addresses(folder: Path) -> None:
    assert list(build_graphs(parsed(), View())) == ["a"]
    (folder / "a.yaml").write_text("name: b/c\n" + GRAPH)
    with pytest.raises(UsageError, match="the name 'b/c' cannot be part of an address"):
        build_graphs(parsed(), View())


def test_only_this_machine_reaches_it_by_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_settings(parsed()).trusted_hosts == LOOPBACK_NAMES
    open_to_all = parsed("--host", "0.0.0.0")
    own = build_settings(open_to_all).trusted_hosts
    assert own[:2] == (ANY_ADDRESS, "localhost")
    assert build_settings(parsed("--host", "0.0.0.0", "--api-key", f"a={'x' * 16}")).trusted_hosts == ()
    assert build_settings(parsed("--host", "0.0.0.0", "--trusted-host", "b.test")).trusted_hosts == ("b.test",)
    warn(open_to_all, build_settings(open_to_all))
    said = capsys.readouterr().err
    assert "0.0.0.0 without --api-key: whoever reaches it may use it; it goes by its IP addresses, localhost, " in said
    assert "--trusted-host NAME" in said
    assert [is_loopback(host) for host in ("localhost", "::1", "10.0.0.1", "example.org")] == [True, True, False, False]


@pytest.mark.usefixtures("known")
async def test_what_is_said_when_it_is_ready(folder: Path) -> None:
    args = parsed("--state-dir", str(folder / "state"))
    graphs = build_graphs(args, View())
    service = build_service(args, graphs, build_settings(args))
    assert service.settings.max_running == 4
    rights = {name: (folder / "state" / name).stat().st_mode & 0o777 for name in ("", "jobs.db", "files")}
    assert rights == {"": 0o700, "jobs.db": 0o600, "files": 0o700}
    await service.stop(0)
    assert welcome("http://x", graphs, True)[:3] == ["listening on http://x", "page: http://x/", "graphs: a"]
    assert '"model": "a"' in welcome("http://x", graphs, True)[3]
    assert "Bearer $OMNI_API_KEY" in welcome("http://x", graphs, True)[3]
