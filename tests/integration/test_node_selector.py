"""`session.node(SELECTOR)`: another node of the cluster, dialled or through a tunnel of ours."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest

import wetware
from wetware.errors import (
    CapabilityError,
    Denied,
    DialError,
    Disconnected,
    InvalidArgument,
    NotFound,
    OverlayError,
    WetwareError,
)
from wetware.identity import Key
from wetware.testing import Home, NodeProcess, wait_for

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

WITHIN_S = 60.0
"""For what takes a second or two on an idle machine."""

Pair = tuple[NodeProcess, NodeProcess]
DIRECT_OR_TUNNEL = pytest.mark.parametrize("direct", [True, False], ids=["direct", "tunnel"])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Nodes a, with zone=home, and b, with zone=cloud."""
    with (
        Home(tmp_path_factory.mktemp("home")) as home,
        home.node("a", args=["--label", "zone=home"]) as a,
        home.node("b", join=a, args=["--label", "zone=cloud"]) as b,
    ):
        for node in (a, b):
            node.wait_members([a.peer_id, b.peer_id], within_s=WITHIN_S)
        yield a, b


def add_user(node: NodeProcess, others: tuple[NodeProcess, ...], name: str, role: str) -> Key:
    """A user, known at all of the nodes."""
    home = node.home
    home.ww("key", "new", name, check=True)
    key = home.key(name)
    node.ww("user", "add", name, "--key", str(key.peer_id), "--role", role, check=True)
    for each in (node, *others):
        wait_for(
            lambda each=each: each.ww("--key", name, "whoami").returncode == 0,
            f"{name} is known at {each.data_dir.name}",
            within_s=WITHIN_S,
        )
    return key


@contextlib.asynccontextmanager
async def at(node: NodeProcess, key: Key | None = None) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(data_dir=node.data_dir, key=key or node.home.key()) as session:
        yield session


@DIRECT_OR_TUNNEL
async def test_a_login_at_the_far_node_by_the_user_s_own_key(labelled: Pair, direct: bool) -> None:
    a, b = labelled
    async with (
        at(a) as session,
        at(b) as there,
        session.node("zone=cloud", direct=direct) as far,
    ):
        identity = await far.whoami()
        assert identity.node == b.peer_id
        assert identity.principal == f"local:{a.home.key().peer_id}" == session.identity.principal
        assert identity.grant != session.identity.grant
        assert {"pubsub", "cluster"} <= {service.name for service in await far.services()}
        # Published at b, where it is received at once.
        topic, name = await there.pubsub.join("far"), f"hello {direct}".encode()
        async with topic.subscribe() as messages:
            await (await far.pubsub.join("far")).publish(name)
            message = await asyncio.wait_for(anext(aiter(messages)), WITHIN_S)
        assert (message.publisher, message.data) == (b.peer_id, name)
    if not direct:
        assert f"peer={b.peer_id}" in a.log.read_text().partition("tunnel.opened")[2]


@DIRECT_OR_TUNNEL
async def test_large_and_many_messages_from_the_far_node(labelled: Pair, direct: bool) -> None:
    a, _ = labelled
    async with at(a) as session, session.node("zone=cloud", direct=direct) as far:
        topic = await far.pubsub.join("bulk")
        payloads = [bytes([n]) * 200_000 for n in range(20)]
        async with topic.subscribe(buffer=64) as messages:
            reading = aiter(messages)
            for payload in payloads:
                await topic.publish(payload)
                message = await asyncio.wait_for(anext(reading), WITHIN_S)
                assert message.data == payload


async def test_the_node_itself_and_which_of_several(labelled: Pair) -> None:
    a, b = labelled
    async with at(a) as session:
        async with session.node("zone=home") as same:
            assert same is session
        async with session.node("service=pubsub,name!=a") as far:
            assert far.identity.node == b.peer_id
        async with session.node("zone=cloud") as far, far.node("zone=home") as back:
            assert back.identity.node == a.peer_id


async def test_nobody_matches(labelled: Pair) -> None:
    a, _ = labelled
    async with at(a) as session:
        with pytest.raises(NotFound, match="zone=moon") as caught:
            async with session.node("zone=moon"):
                pass
        assert caught.value.code == "not_found.member"
        with pytest.raises(InvalidArgument, match="=home"):
            async with session.node("=home"):
                pass
        with pytest.raises(NotFound):
            await session.cluster.tunnel(str(Key.generate().peer_id))


