"""Siblings between nodes in memory: one connection a member, who is refused, and what ends it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import (
    CapabilityError,
    Denied,
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    OverlayError,
    Revoked,
    TimedOut,
    Unsupported,
)
from wetware.hookspecs import PluginContext, Service
from wetware.identity import Key, Principal
from wetware.node import siblings
from wetware.testing import FakeOverlay, overlays, plugin_context

pytestmark = pytest.mark.anyio
SCHEMA = rpc.load(Path(__file__).with_name("siblings.capnp"))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # no one event tells of it
            await asyncio.sleep(0.002)


class Twin(rpc.Servant, interface=SCHEMA.Twin):
    def __init__(self, service: TwinService, node: Principal) -> None:
        self.service, self.node = service, node

    async def who(self) -> dict[str, Any]:
        return {"principal": str(self.node)}

    async def wait(self) -> None:
        self.service.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.service.waiting -= 1

    async def stream(self) -> dict[str, Any]:
        stream = rpc.ByteStream()
        self.service.streams.append(stream)
        return {"stream": stream.servant}

    def released(self) -> None:
        self.service.released += 1


class TwinService(Service):
    interface = SCHEMA.Users
    peer_interface = SCHEMA.Twin

    def __init__(self, name: str = "twins") -> None:
        self.name = name
        self.made = self.waiting = self.released = 0
        self.streams: list[rpc.ByteStream] = []

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        raise AssertionError("nobody is a user here")

    def peer_bootstrap(self, node: Principal) -> rpc.Servant:
        self.made += 1
        return Twin(self, node)


class UsersOnly(TwinService):
    peer_interface = None

    def peer_bootstrap(self, node: Principal) -> None:  # type: ignore[override]
        return None


@contextlib.asynccontextmanager
async def cluster(
    path: Path, count: int = 2, *names: str
) -> AsyncIterator[tuple[list[FakeOverlay], list[PluginContext]]]:
    """So many nodes, each with the services `names`."""
    async with rpc.runtime(), overlays(count) as nodes:
        for node in nodes:
            node.services |= {name: TwinService(name) for name in names or ("twins",)}
        yield list(nodes), [plugin_context(path, name="twins", overlay=node) for node in nodes]


def twins(node: FakeOverlay, name: str = "twins") -> TwinService:
    service = node.services[name]
    assert isinstance(service, TwinService)
    return service


async def test_all_plugins_share_one_connection_and_one_dial(tmp_path: Path) -> None:
    async with cluster(tmp_path, 3, "twins", "others") as ((a, b, c), (ctx, *_)):
        asked = [ctx.sibling(b.peer_id), ctx.sibling(b.peer_id, "others"), ctx.sibling(c.peer_id)]
        one, other, far = await asyncio.gather(*asked)
        assert one.connection is other.connection
        assert one.connection is not far.connection
        assert one.interface == SCHEMA.Twin
        for ref in (one, other, far):
            assert await ref.who() == {"principal": f"node:{a.peer_id}"}  # type: ignore[attr-defined]
        again = await ctx.sibling(b.peer_id)
        assert again.connection is one.connection
        assert (twins(b).made, twins(b, "others").made) == (2, 1), "a servant of its own each time"
        assert b.recorded == [
            ("sibling.opened", {"peer": a.peer_id, "service": name})
            for name in sorted(("twins", "others"), reverse=True)
        ], "once for each service, not each time"


async def test_a_dial_that_one_caller_gives_up_goes_on_for_the_others(tmp_path: Path) -> None:
    async with cluster(tmp_path) as ((_, b), (ctx, _)):
        first, second = (asyncio.create_task(ctx.sibling(b.peer_id)) for _ in range(2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        assert await (await second).who()  # type: ignore[attr-defined]


async def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        with pytest.raises(NotFound) as missing:
            await ctx.sibling(Key.generate().peer_id)
        assert missing.value.code == "not_found.member"
        with pytest.raises(Unsupported) as here:
            await ctx.sibling(b.peer_id, "nothing")
        assert here.value.code == "unsupported.service"
        a.services["users"] = UsersOnly("users")
        with pytest.raises(InvalidArgument, match="has no siblings"):
            await ctx.sibling(b.peer_id, "users")
        for there, says in ({}, "is not running"), ({"users": UsersOnly("users")}, "no siblings"):
            a.services["users"] = TwinService("users")
            b.services |= there
            with pytest.raises(Unsupported, match=says) as refused:
                await ctx.sibling(b.peer_id, "users")
            assert refused.value.code == "unsupported.service"


async def test_who_is_no_member_is_refused_by_name(tmp_path: Path) -> None:
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        b._evicted.add(a.peer_id)
        with pytest.raises(Denied, match="was evicted: only nodes of the cluster") as refused:
            await ctx.sibling(b.peer_id)
        assert refused.value.code == "capability.denied.peer"
        assert twins(b).made == 0
        assert [event for event, _ in b.recorded] == ["sibling.refused"]
        assert a.siblings._links == {}


async def test_all_ends_with_the_membership_calls_in_flight_included(tmp_path: Path) -> None:
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        ref: Any = await ctx.sibling(b.peer_id)
        stream = rpc.ByteStream((await ref.stream())["stream"])
        call = asyncio.create_task(ref.wait())
        await until(lambda: twins(b).waiting)
        b.siblings.gone(a.peer_id)
        with pytest.raises(Revoked, match="no connected member"):
            await call
        assert twins(b).waiting == 0
        for kept in (ref.who(), ctx.sibling(b.peer_id), stream.receive()):
            with pytest.raises(CapabilityError):
                await kept
        await until(lambda: ref.connection.closed)
        fresh: Any = await ctx.sibling(b.peer_id)  # by a connection that is a member's
        assert await fresh.who()


async def test_an_eviction_ends_the_connection_and_a_kept_reference_stays_dead(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        ref: Any = await ctx.sibling(b.peer_id)
        b.evict(a.peer_id)
        with pytest.raises((CapabilityError, OverlayError)):
            await ref.who()
        await a.connect(b)
        with pytest.raises((Disconnected, InvalidArgument)):
            await ref.who()
        with pytest.raises(Denied):
            await ctx.sibling(b.peer_id)
        await until(lambda: twins(b).released == 1)
        assert b.siblings._guards == {}


async def test_a_lost_connection_is_made_again_at_the_next_use(tmp_path: Path) -> None:
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        ref: Any = await ctx.sibling(b.peer_id)
        await a.disconnect(b)
        with pytest.raises(OverlayError):
            await ref.who()
        await a.connect(b)
        again: Any = await ctx.sibling(b.peer_id)
        assert await again.who()
        assert again.connection is not ref.connection


async def look(node: FakeOverlay, after_s: float, *, used: int) -> None:
    """As the node does it now and then, so long after the last look; `used` connections are."""
    links = [link for links in node.siblings._links.values() for link in links]
    await until(lambda: sum(link.in_use for link in links) == used)
    for link in links:
        link.used_at -= after_s
    node.siblings._sweep()


async def test_what_nobody_uses_ends_and_what_is_held_stays(tmp_path: Path) -> None:
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        ref: Any = await ctx.sibling(b.peer_id)
        connection = ref.connection
        stream = rpc.ByteStream((await ref.stream())["stream"])
        ref.close()
        await look(a, siblings.IDLE_S, used=1)
        await stream.send(b"x")
        assert await twins(b).streams[0].receive() == b"x"
        await stream.aclose()
        await look(a, siblings.IDLE_S - 1, used=0)
        assert (await ctx.sibling(b.peer_id)).connection is connection
        await look(a, siblings.IDLE_S, used=0)
        await asyncio.wait_for(connection.wait_closed(), 60)
        await until(lambda: not a.siblings._links)
        again: Any = await ctx.sibling(b.peer_id)
        assert await again.who()


async def test_a_better_path_takes_what_is_new(tmp_path: Path) -> None:
    """And the old one stays until its references are gone; a third one ends the first."""
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        refs: list[Any] = []
        for _ in range(3):
            refs.append(await ctx.sibling(b.peer_id))
            link: Any = a.siblings._links[b.peer_id][-1]
            link.under = type("Carried", (), {"superseded": True})()
        assert len({ref.connection for ref in refs}) == 3
        await asyncio.wait_for(refs[0].connection.wait_closed(), 60)
        for ref in refs[1:]:
            assert await ref.who()
        second = refs[1].connection
        refs[1].close()
        await look(a, 0, used=1)
        await asyncio.wait_for(second.wait_closed(), 60)
        assert await refs[2].who()


async def test_members_that_are_in_use_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(siblings, "LINKS_MAX", 1)
    async with cluster(tmp_path, 3) as ((_, b, c), (ctx, *_)):
        ref: Any = await ctx.sibling(b.peer_id)
        with pytest.raises(LimitExceeded, match="LINKS_MAX"):
            await ctx.sibling(c.peer_id)
        connection = ref.connection
        ref.close()
        other: Any = await ctx.sibling(c.peer_id)
        assert await other.who()
        await asyncio.wait_for(connection.wait_closed(), 60)


async def test_members_that_are_connected_to_at_once_are_bounded_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new one has another one make room, not all of them the same."""
    monkeypatch.setattr(siblings, "LINKS_MAX", 2)
    async with cluster(tmp_path, 5) as ((a, *others), (ctx, *_)):
        peers = [other.peer_id for other in others]
        for peer in peers[:2]:
            (await ctx.sibling(peer)).close()
        links = [link for links in a.siblings._links.values() for link in links]
        await until(lambda: not any(link.in_use for link in links))
        refs = await asyncio.gather(*map(ctx.sibling, peers[2:]))
        await until(lambda: set(a.siblings._links) == set(peers[2:]))
        for link in links:
            await asyncio.wait_for(link.connection.wait_closed(), 60)
        for ref in refs:
            assert await ref.who()  # type: ignore[attr-defined]


