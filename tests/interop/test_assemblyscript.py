"""A program that another compiler than C's has made: it runs, and calls what it was given."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from wetware import rpc
from wetware_proc.driver import Spec
from wetware_proc.wasm.driver import wasm_driver

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
ECHO = rpc.load(Path(__file__).parents[2] / "plugins/proc/tests/echo.capnp").Echo


class Echo(rpc.Servant, interface=ECHO):
    """Says what it hears in capitals."""

    async def say(self, data: bytes) -> dict[str, object]:
        return {"data": data.upper()}

    async def another(self) -> dict[str, object]:
        raise NotImplementedError

    async def hand_on(self, to: rpc.Ref, data: bytes) -> dict[str, object]:
        raise NotImplementedError

    async def many(self, count: int) -> dict[str, object]:
        raise NotImplementedError

    async def untyped(self, named: int) -> dict[str, object]:
        raise NotImplementedError

    async def stream(self) -> dict[str, object]:
        raise NotImplementedError


async def test_a_program_in_assemblyscript(
    assemblyscript: Callable[[str], bytes], tmp_path: Path
) -> None:
    code, out = assemblyscript("guest.ts"), bytearray()
    socket = tmp_path / secrets.token_hex(4)
    async with (
        wasm_driver(tmp_path / "proc") as driver,
        rpc.runtime(),
        rpc.serve_unix(socket, lambda peer: Echo()),
        await rpc.connect_unix(socket) as connection,
    ):
        image, echo = await driver.load(code), connection.bootstrap(ECHO)
        end = await image.run(
            Spec(args=("guest", "hello"), grants={"echo": echo}, stdout=out.extend)
        )
        assert (end.kind, end.code, bytes(out)) == ("exited", 0, b"HELLO\n")
        out.clear()
        end = await image.run(Spec(args=("guest", "hello"), stdout=out.extend))
        assert (end.kind, end.code, bytes(out)) == ("exited", 1, b"error -8\n")
