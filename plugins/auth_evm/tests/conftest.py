"""The wallets of tests are encrypted at little cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def scrypt_n() -> Iterator[int | None]:
    """What a guess at a passphrase costs otherwise, most of a second: one test looks at that."""
    try:
        from wetware_auth_evm.login import wallets
    except ImportError:  # the extra is not there
        yield None
        return
    defaults = wallets.encrypt.__kwdefaults__
    before, defaults["n"] = defaults["n"], 1 << 10
    yield before
    defaults["n"] = before
