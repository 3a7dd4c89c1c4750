"""The page in a real browser, on the real app with graphs whose steps the test lets go.

Playwright's sync API keeps an event loop in this thread, so nothing in this folder is async.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from omni.api import AsyncOmni
from omni.server.access import parse_api_keys
from omni.server.app import build_app
from omni.server.files import FileStore
from omni.server.service import Service
from omni.server.service_settings import ServiceSettings
from omni.server.settings import ServerSettings
from omni.server.store import JobStore
from tests.server.page.chromium import ARGUMENTS, chromium
from tests.server.page.gated import GATE, Gate, gated_stages
from tests.server.page.site import Site

SECRET = "open-sesame-open-sesame"
TIMEOUT_MS = 30_000
GRAPHS = {
    "paint": {
        "description": "Paints a disc, one stroke at a time.",
        "stages": {
            "draw": {"kind": "gated"},
            "facts": {
                "kind": "function",
                "call": "tests.server.page.gated:count_words",
                "inputs": {"image": "draw.image"},
            },
        },
        "outputs": {"image": "draw.image", "facts": "facts.json"},
    },
    "shout": {
        "description": "Says it louder.",
        "inputs": {"prompt": "text", "marks": {"type": "json", "default": 1, "description": "how loud"}},
        "stages": {"loud": {"kind": "function", "call": "tests.server.page.gated:shout"}},
    },
}


@contextlib.asynccontextmanager
async def apps(folder: Path) -> AsyncIterator[dict[str, FastAPI]]:
    """The app without and with API keys, over one service."""
    graphs = {name: AsyncOmni({"name": name, **graph}, runner="inline") for name, graph in GRAPHS.items()}
    store, files = JobStore(f"sqlite:///{folder}/jobs.db"), FileStore(str(folder / "files"))
    service = Service(graphs, store, files, ServiceSettings())
    await service.start()
    try:
        locked = ServerSettings(api_keys=parse_api_keys([f"tests={SECRET}"]))
        yield {"open": build_app(service, ServerSettings()), "locked": build_app(service, locked)}
    finally:
        await service.stop(drain_seconds=0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The running servers."""
    folder = tmp_path_factory.mktemp("site")
    with gated_stages(), Site(lambda: apps(folder)).running() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a module, no longer: while Playwright runs, no other event loop can run in this thread."""
    path = chromium()
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Closed until the test opens it."""
    GATE.close()
    yield GATE
    GATE.close()


@pytest.fixture(scope="module")
def profile(browser: Browser) -> Iterator[BrowserContext]:
    """One profile for all tests: with a new one for each, most of the time goes into loading the page."""
    profile = browser.new_context()
    profile.set_default_timeout(TIMEOUT_MS)
    yield profile
    profile.close()


@pytest.fixture
def tabs(profile: BrowserContext) -> Iterator[Callable[[], Page]]:
    """Opens empty tabs. Fails the test for anything that the page threw, or that its own policy refused."""
    faults: list[str] = []

    def open_tab() -> Page:
        page = profile.new_page()
        page.set_viewport_size({"width": 1360, "height": 900})
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda told: faults.append(told.text) if "Content Security Policy" in told.text else None)
        return page

    yield open_tab
    for page in profile.pages:
        page.close()
    assert not faults, faults


@pytest.fixture
def page(tabs: Callable[[], Page], site: Site, gate: Gate) -> Page:
    """The page, ready."""
    page = tabs()
    visit(page, site.urls["open"])
    return page


def visit(page: Page, url: str) -> None:
    """Open a page of the site and wait until its form is there."""
    page.goto(url)
    expect(page.locator("#form")).not_to_have_attribute("aria-busy", "true")
