"""A real anvil for each test; skipped, with the command to run, where it is missing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

pytest.importorskip("aiohttp", reason="needs the extra: pip install 'wetware[evm]'")
pytest.importorskip("eth", reason="needs py-evm: pip install 'wetware[dev]'")

from plugins.auth_evm.tests.chain.net import Gateway, Net, gateways, net
from plugins.auth_evm.tests.contract.chains import INSTALL, find_anvil


@pytest.fixture
def chain() -> Iterator[Net]:
    """The contract on a chain whose final block lies two behind the newest."""
    if find_anvil() is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    with net() as made:
        yield made


@pytest.fixture
async def three(chain: Net) -> AsyncIterator[list[Gateway]]:
    """Three endpoints of it."""
    async with gateways(chain.chain.url) as each:
        yield each
