"""The blob service beside what it is made of, and beside its peers, in one run.

    python tests/bench/bench_blob.py [--quick] [--mebibytes N] [transfer] [nodes] [store]

transfer: blocks of 1 MiB of random bytes from one process to another over loopback, verified and
read in order, beside the raw stream of the link, plain TCP with sha256 in a thread, and Helia's
bitswap between two node.js processes. The blocks are in memory at the provider's, and who fetches
keeps none of them: what a disk takes is a row of its own. Rounds alternate, so that noise of the
machine hits all.

nodes: a file through a session into a real `ww node`, and out of another one to a file, each on
disk when the call returns, beside `cp && sync`; puts in rounds, of a new file each; the time to
the first byte; the highest memory of nodes and client above what they had before. For any size:
`nodes --mebibytes 10240 --rounds 1`.

store: see bench_blob_store.py.

Exit status 1 with --check if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import bench_blob_store
from bench_blob_store import copied
from cluster_report import Report, machine

import wetware
from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.base.threads import Threads
from wetware.errors import NotFound
from wetware.identity import Key, PeerId
from wetware.overlay.link import LinkHost, Stream
from wetware.testing import FakeOverlay, Home, NodeProcess, Started
from wetware_blob.exchange.exchange import Exchange
from wetware_blob.format.cid import RAW, Block, Cid

if TYPE_CHECKING:
    from wetware_blob.store.store import Store

JS = Path(__file__).parents[1] / "interop" / "js"
NODE_JS = JS / "node_modules" / "node" / "bin" / "node"
PARTS = ("transfer", "nodes", "store")
FIRSTS, FIRST_BYTES = 5, 8 << 20
"""Blobs of which the first byte is waited for, and how many each has."""
RSS_MIB = 64
CLIENT_S_MAX = 3600.0
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


@contextlib.contextmanager
def serving(*command: object) -> Iterator[dict[str, Any]]:
    """A process that serves until its standard input ends, and the line it says first."""
    child = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield json.loads(child.stdout.readline())
    finally:
        child.stdin.close()
        child.wait(10)
        child.stdout.close()


def helia(where: dict[str, Any]) -> dict[str, Any]:
    """Get what Helia serves."""
    done = subprocess.run(
        [NODE_JS, JS / "bitswap.mjs", "get", where["addr"], where["cid"]],
        stdout=subprocess.PIPE,
        timeout=CLIENT_S_MAX,
        check=True,
    )
    return dict(json.loads(done.stdout))


async def transfer(report: Report, mebibytes: int, rounds: int) -> None:
    report.say(
        f"# transfer: {mebibytes} MiB in blocks of 1 MiB, random, not stored; two processes, "
        f"127.0.0.1, {rounds} alternating rounds, medians; {machine()}"
    )
    rates: dict[str, list[float]] = {"tcp": [], "link": [], "blob": [], "helia": []}
    firsts_ms, total = [], mebibytes * BLOCK_BYTES
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(serving(sys.executable, __file__, "--serve", mebibytes))
        there = None
        if (JS / "node_modules" / "@helia" / "bitswap").exists():
            there = stack.enter_context(serving(NODE_JS, JS / "bitswap.mjs", "serve", mebibytes))
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
                    start = time.perf_counter()
                    link_bytes = await raw_link(await conn.open_stream(SOURCE))
                    took_s["link"] = time.perf_counter() - start
                    start = time.perf_counter()
                    tcp_bytes = await plain_tcp(where["tcp"])
                    took_s["tcp"] = time.perf_counter() - start
                    found = {blob_bytes, link_bytes, tcp_bytes}
                    if there is not None:
                        said = await asyncio.to_thread(helia, there)
                        took_s["helia"] = said["seconds"]
                        found.add(said["bytes"])
                    if found != {total}:
                        raise AssertionError("bytes were lost")
                    for name, s in took_s.items():
                        rates[name].append(total / 1e6 / s)

    median = {name: statistics.median(each) for name, each in rates.items() if each}
    for name, title in (
        ("tcp", "plain TCP, sha256 in a thread"),
        ("link", "the link's raw stream (noise + yamux)"),
        ("helia", "Helia to Helia, unixfs.cat (noise + yamux + bitswap)"),
        ("blob", "get: verified, in order"),
    ):
        if name in median:
            spread = f"({min(rates[name]):.0f} to {max(rates[name]):.0f})"
            report.figure("transfer", title, median[name], "MB/s", digits=0, beside=spread)
    report.figure("transfer", "link / get", median["link"] / median["blob"], "×", at_most=2.0)
    if there is not None:
        report.figure(
            "transfer", "Helia / get", median["helia"] / median["blob"], "×", at_most=1 / 3
        )
    else:
        report.say("  no Helia: npm install --no-audit --no-fund --prefix tests/interop/js")
    report.figure("transfer", "time to the first block", statistics.median(firsts_ms), "ms")


# --- nodes ----------------------------------------------------------------------------------------


async def client(data_dir: str, key: str, do: str, *what: str) -> None:
    """One session in a process of its own; prints how long it took, and the memory it took."""
    async with wetware.connect(data_dir=data_dir, key=Key.load(Path(key))) as session:
        blob, memory = session.blob, Peak(os.getpid())
        said: dict[str, Any] = {}
        start = time.perf_counter()
        match do:
            case "put":
                said["cid"] = (await blob.put(Path(what[0]))).cid
            case "get":
                await blob.get(what[0], what[1])
            case "first":
                async with blob.open(what[0]) as file:
                    await file.receive(1)
        print(json.dumps(said | {"s": time.perf_counter() - start, "rss_mib": memory.more_mib()}))


def session(node: NodeProcess, do: str, *what: object) -> dict[str, Any]:
    key = node.home.path / ".wetware" / "keys" / "default"
    done = subprocess.run(
        [sys.executable, __file__, "--client", node.data_dir, key, do, *map(str, what)],
        stdout=subprocess.PIPE,
        timeout=CLIENT_S_MAX,
        check=True,
    )
    return dict(json.loads(done.stdout))


class Peak:
    """The highest resident memory of a process from here on, beside what it has now."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins anew
        self._rest_kib = self._kib("VmRSS")

    def _kib(self, name: str) -> int:
        lines = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
        return int(lines[name].split()[0])

    def more_mib(self) -> float:
        return (self._kib("VmHWM") - self._rest_kib) / 1024


