"""Where things are, for the client library and the node's configuration alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from wetware import paths
from wetware.config import load
from wetware.errors import ConfigError


def test_client_and_node_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a relative home: what is found must not change with the working directory."""
    monkeypatch.delenv("WW_NODE_DATA_DIR", raising=False)
    monkeypatch.delenv("WW_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WW_HOME", "a/../home")
    found = load()
    assert paths.home() == found.home == tmp_path / "home"
    assert paths.data_dir() == found.node.data_dir == tmp_path / "home" / "node"
    assert paths.keys_dir() == found.keys_dir == tmp_path / "home" / "keys"
    monkeypatch.setenv("WW_NODE_DATA_DIR", "elsewhere")
    assert paths.data_dir() == load().node.data_dir == tmp_path / "elsewhere"


def test_the_default_is_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WW_HOME", raising=False)
    assert paths.home() == paths.home({}) == tmp_path / ".wetware"


def test_a_home_of_nobody_is_said_so() -> None:
    with pytest.raises(ConfigError, match="WW_HOME"):
        paths.home({"WW_HOME": "~no-such-user/x"})
