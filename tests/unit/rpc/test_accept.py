"""A connection that comes while its listener stops is not lost unclosed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest

from wetware import rpc
from wetware.base.sockets import accept

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
TURNS = range(8)
"""Of the loop, between a connection and the stop: more than it takes to accept it."""


@pytest.mark.parametrize("turns", TURNS)
async def test_a_cancelled_accept_has_taken_nothing(turns: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        task = asyncio.create_task(accept(listener))
        await asyncio.sleep(0)
        with socket.create_connection(listener.getsockname()):
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                taken = await task
            except asyncio.CancelledError:
                taken, _ = listener.accept()  # BlockingIOError: it was taken, and lost
            taken.close()


@pytest.mark.parametrize("turns", TURNS)
async def test_a_server_on_a_unix_socket_that_stops_closes_all_that_it_took(
    turns: int, tmp_path: Path, servants: Any
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as client:
        async with rpc.serve_unix(path, lambda peer: servants.Zoo()):
            await asyncio.sleep(0)
            client.connect(str(path))
            for _ in range(turns):
                await asyncio.sleep(0)
        # A socket that nobody closed is a ResourceWarning, and so an error of the test.
        client.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
