"""A store as a client of `workload` has it: an engine in this process, or a session at a node."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import anyio

from wetware.base.tasks import Tasks
from wetware_sync.client import Compare as KeyCompare
from wetware_sync.client import Write
from wetware_sync.engine import Closed, Compare, Delete, Engine, Get, LeaseEnded, Page, Put, Txn
from wetware_sync.fencing import guarded_by
from wetware_sync.keys import LOCK
from wetware_sync.locks import NONCE_BYTES, HolderServant

from .parts import ADA

TREE = "/h/"
TTL_S = 2.0


class EnginePort:
    """Who holds a lock may lose it meanwhile, and knows nothing of that, as one who was paused.

    Args:
        engine: The one that runs now; raises Unwritten while there is none.
    """

    def __init__(self, engine: Callable[[], Engine], tasks: Tasks, rng: random.Random) -> None:
        self._engine, self._tasks, self._rng = engine, tasks, rng

    async def get(self, key: str) -> tuple[str | None, int, int]:
        page = await self._engine().read(Get(key.encode()))
        assert isinstance(page, Page)
        for item in page.items:
            return item.value.decode(), item.mod_revision, page.revision
        return None, 0, page.revision

    async def txn(self, writes: dict[str, str | None], expected: int | None, fence: Any) -> int:
        operations = tuple(
            Delete(key.encode()) if value is None else Put(key.encode(), value.encode())
            for key, value in writes.items()
        )
        first = next(iter(writes)).encode()
        compares = (Compare(first, "mod_revision", expected),) if expected is not None else ()
        txn = Txn(operations, compares)
        outcome = await guarded_by(self._engine(), fence or b"", txn, ADA)
        return outcome.revision if outcome.succeeded else 0

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[tuple[int, str, str | None]]:
        watch = self._engine().watch(prefix.encode(), revision, ADA, prefix=True)
        try:
            while True:
                for event in (await watch.next()).events:
                    if event.key.startswith(LOCK):
                        continue  # of those that watch everything: what is a lock's own
                    value = None if event.now is None else event.now.value.decode()
                    yield event.revision, event.key.decode(), value
        finally:
            watch.close()

    @contextlib.asynccontextmanager
    async def lock(self, name: str, wait_s: float) -> AsyncIterator[tuple[int, Any]]:
        engine = self._engine()
        lease = await engine.grant(TTL_S, ADA)
        holder = holder_of(engine, lease, self._tasks)
        which: Any = {"name": name, "kind": "lock", "nonce": secrets.token_bytes(NONCE_BYTES)}
        reply = await holder.acquire(places=0, value=b"", wait_ms=int(wait_s * 1000), **which)
        try:
            if self._rng.random() < 0.5:
                self._tasks.start(self._end(engine, lease, self._rng.uniform(0, 0.02)))
            yield reply["revision"], reply["hold"]
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(engine, lease)

    async def _end(self, engine: Engine, lease: int, after_s: float = 0) -> None:
        await asyncio.sleep(after_s)
        with contextlib.suppress(Closed, LeaseEnded):
            await engine.end(lease, ADA)


def holder_of(engine: Engine, lease: int, tasks: Tasks) -> HolderServant:
    """The servant that takes locks, beside nothing else of a node."""
    ctx = SimpleNamespace(fence=lambda *_, **__: b"a token")
    home: Any = SimpleNamespace(tasks=tasks, ctx=ctx)
    return HolderServant(home, engine, lease, ADA)


class SessionPort:
    """Args: session: At any node, of one that reconnects."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._tree = session.kv.open(TREE)

    async def get(self, key: str) -> tuple[str | None, int, int]:
        reader = await self._tree.ref("reader")
        with self._tree.home.read():
            reply = await reader.call("get", key=key)
        entry = reply["entry"]
        if not reply["found"]:
            return None, 0, reply["revision"]
        return entry["value"].decode(), entry["modified"], reply["revision"]

    async def txn(self, writes: dict[str, str | None], expected: int | None, fence: Any) -> int:
        first = next(iter(writes))
        compares = [] if expected is None else [KeyCompare(first, modified=expected)]
        structs = [
            Write(key, None if value is None else value.encode()) for key, value in writes.items()
        ]
        succeeded, revision = await self._tree.txn(compares, structs, fence=fence)
        return revision if succeeded else 0

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[tuple[int, str, str | None]]:
        async with contextlib.aclosing(self._tree.watch(prefix, revision)) as events:
            async for event in events:
                value = None if event.value is None else event.value.decode()
                yield event.revision, event.key, value

    @contextlib.asynccontextmanager
    async def lock(self, name: str, wait_s: float) -> AsyncIterator[tuple[int, Any]]:
        async with self._session.sync.lock(name, wait_s=wait_s, ttl_s=TTL_S) as held:
            yield held.revision, held
