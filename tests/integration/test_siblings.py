"""`ctx.sibling` between real nodes, for a third party's service, and who tries to be a member."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware import rpc
from wetware.base.multiaddr import Multiaddr
from wetware.broker.limits import LoginLimits
from wetware.broker.protocol import CORE, GATE_PROTOCOL
from wetware.errors import (
    CapabilityError,
    Denied,
    LimitExceeded,
    OverlayError,
    StreamReset,
    Unsupported,
)
from wetware.identity import Key
from wetware.overlay.link import Connection, LinkHost
from wetware.overlay.rpc_pipe import RpcPipe
from wetware.overlay.tunnel import TunnelPipe
from wetware.testing import Home, NodeProcess, wait_for

from ..packaging import third_party
from .test_admission import dial, member_peer

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    files = (("twins.capnp", third_party.TWINS_SCHEMA),)
    third_party.install(site, "twins", third_party.TWINS, files=files)
    return site


@pytest.fixture(scope="module")
def schema(site: Path) -> rpc.Schema:
    return rpc.load(site / "ww_twins" / "twins.capnp")


@pytest.fixture(scope="module")
def nodes(
    site: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[NodeProcess, NodeProcess, NodeProcess]]:
    """Two with the plugin, and one without."""
    path = tmp_path_factory.mktemp("home")
    with (
        Home(path, env={"PYTHONPATH": str(site)}, libp2p=False) as home,
        Home(path, libp2p=False) as without,
        home.node("a") as a,
        home.node("b", join=a) as b,
        without.node("c", join=a.invite()) as c,
    ):
        a.wait_members([b.peer_id, c.peer_id])
        b.wait_members([a.peer_id, c.peer_id])
        yield a, b, c


@contextlib.asynccontextmanager
async def twins(node: NodeProcess, schema: rpc.Schema) -> AsyncIterator[Any]:
    async with wetware.connect(data_dir=node.data_dir, key=node.home.key()) as session:
        yield await session.open("twins", schema.Twins)


@contextlib.asynccontextmanager
async def gate(connection: Connection) -> AsyncIterator[Any]:
    rpc_connection = await rpc.connect(RpcPipe(await connection.open_stream(GATE_PROTOCOL)))
    async with rpc_connection:
        yield rpc_connection.bootstrap(CORE.Gate)


async def refused(gate: Any, why: str) -> None:
    with pytest.raises(Denied, match=why) as caught:
        await gate.peer()
    assert caught.value.code == "capability.denied.peer"


# --- members --------------------------------------------------------------------------------------


async def test_a_sibling_is_reached_as_the_node(nodes: Any, schema: rpc.Schema) -> None:
    a, b, _ = nodes
    async with twins(a, schema) as here, twins(b, schema) as there:
        await there.put(text="written at b")
        asked = [here.ask(peer=str(b.peer_id)) for _ in range(20)]
        for got in await asyncio.gather(*asked):
            assert got == {"principal": f"node:{a.peer_id}", "text": "written at b"}
        assert (await there.ask(peer=str(a.peer_id)))["principal"] == f"node:{b.peer_id}"
    log = [line for line in b.log.read_text().splitlines() if "sibling.opened" in line]
    opened = [line for line in log if "service=twins" in line]
    assert len(opened) == 1, "one connection for all of them, and one record"


async def test_what_is_wrong_is_told(nodes: Any, schema: rpc.Schema) -> None:
    a, _, c = nodes
    async with twins(a, schema) as here:
        for peer, code in (
            (a.peer_id, "not_found.member"),
            (Key.generate().peer_id, "not_found.member"),
            (c.peer_id, "unsupported.service"),
        ):
            with pytest.raises(wetware.WetwareError) as caught:
                await here.ask(peer=str(peer))
            assert caught.value.code == code
        ticket = await asyncio.to_thread(a.invite)
        d = a.home.start_node("d", join=ticket).wait_ready()
        await asyncio.to_thread(a.wait_members, [d.peer_id])
        assert (await here.ask(peer=str(d.peer_id)))["text"] == ""
        await asyncio.to_thread(d.stop)
        await asyncio.to_thread(a.wait_members, [d.peer_id], "left")
        with pytest.raises(OverlayError, match="is left") as gone:
            await here.ask(peer=str(d.peer_id))
        assert gone.value.code == "overlay.dial.not_alive"
        # It is back: the next use connects anew.
        again = a.home.start_node("d").wait_ready()
        await asyncio.to_thread(a.wait_members, [again.peer_id])
        assert (await here.ask(peer=str(again.peer_id)))["text"] == ""
        await asyncio.to_thread(again.stop)


# --- who is none ----------------------------------------------------------------------------------


async def test_clients_are_refused_however_they_come(nodes: Any) -> None:
    a, b, _ = nodes
    async with LinkHost(Key.generate()) as host:
        async with gate(await dial(host, a)) as direct:
            await refused(direct, "is no member of this cluster")
        # Through a member, which is one: the client inside its tunnel is not.
        async with wetware.connect(data_dir=b.data_dir, key=b.home.key()) as session:
            cluster = await session.open("cluster", CORE.Cluster)
            stream = rpc.ByteStream((await cluster.tunnel(peer=str(a.peer_id)))["stream"])
            async with LinkHost(Key.generate()) as inner:
                inside = await inner.connect_pipe(
                    TunnelPipe(stream), a.peer_id, Multiaddr.parse(a.addr)
                )
                async with gate(inside) as carried:
                    await refused(carried, "is no member of this cluster")
    async with await rpc.connect_unix(Path(a.info["socket"])) as local:
        await refused(local.bootstrap(CORE.Gate), "is no node")


async def test_a_member_that_shows_nothing_is_none_on_that_connection(
    nodes: Any, tmp_path: Path
) -> None:
    """Its key alone opens nothing: both ends have to have admitted each other there."""
    a, *_ = nodes
    key = Key.generate()
    ticket = await asyncio.to_thread(a.invite)
    async with member_peer(tmp_path / "peer", ticket, key) as peer:
        async with gate(await peer.introduce(a)) as shown:
            assert (await shown.peer())["peer"] is not None
        async with LinkHost(key) as mute:
            connection = await mute.dial([Multiaddr.parse(a.addr)], peer=a.peer_id)
            async with gate(connection) as silent:
                await refused(silent, "did not introduce itself|connection ended")
    await asyncio.to_thread(a.ww, "evict", key.peer_id, "--yes", check=True)


async def test_a_foreign_peer_is_none(nodes: Any) -> None:
    a, *_ = nodes
    key = Key.generate()
    await asyncio.to_thread(a.invite, "--peer", str(key.peer_id), "--foreign")
    async with LinkHost(key) as host:
        connection = await dial(host, a)
        async with gate(connection) as foreign:
            await refused(foreign, "is a foreign libp2p peer|is no member")
    await asyncio.to_thread(a.ww, "evict", key.peer_id, "--yes", check=True)


async def test_what_an_evicted_node_kept_is_dead(
    nodes: Any, schema: rpc.Schema, tmp_path: Path
) -> None:
    a, *_ = nodes
    key = Key.generate()
    ticket = await asyncio.to_thread(a.invite)
    async with member_peer(tmp_path / "peer", ticket, key) as peer:
        connection = await peer.introduce(a)
        async with gate(connection) as member:
            kept = (await member.peer())["peer"]
            twin = (await kept.open(service="twins"))["service"].cast(schema.Twin)
            assert (await twin.read())["principal"] == f"node:{key.peer_id}"
            waiting = asyncio.create_task(twin.wait())
            await asyncio.to_thread(a.ww, "evict", key.peer_id, "--yes", check=True)
            for call in (waiting, twin.read(), kept.open(service="twins"), member.peer()):
                with pytest.raises((CapabilityError, OverlayError)):
                    await asyncio.wait_for(call, 60)
        # As anybody may, it connects as a stranger.
        async with gate(await dial(peer.host, a)) as stranger:
            await refused(stranger, "was evicted from the cluster")
    wait_for(lambda: "sibling.refused" in a.log.read_text(), "a record of the refusal")


@pytest.mark.long
async def test_strangers_that_fill_the_gate_keep_no_member_out(nodes: Any, tmp_path: Path) -> None:
    """Not even at the member's own address, where many nodes may be behind one NAT or relay."""
    a, *_ = nodes
    limits, key = LoginLimits(), Key.generate()
    ticket = await asyncio.to_thread(a.invite)
    async with (
        contextlib.AsyncExitStack() as stack,
        member_peer(tmp_path / "peer", ticket, key) as peer,
    ):
        connection = await peer.introduce(a)
        for _ in range(limits.gates_per_address_max // limits.gates_per_connection_max):
            stranger = await dial(await stack.enter_async_context(LinkHost(Key.generate())), a)
            for _ in range(limits.gates_per_connection_max):
                await refused(await stack.enter_async_context(gate(stranger)), "is no member")
        async with gate(connection) as member:
            assert (await member.peer())["peer"] is not None
    await asyncio.to_thread(a.ww, "evict", key.peer_id, "--yes", check=True)


# --- members that ask for too much ----------------------------------------------------------------


async def test_a_member_that_opens_ten_thousand(
    nodes: Any, schema: rpc.Schema, tmp_path: Path
) -> None:
    """References and connections are bounded, the log too, and the others notice nothing."""
    a, b, _ = nodes
    key = Key.generate()
    ticket = await asyncio.to_thread(a.invite)
    before = len(a.log.read_bytes())
    async with member_peer(tmp_path / "peer", ticket, key) as peer, twins(b, schema) as other:
        connection = await peer.introduce(a)
        async with gate(connection) as member:
            kept = (await member.peer())["peer"]
            kept.connection._end.limits = rpc.RpcLimits(imports_max=1 << 20)
            held, refusals = [], []
            for _ in range(20):
                asked = [kept.open(service="twins") for _ in range(500)]
                for got in await asyncio.gather(*asked, return_exceptions=True):
                    (refusals if isinstance(got, BaseException) else held).append(got)
                started = time.monotonic()
                assert (await other.ask(peer=str(a.peer_id)))["principal"]
                assert time.monotonic() - started < 5
            assert len(held) <= rpc.RpcLimits().exports_max
            assert len(held) + len(refusals) == 10_000
            assert {type(each) for each in refusals} == {LimitExceeded}
            # Connections: the first four are all that one link has.
            results = await asyncio.gather(
                *(one_more(connection) for _ in range(200)), return_exceptions=True
            )
            assert sum(result is None for result in results) <= 3
        del held
        for _ in range(50):
            async with asyncio.timeout(60):
                while True:  # the node has to hear first that those before are gone
                    with contextlib.suppress(StreamReset):
                        await one_more(connection)
                        break
                    await asyncio.sleep(0.05)
        assert len(a.log.read_bytes()) - before < 64 << 10
    await asyncio.to_thread(a.ww, "evict", key.peer_id, "--yes", check=True)


async def one_more(connection: Connection) -> None:
    async with gate(connection) as member:
        await asyncio.wait_for(member.peer(), 60)
        await asyncio.sleep(0.2)


async def test_a_member_opens_what_has_no_siblings(nodes: Any, tmp_path: Path) -> None:
    """Nothing of the core, of a user, or of another plugin is behind it."""
    a, *_ = nodes
    key = Key.generate()
    ticket = await asyncio.to_thread(a.invite)
    async with (
        member_peer(tmp_path / "peer", ticket, key) as peer,
        gate(await peer.introduce(a)) as member,
    ):
        kept = (await member.peer())["peer"]
        for name in (
            "node",
            "cluster",
            "grants",
            "session",
            "names",
            "users",
            "*",
            "",
            "x" * 500,
        ):
            with pytest.raises(Unsupported) as caught:
                await kept.open(service=name)
            assert caught.value.code == "unsupported.service"
    await asyncio.to_thread(a.ww, "evict", key.peer_id, "--yes", check=True)
