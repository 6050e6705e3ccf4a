"""Link connections and streams in the shapes that py-libp2p 0.8.1 expects, inside the trio guest.

libp2p gets an `IMuxedConn` per link connection, and `IMuxedStream`s of it. It never sees a socket,
and it can end streams of its own only: a connection belongs to the link. What it uses beyond its
interfaces: `get_remote_address`, `swarm`, `on_close` and `remove_stream` on the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from multiaddr import Multiaddr as LibAddr

from wetware.base.multiaddr import Multiaddr
from wetware.errors import OverlayError, StreamReset, WetwareError

if TYPE_CHECKING:
    from types import TracebackType

    from wetware.overlay.link import Connection, Stream

T = TypeVar("T")


async def on_host(
    coroutine: Coroutine[Any, Any, T], *, drop: Callable[[T], object] = lambda _: None
) -> T:
    """Run a coroutine on the asyncio loop and wait for it in trio; cancellation goes through.

    `drop` gets a result that came too late: the wait for it was cancelled in the same moment.
    """
    done = trio.Event()
    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(lambda _: done.set())

    def too_late(task: asyncio.Task[T]) -> None:
        if not task.cancelled() and task.exception() is None:
            drop(task.result())

    try:
        await done.wait()
    except BaseException:
        task.cancel()
        task.add_done_callback(too_late)
        raise
    if task.cancelled():
        raise OverlayError("the operation was cancelled by the link")
    return task.result()


def to_link_addr(addr: LibAddr) -> Multiaddr | None:
    """The address as the link knows it, or None if it cannot dial it (relays, UDP, junk)."""
    try:
        found = Multiaddr.parse(str(addr))
    except (WetwareError, ValueError, LookupError, TypeError):
        return None
    # Relays of libp2p speak another protocol: to dial them would be in vain.
    return found if found.relay is None else None


class GuestStream(IMuxedStream):
    """One stream, its protocol agreed on by the link.

    Attributes:
        done: libp2p is done with it, or it was reset.
    """

    def __init__(self, stream: Stream, conn: GuestConn) -> None:
        self.link_stream, self.muxed_conn = stream, conn
        self.stream_id, self.is_initiator = stream.id, stream.initiator
        self.done = asyncio.Event()
        self._received = bytearray()
        self._ended = False
        self._error: Exception | None = None
        # A reader and a writer may wait at the same time; both look again when something happened.
        self._waiting = trio.lowlevel.ParkingLot()
        conn.streams.add(self)
        stream.attach(self._on_data, self._on_end, self._wake)

    def _on_data(self, data: bytes | bytearray | memoryview) -> None:
        self._received += data
        self._wake()

    def _on_end(self, error: Exception | None) -> None:
        self._ended, self._error = True, error
        if error is not None:
            self._forget()
        self._wake()

    def _wake(self) -> None:
        self._waiting.unpark_all()

    async def read(self, n: int | None = None) -> bytes:
        """Some bytes, at most `n`; raises MuxedStreamEOF at the end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._received and n != 0:
            if self._error is not None:
                raise MuxedStreamReset(str(self._error)) from self._error
            if self._ended:
                raise MuxedStreamEOF("the peer closed its side")
            await self._waiting.park()
        data = bytes(self._received[:n])
        del self._received[: len(data)]
        self.link_stream.consumed(len(data))
        return data

    async def write(self, data: bytes) -> None:
        """Returns when the link has taken everything."""
        await trio.lowlevel.checkpoint_if_cancelled()
        left = memoryview(bytes(data))
        try:
            while left:
                left = left[self.link_stream.write_nowait(left) :]
                if left:
                    await self._waiting.park()
        except StreamReset as exc:
            self._forget()
            raise MuxedStreamReset(str(exc)) from exc
        except OverlayError as exc:
            raise MuxedStreamClosed(str(exc)) from exc

    async def close(self) -> None:
        """libp2p is done with the stream: our side ends, what still comes is discarded."""
        self._forget()
        self.link_stream.finish()

    async def close_write(self) -> None:
        """End our side; the peer's is still readable."""
        self.link_stream.close()

    async def reset(self) -> None:
        self.drop()

    def drop(self) -> None:
        """`reset`, from any context."""
        self._forget()
        self.link_stream.reset()

    def abandon(self) -> None:
        """Reset the stream when no trio task can be woken any more."""
        self.link_stream.detach()
        self.link_stream.reset()
        self._forget()

    def _forget(self) -> None:
        self.done.set()
        self.muxed_conn.streams.discard(self)

    def set_deadline(self, ttl: int) -> None:
        """Not offered: trio's cancel scopes bound every use."""
        raise NotImplementedError

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> GuestStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()


