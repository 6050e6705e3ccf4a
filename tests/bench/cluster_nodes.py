"""Several nodes in one process, and a driver for several such processes: for bench_cluster.py.

A node here is what makes it a member: link, admission, introductions, membership, with the default
limits. No RPC, no services, no libp2p. All nodes of a process share its event loop, so that what
one does delays the others: figures from this are upper bounds.

A worker takes one JSON object a line on stdin and answers each with one on stdout. Times are of the
machine's clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from wetware.base import log
from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key, PeerId
from wetware.node.lag import LagMeter
from wetware.overlay.admission.decision import Admission
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.service import Introductions
from wetware.overlay.admission.store import Store
from wetware.overlay.link import LinkHost
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.known import Change, ChangeKind
from wetware.overlay.membership.service import Membership

LINE_BYTES_MAX = 16 << 20
POLL_S = 0.25
ANSWER_S_MAX = 120.0
KEY_FILE = "bench.key"


class SystemClock:
    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


def rss_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def found(path: Path, names: Iterable[str]) -> dict[str, PeerId]:
    """Make a directory for each node, with key and certificate; the first one founds the cluster.

    Returns their peer IDs, by name.
    """
    peers: dict[str, PeerId] = {}
    founder: Admission | None = None
    for name in names:
        key, directory = Key.generate(), path / name
        directory.mkdir(parents=True)
        key.save(directory / KEY_FILE)
        peers[name] = key.peer_id
        store = Store(directory)
        if founder is None:
            store.found("bench", b"statement")
            founder = Admission(Store(directory), key, clock=SystemClock())
        else:
            bundle = await founder.issuer.certify(key.peer_id)
            store.join(bundle.founding, bundle.chain.encoded, b"", ())
    if founder is not None:
        await founder.store.files.flush()
    return peers


# --- the worker -----------------------------------------------------------------------------------


class Node:
    """One node; lives until the process ends, or `stop`."""

    def __init__(self, directory: Path, note: Callable[[str, Change], None]) -> None:
        self.directory, self.name, self._note = directory, directory.name, note
        self._stack = contextlib.AsyncExitStack()
        self.host: LinkHost
        self.membership: Membership

    async def start(self, bootstrap: Iterable[str]) -> str:
        """Returns its address."""
        key, clock, limits = Key.load(self.directory / KEY_FILE), SystemClock(), AdmissionLimits()
        stack = self._stack
        admission = Admission(
            Store(self.directory), key, clock=clock, limits=limits, veto=_everybody
        )
        self.host = await stack.enter_async_context(
            LinkHost(key, admit=admission, privileged=admission.is_member)
        )
        (addr,) = await self.host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
        introductions = Introductions(
            self.host,
            admission,
            addrs=lambda: self.host.listen_addrs,
            join_document=_document,
        )
        introductions.start()
        stack.push_async_callback(introductions.aclose)
        self.membership = Membership(
            self.host,
            key,
            admission,
            introductions,
            config=MembershipConfig(),
            clock=clock,
            describe=self._describe,
            data_dir=self.directory,
        )
        self.membership.watch(lambda change: self._note(self.name, change))
        self.membership.reach.bootstrap(map(Multiaddr.parse, bootstrap))
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        running = [tasks.create_task(admission.run(lambda: None))]
        ready = asyncio.Event()
        running.append(tasks.create_task(self.membership.run(ready.set)))
        stack.callback(lambda: [task.cancel() for task in running])
        await ready.wait()
        return str(addr.with_peer(key.peer_id))

    def _describe(self) -> dict[str, Any]:
        return {
            "addrs": [str(addr.with_peer(self.host.peer_id)) for addr in self.host.listen_addrs],
            "host": "bench",
            "name": self.name,
            "labels": {"zone": "bench"},
            "version": "0.1",
            "services": ("pubsub",),
        }

    def figures(self) -> dict[str, Any]:
        counters, connections = self.membership.swim.counters, self.host.connections()
        return {
            "connections": len(connections),
            "health": self.membership.swim.awareness.score,
            "link_bytes_out": sum(connection.bytes_out for connection in connections),
            "probes": counters["probes"],
            "frames_out": counters["frames_out"],
            "bytes_out": counters["bytes_out"],
        }

    async def stop(self) -> None:
        await self._stack.aclose()


async def _everybody(peer: PeerId) -> bool:
    return True


async def _document() -> bytes:
    return b""


class Worker:
    """What the process does when it is told to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nodes: dict[str, Node] = {}
        self._changes: list[tuple[float, str, str, str]] = []
        self._lag = LagMeter()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        measuring = asyncio.create_task(self._lag.run())
        while line := await reader.readline():
            ask = json.loads(line)
            answer = await getattr(self, ask.pop("do"))(**ask)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        measuring.cancel()

    def _note(self, name: str, change: Change) -> None:
        removed = change.kind is ChangeKind.REMOVED
        state = "removed" if removed else change.member.state.value
        if removed or change.before is not change.member.state:
            self._changes.append((time.time(), name, str(change.member.peer), state))

    async def hello(self) -> dict[str, Any]:
        return {"rss": rss_bytes()}

    async def start(self, names: list[str], bootstrap: list[str]) -> dict[str, Any]:
        addrs, began = [], time.time()
        for name in names:
            node = self._nodes[name] = Node(self._path / name, self._note)
            addrs.append(await node.start(bootstrap))
        return {"began": began, "at": time.time(), "addrs": addrs}

    async def drain(self) -> dict[str, Any]:
        changes, self._changes = self._changes, []
        return {"changes": changes, "connections": self._connections()}

    def _connections(self) -> dict[str, int]:
        return {name: len(node.host.connections()) for name, node in self._nodes.items()}

    async def figures(self) -> dict[str, Any]:
        lag = self._lag.recent()
        return {
            "at": time.monotonic(),
            "cpu_s": time.process_time(),
            "rss": rss_bytes(),
            "lag_p99_s": lag.p99_s,
            "lag_max_s": lag.max_s,
            "nodes": {name: node.figures() for name, node in self._nodes.items()},
        }

    async def stop(self, names: list[str]) -> dict[str, Any]:
        at = time.time()
        for name in names:
            await self._nodes.pop(name).stop()
        return {"at": at}


