"""kill -9 of either end in the middle of a transfer: what was stored is not fetched again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from wetware_blob.format.build import V1_2025, FileTree, leaf
from wetware_blob.format.cid import Cid

from ..store.parts import running
from .member import BYTES_MAX

pytestmark = pytest.mark.anyio

MEMBER = Path(__file__).with_name("member.py")
CHUNK_BYTES = 64 << 10
CHUNKS = 300
IN_FLIGHT_MAX = BYTES_MAX // CHUNK_BYTES + 8  # and small ones


@contextlib.asynccontextmanager
async def member(*args: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, MEMBER, *args, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    try:
        async with asyncio.timeout(60):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line_of(process: Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


async def until_half(process: Process) -> None:
    while int(await line_of(process)) < CHUNKS // 2:
        pass


async def ended(process: Process) -> tuple[str, str]:
    """What it said to its end."""
    out, err = await process.communicate()
    return out.decode(), err.decode()


@contextlib.asynccontextmanager
async def provider(directory: Path, served: Counter[str]) -> AsyncIterator[tuple[Process, str]]:
    """It, and its address; `served` counts what it is asked for."""
    async with member("serve", str(directory)) as process:
        address = await line_of(process)

        async def count() -> None:
            while digest := await line_of(process):
                served[digest] += 1

        counting = asyncio.create_task(count())
        try:
            yield process, address
        finally:
            if process.returncode is None:
                process.kill()
            await counting


@pytest.fixture
async def root(tmp_path: Path) -> Cid:
    """Of a file in the provider's store."""
    rng, tree, blocks = random.Random(5), FileTree(V1_2025), []
    for _ in range(CHUNKS):
        block = leaf(V1_2025, rng.randbytes(CHUNK_BYTES))
        blocks += [block, *tree.add(block.cid, CHUNK_BYTES, CHUNK_BYTES)]
    made, last = tree.finish()
    async with running(tmp_path / "full") as store, store.hold("local:ada") as hold:
        await store.put(hold, [*blocks, *last])
    return made.cid


async def stored(directory: Path) -> int:
    async with running(directory) as store:
        return (await store.usage()).blocks


def pull_args(tmp_path: Path, address: str, root: Cid) -> tuple[str, ...]:
    return ("pull", str(tmp_path / "reader"), address, str(root))


async def test_a_reader_that_is_killed_fetches_what_was_in_flight_again(
    tmp_path: Path, root: Cid
) -> None:
    served: Counter[str] = Counter()
    async with provider(tmp_path / "full", served) as (_, address):
        async with member(*pull_args(tmp_path, address, root)) as reader:
            await until_half(reader)
            reader.kill()
            await reader.wait()
        before = await stored(tmp_path / "reader")
        assert CHUNKS // 2 <= before < CHUNKS
        async with member(*pull_args(tmp_path, address, root)) as reader:
            out, err = await ended(reader)
            assert (reader.returncode, "done" in out.split()) == (0, True), err
    assert await stored(tmp_path / "reader") == CHUNKS + 1
    assert len(served) == CHUNKS + 1
    assert served.total() - len(served) <= IN_FLIGHT_MAX


async def test_a_provider_that_is_killed_is_named_and_a_retry_goes_on(
    tmp_path: Path, root: Cid
) -> None:
    served: Counter[str] = Counter()
    async with (
        provider(tmp_path / "full", served) as (process, address),
        member(*pull_args(tmp_path, address, root)) as reader,
    ):
        await until_half(reader)
        process.kill()
        async with asyncio.timeout(60):
            out, err = await ended(reader)
        assert reader.returncode == 1
        assert "done" not in out
        assert "nobody has" in err
        assert address.rpartition("/")[2][-8:] in err
    before = await stored(tmp_path / "reader")
    assert CHUNKS // 2 <= before < CHUNKS
    async with (
        provider(tmp_path / "full", served) as (_, address),
        member(*pull_args(tmp_path, address, root)) as reader,
    ):
        out, err = await ended(reader)
        assert (reader.returncode, "done" in out.split()) == (0, True), err
    assert await stored(tmp_path / "reader") == CHUNKS + 1
    assert served.total() - len(served) <= IN_FLIGHT_MAX
