"""Bytes in both directions through one capability, as anyio's `ByteStream`.

```python
async def open(self, name: str) -> dict:  # open @0 (name :Text) -> (stream :Ww.ByteStream)
    stream = rpc.ByteStream()
    self._tasks.start_soon(self._feed, stream)
    return {"stream": stream.servant}

async with rpc.ByteStream((await files.open(name="x"))["stream"]) as stream:  # who calls it
    head = await BufferedByteReceiveStream(stream).receive_exactly(10)
```

Each end holds a capability of the other and pushes. A call that has no answer yet is what holds a
writer back: see `ByteStream` in schema/ww.capnp.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import anyio.abc
from anyio import ClosedResourceError, EndOfStream

from wetware.errors import CapabilityError, Disconnected, InvalidArgument, WetwareError, from_wire
from wetware.rpc.connection import Ref, time_limit
from wetware.rpc.schema import WW
from wetware.rpc.servant import Servant, current_guard

CHUNK_BYTES: Final = 256 << 10
"""Of one call: beside copying so much, what a call costs is little."""
IN_FLIGHT_MAX: Final = 4
"""Calls of one direction that wait for their answer: bandwidth × round trip over a chunk each."""
BUFFER_BYTES_MAX: Final = 512 << 10
"""Of one direction: written and not sent yet, and likewise received and not read yet."""
CLOSE_S: Final = 5.0
"""How long `aclose` waits for the other end to take what was written."""


class ByteStream(anyio.abc.ByteStream):
    """One end of a stream of bytes. Close it with `aclose`, or use it as `async with`.

    `send` returns when there is room for more, not when the other end has read; small pieces travel
    together. An end that has said all calls `send_eof`: if it is closed without, the other end gets
    Disconnected behind the last bytes, instead of EndOfStream.

    What ends both directions is raised by every method from then on, with its code: what the other
    end was aborted with, Disconnected if its reference was released or the connection was lost, and
    the end of the grant under which a servant's method made the stream. ClosedResourceError means
    that this end was closed.

    Args:
        ref: The other end. None: a servant's method makes the stream, and returns its `servant`.
    """

    def __init__(self, ref: Ref | None = None) -> None:
        self.servant = _End(self)
        self._far = ref
        self._in, self._out = _Buffer(), _Buffer()
        self._calls: set[asyncio.Task[Any]] = set()
        self._sent = 0  # calls; the next one's turn
        self._eof_sent = self._pump_due = False
        self._coming = 0  # calls of the other end that are not answered
        self._taken = 0  # of those; the next one's turn
        self._early: dict[int, bytes | None] = {}
        self._error: WetwareError | None = None
        self._closed = False
        self._changed = asyncio.Event()  # never stays set
        self._life: asyncio.Task[Any] | None = None
        if ref is not None:
            self._life = self._call(ref, "attach", far=self.servant)
        self._unguard: Callable[[], None] = lambda: None
        if (guard := current_guard()) is not None:
            self._unguard = guard.on_end(self._cut)

    # --- anyio's ByteStream ---

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Some bytes, at least one; EndOfStream behind the last."""
        await self._until(lambda: self._in.size or self._in.ended or self._error)
        if self._in.size:
            data = self._in.take(max_bytes)
            self._wake()
            return data
        if self._in.ended:
            raise EndOfStream
        raise self._reason()

    async def send(self, item: bytes) -> None:
        """Write all of it; waits while more than BUFFER_BYTES_MAX are not sent yet."""
        if self._error is not None:
            raise self._reason()
        if self._out.ended:
            raise ClosedResourceError
        if item:
            self._out.put(bytes(item))
            self._pump_soon()
        if self._out.size > BUFFER_BYTES_MAX:
            await self._until(lambda: self._out.size <= BUFFER_BYTES_MAX or self._error)
            if self._error is not None:
                raise self._reason()

    async def send_eof(self) -> None:
        """Nothing more will be written; what was is on its way. Reading goes on. Idempotent."""
        if self._error is not None:
            raise self._reason()
        self._out.ended = True
        self._pump_soon()

    async def aclose(self) -> None:
        """End both directions; what was written still arrives, if it can within CLOSE_S."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._drained()
        except TimeoutError:
            pass
        finally:
            self._closed = True
            self._cut(Disconnected("the other end closed the stream"))

    def abort(self, error: WetwareError) -> None:
        """End both directions now, here and at the other end, with `error`. Idempotent."""
        far = self._far
        if self._error is None and self._life is not None and far is not None:
            # The other way round, the error is the answer of `attach`.
            self._far = None
            told = self._call(far, "abort", code=error.code, message=error.message, hint=error.hint)
            told.add_done_callback(lambda _: far.close())
        self._cut(error)

    # --- the life of both directions ---

    def _cut(self, error: WetwareError) -> None:
        """End them now; what was not read yet is gone. Idempotent: the first reason stays."""
        if self._error is None:
            self._in = _Buffer()
            self._lose(error)

    def _lose(self, error: WetwareError) -> None:
        """The other end is gone; what has come from it can be read still."""
        if self._error is not None:
            return
        self._error = error
        self._out = _Buffer()
        self._unguard()
        for call in (*self._calls, self._life):
            if call is not None:
                call.cancel()
        if self._far is not None:
            self._far.close()
        self._wake()

    def _failed(self, error: WetwareError) -> None:
        (self._cut if isinstance(error, CapabilityError) else self._lose)(error)

    def _reason(self) -> Exception:
        if self._closed:
            return ClosedResourceError()
        return self._fresh()

    def _fresh(self) -> WetwareError:
        error = self._error
        assert error is not None  # noqa: S101  # asked for when it has ended
        return from_wire(error.code, error.message, error.hint)

    async def _until(self, ready: Callable[[], object]) -> None:
        while not ready():
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed.clear()

    # --- to the other end ---

    def _call(self, far: Ref, method: str, /, **params: object) -> asyncio.Task[Any]:
        with time_limit(None):  # an answer takes as long as the other end needs for reading
            call = asyncio.get_running_loop().create_task(far.call(method, **params))
        call.add_done_callback(self._answered)
        return call

    def _answered(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled() and (error := call.exception()) is not None:
            self._failed(error if isinstance(error, WetwareError) else Disconnected(str(error)))
        self._pump()

    async def _drained(self) -> None:
        def drained() -> bool:
            return not self._out.size and not self._calls and self._eof_sent >= self._out.ended

        await self._until(lambda: self._error or drained())

    def _pump_soon(self) -> None:
        # What is written in one turn of the loop travels together.
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Send what there is: whole chunks, and less where nothing is on its way."""
        self._pump_due = False
        out, far = self._out, self._far
        while far is not None and self._error is None and len(self._calls) < IN_FLIGHT_MAX:
            if out.size >= CHUNK_BYTES or (out.size and (out.ended or not self._calls)):
                call = self._call(far, "send", turn=self._sent, data=out.take(CHUNK_BYTES))
            elif out.ended and not out.size and not self._eof_sent:
                call = self._call(far, "send_eof", turn=self._sent)
                self._eof_sent = True
            else:
                break
            self._calls.add(call)
            self._sent += 1
        self._wake()

    # --- from the other end ---

    async def _attach(self, far: Ref | None) -> None:
        if far is None or self._far is not None:
            raise InvalidArgument("a stream is attached once, to a stream")
        self._far = far
        self._pump()
        await self._until(lambda: self._error)
        raise self._fresh()

    async def _come(self, turn: int, data: bytes | None) -> None:
        """Bytes, or None for their end; returns when there is room for more."""
        if self._error is not None:
            raise self._fresh()
        early = self._early
        if (
            self._coming >= IN_FLIGHT_MAX
            or not 0 <= turn - self._taken < IN_FLIGHT_MAX
            or turn in early
            or self._in.ended
            or (data is not None and len(data) > CHUNK_BYTES)
        ):
            self._cut(InvalidArgument("the other end of the stream does not keep to its rules"))
            raise self._fresh()
        self._coming += 1
        try:
            early[turn] = data
            while self._taken in early:
                data = early.pop(self._taken)
                self._taken += 1
                if data is None:
                    self._in.ended = True
                else:
                    self._in.put(data)
            self._wake()
            await self._until(lambda: self._in.size <= BUFFER_BYTES_MAX or self._error)
            if self._error is not None:
                raise self._fresh()
        finally:
            self._coming -= 1


