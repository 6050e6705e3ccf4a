"""The unit of systemd that `ww` writes, and what `deploy/` has: a Dockerfile."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.packaging.conftest import ROOT
from tests.packaging.run_dockerfile import DOCKERFILE, read

from wetware.cli.service import unit_text
from wetware.errors import EXIT_BUSY, EXIT_CONFIG, EXIT_DENIED, EXIT_UNREACHABLE, EXIT_USAGE


@pytest.mark.parametrize("user", [False, True])
def test_systemd_takes_the_unit_as_it_is(tmp_path: Path, user: bool) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze (Debian: systemd)")
    unit = tmp_path / "wetware.service"
    unit.write_text(unit_text(user=user))  # it names this environment's `ww`, which must be there
    command = [analyze, *(["--user"] if user else []), "verify", str(unit)]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("user", [False, True])
def test_the_unit_starts_again_where_that_can_help_and_only_there(user: bool) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(unit_text(user=user))
    service = unit["Service"]
    assert service["Restart"] == "on-failure"
    final = set(map(int, service["RestartPreventExitStatus"].split()))
    assert final == {EXIT_USAGE, EXIT_DENIED, EXIT_CONFIG}
    assert not final & {EXIT_BUSY, EXIT_UNREACHABLE}
    # systemd gives up after five starts in ten seconds.
    assert int(service["RestartSec"]) * 5 > 10
    guide = (ROOT / "docs/how-to/run-a-node.md").read_text()
    assert f"RestartPreventExitStatus={service['RestartPreventExitStatus']}" in guide
    assert ("ProtectSystem" in service) is not user


def test_every_instruction_of_the_dockerfile_can_be_run_without_docker() -> None:
    instructions = read(DOCKERFILE)
    assert instructions[0].name == "FROM"
    assert [
        word for each in instructions if each.name in ("ENTRYPOINT", "CMD") for word in each.words
    ] == ["ww", "node"]
