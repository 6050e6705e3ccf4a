"""A plugin whose service takes bytes; see sink.capnp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
from anyio.abc import TaskGroup, TaskStatus

from wetware import rpc
from wetware.errors import WetwareError
from wetware.hookspecs import Service, hookimpl
from wetware.identity import Principal

SCHEMA = rpc.load(Path(__file__).with_name("sink.capnp"))


class SinkService(Service):
    name, interface = "sink", SCHEMA.Sink

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.tasks: TaskGroup

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as self.tasks:
            task_status.started()
            await anyio.sleep_forever()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return Sink(self)

    async def take(self, stream: rpc.ByteStream) -> None:
        count = 0
        async with stream:
            try:
                async for piece in stream:
                    count += len(piece)
                await stream.send(str(count).encode())
                await stream.send_eof()
            except WetwareError as exc:
                self.ends.append(f"{count} {exc.code}")
            else:
                self.ends.append(f"{count}")


class Sink(rpc.Servant, interface=SCHEMA.Sink):
    def __init__(self, service: SinkService) -> None:
        self._service = service

    async def open(self) -> dict[str, Any]:
        stream = rpc.ByteStream()
        self._service.tasks.start_soon(self._service.take, stream)
        return {"stream": stream.servant}

    async def ends(self) -> dict[str, Any]:
        return {"ends": self._service.ends}


@hookimpl
def ww_register_services(ctx: object) -> tuple[Service, ...]:
    return (SinkService(),)
