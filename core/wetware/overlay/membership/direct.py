"""Who is reached through a relay: again and again a direct way is tried, or a better relay."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware.base.backoff import Backoff
from wetware.base.bounds import Rates
from wetware.base.log import get_logger
from wetware.errors import WetwareError
from wetware.overlay.link.relaying import ask_to_carry

if TYPE_CHECKING:
    import random

    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import PeerId
    from wetware.overlay.link import Connection, LinkHost
    from wetware.overlay.punching import Punching

log = get_logger("membership.reach")

AGAIN_S_MIN, AGAIN_S_MAX = 1.0, 600.0
"""Pauses between tries."""
DIAL_S: Final = 5.0
TRIES_MAX: Final = 4
"""At once."""
PER_S, BURST, PEERS_MAX = 1 / 60, 12, 4096
"""Tries for one peer, however often it comes: enough for one that moves twice in a minute."""
HOST_BURST, HOSTS_MAX = 3, 16384
"""Of these, for one host that it names: that may be a victim's. They come back at the same pace."""
PER_HOST_MAX: Final = 2
"""Addresses of one host in a try, which may have many ports."""
BETTER_S: Final = 60.0
"""Between two looks for a better relay."""
BETTER_FACTOR, BETTER_GAIN_S = 1.5, 0.005
"""A round trip has to be so much shorter that moving is worth it: the factor, and at least so much,
as what is measured on a busy machine is a few milliseconds off."""
RELAYS_ASKED_MAX: Final = 3
"""In one look."""


@dataclass(slots=True, eq=False)
class _Relayed:
    backoff: Backoff
    due: float
    better_due: float
    busy: bool = False


class Direct:
    """Of one node.

    Args:
        host: The link.
        addrs: Where a member may be dialled.
        carriers: Connections to who may be a relay to a peer; the shortest round trip first.
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
        carriers: Callable[[PeerId], Iterable[Connection]],
        punching: Punching,
        *,
        now: Callable[[], float],
        rng: random.Random,
        spawn: Callable[[Coroutine[Any, Any, None], str], bool],
        wake: Callable[[], None],
    ) -> None:
        self._host, self._addrs, self._carriers = host, addrs, carriers
        self._punching = punching
        self._now, self._rng, self._spawn, self._wake = now, rng, spawn, wake
        self._relayed: dict[PeerId, _Relayed] = {}
        self.forget()

    def forget(self) -> None:
        """This node is in another network: what was tried before does not count."""
        self._rates = Rates(PER_S, BURST, PEERS_MAX, self._now)
        self._host_rates = Rates(PER_S, HOST_BURST, HOSTS_MAX, self._now)
        self._punching.forget()
        self.again()

    def look(self, up: Iterable[PeerId]) -> float:
        """Start what is due for those of `up` that are relayed; when to look again."""
        now, soonest, before = self._now(), math.inf, self._relayed
        self._relayed = {}
        for peer in up:
            connection = self._host.connection(peer)
            if connection is not None and connection.tunnelled:
                if (relayed := before.get(peer)) is None:
                    backoff = Backoff(AGAIN_S_MIN, AGAIN_S_MAX, self._rng)
                    # The first look at any time in the pause, so that not all pairs look at once.
                    better_due = now + BETTER_S * self._rng.random()
                    relayed = _Relayed(backoff, now + backoff.pause_s(), better_due)
                self._relayed[peer] = relayed
        busy = sum(relayed.busy for relayed in self._relayed.values())
        for peer, relayed in self._relayed.items():
            if relayed.busy:
                continue
            if (due := min(relayed.due, relayed.better_due)) > now:
                soonest = min(soonest, due)
            elif busy < TRIES_MAX:
                work = self._try if relayed.due <= now else self._better
                relayed.busy = self._spawn(work(peer, relayed), f"direct {peer.short}")
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
            addrs = [
                addr
                for host, same in by_host.items()
                if self._host_rates.take((peer, host))
                for addr in same[:PER_HOST_MAX]
            ]
            await self._host.dial(addrs, peer=peer, timeout_s=DIAL_S, direct=True)
            log.info("peer.direct", peer=peer)
        except WetwareError as exc:
            log.debug("peer.not_direct", peer=peer, why=exc)
        finally:
            relayed.due = self._now() + relayed.backoff.pause_s()
            relayed.busy = False
            self._wake()

    async def _better(self, peer: PeerId, relayed: _Relayed) -> None:
        """Move to another relay if the round trip over it is much shorter.

        The smaller peer ID does it, so that both ends take the same one: the newest that it made.
        """
        try:
            connection = self._host.connection(peer)
            if connection is None or not connection.tunnelled or peer < self._host.peer_id:
                return
            present = connection.remote.relay
            carriers = [way for way in self._carriers(peer) if way.peer != present]
            for carrier in carriers[:RELAYS_ASKED_MAX]:
                # A relay is at most as near as what is behind it.
                if not _much_shorter(carrier.rtt_s, connection.rtt_s):
                    return
                try:
                    async with asyncio.timeout(DIAL_S):
                        if await self._moved(peer, carrier, connection.rtt_s):
                            return
                except (WetwareError, TimeoutError) as exc:
                    log.debug("relay.not_better", peer=peer, relay=carrier.peer, why=exc)
        finally:
            relayed.better_due = self._now() + BETTER_S
            relayed.busy = False
            self._wake()

    async def _moved(self, peer: PeerId, carrier: Connection, rtt_s: float) -> bool:
        """Connect through `carrier`, where that is much shorter than `rtt_s`."""
        started = self._now()
        # Two round trips to the relay, and with the second one to the peer.
        pipe = await ask_to_carry(carrier, peer)
        took_s = self._now() - started - carrier.rtt_s
        if not _much_shorter(took_s, rtt_s):
            pipe.reset()
            return False
        await self._host.connect_pipe(pipe, peer, carrier.remote)
        log.info("relay.better", peer=peer, relay=carrier.peer, rtt_s=took_s, before_s=rtt_s)
        return True


def _much_shorter(rtt_s: float, than_s: float) -> bool:
    return rtt_s * BETTER_FACTOR + BETTER_GAIN_S < than_s
