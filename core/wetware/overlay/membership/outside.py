"""What a node knows of how the internet reaches it, and the port that it has of its router.

Members say it: one dials the public addresses of this node by new connections, and two say how they
see a fresh port of it. A port of the router is announced when such a dial got in, and no earlier:
the router may be behind another one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from wetware.base.backoff import Backoff
from wetware.base.log import get_logger
from wetware.base.threads import Threads
from wetware.errors import WetwareError
from wetware.overlay.mapping import LIFETIME_S, Mapping, map_port
from wetware.overlay.punching import OBSERVERS

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.overlay.membership.dial_back import DialBacks
    from wetware.overlay.membership.reach import Reach

log = get_logger("membership.reach")

AGAIN_S: Final = LIFETIME_S / 2
"""Between two looks."""
SOON_S: Final = 1.0
"""The same, while nobody gets in; then longer and longer."""
RENEW_S_MIN: Final = 30.0
"""However short a lifetime the router gives."""


class Outside:
    """Of one node. `run` is all of its life.

    Args:
        reach: Knows who is connected.
        dial_backs: Asks members to dial.
        direct: Where the node says that it can be dialled.
        port: What the router shall send here, or None.
        announce: Called with the port that the router has for it, or None, when that changes.
        map_port: See `wetware.overlay.mapping`.
    """

    def __init__(
        self,
        reach: Reach,
        dial_backs: DialBacks,
        *,
        direct: Callable[[], Iterable[Multiaddr]],
        port: Callable[[], int | None],
        announce: Callable[[Multiaddr | None], None],
        map_port: Callable[[int, Threads], Coroutine[Any, Any, Mapping]] = map_port,
    ) -> None:
        self._reach, self._dial_backs, self._map_port = reach, dial_backs, map_port
        self._direct, self._port, self._announce = direct, port, announce
        self._threads = Threads()
        self._mapping: Mapping | None = None
        self._announced: Multiaddr | None = None
        self._reached: tuple[Multiaddr, ...] = ()
        self._seen: Sequence[Multiaddr] = ()
        self._moved = asyncio.Event()
        self._pauses = Backoff(SOON_S, AGAIN_S, reach.rng)

    async def run(self) -> None:
        """Look again and again until cancelled; then the router has its port back."""
        try:
            while True:
                self._moved.clear()
                wait_s = SOON_S
                if self._reach.observers() or self._reach.carriers():
                    try:
                        await self._look()
                    except Exception:  # a defect in it is not the end of the node
                        log.exception("outside.failed")
                    wait_s = self._pauses.pause_s()
                    if self._reached:
                        self._pauses.reset()
                        wait_s = AGAIN_S
                    if self._mapping is not None:
                        wait_s = min(wait_s, max(RENEW_S_MIN, self._mapping.lifetime_s / 2))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._moved.wait()
        finally:
            if self._mapping is not None:
                await self._mapping.end()

    def network_changed(self) -> None:
        """Nothing is known any more; the router, if it is the same, forgets its port by itself."""
        self._mapping, self._reached, self._seen = None, (), ()
        self._pauses.reset()
        self._tell(None)
        self._moved.set()

    def describe(self, relays: Sequence[str]) -> str:
        """How this node is reached from the internet, in words; `relays` are names."""
        if self._reached:
            return f"reached directly at {self._reached[0].with_peer(None)}"
        if len(self._seen) < OBSERVERS:
            text = "nobody could tell which NAT this node is behind"
        elif len(set(self._seen)) == 1:
            text = "behind a NAT that keeps ports (direct connections can be punched)"
        else:
            text = "behind a symmetric NAT (relayed)"
        return f"{text}; strangers only by the relays {', '.join(relays)}" if relays else text

    async def _look(self) -> None:
        """Renew the port of the router, and ask members; what they say is kept."""
        observers, port = self._reach.observers(), self._port()
        mapping = None
        if port is not None and (observers or self._mapping):
            try:
                mapping = await self._map_port(port, self._threads)
            except WetwareError as exc:
                log.debug("port.not_mapped", why=exc)
        addrs = [addr.with_peer(None) for addr in self._direct() if addr.is_global]
        if mapping is not None:
            addrs = [mapping.addr, *addrs]
        # Others than observers may be on this side of the router.
        carriers = [connection.peer for connection in observers] or list(self._reach.carriers())
        reached: Sequence[Multiaddr] = self._reached  # where nobody can be asked now
        if addrs and carriers:
            try:
                answers = await self._dial_backs.ask(carriers[0], dict.fromkeys(addrs))
                reached = [answer.addr for answer in answers if answer.reached]
            except WetwareError as exc:
                log.debug("outside.not_asked", peer=carriers[0], why=exc)
        seen = self._seen
        if not reached and observers:
            with contextlib.suppress(OSError, TimeoutError, EOFError, WetwareError):
                seen = await self._reach.seen()
        if self._moved.is_set():  # that was another network
            return
        self._mapping, self._seen = mapping, seen
        self._reached = tuple(addr for addr in addrs if addr in reached)
        proved = mapping is not None and mapping.addr in self._reached
        self._tell(mapping.addr if mapping is not None and proved else None)

    def _tell(self, mapped: Multiaddr | None) -> None:
        if mapped != self._announced:
            self._announced = mapped
            log.info("port.mapped", addr=mapped or "none")
            self._announce(mapped)
