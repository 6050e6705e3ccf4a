"""`rpc.ByteStream`: order, half-close, backpressure, and what ends a stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from anyio import ClosedResourceError, EndOfStream, IncompleteRead
from anyio.streams.buffered import BufferedByteReceiveStream

from wetware import rpc
from wetware.errors import (
    Disconnected,
    Expired,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Revoked,
    WetwareError,
)
from wetware.identity import Key
from wetware.rpc import bytestream
from wetware.rpc.bytestream import OUT_BYTES_MAX, WINDOW_BYTES
from wetware.rpc.framing import DATA, GRANT
from wetware.rpc.pipes import SocketPipe

from .conftest import until
from .test_guard import Grant

pytestmark = pytest.mark.anyio

STREAMS = rpc.load(Path(__file__).with_name("streams.capnp"))
HELD_MAX = 2 * OUT_BYTES_MAX + WINDOW_BYTES + (256 << 10)
"""Of one direction, at both ends and between them, beside what one `send` writes."""


class StreamsServant(rpc.Servant, interface=STREAMS.Streams):
    def __init__(self) -> None:
        self.opened: list[rpc.ByteStream] = []
        self.run_sync: Any = None  # of what it opens
        self.upstream: Any = None

    async def open(self) -> dict[str, Any]:
        self.opened.append(rpc.ByteStream(run_sync=self.run_sync))
        return {"stream": self.opened[-1].servant}

    async def take(self, stream: rpc.Ref) -> dict[str, Any]:
        return {"stream": stream}

    async def ping(self) -> None: ...

    async def far(self) -> dict[str, Any]:
        return {"stream": (await self.upstream.open())["stream"]}

    async def pass_on(self, stream: rpc.Ref) -> None:
        await self.upstream.give(stream=stream)

    async def give(self, stream: rpc.Ref) -> None:
        self.opened.append(rpc.ByteStream(stream))

    async def trust(self) -> None:
        rpc.current_connection().trust()


class Rig:
    """A server, and a client that opens streams of it, or hands it streams of its own.

    One that it opened it can hand back as well: then both ends are the server's.
    """

    def __init__(self, path: Path, *, handed: str = "out") -> None:
        self.path, self.servant, self.guard = path, StreamsServant(), Grant()
        self.handed = handed

    @contextlib.asynccontextmanager
    async def running(
        self,
        name: str = "s",
        limits: rpc.RpcLimits = rpc.RpcLimits(),  # noqa: B008  # frozen
    ) -> AsyncIterator[Rig]:
        served = rpc.guarded(self.servant, self.guard)
        async with (
            rpc.serve_unix(self.path / name, lambda _: served, limits=limits),
            await rpc.connect_unix(self.path / name) as self.connection,
        ):
            self.streams = self.connection.bootstrap(STREAMS.Streams)
            yield self

    async def open(self) -> tuple[rpc.ByteStream, rpc.ByteStream]:
        """The client's end and the server's."""
        if self.handed == "in":
            near = rpc.ByteStream()
            await self.streams.give(stream=near.servant)
        elif self.handed == "back":
            await self.streams.give(stream=(await self.streams.open())["stream"])
            near = self.servant.opened[-2]
        else:
            near = rpc.ByteStream((await self.streams.open())["stream"])
        far = self.servant.opened[-1]
        await until(lambda: (near._transport and far._transport) or near._error)
        return near, far


@pytest.fixture(params=["out", "in", "back"])
async def rig(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    async with Rig(tmp_path, handed=request.param).running() as rig:
        yield rig


AWAY = pytest.mark.parametrize("rig", ["out", "in"], indirect=True)
"""For what holds where the ends are of two processes."""


@pytest.fixture(params=["to the servant", "to the client"])
async def ends(rig: Rig, request: pytest.FixtureRequest) -> tuple[rpc.ByteStream, rpc.ByteStream]:
    """A writer and a reader: all holds in both directions."""
    near, far = await rig.open()
    return (near, far) if request.param == "to the servant" else (far, near)


async def collect(stream: rpc.ByteStream, size: int = 65536) -> bytes:
    data = bytearray()
    with contextlib.suppress(EndOfStream):
        while True:
            data += await stream.receive(size)
    return bytes(data)


async def ended(
    stream: rpc.ByteStream, error: type[WetwareError], match: str | None = None
) -> None:
    """Every method raises it."""
    with pytest.raises(error, match=match):
        await collect(stream)
    for again in (stream.receive, lambda: stream.send(b"x"), stream.send_eof):
        with pytest.raises(error, match=match):
            await again()


@pytest.mark.parametrize("piece", [1, 1000, 65536, 3 << 20])
async def test_bytes_arrive_in_order_and_the_end_behind_them(ends: Any, piece: int) -> None:
    writer, reader = ends
    data = os.urandom(min(3 << 20, piece * 5000))

    async def write() -> None:
        for at in range(0, len(data), piece):
            await writer.send(data[at : at + piece])
        await writer.send_eof()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(write())
        assert await collect(reader) == data
    with pytest.raises(EndOfStream):
        await reader.receive()
    with pytest.raises(ClosedResourceError):
        await writer.send(b"more")


@pytest.mark.parametrize("piece", [1000, 65536, 3 << 20])
async def test_a_buffer_is_filled_whatever_the_pieces(ends: Any, piece: int) -> None:
    """It is larger than the window, and what comes behind it waits for the next one."""
    writer, reader = ends
    data = os.urandom(min(5 << 20, piece * 3000) + 1)

    async def write() -> None:
        for at in range(0, len(data), piece):
            await writer.send(data[at : at + piece])
        await writer.send_eof()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(write())
        found = await reader.receive(10)
        count = size = WINDOW_BYTES + 12_345
        while count == size:
            count = await reader.receive_into(buffer := bytearray(size))
            found += buffer[:count]
    assert found == data
    assert await reader.receive_into(bytearray(1)) == 0
    with pytest.raises(EndOfStream):
        await reader.receive()


async def test_what_ends_a_stream_ends_the_filling_of_a_buffer(ends: Any) -> None:
    writer, reader = ends
    waiting = asyncio.create_task(reader.receive_into(bytearray(100)))
    await writer.send(b"some of it")
    await until(lambda: reader._into.nbytes == 90)
    writer.abort(NotFound("the disk is gone"))
    async with asyncio.timeout(60):
        with pytest.raises(NotFound, match="the disk is gone"):
            await waiting
        await ended(reader, NotFound, "the disk is gone")


async def test_small_pieces_travel_together(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = ends
    await writer.send(b"x")
    await reader.receive()
    frames = []
    send = writer._transport.send_frame
    monkeypatch.setattr(
        writer._transport, "send_frame", lambda *args: (frames.append(args[2]), send(*args))
    )
    for _ in range(1000):
        await writer.send(b"x" * 100)
    assert len(await BufferedByteReceiveStream(reader).receive_exactly(100_000)) == 100_000
    assert frames == [100_000]


async def test_anyio_s_buffered_streams_work_on_it(ends: Any) -> None:
    writer, reader = ends
    await writer.send(b"head\nbody")
    await writer.send_eof()
    lines = BufferedByteReceiveStream(reader)
    assert await lines.receive_until(b"\n", 100) == b"head"
    assert await lines.receive_exactly(4) == b"body"
    with pytest.raises(IncompleteRead):
        await lines.receive_exactly(1)


async def test_the_end_of_a_stream_without_bytes_arrives(rig: Rig) -> None:
    """Also where it is said before the other end can know the stream."""
    if rig.handed == "out":
        near = rpc.ByteStream((await rig.streams.open())["stream"])
    else:
        near = rpc.ByteStream()
        await rig.streams.give(stream=near.servant)
    await near.send_eof()
    far = rig.servant.opened[-1]
    async with asyncio.timeout(60):
        with pytest.raises(EndOfStream):
            await far.receive()
        await far.send(b"back")
        assert await near.receive() == b"back"


async def test_both_directions_at_once_and_half_close(rig: Rig) -> None:
    near, far = await rig.open()
    up, down = os.urandom(2 << 20), os.urandom(3 << 20)

    async def write(stream: rpc.ByteStream, data: bytes) -> None:
        await stream.send(data)
        await stream.send_eof()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(write(near, up))
        assert await collect(far) == up  # that direction is over, the other one begins
        group.create_task(write(far, down))
        assert await collect(near) == down
    await near.aclose()
    await far.aclose()


async def test_a_reader_that_stops_makes_the_writer_wait_and_nobody_else(
    ends: Any, rig: Rig
) -> None:
    writer, reader = ends
    written = 0

    async def write() -> None:
        nonlocal written
        while written < 16 << 20:
            await writer.send(bytes(100_000))
            written += 100_000
        await writer.send_eof()

    writing = asyncio.create_task(write())
    await until(lambda: reader._in.size == WINDOW_BYTES and writer._out.size > OUT_BYTES_MAX)
    await rig.streams.ping()  # calls pass it
    assert written <= HELD_MAX
    assert reader._in.size == WINDOW_BYTES
    assert not writing.done()
    async with asyncio.timeout(60):
        assert len(await collect(reader)) == written
        await writing


async def test_a_close_without_an_end_is_told_behind_the_last_bytes(ends: Any) -> None:
    writer, reader = ends
    await writer.send(b"cut of")
    async with asyncio.timeout(60):
        await writer.aclose()
        assert await reader.receive() == b"cut of"
        await ended(reader, Disconnected, "closed the stream|let go of")
    for call in (writer.receive, lambda: writer.send(b"x"), writer.send_eof):
        with pytest.raises(ClosedResourceError):
            await call()
    await writer.aclose()


async def test_a_close_behind_the_end_is_no_error(ends: Any) -> None:
    writer, reader = ends
    await writer.send(b"all")
    await writer.send_eof()
    async with asyncio.timeout(60):
        await writer.aclose()
        assert await collect(reader) == b"all"


async def test_closing_is_bounded(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = ends
    monkeypatch.setattr(bytestream, "CLOSE_S", 0.05)
    writing = asyncio.create_task(writer.send(bytes(8 << 20)))
    await until(lambda: reader._in.size == WINDOW_BYTES)
    async with asyncio.timeout(60):
        await writer.aclose()  # nobody reads
        with pytest.raises(ClosedResourceError):
            await writing
        with pytest.raises(Disconnected):
            await collect(reader)


async def test_an_error_reaches_the_other_end_with_its_code(ends: Any) -> None:
    writer, reader = ends
    waiting = asyncio.create_task(reader.receive())
    await asyncio.sleep(0)
    writer.abort(NotFound("the disk is gone", hint="find it", code="not_found.disk"))
    async with asyncio.timeout(60):
        with pytest.raises(NotFound) as info:
            await waiting
        assert (info.value.code, info.value.hint) == ("not_found.disk", "find it")
        await ended(reader, NotFound, "the disk is gone")
        await ended(writer, NotFound, "the disk is gone")
    writer.abort(Disconnected("another reason"))
    await ended(writer, NotFound, "the disk is gone")


async def test_revocation_ends_both_directions_at_once(rig: Rig) -> None:
    near, far = await rig.open()
    await near.send(b"unread")
    await far.send(b"unread")
    await until(lambda: near._in.size and far._in.size)
    waiting = asyncio.create_task(near.send(bytes(8 << 20)))
    await until(lambda: far._in.size == WINDOW_BYTES)
    rig.guard.end(Revoked("revoked by ada", hint="ask ada"))
    assert far._in.size == 0  # in this turn, not in some later one
    async with asyncio.timeout(60):
        await ended(far, Revoked, "by ada")
        with pytest.raises(Revoked, match="by ada"):
            await waiting
        await ended(near, Revoked, "by ada")
    assert rig.guard.callbacks == []


async def test_a_stream_that_is_idle_hears_of_a_revocation(rig: Rig) -> None:
    near, _ = await rig.open()
    waiting = asyncio.create_task(near.receive())
    await asyncio.sleep(0)
    rig.guard.end(Revoked("revoked by ada"))
    async with asyncio.timeout(60):
        with pytest.raises(Revoked, match="by ada"):
            await waiting


async def test_a_closed_stream_does_not_stay_with_its_grant(rig: Rig) -> None:
    near, far = await rig.open()
    await near.aclose()
    await far.aclose()
    assert rig.guard.callbacks == []


async def test_a_stream_that_is_made_as_its_grant_ends_is_over(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, made = rig.guard, rpc.ByteStream

    def late(*args: Any, **more: Any) -> rpc.ByteStream:
        guard.ended = Revoked("revoked by ada")
        return made(*args)

    near = rpc.ByteStream()
    monkeypatch.setattr(rpc, "ByteStream", late)
    with pytest.raises(Revoked):
        await (rig.streams.give(stream=near.servant) if rig.handed != "out" else rig.streams.open())
    async with asyncio.timeout(60):
        await ended(rig.servant.opened[-1], Revoked, "by ada")
        if rig.handed != "out":
            await ended(near, Revoked, "by ada")
    assert guard.callbacks == []


async def test_a_caller_that_does_not_listen_to_the_end_is_let_go(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(rpc.Servant, interface=rpc.WW.ByteStream):
        told = let_go = False

        async def attach(self, channel: int) -> dict[str, str]:
            return await asyncio.Event().wait()  # type: ignore[return-value]  # never

        async def abort(self, code: str, message: str, hint: str) -> None:
            self.told = True
            await asyncio.Event().wait()

        def released(self) -> None:
            self.let_go = True

    monkeypatch.setattr(bytestream, "CLOSE_S", 0.05)
    deaf = Deaf()
    await rig.streams.give(stream=deaf)
    rig.guard.end(Revoked("revoked by ada"))
    await until(lambda: deaf.told and deaf.let_go)


async def test_a_released_reference_ends_the_stream(rig: Rig) -> None:
    ref = (await rig.streams.open())["stream"]
    far = rig.servant.opened[-1]
    waiting = asyncio.create_task(far.receive())  # nobody attaches
    ref.close()
    async with asyncio.timeout(60):
        with pytest.raises(Disconnected, match="let go"):
            await waiting


async def test_a_lost_connection_ends_both(rig: Rig) -> None:
    near, far = await rig.open()
    await near.send(b"last")
    assert await far.receive() == b"last"
    await far.send(b"unread")
    await until(lambda: near._in.size)
    await rig.connection.aclose()
    async with asyncio.timeout(60):
        await ended(far, Disconnected)
        assert await near.receive() == b"unread"
        await ended(near, Disconnected)
        await near.aclose()
        await far.aclose()


async def test_a_lost_connection_is_the_reason_also_where_it_ends_the_grant(rig: Rig) -> None:
    """As it ends that of a session, which nobody holds any more. What has come is read first."""
    rig.servant.released = lambda: rig.guard.end(Revoked("closed"))  # type: ignore[method-assign]
    near, far = await rig.open()
    await near.send(b"last")
    await until(lambda: far._in.size)
    await rig.connection.aclose()
    async with asyncio.timeout(60):
        await until(lambda: rig.guard.ended)
        assert await far.receive() == b"last"
        await ended(far, Disconnected)


async def test_a_stream_that_passes_to_another_connection_is_carried_there(tmp_path: Path) -> None:
    """As an answer, and as a parameter; both ways, half-closed, to its end."""
    behind, front = Rig(tmp_path), Rig(tmp_path)
    data = os.urandom(3 * WINDOW_BYTES)
    async with behind.running("b"), front.running("f"), asyncio.timeout(60):
        front.servant.upstream = behind.streams
        theirs: list[tuple[rpc.ByteStream, rpc.ByteStream]] = []
        answered = rpc.ByteStream((await front.streams.far())["stream"])
        theirs.append((answered, behind.servant.opened.pop()))
        own = rpc.ByteStream()
        await front.streams.pass_on(stream=own.servant)
        theirs.append((own, behind.servant.opened.pop()))
        for near, far in theirs:
            for source, target in ((near, far), (far, near)):
                sending = asyncio.ensure_future(source.send(data))
                got = bytearray()
                while len(got) < len(data):
                    got += await target.receive()
                await sending
                await source.send_eof()
                with pytest.raises(EndOfStream):
                    await target.receive()
                assert got == data
            await far.aclose()
            await near.aclose()
    assert not bytestream._carriers


async def test_a_stream_that_comes_of_a_capability_of_another_connection_is_carried(
    tmp_path: Path,
) -> None:
    """Also where no guard is between the two: the capability itself was passed on."""
    behind, front = Rig(tmp_path), Rig(tmp_path)
    async with behind.running("b"), asyncio.timeout(60):

        class Passing(rpc.Servant, interface=rpc.WW.Granted):
            async def services(self) -> dict[str, Any]:
                return {"services": []}

            async def open(self, name: str) -> dict[str, Any]:
                return {"service": behind.streams, "interface": 0}

            async def export(self, name: str, cap: Any, interface: int) -> None: ...

        async with (
            rpc.serve_unix(front.path / "p", lambda _: Passing()),
            await rpc.connect_unix(front.path / "p") as connection,
        ):
            given = connection.bootstrap(rpc.WW.Granted)
            streams = (await given.open(name=""))["service"].cast(STREAMS.Streams)
            near = rpc.ByteStream((await streams.open())["stream"])
            await near.send(b"x")
            assert await behind.servant.opened[-1].receive() == b"x"


@pytest.mark.parametrize("at", ["behind", "front"])
async def test_the_end_of_a_carried_stream_is_told_at_both_ends(tmp_path: Path, at: str) -> None:
    behind, front = Rig(tmp_path), Rig(tmp_path)
    async with behind.running("b"), front.running("f"), asyncio.timeout(60):
        front.servant.upstream = behind.streams
        near = rpc.ByteStream((await front.streams.far())["stream"])
        far = behind.servant.opened.pop()
        await near.send(b"x")
        assert await far.receive() == b"x"
        ends, hears = (far, near) if at == "behind" else (near, far)
        ends.abort(NotFound("no more of it"))
        await ended(hears, NotFound)
    assert not bytestream._carriers


async def test_the_end_of_a_grant_cuts_a_carried_stream(tmp_path: Path) -> None:
    behind, front = Rig(tmp_path), Rig(tmp_path)
    async with behind.running("b"), front.running("f"), asyncio.timeout(60):
        front.servant.upstream = behind.streams
        near = rpc.ByteStream((await front.streams.far())["stream"])
        far = behind.servant.opened.pop()
        await near.send(b"x")
        assert await far.receive() == b"x"
        front.guard.end(Revoked("enough"))
        await ended(near, Revoked)
        await ended(far, WetwareError)


async def test_a_servant_s_stream_that_comes_back_is_the_same(rig: Rig) -> None:
    ref = (await rig.streams.open())["stream"]
    near = rpc.ByteStream((await rig.streams.take(stream=ref))["stream"])
    await near.send(b"x")
    assert await rig.servant.opened[-1].receive() == b"x"


async def test_over_a_link_stream(rig: Rig) -> None:
    from wetware.base.access import Access
    from wetware.base.multiaddr import Multiaddr
    from wetware.overlay.link import LinkHost
    from wetware.overlay.rpc_pipe import RpcPipe

    servant = StreamsServant()
    async with LinkHost(Key.generate()) as server, LinkHost(Key.generate()) as client:
        addrs = await server.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        server.handle("/streams", lambda s: rpc.serve(RpcPipe(s), servant), access=Access.PUBLIC)
        link = await client.dial([addrs[0].with_peer(server.peer_id)])
        async with (
            asyncio.timeout(60),
            await rpc.connect(RpcPipe(await link.open_stream("/streams"))) as connection,
        ):
            streams = connection.bootstrap(STREAMS.Streams)
            near = rpc.ByteStream((await streams.open())["stream"])
            far = servant.opened[-1]
            data = os.urandom(3 << 20)

            async def write() -> None:
                await near.send(data)
                await near.send_eof()

            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                assert await collect(far) == data


# --- who does not keep to the rules ---------------------------------------------------------------


Frames = list[tuple[int, int, bytes]]


@pytest.mark.parametrize(
    "frames",
    [
        [(DATA, WINDOW_BYTES + 1, bytes(WINDOW_BYTES + 1))],
        [(DATA, 100_000, bytes(100_000))] * 11,
        [(DATA, 0, b""), (DATA, 1, b"x")],
    ],
    ids=["long", "does not wait", "behind the end"],
)
@pytest.mark.parametrize("to_client", [False, True])
async def test_an_end_that_breaks_the_rules_is_cut_off(
    rig: Rig, frames: Frames, to_client: bool
) -> None:
    near, far = await rig.open()
    await until(lambda: far._transport)
    if to_client:
        near, far = far, near
    for kind, count, data in frames:
        near._transport.send_frame(kind, near._channel, count, data)
    await until(lambda: far._error)
    async with asyncio.timeout(60):
        await ended(far, InvalidArgument, "does not keep to its rules")
        await ended(near, InvalidArgument, "does not keep to its rules")
    await rig.streams.ping()  # what was on its way is dropped, and the connection goes on


@AWAY
async def test_frames_of_no_channel_are_dropped(rig: Rig) -> None:
    near, far = await rig.open()
    await until(lambda: far._transport)
    for kind in (DATA, GRANT):
        near._transport.send_frame(kind, near._channel ^ 1, 3, b"abc" if kind == DATA else b"")
    near._transport.send_frame(DATA, near._channel ^ 1, 0)
    await near.send(b"x")
    assert await far.receive() == b"x"
    await rig.streams.ping()


async def test_a_stream_is_attached_once(rig: Rig) -> None:
    ref = (await rig.streams.open())["stream"]
    near = rpc.ByteStream(ref)
    await near.send(b"x")
    await rig.servant.opened[-1].receive()
    with pytest.raises(InvalidArgument, match="attached once"):
        await ref.attach(channel=near._channel + 1)
    other = (await rig.streams.open())["stream"]
    with pytest.raises(InvalidArgument, match="there already"):
        await other.attach(channel=near._channel)
    await near.send(b"y")
    assert await rig.servant.opened[0].receive() == b"y"
    with pytest.raises(InvalidArgument, match="attached once"):
        await other.attach(channel=near._channel + 1)
    await ended(rig.servant.opened[-1], InvalidArgument, "there already")


@pytest.mark.parametrize("handed", ["out", "in"])
async def test_the_streams_of_a_connection_are_bounded_together(
    tmp_path: Path, handed: str
) -> None:
    """What a client makes a server hold that does not read, whichever of them makes the streams."""
    limits = rpc.RpcLimits(streams_max=3)
    async with Rig(tmp_path, handed=handed).running(limits=limits) as rig:
        pairs = [await rig.open() for _ in range(3)]
        writing = [asyncio.create_task(near.send(bytes(3 << 20))) for near, _ in pairs]
        with pytest.raises(LimitExceeded, match="3 byte streams are open: streams_max is 3"):
            await rig.open()
        await until(lambda: all(far._in.size == WINDOW_BYTES for _, far in pairs))
        assert len(rig.servant.opened) == 3
        assert sum(far._in.size for far in rig.servant.opened) == 3 * WINDOW_BYTES
        await pairs[0][1].aclose()
        await until(lambda: pairs[0][0]._error)
        near, far = await rig.open()  # in the place of the one that is over
        await near.send(b"x")
        assert await far.receive() == b"x"
        for task in writing:
            task.cancel()
        await asyncio.gather(*writing, return_exceptions=True)


async def test_streams_that_are_not_attached_count(tmp_path: Path) -> None:
    """A service writes into them meanwhile."""
    async with Rig(tmp_path).running(limits=rpc.RpcLimits(streams_max=3)) as rig:
        refs = [(await rig.streams.open())["stream"] for _ in range(3)]
        with pytest.raises(LimitExceeded, match="streams_max is 3"):
            await rig.streams.open()
        assert len(rig.servant.opened) == 3
        refs[0].close()
        await until(lambda: rig.servant.opened[0]._error)
        near, far = await rig.open()
        await near.send(b"x")
        assert await far.receive() == b"x"


async def test_a_stranger_has_no_streams() -> None:
    ours, theirs = socket.socketpair()
    servant = StreamsServant()
    serving = asyncio.create_task(
        rpc.serve(SocketPipe(ours), servant, stranger_message_bytes_max=64 << 10)
    )
    async with asyncio.timeout(60), await rpc.connect(SocketPipe(theirs)) as connection:
        streams = connection.bootstrap(STREAMS.Streams)
        with pytest.raises(LimitExceeded, match="streams_max is 0"):
            await streams.open()
        with pytest.raises(LimitExceeded, match="streams_max is 0"):
            await streams.give(stream=rpc.ByteStream().servant)
        await streams.trust()
        near = rpc.ByteStream((await streams.open())["stream"])
        await near.send(b"x")
        assert await servant.opened[-1].receive() == b"x"
    await serving


@AWAY
async def test_bytes_are_charged_and_judged(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both what the server's end takes and what it gives, before it does."""
    near, far = await rig.open()
    charged: list[int] = []

    def charge(method: rpc.Method, count: int) -> None:
        charged.append(count)
        if sum(charged) > 1000:
            raise LimitExceeded("no bytes are left", code="limit.quota")

    monkeypatch.setattr(rig.guard, "charge", charge)
    monkeypatch.setattr(Grant, "metered", True)
    await near.send(bytes(400))
    assert await far.receive() == bytes(400)
    await far.send(bytes(600))
    assert await near.receive() == bytes(600)
    assert charged == [400, 600]
    with pytest.raises(LimitExceeded):
        await far.send(b"x")
    async with asyncio.timeout(60):
        with pytest.raises(LimitExceeded, match="no bytes are left") as info:
            await near.receive()
    assert info.value.code == "limit.quota"


