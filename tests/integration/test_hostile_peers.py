"""Hostile peers against real nodes, one attack a test: A stays up, and the rest does not notice.

What "does not notice" means is in `Trio.unharmed`: while A is attacked, and after, everything that
B publishes arrives at C and at A, complete and in order; calls to A, to C through A, and pings
among the three are answered; nobody is dead in anybody's view. A's memory, sockets and log stay
within bounds, and what the attack opened is closed when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

import wetware
from wetware.base import cbor
from wetware.base.varint import uvarint
from wetware.broker.protocol import GATE_PROTOCOL
from wetware.client import LoginRefused
from wetware.errors import OverlayError, WetwareError
from wetware.identity import Key, PeerId
from wetware.overlay.admission.exchange import CERTIFICATE_PROTOCOL, JOIN_PROTOCOL
from wetware.overlay.admission.statements import Certificate, Chain, Tombstone
from wetware.overlay.frames import read_frame, write_frame
from wetware.overlay.link import Connection, LinkHost, LinkLimits, Stream
from wetware.overlay.link.multistream import HELLO, encode_line
from wetware.overlay.link.noise import NoiseIdentity
from wetware.overlay.link.relaying import RELAY_PROTOCOL
from wetware.overlay.membership.courier import PROTOCOL as MEMBERSHIP
from wetware.overlay.membership.dial_back import DIAL_BACK_PROTOCOL
from wetware.overlay.membership.record import Record
from wetware.overlay.membership.twins import PROCESS_PROTOCOL
from wetware.overlay.membership.wire import CLAIM, ENTRY
from wetware.overlay.punching import OBSERVED_PROTOCOL, PUNCH_PROTOCOL
from wetware.overlay.tunnel import TUNNEL_PROTOCOL
from wetware_audit.chain import CHECKPOINT_DOMAIN, Checkpoint
from wetware_audit.spread import PROTOCOL as AUDIT_PROTOCOL
from wetware_auth_local.spread import PROTOCOL as POLICY_PROTOCOL
from wetware_blob.exchange.wire import PROTOCOL as BLOB_PROTOCOL
from wetware_pubsub.router import FLOODSUB, MESHSUB_10, MESHSUB_11
from wetware_pubsub.wire import encode_unsigned, frame, publish_chunk
from wetware_pubsub.wire import subscription_chunk as subscription

from ..unit.overlay.link.conftest import HEADER, RawPeer
from .hostile import MIB, Mole, Trio, coming_from, framed, made_trio, send

pytestmark = pytest.mark.anyio

DATA, WINDOW, PING, GOAWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
KIB = 1 << 10
IDENTIFY, IDENTIFY_PUSH = "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0"
KAD, IPFS_PING = "/ipfs/kad/1.0.0", "/ipfs/ping/1.0.0"
PUBLIC = (
    IDENTIFY, IDENTIFY_PUSH, IPFS_PING, GATE_PROTOCOL, CERTIFICATE_PROTOCOL, JOIN_PROTOCOL,
    RELAY_PROTOCOL, OBSERVED_PROTOCOL,
)  # fmt: skip
MEMBERS_ONLY = (
    KAD, MEMBERSHIP, DIAL_BACK_PROTOCOL, MESHSUB_11, MESHSUB_10, FLOODSUB, POLICY_PROTOCOL,
    TUNNEL_PROTOCOL, AUDIT_PROTOCOL, PROCESS_PROTOCOL, PUNCH_PROTOCOL,
    BLOB_PROTOCOL,
)  # fmt: skip


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    made = made_trio(tmp_path_factory.mktemp("trio"))
    try:
        yield made
        for node in made.nodes:  # as an operator sees it, in the end
            states = {peer: m["state"] for peer, m in node.members().items()}
            assert {states[str(other.peer_id)] for other in made.nodes} == {"alive"}
    finally:
        made.close()
        made.home.__exit__()


@contextlib.asynccontextmanager
async def raw(trio: Trio, source: str = "127.0.0.67") -> Any:
    peer = await RawPeer.connect(trio.addr, source)
    try:
        yield peer
    finally:
        await peer.aclose()


@contextlib.asynccontextmanager
async def secured(trio: Trio, source: str = "127.0.0.67", key: Key | None = None) -> Any:
    async with raw(trio, source) as peer, asyncio.timeout(60):
        yield await peer.secure(NoiseIdentity(key) if key else None)


def topic_of(trio: Trio) -> str:
    return f"/wetware/{trio.a.info['cluster']}/rest"


async def answers(connection: Connection) -> bool:
    async with asyncio.timeout(60), await connection.open_stream(IPFS_PING) as stream:
        await stream.write(b"p" * 32)
        return await stream.read_exactly(32) == b"p" * 32


# --- bytes that are none of the protocol's --------------------------------------------------------


def junk() -> list[bytes]:
    """What is no frame of any protocol here, framed in each of their ways."""
    rng = random.Random(7)  # reproducible, not secret
    found = [b"", b"\x00", b"\x00" * 64, b"\xff" * 64, rng.randbytes(300), HELLO * 3]
    for body in (b"\x00", b"\xff" * 40, rng.randbytes(200), cbor.encode([1]), cbor.encode({})):
        found += [framed(body), uvarint(len(body)) + body]
    found.append(framed(cbor.encode({"k": 99, "v": -1, "chain": "x", "secret": 7, "addrs": {}})))
    found.append(framed(b"\x81" * 3000 + b"\x00"))  # deep
    found.append(framed(b"\xba\x3b\x9a\xca\x00"))  # a map of a billion entries
    found += [(500).to_bytes(4, "big") + b"half", uvarint(500) + b"half"]
    # RPC: a segment table and then nonsense; a struct pointer far beyond its segment.
    found.append(b"\x00\x00\x00\x00\x04\x00\x00\x00" + rng.randbytes(32))
    found.append(b"\x00\x00\x00\x00\x01\x00\x00\x00" + b"\xfc\xff\xff\x7f\xff\xff\xff\xff")
    return found


def oversize() -> list[bytes]:
    """Lengths beyond every limit, in each of the protocols' ways, and the first of the bytes."""
    body = b"x" * 16 * KIB
    lengths = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", uvarint(1 << 31), b"\xff" * 10]
    lengths.append(b"\x00\x00\x00\x00\xff\xff\xff\x7f")  # RPC: one segment of 16 GiB
    lengths.append(b"\xff\xff\xff\xff" + b"\xff" * 60)  # RPC: four billion segments
    return [length + body for length in lengths]


