"""The pipe between whoever feeds a guest and the guest."""

from __future__ import annotations

import asyncio

import pytest

from wetware_proc.driver import PIPE_BYTES, Pipe

pytestmark = pytest.mark.anyio


async def test_a_pipe_holds_so_many_bytes_and_no_more() -> None:
    pipe = Pipe()
    data = bytes(range(256)) * (3 * PIPE_BYTES // 256)
    writing = asyncio.ensure_future(pipe.write(data))
    await asyncio.sleep(0)
    assert pipe.available == PIPE_BYTES
    assert not writing.done()
    taken = bytearray()
    while len(taken) < len(data):
        taken += await pipe.read(1000)
    await writing
    assert taken == data


async def test_who_reads_waits_for_bytes_or_the_end() -> None:
    pipe = Pipe()
    reading = [asyncio.ensure_future(pipe.read(10)) for _ in range(2)]
    await asyncio.sleep(0)
    assert not pipe.ready
    await pipe.write(b"0123456789abc")
    assert sorted(await asyncio.gather(*reading)) == [b"0123456789", b"abc"]
    pipe.close()
    assert await pipe.read(10) == b""


async def test_who_waits_may_be_cancelled_and_nobody_is_remembered() -> None:
    pipe = Pipe()
    waiting = asyncio.ensure_future(pipe.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not pipe._changed._waiters


async def test_writing_to_a_closed_pipe_fails_also_while_it_waits() -> None:
    pipe = Pipe()
    writing = asyncio.ensure_future(pipe.write(bytes(2 * PIPE_BYTES)))
    await asyncio.sleep(0)
    pipe.close()
    with pytest.raises(BrokenPipeError):
        await writing
    with pytest.raises(BrokenPipeError):
        await pipe.write(b"x")
