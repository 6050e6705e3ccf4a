"""Requests and their answers, on one node and over two."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

import wetware
from wetware import rpc
from wetware.errors import (
    Denied,
    Disconnected,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Revoked,
    TimedOut,
)
from wetware.identity import Principal
from wetware.testing import NodeProcess
from wetware_pubsub.requests import REQUESTS_PER_REQUESTER_MAX, RESPONDERS_PER_PRINCIPAL_MAX
from wetware_pubsub.schema import SCHEMA

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def sessions(*nodes: NodeProcess) -> AsyncIterator[list[Any]]:
    async with contextlib.AsyncExitStack() as stack:
        key = nodes[0].home.key()
        yield [
            await stack.enter_async_context(wetware.connect(node.addr, key=key)) for node in nodes
        ]


async def add(request: Any) -> bytes:
    return b"%d" % sum(map(int, request.data.split()))


async def answered(session: Any, topic: str, data: bytes) -> Any:
    """The answer, asking again until a responder at another node is known at this one."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await session.pubsub.request(topic, data, timeout_s=60)
            except NotFound:
                await asyncio.sleep(0.05)


async def test_a_request_is_answered_by_whoever_serves(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, b = pair
    me = Principal("local", str(a.home.key().peer_id))
    async with sessions(a, a, b) as (one, two, far):
        asked = []

        async def handler(request: Any) -> bytes:
            asked.append(request)
            return await add(request)

        async with (await two.pubsub.join("sum")).serve(handler):
            answer = await one.pubsub.request("sum", b"1 2", timeout_s=60)
            assert answer == (b"3", me, a.peer_id)
            assert await answered(far, "sum", b"20 22") == (b"42", me, a.peer_id)
            assert [(r.data, r.topic, r.principal, r.node) for r in asked] == [
                (b"1 2", "sum", me, a.peer_id),
                (b"20 22", "sum", me, b.peer_id),
            ]
            many = [one.pubsub.request("sum", b"%d 1" % n, timeout_s=60) for n in range(100)]
            assert [a.data for a in await asyncio.gather(*many)] == [
                b"%d" % (n + 1) for n in range(100)
            ]


async def test_nobody_listens_is_said_at_once(pair: tuple[NodeProcess, NodeProcess]) -> None:
    """Also where somebody subscribes, or serves another name of the mesh, or did so before."""
    a, _ = pair
    async with sessions(a, a) as (one, two):
        async with (
            (await two.pubsub.join("void.b")).serve(add),
            (await two.pubsub.join("void.a")).subscribe(),
        ):
            for name in ("void.a", "void", "nowhere"):
                with pytest.raises(NotFound, match="nobody serves") as info:
                    await one.pubsub.request(name, b"1", timeout_s=3600)
                assert info.value.code == "not_found.responder"
        async with (await two.pubsub.join("gone")).serve(add):
            await one.pubsub.request("gone", b"1")
        await nobody_left(one, "gone")


async def nobody_left(session: Any, name: str) -> None:
    """A responder's release may still be on its way."""
    async with asyncio.timeout(60):
        while True:
            try:
                await session.pubsub.request(name, b"1", timeout_s=3600)
            except Disconnected:
                continue
            except NotFound:
                return


async def test_a_pattern_is_served_and_not_asked(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    async with sessions(a, a) as (one, two):

        async def which(request: Any) -> str:
            return str(request.topic)

        async with (await two.pubsub.join("which.*")).serve(which):
            assert (await one.pubsub.request("which.one", b"")).data == b"which.one"
            for name in ("which.one.more", "which"):
                with pytest.raises(NotFound):
                    await one.pubsub.request(name, b"")
            with pytest.raises(InvalidArgument):
                await one.pubsub.request("which.*", b"")
        with pytest.raises(InvalidArgument, match="raw"):
            await (await one.pubsub.join("raw", raw=True)).request(b"")


async def test_many_answers(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, b = pair

    async def several(request: Any) -> AsyncIterator[bytes]:
        for number in range(int(request.data)):
            yield b"%d" % number

    async with sessions(a, a, b) as (one, two, far):
        topic = await one.pubsub.join("many")
        with pytest.raises(InvalidArgument):
            topic.request_many(b"", count=1)
        async with (
            (await two.pubsub.join("many")).serve(several),
            (await far.pubsub.join("many")).serve(several),
        ):
            async with asyncio.timeout(60):
                nodes: set[str] = set()
                while nodes != {a.peer_id, b.peer_id}:
                    async with topic.request_many(b"1", timeout_s=60) as answers:
                        nodes = {answer.node async for answer in answers}
            async with topic.request_many(b"100", timeout_s=60) as answers:
                got: dict[str, list[int]] = {}
                async for answer in answers:
                    got.setdefault(answer.node, []).append(int(answer.data))
            assert got == {a.peer_id: [*range(100)], b.peer_id: [*range(100)]}
            assert answers.complete
            async with topic.request_many(b"100", count=5, timeout_s=60) as answers:
                assert len([answer async for answer in answers]) == 5


async def test_what_a_responder_raises_and_what_it_keeps_to_itself(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair

    async def handler(request: Any) -> bytes | None:
        match request.data:
            case b"bad":
                raise InvalidArgument("no number", hint="send one", code="invalid.number")
            case b"denied":
                raise Revoked("the grant was revoked")
            case b"bug":
                raise ZeroDivisionError("secret")
        return None

    async with sessions(a, a) as (one, two):
        topic = await one.pubsub.join("errors")
        async with (await two.pubsub.join("errors")).serve(handler):
            with pytest.raises(InvalidArgument, match="no number") as bad:
                await topic.request(b"bad")
            assert (bad.value.code, bad.value.hint) == ("invalid.number", "send one")
            with pytest.raises(InternalError) as bug:
                await topic.request(b"bug")
            assert "secret" not in str(bug.value)
            with pytest.raises(Disconnected) as denied:  # its own grant's, not the requester's
                await topic.request(b"denied")
            assert denied.value.code == "overlay.disconnected.responder"
            with pytest.raises(NotFound) as none:
                await topic.request(b"")
            assert none.value.code == "not_found.answer"


class Responder(rpc.Servant, interface=SCHEMA.Responder):
    """Keeps what it is handed, and says nothing until told."""

    def __init__(self) -> None:
        self.inboxes: asyncio.Queue[rpc.Ref] = asyncio.Queue()
        self.cancelled = asyncio.Event()
        self.done = asyncio.Event()
        self.subscription: Any = None

    async def handle(self, inbox: rpc.Ref, **_: object) -> None:
        await self.inboxes.put(inbox)
        try:
            await self.done.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@contextlib.asynccontextmanager
async def held(session: Any, name: str) -> AsyncIterator[Responder]:
    responder = Responder()
    reply = await (await session.pubsub.join(name)).ref.call("serve", responder=responder)
    responder.subscription = reply["subscription"]
    try:
        yield responder
    finally:
        responder.subscription.close()


async def late(inbox: rpc.Ref) -> None:
    with pytest.raises(NotFound) as info:
        await inbox.call("answer", data=b"late", principal="", node="")
    assert info.value.code == "not_found.request"


async def test_an_answer_after_the_timeout_is_refused(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    """And its handler was cancelled; over two nodes as well."""
    a, b = pair
    async with sessions(a, a, b) as (near, at_a, far), held(at_a, "late") as responder:
        await until_known(far, "late", responder)
        for session in (near, far):
            topic = await session.pubsub.join("late")
            responder.cancelled.clear()
            with pytest.raises(TimedOut):
                await topic.request(b"1", timeout_s=0.3)
            inbox = await responder.inboxes.get()
            async with asyncio.timeout(60):
                await responder.cancelled.wait()
            await late(inbox)


async def until_known(session: Any, name: str, responder: Responder) -> None:
    """Until the responder has had a request of the session; it is let go."""
    async with asyncio.timeout(60):
        while responder.inboxes.empty():
            with contextlib.suppress(NotFound, TimedOut):
                await session.pubsub.request(name, b"", timeout_s=0.2)
    while not responder.inboxes.empty():
        responder.inboxes.get_nowait()


async def test_forged_answers_are_refused_or_name_who_gave_them(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, b = pair
    me = Principal("local", str(a.home.key().peer_id))
    async with (
        sessions(a, a, b) as (one, two, far),
        held(far, "forged") as responder,
        held(two, "forger") as other,
    ):
        await until_known(one, "forged", responder)
        asking = asyncio.create_task(one.pubsub.request("forged", b"1", timeout_s=60))
        inbox = await asyncio.wait_for(responder.inboxes.get(), 60)
        elsewhere = asyncio.create_task(one.pubsub.request("forger", b"1", timeout_s=60))
        stolen = await asyncio.wait_for(other.inboxes.get(), 60)
        await stolen.call("answer", data=b"mine", principal="local:root", node="12D3KooWnobody")
        assert await elsewhere == (b"mine", me, a.peer_id)
        assert not asking.done(), "another inbox is another request"
        await inbox.call("answer", data=b"3", principal="local:root", node=str(a.peer_id))
        assert await asking == (b"3", me, b.peer_id)
        await late(inbox)
        await late(stolen)


async def test_a_responder_that_dies_is_told_at_once(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, b = pair
    async with sessions(a, b) as (one, far):
        for close in (True, False):
            async with wetware.connect(b.addr, key=a.home.key()) as dying:
                responder = Responder()
                topic = await dying.pubsub.join("dies")
                reply: Any = await topic.ref.call("serve", responder=responder)
                await until_known(one, "dies", responder)
                asking = [
                    asyncio.create_task(session.pubsub.request("dies", b"1", timeout_s=3600))
                    for session in (one, far)
                ]
                for _ in asking:
                    await asyncio.wait_for(responder.inboxes.get(), 60)
                if close:
                    reply["subscription"].close()
                else:
                    await dying.close()
            for each in asking:
                with pytest.raises(Disconnected) as info:
                    await asyncio.wait_for(each, 60)
                assert info.value.code == "overlay.disconnected.responder"


async def test_revocation_in_the_middle_ends_both_sides(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair
    async with sessions(a) as (session,):
        ref, grant = await session.share({"pubsub:cut": []})
        async with wetware.connect(ref) as guest, held(session, "cut") as responder:
            asking = asyncio.create_task(guest.pubsub.request("cut", b"1", timeout_s=3600))
            inbox = await asyncio.wait_for(responder.inboxes.get(), 60)
            await session.revoke(grant.id)
            with pytest.raises(Revoked):
                await asyncio.wait_for(asking, 60)
            await asyncio.wait_for(responder.cancelled.wait(), 60)
            await late(inbox)
        ref, grant = await session.share({"pubsub:cut": []})
        async with wetware.connect(ref) as guest:
            started = asyncio.Event()

            async def handler(_: Any) -> None:
                started.set()
                await asyncio.sleep(3600)

            async with (await guest.pubsub.join("cut")).serve(handler) as serving:
                asking = asyncio.create_task(session.pubsub.request("cut", b"1", timeout_s=3600))
                await asyncio.wait_for(started.wait(), 60)
                await session.revoke(grant.id)
                with pytest.raises(Disconnected):
                    await asyncio.wait_for(asking, 60)
                with pytest.raises(Revoked):
                    await asyncio.wait_for(serving.wait(), 60)
        with pytest.raises(NotFound):
            await session.pubsub.request("cut", b"1", timeout_s=3600)


async def test_grants_bound_who_asks_who_serves_and_what(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair
    async with sessions(a) as (session,):
        methods = ["PubSub.join", "Topic.request"]
        asks = await session.attenuate({"pubsub": methods}, where=["topic=ask", "data=max:3"])
        topic = await asks.pubsub.join("ask")
        with pytest.raises(Denied):
            await topic.serve(add).__aenter__()
        with pytest.raises(Denied):
            await topic.request(b"1 23")
        async with (await session.pubsub.join("ask")).serve(add):
            assert (await topic.request(b"1 2")).data == b"3"
        serves = await session.attenuate({"pubsub": ["PubSub.join", "Topic.serve"]})
        async with (await serves.pubsub.join("mute")).serve(add):
            with pytest.raises(Disconnected):  # `Inbox.answer` is not granted
                await session.pubsub.request("mute", b"1")


@contextlib.asynccontextmanager
async def asking(topic: Any, data: bytes, count: int) -> AsyncIterator[None]:
    """So many requests are in flight for the block."""
    tasks = [asyncio.create_task(topic.request(data, timeout_s=3600)) for _ in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_requests_in_flight_are_bounded(pair: tuple[NodeProcess, NodeProcess]) -> None:
    """One user leaves room at a responder for others; responders of one user leave it at a node."""
    a, _ = pair
    async with sessions(a, a) as (one, two), held(two, "full") as responder:
        topic = await one.pubsub.join("full")
        async with asking(topic, b"1", REQUESTS_PER_REQUESTER_MAX):
            for _ in range(REQUESTS_PER_REQUESTER_MAX):
                await asyncio.wait_for(responder.inboxes.get(), 60)
            with pytest.raises(LimitExceeded) as info:
                await topic.request(b"1", timeout_s=60)
            assert info.value.code == "limit.requests"
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(RESPONDERS_PER_PRINCIPAL_MAX - 1):
                    await stack.enter_async_context(held(two, "many"))
                with pytest.raises(LimitExceeded) as info:
                    await stack.enter_async_context(held(two, "many"))
                assert info.value.code == "limit.responders"


async def test_requests_that_wait_leave_the_link_to_others(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, b = pair
    async with (
        sessions(a, b) as (one, far),
        held(far, "slow") as responder,
        (await far.pubsub.join("quick")).serve(add),
    ):
        await until_known(one, "slow", responder)
        assert (await answered(one, "quick", b"1 2")).data == b"3"
        async with asking(await one.pubsub.join("slow"), bytes(512 << 10), 24):
            await asyncio.wait_for(responder.inboxes.get(), 60)
            with pytest.raises(LimitExceeded) as info:
                await one.pubsub.request("slow", bytes(512 << 10), timeout_s=60)
            assert info.value.code == "limit.requests"
            assert (await one.pubsub.request("quick", b"1 2", timeout_s=60)).data == b"3"


async def test_who_takes_no_answer_is_not_waited_for(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, b = pair

    class Full(rpc.Servant, interface=SCHEMA.Inbox):
        async def answer(self, **_: object) -> None:
            await asyncio.Event().wait()

    async def flood(request: Any) -> AsyncIterator[bytes]:
        while True:
            yield bytes(512 << 10)

    async with (
        sessions(a, b) as (one, far),
        (await far.pubsub.join("flood")).serve(flood),
        (await far.pubsub.join("quick")).serve(add),
    ):
        assert (await answered(one, "quick", b"1 2")).data == b"3"
        await answered(one, "flood", b"")
        topic = (await one.pubsub.join("flood")).ref
        tasks = [
            asyncio.create_task(topic.call("request", data=b"", inbox=Full(), count=9))
            for _ in range(3)
        ]
        assert (await one.pubsub.request("quick", b"1 2", timeout_s=60)).data == b"3"
        for task in tasks:
            with pytest.raises(LimitExceeded) as info:
                await task
            assert info.value.code == "limit.slow"


async def test_nobody_is_asked_again_for_what_a_responder_did_not_find(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, b = pair
    seen: list[object] = []
    async with sessions(a, b) as (one, far):

        async def nest(request: Any) -> None:
            seen.append(request)
            await one.pubsub.request("nobody", b"", timeout_s=60)

        async def first(request: Any) -> bytes:
            return b"here"

        async with (await far.pubsub.join("nest")).serve(first):
            await answered(one, "nest", b"")
        async with (
            (await one.pubsub.join("nest")).serve(nest),
            (await far.pubsub.join("nest")).serve(nest),
        ):
            with pytest.raises(NotFound) as info:
                await one.pubsub.request("nest", b"", timeout_s=60)
            assert info.value.code == "not_found.responder.onward"
            assert len(seen) == 1


async def test_an_answer_after_its_responder_was_done_is_refused(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair
    async with sessions(a, a) as (one, two), held(one, "done") as quick, held(two, "done") as slow:
        topic = await one.pubsub.join("done")
        async with topic.request_many(b"", count=9, timeout_s=60) as answers:
            inbox = await slow.inboxes.get()
            await quick.inboxes.get()
            slow.done.set()
            async with asyncio.timeout(60):
                while (await slow.subscription.call("stats"))["buffered"]:
                    await asyncio.sleep(0.02)
            await late(inbox)
            quick.done.set()
            with pytest.raises(NotFound, match="gave no answer"):
                await anext(answers)


def test_ww_request(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    nobody = a.ww("request", "cli", "1 2")
    assert nobody.returncode == 1
    assert "nobody serves the topic 'cli'" in nobody.stderr

    async def ask() -> list[Any]:
        async with sessions(a) as (session,), (await session.pubsub.join("cli")).serve(add):
            return [
                await asyncio.to_thread(a.ww, "request", "cli", *args)
                for args in (("1 2",), ("1 2", "--json", "--count", "5", "--timeout", "60"))
            ]

    plain, many = asyncio.run(ask())
    assert (plain.stdout, plain.returncode) == ("3\n", 0), plain.stderr
    (line,) = many.stdout.splitlines()
    shown = json.loads(line)
    assert (shown["data"], shown["node"]) == ("3", str(a.peer_id))
    assert shown["principal"].startswith("local:")
