"""Endpoints that are not needed any more; without a chain."""

from __future__ import annotations

import asyncio

import pytest

from wetware_auth_evm.chain.endpoints import Endpoints

pytestmark = pytest.mark.anyio


async def test_a_cancellation_while_others_are_let_go_is_not_lost() -> None:
    """Who stops the follower waits for it."""
    each = Endpoints(["http://127.0.0.1:1", "http://127.0.0.1:2"], quorum=1, timeout_s=60.0)
    going = asyncio.Event()

    async def quick(*_: object) -> str:
        return "0x1"

    async def slow_to_go(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            going.set()
            await asyncio.Event().wait()

    for endpoint, call in zip(each.each, (quick, slow_to_go), strict=True):
        endpoint.call = call  # type: ignore[assignment,method-assign]
    asking = asyncio.create_task(each.agree("eth_chainId"))
    await going.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
