"""The transport between pycapnp and a byte stream: keeps every promise pycapnp relies on.

pycapnp 2.2.4 crashes the process when a read starts after `eof_received`, buffers without limit in
both directions, and reads a message in two or three small pieces. So the transport

- never calls `eof_received`: the end of the stream is a lost connection, once all before it was
  read;
- reads Cap'n Proto's framing itself, refuses an oversize message by its first 8 bytes, and hands
  over whole messages only;
- keeps book of calls that are not answered yet, and stops reading while they hold too many bytes;
- bounds what all connections together hold of incomplete messages, and how long one may take;
- collects what is written in one turn of the loop into one write, where many calls are open;
- carries frames of bytes between the messages, which pycapnp does not see: see `bytestream`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from wetware.base.log import get_logger
from wetware.errors import WetwareError
from wetware.rpc.framing import (
    BOOTSTRAP,
    CALL,
    FILE,
    FINISH,
    FRAME,
    GRANT,
    LENGTH,
    RETURN,
    FramingError,
    message_bytes,
    message_head,
    segment_kind,
)
from wetware.rpc.handed import FILES_MAX
from wetware.rpc.limits import RpcLimits, wire_bytes_max

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from wetware.rpc.handed import Handed

log = get_logger("rpc")

_READ_AHEAD_BYTES: Final = 256 << 10
"""Whole messages that wait for pycapnp; with more the stream is not read."""
_PIECE_BYTES: Final = 16 << 10
"""Pieces of a message that are as long leave as they are; shorter ones are joined."""
_WRITES_JOINED_MAX: Final = 16
"""Pieces that leave together. With many calls in flight the peer works on the first of them while
the rest are made; waiting for the end of the turn would let the two ends take turns."""
_FEW_CALLS: Final = 4
"""Open calls, of both ends together, up to which no message waits for the end of the turn."""


class Partials:
    """What the connections of one loop hold of incomplete messages, and which gives way.

    Attributes:
        total_bytes: Of all of them.
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self._held: dict[RpcTransport, int] = {}

    def hold(self, transport: RpcTransport, size: int) -> None:
        """`transport` holds `size` bytes now."""
        self.total_bytes += size - self._held.get(transport, 0)
        if size:
            self._held[transport] = size
        else:
            self._held.pop(transport, None)

    def most(self) -> RpcTransport:
        """Who holds most, the strangers first; of equal ones the one that holds it longest."""
        return max(self._held, key=lambda transport: (not transport.trusted, self._held[transport]))


class Channel(Protocol):
    """Whose bytes travel in frames. Called within `feed`: raises nothing, calls nothing back."""

    def fed(self, data: memoryview) -> None:
        """Bytes have come, which are the caller's; none are the end."""

    def granted(self, count: int) -> None:
        """The other end takes so many bytes more; none: also a file, before any."""

    def handed(self, file: Handed | None, length: int) -> None:
        """A file in place of so many bytes, and the end; None where its descriptor did not come."""

    def lost(self) -> None:
        """The connection has ended: nothing comes any more."""


class Pipe(Protocol):
    """A byte stream under the transport. All methods are synchronous and called on the loop."""

    @property
    def peer(self) -> str:
        """Where the bytes come from, for the log."""

    def start(self, transport: RpcTransport) -> None:
        """Begin to call `feed`, `feed_eof`, `feed_error` and `writable` of the transport."""

    def write(self, pieces: Collection[memoryview]) -> int:
        """Take what fits now of the pieces, the first ones first; returns how many bytes.

        0 means that `writable` is called later. Raises OSError when broken.
        """

    def flush(self) -> None:
        """Send what was taken now, not at the end of the turn. May call `writable`."""

    def pause(self) -> None:
        """Feed no more until `resume`; the peer is slowed down."""

    def resume(self) -> None:
        """Feed again."""

    def close(self) -> None:
        """Send the end of the stream after what was taken, and let go."""

    def abort(self) -> None:
        """Let go at once."""


