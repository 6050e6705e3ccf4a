"""The rest of a cluster while one node is attacked: a process that uses it, and keeps count.

    python bystander.py KEY A B C

Publishes at B what it receives at A and at C, calls A, calls C through A, and lets B and C ping A
and each other, all the time. For each line on stdin it prints one JSON object: what happened since
the line before. In a process of its own, so that the attacker's work does not count as A's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import wetware
from wetware.base.multiaddr import Multiaddr
from wetware.errors import WetwareError
from wetware.identity import Key, PeerId

PUBLISH_S, CALL_S, PING_S = 0.02, 0.05, 0.2
CALL_S_MAX, FLUSH_S_MAX = 20.0, 20.0
TOPIC = "rest"


class Reader:
    """What arrives at one node of what is published at another: everything, in order?"""

    def __init__(self) -> None:
        self.last = -1
        self.wrong: list[list[int]] = []
        self.came = asyncio.Event()

    async def run(self, messages: Any) -> None:
        async for message in messages:
            number = int(message.data)
            if self.last >= 0 and number != self.last + 1:
                self.wrong.append([self.last, number])
            self.last = number
            self.came.set()

    async def reach(self, number: int) -> None:
        while self.last < number:
            self.came.clear()
            await self.came.wait()


class Calls:
    """One call, again and again."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.count, self.longest_s, self.failures = 0, 0.0, list[str]()

    async def run(self, call: Any, pause_s: float) -> None:
        while True:
            started = time.monotonic()
            try:
                async with asyncio.timeout(CALL_S_MAX):
                    await call()
            except (WetwareError, TimeoutError) as exc:
                self.failures.append(f"{type(exc).__name__}: {exc}"[:200])
                await asyncio.sleep(0.5)
            self.count += 1
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            await asyncio.sleep(pause_s)


async def lines() -> Any:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        yield line.decode().strip()


async def main(key_file: str, *addrs: str) -> None:
    key = Key.load(Path(key_file))
    peers = [PeerId.parse(str(Multiaddr.parse(addr).peer)) for addr in addrs]
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        at_a, at_b, at_c = [
            await enter(wetware.connect(addr, key=key, timeout_s=30.0)) for addr in addrs
        ]
        through_a = await enter(at_a.node(str(peers[2]), direct=False, timeout_s=30.0))
        topic = await at_b.pubsub.join(TOPIC)
        readers = {"a": Reader(), "c": Reader()}
        tasks = await enter(asyncio.TaskGroup())
        for name, session in (("a", at_a), ("c", at_c)):
            messages = await enter((await session.pubsub.join(TOPIC)).subscribe())
            tasks.create_task(readers[name].run(messages))
        sent = -1

        async def publish() -> None:
            nonlocal sent
            while True:
                await topic.publish(str(sent + 1))
                sent += 1
                await asyncio.sleep(PUBLISH_S)

        calls = {name: Calls() for name in ("a", "c_through_a", "b_to_a", "c_to_b")}
        tasks.create_task(calls["a"].run(at_a.status, CALL_S))
        tasks.create_task(calls["c_through_a"].run(through_a.whoami, CALL_S))
        tasks.create_task(calls["b_to_a"].run(lambda: at_b.cluster.ping(peers[0]), PING_S))
        tasks.create_task(calls["c_to_b"].run(lambda: at_c.cluster.ping(peers[1]), PING_S))
        tasks.create_task(publish())
        async with asyncio.timeout(60):  # the subscriptions reach B
            await asyncio.gather(*(reader.reach(0) for reader in readers.values()))
        start, since = sent + 1, time.monotonic()
        async for _ in lines():
            until = sent
            late = []
            for name, reader in readers.items():
                try:
                    async with asyncio.timeout(FLUSH_S_MAX):
                        await reader.reach(until)
                except TimeoutError:
                    late.append([name, reader.last, until])
            report = {
                "seconds": time.monotonic() - since,
                "published": until - start + 1,
                "late": late,
                "wrong": {name: reader.wrong for name, reader in readers.items()},
                "calls": {
                    name: {"count": c.count, "longest_s": c.longest_s, "failures": c.failures}
                    for name, c in calls.items()
                },
                "views": {
                    name: {str(m.peer_id): m.state for m in await session.cluster.list()}
                    for name, session in (("a", at_a), ("b", at_b), ("c", at_c))
                },
                "a": await at_a.status(details=True),
            }
            print(json.dumps(report), flush=True)  # noqa: T201 - that is how it is read
            start, since = until + 1, time.monotonic()
            for reader in readers.values():
                reader.wrong = []
            for each in calls.values():
                each.reset()
        raise SystemExit(0)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
