"""Keys and locks of a real `ww node` beside a real etcd, with the same client loop in the same run.

`python tests/bench/bench_sync.py [--quick] [--json] [--seconds N] [--rounds N] [--keys N]`: puts,
and locks with their unlocks, by 1 and by 64 clients, 64 that want the same lock, and how long after
its put was asked for an event is told to another client. Then the same puts over more and more
keys, up to N (1,000,000).

Four clients share a connection: a session over the node's unix socket, one over its encrypted link
on loopback, or a gRPC channel to etcd without TLS. All of them are in one process; node and etcd
write to the same disk, and everything is on it when it is answered. A lock is what etcd's own
`concurrency` makes of it: two requests, a transaction and a deletion. Our engine on etcd is called
in this process, as a node's services call it. The ways take turns, and the median of the rounds is
printed. Exit status 1 with --check if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import anyio
from cluster_report import Report, machine, quantile

import wetware
from wetware.identity import Key
from wetware.testing import Home, NodeProcess
from wetware_sync import engine as engines

VALUE = bytes(100)
OWNER = "local:bench"
CLIENTS = 64
CONNECTIONS = 16
TTL_S = 60
FILL_KEYS = 100
"""In one transaction."""
OWNER_KEYS = 90_000
"""A principal may have 100,000; beyond that others write, too."""
START_S_MAX = 30.0
ENGINE = "our engine on etcd"
TARGETS = {"unix socket": 1.0, ENGINE: 1.3}
"""The time that each takes of etcd's."""
TICKS_S = os.sysconf("SC_CLK_TCK")


class Client(Protocol):
    """One of those that share a connection."""

    async def put(self, key: str) -> int:
        """Returns the revision."""
        ...

    async def fill(self, keys: Sequence[str]) -> None:
        """Put all of them in one transaction."""
        ...

    async def lock(self, name: str) -> None:
        """Take it, and let it go."""
        ...

    def watch(self, prefix: str, revision: int) -> AsyncIterator[int]:
        """The revision of each change, from one on."""
        ...


class Way(NamedTuple):
    """A store, as some clients have it. `pid`: of the process that has it."""

    name: str
    pid: int
    clients: Sequence[Client]


# --- ours -----------------------------------------------------------------------------------------


class Ours:
    def __init__(self, session: wetware.Session) -> None:
        self._session = session
        self._tree = session.kv.open("/bench/")

    async def put(self, key: str) -> int:
        return await self._tree.put(key, VALUE)

    async def fill(self, keys: Sequence[str]) -> None:
        from wetware_sync.client import Write

        done, _ = await self._tree.txn([], [Write(key, VALUE) for key in keys])
        assert done

    async def lock(self, name: str) -> None:
        async with self._session.sync.lock(name, ttl_s=TTL_S):
            pass

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[int]:
        async for event in self._tree.watch(prefix, revision):
            yield event.revision


@contextlib.asynccontextmanager
async def sessions(
    node: NodeProcess, keys: Sequence[Key], *, link: bool
) -> AsyncIterator[list[wetware.Session]]:
    """One of each key."""
    where: dict[str, Any] = {"target": node.addr} if link else {"data_dir": node.data_dir}
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(wetware.connect(key=key, **where)) for key in keys]


# --- etcd -----------------------------------------------------------------------------------------


