"""Grants for what outlives a call: live ones below a call's, durable ones below a session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.broker.derived import Derived, Deriver
from wetware.broker.protocol import CORE
from wetware.client import Session
from wetware.errors import (
    Amplification,
    CapabilityError,
    Denied,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Revoked,
    Unsupported,
    WetwareError,
)
from wetware.hookspecs import RoleProfile
from wetware.identity import PeerId

from .cluster import BOX, Backend, MemNode, box
from .parts import Clock

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
ASKED = {"out": ("box:a", ()), "in": ("box", ("key=prefix:b",))}


class World:
    """A node with the service `box`, which is started and stopped by the test."""

    def __init__(self, directory: Path) -> None:
        profile = RoleProfile({"box": frozenset({"*"})})
        self.backend = Backend({"member": profile}, {"ada": {"member"}})
        self.node = MemNode("a", directory, self.backend, Clock())
        self.running = self.node.running
        self.kept: list[str] = []

    async def keep(self, id_: str) -> None:
        """What a service does before a grant of it is on disk."""
        assert self.node.tree.grants[id_].durable
        assert id_ not in self.node.tree.shares
        self.kept.append(id_)

    @property
    def deriver(self) -> Deriver:
        return Deriver(lambda: self.node.broker)

    async def handed(self, session: Session, passed: Any = None, item: Any = None) -> Any:
        """What the service `box` has in its method: guard, session and item."""
        ref = session._ref if passed is None else passed
        await (await box(session)).hand(session=ref, item=item)
        return self.node.box.handed

    async def durable(self, session: Session, asked: Any = ASKED) -> Derived:
        _, ref, _ = await self.handed(session)
        return await self.deriver.derive_durable(ref, "job 1", asked, self.keep)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with rpc.runtime():
        yield World(tmp_path)


async def test_a_live_one_ends_the_calls_of_what_came_with_the_call(world: World) -> None:
    class Item(rpc.Servant, interface=BOX.Item):
        asked = 0

        async def read(self) -> dict[str, Any]:
            self.asked += 1
            if self.asked > 1:
                await asyncio.Event().wait()
            return {"data": b"x"}

        async def box(self) -> dict[str, Any]:
            return {"box": None}

    item = Item()
    async with world.running(), world.node.login("ada") as ada:
        guard, _, ref = await world.handed(ada, item=item)
        derived = world.deriver.derive(guard, "job 1")
        mine, other = derived.under("in", ref), derived.under("other", ref)
        assert await mine.read() == {"data": b"x"}
        shown = {grant.label: grant for grant in await ada.grants()}
        assert shown["in=Item"].parents == (derived.id,)
        assert shown["job 1"].kind == "derived"
        assert not shown["job 1"].durable
        assert derived.id not in world.node.tree.shares

        running = asyncio.ensure_future(mine.read())
        while item.asked < 2:
            await asyncio.sleep(0)
        await ada.revoke(shown["in=Item"].id, "enough")
        with pytest.raises(Revoked, match="enough"):
            await running
        with pytest.raises(Revoked, match="enough"):
            await mine.read()
        assert derived.ended is None
        running = asyncio.ensure_future(other.read())
        while item.asked < 3:
            await asyncio.sleep(0)
        derived.end("it is done")
        with pytest.raises(Revoked, match="it is done"):
            await running
        derived.end("again")
        assert "job 1" not in {grant.label for grant in await ada.grants()}


async def test_what_is_passed_from_one_to_another_ends_with_its_own(world: World) -> None:
    class Item(rpc.Servant, interface=BOX.Item):
        async def read(self) -> dict[str, Any]:
            return {"data": b"x"}

        async def box(self) -> dict[str, Any]:
            return {"box": None}

    async with world.running(), world.node.login("ada") as ada:
        guard, to, item = await world.handed(ada, await box(ada), Item())
        derived = world.deriver.derive(guard, "job 1")
        mine = derived.under("in", item)
        await derived.under("to", to.cast(BOX.Box)).keep(item=mine)
        kept = world.node.box.item
        assert await kept.read() == {"data": b"x"}
        shown = {grant.label: grant.id for grant in await ada.grants()}
        await ada.revoke(shown["in=Item"], "enough")
        with pytest.raises(Revoked, match="enough"):
            await kept.read()


async def test_a_live_one_ends_with_the_session_of_the_call(world: World) -> None:
    async with world.running():
        async with world.node.login("ada") as ada:
            guard, _, _ = await world.handed(ada)
            derived = world.deriver.derive(guard, "job 1")
            ended: list[WetwareError] = []
            derived.on_end(ended.append)
            await ada.close()
        assert isinstance(ended[0], Revoked)
        with pytest.raises(Revoked):
            world.deriver.derive(guard, "job 2")


async def test_a_durable_one_is_there_after_a_restart_with_what_binds_it(world: World) -> None:
    async with world.running():
        async with world.node.login("ada") as ada:
            made = await world.durable(ada)
            ended: list[WetwareError] = []
            made.on_end(ended.append)
            assert world.kept == [made.id]
            shown = {grant.label: grant for grant in await ada.grants()}
            assert shown["job 1"].durable
            assert shown["out=box:a"].parents == shown["in=box"].parents == (made.id,)
        await used(made)  # the session is over
    assert ended == [], "the node has stopped, and nothing else ended"
    async with world.running(), world.node.login("ada") as ada:
        again = await world.deriver.derived(made.id)
        await used(again)
        assert {"job 1", "out=box:a", "in=box"} <= {grant.label for grant in await ada.grants()}


async def used(derived: Derived) -> None:
    """It has what was asked for, and no more."""
    async with derived.opened() as refs:
        assert refs.keys() == {"out", "in"}
        assert refs["out"].interface == BOX.Item
        await refs["out"].read()
        with pytest.raises(CapabilityError):
            await (await refs["out"].box())["box"].get(key="c")
        await refs["in"].put(key="b1", data=b"")
        with pytest.raises(Denied):
            await refs["in"].put(key="c", data=b"")


@pytest.mark.parametrize("way", ["role", "revoke", "end"])
async def test_a_durable_one_ends_for_good(world: World, way: str) -> None:
    async with world.running(), world.node.login("ada") as ada:
        made = await world.durable(ada)
        ended: list[WetwareError] = []
        made.on_end(ended.append)
        async with made.opened() as refs:
            slow = asyncio.ensure_future(refs["in"].slow())
            while not world.node.box.running:
                await asyncio.sleep(0)
            match way:
                case "role":
                    world.backend.withdraw("ada", "member")
                case "revoke":
                    await ada.revoke(made.id, "over")
                case "end":
                    made.end("over")
            with pytest.raises(Revoked):
                await slow
        assert len(ended) == 1
    async with world.running():
        with pytest.raises(Revoked, match=r"over|withdrawn"):
            await world.deriver.derived(made.id)


async def test_a_durable_one_ends_with_a_role_that_goes_while_the_node_is_down(
    world: World,
) -> None:
    async with world.running(), world.node.login("ada") as ada:
        made = await world.durable(ada)
    world.backend.users["ada"].clear()
    async with world.running():
        with pytest.raises(Revoked, match="ended while the node was down"):
            await world.deriver.derived(made.id)
        with pytest.raises(NotFound):
            await world.deriver.derived("0" * 16)


async def test_what_is_revoked_by_itself_is_left_out(world: World) -> None:
    async with world.running(), world.node.login("ada") as ada:
        made = await world.durable(ada)
        async with made.opened() as refs:
            shown = {grant.label: grant.id for grant in await ada.grants()}
            await ada.revoke(shown["out=box:a"])
            with pytest.raises(Revoked):
                await refs["out"].read()
            await refs["in"].get(key="b")
    async with world.running(), (await world.deriver.derived(made.id)).opened() as refs:
        assert refs.keys() == {"in"}


async def test_nobody_redeems_what_is_for_a_service(world: World) -> None:
    async with world.running(), world.node.login("ada") as ada:
        made = await world.durable(ada)
        for secret in (b"", bytes(32), made.id.encode()):
            with pytest.raises(Denied):
                await world.node.tree.redeem(made.id, secret)


async def test_only_what_the_session_has_can_be_kept(world: World) -> None:
    world.backend.profiles["member"] = RoleProfile({"box": frozenset({"Box.get", "Box.hand"})})
    async with world.running(), world.node.login("ada") as ada:
        for asked, error in (
            ({"x": ("none", ())}, Amplification),
            ({"x": ("box", ("nothing=equals:1",))}, InvalidArgument),
            ({"a=b": ("box", ())}, InvalidArgument),
            ({"x": ("box:\n", ())}, InvalidArgument),
        ):
            with pytest.raises(error):
                await world.durable(ada, asked)
        assert not world.node.tree.shares
        made = await world.durable(ada, {})
        async with made.opened() as refs:
            assert refs == {}
        narrow = await world.durable(ada, {"in": ("box", ())})
        async with narrow.opened() as refs:
            with pytest.raises(Denied):
                await refs["in"].items()


async def test_what_cannot_be_kept_is_not_granted(world: World) -> None:
    async def full(id_: str) -> None:
        raise LimitExceeded("there is no room")

    async with world.running(), world.node.login("ada") as ada:
        _, ref, _ = await world.handed(ada)
        with pytest.raises(LimitExceeded):
            await world.deriver.derive_durable(ref, "job", ASKED, full)
        assert not world.node.tree.shares
        assert not any(grant.label == "job" for grant in await ada.grants())


async def test_a_service_that_is_gone_is_named(world: World) -> None:
    async with world.running(), world.node.login("ada") as ada:
        made = await world.durable(ada)
        world.node.broker.services = {}
        with pytest.raises(Unsupported, match="box"):
            async with made.opened():
                pass


async def test_a_session_has_to_vouch_for_itself(world: World, tmp_path: Path) -> None:
    """What is kept comes from the session that was handed in, and from no ID or name."""

    class Fake(rpc.Servant, interface=CORE.Subtree):
        """Answers to anything, and vouches for nothing."""

        async def list(self, principal: str, limit: int) -> dict[str, Any]:
            return {}

        async def revoke(self, id: str, reason: str) -> dict[str, Any]:
            return {"cut": 0}

        async def why(self, decision: str) -> dict[str, Any]:
            return {}

    other = MemNode("b", tmp_path, world.backend, Clock())
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(world.running())
        await stack.enter_async_context(other.running())
        ada = await stack.enter_async_context(world.node.login("ada"))
        elsewhere = await stack.enter_async_context(other.login("ada"))
        for passed in (Fake(), elsewhere._ref):
            _, ref, _ = await world.handed(ada, passed)
            with pytest.raises(WetwareError):
                await world.deriver.derive_durable(ref, "job", {}, world.keep)
        sealed = await ada.attenuate({"box": ()}, sealed=True)
        _, ref, _ = await world.handed(ada, sealed._ref)
        with pytest.raises(Denied):
            await world.deriver.derive_durable(ref, "job", {}, world.keep)
        assert not world.node.tree.shares
        assert not world.node.broker.claims
        await ada._ref.call("vouch", claim=b"of nobody")
        assert not world.node.broker.claims
        assert PeerId.parse(elsewhere.identity.node) == other.key.peer_id


async def test_without_a_node_nothing_is_durable() -> None:
    with pytest.raises(Unsupported):
        await Deriver().derived("0" * 16)
