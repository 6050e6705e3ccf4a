"""Topics as capabilities: over real RPC, with guards that end, and subscribers that are slow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.base.log import get_logger
from wetware.base.subjects import covers
from wetware.errors import (
    STOPPING,
    CapabilityError,
    Denied,
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Revoked,
)
from wetware.hookspecs import PluginContext
from wetware.identity import Principal
from wetware.rpc import push
from wetware.testing import FakeOverlay, Started
from wetware_pubsub import frames
from wetware_pubsub.client import PubSub, Topic, _batch
from wetware_pubsub.config import PubSubConfig
from wetware_pubsub.names import check_topic, is_pattern, mesh
from wetware_pubsub.requests import SiblingServant
from wetware_pubsub.router import Received
from wetware_pubsub.service import PubSubService

pytestmark = pytest.mark.anyio

ALICE = Principal("local", "alice")


class FakeGuard:
    """Ends when told to, like a revoked grant."""

    def __init__(self) -> None:
        self.ended: CapabilityError | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.callbacks: dict[object, Callable[[CapabilityError], None]] = {}

    payer = None
    metered = False

    @property
    def blocked(self) -> CapabilityError | None:
        return self.ended

    def charge(self, method: rpc.Method, nbytes: int) -> None:
        raise AssertionError("it is not metered")

    def enter(self, method: object, args: object, task: asyncio.Task[Any], passed: bool) -> None:
        if self.ended is not None:
            raise self.ended
        self.tasks.add(task)

    def leave(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)

    def exported(self) -> None:
        pass

    def unexported(self) -> bool:
        return False

    def onward(self, method: rpc.Method, args: Any, passed: bool) -> Any:
        return self

    def let_go(self) -> None:
        pass

    def on_end(self, callback: Callable[[CapabilityError], None]) -> Callable[[], None]:
        key = object()
        self.callbacks[key] = callback
        return lambda: self.callbacks.pop(key, None) and None

    def end(self) -> None:
        self.ended = Revoked("the grant was revoked")
        for task in self.tasks:
            task.cancel()
        for callback in list(self.callbacks.values()):
            callback(self.ended)


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # no one event tells of it
            await asyncio.sleep(0.002)


class Served:
    def __init__(self, service: PubSubService, path: Path) -> None:
        self.service, self.path = service, path
        self.task: asyncio.Task[None]
        self.guards: list[FakeGuard] = []

    def bootstrap(self, _: object) -> Any:
        self.guards.append(FakeGuard())
        return rpc.guarded(self.service.bootstrap(ALICE), self.guards[-1])

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[PubSub]:
        connection = await rpc.connect_unix(self.path)
        try:
            yield PubSub(connection.bootstrap(PubSub.INTERFACE))
        finally:
            await connection.aclose()


@contextlib.asynccontextmanager
async def serve(tmp_path: Path, **config: Any) -> AsyncIterator[Served]:
    ctx = PluginContext(
        name="pubsub",
        config=PubSubConfig(**config),
        log=get_logger("pubsub"),
        data_dir=tmp_path,
        clock=time,
        overlay=FakeOverlay(cluster="test"),
    )
    async with rpc.runtime():
        service = PubSubService(ctx)
        served = Served(service, tmp_path / "s")
        ready = Started()
        served.task = task = asyncio.create_task(service.run(task_status=ready))
        await ready.wait()
        try:
            async with rpc.serve_unix(served.path, served.bootstrap):
                yield served
        finally:
            task.cancel()
            await asyncio.wait([task])


# --- over RPC -------------------------------------------------------------------------------------


async def test_what_is_published_is_received_by_every_subscriber(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as one, served.session() as two:
        publisher = await one.join("chat")
        async with (
            (await one.join("chat")).subscribe() as first,
            (await two.join("chat")).subscribe() as second,
            (await two.join("other")).subscribe() as other,
        ):
            seqnos = [await publisher.publish(b"1"), await publisher.publish("zwei")]
            for messages in (first, second):
                got = [await anext(messages), await anext(messages)]
                assert [m.data for m in got] == [b"1", b"zwei"]
                assert [m.seqno for m in got] == seqnos
                assert {m.publisher for m in got} == {served.service.gossip.router.me}
                assert messages.dropped == 0
            info = await publisher.info()
            assert (info.name, info.subscribers, info.peers, info.mesh) == ("chat", 2, 0, 0)
            assert (await other.stats())["delivered"] == 0
        await until(lambda: served.service.gossip.router.topics == ())


async def test_a_burst_is_complete_and_in_order_at_eight_subscribers(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, contextlib.AsyncExitStack() as stack:
        subscriptions = []
        for _ in range(8):
            session = await stack.enter_async_context(served.session())
            topic = await session.join("burst")
            subscriptions.append(await stack.enter_async_context(topic.subscribe()))
        publisher = await (await stack.enter_async_context(served.session())).join("burst")

        async def read(messages: Any) -> list[int]:
            return [int((await anext(messages)).data) for _ in range(2000)]

        readers = [asyncio.create_task(read(s)) for s in subscriptions]
        assert await publisher.publish_all(b"%d" % n for n in range(2000)) == 2000
        for reader in readers:
            assert await asyncio.wait_for(reader, 60) == list(range(2000))
        assert [s.dropped for s in subscriptions] == [0] * 8


async def test_a_slow_subscriber_loses_the_oldest_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "READ_AHEAD_MAX", 10)
    monkeypatch.setattr(push, "BATCH_ITEMS_MAX", 10)
    async with (
        serve(tmp_path) as served,
        served.session() as slow,
        served.session() as fast,
    ):
        topic = await slow.join("t")
        async with topic.subscribe(buffer=50) as lagging, topic.subscribe(buffer=5000) as roomy:
            publisher = await fast.join("t")
            for first in range(0, 1000, 10):
                await publisher.publish_all(b"%d" % n for n in range(first, first + 10))
            got = []
            while not got or got[-1] != 999:
                got.append(int((await anext(lagging)).data))
            assert got == sorted(set(got))
            assert lagging.dropped == 1000 - len(got) > 0
            assert got[-50:] == list(range(950, 1000)), "the newest are kept"
            assert [int((await anext(roomy)).data) for _ in range(1000)] == list(range(1000))
            assert roomy.dropped == 0
            stats = await lagging.stats()
            assert stats == {
                "delivered": len(got), "dropped": lagging.dropped, "buffered": 0, "ended": False
            }  # fmt: skip


async def test_what_is_published_while_a_call_is_away_goes_with_the_next_one(
    tmp_path: Path,
) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        calls = _count_calls(topic)
        async with topic.subscribe() as messages:
            seqnos = await asyncio.gather(*(topic.publish(b"%d" % n) for n in range(500)))
            assert seqnos == list(range(seqnos[0], seqnos[0] + 500))
            assert calls == [1, 499]
            batches = [await anext(messages.batches), await anext(messages.batches)]
            assert [len(batch.data) for batch in batches] == calls
            assert batches[1].messages()[-1].data == b"499"
            assert batches[1].messages()[-1].seqno == seqnos[-1]


async def test_a_message_names_by_whose_grant_it_was_published(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic, raw = await session.join("t"), await session.join("t", raw=True)
        before = time.time()
        async with topic.subscribe() as messages, raw.subscribe() as plain:
            await topic.publish(b"1")
            await raw.publish(b"2")
            message, other = await anext(messages), await anext(plain)
        assert (message.data, message.principal) == (b"1", ALICE)
        assert message.time is not None
        assert before - 0.01 <= message.time <= time.time()
        assert (other.data, other.principal, other.time) == (b"2", None, None)
        assert other.publisher == message.publisher == served.service.gossip.router.me


async def test_a_raw_topic_has_one_message_in_each_of_gossip(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t", raw=True)
        async with topic.subscribe() as messages:
            assert served.service.gossip.router.topics == ("/wetware/test/t",)
            assert await topic.publish_all(b"%d" % n for n in range(50)) == 50
            assert [int((await anext(messages)).data) for _ in range(50)] == list(range(50))
            data, lengths = rpc.packed.pack([b"a", b"b"])
            with pytest.raises(InvalidArgument) as info:
                await topic.ref.call("publish", data=data, lengths=lengths)
            assert info.value.code == "invalid.packed"


async def test_who_publishes_much_waits_only_where_there_is_no_room(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        calls = _count_calls(topic)
        async with topic.subscribe(slow="block") as messages:
            async with topic.publisher() as publisher:
                for number in range(20_000):
                    await publisher.publish(b"%064d" % number)
            assert publisher.published == 20_000
            assert publisher.waiting == 0
            assert len(calls) < 20
            assert max(calls) <= rpc.packed.VALUES_MAX
            assert [int((await anext(messages)).data) for _ in range(20_000)] == [*range(20_000)]


def _count_calls(topic: Any) -> list[int]:
    """How many messages each call has that publishes."""
    counts: list[int] = []
    call = topic._queue._call

    async def counted(method: str, **params: Any) -> Any:
        counts.append(max(1, len(params.get("lengths", b"")) // 4))
        return await call(method, **params)

    topic._queue._call = counted
    return counts


class Choosy(FakeGuard):
    """Lets the first values of a call through, up to one that begins with a minus."""

    def enter(self, method: Any, args: Any, task: asyncio.Task[Any], passed: bool) -> None:
        super().enter(method, args, task, passed)
        if method.packed is None:
            return
        values = rpc.packed.unpack(
            args["data"], rpc.packed.lengths_of(len(args["data"]), args["lengths"])
        )
        taken = next((n for n, value in enumerate(values) if value[:1] == b"-"), len(values))
        if not taken:
            raise Denied(f"{values[0]!r} is negative")
        if taken < len(values):
            args["data"], args["lengths"] = rpc.packed.pack(values[:taken])


async def test_of_a_frame_each_message_has_its_own_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(tmp_path) as served:
        monkeypatch.setattr(f"{__name__}.FakeGuard", Choosy)
        async with served.session() as session:
            topic = await session.join("t")
            async with topic.subscribe() as messages:
                texts = [b"0", b"1", b"-2", b"3", b"-4", b"-5", b"6"]
                calls = [topic.publish(text) for text in texts]
                answers = await asyncio.gather(*calls, return_exceptions=True)
                good = [0, 1, 3, 6]
                assert [n for n, a in enumerate(answers) if isinstance(a, int)] == good
                assert [type(a) for a in answers if not isinstance(a, int)] == [Denied] * 3
                assert [str(a) for a in answers if isinstance(a, Denied)] == [
                    f"b'-{n}' is negative" for n in (2, 4, 5)
                ]
                got = [await anext(messages) for _ in good]
                assert [int(m.data) for m in got] == good
                assert [m.seqno for m in got] == [answers[n] for n in good]


async def test_after_a_refusal_a_publisher_sends_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(tmp_path) as served:
        monkeypatch.setattr(f"{__name__}.FakeGuard", Choosy)
        async with served.session() as session:
            topic = await session.join("t")
            async with topic.subscribe() as messages:
                with pytest.raises(Denied, match="-3"):
                    await topic.publish_all([b"1", b"2", b"-3", b"4"])
                await topic.publish(b"5")
                assert [(await anext(messages)).data for _ in range(3)] == [b"1", b"2", b"5"]


async def test_revocation_ends_all_that_wait_to_be_published(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        publishing = [asyncio.create_task(topic.publish(b"x")) for _ in range(50)]
        await asyncio.sleep(0)
        served.guards[0].end()
        answers = await asyncio.gather(*publishing, return_exceptions=True)
        assert {type(a) for a in answers[1:]} == {Revoked}
        with pytest.raises(Revoked):
            await topic.publish_all([b"1", b"2"])


async def test_who_gives_up_waiting_has_not_published(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        async with topic.subscribe() as messages:
            texts = [b"1", b"2", b"3"]
            first, second, third = (asyncio.create_task(topic.publish(t)) for t in texts)
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.gather(first, third)
            assert [(await anext(messages)).data for _ in range(2)] == [b"1", b"3"]


@pytest.mark.parametrize(
    "lengths", [b"\1", b"\1\0\0\0", b"\3\0\0\0", b"\xff\xff\xff\xff" * 2, bytes(4 * 4097)]
)
async def test_a_frame_that_lies_about_its_lengths_is_not_published(
    tmp_path: Path, lengths: bytes
) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        with pytest.raises(InvalidArgument) as info:
            await topic.ref.call("publish", data=b"ab", lengths=lengths)
        assert info.value.code == "invalid.packed"
        assert served.service.gossip.router.stats.published == 0


async def test_an_oversize_frame_is_not_published(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        data, lengths = rpc.packed.pack([bytes(frames.PACK_BYTES), b"x"])
        with pytest.raises(InvalidArgument) as info:
            await topic.ref.call("publish", data=data, lengths=lengths)
        assert info.value.code == "invalid.packed"
        await topic.publish_all([bytes(frames.PACK_BYTES), b"x", bytes(512 << 10), b"y"])
        assert served.service.gossip.router.stats.published == 4


# --- slow consumers -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def stuck(
    tmp_path: Path, slow: str, *, name: str = "t", **config: Any
) -> AsyncIterator[tuple[Served, Any, Any, Any]]:
    """A subscriber that does not read, with room for 100 KB: served, its messages and a topic."""
    async with (
        serve(tmp_path, buffer_bytes_max=100_000, **config) as served,
        served.session() as session,
        served.session() as other,
    ):
        topic = await session.join(name)
        async with topic.subscribe(slow=slow) as messages:
            (pumps,) = served.service._topics.values()
            yield served, messages, await other.join(name), next(iter(pumps))


def _small_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "READ_AHEAD_BYTES_MAX", 50_000)
    monkeypatch.setattr(push, "BATCH_BYTES_MAX", 20_000)


async def _read_on(messages: Any) -> None:
    async for _ in messages:
        pass


@pytest.mark.parametrize("slow", ["dropOldest", "dropNewest"])
async def test_a_slow_consumer_loses_what_it_said_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    _small_read_ahead(monkeypatch)
    async with stuck(tmp_path, slow) as (_, messages, topic, pump):
        for number in range(100):
            await topic.publish(b"%d" % number + b" " * 10_000)
            assert pump._bytes <= 100_000, "memory is flat"
        await until(lambda: not pump._in_flight or pump.dropped > 50)
        got = [int((await anext(messages)).data)]
        while len(got) + messages.dropped < 100:
            got.append(int((await anext(messages)).data))
        assert messages.dropped == pump.dropped > 50
        assert got == sorted(set(got))
        assert (got[-1] == 99) == (slow == "dropOldest")
        if slow == "dropNewest":
            assert got == [*range(len(got))]


async def test_a_slow_consumer_is_disconnected_if_it_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_read_ahead(monkeypatch)
    async with stuck(tmp_path, "disconnect") as (served, messages, topic, pump):
        for _ in range(100):
            await topic.publish(b" " * 10_000)
        assert pump.ended
        assert served.service.subscribers("/wetware/test/t#1", "t") == 0
        with pytest.raises(LimitExceeded) as info:
            await asyncio.wait_for(_read_on(messages), 20)
        assert info.value.code == "limit.slow"


async def test_publishers_wait_for_a_slow_consumer_if_it_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_read_ahead(monkeypatch)
    async with stuck(tmp_path, "block") as (_, messages, topic, pump):

        async def publish() -> None:
            for number in range(100):
                await topic.publish(b"%d" % number + b" " * 10_000)
                assert pump._bytes <= 120_000, "one more than there is room for"

        publishing = asyncio.create_task(publish())
        await until(lambda: not pump.has_room)
        assert [int((await anext(messages)).data) for _ in range(100)] == [*range(100)]
        await publishing
        assert messages.dropped == pump.dropped == 0


async def test_a_consumer_that_blocks_for_too_long_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_read_ahead(monkeypatch)
    async with stuck(tmp_path, "block", publish_wait_s=0.3) as (_, messages, topic, pump):
        for _ in range(100):
            await topic.publish(b" " * 10_000)
        assert pump.ended
        with pytest.raises(LimitExceeded) as info:
            await asyncio.wait_for(_read_on(messages), 20)
        assert info.value.code == "limit.slow"


def test_what_a_slow_consumer_can_be_is_named() -> None:
    with pytest.raises(InvalidArgument, match="nothing that a subscriber can be") as info:
        Topic.subscribe(Topic.__new__(Topic), slow="wait")
    assert "block" in info.value.hint


async def test_a_buffer_is_bounded_in_bytes(tmp_path: Path) -> None:
    async with serve(tmp_path, buffer_bytes_max=1 << 20) as served, served.session() as session:
        topic = await session.join("t")
        async with topic.subscribe() as messages:
            big = 300 << 10
            for number in range(20):
                await topic.publish(b"%d" % number + b" " * big)
            got = []
            while not got or got[-1] != 19:
                got.append(int((await anext(messages)).data))
            assert len(got) + messages.dropped == 20


async def test_revocation_ends_a_subscription_at_once(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        async with topic.subscribe() as messages:
            await topic.publish(b"1")
            assert (await anext(messages)).data == b"1"
            waiting = asyncio.create_task(anext(messages))
            await asyncio.sleep(0)
            served.guards[0].end()
            with pytest.raises(Revoked):
                await asyncio.wait_for(waiting, 60)
            assert served.service.gossip.router.topics == ()
            with pytest.raises(StopAsyncIteration):
                await anext(messages)
        with pytest.raises(Revoked):
            await topic.publish(b"2")
        assert not served.guards[0].callbacks


async def test_leaving_or_losing_the_connection_ends_a_subscription(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        async with served.session() as session:
            topic = await session.join("t")
            async with topic.subscribe():
                assert served.service.gossip.router.topics == ("/wetware/test/t#1",)
            await until(lambda: served.service.gossip.router.topics == ())
            subscription = await topic.subscribe().__aenter__()
            await subscription.batches._ref.cancel()  # type: ignore[union-attr]
            await subscription.batches._ref.cancel()  # type: ignore[union-attr]  # idempotent
            assert (await subscription.stats())["ended"] is True
            with pytest.raises(Disconnected):
                await anext(subscription)
            left_open = await topic.subscribe().__aenter__()
        with pytest.raises(Disconnected):
            await asyncio.wait_for(anext(left_open), 60)
        await until(lambda: served.service.gossip.router.topics == ())
        assert not served.guards[0].callbacks


async def test_a_subscription_that_is_dropped_ends(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        await topic.ref.call("subscribe", sink=topic.subscribe().batches, buffer=0)
        await until(lambda: served.service.gossip.router.topics == ())


async def test_a_sink_that_fails_ends_its_subscription_alone(tmp_path: Path) -> None:
    class Broken(rpc.Servant, interface=rpc.WW.Sink):
        async def push(self, **_: object) -> None:
            raise InvalidArgument("no, thanks")

    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        async with topic.subscribe() as good:
            reply: Any = await topic.ref.call("subscribe", sink=Broken(), buffer=0)
            await topic.publish(b"1")
            await topic.publish(b"2")
            assert [(await anext(good)).data for _ in range(2)] == [b"1", b"2"]
            with pytest.raises(InvalidArgument, match="no, thanks"):
                await reply["subscription"].stats()


async def test_all_subscribers_are_handed_the_same_bytes(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        async with topic.subscribe(), topic.subscribe():
            publisher, seqno = served.service.gossip.router.me, (1 << 63) + 5
            data, lengths = rpc.packed.pack([b"one", b"", b"three"])
            frame = frames.encode(ALICE, 1.5, data, lengths)
            served.service._deliver(
                Received("/wetware/test/t#1", frame, publisher, seqno.to_bytes(8, "big"), 3)
            )
            (pumps,) = served.service._topics.values()
            (one, count), (two, _) = (next(iter(pump._waiting.values())) for pump in pumps)
            assert one is two
            assert count == 3
            messages = _batch("t", one, raw=False).messages()
            assert [m.data for m in messages] == [b"one", b"", b"three"]
            assert [m.seqno for m in messages] == [seqno, seqno + 1, seqno + 2]
            assert {(m.publisher, m.principal, m.time) for m in messages} == {
                (publisher, ALICE, 1.5)
            }


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("wrong", [b"", b"12345678", b"12345678\x02p", b"12345678\x01\xffdata"])
def test_what_is_no_message_is_an_error(wrong: bytes, raw: bool) -> None:
    with pytest.raises(InvalidArgument, match="no message"):
        _batch("t", wrong, raw=raw)
    assert _batch("t", b"12345678\x01p", raw=True).data == [b""]


async def test_a_stopping_node_says_so_and_takes_no_more_subscribers(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        async with asyncio.timeout(60), topic.subscribe() as messages:
            served.task.cancel()
            await asyncio.wait([served.task])
            with pytest.raises(Disconnected) as info:
                await anext(messages)
            assert info.value.code == STOPPING
            with pytest.raises(Disconnected, match="not running"):
                await topic.subscribe().__aenter__()
        assert not served.service._topics
        assert not served.service._per_principal


async def test_limits_and_bad_arguments_are_named(tmp_path: Path) -> None:
    async with (
        serve(
            tmp_path,
            subscriptions_per_principal_max=2,
            topics_max=1,
            buffer_messages_max=100,
            buffer_messages_default=100,
            message_bytes_max=10,
        ) as served,
        served.session() as session,
        contextlib.AsyncExitStack() as stack,
    ):
        topic = await session.join("t")
        with pytest.raises(InvalidArgument, match="buffer_messages_max"):
            await stack.enter_async_context(topic.subscribe(buffer=101))
        with pytest.raises(InvalidArgument, match="message_bytes_max"):
            await topic.publish(b"x" * 11)
        with pytest.raises(TypeError, match=r"Topic.publish: data: expected bytes, not int"):
            await topic.publish(5)  # type: ignore[arg-type]  # five zero bytes, once
        with pytest.raises(InvalidArgument, match="sink"):
            await topic.ref.call("subscribe", sink=None, buffer=0)
        with pytest.raises(InvalidArgument):
            topic.subscribe(buffer=-1)
        first = await stack.enter_async_context(topic.subscribe())
        with pytest.raises(LimitExceeded, match="topics_max"):
            await stack.enter_async_context((await session.join("u")).subscribe())
        with pytest.raises(LimitExceeded, match="topics_max"):  # peers remember that one as well
            await stack.enter_async_context((await session.join("u")).serve(_unasked))
        await stack.enter_async_context(topic.subscribe())
        with pytest.raises(LimitExceeded, match="subscriptions_per_principal_max"):
            await stack.enter_async_context(topic.subscribe())
        first.close()
        await until(lambda: served.service.subscribers("/wetware/test/t#1", "t") == 1)
        await stack.enter_async_context(topic.subscribe())


async def _unasked(request: object) -> None:
    pytest.fail("asked")


async def test_who_blocks_is_looked_at_once_for_each_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of them for each: a frame that nobody gets would stop the node for seconds."""
    async with serve(tmp_path) as served, served.session() as session:
        service, looks = served.service, 0
        topic = await session.join("a.*.b")
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                await stack.enter_async_context(topic.subscribe(slow="block"))
            full = [pump for pumps in service._topics.values() for pump in pumps]
            monkeypatch.setattr(service, "_full", lambda: full)

            def covering(*args: Any) -> bool:
                nonlocal looks
                looks += 1
                return covers(*args)

            monkeypatch.setattr("wetware_pubsub.service.covers", covering)
            await (await session.join("a.x.c")).publish(b"")
            assert looks == 2 * len(full), "once to deliver it, and once to wait"