async def throw(connection: Connection, protocols: tuple[str, ...], data: list[bytes]) -> None:
    for protocol in protocols:
        await asyncio.gather(*(send(connection, protocol, each, wait_s=0.2) for each in data))


async def served(connection: Connection) -> set[str]:
    """What A says that it serves."""
    from libp2p.identity.identify.pb.identify_pb2 import Identify

    answer = await send(connection, IDENTIFY, b"", wait_s=10)
    said, at = Identify(), 1 + (answer[0] >> 7)
    said.ParseFromString(answer[at:])
    return set(said.protocols)


async def test_malformed_frames_of_a_stranger_on_every_public_protocol(trio: Trio) -> None:
    async with trio.unharmed("malformed, stranger"), trio.stranger() as connection:
        assert await served(connection) == {*PUBLIC, *MEMBERS_ONLY}, "every protocol is attacked"
        for protocol in MEMBERS_ONLY:
            with pytest.raises(OverlayError):
                await connection.open_stream(protocol)
        await throw(connection, PUBLIC, junk())
        assert await answers(connection)
    for protocol in MEMBERS_ONLY:
        trio.a.wait_log(f"protocol={protocol} ")


async def test_malformed_frames_of_a_member_on_every_protocol(trio: Trio) -> None:
    async with trio.unharmed("malformed, member"), trio.mole() as mole:
        await throw(mole.connection, MEMBERS_ONLY, junk())
        await throw(mole.connection, PUBLIC, junk()[:12])
        assert await answers(mole.connection)


async def test_oversize_frames_of_a_stranger_on_every_public_protocol(trio: Trio) -> None:
    bounded = trio.unharmed("oversize, stranger", growth_bytes_max=32 * MIB)
    async with bounded, trio.stranger() as connection:
        await throw(connection, PUBLIC, oversize())
        assert await answers(connection)


async def test_oversize_frames_of_a_member_on_every_protocol(trio: Trio) -> None:
    bounded = trio.unharmed("oversize, member", growth_bytes_max=32 * MIB)
    async with bounded, trio.mole() as mole:
        await throw(mole.connection, MEMBERS_ONLY, oversize())
        assert await answers(mole.connection)


async def test_broken_frames_below_the_streams(trio: Trio) -> None:
    rng = random.Random(8)  # reproducible, not secret
    starts = [
        b"",
        HELLO,
        HELLO + encode_line("/noise"),
        HELLO + encode_line("/noise") + b"\xff\xff",
        HELLO + encode_line("/noise") + b"\x00\x20" + rng.randbytes(32),
        HELLO + encode_line("/plaintext/2.0.0"),
    ]
    frames = [
        (9, 0, 0, 0, b""),
        (WINDOW, SYN, 2, 0, b""),
        (DATA, 0, 0, 1, b"x"),
        (DATA, SYN, 1, 1 << 30, b""),
        (DATA, SYN, 1, 0xFFFFFFFF, b""),
        (WINDOW, SYN, 1, 0xFFFFFFFF, b""),
        (GOAWAY, 0, 0, 2, b""),
    ]
    async with trio.unharmed("broken frames"):
        for start in starts:
            async with raw(trio) as peer:
                peer.writer.write(start + rng.randbytes(300))
                with contextlib.suppress(ConnectionError):  # it may have been cut off by now
                    await peer.writer.drain()
        for each in frames:
            async with secured(trio) as peer:
                peer.frame(*each)
                assert await peer.cut_off(), each
        for _ in range(20):
            async with secured(trio) as peer:
                for _ in range(6):
                    peer.frame(
                        rng.randrange(5),
                        rng.randrange(16),
                        rng.choice([0, 1, 2, 3, rng.getrandbits(32)]),
                        rng.choice([0, 1, 100, 1 << 20, rng.getrandbits(32)]),
                        rng.randbytes(rng.randrange(120)),
                    )
                with contextlib.suppress(ConnectionError):  # it may have been cut off by now
                    await peer.writer.drain()


