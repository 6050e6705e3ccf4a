"""Who may use a data directory, and what the others are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wetware.errors import ConfigError
from wetware.node.data_dir import locked


def refused(data_dir: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught, locked(data_dir):
        pytest.fail("it was locked")
    assert caught.value.code == "config.data_dir"
    assert not (data_dir / "lock").exists()
    return caught.value


def test_what_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    said = refused(tmp_path)
    assert f"others can write to {tmp_path}" in said.message
    assert f"chmod go-w {tmp_path}" in said.hint


def test_that_of_another_user_is_for_that_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root, say, at the directory of the system's service: what it writes the service cannot."""
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    said = refused(tmp_path)
    assert "belongs to another user" in said.message
    assert "run it as that user" in said.hint
