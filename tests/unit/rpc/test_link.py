"""RPC over streams of the link: two hosts, real TCP, encrypted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from wetware import rpc
from wetware.admission import Access
from wetware.errors import Denied, Disconnected
from wetware.identity import Key
from wetware.link import LinkHost, Stream
from wetware.multiaddr import Multiaddr
from wetware.rpc import kjloop

# ruff: noqa: SIM117  # the RPC connection lives within the stream: two steps, read as two
pytestmark = pytest.mark.anyio
PROTOCOL = "/wetware/test/1"


@contextlib.asynccontextmanager
async def hosts(
    handler: Callable[[Stream], Any],
) -> AsyncIterator[tuple[LinkHost, LinkHost, Stream]]:
    async with LinkHost(Key.generate()) as server, LinkHost(Key.generate()) as client:
        (addr,) = await server.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        server.handle(PROTOCOL, handler, access=Access.PUBLIC)
        connection = await client.dial([addr.with_peer(server.peer_id)])
        yield server, client, await connection.open_stream(PROTOCOL)


async def test_calls_over_the_link(schema: rpc.Schema, servants: Any, tools: Any) -> None:
    servant, mine = servants.Zoo(), servants.Zoo()
    served = asyncio.Event()

    async def handler(stream: Stream) -> None:
        await rpc.serve(stream, servant)
        served.set()

    async with hosts(handler) as (_, _, stream):
        async with await rpc.connect(stream) as connection:
            zoo = connection.bootstrap(schema.Zoo)
            assert await zoo.data(data=b"x" * 900_000) == {"data": b"x" * 900_000}
            assert len((await zoo.big(bytes=1_000_000))["data"]) == 1_000_000
            with pytest.raises(Denied):
                await zoo.fail(how="denied")
            cell = (await zoo.relay(zoo=mine))["cell"]
            assert await cell.get() == {"value": b"relayed"}
            payload = bytes(200_000)
            results = await asyncio.gather(*(zoo.data(data=payload) for _ in range(100)))
            assert all(r == {"data": payload} for r in results)
            hanging = asyncio.create_task(zoo.hang())
            await tools.until(lambda: servant.running == 1)
        with pytest.raises(Disconnected):
            await hanging
        async with asyncio.timeout(10):
            await served.wait()
        await tools.until(lambda: servant.releases == 1)
        assert servant.cancelled == 1
    assert kjloop._runtimes == {}


async def test_several_rpc_connections_on_one_link(schema: rpc.Schema, servants: Any) -> None:
    async with hosts(lambda stream: rpc.serve(stream, servants.Zoo())) as (server, client, stream):
        async with (
            await rpc.connect(stream) as one,
            await rpc.connect(await client.open_stream(server.peer_id, PROTOCOL)) as two,
        ):
            first, second = one.bootstrap(schema.Zoo), two.bootstrap(schema.Zoo)
            cell = (await first.make(value=b"one's"))["cell"]
            assert await second.use(cell=cell) == {"value": b"one's"}  # by way of this client
            await one.aclose()
            await second.nothing()


@pytest.mark.parametrize("side", ["server", "client"])
async def test_the_link_connection_dies(
    schema: rpc.Schema, servants: Any, tools: Any, side: str
) -> None:
    servant = servants.Zoo()
    served = asyncio.Event()

    async def handler(stream: Stream) -> None:
        await rpc.serve(stream, servant)
        served.set()

    async with hosts(handler) as (server, client, stream):
        async with await rpc.connect(stream) as connection:
            hanging = asyncio.create_task(connection.bootstrap(schema.Zoo).hang())
            await tools.until(lambda: servant.running == 1)
            host = server if side == "server" else client
            for link in host.connections():
                link.close()
            async with asyncio.timeout(10):
                with pytest.raises(Disconnected):
                    await hanging
                await connection.wait_closed()
                await served.wait()
            await tools.until(lambda: servant.releases == 1)


async def test_cancelling_the_server_closes_the_connection(
    schema: rpc.Schema, servants: Any
) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def handler(stream: Stream) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        await rpc.serve(stream, servants.Zoo())

    async with hosts(handler) as (_, _, stream), await rpc.connect(stream) as connection:
        zoo = connection.bootstrap(schema.Zoo)
        await zoo.nothing()
        tasks[0].cancel()
        async with asyncio.timeout(10):
            await connection.wait_closed()
        with pytest.raises(Disconnected):
            await zoo.nothing()


async def test_a_client_that_stops_reading_stops_the_server(
    schema: rpc.Schema, servants: Any
) -> None:
    """The window stays shut while nobody reads: the server holds its results, and bounded ones."""
    limits = rpc.RpcLimits(result_bytes_out_max=1 << 20)
    async with hosts(lambda s: rpc.serve(s, servants.Zoo(), limits)) as (_, _, stream):
        async with await rpc.connect(stream) as connection:
            zoo = connection.bootstrap(schema.Zoo)
            await zoo.nothing()
            (end,) = [
                e
                for runtime in kjloop._runtimes.values()
                for e in runtime.connections
                if e is not zoo._end
            ]
            pipe: Any = zoo._end.transport._pipe
            feed, zoo._end.transport.feed = (
                zoo._end.transport.feed,
                lambda data: held.append(bytes(data)),
            )
            held: list[bytes] = []
            pipe.pause()
            tasks = [asyncio.create_task(zoo.big(bytes=500_000)) for _ in range(100)]
            most = 0
            for _ in range(200):
                await asyncio.sleep(0.002)
                most = max(most, end.transport.out_bytes + end.results_pending)
            assert most < (1 << 20) + 600_000
            assert sum(map(len, held)) < 20 << 20  # the link's window and buffers
            zoo._end.transport.feed = feed
            for data in held:
                feed(data)
            pipe.resume()
            async with asyncio.timeout(30):
                results = await asyncio.gather(*tasks)
            assert all(len(r["data"]) == 500_000 for r in results)