async def test_what_was_written_before_it_was_attached_is_charged_then(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    monkeypatch.setattr(rig.guard, "charge", lambda _, count: charged.append(count))
    ref = (await rig.streams.open())["stream"]
    await rig.servant.opened[-1].send(bytes(700))
    monkeypatch.setattr(Grant, "metered", True)
    near = rpc.ByteStream(ref)
    assert await near.receive() == bytes(700)
    assert 700 in charged


async def test_a_cancelled_receive_loses_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = await rig.open()
    await near.send(b"abc")
    await until(lambda: far._in.size)
    monkeypatch.setattr(Grant, "metered", True)
    monkeypatch.setattr(rig.guard, "charge", lambda *_: asyncio.Event().wait())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await far.receive()
    monkeypatch.setattr(rig.guard, "charge", lambda *_: None)
    assert await far.receive() == b"abc"


async def test_many_streams_do_not_fill_the_connection_together(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them looks at what waits, also at what the others have written in this turn."""
    pairs = [await rig.open() for _ in range(20)]
    transport = pairs[0][0]._transport
    await until(lambda: all(near._may_send == WINDOW_BYTES for near, _ in pairs))
    for near, _ in pairs:
        near._out.put(bytes(WINDOW_BYTES // 2))
        near._pump()
    assert transport.unsent_bytes <= OUT_BYTES_MAX + WINDOW_BYTES
    for near, far in pairs:
        await near.send_eof()
        assert len(await collect(far)) == WINDOW_BYTES // 2


async def test_nothing_passes_while_the_grant_is_blocked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = await rig.open()
    await near.send(b"x")
    assert await far.receive() == b"x"
    await near.send(b"unread")
    await until(lambda: far._in.size)
    monkeypatch.setattr(Grant, "blocked", Expired("the clock is wrong"))
    with pytest.raises(Expired):
        await far.receive()
    async with asyncio.timeout(60):
        with pytest.raises(Expired, match="clock is wrong"):
            await near.receive()


# --- what it costs --------------------------------------------------------------------------------


def test_a_command_does_not_pay_for_it() -> None:
    code = (
        "import sys, wetware.client, wetware.client.cluster; from wetware import rpc; "
        "assert 'anyio' not in sys.modules; rpc.ByteStream; assert 'anyio.abc' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
