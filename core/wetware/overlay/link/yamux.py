"""yamux/1.0.0: many streams on one connection, each with its own window. No sockets in here.

A `Session` eats plaintext (`feed`) and yields frames (`pull`); applications hold `Stream`s.
Control frames leave before data, urgent streams before ordinary ones; streams with data take turns,
one frame each, so that a bulk transfer does not starve small messages. Receive windows are
enforced, and everything that a peer can make this side hold is counted against a named limit.
Source: https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import asyncio
import math
import struct
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from wetware.base.bounds import TokenBucket
from wetware.base.log import get_logger
from wetware.errors import LimitExceeded, OverlayError, StreamReset
from wetware.overlay.link.limits import YAMUX_WINDOW_BYTES, LinkLimits, Violation
from wetware.overlay.link.multistream import Proposer

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import PeerId

log = get_logger("link.yamux")

Bytes: TypeAlias = bytes | bytearray | memoryview

HEADER = struct.Struct("!BBHII")  # version, type, flags, stream, length
HEADER_BYTES = 12
DATA, WINDOW, PING, GOAWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
FRAME_BYTES = 64 << 10
"""Of data in one frame sent: a stream's turn. js and go accept more, rust up to 1 MiB."""

_COALESCE_BYTES = 1024  # a smaller chunk joins the one before it: bounds the overhead per byte
_COALESCED_BYTES_MAX = 16 << 10
_WINDOW_MAX = 0xFFFFFFFF
_GROWTH_RTTS = 2  # 1 would do on a path without jitter
_CREDIT_SHIFT = 3  # a window comes back by eighths: what is kept longer, the sender waits for

_pack = HEADER.pack
GOAWAY_FRAME = _pack(0, GOAWAY, 0, 0, 0)
_unpack_from = HEADER.unpack_from


