"""With `--json` an error is one line of JSON on stderr, whatever went wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wetware.testing import Home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path) as made:
        yield made


def _error(home: Home, *args: str) -> dict[str, Any]:
    done = home.ww(*args)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    error: dict[str, Any] = json.loads(line)["error"]
    assert set(error) == {"code", "message", "hint", "exit_code"}
    assert error["exit_code"] == done.returncode != 0
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("args", "code", "exit_code"),
    [
        (["whoami", "--json"], "overlay.dial.no_node", 69),
        (["--node", "zone=cloud", "ls", "--json"], "overlay.dial.no_node", 69),
        (["key", "show", "--json"], "key.missing", 78),
        (["context", "show", "x", "--json"], "not_found.context", 1),
        (["share", "pubsub:", "--json"], "invalid.usage", 2),
        (["share", "--json"], "invalid.usage", 2),
        (["ls", "--limit", "x", "--json"], "invalid.usage", 2),
        (["ls", "--nothing", "--json"], "invalid.usage", 2),
        (["nothing", "--json"], "invalid.usage", 2),
        (["audit", "nothing", "--json"], "invalid.usage", 2),
        (["auth", "evm", "nothing", "--json"], "invalid.usage", 2),
        (["user", "list", "--role", "--json"], "invalid.usage", 2),
        (["ls", "--node", "", "--json"], "invalid.empty", 2),
    ],
)
def test_errors_are_json(home: Home, args: list[str], code: str, exit_code: int) -> None:
    error = _error(home, *args)
    assert (error["code"], error["exit_code"]) == (code, exit_code)
    assert error["hint"]


def test_without_it_they_are_for_people(home: Home) -> None:
    for args in (["whoami"], ["ls", "--", "--json"], ["nothing"]):
        with pytest.raises(json.JSONDecodeError):
            json.loads(home.ww(*args).stderr)
    assert home.ww("whoami").stderr.startswith("ww: ")
    assert home.ww("ls", "--nothing").stderr.startswith("Usage: ww ls")
