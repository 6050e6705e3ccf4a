"""The import module `ww`, version 1: the capabilities of a guest, beside WASI.

    cap(name, count) -> handle      the grant of a name; a handle is the guest's own, never reused
    call(handle, at, count) -> n    a message; the reply has n bytes, and is fetched with `take`
    send(handle, at, count) -> 0    the same, without waiting for it; its reply is lost
    offer(handle, name, count) -> 0 the spawner can have it by this name
    take(at, count) -> n            the next bytes of the last reply, or of the last error's text
    drop(handle) -> 0               the handle is void

What fails returns a negative number: the error of WASI, as for everything else that it calls. After
a `call` that failed `take` gives the code of the error, a newline, and its message. A version that
is not compatible gets another module name.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from wetware.base.tasks import Tasks
from wetware.errors import CapabilityError, LimitExceeded, NotFound, WetwareError
from wetware_proc import grants
from wetware_proc.grants import MESSAGE_BYTES_MAX, NAME_BYTES_MAX, TABLE_FULL, Handles
from wetware_proc.wasm.engine import Fiber, Imports, Result
from wetware_proc.wasm.errno import Errno, need

if TYPE_CHECKING:
    from wetware import rpc
    from wetware_proc.driver import Spec


class Caps:
    """The handles of one guest.

    Args:
        fiber: The guest.
        spec: Its grants and limits.

    Attributes:
        sent: What it has said without waiting for an answer.
    """

    def __init__(self, fiber: Fiber, spec: Spec) -> None:
        self._memory, self._calls_max, self._spec = fiber.memory, spec.limits.calls_max, spec
        self._handles = Handles(spec.grants, spec.limits.handles_max)
        self._reply = memoryview(b"")
        self.sent = Tasks()

    def close(self) -> None:
        """The guest is gone."""
        self._handles.close()

    def cap(self, at: int, count: int) -> int:
        need(count <= NAME_BYTES_MAX, Errno.NAMETOOLONG)
        try:
            return self._handles.named(self._memory.read(at, count).decode())
        except NotFound:
            raise Errno.NOENT.error() from None
        except LimitExceeded:
            raise Errno.MFILE.error() from None

    def drop(self, handle: int) -> int:
        self._ref(handle)
        self._handles.drop(handle)
        return 0

    def call(self, handle: int, at: int, count: int) -> Result:
        return partial(self._call, self._ref(handle), self._message(at, count))

    async def _call(self, ref: rpc.Ref, message: bytes) -> int:
        try:
            reply = self._handles.answer(await grants.call(ref, *self._handles.message(message)))
            failed = Errno.SUCCESS
        except WetwareError as exc:
            reply, failed = f"{exc.code}\n{exc.message}".encode()[:MESSAGE_BYTES_MAX], _errno(exc)
        self._reply = memoryview(reply)
        need(not failed, failed)
        return len(reply)

    def send(self, handle: int, at: int, count: int) -> Result:
        return partial(self._send, self._ref(handle), self._message(at, count))

    def _send(self, ref: rpc.Ref, message: bytes) -> int:
        need(len(self.sent) < self._calls_max, Errno.AGAIN)
        try:
            method, params = self._handles.message(message)
        except WetwareError:
            raise Errno.IO.error() from None
        self.sent.start(_say(ref, method, params))
        return 0

    def offer(self, handle: int, at: int, count: int) -> Result:
        need(count <= NAME_BYTES_MAX, Errno.NAMETOOLONG)
        return partial(self._offer, self._memory.read(at, count).decode(), self._ref(handle))

    def _offer(self, name: str, ref: rpc.Ref) -> int:
        try:
            self._spec.offer(name, ref)
        except WetwareError as exc:
            raise (Errno.MFILE if isinstance(exc, LimitExceeded) else Errno.INVAL).error() from None
        return 0

    def take(self, at: int, count: int) -> int:
        piece = self._reply[: min(count, MESSAGE_BYTES_MAX)]
        self._memory.view(at, len(piece))[:] = piece
        self._reply = self._reply[len(piece) :]
        return len(piece)

    def _ref(self, handle: int) -> rpc.Ref:
        try:
            return self._handles.get(handle)
        except NotFound:
            raise Errno.BADF.error() from None

    def _message(self, at: int, count: int) -> bytes:
        need(count <= MESSAGE_BYTES_MAX, Errno.TOOBIG)
        return self._memory.read(at, count)


async def _say(ref: rpc.Ref, method: str, params: dict[str, Any]) -> None:
    with contextlib.suppress(WetwareError):
        await grants.call(ref, method, params)


def _errno(error: WetwareError) -> Errno:
    if isinstance(error, CapabilityError):
        return Errno.NOTCAPABLE
    if error.code == TABLE_FULL:
        return Errno.MFILE
    return Errno.AGAIN if isinstance(error, LimitExceeded) else Errno.IO


IMPORTS: Final = Imports(
    "ww",
    Caps,
    {"cap": "ii", "call": "iii", "send": "iii", "offer": "iii", "take": "ii", "drop": "i"},
    failed=int.__neg__,
)
"""All of version 1."""
