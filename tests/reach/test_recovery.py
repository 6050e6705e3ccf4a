"""What was reached is reached again: after a relay's death, a silence, a change of network."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest

from .cluster import RETRY_S, Cluster, first
from .lab import Network
from .probe import prove

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

BACK_S = 20.0
"""Not the figure, for which see tests/bench/bench_roaming.py: the tests share their processors."""

FORGET_S = 5


def _at_home(cluster: Cluster, name: str, network: Network) -> None:
    cluster.lab.host(name, network)
    prove(cluster.lab, name)
    cluster.start(name, join="hub")


def _missed(ways: dict[str, float | str]) -> dict[str, str]:
    return {way: why for way, why in ways.items() if isinstance(why, str)}


def _path(cluster: Cluster, here: str, there: str) -> str:
    """By way of whom, as `ww ping` says."""
    printed = cluster.ww(here, "ping", there, "-c", "1", "--json", check=True).stdout
    return str(json.loads(printed)["path"])


async def test_when_a_relay_dies_another_takes_over(cluster: Cluster) -> None:
    """Under a subscription, which goes on."""
    for name in ("hub", "rented"):
        cluster.lab.host(name)
        cluster.start(name, join="hub" if cluster.nodes else "")
    for name in ("home", "cafe"):
        _at_home(cluster, name, cluster.lab.network("symmetric"))
    arrived = asyncio.Event()
    async with cluster.session("home") as home, cluster.session("cafe") as cafe:
        topic = await home.pubsub.join("chat")

        async def publish() -> None:
            arrived.clear()
            await topic.publish("hello")
            async with asyncio.timeout(RETRY_S):
                await arrived.wait()

        async def receive() -> None:
            async for _ in messages:
                arrived.set()

        async def ping() -> None:
            await home.cluster.ping(str(cluster.nodes["cafe"].peer_id))

        async with (await cafe.pubsub.join("chat")).subscribe() as messages:
            receiving = asyncio.create_task(receive())
            assert isinstance(await first(publish, BACK_S), float)
            via = _path(cluster, "home", "cafe").removeprefix("via ")
            assert via in ("hub", "rented")
            cluster.nodes.pop(via).stop(signal.SIGKILL)
            ways = {"pubsub": publish, "ping": ping}
            took = [await first(way, BACK_S) for way in ways.values()]
            assert all(isinstance(way, float) for way in took), took
            receiving.cancel()
    (other,) = {"hub", "rented"} & set(cluster.nodes)
    assert _path(cluster, "home", "cafe") == f"via {other}"


@pytest.mark.long
async def test_a_nat_that_forgets_a_silent_connection_is_not_noticed(cluster: Cluster) -> None:
    """Members ask each other before it does; what is said next is answered at once."""
    cluster.lab.host("hub")
    cluster.start("hub")
    for name in ("home", "cafe"):
        _at_home(cluster, name, cluster.lab.network("symmetric", forget_s=FORGET_S))
    assert not _missed(await cluster.reach("home", "cafe", within_s=BACK_S))
    await asyncio.sleep(2 * FORGET_S)
    assert not _missed(await cluster.reach("cafe", "home", within_s=2.0))


@pytest.mark.parametrize("kind", ["port-restricted", "isolated"])
async def test_a_laptop_is_back_after_a_change_of_network(cluster: Cluster, kind: str) -> None:
    """Behind another NAT; or, after it was nowhere, at home again with another address."""
    home = cluster.lab.network("port-restricted")
    cluster.lab.host("hub")
    cluster.start("hub")
    _at_home(cluster, "laptop", home)
    _at_home(cluster, "cafe", cluster.lab.network("symmetric"))
    assert not _missed(await cluster.reach("cafe", "laptop", within_s=BACK_S))
    cluster.lab.move("laptop", cluster.lab.network(kind))
    if kind == "isolated":
        await asyncio.sleep(5)
        cluster.lab.move("laptop", home)
    for there in ("hub", "cafe"):
        assert not _missed(await cluster.reach("laptop", there, within_s=BACK_S))
        assert not _missed(await cluster.reach(there, "laptop", within_s=BACK_S))