class Connection(ABC):
    """An authenticated, encrypted, multiplexed connection to one peer.

    Made by a `LinkHost`: by the time others see it, it is established.

    Attributes:
        peer: Who is at the other end, proven in the handshake.
        remote: The peer's address, with its peer ID; through the relay if `tunnelled`.
        tunnelled: Whether somebody else carries its bytes.
        local: This end's address.
        initiator: Whether this side dialled.
        channel_binding: 32 bytes, equal at both ends and unique to this connection (the Noise
            handshake hash): what a login is bound to.
        closed: Whether it has ended, or is about to.
        error: Why it ended; None while it is open and after a `close()` here.
        bytes_in: TCP payload received.
        bytes_out: TCP payload handed to TCP.
        opened_at: Loop time at which it was established.
    """

    peer: PeerId
    remote: Multiaddr
    tunnelled: bool
    local: Multiaddr
    initiator: bool
    channel_binding: bytes
    closed: bool
    error: Exception | None
    bytes_in: int
    bytes_out: int
    opened_at: float
    _session: Session

    async def open_stream(self, *protocols: str) -> Stream:
        """Open a stream for the first of `protocols` that the peer accepts.

        Raises ProtocolRefused (the peer speaks none of them, or not with this node), StreamReset
        (the connection is closing), OverlayError "overlay.timeout" after `negotiation_s`,
        LimitExceeded.
        """
        proposer = Proposer(protocols)
        stream = self._session.open()
        try:
            stream.write_nowait(proposer.start())
            async with asyncio.timeout(self._session.limits.negotiation_s):
                while proposer.chosen is None:
                    data = await stream.read()
                    if not data:
                        raise StreamReset(  # noqa: TRY301  # handled as one that the stream raises
                            "the peer closed the stream before a protocol was agreed"
                        )
                    reply = proposer.receive(data)
                    if reply:
                        stream.write_nowait(reply)
        except TimeoutError:
            stream.reset()
            raise OverlayError(
                f"the peer did not answer for {protocols[0]!r} within "
                f"{self._session.limits.negotiation_s:g} s",
                code="overlay.timeout",
            ) from None
        except Violation as exc:
            self.abort(exc)
            raise
        except BaseException:
            stream.reset()
            raise
        stream.unread(proposer.rest())
        stream.protocol = proposer.chosen
        return stream

    @property
    def address(self) -> str:
        """Whose it is that limits for strangers count: the peer's address, or the relay's ID."""
        return self.remote.relay or self.remote.host

    @property
    def rtt_s(self) -> float:
        """The shortest round trip measured; infinite before the first."""
        return self._session.rtt_s

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The open streams, both ways."""
        return tuple(self._session.streams.values())

    @property
    def in_use(self) -> bool:
        """Whether a stream is open, either way, or a handler still works for one."""
        session = self._session
        return bool(session.streams_in or session.streams_out)

    @property
    @abstractmethod
    def superseded(self) -> bool:
        """Whether this one is carried and a direct one, or one over a better relay, is there.

        Who keeps a stream on it opens another, which takes that one, and finishes the old stream.
        """

    @property
    @abstractmethod
    def accepts_streams(self) -> bool:
        """Whether streams can be opened: neither end has begun to close."""

    @abstractmethod
    def close(self) -> None:
        """End gracefully: send what is queued, say goodbye, close. Idempotent, returns at once.

        What the peer's windows do not admit is dropped; after `close_s` so is the rest. Streams end
        with StreamReset for readers here. `wait_closed` waits for the end.
        """

    @abstractmethod
    async def wait_closed(self) -> None:
        """Return once the connection has ended, whoever ended it."""

    @abstractmethod
    def abort(self, reason: Exception) -> None:
        """End now, dropping what is queued."""

    @abstractmethod
    def flush(self) -> None:
        """Send what is queued now, not at the end of the loop turn.

        For a caller that has joined its small writes itself: the peer works on the first of them
        while the next are made.
        """


class Stream:
    """One bidirectional byte stream to a peer. Made by a connection, or handed to a handler.

    Two faces, not to be mixed for one direction at a time:

    - **Coroutines**: `read`, `read_exactly`, `write`. One task reads at a time; writers queue.
    - **Callbacks**: `attach` pushes what arrives, which is the cheapest, and `write_nowait`.

    A stream ends for good when both sides have said FIN (`close` on this one), or at a reset.
    `close` alone leaves the peer's direction open: read to the end, `finish()`, or `reset()`.
    As a context manager, it is finished at the end of the block, or reset by an exception.

    Attributes:
        id: The yamux stream ID.
        connection: The connection that carries it.
        protocol: What both ends agreed on; "" before that.
        initiator: Whether this side opened it.
    """

    __slots__ = (
        "_discard",
        "_fin",
        "_fin_sent",
        "_grown",
        "_half_at",
        "_half_bytes",
        "_held",
        "_holds",
        "_in",
        "_linger",
        "_on_data",
        "_on_end",
        "_on_writable",
        "_out",
        "_out_bytes",
        "_queued",
        "_read_closed",
        "_reader",
        "_recv_window",
        "_reset",
        "_send_window",
        "_session",
        "_target",
        "_uncredited",
        "_urgent",
        "_want",
        "_writers",
        "connection",
        "id",
        "initiator",
        "protocol",
    )

    def __init__(self, session: Session, stream_id: int, *, initiator: bool) -> None:
        self._session = session
        self.connection: Connection = session.connection
        self.id, self.initiator = stream_id, initiator
        self.protocol = ""
        # receiving
        self._in: deque[Bytes] = deque()
        self._held = 0  # bytes received and not consumed
        self._recv_window = YAMUX_WINDOW_BYTES  # what the peer may still send
        self._target = YAMUX_WINDOW_BYTES  # what the window is restored to
        self._grown = 0  # of the target, what the session booked
        self._uncredited = 0  # consumed and not yet given back to the peer
        self._half_bytes = 0  # given back since half a window was the last time
        self._half_at = -math.inf  # loop time of that
        self._read_closed = False  # FIN came, or the stream was reset
        self._discard = False  # nobody will read any more
        self._reader: asyncio.Future[None] | None = None
        self._on_data: Callable[[Bytes], None] | None = None
        self._on_end: Callable[[Exception | None], None] | None = None
        # sending
        self._out: deque[bytes | memoryview] = deque()
        self._out_bytes = 0
        self._send_window = YAMUX_WINDOW_BYTES
        self._queued = False  # whether it is in one of the session's rings
        self._urgent = False
        self._want = False  # a writer got less than it asked for
        self._fin = self._fin_sent = False
        self._writers: deque[asyncio.Future[None]] = deque()
        self._on_writable: Callable[[], None] | None = None
        # ending
        self._reset: Exception | None = None
        self._holds = 1  # the table, and for inbound streams the handler
        self._linger: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Stream {self.id} {self.protocol or '-'} {self.connection.peer.short}>"

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""
        return self.connection.peer

    @property
    def ended(self) -> bool:
        """Whether it is over: reset, or both sides closed and all that came was taken."""
        return self._reset is not None or (self._read_closed and self._fin_sent and not self._in)

    @property
    def closing(self) -> bool:
        """Whether this side was closed or the stream was reset: nothing can be written."""
        return self._fin

    @property
    def urgent(self) -> bool:
        """Whether what this side sends on it goes before the data of ordinary streams.

        For small messages that must not wait behind a transfer, such as membership probes. It may
        be set at any time, also for what is queued already. Per flush of the connection, urgent
        streams together send at most `urgent_flush_bytes_max` ahead of the others. The peer decides
        for its own direction.
        """
        return self._urgent

    @urgent.setter
    def urgent(self, urgent: bool) -> None:
        if urgent == self._urgent:
            return
        if self._queued:
            self._session.ring_of(self).remove(self)
        self._urgent = urgent
        if self._queued:
            self._session.ring_of(self).append(self)

    # --- reading ----------------------------------------------------------------------------------

    def read_nowait(self, n: int = -1) -> bytes | None:
        """What has arrived, at most `n` bytes; None if nothing has, b"" at the end.

        Returns one chunk as it arrived, at most 64 KiB; more may be there. Raises StreamReset.
        """
        queue = self._in
        if not queue:
            if self._reset is not None:
                raise self._gone()
            return b"" if self._read_closed or n == 0 else None
        chunk = queue.popleft()
        if 0 <= n < len(chunk):
            view = memoryview(chunk)
            queue.appendleft(view[n:])
            chunk = view[:n]
        self.consumed(len(chunk))
        return chunk if type(chunk) is bytes else bytes(chunk)

    async def read(self, n: int = -1) -> bytes:
        """Some bytes, at most `n` (any number if negative), b"" at the end.

        Waits until something has arrived; returns what is there, one chunk of up to 64 KiB, not
        everything to the end. Raises StreamReset.
        """
        while (data := self.read_nowait(n)) is None:
            await self._readable()
        return data

    async def read_exactly(self, n: int) -> bytes:
        """Exactly `n` bytes; asyncio.IncompleteReadError, with what came, at an early end."""
        parts: list[bytes] = []
        left = n
        while left:
            data = self.read_nowait(left)
            if data is None:
                await self._readable()
                continue
            if len(data) == n:
                return data
            if not data:
                raise asyncio.IncompleteReadError(b"".join(parts), n)
            parts.append(data)
            left -= len(data)
        return b"".join(parts)

    async def _readable(self) -> None:
        if self._reader is not None:
            raise RuntimeError("another task reads this stream")
        self._reader = self._session.loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def unread(self, data: bytes) -> None:
        """Put bytes in front of what is read next."""
        if data and self._reset is None:
            if self._holds:
                self._hold(len(data))
            self._uncredited -= len(data)
            self._in.appendleft(data)

    def consumed(self, n: int) -> None:
        """Say that `n` bytes that `on_data` received are done with: the peer may send as many more.

        Only after `attach`; the other ways of reading do it by themselves.
        """
        held = n if n < self._held else self._held  # an ended stream no longer counts
        session = self._session
        self._held -= held
        session.held_bytes -= held
        session.totals.buffered_bytes -= held
        if self._read_closed:
            return
        self._uncredited += n
        if self._uncredited >= self._target >> _CREDIT_SHIFT:
            self._credit()

    def _credit(self) -> None:
        """Give the window back; let it grow if the path needs it and the connection's share allows.

        It needs it if half the window is used up in less than some round trips: then the sender
        may have to wait for the window. A larger window than that would only be a longer queue, in
        which urgent frames wait as well.
        """
        session, delta = self._session, self._uncredited
        self._uncredited = 0
        self._half_bytes += delta
        if self._half_bytes >= self._target >> 1:
            limit, now = session.limits.stream_window_bytes, session.loop.time()
            took_s, self._half_at, self._half_bytes = now - self._half_at, now, 0
            if self._target < limit and took_s <= session.rtt_s * _GROWTH_RTTS:
                extra = min(self._target * 2, limit) - self._target
                if session.grow(extra):
                    self._target += extra
                    self._grown += extra
                    delta += extra
        self._recv_window += delta
        session.control(_pack(0, WINDOW, 0, self.id, delta))

    def attach(
        self,
        on_data: Callable[[Bytes], None],
        on_end: Callable[[Exception | None], None],
        on_writable: Callable[[], None] | None = None,
    ) -> None:
        """Push what arrives to callbacks instead of queueing it: the fast face for RPC.

        Args:
            on_data: Called on the loop with each piece as it is decrypted; what was queued before
                is pushed during `attach`. A memoryview stays valid while it is held (and holds its
                whole message, up to 64 KiB). The peer's window comes back only with `consumed(n)`:
                a sink that does not consume stops the peer after the window.
            on_end: Called once: None when the peer said FIN, else the StreamReset. No data follows.
            on_writable: Called when `write_nowait` took less than asked and there is room again, or
                it would now raise because the stream was reset.

        The callbacks must not block; one that raises resets the stream and is logged.
        `read*` must not be used afterwards. Call `detach` to undo.
        """
        self._on_data, self._on_end, self._on_writable = on_data, on_end, on_writable
        queue = self._in
        while queue and self._on_data is on_data:
            self._push(queue.popleft())
        if self._read_closed and self._on_end is on_end:
            self._ended()

    def detach(self) -> None:
        """End `attach`: what arrives from now on is queued for `read`."""
        self._on_data = self._on_end = self._on_writable = None

    def _push(self, data: Bytes) -> None:
        assert self._on_data is not None  # noqa: S101  # callers check; mypy cannot see it
        try:
            self._on_data(data)
        except Exception:  # a sink's defect ends its stream only
            log.error("stream.sink_failed", protocol=self.protocol, exc_info=True)
            self.reset()

    def _ended(self) -> None:
        on_end, self._on_end, self._on_data = self._on_end, None, None
        if on_end is not None:
            try:
                on_end(self._gone() if self._reset is not None else None)
            except Exception:  # as in _push
                log.error("stream.sink_failed", protocol=self.protocol, exc_info=True)
                self.reset()

    def _hold(self, n: int) -> None:
        session = self._session
        self._held += n
        session.held_bytes += n
        session.totals.buffered_bytes += n

    def _receive(self, buf: bytes, start: int, n: int) -> None:
        """Take `n` bytes of a data frame, at `start` of a decrypted message."""
        if self._read_closed or self._discard:
            return
        session = self._session
        self._held += n
        session.held_bytes += n
        session.totals.buffered_bytes += n
        if self._on_data is not None:
            self._push(memoryview(buf)[start : start + n])
            return
        queue = self._in
        if n >= _COALESCE_BYTES or not queue:
            if n == len(buf):
                queue.append(buf)
            elif n << 1 >= len(buf):
                queue.append(memoryview(buf)[start : start + n])
            else:  # a copy: a small view would keep the whole message alive
                queue.append(buf[start : start + n])
        else:
            last = queue[-1]
            if type(last) is bytearray and len(last) < _COALESCED_BYTES_MAX:
                last += buf[start : start + n]
            else:
                queue.append(bytearray(buf[start : start + n]))
        self._wake_reader()

    def _wake_reader(self) -> None:
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    # --- writing ----------------------------------------------------------------------------------

    def _room(self) -> int:
        """How many bytes a writer may add now."""
        session, limits = self._session, self._session.limits
        if (
            session.unsent_bytes > limits.unsent_per_connection_bytes_max
            or session.totals.unsent_bytes > limits.unsent_bytes_max
        ):
            return limits.stream_unsent_bytes_min - self._out_bytes
        return limits.stream_unsent_bytes_max - self._out_bytes

    def write_nowait(self, data: Bytes) -> int:
        """Accept some of `data`, maybe none; returns how many bytes.

        Less than all means that the buffer of this stream is full: `on_writable` of `attach` tells
        when it is worth another try. `data` may be reused afterwards.
        Raises StreamReset, or OverlayError after `close`.
        """
        if self._reset is not None:
            raise self._gone()
        if self._fin:
            raise OverlayError("the stream is closed for writing", code="overlay.closed")
        size = len(data) if type(data) is bytes else memoryview(data).nbytes
        if not size:
            return 0
        room = self._room()
        if size > room:
            self._want = True
            if room <= 0:
                return 0
            data, size = memoryview(data).cast("B")[:room], room
        if type(data) is not bytes and not (type(data) is memoryview and type(data.obj) is bytes):
            data = bytes(data)  # the caller may change it
        session = self._session
        self._out.append(data)
        self._out_bytes += size
        session.unsent_bytes += size
        session.totals.unsent_bytes += size
        if not self._queued and self._send_window:
            self._queued = True
            (session.urgent if self._urgent else session.ring).append(self)
            # A writer that got less waits for a later wake-up: not for one from within this call.
            (session.output if self._want else session.data_output)()
        return size

    async def write(self, data: Bytes) -> None:
        """Send all of `data`; returns once it is accepted, within the limits on unsent bytes.

        Waits while the peer's window or the connection is full. Several tasks may write; each
        call's bytes stay together, in the order of the calls. Raises StreamReset, or OverlayError
        after `close`. A cancelled write may have sent a part.
        """
        if not self._writers:
            done = self.write_nowait(data)
            if done == (len(data) if type(data) is bytes else memoryview(data).nbytes):
                return
            rest = memoryview(data).cast("B")[done:]
        else:
            rest = memoryview(data).cast("B")
        await self._write_rest(rest)

    async def _write_rest(self, rest: memoryview) -> None:
        loop, writers = self._session.loop, self._writers
        turn = loop.create_future()
        writers.append(turn)
        try:
            while rest:
                await turn  # set for the first in line alone, or for all at a reset
                if self._reset is not None:
                    raise self._gone()
                turn = writers[0] = loop.create_future()
                rest = rest[self.write_nowait(rest) :]
        finally:
            first = writers[0] is turn
            writers.remove(turn)
            if first and writers and not writers[0].done():
                writers[0].set_result(None)

    def _wake_writer(self) -> None:
        self._want = False
        if self._writers and not self._writers[0].done():
            self._writers[0].set_result(None)
        self._writable()

    def _writable(self) -> None:
        if self._on_writable is not None:
            try:
                self._on_writable()
            except Exception:  # as in _push
                log.error("stream.sink_failed", protocol=self.protocol, exc_info=True)
                self._on_writable = None
                self.reset()

    # --- ending -----------------------------------------------------------------------------------

    def close(self) -> None:
        """End this side (FIN) after what was written. Reading goes on. Idempotent."""
        if self._fin or self._reset is not None:
            return
        self._fin = True
        if not self._out:
            self._send_fin()

    def _send_fin(self) -> None:
        self._fin_sent = True
        self._session.control(_pack(0, WINDOW, FIN, self.id, 0))
        self._settle()

    def reset(self) -> None:
        """End both sides at once (RST): what is unsent or unread is dropped. Idempotent."""
        if self._reset is None and self.id in self._session.streams:
            self._session.control(_pack(0, WINDOW, RST, self.id, 0))
        self._fail(StreamReset("the stream was reset by this node"))

    def finish(self) -> None:
        """Done with both directions: FIN after what was written; what still comes is discarded.

        A peer that does not close its side within `linger_s` is reset.
        """
        self.close()
        self._discard = True
        self._drop_input()
        session = self._session
        if self._reset is None and self.id in session.streams and self._linger is None:
            self._linger = session.loop.call_later(session.limits.linger_s, self.reset)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is None:
            self.finish()
        else:
            self.reset()

    def _gone(self) -> StreamReset:
        return StreamReset(str(self._reset))

    def _drop_input(self) -> None:
        self._in.clear()
        self._hold(-self._held)

    def _drop_output(self) -> None:
        session = self._session
        session.unsent_bytes -= self._out_bytes
        session.totals.unsent_bytes -= self._out_bytes
        self._out.clear()
        self._out_bytes = 0

    def _fail(self, reason: Exception, *, keep_input: bool = False) -> None:
        """End the stream here; `keep_input` leaves what has arrived to be read."""
        if self._reset is not None:
            return
        self._reset = reason
        self._read_closed = self._fin = self._fin_sent = True
        self._drop_output()
        if not keep_input:
            self._drop_input()
        self._settle()
        self._ended()
        self._wake_reader()
        for turn in self._writers:
            if not turn.done():
                turn.set_result(None)
        if self._want:
            self._want = False
            self._writable()
        self._on_writable = None
        self._session.on_reset(self)

    def _remote_fin(self) -> None:
        if not self._read_closed:
            self._read_closed = True
            self._settle()
            self._ended()
            self._wake_reader()

    def _settle(self) -> None:
        """Leave the session's table once both sides are closed."""
        streams = self._session.streams
        if self._read_closed and self._fin_sent and streams.pop(self.id, None) is not None:
            if self._linger is not None:
                self._linger.cancel()
                self._linger = None
            self._session.shrink(self._grown)
            self._grown = 0
            self.release()

    def hold(self) -> None:
        """Keep the stream's slot even after it ended: somebody still works for it."""
        self._holds += 1

    def release(self) -> None:
        """Undo `hold`, or the table's own."""
        self._holds -= 1
        if self._holds == 0:
            self._hold(-self._held)  # what is unread is now between the application and its memory
            self._session.on_free(self)