class Refuses(TwinService):
    def peer_bootstrap(self, node: Principal) -> rpc.Servant:
        raise Denied(f"{node} is not for {self.name}")


async def test_a_service_that_refuses_a_node_ends_nothing_of_the_others(tmp_path: Path) -> None:
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        ref: Any = await ctx.sibling(b.peer_id)
        a.services["others"] = b.services["others"] = Refuses("others")
        with pytest.raises(Denied, match="is not for others"):
            await ctx.sibling(b.peer_id, "others")
        assert await ref.who()
        assert (await ctx.sibling(b.peer_id)).connection is ref.connection


async def test_a_member_that_holds_ten_thousand_is_refused(tmp_path: Path) -> None:
    """References are bounded by its connection; what it held is released with that."""
    async with cluster(tmp_path) as ((a, b), (ctx, _)):
        first: Any = await ctx.sibling(b.peer_id)
        monkey = a.siblings._links[b.peer_id][-1]
        monkey.connection._end.limits = rpc.RpcLimits(imports_max=1 << 20)
        held, refused = [first], 0
        for _ in range(50):
            asked = [ctx.sibling(b.peer_id) for _ in range(200)]
            for got in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(got, rpc.Ref):
                    held.append(got)
                else:
                    assert isinstance(got, LimitExceeded), got
                    assert "exports_max" in got.message
                    refused += 1
        assert len(held) + refused == 10_001
        assert len(held) <= rpc.RpcLimits().exports_max
        assert await first.who(), "what it had goes on"
        assert [event for event, _ in b.recorded] == ["sibling.opened"]
        await a.disconnect(b)
        await until(lambda: twins(b).released == twins(b).made)


async def test_a_member_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(siblings, "OPEN_S", 0.1)
    async with cluster(tmp_path) as ((_, b), (ctx, _)):
        hangs = asyncio.Event()
        monkeypatch.setattr(b.siblings, "_admit", lambda _: hangs.wait())
        with pytest.raises(TimedOut, match="did not answer"):
            await ctx.sibling(b.peer_id)
