"""The import module `ww`, version 1: the capabilities of a guest, beside WASI.

What each function takes, does and returns is in docs/reference/guest-abi.md.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from wetware.base.tasks import Tasks
from wetware.errors import CapabilityError, LimitExceeded, NotFound, WetwareError
from wetware_proc import grants
from wetware_proc.grants import MESSAGE_BYTES_MAX, NAME_BYTES_MAX, TABLE_FULL, Held
from wetware_proc.serving import Calls
from wetware_proc.wasm.engine import Fiber, Imports, Result
from wetware_proc.wasm.errno import Errno, need

if TYPE_CHECKING:
    from collections.abc import Callable

    from wetware_proc.driver import Spec


class Caps:
    """The handles of one guest; `sent` is what it has said without waiting for an answer."""

    def __init__(self, fiber: Fiber, spec: Spec) -> None:
        self._memory, self._offered = fiber.memory, spec.offer
        self._calls_max = spec.limits.calls_max
        self._calls = Calls(spec)
        self._handles = self._calls.handles
        self._reply = memoryview(b"")
        self.sent = Tasks()

    def close(self) -> None:
        self._calls.end()

    def cap(self, at: int, count: int) -> int:
        try:
            return self._handles.named(self._name(at, count))
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

    async def _call(self, ref: Held, message: bytes) -> int:
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

    def _send(self, ref: Held, message: bytes) -> int:
        need(len(self.sent) < self._calls_max, Errno.AGAIN)
        try:
            method, params = self._handles.message(message)
        except WetwareError:
            raise Errno.IO.error() from None
        self.sent.start(_say(ref, method, params))
        return 0

    def offer(self, handle: int, at: int, count: int) -> Result:
        return partial(_done, self._offered, self._name(at, count), self._ref(handle))

    def serve(self, at: int, count: int) -> Result:
        return partial(_done, self._calls.serve, self._name(at, count))

    def accept(self) -> Result:
        return self._accept

    async def _accept(self) -> int:
        try:
            message = await self._calls.accept()
        except NotFound:
            raise Errno.NOENT.error() from None
        self._reply = memoryview(message)
        return len(message)

    def reply(self, number: int, at: int, count: int) -> Result:
        return partial(_done, self._calls.reply, number, self._message(at, count))

    def take(self, at: int, count: int) -> int:
        piece = self._reply[: min(count, MESSAGE_BYTES_MAX)]
        self._memory.view(at, len(piece))[:] = piece
        self._reply = self._reply[len(piece) :]
        return len(piece)

    def _name(self, at: int, count: int) -> str:
        need(count <= NAME_BYTES_MAX, Errno.NAMETOOLONG)
        return self._memory.read(at, count).decode()

    def _ref(self, handle: int) -> Held:
        try:
            return self._handles.get(handle)
        except NotFound:
            raise Errno.BADF.error() from None

    def _message(self, at: int, count: int) -> bytes:
        need(count <= MESSAGE_BYTES_MAX, Errno.TOOBIG)
        return self._memory.read(at, count)


async def _say(ref: Held, method: str, params: dict[str, Any]) -> None:
    with contextlib.suppress(WetwareError):
        await grants.call(ref, method, params)


def _done(function: Callable[..., int | None], *args: Any) -> int:
    try:
        return function(*args) or 0
    except WetwareError as exc:
        if exc.code == "not_found.call":
            raise Errno.BADF.error() from None
        raise (Errno.MFILE if isinstance(exc, LimitExceeded) else Errno.INVAL).error() from None


def _errno(error: WetwareError) -> Errno:
    if isinstance(error, CapabilityError):
        return Errno.NOTCAPABLE
    if error.code == TABLE_FULL:
        return Errno.MFILE
    return Errno.AGAIN if isinstance(error, LimitExceeded) else Errno.IO


IMPORTS: Final = Imports(
    "ww",
    Caps,
    {
        "cap": "ii", "call": "iii", "send": "iii", "take": "ii", "drop": "i",
        "offer": "iii", "serve": "ii", "accept": "", "reply": "iii",
    },
    failed=int.__neg__,
)  # fmt: skip
"""All of version 1."""
