"""`ww pub` and `ww sub`: what they read and what they write."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wetware.errors import InvalidArgument
from wetware.identity import PeerId
from wetware_pubsub import cli
from wetware_pubsub.client import Message

pytestmark = pytest.mark.anyio

PEER = PeerId("12D3KooWpeer")


def _message(data: bytes) -> Message:
    return Message(data, PEER, 7, None, None, "t")


def test_lines() -> None:
    hostile = b"a\x1b[2J\x07b\tc\x9b\nd \xff\xe2\x80\xae \xc3\xa9"
    assert cli.bytes_of(_message(hostile)) == hostile
    assert cli.text_line(_message(hostile)) == hostile + b"\n"
    shown = cli.terminal_line(_message(hostile))
    assert shown == b"a\\x1b[2J\\x07b\tc\\x9b\\nd \\xff\\u202e \xc3\xa9\n"


@pytest.mark.parametrize("data", [b"", b"plain", "é\u202e\n".encode(), b"\xff\0"])
def test_json_lines(data: bytes) -> None:
    line = cli.json_line(_message(data))
    assert line.count(b"\n") == 1
    fields = json.loads(line)
    assert (fields["topic"], fields["publisher"], fields["seqno"]) == ("t", PEER, 7)
    back = base64.b64decode(fields["data_base64"]) if "data_base64" in fields else None
    assert (back if back is not None else fields["data"].encode()) == data


async def test_a_rate_is_kept_and_nothing_is_saved_up() -> None:
    loop = asyncio.get_running_loop()
    paused, started = [], loop.time()

    async def source() -> AsyncIterator[bytes]:
        for number in range(5):
            if number == 2:
                await asyncio.sleep(0.1)
                paused.append(loop.time())
            yield b"%d" % number

    times = [loop.time() async for _ in cli.paced(source(), 50)]
    for number, time in enumerate(times):
        assert time - started >= number / 50 - 1e-6
        assert number < 3 or time - paused[0] >= (number - 2) / 50 - 1e-6
    assert [data async for data in cli.paced(source(), None)] == [b"0", b"1", b"2", b"3", b"4"]


async def _lines(fd: int) -> list[bytes]:
    return [line async for line in cli.stdin_lines(fd)]


async def test_lines_of_a_pipe_come_as_they_are_written() -> None:
    read_fd, write_fd = os.pipe()
    try:
        lines = cli.stdin_lines(read_fd)
        os.write(write_fd, b"one\ntw")
        assert await anext(lines) == b"one"
        os.write(write_fd, b"o\n\nlast")
        os.close(write_fd)
        assert [line async for line in lines] == [b"two", b"", b"last"]
    finally:
        os.close(read_fd)


async def test_lines_of_a_regular_file(tmp_path: Path) -> None:
    lines = [b"%d" % n * (n % 50) for n in range(20_000)]
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with path.open("rb") as file:
        assert await _lines(file.fileno()) == lines


async def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "LINE_BYTES_MAX", 100_000)
    path = tmp_path / "in"
    path.write_bytes(b"x" * 300_000)
    with path.open("rb") as file, pytest.raises(InvalidArgument, match="100000 bytes"):
        await _lines(file.fileno())


async def test_output_does_not_block_the_loop_on_a_full_pipe() -> None:
    read_fd, write_fd = os.pipe()
    try:
        output = cli.Output(write_fd)
        data = os.urandom(1 << 20)  # a pipe takes 64 KiB
        writing = asyncio.create_task(output.write(data))
        got = bytearray()
        os.set_blocking(read_fd, False)
        async with asyncio.timeout(60):
            while len(got) < len(data):
                await asyncio.sleep(0)  # would never come back if the write blocked
                with contextlib.suppress(BlockingIOError):
                    got += os.read(read_fd, 32 << 10)
            await writing
        assert bytes(got) == data
    finally:
        os.close(read_fd)
        os.close(write_fd)


async def test_output_to_files_that_cannot_be_polled(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        await cli.Output(file.fileno()).write(b"x" * 100_000)
    assert (tmp_path / "out").stat().st_size == 100_000
    with Path("/dev/null").open("wb") as null:  # noqa: ASYNC230
        await cli.Output(null.fileno()).write(b"x" * 100_000)


def test_the_commands_are_mounted_and_refuse_nonsense() -> None:
    import typer

    app = typer.Typer()
    cli.mount(app)
    runner = CliRunner()
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert {"pub", "sub"} <= set(shown.output.split())
    assert runner.invoke(app, ["sub", "t", "--count", "0"]).exit_code == 2
    both = runner.invoke(app, ["sub", "t", "--json", "--raw"])
    assert isinstance(both.exception, InvalidArgument)


def test_the_client_and_the_commands_import_no_router() -> None:
    code = (
        "import sys, wetware_pubsub.client, wetware_pubsub.cli, wetware_pubsub.plugin\n"
        "heavy = {'router', 'gossip', 'service', 'wire', 'order'}\n"
        "loaded = {m.partition('.')[2] for m in sys.modules if m.startswith('wetware_pubsub.')}\n"
        "print(sorted(loaded & heavy), 'libp2p' in sys.modules, 'trio' in sys.modules)"
    )
    import subprocess

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]", "False", "False"]
