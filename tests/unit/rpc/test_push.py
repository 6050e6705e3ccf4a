"""`Pump` and `Subscription`: what waits is bounded, what is lost is counted, and why it ended."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import CapabilityError, Disconnected, InvalidArgument, Revoked, stopping
from wetware.rpc import push
from wetware.rpc.push import ITEM_OVERHEAD

from .test_guard import Grant

pytestmark = pytest.mark.anyio

FEED = rpc.load(Path(__file__).with_name("feed.capnp"))


class FakeSink:
    """Answers when told to."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.answers: list[asyncio.Future[None]] = []
        self.closed = 0

    async def call(self, name: str, **batch: Any) -> None:
        assert name == "push"
        self.batches.append(batch)
        self.answers.append(asyncio.get_running_loop().create_future())
        await self.answers[-1]

    def close(self) -> None:
        self.closed += 1

    @property
    def items(self) -> list[list[bytes]]:
        return [batch["items"] for batch in self.batches]


def pump_to(sink: Any, items_max: int = 1000, bytes_max: int = 1 << 20) -> rpc.Pump:
    return rpc.Pump(sink, items_max=items_max, bytes_max=bytes_max)


async def turns(count: int = 5) -> None:
    """What is due now is done then."""
    for _ in range(count):
        await asyncio.sleep(0)


# --- the pump, without RPC ------------------------------------------------------------------------


async def test_drops_are_counted_exactly_and_reported_with_the_next_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(push, "BATCH_ITEMS_MAX", 3)
    sink = FakeSink()
    pump = pump_to(sink, items_max=5)
    for number in range(6):
        pump.offer(b"%d" % number)  # 0 is dropped: five fit
    await turns()
    assert len(sink.batches) == 1
    assert pump.buffered == 2, "no second batch that is not full"
    for number in range(6, 14):
        pump.offer(b"%d" % number)  # 4 to 8 are dropped
    await turns()
    assert len(sink.batches) == 2
    pump.offer(b"14")
    await turns()
    assert pump.buffered == 3, "no third batch before an answer"
    sink.answers[0].set_result(None)
    await turns()
    assert [[int(item) for item in items] for items in sink.items] == [
        [1, 2, 3],
        [9, 10, 11],
        [12, 13, 14],
    ]
    assert [batch["dropped"] for batch in sink.batches] == [1, 5, 0]
    assert (pump.delivered, pump.dropped) == (3, 6)
    pump.end()
    await turns()
    assert all(answer.cancelled() for answer in sink.answers[1:])


async def test_bytes_that_wait_and_bytes_of_a_batch_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each = 100 + ITEM_OVERHEAD
    monkeypatch.setattr(push, "BATCH_BYTES_MAX", 2 * each)
    sink = FakeSink()
    pump = pump_to(sink, bytes_max=5 * each)
    for number in range(7):
        pump.offer(b"%d" % number * 100)
    assert (pump.buffered, pump.dropped) == (5, 2)
    await turns()
    assert [len(items) for items in sink.items] == [2, 2], "both were full"
    pump.offer(b"x" * 10 * each)
    assert (pump.buffered, pump.dropped) == (1, 3), "one item may exceed it"
    sink.answers[0].set_result(None)
    await turns()
    assert sink.items[-1] == [b"x" * 10 * each]
    assert sink.batches[-1]["dropped"] == 1
    pump.end()


async def test_an_item_takes_the_place_of_one_that_waits_with_its_key() -> None:
    sink = FakeSink()
    pump = pump_to(sink, items_max=3, bytes_max=3 * (1 + ITEM_OVERHEAD))
    for _ in range(100):
        for key in "abc":
            pump.offer(key.encode(), key)
    pump.offer(b"B", "b")
    await turns()
    pump.offer(b"2", "b")
    sink.answers[0].set_result(None)
    await turns()
    assert sink.items == [[b"a", b"B", b"c"], [b"2"]], "what was sent is not replaced"
    assert pump.dropped == 0
    pump.end()