# --- identities that are none ---------------------------------------------------------------------

JUNK_KEYS = (
    b"",
    b"\x08\x01\x12\x20" + bytes(32),
    b"\x08\x01\x12\x20" + b"\xff" * 32,
    b"\x08\x01\x12\x02ab",
    b"\x08\x63\x12\x02ab",
    b"\x08\x00\x12\x02ab",
    b"\xff" * 300,
)


async def test_junk_public_keys(trio: Trio) -> None:
    """In the noise payload of a stranger; in identify, its push, and messages of a member."""
    from libp2p.identity.identify.pb.identify_pb2 import Identify

    said = []
    for key in JUNK_KEYS:
        message = Identify(public_key=key, protocols=[KAD], listen_addrs=[key]).SerializeToString()
        said.append(uvarint(len(message)) + message)
    answer = iter(said * 100)

    async def identify(stream: Stream) -> None:
        await stream.write(next(answer))

    async with trio.unharmed("junk keys"):
        for key in JUNK_KEYS:
            async with raw(trio) as peer:
                identity = NoiseIdentity(peer.key)
                identity.payload = b"\x0a" + uvarint(len(key)) + key + b"\x12\x40" + bytes(64)
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await asyncio.wait_for(peer.secure(identity), 60)
        async with trio.mole(handlers={IDENTIFY: identify}) as mole:
            for push in said:
                await send(mole.connection, IDENTIFY_PUSH, push, wait_s=0.1)
            stream = await mole.speak(MESHSUB_11)
            for key in JUNK_KEYS:
                unsigned = encode_unsigned(key[:60], b"-7", b"\x77" + bytes(7), topic_of(trio))
                await stream.write(frame([publish_chunk(unsigned, bytes(64), key)]))
            assert await answers(mole.connection)


async def test_impersonation(trio: Trio) -> None:
    """Noise with the payload of another; the certificate of another, shown and to be renewed."""
    async with trio.unharmed("impersonation"), trio.mole() as mole:
        loot = Record.parse(await mole.fetch_record(trio.b.peer_id))
        stolen = loot.chain  # any member has everybody's certificate
        async with raw(trio) as peer:
            replayed = NoiseIdentity(Key.generate())
            replayed.payload = mole.host.noise.payload
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await asyncio.wait_for(peer.secure(replayed), 60)
        thief_key = Key.generate()
        async with trio.stranger(key=thief_key) as thief:
            for protocol, request in (
                (CERTIFICATE_PROTOCOL, {"v": 1, "chain": stolen}),
                (JOIN_PROTOCOL, {"v": 1, "chain": stolen}),
                (JOIN_PROTOCOL, {"v": 1, "renew": stolen}),
            ):
                answer = await send(thief, protocol, framed(request), wait_s=5)
                refused = cbor.decode(answer[4:], bytes_max=8192)
                assert refused["code"] == "admission.wrong_peer", protocol
            # A cluster of its own, with the other's names in it.
            forged = Certificate(
                cluster=trio.a.info["cluster"],
                peer=thief_key.peer_id,
                rights=frozenset({"member", "invite"}),
                labels={},
                not_before_ms=int(time.time() * 1000),
                not_after_ms=int(time.time() * 1000) + 3_600_000,
                foreign=False,
            ).signed(Key.generate())
            request = {"v": 1, "chain": Chain((forged,)).encoded}
            answer = await send(thief, CERTIFICATE_PROTOCOL, framed(request), wait_s=5)
            assert cbor.decode(answer[4:], bytes_max=8192)["code"].startswith("admission.")
            with pytest.raises(OverlayError):
                await thief.open_stream(MEMBERSHIP)
        # The member itself, with another's certificate on its own connection: nothing changes.
        answer = await send(
            mole.connection, CERTIFICATE_PROTOCOL, framed({"v": 1, "chain": stolen}), wait_s=5
        )
        assert cbor.decode(answer[4:], bytes_max=8192)["code"] == "admission.wrong_peer"


# --- too many of something ------------------------------------------------------------------------


async def test_a_thousand_connections_one_after_another(trio: Trio) -> None:
    async with trio.unharmed("1,000 connections"):
        for turn in range(1000):
            peer = await RawPeer.connect(trio.addr, f"127.0.0.{70 + turn % 4}")
            if turn % 2:
                peer.writer.write(HELLO)
            if turn % 8 == 0:
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    await peer.secure()
            await peer.aclose()


