"""Carrying connections for members that cannot dial each other, and being carried to.

A member that is asked by another one opens a stream to the target, over the connection that it has
to it, and copies bytes both ways: never over a connection that is carried itself. A stranger is
carried only to members that asked this node for it: so a laptop behind a NAT can be reached with
the ticket or the reference that it gave away, by whoever has never seen the cluster. What is
public there is all that a stranger gets, as on a direct connection.

Asking is in `wetware.overlay.link.relaying`. Memory is bounded by the link's limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from wetware.base.access import Access
from wetware.base.bounds import Claim, Places, Throttle, TokenBucket, address_key, network_key
from wetware.base.log import get_logger
from wetware.errors import LimitExceeded, OverlayError
from wetware.overlay.link.relaying import ANSWER_S_MAX, RELAY_PROTOCOL, Verdict, read_target
from wetware.overlay.splice import splice
from wetware.overlay.tunnel import TUNNEL_PROTOCOL

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.link import Connection, LinkHost, Stream

log = get_logger("relay")

PAIRS_MAX: Final = 512
"""Connections carried at once."""
PAIRS_PER_PEER_MAX: Final = 64
"""Of these, for one member that asks; a cluster's full mesh is smaller."""
PAIRS_PER_TARGET_MAX: Final = 4
"""Between the same two; more than a link keeps of one peer is of no use."""
BYTES_PER_S: Final = 256 << 20
"""Of all members together: more than a line of 1 Gbit/s carries, and a core copies."""
RESERVATIONS_MAX: Final = 256
"""Members to which strangers are carried."""
STRANGERS_MAX: Final = 32
"""Connections of strangers carried at once. Where all are taken, the network that has most of them
loses its oldest to one that has fewer: so it takes 32 networks to keep others out."""
STRANGERS_PER_ADDRESS_MAX: Final = 4
STRANGERS_PER_TARGET_MAX: Final = 8
"""Likewise."""
FULL_LINES_PER_MINUTE: Final = 6
"""In the log: strangers may ask fifty times a second."""
STRANGER_BYTES_PER_S: Final = 1 << 20
"""Of all strangers together: to join takes some kilobytes."""


def claims_of_member(source: PeerId, target: PeerId) -> tuple[Claim, ...]:
    """The places that a connection between two members takes at their relay."""
    return (
        Claim("all", PAIRS_MAX, f"{PAIRS_MAX} are carried (PAIRS_MAX)"),
        Claim(source, PAIRS_PER_PEER_MAX, "too many for one member (PAIRS_PER_PEER_MAX)"),
        Claim(
            frozenset((source, target)),
            PAIRS_PER_TARGET_MAX,
            "too many between two members (PAIRS_PER_TARGET_MAX)",
        ),
    )