async def test_nothing_is_taken_or_pushed_after_the_end() -> None:
    sink, ended = FakeSink(), []
    pump = pump_to(sink)
    pump.start(ended.append)
    pump.offer(b"1")
    pump.end()
    pump.offer(b"2")
    await turns()
    assert sink.batches == []
    assert (pump.buffered, sink.closed, ended) == (0, 1, [pump])
    pump.end(Disconnected("too late"))
    assert (await pump.stats())["ended"] is True, "the first reason stays: none"
    assert (sink.closed, ended) == (1, [pump])


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (InvalidArgument, "no, thanks"),
        (ValueError, "the subscriber failed"),
        (asyncio.CancelledError, "the subscriber failed"),
    ],
)
async def test_nothing_is_held_after_the_end(failure: type[BaseException], reason: str) -> None:
    """Neither by the error's traceback, nor by what called or was called."""

    class Failing(FakeSink):
        async def call(self, name: str, **batch: Any) -> None:
            await super().call(name, **batch)
            raise failure("no, thanks")

    class Weak:
        def discard(self, pump: rpc.Pump) -> None:
            pass

    def prepare() -> tuple[rpc.Pump, Failing, list[weakref.ref[Any]]]:
        sink, on_end = Failing(), Weak()
        pump = pump_to(sink)
        pump.start(on_end.discard)
        pump.offer(b"1")
        return pump, sink, [weakref.ref(sink), weakref.ref(on_end)]

    pump, sink, held = prepare()
    await turns()
    sink.answers[0].set_result(None)
    await turns()
    assert pump.ended
    assert str(pump.reason) == reason
    del sink
    for _ in range(3):
        with pytest.raises((InvalidArgument, Disconnected)):
            await pump.stats()
    assert pump.reason is not None
    assert pump.reason.__traceback__ is None
    gc.collect()
    assert [ref() for ref in held] == [None, None]


async def test_a_push_does_not_hold_who_made_the_offer() -> None:
    """Its context has the publisher's guard and connection."""

    class Publisher:
        pass

    variable: contextvars.ContextVar[object] = contextvars.ContextVar("publisher")
    sink = FakeSink()
    pump = pump_to(sink)

    def publish() -> weakref.ref[Publisher]:
        publisher = Publisher()
        context = contextvars.copy_context()
        context.run(variable.set, publisher)
        context.run(pump.offer, b"1")
        return weakref.ref(publisher)

    held = publish()
    await turns()
    assert len(sink.batches) == 1
    gc.collect()
    assert held() is None
    pump.end()


# --- over RPC -------------------------------------------------------------------------------------


class FeedServant(rpc.Servant, interface=FEED.Feed):
    def __init__(self, items_max: int = 1000) -> None:
        self.items_max = items_max
        self.running: set[rpc.Pump] = set()
        self.pumps: list[rpc.Pump] = []

    async def follow(self, sink: rpc.Ref | None) -> dict[str, object]:
        pump = pump_to(sink, items_max=self.items_max, bytes_max=64 << 20)
        self.running.add(pump)
        self.pumps.append(pump)
        pump.start(self.running.discard)
        return {"subscription": pump}


def subscription(feed: rpc.Ref) -> rpc.Subscription[str]:
    return rpc.Subscription(lambda sink: feed.call("follow", sink=sink), bytes.decode)


@contextlib.asynccontextmanager
async def serve(
    tmp_path: Path, servant: rpc.Servant, guard: Grant | None = None
) -> AsyncIterator[rpc.Ref]:
    target: Any = servant if guard is None else rpc.guarded(servant, guard)
    async with (
        rpc.serve_unix(tmp_path / "s", lambda _: target),
        await rpc.connect_unix(tmp_path / "s") as connection,
    ):
        yield connection.bootstrap(FEED.Feed)


async def test_items_arrive_in_order_and_leaving_ends_it(tmp_path: Path, tools: Any) -> None:
    servant = FeedServant()
    async with serve(tmp_path, servant) as feed:
        async with subscription(feed) as lines:
            for number in range(1000):
                servant.pumps[0].offer(b"%d" % number)
            assert [int(await anext(lines)) for _ in range(1000)] == list(range(1000))
            await tools.until(lambda: servant.pumps[0].delivered == 1000)
            assert await lines.stats() == {
                "delivered": 1000, "dropped": 0, "buffered": 0, "ended": False,
            }  # fmt: skip
            with pytest.raises(RuntimeError, match="once"):
                await lines.__aenter__()
        with pytest.raises(StopAsyncIteration):
            await anext(lines)
        await lines.push([b"late"], 1)  # a call that was on its way
        with pytest.raises(StopAsyncIteration):
            await anext(lines)
        assert lines.dropped == 0
        await tools.until(lambda: not servant.running)


