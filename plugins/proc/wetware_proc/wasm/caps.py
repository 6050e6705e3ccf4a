"""The import module `ww`, version 1: the capabilities of a guest, beside WASI.

    cap(name, count) -> handle      the grant of a name; a handle is the guest's own, never reused
    call(handle, at, count) -> n    a message; the reply has n bytes, and is fetched with `take`
    send(handle, at, count) -> 0    the same, without waiting for it; its reply is lost
    take(at, count) -> n            the next bytes of the last reply, or of the last error's text
    drop(handle) -> 0               the handle is void

What fails returns a negative number: the error of WASI, as for everything else that it calls. After
a `call` that failed `take` gives the code of the error, a newline, and its message. A version that
is not compatible gets another module name.
"""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger
from wetware.errors import CapabilityError, InternalError, LimitExceeded, Revoked, WetwareError
from wetware_proc.wasm.engine import Call, Fiber, Result
from wetware_proc.wasm.errno import Errno, need

if TYPE_CHECKING:
    from wetware_proc.driver import Grant, Spec

MODULE: Final = "ww"
MESSAGE_BYTES_MAX: Final = 1 << 20
"""Of a message or a reply."""
NAME_BYTES_MAX: Final = 256
"""Of a grant."""

log = get_logger("proc.caps")


class Caps:
    """The handles of one guest.

    Args:
        fiber: The guest.
        spec: Its grants and limits.
    """

    def __init__(self, fiber: Fiber, spec: Spec) -> None:
        self._memory, self._grants, self._limits = fiber.memory, spec.grants, spec.limits
        self._handles: dict[int, Grant] = {}
        self._numbers = itertools.count(1)
        self._reply = memoryview(b"")
        self._sent: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether something that was sent is on its way."""
        return bool(self._sent)

    async def finish(self) -> None:
        """Wait for what was sent."""
        while self._sent:
            await asyncio.wait(self._sent)

    async def stop(self) -> None:
        """Cancel what was sent; returns when nothing of it goes on."""
        for task in self._sent:
            task.cancel()
        await self.finish()

    def cap(self, at: int, count: int) -> int:
        need(count <= NAME_BYTES_MAX, Errno.NAMETOOLONG)
        grant = self._grants.get(self._memory.read(at, count).decode())
        if grant is None:
            raise Errno.NOENT.error()
        need(len(self._handles) < self._limits.handles_max, Errno.MFILE)
        handle = next(self._numbers)
        need(handle < 1 << 31, Errno.MFILE)
        self._handles[handle] = grant
        return handle

    def drop(self, handle: int) -> int:
        self._handle(handle)
        del self._handles[handle]
        return 0

    def call(self, handle: int, at: int, count: int) -> Result:
        return partial(self._call, self._handle(handle), self._message(at, count))

    async def _call(self, grant: Grant, message: bytes) -> int:
        reply, failed = await _ask(grant, message)
        self._reply = memoryview(reply)
        need(not failed, failed)
        return len(reply)

    def send(self, handle: int, at: int, count: int) -> Result:
        return partial(self._send, self._handle(handle), self._message(at, count))

    def _send(self, grant: Grant, message: bytes) -> int:
        need(len(self._sent) < self._limits.calls_max, Errno.AGAIN)

        async def ask() -> None:
            await _ask(grant, message)

        task = asyncio.ensure_future(ask())
        self._sent.add(task)
        task.add_done_callback(self._sent.discard)
        return 0

    def take(self, at: int, count: int) -> int:
        piece = self._reply[: min(count, MESSAGE_BYTES_MAX)]
        self._memory.view(at, len(piece))[:] = piece
        self._reply = self._reply[len(piece) :]
        return len(piece)

    def _handle(self, handle: int) -> Grant:
        if (grant := self._handles.get(handle)) is None:
            raise Errno.BADF.error()
        return grant

    def _message(self, at: int, count: int) -> bytes:
        need(count <= MESSAGE_BYTES_MAX, Errno.TOOBIG)
        return self._memory.read(at, count)


async def _ask(grant: Grant, message: bytes) -> tuple[bytes, Errno]:
    """The reply, or the text of an error, with its number."""
    error: WetwareError
    try:
        reply = bytes(await grant(message))
        if len(reply) <= MESSAGE_BYTES_MAX:
            return reply, Errno.SUCCESS
        error = LimitExceeded(f"the reply has {len(reply)} bytes: at most {MESSAGE_BYTES_MAX}")
    except WetwareError as exc:
        error = exc
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        error = Revoked("the call was cut off")
    except Exception:
        log.exception("grant.failed")
        error = InternalError("the call failed")
    text = f"{error.code}\n{error.message}".encode()[:MESSAGE_BYTES_MAX]
    if isinstance(error, CapabilityError):
        return text, Errno.NOTCAPABLE
    return text, Errno.AGAIN if isinstance(error, LimitExceeded) else Errno.IO


def _negative(number: int) -> int:
    return -number


CALLS: Final = (
    Call("cap", "ii", Caps.cap, failed=_negative),
    Call("call", "iii", Caps.call, parks=True, failed=_negative),
    Call("send", "iii", Caps.send, parks=True, failed=_negative),
    Call("take", "ii", Caps.take, failed=_negative),
    Call("drop", "i", Caps.drop, failed=_negative),
)
"""All of version 1."""
