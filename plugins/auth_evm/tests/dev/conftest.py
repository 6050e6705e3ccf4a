"""Try-out chains of both engines, each in a home of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("eth_tester", reason="needs the extra: pip install 'wetware[evm]'")

from wetware.base.log import get_logger
from wetware_auth_evm.dev import tryout
from wetware_auth_evm.dev.anvil import find_anvil
from wetware_auth_evm.dev.tryout import DevChain

CONTRACTS = Path(__file__).resolve().parents[2] / "contracts"
INSTALL = "npm ci --no-audit --no-fund --prefix plugins/auth_evm/contracts"


def anvil_path() -> Path:
    """The anvil of the tests; skipped, with the command to run, where it is missing."""
    for installed in CONTRACTS.glob("node_modules/@foundry-rs/anvil-*/bin/anvil"):
        return installed
    found = find_anvil()
    if found is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    return found


@pytest.fixture(params=["anvil", "eth-tester"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each engine in turn; what a start finds in its environment."""
    name: str = request.param
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WW_KEY", raising=False)
    monkeypatch.delenv("WW_PASSPHRASE", raising=False)
    monkeypatch.setenv("WW_ANVIL", str(anvil_path()) if name == "anvil" else "none")
    return name


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Callable[..., DevChain]]:
    """`start()` in the test's directory; what still runs at the end is closed."""
    made: list[DevChain] = []
    directory = tmp_path / "plugin"
    directory.mkdir()

    def run(**given: object) -> DevChain:
        given.setdefault("log", get_logger("test"))
        chain = tryout.start(directory, **given)  # type: ignore[arg-type]
        made.append(chain)
        return chain

    yield run
    for chain in made:
        chain.close()
