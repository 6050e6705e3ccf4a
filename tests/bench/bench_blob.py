"""The blob service beside what it is made of, in one run: `python tests/bench/bench_blob.py`.

transfer: blocks of 1 MiB of random bytes from one process to another over loopback, verified and
read in order, beside the raw stream of the link and beside plain TCP with sha256 in a thread. The
blocks are in memory at the provider's, and who fetches keeps none of them: what a disk takes is a
row of its own. Rounds alternate, so that noise of the machine hits all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.base.threads import Threads
from wetware.errors import NotFound
from wetware.identity import Key, PeerId
from wetware.overlay.link import LinkHost, Stream
from wetware.testing import FakeOverlay, Started
from wetware_blob.exchange.exchange import Exchange
from wetware_blob.format.cid import RAW, Block, Cid

if TYPE_CHECKING:
    from wetware_blob.store.store import Store

SOURCE = "/bench/source/1"
BLOCK_BYTES = 1 << 20
PIECE_BYTES = 64 << 10


class Memory:
    """A store without a disk: it has what it was made with, and forgets what it is given."""

    def __init__(self, blocks: dict[bytes, bytes]) -> None:
        self._blocks = blocks

    async def have(self, digests: Collection[bytes]) -> set[bytes]:
        return {digest for digest in digests if digest in self._blocks}

    async def get(self, digest: bytes) -> bytes:
        try:
            return self._blocks[digest]
        except KeyError:
            raise NotFound("no such block") from None

    @contextlib.asynccontextmanager
    async def hold(self, owner: str, root: Cid | None = None) -> AsyncIterator[None]:
        yield

    async def put(self, hold: Any, blocks: Sequence[Block]) -> None: ...


async def nobody(root: Cid) -> AsyncGenerator[PeerId, None]:
    return
    yield


@contextlib.asynccontextmanager
async def exchange(host: LinkHost, store: Memory, find: Any) -> AsyncIterator[Exchange]:
    made = Exchange(FakeOverlay(host=host), cast("Store", store), find=find, run_sync=Threads().run)
    ready = Started()
    task = asyncio.create_task(made.run(task_status=ready))
    await ready.wait()
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.wait([task])


async def serve(count: int) -> None:
    """The provider, in a process of its own: blocks, a raw stream of the link, and plain TCP."""
    blocks = [os.urandom(BLOCK_BYTES) for _ in range(count)]
    digests = [hashlib.sha256(block).digest() for block in blocks]

    async def source(stream: Stream) -> None:
        for block in blocks:
            for at in range(0, BLOCK_BYTES, PIECE_BYTES):
                await stream.write(memoryview(block)[at : at + PIECE_BYTES])

    async def tcp(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for block in blocks:
            writer.write(block)
            await writer.drain()
        writer.close()

    async with LinkHost(Key.generate(), admit=lambda *_: True, privileged=lambda _: True) as host:
        store = Memory(dict(zip(digests, blocks, strict=True)))
        async with exchange(host, store, nobody):
            host.handle(SOURCE, source, access=Access.PUBLIC)
            (addr,) = await host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
            server = await asyncio.start_server(tcp, "127.0.0.1", 0)
            print(
                json.dumps(
                    {
                        "link": str(addr),
                        "tcp": server.sockets[0].getsockname()[1],
                        "digests": [digest.hex() for digest in digests],
                    }
                ),
                flush=True,
            )
            await asyncio.to_thread(sys.stdin.read)  # until the parent is done or gone
            server.close()


async def raw_link(stream: Stream) -> int:
    total = 0
    while data := await stream.read():
        total += len(data)
    return total


async def plain_tcp(port: int) -> int:
    """Plain TCP, and sha256 of each MiB in a thread beside the next one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4 * BLOCK_BYTES)
    hashing: asyncio.Future[bytes] | None = None
    total = 0
    while data := await _block(reader):
        if hashing is not None:
            await hashing
        hashing = asyncio.ensure_future(
            asyncio.to_thread(lambda d: hashlib.sha256(d).digest(), data)
        )
        total += len(data)
    assert hashing is not None
    await hashing
    writer.close()
    await writer.wait_closed()
    return total


async def _block(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readexactly(BLOCK_BYTES)
    except asyncio.IncompleteReadError as exc:
        return exc.partial


async def get(made: Exchange, cids: list[Cid]) -> tuple[int, float]:
    """Read all in order; how many bytes, and the time to the first of them."""
    total, first_s, start = 0, 0.0, time.perf_counter()
    async with made.open(cids[0], "bench") as fetch:
        fetch.ahead(cids)
        for cid in cids:
            total += len(await fetch.get(cid))
            first_s = first_s or time.perf_counter() - start
        await fetch.kept()
    return total, first_s


async def transfer(rounds: int, mebibytes: int) -> None:
    child = subprocess.Popen(  # noqa: ASYNC220  # before anything is measured
        [sys.executable, __file__, "--serve", str(mebibytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    rates: dict[str, list[float]] = {"tcp": [], "link": [], "blob": []}
    firsts_ms, total = [], mebibytes * BLOCK_BYTES
    rss_before_mib = rss_mib()
    try:
        assert child.stdout is not None
        where = json.loads(child.stdout.readline())
        cids = [Cid(1, RAW, bytes.fromhex(digest)) for digest in where["digests"]]
        addr = Multiaddr.parse(where["link"])

        async def provider(root: Cid) -> AsyncGenerator[PeerId, None]:
            assert addr.peer is not None
            yield addr.peer

        async with LinkHost(Key.generate()) as host:
            conn = await host.dial([addr])
            async with exchange(host, Memory({}), provider) as made:
                for _ in range(rounds):
                    start = time.perf_counter()
                    blob_bytes, first_s = await get(made, cids)
                    took_s = {"blob": time.perf_counter() - start}
                    firsts_ms.append(first_s * 1000)
                    rss_blob_mib = rss_mib()
                    start = time.perf_counter()
                    link_bytes = await raw_link(await conn.open_stream(SOURCE))
                    took_s["link"] = time.perf_counter() - start
                    start = time.perf_counter()
                    tcp_bytes = await plain_tcp(where["tcp"])
                    took_s["tcp"] = time.perf_counter() - start
                    if {blob_bytes, link_bytes, tcp_bytes} != {total}:
                        raise AssertionError("bytes were lost")
                    for name, s in took_s.items():
                        rates[name].append(total / 1e6 / s)
    finally:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(10)
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"# transfer: {mebibytes} MiB in blocks of 1 MiB, random, not stored; 2 processes, "
        f"127.0.0.1, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{rounds} alternating rounds"
    )
    for name, title in (
        ("tcp", "plain TCP, sha256 in a thread"),
        ("link", "the link's raw stream (noise + yamux)"),
        ("blob", "get: verified, in order"),
    ):
        values = rates[name]
        print(
            f"{title:40} {median[name]:6.0f} MB/s ({min(values):.0f}–{max(values):.0f})"
            + (f"   {median[name] / median['link']:.2f} × link (target ≥ 0.5)" * (name == "blob"))
        )
    print(f"{'time to the first block':40} {statistics.median(firsts_ms):6.1f} ms")
    print(f"{'peak RSS of who gets, above its start':40} {rss_blob_mib - rss_before_mib:6.0f} MiB")


def rss_mib() -> float:
    """The highest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=1024, help="per transfer")
    parser.add_argument("--quick", action="store_true", help="about 15 s")
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.serve))
    elif args.quick:
        asyncio.run(transfer(3, 256))
    else:
        asyncio.run(transfer(args.rounds, args.mebibytes))
