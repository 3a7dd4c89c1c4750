"""schemathesis over the served OpenAPI document: whatever a client sends, no answer is a 5xx, and answers are as told.

The suite runs a few, always the same; `make fuzz` runs 5,000.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from omni.server.settings import ServerSettings
from tests.server import bombs
from tests.server.live import WAIT_SECONDS, live_server
from tests.server.makers import GRAPHS
from tests.server.raw_http import data_url

NUM_CASES = int(os.environ.get("OMNI_FUZZ_CASES", "300"))
"""Of all operations together."""
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
SETTINGS = ServerSettings(
    max_pixels=1_000_000,
    allow_unknown_fields=True,  # else next to every body has a field too many, and nothing else is looked at
)
FIXED = ("/v1/models", "/v1/graphs", "/health", "/ready", "/metrics")
"""Addresses that take no parameter: one case is all there is."""
BODIES: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {"model": "painter", "prompt": "x"},
    "/v1/images/edits": {"model": "retoucher", "prompt": "x", "image": data_url(bombs.picture())},
    "/v1/videos": {"model": "film", "prompt": "x"},
    "/v1/audio/speech": {"model": "singer", "input": "x"},
    "/v1/audio/generations": {"model": "singer", "prompt": "x"},
    "/v1/chat/completions": {"model": "echo", "messages": [{"role": "user", "content": "x"}]},
    "/v1/graphs/{name}/jobs": {"inputs": {"prompt": "x"}},
}
"""Right values by path. Each case takes some of them, else hardly one would get past the first check."""


class Site(NamedTuple):
    """A running server."""

    client: httpx.Client
    schema: Any

    def post(self, path: str, body: Any, **headers: str) -> dict[str, Any]:
        """A right request."""
        answer = self.client.post(path, json=body, headers=headers)
        assert answer.status_code < 300, answer.text
        return dict(answer.json())

    def job(self) -> str:
        """The id of a new, finished job."""
        return str(self.post("/v1/graphs/echo/jobs", BODIES["/v1/graphs/{name}/jobs"], Prefer="wait=30")["id"])

    def look(self) -> str:
        """The id of a new, finished job that was given a picture."""
        body = {"inputs": {"image": data_url(bombs.picture())}}
        return str(self.post("/v1/graphs/looker/jobs", body, Prefer="wait=30")["id"])

    def video(self) -> str:
        """The id of a new, finished video."""
        video = str(self.post("/v1/videos", BODIES["/v1/videos"])["id"])
        events = self.client.get(f"/v1/jobs/{video}/events")  # until the last one
        assert "event: done" in events.text, events.text
        return video


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        with live_server(GRAPHS, SETTINGS, tmp_path_factory.mktemp("site")) as port:
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=WAIT_SECONDS) as client:
                yield Site(client, schemathesis.openapi.from_url(f"{url}/openapi.json"))


def steer(site: Site, case: Any, draw: Callable[[Any], Any]) -> None:
    """Put right values into a case here and there."""
    looks = "/inputs/" in case.path
    name = "image" if looks else "text" if "/outputs/" in case.path else "echo"
    makers = {
        "job_id": site.look if looks else site.job,
        "video_id": site.video,
        "name": lambda: name,
        "model": lambda: "painter",
    }
    if draw(st.booleans()):
        for parameter in case.path_parameters:
            case.path_parameters[parameter] = makers[parameter]()
    right = BODIES.get(case.path)
    if right is None or not isinstance(case.body, dict) or not draw(st.integers(0, 9)):
        return
    for name in draw(st.sets(st.sampled_from(sorted(case.body)))) if case.body else ():
        del case.body[name]
    case.body.update(right)


def test_no_case_is_answered_with_a_server_error(site: Site) -> None:
    operations = [result.ok() for result in site.schema.get_all_operations()]
    counted = [operation for operation in operations if operation.path not in FIXED]
    codes: dict[str, Counter[int]] = {}
    for operation in operations:
        found = codes[f"{operation.method.upper()} {operation.path}"] = Counter()
        count = 1 if operation.path in FIXED else -(-NUM_CASES // len(counted))
        run_cases(site, operation, count, found)
    total = sum(sum(found.values()) for found in codes.values())
    assert total >= NUM_CASES
    assert not [name for name, found in codes.items() if any(code >= 500 for code in found)]
    print(f"{total} cases: {dict(sum(codes.values(), Counter()))}")
    assert not [name for name, found in codes.items() if not any(code < 300 for code in found)], "never got through"


def run_cases(site: Site, operation: Any, count: int, codes: Counter[int]) -> None:
    """Cases of one operation, the same ones each time."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), data=st.data())
    def send(case: Any, data: st.DataObject) -> None:
        steer(site, case, data.draw)
        response = case.call()
        codes[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    send()