async def test_ten_thousand_streams(trio: Trio) -> None:
    """All at once, which is a flood; and as one after another as the limits grant."""
    async with trio.unharmed("10,000 streams"):
        async with secured(trio) as peer:
            peer.send(b"".join(HEADER.pack(0, WINDOW, SYN, 2 * n + 1, 0) for n in range(10_000)))
            assert await peer.cut_off()
        async with secured(trio) as peer:
            lines = HELLO + encode_line("/nothing/1.0.0") + encode_line(IPFS_PING)
            for first in range(0, 10_000, 500):
                peer.send(
                    b"".join(
                        HEADER.pack(0, DATA, SYN, 2 * n + 1, len(lines))
                        + lines
                        + HEADER.pack(0, WINDOW, RST, 2 * n + 1, 0)
                        for n in range(first, first + 500)
                    )
                )
                with contextlib.suppress(ConnectionError):
                    await peer.writer.drain()
                await asyncio.sleep(0.02)


async def test_streams_opened_and_reset_without_end(trio: Trio) -> None:
    """Each is good and soon over, so that no limit on open streams holds: the rate must."""
    lines = HELLO + encode_line(IPFS_PING)

    async def flood(peer: RawPeer, until_s: float) -> None:
        taking = asyncio.create_task(peer.cut_off())  # answers are read, so that nothing stalls
        try:
            for first in range(0, 1_000_000, 400):
                if taking.done() or time.monotonic() > until_s:
                    break
                peer.send(
                    b"".join(
                        HEADER.pack(0, DATA, SYN, 2 * n + 1, len(lines))
                        + lines
                        + HEADER.pack(0, WINDOW, RST, 2 * n + 1, 0)
                        for n in range(first, first + 400)
                    )
                )
                await peer.writer.drain()
                await asyncio.sleep(0.01)
        finally:
            taking.cancel()

    async with trio.unharmed("streams without end"):
        until_s = time.monotonic() + 6
        while time.monotonic() < until_s:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
                async with secured(trio, "127.0.0.68") as peer:
                    await flood(peer, until_s)
            await asyncio.sleep(0.1)


async def test_streams_of_a_member_on_every_protocol_at_once(trio: Trio) -> None:
    """Opened, and then nothing is said: what a member can hold open, and for how long."""
    async with trio.unharmed("idle streams"), trio.mole() as mole:
        held = []
        for protocol in (*PUBLIC, *MEMBERS_ONLY):
            opened = await asyncio.gather(
                *(mole.connection.open_stream(protocol) for _ in range(60)), return_exceptions=True
            )
            held += [each for each in opened if isinstance(each, Stream)]
        assert len(held) > 60
        await asyncio.sleep(1)
        for stream in held:
            stream.reset()


async def test_240_hung_handshakes(trio: Trio) -> None:
    async with trio.unharmed("hung handshakes"):
        hung = []
        for number in range(240):
            peer = await RawPeer.connect(trio.addr, f"127.0.0.{80 + number % 6}")
            peer.writer.write(HELLO if number % 2 else HELLO + encode_line("/noise"))
            hung.append(peer)
        async with trio.mole() as mole:  # a newcomer still gets in, and so does a user
            assert await answers(mole.connection)
        key = trio.home.key()
        async with wetware.connect(trio.a.addr, key=key) as session:
            assert (await session.whoami()).node == str(trio.a.peer_id)
        for peer in hung:
            await peer.aclose()


# --- peers that do not take what is sent to them --------------------------------------------------


async def test_windows_that_are_never_opened(trio: Trio) -> None:
    """Streams that A answers on at length, and of which nothing is taken."""
    async with trio.unharmed("window never opened"):
        async with secured(trio) as peer:
            lines = HELLO + encode_line(IPFS_PING)
            for number in range(64):
                peer.frame(DATA, SYN, 2 * number + 1, len(lines), lines)
                for _ in range(8):  # echoed, and never acknowledged
                    peer.frame(DATA, 0, 2 * number + 1, 30 * KIB, bytes(30 * KIB))
                await peer.writer.drain()
            await asyncio.sleep(1)
        async with trio.mole() as mole:
            digest = await policy_digest(mole)
            streams = [await mole.speak(POLICY_PROTOCOL) for _ in range(4)]
            for stream in streams:
                await stream.write(framed({"pull": digest}))
            await asyncio.sleep(1)
            assert await answers(mole.connection)


async def policy_digest(mole: Mole) -> bytes:
    claim = framed({"version": 1, "digest": bytes(32)})
    answer = await send(mole.connection, POLICY_PROTOCOL, claim, wait_s=5)
    digest = cbor.decode(answer[4:], bytes_max=4096)["digest"]
    assert isinstance(digest, bytes)
    return digest


async def test_a_window_that_is_overrun(trio: Trio) -> None:
    async with trio.unharmed("window overrun"):
        for protocol in PUBLIC:
            async with secured(trio) as peer:
                lines = HELLO + encode_line(protocol)
                peer.frame(DATA, SYN, 1, len(lines), lines)
                peer.frame(DATA, 0, 1, 8 * MIB)
                assert await peer.cut_off(), protocol
            async with secured(trio) as peer:  # as one that honestly does not count
                peer.frame(DATA, SYN, 1, len(lines), lines)
                for _ in range(80):  # 5 MiB at once: windows grow to 4
                    peer.frame(DATA, 0, 1, 64 * KIB, bytes(64 * KIB))
                with contextlib.suppress(ConnectionError, TimeoutError):
                    async with asyncio.timeout(2):
                        await peer.writer.drain()


