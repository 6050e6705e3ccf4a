"""Where things are, for the client library and the node's configuration alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wetware.base import paths
from wetware.config import load
from wetware.errors import ConfigError
from wetware.testing import wait_for


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


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without a passwd entry, as in many a container."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "WW_HOME", "WW_NODE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)


@pytest.mark.usefixtures("homeless")
def test_no_home_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (None, "", "not/absolute"):
        if home is not None:
            monkeypatch.setenv("HOME", home)
        with pytest.raises(ConfigError) as caught:
            paths.home()
        assert "WW_HOME" in caught.value.hint
    monkeypatch.setenv("WW_HOME", "")  # so that what `settle` sets ends with the test
    monkeypatch.delenv("WW_HOME")
    paths.settle(str(tmp_path))
    assert paths.home() == load().home == tmp_path


def test_the_data_directory_is_no_home_for_who_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WW_HOME", raising=False)
    paths.settle(str(tmp_path / "data"))
    assert paths.home() == tmp_path / ".wetware"


def test_a_node_of_a_user_without_a_home(tmp_path: Path) -> None:
    """It runs with --data-dir alone, and its owner's commands find the key there."""
    script = (
        "import pwd, sys\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from wetware.cli import main\n"
        "main()\n"
    )
    kept = ("HOME", "WW_", "XDG_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(kept)}

    def ww(*args: str) -> list[str]:
        return [sys.executable, "-c", script, *args]

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ww(*args), env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    refused = run("whoami")
    assert refused.returncode == 78
    assert "WW_HOME" in refused.stderr
    data_dir = tmp_path / "data"
    process = subprocess.Popen(
        ww("node", "--data-dir", str(data_dir), "--listen", "/ip4/127.0.0.1/tcp/0"),
        env=env,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: (data_dir / "node.json").exists() or process.poll(), "a running node")
        for command in ("whoami", "user list", "status"):
            done = run("--data-dir", str(data_dir), *command.split())
            assert done.returncode == 0, done.stderr
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
