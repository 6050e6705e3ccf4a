"""What the tests of the store are made of: blocks, trees of them, and stores that run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio

from wetware.base.files import Files
from wetware.base.threads import Threads
from wetware_blob.format import dagpb
from wetware_blob.format.cid import DAG_PB, RAW, Block, Cid
from wetware_blob.store.store import Store

MIB = 1 << 20
ADA = "local:ada"
BOB = "local:bob"


class Clock:
    """Time that tests set."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def raw(data: bytes) -> Block:
    return Block(Cid.of(RAW, data), data)


def node(children: Sequence[Cid], data: bytes = b"") -> Block:
    links = tuple(dagpb.Link(bytes(cid), b"", 0) for cid in children)
    block = dagpb.encode(dagpb.Node(links, data))
    return Block(Cid.of(DAG_PB, block), block)


@contextlib.asynccontextmanager
async def running(
    where: Path | Files,
    *,
    node_bytes_max: int = 1 << 40,
    owner_bytes_max: int = 1 << 40,
    run_sync: Callable[..., Any] | None = None,
    clock: Clock | None = None,
    sleep: Callable[[float], Any] = anyio.sleep,
) -> AsyncIterator[Store]:
    """A store that is open."""
    store = Store(
        where if not isinstance(where, Path) else Files(where),
        run_sync=run_sync or Threads().run,
        clock=clock or Clock(),
        node_bytes_max=node_bytes_max,
        owner_bytes_max=owner_bytes_max,
        sleep=sleep,
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: store.run(task_status=task_status))
        try:
            yield store
        finally:
            tasks.cancel_scope.cancel()