class Relay:
    """Serves the relay's protocols on a host.

    Args:
        host: The link.
        is_member: Of this cluster.
        enabled: Whether others are carried; being carried to is always served.
    """

    def __init__(
        self, host: LinkHost, *, is_member: Callable[[PeerId], bool], enabled: bool
    ) -> None:
        self._host, self._is_member, self._enabled = host, is_member, enabled
        self._places = Places()
        self._reserved: dict[PeerId, int] = {}
        self._strangers: dict[Stream, tuple[str, PeerId]] = {}  # address, target; the oldest first
        self._lines = Throttle(FULL_LINES_PER_MINUTE, 1, time.monotonic)
        self._pace = TokenBucket(BYTES_PER_S, BYTES_PER_S)
        self._strangers_pace = TokenBucket(STRANGER_BYTES_PER_S, STRANGER_BYTES_PER_S)

    def start(self) -> Callable[[], None]:
        """Serve; returns what ends it. What is carried goes on until the host ends."""
        ends = contextlib.ExitStack()
        ends.callback(self._host.handle(RELAY_PROTOCOL, self._serve, access=Access.PUBLIC))
        ends.callback(self._host.handle(TUNNEL_PROTOCOL, self._carried, access=Access.MEMBER))
        return ends.close

    async def _carried(self, stream: Stream) -> None:
        """The far end: what comes out of it is a connection like one from the network.

        The limits for strangers count it under the member that carries it.
        """
        connection = self._host.accept_pipe(stream, stream.connection.remote)
        await connection.wait_closed()

    async def _serve(self, stream: Stream) -> None:
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                target = await read_target(stream)
        except TimeoutError:
            raise OverlayError("it did not say whom it wants", code="overlay.timeout") from None
        with contextlib.ExitStack() as held:
            verdict, onward = await self._begin(stream, target, held)
            try:
                await stream.write(bytes([verdict]))
            except BaseException:
                if onward is not None:
                    onward.reset()
                raise
            if verdict is not Verdict.CARRIED:
                if target is not None:
                    log.debug("relay.refused", source=stream.peer, target=target, why=verdict.name)
                return
            if onward is None:
                await stream.read()  # until it ends
                return
            log.debug("relay.begun", source=stream.peer, target=target)

            def pace() -> TokenBucket:
                # A member may be introduced after it asked.
                return self._pace if self._is_member(stream.peer) else self._strangers_pace

            await splice(stream, onward, pace)

    async def _begin(
        self, stream: Stream, target: PeerId | None, held: contextlib.ExitStack
    ) -> tuple[Verdict, Stream | None]:
        """The answer, and the stream to the target; `held` has the places until the end."""
        if not self._enabled:
            return Verdict.OFF, None
        if stream.connection.tunnelled:  # carriers are not chained
            return Verdict.NOT_CONNECTED, None
        try:
            if target is None:
                return self._reserve(stream.peer, held), None
            connection = self._way(stream, target)
            if connection is None:
                return Verdict.NOT_CONNECTED, None
            if self._is_member(stream.peer):
                held.enter_context(self._places.hold(*claims_of_member(stream.peer, target)))
            else:
                self._take_stranger(stream, target, held)
        except LimitExceeded as exc:
            self._host.refused["relay.full"] += 1
            if (left_out := self._lines.lines("full")) is not None:
                log.info("relay.full", source=stream.peer, why=exc, unlogged=left_out)
            return Verdict.FULL, None
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                return Verdict.CARRIED, await connection.open_stream(TUNNEL_PROTOCOL)
        except (OverlayError, TimeoutError) as exc:
            log.debug("relay.failed", source=stream.peer, target=target, why=exc)
            return Verdict.NOT_CONNECTED, None

    def _way(self, stream: Stream, target: PeerId) -> Connection | None:
        """The connection to a target that this peer may be carried to."""
        connection = self._host.connection(target)
        known = self._is_member(target) and target != stream.peer
        if not known or connection is None or connection.tunnelled:
            return None
        # A stranger does not learn who is connected here.
        allowed = self._is_member(stream.peer) or target in self._reserved
        return connection if allowed else None

    def _take_stranger(self, stream: Stream, target: PeerId, held: contextlib.ExitStack) -> None:
        address = address_key(stream.connection.address)
        # One that was introduced after it asked is none any more.
        there = {
            other: place
            for other, place in self._strangers.items()
            if not self._is_member(other.peer)
        }
        if sum(at == address for at, _ in there.values()) >= STRANGERS_PER_ADDRESS_MAX:
            raise LimitExceeded(f"too many strangers at {address} (STRANGERS_PER_ADDRESS_MAX)")
        to_target = [other for other, (_, to) in there.items() if to == target]
        if len(to_target) >= STRANGERS_PER_TARGET_MAX:
            self._make_room(address, to_target, "STRANGERS_PER_TARGET_MAX")
        elif len(there) >= STRANGERS_MAX:
            self._make_room(address, list(there), "STRANGERS_MAX")
        self._strangers[stream] = address, target
        held.callback(self._strangers.pop, stream, None)

    def _make_room(self, address: str, among: list[Stream], limit: str) -> None:
        """End the oldest of the network that has most of `among`, or raise LimitExceeded."""
        networks = {stream: network_key(self._strangers[stream][0]) for stream in among}
        counts, network = Counter(networks.values()), network_key(address)
        most = max(counts, key=counts.__getitem__, default=network)
        if counts[most] <= counts[network] + 1:
            raise LimitExceeded(f"{len(among)} strangers ({limit})")
        oldest = next(stream for stream in among if networks[stream] == most)
        del self._strangers[oldest]
        log.debug("relay.displaced", source=oldest.peer, network=most, limit=limit)
        oldest.reset()

    def _reserve(self, peer: PeerId, held: contextlib.ExitStack) -> Verdict:
        if not self._is_member(peer):
            return Verdict.NOT_CONNECTED
        if peer not in self._reserved and len(self._reserved) >= RESERVATIONS_MAX:
            return Verdict.FULL
        self._reserved[peer] = self._reserved.get(peer, 0) + 1
        held.callback(self._release, peer)
        return Verdict.CARRIED

    def _release(self, peer: PeerId) -> None:
        self._reserved[peer] -= 1
        if not self._reserved[peer]:
            del self._reserved[peer]
