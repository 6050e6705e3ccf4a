"""Items pushed to a subscriber: `Pump` at the node, `Subscription` in the application.

Between them are `Sink` and `Subscription` of ww.capnp. What an item is, the two agree on.

```python
class Log(rpc.Servant, interface=SCHEMA.Log):  # follow @0 (sink :Ww.Sink) -> (subscription :Ww.…)
    async def follow(self, sink: rpc.Ref | None) -> dict[str, object]:
        pump = rpc.Pump(sink, items_max=1000, bytes_max=1 << 20)
        self._followers.add(pump)
        pump.start(self._followers.discard)
        return {"subscription": pump}  # from here on: pump.offer(b"an item")

lines = rpc.Subscription(lambda sink: log.call("follow", sink=sink), bytes.decode)
async with lines:
    async for line in lines:
        ...
```
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeVar

from wetware.errors import (
    STOPPING,
    Disconnected,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    WetwareError,
)
from wetware.rpc.dispatch import current_guard
from wetware.rpc.schema import WW
from wetware.rpc.servant import Servant
from wetware.rpc.wire import fresh

if TYPE_CHECKING:
    from wetware.rpc.refs import Ref, RpcConnection

T = TypeVar("T")

BATCH_ITEMS_MAX: Final = 512
"""Items of one call of a sink."""
BATCH_BYTES_MAX: Final = 128 << 10
"""Bytes of one call, which the last item may exceed."""
IN_FLIGHT_MAX: Final = 2
"""Calls that wait for the sink's answer; only a full batch goes out beside another. Two keep the
connection busy, and more only hide a slow subscriber."""
ITEM_OVERHEAD: Final = 64
"""Bytes that an item counts beside its own, in a buffer and in a batch: empty ones are not free."""
READ_AHEAD_MAX: Final = 1024
"""Items that wait in the application; beyond it the node is told to wait."""
READ_AHEAD_BYTES_MAX: Final = 8 << 20
"""Bytes that wait there."""

STOPPED_S: Final = 10.0
"""A node that says that it stops has ended its connections by then; it takes two seconds."""

_CONTEXT: Final = contextvars.Context()
"""What pushes run in: the context of an `offer` would keep alive who made it, e.g. a publisher."""


class Slow(enum.StrEnum):
    """What becomes of an item for whose sink there is no room, as schemas name it."""

    DROP_OLDEST = "dropOldest"
    DROP_NEWEST = "dropNewest"
    DISCONNECT = "disconnect"
    BLOCK = "block"


class Pump(Servant, interface=WW.Subscription):
    """Items on their way to one sink: a bounded buffer, from which batches are pushed.

    It is also what the subscriber holds: return it as the `subscription`. It ends when that is
    cancelled or released, when the sink fails, and with the guard of the call that started it. It
    holds nothing of the sink, the items or the guard then.

    Args:
        sink: Where items are pushed to. None raises InvalidArgument.
        items_max: Items that may wait, 1 or more; one that counts as more may exceed it.
        bytes_max: Bytes that may wait, ITEM_OVERHEAD an item included; one item may exceed it.
        slow: What is done beyond them. BLOCK takes the item: who offers waits for `room` then, and
            does not offer meanwhile.

    Attributes:
        buffered: Items that wait.
        delivered: Items that the sink took.
        dropped: Items that were dropped because it was too slow.
        ended: Whether it is over.
        reason: What ended it; None as long as it runs, and if it was cancelled.
    """

    def __init__(
        self,
        sink: Ref | None,
        *,
        items_max: int,
        bytes_max: int,
        slow: Slow = Slow.DROP_OLDEST,
    ) -> None:
        if sink is None:
            raise InvalidArgument("a subscription needs a sink", code="invalid.sink")
        self._sink: Ref | None = sink
        self._items_max, self._bytes_max, self.slow = items_max, bytes_max, slow
        self._waiting: OrderedDict[Hashable, tuple[bytes, int]] = OrderedDict()  # with its count
        self._bytes = self._unreported = 0
        self._room = asyncio.Event()
        self.buffered = 0
        self._in_flight: set[asyncio.Task[None]] = set()
        self._due = False
        self._unguard: Callable[[], None] | None = None
        self._on_end: Callable[[Pump], None] | None = None
        self.delivered = self.dropped = 0
        self.ended = False
        self.reason: WetwareError | None = None

    def start(self, on_end: Callable[[Pump], None]) -> None:
        """End with `current_guard()`; call it in the servant's method.

        `on_end` is called once, with this, when it has ended: at once if the guard has.
        """
        self._on_end = on_end
        if (guard := current_guard()) is not None:
            unguard = guard.on_end(self.end)
            if not self.ended:
                self._unguard = unguard

    def offer(self, item: bytes, key: Hashable = None, *, count: int = 1) -> None:
        """Take an item, of at most 768 KiB; returns at once, and does nothing after the end.

        It counts as `count` of them: what it holds is packed. One that waits with the same `key` is
        replaced in its place. If there is no room, the oldest go, unless it is `slow` otherwise;
        the sink is told how many were dropped with the next batch.
        """
        if self.ended:
            return
        if key is None:
            key = object()
        elif (older := self._waiting.get(key)) is not None:
            self._bytes -= len(older[0]) + ITEM_OVERHEAD
            self.buffered -= older[1]
        self._waiting[key] = item, count
        self._bytes += len(item) + ITEM_OVERHEAD
        self.buffered += count
        if self.slow is not Slow.BLOCK:
            while len(self._waiting) > 1 and self._is_over():
                if self.slow is Slow.DISCONNECT:
                    self.end(too_slow("it was too slow for what came"))
                    return
                _, lost = self._pop(last=self.slow is Slow.DROP_NEWEST)
                self.dropped += lost
                self._unreported += lost
        self._wake()

    def _is_over(self) -> bool:
        return self.buffered > self._items_max or self._bytes > self._bytes_max

    @property
    def has_room(self) -> bool:
        """Whether something may be offered to one that is to BLOCK."""
        return self.slow is not Slow.BLOCK or self.ended or not self._is_over()

    async def room(self, wait_s: float) -> None:
        """Wait until it has room, or has ended; it ends if its sink takes nothing for `wait_s`."""
        while not self.has_room:
            self._room.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._room.wait()
            except TimeoutError:
                self.end(too_slow(f"it took nothing for {wait_s:g} s"))

    def end(self, reason: WetwareError | None = None) -> None:
        """Stop now, whatever waits or is in flight. Idempotent: the first reason stays."""
        if (sink := self._sink) is None:
            return
        self.ended = True
        self.reason = reason and fresh(reason)  # without a traceback, whose frames hold the sink
        self._waiting.clear()
        self._bytes = self.buffered = 0
        self._room.set()
        for call in self._in_flight:
            call.cancel()
        sink.close()
        unguard, on_end = self._unguard, self._on_end
        self._sink = self._unguard = self._on_end = None
        if unguard is not None:
            unguard()
        if on_end is not None:
            on_end(self)

    # --- ww.capnp ---------------------------------------------------------------------------------

    async def cancel(self) -> None:
        """End it."""
        self.end()

    async def stats(self) -> dict[str, object]:
        """Its counters; raises what ended it."""
        if self.reason is not None:
            raise fresh(self.reason)
        return {
            "delivered": self.delivered,
            "dropped": self.dropped,
            "buffered": self.buffered,
            "ended": self.ended,
        }

    def released(self) -> None:
        """The subscriber let go."""
        self.end()

    # --- pushing ----------------------------------------------------------------------------------

    def _pop(self, *, last: bool = False) -> tuple[bytes, int]:
        _, (item, count) = self._waiting.popitem(last=last)
        self._bytes -= len(item) + ITEM_OVERHEAD
        self.buffered -= count
        return item, count

    def _may_push(self) -> bool:
        """At once when nothing is in flight, else only a full batch: small ones would cost more."""
        if not self._in_flight or not self._waiting:
            return bool(self._waiting)
        return len(self._in_flight) < IN_FLIGHT_MAX and (
            len(self._waiting) >= BATCH_ITEMS_MAX or self._bytes >= BATCH_BYTES_MAX
        )

    def _wake(self) -> None:
        """Push in the loop's next turn: what is offered in this one goes together."""
        if not self._due and self._may_push():
            self._due = True
            asyncio.get_running_loop().call_soon(self._push, context=_CONTEXT)

    def _push(self) -> None:
        self._due = False
        while self._sink is not None and self._may_push():
            items: list[bytes] = []
            total = 0
            rest = self._bytes - BATCH_BYTES_MAX
            while self._waiting and len(items) < BATCH_ITEMS_MAX and self._bytes > rest:
                item, count = self._pop()
                items.append(item)
                total += count
            dropped, self._unreported = self._unreported, 0
            call = asyncio.create_task(self._sink.call("push", items=items, dropped=dropped))
            self._in_flight.add(call)
            call.add_done_callback(partial(self._pushed, total))

    def _pushed(self, count: int, call: asyncio.Task[None]) -> None:
        self._in_flight.discard(call)
        error = asyncio.CancelledError() if call.cancelled() else call.exception()
        if error is None:
            self.delivered += count
            self._room.set()
            self._wake()
        else:
            failed = error if isinstance(error, WetwareError) else None
            self.end(failed or Disconnected("the subscriber failed"))


