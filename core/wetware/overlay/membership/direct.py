"""Who is reached through a relay: again and again a direct connection is tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware.base.backoff import Backoff
from wetware.base.bounds import Rates
from wetware.base.log import get_logger
from wetware.errors import WetwareError

if TYPE_CHECKING:
    import random

    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import PeerId
    from wetware.overlay.link import LinkHost
    from wetware.overlay.punching import Punching

log = get_logger("membership.reach")

AGAIN_S_MIN, AGAIN_S_MAX = 1.0, 600.0
"""Pauses between tries."""
DIAL_S: Final = 5.0
TRIES_MAX: Final = 4
"""At once."""
PER_S, BURST, PEERS_MAX = 1 / 60, 4, 4096
"""Tries for one peer, whatever it says and however often it comes: it names where they go."""
PER_HOST_MAX: Final = 2
"""Addresses of one host in a try: a peer may name a victim's, with many ports."""


@dataclass(slots=True, eq=False)
class _Relayed:
    backoff: Backoff
    due: float
    busy: bool = False


class Direct:
    """Of one node.

    Args:
        host: The link.
        addrs: Where a member may be dialled.
        punching: For what cannot be dialled.
        now: Monotonic seconds.
        rng: For jitter.
        spawn: Begins a task; whether it has begun.
        wake: Called when `look` has something to do.
    """

    def __init__(
        self,
        host: LinkHost,
        addrs: Callable[[PeerId], Iterable[Multiaddr]],
        punching: Punching,
        *,
        now: Callable[[], float],
        rng: random.Random,
        spawn: Callable[[Coroutine[Any, Any, None], str], bool],
        wake: Callable[[], None],
    ) -> None:
        self._host, self._addrs, self._punching = host, addrs, punching
        self._now, self._rng, self._spawn, self._wake = now, rng, spawn, wake
        self._relayed: dict[PeerId, _Relayed] = {}
        self._rates = Rates(PER_S, BURST, PEERS_MAX, now)

    def look(self, up: Iterable[PeerId]) -> float:
        """Start what is due for those of `up` that are relayed; when to look again."""
        now, soonest, before = self._now(), math.inf, self._relayed
        self._relayed = {}
        for peer in up:
            connection = self._host.connection(peer)
            if connection is not None and connection.tunnelled:
                if (relayed := before.get(peer)) is None:
                    backoff = Backoff(AGAIN_S_MIN, AGAIN_S_MAX, self._rng)
                    relayed = _Relayed(backoff, now + backoff.pause_s())
                self._relayed[peer] = relayed
        busy = sum(relayed.busy for relayed in self._relayed.values())
        for peer, relayed in self._relayed.items():
            if relayed.busy:
                continue
            if relayed.due > now:
                soonest = min(soonest, relayed.due)
            elif busy < TRIES_MAX:
                relayed.busy = self._spawn(self._try(peer, relayed), f"direct {peer.short}")
                busy += relayed.busy
        return soonest

    def again(self, *peers: PeerId) -> None:
        """All of `peers`, or everybody, may be where they can be reached now."""
        for peer in peers or tuple(self._relayed):
            if (relayed := self._relayed.get(peer)) is not None:
                relayed.backoff.reset()
                relayed.due = self._now()

    async def _try(self, peer: PeerId, relayed: _Relayed) -> None:
        """Punch, if that is this end's part, and dial."""
        try:
            if not self._rates.take(peer):
                return
            connection = self._host.connection(peer)
            if connection is not None and connection.tunnelled and self._host.peer_id < peer:
                try:
                    await self._punching.punch(connection)
                except WetwareError as exc:
                    log.debug("peer.not_punched", peer=peer, why=exc)
            by_host: dict[str, list[Multiaddr]] = {}
            for addr in self._addrs(peer):
                if addr.relay is None:
                    by_host.setdefault(addr.host, []).append(addr)
            addrs = [addr for same in by_host.values() for addr in same[:PER_HOST_MAX]]
            await self._host.dial(addrs, peer=peer, timeout_s=DIAL_S, direct=True)
            log.info("peer.direct", peer=peer)
        except WetwareError as exc:
            log.debug("peer.not_direct", peer=peer, why=exc)
        finally:
            relayed.due = self._now() + relayed.backoff.pause_s()
            relayed.busy = False
            self._wake()