async def test_what_another_node_asks_is_judged_as_a_request_is(tmp_path: Path) -> None:
    async with serve(tmp_path, message_bytes_max=10) as served:
        sibling: Any = SiblingServant(served.service.requests, "12D3KooW")
        bad = [
            {"topic": "orders.>"},
            {"data": bytes(11)},
            {"principal": "nobody"},
            {"topic": "." * 1000},
        ]
        for changed in bad:
            asked = {"topic": "a", "data": b"", "principal": "local:ada", "every": False}
            with pytest.raises(InvalidArgument):
                await sibling.ask(**{**asked, **changed}, inbox=object())
        with pytest.raises(NotFound):
            await sibling.ask(**asked, inbox=object())


def test_a_name_is_measured_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wetware_pubsub.names.tokens_of", lambda name: pytest.fail("looked at"))
    with pytest.raises(InvalidArgument, match="has 1000000 characters"):
        check_topic("." * 1_000_000, 128)


async def test_a_failing_publish_all_says_so_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with serve(tmp_path, message_bytes_max=10) as served, served.session() as session:
        topic = await session.join("t")
        before = asyncio.all_tasks()

        async def source() -> AsyncIterator[str]:
            for n in range(200):
                yield "x" * 11 if n == 100 else str(n)

        with pytest.raises(InvalidArgument, match="message_bytes_max"):
            await topic.publish_all(source())
        assert asyncio.all_tasks() <= before
        assert await topic.publish_all([]) == 0
        assert served.service.gossip.router.stats.published >= 100


