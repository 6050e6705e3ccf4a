"""What is asked of the objects that a program serves, on the way to it, and its answers."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.errors import InvalidArgument, LimitExceeded, NotFound, WetwareError
from wetware_proc.grants import Handles, decoded, known
from wetware_proc.schema import SCHEMA
from wetware_proc.served import filled, packed

if TYPE_CHECKING:
    from wetware_proc.driver import Spec

WAITING_BYTES_MAX: Final = 4 << 20  # of calls that a program has not answered
METHOD_CHARS_MAX: Final = 255


@dataclass(slots=True)
class _Call:
    handle: int
    method: str
    args: Any  # None once the guest has taken it
    answer: asyncio.Future[dict[str, Any]] = field(default_factory=asyncio.Future)


class Calls:
    """What one guest holds, and the calls of what it serves. On the loop, but for `handles`.

    A guest takes a call when it likes, and may take others before it answers. A call is bounded by
    its caller, who may leave at any time.
    """

    def __init__(self, spec: Spec) -> None:
        self.handles = Handles(spec.grants, spec.limits.handles_max)
        self._offer, self._calls_max = spec.offer, spec.limits.calls_max
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self._came = asyncio.Event()
        self._bytes = self._served = 0
        self._ended = False

    def serve(self, name: str) -> int:
        """A handle of a new object, which is offered by that name.

        Raises LimitExceeded, InvalidArgument.
        """
        served = ServedServant(self)
        served.handle = self.handles.add(served)
        try:
            self._offer(name, served)
        except WetwareError:
            self.handles.drop(served.handle)
            raise
        self._served += 1
        return served.handle

    async def accept(self) -> bytes:
        """The next call, for the guest: [number, handle, method, {parameter: value}].

        Raises NotFound where it serves nothing.
        """
        if not self._served:
            raise NotFound("the program serves nothing", code="not_found.served")
        while True:
            while not (waiting := [n for n, call in self._calls.items() if call.args is not None]):
                self._came.clear()
                await self._came.wait()
            call = self._calls[number := waiting[0]]
            args, call.args = call.args, None
            try:
                return self.handles.answer([number, call.handle, call.method, args])
            except WetwareError as exc:
                _fail(call, exc)

    def reply(self, number: int, data: bytes) -> None:
        """The guest's answer to a call: [true, value] or [false, text].

        Raises NotFound where nobody waits for it; InvalidArgument, LimitExceeded and NotFound for
        what is no answer, which its caller hears as well.
        """
        if (call := self._calls.get(number)) is None or call.answer.done():
            raise NotFound(f"nobody waits for the answer to call {number}", code="not_found.call")
        try:
            match value := self.handles.value(data):
                case [True, _] | [False, str()]:
                    reply, caps = packed(value)
                case _:
                    raise InvalidArgument("an answer is [true, value] or [false, text]")
        except WetwareError as exc:
            what = f"what the program answers makes no sense: {exc.message}"
            _fail(call, WetwareError(what, code="proc.answer"))
            raise
        call.answer.set_result({"reply": reply, "caps": caps})

    def end(self) -> None:
        """The guest is gone."""
        self._ended = True
        for call in self._calls.values():
            _fail(call, _over())
        self.handles.close()

    async def made(
        self, handle: int, method: str, args: bytes, caps: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """See Served in proc.capnp."""
        if self._ended:
            raise _over()
        if len(method) > METHOD_CHARS_MAX:
            raise InvalidArgument(f"a method's name has at most {METHOD_CHARS_MAX} characters")
        if not isinstance(value := filled(decoded(args), caps, known), dict):
            raise InvalidArgument("the arguments are {parameter: value} in CBOR")
        size = len(args)
        if len(self._calls) >= self._calls_max or self._bytes + size > WAITING_BYTES_MAX:
            raise LimitExceeded(
                f"the program has {len(self._calls)} calls of {self._bytes} bytes to answer: at "
                f"most {self._calls_max} (calls_max) of {WAITING_BYTES_MAX} (WAITING_BYTES_MAX)",
                hint="try again",
            )
        number, call = next(self._numbers), _Call(handle, method, value)
        self._calls[number] = call
        self._bytes += size
        self._came.set()
        try:
            return await call.answer
        finally:
            del self._calls[number]
            self._bytes -= size


class ServedServant(rpc.Servant, interface=SCHEMA.Served):
    """See proc.capnp."""

    def __init__(self, calls: Calls) -> None:
        self._calls, self.handle = calls, 0  # what its program knows it by

    async def call(self, method: str, args: bytes, caps: list[dict[str, Any]]) -> dict[str, Any]:
        return await self._calls.made(self.handle, method, args, caps)


def _fail(call: _Call, error: WetwareError) -> None:
    if not call.answer.done():
        call.answer.set_exception(error)


def _over() -> WetwareError:
    return WetwareError("the program that serves it has ended", code="proc.ended")
