"""What a process costs: `python tests/bench/bench_proc.py`.

From its start to the report of its end, in this process ("in the node") and through a session of a
real `ww node`, beside /bin/true, a bare Python and bwrap, in turns, so that a busy machine hits all
alike. The guest says hello; it is written as text, without a C library. Then a guest's call of
a capability beside the same call in Python, how long killing a spinner takes, how late the loop is
beside eight of them, two guests that compute beside one, bytes through a guest beside pipes through
`cat`, and the memory of a thousand that wait. Python functions are measured where the node has
them (not with --quick: their runner is built), native programs where it has those, and bwrap.
Exit status 1 with --check if a target is missed by more than a quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import wasmtime

import wetware
from wetware import rpc
from wetware.testing import Home, NodeProcess
from wetware_proc.client import Executor
from wetware_proc.driver import Pipe, Spec
from wetware_proc.wasm.driver import WasmDriver, WasmImage, wasm_driver

ECHO = rpc.load(Path(__file__).with_name("bench.capnp")).Echo
BWRAP = ("bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "true")
WASI = '(import "wasi_snapshot_preview1"'
HELLO = rf"""(module {WASI} "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1) (data (i32.const 0) "\08\00\00\00\06\00\00\00hello\n")
    (func (export "_start")
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 20)))))"""
SPIN = '(module (func (export "_start") (loop $more (br $more))))'
COMPUTE = """(module (func (export "_start") (local $n i64)
    (loop $more (br_if $more (i64.ne (i64.const 400000000)
        (local.tee $n (i64.add (local.get $n) (i64.const 1))))))))"""
CAT = rf"""(module {WASI} "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
    {WASI} "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 2)
    (data (i32.const 0) "\00\00\01\00\00\00\01\00\00\00\01\00")
    (func (export "_start") (loop $more
        (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 12)))
        (drop (call $write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 16)))
        (br_if $more (i32.load (i32.const 12))))))"""
CALLS = 1000
CALL = rf"""(module (import "ww" "cap" (func $cap (param i32 i32) (result i32)))
    (import "ww" "call" (func $call (param i32 i32 i32) (result i32)))
    {WASI} "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
    {WASI} "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 2)
    (data (i32.const 0) "echo\82\64echo\a1\64data\41x")
    (data (i32.const 64) "\00\04\00\00\40\1f\00\00")
    (func $now (result i64)
        (drop (call $clock (i32.const 1) (i64.const 0) (i32.const 128))) (i64.load (i32.const 128)))
    (func (export "_start") (local $echo i32) (local $at i32) (local $start i64)
        (local.set $echo (call $cap (i32.const 0) (i32.const 4)))
        (local.set $at (i32.const 1024))
        (loop $more
            (local.set $start (call $now))
            (if (i32.lt_s (call $call (local.get $echo) (i32.const 4) (i32.const 14)) (i32.const 0))
                (then unreachable))
            (i64.store (local.get $at) (i64.sub (call $now) (local.get $start)))
            (local.set $at (i32.add (local.get $at) (i32.const 8)))
            (br_if $more (i32.lt_u (local.get $at) (i32.const {1024 + 8 * CALLS}))))
        (drop (call $write (i32.const 1) (i32.const 64) (i32.const 1) (i32.const 128)))))"""
"""Writes how long each call took, in ns."""

Starts = dict[str, Callable[[], Awaitable[object]]]


def p50_p99(values: list[float]) -> tuple[float, float]:
    values = sorted(values)
    return values[len(values) // 2], values[len(values) * 99 // 100]


def program(*command: str) -> Callable[[], Awaitable[object]]:
    async def run() -> None:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)  # noqa: ASYNC221 - alone

    return run


def peers() -> Starts:
    found = {
        "/bin/true": program("/bin/true"),
        "python -c pass": program(sys.executable, "-I", "-c", "pass"),
    }
    if shutil.which("bwrap") and subprocess.run(BWRAP, capture_output=True).returncode == 0:
        found["bwrap true"] = program(*BWRAP)
    return found


def nothing() -> None:
    """Travels."""


@contextlib.asynccontextmanager
async def ours(driver: WasmDriver, node: NodeProcess, quick: bool) -> AsyncIterator[Starts]:
    image = await driver.load(wasmtime.wat2wasm(HELLO))
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        loaded = await session.proc.load(bytes(wasmtime.wat2wasm(HELLO)))

        async def in_session() -> None:
            async with loaded.spawn() as process:
                if await process.stdout.receive() != b"hello\n" or (await process.wait()).code:
                    raise ValueError("the guest failed")

        found: Starts = {
            "wasm, in the node": lambda: image.run(Spec(args=("hello",))),
            "wasm, session": in_session,
        }
        if not quick and hasattr(Executor, "call"):
            found["Python, session"] = lambda: session.proc.call(nothing)
        if "bwrap true" in peers() and importlib.util.find_spec("wetware_proc.native"):
            found["native, session"] = lambda: session.proc.run("true", kind="native")
        yield found


async def starts(found: Starts, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds from start to end, p50 and p99."""
    took: dict[str, list[float]] = {name: [] for name in found}
    for start in found.values():
        await start()  # builds, compiles, opens
    for _ in range(rounds):
        for name, start in found.items():
            for _ in range(5 if name == "python -c pass" else 25):
                before = time.perf_counter()
                await start()
                took[name].append((time.perf_counter() - before) * 1e3)
    return {name: p50_p99(each) for name, each in took.items()}