@pytest.mark.parametrize(
    ("name", "heard"),
    [
        ("a", "a"),
        ("chat", "chat"),
        ("a/b/c", "a/b/c"),
        ("A-Z_0.9~:@+", "A-Z_0.>"),
        ("x" * 128, "x" * 128),
        ("12D3KooW:chat/room-1", "12D3KooW:chat/room-1"),
        ("a.b", "a.>"),
        ("a.", "a.>"),
        (".a..b", ".>"),
        ("a/b.c/d.e", "a/b.>"),
        ("a.*", "a.>"),
        ("a.>", "a.>"),
        ("a.*.c.>", "a.>"),
    ],
)
def test_topics(name: str, heard: str) -> None:
    assert check_topic(name, 128) == name
    assert mesh(name) == heard
    assert is_pattern(name) is ("*" in name or ">" in name)


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "/a", "a/", "a//b", "a b", "a\n", "a\0", "ä", "a" * 129, "a\u202eb", "*", "a\r",
        ">", "*.a", "a.>.b", "a.b*", "a>", "a/*", "a.*/b",
    ],
)  # fmt: skip
def test_names_that_are_no_topics(name: str) -> None:
    with pytest.raises(InvalidArgument) as info:
        check_topic(name, 128)
    assert info.value.code == "invalid.topic"
    assert info.value.hint


