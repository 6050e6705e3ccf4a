"""What is under way while the path between two members changes or is idle."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.packaging import third_party

import wetware
from wetware import rpc
from wetware.errors import Disconnected, WetwareError
from wetware.testing import Home

from .cluster import RETRY_S, Cluster
from .lab import Lab

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

Record = Callable[[str, object], None]
BACK_S = 3.0
"""After the death of a relay the pair meets through another one."""
SUBSCRIBED_S = 10.0
TRANSFER_BYTES, PIECE_BYTES = 100_000_000, 64_000
FORGET_S = 30
"""Of a NAT that is quick to forget; those of homes take minutes to days."""
IDLE_S = 60.0
SINK = rpc.load(Path(__file__).with_name("sink.capnp")).Sink


def start(cluster: Cluster, *names: str, kind: str) -> None:
    """Nodes on machines of their own, each as soon as those before it know each other."""
    for name in names:
        cluster.lab.host(name, cluster.lab.network(kind) if kind != "open" else None)
        cluster.start(name, join=next(iter(cluster.nodes), ""))


async def via(session: wetware.Session, peer: object) -> str | None:
    """Who carries the connection of a session's node to a peer; "": it is direct; None: none."""
    for member in await session.cluster.list():
        if str(member.peer_id) == str(peer) and member.connected:
            return member.via
    return None


async def until(condition: Callable[[], Awaitable[object]], what: str, within_s: float) -> float:
    """After how many seconds it was met."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(WetwareError):
            if await condition():
                return time.monotonic() - began
        assert time.monotonic() - began < within_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(RETRY_S)


async def logged_in(
    stack: contextlib.AsyncExitStack, cluster: Cluster, name: str
) -> wetware.Session:
    """A node that has just joined refuses until it has compared its policy with another one's."""
    sessions: list[wetware.Session] = []

    async def enter() -> bool:
        sessions.append(await stack.enter_async_context(cluster.session(name)))
        return True

    await until(enter, f"a login at {name}", SUBSCRIBED_S)
    return sessions[0]


@contextlib.asynccontextmanager
async def running(*work: Any) -> AsyncIterator[list[asyncio.Task[Any]]]:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def publish(topic: Any, per_s: float) -> None:
    """Count for ever."""
    count = 0
    due = time.monotonic()
    while True:
        await topic.publish(str(count))
        count += 1
        due += 1 / per_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def heard(messages: Any, publisher: object, into: list[tuple[float, int]]) -> None:
    async for message in messages:
        if message.publisher == publisher:
            into.append((time.monotonic(), int(message.data)))


def lost_and_reordered(got: list[tuple[float, int]]) -> tuple[int, int]:
    numbers = [number for _, number in got]
    assert len(set(numbers)) == len(numbers), "one came twice"
    swapped = sum(later < earlier for earlier, later in pairwise(numbers))
    return max(numbers) - min(numbers) + 1 - len(numbers), swapped