class _Buffer:
    """Bytes of one direction.

    Attributes:
        size: How many there are.
        ended: No more will come.
    """

    __slots__ = ("_parts", "ended", "size")

    def __init__(self) -> None:
        self._parts: deque[bytes | memoryview] = deque()
        self.size = 0
        self.ended = False

    def put(self, data: bytes) -> None:
        self._parts.append(data)
        self.size += len(data)

    def take(self, max_bytes: int) -> bytes:
        """The first bytes: as many whole pieces as there is room for, or a part of the first."""
        parts = self._parts
        taken, room = [parts.popleft()], max_bytes
        room -= len(taken[0])
        if room < 0:
            view = memoryview(taken[0])
            taken[0] = view[:max_bytes]
            parts.appendleft(view[max_bytes:])
        else:
            while parts and len(parts[0]) <= room:
                taken.append(parts.popleft())
                room -= len(taken[-1])
        data = taken[0] if len(taken) == 1 else b"".join(taken)
        self.size -= len(data)
        return bytes(data)


class _End(Servant, interface=WW.ByteStream):
    """One end, as the other one calls it."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def attach(self, far: Ref | None) -> None:
        """Raises what ends the stream."""
        await self._stream._attach(far)

    async def send(self, turn: int, data: bytes) -> None:
        """Returns when there is room for more."""
        await self._stream._come(turn, data)

    async def send_eof(self, turn: int) -> None:
        """No more bytes will come."""
        await self._stream._come(turn, None)

    async def abort(self, code: str, message: str, hint: str) -> None:
        """The other end has failed."""
        self._stream._failed(from_wire(code, message, hint))

    def released(self) -> None:
        """The other end let go."""
        if self._stream._life is None:  # else the answer of `attach` says why
            self._stream._lose(Disconnected("the other end let go of the stream"))