class Etcd:
    """As etcd's `concurrency` does it, without what it asks again after a wait."""

    def __init__(self, channel: Any, lease: int) -> None:
        from aetcd import rpc

        self._rpc, self._lease = rpc, lease
        self._kv, self._watches = rpc.KVStub(channel), rpc.WatchStub(channel)

    async def put(self, key: str) -> int:
        request = self._rpc.PutRequest(key=f"/bench/{key}".encode(), value=VALUE)
        return int((await self._kv.Put(request)).header.revision)

    async def fill(self, keys: Sequence[str]) -> None:
        rpc = self._rpc
        puts = [
            rpc.RequestOp(request_put=rpc.PutRequest(key=f"/bench/{key}".encode(), value=VALUE))
            for key in keys
        ]
        done = await self._kv.Txn(rpc.TxnRequest(success=puts))
        assert done.succeeded

    async def lock(self, name: str) -> None:
        rpc = self._rpc
        scope = f"/lock/{name}/".encode()
        key = scope + b"%x" % self._lease
        end = scope[:-1] + bytes([scope[-1] + 1])
        first = rpc.RangeRequest(
            key=scope,
            range_end=end,
            sort_order=rpc.RangeRequest.ASCEND,
            sort_target=rpc.RangeRequest.CREATE,
            limit=1,
        )
        done = await self._kv.Txn(
            rpc.TxnRequest(
                compare=[
                    rpc.Compare(
                        key=key,
                        target=rpc.Compare.CREATE,
                        result=rpc.Compare.EQUAL,
                        create_revision=0,
                    )
                ],
                success=[
                    rpc.RequestOp(request_put=rpc.PutRequest(key=key, lease=self._lease)),
                    rpc.RequestOp(request_range=first),
                ],
            )
        )
        assert done.succeeded
        mine = done.header.revision
        (owner,) = done.responses[1].response_range.kvs
        while owner.create_revision != mine:
            page = await self._kv.Range(
                rpc.RangeRequest(
                    key=scope,
                    range_end=end,
                    sort_order=rpc.RangeRequest.DESCEND,
                    sort_target=rpc.RangeRequest.CREATE,
                    limit=1,
                    max_create_revision=mine - 1,
                )
            )
            if not page.kvs:
                break
            await self._gone(page.kvs[0].key, page.header.revision)
        await self._kv.DeleteRange(rpc.DeleteRangeRequest(key=key))

    async def _gone(self, key: bytes, revision: int) -> None:
        rpc = self._rpc
        stream = self._watches.Watch()
        create = rpc.WatchCreateRequest(key=key, start_revision=revision)
        await stream.write(rpc.WatchRequest(create_request=create))
        try:
            while True:
                told = await stream.read()
                if any(event.type == event.DELETE for event in told.events):
                    return
        finally:
            stream.cancel()

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[int]:
        rpc = self._rpc
        key = f"/bench/{prefix}".encode()
        create = rpc.WatchCreateRequest(
            key=key, range_end=key[:-1] + bytes([key[-1] + 1]), start_revision=revision
        )
        stream = self._watches.Watch()
        await stream.write(rpc.WatchRequest(create_request=create))
        try:
            while True:
                for event in (await stream.read()).events:
                    yield event.kv.mod_revision
        finally:
            stream.cancel()


class ByEngine:
    """Etcd behind our interface: the transactions of the services, without them."""

    def __init__(self, engine: Any, lease: int) -> None:
        self._engine, self._lease = engine, lease

    async def put(self, key: str) -> int:
        put = engines.Put(f"/engine/{key}".encode(), VALUE)
        return int((await self._engine.txn(engines.Txn((put,)), OWNER)).revision)

    async def fill(self, keys: Sequence[str]) -> None:
        raise NotImplementedError("only its latency is measured")

    async def lock(self, name: str) -> None:
        scope = f"/engine-lock/{name}/".encode()
        key = scope + b"%x" % self._lease
        first = engines.Get(scope, prefix=True, limit=1, order=engines.Order.OLDEST)
        absent = engines.Compare(key, "version", 0)
        taken = engines.Txn((engines.Put(key, b"", self._lease), first), (absent,))
        assert (await self._engine.txn(taken, OWNER)).succeeded
        await self._engine.txn(engines.Txn((engines.Delete(key),)), OWNER)

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[int]:
        watch = self._engine.watch(f"/engine/{prefix}".encode(), revision, OWNER, prefix=True)
        try:
            while True:
                for event in (await watch.next()).events:
                    yield event.revision
        finally:
            watch.close()