async def test_a_member_that_stops_reading(trio: Trio) -> None:
    """It is subscribed to what the rest says, and its TCP connection takes nothing any more."""

    async def mute(stream: Stream) -> None:
        await asyncio.Event().wait()

    handlers = {MESHSUB_11: mute, MEMBERSHIP: mute, POLICY_PROTOCOL: mute}
    async with trio.unharmed("frozen"), trio.mole(handlers=handlers) as mole:
        stream = await mole.speak(MESHSUB_11)
        await stream.write(frame([subscription(topic_of(trio), True)]))
        record = make_record(mole)
        speaking = await mole.speak()
        await speaking.write(framed({"k": 8, "r": [record.encoded]}))
        await asyncio.sleep(0.5)
        mole.connection._transport.pause_reading()  # type: ignore[union-attr]
        asking = framed({"k": 7, "w": trio.a.peer_id.public_key}) * 500
        key = trio.home.key()
        async with wetware.connect(trio.b.addr, key=key) as session:
            topic = await session.pubsub.join("bulk")
            for _ in range(100):
                await topic.publish(bytes(20_000))
        with contextlib.suppress(TimeoutError, OverlayError):
            async with asyncio.timeout(3):
                while True:
                    await speaking.write(asking)
        mole.host.connections()[0].abort(OSError("done"))


# --- frames that are good, and cost much ----------------------------------------------------------


