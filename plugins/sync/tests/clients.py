"""Some clients of `workload` in a process of their own: `python -m plugins.sync.tests.clients`.

Arguments, as one of JSON: data_dir, first, count, seed, pause_s. Records go to stdout, one a line.
A line on stdin stops the clients: what they then say is "stopped", and they end with their watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from typing import Any

import wetware

from .ports import SessionPort
from .workload import Client, Record

SESSION_CLIENTS = 8


async def main(data_dir: str, first: int, count: int, seed: int, pause_s: float) -> None:
    def note(record: Record) -> None:
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()

    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        clients: list[Client] = []
        for number in range(first, first + count):
            if (number - first) % SESSION_CLIENTS == 0:
                session: Any = await stack.enter_async_context(
                    wetware.connect(data_dir=data_dir, reconnect=True)
                )
            rng = random.Random(seed + number)
            port = SessionPort(session)
            clients.append(Client(port, note, rng, f"c{number}", stop=stop, pause_s=pause_s))
        running = [tasks.create_task(client.run()) for client in clients]
        note({"started": first})
        await asyncio.to_thread(sys.stdin.readline)
        stop.set()
        for client in clients:
            await client.stopped.wait()
        note({"stopped": first})
        await asyncio.gather(*running)


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
