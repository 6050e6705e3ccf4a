"""Peers that attack real nodes, and the cluster that they attack.

A `Trio` is three `ww node` processes: A, which is attacked, and B and C, which use it and each
other all the time (see bystander.py) and must not notice. Attackers run in the test: a `RawPeer`
says what it likes below the level of streams, a stranger is a `LinkHost` with a key of its own, and
a `Mole` is a member that joined with a ticket, like any node, and then speaks for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from wetware.base import cbor
from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.errors import OverlayError, WetwareError
from wetware.identity import Key, PeerId
from wetware.overlay.admission.decision import Admission
from wetware.overlay.admission.joining import join
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.admission.service import Introductions
from wetware.overlay.admission.store import Store
from wetware.overlay.admission.texts import parse_join
from wetware.overlay.link import Connection, LinkHost, LinkLimits, Stream
from wetware.overlay.membership.courier import PROTOCOL as MEMBERSHIP
from wetware.testing import Home, NodeProcess

MIB = 1 << 20
GROWTH_BYTES_MAX = 96 * MIB
"""How much more memory A may take for an attack; each table that an attacker can fill is smaller.
CPython gives little back, so that this is what it peaked at, and later attacks use it again."""
LOG_BYTES_MAX = 128 << 10
"""What an attack may add to A's log: a peer must not be able to fill the disk."""
CALL_S_MAX = 2.5
"""The longest call to A while it is attacked. It takes 2 ms alone; two cores carry everything here,
the attacker included, and other tests beside it. A loop that stands still shows in full."""
SETTLE_S_MAX = 15.0
"""For what an attack left to be gone."""