async def test_frames_that_take_long_to_read(trio: Trio) -> None:
    """Within every limit of size, and full of the smallest parts that a decoder can be made to see.

    A loop that reads one of them to its end stands still for seconds, and its node is dead to the
    others.
    """

    def field(tag: int, body: bytes) -> bytes:
        return bytes((tag,)) + uvarint(len(body)) + body

    most = (4 << 20) - 64
    rpcs = [
        b"\x78\x00" * (most // 2),  # fields that nobody knows
        field(0x1A, b"\x12\x00" * (most // 2)),  # IWANTs of nothing
        field(0x12, field(0x22, b"t") + b"\x78\x00" * (most // 2)),  # in a message
        field(0x1A, b"\x0a\x00" * 4096 + b"\x1a\x00" * 4096),
        field(0x12, field(0x22, b"t")) * 16_000,
    ]
    documents = [{"k": 5, "x": [0] * 60_000}, {"k": 5, "x": [[]] * 60_000}]
    async with trio.unharmed("slow frames", growth_bytes_max=64 * MIB), trio.mole() as mole:
        for rpc in rpcs:
            with contextlib.suppress(OverlayError, TimeoutError):
                async with asyncio.timeout(10):
                    stream = await mole.speak(MESHSUB_11)
                    await stream.write(uvarint(len(rpc)) + rpc)
                    await asyncio.sleep(0.3)
        stream = await mole.speak()
        for document in documents * 10:
            await stream.write(framed(document))
        assert await answers(mole.connection)


async def test_refusals_do_not_fill_the_log(trio: Trio) -> None:
    """A stranger that is refused thousands of times a second."""
    async with trio.unharmed("log"):
        for protocol in PUBLIC:
            async with secured(trio) as peer:
                lines = HELLO + encode_line(protocol)
                for first in range(0, 1000, 100):
                    peer.send(
                        b"".join(
                            HEADER.pack(0, DATA, SYN, 2 * n + 1, len(lines) + 8)
                            + lines
                            + b"\xff" * 8
                            for n in range(first, first + 100)
                        )
                    )
                    with contextlib.suppress(ConnectionError):
                        await peer.writer.drain()
                    await asyncio.sleep(0.05)


# --- the membership ------------------------------------------------------------------------------


def make_record(mole: Mole, key: Key | None = None, **fields: Any) -> Record:
    """A record with a good signature: the member's own unless another key signs."""
    now_ms = int(time.time() * 1000)
    return Record.sign(
        key or mole.key,
        **{
            "incarnation": now_ms,
            "instance": bytes(8),
            "issued_ms": now_ms,
            "host": "mole",
            "name": "mole",
            "chain": mole.admission.own.encoded,
            **fields,
        },
    )


async def test_forged_and_replayed_member_records(trio: Trio) -> None:
    before = trio.a.members()[str(trio.b.peer_id)]
    async with trio.unharmed("forged records"), trio.mole() as mole:
        good = await mole.fetch_record(trio.b.peer_id)
        record, envelope = Record.parse(good), cbor.decode(good, bytes_max=8192)
        fields = cbor.decode(envelope["p"], bytes_max=8192)
        forged = []
        for change in (
            {"n": record.incarnation + 1},
            {"n": record.incarnation + 1, "q": True},  # a farewell
            {"n": 1 << 62, "a": ["/ip4/127.0.0.1/tcp/9"]},
            {"r": record.revision + 1, "a": []},
        ):
            payload = cbor.encode(fields | change)
            for signature in (envelope["s"], mole.key.sign(payload), bytes(64)):
                forged.append(cbor.encode({"p": payload, "s": signature}))
        own = make_record(mole)
        # Another's certificate in one's own record, and one's own in that of a new identity.
        forged.append(make_record(mole, chain=record.chain).encoded)
        forged.append(make_record(mole, Key.generate()).encoded)
        forged += [good] * 20  # replayed
        stream = await mole.speak()
        for each in forged:
            await stream.write(framed({"k": 8, "r": [each]}))
            # Announced as well, so that A asks for it.
            key, other = trio.b.peer_id.public_key, trio.c.peer_id.public_key
            entries = ENTRY.pack(key, record.incarnation + 1, 0, 3)
            entries += ENTRY.pack(other, 1 << 62, 7, 0)
            await stream.write(framed({"k": 5, "d": entries}))
        await stream.write(framed({"k": 1, "n": 1}))
        await asyncio.sleep(0.5)
        assert str(mole.peer) not in trio.a.members(), "none of its own was good"
        # Of what it says itself, on its own connection, the time alone is no forgery.
        late = make_record(mole, issued_ms=own.issued_ms - 7_200_000)
        await stream.write(framed({"k": 8, "r": [late.encoded]}))
        await asyncio.sleep(0.5)
        assert str(mole.peer) in trio.a.members()
    after = trio.a.members()[str(trio.b.peer_id)]
    same = ("incarnation", "addrs", "name", "host", "state")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


async def test_a_flood_of_member_records(trio: Trio) -> None:
    """New ones of its own, and of identities that have no certificate, as fast as A takes them."""
    async with trio.unharmed("flood of records"), trio.mole() as mole:
        stream = await mole.speak()
        now_ms = int(time.time() * 1000)
        chain = mole.admission.own.encoded
        strangers = [Key.generate() for _ in range(300)]
        frames = []
        for number in range(30):
            batch = [make_record(mole, revision=10 * number + n).encoded for n in range(10)]
            batch += [
                make_record(mole, key, incarnation=now_ms + number, chain=chain).encoded
                for key in strangers[10 * number : 10 * number + 10]
            ]
            frames.append(framed({"k": 8, "r": batch}))
        for number in range(40):  # nodes that nobody has heard of
            entries = [ENTRY.pack(os.urandom(32), now_ms, number, 0) for _ in range(1000)]
            frames.append(framed({"k": 5, "d": b"".join(entries)}))
        until_s = time.monotonic() + 4
        with contextlib.suppress(OverlayError, TimeoutError):
            async with asyncio.timeout(4):
                while time.monotonic() < until_s:
                    for each in frames:
                        await stream.write(each)
        members = trio.a.members()
        assert len(members) <= 4 + len(trio.measured), "nobody without a certificate is in it"
        for key in strangers:
            assert str(key.peer_id) not in members


async def test_suspicions_and_deaths_of_everybody_are_not_believed(trio: Trio) -> None:
    async with trio.unharmed("slander"), trio.mole() as mole:
        others = [trio.b.peer_id, trio.c.peer_id, trio.a.peer_id]
        records = [Record.parse(await mole.fetch_record(peer)) for peer in others]
        stream = await mole.speak()
        deadline = time.monotonic() + 6  # longer than a suspicion lasts
        while time.monotonic() < deadline:
            claims, entries = [], []
            for record in records:
                about = record.peer.public_key
                for ahead in range(4):
                    incarnation = record.incarnation + ahead
                    for accuser in (mole.peer, *others):
                        for state in (1, 2):
                            claims.append(CLAIM.pack(about, incarnation, accuser.public_key, state))
                    entries.append(ENTRY.pack(about, incarnation, record.revision, 2))
            await stream.write(framed({"k": 5, "c": b"".join(claims), "d": b"".join(entries)}))
            await asyncio.sleep(0.05)
    for node in trio.nodes:
        node.wait_members(others)


async def test_a_flood_of_facts(trio: Trio) -> None:
    """Tombstones for everybody, signed by whoever: nobody is evicted, and nothing is kept."""
    kept = trio.a.data_dir / "tombstones.json"
    before = kept.read_bytes() if kept.exists() else b""
    async with trio.unharmed("flood of facts"), trio.mole() as mole:
        now_ms = int(time.time() * 1000)
        own = mole.admission.own
        facts = []
        for number in range(200):
            key = mole.key if number % 2 else Key.generate()
            victim = [trio.a, trio.b, trio.c][number % 3].peer_id
            for chain in (None, own):
                facts.append(
                    Tombstone(
                        cluster=trio.a.info["cluster"],
                        peer=victim,
                        chain=chain,
                        reason=f"because {number}",
                        at_ms=now_ms + number,
                        not_after_ms=now_ms + 86_400_000,
                    )
                    .signed(key)
                    .encoded
                )
        stream = await mole.speak()
        with contextlib.suppress(OverlayError, TimeoutError):
            async with asyncio.timeout(4):
                for _ in range(20):
                    for at in range(0, len(facts), 20):
                        await stream.write(framed({"k": 8, "b": facts[at : at + 20]}))
                    digests = b"".join(os.urandom(16) for _ in range(2000))
                    await stream.write(framed({"k": 6, "l": b"", "h": b"", "f": digests}))
        assert await answers(mole.connection)
    assert (kept.read_bytes() if kept.exists() else b"") == before


async def test_a_node_is_not_made_to_knock_at_other_doors(trio: Trio) -> None:
    knocked = 0

    class Door(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            nonlocal knocked
            knocked += 1
            transport.close()  # type: ignore[attr-defined]

    server = await asyncio.get_running_loop().create_server(Door, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    asked = framed({"addrs": [f"/ip4/127.0.0.1/tcp/{port}"] * 8})
    try:
        async with trio.unharmed("dial-back"), trio.mole() as mole:
            answers_ = []
            for _ in range(40):
                got = await send(mole.connection, DIAL_BACK_PROTOCOL, asked, wait_s=5)
                answers_.append(cbor.decode(got[4:], bytes_max=8192))
            refused = [each for each in answers_ if "refused" in each]
            assert len(refused) >= 30, "so often and no more"
            for each in answers_:
                assert {why for _, why, _ in each.get("results", [])} <= {"unknown"}
            assert knocked == 0
            # In its own record it may name what it likes: that is dialled so often and no more.
            record = make_record(mole, addrs=[f"/ip4/127.0.0.1/tcp/{port}"])
            await (await mole.speak()).write(framed({"k": 8, "r": [record.encoded]}))
            for _ in range(20):
                await send(mole.connection, DIAL_BACK_PROTOCOL, asked, wait_s=5)
            assert knocked <= 3 * 8
    finally:
        server.close()


# --- words on logs --------------------------------------------------------------------------------


async def test_checkpoints_that_are_not_the_sender_s(trio: Trio) -> None:
    """Of another node, with its own signature or a good one; forged; and its own, rewritten."""

    def said(signer: Key, node: PeerId, head: bytes = bytes(32)) -> str:
        word = Checkpoint("log", node, 7, head, time.time_ns() // 1_000_000)
        return word.sign(lambda data: signer.sign(CHECKPOINT_DOMAIN + data)).text

    def known(node: PeerId) -> int:
        done = trio.a.ww("audit", "checkpoint", "--of", str(node))
        return len([line for line in done.stdout.splitlines() if '"log":"log"' in line])

    async def tell(connection: Connection, word: str) -> None:
        """As a node does, without a proof, and until the other side has heard it."""
        async with asyncio.timeout(60), await connection.open_stream(AUDIT_PROTOCOL) as stream:
            with contextlib.suppress(OverlayError, EOFError):  # what is refused is reset
                await read_frame(stream, bytes_max=4096)
                await write_frame(stream, {"checkpoint": word, "records": 0})
                await read_frame(stream, bytes_max=4096)

    other = Key.generate()
    async with trio.unharmed("checkpoints"), trio.mole() as mole:
        own = mole.key.peer_id
        for bad in (
            said(mole.key, trio.b.peer_id),
            said(other, other.peer_id),
            said(other, own),
            said(mole.key, own).replace('"seq":7', '"seq":8'),
        ):
            await tell(mole.connection, bad)
        for node in (trio.b.peer_id, other.peer_id, own):
            assert await asyncio.to_thread(known, node) == 0, node
        await tell(mole.connection, said(mole.key, own))
        assert await asyncio.to_thread(known, own) == 1
    trio.a.wait_log(f"audit.refused peer={own}")
    async with trio.mole() as mole:  # an error of its own is what it should lead to
        for number in range(20):
            await tell(mole.connection, said(mole.key, mole.peer, bytes([number]) * 32))
    trio.a.wait_log(f"audit.log_rewritten node={mole.peer}")
    lines = trio.a.log.read_text().count(f"audit.log_rewritten node={mole.peer}")
    assert 1 <= lines <= 8, "so many a minute"


# --- guesses -------------------------------------------------------------------------------------


async def test_tickets_guessed_at_a_high_rate(trio: Trio) -> None:
    async with trio.unharmed("guessed tickets"):
        codes: list[str] = []
        for number in range(3):
            async with trio.stranger(f"127.0.0.{90 + number % 2}") as connection:
                for _ in range(100):
                    request = framed({"v": 1, "secret": os.urandom(32)})
                    answer = await send(connection, JOIN_PROTOCOL, request, wait_s=5)
                    codes.append(cbor.decode(answer[4:], bytes_max=8192)["code"])
        assert set(codes) == {"admission.ticket_unknown", "limit"}
        assert codes.count("admission.ticket_unknown") < 2 * 130
        async with trio.mole() as mole:  # from another address, with a ticket
            assert await answers(mole.connection)


async def test_logins_attempted_at_a_high_rate(trio: Trio) -> None:
    ends: list[str] = []

    async def attempt() -> None:
        try:
            async with wetware.connect(trio.a.addr, key=Key.generate()):
                ends.append("in")
        except LoginRefused as exc:
            ends.append(exc.status.name)
        except WetwareError as exc:
            ends.append(exc.code)

    async with trio.unharmed("logins"):
        started = time.monotonic()
        with coming_from("127.0.0.95"):
            for _ in range(15):
                await asyncio.gather(*(attempt() for _ in range(8)))
        # 60 a minute: so many at once, and one more each second.
        allowed = 60 + (time.monotonic() - started) + 1
        assert "in" not in ends
        assert ends.count("UNKNOWN_PRINCIPAL") <= allowed
        assert ends.count("limit") >= min(30, len(ends) - allowed)
        async with wetware.connect(trio.a.addr, key=trio.home.key()) as session:
            assert (await session.whoami()).roles  # from another address


# --- relays that flood ----------------------------------------------------------------------------

FLOOD_S = 5.0


async def flooding(mole: Mole, attack: Any) -> None:
    """Many of `attack(connection)` at once, over and over, and a new connection after each end."""
    deadline, done = time.monotonic() + FLOOD_S, 0

    async def work() -> None:
        nonlocal done
        while time.monotonic() < deadline:
            with contextlib.suppress(WetwareError, EOFError, TimeoutError):
                await attack(await mole.reach(mole.trio.a))
                done += 1
            await asyncio.sleep(0)

    await asyncio.gather(*(work() for _ in range(32)))
    print(f"{done} attacks")  # noqa: T201 - figures, with -s
    assert done >= 32


@pytest.mark.parametrize("start", [b"", HELLO + encode_line("/noise")], ids=["noise", "handshake"])
async def test_a_relay_floods_through_tunnels_that_nobody_asked_for(
    trio: Trio, start: bytes
) -> None:
    """What comes out of each is a connection, of which not even the handshake is one."""
    data = start + os.urandom(64 * KIB)

    async def attack(connection: Connection) -> None:
        stream = await connection.open_stream(TUNNEL_PROTOCOL)
        try:
            await stream.write(data)
        finally:
            stream.reset()

    async with trio.unharmed("tunnels", growth_bytes_max=48 * MIB), trio.mole() as mole:
        await flooding(mole, attack)


async def test_a_relay_floods_connections_that_it_carries(trio: Trio) -> None:
    """Of strangers, as a relay may have any number of keys: bytes that are echoed, and not read."""
    data = os.urandom(64 * KIB)

    async def attack(connection: Connection) -> None:
        stream = await connection.open_stream(TUNNEL_PROTOCOL)
        async with LinkHost(Key.generate(), limits=LinkLimits(close_s=0.2)) as host:
            inner = await host.connect_pipe(stream, trio.a.peer_id, connection.remote)
            ping = await inner.open_stream(IPFS_PING)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while True:
                        await ping.write(data)

    async with trio.unharmed("carried"), trio.mole() as mole:
        await flooding(mole, attack)


@pytest.mark.long
async def test_a_relay_floods_its_own_streams(trio: Trio) -> None:
    """Those that it opens, and those that the node has opened to it, which asked for nothing."""
    data = os.urandom(64 * KIB)
    opened: list[Stream] = []

    async def keep(stream: Stream) -> None:
        opened.append(stream)
        while await stream.read():
            pass

    async def attack(connection: Connection) -> None:
        own = await connection.open_stream(random.choice(MEMBERS_ONLY))
        for stream in (own, *opened[-2:]):
            with contextlib.suppress(WetwareError, TimeoutError):
                async with asyncio.timeout(0.2):
                    await stream.write(data * 8)
        own.reset()

    async with trio.unharmed("own streams"), trio.mole(handlers={MEMBERSHIP: keep}) as mole:
        await flooding(mole, attack)


@pytest.mark.long
async def test_a_relay_floods_as_fast_as_a_socket_takes_it(trio: Trio) -> None:
    """Tunnels full of noise, prepared, so that the attacker has next to no work with them."""
    lines = HELLO + encode_line(TUNNEL_PROTOCOL)
    data = os.urandom(200 * KIB)  # nearly a window
    async with trio.unharmed("fast tunnels"), trio.mole() as mole:
        until_s = time.monotonic() + FLOOD_S
        sent = 0
        while time.monotonic() < until_s:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
                async with secured(trio, "127.0.0.69", mole.key) as peer:
                    taking = asyncio.create_task(peer.cut_off())
                    try:
                        for first in range(0, 1_000_000, 20):
                            if taking.done() or time.monotonic() > until_s:
                                break
                            peer.send(
                                b"".join(
                                    HEADER.pack(0, DATA, SYN, 2 * n + 1, len(lines))
                                    + lines
                                    + HEADER.pack(0, DATA, 0, 2 * n + 1, len(data))
                                    + data
                                    for n in range(first, first + 20)
                                )
                            )
                            sent += 20
                            await peer.writer.drain()
                            await asyncio.sleep(0)
                    finally:
                        taking.cancel()
            await asyncio.sleep(0.02)
        print(f"{sent} tunnels")  # noqa: T201 - figures, with -s
        assert sent >= 200
