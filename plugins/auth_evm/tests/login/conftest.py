"""A backend on a real anvil for each test; skipped, with the command to run, without one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs the extra: pip install 'wetware[evm]'")
pytest.importorskip("eth", reason="needs py-evm: pip install 'wetware[dev]'")

from plugins.auth_evm.tests.chain.net import Net, net
from plugins.auth_evm.tests.contract.chains import INSTALL, find_anvil
from plugins.auth_evm.tests.login.world import World


@pytest.fixture
def chain() -> Iterator[Net]:
    """The contract on a chain whose final block lies two behind the newest."""
    if find_anvil() is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    with net() as made:
        yield made


@pytest.fixture
async def world(chain: Net, tmp_path: Path) -> AsyncIterator[World]:
    """A backend of that contract that has read it, and users of it."""
    async with World(chain, tmp_path) as made:
        yield made