@pytest.fixture
def sinking(lab: Lab, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose nodes have the service of sink.py."""
    here, site = Path(__file__).parent, tmp_path / "site"
    files = (("sink.capnp", (here / "sink.capnp").read_text()),)
    third_party.install(site, "sink", (here / "sink.py").read_text(), files=files)
    with Home(tmp_path, env={"PYTHONPATH": str(site)}) as home:
        yield Cluster(lab, home)


async def pipe(session: wetware.Session) -> rpc.ByteStream:
    """To the service of sink.py at a session's node."""
    return rpc.ByteStream((await session.service("sink", SINK).open())["stream"])


async def upload_all(stream: rpc.ByteStream, size: int) -> bool:
    """Whether the other end got all of it, as it says."""
    async with stream:
        await stream.send(bytes(size))
        await stream.send_eof()
        return int(await stream.receive()) == size


async def test_a_relay_is_killed_under_a_transfer_and_subscriptions(
    sinking: Cluster, record_property: Record
) -> None:
    """Both ends of the transfer are told, and never that it was all; subscriptions go on."""
    cluster = sinking
    start(cluster, "hub1", "hub2", kind="open")
    start(cluster, "home", "cafe", kind="symmetric")
    cafe = cluster.nodes["cafe"]
    with cluster.lab.inside("home"):
        async with contextlib.AsyncExitStack() as stack:
            here, there = [await logged_in(stack, cluster, name) for name in ("home", "cafe")]

            async def related() -> bool:
                return bool(await via(here, cafe.peer_id)) and bool(
                    await via(there, cluster.nodes["home"].peer_id)
                )

            await until(related, "home and cafe are connected", BACK_S)
            # Who runs on a node of a topic, and who looks at it through a tunnel of another.
            topic = await here.pubsub.join("chat")
            far = await stack.enter_async_context(
                wetware.connect(
                    "cafe",
                    data_dir=cluster.nodes["home"].data_dir,
                    key=cafe.home.key(),
                    reconnect=True,
                )
            )
            local: list[tuple[float, int]] = []
            tunnelled: list[tuple[float, int]] = []
            listening = []
            for session in (there, far):
                messages = (await session.pubsub.join("chat")).subscribe()
                listening.append(await stack.enter_async_context(messages))
            home = cluster.nodes["home"].peer_id
            work = (
                heard(listening[0], home, local),
                heard(listening[1], home, tunnelled),
                publish(topic, 50),
            )
            upload = await stack.enter_async_context(here.node("cafe", direct=False))
            bulk = await stack.enter_async_context(await pipe(upload))
            sent = 0

            async def send() -> None:
                nonlocal sent
                for _ in range(TRANSFER_BYTES // PIECE_BYTES):
                    await bulk.send(bytes(PIECE_BYTES))
                    sent += PIECE_BYTES
                await bulk.send_eof()

            async with running(*work):

                async def flowing() -> bool:
                    return bool(local and tunnelled)

                await until(flowing, "both subscriptions are under way", SUBSCRIBED_S)
                relay = await via(here, cafe.peer_id)
                [killed] = [n for n in cluster.nodes.values() if str(n.peer_id) == str(relay)]
                async with running(send()) as (transfer,):
                    async with asyncio.timeout(SUBSCRIBED_S):
                        while sent < TRANSFER_BYTES // 4:
                            await asyncio.sleep(0)
                    killed.stop(signal.SIGKILL)
                    died, sent_before = time.monotonic(), sent
                    with pytest.raises(Disconnected):
                        await asyncio.wait_for(transfer, BACK_S)
                    record_property("who sends is told after, s", time.monotonic() - died)
                assert sent_before <= sent < TRANSFER_BYTES
                with pytest.raises(Disconnected):  # and not EndOfStream
                    await bulk.receive()
                local_sink = there.service("sink", SINK)

                async def told() -> bool:
                    return bool((await local_sink.ends())["ends"])

                await until(told, "who receives is told", BACK_S)
                record_property("who receives is told after, s", time.monotonic() - died)
                [end] = (await local_sink.ends())["ends"]
                count, _, code = end.partition(" ")
                assert code == Disconnected.code
                assert 0 < int(count) <= sent

                async def elsewhere() -> bool:
                    return await via(here, cafe.peer_id) not in (None, "", relay)

                async def works() -> bool:
                    async with here.node("cafe", direct=False) as again:
                        return await upload_all(await pipe(again), TRANSFER_BYTES // 100)

                async def both() -> bool:
                    return min(local[-1][0], tunnelled[-1][0]) > died + BACK_S

                await until(elsewhere, "another relay", BACK_S)
                await until(works, "a transfer through it", BACK_S)
                record_property("another transfer is over after, s", time.monotonic() - died)
                assert time.monotonic() - died < BACK_S
                await until(both, "both subscriptions go on", 2 * BACK_S)
            for name, got in (("local", local), ("tunnelled", tunnelled)):
                pauses = [b[0] - a[0] for a, b in pairwise(got)]
                lost, swapped = lost_and_reordered(got)
                record_property(f"{name}: pause s, lost", (max(pauses), lost))
                assert max(pauses) < BACK_S
                assert not swapped
            # The session was elsewhere, so it was not subscribed for a while, and says so.
            record_property("gap_s", listening[1].gap_s)
            assert 0 < listening[1].gap_s < BACK_S
            assert listening[0].gap_s == 0


async def test_a_pair_moves_to_a_punched_connection_and_nothing_is_lost(
    cluster: Cluster, record_property: Record
) -> None:
    start(cluster, "hub", kind="open")
    # The smaller peer ID asks for the punching. It cannot, until all of this is under way.
    first, second = sorted(("home", "cafe"), key=cluster.node_id)
    start(cluster, first, kind="port-restricted")
    cluster.lab.admit_new(first, allowed=False)
    start(cluster, second, kind="port-restricted")
    peers = {name: cluster.nodes[name].peer_id for name in (first, second)}
    failed: list[str] = []
    calls = 0

    async def keep_calling(call: Callable[[], Awaitable[object]], pause_s: float) -> None:
        nonlocal calls
        while True:
            try:
                await call()
                calls += 1
            except WetwareError as exc:
                failed.append(str(exc))
            await asyncio.sleep(pause_s)

    with cluster.lab.inside(first):
        async with contextlib.AsyncExitStack() as stack:
            here, there = [await logged_in(stack, cluster, name) for name in (first, second)]

            async def related() -> bool:
                return await via(here, peers[second]) is not None

            await until(related, "connected", BACK_S)
            to_there: list[tuple[float, int]] = []
            to_here: list[tuple[float, int]] = []
            topics = [await session.pubsub.join("chat") for session in (here, there)]
            messages = [await stack.enter_async_context(topic.subscribe()) for topic in topics]
            tunnel = await stack.enter_async_context(here.node(second, direct=False))

            async def new_tunnel() -> None:
                async with here.node(second, direct=False) as session:
                    await session.whoami()

            work = (
                heard(messages[0], peers[second], to_here),
                heard(messages[1], peers[first], to_there),
                publish(topics[0], 200),
                publish(topics[1], 200),
                keep_calling(lambda: here.cluster.ping(str(peers[second])), 0.05),
                keep_calling(tunnel.whoami, 0.05),
                keep_calling(new_tunnel, 0.3),
            )
            async with running(*work) as tasks:

                async def flowing() -> bool:
                    return bool(to_here and to_there and calls > 10)

                await until(flowing, "all of it is under way", SUBSCRIBED_S)
                hub = str(cluster.nodes["hub"].peer_id)
                assert str(await via(here, peers[second])) == hub
                cluster.lab.admit_new(first, allowed=True)

                async def direct() -> bool:
                    return await via(here, peers[second]) == "" == await via(there, peers[first])

                took_s = await until(direct, "a direct connection", 25.0)
                record_property("direct after, s", took_s)
                counts = len(to_here), len(to_there)
                await asyncio.sleep(3.0)
                assert not any(task.done() for task in tasks), tasks
            assert len(to_here) > counts[0] + 100
            assert len(to_there) > counts[1] + 100
    record_property("messages, calls", (len(to_here), len(to_there), calls))
    assert not failed
    assert lost_and_reordered(to_here) == lost_and_reordered(to_there) == (0, 0)


async def test_messages_pass_between_members_whose_hubs_subscribe_to_nothing(
    cluster: Cluster, record_property: Record
) -> None:
    start(cluster, "hub1", "hub2", kind="open")
    start(cluster, "home", "cafe", kind="symmetric")
    with cluster.lab.inside("home"):
        async with contextlib.AsyncExitStack() as stack:
            here, there = [await logged_in(stack, cluster, name) for name in ("home", "cafe")]
            topics = [await session.pubsub.join("chat") for session in (here, there)]
            messages = [await stack.enter_async_context(topic.subscribe()) for topic in topics]

            async def meshed() -> bool:
                return all([(await topic.info()).mesh == 1 for topic in topics])

            took_s = await until(meshed, "a mesh over the relays", SUBSCRIBED_S)
            record_property("mesh after, s", took_s)
            for topic in topics:
                assert (await topic.info()).peers == 1  # and no hub
            got: list[list[tuple[float, int]]] = [[], []]
            peers = [cluster.nodes[name].peer_id for name in ("cafe", "home")]
            work = [heard(*each) for each in zip(messages, peers, got, strict=True)]
            async with running(*work, *(publish(topic, 100) for topic in topics)):

                async def many() -> bool:
                    return min(map(len, got)) >= 200

                await until(many, "200 messages each way", SUBSCRIBED_S)
            assert [lost_and_reordered(each) for each in got] == [(0, 0), (0, 0)]
            assert await via(here, cluster.nodes["cafe"].peer_id) in {
                str(cluster.nodes[hub].peer_id) for hub in ("hub1", "hub2")
            }


@pytest.mark.long
async def test_a_path_idle_for_longer_than_its_nat_remembers_answers_at_once(
    lab: Lab, cluster: Cluster, record_property: Record
) -> None:
    """The links of the members, and that of a client, which says nothing by itself."""
    start(cluster, "hub", kind="open")
    for name in ("home", "cafe"):
        lab.host(name, lab.network("symmetric", forget_s=FORGET_S))
        cluster.start(name, join="hub")
    hub, cafe = cluster.nodes["hub"], cluster.nodes["cafe"].peer_id
    client = wetware.connect(
        f"/ip4/{lab.hosts['hub'].address}/tcp/4001/p2p/{hub.peer_id}", key=hub.home.key()
    )
    with lab.inside("home"):
        async with (
            client as near,
            contextlib.AsyncExitStack() as stack,
        ):
            here = await logged_in(stack, cluster, "home")
            await until(lambda: via(here, cafe), "home and cafe are connected", BACK_S)
            far = await stack.enter_async_context(here.node("cafe", direct=False))
            await asyncio.sleep(IDLE_S)
            for what, call in (
                ("client to hub", near.whoami),
                ("home to cafe, a tunnel", far.whoami),
                (
                    "home to cafe, ping",
                    lambda: here.cluster.ping(str(cafe)),
                ),
            ):
                began = time.monotonic()
                await call()
                record_property(what, took_s := time.monotonic() - began)
                assert took_s < 1.0, what
