"""A member in a process of its own, to be killed: a store, and its end of the exchange.

member.py serve DIRECTORY              prints its address, and each digest that it is asked for
member.py pull DIRECTORY ADDRESS CID   prints how many blocks it has, and "done"
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from pathlib import Path

import anyio

from wetware.base.files import Files
from wetware.base.multiaddr import Multiaddr
from wetware.base.threads import Threads
from wetware.errors import EXIT_FAILED, WetwareError
from wetware.identity import Key, PeerId
from wetware.overlay.link import LinkHost
from wetware.testing import FakeOverlay
from wetware_blob.exchange import fetch as fetching
from wetware_blob.exchange.exchange import Exchange, pull
from wetware_blob.format.cid import Cid
from wetware_blob.store.store import Store

BYTES_MAX = 2 << 20
PAUSE_S = 0.005  # before each answer: there is time to be killed in

say = partial(print, flush=True)


@contextlib.asynccontextmanager
async def opened(directory: str) -> AsyncIterator[Store]:
    store = Store(
        Files(Path(directory)),
        run_sync=Threads().run,
        clock=time,
        node_bytes_max=1 << 40,
        owner_bytes_max=1 << 40,
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: store.run(task_status=task_status))
        yield store
        tasks.cancel_scope.cancel()


async def serve(directory: str) -> None:
    async def nobody(root: Cid) -> AsyncGenerator[PeerId, None]:
        return
        yield

    async with (
        opened(directory) as store,
        LinkHost(Key.generate(), admit=lambda *_: True) as host,
        anyio.create_task_group() as tasks,
    ):
        get = store.get

        async def slowly(digest: bytes) -> bytes:
            await asyncio.sleep(PAUSE_S)
            data = await get(digest)
            say(digest.hex())
            return data

        store.get = slowly  # type: ignore[method-assign]  # to be told
        made = Exchange(FakeOverlay(host=host), store, find=nobody, run_sync=Threads().run)
        await tasks.start(lambda task_status: made.run(task_status=task_status))
        (addr,) = await host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        say(addr)
        await asyncio.to_thread(sys.stdin.read)  # until who started it is done or gone
        tasks.cancel_scope.cancel()


async def fetch(directory: str, address: str, cid: str) -> None:
    fetching.BYTES_MAX = BYTES_MAX  # type: ignore[misc]  # a file that is not small beside it
    addr = Multiaddr.parse(address)

    async def find(root: Cid) -> AsyncGenerator[PeerId, None]:
        assert addr.peer is not None
        yield addr.peer

    async with (
        opened(directory) as store,
        LinkHost(Key.generate(), admit=lambda *_: True) as host,
        anyio.create_task_group() as tasks,
    ):

        async def tell() -> None:
            while True:
                say((await store.usage()).blocks)
                await asyncio.sleep(0.005)

        await host.dial([addr])
        made = Exchange(FakeOverlay(host=host), store, find=find, run_sync=Threads().run)
        await tasks.start(lambda task_status: made.run(task_status=task_status))
        tasks.start_soon(tell)
        root = Cid.parse(cid)
        try:
            async with made.open(root, "local:ada") as source:
                await pull(source, root)
            say("done")
        except WetwareError as exc:
            sys.stderr.write(str(exc))
            raise SystemExit(EXIT_FAILED) from None
        finally:
            tasks.cancel_scope.cancel()


if __name__ == "__main__":
    verb, *args = sys.argv[1:]
    asyncio.run({"serve": serve, "pull": fetch}[verb](*args))
