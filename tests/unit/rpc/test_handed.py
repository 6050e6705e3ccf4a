"""Files that are handed in instead of their bytes, and descriptors that nobody asked for."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import InvalidArgument, Revoked
from wetware.identity import Key
from wetware.rpc import handed
from wetware.rpc.framing import FILE, FRAME, GRANT, LENGTH
from wetware.rpc.handed import FILES_MAX, Handed
from wetware.rpc.pipes import SocketPipe

from .conftest import until
from .test_bytestream import STREAMS, Rig, StreamsServant, collect, ended
from .test_guard import Grant

pytestmark = pytest.mark.anyio

DATA = os.urandom(300_000)


async def in_thread(function: Callable[..., Any], *args: object) -> Any:
    return await asyncio.to_thread(function, *args)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One on a disk, wherever the tests have their directories."""
    monkeypatch.setattr(handed, "_on_disk", lambda _: True)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """Its servant takes files."""
    async with Rig(tmp_path).running() as made:
        made.servant.run_sync = in_thread
        yield made


class Watched:
    """A descriptor of which this test sees when the last copy of it is closed."""

    def __init__(self) -> None:
        self._end, self.fd = os.pipe()
        os.set_blocking(self._end, False)

    def close(self) -> None:
        os.close(self.fd)

    async def gone(self) -> None:
        def closed() -> bool:
            try:
                return os.read(self._end, 1) == b""
            except BlockingIOError:
                return False

        await until(closed)
        os.close(self._end)


def opened(path: Path) -> int:
    """How many descriptors of it this process has."""
    found = Path("/proc/self/fd").iterdir()
    return sum(fd.is_symlink() and os.readlink(fd) == str(path) for fd in found)


def frame(channel: int, length: int = 10) -> bytes:
    return FRAME.pack(FILE, LENGTH.size, channel) + LENGTH.pack(length)


