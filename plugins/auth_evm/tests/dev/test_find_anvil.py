"""Where anvil is looked for, and what is not taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from wetware.errors import ConfigError
from wetware_auth_evm import dev_process
from wetware_auth_evm.dev_process import find_anvil


def _program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def _npm(modules: Path, nested: bool = False) -> Path:
    scope = modules / "@foundry-rs"
    if nested:
        scope = scope / "anvil" / "node_modules" / "@foundry-rs"
    return _program(scope / dev_process._package() / "bin" / "anvil")


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_anvil({"PATH": str(tmp_path)}, tmp_path) is None


def test_the_variable_wins(tmp_path: Path) -> None:
    named, _ = _program(tmp_path / "named"), _program(tmp_path / "bin/anvil")
    env = {"PATH": str(tmp_path / "bin"), "WW_ANVIL": str(named)}
    assert find_anvil(env, tmp_path) == named
    assert find_anvil({**env, "WW_ANVIL": "none"}, tmp_path) is None
    assert find_anvil({**env, "WW_ANVIL": ""}, tmp_path) == tmp_path / "bin/anvil"
    for wrong in (tmp_path / "missing", tmp_path, Path(__file__)):
        with pytest.raises(ConfigError, match="is no program"):
            find_anvil({**env, "WW_ANVIL": str(wrong)}, tmp_path)


def test_path_wins_over_npm(tmp_path: Path) -> None:
    on_path = _program(tmp_path / "bin/anvil")
    _npm(tmp_path / "node_modules")
    assert find_anvil({"PATH": str(tmp_path / "bin")}, tmp_path) == on_path


@pytest.mark.parametrize("nested", [False, True])
def test_what_npm_installed(tmp_path: Path, nested: bool) -> None:
    here = _npm(tmp_path / "work/node_modules", nested)
    assert find_anvil({"PATH": ""}, tmp_path / "work") == here
    prefix = _npm(tmp_path / "prefix/lib/node_modules", nested)
    elsewhere = tmp_path / "elsewhere"
    env = {"PATH": "", "NPM_CONFIG_PREFIX": str(tmp_path / "prefix")}
    assert find_anvil(env, elsewhere) == prefix
    _program(tmp_path / "usr/bin/npm")
    beside = _npm(tmp_path / "usr/lib/node_modules", nested)
    assert find_anvil({"PATH": str(tmp_path / "usr/bin")}, elsewhere) == beside


def test_npm_s_script_stands_for_the_program(tmp_path: Path) -> None:
    """The script needs node, and puts a process between us and anvil."""
    modules = tmp_path / "lib/node_modules"
    binary = _npm(modules, nested=True)
    script = _program(modules / "@foundry-rs/anvil/bin.mjs")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/anvil").symlink_to(script)
    assert find_anvil({"PATH": str(tmp_path / "bin")}, tmp_path) == binary


@pytest.mark.parametrize("part", ["bin/anvil", "bin", ".", "..", "../.."])
def test_what_others_could_have_put_there_is_not_run(tmp_path: Path, part: str) -> None:
    """A working directory in /tmp, say, with a program that somebody left for us."""
    binary = _npm(tmp_path / "node_modules")
    assert find_anvil({"PATH": ""}, tmp_path) == binary
    target = (binary.parents[1] / part).resolve()
    target.chmod(target.stat().st_mode | 0o022)
    assert find_anvil({"PATH": ""}, tmp_path) is None


def test_what_cannot_be_run_is_not_taken(tmp_path: Path) -> None:
    binary = _npm(tmp_path / "node_modules")
    binary.chmod(0o644)
    assert find_anvil({"PATH": ""}, tmp_path) is None
