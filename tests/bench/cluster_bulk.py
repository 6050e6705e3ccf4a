"""A plugin that loads a node from inside, for bench_saturation.py.

It runs on the node's own loop: it sends to other nodes as fast as the link takes it, on the
connection that carries the membership, answers calls, and measures what that does to the loop and
to the membership. It looks into the node for that, as no real plugin may.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import gc
import io
import json
import os
import pstats
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from wetware import rpc
from wetware.base.access import Access
from wetware.hookspecs import PluginContext, Service, hookimpl
from wetware.identity import PeerId, Principal
from wetware.node.lag import LagMeter

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.node.compose import Node
    from wetware.overlay.link import Stream

NAME = "bulk"
PROTOCOL = "/bench/bulk/1"
CHUNK_BYTES = 64 << 10
ECHO_EVERY_S = 0.1
ECHO_S_MAX = 5.0
SCHEMA = rpc.load(Path(__file__).with_name("cluster_bulk.capnp"))
LATE_S = 0.02
SAMPLE_S = 0.005
COUNTERS = ("probes", "probes_failed", "suspicions", "deaths", "refutations", "away", "doubted")


@hookimpl
def ww_register_services(ctx: PluginContext) -> Iterable[Service]:
    return (BulkService(ctx),)


class Sampler(threading.Thread):
    """What the loop does while it is late: its stack, every SAMPLE_S once it is LATE_S late."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.beat_at = time.monotonic()
        self.stacks: Counter[str] = Counter()
        self.ended = False
        self._watched = threading.get_ident()

    def run(self) -> None:
        while not self.ended:
            time.sleep(SAMPLE_S)
            if time.monotonic() - self.beat_at > LATE_S:
                frame = sys._current_frames().get(self._watched)
                stack = traceback.extract_stack(frame)[-5:]
                self.stacks[" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}"
                                       for f in reversed(stack))] += 1  # fmt: skip


