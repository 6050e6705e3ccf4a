"""The wheel, the sdist, and an environment into which the wheel was installed: built once a run."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Built:
    """What was built, and the environment that has the wheel.

    Attributes:
        wheel: The wheel.
        sdist: The source distribution.
        venv: A virtual environment with the wheel in it and nothing of the source tree.
    """

    wheel: Path
    sdist: Path
    venv: Path

    def run(
        self,
        *args: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 90,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, e.g. `ww`, without the variables of this process.

        Its folder is the environment's, which all tests share, unless `cwd` says another.
        """
        keep = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
        return subprocess.run(
            [str(self.venv / "bin" / args[0]), *args[1:]],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**keep, "PATH": f"{self.venv / 'bin'}:/usr/bin:/bin", **(env or {})},
            cwd=cwd or self.venv,
        )


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Built:
    """Build once for all workers: the first one holds a lock meanwhile."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "built"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = shared / "done.json"
        if not done.exists():
            done.write_text(json.dumps(_build(shared)))
        paths = json.loads(done.read_text())
    return Built(**{name: Path(path) for name, path in paths.items()})


def _build(folder: Path) -> dict[str, str]:
    dist, venv = folder / "dist", folder / "venv"
    dist.mkdir()
    code = (
        "import sys; from hatchling import build; d = sys.argv[1];"
        " print(build.build_wheel(d)); print(build.build_sdist(d))"
    )
    names = _checked([_with_hatchling(folder), "-c", code, str(dist)], cwd=ROOT).split()
    wheel, sdist = (dist / name for name in names[-2:])
    new_venv(venv, wheel)
    return {"wheel": str(wheel), "sdist": str(sdist), "venv": str(venv)}


def new_venv(venv: Path, wheel: Path) -> None:
    """An environment with a wheel in it, and with the dependencies of the one that runs the tests.

    Those are found through a .pth file, which spares minutes of downloads; wetware itself is the
    wheel's alone. That the wheel declares all of them is a test of its own.
    """
    _checked([sys.executable, "-m", "venv", str(venv)])
    python = str(venv / "bin" / "python")
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    ours = _checked([sys.executable, "-c", where]).strip()
    (Path(_checked([python, "-c", where]).strip()) / "dependencies.pth").write_text(f"{ours}\n")
    _checked([python, "-m", "pip", "install", *_PIP, "--no-deps", "--ignore-installed", str(wheel)])


_PIP = ("--quiet", "--disable-pip-version-check")


def _with_hatchling(folder: Path) -> str:
    """An interpreter that has the build backend: this one, or one that gets it from the index."""
    if importlib.util.find_spec("hatchling") is not None:
        return sys.executable
    _checked([sys.executable, "-m", "venv", str(folder / "build")])
    python = str(folder / "build" / "bin" / "python")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    _checked([python, "-m", "pip", "install", *_PIP, *requires])
    return python


def _checked(command: list[str], cwd: Path | None = None) -> str:
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert run.returncode == 0, f"{command}: {run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.fixture
def ww(built: Built, tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run `ww` of the installed wheel with a home of its own; `site` goes on PYTHONPATH."""

    def run(
        *args: str, site: Path | None = None, timeout_s: float = 90
    ) -> subprocess.CompletedProcess[str]:
        env = {"WW_HOME": str(tmp_path / "home")}
        if site is not None:
            env["PYTHONPATH"] = str(site)
        return built.run("ww", *args, env=env, timeout_s=timeout_s)

    return run