class GuestConn(IMuxedConn):
    """One link connection: it ends for libp2p with the link's, or when libp2p lets go of it."""

    negotiated_security_protocol = "/noise"
    negotiated_muxer_protocol = "/yamux/1.0.0"

    def __init__(self, connection: Connection, *, waiting_max: int) -> None:
        self.link_conn = connection
        self.peer_id = ID(connection.peer.multihash)
        self.event_started = trio.Event()
        self.settled = trio.Event()  # libp2p has it in its table, or has refused it
        self.on_close: Callable[[], Awaitable[None]] | None = None  # set by SwarmConn
        self.streams: set[GuestStream] = set()
        self._released = trio.Event()
        self._send, self._receive = trio.open_memory_channel[GuestStream](waiting_max)

    @property
    def is_initiator(self) -> bool:
        return self.link_conn.initiator

    @property
    def is_established(self) -> bool:
        """True until it is closed: the link hands over finished connections."""
        return not self.is_closed

    @property
    def is_closed(self) -> bool:
        return self._released.is_set() or self.link_conn.closed

    def get_remote_address(self) -> tuple[str, int] | None:
        remote = self.link_conn.remote
        return (remote.host, remote.port) if remote.kind in ("ip4", "ip6") else None

    def get_transport_addresses(self) -> list[LibAddr]:
        return [LibAddr(str(self.link_conn.remote.with_peer(None)))]

    def get_connection_type(self) -> ConnectionType:
        relayed = self.link_conn.tunnelled
        return ConnectionType.RELAYED if relayed else ConnectionType.DIRECT

    async def start(self) -> None:
        """Run until the connection is over; libp2p runs this as a task."""
        self.event_started.set()
        await self._released.wait()
        if self.on_close is not None:
            await self.on_close()

    async def wait_over(self) -> None:
        """Return when the connection is over, for libp2p."""
        await self._released.wait()

    async def offer(self, stream: Stream) -> None:
        """Give an inbound stream to libp2p, and wait until that is done with it.

        Resets the stream if libp2p does not keep up.
        """
        guest_stream = GuestStream(stream, self)
        try:
            self._send.send_nowait(guest_stream)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            guest_stream.drop()
        await guest_stream.done.wait()

    async def accept_stream(self) -> GuestStream:
        """The next inbound stream; raises MuxedConnUnavailable when the connection is over."""
        try:
            return await self._receive.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise MuxedConnUnavailable("the connection is over") from None

    async def open_stream(self) -> NoReturn:
        """Refused: streams are opened for a protocol, see `open_for`."""
        raise MuxedStreamError("a stream is opened for a protocol (Host.new_stream)")

    async def open_for(self, protocols: tuple[str, ...]) -> GuestStream:
        """A new stream for the first of `protocols` that the peer speaks.

        Raises ProtocolRefused, StreamReset, LimitExceeded.
        """
        opening = self.link_conn.open_stream(*protocols)
        stream = await on_host(opening, drop=lambda late: late.reset())
        if self.is_closed:
            stream.reset()
            raise MuxedConnUnavailable("the connection is over")
        return GuestStream(stream, self)

    async def close(self) -> None:
        """libp2p lets go of the connection. The TCP connection is the link's and stays."""
        self.release()

    def release(self) -> None:
        """End the connection for libp2p, and the streams that are libp2p's. From any context."""
        if self._released.is_set():
            return
        self._released.set()
        self.settled.set()
        self._send.close()
        for stream in tuple(self.streams):
            stream.drop()

    def abandon(self) -> None:
        """The guest has ended: reset its streams without touching trio."""
        for stream in tuple(self.streams):
            stream.abandon()
        self.streams.clear()
