"""What `deploy/` has: a unit of systemd, and a Dockerfile."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.packaging.conftest import ROOT
from tests.packaging.run_dockerfile import DOCKERFILE, read

from wetware.errors import EXIT_BUSY, EXIT_CONFIG, EXIT_DENIED, EXIT_UNREACHABLE, EXIT_USAGE

UNIT = ROOT / "deploy/wetware.service"


def test_systemd_takes_the_unit_as_it_is(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze (Debian: systemd)")
    installed, ours = "/opt/wetware/bin/ww", Path(sys.executable).with_name("ww")
    text = UNIT.read_text()
    assert f"ExecStart={installed} node\n" in text
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace(installed, str(ours)))  # it must be there
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_starts_again_where_that_can_help_and_only_there() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["Restart"] == "on-failure"
    final = set(map(int, service["RestartPreventExitStatus"].split()))
    assert final == {EXIT_USAGE, EXIT_DENIED, EXIT_CONFIG}
    assert not final & {EXIT_BUSY, EXIT_UNREACHABLE}
    # systemd gives up after five starts in ten seconds.
    assert int(service["RestartSec"]) * 5 > 10
    guide = (ROOT / "docs/how-to/run-a-node.md").read_text()
    assert f"RestartPreventExitStatus={service['RestartPreventExitStatus']}" in guide


def test_every_instruction_of_the_dockerfile_can_be_run_without_docker() -> None:
    instructions = read(DOCKERFILE)
    assert instructions[0].name == "FROM"
    assert [
        word for each in instructions if each.name in ("ENTRYPOINT", "CMD") for word in each.words
    ] == ["ww", "node"]
