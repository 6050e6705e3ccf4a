"""Bytes in both directions through one capability, as anyio's `ByteStream`.

```python
async def open(self, name: str) -> dict:  # open @0 (name :Text) -> (stream :Ww.ByteStream)
    stream = rpc.ByteStream()
    self._tasks.start_soon(self._feed, stream)
    return {"stream": stream.servant}

async with rpc.ByteStream((await files.open(name="x"))["stream"]) as stream:  # who calls it
    head = await BufferedByteReceiveStream(stream).receive_exactly(10)
```

The bytes travel beside the calls of the connection, in frames of its transport: a call for each
chunk costs a processor several times what copying it does. Calls make a stream, and end it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import anyio.abc
from anyio import ClosedResourceError, EndOfStream

from wetware.base.tasks import Tasks
from wetware.errors import (
    CapabilityError,
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    WetwareError,
    from_wire,
)
from wetware.rpc.dispatch import current_connection, current_guard
from wetware.rpc.framing import DATA, GRANT
from wetware.rpc.handed import Handed, readable
from wetware.rpc.refs import time_limit
from wetware.rpc.schema import WW
from wetware.rpc.servant import Servant
from wetware.rpc.wire import fresh

if TYPE_CHECKING:
    from wetware.rpc.refs import Caller, Ref
    from wetware.rpc.servant import Guard
    from wetware.rpc.transport import RpcTransport

RunSync = Callable[..., Awaitable[Any]]
WINDOW_BYTES: Final = 1 << 20
"""Of one direction, sent and not read yet: bandwidth × round trip. All streams of a connection:
`RpcLimits.streams_max` times as much."""
FRAME_BYTES_MAX: Final = 128 << 10
"""Others take turns on the connection."""
_SHORT_BYTES: Final = 32 << 10
"""Pieces that are not as long are joined: what one costs is more than its copy."""
OUT_BYTES_MAX: Final = 512 << 10
"""Written and not sent yet, of one stream; and of a connection, beyond which its streams wait."""
CLOSE_S: Final = 5.0
"""How long `aclose` waits until what was written is on its way, and `abort` to say why."""


class ByteStream(anyio.abc.ByteStream):
    """One end of a stream of bytes. Close it with `aclose`, or use it as `async with`.

    `send` returns when there is room for more, not when the other end has read; small pieces travel
    together. An end that has said all calls `send_eof`: if it is closed without, the other end gets
    Disconnected behind the last bytes, instead of EndOfStream.

    What ends both directions is raised by every method from then on, with its code: what the other
    end was aborted with, Disconnected if its reference was released or the connection was lost, and
    the end of the grant: of the one under which a servant's method made the stream, or was handed
    the other end. What passes is charged to it. ClosedResourceError means that this end was closed.

    Args:
        ref: The other end, which belongs to the stream from here on; raises LimitExceeded where
            `streams_max` of the connection are open. None: the stream is made here, and its
            `servant` returned by a servant's method, or handed to one.
        run_sync: Of a stream that is made here: the other end may hand in a file in place of its
            bytes (`send_file`), which is read in threads by this. What is received is the same.
    """

    def __init__(self, ref: Ref | None = None, *, run_sync: RunSync | None = None) -> None:
        self.servant = _End(self)
        self._ref: Ref | None = None
        self._in, self._out = _Buffer(), _Buffer()
        self._channel = 0
        self._transport: RpcTransport | _Here | None = None
        self._may_send = 0  # bytes
        self._may_come = WINDOW_BYTES
        self._read = 0  # of what has come; the other end does not know yet
        self._into = memoryview(b"")  # what `receive_into` has still to fill
        self._met = False  # the other end knows the channel
        self._run_sync = run_sync
        self._file: Handed | None = None  # what is received, behind what is in `_in`
        self._file_taken = False  # by the other end
        self._eof_sent = self._pump_due = False
        self._error: WetwareError | None = None
        self._closed = False
        self._attached = False
        self._changed = asyncio.Event()  # never stays set
        self._guard: Guard | None = None  # decides on the bytes
        self._undo: list[Callable[[], object]] = []
        self._life: asyncio.Task[Any] | None = None
        if ref is not None:
            self._attach_to(ref)
        elif (end := current_connection()._end) is not None:
            self._claim(end)  # who never attaches holds what is written meanwhile
        self._hold(current_guard())

    def _attach_to(self, ref: Ref) -> None:
        self._open(ref._end, secrets.randbits(64))
        self._attached, self._ref = True, ref
        # A caller handed it in under a grant. From here on that is asked by the stream itself:
        # an end of the grant cuts both directions, and the call that tells the caller passes.
        self._guard, ref._guard = ref._guard, None
        self._life = self._call(ref, "attach", channel=self._channel)
        self._hold(self._guard)

    def _hold(self, guard: Guard | None) -> None:
        if guard is not None:
            self._undo.append(guard.on_end(self.abort))

    def _claim(self, end: Caller) -> None:
        """Take a place among the streams of a connection, if this has none; or LimitExceeded."""
        streams, streams_max = end.streams, end.limits.streams_max
        if self not in streams and len(streams) >= streams_max:
            raise LimitExceeded(
                f"{len(streams)} byte streams are open: streams_max is {streams_max}",
                hint="close some, or connect once more",
            )
        streams.add(self)
        self._undo.append(lambda: streams.discard(self))

    def _open(self, end: Caller, channel: int) -> None:
        channels = end.transport.channels
        if end.closed:
            raise Disconnected("the connection is closed", hint="connect again")
        if channel in channels:
            raise InvalidArgument(f"a stream on channel {channel} is there already")
        self._claim(end)
        channels[channel] = self
        self._channel, self._transport = channel, end.transport

    # --- anyio's ByteStream ---

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Some bytes, at least one; EndOfStream behind the last."""
        if not self._in.size:
            await self._until(lambda: self._in.size or self._in.ended or self._error)
        if self._in.size:
            data = bytes(self._in.take(max_bytes))
            try:
                await self._pass(len(data))
            except asyncio.CancelledError:
                self._in.put_back(data)
                raise
            self._took(len(data))
            return data
        if self._file is not None:
            buffer = bytearray(max_bytes)
            if count := await self._read_file(self._file, memoryview(buffer)):
                return bytes(buffer[:count])
        if self._in.ended:
            raise EndOfStream
        raise self._reason()

    async def receive_into(self, buffer: bytearray | memoryview) -> int:
        """Fill `buffer`; returns how many bytes came, less than its length at the end alone.

        For much, at less cost than `receive`: no piece is kept, or waited for by itself. Where it
        raises or is cancelled, what had come for it is gone, and what comes may still be written.
        """
        self._into = memoryview(buffer)
        try:
            while self._in.size and self._into:
                self._lay(memoryview(self._in.take(len(self._into))))
            await self._until(lambda: not self._into or self._in.ended or self._error)
            missing = len(self._into)
        finally:
            self._into = memoryview(b"")
        if missing and not self._in.ended:
            raise self._reason()
        await self._pass(len(buffer) - missing)
        if missing and self._file is not None:
            missing -= await self._read_file(self._file, memoryview(buffer)[-missing:])
        return len(buffer) - missing

    async def _read_file(self, file: Handed, buffer: memoryview) -> int:
        expected = min(len(buffer), file.length - file.at)
        await self._pass(expected)
        assert self._run_sync is not None  # noqa: S101  # else none was taken
        why = "became shorter while it was read"
        try:
            count: int = await self._run_sync(file.read_into, buffer[:expected])
        except OSError as exc:
            count, why = -1, f"cannot be read: {exc.strerror}"
        if self._file is not file:  # cut meanwhile
            raise self._reason()
        if count < expected:
            error = InvalidArgument(f"the file that was handed in {why}", code="invalid.file")
            self.abort(error)
            raise error
        file.at += count
        return count

    async def send(self, item: bytes) -> None:
        """Write all of it; waits while more than OUT_BYTES_MAX are not sent yet."""
        if self._error is not None:
            raise self._reason()
        if self._out.ended:
            raise ClosedResourceError
        if item:
            await self._pass(len(item))
            if self._error is not None:
                raise self._reason()
            self._out.put(bytes(item))
            if len(item) < _SHORT_BYTES:
                self._pump_soon()  # what is written in one turn of the loop travels together
            elif not self._pump_due:
                self._pump()
        if self._out.size > OUT_BYTES_MAX:
            await self._until(lambda: self._out.size <= OUT_BYTES_MAX or self._error)
            if self._error is not None:
                raise self._reason()

    async def send_file(self, fd: int, length: int) -> bool:
        """Hand in a file in place of its first `length` bytes, and the end of the stream.

        False where it has to be sent as bytes: the other end is in another machine or a sandbox, or
        takes none, or it is no regular file on a disk. The descriptor stays the caller's.
        """
        await self._until(lambda: self._met or self._error)
        transport = self._transport
        if self._error is not None or self._out.ended or transport is None:
            raise self._reason()
        if not self._file_taken or self._out.size or not readable(fd):
            return False
        self._out.ended = self._eof_sent = transport.send_file(
            self._channel, Handed(os.dup(fd)), length
        )
        return self._eof_sent

    async def send_eof(self) -> None:
        """Nothing more will be written; what was is on its way. Reading goes on. Idempotent."""
        if self._error is not None:
            raise self._reason()
        self._out.ended = True
        self._pump_soon()

    async def aclose(self) -> None:
        """End both directions; what was written still arrives, if it can be sent in CLOSE_S."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._until(
                    lambda: self._error or not (self._out.size or self._out.ended > self._eof_sent)
                )
        except TimeoutError:
            pass
        finally:
            self._closed = True
            self._cut(Disconnected("the other end closed the stream"))

    def abort(self, error: WetwareError) -> None:
        """End both directions now, here and at the other end, with `error`. Idempotent."""
        ref = self._ref
        if self._error is None and ref is not None:  # else the answer of `attach` tells it
            self._ref = None
            why = {"code": error.code, "message": error.message, "hint": error.hint}
            told = self._call(ref, "abort", limit_s=CLOSE_S, **why)
            told.add_done_callback(lambda _: ref.close())
        self._cut(error)

    # --- the life of both directions ---

    async def _pass(self, count: int) -> None:
        """The grant that this end is under decides on the bytes that it takes and gives."""
        guard = self._guard
        if guard is None:
            return
        try:
            # What had come before the connection was lost passes, though the session ends with it.
            over = self._error is not None and guard.ended is not None
            if not over and (blocked := guard.blocked) is not None:
                raise fresh(blocked)
            if guard.metered and (waiting := guard.charge(_ATTACH, count)) is not None:
                await waiting
        except WetwareError as exc:
            self.abort(exc)
            raise

    def _cut(self, error: WetwareError) -> None:
        """End them now; what was not read yet is gone. Idempotent: the first reason stays."""
        self._file = None
        if self._error is None:
            self._in = _Buffer()
            self._lose(error)

    def _lose(self, error: WetwareError) -> None:
        """The other end is gone; what has come from it can be read still."""
        if self._error is not None:
            return
        self._error = error
        self._out = _Buffer()
        for undo in self._undo:
            undo()
        transport, self._transport = self._transport, None
        if isinstance(transport, _Here):
            transport.other._failed(error)  # which ends the call of `attach`, too
        else:
            if transport is not None:
                transport.channels.pop(self._channel, None)
            if self._life is not None:
                self._life.cancel()
        if self._ref is not None:
            self._ref.close()
        self._wake()

    def _failed(self, error: WetwareError) -> None:
        (self._cut if isinstance(error, CapabilityError) else self._lose)(error)

    def _reason(self) -> Exception:
        if self._closed or self._error is None:
            return ClosedResourceError()
        return fresh(self._error)

    async def _until(self, ready: Callable[[], object]) -> None:
        while not ready():
            await self._changed.wait()

    def _lay(self, data: memoryview) -> None:
        """Into the buffer that waits for it, which has room for all of it."""
        self._into[: len(data)] = data
        self._into = self._into[len(data) :]
        self._took(len(data))

    def _took(self, count: int) -> None:
        self._read += count
        if self._read >= WINDOW_BYTES >> 2 and self._transport is not None:
            self._may_come += self._read
            self._transport.send_frame(GRANT, self._channel, self._read)
            self._read = 0

    def _wake(self) -> None:
        self._changed.set()
        self._changed.clear()

    def _call(
        self, ref: Ref, method: str, *, limit_s: float | None = None, **params: object
    ) -> asyncio.Task[Any]:
        with time_limit(limit_s):
            call = asyncio.get_running_loop().create_task(ref.call(method, **params))
        call.add_done_callback(self._answered)
        return call

    def _answered(self, call: asyncio.Task[Any]) -> None:
        if call.cancelled():
            return
        if (error := call.exception()) is None and (told := call.result()) is not None:
            error = from_wire(**told)
        if error is not None:
            self._failed(error if isinstance(error, WetwareError) else Disconnected(str(error)))

    async def _attach(self, channel: int) -> dict[str, str]:
        end = current_connection()._end
        if self._attached or end is None:
            raise InvalidArgument("a stream is attached once")
        self._attached = True
        self._guard = current_guard()  # may be narrower than that of the method that made it
        self._hold(self._guard)
        if self._out.size:  # written before it was known what they count for
            await self._pass(self._out.size)
        if self._error is None:
            near = end.transport.channels.get(channel)
            if isinstance(near, ByteStream) and near._ref is not None:
                del end.transport.channels[channel]
                self._transport, near._transport = _Here(near), _Here(self)
            else:
                try:
                    self._open(end, channel)
                except WetwareError as exc:
                    self._cut(exc)
                    raise
            self._may_send, self._met = WINDOW_BYTES, True
            assert self._transport is not None  # noqa: S101  # it was set above
            if self._run_sync is not None and self._transport.takes_files:
                self._wait_for_file(self._transport)
            self._transport.send_frame(GRANT, channel, WINDOW_BYTES)
            self._pump()
        await self._until(lambda: self._error)
        error = self._error
        assert error is not None  # noqa: S101  # that was waited for
        return {"code": error.code, "message": error.message, "hint": error.hint}

    def _wait_for_file(self, transport: RpcTransport | _Here) -> None:
        def undo() -> None:
            transport.files_due -= 1

        transport.files_due += 1
        self._undo.append(undo)
        transport.send_frame(GRANT, self._channel, 0)

    # --- bytes ---

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        out, transport = self._out, self._transport
        if transport is None:
            return
        while out.size and self._may_send:
            if transport.unsent_bytes > OUT_BYTES_MAX:
                self._pump_due = True
                transport.when_drained(self._pump)
                break
            data = out.take(min(FRAME_BYTES_MAX, self._may_send))
            self._may_send -= len(data)
            transport.send_frame(DATA, self._channel, len(data), data)
        if out.ended and not out.size and self._met and not self._eof_sent:
            self._eof_sent = True
            transport.send_frame(DATA, self._channel, 0)
        transport.flush()
        self._wake()

    def fed(self, data: memoryview) -> None:
        """See Channel."""
        if self._error is not None:
            return
        self._may_come -= len(data)
        if self._may_come < 0 or (self._in.ended and data):
            self.abort(InvalidArgument("the other end of the stream does not keep to its rules"))
            return
        if not data:
            self._in.ended = True
        elif self._into:
            room = len(self._into)
            self._lay(data[:room])
            if len(data) < room:
                return
            data = data[room:]
        if data:
            self._in.put(bytes(data))  # it must not keep all that it came with
        self._wake()

    def granted(self, count: int) -> None:
        """See Channel."""
        self._may_send += count
        self._met = True
        self._file_taken = self._file_taken or not count
        self._pump_soon()

    def handed(self, file: Handed | None, length: int) -> None:
        """See Channel."""
        if self._error is not None:
            return
        if file is None or self._run_sync is None or self._in.ended or not readable(file.fd):
            self.abort(InvalidArgument("what the other end handed in is no file that is read here"))
            return
        file.length = length
        self._file, self._in.ended = file, True
        self._wake()

    def lost(self) -> None:
        """See Channel."""
        self._lose(Disconnected("the connection was lost", hint="connect again"))


def carried(ref: Ref) -> Servant:
    """An end for another connection, whose bytes are carried from and to the stream of `ref`.

    Each of the two is a stream of its own connection, and under the grant there. Call it in a task
    of the loop; it goes on until one of the two has ended.
    """
    near, far = ByteStream(ref), ByteStream()
    for source, target in ((near, far), (far, near)):
        _carriers.start(_carry(source, target))
    return far.servant


_carriers: Final = Tasks()


async def _carry(source: ByteStream, target: ByteStream) -> None:
    """One direction: the end of the source, as it was, is the end of the target."""
    try:
        try:
            while True:
                await target.send(await source.receive())
        except EndOfStream:
            await target.send_eof()
        await source._until(lambda: source._error)
        await target.aclose()
    except (WetwareError, ClosedResourceError):
        if source._error is not None:  # else the target has ended, and its own direction tells it
            target.abort(source._error)


class _Here:
    """In place of a transport where both ends are in this process.

    Somebody handed the reference back that they had got here, e.g. what one service gave to another
    one. Should a peer attach a stream to one that it handed in itself: it has both already.
    """

    unsent_bytes = files_due = 0
    takes_files = False

    def __init__(self, other: ByteStream) -> None:
        self.other = other

    def send_frame(
        self, kind: int, _channel: int, count: int, data: bytes | memoryview = b""
    ) -> None:
        if kind == GRANT:
            self.other.granted(count)
        else:
            self.other.fed(memoryview(data))

    def send_file(self, *_: object) -> bool:
        return False

    def when_drained(self, callback: Callable[[], None]) -> None:
        callback()

    def flush(self) -> None:
        """Nothing waits."""


class _Buffer:
    """Bytes of one direction.

    Attributes:
        size: How many there are.
        ended: No more will come.
    """

    __slots__ = ("_parts", "ended", "size")

    def __init__(self) -> None:
        self._parts: deque[bytes | bytearray | memoryview] = deque()
        self.size = 0
        self.ended = False

    def put(self, data: bytes) -> None:
        parts, size = self._parts, len(data)
        self.size += size
        if size <= 1024 and parts and isinstance(last := parts[-1], bytearray):
            last += data  # a piece costs more than its bytes
        else:
            parts.append(data if size > 1024 else bytearray(data))

    def put_back(self, data: bytes) -> None:
        self._parts.appendleft(data)
        self.size += len(data)

    def take(self, max_bytes: int) -> bytes | memoryview:
        """The first bytes: a piece, or a part of it, or several where to copy them is cheaper."""
        parts = self._parts
        first = parts.popleft()
        room = max_bytes - len(first)
        if room < 0:
            view = memoryview(bytes(first) if isinstance(first, bytearray) else first)
            parts.appendleft(view[max_bytes:])
            self.size -= max_bytes
            return view[:max_bytes]
        taken = [first]
        while parts and len(parts[0]) <= min(room, _SHORT_BYTES):
            taken.append(parts.popleft())
            room -= len(taken[-1])
        self.size -= max_bytes - room
        if len(taken) > 1:
            return b"".join(taken)
        return bytes(first) if isinstance(first, bytearray) else first


class _End(Servant, interface=WW.ByteStream):
    """The end that a servant's method made, as the other one calls it."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def attach(self, channel: int) -> dict[str, str]:
        """What ended the stream."""
        return await self._stream._attach(channel)

    async def abort(self, code: str, message: str, hint: str) -> None:
        """The other end has failed."""
        self._stream._failed(from_wire(code, message, hint))

    def released(self) -> None:
        """The other end let go."""
        self._stream._lose(Disconnected("the other end let go of the stream"))


_ATTACH: Final = WW.ByteStream.methods["attach"]