@contextlib.asynccontextmanager
async def by_engine(address: str) -> AsyncIterator[list[Client]]:
    from wetware_sync.etcd.engine import EtcdEngine
    from wetware_sync.etcd.wire import Etcd

    engine = EtcdEngine(Etcd([address]))
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: engine.run(task_status=task_status))
        leases = [await engine.grant(3600.0, OWNER) for _ in range(CLIENTS)]
        yield [ByEngine(engine, lease) for lease in leases]
        tasks.cancel_scope.cancel()


@contextlib.contextmanager
def etcd(folder: Path) -> Iterator[tuple[int, str]]:
    """Its process ID and its address; it writes to the disk before it answers, as by default."""
    with socket.socket() as client, socket.socket() as peer:
        client.bind(("127.0.0.1", 0))
        peer.bind(("127.0.0.1", 0))
        address, other = (f"127.0.0.1:{each.getsockname()[1]}" for each in (client, peer))
    urls = {
        "listen-client-urls": address,
        "advertise-client-urls": address,
        "listen-peer-urls": other,
        "initial-advertise-peer-urls": other,
    }
    command = ["etcd", "--data-dir", str(folder / "etcd"), "--log-level", "error"]
    command += ["--initial-cluster", f"default=http://{other}"]
    command += [word for name, url in urls.items() for word in (f"--{name}", f"http://{url}")]
    with (folder / "etcd.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process.pid, address
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def channels(address: str) -> AsyncIterator[list[Client]]:
    import grpc.aio
    from aetcd import rpc

    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each
    async with contextlib.AsyncExitStack() as stack:
        there = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            for _ in range(CONNECTIONS)
        ]
        async with asyncio.timeout(START_S_MAX):
            await asyncio.gather(*(channel.channel_ready() for channel in there))
        found: list[Client] = []
        for number in range(CLIENTS):
            channel = there[number % CONNECTIONS]
            lease = await rpc.LeaseStub(channel).LeaseGrant(rpc.LeaseGrantRequest(TTL=3600))
            found.append(Etcd(channel, lease.ID))
        yield found


def without_etcd() -> str:
    """Why it cannot be measured; "" where it can."""
    if shutil.which("etcd") is None:
        return "etcd is not installed (Debian: etcd-server)"
    try:
        import aetcd  # noqa: F401  # only whether it is there
    except ImportError:
        return "the client of etcd is not installed (`pip install aetcd`)"
    return ""


# --- measuring ------------------------------------------------------------------------------------


class Round(NamedTuple):
    """Latencies, s; how many a second, and µs of processor for each one there and here."""

    times: list[float]
    per_s: float
    there_us: float
    here_us: float


def processor_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_S


async def timed(
    way: Way, clients: int, seconds: float, call: Callable[[Client, int, int], Awaitable[object]]
) -> Round:
    """What some clients do over and over, each with its number and a count."""
    times: list[float] = []
    there, here, began = processor_s(way.pid), time.process_time(), time.perf_counter()
    end = began + seconds

    async def work(number: int) -> None:
        client = way.clients[number]
        for count in itertools.count():
            if (start := time.perf_counter()) >= end:
                return
            await call(client, number, count)
            times.append(time.perf_counter() - start)

    await asyncio.gather(*map(work, range(clients)))
    many, took = len(times), time.perf_counter() - began
    there, here = processor_s(way.pid) - there, time.process_time() - here
    return Round(times, many / took, there / many * 1e6, here / many * 1e6)


