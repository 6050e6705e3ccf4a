"""Which members a node keeps connections to, and how it gets them: dials, back-off, discovery.

A small cluster is a full mesh; in a large one each node keeps its neighbours on a ring of hashed
peer IDs, the same ones from both ends, and dials the others when it has something to say to them.
A member that is not reached within half a second is reached through others, which carry the bytes;
then again and again a direct connection is tried, and what was begun over the relay moves there.
Members that are lost, and those remembered from before a restart, are tried for as long as they are
remembered: so a partition heals, and a node that comes back needs no bootstrap address. Whoever
answers has to be introduced (see `wetware.overlay.admission`) before it counts as connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from wetware.base.backoff import Backoff
from wetware.base.bounds import Rates, Recent, TokenBucket
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.errors import AdmissionRefused, DialError, OverlayError, WetwareError
from wetware.overlay.membership.direct import Direct
from wetware.overlay.peers import PeerDown, PeerUp
from wetware.overlay.punching import Punching

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.identity import PeerId
    from wetware.overlay.admission.service import Introductions
    from wetware.overlay.link import Connection, LinkHost
    from wetware.overlay.membership.config import MembershipConfig
    from wetware.overlay.membership.peers import PeerStore

log = get_logger("membership.reach")

CARRIERS_MAX = 3
"""Members asked to carry a connection, beside those that the peer itself names."""
FAILED_S, FAILED_MAX = 600.0, 4096
"""How long a relay comes last for a peer after a connection through it to that one fell silent or
was cut, and of how many pairs that is known: a near one that holds or cuts what it carries would be
taken again and again. For that peer alone, for it may as well have been the peer that went."""
RELAYS_KEPT, RELAYS_AGAIN_S = 3, 10.0
"""Relays that a node of a large cluster stays connected to, and how often it looks for others."""
MOVES_PER_S, MOVES_BURST, MOVES_PEERS_MAX = 1 / 60, 4, 4096
"""How often a member is tried at once for it names new addresses: they may be somebody else's. A
node that starts names its relays after its own."""
PLAN_S_MIN = 0.02
"""Between two plans: a whole cluster may become known within a turn of the loop."""
_FAILED = ("overlay.keepalive", "overlay.carrier")
_TEXT_LOGGED = 120


@dataclass(frozen=True, slots=True)
class ReachLimits:
    """What bounds the search for peers, beside the configuration.

    Times are seconds, the rest are counts.

    Attributes:
        on_demand_max: Connections that this node dialled beyond those of the plan and that stay
            open: what is used again is not dialled again. Beyond it the ones with least traffic are
            closed.
        second_s: Head start of the smaller peer ID of a pair, so that not both dial; longer where
            dials take long, up to `second_s_max`.
        second_s_max: The longest head start.
        patience_s: How much of that head start a patient caller waits for: longer than a dial takes
            on most links, and shorter than a probe takes to fail.
        stable_s: A connection that held so long resets the back-off; one that ends at once does
            not, or two nodes that refuse each other would knock in step.
        dial_s: For a connection to a member.
        introduce_s: For the peer to show that it is a member, and to accept that this node is one.
        lost_max: With more members lost the pauses grow with their number, so that the dials in a
            second stay the same.
        found_max: Peers that one source of addresses has found and that wait to be tried; the
            oldest make room.
        found_dials_max: Discovered addresses tried at once.
        found_per_s: Discovered addresses tried in a second, sustained: whoever can announce
            addresses must not make this node dial the world.
        found_burst: How many at once above that rate.
        eager_s: After the network has changed, whoever is lost is dialled at once for so long.
        strangers_max: Discovered peers that were no members, remembered for `stranger_s`.
        bootstraps_max: Bootstrap addresses.
    """

    on_demand_max: int = 128
    second_s: float = 0.5
    second_s_max: float = 5.0
    patience_s: float = 0.2
    stable_s: float = 10.0
    dial_s: float = 10.0
    introduce_s: float = 10.0
    lost_max: int = 32
    found_max: int = 256
    found_dials_max: int = 4
    found_per_s: float = 2.0
    found_burst: int = 32
    eager_s: float = 5.0
    strangers_max: int = 4096
    bootstraps_max: int = 64


def relays_of(own: PeerId, public: Iterable[PeerId], count: int) -> frozenset[PeerId]:
    """The `count` of some peers that `own` keeps as its relays: each peer has its own, evenly.

    Source: Thaler, Ravishankar, "Using name-based mappings to increase hit rates" (1998):
    rendezvous hashing.
    """
    return frozenset(
        heapq.nlargest(
            count, public, key=lambda peer: hashlib.sha256(f"{own} {peer}".encode()).digest()
        )
    )


def is_public(addrs: Iterable[Multiaddr]) -> bool:
    """Whether who names these can be dialled from the internet, as far as their texts tell.

    At an IPv6 address a router at home lets nobody in, though it is global.
    """
    return any(addr.is_global and addr.kind == "ip4" for addr in addrs)


def is_name(addr: Multiaddr) -> bool:
    """Whether it has to be looked up: whoever names itself so is most likely on the internet."""
    return addr.kind.startswith("dns") and not addr.is_loopback and addr.relay is None


def ring_neighbours(own: PeerId, peers: Iterable[PeerId], count: int) -> frozenset[PeerId]:
    """The `count` peers next to `own` on the ring of hashed peer IDs, half on either side.

    With the same view both ends choose each other: who is among my next ones has me among its
    previous ones.
    """
    others = [peer for peer in peers if peer != own]
    if len(others) <= count:
        return frozenset(others)
    ring = sorted((*others, own), key=_position)
    at, half = ring.index(own), max(1, count // 2)
    return frozenset(ring[(at + step) % len(ring)] for step in range(-half, half + 1) if step) - {
        own
    }


@lru_cache(maxsize=8192)
def _position(peer: PeerId) -> bytes:
    return hashlib.sha256(b"wetware-ring:1\n" + peer.encode()).digest()


@dataclass(slots=True, eq=False)
class _Target:
    """One member that a connection is wanted to."""

    due: float
    others_until: float  # until then it is the peer's turn to dial
    backoff: Backoff
    told: bool = False  # whether the log has that it cannot be reached
    up_at: float | None = None


@dataclass(slots=True, eq=False)
class _Bootstrap:
    """One bootstrap address."""

    addr: Multiaddr
    peer: PeerId | None
    backoff: Backoff
    due: float = 0.0
    told: bool = False
    busy: bool = False


class Reach:
    """Keeps the connections of a node to its cluster. `run` is all of its life.

    Args:
        host: The link.
        introductions: Says who is connected and admitted.
        store: Addresses; learns which ones worked.
        members: The others' states: "alive", "suspect", "dead" or "left"; asked after `changed`.
        config: How many connections are kept, and when lost ones are tried again.
        clock: The node's clock.
        rng: For jitter.

    Attributes:
        limits: See ReachLimits.
        started: Set once `run` serves `connect`.
        hidden: Whether nobody on the internet can dial this node: then it keeps relays.
    """

    def __init__(
        self,
        host: LinkHost,
        introductions: Introductions,
        store: PeerStore,
        *,
        members: Callable[[], Mapping[PeerId, str]],
        config: MembershipConfig,
        clock: Clock,
        limits: ReachLimits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._config, self.limits = config, limits or ReachLimits()
        self._host, self._introductions, self._store = host, introductions, store
        self._members, self.now = members, clock.monotonic
        self.rng = rng or random.SystemRandom()
        self._up: set[PeerId] = set()
        self._states: Mapping[PeerId, str] = {}
        self._wanted: frozenset[PeerId] = frozenset()
        self._lost: frozenset[PeerId] = frozenset()
        self._took_s = 0.0  # what a dial takes, averaged
        self._targets: dict[PeerId, _Target] = {}
        self._bootstraps: list[_Bootstrap] = []
        self._attempts: dict[PeerId, asyncio.Future[Connection]] = {}
        # By source, and all that is bounded is so for each: whoever floods one, e.g. by multicast,
        # must not keep this node from what another finds. They take turns.
        self._found: OrderedDict[str, OrderedDict[PeerId, Multiaddr]] = OrderedDict()
        self._found_busy: set[tuple[str, PeerId]] = set()
        self._punching = Punching(host, self.observers, self.now)
        self._direct = Direct(
            host,
            store.addrs,
            self._carriers_to,
            self._punching,
            now=self.now,
            rng=self.rng,
            spawn=self.spawn,
            wake=lambda: self._wake.set(),
        )
        self._found_rate = TokenBucket(
            self.limits.found_per_s, self.limits.found_burst, clock.monotonic
        )
        self._strangers: Recent[tuple[str, PeerId], None] = Recent(
            config.stranger_s, self.limits.strangers_max, clock.monotonic
        )
        self._moves = Rates(MOVES_PER_S, MOVES_BURST, MOVES_PEERS_MAX, self.now)
        self._failed_relays = self._no_failed_relays()
        self._traffic: dict[Connection, int] = {}
        self._dirty = True
        self._plan_at = self._prune_at = self._eager_until = 0.0
        self.hidden = False
        self._relays: frozenset[PeerId] = frozenset()
        self._relays_at = 0.0
        self.started = asyncio.Event()
        self._wake = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Keep the connections until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            end_watch = self._introductions.watch(self._peer_changed)
            end_links = self._host.watch(lambda _: None, self._link_down)
            end_punching = self._punching.start()
            self.started.set()
            try:
                while True:
                    self._wake.clear()
                    wait_s = max(0.0, self._step() - self.now())
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait_s):
                            await self._wake.wait()
            finally:
                end_watch()
                end_links()
                end_punching()
                self._tasks = None
                for attempt in self._attempts.values():
                    if not attempt.done():
                        attempt.set_exception(DialError("this node is stopping"))
                        attempt.exception()  # nobody may be waiting

    # --- what others say --------------------------------------------------------------------------

    def changed(self) -> None:
        self._dirty = True
        self._wake.set()

    def moved(self, peer: PeerId) -> None:
        """`peer` names new addresses, or has restarted: worth a try now."""
        if self._moves.take(peer):
            target = self._targets.get(peer)
            if target is not None and peer not in self._up:
                target.backoff.reset()
                target.due = min(target.due, self.now() + self._head_start(peer))
            self._direct.again(peer)
        self.changed()

    def network_changed(self) -> None:
        """This machine is in another network, or back in one: everybody is worth a try now."""
        self._eager_until = self.now() + self.limits.eager_s
        everybody: list[_Target | _Bootstrap] = [*self._targets.values(), *self._bootstraps]
        for one in everybody:
            one.backoff.reset()
            one.due = self.now()
        self._failed_relays = self._no_failed_relays()
        self._direct.forget()
        self._wake.set()

    def forget(self, peer: PeerId) -> None:
        """`peer` is no member any more: it is not tried again."""
        for found in self._found.values():
            found.pop(peer, None)
        self.changed()

    def wants(self, peer: PeerId) -> bool:
        """Whether a connection to `peer` is to be kept."""
        return peer in self._wanted

    def bootstrap(self, addrs: Iterable[Multiaddr]) -> None:
        """Addresses that lead into the cluster; tried until the member behind one is known.

        More than `bootstraps_max` are not kept.
        """
        for addr in addrs:
            known = any(entry.addr == addr for entry in self._bootstraps)
            if not known and len(self._bootstraps) < self.limits.bootstraps_max:
                self._bootstraps.append(_Bootstrap(addr, addr.peer, self._backoff()))
        self._wake.set()

    def found(self, addr: str | Multiaddr, source: str) -> None:
        """A discovery found this address; it is tried if it can be of use. Never raises.

        `source` is its name, of which there are few.
        """
        try:
            if isinstance(addr, str):
                addr = Multiaddr.parse(addr)
        except WetwareError as exc:
            log.debug("peer.bad_address", addr=str(addr)[:_TEXT_LOGGED], source=source, why=exc)
            return
        peer = addr.peer
        if peer is None or peer == self._host.peer_id or peer in self._up:
            return
        if (target := self._targets.get(peer)) is not None:
            if self._store.hinted(peer, addr, source):
                # Worth a try now, but no more often than any other address.
                target.due = min(target.due, self.now() + self._config.redial_s_min)
                self._wake.set()
            return
        if (source, peer) in self._strangers:
            return
        found = self._found.setdefault(source, OrderedDict())
        found[peer] = addr
        if len(found) > self.limits.found_max:
            found.popitem(last=False)
        self._wake.set()

    def _peer_changed(self, change: PeerUp | PeerDown) -> None:
        peer, now = change.peer, self.now()
        target = self._targets.get(peer)
        if isinstance(change, PeerUp):
            self._up.add(peer)
            for source, found in self._found.items():
                self._strangers.discard((source, peer))
                found.pop(peer, None)
            if target is not None:
                target.up_at, target.told = now, False
            connection = self._host.connection(peer)
            if connection is not None:
                if connection.initiator and not connection.tunnelled:
                    self._store.worked(peer, connection.remote)
                attempt = self._attempts.get(peer)
                if attempt is not None and not attempt.done():
                    attempt.set_result(connection)  # it dialled first
        else:
            self._up.discard(peer)
            if target is not None:
                if target.up_at is not None and now - target.up_at >= self.limits.stable_s:
                    target.backoff.reset()
                target.up_at = None
                target.due = now
                if now >= self._eager_until:
                    target.due += self._pause_s(target) + self._head_start(peer)
        self._wake.set()

    def _no_failed_relays(self) -> Recent[tuple[PeerId | None, PeerId], None]:
        return Recent(FAILED_S, FAILED_MAX, self.now)

    def _link_down(self, connection: Connection) -> None:
        relay, error = connection.remote.relay, connection.error
        if self.now() < self._eager_until:  # this node has moved: that ends what it had before
            return
        if relay is not None and getattr(error, "code", "") in _FAILED:
            self._failed_relays.put((relay, connection.peer), None)

    # --- connections on demand --------------------------------------------------------------------

    def connected(self, peer: PeerId) -> Connection | None:
        """The connection to a member that is introduced, or None."""
        return self._host.connection(peer) if peer in self._up else None

    async def connect(
        self, peer: PeerId, *, timeout_s: float | None = None, patient: bool = False
    ) -> Connection:
        """A connection to the member `peer`, introduced: the one there is, or a new one.

        Callers share an attempt. `patient` leaves a new member, for `patience_s`, to dial itself if
        it is its turn. Raises DialError.
        """
        connection = self.connected(peer)
        if connection is not None:
            return connection
        delay_s = 0.0
        if patient and (target := self._targets.get(peer)) is not None:
            delay_s = min(self.limits.patience_s, target.others_until - self.now())
        attempt = self._attempts.get(peer) or self._start(peer, delay_s)
        limits = self.limits
        try:
            async with asyncio.timeout(timeout_s or limits.dial_s + limits.introduce_s):
                return await asyncio.shield(attempt)
        except TimeoutError:
            raise DialError(f"cannot reach {peer}: no answer in time") from None

    def spawn(self, coro: Coroutine[Any, Any, None], name: str) -> bool:
        """Begin a task that ends with `run`; whether it has begun."""
        with contextlib.suppress(RuntimeError):  # the group is about to end
            if self._tasks is not None:
                self._tasks.create_task(coro, name=name)
                return True
        coro.close()
        return False

    def _start(self, peer: PeerId, delay_s: float = 0.0) -> asyncio.Future[Connection]:
        attempt: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._attempts[peer] = attempt
        if not self.spawn(self._attempt(peer, attempt, delay_s), f"dial {peer.short}"):
            del self._attempts[peer]
            attempt.set_exception(DialError("this node is stopping"))
        return attempt

    async def _attempt(
        self, peer: PeerId, attempt: asyncio.Future[Connection], delay_s: float
    ) -> None:
        try:
            if delay_s > 0:
                await asyncio.wait([attempt], timeout=delay_s)  # set when the peer is up
            connection = self.connected(peer) or await self._dial(self._addrs(peer), peer)
        except WetwareError as exc:
            if not attempt.done():
                self._failed(peer, exc)
                attempt.set_exception(exc)
        except BaseException as exc:
            if not attempt.done():
                attempt.set_exception(DialError(f"the dial of {peer} was given up"))
            if not isinstance(exc, Exception):
                raise
            log.exception("dial.defect", peer=peer)
        else:
            if not attempt.done():
                attempt.set_result(connection)
        finally:
            attempt.exception()  # looked at, even if nobody waits
            if self._attempts.get(peer) is attempt:
                del self._attempts[peer]
            self._wake.set()

    def _failed(self, peer: PeerId, exc: WetwareError) -> None:
        target = self._targets.get(peer)
        if target is None:
            log.debug("peer.unreachable", peer=peer, why=exc)
            return
        pause_s = self._pause_s(target)
        target.due = self.now() + pause_s
        if not target.told:
            target.told = True
            log.info("peer.unreachable", peer=peer, again_s=round(pause_s, 1), why=exc)

    def carriers(self) -> dict[PeerId, Connection]:
        """The members that this node is connected to directly; the shortest round trip first."""
        found = {
            peer: connection
            for peer in self._up
            if (connection := self._host.connection(peer)) is not None and not connection.tunnelled
        }
        return dict(sorted(found.items(), key=lambda item: item[1].rtt_s))

    def _carriers_to(self, peer: PeerId) -> list[Connection]:
        """Those that may carry a connection to `peer`, without those of FAILED_S."""
        return [
            connection
            for other, connection in self.carriers().items()
            if other != peer and (other, peer) not in self._failed_relays
        ]

    def observers(self) -> list[Connection]:
        """Who can tell how this node is seen: who was dialled at a public address."""
        dialled = (connection for connection in self.carriers().values() if connection.initiator)
        return [connection for connection in dialled if connection.remote.is_global]

    async def seen(self) -> list[Multiaddr]:
        """How two of them, or fewer, see one fresh port of this node; see `Punching.seen`."""
        return await self._punching.seen()

    def _addrs(self, peer: PeerId) -> list[Multiaddr]:
        """Where to try to reach a member: directly, and through others."""
        known = self._store.addrs(peer)
        direct = [addr for addr in known if addr.relay is None]
        named = [addr for addr in known if addr.relay is not None]
        carriers = sorted(
            (connection for other, connection in self.carriers().items() if other != peer),
            key=lambda carrier: (carrier.peer, peer) in self._failed_relays,
        )
        through = [carrier.remote.through(peer) for carrier in carriers[:CARRIERS_MAX]]
        by_relay: dict[object, Multiaddr] = {}
        for addr in sorted(
            (*named, *through),
            key=lambda addr: (
                (addr.relay, peer) in self._failed_relays,
                addr.relay not in self._up,
            ),
        ):
            # Who is connected is asked once; another may be there at one of its addresses only.
            by_relay.setdefault(addr.relay if addr.relay in self._up else addr, addr)
        return [*direct, *by_relay.values()]

    async def _dial(self, addrs: Sequence[Multiaddr], peer: PeerId | None) -> Connection:
        """Dial and wait until the peer is introduced; a connection in vain is closed again."""
        before, started = set(self._host.connections()), self.now()
        connection = await self._host.dial(addrs, peer=peer, timeout_s=self.limits.dial_s)
        try:
            await self._introduced(connection)
        except WetwareError as exc:
            if connection.initiator and connection not in before:
                connection.close()
            if isinstance(exc, AdmissionRefused):
                raise DialError(
                    f"{connection.peer} answered, but: {exc.message}",
                    hint=exc.hint,
                    code="overlay.not_member",
                ) from exc
            raise
        self._took_s += 0.2 * (self.now() - started - self._took_s)
        return self._host.connection(connection.peer) or connection

    async def _introduced(self, connection: Connection) -> None:
        """Wait until the peer is a connected member.

        Raises AdmissionRefused where one end refuses the other, OverlayError where the exchange
        fails or takes too long.
        """
        peer = connection.peer
        try:
            async with asyncio.timeout(self.limits.introduce_s):
                while peer not in self._up:
                    try:
                        await self._introductions.introduced(connection)
                    except OverlayError:
                        # Of two connections to one peer one may end; the other is as good.
                        other = self._host.connection(peer)
                        if other is None or other is connection:
                            raise
                        connection = other
                    else:
                        return
        except TimeoutError:
            raise DialError(f"{peer} did not introduce itself in time") from None

    # --- the plan ---------------------------------------------------------------------------------

    def _backoff(self) -> Backoff:
        return Backoff(self._config.redial_s_min, self._config.redial_s_max, self.rng)

    def _pause_s(self, target: _Target) -> float:
        return target.backoff.pause_s(stretch=len(self._lost) / self.limits.lost_max)

    def _head_start(self, peer: PeerId) -> float:
        if self._host.peer_id < peer:
            return 0.0
        limits = self.limits
        return max(limits.second_s, min(limits.second_s_max, 4 * self._took_s))

    def _plan(self) -> None:
        """Work out whom to be connected to."""
        self._dirty = False
        own, members = self._host.peer_id, self._members()
        self._states = members
        live = [peer for peer in members if self._is_live(peer)]
        if len(live) < self._config.full_mesh_max:
            self._wanted = frozenset(live)
        else:
            self._wanted = ring_neighbours(own, live, self._config.neighbours)
            self._wanted |= self._keep_relays(live)
        # A member that left says itself when it is back.
        lost = {peer for peer, state in members.items() if state == "dead"}
        lost.update(peer for peer in self._store.peers() if peer not in members and peer != own)
        self._lost = frozenset(lost)
        now = self.now()
        for peer in self._targets.keys() - self._wanted - lost:
            del self._targets[peer]
        for peer in (*self._wanted, *lost):
            if peer not in self._targets:
                # Whoever is remembered from before a restart does not know that this node is back.
                due = now if peer in lost else now + self._head_start(peer)
                target = self._targets[peer] = _Target(due, due, self._backoff())
                if peer in self._up:
                    target.up_at = now

    def _keep_relays(self, live: Sequence[PeerId]) -> frozenset[PeerId]:
        """Members on the internet that a node which is not stays connected to."""
        few = len(self._relays) < RELAYS_KEPT
        if self.hidden and (few or not self._relays <= set(live)):
            now = self.now()
            if now >= self._relays_at:  # it looks at all addresses of all members
                self._relays_at = now + RELAYS_AGAIN_S
                public = (
                    peer
                    for peer in live
                    if is_public(addrs := self._store.addrs(peer)) or any(map(is_name, addrs))
                )
                self._relays = relays_of(self._host.peer_id, public, RELAYS_KEPT)
        return self._relays if self.hidden else frozenset()

    def _step(self) -> float:
        """Start what is due; returns when to look again."""
        now = self.now()
        soonest = now + self._config.redial_s_max
        if self._dirty:
            if now >= self._plan_at:
                self._plan_at = now + PLAN_S_MIN
                self._plan()
            else:
                soonest = self._plan_at
        if now >= self._prune_at:
            self._prune()
            self._prune_at = now + self._config.redial_s_max
        soonest = min(soonest, self._direct.look(self._up))
        waiting = sorted(
            (target.due, peer)
            for peer, target in self._targets.items()
            if self.connected(peer) is None and peer not in self._attempts
        )
        lost_dials = sum(peer in self._lost for peer in self._attempts)
        for due, peer in waiting:
            if due > now:
                soonest = min(soonest, due)
                break
            if len(self._attempts) >= self._config.dials_max:
                break  # the end of one wakes us
            if peer in self._lost:
                if lost_dials >= max(1, self._config.dials_max // 2):
                    continue  # whoever does not answer must not be in the way of the living
                lost_dials += 1
            if self._addrs(peer):
                self._start(peer)
            else:  # known by name only: gossip or a discovery may tell
                target = self._targets[peer]
                target.due = now + self._pause_s(target)
                soonest = min(soonest, target.due)
        for entry in self._bootstraps:
            if not entry.busy and self._needs(entry):
                if entry.due <= now:
                    entry.busy = self.spawn(self._enter(entry), f"bootstrap {entry.addr}")
                else:
                    soonest = min(soonest, entry.due)
        while len(self._found_busy) < self.limits.found_dials_max and any(self._found.values()):
            if not self._found_rate.take():
                soonest = min(soonest, now + 1.0 / self.limits.found_per_s)
                break
            source = next(source for source, found in self._found.items() if found)
            self._found.move_to_end(source)
            peer, addr = self._found[source].popitem(last=False)
            if (source, peer) not in self._found_busy:
                self._found_busy.add((source, peer))
                self.spawn(self._try(peer, addr, source), f"found {peer.short}")
        return soonest

    def _needs(self, entry: _Bootstrap) -> bool:
        """Whether a bootstrap address is worth a dial: not once the member behind it is known."""
        if entry.peer is None:
            return True
        if entry.peer in self._up or entry.peer == self._host.peer_id:
            return False
        return not self._up or not self._is_live(entry.peer)

    def _is_live(self, peer: PeerId) -> bool:
        return peer != self._host.peer_id and self._states.get(peer) in ("alive", "suspect")

    async def _enter(self, entry: _Bootstrap) -> None:
        try:
            connection = await self._dial((entry.addr,), entry.addr.peer)
        except WetwareError as exc:
            if exc.code == "overlay.dial_self":
                self._bootstraps.remove(entry)
                return
            pause_s = entry.backoff.pause_s()
            entry.due = self.now() + pause_s
            if not entry.told:
                entry.told = True
                log.warning("bootstrap.failed", addr=entry.addr, again_s=round(pause_s, 1), why=exc)
        else:
            entry.peer = connection.peer
            entry.due = self.now() + entry.backoff.pause_s()
            entry.backoff.reset()
            entry.told = False
        finally:
            entry.busy = False
            self._wake.set()

    async def _try(self, peer: PeerId, addr: Multiaddr, source: str) -> None:
        """Dial a discovered peer; one that is no member is left alone for a while."""
        try:
            await self._dial((addr,), peer)
            log.info("peer.found", peer=peer, source=source)
        except WetwareError as exc:
            log.debug("peer.not_found", peer=peer, source=source, why=exc)
            if peer not in self._states:  # also one that is not there: announcements are cheap
                self._strangers.put((source, peer), None)
        finally:
            self._found_busy.discard((source, peer))
            self._wake.set()

    def _prune(self) -> None:
        """Close the least used of the connections that were dialled on demand, beyond the limit."""
        mine = {
            connection: connection.bytes_in + connection.bytes_out
            for connection in self._host.connections()
            if connection.initiator and connection.peer in self._up - self._wanted
        }
        excess = len(mine) - self.limits.on_demand_max
        if excess > 0:
            by_use = sorted(mine, key=lambda conn: mine[conn] - self._traffic.get(conn, 0))
            for connection in by_use[:excess]:
                log.debug("peer.unused", peer=connection.peer)
                connection.close()
                del mine[connection]
        self._traffic = mine
