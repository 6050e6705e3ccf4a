"""Named limits hold on both sides, and reaching one breaks nothing else."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import Disconnected, LimitExceeded
from wetware.rpc import RpcLimits
from wetware.rpc.pipes import SocketPipe

pytestmark = pytest.mark.anyio


async def test_parameters_that_are_too_large_are_not_sent(serving: Any, servants: Any) -> None:
    servant = servants.Zoo()
    limits = RpcLimits(message_bytes_max=10_000)
    async with serving(servant, limits=limits) as zoo:
        for too_large in (zoo.data(data=bytes(10_000)), zoo.echo(blobs=[bytes(2000)] * 5)):
            with pytest.raises(LimitExceeded, match="message_bytes_max is 10000"):
                await too_large
        assert servant.seen == []
        assert len((await zoo.data(data=bytes(9_900)))["data"]) == 9_900
        assert len((await zoo.echo(blobs=[bytes(2000)] * 4))["blobs"]) == 4


async def test_results_that_are_too_large_are_an_error(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        with pytest.raises(LimitExceeded, match=r"Zoo\.big: results of .* message_bytes_max"):
            await zoo.big(bytes=2 << 20)
        assert len((await zoo.big(bytes=1_000_000))["data"]) == 1_000_000


async def test_a_peer_with_a_larger_limit_loses_its_connection(serving: Any, servants: Any) -> None:
    servant = servants.Zoo()
    async with serving(
        servant,
        limits=RpcLimits(message_bytes_max=10_000),
        client_limits=RpcLimits(message_bytes_max=1 << 20),
    ) as zoo:
        with pytest.raises(Disconnected):
            await zoo.data(data=bytes(500_000))
        assert servant.seen == []


async def test_calls_wait_for_a_place(serving: Any, servants: Any, tools: Any) -> None:
    servant = servants.Zoo()
    async with serving(servant, limits=RpcLimits(calls_out_max=5)) as zoo:
        tasks = [asyncio.create_task(zoo.hang()) for _ in range(20)]
        await tools.until(lambda: servant.running == 5)
        await asyncio.sleep(0.02)
        assert (servant.running, len(zoo._end.queue)) == (5, 15)
        tasks[10].cancel()  # one that waits
        tasks[0].cancel()  # one that runs: its place is given to the next
        await tools.until(lambda: servant.cancelled == 1 and servant.running == 5)
        assert len(zoo._end.queue) == 13
        servant.go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(r is None for r in results) == 18
        assert (zoo._end.calls_out, zoo._end.bytes_out) == (0, 0)
        assert await zoo.nothing() is None


async def test_bytes_wait_for_a_place(serving: Any, servants: Any, tools: Any) -> None:
    class Slow(servants.Zoo):  # type: ignore[misc, name-defined]
        async def data(self, data: bytes, name: str) -> Any:
            await self.hang()
            return {}

    servant = Slow()
    limits = RpcLimits(call_bytes_out_max=1 << 20)
    async with serving(servant, limits=limits) as zoo:
        tasks = [asyncio.create_task(zoo.data(data=bytes(300_000))) for _ in range(20)]
        await tools.until(lambda: servant.running == 4)
        await asyncio.sleep(0.02)
        assert servant.running == 4  # 3 of them are below the limit, the fourth crosses it
        assert zoo._end.bytes_out <= limits.call_bytes_out_max + 300_100
        servant.go.set()
        await asyncio.gather(*tasks)
        assert zoo._end.bytes_out == 0


async def test_waiting_for_a_place_ends(serving: Any, servants: Any, tools: Any) -> None:
    servant = servants.Zoo()
    limits = RpcLimits(calls_out_max=1, call_wait_s=0.05)
    async with serving(servant, limits=limits) as zoo:
        first = asyncio.create_task(zoo.hang())
        await tools.until(lambda: servant.running == 1)
        with pytest.raises(LimitExceeded, match="calls_out_max is 1"):
            await zoo.nothing()
        servant.go.set()
        await first
        assert await zoo.nothing() is None


async def test_those_that_wait_fail_with_the_connection(
    serving: Any, servants: Any, tools: Any
) -> None:
    servant = servants.Zoo()
    async with serving(servant, limits=RpcLimits(calls_out_max=1)) as zoo:
        tasks = [asyncio.create_task(zoo.hang()) for _ in range(3)]
        await tools.until(lambda: servant.running == 1)
        zoo._end.transport.abort()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [Disconnected] * 3


async def test_a_server_refuses_more_calls_than_it_runs(
    serving: Any, servants: Any, tools: Any
) -> None:
    servant = servants.Zoo()
    async with serving(servant, limits=RpcLimits(calls_in_max=3)) as zoo:
        tasks = [asyncio.create_task(zoo.hang()) for _ in range(3)]
        await tools.until(lambda: servant.running == 3)
        with pytest.raises(LimitExceeded, match="calls_in_max"):
            await zoo.nothing()
        servant.go.set()
        await asyncio.gather(*tasks)
        assert await zoo.nothing() is None


async def test_exports_and_imports_are_bounded(serving: Any, servants: Any, tools: Any) -> None:
    servant = servants.Zoo()
    async with serving(
        servant, limits=RpcLimits(exports_max=10), client_limits=RpcLimits(imports_max=20)
    ) as zoo:
        with pytest.raises(LimitExceeded, match="exports_max is 10"):
            await zoo.make_many(count=10)  # the bootstrap object is one
        cells = (await zoo.make_many(count=9))["cells"]
        with pytest.raises(LimitExceeded, match="exports_max"):
            await zoo.make(value=b"")
        del cells[3:]
        await tools.until(lambda: len(zoo._end.clients) == 4)
        await zoo.nothing()
        assert len((await zoo.make_many(count=6))["cells"]) == 6


async def test_imports_are_bounded(serving: Any, servants: Any) -> None:
    limits = RpcLimits(imports_max=5)
    async with serving(servants.Zoo(), client_limits=limits) as zoo:
        with pytest.raises(LimitExceeded, match="imports_max is 5"):
            await zoo.make_many(count=5)
        kept = (await zoo.make_many(count=4))["cells"]
        with pytest.raises(LimitExceeded):
            await zoo.make(value=b"")
        assert await kept[3].get() == {"value": b""}


async def test_a_flood_of_large_calls_does_not_fill_the_server(
    schema: rpc.Schema, servants: Any, tools: Any
) -> None:
    """A client without manners: no waiting, no limits of its own, 200 calls of 1 MiB."""

    class Slow(servants.Zoo):  # type: ignore[misc, name-defined]
        async def data(self, data: bytes, name: str) -> Any:
            self.running += 1
            self.seen.append(len(data))
            del data
            await self.go.wait()
            return {}

    servant = Slow()
    limits = RpcLimits(call_bytes_in_max=4 << 20)
    rude = RpcLimits(calls_out_max=10**6, call_bytes_out_max=1 << 40, out_bytes_max=1 << 40)
    ours, theirs = socket.socketpair()
    server = asyncio.ensure_future(rpc.serve(SocketPipe(ours), servant, limits))
    async with await rpc.connect(SocketPipe(theirs), rude) as connection:
        zoo = connection.bootstrap(schema.Zoo)
        payload = bytes(1_000_000)
        tasks = [asyncio.create_task(zoo.data(data=payload)) for _ in range(200)]
        await tools.until(lambda: servant.running == 4)
        await asyncio.sleep(0.2)
        assert servant.running == 4  # the fifth would hold more than 4 MiB
        (end,) = [e for e in _ends() if e.transport is not zoo._end.transport]
        held = end.transport._in_bytes + end.transport._queued_bytes + len(end.transport._partial)
        assert held < (4 << 20) + (2 << 20)
        servant.go.set()
        await asyncio.gather(*tasks)
        assert len(servant.seen) == 200
    await server


def _ends() -> list[Any]:
    from wetware.rpc import kjloop

    return [end for runtime in kjloop._runtimes.values() for end in runtime.connections]


async def test_results_wait_for_a_reader(schema: rpc.Schema, servants: Any, tools: Any) -> None:
    """A client asks for much and reads nothing: results are held back, then it is dropped."""
    servant = servants.Zoo()
    limits = RpcLimits(result_bytes_out_max=2 << 20, write_stall_s=0.5)
    ours, theirs = socket.socketpair()
    server = asyncio.ensure_future(rpc.serve(SocketPipe(ours), servant, limits))
    async with await rpc.connect(SocketPipe(theirs), RpcLimits()) as connection:
        zoo = connection.bootstrap(schema.Zoo)
        await zoo.nothing()
        (end,) = [e for e in _ends() if e.transport is not zoo._end.transport]
        zoo._end.transport._pipe.pause()  # reads no more
        tasks = [asyncio.create_task(zoo.big(bytes=1_000_000)) for _ in range(50)]
        most = 0
        async with asyncio.timeout(60):
            while not end.closed:
                most = max(most, end.transport.out_bytes + end.results_pending)
                await asyncio.sleep(0.001)
        assert 1_000_000 < most < (2 << 20) + 1_100_000
        zoo._end.transport._pipe.resume()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(r, Disconnected) for r in results)
    await server


async def test_a_stopped_peer_costs_the_caller_a_bounded_amount(
    schema: rpc.Schema, servants: Any
) -> None:
    """200 calls of 1 MiB to a peer that reads nothing: no more than the limit is held."""
    ours, theirs = socket.socketpair()
    limits = RpcLimits(call_bytes_out_max=4 << 20)
    async with await rpc.connect(SocketPipe(ours), limits) as connection:
        zoo = connection.bootstrap(schema.Zoo)
        tasks = [asyncio.create_task(zoo.data(data=bytes(1_000_000))) for _ in range(200)]
        for _ in range(20):
            await asyncio.sleep(0.005)
        end = zoo._end
        assert end.calls_out == 5
        assert end.transport.out_bytes < (6 << 20)
        assert len(end.queue) == 195
        theirs.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(r) for r in results} == {Disconnected}
