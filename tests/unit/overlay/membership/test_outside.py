"""What a node says of how it is reached, and when it announces a port of its router."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.errors import LimitExceeded, OverlayError
from wetware.identity import Key
from wetware.overlay.mapping import Mapping
from wetware.overlay.membership import outside
from wetware.overlay.membership.outside import Outside

pytestmark = pytest.mark.anyio

HUB = Key.from_seed(b"h" * 32).peer_id
MAPPED = Multiaddr("ip4", "5.0.0.9", 4001)
PRIVATE = Multiaddr("ip4", "10.0.0.2", 4001)


class World:
    """All that an `Outside` asks."""

    def __init__(self) -> None:
        self.hubs: list[Any] = [SimpleNamespace(peer=HUB)]
        self.inside: dict[Any, Any] = {}
        self.opens: set[Multiaddr] = set()  # where a dial gets in
        self.refuses = self.no_router = False
        self.answers: list[Multiaddr] = []
        self.announced: list[Multiaddr | None] = []
        self.direct: list[Multiaddr] = [PRIVATE]
        self.lifetime_s = 1200.0
        self.mapped = self.ended = 0
        self.rng = random.Random(1)
        self.outside = Outside(
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            direct=lambda: self.direct,
            port=lambda: 4001,
            announce=self.announced.append,
            map_port=self.map,
        )

    def observers(self) -> list[Any]:
        return self.hubs

    def carriers(self) -> dict[Any, Any]:
        return {hub.peer: hub for hub in self.hubs} | self.inside

    async def seen(self) -> list[Multiaddr]:
        return self.answers

    async def ask(self, peer: Any, addrs: Any) -> list[Any]:
        if self.refuses:
            raise LimitExceeded("too often")
        return [SimpleNamespace(addr=addr, reached=addr in self.opens) for addr in addrs]

    async def map(self, port: int, threads: Any) -> Mapping:
        self.mapped += 1
        if self.no_router:
            raise OverlayError("no router")
        return Mapping(MAPPED, self.lifetime_s, self.end)

    async def end(self) -> None:
        self.ended += 1


async def test_a_port_is_announced_once_a_member_got_in_there_and_no_earlier() -> None:
    world = World()
    await world.outside._look()
    assert world.announced == []
    world.opens.add(MAPPED)
    await world.outside._look()
    await world.outside._look()
    assert world.announced == [MAPPED]
    assert world.outside.describe([]) == f"reached directly at {MAPPED}"
    world.refuses = True  # who cannot be asked says nothing against it
    await world.outside._look()
    assert world.announced == [MAPPED]
    world.refuses = False
    world.opens.clear()
    await world.outside._look()
    assert world.announced == [MAPPED, None]


async def test_the_announced_port_goes_with_its_router() -> None:
    world = World()
    world.opens.add(MAPPED)
    await world.outside._look()
    world.no_router = True
    await world.outside._look()
    assert world.announced == [MAPPED, None]


async def test_after_a_change_of_the_network_all_is_asked_anew() -> None:
    world = World()
    world.opens.add(MAPPED)
    await world.outside._look()
    world.outside.network_changed()
    assert world.announced == [MAPPED, None]
    await world.outside._look()  # it had begun in the other network
    assert world.announced == [MAPPED, None]


async def test_nothing_is_mapped_where_nobody_could_prove_it() -> None:
    world = World()
    world.hubs, world.inside = [], {HUB: None}
    await world.outside._look()
    assert world.mapped == 0
    assert "nobody could tell" in world.outside.describe([])


async def test_the_kind_of_nat_needs_two_who_tell() -> None:
    world = World()
    for ports, words in [
        ((), "nobody could tell"),
        ((1,), "nobody could tell"),
        ((1, 1), "keeps ports"),
        ((1, 2), "symmetric NAT"),
    ]:
        world.answers = [Multiaddr("ip4", "5.0.0.9", port) for port in ports]
        await world.outside._look()
        assert words in world.outside.describe([])
    assert world.outside.describe(["hub1", "hub2"]).endswith("only by the relays hub1, hub2")


async def test_a_public_address_of_the_node_is_dialled_by_whoever_is_connected() -> None:
    world = World()
    world.hubs, world.inside, world.direct = [], {HUB: None}, [MAPPED.with_peer(HUB)]
    world.opens.add(MAPPED)
    await world.outside._look()
    assert world.outside.describe([]) == f"reached directly at {MAPPED}"
    assert world.announced == []


async def test_it_is_renewed_at_half_its_lifetime_and_ended_with_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outside, "RENEW_S_MIN", 0.0)
    world = World()
    world.opens.add(MAPPED)
    world.lifetime_s = 0.02
    running = asyncio.ensure_future(world.outside.run())
    async with asyncio.timeout(60):
        while world.mapped < 4:
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert world.ended == 1