async def watched(way: Way, many: int) -> Round:
    """One puts, another one is told: from when the put is asked for."""
    revision = await way.clients[0].put("w/first")
    told = way.clients[1].watch("w/", revision)
    assert await anext(told) == revision
    times = []
    there, here, start = processor_s(way.pid), time.process_time(), time.perf_counter()
    for number in range(many):
        event = asyncio.ensure_future(anext(told))
        began = time.perf_counter()
        put = asyncio.ensure_future(way.clients[0].put(f"w/{number % 10}"))
        revision = await event
        times.append(time.perf_counter() - began)
        assert await put == revision
    took = time.perf_counter() - start
    there, here = processor_s(way.pid) - there, time.process_time() - here
    await told.aclose()  # type: ignore[attr-defined]  # they are generators
    return Round(times, many / took, there / many * 1e6, here / many * 1e6)


def measures(seconds: float, quick: bool) -> dict[str, Callable[[Way], Awaitable[Round]]]:
    def puts(clients: int) -> Callable[[Way], Awaitable[Round]]:
        return lambda way: timed(
            way, clients, seconds, lambda c, number, count: c.put(f"p/{number}/{count % 100}")
        )

    def locks(clients: int, name: str) -> Callable[[Way], Awaitable[Round]]:
        return lambda way: timed(
            way, clients, seconds, lambda c, number, _: c.lock(name.format(number))
        )

    return {
        "put, 1 client": puts(1),
        f"put, {CLIENTS} clients": puts(CLIENTS),
        "lock + unlock, 1 client": locks(1, "m/{}"),
        f"lock + unlock, {CLIENTS} clients": locks(CLIENTS, "m/{}"),
        f"lock + unlock of the same, {CLIENTS} clients": locks(CLIENTS, "same"),
        "put asked for → event at another client": lambda way: watched(way, 100 if quick else 300),
    }


def tell(report: Report, name: str, found: dict[str, list[Round]]) -> None:
    """The medians of the rounds of each way, beside etcd's."""
    medians = {
        way: Round(
            [statistics.median(quantile(r.times, share) for r in rounds) for share in (0.5, 0.99)],
            *(statistics.median(column) for column in zip(*(r[1:] for r in rounds), strict=True)),
        )
        for way, rounds in found.items()
    }
    etcd = medians.get("etcd")
    alone, latency = "1 client" in name, "event" in name
    for way, median in medians.items():
        (p50, p99), beside = median.times, ""
        if etcd is not None and way != "etcd":
            beside = f"; {median.per_s / etcd.per_s:.2f} × etcd's"
            if latency:
                beside = f"; p50 {p50 / etcd.times[0]:.2f} × etcd's"
        report.figure(
            name,
            way,
            p50 * 1e3 if latency else median.per_s,
            "ms p50" if latency else "/s",
            digits=2 if latency else 0,
            beside=f"p50 {p50 * 1e3:.2f}, p99 {p99 * 1e3:.2f} ms; processor there "
            f"{median.there_us:.0f}, here {median.here_us:.0f} µs each{beside}",
        )
    for way, most in TARGETS.items():
        if etcd is None or (ours := medians.get(way)) is None:
            continue
        ratio = ours.times[0] / etcd.times[0] if alone or latency else etcd.per_s / ours.per_s
        report.figure(name, f"time of {way} / etcd's", ratio, "×", at_most=most)


async def compared(report: Report, ways: Sequence[Way], args: argparse.Namespace) -> None:
    for name, measure in measures(args.seconds, args.quick).items():
        report.say(f"{name}:")
        found: dict[str, list[Round]] = {way.name: [] for way in ways}
        if " the same" in name:  # without its services the engine alone has no waiting
            found.pop(ENGINE, None)
        for _ in range(args.rounds):
            for way in ways:
                if way.name in found:
                    found[way.name].append(await measure(way))
        tell(report, name, found)


