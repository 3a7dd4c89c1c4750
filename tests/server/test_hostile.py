"""Hostile requests to a whole server on a real socket: each gets its exact status and message, and harms nobody."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from omni.server.access import parse_api_keys
from omni.server.settings import ServerSettings
from tests.server import hostile_access, hostile_forms, hostile_media, hostile_values
from tests.server.hostile import ANNA, BEN, PNG, VIDEOS, Case, echo, film, get, look
from tests.server.live import live_server, say
from tests.server.makers import GRAPHS
from tests.server.raw_http import Answer, data_url, read_answer

CASES = (*hostile_access.CASES, *hostile_values.CASES, *hostile_media.CASES, *hostile_forms.CASES)
SETTINGS = ServerSettings(
    api_keys=parse_api_keys([f"anna={ANNA}", f"ben={BEN}"]),
    trusted_hosts=("localhost",),
    allowed_hosts=("*",),  # so that nothing but the address keeps a fetch from this machine
    webhook_hosts=("*",),
    max_body_bytes=399_999,
    max_field_bytes=100_000,
    max_pixels=1_000_000,
    body_seconds=0.5,
    header_seconds=0.5,
)


class Site(NamedTuple):
    """A running server with a finished job and video."""

    ask: Callable[[bytes], Answer]
    folder: Path
    job: str
    video: str


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)  # where the graphs find their functions
        with live_server(GRAPHS, SETTINGS, folder) as port:

            def ask(request: bytes) -> Answer:
                return read_answer(say(port, request))

            once = {"Idempotency-Key": "once", "Prefer": "wait=30"}
            job = json.loads(ask(echo(once)).body)
            video = json.loads(ask(film()).body)
            while (found := json.loads(ask(get(f"{VIDEOS}/{video['id']}")).body))["status"] != "completed":
                assert found["status"] != "failed", found
                threading.Event().wait(0.02)
            yield Site(ask, folder, job["id"], video["id"])


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_hostile_request_gets_its_answer(case: Case, site: Site) -> None:
    request = case.request.replace(b"{job}", site.job.encode()).replace(b"{video}", site.video.encode())
    answer = site.ask(request)
    assert answer.status == case.status, answer.message
    if case.message is not None:
        assert answer.message == case.message.replace("{job}", site.job).replace("{video}", site.video)
    for name in ("x-evil", "access-control-allow-origin", "server"):
        assert name not in answer.headers


@pytest.mark.parametrize(
    "details",
    [
        {"blob": "../jobs.db", "type": "image"},
        [{"blob": "../jobs.db", "type": "image"}],
        {"json": {"blob": "../jobs.db", "type": "image"}},
    ],
)
def test_a_json_input_that_looks_like_a_stored_file_is_none(site: Site, details: object) -> None:
    job = json.loads(site.ask(look(data_url(PNG), details=details)).body)["id"]
    answer = site.ask(get(f"/v1/jobs/{job}/inputs/details"))
    assert (answer.status, answer.message) == (404, f"job {job} was given no file as 'details' with index 0")


def test_afterwards_the_server_is_well(site: Site) -> None:
    assert site.ask(get("/ready")).status == 200
    answer = site.ask(echo({"Prefer": "wait=30"}, inputs={"prompt": "still here"}))
    assert (answer.status, json.loads(answer.body)["outputs"]["text"][0]["text"]) == (200, "still here")


def test_afterwards_no_name_of_a_client_is_on_the_disk(site: Site) -> None:
    """Names below the state folder are the database's and ours."""
    names = {str(path.relative_to(site.folder)) for path in site.folder.rglob("*") if path.is_file()}
    assert len(names) > 3
    database = r"jobs\.db(-wal|-shm|\.servers/[A-Za-z0-9.-]+-[0-9]+-[0-9a-f]+)?"
    ours = re.compile(database + r"|files/omni-store|files/job_[0-9a-f]{24}/(in|out)-[0-9a-f]{12}\.[a-z0-9]+")
    assert not [name for name in names if not ours.fullmatch(name)]


def test_answers_to_hostile_requests_have_the_shape_of_openai(site: Site) -> None:
    answer = site.ask(get("/v1/jobs/..%2f..%2fetc%2fpasswd"))
    assert answer.headers["content-type"] == "application/json"
    error = json.loads(answer.body)["error"]
    assert error == {
        "message": "there is no such address here",
        "type": "invalid_request_error",
        "param": None,
        "code": "not_found",
        "stage": None,
    }