async def calls_us(driver: WasmDriver, folder: Path) -> dict[str, tuple[float, float]]:
    class Echo(rpc.Servant, interface=ECHO):
        async def echo(self, data: bytes) -> dict[str, Any]:
            return {"data": data}

    image = await driver.load(wasmtime.wat2wasm(CALL))
    async with (
        rpc.serve_unix(folder / "echo", lambda _peer: Echo()),
        await rpc.connect_unix(folder / "echo") as connection,
    ):
        ref, out, plain = connection.bootstrap(ECHO), bytearray(), []
        end = await image.run(Spec(grants={"echo": ref}, stdout=out.extend))
        if end.code or len(out) != 8 * CALLS:
            raise ValueError(f"the guest that calls ended: {end}")
        for _ in range(CALLS):
            before = time.perf_counter_ns()
            await ref.call("echo", data=b"x")
            plain.append((time.perf_counter_ns() - before) / 1e3)
    return {
        "by a guest": p50_p99([each / 1e3 for each in memoryview(out).cast("Q")]),
        "in Python": p50_p99(plain),
    }


async def spinning(driver: WasmDriver, image: WasmImage, count: int) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.ensure_future(image.run(Spec())) for _ in range(count)]
    await asyncio.sleep(0.02)
    return tasks


async def killed(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def kills_ms(driver: WasmDriver, rounds: int) -> tuple[float, float]:
    image, took = await driver.load(wasmtime.wat2wasm(SPIN)), []
    for _ in range(rounds):
        tasks = await spinning(driver, image, 1)
        before = time.perf_counter()
        await killed(tasks)
        took.append((time.perf_counter() - before) * 1e3)
    return p50_p99(took)


async def lag_ms(driver: WasmDriver, seconds: float) -> tuple[float, float]:
    tasks = await spinning(driver, await driver.load(wasmtime.wat2wasm(SPIN)), 8)
    late, until = [], time.perf_counter() + seconds
    while (before := time.perf_counter()) < until:
        await asyncio.sleep(0.002)
        late.append((time.perf_counter() - before - 0.002) * 1e3)
    await killed(tasks)
    return p50_p99(late)


async def speedup(driver: WasmDriver) -> float:
    """Of two guests that compute beside one after the other."""
    image = await driver.load(wasmtime.wat2wasm(COMPUTE))

    async def took_s(count: int) -> float:
        before = time.perf_counter()
        await asyncio.gather(*(image.run(Spec()) for _ in range(count)))
        return time.perf_counter() - before

    return statistics.median([2 * await took_s(1) / await took_s(2) for _ in range(3)])


async def mb_s(driver: WasmDriver, total: int) -> dict[str, float]:
    """Through a guest, and through `cat` and two pipes."""
    piece = os.urandom(64 << 10)
    image = await driver.load(wasmtime.wat2wasm(CAT))

    async def through_guest() -> int:
        pipe, got = Pipe(), 0

        def take(data: bytes) -> None:
            nonlocal got
            got += len(data)

        running = asyncio.ensure_future(image.run(Spec(stdin=pipe, stdout=take)))
        for _ in range(total // len(piece)):
            await pipe.write(piece)
        pipe.close()
        await running
        return got

    async def through_cat() -> int:
        cat = await asyncio.create_subprocess_exec(
            "cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert cat.stdin is not None
        assert cat.stdout is not None

        async def write(to: asyncio.StreamWriter) -> None:
            for _ in range(total // len(piece)):
                to.write(piece)
                await to.drain()
            to.close()

        writing, got = asyncio.ensure_future(write(cat.stdin)), 0
        while data := await cat.stdout.read(len(piece)):
            got += len(data)
        await writing
        await cat.wait()
        return got

    ways, found = {"guest": through_guest, "cat": through_cat}, {"guest": 0.0, "cat": 0.0}
    for _ in range(3):
        for name, way in ways.items():
            before = time.perf_counter()
            if (got := await way()) != total:
                raise ValueError(f"{got} bytes came through {name}, of {total}")
            found[name] = max(found[name], total / (time.perf_counter() - before) / 1e6)
    return found


async def parked_kib(driver: WasmDriver, count: int) -> float:
    """Of each guest that waits for input."""
    image, pipe = await driver.load(wasmtime.wat2wasm(CAT)), Pipe()
    await image.run(Spec())
    before = resident_kib()
    tasks = [
        asyncio.ensure_future(image.run(Spec(stdin=pipe, args=("cat",)))) for _ in range(count)
    ]
    while len(pipe._changed._waiters) < count:
        await asyncio.sleep(0.01)
    each = (resident_kib() - before) / count
    pipe.close()
    await asyncio.gather(*tasks)
    return each


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def measure(node: NodeProcess, folder: Path, quick: bool) -> dict[str, Any]:
    async with rpc.runtime(), rpc.loop_gc(), wasm_driver(folder / "proc") as driver:
        parked = await parked_kib(driver, 1000)  # first: nothing was freed before
        async with ours(driver, node, quick) as found:
            started = await starts({**peers(), **found}, 5 if quick else 20)
        return {
            "starts_ms": started,
            "calls_us": await calls_us(driver, folder),
            "kill_ms": await kills_ms(driver, 50 if quick else 300),
            "lag_ms": await lag_ms(driver, 2 if quick else 10),
            "speedup": await speedup(driver),
            "mb_s": await mb_s(driver, (64 if quick else 512) << 20),
            "parked_kib": parked,
        }


def targets(result: dict[str, Any]) -> Iterator[tuple[str, float, float, str]]:
    """What, its value, the most that it may be, the unit."""
    starts = {name: p50 for name, (p50, _) in result["starts_ms"].items()}
    yield "wasm in the node, p50", starts["wasm, in the node"], 0.3, "ms"
    yield "wasm through a session, p50", starts["wasm, session"], 3.0, "ms"
    if "Python, session" in starts:
        yield "Python call, p50", starts["Python, session"], 6.0, "ms"
    if "native, session" in starts:
        yield (
            "native beyond bwrap, p50",
            starts["native, session"] - starts["bwrap true"],
            5.0,
            "ms",
        )
    yield "loop lag beside 8 spinners, p99", result["lag_ms"][1], 25.0, "ms"


def report(result: dict[str, Any]) -> bool:
    print(f"\n{'start to end, ms':24}{'p50':>9}{'p99':>9}{'x /bin/true':>13}")
    true = result["starts_ms"]["/bin/true"][0]
    for name, (p50, p99) in result["starts_ms"].items():
        print(f"{name:24}{p50:9.3f}{p99:9.3f}{p50 / true:13.2f}")
    print(f"\n{'':24}{'p50':>9}{'p99':>9}")
    for name, (p50, p99) in result["calls_us"].items():
        print(f"{'call ' + name + ', µs':24}{p50:9.0f}{p99:9.0f}")
    for name, key in (("kill a spinner, ms", "kill_ms"), ("loop lag, ms", "lag_ms")):
        print(f"{name:24}{result[key][0]:9.2f}{result[key][1]:9.2f}")
    rates = result["mb_s"]
    print(
        f"\ntwo guests that compute, beside one after the other: {result['speedup']:.2f} x on "
        f"{os.cpu_count()} cores\nbytes through a guest: {rates['guest']:.0f} MB/s, "
        f"{rates['guest'] / rates['cat']:.2f} x `cat` ({rates['cat']:.0f})\n"
        f"a guest that waits: {result['parked_kib']:.0f} KiB\n"
    )
    good = True
    for what, value, most, unit in targets(result):
        good = good and value <= most * 1.25
        met = "met" if value <= most else "MISSED"
        print(f"{what:34}{value:8.2f} {unit}  target <= {most} {met}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no Python functions")
    parser.add_argument("--json", action="store_true", help="figures alone, as JSON")
    parser.add_argument("--check", action="store_true", help="fail if a target is far off")
    args = parser.parse_args()
    native = importlib.util.find_spec("wetware_proc.native") and shutil.which("bwrap")
    settings = {"WW_PLUGINS_PROC_NATIVE": "true"} if native else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Home(Path(folder) / "home", settings, libp2p=False) as home,
        home.node() as node,
    ):
        result = asyncio.run(measure(node, Path(folder), args.quick))
    if args.json:
        print(json.dumps(result))
        return 0
    return 0 if report(result) or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
