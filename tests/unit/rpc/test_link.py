"""RPC over streams of the link: two hosts, real TCP, encrypted."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from wetware import rpc
from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.errors import Denied, Disconnected, LimitExceeded, StreamReset
from wetware.identity import Key
from wetware.overlay.link import LinkHost, Stream
from wetware.overlay.rpc_pipe import RpcPipe
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
        await rpc.serve(RpcPipe(stream), servant)
        served.set()

    async with hosts(handler) as (_, _, stream):
        async with await rpc.connect(RpcPipe(stream)) as connection:
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
        async with asyncio.timeout(60):
            await served.wait()
        await tools.until(lambda: servant.releases == 1)
        assert servant.cancelled == 1
    assert kjloop._runtimes == {}


async def test_a_stranger_has_little_until_it_is_trusted(
    schema: rpc.Schema, servants: Any, tools: Any
) -> None:
    class Gate(servants.Zoo):  # type: ignore[misc, name-defined]
        async def nothing(self) -> None:  # stands for a login
            connection = rpc.current_connection()
            self.seen.append(connection.trusted)
            connection.trust()
            connection.trust()
            self.seen.append(connection.trusted)
            self.connection = connection

    servant = Gate()

    async def handler(stream: Stream) -> None:
        await rpc.serve(RpcPipe(stream), servant, stranger_message_bytes_max=64 << 10, trust_s=10)

    async with hosts(handler) as (server, client, stream):
        async with await rpc.connect(RpcPipe(stream)) as connection:
            zoo = connection.bootstrap(schema.Zoo)
            assert len((await zoo.data(data=bytes(60_000)))["data"]) == 60_000
            with pytest.raises(LimitExceeded, match="message_bytes_max is 65536"):
                await zoo.big(bytes=70_000)
            with pytest.raises(LimitExceeded, match="exports_max is 64"):
                await zoo.make_many(count=64)
            await zoo.nothing()
            assert servant.seen[-2:] == [False, True]
            assert len((await zoo.data(data=bytes(900_000)))["data"]) == 900_000
            assert len((await zoo.make_many(count=200))["cells"]) == 200
            (end,) = [e for e in _ends() if e is not zoo._end]
            assert end._trust_due is None
        await tools.until(lambda: end.closed)
        servant.connection.trust()  # too late, and no harm
        again = await client.open_stream(server.peer_id, PROTOCOL)
        async with await rpc.connect(RpcPipe(again)) as connection:
            with pytest.raises(Disconnected):
                await connection.bootstrap(schema.Zoo).data(data=bytes(900_000))


async def test_a_stranger_is_not_served_for_ever(
    schema: rpc.Schema, servants: Any, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Gate(servants.Zoo):  # type: ignore[misc, name-defined]
        async def fail(self, how: str) -> None:
            rpc.current_connection().trust()

    servant = Gate()

    async def handler(stream: Stream) -> None:
        await rpc.serve(RpcPipe(stream), servant, trust_s=0.3)

    async with hosts(handler) as (server, client, stream):
        with caplog.at_level("INFO", "wetware.rpc"):
            async with (
                await rpc.connect(RpcPipe(stream)) as one,
                await rpc.connect(
                    RpcPipe(await client.open_stream(server.peer_id, PROTOCOL))
                ) as two,
            ):
                trusted = two.bootstrap(schema.Zoo)
                await trusted.fail(how="")
                stranger = one.bootstrap(schema.Zoo)
                hanging = asyncio.create_task(stranger.hang())
                async with asyncio.timeout(60):
                    with pytest.raises(Disconnected):
                        await hanging
                await tools.until(lambda: servant.cancelled == 1)
                assert len((await trusted.data(data=bytes(900_000)))["data"]) == 900_000
                assert not two.closed
    events = [r for r in caplog.records if r.getMessage() == "rpc.not_trusted"]
    assert len(events) == 1
    assert events[0].ww["after_s"] == 0.3  # type: ignore[attr-defined]


async def test_without_a_limit_for_strangers_everybody_is_trusted(
    schema: rpc.Schema, servants: Any
) -> None:
    seen: list[bool] = []

    class Zoo(servants.Zoo):  # type: ignore[misc, name-defined]
        async def nothing(self) -> None:
            seen.append(rpc.current_connection().trusted)

    async with hosts(lambda stream: rpc.serve(RpcPipe(stream), Zoo())) as (_, _, stream):
        async with await rpc.connect(RpcPipe(stream)) as connection:
            await connection.bootstrap(schema.Zoo).nothing()
    assert seen == [True]
    rpc.current_connection().trust()  # outside of a call there is none to trust
    assert rpc.current_connection().trusted


async def test_strangers_with_incomplete_messages_do_not_fill_the_memory(
    schema: rpc.Schema, servants: Any, tools: Any
) -> None:
    servant = servants.Zoo()
    limits = rpc.RpcLimits(partial_bytes_total_max=1 << 20)
    message = struct.pack("<II", 0, 20_000) + bytes(150_000)  # 10 kB of it never come

    async def handler(stream: Stream) -> None:
        await rpc.serve(RpcPipe(stream), servant, limits, stranger_message_bytes_max=128 << 10)

    async with hosts(handler) as (server, client, first):
        async with await rpc.connect(RpcPipe(first)) as connection:
            zoo = connection.bootstrap(schema.Zoo)
            await zoo.nothing()
            (runtime,) = kjloop._runtimes.values()
            most = 0
            for _ in range(20):
                stream = await client.open_stream(server.peer_id, PROTOCOL)
                with contextlib.suppress(StreamReset):
                    await stream.write(message)
                await asyncio.sleep(0)
                most = max(most, runtime.partials.total_bytes)
            await tools.until(lambda: runtime.partials.total_bytes > (1 << 20) - 160_000)
            assert most <= 1 << 20
            await tools.until(lambda: len(_ends()) < 12)  # most streams were dropped
            assert len((await zoo.data(data=bytes(120_000)))["data"]) == 120_000


def _ends() -> list[Any]:
    return [end for runtime in kjloop._runtimes.values() for end in runtime.connections]


async def test_several_rpc_connections_on_one_link(schema: rpc.Schema, servants: Any) -> None:
    async with hosts(lambda stream: rpc.serve(RpcPipe(stream), servants.Zoo())) as (
        server,
        client,
        stream,
    ):
        async with (
            await rpc.connect(RpcPipe(stream)) as one,
            await rpc.connect(RpcPipe(await client.open_stream(server.peer_id, PROTOCOL))) as two,
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
        await rpc.serve(RpcPipe(stream), servant)
        served.set()

    async with hosts(handler) as (server, client, stream):
        async with await rpc.connect(RpcPipe(stream)) as connection:
            hanging = asyncio.create_task(connection.bootstrap(schema.Zoo).hang())
            await tools.until(lambda: servant.running == 1)
            host = server if side == "server" else client
            for link in host.connections():
                link.close()
            async with asyncio.timeout(60):
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
        await rpc.serve(RpcPipe(stream), servants.Zoo())

    async with hosts(handler) as (_, _, stream), await rpc.connect(RpcPipe(stream)) as connection:
        zoo = connection.bootstrap(schema.Zoo)
        await zoo.nothing()
        tasks[0].cancel()
        async with asyncio.timeout(60):
            await connection.wait_closed()
        with pytest.raises(Disconnected):
            await zoo.nothing()


async def test_a_client_that_stops_reading_stops_the_server(
    schema: rpc.Schema, servants: Any
) -> None:
    """The window stays shut while nobody reads: the server holds its results, and bounded ones."""
    limits = rpc.RpcLimits(result_bytes_out_max=1 << 20)
    async with hosts(lambda s: rpc.serve(RpcPipe(s), servants.Zoo(), limits)) as (_, _, stream):
        async with await rpc.connect(RpcPipe(stream)) as connection:
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
            async with asyncio.timeout(60):
                results = await asyncio.gather(*tasks)
            assert all(len(r["data"]) == 500_000 for r in results)