def write_random(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for at in range(0, size, BLOCK_BYTES):
            file.write(os.urandom(min(BLOCK_BYTES, size - at)))


def digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def nodes(report: Report, folder: Path, mebibytes: int, rounds: int) -> None:
    size = mebibytes << 20
    report.say(
        f"# nodes: {mebibytes} MiB, random, through a session; real nodes on 127.0.0.1; "
        f"puts in {rounds} rounds; {machine()}"
    )
    source, copy = folder / "source0", folder / "got"
    puts: list[dict[str, Any]] = []
    beside: list[float] = []
    with (
        Home(folder / "home", libp2p=False) as home,
        home.node("a") as a,
        home.node("b", join=a) as b,
    ):
        for node in (a, b):
            node.wait_members((a.peer_id, b.peer_id))
        session(a, "put", Path(__file__))  # what is imported late is
        memory = {"a": Peak(a.process.pid), "b": Peak(b.process.pid)}
        for number in range(rounds):
            new = folder / f"source{number}"
            write_random(new, size)
            os.sync()
            # Each is first in turn: the first one gets more of the memory that has just been freed.
            if number % 2 == 0:
                beside.append(copied(new))
            puts.append(session(a, "put", new))
            if number % 2:
                beside.append(copied(new))
        put = puts[0]
        got = session(b, "get", put["cid"], copy)
        after = copied(source)
        if digest(copy) != digest(source):
            raise AssertionError("what was got is not what was put")
        peaks = {name: peak.more_mib() for name, peak in memory.items()}
        copy.unlink()
        again = session(b, "get", put["cid"], copy)
        firsts_s = []
        for number in range(FIRSTS):
            small = folder / f"small{number}"
            write_random(small, FIRST_BYTES)
            firsts_s.append(session(b, "first", session(a, "put", small)["cid"])["s"])

    def row(name: str, s: float, beside: float) -> None:
        rate = size / 1e6 / s
        both = f"{beside:.0f} MB/s beside {rate:.0f} MB/s"
        report.figure("nodes", f"cp && sync / {name}", beside / rate, "×", beside=both)

    rates = [size / 1e6 / put["s"] for put in puts]
    ratios = [cp / rate for cp, rate in zip(beside, rates, strict=True)]
    report.figure(
        "nodes",
        "cp && sync / put, pinned",
        statistics.median(ratios),
        "×",
        at_most=2.0,
        beside=f"{statistics.median(beside):.0f} MB/s beside {statistics.median(rates):.0f} MB/s; "
        f"each round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}",
    )
    row("get at another node", got["s"], after)
    row("get of what the node has", again["s"], after)
    report.figure(
        "nodes", "time to the first byte at another node", statistics.median(firsts_s) * 1e3, "ms"
    )
    peaks |= {"the client, put": put["rss_mib"], "the client, get": got["rss_mib"]}
    for name, mib in peaks.items():
        report.figure(
            "nodes", f"peak RSS above rest, {name}", mib, "MiB", at_most=RSS_MIB, digits=0
        )


@contextlib.contextmanager
def folder(above: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ww-bench-blob-", dir=above) as name:
        yield Path(name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--rounds", type=int, default=3, help="of transfer and of puts")
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="256 MiB, about a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="a missed target is a failure")
    parser.add_argument("--dir", type=Path, help="where to write; default: the temporary directory")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.serve))
        return 0
    if args.client:
        asyncio.run(client(*args.client))
        return 0
    if args.quick:
        args.mebibytes, args.rounds = 256, 1
    parts = args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: of {', '.join(PARTS)}")
    report = Report(as_json=args.json)
    if "transfer" in parts:
        asyncio.run(transfer(report, args.mebibytes, args.rounds))
    if "nodes" in parts:
        with folder(args.dir) as where:
            nodes(report, where, args.mebibytes, 3 if args.quick else args.rounds)
    if "store" in parts:
        with folder(args.dir) as where:
            bench_blob_store.store(report, where, args.mebibytes)
    if args.json:
        print(json.dumps(report.figures, indent=2))
    for missed in report.missed:
        report.say(f"missed: {missed}")
    return 1 if args.check and report.missed else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
