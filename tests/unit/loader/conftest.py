"""An environment of plugins, as modules and as distributions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.unit.loader.world import Backend, Recorder, World

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """With the bundled backend `auth_local`, and the bundled recorder."""
    made = World(tmp_path, monkeypatch)
    made.plugin("audit", dist="wetware", ww_register_recorder=lambda ctx, sign: Recorder())
    made.plugin("auth_local", dist="wetware", ww_register_auth=lambda ctx: Backend())
    return made


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of distributions on sys.path; what they import is forgotten afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("ww_"):
            del sys.modules[name]