class BulkService(Service):
    """The service and its work."""

    name = NAME
    interface = SCHEMA.Bulk

    def __init__(self, ctx: PluginContext) -> None:
        self._ctx = ctx
        self._node: Node = ctx.overlay._node  # type: ignore[attr-defined]
        self._senders: dict[PeerId, asyncio.Task[None]] = {}
        self._measuring: list[asyncio.Task[None]] = []
        self.bytes_in = self.bytes_out = 0
        self._began_at = self._cpu_s = self._loop_cpu_s = 0.0
        self._counters: dict[str, int] = {}
        self._lag = LagMeter()
        self._echoes: dict[str, list[float]] = {}
        self._lost = 0
        self._beats: list[tuple[float, float]] = []  # late by, of which this thread ran
        self._collecting = (0.0, 0.0)
        self._collected: tuple[float, float] = (0.0, 0.0)  # the longest: in all, and running
        self._sampler: Sampler | None = None
        self._profile: cProfile.Profile | None = None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        end = self._ctx.overlay.handle(PROTOCOL, self._sink, access=Access.MEMBER)
        gc.callbacks.append(self._gc)
        task_status.started()
        try:
            await anyio.sleep_forever()
        finally:
            gc.callbacks.remove(self._gc)
            end()
            self._stop(self._senders.values())
            self._stop(self._measuring)

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return BulkServant(self)

    def _stop(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()

    # --- the load ---

    async def _sink(self, stream: Stream) -> None:
        while data := await stream.read():
            self.bytes_in += len(data)

    async def _send(self, peer: PeerId) -> None:
        chunk = os.urandom(CHUNK_BYTES)
        stream = await self._ctx.overlay.open_stream(peer, PROTOCOL)
        try:
            while True:
                await stream.write(chunk)
                self.bytes_out += len(chunk)
        finally:
            stream.reset()

    def send_to(self, peers: Iterable[PeerId]) -> None:
        self._stop(self._senders.values())
        self._senders = {peer: asyncio.create_task(self._send(peer)) for peer in peers}

    # --- what it does to the node ---

    def _gc(self, phase: str, _info: object) -> None:
        now = (time.perf_counter(), time.thread_time())
        if phase == "start":
            self._collecting = now
        else:
            took = (now[0] - self._collecting[0], now[1] - self._collecting[1])
            self._collected = max(self._collected, took)

    def _swim(self) -> dict[str, int]:
        counters = self._node.membership.swim.counters
        return {name: counters[name] for name in COUNTERS}

    def begin(self, *, profile: bool) -> None:
        self._stop(self._measuring)
        self.bytes_in = self.bytes_out = self._lost = 0
        self._lag, self._echoes, self._beats = LagMeter(), {}, []
        self._collected = (0.0, 0.0)
        self._counters = self._swim()
        peers = [member.peer for member in self._node.membership.swim.members().values()]
        work = [self._lag.run(), *map(self._echo, peers)]
        if profile:
            work.append(self._beat())
            self._sampler, self._profile = Sampler(), cProfile.Profile()
            self._sampler.start()
        self._measuring = [asyncio.create_task(each) for each in work]
        self._began_at, self._cpu_s = time.perf_counter(), time.process_time()
        self._loop_cpu_s = time.thread_time()
        if self._profile is not None:
            self._profile.enable()

    async def _echo(self, peer: PeerId) -> None:
        """Round trips on the membership stream: what a probe and its answer take."""
        times = self._echoes[str(peer)] = []
        while True:
            await asyncio.sleep(ECHO_EVERY_S)
            try:
                async with asyncio.timeout(ECHO_S_MAX):
                    times.append(await self._node.membership.round_trip(peer))
            except TimeoutError:
                self._lost += 1

    async def _beat(self) -> None:
        """How late the loop is, and how much of that it spent running."""
        interval_s = 0.01
        while True:
            at, cpu = time.monotonic(), time.thread_time()
            await asyncio.sleep(interval_s)
            now = time.monotonic()
            if self._sampler is not None:
                self._sampler.beat_at = now
            late = now - at - interval_s
            if late > LATE_S:
                self._beats.append((late, time.thread_time() - cpu))

    def figures(self) -> dict[str, Any]:
        took_s = time.perf_counter() - self._began_at
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.disable()
        now = self._swim()
        late = sum(late for late, _ in self._beats)
        result: dict[str, Any] = {
            "took_s": took_s,
            "in_mb_s": self.bytes_in / 1e6 / took_s,
            "out_mb_s": self.bytes_out / 1e6 / took_s,
            "cpu": (time.process_time() - self._cpu_s) / took_s,
            "loop_cpu": (time.thread_time() - self._loop_cpu_s) / took_s,
            "lag": asdict(self._lag.recent()),
            "gc_s": self._collected,
            "echoes": self._echoes,
            "echoes_lost": self._lost,
            "members": [m.state.value for m in self._node.membership.swim.members().values()],
            **{name: now[name] - self._counters[name] for name in COUNTERS},
        }
        if profile is not None and self._sampler is not None:
            self._sampler.ended = True
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(25)
            result["profile"] = text.getvalue()
            result["late_s"] = late
            result["late_own_s"] = sum(own for _, own in self._beats)
            result["late_stacks"] = self._sampler.stacks.most_common(12)
        self._stop(self._measuring)
        return result


class BulkServant(rpc.Servant, interface=SCHEMA.Bulk):
    """What the bench calls."""

    def __init__(self, service: BulkService) -> None:
        self._service = service

    async def echo(self, data: bytes) -> dict[str, bytes]:
        return {"data": data}

    async def run(self, peers: list[str]) -> None:
        self._service.send_to(map(PeerId.parse, peers))

    async def begin(self, profile: bool) -> None:
        self._service.begin(profile=profile)

    async def figures(self) -> dict[str, str]:
        return {"json": json.dumps(self._service.figures())}