def too_slow(why: str) -> LimitExceeded:
    """Ends a subscription."""
    return LimitExceeded(
        f"the subscription ended: {why}",
        hint="read faster, with a larger buffer, or let messages be dropped",
        code="limit.slow",
    )


async def regained(connection: RpcConnection, lost: Disconnected) -> RpcConnection:
    """The connection that took the place of one of which `lost` came, once the application has it.

    Raises `lost` where it does not log in again, and where the connection lives: then what was
    called has ended alone.
    """
    if connection.again is None or not (connection.closed or lost.code == STOPPING):
        raise lost
    try:
        async with asyncio.timeout(STOPPED_S):
            await connection.wait_closed()
    except TimeoutError:
        raise lost from None
    return await connection.again(connection)


class Subscription(Servant, Generic[T], interface=WW.Sink):
    """What a node pushes, for one consumer: enter it with `async with`, read with `async for`.

    Raises from the loop what ended it: Revoked, Expired, Disconnected. Where the connection was
    lost and the application has another one (`connect(reconnect=True)`), it subscribes there and
    goes on. It is also the sink that the node is given.

    Args:
        subscribe: Hands the sink to the node; its answer has the node's `subscription`.
        decode: Makes of an item what the consumer gets; what it raises comes from the loop.

    Attributes:
        dropped: Items that the node dropped because this end was too slow.
        gap_s: For how long in all it was not subscribed because the connection was lost: what the
            node had meanwhile is missing.
    """

    def __init__(
        self,
        subscribe: Callable[[Servant], Awaitable[Mapping[str, Any]]],
        decode: Callable[[bytes], T],
    ) -> None:
        self._subscribe, self._decode = subscribe, decode
        self._ref: Ref | None = None
        self._items: deque[bytes] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._released = self._closed = False
        self.dropped = 0
        self.gap_s = 0.0

    async def __aenter__(self) -> Subscription[T]:
        if self._ref is not None or self._closed:
            raise RuntimeError("a subscription is entered once")
        await self._enter()
        return self

    async def _enter(self) -> None:
        self._released = False
        self._ref = (await self._subscribe(self))["subscription"]
        if self._ref is None:
            raise InternalError("the node answered without a subscription")

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it now: the node is told by the release of the capability. Idempotent."""
        self._closed = True
        self._items.clear()
        self._changed.set()
        if self._ref is not None:
            self._ref.close()

    def __aiter__(self) -> Subscription[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            if self._released:
                try:
                    await self._resume()
                except BaseException:
                    self._closed = True
                    raise
                continue
            self._changed.clear()
            await self._changed.wait()
        item = self._items.popleft()
        self._bytes -= len(item)
        if len(self._items) < READ_AHEAD_MAX // 2 and self._bytes < READ_AHEAD_BYTES_MAX // 2:
            self._changed.set()
        return self._decode(item)

    async def _resume(self) -> None:
        """Subscribe again by the connection that took the place of ours; else raise the reason."""
        ref = self._ref
        assert ref is not None  # noqa: S101  # it was entered
        began = asyncio.get_running_loop().time()
        connection = ref.connection
        try:
            await self._raise_reason()
        except Disconnected as exc:
            lost = exc
        while not self._closed:
            connection = await regained(connection, lost)
            try:
                await self._enter()
            except Disconnected as exc:
                lost = exc
            else:
                self.gap_s += asyncio.get_running_loop().time() - began
                return

    async def _raise_reason(self) -> NoReturn:
        await self.stats()  # raises it, if the node or the network has one
        raise Disconnected("the node ended the subscription", hint="subscribe again")

    async def stats(self) -> dict[str, Any]:
        """`delivered`, `dropped`, `buffered` (at the node) and `ended`."""
        if self._ref is None:
            raise RuntimeError("the subscription has not been entered")
        return dict(await self._ref.call("stats"))

    # --- ww.capnp ---------------------------------------------------------------------------------

    async def push(self, items: list[bytes], dropped: int) -> None:
        """The next items, from the node; returns when there is room for more."""
        if self._closed:
            return
        self.dropped += dropped
        self._items.extend(items)
        self._bytes += sum(map(len, items))
        self._changed.set()
        while not self._closed and (
            len(self._items) >= READ_AHEAD_MAX or self._bytes >= READ_AHEAD_BYTES_MAX
        ):
            self._changed.clear()
            await self._changed.wait()

    def released(self) -> None:
        """The node let go: the subscription is over."""
        self._released = True
        self._changed.set()
