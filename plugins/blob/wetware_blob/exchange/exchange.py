"""What the rest of the plugin uses: a source of blocks, this node's own or those of others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

import anyio

from wetware.errors import LimitExceeded
from wetware_blob.exchange import fetch as fetching
from wetware_blob.exchange.fetch import Fetch, Find
from wetware_blob.exchange.serve import serve
from wetware_blob.format.cid import RAW, Cid
from wetware_blob.format.read import links_of

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.hookspecs import Overlay
    from wetware_blob.store.store import RunSync, Store

FETCHES_MAX: Final = 64
"""Roots that are read at a time."""
BYTES_MAX: Final = 64 << 20
"""In memory of all fetches, as long as each has its BYTES_MIN."""
LINKS_MAX: Final = 1 << 20
"""Links of a DAG that `pull` has yet to follow: a file of 10 GiB has 10,240 in all."""


class Exchange:
    """Serves this node's blocks to members, and fetches theirs."""

    def __init__(self, overlay: Overlay, store: Store, *, find: Find, run_sync: RunSync) -> None:
        self._overlay, self._store, self._find = overlay, store, find
        self._fetch = partial(Fetch, overlay=overlay, store=store, run_sync=run_sync)
        self._fetches: dict[tuple[Cid, bool], Fetch] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            with contextlib.ExitStack() as stack:
                stack.callback(serve(self._overlay, self._store.get))
                task_status.started()
                await anyio.sleep_forever()

    @contextlib.contextmanager
    def opened(self, root: Cid, owner: str, *, local: bool = False) -> Iterator[Fetch]:
        """Blocks under `root`, for `owner`: those of the store and, unless `local`, of members.

        They come once `ready` is done. Who opens the same root meanwhile shares what is fetched.
        Raises LimitExceeded.
        """
        assert self._tasks is not None  # noqa: S101  # the service runs before it is called
        fetch = self._fetches.get((root, local))
        if fetch is None or fetch.error is not None:
            if len(self._fetches) >= FETCHES_MAX:
                raise LimitExceeded(
                    f"{FETCHES_MAX} blobs are read at a time (FETCHES_MAX)", hint="try again later"
                )
            fetch = self._fetch(root, owner, find=None if local else self._find)
            self._fetches[root, local] = fetch
            fetch.task = self._tasks.create_task(fetch.run())
            self._share()
        fetch.users += 1
        end: Callable[[], object] = fetch.task.cancel
        try:
            yield fetch
            end = fetch.close
        finally:
            fetch.users -= 1
            if not fetch.users:
                if self._fetches.get((root, local)) is fetch:
                    del self._fetches[root, local]
                    self._share()
                end()

    @contextlib.asynccontextmanager
    async def open(self, root: Cid, owner: str) -> AsyncIterator[Fetch]:
        """As `opened`, and ready; nothing goes on after the block.

        Raises what the store raises if it cannot hold the root, too.
        """
        fetch: Fetch | None = None
        try:
            with self.opened(root, owner) as fetch:
                await asyncio.shield(fetch.ready)
                yield fetch
        finally:
            if fetch is not None and not fetch.users:
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([fetch.task])

    def _share(self) -> None:
        """Divide the memory."""
        share = BYTES_MAX // max(1, len(self._fetches))
        for fetch in self._fetches.values():
            fetch.bytes_max = min(max(share, fetching.BYTES_MIN), fetching.BYTES_MAX)


async def pull(source: Fetch, root: Cid, count: Callable[[int], object] = lambda _: None) -> None:
    """Every block under `root` is in the store, on disk, when this returns.

    `count` is told, again and again, what the blocks are charged that came from others until then.
    Raises what it raises, as `Fetch.get`, BadBlock, LimitExceeded.
    """
    seen: set[bytes] = set()
    waiting = [root]  # the next one last
    while waiting:
        cid = waiting.pop()
        if cid.digest in seen:
            continue
        block = await source.get(cid)
        count(source.charged)
        if cid.codec == RAW:
            continue
        seen.add(cid.digest)
        links = await links_of(cid, block)
        lacking = set(await source.lacks(links))
        source.ahead([link for link in links if link in lacking])
        waiting += [link for link in reversed(links) if link.codec != RAW or link in lacking]
        if len(waiting) > LINKS_MAX:
            raise LimitExceeded(f"the DAG has more than {LINKS_MAX} links to follow (LINKS_MAX)")
    await source.kept()
    count(source.charged)
