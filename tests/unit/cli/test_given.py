"""An empty value is never "not given": it is refused with exit code 2, and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from wetware import client, config
from wetware.base import paths
from wetware.errors import ConfigError, InvalidArgument
from wetware.testing import Home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path) as made:
        yield made


def _written(home: Home) -> list[str]:
    return sorted(str(path.relative_to(home.path)) for path in home.path.rglob("*"))


@pytest.mark.parametrize(
    "args",
    [
        ["node", "--join", "-"],
        ["node", "--join", ""],
        ["node", "--join", " "],
        ["node", "--join="],
        ["node", "--name", ""],
        ["node", "--data-dir", ""],
        ["node", "--peer", ""],
        ["node", "--auth", ""],
        ["--data-dir", "", "id"],
        ["--config", "", "id"],
        ["--key", "", "key", "show"],
        ["--node", "", "whoami"],
        ["whoami", "--node", ""],
        ["id", "--data-dir="],
        ["--context", "", "whoami"],
        ["key", "new", ""],
        ["ls", ""],
        ["evict", "", "--yes"],
        ["revoke", "--sessions", ""],
        ["grants", "--all", "--principal", ""],
        ["share", "pubsub", "--where", ""],
        ["audit", "tail", "--grant", ""],
        ["audit", "verify", "--dir", ""],
        ["user", "add", "ada", "--key", ""],
        ["user", "set", "ada", "--role", ""],
        ["role", "set", "reader", "pubsub="],
        ["role", "set", "reader", "pubsub", "--methods", ""],
        ["policy", "import", "-"],
        ["sub", ""],
        ["auth", "evm", "login", "--signature", ""],
        ["auth", "evm", "logout", "--cluster", ""],
        ["auth", "evm", "list", "--account", ""],
    ],
    ids=" ".join,
)
def test_an_empty_value_on_the_command_line(home: Home, args: list[str]) -> None:
    """The core's commands and the plugins', whichever way the value is given."""
    done = home.ww(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "empty" in done.stderr or "names no methods" in done.stderr
    if args in (["ls", ""], ["sub", ""]):  # what has to be there cannot be left out
        assert ("leave it out" in done.stderr) == (args == ["ls", ""])
    assert _written(home) == []


def test_what_is_no_ticket_leaves_nothing_behind(home: Home) -> None:
    done = home.ww("node", "--join", "wwt1no-ticket")
    assert done.returncode == 2
    assert "not a ticket" in done.stderr
    assert _written(home) == []


@pytest.mark.parametrize("text", ["\n", "   \n", "\nwwt1rest\n", "\ufeff\n"])
def test_a_blank_first_line_is_no_ticket(home: Home, text: str) -> None:
    done = home.ww("node", "--join", "-", input=text)
    assert done.returncode == 2
    assert "a ticket" in done.stderr
    assert _written(home) == []


@pytest.mark.parametrize("name", sorted(config.ENV_OTHER))
def test_an_empty_variable(home: Home, name: str) -> None:
    done = home.ww("key", "new", env={name: ""})
    assert done.returncode == 2
    assert done.stderr.startswith(f"ww: {name} is set, and empty")
    assert _written(home) == []


@pytest.mark.parametrize(
    ("name", "code"), [("WW_NODE_JOIN", 78), ("WW_NODE_NAME", 78), ("WW_NODE_DATA_DIR", 2)]
)
def test_an_empty_variable_of_a_setting(home: Home, name: str, code: int) -> None:
    done = home.ww("node", env={name: ""})
    assert done.returncode == code
    assert name in done.stderr
    assert _written(home) == []


def test_an_empty_text_in_the_file(tmp_path: Path) -> None:
    """Such as a template leaves whose variable was unset: it must not found a cluster."""
    file = tmp_path / "ww.toml"
    file.write_text('[node]\njoin = ""\n')
    with pytest.raises(ConfigError, match=r"join in .* line 2: expected text"):
        _ = config.load(path=file, env={"WW_HOME": str(tmp_path)}).node


def test_an_empty_variable_of_a_list_is_the_empty_list(tmp_path: Path) -> None:
    env = {"WW_HOME": str(tmp_path), "WW_PLUGINS_ENABLE": ""}
    assert config.load(env=env).plugins.enable == ()


@pytest.mark.anyio
async def test_the_client_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WW_HOME", str(tmp_path))
    with pytest.raises(InvalidArgument, match="address is empty"):
        async with client.connect(""):
            pass
    monkeypatch.setenv("WW_NODE", "")
    with pytest.raises(InvalidArgument, match="WW_NODE is set, and empty"):
        async with client.connect():
            pass
    monkeypatch.setenv("WW_KEY", "")
    for key, says in (("", "name of the key is empty"), (None, "WW_KEY is set, and empty")):
        with pytest.raises(InvalidArgument, match=says):
            _ = client.KeyChoice(key, paths.keys_dir(), None).path


def test_an_empty_file_of_checkpoints(home: Home) -> None:
    """Without this the log was "whole", compared with nothing."""
    empty = home.path / "checkpoints"
    empty.touch()
    done = home.ww("audit", "verify", "--checkpoint", str(empty))
    assert done.returncode == 2
    assert "holds no checkpoint" in done.stderr


def test_data_may_be_empty(home: Home) -> None:
    """What is published is the user's: the command gets as far as looking for a node."""
    assert home.ww("pub", "chat", "").returncode == 69
