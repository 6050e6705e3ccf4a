"""Who is carried to whom, what the relay sees, and what a relay that lies achieves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TypeAlias

import pytest

from wetware.base.access import Access
from wetware.base.bounds import TokenBucket
from wetware.base.multiaddr import Multiaddr
from wetware.errors import DialError, OverlayError, PeerMismatch
from wetware.identity import Key, PeerId
from wetware.overlay import punching
from wetware.overlay import relay as relaying
from wetware.overlay.frames import read_frame, write_frame
from wetware.overlay.link import Connection, LinkHost, LinkLimits, Stream
from wetware.overlay.link.connection import NoiseConnection
from wetware.overlay.link.limits import YAMUX_WINDOW_BYTES
from wetware.overlay.link.relaying import RELAY_PROTOCOL, Verdict, ask_to_carry
from wetware.overlay.punching import PUNCH_PROTOCOL, Punching
from wetware.overlay.relay import Relay
from wetware.overlay.tunnel import TUNNEL_PROTOCOL
from wetware.testing import tasks_of_core

pytestmark = pytest.mark.anyio

MIB = 1 << 20
Trio: TypeAlias = tuple[LinkHost, LinkHost, LinkHost]
ECHO = "/echo"
QUICK = LinkLimits(close_s=0.2, linger_s=0.5)
KEEPALIVE = replace(QUICK, keepalive_s=0.5, keepalive_timeout_s=0.5)


class Net:
    """Hosts of which `members` are in one cluster."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self.stack = stack
        self.members: set[PeerId] = set()

    async def host(
        self, *, member: bool = True, relay: bool = True, limits: LinkLimits | None = None
    ) -> LinkHost:
        key = Key.generate()

        def admit(peer: PeerId, protocol: str, access: Access) -> bool:
            return access is Access.PUBLIC or peer in self.members

        host = await self.stack.enter_async_context(
            LinkHost(
                key,
                limits=limits or QUICK,
                admit=admit,
                privileged=self.members.__contains__,
            )
        )
        await host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        if member:
            self.members.add(key.peer_id)
        Relay(host, is_member=self.members.__contains__, enabled=relay).start()
        host.handle(ECHO, echo, access=Access.PUBLIC)
        return host

    def mute(self, to: LinkHost) -> Multiaddr:
        """An address where connections are taken and nobody says a word."""
        sock = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return Multiaddr("ip4", "127.0.0.1", sock.getsockname()[1], to.peer_id)


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)


async def hear_all(stream: Stream) -> None:
    while await stream.read():
        pass


def through(hub: LinkHost, to: LinkHost) -> tuple[Multiaddr, ...]:
    return tuple(addr.through(to.peer_id) for addr in hub.listen_addrs)


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    before = tasks_of_core()
    async with contextlib.AsyncExitStack() as stack:
        yield Net(stack)
    await asyncio.sleep(0)
    assert tasks_of_core() <= before


@pytest.fixture
async def trio(net: Net) -> Trio:
    """Two members, and a hub to which `cafe` has dialled, as from behind a NAT."""
    home, hub, cafe = await net.host(), await net.host(), await net.host()
    await cafe.dial(hub.listen_addrs)
    return home, hub, cafe


async def test_a_member_is_reached_through_another(
    trio: Trio,
) -> None:
    home, hub, cafe = trio
    connection = await home.dial(through(hub, cafe))
    assert connection.peer == cafe.peer_id
    assert connection.tunnelled
    assert str(connection.remote) == f"{hub.listen_addrs[0]}/p2p-circuit/p2p/{cafe.peer_id}"
    data = os.urandom(3 * MIB)
    async with await connection.open_stream(ECHO) as stream:
        writing = asyncio.ensure_future(stream.write(data))
        assert await stream.read_exactly(len(data)) == data
        await writing
    [inbound] = [c for c in cafe.connections() if c.peer == home.peer_id]
    assert inbound.remote.relay == hub.peer_id
    assert inbound.address == hub.peer_id
    assert inbound.channel_binding == connection.channel_binding