async def until(condition: Any, what: str, *, within_s: float = SETTLE_S_MAX) -> None:
    """Wait for a condition of which no event tells."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.05)


def framed(message: object) -> bytes:
    """Four bytes of length and CBOR; bytes as they are."""
    body = message if isinstance(message, bytes) else cbor.encode(message)
    return len(body).to_bytes(4, "big") + body


class Bystander:
    """The process of bystander.py."""

    ANSWER_S_MAX = 60.0

    def __init__(self, home: Home, nodes: tuple[NodeProcess, ...]) -> None:
        self._errors = home.path / "bystander.log"
        with self._errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).with_name("bystander.py")),
                    str(home.path / ".wetware" / "keys" / "default"),
                    *(node.addr for node in nodes),
                ],
                env=home.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )

    def report(self) -> dict[str, Any]:
        """What happened since the last report."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"report\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self.ANSWER_S_MAX)
        line = process.stdout.readline() if ready else b""
        assert line, f"the bystander says nothing:\n{self._errors.read_text()}"
        report: dict[str, Any] = json.loads(line)
        return report

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Trio:
    """A, B and C, and who uses them."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.a = home.start_node("a").wait_ready()
        self.ticket = self.a.invite("--uses", "200")
        self.b, self.c = [home.start_node(name, join=self.ticket) for name in "bc"]
        self.nodes = (self.a, self.b.wait_ready(), self.c.wait_ready())
        peers = [node.peer_id for node in self.nodes]
        for node in self.nodes:
            node.wait_members(peers)
        self.bystander = Bystander(home, self.nodes)
        first = self.bystander.report()
        self.pid, self.connected = first["a"]["pid"], self._connected(first)
        self._moles = 0
        self.measured: dict[str, dict[str, float]] = {}

    def close(self) -> None:
        self.bystander.close()
        for node in self.nodes:
            node.stop()

    @property
    def addr(self) -> Multiaddr:
        """Where A is attacked."""
        return Multiaddr.parse(self.a.addr)

    def rss(self) -> int:
        """Memory of A, now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096

    def files(self) -> int:
        """Sockets and files that A has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    @staticmethod
    def _connected(report: dict[str, Any]) -> list[str]:
        return sorted(peer["peer_id"] for peer in report["a"]["peers"])

    @contextlib.asynccontextmanager
    async def unharmed(
        self,
        name: str,
        *,
        growth_bytes_max: int = GROWTH_BYTES_MAX,
        call_s_max: float = CALL_S_MAX,
        log_bytes_max: int = LOG_BYTES_MAX,
    ) -> AsyncIterator[None]:
        """What happens inside leaves A up, bounded and as it was, and the rest does not notice."""
        await asyncio.to_thread(self.bystander.report)
        marks = {node.log: node.log.stat().st_size for node in self.nodes}
        rss, files = self.rss(), self.files()
        peak = rss

        async def sample() -> None:
            nonlocal peak
            while True:
                peak = max(peak, self.rss())
                await asyncio.sleep(0.05)

        sampling = asyncio.create_task(sample())
        started = time.monotonic()
        try:
            yield
        finally:
            sampling.cancel()
        took_s = time.monotonic() - started
        assert self.a.process.poll() is None, self.a.log.read_text()[-4000:]
        report = await asyncio.to_thread(self.bystander.report)
        grown, log_bytes = peak - rss, self.a.log.stat().st_size - marks[self.a.log]
        longest_s = max(each["longest_s"] for each in report["calls"].values())
        self.measured[name] = {
            "seconds": round(took_s, 1),
            "grown_mib": round(grown / MIB, 1),
            "log_kib": round(log_bytes / 1024, 1),
            "longest_call_ms": round(1000 * longest_s),
            "lag_p99_ms": round(1000 * report["a"]["loop_lag_p99_s"]),
        }
        print(name, self.measured[name])  # noqa: T201 - figures, with -s
        # The rest: everything arrived, in order; every call was answered; nobody is dead.
        assert report["a"]["pid"] == self.pid == self.a.process.pid
        assert report["published"] > 0
        assert report["late"] == []
        assert report["wrong"] == {"a": [], "c": []}
        # B and C alone show how late the machine itself is.
        machine_s = report["calls"]["c_to_b"]["longest_s"]
        for what, calls in report["calls"].items():
            assert calls["failures"] == [], what
            assert calls["longest_s"] < call_s_max + machine_s, what
        ours = {str(node.peer_id) for node in self.nodes}
        for view in report["views"].values():
            assert {peer for peer, state in view.items() if state == "alive"} >= ours
        for node in self.nodes:
            with node.log.open() as log:
                log.seek(marks[node.log])
                text = log.read()
            for peer in ours:
                assert f"member.dead peer={peer}" not in text, node.data_dir.name
            bad = re.search(r"^\S+ (error|critical) (.*\n(    .*\n)*)", text, re.MULTILINE)
            assert bad is None, f"{node.data_dir.name}: {bad and bad[0]}"
        # A: bounded, and nothing is left.
        assert grown < growth_bytes_max
        assert log_bytes < log_bytes_max
        await until(lambda: self.files() <= files, "A's sockets are closed")

        async def as_before() -> bool:
            now = await asyncio.to_thread(self.bystander.report)
            return self._connected(now) == self.connected and now["a"]["sessions"] == 1

        deadline = time.monotonic() + SETTLE_S_MAX
        while not await as_before():
            assert time.monotonic() < deadline, "A's connections are as before"
            await asyncio.sleep(0.2)

    # --- attackers ---

    @contextlib.asynccontextmanager
    async def stranger(
        self, source: str = "127.0.0.66", key: Key | None = None
    ) -> AsyncIterator[Connection]:
        """A connection to A of somebody with a key and nothing else."""
        async with LinkHost(key or Key.generate(), limits=LinkLimits(close_s=0.2)) as host:
            with coming_from(source):
                yield await host.dial([self.addr])

    @contextlib.asynccontextmanager
    async def mole(self, **how: Any) -> AsyncIterator[Mole]:
        """A member that is up with A."""
        self._moles += 1
        path = self.home.path / f"mole{self._moles}"
        path.mkdir()
        async with Mole(path, self).running(**how) as mole:
            yield mole


@contextlib.contextmanager
def coming_from(source: str) -> Iterator[None]:
    """What this loop dials comes from another address of this machine meanwhile.

    Limits hold for each address: an attacker shall not use up those of the test's honest clients.
    """
    loop = asyncio.get_running_loop()
    loop.create_connection = partial(  # type: ignore[method-assign]
        type(loop).create_connection, loop, local_addr=(source, 0)
    )
    try:
        yield
    finally:
        del loop.create_connection  # type: ignore[method-assign]


class Mole:
    """A member of the cluster whose part the test plays."""

    def __init__(self, path: Path, trio: Trio) -> None:
        self.path, self.trio, self.key = path, trio, Key.generate()
        self.heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.host: LinkHost
        self.admission: Admission
        self.introductions: Introductions
        self.connection: Connection

    @property
    def peer(self) -> PeerId:
        return self.key.peer_id

    @contextlib.asynccontextmanager
    async def running(
        self, *targets: NodeProcess, handlers: dict[str, Any] | None = None
    ) -> AsyncIterator[Mole]:
        clock, limits = time, AdmissionLimits()
        async with LinkHost(self.key) as host:
            store, ticket = Store(self.path), parse_join(self.trio.ticket)
            await join(host, ticket, store, key=self.key, clock=clock, limits=limits)
        self.admission = Admission(store, self.key, clock=clock, limits=limits)
        async with LinkHost(
            self.key,
            limits=LinkLimits(close_s=0.2),
            admit=lambda peer, protocol, access: True,
        ) as self.host:
            for protocol, handler in {MEMBERSHIP: self.listen, **(handlers or {})}.items():
                self.host.handle(protocol, handler, access=Access.PUBLIC)
            self.introductions = Introductions(
                self.host, self.admission, addrs=lambda: (), join_document=_nothing
            )
            self.introductions.start()
            try:
                for node in targets or (self.trio.a,):
                    await self.reach(node)
                self.connection = self.to(self.trio.a) if not targets else self.to(targets[0])
                yield self
            finally:
                await self.introductions.aclose()
        await self.admission.store.files.flush()

    async def reach(self, node: NodeProcess) -> Connection:
        """A connection on which both ends have admitted each other."""
        connection = await self.host.dial([Multiaddr.parse(node.addr)])
        await self.introductions.introduced(connection)
        return connection

    def to(self, node: NodeProcess) -> Connection:
        connection = self.host.connection(node.peer_id)
        assert connection is not None
        return connection

    async def speak(self, protocol: str = MEMBERSHIP) -> Stream:
        """A stream to A."""
        return await self.connection.open_stream(protocol)

    async def fetch_record(self, peer: PeerId) -> bytes:
        """A node's record, as A has it."""
        stream = await self.speak()
        async with asyncio.timeout(60):
            while True:
                await stream.write(framed({"k": 7, "w": peer.public_key}))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        while not (records := (await self.heard.get()).get("r")):
                            pass
                        return bytes(records[0])

    async def listen(self, stream: Stream) -> None:
        """Keep the frames that A sends on the membership protocol."""
        while True:
            size = int.from_bytes(await stream.read_exactly(4), "big")
            frame = cbor.decode(await stream.read_exactly(size), bytes_max=size)
            if self.heard.qsize() < 10_000:
                self.heard.put_nowait(frame)


async def _nothing() -> bytes:
    return b""


async def send(connection: Connection, protocol: str, data: bytes, *, wait_s: float = 0.0) -> bytes:
    """Say something on a new stream, close it, and return what comes back within `wait_s`."""
    got = b""
    try:
        stream = await connection.open_stream(protocol)
    except OverlayError:
        return got
    with contextlib.suppress(WetwareError, TimeoutError, EOFError):
        async with asyncio.timeout(5):
            await stream.write(data)
        if wait_s:
            async with asyncio.timeout(wait_s):
                while chunk := await stream.read():
                    got += chunk
        stream.close()
    stream.reset()
    return got


def made_trio(path: Path) -> Trio:
    """Start it, with what failed told in full."""
    home = Home(path, libp2p=True)
    try:
        return Trio(home)
    except BaseException:
        home.__exit__()
        raise


__all__ = [
    "MIB",
    "Mole",
    "Trio",
    "coming_from",
    "framed",
    "made_trio",
    "send",
    "until",
]
