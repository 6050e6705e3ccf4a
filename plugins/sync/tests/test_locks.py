"""Locks whose acquisition is cancelled anywhere, and leases whose holders are told in time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from wetware.base.tasks import Tasks
from wetware.errors import Denied, Unsupported
from wetware_sync.engine import Engine, Get, LeaseEnded
from wetware_sync.errors import HomeDown
from wetware_sync.holding import Sync
from wetware_sync.keys import LOCK
from wetware_sync.lease import Lease, now_s
from wetware_sync.leases import leased

from .parts import ADA, BOB, Clock, embedded, running
from .ports import holder_of

pytestmark = pytest.mark.anyio

NONCES = [bytes([number]) * 16 for number in range(3)]
TTL_S = 60.0


class Stepped:
    """A coroutine that is cancelled at one of its awaits.

    Args:
        at: Which one, from 1 on; 0: none.
        late: Only as what it awaits is done, before it hears of that.

    Attributes:
        count: Awaits so far.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], at: int, *, late: bool) -> None:
        self._work, self._at, self._late = work, at, late
        self.count = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        task = asyncio.current_task()
        assert task is not None
        error: BaseException | None = None
        while True:
            try:
                waits = steps.send(None) if error is None else steps.throw(error)
            except StopIteration as done:
                return done.value
            error = None
            self.count += 1
            if self.count == self._at:
                if self._late and waits is not None:
                    waits.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            try:
                yield waits
            except BaseException as exc:
                error = exc


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with running(embedded(tmp_path, Clock())) as engine:
        yield engine


async def keys(engine: Engine) -> int:
    return len((await engine.read(Get(LOCK, prefix=True))).items)


def acquiring(holder: Any, nonce: bytes, wait_ms: int = 60_000) -> Coroutine[Any, Any, Any]:
    coroutine: Coroutine[Any, Any, Any] = holder.acquire(
        name="x", kind="lock", nonce=nonce, places=0, value=b"", wait_ms=wait_ms
    )
    return coroutine


async def _frees(engine: Engine, waits: asyncio.Task[Any], holder: Any) -> None:
    """Let the lock go when somebody waits for it."""
    while not waits.done() and await keys(engine) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    await holder.let_go(name="x", kind="lock", nonce=NONCES[1])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("held", [False, True])
async def test_an_acquire_is_cancelled_at_every_await_of_the_servant(
    engine: Engine, held: bool, late: bool
) -> None:
    """Afterwards nothing is left of it, and another one has the lock at once."""
    tasks = Tasks()
    holders = [holder_of(engine, await engine.grant(TTL_S, ADA), tasks) for _ in range(len(NONCES))]
    at = cancelled = 0
    while True:
        at += 1
        if held:
            await acquiring(holders[1], NONCES[1], 0)
        stepped = Stepped(acquiring(holders[0], NONCES[0]), at, late=late)

        async def work(stepped: Stepped = stepped) -> Any:
            return await stepped

        task = asyncio.ensure_future(work())
        if held:
            await _frees(engine, task, holders[1])
        await asyncio.wait([task], timeout=60)
        assert task.done()
        while tasks:
            await tasks.wait()
        if not task.cancelled():
            await holders[0].let_go(name="x", kind="lock", nonce=NONCES[0])
            if stepped.count < at:
                break
        cancelled += task.cancelled()
        assert await keys(engine) == 0, f"at await {at}"
        await asyncio.wait_for(acquiring(holders[2], NONCES[2], 0), 60)
        await holders[2].let_go(name="x", kind="lock", nonce=NONCES[2])
    assert cancelled >= (4 if held else 1), (at, cancelled)


class Ref:
    """As a capability: what is asked is on its way for a moment, and so is the answer."""

    closed = False

    def __init__(self, servant: Any) -> None:
        self._servant = servant

    async def call(self, method: str, /, **params: Any) -> Any:
        await asyncio.sleep(0)
        answer = await getattr(self._servant, method)(**params)
        await asyncio.sleep(0)
        return answer


class Here:
    """As AtHome: leases of an engine in this process."""

    survives = True

    def __init__(self, engine: Engine, tasks: Tasks) -> None:
        self._engine, self._tasks = engine, tasks

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        yield

    async def call(self, method: str, /, **params: Any) -> Any:
        assert method == "enter"
        await asyncio.sleep(0)
        id_ = await leased(self._engine, params["ttl_ms"], params["id"], params["epoch"], ADA)
        holder = Ref(holder_of(self._engine, id_, self._tasks))
        await asyncio.sleep(0)
        return {"holder": holder, "id": id_, "epoch": self._engine.epoch}


def client(engine: Engine, tasks: Tasks) -> Sync:
    sync = Sync(None)
    sync.home = Here(engine, tasks)  # type: ignore[assignment]
    return sync


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("held", [False, True])
async def test_an_acquire_is_cancelled_at_every_await_of_the_client(
    engine: Engine, held: bool, late: bool
) -> None:
    tasks = Tasks()
    other = holder_of(engine, await engine.grant(TTL_S, BOB), tasks)
    other._owner = BOB
    at = cancelled = 0
    while True:
        at += 1
        sync = client(engine, tasks)
        if held:
            await acquiring(other, NONCES[1], 0)

        async def work(sync: Sync = sync) -> None:
            async with sync.lock("x", ttl_s=TTL_S):
                pass

        stepped = Stepped(work(), at, late=late)

        async def step(stepped: Stepped = stepped) -> None:
            await stepped

        task = asyncio.ensure_future(step())
        if held:
            await _frees(engine, task, other)
        await asyncio.wait([task], timeout=60)
        assert task.done()
        while sync._owed or tasks:
            await asyncio.wait({*sync._owed._tasks, *tasks._tasks})
        assert await keys(engine) == 0, f"at await {at}"
        await asyncio.wait_for(acquiring(other, NONCES[2], 0), 60)
        await other.let_go(name="x", kind="lock", nonce=NONCES[2])
        for lease in sync._leases.values():
            await lease.aclose()
        if not task.cancelled() and stepped.count < at:
            break
        cancelled += task.cancelled()
    assert cancelled >= 6, (at, cancelled)


