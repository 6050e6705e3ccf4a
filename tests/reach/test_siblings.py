"""`ctx.sibling` between members that cannot dial each other, and when they can."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.packaging import third_party

from wetware import rpc
from wetware.errors import WetwareError
from wetware.testing import Home

from .cluster import RETRY_S, Cluster
from .lab import Lab
from .test_changes import logged_in, start, until, via

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]
RELAYED_S, DIRECT_S = 10.0, 45.0


@pytest.fixture
def twins(lab: Lab, tmp_path: Path) -> Iterator[tuple[Cluster, rpc.Interface]]:
    """A cluster whose nodes have a service with siblings, and what its users have."""
    site = tmp_path / "site"
    files = (("twins.capnp", third_party.TWINS_SCHEMA),)
    package = third_party.install(site, "twins", third_party.TWINS, files=files)
    interface = rpc.load(site / package / "twins.capnp").Twins
    with Home(tmp_path, env={"PYTHONPATH": str(site)}) as home:
        yield Cluster(lab, home), interface


async def test_over_a_relay(twins: tuple[Cluster, rpc.Interface]) -> None:
    """Each is known as itself, whoever carries it."""
    cluster, interface = twins
    start(cluster, "hub", kind="open")
    start(cluster, "home", "cafe", kind="symmetric")
    async with contextlib.AsyncExitStack() as stack:
        for here, there in (("home", "cafe"), ("cafe", "home")):
            session = await logged_in(stack, cluster, here)
            peer = cluster.nodes[there].peer_id
            service: Any = await session.open("twins", interface)

            async def asked(service: Any = service, peer: Any = peer) -> Any:
                return await service.ask(peer=str(peer))

            await until(asked, f"{here} asks {there}", RELAYED_S)
            assert (await asked())["principal"] == f"node:{cluster.nodes[here].peer_id}"
            assert await via(session, peer) == cluster.nodes["hub"].peer_id


@pytest.mark.long
async def test_what_is_new_takes_the_direct_path(twins: tuple[Cluster, rpc.Interface]) -> None:
    """And no call fails meanwhile, nor when the relay dies that was left."""
    cluster, interface = twins
    start(cluster, "hub", kind="open")
    start(cluster, "home", "cafe", kind="port-restricted")
    peer = cluster.nodes["cafe"].peer_id
    async with contextlib.AsyncExitStack() as stack:
        session = await logged_in(stack, cluster, "home")
        service: Any = await session.open("twins", interface)

        async def asked() -> Any:
            return await service.ask(peer=str(peer))

        await until(asked, "home asks cafe", RELAYED_S)
        assert await via(session, peer) != "", "it began over the relay"
        failures: list[WetwareError] = []

        async def only_direct() -> bool:
            try:
                await asked()
            except WetwareError as exc:
                failures.append(exc)
            status = (await session.status())["peers"]
            return [each["via"] for each in status if each["peer_id"] == str(peer)] == [""]

        # That connection ends when nobody uses it, and all this time somebody asks.
        await until(only_direct, "one direct connection", DIRECT_S)
        cluster.nodes["hub"].stop(signal.SIGKILL)
        for _ in range(20):
            await asked()
            await asyncio.sleep(RETRY_S)
        assert failures == []
