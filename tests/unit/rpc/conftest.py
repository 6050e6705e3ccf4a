"""A servant with every kind of method, and connections to it over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import Denied, WetwareError

ZOO = Path(__file__).with_name("zoo.capnp")


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait for a condition, turn by turn of the loop, with a deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not come true")
        await asyncio.sleep(0.001)


def make_servants(schema: rpc.Schema) -> SimpleNamespace:
    class CellServant(rpc.Servant, interface=schema.Cell):
        def __init__(self, value: bytes = b"") -> None:
            self.value = value
            self.releases = 0

        async def get(self) -> dict[str, Any]:
            return {"value": self.value}

        async def set(self, value: bytes) -> None:
            self.value = value

        def released(self) -> None:
            self.releases += 1

    class CounterServant(rpc.Servant, interface=schema.Counter):
        def __init__(self) -> None:
            self.total = 0

        async def get(self) -> dict[str, Any]:
            return {"value": str(self.total).encode()}

        async def set(self, value: bytes) -> None:
            self.total = int(value)

        async def add(self, by: int) -> dict[str, Any]:
            self.total += by
            return {"total": self.total}

    class ZooServant(rpc.Servant, interface=schema.Zoo):
        def __init__(self) -> None:
            self.seen: list[Any] = []
            self.cell: Any = None
            self.made: list[CellServant] = []
            self.running = 0
            self.cancelled = 0
            self.releases = 0
            self.guards: list[Any] = []
            self.go = asyncio.Event()

        async def echo(self, **everything: Any) -> dict[str, Any]:
            self.seen.append(everything)
            return everything

        async def data(self, data: bytes, name: str) -> dict[str, Any]:
            self.seen.append((data, name))
            return {"data": data}

        async def nothing(self) -> None:
            self.guards.append(rpc.current_guard())

        async def fail(self, how: str) -> None:
            if how == "denied":
                raise Denied("no grant covers it", hint="ask the operator")
            if how == "code":
                raise WetwareError("peculiar", code="peculiar.code")
            if how == "cancelled":
                raise asyncio.CancelledError
            if how == "surrogate":
                raise Denied("a\udcffb\0c" + "x" * 5000)
            secret = "do-not-send-this"
            raise ValueError(f"bug in {__file__}: {secret}")

        async def hang(self) -> None:
            self.running += 1
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.running -= 1

        async def make(self, value: bytes) -> dict[str, Any]:
            cell = CellServant(value)
            self.made.append(cell)
            return {"cell": cell}

        async def keep(self, cell: rpc.Ref) -> None:
            self.cell = cell

        async def kept(self) -> dict[str, Any]:
            return {"cell": self.cell}

        async def use(self, cell: rpc.Ref) -> dict[str, Any]:
            return {"value": (await cell.get())["value"]}

        async def any(self, cap: Any) -> dict[str, Any]:
            self.seen.append(cap)
            return {"cap": cap}

        async def counter(self) -> dict[str, Any]:
            return {"counter": CounterServant()}

        async def make_many(self, count: int) -> dict[str, Any]:
            cells = [CellServant() for _ in range(count)]
            self.made += cells
            return {"cells": cells}

        async def bits(self, bits: list[bool]) -> dict[str, Any]:
            return {"count": len(bits)}

        async def big(self, bytes: int) -> dict[str, Any]:
            return {"data": b"\1" * bytes}

        async def relay(self, zoo: rpc.Ref) -> dict[str, Any]:
            return {"cell": (await zoo.make(value=b"relayed"))["cell"]}

        def released(self) -> None:
            self.releases += 1

    return SimpleNamespace(Cell=CellServant, Counter=CounterServant, Zoo=ZooServant)


@pytest.fixture(scope="session")
def schema() -> rpc.Schema:
    return rpc.load(ZOO)


@pytest.fixture(scope="session")
def servants(schema: rpc.Schema) -> SimpleNamespace:
    return make_servants(schema)


Connect = Callable[..., Awaitable[Any]]


@pytest.fixture
def serving(
    schema: rpc.Schema, tmp_path: Path
) -> Callable[..., contextlib.AbstractAsyncContextManager[Any]]:
    """`async with serving(servant) as zoo`: a reference to it over a unix socket."""

    @contextlib.asynccontextmanager
    async def serving(
        servant: Any,
        *,
        limits: rpc.RpcLimits | None = None,
        client_limits: rpc.RpcLimits | None = None,
        name: str = "s",
    ) -> AsyncIterator[rpc.Ref]:
        path = tmp_path / name
        both = limits or rpc.RpcLimits()
        async with (
            rpc.serve_unix(path, lambda _peer: servant, limits=both),
            await rpc.connect_unix(path, limits=client_limits or both) as connection,
        ):
            yield connection.bootstrap(schema.Zoo)

    return serving


@pytest.fixture
def tools() -> ModuleType:
    """This module, for its functions."""
    return sys.modules[__name__]
