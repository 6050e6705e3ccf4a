"""A chain for all tests of a worker, and a home and a contract for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("eth_account", reason="needs the extra: pip install 'wetware[evm]'")

from plugins.auth_evm.tests.cli.anvils import Anvil, World

from wetware.cli.app import options


@pytest.fixture(scope="session")
def anvil() -> Iterator[Anvil]:
    made = Anvil()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty WW_HOME."""
    for name in ("WW_KEY", "WW_PASSPHRASE", "WW_CONFIG", "WW_NODE", "WW_NODE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(options, "given", {})
    monkeypatch.setattr(options, "_context", None)
    return tmp_path / "home"


@pytest.fixture
def world(anvil: Anvil, home: Path) -> World:
    """The wallet `default` owns a fresh contract."""
    made = World(anvil, home)
    made.contract = anvil.deploy(made.person("default").address)
    return made