async def growth(report: Report, way: Way, owners: Sequence[Client], args: Any) -> None:
    """Puts in a store of more and more keys; `owners` fill it."""
    rng, keys = random.Random(1), 0
    for size in (size for size in (1000, 10_000, 100_000, 1_000_000) if size <= args.keys):
        parts = [
            [f"g/{n:08d}" for n in range(at, at + FILL_KEYS)] for at in range(keys, size, FILL_KEYS)
        ]
        for first in range(0, len(parts), 16):
            some = parts[first : first + 16]
            await asyncio.gather(*(owners[int(p[0][2:]) // OWNER_KEYS].fill(p) for p in some))
        keys = size
        done = await timed(
            way,
            CLIENTS,
            args.seconds,
            lambda client, *_, size=size: client.put(f"g/{rng.randrange(size):08d}"),
        )
        report.figure(
            "growth",
            f"{way.name}: puts over {size} keys, {CLIENTS} clients",
            done.per_s,
            "/s",
            digits=0,
            beside=f"p50 {quantile(done.times, 0.5) * 1e3:.1f}, "
            f"p99 {quantile(done.times, 0.99) * 1e3:.1f} ms; "
            f"processor there {done.there_us:.0f} µs each",
        )


def owners(node: NodeProcess, many: int) -> list[Key]:
    """Keys of users who may write."""
    keys = [Key.generate() for _ in range(many)]
    for number, key in enumerate(keys):
        user = ("user", "add", f"user{number}", "--key", str(key.peer_id), "--role", "member")
        node.ww(*user, check=True)
    return keys


async def measure(report: Report, node: NodeProcess, folder: Path, args: Any) -> None:
    users = owners(node, max(args.keys // OWNER_KEYS + 1, 1 if args.quick else CONNECTIONS // 4))
    async with contextlib.AsyncExitStack() as stack:

        async def clients(keys: Sequence[Key], many: int, *, link: bool = False) -> list[Client]:
            there = await stack.enter_async_context(sessions(node, keys, link=link))
            return [Ours(there[number % len(there)]) for number in range(many)]

        mine = [node.home.key()] * CONNECTIONS
        ways = [Way("unix socket", node.process.pid, await clients(mine, CLIENTS))]
        fillers = [await clients(users, len(users))]
        if not args.quick:  # a node keeps four connections of each user
            keys = [users[number % len(users)] for number in range(CONNECTIONS)]
            encrypted = await clients(keys, CLIENTS, link=True)
            ways.append(Way("link, encrypted", node.process.pid, encrypted))
        if missing := without_etcd():
            report.say(f"# without etcd to compare with: {missing}")
        else:
            pid, address = stack.enter_context(etcd(folder))
            beside = await stack.enter_async_context(channels(address))
            ways.append(Way("etcd", pid, beside))
            engine = await stack.enter_async_context(by_engine(address))
            ways.append(Way(ENGINE, pid, engine))
            fillers.append(beside)
        await compared(report, ways, args)
        stores = [way for way in ways if way.name in ("unix socket", "etcd")]
        for way, filler in zip(stores, fillers, strict=True):
            await growth(report, way, filler, args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10,000 keys, three short rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seconds", type=float, help="of a round of each")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--keys", type=int)
    args = parser.parse_args()
    args.seconds = args.seconds or (0.5 if args.quick else 3.0)
    args.rounds = args.rounds or (3 if args.quick else 7)
    args.keys = args.keys or (10_000 if args.quick else 1_000_000)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left
    report = Report(as_json=args.json)
    report.say(
        f"# values of {len(VALUE)} bytes, one host, on the disk when answered; unix socket and "
        f"etcd without encryption; {CONNECTIONS} connections; medians of {args.rounds} rounds of "
        f"{args.seconds:g} s; {machine()}"
    )
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd()) as folder,
        Home(Path(folder) / "home", libp2p=False) as home,
        home.node("a") as node,
    ):
        asyncio.run(measure(report, node, Path(folder), args))
    if args.json:
        print(json.dumps(report.figures, indent=2))
    for missed in report.missed:
        report.say(f"MISSED: {missed}")
    return int(args.check and bool(report.missed))


if __name__ == "__main__":
    sys.exit(main())