async def test_a_slow_subscriber_is_waited_for_loses_the_oldest_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Any
) -> None:
    monkeypatch.setattr(push, "BATCH_ITEMS_MAX", 10)
    monkeypatch.setattr(push, "READ_AHEAD_MAX", 10)
    servant = FeedServant(items_max=50)
    async with serve(tmp_path, servant) as feed, subscription(feed) as lines:
        (pump,) = servant.pumps
        for number in range(1000):
            pump.offer(b"%d" % number)
            await asyncio.sleep(0)
        await tools.until(lambda: len(lines._items) >= 10)
        assert len(lines._items) < 10 + 2 * 10, "two calls, and no more before an answer"
        got = []
        while not got or got[-1] != 999:
            got.append(int(await anext(lines)))
        assert got == sorted(set(got))
        assert got[-50:] == list(range(950, 1000)), "the newest are kept"
        assert lines.dropped == 1000 - len(got) > 0
        await tools.until(lambda: pump.delivered == len(got))


async def test_bytes_that_wait_in_the_application_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Any
) -> None:
    monkeypatch.setattr(push, "READ_AHEAD_BYTES_MAX", 200 << 10)
    servant = FeedServant()
    async with serve(tmp_path, servant) as feed, subscription(feed) as lines:
        (pump,) = servant.pumps
        for _ in range(20):
            pump.offer(b"x" * (100 << 10))
        await tools.until(lambda: lines._bytes >= 200 << 10)
        await turns(50)
        assert len(lines._items) <= 5, "one below the bound, and two calls"
        assert pump.buffered >= 15
        for _ in range(20):
            assert len(await anext(lines)) == 100 << 10
        assert lines._bytes == 0


async def test_a_revocation_ends_it_now_and_says_so(tmp_path: Path, tools: Any) -> None:
    servant, grant = FeedServant(), Grant()
    async with serve(tmp_path, servant, grant) as feed, subscription(feed) as lines:
        servant.pumps[0].offer(b"1")
        assert await anext(lines) == "1"
        grant.end(Revoked("the operator took it back"))
        assert servant.pumps[0].ended
        servant.pumps[0].offer(b"2")
        with pytest.raises(Revoked, match="the operator took it back"):
            await anext(lines)
        with pytest.raises(StopAsyncIteration):
            await anext(lines)
        assert grant.callbacks == []
        assert not servant.running


async def test_a_revocation_ends_a_push_that_is_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Any
) -> None:
    monkeypatch.setattr(push, "READ_AHEAD_MAX", 1)
    servant, grant = FeedServant(), Grant()
    async with serve(tmp_path, servant, grant) as feed, subscription(feed) as lines:
        servant.pumps[0].offer(b"1")
        await tools.until(lambda: lines._items)
        (call,) = servant.pumps[0]._in_flight
        grant.end(Revoked("gone"))
        await tools.until(call.done)
        assert isinstance(servant.pumps[0].reason, Revoked)
        assert grant.callbacks == []


async def test_a_grant_that_has_ended_ends_it_from_the_start() -> None:
    class Ended(Grant):
        def on_end(self, callback: Callable[[CapabilityError], None]) -> Callable[[], None]:
            callback(Revoked("gone"))
            return lambda: None

    sink, ended = FakeSink(), []
    pump = pump_to(sink)
    token = rpc.dispatch._current.set((Ended(), rpc.current_connection()))
    try:
        pump.start(ended.append)
    finally:
        rpc.dispatch._current.reset(token)
    pump.offer(b"1")
    await turns()
    assert ended == [pump]
    assert (sink.batches, sink.closed) == ([], 1)
    with pytest.raises(Revoked):
        await pump.stats()


@pytest.mark.parametrize(
    ("reason", "raised"),
    [
        (Disconnected("the node is stopping"), "the node is stopping"),
        (None, "the node ended the subscription"),
    ],
)
async def test_why_the_node_ended_it_reaches_the_loop(
    tmp_path: Path, reason: Disconnected | None, raised: str
) -> None:
    servant = FeedServant()
    async with serve(tmp_path, servant) as feed, subscription(feed) as lines:
        servant.pumps[0].end(reason)
        with pytest.raises(Disconnected, match=raised):
            await asyncio.wait_for(anext(lines), 60)