# --- the driver -----------------------------------------------------------------------------------


class Process:
    """A worker, seen from the driver."""

    def __init__(self, process: asyncio.subprocess.Process, names: list[str]) -> None:
        self._process, self.names = process, names
        self.rss_empty = 0

    async def ask(self, do: str, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
        async with asyncio.timeout(ANSWER_S_MAX):
            line = await self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended; its errors are above: {self.names}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def kill(self) -> float:
        """kill -9; returns when."""
        at = time.time()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        await self._process.wait()
        return at


class Cluster:
    """Workers with nodes, and what each node has said of each other."""

    def __init__(self, path: Path, peers: Mapping[str, PeerId]) -> None:
        self._path, self.peers = path, peers
        self._names = {str(peer): name for name, peer in peers.items()}
        self.processes: list[Process] = []
        self.states: dict[tuple[str, str], tuple[str, float]] = {}  # (of, seen by) → state, since
        self.history: list[tuple[float, str, str, str]] = []  # when, seen by, of, state
        self.connections: dict[str, int] = {}
        self.addrs: dict[str, str] = {}

    async def spawn(self, names: list[str]) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            str(self._path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
        )
        worker = Process(process, names)
        self.processes.append(worker)
        worker.rss_empty = (await worker.ask("hello"))["rss"]
        return worker

    async def start(
        self, worker: Process, names: list[str], *, bootstrap: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Start some of the worker's nodes, one after the other; when the first and the last."""
        answer = await worker.ask("start", names=names, bootstrap=list(bootstrap))
        self.addrs.update(zip(names, answer["addrs"], strict=True))
        return answer

    async def kill(self, worker: Process) -> float:
        self.processes.remove(worker)
        return await worker.kill()

    async def aclose(self) -> None:
        for worker in self.processes[:]:
            await self.kill(worker)

    @property
    def names(self) -> list[str]:
        """Of the nodes whose processes live."""
        return [name for worker in self.processes for name in worker.names]

    async def drain(self) -> None:
        for answer in await asyncio.gather(*(w.ask("drain") for w in self.processes)):
            self.connections.update(answer["connections"])
            for at, by, peer, state in answer["changes"]:
                of = self._names[peer]
                self.states[of, by] = (state, at)
                self.history.append((at, by, of, state))

    async def until(self, condition: Callable[[], bool], what: str, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while True:
            await self.drain()
            if condition():
                return
            if time.monotonic() > deadline:
                has = Counter(self.connections.values())
                raise SystemExit(
                    f"not within {within_s:g} s: {what}; connections: nodes that have them: "
                    + ", ".join(f"{many}: {count}" for many, count in sorted(has.items()))
                )
            await asyncio.sleep(POLL_S)

    async def seen(
        self, of: Iterable[str], state: str, *, by: Iterable[str], within_s: float
    ) -> float:
        """Wait until all of `by` see all of `of` so; returns when the last one began to."""
        pairs = [(one, other) for one in of for other in by if one != other]

        def so() -> bool:
            return all(self.states.get(pair, ("", 0.0))[0] == state for pair in pairs)

        await self.until(so, f"{len(pairs)} views say {state!r}", within_s)
        return max(self.states[pair][1] for pair in pairs)

    def said(self, state: str, *, since: float = 0.0) -> list[tuple[float, str, str]]:
        """When, by whom and of whom it was said, in order."""
        return sorted(
            (at, by, of) for at, by, of, said in self.history if said == state and at >= since
        )


if __name__ == "__main__":
    log.setup("error")
    asyncio.run(Worker(Path(sys.argv[1])).run())