class Silent(Here):
    """Its leases are granted, and nothing is answered any more."""

    async def call(self, method: str, /, **params: Any) -> Any:
        reply = await super().call(method, **params)
        reply["holder"] = Unanswered()
        return reply


class Unanswered:
    closed = False

    async def call(self, method: str, /, **params: Any) -> Any:
        await asyncio.sleep(3600)


async def test_a_holder_is_told_before_its_time_is_over(engine: Engine) -> None:
    """Who looks at a clock now and then looks early enough."""
    sent_s = now_s()
    lease = Lease(Silent(engine, Tasks()), "enter", 2.0)  # type: ignore[arg-type]
    async with lease:
        with pytest.raises(LeaseEnded, match="not kept"), lease.living():
            await asyncio.sleep(60)
        assert now_s() - sent_s < 2.0


class Away(Here):
    """A store that cannot be reached for a while; its own clock stands still."""

    away = False

    async def call(self, method: str, /, **params: Any) -> Any:
        if self.away:
            raise HomeDown("not there")
        reply = await super().call(method, **params)
        reply["holder"] = RefOf(self, reply["holder"])
        return reply


class RefOf:
    closed = False

    def __init__(self, home: Away, ref: Ref) -> None:
        self._home, self._ref = home, ref

    async def call(self, method: str, /, **params: Any) -> Any:
        if self._home.away:
            raise HomeDown("not there")
        return await self._ref.call(method, **params)


async def test_what_is_lost_is_let_go_also_where_the_store_would_keep_it(engine: Engine) -> None:
    tasks = Tasks()
    home = Away(engine, tasks)
    lease = Lease(home, "enter", 2.0)  # type: ignore[arg-type]
    async with lease:
        await acquiring(holder_of(engine, lease.id, tasks), NONCES[0])
        home.away = True
        with pytest.raises(LeaseEnded, match="not kept"), lease.living():
            await asyncio.sleep(60)
        await asyncio.sleep(2.5)  # longer than the lease: it is told in vain
        assert await keys(engine) == 1
        home.away = False
        async with asyncio.timeout(5.0):
            while await keys(engine):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_a_token_is_for_who_holds_what_only_one_can_hold(engine: Engine) -> None:
    tasks = Tasks()
    holder = holder_of(engine, await engine.grant(TTL_S, ADA), tasks)
    first = {"name": "x", "kind": "lock", "nonce": NONCES[0]}
    later = {**first, "nonce": NONCES[1]}
    await acquiring(holder, NONCES[0])
    waits = asyncio.ensure_future(acquiring(holder, NONCES[1]))
    while await keys(engine) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await holder.token(**first) == {"token": b"a token"}
    with pytest.raises(Denied, match="not held any more"):
        await holder.token(**later)  # its number is above that of who holds it
    await holder.let_go(**first)
    await waits
    with pytest.raises(Denied, match="not held any more"):
        await holder.token(**first)
    assert await holder.token(**later) == {"token": b"a token"}
    await holder.let_go(**later)
    await holder.acquire(
        name="x", kind="shared", nonce=NONCES[0], places=0, value=b"", wait_ms=60_000
    )
    with pytest.raises(Unsupported) as refused:
        await holder.token(**{**first, "kind": "shared"})
    assert refused.value.code == "unsupported.fence"
    with pytest.raises(Denied):  # as another kind it is another key
        await holder.token(**first)


async def test_an_expired_lock_is_not_extended(tmp_path: Path) -> None:
    clock = Clock()
    async with running(embedded(tmp_path, clock)) as engine:
        tasks = Tasks()
        holder = holder_of(engine, await engine.grant(10.0, ADA), tasks)
        await acquiring(holder, NONCES[0])
        clock.now += 10.0
        with pytest.raises(LeaseEnded):  # also in the moment before it is ended
            await holder.keep()
        other = holder_of(engine, await engine.grant(10.0, ADA), tasks)
        await asyncio.wait_for(acquiring(other, NONCES[1]), 60)
        with pytest.raises(LeaseEnded):
            await holder.keep()
        with contextlib.suppress(LeaseEnded):
            await holder.end()
        assert await keys(engine) == 1


async def test_who_gives_up_is_not_told_how_it_ended_by_a_log(engine: Engine) -> None:
    """What the store answers to a call that is cancelled is nobody's, and no error of the node."""
    loop, said = asyncio.get_running_loop(), list[str]()
    loop.set_exception_handler(lambda _, context: said.append(context["message"]))
    try:
        tasks = Tasks()
        holder = holder_of(engine, await engine.grant(10.0, ADA), tasks)
        await engine.end(holder._id, ADA)
        waits = asyncio.ensure_future(acquiring(holder, NONCES[0]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        while tasks:
            await tasks.wait()
        del waits
        gc.collect()
        assert not said
    finally:
        loop.set_exception_handler(None)
