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
from wetware.errors import (
    STOPPING,
    CapabilityError,
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    Revoked,
)
from wetware.hookspecs import PluginContext
from wetware.identity import Principal
from wetware.rpc import push
from wetware.testing import FakeOverlay, Started
from wetware_pubsub.client import PubSub, _message
from wetware_pubsub.config import PubSubConfig
from wetware_pubsub.router import Received
from wetware_pubsub.service import PubSubService, check_topic

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
            await publisher.publish_all(b"%d" % n for n in range(1000))
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
                assert served.service.gossip.router.topics == ("/wetware/test/t",)
            await until(lambda: served.service.gossip.router.topics == ())
            subscription = await topic.subscribe().__aenter__()
            await subscription._ref.cancel()  # type: ignore[union-attr]
            await subscription._ref.cancel()  # type: ignore[union-attr]  # idempotent
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
        await topic.ref.call("subscribe", sink=topic.subscribe(), buffer=0)
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


async def test_a_message_is_encoded_once_for_all_subscribers(tmp_path: Path) -> None:
    async with serve(tmp_path) as served, served.session() as session:
        topic = await session.join("t")
        async with topic.subscribe(), topic.subscribe():
            publisher, seqno = served.service.gossip.router.me, (1 << 63) + 5
            received = Received("/wetware/test/t", b"data", publisher, seqno.to_bytes(8, "big"))
            served.service._deliver(received)
            (pumps,) = served.service._topics.values()
            one, two = (next(iter(pump._waiting.values())) for pump in pumps)
            assert one is two
            message = _message(one)
            assert (message.data, message.publisher, message.seqno) == (b"data", publisher, seqno)


@pytest.mark.parametrize("wrong", [b"", b"12345678", b"12345678\x02p", b"12345678\x01\xffdata"])
def test_what_is_no_message_is_an_error(wrong: bytes) -> None:
    with pytest.raises(InvalidArgument, match="no message"):
        _message(wrong)
    assert _message(b"12345678\x01p").data == b""


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
        await stack.enter_async_context(topic.subscribe())
        with pytest.raises(LimitExceeded, match="subscriptions_per_principal_max"):
            await stack.enter_async_context(topic.subscribe())
        first.close()
        await until(lambda: served.service.subscribers("/wetware/test/t") == 1)
        await stack.enter_async_context(topic.subscribe())


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
    "name", ["a", "chat", "a/b/c", "A-Z_0.9~:@+", "x" * 128, "12D3KooW:chat/room-1"]
)
def test_topics(name: str) -> None:
    assert check_topic(name, 128) == name


@pytest.mark.parametrize(
    "name",
    ["", "/", "/a", "a/", "a//b", "a b", "a\n", "a\0", "ä", "a" * 129, "a\u202eb", "*", "a\r"],
)
def test_names_that_are_no_topics(name: str) -> None:
    with pytest.raises(InvalidArgument) as info:
        check_topic(name, 128)
    assert info.value.code == "invalid.topic"
    assert info.value.hint


def test_a_configuration_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold two messages"):
        PubSubConfig(queue_bytes_max=1000)