@dataclass(slots=True)
class Totals:
    """What all connections of a host hold together. Written by the sessions, read by the limits.

    Attributes:
        buffered_bytes: Received and not yet read.
        grown_bytes: Receive windows promised beyond yamux's initial one.
        unsent_bytes: Accepted from writers and not yet handed to TCP.
        sessions: Who contributes.
    """

    buffered_bytes: int = 0
    grown_bytes: int = 0
    unsent_bytes: int = 0
    sessions: set[Session] = field(default_factory=set)


class Session:
    """The multiplexer of one connection.

    Args:
        connection: Attached to the streams; not used otherwise.
        initiator: Whether this side dialled (its stream IDs are odd).
        limits: See LinkLimits.
        totals: The host's counters, updated here.
        loop: The loop that the streams' waits live on.
        on_output: Called when there is something to `pull`, possibly often.
        on_data: Called instead when a stream has data.
        on_stream: Called with each inbound stream, before any of its data.
        on_reset: Called when a stream was reset, by either side or a lost connection.
        on_violation: Called to end the connection, when another one's input found it at fault.
        refused: Counts by reason what is turned away.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        initiator: bool,
        limits: LinkLimits,
        totals: Totals,
        loop: asyncio.AbstractEventLoop,
        on_output: Callable[[], None],
        on_data: Callable[[], None],
        on_stream: Callable[[Stream], None],
        on_reset: Callable[[Stream], None],
        on_violation: Callable[[Violation], None],
        refused: Counter[str],
    ) -> None:
        self.connection, self.limits, self.totals, self.loop = connection, limits, totals, loop
        self.output, self.data_output = on_output, on_data
        self._on_stream, self.on_reset = on_stream, on_reset
        self.on_violation, self._refused = on_violation, refused
        totals.sessions.add(self)
        self.frames_in = 0
        self.streams: dict[int, Stream] = {}
        self.ring: deque[Stream] = deque()  # streams with data and window, in turn
        self.urgent: deque[Stream] = deque()  # the urgent ones, likewise
        self.held_bytes = self.unsent_bytes = self.grown_bytes = 0
        self.streams_in = self.streams_out = 0
        self.used_at = 0.0  # loop time at which the last stream with a protocol ended
        self.rtt_s = math.inf  # the shortest round trip measured; unknown: windows just grow
        self.pinged_at = math.inf  # loop time of the first ping that is not answered yet
        self.remote_gone = False  # the peer said GOAWAY: no new streams
        self.going = False  # this side is about to
        self.dead = False
        self._initiator = initiator
        self._next_id = 1 if initiator else 2
        self._control: list[bytes | memoryview] = []
        self._header = bytearray()  # a header that was cut by a message's end
        self._body_left = 0
        self._body_stream: Stream | None = None
        self._body_flags = 0
        self._opens = TokenBucket(limits.stream_opens_per_s, limits.stream_opens_burst)
        self._aborts = TokenBucket(limits.stream_aborts_per_s, limits.stream_aborts_burst)
        self._idle_talk = TokenBucket(limits.control_frames_per_s, limits.control_frames_burst)

    # --- sending ----------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether `pull` would yield something."""
        return bool(self._control or self.ring or self.urgent)

    def ring_of(self, stream: Stream) -> deque[Stream]:
        """Where a stream waits for its turn."""
        return self.urgent if stream._urgent else self.ring

    def control(self, frame: bytes) -> None:
        """Queue a control frame ahead of data."""
        if self.dead:
            return
        self._control.append(frame)
        self.output()

    def pull(self, bytes_max: int) -> list[bytes | memoryview]:
        """Take frames to send, roughly up to `bytes_max`.

        Control frames first, then urgent streams within their share, then the others, and urgent
        ones again if nothing else is left: within each kind, a turn per stream.
        """
        parts: list[bytes | memoryview] = self._control
        self._control = []
        left, ring, urgent = bytes_max - HEADER_BYTES * len(parts), self.ring, self.urgent
        # At most half, so that every pull moves the others on as well.
        share = min(self.limits.urgent_flush_bytes_max, bytes_max >> 1)
        while left > 0:
            turn = FRAME_BYTES
            if urgent and (share > 0 or not ring):
                stream = urgent.popleft()
                if ring:
                    turn = min(turn, share)
            elif ring:
                stream = ring.popleft()
            else:
                break
            stream._queued = False
            size = min(stream._out_bytes, stream._send_window, turn)
            if not size:  # reset meanwhile
                continue
            parts.append(_pack(0, DATA, 0, stream.id, size))
            left -= size + HEADER_BYTES
            if stream._urgent:
                share -= size
            stream._send_window -= size
            stream._out_bytes -= size
            self.unsent_bytes -= size
            self.totals.unsent_bytes -= size
            queue = stream._out
            if len(queue) == 1 and len(queue[0]) == size:
                parts.append(queue.popleft())
                size = 0
            while size:
                chunk = queue.popleft()
                if len(chunk) > size:
                    view = memoryview(chunk)
                    queue.appendleft(view[size:])
                    chunk = view[:size]
                parts.append(chunk)
                size -= len(chunk)
            if stream._out_bytes:
                if stream._send_window:
                    stream._queued = True
                    self.ring_of(stream).append(stream)
            elif stream._fin and not stream._fin_sent:
                stream._fin_sent = True
                parts.append(_pack(0, WINDOW, FIN, stream.id, 0))
                stream._settle()
            if stream._want and stream._room() >= stream._out_bytes:
                stream._wake_writer()
        return parts

    # --- windows ----------------------------------------------------------------------------------

    def grow(self, extra: int) -> bool:
        """Whether a stream's window may grow by `extra` bytes; if so, it is booked."""
        limits, totals = self.limits, self.totals
        if (
            self.grown_bytes + extra > limits.buffered_per_connection_bytes_max >> 1
            or totals.grown_bytes + extra > limits.buffered_bytes_max >> 1
        ):
            return False
        self.grown_bytes += extra
        totals.grown_bytes += extra
        return True

    def shrink(self, extra: int) -> None:
        """Give back what `grow` booked."""
        self.grown_bytes -= extra
        self.totals.grown_bytes -= extra

    def _over(self) -> bool:
        return (
            self.held_bytes > self.limits.buffered_per_connection_bytes_max
            or self.totals.buffered_bytes > self.limits.buffered_bytes_max
        )

    def _relieve(self) -> None:
        """Reset the streams with most unread bytes until the limits hold again."""
        while self._over():
            session = self
            if self.held_bytes <= self.limits.buffered_per_connection_bytes_max:
                session = max(self.totals.sessions, key=lambda other: other.held_bytes)
            worst = max(session.streams.values(), key=lambda stream: stream._held, default=None)
            self._refused["stream.unread"] += 1
            if worst is None or worst._held <= 0:
                # Held by handlers of streams that have ended: nothing is left to reset.
                session.on_violation(Violation("yamux: too many bytes that nobody reads"))
                return
            log.warning(
                "stream.unread", peer=worst.peer, protocol=worst.protocol, held_bytes=worst._held
            )
            worst.reset()

    # --- streams ----------------------------------------------------------------------------------

    def open(self) -> Stream:
        """A new outbound stream, nothing agreed on it yet.

        Raises StreamReset on a connection that ends, LimitExceeded.
        """
        if self.dead or self.going or self.remote_gone:
            raise StreamReset("the connection is closing")
        if self.streams_out >= self.limits.streams_out_per_connection_max:
            raise LimitExceeded(
                f"{self.streams_out} streams are open to the peer (streams_out_per_connection_max)",
                hint="close streams that are done",
            )
        stream_id = self._next_id
        if stream_id > _WINDOW_MAX:
            raise LimitExceeded("the connection has used up its stream IDs", hint="dial again")
        self._next_id += 2
        stream = self.streams[stream_id] = Stream(self, stream_id, initiator=True)
        self.streams_out += 1
        self.control(_pack(0, WINDOW, SYN, stream_id, 0))
        return stream

    def on_free(self, stream: Stream) -> None:
        if stream.initiator:
            self.streams_out -= 1
        else:
            self.streams_in -= 1
        if stream.initiator or stream.protocol:  # not one on which nothing was agreed
            self.used_at = self.loop.time()

    def _accept(self, stream_id: int) -> Stream | None:
        if stream_id & 1 == self._next_id & 1 or stream_id in self.streams:
            raise Violation("yamux: a stream ID that is not the peer's to open")
        if (
            self.going
            or self.streams_in >= self.limits.streams_in_per_connection_max
            or not self._opens.take()
        ):
            if not self.going:
                self._refused["stream.limit"] += 1
            self._spend(self._aborts, "streams opened beyond the limit")
            self.control(_pack(0, WINDOW, RST, stream_id, 0))
            return None
        stream = self.streams[stream_id] = Stream(self, stream_id, initiator=False)
        self.streams_in += 1
        self.control(_pack(0, WINDOW, ACK, stream_id, 0))
        self._on_stream(stream)
        return stream

    def _spend(self, bucket: TokenBucket, what: str) -> None:
        if not bucket.take():
            self._refused["connection.flood"] += 1
            raise Violation(f"yamux: flood: {what}")

    def end(self, reason: Exception) -> None:
        """The connection is gone: every stream ends; what has arrived may still be read.

        It counts until it is read, or its handler ends. As there is nobody whose stream could be
        reset for it, it is dropped where half of what a host may hold is taken: or who fills the
        windows and hangs up, again and again, makes this side hold any amount.
        """
        keep_input = self.totals.buffered_bytes <= self.limits.buffered_bytes_max >> 1
        self.dead = True
        self.totals.sessions.discard(self)
        self._control.clear()
        self.ring.clear()
        self.urgent.clear()
        for stream in list(self.streams.values()):
            stream._fail(reason, keep_input=keep_input)

    # --- receiving --------------------------------------------------------------------------------

    def feed(self, buf: bytes) -> None:
        """Take one decrypted message; frames may span messages. Raises Violation."""
        at, end, streams = 0, len(buf), self.streams
        while at < end and not self.dead:
            if self._body_left:
                size = min(self._body_left, end - at)
                self._body_left -= size
                if self._body_stream is not None:
                    self._body_stream._receive(buf, at, size)
                at += size
                if not self._body_left:
                    stream, self._body_stream = self._body_stream, None
                    if stream is not None and self._body_flags:
                        self._finish(stream, self._body_flags)
                continue
            if self._header or end - at < HEADER_BYTES:
                missing = HEADER_BYTES - len(self._header)
                self._header += buf[at : at + missing]
                at += missing
                if at > end:
                    break
                version, kind, flags, stream_id, size = _unpack_from(self._header, 0)
                self._header.clear()
            else:
                version, kind, flags, stream_id, size = _unpack_from(buf, at)
                at += HEADER_BYTES
            self.frames_in += 1
            if not (version or kind or flags) and 0 < size <= end - at:
                # A whole data frame of an open stream: what nearly all frames are.
                stream = streams.get(stream_id)
                if stream is not None and size <= stream._recv_window:
                    stream._recv_window -= size
                    stream._receive(buf, at, size)
                    at += size
                    continue
            if version:
                raise Violation(f"yamux: version {version}")
            if kind <= WINDOW:
                self._stream_frame(kind, flags, stream_id, size)
            elif kind == PING:
                self._ping(flags, size)
            elif kind == GOAWAY:
                if size:
                    raise Violation(f"yamux: the peer went away with error {size}")
                self._spend(self._idle_talk, "goaway")
                self.remote_gone = True
            else:
                raise Violation(f"yamux: frame type {kind}")
        if self.held_bytes > YAMUX_WINDOW_BYTES and self._over():
            self._relieve()
        if len(self._control) > self.limits.control_queued_max:
            self._refused["connection.flood"] += 1
            raise Violation("yamux: flood: the peer does not read the answers that it causes")

    def _stream_frame(self, kind: int, flags: int, stream_id: int, size: int) -> None:
        if not stream_id:
            raise Violation("yamux: a stream frame without a stream")
        if flags & SYN:
            stream = self._accept(stream_id)
        else:
            stream = self.streams.get(stream_id)
            if stream is None and stream_id & 1 == self._next_id & 1 and stream_id >= self._next_id:
                raise Violation("yamux: a frame for a stream that was never opened")
        if kind == DATA:
            if size:
                if size > self.limits.frame_bytes_max:
                    raise Violation("yamux: an oversize frame (frame_bytes_max)")
                if stream is not None:
                    if size > stream._recv_window:
                        raise Violation("yamux: the peer overran a receive window")
                    stream._recv_window -= size
                # Of a stream that ended here the peer may not know yet: its data is skipped.
                self._body_left, self._body_stream = size, stream
                self._body_flags = flags & (FIN | RST)
                return
            if not flags:
                self._spend(self._idle_talk, "empty frames")
        elif size:
            if stream is not None:
                window = stream._send_window + size
                if window > _WINDOW_MAX:
                    raise Violation("yamux: a window beyond 4 GiB")
                stream._send_window = window
                if stream._out_bytes and not stream._queued:
                    stream._queued = True
                    self.ring_of(stream).append(stream)
                    self.output()
        elif not flags:
            self._spend(self._idle_talk, "empty window updates")
        if flags & (FIN | RST) and stream is not None:
            self._finish(stream, flags)

    def _finish(self, stream: Stream, flags: int) -> None:
        if flags & RST:
            if not stream.initiator and not stream.protocol:
                self._spend(self._aborts, "streams opened and reset")
            stream._fail(StreamReset("the peer reset the stream"))
        else:
            stream._remote_fin()

    def _ping(self, flags: int, value: int) -> None:
        self._spend(self._idle_talk, "pings")
        if flags & SYN:
            self.control(_pack(0, PING, ACK, 0, value))
        elif self.pinged_at < math.inf:
            self.rtt_s = min(self.rtt_s, self.loop.time() - self.pinged_at)
            self.pinged_at = math.inf

    def ping(self) -> None:
        """Ask the peer for a sign of life."""
        self.pinged_at = min(self.pinged_at, self.loop.time())
        self.control(_pack(0, PING, SYN, 0, 1))
