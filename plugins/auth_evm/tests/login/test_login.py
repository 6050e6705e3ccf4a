"""Logging in: the ways that work."""

from __future__ import annotations

import pytest
from plugins.auth_evm.tests.login.world import ALICE, World

from wetware.hookspecs import Accept

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("form", ["eip712", "eip4361"])
async def test_a_wallet_lets_a_session_key_act_for_it(world: World, form: str) -> None:
    await world.grant(ALICE.address)
    session = world.session_of(ALICE, form=form)
    result = await world.login(session)
    assert result == Accept(
        world.principal(ALICE), frozenset({"member"}), float(session.grant.expires_at)
    )
    assert str(world.principal(ALICE)) == f"evm:31337:{ALICE.address}"
    assert world.backend.roles(world.principal(ALICE)) == {"member"}