class RpcTransport:
    """See the module. One per connection; `stream_factory` gets it into pycapnp.

    Args:
        pipe: The bytes.
        limits: `message_bytes_max`, `answers_max`, `call_bytes_in_max`, `out_bytes_max`,
            `partial_bytes_total_max`, `message_s`, `write_stall_s` and `close_s` are enforced here.
        on_lost: Called once, on the loop and outside of pycapnp, when the connection is gone; with
            the reason, or None if we closed it.
        on_sent: Called for every result message that pycapnp wrote, with its size in bytes.
        on_drained: Called when bytes left.
        partials: Shared by all connections of the loop.

    Attributes:
        trusted: Whether others give way first when incomplete messages take too much memory.
        heard: Whether the peer has sent anything.
        takes_files: Whether the peer may hand in files, as the pipe says.
        files_due: How many streams wait for one.
        hand: The pipe's, where it can: the peer has the file before what is written from then on.
    """

    def __init__(
        self,
        pipe: Pipe,
        limits: RpcLimits,
        on_lost: Callable[[Exception | None], None],
        on_sent: Callable[[int], None],
        on_drained: Callable[[], None],
        partials: Partials | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pipe = pipe
        self._limits = limits
        self._wire_bytes_max = wire_bytes_max(limits)
        self._on_lost = on_lost
        self._on_sent = on_sent
        self._on_drained = on_drained
        self._protocol: Any = None
        self.trusted = True
        self.heard = False
        self.takes_files, self.files_due = False, 0
        self.hand: Callable[[Handed], None] | None = None
        self._files: deque[Handed] = deque()  # those of which no frame has told yet
        # Inbound: an incomplete message, whole ones not admitted yet, whole ones for pycapnp.
        self._partial = bytearray()
        self._partial_size = 0  # when it is complete; 0 while its head is incomplete, too
        self.channels: dict[int, Channel] = {}
        self._frame: tuple[Channel | None, int] = (None, 0)  # what is missing of one
        self._partials = Partials() if partials is None else partials
        self._begun_s = 0.0  # when the incomplete message began, by the loop's clock
        self._late: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[memoryview, int, int]] = deque()
        self._ready: deque[memoryview] = deque()
        self._at = 0  # how much of the first of them pycapnp has
        self._queued_bytes = 0
        self._read_bytes = 0  # by pycapnp
        self._unread: asyncio.TimerHandle | None = None
        self._paused = True  # by pycapnp
        self._pipe_paused = False  # by us
        self._delivering = False
        self._end: Exception | None = None  # how the stream ended, once all before it was read
        # Outbound.
        self._out: list[bytes | memoryview] = []
        self._left: deque[memoryview] = deque()  # what the pipe has not taken yet
        self.out_bytes = 0  # of `_left`
        self._queued = 0  # bytes of `_out`
        self._flush_due = False
        self._blocked: asyncio.TimerHandle | None = None
        self._when_drained: list[Callable[[], None]] = []
        self._unwritten = self._size = 0  # of the message that pycapnp is writing
        self._told: tuple[int, int] | None = None  # its kind and ID, by its first segment
        self._asked = 0  # our calls that the peer has not answered
        # Book of the peer's calls: question ID → bytes of parameters, 0 once answered.
        self._answers: dict[int, int] = {}
        self._in_bytes = 0
        self._closing = self._failed = self._lost = self._pipe_gone = False

    def begin(self, protocol: Any) -> None:
        """Connect to pycapnp's protocol and start the pipe."""
        self._protocol = protocol
        protocol.connection_made(self)
        self._pipe.start(self)

    def use(self, limits: RpcLimits) -> None:
        self._limits = limits
        self._wire_bytes_max = wire_bytes_max(limits)
        self._loop.call_soon(self._readmit)

    @property
    def peer(self) -> str:
        """Where the bytes come from, for the log."""
        return self._pipe.peer

    @property
    def unsent_bytes(self) -> int:
        return self.out_bytes + self._queued

    # --- what pycapnp calls -----------------------------------------------------------------------

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        """Pycapnp waits for bytes: they are handed over right here if they are there."""
        self._paused = False
        if not self._delivering and (self._ready or self._end is not None):
            self._deliver()

    def is_closing(self) -> bool:
        return self._closing

    def can_write_eof(self) -> bool:
        """A stream is closed as a whole."""
        return False

    def write(self, data: bytes) -> None:
        """A piece of a message: the table of its segments, or one of these.

        Where few calls are open, a call or a result leaves once it is complete: the peer waits for
        it. What else is written in a turn of the loop leaves at its end, in few pieces.
        """
        if self._closing:
            return
        self._queue(data)
        if not self._unwritten:
            self._size = self._unwritten = message_bytes(data, 0)
            self._told = None
        elif self._told is None:
            self._told = segment_kind(data)
        self._unwritten -= len(data)
        if self._unwritten == 0 and self._told is not None:
            kind, ident = self._told
            if kind == RETURN:
                self._returned(ident, self._size)
            elif kind in (CALL, BOOTSTRAP):
                self._asked += 1
            if kind in (CALL, RETURN) and self._asked + len(self._answers) <= _FEW_CALLS:
                self._flush()

    def close(self) -> None:
        """Send what is queued, within `close_s`, and close. Called from destructors, too."""
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._finish)

    def abort(self) -> None:
        self._fail(None)

    # --- what the pipe calls ----------------------------------------------------------------------

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._end is not None:
            return
        self.heard = True
        view = memoryview(data).toreadonly()
        partial, size = self._partial, self._partial_size
        goes_on = False  # what is incomplete afterwards was so before
        try:
            if self._frame[1]:
                self._split(view[self._feed_channel(view, *self._frame) :])
            elif not partial:
                self._split(view)
            elif not size:
                self._forget_partial()
                goes_on = self._split(memoryview(b"".join((partial, view)))) == 0
            else:
                missing = size - len(partial)
                partial += view[:missing]
                goes_on = len(partial) < size
                if not goes_on:
                    self._forget_partial()
                    self._split(memoryview(partial).toreadonly())
                    self._split(view[missing:])
        except FramingError as exc:
            self._violated(str(exc))
            return
        if partial or self._partial:
            self._hold(begins=not goes_on)
            if self._closing:
                return
        if self._ready and not self._paused and not self._delivering:
            self._deliver()
        self._throttle()

    def feed_files(self, files: list[Handed], *, whole: bool) -> None:
        """They came before what is fed next; not `whole`: some were lost, here or by the peer."""
        self._files += files
        if not whole or len(self._files) > FILES_MAX:
            self._violated("too many files at a time, for the connection or for this process")

    def _split(self, view: memoryview) -> int:
        """Queue the whole messages in `view`; returns where the incomplete rest begins."""
        at, end, start, framed = 0, len(view), 0, 0
        while at < end:
            size, kind, ident = message_head(view, at, end)
            if kind >= GRANT or (kind == FILE and at + size <= end):
                if start < at:
                    self._ready.append(view[start:at])
                start = at + self._take_frame(view, at, kind, ident)
                framed += start - at
                at = start
                continue
            if size > self._wire_bytes_max:
                raise FramingError(
                    f"a message of {size} bytes: message_bytes_max is "
                    f"{self._limits.message_bytes_max}"
                )
            if size == 0 or at + size > end:
                self._partial, self._partial_size = bytearray(view[at:]), size
                break
            if self._waiting or not self._admit(kind, ident, size):
                if start < at:
                    self._ready.append(view[start:at])
                self._waiting.append((view[at : at + size], kind, ident))
                start = at + size
            at += size
        if start < at:  # what was admitted goes on as one piece
            self._ready.append(view[start:at])
        self._queued_bytes += at - framed
        return at

    def _take_frame(self, view: memoryview, at: int, kind: int, ident: int) -> int:
        """Pass on what there is of a frame; returns how many bytes those are, its head included.

        A channel that is not there has been closed: what was on its way is dropped.
        """
        channel, count = self.channels.get(ident), FRAME.unpack_from(view, at)[1]
        if kind == GRANT:
            if channel is not None:
                channel.granted(count)
            return FRAME.size
        if kind == FILE:
            if count != LENGTH.size:
                raise FramingError("a file whose length has another length")
            file = self._files.popleft() if self._files else None
            if channel is not None:
                channel.handed(file, LENGTH.unpack_from(view, at + FRAME.size)[0])
            return FRAME.size + count
        return FRAME.size + self._feed_channel(view[at + FRAME.size :], channel, count)

    def _feed_channel(self, view: memoryview, channel: Channel | None, missing: int) -> int:
        piece = view[:missing]
        self._frame = (channel, missing - len(piece))
        if channel is not None and (piece or not missing):
            channel.fed(piece)
        return len(piece)

    def send_frame(
        self, kind: int, channel: int, count: int, data: bytes | memoryview = b""
    ) -> None:
        """A frame to the other end; `count` is the length of `data` where that is to follow."""
        if not self._closing:
            self._queue(FRAME.pack(kind, count, channel))
            if data:
                self._queue(data)

    def send_file(self, channel: int, file: Handed, length: int) -> bool:
        """A file to the other end, in place of so many bytes; False where that cannot be."""
        if self._closing or self.hand is None:
            return False
        self.hand(file)
        self.send_frame(FILE, channel, LENGTH.size, LENGTH.pack(length))
        return True

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call back once, in a turn of its own, when bytes have left."""
        self._when_drained.append(callback)

    def _forget_partial(self) -> None:
        self._partial, self._partial_size = bytearray(), 0

    def _hold(self, *, begins: bool) -> None:
        """Account for the incomplete message, which `begins` with what was fed last."""
        partials, size = self._partials, len(self._partial)
        partials.hold(self, size)
        if not size:
            return  # a timer that runs finds out by itself
        if begins:
            self._begun_s = self._loop.time()
        if self._late is None:
            self._late = self._loop.call_later(self._limits.message_s, self._check_late)
        while partials.total_bytes > self._limits.partial_bytes_total_max:
            partials.most()._give_way(self._limits.partial_bytes_total_max)

    def _give_way(self, total_max: int) -> None:
        size = len(self._partial)
        self._forget_partial()
        self._partials.hold(self, 0)
        self._violated(
            f"incomplete messages hold more than {total_max} bytes (partial_bytes_total_max); "
            f"this one has {size}"
        )

    def _check_late(self) -> None:
        self._late = None
        if self._closing or not self._partial:
            return
        allowed = left = self._limits.message_s
        if not self._pipe_paused:  # otherwise it is us who hold it up
            left += self._begun_s - self._loop.time()
        if left > 0:
            self._late = self._loop.call_later(left, self._check_late)
        else:
            self._violated(f"a message was not complete within {allowed:g} s (message_s)")

    def _admit(self, kind: int, ident: int, size: int) -> bool:
        """Keep book of one inbound message; False if it has to wait until calls are answered."""
        if kind == FINISH:
            self._in_bytes -= self._answers.pop(ident, 0)
        elif kind == RETURN:
            self._asked -= 1
        elif kind in (CALL, BOOTSTRAP):
            if self._in_bytes and self._in_bytes + size > self._limits.call_bytes_in_max:
                return False
            if len(self._answers) >= self._limits.answers_max:
                raise FramingError(
                    f"{len(self._answers)} calls without a finish: answers_max is "
                    f"{self._limits.answers_max}"
                )
            self._in_bytes += size - self._answers.get(ident, 0)
            self._answers[ident] = size
        return True

    def _readmit(self) -> None:
        """Calls were answered: let waiting messages pass, in order."""
        waiting = self._waiting
        try:
            while waiting:
                message, kind, ident = waiting[0]
                if not self._admit(kind, ident, len(message)):
                    break
                self._ready.append(message)
                waiting.popleft()
        except FramingError as exc:
            self._violated(str(exc))
            return
        if self._ready and not self._paused and not self._delivering:
            self._deliver()
        self._throttle()

    def _throttle(self) -> None:
        """Read from the pipe only while little is queued: this is what slows the peer down."""
        full = self._queued_bytes > _READ_AHEAD_BYTES or bool(self._waiting)
        if full != self._pipe_paused and not self._pipe_gone:
            self._pipe_paused = full
            if full:
                self._pipe.pause()
                self._watch_reader()
            else:
                self._begun_s = self._loop.time()
                self._pipe.resume()

    def _watch_reader(self) -> None:
        # After a message that it cannot make sense of, pycapnp reads no more and says nothing: the
        # peer's end would not be seen either.
        if self._unread is None:
            delay_s = self._limits.message_s
            self._unread = self._loop.call_later(delay_s, self._check_reader, self._read_bytes)

    def _check_reader(self, before: int) -> None:
        self._unread = None
        if self._closing or not self._pipe_paused:
            return
        if self._read_bytes > before or self._waiting:
            self._watch_reader()
        else:
            self._violated("a message that could not be read")

    def feed_eof(self) -> None:
        self.feed_error(ConnectionResetError("the peer closed the connection"))

    def feed_error(self, exc: Exception) -> None:
        """The stream is broken; what arrived before is still handed over."""
        if self._end is None and not self._closing:
            self._end = exc
            if not self._delivering and not (self._ready and not self._paused):
                self._maybe_end()
            # Where nobody reads what came before, see `_watch_reader`.
            self._loop.call_later(self._limits.close_s, self._fail, exc)

    def writable(self) -> None:
        """The pipe takes bytes again."""
        self._unblock()
        self._flush()

    # --- inside -----------------------------------------------------------------------------------

    def _deliver(self) -> None:
        protocol, ready = self._protocol, self._ready
        self._delivering = True
        try:
            while ready and not self._paused and not self._closing:
                piece, at = ready[0], self._at
                buffer = protocol.get_buffer(-1)
                count, left = len(buffer), len(piece) - at
                if count < left:
                    buffer[:] = piece[at : at + count]
                    self._at = at + count
                else:
                    count = left
                    buffer[:count] = piece[at:]
                    ready.popleft()
                    self._at = 0
                del buffer  # pycapnp's memory is gone after buffer_updated
                self._queued_bytes -= count
                self._read_bytes += count
                protocol.buffer_updated(count)
        finally:
            self._delivering = False
        if self._pipe_paused:
            self._throttle()
        if self._end is not None:
            self._maybe_end()

    def _maybe_end(self) -> None:
        # With calls that wait for answers nobody will read, there is no point in handing over more.
        if not self._ready or self._waiting:
            self._fail(self._end)

    def _violated(self, how: str) -> None:
        if not self._failed:
            log.warning("rpc.dropped", peer=self._pipe.peer, reason=how)
        self._fail(FramingError(how))

    def _fail(self, exc: Exception | None) -> None:
        """Give up; pycapnp hears of it in a turn of its own, never inside one of its calls."""
        if not self._failed:
            self._failed = self._closing = True
            self._loop.call_soon(self._gone, exc)

    def _gone(self, exc: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self._failed = self._closing = True
        self.channels.clear()
        self._files.clear()
        self._ready.clear()
        self._waiting.clear()
        self._forget_partial()
        self._partials.hold(self, 0)
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()
        self._late = self._unread = None
        self._out.clear()
        self._left.clear()
        self.out_bytes = 0
        self._unblock()
        if not self._pipe_gone:
            self._pipe_gone = True
            self._pipe.abort()
        if self._protocol is not None:
            self._protocol.connection_lost(exc or ConnectionResetError("closed"))
        self._on_lost(exc)

    def _queue(self, data: bytes | memoryview) -> None:
        self._out.append(data)
        self._queued += len(data)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush_turn)
        elif len(self._out) >= _WRITES_JOINED_MAX and not self._left:
            self._flush()

    def _flush_turn(self) -> None:
        self._flush_due = False
        if self._out or self._closing:
            self._flush()

    def flush(self) -> None:
        """Send what was written now, not at the end of the turn."""
        if self._out:
            self._flush()

    def _flush(self) -> None:
        if self._failed or self._pipe_gone:
            return
        if self._out:
            short = self._queued < _PIECE_BYTES
            pieces = [b"".join(self._out)] if short else _joined(self._out)
            self._out.clear()
            self._queued = 0
            for piece in pieces:
                self.out_bytes += len(piece)
                self._left.append(memoryview(piece))
        while self._left and self._blocked is None:
            try:
                count = self._pipe.write(self._left)
            except Exception as exc:
                if not isinstance(exc, (OSError, WetwareError)):  # a defect of the pipe
                    log.error("rpc.write_failed", peer=self._pipe.peer, exc_info=exc)  # noqa: TRY400  # an EventLogger
                self._fail(exc if isinstance(exc, OSError) else ConnectionResetError(str(exc)))
                return
            self.out_bytes -= count
            if count == 0:
                self._blocked = self._loop.call_later(self._limits.write_stall_s, self._stalled)
            while count:
                first = self._left[0]
                if count < len(first):
                    self._left[0] = first[count:]
                    break
                count -= len(first)
                self._left.popleft()
        self._pipe.flush()
        self._on_drained()
        if self._when_drained and not self._blocked:
            for callback in self._when_drained:
                self._loop.call_soon(callback)
            self._when_drained.clear()
        if self.out_bytes > self._limits.out_bytes_max:
            self._violated(
                f"the peer does not read: {self.out_bytes} bytes wait, out_bytes_max is "
                f"{self._limits.out_bytes_max}"
            )
        elif self._closing and not self._left and not self._out:
            self._finish()

    def _returned(self, ident: int, size: int) -> None:
        """Pycapnp has written the result of a call."""
        if ident in self._answers:
            self._in_bytes -= self._answers[ident]
            self._answers[ident] = 0
        self._on_sent(size)
        if self._waiting:
            # Not from here: pycapnp may be in the middle of writing.
            self._loop.call_soon(self._readmit)

    def _unblock(self) -> None:
        if self._blocked is not None:
            self._blocked.cancel()
            self._blocked = None

    def _stalled(self) -> None:
        self._blocked = None
        self._violated(
            f"nothing could be sent for {self._limits.write_stall_s:g} s (write_stall_s)"
        )

    def _finish(self) -> None:
        """Closing: let the last bytes out, then close the pipe and tell everybody."""
        if self._failed or self._pipe_gone:
            return
        if self._out and not self._flush_due:
            self._flush()
        if self._left or self._out:
            self._loop.call_later(self._limits.close_s, self._fail, None)
            return
        self._pipe_gone = True
        self._pipe.close()
        self._gone(None)


def _joined(pieces: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """The same bytes in fewer pieces: to copy a small one is cheaper than to have it."""
    out: list[bytes | memoryview] = []
    for is_long, group in itertools.groupby(pieces, lambda piece: len(piece) >= _PIECE_BYTES):
        run = list(group)
        out += run if is_long else [b"".join(run)]
    return out


def open_stream(transport: RpcTransport) -> Any:
    """Pycapnp's stream over `transport`.

    pycapnp makes streams only by `loop.create_connection(protocol_factory, host, port, **kwargs)`,
    and passes its keywords on; while it does so, this loop knows one keyword more.
    """
    import capnp

    loop: Any = transport._loop
    original = loop.__dict__.get("create_connection")

    async def create_connection(factory: Any, *_args: Any, **_kwargs: Any) -> tuple[Any, Any]:
        protocol = factory()
        transport.begin(protocol)
        return transport, protocol

    loop.create_connection = create_connection
    try:
        coroutine = capnp.AsyncIoStream.create_connection()
        try:
            coroutine.send(None)  # runs to its end: nothing in it waits
        except StopIteration as done:
            return done.value
        coroutine.close()
        raise RuntimeError("this version of pycapnp makes its streams in another way")
    finally:
        if original is None:
            del loop.create_connection
        else:
            loop.create_connection = original