async def test_two_peers_that_are_each_the_relay_to_the_other_are_refused_at_once(net: Net) -> None:
    home = await net.host()
    one, other = (Multiaddr("ip4", "127.0.0.1", 9, Key.generate().peer_id) for _ in range(2))
    assert one.peer is not None
    assert other.peer is not None
    async with asyncio.timeout(60):
        dials = await asyncio.gather(
            home.dial([other.through(one.peer)]),
            home.dial([one.through(other.peer)]),
            return_exceptions=True,
        )
    assert [type(dial) for dial in dials] == [DialError, DialError]


async def test_it_is_dialled_beside_addresses_that_do_not_answer(
    trio: Trio,
) -> None:
    home, hub, cafe = trio
    nowhere = Multiaddr("ip4", "127.0.0.1", 9, cafe.peer_id)
    connection = await home.dial([nowhere, *through(hub, cafe)])
    assert connection.tunnelled


async def test_a_direct_dial_does_not_make_do_with_a_relay(
    trio: Trio,
) -> None:
    home, hub, cafe = trio
    relayed = await home.dial(through(hub, cafe))
    assert await home.dial(cafe.listen_addrs) is relayed
    assert not relayed.superseded
    direct = await home.dial(cafe.listen_addrs, direct=True)
    assert not direct.tunnelled
    assert relayed.superseded
    assert not direct.superseded
    assert home.connection(cafe.peer_id) is direct
    direct.close()
    await direct.wait_closed()
    assert not relayed.superseded


async def test_a_superseded_connection_ends_when_its_last_stream_has(net: Net) -> None:
    limits = LinkLimits(duplicate_idle_s=0.1, close_s=0.2, linger_s=0.5)
    home, hub, cafe = await net.host(limits=limits), await net.host(), await net.host()
    await cafe.dial(hub.listen_addrs)
    relayed = await home.dial(through(hub, cafe))
    stream = await relayed.open_stream(ECHO)
    await home.dial(cafe.listen_addrs, direct=True)
    await asyncio.sleep(0.4)
    assert not relayed.closed
    await stream.write(b"still here")
    assert await stream.read_exactly(10) == b"still here"
    stream.finish()
    async with asyncio.timeout(60):
        await relayed.wait_closed()


async def test_the_end_of_the_relay_ends_what_it_carries(
    trio: Trio,
) -> None:
    home, hub, cafe = trio
    connection = await home.dial(through(hub, cafe))
    stream = await connection.open_stream(ECHO)
    await hub.aclose()
    async with asyncio.timeout(60):
        with pytest.raises(OverlayError):
            await stream.read_exactly(1)
        await connection.wait_closed()


# --- who is carried -------------------------------------------------------------------------------


async def refusal(relay: LinkHost, source: LinkHost, target: PeerId | None) -> str:
    connection = await source.dial(relay.listen_addrs)
    with pytest.raises(DialError) as caught:
        (await ask_to_carry(connection, target)).reset()
    return caught.value.message


async def test_only_to_members_that_are_connected(net: Net, trio: Trio) -> None:
    home, hub, cafe = trio
    stranger = await net.host(member=False)
    await stranger.dial(hub.listen_addrs)
    for target in (stranger.peer_id, Key.generate().peer_id, home.peer_id):
        assert "no connection to that peer" in await refusal(hub, home, target)
    off = await net.host(relay=False)
    await cafe.dial(off.listen_addrs)
    assert "does not relay" in await refusal(off, home, cafe.peer_id)


async def test_carriers_are_not_chained(net: Net, trio: Trio) -> None:
    home, hub, cafe = trio
    other = await net.host()
    await other.dial(cafe.listen_addrs)
    relayed = await home.dial(through(hub, cafe))  # cafe would carry to `other`
    with pytest.raises(DialError, match="itself is reached through another"):
        await ask_to_carry(relayed, other.peer_id)
    # A dialler that does not keep to it is refused.
    async with await relayed.open_stream(RELAY_PROTOCOL) as stream:
        raw = other.peer_id.multihash
        await stream.write(bytes([len(raw)]) + raw)
        assert await stream.read_exactly(1) == bytes([Verdict.NOT_CONNECTED])
    # And a member that is reached through a relay is not carried to.
    await home.dial(other.listen_addrs)
    assert "no connection to that peer" in await refusal(home, other, cafe.peer_id)


