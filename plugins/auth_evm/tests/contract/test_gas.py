"""The table of gas in the reference is what the contract that ships costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .chains import INSTALL, anvil_chain, find_anvil
from .gas import measure, table

REFERENCE = Path(__file__).parents[4] / "docs/reference/auth-evm-contract.md"


def test_the_gas_of_the_reference_is_measured() -> None:
    if find_anvil() is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    found = re.search(
        r"<!-- begin: (.*?) -->\n\n(.*?)\n\n<!-- end -->", REFERENCE.read_text(), re.DOTALL
    )
    assert found is not None
    with anvil_chain() as chain:
        assert found[2] == table(measure(chain)), f"put the output of `{found[1]}` there"
