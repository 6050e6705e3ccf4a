"""Peers that speak the protocols of admission badly: refused within limits, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from wetware.base import cbor
from wetware.base.access import Access
from wetware.errors import AdmissionRefused, StreamReset, WetwareError
from wetware.identity import Key
from wetware.overlay.admission.exchange import CERTIFICATE_PROTOCOL, JOIN_PROTOCOL
from wetware.overlay.admission.service import EXCHANGES_PER_CONNECTION_MAX
from wetware.overlay.frames import read_frame, write_frame
from wetware.overlay.link import LinkHost, Stream

pytestmark = pytest.mark.anyio

PROTOCOLS = pytest.mark.parametrize("protocol", [CERTIFICATE_PROTOCOL, JOIN_PROTOCOL])


async def opened(cluster: Any, a: Any, protocol: str) -> tuple[LinkHost, Stream]:
    host = await cluster.stranger()
    connection = await host.dial([a.addr])
    return host, await connection.open_stream(protocol)


async def read_on(stream: Stream) -> None:
    while await stream.read():
        pass


async def trickle(stream: Stream, data: bytes) -> None:
    for byte in data:
        await stream.write(bytes([byte]))
        await asyncio.sleep(0.01)


async def cut(stream: Stream) -> None:
    """The other end reset the stream without another word."""
    async with asyncio.timeout(60):
        with pytest.raises(StreamReset):
            await read_on(stream)


async def nothing_left(a: Any, eventually: Callable[..., Awaitable[None]]) -> None:
    await eventually(lambda: not a.introductions._places)
    await eventually(lambda: not a.host._serving.tasks)
    assert a.introductions.peers() == ()
    assert list(a.admission.members) == []


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


HOSTILE = {
    "a length that promises 4 GiB": b"\xff\xff\xff\xff" + b"x" * 1000,
    "a length just beyond the limit": (4096 + 2048 + 1).to_bytes(4, "big"),
    "garbage": framed(b"\xff\x00garbage"),
    "nothing in the frame": framed(b""),
    "a list": framed(cbor.encode([1, 2])),
    "an empty map": framed(cbor.encode({})),
    "a chain that is text": framed(cbor.encode({"v": 1, "chain": "x"})),
    "a secret that is too long": framed(cbor.encode({"v": 1, "secret": b"x" * 33})),
    "a deep nest": framed(b"\x81" * 3000 + b"\x00"),
    "a tag": framed(b"\xd8\x1c\xa0"),
    "a map that promises a billion entries": framed(b"\xba\x3b\x9a\xca\x00"),
}


@PROTOCOLS
@pytest.mark.parametrize("what", HOSTILE)
async def test_frames_that_are_none(
    cluster: Any, eventually: Any, protocol: str, what: str
) -> None:
    a = await cluster.founder()
    _, stream = await opened(cluster, a, protocol)
    await stream.write(HOSTILE[what])
    await cut(stream)
    await nothing_left(a, eventually)
    assert a.host.refused["admission.exchange"] == 1
    b = await cluster.join(await a.ticket())  # the node goes on
    await b.connect(a)


@PROTOCOLS
async def test_a_frame_that_is_cut_off(cluster: Any, eventually: Any, protocol: str) -> None:
    a = await cluster.founder()
    host, stream = await opened(cluster, a, protocol)
    await stream.write(b"\x00\x00\x01\x00half")
    stream.close()
    await cut(stream)
    _, other = await opened(cluster, a, protocol)
    await other.write(b"\x00\x00")
    other.connection.abort(RuntimeError("pulled the plug"))
    await nothing_left(a, eventually)
    assert host.connections()


@PROTOCOLS
async def test_a_peer_that_sends_slowly_has_a_deadline(
    cluster: Any, eventually: Any, protocol: str
) -> None:
    a = await cluster.founder(exchange_s=0.2, join_s=0.2)
    _, stream = await opened(cluster, a, protocol)
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(StreamReset):
        await trickle(stream, (1000).to_bytes(4, "big") + bytes(1000))
    assert 0.1 < loop.time() - start < 5
    await nothing_left(a, eventually)


async def test_a_member_that_never_acks_is_never_up(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder(exchange_s=0.2)
    ticket, key = await a.ticket(), Key.generate()
    chain = await a.issuer.redeem(key.peer_id, ticket.secret)
    node = cluster.member(key)
    await node.open_host()
    connection = await node.host.dial([a.addr])
    stream = await connection.open_stream(CERTIFICATE_PROTOCOL)
    await write_frame(stream, {"v": 1, "chain": chain.encoded})
    assert "chain" in await read_frame(stream, bytes_max=8192)
    assert a.introductions.peers() == ()
    await cut(stream)
    assert a.introductions.peers() == ()
    await eventually(lambda: not a.introductions._places)
    for answer in ({"ack": 1}, {"ack": False}, {}, {"code": "admission.expired"}):
        stream = await connection.open_stream(CERTIFICATE_PROTOCOL)
        await write_frame(stream, {"v": 1, "chain": chain.encoded})
        await read_frame(stream, bytes_max=8192)
        await write_frame(stream, answer)
        await eventually(lambda: not a.introductions._places)
        assert a.introductions.peers() == ()


async def test_a_node_that_is_dialled_and_answers_badly(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder(exchange_s=0.3)
    answers = [
        b"\xff\xff\xff\xff",
        framed(b"junk"),
        framed(cbor.encode({"chain": 5})),
        framed(cbor.encode({"code": 5, "message": ["x"], "hint": {"a": "b"}})),
        framed(cbor.encode({"code": "admission.evicted", "message": "x" * 3000 + "\n\x1b[31m"})),
        b"",
    ]

    for answer in answers:

        async def serve(stream: Stream, answer: bytes = answer) -> None:
            await read_frame(stream, bytes_max=8192)
            await stream.write(answer)
            await stream.read()  # and no end

        host = await cluster.stranger()
        host.handle(CERTIFICATE_PROTOCOL, serve, access=Access.PUBLIC)
        (addr,) = await host.listen([type(a.addr)("ip4", "127.0.0.1", 0)])
        connection = await a.host.dial([addr])
        with pytest.raises(WetwareError) as exc:
            await a.introductions.introduced(connection)
        assert len(str(exc.value)) < 600
        assert str(exc.value).isprintable()
        assert host.peer_id not in a.introductions.peers()


async def test_exchanges_are_bounded_per_connection(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder()
    host = await cluster.stranger()
    connection = await host.dial([a.addr])
    streams = [
        await connection.open_stream(CERTIFICATE_PROTOCOL)
        for _ in range(EXCHANGES_PER_CONNECTION_MAX + 3)
    ]
    for stream in streams[EXCHANGES_PER_CONNECTION_MAX:]:
        await cut(stream)
    assert len(a.host._serving.tasks) == EXCHANGES_PER_CONNECTION_MAX
    connection.close()
    await nothing_left(a, eventually)


async def test_exchanges_are_bounded_per_address(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder(exchanges_per_address_max=3, exchanges_max=5)
    held = [await opened(cluster, a, JOIN_PROTOCOL) for _ in range(3)]
    await eventually(lambda: len(a.host._serving.tasks) == 3)
    _, stream = await opened(cluster, a, JOIN_PROTOCOL)
    await cut(stream)
    for host, _ in held:
        await host.aclose()
    await nothing_left(a, eventually)
    assert (await cluster.join(await a.ticket())).admission.own


async def test_guessing_tickets_is_limited_per_address(cluster: Any, eventually: Any) -> None:
    a = await cluster.founder(attempts_per_address_max=5)
    host = await cluster.stranger()
    connection = await host.dial([a.addr])
    codes = []
    for n in range(8):
        stream = await connection.open_stream(JOIN_PROTOCOL)
        await write_frame(stream, {"v": 1, "secret": bytes([n]) * 32})
        codes.append((await read_frame(stream, bytes_max=8192))["code"])
    assert codes == ["admission.ticket_unknown"] * 5 + ["limit"] * 3
    await nothing_left(a, eventually)
    assert len(a.introductions._attempts) == 1


async def test_members_are_heard_whatever_their_neighbours_do(
    cluster: Any, eventually: Any
) -> None:
    """A site of members behind one address, and a neighbour there that wastes its attempts."""
    a = await cluster.founder(attempts_per_address_max=5)
    b = await cluster.join(await a.ticket())
    await b.connect(a)
    host = await cluster.stranger()
    connection = await host.dial([a.addr])
    for _ in range(8):
        stream = await connection.open_stream(CERTIFICATE_PROTOCOL)
        await write_frame(stream, {"v": 1, "chain": b.admission.own.encoded})
        assert "code" in await read_frame(stream, bytes_max=8192)
    for each in b.host.connections():
        each.close()
    await eventually(lambda: not b.host.connections())
    await b.connect(a)


async def test_the_table_of_addresses_is_bounded(cluster: Any) -> None:
    attempts = (await cluster.founder(addresses_max=10)).introductions._attempts
    for n in range(100):
        attempts.take(f"192.0.2.{n}")
    assert len(attempts) == 10


async def test_a_backend_without_a_document_costs_no_ticket(cluster: Any) -> None:
    a = await cluster.founder()
    ticket = await a.ticket()

    async def too_large() -> bytes:
        return bytes(600 << 10)

    a.introductions._join_document = too_large
    with pytest.raises(AdmissionRefused) as exc:
        await cluster.join(ticket)
    assert exc.value.code == "admission.document"
    assert a.issuer.tickets()[0].uses_left == 1

    async def largest() -> bytes:
        return bytes(512 << 10)

    a.introductions._join_document = largest
    b = await cluster.join(ticket)
    assert len(b.admission.store.join_document) == 512 << 10