async def test_a_stranger_is_carried_to_who_asked_for_it_and_to_nobody_else(
    net: Net, trio: Trio
) -> None:
    _, hub, cafe = trio
    stranger = await net.host(member=False)
    unknown = await refusal(hub, stranger, Key.generate().peer_id)
    assert await refusal(hub, stranger, cafe.peer_id) == unknown  # who is there is not told
    reservation = await ask_to_carry(await cafe.dial(hub.listen_addrs), None)
    connection = await stranger.dial(through(hub, cafe))
    assert connection.tunnelled
    with pytest.raises(OverlayError):  # what is public is all that it gets
        await connection.open_stream(TUNNEL_PROTOCOL)
    connection.close()
    reservation.finish()
    await asyncio.sleep(0.1)
    assert await refusal(hub, stranger, cafe.peer_id) == unknown


async def test_a_stranger_cannot_ask_to_be_carried_to(net: Net) -> None:
    hub, stranger = await net.host(), await net.host(member=False)
    assert "no connection to that peer" in await refusal(hub, stranger, None)


async def test_what_one_member_may_have_carried_is_bounded(net: Net, trio: Trio) -> None:
    home, hub, cafe = trio
    connection = await home.dial(hub.listen_addrs)
    pipes = [
        await ask_to_carry(connection, cafe.peer_id) for _ in range(relaying.PAIRS_PER_TARGET_MAX)
    ]
    assert "as much as it may" in await refusal(hub, home, cafe.peer_id)
    other = await net.host()
    await other.dial(hub.listen_addrs)
    (await other.dial(through(hub, cafe))).close()  # others are not in its way
    pipes.pop().reset()
    await asyncio.sleep(0.1)
    pipes.append(await ask_to_carry(connection, cafe.peer_id))  # a place that came free
    for pipe in pipes:
        pipe.reset()


async def test_strangers_have_few_places(net: Net, trio: Trio) -> None:
    home, hub, cafe = trio
    await ask_to_carry(await cafe.dial(hub.listen_addrs), None)
    for _ in range(relaying.STRANGERS_PER_ADDRESS_MAX):
        stranger = await net.host(member=False)
        await stranger.dial(through(hub, cafe))
    late = await net.host(member=False)
    assert "as much as it may" in await refusal(hub, late, cafe.peer_id)
    assert (await home.dial(through(hub, cafe))).tunnelled  # a member is not in that queue


