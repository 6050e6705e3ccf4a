"""Where anvil is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from wetware.errors import ConfigError
from wetware_auth_evm.dev.anvil import find_anvil


def _program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_anvil({"PATH": str(tmp_path)}) is None


def test_the_variable_wins(tmp_path: Path) -> None:
    named, _ = _program(tmp_path / "named"), _program(tmp_path / "bin/anvil")
    env = {"PATH": str(tmp_path / "bin"), "WW_ANVIL": str(named)}
    assert find_anvil(env) == named
    assert find_anvil({**env, "WW_ANVIL": "none"}) is None
    assert find_anvil({**env, "WW_ANVIL": ""}) == tmp_path / "bin/anvil"
    for wrong in (tmp_path / "missing", tmp_path, Path(__file__)):
        with pytest.raises(ConfigError, match="is no program"):
            find_anvil({**env, "WW_ANVIL": str(wrong)})


def test_what_is_beside_a_working_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path / "node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil")
    monkeypatch.chdir(tmp_path)
    assert find_anvil({"PATH": ""}) is None


@pytest.mark.parametrize("packages", ["@foundry-rs", "@foundry-rs/anvil/node_modules/@foundry-rs"])
def test_npm_s_script_stands_for_the_program(tmp_path: Path, packages: str) -> None:
    """The script needs node, and puts a process between us and anvil."""
    modules = tmp_path / "lib/node_modules"
    binary = _program(modules / packages / "anvil-linux-amd64/bin/anvil")
    script = _program(modules / "@foundry-rs/anvil/bin.mjs")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/anvil").symlink_to(script)
    assert find_anvil({"PATH": str(tmp_path / "bin")}) == binary


def test_what_cannot_be_run_is_not_taken(tmp_path: Path) -> None:
    _program(tmp_path / "anvil").chmod(0o644)
    assert find_anvil({"PATH": str(tmp_path)}) is None
