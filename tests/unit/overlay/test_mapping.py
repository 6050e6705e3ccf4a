"""A port of the router by NAT-PMP: what a gateway answers, and what one must not achieve."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.base.threads import Threads
from wetware.errors import OverlayError
from wetware.overlay import mapping
from wetware.overlay.mapping import LIFETIME_S, map_port, natpmp

pytestmark = pytest.mark.anyio

PUBLIC = "5.0.0.9"
Answer = Callable[[bytes], list[bytes]]


class Gateway(asyncio.DatagramProtocol):
    """As RFC 6886; `answers` says otherwise."""

    def __init__(self, answers: Answer | None = None) -> None:
        self.answers = answers or self.honest
        self.host, self.lifetime_s = PUBLIC, LIFETIME_S
        self.mapped: dict[int, int] = {}
        self.asked: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    @property
    def port(self) -> int:
        return int(self.transport.get_extra_info("sockname")[1])

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.asked.append(data)
        for answer in self.answers(data):
            self.transport.sendto(answer, addr)

    def honest(self, data: bytes) -> list[bytes]:
        if data == b"\0\0":
            return [struct.pack(">BBHI", 0, 128, 0, 7) + socket.inet_aton(self.host)]
        _, _, _, port, wanted, lifetime_s = struct.unpack(">BBHHHI", data)
        if lifetime_s:
            lifetime_s, self.mapped[port] = self.lifetime_s, wanted
        else:
            self.mapped.pop(port, None)
        external = self.mapped.get(port, 0)
        return [struct.pack(">BBHIHHI", 0, 130, 0, 7, port, external, lifetime_s)]


@contextlib.asynccontextmanager
async def gateway(answers: Answer | None = None) -> AsyncIterator[Gateway]:
    loop = asyncio.get_running_loop()
    transport, made = await loop.create_datagram_endpoint(
        lambda: Gateway(answers), local_addr=("127.0.0.1", 0)
    )
    try:
        yield made
    finally:
        transport.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "WAITS_S", (0.05, 0.1))


async def test_a_port_is_mapped_renewed_and_given_back() -> None:
    async with gateway() as router:
        for _ in range(2):
            got = await natpmp("127.0.0.1", 4001, server_port=router.port)
            assert (str(got.addr), got.lifetime_s) == (f"/ip4/{PUBLIC}/tcp/4001", LIFETIME_S)
        assert router.mapped == {4001: 4001}
        await got.end()
        assert router.mapped == {}


async def test_what_the_router_gives_is_taken_and_no_longer_lifetime_than_asked() -> None:
    async with gateway() as router:
        router.lifetime_s = 30
        assert (await natpmp("127.0.0.1", 1, server_port=router.port)).lifetime_s == 30
        router.lifetime_s = 2**32 - 1
        assert (await natpmp("127.0.0.1", 1, server_port=router.port)).lifetime_s == LIFETIME_S


async def test_a_lost_answer_is_asked_for_again() -> None:
    async with gateway() as router:
        router.answers = lambda data: router.honest(data) if len(router.asked) > 1 else []
        await natpmp("127.0.0.1", 4001, server_port=router.port)
        assert len(router.asked) == 3


async def test_behind_another_nat_nothing_is_mapped() -> None:
    async with gateway() as router:
        router.host = "192.168.7.2"
        with pytest.raises(OverlayError, match=r"no public address, but 192\.168\.7\.2"):
            await natpmp("127.0.0.1", 4001, server_port=router.port)
        assert router.mapped == {}


GOOD = struct.pack(">BBHI", 0, 128, 0, 7) + socket.inet_aton(PUBLIC)


def mapped(port: int, external: int, lifetime_s: int) -> Answer:
    answer = struct.pack(">BBHIHHI", 0, 130, 0, 7, port, external, lifetime_s)
    return lambda data: [GOOD if len(data) == 2 else answer]


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (lambda data: [], "no answer"),
        (lambda data: [GOOD[:n] for n in range(12)], "no answer"),  # truncated
        (lambda data: [GOOD + b"\0"], "no answer"),
        (lambda data: [b"\0\x82" + GOOD[2:]], "no answer"),  # another opcode
        (lambda data: [b"\0\0" + GOOD[2:]], "no answer"),  # a request
        (lambda data: [b"\2" + GOOD[1:]], "no answer"),  # another version: PCP
        (lambda data: [b"\0\x80\0\2"], "refuses"),
        (mapped(4001, 4001, 0), "another port, or none"),
        (mapped(4001, 0, 60), "another port, or none"),
        (mapped(22, 4001, 60), "another port, or none"),
    ],
)
async def test_what_is_no_mapping(answers: Answer, why: str) -> None:
    async with gateway(answers) as router:
        with pytest.raises(OverlayError, match=why):
            await natpmp("127.0.0.1", 4001, server_port=router.port)
        assert len(router.asked) <= 2


async def test_a_flood_of_datagrams_does_not_hold_the_loop() -> None:
    async with gateway(lambda data: [b"\0\x82\0\0"] * 100) as router:
        with pytest.raises(OverlayError, match="no answer"):
            await natpmp("127.0.0.1", 4001, server_port=router.port)


async def test_nobody_but_the_gateway_is_heard() -> None:
    """Its answers come from the address that was asked."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))

        class Elsewhere(Gateway):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                other.sendto(self.honest(data)[0], addr)

        loop = asyncio.get_running_loop()
        transport, router = await loop.create_datagram_endpoint(
            Elsewhere, local_addr=("127.0.0.1", 0)
        )
        try:
            with pytest.raises(OverlayError, match="no answer"):
                await natpmp("127.0.0.1", 4001, server_port=router.port)
        finally:
            transport.close()