@pytest.mark.parametrize("limit", ["STRANGERS_MAX", "STRANGERS_PER_TARGET_MAX"])
async def test_a_network_with_many_strangers_makes_room_for_another(
    net: Net, trio: Trio, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(relaying, limit, 4)
    addresses: dict[PeerId, str] = {}
    monkeypatch.setattr(
        Connection,
        "address",
        property(lambda self: addresses.get(getattr(self, "peer", None), self.remote.host)),
    )
    _, hub, cafe = trio
    await ask_to_carry(await cafe.dial(hub.listen_addrs), None)

    async def carried(address: str) -> Connection:
        stranger = await net.host(member=False)
        addresses[stranger.peer_id] = address
        return await stranger.dial(through(hub, cafe))

    many = [await carried(f"10.0.0.{n}") for n in range(4)]
    with pytest.raises(DialError, match="as much as it may"):
        await carried("10.0.0.9")  # of the same network
    few = [await carried("10.0.1.1")]
    async with asyncio.timeout(60):
        await many[0].wait_closed()
    few.append(await carried("2600::1"))
    async with asyncio.timeout(60):
        await many[1].wait_closed()
    assert not any(each.closed for each in (*many[2:], *few))
    with pytest.raises(DialError, match="as much as it may"):
        await carried("10.0.1.2")  # now that one has its share
    few.append(await carried("10.0.2.1"))
    assert [each.closed for each in few] == [False] * 3


async def test_who_has_become_a_member_keeps_no_place_of_strangers_and_makes_no_room(
    net: Net, trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that joins through a relay, or asks before it is introduced, is carried for days."""
    monkeypatch.setattr(relaying, "STRANGERS_MAX", 2)
    _, hub, cafe = trio
    await ask_to_carry(await cafe.dial(hub.listen_addrs), None)
    carried = []
    for _ in range(2):
        joined = await net.host(member=False)
        carried.append(await joined.dial(through(hub, cafe)))
        net.members.add(joined.peer_id)
    stranger = await net.host(member=False)
    carried.append(await stranger.dial(through(hub, cafe)))
    assert not any(each.closed for each in carried)


async def test_the_pace_is_that_of_all_together(monkeypatch: pytest.MonkeyPatch, net: Net) -> None:
    monkeypatch.setattr(relaying, "BYTES_PER_S", 2 * MIB)
    fixed = LinkLimits(stream_window_bytes=YAMUX_WINDOW_BYTES)
    home, hub, cafe = await net.host(), await net.host(limits=fixed), await net.host()
    await cafe.dial(hub.listen_addrs)
    connection = await home.dial(through(hub, cafe))
    started = asyncio.get_running_loop().time()
    async with await connection.open_stream(ECHO) as stream:
        writing = asyncio.ensure_future(stream.write(bytes(3 * MIB)))
        await stream.read_exactly(3 * MIB)
        await writing
    # Both ways count: 6 MiB, of which 2 were saved up; nobody waits for the last window of each.
    assert asyncio.get_running_loop().time() - started > (6 - 2 - 2 * 0.25) / 2 - 0.05


def test_a_pace_lets_the_first_burst_through() -> None:
    bucket = TokenBucket(10, 10, lambda: 0.0)
    bucket.spend(25)
    assert bucket.wait_s() == pytest.approx(1.6)


# --- relays and diallers that lie -----------------------------------------------------------------


async def test_a_relay_that_answers_itself_is_not_who_was_dialled(net: Net) -> None:
    home, hub = await net.host(), await net.host()
    liar = await net.stack.enter_async_context(LinkHost(Key.generate()))
    await liar.listen([Multiaddr("ip4", "127.0.0.1", 0)])

    async def impersonate(stream: Stream) -> None:
        await stream.read_exactly(1 + len(hub.peer_id.multihash))
        await stream.write(bytes([Verdict.CARRIED]))
        await liar.accept_pipe(stream, stream.connection.remote).wait_closed()

    liar.handle(RELAY_PROTOCOL, impersonate, access=Access.PUBLIC)
    with pytest.raises(PeerMismatch):
        await home.dial(through(liar, hub))


@pytest.mark.parametrize("tamper", ["reorder", "replay", "truncate", "reflect", "flip"])
async def test_a_relay_that_meddles_ends_the_connection_and_no_byte_is_believed(
    net: Net, tamper: str
) -> None:
    home, cafe = await net.host(), await net.host()
    liar = await net.stack.enter_async_context(LinkHost(Key.generate()))
    await liar.listen([Multiaddr("ip4", "127.0.0.1", 0)])
    net.members.add(liar.peer_id)
    await liar.dial(cafe.listen_addrs)
    begun = asyncio.Event()

    async def meddle(stream: Stream) -> None:
        await stream.read_exactly(1 + len(cafe.peer_id.multihash))
        onward = await liar.open_stream(cafe.peer_id, TUNNEL_PROTOCOL)
        await stream.write(bytes([Verdict.CARRIED]))

        async def back() -> None:
            while data := await onward.read():
                await stream.write(data)

        async def forth() -> None:
            held = b""
            while data := await stream.read():
                if not begun.is_set():
                    await onward.write(data)
                elif tamper == "reorder" and not held:
                    held = data
                elif tamper == "reorder":
                    await onward.write(data + held)
                elif tamper == "replay":
                    await onward.write(data + data)
                elif tamper == "truncate":
                    await onward.write(data[:-1])
                elif tamper == "reflect":
                    await stream.write(data)
                else:
                    await onward.write(data[:-1] + bytes([data[-1] ^ 1]))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(back())
            tasks.create_task(forth())

    liar.handle(RELAY_PROTOCOL, meddle, access=Access.PUBLIC)
    connection = await home.dial(through(liar, cafe))
    heard = bytearray()

    async def hear(stream: Stream) -> None:
        while data := await stream.read():
            heard.extend(data)

    cafe.handle("/hear", hear, access=Access.PUBLIC)
    stream = await connection.open_stream("/hear")
    await stream.write(b"one")
    async with asyncio.timeout(60):
        while bytes(heard) != b"one":
            await asyncio.sleep(0.005)
    begun.set()
    for part in (b"two", b"three", b"four"):
        with contextlib.suppress(OverlayError):
            await stream.write(part)
        await asyncio.sleep(0.05)
    if tamper != "truncate":  # there the rest is waited for, and nothing is believed
        async with asyncio.timeout(60):
            await connection.wait_closed()
    assert b"onetwothreefour".startswith(bytes(heard))


async def holding(net: Net, cafe: LinkHost, delay_s: Callable[[], float]) -> LinkHost:
    """A relay to `cafe` that passes each piece on after so long, in order."""
    liar = await net.stack.enter_async_context(LinkHost(Key.generate(), limits=QUICK))
    await liar.listen([Multiaddr("ip4", "127.0.0.1", 0)])
    net.members.add(liar.peer_id)
    await liar.dial(cafe.listen_addrs)
    loop = asyncio.get_running_loop()

    async def carry(source: Stream, target: Stream) -> None:
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take() -> None:
            while data := await source.read():
                held.put_nowait((loop.time() + delay_s(), data))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(take())
            while True:
                due, data = await held.get()
                await asyncio.sleep(due - loop.time())
                await target.write(data)

    async def serve(stream: Stream) -> None:
        await stream.read_exactly(1 + len(cafe.peer_id.multihash))
        onward = await liar.open_stream(cafe.peer_id, TUNNEL_PROTOCOL)
        await stream.write(bytes([Verdict.CARRIED]))
        with contextlib.suppress(ExceptionGroup):  # its ends are gone
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(carry(stream, onward))
                tasks.create_task(carry(onward, stream))

    liar.handle(RELAY_PROTOCOL, serve, access=Access.PUBLIC)
    return liar


async def test_a_relay_that_holds_every_byte_is_passed_by(trio: Trio, net: Net) -> None:
    """By who has another one; its own answer comes at once."""
    home, hub, cafe = trio
    liar = await holding(net, cafe, lambda: 60.0)
    loop = asyncio.get_running_loop()
    began = loop.time()
    connection = await home.dial([*through(liar, cafe), *through(hub, cafe)])
    assert loop.time() - began < 1.0
    assert connection.remote.relay == hub.peer_id


@pytest.mark.parametrize("growing", [True, False])
async def test_a_relay_that_holds_every_byte_longer_than_a_keepalive_loses_the_connection(
    net: Net, growing: bool
) -> None:
    """Also where bytes never cease to arrive: what they answer is too old."""
    home, cafe = await net.host(limits=KEEPALIVE), await net.host(limits=KEEPALIVE)
    loop = asyncio.get_running_loop()
    began = math.inf

    def delay_s() -> float:
        return max(0.0, (loop.time() - began) / 2 if growing else 60.0 * (loop.time() > began))

    liar = await holding(net, cafe, delay_s)
    connection = await home.dial(through(liar, cafe))
    [inbound] = [c for c in cafe.connections() if c.peer == home.peer_id]
    cafe.handle("/hear", hear_all, access=Access.PUBLIC)
    stream = await connection.open_stream("/hear")
    back = await inbound.open_stream(ECHO)
    began = loop.time()

    async def talk() -> None:
        with contextlib.suppress(OverlayError):
            while True:
                await stream.write(b"x")
                await back.write(b"y")
                await asyncio.sleep(0.02)

    talking = asyncio.create_task(talk())
    try:
        async with asyncio.timeout(6 * (KEEPALIVE.keepalive_s + KEEPALIVE.keepalive_timeout_s)):
            await asyncio.gather(connection.wait_closed(), inbound.wait_closed())
    finally:
        talking.cancel()
        await asyncio.wait([talking])
    why = {getattr(each.error, "code", "") for each in (connection, inbound)}
    assert "overlay.keepalive" in why  # the first one ends the pipe for the other
    assert why <= {
        "overlay.keepalive",
        "overlay.carrier",
        "overlay.closed",  # where all of the pipe was carried, and then its end
    }


@pytest.mark.parametrize(
    "question", [b"", b"\xff", b"\x05short"[:4], b"\x03abc", bytes([64]) + bytes(64)]
)
async def test_a_question_that_makes_no_sense_costs_the_stream(trio: Trio, question: bytes) -> None:
    home, hub, _ = trio
    connection = await home.dial(hub.listen_addrs)
    async with await connection.open_stream(RELAY_PROTOCOL) as stream:
        await stream.write(question)
        stream.close()
        async with asyncio.timeout(60):
            with contextlib.suppress(OverlayError):
                assert await stream.read() == b""
    assert not connection.closed


async def test_ten_thousand_requests_leave_the_relay_as_it_was(
    trio: Trio,
) -> None:
    home, hub, cafe = trio
    connection = await home.dial(hub.listen_addrs)
    nobody = Key.generate().peer_id

    async def ask() -> None:
        with contextlib.suppress(OverlayError):
            (await ask_to_carry(connection, nobody)).reset()

    for _ in range(20):
        await asyncio.gather(*(ask() for _ in range(500)))
        if connection.closed:  # it was too fast for the link
            connection = await home.dial(hub.listen_addrs)
    assert (await home.dial(through(hub, cafe))).tunnelled
    assert len(hub.connections()) <= 3


async def test_a_direct_dial_and_one_through_a_relay_do_not_wait_for_each_other(
    net: Net, trio: Trio
) -> None:
    home, hub, cafe = trio
    nowhere = net.mute(cafe)
    direct = asyncio.ensure_future(home.dial([nowhere], peer=cafe.peer_id, direct=True))
    await asyncio.sleep(0.05)
    connection = await home.dial(through(hub, cafe), timeout_s=2.0)
    assert connection.tunnelled
    assert not direct.done()
    direct.cancel()
    await asyncio.wait([direct])


async def test_a_direct_dial_is_not_over_when_the_peer_comes_through_a_relay(net: Net) -> None:
    home, hub, cafe = await net.host(), await net.host(), await net.host()
    if home.peer_id > cafe.peer_id:
        home, cafe = cafe, home
    for each in (home, cafe):
        await each.dial(hub.listen_addrs)
    nowhere = net.mute(home)
    direct = asyncio.ensure_future(cafe.dial([nowhere], direct=True))
    await asyncio.sleep(0.05)
    await home.dial(through(hub, cafe))
    await asyncio.sleep(0.05)
    assert cafe.connection(home.peer_id) is not None
    assert not direct.done()
    direct.cancel()
    await asyncio.wait([direct])


async def test_nobody_is_a_relay_to_itself(trio: Trio) -> None:
    home, _, cafe = trio
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(DialError, match="itself"):
        await home.dial(through(cafe, cafe), timeout_s=60)
    with pytest.raises(DialError, match="itself"):
        await home.dial(through(home, cafe), timeout_s=60)
    assert loop.time() - began < 30


async def test_who_is_carried_is_not_suspected_when_a_direct_connection_comes(
    trio: Trio,
) -> None:
    """What it carries may wait behind megabytes at the relay for longer than a probe does."""
    home, hub, cafe = trio
    relayed = await home.dial(through(hub, cafe))
    assert isinstance(relayed, NoiseConnection)
    await asyncio.sleep(0.01)
    await home.dial(cafe.listen_addrs, direct=True)
    assert relayed.superseded
    assert relayed._probed_at is None


async def test_who_is_refused_over_and_over_does_not_fill_the_log(
    net: Net, trio: Trio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relaying, "STRANGERS_MAX", 0)
    _, hub, cafe = trio
    await ask_to_carry(cafe.connection(hub.peer_id), None)
    stranger = await net.host(member=False)
    await stranger.dial(hub.listen_addrs)
    with caplog.at_level(logging.INFO):
        for _ in range(50):
            with pytest.raises(DialError, match="as much as it may"):
                await ask_to_carry(stranger.connection(hub.peer_id), cafe.peer_id)
    lines = [record for record in caplog.records if record.getMessage() == "relay.full"]
    assert 1 <= len(lines) <= relaying.FULL_LINES_PER_MINUTE + 1
    assert hub.refused["relay.full"] == 50


@pytest.mark.parametrize("asked", ["to be carried to", "to carry"])
async def test_a_relay_that_floods_its_answers_fills_a_window_and_no_more(
    net: Net, trio: Trio, asked: str
) -> None:
    """While it pours, who asked is answered by others at once."""
    home, hub, cafe = trio
    liar = await net.stack.enter_async_context(LinkHost(Key.generate(), limits=QUICK))
    await liar.listen([Multiaddr("ip4", "127.0.0.1", 0)])
    poured = 0

    async def pour(stream: Stream) -> None:
        nonlocal poured
        await stream.read_exactly(1)
        await stream.write(bytes([Verdict.CARRIED]))
        while True:
            await stream.write(bytes(64 << 10))
            poured += 64 << 10

    liar.handle(RELAY_PROTOCOL, pour, access=Access.PUBLIC)
    connection = await home.dial(liar.listen_addrs)
    other = await home.dial(hub.listen_addrs)
    if asked == "to carry":
        with pytest.raises(DialError):
            await home.dial(through(liar, cafe))
    else:
        held = await ask_to_carry(connection, None)
    loop = asyncio.get_running_loop()
    async with await other.open_stream(ECHO) as stream:
        for _ in range(50):
            began = loop.time()
            await stream.write(b"?")
            await stream.read_exactly(1)
            assert loop.time() - began < 3  # some ms where nothing else runs
    assert poured
    assert home.totals.buffered_bytes <= YAMUX_WINDOW_BYTES
    if asked == "to be carried to":
        assert home.totals.buffered_bytes
        held.reset()
    assert not connection.closed


async def test_what_came_for_a_handshake_is_not_held_when_it_has_failed(trio: Trio) -> None:
    """Nor by the connection, which is in a cycle, until the next collection of garbage."""
    _, hub, cafe = trio
    onward = hub.connection(cafe.peer_id)
    assert onward is not None
    data = os.urandom(200 << 10)

    async def flood() -> None:
        stream = await onward.open_stream(TUNNEL_PROTOCOL)
        with contextlib.suppress(OverlayError):
            await stream.write(data)
            await stream.read()
        stream.reset()

    await flood()  # what is made once
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(64):
            await flood()
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert cafe.refused["handshake.failed"] >= 64
    assert held_bytes < 3 * MIB


async def test_connections_that_a_relay_carries_over_and_over_do_not_fill_the_log(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of another stranger: a relay can make any number of keys."""
    _, hub, cafe = trio
    onward = hub.connection(cafe.peer_id)
    assert onward is not None
    with caplog.at_level(logging.INFO):
        for _ in range(60):
            async with LinkHost(Key.generate(), limits=QUICK) as stranger:
                pipe = await onward.open_stream(TUNNEL_PROTOCOL)
                await stranger.connect_pipe(pipe, cafe.peer_id, hub.listen_addrs[0])
    at_cafe = [
        record.__dict__["ww"]
        for record in caplog.records
        if record.getMessage() in ("connection.up", "connection.down")
        and record.__dict__["ww"]["peer"] != cafe.peer_id
    ]
    assert 60 <= len(at_cafe) < 70, "of 120"


async def test_few_peers_at_once_have_this_node_try_for_a_direct_connection(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Multiaddr, "is_global", True)
    monkeypatch.setattr(punching, "SERVED_MAX", 1)
    home, hub, cafe = trio
    if home.peer_id > cafe.peer_id:  # whose part it is to ask
        home, cafe = cafe, home
    for each in (home, cafe):
        await each.dial(hub.listen_addrs)
    used = cafe.connection(hub.peer_id)
    assert used is not None
    Punching(hub, list, lambda: 0.0).start()
    Punching(cafe, lambda: [used], lambda: 0.0).start()
    relayed = await home.dial(through(hub, cafe))

    async def ask() -> tuple[Stream, dict[str, object]]:
        stream = await relayed.open_stream(PUNCH_PROTOCOL)
        await write_frame(stream, {"addr": "/ip4/127.0.0.1/tcp/9"})
        return stream, await read_frame(stream, bytes_max=1024)

    first, answer = await ask()
    assert "addr" in answer
    _, answer = await ask()
    assert "SERVED_MAX" in str(answer["refused"])
    first.reset()  # it gave up
    async with asyncio.timeout(60):
        while "SERVED_MAX" in str((await ask())[1]):
            await asyncio.sleep(0.05)
