"""`omni bench serve`: against a real server process, and what it does with wrong arguments, answers and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni.bench import serve, serve_plot
from omni.bench.http_load import LoadResult, Sample
from omni.bench.memory_slope import Memory
from omni.bench.serve_api import Api, choose_api, parse_inputs
from omni.bench.server_process import Server, running, started
from omni.cli.main import build_parser, main
from omni.errors import OmniError, UsageError

API = Api("chat", "noop", "/v1/chat/completions", "{}")


class FakeServer(Server):
    """Knows the graphs that it is made with."""

    def __init__(self, **outputs: dict[str, str]) -> None:
        super().__init__("127.0.0.1", 1)
        self.graphs = [{"name": name, "outputs": types} for name, types in outputs.items()]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        assert (method, path) == ("GET", "/v1/graphs")
        return {"data": self.graphs}


def result(latencies: list[float], errors: dict[str, int] | None = None, own: float | None = 0.001) -> LoadResult:
    samples = [Sample(100.0 + number, 100.0 + number + latency, own) for number, latency in enumerate(latencies)]
    return LoadResult(samples=samples, errors=errors or {}, seconds=0.5, cpu_seconds=0.01)


def arguments(*texts: str) -> Any:
    return build_parser().parse_args(["bench", "serve", *texts])


def report_of(*results: LoadResult, memory: Memory | None = None, closed: LoadResult | None = None) -> Any:
    rows = {"100/s": list(results), serve.CLOSED: [closed or result([0.01] * 200)]}
    return serve._report(arguments(), API, rows, {"100/s": [0.002]}, memory)


def test_numbers_of_the_report() -> None:
    report = report_of(result([0.003, 0.005, 0.011]))
    assert report.correct
    latency, added = report.sections
    assert [row.name for row in latency.rows] == ["100/s", serve.CLOSED]
    assert latency.rows[0].median_ms == pytest.approx(5.0)
    assert added.rows[0].median_ms == pytest.approx(4.0)
    tables = {table.title: table for table in report.tables}
    assert tables["latency, ms"].rows["100/s"] == pytest.approx((5.0, 11.0, 11.0, 11.0))
    assert tables["per row"].rows["100/s"] == pytest.approx((6.0, 0.0, 2.0, 10 / 3))
    assert [(target.value, target.met) for target in report.targets] == [
        (pytest.approx(4.0), True),
        (pytest.approx(400.0), True),
    ]


def test_missed_targets_are_no_wrong_results() -> None:
    report = report_of(result([0.1]), closed=result([0.1]))
    assert [target.met for target in report.targets] == [False, False]
    assert report.correct


@pytest.mark.parametrize(
    "report",
    [
        report_of(result([0.01], {"status 503": 1})),
        report_of(result([])),
        report_of(result([0.01]), memory=Memory([(0, 1), (9, 2)], bytes_per_request=5000.0)),
    ],
    ids=["error", "no answer", "leak"],
)
def test_wrong_results(report: Any) -> None:
    assert not report.correct


def test_a_server_that_does_not_tell_the_graph_s_time_has_no_such_target() -> None:
    report = report_of(result([0.1], own=None), closed=result([0.1], own=None))
    assert [target.unit for target in report.targets] == ["/s"]
    assert [section.title for section in report.sections] == ["latency"]


@pytest.mark.parametrize(
    ("outputs", "options", "path", "expect"),
    [
        ({"noop": {"text": "text"}}, {}, "/v1/chat/completions", "request {number}"),
        ({"describe": {"text": "text"}}, {}, "/v1/chat/completions", ""),
        ({"draw": {"images": "list[image]"}}, {}, "/v1/images/generations", ""),
        ({"film": {"video": "video"}}, {}, "/v1/graphs/film/jobs", ""),
        ({"draw": {"image": "image"}}, {"api": "job"}, "/v1/graphs/draw/jobs", ""),
        ({"a": {"image": "image"}, "b": {"text": "text"}}, {"graph": "b"}, "/v1/chat/completions", ""),
    ],
)
def test_the_call_fits_the_graph(
    outputs: dict[str, dict[str, str]], options: dict[str, str], path: str, expect: str
) -> None:
    api = choose_api(FakeServer(**outputs), options.get("graph"), options.get("api", "auto"), ["steps=3", "style=oil"])
    assert (api.path, api.expect) == (path, expect)
    assert "request {number}" in api.body
    if api.name == "job":
        assert json.loads(api.body)["inputs"] == {"prompt": "request {number}", "steps": 3, "style": "oil"}
        assert api.headers == {"Prefer": "wait=60"}


def test_several_graphs_need_a_name() -> None:
    with pytest.raises(UsageError, match="GRAPH must be one of the server's: a, b"):
        choose_api(FakeServer(a={"x": "text"}, b={"x": "text"}), None, "auto")


def test_inputs_are_name_and_value() -> None:
    assert parse_inputs(["a=1", "b=x=y"]) == {"a": 1, "b": "x=y"}
    with pytest.raises(UsageError, match="--input a: give NAME=VALUE"):
        parse_inputs(["a"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["--rate", "fast"], "--rate fast: give requests per second"),
        (["--rate", "0"], "--rate must be above 0"),
        (["--repeat", "0"], "--repeat at least 1"),
        (["--plot", "a.pdf"], "--plot a.pdf: the name must end in .png or .svg"),
        (["--plot", "no/such/folder/a.png"], "there is no such folder"),
        (["--url", "http://127.0.0.1:1", "--set", "a=b"], "leave it out with --url"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        serve.measure(arguments(*texts))


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "127.0.0.1", "http://127.0.0.1:1/v1", "http://127.0.0.1:1"])
def test_servers_that_cannot_be_asked_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match=f"--url {url}: "):
        running(url)


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"--plot needs matplotlib: pip install 'omni-stages\[plots\]'"):
        serve_plot.check("a.png")


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_plots_are_pictures(tmp_path: Path, name: str, begin: bytes) -> None:
    serve_plot.check(str(tmp_path / name))
    memory = Memory([(0, 10**8), (100, 10**8), (200, 10**8)], bytes_per_request=0.0)
    serve_plot.draw(str(tmp_path / name), {"100/s": [0.001, 0.002, 0.1], "most": [0.01]}, memory)
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    with pytest.raises(OmniError, match=r"omni serve ended: .*no-such-graph"), started(str(tmp_path / "no-such-graph")):
        pass


def test_a_real_server_under_load_keeps_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rate", "100", "--requests", "60", "--connections", "4", "--soak", "5000", "--warmup", "300"]
    code = main(["bench", "serve", *sizes, "--plot", str(tmp_path / "a.png"), "--json"])
    report = json.loads(capsys.readouterr().out)
    notes = "; ".join(report["notes"])
    assert code == 0, notes
    assert "errors: none" in notes
    assert "memory flat: yes" in notes
    assert [(row["name"], row["num_runs"]) for row in report["sections"][1]["rows"]] == [
        ("100/s", 60),
        (serve.CLOSED, 60),
    ]
    assert report["targets"][0]["name"] == "added at 100/s, p50"
    added = report["sections"][1]["rows"][0]["median_ms"]
    assert 0 < added < report["sections"][0]["rows"][0]["median_ms"]
    cpu = {table["title"]: table for table in report["tables"]}["per row"]["rows"]["100/s"][2]
    assert cpu is not None
    assert (tmp_path / "a.png").stat().st_size > 10_000
