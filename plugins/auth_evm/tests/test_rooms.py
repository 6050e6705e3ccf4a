"""One room per idea: each imports those above it alone, so that it can be read without the rest."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wetware_auth_evm"
ROOMS = ("chain", "login", "node", "cli")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_none_below_it(room: str) -> None:
    below = tuple(f"wetware_auth_evm.{name}" for name in ROOMS[ROOMS.index(room) + 1 :])
    files = sorted((PACKAGE / room).glob("*.py"))
    found = [
        f"{path.name}:{node.lineno} imports {name}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for name in (f"{node.module}.{alias.name}" for alias in node.names)
        if any(name.startswith(f"{each}.") for each in below)
    ]
    assert len(files) > 2
    assert found == []


def test_a_node_does_without_web3() -> None:
    code = (
        "import sys, wetware_auth_evm.node.backend, wetware_auth_evm.node.service\n"
        "print(sorted({'web3', 'eth_account', 'eth_utils', 'eth_abi'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
