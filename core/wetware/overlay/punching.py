"""From a relayed connection to a direct one: TCP hole punching, coordinated over the relay.

Each end takes a fresh port and dials members from it that say how they see it: that keeps the NAT's
mapping, and two who see different ports tell that there is none to use (a symmetric NAT). It does
so as a stranger, by a host of its own: as the node it would have second connections for a moment,
in which streams would begin, and which cast doubt on the first ones. Both ends tell each other over
the relayed connection and connect at the same moment from those ports, so that each router takes
the other's SYN for an answer. No listener is involved: both ends are TCP diallers of one connection
(simultaneous open), and the smaller peer ID is the initiator of noise and yamux.

Source: Ford, Srisuresh, Kegel, "Peer-to-Peer Communication Across NATs" (2005); DCUtR of libp2p.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from wetware.base.access import Access
from wetware.base.bounds import Claim, Places, Rates
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.errors import DialError, OverlayError, WetwareError
from wetware.identity import Key
from wetware.overlay.frames import read_frame, write_frame
from wetware.overlay.link import LinkHost, LinkLimits

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.link import Connection, Stream

log = get_logger("punching")

OBSERVED_PROTOCOL: Final = "/wetware/observed/1.0.0"
"""{addr}: how the peer sees the other end of the connection."""
PUNCH_PROTOCOL: Final = "/wetware/punch/1.0.0"
"""{addr} → {addr} or {refused}, then {go}."""
FRAME_BYTES_MAX: Final = 1024
OBSERVERS: Final = 2
EXCHANGE_S: Final = 10.0
"""For all of it."""
CLOSE_S: Final = 0.5
"""For the connections to observers to end."""
TRIES_MAX: Final = 4
"""Of one attempt. The peer names the address: where a stranger answers, it is not to be flooded."""
TRY_S: Final = 1.5
PER_S, BURST, PEERS_MAX = 1 / 60, 6, 1024
"""Attempts that a peer may cause here."""
HOST_BURST, HOSTS_MAX = 2, 4096
"""The same at one host: each makes this node dial an address there that the peer names."""
SERVED_MAX: Final = 8
"""Attempts of peers at once: each holds sockets, and asks the same observers."""


class Punching:
    """Of one host.

    Args:
        host: The link.
        observers: Connections to members that were dialled at public addresses.
        monotonic: Seconds that never go back.
    """

    def __init__(
        self,
        host: LinkHost,
        observers: Callable[[], Iterable[Connection]],
        monotonic: Callable[[], float],
    ) -> None:
        self._host, self._observers = host, observers
        self._monotonic = monotonic
        self._served = Places()
        self.forget()

    def forget(self) -> None:
        """This node is in another network: what was tried before does not count."""
        self._rates = Rates(PER_S, BURST, PEERS_MAX, self._monotonic)
        self._host_rates = Rates(PER_S, HOST_BURST, HOSTS_MAX, self._monotonic)

    def start(self) -> Callable[[], None]:
        """Serve; returns what ends it."""
        ends = contextlib.ExitStack()
        ends.callback(self._host.handle(OBSERVED_PROTOCOL, self._tell, access=Access.PUBLIC))
        ends.callback(self._host.handle(PUNCH_PROTOCOL, self._serve, access=Access.MEMBER))
        return ends.close

    async def punch(self, relayed: Connection) -> Connection:
        """A direct connection to the peer of a relayed one; raises DialError, OverlayError."""
        try:
            async with asyncio.timeout(EXCHANGE_S), contextlib.AsyncExitStack() as stack:
                port, own = await self._observe(stack)
                async with await relayed.open_stream(PUNCH_PROTOCOL) as stream:
                    await write_frame(stream, {"addr": str(own)})
                    answer = await read_frame(stream, bytes_max=FRAME_BYTES_MAX)
                    if isinstance(why := answer.get("refused"), str):
                        raise DialError(f"{relayed.peer} says: {why[:200]}")
                    theirs = public_addr(answer)
                    self._take(relayed.peer, theirs)
                    await write_frame(stream, {"go": True})
                    # It arrives when this end begins, as far as can be told.
                    await asyncio.sleep(min(1.0, relayed.rtt_s) / 2)
                    return await self._connect(port, theirs, relayed.peer)
        except (TimeoutError, EOFError, OSError) as exc:
            raise DialError(
                f"cannot reach {relayed.peer} directly: {str(exc) or 'too slow'}"
            ) from exc

    async def seen(self) -> list[Multiaddr]:
        """How OBSERVERS members, or fewer, see one fresh port of this node; raises as `punch`.

        Also OSError, TimeoutError and EOFError.
        """
        async with asyncio.timeout(EXCHANGE_S), contextlib.AsyncExitStack() as stack:
            return (await self._ask(stack))[1]

    async def _tell(self, stream: Stream) -> None:
        await write_frame(stream, {"addr": str(stream.connection.remote.with_peer(None))})

    async def _serve(self, stream: Stream) -> None:
        """The other end of `punch`."""
        connection, peer = stream.connection, stream.peer
        try:
            async with asyncio.timeout(EXCHANGE_S), contextlib.AsyncExitStack() as stack:
                theirs = public_addr(await read_frame(stream, bytes_max=FRAME_BYTES_MAX))
                try:
                    full = Claim("all", SERVED_MAX, "too many at once (SERVED_MAX)")
                    stack.enter_context(self._served.hold(full))
                    turned = self._host.peer_id < peer  # then it is this end that asks
                    if not connection.tunnelled or turned or not self._rates.take(peer):
                        raise DialError("not now")  # told as what else fails
                    self._take(peer, theirs)
                    port, own = await self._observe(stack)
                except (WetwareError, OSError) as exc:
                    await write_frame(stream, {"refused": str(exc)[:200]})
                    return
                await write_frame(stream, {"addr": str(own)})
                await read_frame(stream, bytes_max=FRAME_BYTES_MAX)
                await self._connect(port, theirs, peer)
        except (WetwareError, OSError, TimeoutError, EOFError) as exc:
            log.debug("punch.failed", peer=peer, why=exc)

    def _take(self, peer: PeerId, theirs: Multiaddr) -> None:
        if not self._host_rates.take((peer, theirs.host)):
            raise DialError(f"not now: {theirs.host} was tried")

    async def _observe(self, stack: contextlib.AsyncExitStack) -> tuple[int, Multiaddr]:
        """A fresh port and its public address; the mapping lasts as long as `stack`.

        Raises DialError where nobody can tell, or the NAT gives each destination another port.
        """
        port, answers = await self._ask(stack)
        seen = set(answers)
        if not seen:
            raise DialError("nobody is connected who could tell how this node is seen")
        if len(seen) > 1:
            raise DialError("its NAT is symmetric: each destination sees another port")
        return port, seen.pop()

    async def _ask(self, stack: contextlib.AsyncExitStack) -> tuple[int, list[Multiaddr]]:
        """A fresh port, and how members see it; the mapping lasts as long as `stack`."""
        # By host: two connections from one port to one address would be the same four-tuple.
        observers = {
            connection.remote.host: connection
            for connection in self._observers()
            if connection.remote.kind == "ip4"
        }
        limits = LinkLimits(close_s=CLOSE_S)
        asking = await stack.enter_async_context(LinkHost(Key.generate(), limits=limits))
        port = 0
        seen: list[Multiaddr] = []
        for observer in list(observers.values())[:OBSERVERS]:
            sock = _bound(port)
            port = sock.getsockname()[1]
            connection = await _dialled(
                asking, sock, observer.remote, observer.peer, initiator=True
            )
            async with await connection.open_stream(OBSERVED_PROTOCOL) as stream:
                seen.append(public_addr(await read_frame(stream, bytes_max=FRAME_BYTES_MAX)))
        return port, seen

    async def _connect(self, port: int, to: Multiaddr, peer: PeerId) -> Connection:
        why = ""
        for _ in range(TRIES_MAX):
            try:
                connection = await _dialled(
                    self._host, _bound(port), to, peer, initiator=self._host.peer_id < peer
                )
            except (OSError, TimeoutError) as exc:
                why = str(exc) or "no answer"
                # In fixed steps both ends would fall into step with routers that refuse.
                await asyncio.sleep(random.uniform(0.02, 0.4))  # noqa: S311  # only a pause
            else:
                log.info("punch.direct", peer=peer, remote=connection.remote)
                return connection
        raise DialError(f"no way to {to}: {why}")


async def _dialled(
    host: LinkHost, sock: socket.socket, to: Multiaddr, peer: PeerId, *, initiator: bool
) -> Connection:
    """A connection from a bound socket; raises OSError, TimeoutError, WetwareError."""
    try:
        async with asyncio.timeout(TRY_S):
            await asyncio.get_running_loop().sock_connect(sock, (to.host, to.port))
    except BaseException:
        sock.close()
        raise
    return await host.adopt(sock, peer, initiator=initiator)


def _bound(port: int) -> socket.socket:
    """A socket of this port, which others of this node may have as well; 0 is a fresh one."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("0.0.0.0", port))  # noqa: S104  # it never listens
    return sock


def public_addr(frame: dict[str, Any]) -> Multiaddr:
    """The address in a frame; raises OverlayError, InvalidArgument for what is none, or private."""
    text = frame.get("addr")
    addr = Multiaddr.parse(text if isinstance(text, str) else "")
    if not addr.is_global or addr.kind != "ip4":
        raise OverlayError(f"{addr} is no public address")
    return addr
