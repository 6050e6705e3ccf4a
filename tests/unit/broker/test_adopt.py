"""References to another node, held through one's own: membrane, revocation, lease."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import (
    Denied,
    InvalidArgument,
    LimitExceeded,
    Revoked,
    Unsupported,
    WetwareError,
)
from wetware.hookspecs import RoleProfile
from wetware.identity import PeerId

from .cluster import BOX, Backend, MemNode, box
from .parts import Clock
from .test_attacks import Holder, SinkServant

pytestmark = pytest.mark.anyio
LEASE_S = 1.0


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[tuple[MemNode, MemNode]]:
    backend = Backend({"member": RoleProfile({"box": frozenset({"*"})})}, {"ada": {"member"}})
    others: dict[PeerId, Path] = {}
    a, b = (
        MemNode(name, tmp_path, backend, Clock(), others, lease_s=LEASE_S,
                adoptions_per_session_max=3)
        for name in "ab"
    )  # fmt: skip
    async with rpc.runtime(), a.running(), b.running():
        yield a, b


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_reference_works_through_another_node_as_narrow_as_it_is(nodes: Any) -> None:
    a, b = nodes
    async with a.login("ada") as at_a, b.login("ada") as at_b:
        ref, _ = await at_a.share({"box": ["Box.put", "Box.open", "Item.*"]}, {"key": "k"})
        adopted = await at_b.adopt(ref)
        assert adopted.identity.node == str(a.key.peer_id)
        held = await box(adopted)
        await held.put(key="k", data=b"x")
        assert a.box.data == {"k": b"x"}
        assert not b.box.data
        for refused in (held.put(key="other", data=b""), held.get(key="k")):
            with pytest.raises(Denied):
                await refused
        item = (await held.open(key="k"))["item"]
        assert (await item.read())["data"] == b"x"
        with pytest.raises(Denied):
            await (await item.box())["box"].get(key="k")
        weak = await adopted.attenuate({"box": ["Item.read"]})
        with pytest.raises(Denied):
            await (await box(weak)).put(key="k", data=b"")


async def test_revocation_at_the_issuer_reaches_the_holders_of_the_other_node(nodes: Any) -> None:
    a, b = nodes
    async with a.login("ada") as at_a, b.login("ada") as at_b:
        ref, grant = await at_a.share({"box": []})
        adopted = await at_b.adopt(ref)
        held, sink = await box(adopted), SinkServant()
        await held.watch(sink=sink)
        item = (await held.open(key="k"))["item"]
        weak = await adopted.attenuate()
        running = asyncio.create_task(held.slow())
        await until(lambda: a.box.running)
        (out,) = a.box.sinks
        await at_a.revoke(grant.id, "lost")
        with pytest.raises(Revoked):
            await running
        assert not a.box.running
        # Nobody asked: the other node has been told.
        await until(lambda: not len(b.broker.adoptions))
        for dead in (held.get(key="k"), item.read(), adopted.whoami(), weak.whoami()):
            with pytest.raises(Revoked, match="lost"):
                await dead
        with pytest.raises(WetwareError):
            await out.push(item=None, data=b"")


async def test_the_end_of_the_session_here_ends_it_there(nodes: Any) -> None:
    a, b = nodes
    async with a.login("ada") as at_a:
        ref, grant = await at_a.share({"box": []})
        async with b.login("ada") as at_b:
            held = await box(await at_b.adopt(ref))
            with contextlib.suppress(WetwareError):
                await held.get(key="k")
        await until(lambda: not len(b.broker.adoptions))
        await until(lambda: not a.tree.grants.get(grant.id).children)


async def test_a_node_that_is_cut_off_refuses_within_the_lease(
    nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The issuer stops answering; the connection does not end."""
    a, b = nodes
    async with a.login("ada") as at_a, b.login("ada") as at_b:
        ref, _ = await at_a.share({"box": []})
        adopted = await at_b.adopt(ref)
        held = await box(adopted)
        await held.get(key="k")
        hung = asyncio.Event()

        async def silent(*_: object, **__: object) -> Any:
            await hung.wait()

        # From here on nothing of what the other node asks for is answered.
        from wetware.broker.session import SessionServant

        monkeypatch.setattr(SessionServant, "keep", silent)
        monkeypatch.setattr(type(a.box.bootstrap(None)), "get", silent)
        loop = asyncio.get_running_loop()
        cut_off = loop.time()
        call = asyncio.create_task(held.get(key="k"))
        with pytest.raises(Revoked) as refused:
            await call
        assert refused.value.code == "capability.revoked.lease"
        assert loop.time() - cut_off < LEASE_S + 0.5
        with pytest.raises(Revoked):
            await held.put(key="k", data=b"")
        assert not a.box.puts
        hung.set()


async def test_a_long_use_outlives_many_leases(nodes: Any) -> None:
    a, b = nodes
    async with a.login("ada") as at_a, b.login("ada") as at_b:
        ref, _ = await at_a.share({"box": []})
        adopted = await at_b.adopt(ref)
        held = await box(adopted)
        for _ in range(5):
            await asyncio.sleep(LEASE_S / 2)
            await held.get(key="k")


async def test_a_callback_comes_back_to_its_owner_through_the_other_node(nodes: Any) -> None:
    a, b = nodes
    async with a.login("ada") as at_a, b.login("ada") as at_b:
        ref, _ = await at_a.share({"box": []})
        adopted = await at_b.adopt(ref)
        held = await box(adopted)
        own = Holder(b"mine")
        await held.keep(item=own)
        for _ in range(5):  # there and back again: it stays as it is
            back = (await held.kept())["item"]
            assert (await back.read())["data"] == b"mine"
            await held.keep(item=back)
        await at_a.revoke((await at_a.grants())[0].id)


async def test_what_cannot_be_adopted(nodes: Any) -> None:
    a, b = nodes
    async with a.login("ada") as at_a, b.login("ada") as at_b:
        own, _ = await at_b.share({"box": []})
        with pytest.raises(InvalidArgument, match="itself"):
            await at_b.adopt(own)
        with pytest.raises(InvalidArgument):
            await at_b.adopt("ww1nonsense")
        ref, _ = await at_a.share({"box": []})
        adopted = await at_b.adopt(ref)
        with pytest.raises(Unsupported):
            await adopted.adopt(own)
        more = [await at_b.adopt(ref) for _ in range(2)]
        with pytest.raises(LimitExceeded, match="adoptions_per_session_max"):
            await at_b.adopt(ref)
        assert len(b.broker.adoptions) == 3
        await more.pop().close()
        await until(lambda: len(b.broker.adoptions) == 2)
        await at_b.adopt(ref)
        b.broker.adoptions._services.clear()
        with pytest.raises(Unsupported, match="does not have the service"):
            await adopted.open("box", BOX.Box)
