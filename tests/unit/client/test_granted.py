"""`wetware.connect()` in a program that a node runs: the socket that it has inherited."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

import wetware
from wetware import rpc
from wetware.errors import DialError, NotFound, Unsupported, WetwareError

pytestmark = pytest.mark.anyio


class Counter(rpc.Servant, interface=rpc.WW.Source):
    async def stat(self) -> dict[str, Any]:
        return {"size": 7}

    async def read(self, start: int, end: int) -> dict[str, Any]:
        raise NotImplementedError


class Given(rpc.Servant, interface=rpc.WW.Granted):
    def __init__(self) -> None:
        self.offered: dict[str, rpc.Ref] = {}

    async def services(self) -> dict[str, Any]:
        return {"services": [{"name": "in", "interface": "Source", "methods": ["*"]}]}

    async def open(self, name: str) -> dict[str, Any]:
        if name == "strange":
            return {"service": Counter(), "interface": 12345}
        if name != "in":
            raise NotFound("nothing of that name", code="not_found.grant")
        return {"service": Counter(), "interface": rpc.WW.Source.id}

    async def export(self, name: str, cap: rpc.Ref, interface: int) -> None:
        known = rpc.known(interface)
        assert known is not None
        self.offered[name] = cap.cast(known)


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Given]:
    ours, theirs = socket.socketpair()
    monkeypatch.setenv("WW_FD", str(theirs.detach()))
    given = Given()
    async with rpc.runtime():
        serving = asyncio.ensure_future(rpc.serve(rpc.SocketPipe(ours), given))
        yield given
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def test_a_program_finds_what_it_was_given(node: Given) -> None:
    async with wetware.connect() as session:
        assert [each.name for each in await session.services()] == ["in"]
        ref = await session.open("in", rpc.WW.Source)
        assert await ref.call("stat") == {"size": 7}
        by_itself = await session.open("in")  # type: ignore[call-arg]  # a program's session
        assert by_itself.interface is rpc.WW.Source
        with pytest.raises(NotFound):
            await session.open("out", rpc.WW.Source)
        with pytest.raises(Unsupported, match="interface"):
            await session.open("strange")  # type: ignore[call-arg]


async def test_a_program_offers_what_it_serves(node: Given) -> None:
    async with wetware.connect() as session:
        await session.export("out", Counter())
        assert await node.offered["out"].call("stat") == {"size": 7}
    with pytest.raises(WetwareError):
        await node.offered["out"].call("stat")


async def test_there_is_no_way_on_from_there(node: Given) -> None:
    async with wetware.connect() as session:
        for refused in (
            session.share({"in": ()}),
            session.attenuate({"in": ()}),
            session.whoami(),
            session.grants(),
            session.revoke("0" * 16),
        ):
            with pytest.raises(Unsupported, match="Granted has no method"):
                await refused
        with pytest.raises(NotFound):
            async with session.node("other"):
                pass


async def test_the_socket_is_taken_once_and_no_child_inherits_it(node: Given) -> None:
    number = int(os.environ["WW_FD"])
    async with wetware.connect():
        assert "WW_FD" not in os.environ
        assert not os.get_inheritable(number)


@pytest.mark.parametrize("number", ["x", "987654", "1e3"])
async def test_what_is_no_socket_is_said(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    monkeypatch.setenv("WW_FD", number)
    with pytest.raises(DialError, match="is no socket of this process"):
        async with wetware.connect():
            pass


async def test_who_says_where_to_log_in_is_taken_at_their_word(
    node: Given, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with pytest.raises(DialError, match="no node is running"):
        async with wetware.connect(data_dir=tmp_path):
            pass
    socket.socket(fileno=int(os.environ["WW_FD"])).close()
