"""The search for Chromium fails by saying how to get it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.server.page import chromium


def test_without_apt_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(AssertionError, match=r"apt-get install -y --no-install-recommends chromium .*no apt-get"):
        chromium.chromium()


def test_an_install_that_gives_nothing_fails_with_what_apt_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text('#!/bin/sh\necho "E: said of $*"\nexit 100\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(chromium, "NAMES", ("no-such-browser",))
    monkeypatch.setattr(chromium.os, "geteuid", lambda: 0)
    with pytest.raises(AssertionError, match=r"as root, run apt-get update(.|\n)*E: said of .* update(.|\n)*install"):
        chromium.install(time.monotonic() + 30)