async def test_the_first_token_is_no_wildcard(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        for name in (">", "*", "*.new"):
            with pytest.raises(InvalidArgument, match="every message of the cluster") as info:
                await session.join(name)
            assert info.value.code == "invalid.topic"


async def test_a_pattern_is_subscribed_and_not_published_to(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        pattern = await session.join("a.*")
        with pytest.raises(InvalidArgument, match="cannot be published to"):
            await pattern.publish(b"1")
        with pytest.raises(InvalidArgument, match="raw topic"):
            await session.join("a.*", raw=True)
        assert not served.service.gossip.router.stats.published


async def test_subjects_of_one_mesh_are_told_apart(tmp_path: Path) -> None:
    """Each subscriber gets what its pattern matches, in order, and nothing else of the mesh."""
    wanted = {
        "a.b": ["a.b"],
        "a.*": ["a.b", "a.c"],
        "a.*.d": ["a.b.d"],
        "a.>": ["a.b", "a.c", "a.b.d"],
        "a.c.>": [],
        "a": ["a"],
    }
    async with (
        serve(tmp_path) as served,
        served.session() as session,
        served.session() as other,
        contextlib.AsyncExitStack() as stack,
    ):
        subscribed = {
            name: await stack.enter_async_context((await other.join(name)).subscribe())
            for name in wanted
        }
        assert set(served.service.gossip.router.topics) == {
            "/wetware/test/a#1", "/wetware/test/a.>#1",
        }  # fmt: skip
        for name in ("a.b", "a", "a.c", "a.b.d", "ab.c"):
            await (await session.join(name)).publish(name)
        for name, messages in subscribed.items():
            got = [await anext(messages) for _ in wanted[name]]
            assert [m.data.decode() for m in got] == [m.topic for m in got] == wanted[name]
            assert (await messages.stats())["delivered"] == len(got), name
            info = await (await session.join(name)).info()
            assert info.subscribers == {"a.b": 3, "a.*": 2, "a.*.d": 2, "a.c.>": 2}.get(name, 1)


async def test_a_blocking_subscriber_holds_up_what_it_would_get_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_read_ahead(monkeypatch)
    async with stuck(tmp_path, "block", name="t.a") as (served, messages, topic, pump):

        async def publish() -> None:
            for number in range(100):
                await topic.publish(b"%d" % number + b" " * 10_000)

        publishing = asyncio.create_task(publish())
        await until(lambda: not pump.has_room)
        async with served.session() as session:
            await (await session.join("t.b")).publish(b"free")
        assert not pump.has_room
        assert [int((await anext(messages)).data) for _ in range(100)] == [*range(100)]
        await publishing


def test_a_configuration_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold two messages"):
        PubSubConfig(queue_bytes_max=1000)