async def test_nobody_listens() -> None:
    async with gateway() as router:
        port = router.port
    with pytest.raises(OSError):
        await natpmp("127.0.0.1", 4001, server_port=port)


class Upnp:
    """The object of miniupnpc."""

    lanaddr = "10.0.0.2"

    def __init__(self, host: str = PUBLIC, taken: tuple[int, ...] = ()) -> None:
        self.host = host
        self.entries: dict[int, tuple[Any, ...]] = {port: ("10.0.0.3", 1) for port in taken}

    def discover(self) -> int:
        return 1

    def selectigd(self) -> str:
        return "http://10.0.0.1/"

    def externalipaddress(self) -> str:
        return self.host

    def getspecificportmapping(self, port: int, protocol: str) -> tuple[Any, ...] | None:
        return self.entries.get(port)

    def addportmapping(self, port: int, protocol: str, host: str, internal: int, *_: Any) -> None:
        self.entries[port] = (host, internal, "wetware", True, 1)

    def deleteportmapping(self, port: int, protocol: str) -> None:
        del self.entries[port]


@pytest.fixture
def upnp(monkeypatch: pytest.MonkeyPatch) -> Upnp:
    router = Upnp()
    monkeypatch.setitem(sys.modules, "miniupnpc", SimpleNamespace(UPnP=lambda: router))
    monkeypatch.setattr(mapping, "default_gateway", lambda: "")
    return router


async def test_upnp_takes_no_port_of_another_machine(upnp: Upnp) -> None:
    got = await map_port(4001, Threads())
    assert got.addr.port == 4001
    assert (await map_port(4001, Threads())).addr == got.addr
    await got.end()
    assert upnp.entries == {}
    upnp.entries[4001] = ("10.0.0.3", 4001)
    other = await map_port(4001, Threads())
    assert other.addr.port != 4001
    assert upnp.entries[other.addr.port][:2] == ("10.0.0.2", 4001)
    assert upnp.entries[4001] == ("10.0.0.3", 4001)


@pytest.mark.parametrize("host", ["192.168.7.2", "", "<b>", "100.64.0.1", "5.0.0.9\n"])
async def test_upnp_says_no_public_address(upnp: Upnp, host: str) -> None:
    upnp.host = host
    with pytest.raises(OverlayError, match="UPnP"):
        await map_port(4001, Threads())
    assert upnp.entries == {}


async def test_upnp_takes_no_longer_than_its_bound(
    upnp: Upnp, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    go_on = threading.Event()
    monkeypatch.setattr(upnp, "selectigd", go_on.wait, raising=False)
    monkeypatch.setattr(mapping, "UPNP_S", 0.05)
    with pytest.raises(OverlayError, match="too slow"):
        await map_port(4001, Threads())
    go_on.set()


async def test_without_any_router(upnp: Upnp, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise Exception("Success")

    monkeypatch.setattr(upnp, "discover", fails, raising=False)
    with pytest.raises(OverlayError, match="no default gateway; UPnP: no router answers"):
        await map_port(4001, Threads())
