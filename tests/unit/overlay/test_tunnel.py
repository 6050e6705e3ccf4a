"""A byte stream as the pipe of a tunnel, and the relay between two."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from wetware import rpc
from wetware.broker.protocol import CORE
from wetware.errors import WetwareError
from wetware.overlay.tunnel import TunnelPipe, relay

pytestmark = pytest.mark.anyio


class Far(rpc.Servant, interface=CORE.Cluster):
    """Answers `tunnel` with a stream, and leaves its other end to the test."""

    def __init__(self) -> None:
        self.pipes: list[TunnelPipe] = []

    async def tunnel(self, peer: str) -> dict[str, object]:
        stream = rpc.ByteStream()
        self.pipes.append(TunnelPipe(stream))
        return {"stream": stream.servant}

    async def list(self, **_: object) -> None: ...
    async def watch(self, **_: object) -> None: ...
    async def ping(self, **_: object) -> None: ...
    async def invite(self, **_: object) -> None: ...
    async def certify(self, **_: object) -> None: ...
    async def tickets(self) -> None: ...
    async def revoke_ticket(self, **_: object) -> None: ...
    async def evict(self, **_: object) -> None: ...
    async def check(self) -> None: ...


@asynccontextmanager
async def pipes(path: Path, count: int = 1) -> AsyncIterator[list[tuple[TunnelPipe, TunnelPipe]]]:
    """Near and far ends of pipes over a unix socket."""
    far = Far()
    async with (
        rpc.runtime(),
        rpc.serve_unix(path / "s", lambda _: far),
        await rpc.connect_unix(path / "s") as connection,
    ):
        cluster = connection.bootstrap(CORE.Cluster)
        made = []
        for _ in range(count):
            near = TunnelPipe(rpc.ByteStream((await cluster.call("tunnel", peer=""))["stream"]))
            made.append((near, far.pipes[-1]))
        yield made
        for near, _ in made:
            near.reset()


async def collect(pipe: TunnelPipe) -> bytes:
    data = b""
    while part := await pipe.read():
        data += part
    return data


async def test_bytes_arrive_in_order_and_the_end_after_them(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096  # 1 MiB: several calls
    async with pipes(tmp_path) as [(near, far)]:
        reading = asyncio.create_task(collect(far))
        await near.write(data)
        near.finish()
        near.finish()
        assert await reading == data


async def test_both_directions_at_once(tmp_path: Path) -> None:
    up, down = b"u" * 700_000, b"d" * 700_000

    async def exchange(pipe: TunnelPipe, mine: bytes, theirs: int) -> bytes:
        got = b""
        sending = asyncio.create_task(pipe.write(mine))
        while len(got) < theirs:
            got += await pipe.read()
        await sending
        return got

    async with pipes(tmp_path) as [(near, far)]:
        results = await asyncio.gather(exchange(near, up, len(down)), exchange(far, down, len(up)))
        assert results == [down, up]


async def test_the_other_end_s_loss_is_told(tmp_path: Path) -> None:
    async with pipes(tmp_path) as [(near, far)]:
        reading = asyncio.create_task(near.read())
        await asyncio.sleep(0)
        far.reset()
        with pytest.raises(WetwareError):
            await reading
        with pytest.raises(WetwareError):
            await near.write(b"x")


async def test_a_relay_carries_and_ends_both(tmp_path: Path) -> None:
    async with pipes(tmp_path, 2) as [(a_near, a_far), (b_near, b_far)]:
        carrying = asyncio.create_task(relay(a_far, b_far))
        await a_near.write(b"to b")
        assert await b_near.read() == b"to b"
        await b_near.write(b"to a")
        assert await a_near.read() == b"to a"
        await a_near.write(b"last")
        a_near.finish()
        assert await collect(b_near) == b"last"
        await carrying


async def test_a_relay_that_loses_one_end_cuts_the_other(tmp_path: Path) -> None:
    async with pipes(tmp_path, 2) as [(a_near, a_far), (b_near, b_far)]:
        carrying = asyncio.create_task(relay(a_far, b_far))
        await a_near.write(b"x")
        assert await b_near.read() == b"x"
        a_near.reset()
        with pytest.raises(WetwareError):
            await carrying
        with pytest.raises(WetwareError):
            await collect(b_near)
