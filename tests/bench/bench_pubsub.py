"""Pub-sub through real nodes and sessions: `python tests/bench/bench_pubsub.py`.

64-byte messages from one publisher to eight subscribers, each with a session of its own, over unix
sockets: at one node, and from one node to another over the encrypted overlay. Every message is
signed by its node and verified by the receiving one. Nodes, publisher and subscribers are processes
of their own (the eight subscribers share one), on this machine. Prints what was delivered; nothing
is lost, or the run fails. Takes less than 30 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import wetware
from wetware.testing import Home, NodeProcess

SUBSCRIBERS = 8
PAYLOAD_BYTES = 64
WARM_S = 20.0
RUN_S_MAX = 60.0  # on a loaded machine; about 5 s on an idle one


def _payload(number: int) -> bytes:
    return b"%016d%020d" % (number, time.time_ns()) + b"." * (PAYLOAD_BYTES - 36)


async def subscribers(data_dir: Path, key: Path, count: int, paced: int) -> None:
    """Eight sessions that read until all have everything; prints one JSON line."""
    done_at = [0.0] * SUBSCRIBERS
    first_at = [0.0] * SUBSCRIBERS
    latencies_s: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        subscriptions: list[Any] = []
        for _ in range(SUBSCRIBERS):
            session = await stack.enter_async_context(wetware.connect(data_dir=data_dir, key=key))
            topic = await session.pubsub.join("bench")
            subscriptions.append(await stack.enter_async_context(topic.subscribe(buffer=65_536)))
        sys.stdout.write("ready\n")
        sys.stdout.flush()

        async def read(index: int) -> int:
            messages = subscriptions[index]
            expected = 0
            async for message in messages:
                number = int(message.data[:16])
                if message.data.startswith(b"-"):
                    continue  # a probe
                if number != expected:
                    raise SystemExit(f"subscriber {index}: {number} came in place of {expected}")
                if number < paced:
                    if index == 0:
                        latencies_s.append((time.time_ns() - int(message.data[16:36])) / 1e9)
                elif number == paced:
                    first_at[index] = time.perf_counter()
                expected += 1
                if expected == paced + count:
                    done_at[index] = time.perf_counter()
                    break
            return int(messages.dropped)

        dropped = await asyncio.gather(*map(read, range(SUBSCRIBERS)))
    elapsed_s = max(done_at) - min(first_at)
    latencies_s.sort()
    print(
        json.dumps(
            {
                "delivered_per_s": SUBSCRIBERS * count / elapsed_s,
                "messages_per_s": count / elapsed_s,
                "dropped": sum(dropped),
                "p50_ms": statistics.median(latencies_s) * 1e3,
                "p99_ms": latencies_s[int(len(latencies_s) * 0.99)] * 1e3,
            }
        )
    )


async def publisher(data_dir: Path, key: Path, count: int, paced: int, remote: bool) -> None:
    """Probes until the subscribers are known, then a paced part, then a burst."""
    async with wetware.connect(data_dir=data_dir, key=key) as session:
        topic = await session.pubsub.join("bench")
        deadline = time.monotonic() + WARM_S
        while remote and (await topic.info()).peers == 0:
            if time.monotonic() > deadline:
                raise SystemExit("the other node's subscription is not known here")
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)
        for number in range(paced):
            await topic.publish(_payload(number))
            await asyncio.sleep(0.005)
        started = time.perf_counter()
        await topic.publish_all(_payload(paced + n) for n in range(count))
        print(json.dumps({"published_per_s": count / (time.perf_counter() - started)}))


def _spawn(role: str, node: NodeProcess, key: Path, *rest: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # ourselves
        [sys.executable, __file__, "--role", role, str(node.data_dir), str(key), *map(str, rest)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **node.home.env},
    )


def measure(at: NodeProcess, to: NodeProcess, key: Path, count: int, paced: int) -> dict[str, Any]:
    """One run; raises SystemExit if a message was lost, out of order or dropped."""
    reading = _spawn("sub", to, key, count, paced)
    writing = None
    try:
        assert reading.stdout is not None
        if reading.stdout.readline() != "ready\n":
            raise SystemExit("the subscribers did not start")
        writing = _spawn("pub", at, key, count, paced, int(at is not to))
        out, _ = writing.communicate(timeout=RUN_S_MAX)
        result: dict[str, Any] = json.loads(out)
        out, _ = reading.communicate(timeout=RUN_S_MAX)
        result |= json.loads(out)
    finally:
        for process in (reading, writing):
            if process is not None:
                process.kill()
                process.wait()
    if result["dropped"]:
        raise SystemExit(f"{result['dropped']} messages were dropped")
    return result


def main() -> None:
    """Start two nodes, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000, help="messages of the burst")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", choices=("pub", "sub"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        data_dir, key, *numbers = args.rest
        work = subscribers if args.role == "sub" else publisher
        asyncio.run(work(Path(data_dir), Path(key), *map(int, numbers)))  # type: ignore[operator]
        return
    results = {}
    with (
        tempfile.TemporaryDirectory() as path,
        Home(Path(path)) as home,
        home.node("a") as a,
        home.node("b", join=a) as b,
    ):
        b.wait_members([a.peer_id])
        key = home.path / "bench.key"
        home.key().save(key)
        results["one node"] = measure(a, a, key, args.count, 200)
        results["two nodes"] = measure(a, b, key, args.count, 200)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(
        f"pub-sub, {PAYLOAD_BYTES} B, 1 -> {SUBSCRIBERS} sessions, {args.count} messages, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}"
    )
    for name, r in results.items():
        print(
            f"  {name}: {r['messages_per_s']:8.0f} messages/s, {r['delivered_per_s']:8.0f} "
            f"delivered/s, latency at 200/s p50 {r['p50_ms']:.2f} p99 {r['p99_ms']:.2f} ms"
        )


if __name__ == "__main__":
    main()