async def test_it_goes_on_by_what_took_the_place_of_a_lost_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = FeedServant(), FeedServant()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with contextlib.AsyncExitStack() as stack:
        lost = contextlib.AsyncExitStack()
        feed = await lost.enter_async_context(serve(tmp_path / "a", first))
        there = await stack.enter_async_context(serve(tmp_path / "b", last))
        gone = await rpc.connect_unix(tmp_path / "b" / "s")
        now, next_ones = [feed], [gone.bootstrap(FEED.Feed), there]
        await gone.aclose()
        asked: list[rpc.RpcConnection] = []

        async def again(connection: rpc.RpcConnection) -> rpc.RpcConnection:
            asked.append(connection)
            now[0] = next_ones.pop(0)
            return now[0].connection

        feed.connection.again = gone.again = again
        lines = rpc.Subscription(lambda sink: now[0].call("follow", sink=sink), bytes.decode)
        await stack.enter_async_context(lines)
        first.pumps[0].offer(b"1")
        assert await anext(lines) == "1"
        assert lines.gap_s == 0
        await lost.aclose()
        waiting = asyncio.create_task(anext(lines))
        while not last.pumps:
            await asyncio.sleep(0.001)
        last.pumps[0].offer(b"2")
        assert await asyncio.wait_for(waiting, 60) == "2"
        assert lines.gap_s > 0
        assert asked == [feed.connection, gone], "the second one was lost as well"
        there.connection.again = again
        monkeypatch.setattr(push, "STOPPED_S", 0.01)
        for reason in (Disconnected("the service failed"), stopping()):
            async with rpc.Subscription(
                lambda sink: there.call("follow", sink=sink), bytes
            ) as more:
                last.pumps[-1].end(reason)
                with pytest.raises(Disconnected, match=reason.message):
                    await asyncio.wait_for(anext(more), 60)
        assert len(asked) == 2, "its connection lives: nothing takes its place"


async def test_what_ended_with_the_lost_connection_is_not_waited_for(tmp_path: Path) -> None:
    """E.g. a part of the session that was given on: nobody makes it anew."""
    async with contextlib.AsyncExitStack() as stack:
        lost = contextlib.AsyncExitStack()
        servant = FeedServant()
        feed = await lost.enter_async_context(serve(tmp_path, servant))
        (tmp_path / "b").mkdir()
        there = await stack.enter_async_context(serve(tmp_path / "b", FeedServant()))

        async def again(connection: rpc.RpcConnection) -> rpc.RpcConnection:
            assert connection is not there.connection, "it lives"
            return there.connection

        feed.connection.again = again
        lines = rpc.Subscription(lambda sink: feed.call("follow", sink=sink), bytes.decode)
        await stack.enter_async_context(lines)
        await lost.aclose()
        with pytest.raises(Disconnected):
            await asyncio.wait_for(anext(lines), 60)


async def test_a_sink_that_fails_ends_its_subscription_with_its_reason(
    tmp_path: Path, tools: Any
) -> None:
    class Broken(rpc.Servant, interface=rpc.WW.Sink):
        async def push(self, items: list[bytes], dropped: int) -> None:
            raise InvalidArgument("no, thanks")

    servant = FeedServant()
    async with serve(tmp_path, servant) as feed, subscription(feed) as lines:
        reply: Any = await feed.call("follow", sink=Broken())
        for pump in servant.pumps:
            pump.offer(b"1")
        await tools.until(lambda: servant.pumps[1].ended)
        with pytest.raises(InvalidArgument, match="no, thanks"):
            await reply["subscription"].stats()
        assert await anext(lines) == "1", "the other one goes on"
        with pytest.raises(InvalidArgument, match="sink"):
            await feed.call("follow", sink=None)


async def test_it_ends_when_it_is_cancelled_dropped_or_the_connection_is_gone(
    tmp_path: Path, tools: Any
) -> None:
    servant, grant = FeedServant(), Grant()
    async with serve(tmp_path, servant, grant) as feed:
        lines = await subscription(feed).__aenter__()
        assert lines._ref is not None
        await lines._ref.call("cancel")
        await lines._ref.call("cancel")  # idempotent
        assert (await lines.stats())["ended"] is True
        with pytest.raises(Disconnected, match="ended the subscription"):
            await anext(lines)
        await feed.call("follow", sink=subscription(feed))  # nobody holds what it returned
        await tools.until(lambda: not servant.running)
        left_open = await subscription(feed).__aenter__()
    with pytest.raises(Disconnected):
        await asyncio.wait_for(anext(left_open), 60)
    await tools.until(lambda: not servant.running)
    assert grant.callbacks == [], "the grant, which lives, knows of none of them"


async def test_an_item_that_cannot_be_read_is_an_error_of_the_loop(tmp_path: Path) -> None:
    servant = FeedServant()
    async with serve(tmp_path, servant) as feed, subscription(feed) as lines:
        servant.pumps[0].offer(b"\xff")
        servant.pumps[0].offer(b"2")
        with pytest.raises(UnicodeDecodeError):
            await anext(lines)
        assert await anext(lines) == "2"