def send(stream: rpc.ByteStream, data: bytes, *fds: int) -> None:
    """Past all rules, as a client of another make could."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
    transport: Any = stream._transport
    transport._pipe._sock.sendmsg([data], rights)


async def give(path: Path, near: rpc.ByteStream, length: int) -> bool:
    with path.open("rb") as source:
        return await near.send_file(source.fileno(), length)


async def test_a_file_is_received_as_its_bytes_and_closed(rig: Rig, file: Path) -> None:
    near, far = await rig.open()
    assert await give(file, near, len(DATA))
    assert await far.receive(1000) == DATA[:1000]
    buffer = bytearray(100_000)
    assert await far.receive_into(buffer) == len(buffer)
    assert buffer == DATA[1000:101_000]
    assert await collect(far) == DATA[101_000:]
    assert not await far.receive_into(buffer)
    await far.send(b"the other direction goes on")
    assert await near.receive() == b"the other direction goes on"
    await asyncio.gather(near.aclose(), far.aclose())
    await until(lambda: not opened(file))  # the thread that read it may let go of it a moment later


async def test_what_was_sent_before_it_comes_first(rig: Rig, file: Path) -> None:
    near, far = await rig.open()
    await near.send(b"head")
    await until(lambda: far._in.size)
    assert await give(file, near, len(DATA))
    buffer = bytearray(1 << 20)
    assert await far.receive_into(buffer) == 4 + len(DATA)
    assert buffer.startswith(b"head" + DATA)


async def test_several_at_once_do_not_change_places(rig: Rig, tmp_path: Path, file: Path) -> None:
    pairs = [await rig.open() for _ in range(8)]
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 1000)
    given = [give(tmp_path / str(n), near, 1000) for n, (near, _) in enumerate(pairs)]
    assert all(await asyncio.gather(*given))
    for number, (_, far) in enumerate(pairs):
        assert await collect(far) == bytes([number]) * 1000


async def test_it_is_read_in_threads_while_the_loop_goes_on(rig: Rig, file: Path) -> None:
    reading, go_on = threading.Event(), threading.Event()

    async def slow(function: Callable[..., Any], *args: object) -> Any:
        def call() -> Any:
            reading.set()
            assert go_on.wait(60)
            return function(*args)

        return await asyncio.to_thread(call)

    rig.servant.run_sync = slow
    near, far = await rig.open()
    assert await give(file, near, len(DATA))
    receiving = asyncio.create_task(far.receive())
    await until(reading.is_set)
    await rig.streams.ping()
    assert not receiving.done()
    go_on.set()
    assert DATA.startswith(await receiving)


async def test_a_revocation_stops_the_reading_at_once(rig: Rig, file: Path) -> None:
    go_on, read = asyncio.Event(), list[object]()

    async def slow(function: Callable[..., Any], *args: object) -> Any:
        read.append(args)
        await go_on.wait()
        return function(*args)

    rig.servant.run_sync = slow
    near, far = await rig.open()
    assert await give(file, near, len(DATA))
    receiving = asyncio.create_task(far.receive())
    await until(lambda: read)
    rig.guard.end(Revoked("taken back"))
    await ended(near, Revoked, "taken back")
    go_on.set()
    with pytest.raises(Revoked, match="taken back"):
        await receiving
    await ended(far, Revoked, "taken back")
    assert len(read) == 1
    del receiving
    await until(lambda: not opened(file))


async def test_its_bytes_are_charged_before_they_are_read(
    rig: Rig, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    monkeypatch.setattr(Grant, "metered", True)
    monkeypatch.setattr(Grant, "charge", lambda _, method, count: charged.append(count))
    near, far = await rig.open()
    assert await give(file, near, len(DATA))
    await far.receive(1000)
    assert charged[1:] == [1000]  # behind the call that opened it


# --- a file that changes --------------------------------------------------------------------------


async def test_one_that_grows_is_what_it_was(rig: Rig, file: Path) -> None:
    near, far = await rig.open()
    assert await give(file, near, len(DATA))
    with file.open("ab") as more:
        more.write(b"more")
    assert await collect(far) == DATA


async def test_one_that_shrinks_is_no_shorter_file(rig: Rig, file: Path) -> None:
    near, far = await rig.open()
    assert await give(file, near, len(DATA))
    await far.receive(1000)
    os.truncate(file, 2000)
    for end in (far, near):
        await ended(end, InvalidArgument, "became shorter while it was read")


async def test_one_that_cannot_be_read_is_told(
    rig: Rig, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Handed, "read_into", broken)
    near, far = await rig.open()
    assert await give(file, near, len(DATA))
    for end in (far, near):
        await ended(end, InvalidArgument, "cannot be read: Input/output error")


# --- where bytes are sent -------------------------------------------------------------------------


async def test_what_is_no_regular_file_of_a_disk_is_sent_as_bytes(
    rig: Rig, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = await rig.open()
    ends = os.pipe()
    no_files = [
        *ends,
        os.open(tmp_path, os.O_RDONLY),
        os.open(file, os.O_WRONLY),
        os.open(file, os.O_PATH),
        os.open("/dev/zero", os.O_RDONLY),
    ]
    for fd in no_files:
        assert not await near.send_file(fd, 10)
        os.close(fd)
    monkeypatch.undo()
    assert not await give(Path("/proc/self/status"), near, 10)  # of a program: the kernel
    await near.send(b"bytes")
    assert await far.receive() == b"bytes"


@pytest.mark.parametrize("handed_how", ["takes none", "in", "back"])
async def test_a_stream_that_takes_no_file(tmp_path: Path, file: Path, handed_how: str) -> None:
    how = "out" if handed_how == "takes none" else handed_how
    async with Rig(tmp_path, handed=how).running() as rig:
        near, far = await rig.open()
        assert not await give(file, near, len(DATA))
        await near.send(b"bytes")
        assert await far.receive() == b"bytes"


async def test_over_a_network_there_are_no_files(rig: Rig, file: Path) -> None:
    from wetware.base.access import Access
    from wetware.base.multiaddr import Multiaddr
    from wetware.overlay.link import LinkHost
    from wetware.overlay.rpc_pipe import RpcPipe

    servant = rig.servant
    async with LinkHost(Key.generate()) as server, LinkHost(Key.generate()) as client:
        addrs = await server.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        server.handle("/streams", lambda s: rpc.serve(RpcPipe(s), servant), access=Access.PUBLIC)
        link = await client.dial([addrs[0].with_peer(server.peer_id)])
        async with await rpc.connect(RpcPipe(await link.open_stream("/streams"))) as connection:
            streams = connection.bootstrap(STREAMS.Streams)
            near = rpc.ByteStream((await streams.open())["stream"])
            assert not await give(file, near, len(DATA))
            near._file_taken = True  # a server that says it takes one
            assert not await give(file, near, len(DATA))
            assert near._transport is not None
            near._transport.send_frame(FILE, near._channel, LENGTH.size, LENGTH.pack(10))
            await ended(near, InvalidArgument, "no file that is read here")


# --- descriptors of who does not keep to the rules ------------------------------------------------


async def test_what_is_no_file_to_read_is_refused_and_closed(
    rig: Rig, tmp_path: Path, file: Path
) -> None:
    for path, flags in ((file, os.O_WRONLY), (file, os.O_PATH), (tmp_path, os.O_RDONLY)):
        near, _ = await rig.open()
        fd = os.open(path, flags)
        send(near, frame(near._channel), fd)
        os.close(fd)
        await ended(near, InvalidArgument, "no file that is read here")
        await until(lambda path=path: not opened(path))
    near, _ = await rig.open()
    pipe = Watched()
    send(near, frame(near._channel), pipe.fd)
    pipe.close()
    await ended(near, InvalidArgument, "no file that is read here")
    await pipe.gone()


async def test_a_file_without_its_descriptor_or_behind_the_end(rig: Rig, file: Path) -> None:
    near, _ = await rig.open()
    send(near, frame(near._channel))
    await ended(near, InvalidArgument, "no file that is read here")
    near, far = await rig.open()
    await near.send_eof()
    await until(lambda: far._in.ended)
    with file.open("rb") as source:
        send(near, frame(near._channel), source.fileno())
    await ended(near, InvalidArgument, "no file that is read here")


@pytest.mark.parametrize("cut", [0, 1, 8, 15, 16, 23])
async def test_a_frame_that_comes_in_two_parts_has_its_file(rig: Rig, file: Path, cut: int) -> None:
    near, far = await rig.open()
    data = frame(near._channel)
    with file.open("rb") as source:
        send(near, data[: cut + 1], source.fileno())
    await asyncio.sleep(0.01)
    if cut < 23:
        send(near, data[cut + 1 :])
    assert await collect(far) == DATA[:10]


@pytest.mark.parametrize("waits", ["no stream", "a sandbox"])
async def test_a_descriptor_that_nobody_waits_for_is_closed(
    tmp_path: Path, rig: Rig, waits: str
) -> None:
    pipe = Watched()
    if waits == "no stream":
        rig.servant.run_sync = None
        near, _ = await rig.open()
        send(near, FRAME.pack(GRANT, 1, near._channel ^ 1), pipe.fd)
        pipe.close()
        await pipe.gone()
        await rig.streams.ping()
        return
    ours, theirs = socket.socketpair()
    servant = StreamsServant()
    servant.run_sync = in_thread
    serving = asyncio.create_task(rpc.serve(SocketPipe(ours), servant))
    async with await rpc.connect(SocketPipe(theirs)) as connection:
        streams = connection.bootstrap(STREAMS.Streams)
        near = rpc.ByteStream((await streams.open())["stream"])
        await until(lambda: near._met)
        send(near, frame(near._channel), pipe.fd)
        pipe.close()
        await pipe.gone()
        await ended(near, InvalidArgument, "no file that is read here")
        await streams.ping()
    await serving


async def test_descriptors_without_a_frame_are_bounded_and_closed(rig: Rig) -> None:
    """One that waits for a frame is closed with the connection; too many of them end it."""
    near, far = await rig.open()
    pipe = Watched()
    nothing = frame(near._channel ^ 1)  # of a channel that is over, which takes one away
    send(near, nothing, pipe.fd, pipe.fd)
    transport: Any = far._transport
    await until(lambda: len(transport._files) == 1)
    for _ in range(FILES_MAX):
        send(near, nothing, pipe.fd, pipe.fd)
    pipe.close()
    await until(lambda: far._error)
    await pipe.gone()
    assert not transport._files


async def test_descriptors_that_were_lost_end_the_connection(rig: Rig) -> None:
    """More than are taken at a time, or than the process may have: which, nobody can say."""
    near, far = await rig.open()
    pipe = Watched()
    send(near, frame(near._channel), *[pipe.fd] * (FILES_MAX + 1))
    pipe.close()
    await pipe.gone()
    await until(lambda: far._error)