async def test_a_name_that_two_nodes_have(labelled: Pair) -> None:
    """Each way to name a node lists both with their IDs, and takes neither."""
    a, b = labelled
    start = partial(a.home.start_node, args=["--name", "twin"])
    ticket = await asyncio.to_thread(a.invite, "--uses", "2")
    twins = [start(f"twin{n}", join=ticket) for n in range(2)]
    try:
        for twin in twins:
            await asyncio.to_thread(twin.wait_ready)
        ids = [twin.peer_id for twin in twins]
        await asyncio.to_thread(a.wait_members, ids)
        async with at(a) as session:
            for name in ("twin", "name=twin", b.peer_id[:8]):
                with pytest.raises(InvalidArgument, match="ambiguous") as caught:
                    async with session.node(name):
                        pass
                assert caught.value.code == "invalid.ambiguous"
                assert all(peer in caught.value.message for peer in ids)
            async with session.node(ids[1]) as far:
                assert far.identity.node == ids[1]
            async with session.node("name=tw*") as far:  # any of them
                assert far.identity.node in ids
            for nothing in ("", " "):
                with pytest.raises(InvalidArgument, match="names no node"):
                    async with session.node(nothing):
                        pass
        for command in (("ping", "-c", "1"), ("evict", "--yes")):
            done = await asyncio.to_thread(a.ww, *command, "twin")
            assert done.returncode == 2
            assert all(f"twin {peer}" in done.stderr for peer in ids), done.stderr
        for command in (("ping", "-c", "1"), ("evict", "--yes"), ("ls",)):
            done = await asyncio.to_thread(a.ww, *command, "")
            assert (done.returncode, "empty" in done.stderr) == (2, True), done.stderr
        # One that is gone is not in the way of the one that is there; it is of no eviction.
        assert await asyncio.to_thread(twins[0].stop) == 0
        await asyncio.to_thread(a.wait_members, ids[:1], "left")
        assert (await asyncio.to_thread(a.ww, "ping", "-c", "1", "twin")).returncode == 0
        assert (await asyncio.to_thread(a.ww, "evict", "--yes", "twin")).returncode == 2
    finally:
        for twin in twins:
            twin.stop()
        for twin in twins:
            await asyncio.to_thread(a.ww, "evict", twin.peer_id, "--yes")


async def test_a_grant_without_the_tunnel(labelled: Pair) -> None:
    a, b = labelled
    await asyncio.to_thread(
        a.ww, "role", "set", "reader", "cluster=Cluster.list", "pubsub", check=True
    )
    key = await asyncio.to_thread(add_user, a, (b,), "reader", "reader")
    async with at(a, key) as session:
        with pytest.raises(Denied, match="tunnel"):
            async with session.node("zone=cloud", direct=False):
                pass
        # What needs no tunnel works: there, it is the user's own login that counts.
        async with session.node("zone=cloud", direct=True) as far:
            assert far.identity.roles == ("reader",)
        with pytest.raises(Denied):
            await session.cluster.ping(str(b.peer_id))
        assert (await session.whoami()).roles == ("reader",)


@DIRECT_OR_TUNNEL
async def test_the_far_node_dies_while_it_is_in_use(labelled: Pair, direct: bool) -> None:
    a, _ = labelled
    name = f"mortal-{'direct' if direct else 'tunnel'}"
    victim = await asyncio.to_thread(a.home.start_node, name, join=a)
    try:
        await asyncio.to_thread(victim.wait_ready)
        await asyncio.to_thread(a.wait_members, [victim.peer_id])
        async with at(a) as session, session.node(f"name={name}", direct=direct) as far:
            topic = await far.pubsub.join("quiet")
            async with topic.subscribe() as messages:
                waiting = asyncio.create_task(anext(aiter(messages)))
                assert (await far.whoami()).node == victim.peer_id
                victim.process.send_signal(signal.SIGKILL)
                victim.process.wait()
                with pytest.raises((WetwareError, StopAsyncIteration)):
                    await asyncio.wait_for(waiting, WITHIN_S)
            with pytest.raises(OverlayError):
                await asyncio.wait_for(far.whoami(), WITHIN_S)
            assert (await session.whoami()).node == a.peer_id, "the session here goes on"
            with pytest.raises((DialError, Disconnected, NotFound)):
                async with session.node(f"name={name}", direct=direct, timeout_s=5):
                    pass
    finally:
        victim.stop()


async def test_a_tunnel_ends_with_the_session_s_user(labelled: Pair) -> None:
    a, b = labelled
    key = await asyncio.to_thread(add_user, a, (b,), "ada", "member")
    async with at(a, key) as session:
        async with session.node("zone=cloud", direct=False) as far:
            pipe = await session.cluster.tunnel(b.peer_id)
            reading = asyncio.create_task(_read_to_the_end(pipe))
            assert (await far.whoami()).principal == f"local:{key.peer_id}"
            await asyncio.to_thread(a.ww, "user", "remove", "ada", check=True)
            with pytest.raises(WetwareError):
                await asyncio.wait_for(reading, WITHIN_S)
            with pytest.raises((CapabilityError, OverlayError)):
                await asyncio.wait_for(_ask_for_ever(far), WITHIN_S)
        with pytest.raises(CapabilityError):
            await session.whoami()


async def _ask_for_ever(session: wetware.Session) -> None:
    while True:
        await session.whoami()
        await asyncio.sleep(0.05)


async def _read_to_the_end(pipe: object) -> None:
    while await pipe.read():  # type: ignore[attr-defined]
        pass
