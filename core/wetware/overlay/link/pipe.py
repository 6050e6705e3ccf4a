"""A connection over any byte pipe: noise runs end to end through whoever carries the bytes.

For tunnels: a node relays bytes between two streams and sees ciphertext alone. `PipeTransport` is
to a pipe what asyncio's transport is to a socket, and drives the same `Connection`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from wetware.base.log import get_logger
from wetware.errors import OverlayError, WetwareError
from wetware.overlay.link.yamux import Stream

if TYPE_CHECKING:
    from wetware.overlay.link.yamux import Bytes

log = get_logger("link.pipe")


class Pipe(Protocol):
    """A reliable, ordered stream of bytes, both ways, that somebody else carries.

    A `Stream` of a connection is one. One task reads and one writes at a time. Whoever gets a pipe
    owns it, and ends it.
    """

    async def read(self) -> bytes:
        """Some bytes as they arrive, b"" at the end. Raises when the carrier fails."""
        ...

    async def write(self, data: bytes) -> None:
        """Send all of `data`; waits while the carrier is full."""
        ...

    def finish(self) -> None:
        """End after what was written. Nothing is read any more. Idempotent, returns at once."""
        ...

    def reset(self) -> None:
        """End now, dropping what is queued. Idempotent."""
        ...


class PipeTransport(asyncio.Transport):
    """What asyncio's socket transport does, over a `Pipe`.

    It never calls the protocol from within the protocol's own call, except that `write` may call
    `pause_writing`, as asyncio's does. What a `Stream` brings is handed over while its connection
    delivers it.

    Args:
        pipe: Where bytes come from and go to; owned from now on.
        protocol: What is driven; it is given any bytes-like object. It pauses itself when told to:
            that bounds what is queued here to what it hands over between two of its turns.
        spawn: Makes the tasks that read and write; they end with the transport.
    """

    def __init__(
        self,
        pipe: Pipe,
        protocol: asyncio.Protocol,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._pipe, self._protocol = pipe, protocol
        self._stream = pipe if isinstance(pipe, Stream) else None
        self._queue: list[Bytes] = []
        self._queued_bytes = 0  # also what is being written
        self._high = self._low = 0
        self._writing_paused = False
        self._closing = self._lost = False
        self._wanted = asyncio.Event()  # there is something to write, or to close
        self._reading = asyncio.Event()
        self._reading.set()
        self._arrived: deque[Bytes] = deque()  # on a stream, while reading pauses: its window
        self._no_more = False  # the stream's other end has said so
        self._tasks: list[asyncio.Task[None]] = []
        protocol.connection_made(self)
        if self._lost:
            return
        self._tasks.append(spawn(self._write()))
        if self._stream is not None:
            self._stream.attach(self._on_data, self._on_end)
        else:
            self._tasks.append(spawn(self._read()))

    # --- what the protocol calls ------------------------------------------------------------------

    def get_write_buffer_size(self) -> int:
        """Bytes that the pipe has not accepted yet."""
        return self._queued_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """When `pause_writing` and `resume_writing` are called: see asyncio.WriteTransport."""
        self._high, self._low = high or 0, low or 0

    def write(self, data: Bytes) -> None:
        """Queue bytes, which must not change any more."""
        if self._closing or not data:
            return
        if self._stream is not None and not self._queued_bytes:
            try:  # at once, which saves a turn of the loop and the waking of a task
                taken = self._stream.write_nowait(data)
            except OverlayError as exc:
                self._failed(exc)
                return
            if taken == len(data):
                return
            data = memoryview(data)[taken:]
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._wanted.set()
        if self._queued_bytes > self._high and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def is_closing(self) -> bool:
        """Whether it has ended, or will when what is queued has left."""
        return self._closing

    def pause_reading(self) -> None:
        """Read the pipe no more, which in the end stops the sender."""
        self._reading.clear()

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""
        self._reading.set()
        self._loop.call_soon(self._deliver)

    def close(self) -> None:
        """End once what is queued has left."""
        self._closing = True
        self._wanted.set()

    def abort(self) -> None:
        self._end(None)

    def _end(self, exc: Exception | None, *, gracefully: bool = False) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._queue.clear()
        self._arrived.clear()
        self._queued_bytes = 0
        with contextlib.suppress(Exception):  # it has ended: how is of no interest any more
            (self._pipe.finish if gracefully else self._pipe.reset)()
        self._loop.call_soon(self._finish, exc)

    def _finish(self, exc: Exception | None) -> None:
        for task in self._tasks:
            task.cancel()
        self._protocol.connection_lost(exc)

    # --- the pipe ---------------------------------------------------------------------------------

    def _failed(self, exc: Exception) -> None:
        if not isinstance(exc, WetwareError | OSError | EOFError):
            log.error("pipe.defect", exc_info=exc)
        self._end(OverlayError(f"what carried the connection ended: {exc}", code="overlay.carrier"))

    def _on_data(self, data: Bytes) -> None:
        if not self._closing:  # after a close() there is nobody to give it to
            self._arrived.append(data)
            self._deliver()

    def _on_end(self, error: Exception | None) -> None:
        if error is not None:
            self._failed(error)
            return
        self._no_more = True
        self._deliver()

    def _deliver(self) -> None:
        """Hand over what the stream has brought: saves a turn and a task, as in `write`."""
        try:
            while self._stream is not None and self._reading.is_set() and not self._closing:
                if self._arrived:
                    data = self._arrived.popleft()
                    self._protocol.data_received(data)  # type: ignore[arg-type]  # see Args
                    self._stream.consumed(len(data))
                elif self._no_more:
                    self._end(None, gracefully=True)  # neither end of a connection half-closes
                else:
                    return
        except Exception as exc:  # a defect ends this connection only
            self._failed(exc)

    async def _read(self) -> None:
        try:
            while not self._closing:
                await self._reading.wait()
                data = await self._pipe.read()
                await self._reading.wait()  # the read was begun before the pause
                if not data:
                    self._end(None, gracefully=True)  # as in _deliver
                elif not self._closing:
                    self._protocol.data_received(data)
        except Exception as exc:  # the carrier's failure, or its defect, ends this connection only
            self._failed(exc)

    async def _write(self) -> None:
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                while self._queue:
                    data = b"".join(self._queue)
                    self._queue.clear()
                    await self._pipe.write(data)
                    if self._lost:
                        return
                    self._queued_bytes -= len(data)
                    if self._writing_paused and self._queued_bytes <= self._low:
                        self._writing_paused = False
                        self._protocol.resume_writing()
                if self._closing:
                    self._end(None, gracefully=True)
                    return
        except Exception as exc:  # as in _read
            self._failed(exc)
