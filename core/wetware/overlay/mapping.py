"""A port of the router for this node: by NAT-PMP, else by UPnP.

Whether anybody gets in there is another question: see `wetware.overlay.membership.outside`.
Source: RFC 6886 (NAT-PMP); UPnP Forum, "Internet Gateway Device" (2001), by way of miniupnpc.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from wetware.base.multiaddr import Multiaddr
from wetware.errors import OverlayError, WetwareError

if TYPE_CHECKING:
    from wetware.base.threads import Threads

LIFETIME_S: Final = 1200
"""Asked for. A router that forgets, or a node that is killed, is no trouble for longer."""
WAITS_S: Final = (0.25, 0.5, 1.0, 2.0)
"""For an answer, again and again (RFC 6886, 3.1)."""
STRAY_MAX: Final = 16
"""Datagrams looked at in one such wait that are no answer: reading them does not pause."""
UPNP_S: Final = 10.0
"""For all of it: without a router it takes some 4 s, and one may be slow."""
UPNP_DISCOVER_MS: Final = 1000
UPNP_PORTS: Final = 4
"""Tried, where other machines have them already."""
END_S: Final = 0.5
"""For the end of a mapping, when the node stops."""
PORT: Final = 5351
_ADDRESS, _TCP, _ANSWER = 0, 2, 128


@dataclass(frozen=True, slots=True)
class Mapping:
    """A port of the router.

    Attributes:
        addr: Its public address; it is global.
        lifetime_s: Without another request.
        end: Ends it now; never raises, and takes END_S at most.
    """

    addr: Multiaddr
    lifetime_s: float
    end: Callable[[], Awaitable[None]]


async def map_port(port: int, threads: Threads) -> Mapping:
    """Have the router send a port of its own to this one, TCP, or go on doing so.

    Raises OverlayError where no router does.
    """
    why = "no default gateway"
    if gateway := default_gateway():
        try:
            return await natpmp(gateway, port)
        except (OSError, WetwareError) as exc:
            why = f"NAT-PMP: {exc}"
    try:
        async with asyncio.timeout(UPNP_S):
            host, external, end = await threads.run(_upnp, port)
    except (TimeoutError, WetwareError) as exc:
        raise OverlayError(f"{why}; UPnP: {str(exc) or 'too slow'}") from exc

    async def ended() -> None:
        with contextlib.suppress(Exception):  # it raises nothing more special
            async with asyncio.timeout(END_S):
                await threads.run(end)

    return Mapping(_public(host, external), LIFETIME_S, ended)


def default_gateway() -> str:
    """That of the default route, IPv4; "" where there is none, or where this is not Linux."""
    with contextlib.suppress(OSError), open("/proc/net/route") as routes:
        for line in routes.readlines()[1:]:
            fields = line.split()
            if fields[1] == fields[7] == "00000000" and int(fields[3], 16) & 2:  # RTF_GATEWAY
                return socket.inet_ntoa(struct.pack("=I", int(fields[2], 16)))
    return ""


async def natpmp(gateway: str, port: int, *, server_port: int = PORT) -> Mapping:
    """A mapping by NAT-PMP; raises OSError, OverlayError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        # Connected, it hears the gateway alone, and its ICMP as an error.
        sock.connect((gateway, server_port))
        answer = await _ask(sock, struct.pack(">BB", 0, _ADDRESS), 12)
        host = socket.inet_ntoa(answer[8:12])
        _public(host, port)  # before anything is mapped
        request = struct.pack(">BBHHHI", 0, _TCP, 0, port, port, LIFETIME_S)
        internal, external, lifetime_s = struct.unpack(">HHI", (await _ask(sock, request, 16))[8:])
    if internal != port or not external or not lifetime_s:
        raise OverlayError("the router mapped another port, or none")

    async def end() -> None:
        with (
            contextlib.suppress(OSError, OverlayError, TimeoutError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        ):
            sock.setblocking(False)
            sock.connect((gateway, server_port))
            async with asyncio.timeout(END_S):
                await _ask(sock, struct.pack(">BBHHHI", 0, _TCP, 0, port, 0, 0), 16)

    return Mapping(_public(host, external), min(lifetime_s, LIFETIME_S), end)


async def _ask(sock: socket.socket, request: bytes, answer_bytes: int) -> bytes:
    """The answer to a request; raises OSError, and OverlayError for a refusal or none at all."""
    loop = asyncio.get_running_loop()
    for wait_s in WAITS_S:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await loop.sock_sendall(sock, request)
                for _ in range(STRAY_MAX):
                    answer = await loop.sock_recv(sock, 64)
                    if len(answer) < 4 or answer[0] or answer[1] != request[1] | _ANSWER:
                        continue
                    if refused := struct.unpack_from(">H", answer, 2)[0]:
                        raise OverlayError(f"the router refuses (result {refused})")
                    if len(answer) == answer_bytes:
                        return answer
    raise OverlayError("no answer")


def _upnp(port: int) -> tuple[str, int, Callable[[], object]]:
    """The router's address and port, and what ends the mapping; blocks for seconds."""
    import miniupnpc

    router = miniupnpc.UPnP()
    router.discoverdelay = UPNP_DISCOVER_MS
    try:
        router.discover()
        router.selectigd()
        host = router.externalipaddress()
        _public(host, port)
        for external in (port, *random.sample(range(1024, 65536), UPNP_PORTS - 1)):
            # Many routers would take it from whoever has it.
            taken = router.getspecificportmapping(external, "TCP")
            if taken is None or tuple(taken[:2]) == (router.lanaddr, port):
                name = "wetware"
                router.addportmapping(external, "TCP", router.lanaddr, port, name, "", LIFETIME_S)
                return host, external, partial(router.deleteportmapping, external, "TCP")
    except WetwareError:
        raise
    except Exception as exc:  # it raises nothing more special
        raise OverlayError(str(exc) if str(exc) != "Success" else "no router answers") from exc
    raise OverlayError("other machines have the ports")


def _public(host: object, port: int) -> Multiaddr:
    """What a router says; raises InvalidArgument, OverlayError where it is no public address."""
    addr = Multiaddr.parse(f"/ip4/{host}/tcp/{port}")
    if not addr.is_global:
        raise OverlayError(f"the router itself has no public address, but {addr.host}")
    return addr
