"""Chains for the tests of the contract; skipped, with the command to run, where one is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("eth_abi", reason="needs the extra: pip install 'wetware[evm]'")
pytest.importorskip("eth", reason="needs py-evm: pip install 'wetware[dev]'")

from plugins.auth_evm.tests.contract.chains import (
    INSTALL,
    Acl,
    Chain,
    EvmChain,
    anvil_chain,
    find_anvil,
)
from plugins.auth_evm.tests.contract.people import OWNER


@pytest.fixture(params=["py-evm", "anvil"])
def chain(request: pytest.FixtureRequest) -> Iterator[Chain]:
    """Each chain in turn, fresh."""
    if request.param == "py-evm":
        yield EvmChain()
        return
    if find_anvil() is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    with anvil_chain() as anvil:
        yield anvil


@pytest.fixture
def acl(chain: Chain) -> Acl:
    """The contract, freshly deployed, owned by OWNER."""
    return Acl.deploy(chain, OWNER)
