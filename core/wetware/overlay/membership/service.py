"""The membership of a running node: SWIM on the link's streams, and what others ask about members.

`Membership` joins the parts: `swim` decides and knows no IO, `reach` keeps the connections, `peers`
remembers them, `admission` says who is a member at all. Each side speaks on the stream that
it opened: frames of four bytes of length and a CBOR map. A peer that breaks the framing loses its
stream, and after some repetitions its turn for a while; one that does not read loses the oldest of
what waits for it; nobody waits for either.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wetware.base import cbor
from wetware.base.access import Access
from wetware.base.backoff import Backoff
from wetware.base.bounds import TokenBucket
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.errors import (
    DialError,
    InvalidArgument,
    LimitExceeded,
    OverlayError,
    PeerMismatch,
    StreamReset,
    WetwareError,
)
from wetware.identity import Key
from wetware.overlay.admission.decision import Admitted, Removed
from wetware.overlay.frames import field, read_frame, write_frame
from wetware.overlay.link import LinkHost, LinkLimits, Stream
from wetware.overlay.membership.known import Change, ChangeKind, Known, State
from wetware.overlay.membership.peers import (
    INCARNATION_FILE,
    PEERS_FILE,
    IncarnationFile,
    PeerStore,
)
from wetware.overlay.membership.reach import Reach, ReachLimits
from wetware.overlay.membership.record import RECORD_BYTES_MAX, Malformed, Record
from wetware.overlay.membership.swim import Swim, middle
from wetware.overlay.peers import PeerDown, PeerUp

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.identity import PeerId
    from wetware.overlay.admission.decision import Admission
    from wetware.overlay.admission.service import Introductions
    from wetware.overlay.link import Connection
    from wetware.overlay.membership.config import MembershipConfig

log = get_logger("membership")

PROTOCOL = "/wetware/membership/1.0.0"
DIAL_BACK_PROTOCOL = "/wetware/dial-back/1.0.0"
PROCESS_PROTOCOL = "/wetware/process/1.0.0"
"""{other} → {record}: what the process at the other end signs of itself now. `other` is the record
that another process with its key has just signed, or empty."""

QUEUE_FRAMES_MAX = 512
"""Frames that wait for one peer; the bytes are bounded by `queue_bytes_max` of the config."""
FRAMES_PER_S, FRAMES_BURST = 200.0, 2000
"""Frames taken from one peer. An honest one sends a handful in a second, and more when it joins;
who sends faster is read more slowly, and its own window stops it."""
BYTES_PER_S, BYTES_BURST = 2.0 * (1 << 20), 8 << 20
"""The same in bytes: a thousand records are half a MiB."""
FRAME_S_MAX = 10.0
"""From the length of a frame to its last byte."""
OPEN_S_MAX = 5.0
"""For a stream to be opened on a live connection."""
STALL_S_MAX = 10.0
"""A peer that takes nothing for so long loses its stream, and starts anew when it reads again."""
REOPEN_S_MIN, REOPEN_S_MAX = 0.05, 10.0
PENALTY_FREE = 2
"""Broken frames that are forgiven; each one more doubles the time for which a peer is not heard."""
PENALTY_S_MIN, PENALTY_S_MAX = 1.0, 300.0
PENALTIES_MAX = 4096
HOUSEKEEP_S = 1.0
SAVE_S = 5.0
DESCRIBE_S = 2.0
REJUDGE_S = 30.0
"""How often all certificates are looked at again; sooner when a tombstone came."""
LINK_IDLE_S = 60.0
"""A stream to a peer that is not kept connected ends after so long without a frame."""
ADMITS_MAX = 1024
"""New members whose admission the backend still has to confirm; a later record asks again."""
REFUSED_S = 30.0
"""Records of a peer whose admission was refused are not believed again for so long."""
TWIN_S = 60.0
"""How long a second process with one key is told of after it was last heard of."""
COMPARE_S = 10.0
"""Between two looks whether the same process is at the ends of a peer's connections."""
TWINS_MAX = 1024
ECHOES_MAX = 256
DIAL_BACK_ADDRS_MAX = 8
DIAL_BACK_S_MAX = 3.0
"""For one address."""
DIAL_BACKS_MAX = 4
"""Requests served at once, all peers together."""
DIAL_BACK_PER_S, DIAL_BACK_BURST = 0.1, 3
"""Requests of one peer: `ww doctor` needs one."""
SMALL_FRAME_BYTES_MAX = RECORD_BYTES_MAX + 256
"""Of what is asked and answered on a stream of its own."""

# The service's own frames: recognised by their first bytes, so that others are decoded only once.
_ECHO, _ECHOED = b"\xa1\x64echo", b"\xa1\x66echoed"


@dataclass(frozen=True, slots=True)
class DialBack:
    """How one address looks from another member.

    Attributes:
        addr: The address.
        reached: Whether this node answered there, authenticated.
        why: "ok", "refused", "timeout", "other peer" or "failed".
        took_s: How long it took.
    """

    addr: Multiaddr
    reached: bool
    why: str
    took_s: float


class _Outlet:
    """What goes to one peer: a bounded queue, and the stream that this side opened."""

    __slots__ = (
        "backoff",
        "bytes",
        "frames",
        "head",
        "opened",
        "opening",
        "peer",
        "retry_at",
        "stalled_at",
        "stream",
        "used_at",
    )

    def __init__(self, peer: PeerId, backoff: Backoff, now: float) -> None:
        self.peer, self.backoff = peer, backoff
        self.frames: deque[bytes] = deque()  # whole ones, with their lengths
        self.bytes = 0
        self.head = b""  # the rest of a frame of which a part was sent
        self.stream: Stream | None = None
        self.opening = False
        self.opened: set[asyncio.Future[None]] = set()
        self.retry_at = 0.0
        self.stalled_at: float | None = None
        self.used_at = now

    def clear(self) -> int:
        dropped = len(self.frames)
        self.frames.clear()
        self.bytes, self.head = 0, b""
        return dropped

    def settle(self, exc: WetwareError | None) -> None:
        """Tell those who wait for the stream."""
        for waiter in self.opened:
            if waiter.done():
                continue
            if exc is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(exc)
                waiter.exception()
        self.opened.clear()


class _Penalties:
    """Who broke the framing so often that it is not heard for a while."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._peers: OrderedDict[PeerId, tuple[int, float]] = OrderedDict()  # count, until

    def add(self, peer: PeerId) -> float:
        """One more broken frame; returns for how long the peer is not heard."""
        count, until = self._peers.pop(peer, (0, 0.0))
        if until and self._now() - until > PENALTY_S_MAX:
            count = 0  # it has behaved for a while
        count += 1
        over = count - PENALTY_FREE
        penalty_s = min(PENALTY_S_MAX, PENALTY_S_MIN * 2.0 ** min(over - 1, 32)) if over > 0 else 0
        self._peers[peer] = (count, self._now() + penalty_s)
        while len(self._peers) > PENALTIES_MAX:
            self._peers.popitem(last=False)
        return penalty_s

    def muted(self, peer: PeerId) -> bool:
        """Whether the peer is not heard now."""
        return peer in self._peers and self._now() < self._peers[peer][1]


class Membership:
    """Who is in the cluster, as this node sees it. `run` is all of its life.

    Args:
        host: The link.
        key: The node's key; signs its record.
        admission: Decides who is a member.
        introductions: Says who is connected and admitted, both ways.
        config: Timings and bounds.
        clock: The node's clock.
        describe: What the node's record says, asked every `DESCRIBE_S`: addrs, host, name, labels,
            version, services, and if it knows better than the system load and memory_bytes.
        data_dir: Where the peer store and the incarnation are kept.
        reach_limits: For tests; from `config` if None.
        rng: Chooses whom to probe, and jitter.
    """

    def __init__(
        self,
        host: LinkHost,
        key: Key,
        admission: Admission,
        introductions: Introductions,
        *,
        config: MembershipConfig,
        clock: Clock,
        describe: Callable[[], Mapping[str, Any]],
        data_dir: Path,
        reach_limits: ReachLimits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._host, self._key, self._admission = host, key, admission
        self._introductions, self._config, self._clock = introductions, config, clock
        self._describe, self._now = describe, clock.monotonic
        self._rng = rng or random.SystemRandom()
        self.counters: Counter[str] = Counter()
        self._incarnations = IncarnationFile(data_dir / INCARNATION_FILE)
        self._store = PeerStore(
            data_dir / PEERS_FILE, unix_ms=self._unix_ms, peers_max=config.peers_max
        )
        self._store.load()
        self._since = self._now()
        self._incarnation = self._incarnations.begin(self._unix_ms())
        self._instance = secrets.token_bytes(8)
        self._described: Mapping[str, Any] = {}
        self._bad_description = False
        self.swim = self._begin()
        self.reach = Reach(
            host,
            introductions,
            self._store,
            members=self._states,
            clock=clock,
            limits=reach_limits
            or ReachLimits(
                full_mesh_max=config.full_mesh_max,
                neighbours=config.neighbours,
                redial_s_min=config.redial_s_min,
                redial_s_max=config.redial_s_max,
                stranger_s=config.stranger_s,
                dials_max=config.dials_max,
            ),
            rng=self._rng,
        )
        self._watchers: list[Callable[[Change], None]] = []
        self._outlets: dict[PeerId, _Outlet] = {}
        self._inbound: dict[PeerId, Stream] = {}
        self._paces: dict[PeerId, tuple[TokenBucket, TokenBucket]] = {}
        self._penalties = _Penalties(self._now)
        self._echoes: dict[int, tuple[PeerId, asyncio.Future[None]]] = {}
        self._echo_ids = itertools.count(secrets.randbits(32))
        self._admits: OrderedDict[PeerId, bytes] = OrderedDict()
        self._admit_wake = asyncio.Event()
        self._refused: OrderedDict[PeerId, float] = OrderedDict()  # until
        self._dial_backs: OrderedDict[PeerId, TokenBucket] = OrderedDict()
        self._dial_backs_running = 0
        self._twins: OrderedDict[PeerId, tuple[Record, float]] = OrderedDict()  # seen when
        self._compared: OrderedDict[PeerId, float] = OrderedDict()
        self._rejudge_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._tasks: asyncio.TaskGroup | None = None
        self._left = False
        self._emptied = asyncio.Event()  # some outlet has nothing to send any more

    def _begin(self) -> Swim:
        """Swim with nobody else in it, and the node's record as it is now."""
        return Swim(
            self._sign(self._fields()),
            config=self._config,
            sign=partial(Record.sign, self._key),
            send=self._send,
            accept=self._accept,
            facts=self._admission.facts,
            adopt=self._admission.adopt,
            now=self._now,
            unix_ms=self._unix_ms,
            rng=self._rng,
            on_change=self._changed,
            on_old=self._ask_author,
        )

    def _sign(self, fields: Mapping[str, Any]) -> Record:
        return Record.sign(
            self._key,
            incarnation=self._incarnation,
            instance=self._instance,
            issued_ms=self._unix_ms(),
            **fields,
        )

    def _unix_ms(self) -> int:
        return int(self._clock.time() * 1000)

    # --- life -------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> None:
        """Take part in the cluster until cancelled; then say goodbye, within `leave_s`."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._close)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            self._tasks = tasks
            # Anew: what the node says first is complete, wherever it was made.
            self.swim = self._begin()
            for protocol, handler in (
                (PROTOCOL, self._listen),
                (DIAL_BACK_PROTOCOL, self._serve_dial_back),
                (PROCESS_PROTOCOL, self._serve_process),
            ):
                stack.callback(self._host.handle(protocol, handler, access=Access.MEMBER))
            stack.callback(self._admission.watch(self._admission_changed))
            stack.callback(self._admission.watch_facts(self._fact))
            tasks.create_task(self.reach.run(), name="membership reach")
            await self.reach.started.wait()  # whoever is connected already is spoken to at once
            stack.callback(self._introductions.watch(self._peer_changed))
            tasks.create_task(self._admit_all(), name="membership admissions")
            self._tick()
            ready()
            try:
                await self._housekeep()
            finally:
                # Before the streams end: the tasks that open them run until this block is left.
                await self.leave()
                self._tasks = None

    def _close(self) -> None:
        self._tasks = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for outlet in list(self._outlets.values()):
            self._close_outlet(outlet)
        for stream in list(self._inbound.values()):
            stream.reset()
        for _peer, waiter in self._echoes.values():
            if not waiter.done():
                waiter.set_exception(OverlayError("this node is stopping", code="overlay.closed"))
                waiter.exception()
        self._store.save_now()

    async def leave(self) -> None:
        """Tell some members that this node goes; at most `leave_s`. Idempotent."""
        if self._left:
            return
        self._left = True
        self.swim.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.leave_s):
                while any(outlet.frames or outlet.head for outlet in self._outlets.values()):
                    self._emptied.clear()
                    await self._emptied.wait()

    def _tick(self) -> None:
        """Let swim do what is due, and come back when it asks to."""
        self._timer = None
        try:
            self.swim.tick()
        except Exception:  # a defect must not silence the node for good
            log.exception("membership.tick_failed")
            if self._tasks is not None:
                self._timer_due = self._now() + HOUSEKEEP_S
                self._timer = asyncio.get_running_loop().call_later(HOUSEKEEP_S, self._tick)
            return
        self._rearm()

    def _rearm(self) -> None:
        """After every call of swim: the time of its next tick may have moved."""
        if self._tasks is None:
            return
        due = self.swim.due
        if self._timer is not None:
            if due >= self._timer_due:
                return  # the tick that comes first arms the next
            self._timer.cancel()
        self._timer_due = due
        delay_s = max(0.0, due - self._now())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    async def _housekeep(self) -> None:
        save_at = describe_at = self._now()
        while True:
            await asyncio.sleep(HOUSEKEEP_S)
            now = self._now()
            try:
                if now >= describe_at:
                    describe_at = now + DESCRIBE_S
                    self.refresh()
                self._incarnations.used(self.swim.record.incarnation)
                for outlet in list(self._outlets.values()):
                    self._look_after(outlet, now)
                if now >= self._rejudge_at:
                    self._rejudge_at = now + REJUDGE_S
                    self._rejudge()
                if now >= save_at:
                    save_at = now + SAVE_S
                    await self._store.save()
            except Exception:  # a defect in one of them is not the end of the node
                log.exception("membership.housekeeping_failed")

    def refresh(self) -> None:
        """Ask what the node's record should say now, and publish it if it changed.

        A description that no record can hold is logged once, and the one before stays.
        """
        self.swim.update(**self._fields())
        self._rearm()

    def _fields(self) -> dict[str, Any]:
        chain = self._admission.own.encoded
        fields = {"chain": chain, **self._describe()}
        fields["addrs"] = tuple(map(str, fields.get("addrs", ())))
        fields["services"] = tuple(fields.get("services", ()))
        if fields != self._described:
            self._described = dict(fields)
            try:
                # Swim signs later, when nobody is there to hear that it cannot be done.
                self._sign(fields)
                self._bad_description = False
            except InvalidArgument as exc:
                self._bad_description = True
                log.warning("membership.bad_description", why=exc)
        if self._bad_description:
            fields = {"chain": chain}
        fields.setdefault("load", os.getloadavg()[0] / (os.cpu_count() or 1))
        fields.setdefault("memory_bytes", _memory_bytes())
        return fields

    # --- what others ask --------------------------------------------------------------------------

    def members(self) -> tuple[Known, ...]:
        """All members that this node knows of, itself included, by name and peer ID; any state."""
        found = [self._self(), *self.swim.members().values()]
        return tuple(sorted(found, key=lambda member: (member.record.name, member.record.peer)))

    def member(self, peer: PeerId) -> Known | None:
        """One member, this node included, or None."""
        return self._self() if peer == self._key.peer_id else self.swim.member(peer)

    def _self(self) -> Known:
        record = self.swim.record
        return Known(
            record=record,
            state=State.LEFT if self._left else State.ALIVE,
            since=self._since,
            labels={**record.labels, **self._admission.own.labels},
            rtt_s=0.0,
            clock_offset_s=0.0,
        )

    @property
    def peer_id(self) -> PeerId:
        return self._key.peer_id

    @property
    def clock_offset_s(self) -> float | None:
        """How far the other members' clocks are ahead of this node's, in the median, s.

        Where none of a living member was measured: at least so far by the certificates that begin
        in the future. None where there are none either.
        """
        return middle((self.swim.clock_offsets_s or self._admission.early_s()).values())

    @property
    def knows_others(self) -> bool:
        """Whether the cluster has other nodes, as far as this one remembers."""
        own, is_foreign = self._key.peer_id, self._admission.is_foreign
        return any(peer != own and not is_foreign(peer) for peer in self._store.peers())

    def watch(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Call back, on the loop, for every change from now on. Returns what ends the watch."""
        self._watchers.append(callback)

        def end() -> None:
            if callback in self._watchers:
                self._watchers.remove(callback)

        return end

    def bootstrap(self, addrs: Iterable[Multiaddr]) -> None:
        self.reach.bootstrap(addrs)

    def found(self, addr: str | Multiaddr, source: str) -> None:
        """A discovery found this address. Never raises."""
        self.reach.found(addr, source)

    async def connect(self, peer: PeerId, *, timeout_s: float | None = None) -> Connection:
        """A connection to a member; dials if need be. Raises DialError."""
        return await self.reach.connect(peer, timeout_s=timeout_s)

    async def ping(self, peer: PeerId, timeout_s: float = 5.0) -> float:
        """The round trip to a member on the membership stream, seconds; dials if need be.

        The better of two, so that the opening of streams does not count. Raises DialError, or
        OverlayError "overlay.timeout" if it does not answer in time.
        """
        if peer == self._key.peer_id:
            return 0.0
        try:
            async with asyncio.timeout(timeout_s):
                await self.reach.connect(peer)
                await self._opened(peer)
                return min([await self._echo(peer) for _ in range(2)])
        except TimeoutError:
            raise OverlayError(
                f"{peer} did not answer within {timeout_s:g} s",
                hint="`ww ls` says when it was last alive",
                code="overlay.timeout",
            ) from None

    async def _opened(self, peer: PeerId) -> None:
        """Wait until the stream to a connected peer is open."""
        outlet = self._outlet(peer)
        if outlet.stream is None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            outlet.opened.add(waiter)
            self._open(outlet)
            await waiter

    async def _echo(self, peer: PeerId) -> float:
        if len(self._echoes) >= ECHOES_MAX:
            raise LimitExceeded(f"{ECHOES_MAX} pings are under way")
        loop = asyncio.get_running_loop()
        number, answered = next(self._echo_ids), loop.create_future()
        self._echoes[number] = (peer, answered)
        started = self._now()
        try:
            self._send(peer, cbor.encode({"echo": number}))
            await answered
        finally:
            del self._echoes[number]
        return self._now() - started

    # --- changes ----------------------------------------------------------------------------------

    def _states(self) -> Mapping[PeerId, str]:
        return {peer: member.state.value for peer, member in self.swim.members().items()}

    def _changed(self, change: Change) -> None:
        """Swim saw a change (it must not be called from here)."""
        member, peer, kind = change.member, change.member.record.peer, change.kind
        if kind is ChangeKind.DUPLICATE:
            self._met(member.record)
        elif kind is ChangeKind.REMOVED:
            log.info("member.removed", peer=peer, name=member.record.name)
        elif change.before is not member.state:
            (log.warning if member.state in (State.SUSPECT, State.DEAD) else log.info)(
                f"member.{member.state.value}", peer=peer, name=member.record.name
            )
        if (
            kind in (ChangeKind.JOINED, ChangeKind.UPDATED, ChangeKind.ALIVE)
            and member.state is State.ALIVE
            and self._remember(member.record)
        ):
            self.reach.moved(peer)
        if kind is not ChangeKind.UPDATED:
            self.reach.changed()
        for watcher in list(self._watchers):
            try:
                watcher(change)
            except Exception:  # a watcher's defect is its own
                log.exception("watcher.failed")

    def _remember(self, record: Record) -> bool:
        """Keep the addresses of a record; whether they are news."""
        addrs = []
        for text in record.addrs:
            # An address of a kind that this version does not know is somebody else's to use.
            with contextlib.suppress(InvalidArgument):
                addrs.append(Multiaddr.parse(text))
        before = self._store.addrs(record.peer)
        self._store.named(record.peer, addrs)
        return not set(self._store.addrs(record.peer)) <= set(before)

    def _peer_changed(self, change: PeerUp | PeerDown) -> None:
        peer = change.peer
        if isinstance(change, PeerUp):
            connection = self._host.connection(peer)
            log.info("peer.connected", peer=peer, addr=connection.remote if connection else "")
            if (outlet := self._outlets.get(peer)) is not None:
                outlet.retry_at = 0.0
                outlet.backoff.reset()
            if not self._admission.is_foreign(peer):  # that speaks nothing of ours
                self.swim.peer_up(peer)
        else:
            log.info("peer.lost", peer=peer)
            self._drop_outlet(peer)
            self._paces.pop(peer, None)
            # In a large cluster connections that are not needed end; that is no sign of a death.
            if self.reach.wants(peer):
                self.swim.peer_down(peer)
        self._rearm()

    def _admission_changed(self, change: Admitted | Removed) -> None:
        if isinstance(change, Removed):
            if change.reason == "vetoed":
                self._refuse(change.peer)
            self._expel(change.peer, change.reason)
        else:
            self._refused.pop(change.peer, None)

    def _expel(self, peer: PeerId, reason: str) -> None:
        """A peer is no member, or no more: nothing of it stays, and nothing goes to it."""
        self._admits.pop(peer, None)
        self._drop_outlet(peer)
        if (stream := self._inbound.get(peer)) is not None:
            stream.reset()
        if reason.endswith("evicted"):  # who renews, or is let in again, is where it was
            self._store.forget(peer)
        self.swim.evict(peer)
        self.reach.forget(peer)
        self._rearm()

    def _fact(self, fact: bytes) -> None:
        self.swim.add_fact(fact)
        self._rejudge_at = 0.0
        self._rearm()

    def _rejudge(self) -> None:
        """Look again at the certificates in the table: tombstones come, and time passes.

        Admission tells of those that it knows; gossip knows more peers than have shown themselves.
        """
        for peer, member in self.swim.members().items():
            try:
                self._admission.verify(member.record.chain)
            except WetwareError as exc:
                log.info("member.invalid", peer=peer, why=exc)
                self._expel(peer, exc.code)
        for peer in self._store.peers():
            if self._admission.evicted(peer) is not None:  # while it, or this node, was away
                self._store.forget(peer)
                self.reach.forget(peer)

    def _accept(self, record: Record) -> Mapping[str, str]:
        """Whether a record's certificate makes its node a member; the labels that it grants.

        Raises WetwareError.
        """
        peer = record.peer
        chain = self._admission.verify(record.chain)
        record.check_chain(chain)
        if (until := self._refused.get(peer)) is not None:
            if self._now() >= until:
                self._refused[peer] = self._now() + REFUSED_S
                self._admit_later(peer, record.chain)
            raise InvalidArgument(f"{peer} was refused as a member")
        if peer != self._key.peer_id and not self._admission.is_member(peer):
            # So that it may speak to us before it was introduced; the backend may still veto.
            self._admit_later(peer, record.chain)
        return chain.labels

    def _ask_author(self, record: Record) -> None:
        """An old record, of a member to which there is no connection: have it say so itself."""
        with contextlib.suppress(WetwareError):
            if self._admission.verify(record.chain).peer == record.peer:
                for text in record.addrs:
                    self.reach.found(Multiaddr.parse(text).with_peer(record.peer), "an old record")

    def _admit_later(self, peer: PeerId, chain: bytes) -> None:
        if peer not in self._admits and len(self._admits) >= ADMITS_MAX:
            self._admits.popitem(last=False)
        self._admits[peer] = chain
        self._admit_wake.set()

    def _refuse(self, peer: PeerId) -> None:
        """Believe no record of a peer until the backend lets it be a member."""
        self._refused[peer] = self._now() + REFUSED_S
        self._refused.move_to_end(peer)
        while len(self._refused) > ADMITS_MAX:
            self._refused.popitem(last=False)

    async def _admit_all(self) -> None:
        while True:
            self._admit_wake.clear()
            while self._admits:
                peer, chain = self._admits.popitem(last=False)
                try:
                    await self._admission.admit(peer, chain)
                except WetwareError as exc:
                    log.info("member.refused", peer=peer, why=exc)
                    self._refuse(peer)
                    self._expel(peer, exc.code)
                except Exception:
                    log.exception("member.admit_failed", peer=peer)
            await self._admit_wake.wait()

    # --- to a peer --------------------------------------------------------------------------------

    def _outlet(self, peer: PeerId) -> _Outlet:
        outlet = self._outlets.get(peer)
        if outlet is None:
            backoff = Backoff(REOPEN_S_MIN, REOPEN_S_MAX, self._rng)
            outlet = self._outlets[peer] = _Outlet(peer, backoff, self._now())
        return outlet

    def _send(self, peer: PeerId, frame: bytes) -> None:
        """Queue a frame; the oldest give way where the queue is full."""
        outlet = self._outlet(peer)
        outlet.used_at = self._now()
        outlet.frames.append(len(frame).to_bytes(4, "big") + frame)
        outlet.bytes += len(frame) + 4
        while outlet.bytes > self._config.queue_bytes_max or len(outlet.frames) > QUEUE_FRAMES_MAX:
            outlet.bytes -= len(outlet.frames.popleft())
            self.counters["frames_dropped"] += 1
        if outlet.stream is not None:
            self._pump(outlet)
        else:
            self._open(outlet)

    def _pump(self, outlet: _Outlet) -> None:
        """Hand to the link what it takes."""
        stream = outlet.stream
        if stream is None:
            return
        try:
            while outlet.head or outlet.frames:
                if outlet.head:
                    data = outlet.head
                else:
                    data = outlet.frames.popleft()
                    outlet.bytes -= len(data)
                taken = stream.write_nowait(data)
                outlet.head = data[taken:]
                if outlet.head:
                    if taken or outlet.stalled_at is None:
                        outlet.stalled_at = self._now()
                    return
            outlet.stalled_at = None
            self._emptied.set()
        except OverlayError:
            self._stream_ended(outlet, stream)

    def _open(self, outlet: _Outlet) -> None:
        if outlet.opening or self._tasks is None:
            return
        connecting = self._connect(outlet)
        try:
            self._tasks.create_task(connecting, name=f"membership {outlet.peer.short}")
            outlet.opening = True
        except RuntimeError:  # the group is about to end
            connecting.close()

    async def _connect(self, outlet: _Outlet) -> None:
        """Open the stream to a peer, on the connection that there is or a new one."""
        peer = outlet.peer
        try:
            if (pause_s := outlet.retry_at - self._now()) > 0:
                if self.reach.connected(peer) is None:
                    self._unreachable(outlet, DialError(f"{peer} was not reached a moment ago"))
                    return
                await asyncio.sleep(pause_s)
            connection = await self.reach.connect(peer, patient=True)
            async with asyncio.timeout(OPEN_S_MAX):
                stream = await connection.open_stream(PROTOCOL)
        except (WetwareError, TimeoutError) as exc:
            if self._outlets.get(peer) is outlet:
                why = exc if isinstance(exc, WetwareError) else OverlayError("no answer in time")
                self._unreachable(outlet, why)
        except Exception:  # one peer's trouble is not the others'
            log.exception("membership.open_failed", peer=peer)
            self._unreachable(outlet, OverlayError("a defect; the log has the details"))
        else:
            if self._outlets.get(peer) is not outlet:
                stream.reset()  # the peer went, or was evicted, meanwhile
                return
            stream.urgent = True
            outlet.stream = stream
            # Each side speaks on its own stream: nothing is expected here but its end.
            stream.attach(
                lambda _data: self._stream_ended(outlet, stream),
                lambda _exc: self._stream_ended(outlet, stream),
                lambda: self._pump(outlet),
            )
            if outlet.stream is not None:
                outlet.settle(None)
                self._pump(outlet)
        finally:
            outlet.opening = False

    def _unreachable(self, outlet: _Outlet, exc: WetwareError) -> None:
        if self._now() >= outlet.retry_at:
            outlet.retry_at = self._now() + outlet.backoff.pause_s()
            log.debug("peer.not_told", peer=outlet.peer, why=exc)
        self.counters["frames_dropped"] += outlet.clear()
        self._emptied.set()
        outlet.settle(exc)
        self.swim.unreachable(outlet.peer)
        self._rearm()

    def _stream_ended(self, outlet: _Outlet, stream: Stream) -> None:
        """The stream to a peer is over; the next frame opens another."""
        if outlet.stream is not stream:
            return
        outlet.stream, outlet.stalled_at, outlet.head = None, None, b""
        stream.detach()
        stream.reset()
        now = self._now()
        # Not at once, or a peer that refuses every stream would keep this node busy.
        outlet.retry_at = max(outlet.retry_at, now + outlet.backoff.pause_s())
        if outlet.frames:
            self._open(outlet)

    def _look_after(self, outlet: _Outlet, now: float) -> None:
        """Every second: end what does not move, and what nobody uses."""
        if outlet.stream is None:
            if not outlet.opening and not outlet.frames and now - outlet.used_at > LINK_IDLE_S:
                self._drop_outlet(outlet.peer)
            return
        if outlet.stalled_at is not None and now - outlet.stalled_at > STALL_S_MAX:
            log.warning("peer.fell_behind", peer=outlet.peer, stalled_s=STALL_S_MAX)
            self.counters["frames_dropped"] += outlet.clear()
            self.counters["streams_stalled"] += 1
            self._stream_ended(outlet, outlet.stream)
        elif now - outlet.used_at > LINK_IDLE_S and not self.reach.wants(outlet.peer):
            self._drop_outlet(outlet.peer)
        elif outlet.stalled_at is None:
            outlet.backoff.reset()

    def _drop_outlet(self, peer: PeerId) -> None:
        if (outlet := self._outlets.pop(peer, None)) is not None:
            self._close_outlet(outlet)
            self._emptied.set()

    def _close_outlet(self, outlet: _Outlet) -> None:
        outlet.settle(StreamReset("the peer is gone"))
        stream, outlet.stream = outlet.stream, None
        if stream is not None:
            stream.detach()
            if outlet.head:  # a clean end within a frame would look like a broken peer
                stream.reset()
            else:
                stream.finish()  # what was written still leaves
        outlet.clear()

    # --- from a peer ------------------------------------------------------------------------------

    async def _listen(self, stream: Stream) -> None:
        peer = stream.peer
        if self._tasks is None or self._penalties.muted(peer):
            self.counters["streams_refused"] += 1
            stream.reset()
            return
        if (previous := self._inbound.get(peer)) is not None:
            if previous.connection is not stream.connection:
                self._compare(peer, previous.connection, stream.connection)
            previous.reset()
        self._inbound[peer] = stream
        try:
            await self._read(peer, stream)
        except Malformed as exc:
            stream.reset()
            penalty_s = self._penalties.add(peer)
            self.counters["frames_malformed"] += 1
            log.warning("frame.malformed", peer=peer, why=exc, muted_s=penalty_s)
        except (WetwareError, EOFError) as exc:
            log.debug("stream.ended", peer=peer, why=exc)
            stream.reset()
        finally:
            if self._inbound.get(peer) is stream:
                del self._inbound[peer]

    async def _read(self, peer: PeerId, stream: Stream) -> None:
        frames, nbytes = self._pace(peer)
        while True:
            try:
                size = int.from_bytes(await stream.read_exactly(4), "big")
            except asyncio.IncompleteReadError as exc:
                if exc.partial:
                    raise Malformed("the stream ends within a frame") from None
                return
            if not 0 < size <= self._config.frame_bytes_max:
                raise Malformed(f"a frame of {size} bytes; 1 to {self._config.frame_bytes_max}")
            try:
                async with asyncio.timeout(FRAME_S_MAX):
                    frame = await stream.read_exactly(size)
            except TimeoutError:
                raise Malformed(f"a frame took longer than {FRAME_S_MAX:g} s") from None
            except asyncio.IncompleteReadError:
                raise Malformed("the stream ends within a frame") from None
            # Who sends faster is read more slowly: its window closes, and it has to wait.
            for bucket, count in ((frames, 1), (nbytes, size)):
                while not bucket.take(count):
                    self.counters["throttled"] += 1
                    await asyncio.sleep(0.1)
            if self._inbound.get(peer) is not stream or self._tasks is None:
                return
            self._receive(peer, frame)
            # Others get the loop: frames that have all arrived would not wait for anything.
            await asyncio.sleep(0)

    def _pace(self, peer: PeerId) -> tuple[TokenBucket, TokenBucket]:
        """Kept while the peer is connected: a new stream is no new allowance."""
        pace = self._paces.get(peer)
        if pace is None:
            pace = self._paces[peer] = (
                TokenBucket(FRAMES_PER_S, FRAMES_BURST, self._now),
                TokenBucket(BYTES_PER_S, BYTES_BURST + self._config.frame_bytes_max, self._now),
            )
        return pace

    def _receive(self, peer: PeerId, frame: bytes) -> None:
        self.counters["frames_in"] += 1
        if frame.startswith((_ECHO, _ECHOED)):
            self._receive_echo(peer, frame)
            self.swim.heard(peer)
            return
        try:
            self.swim.receive(peer, frame)
        except WetwareError:
            raise
        except Exception as exc:
            log.exception("membership.receive_failed", peer=peer)
            raise Malformed("a frame that could not be handled") from exc
        finally:
            self._rearm()

    def _receive_echo(self, peer: PeerId, frame: bytes) -> None:
        try:
            message = cbor.decode(frame, bytes_max=32)
        except InvalidArgument as exc:
            raise Malformed(exc.message) from None
        number = message.get("echo", message.get("echoed")) if isinstance(message, dict) else None
        if type(number) is not int:
            raise Malformed("an echo without its number")
        if "echo" in message:
            self._send(peer, cbor.encode({"echoed": number}))
            return
        asker, answered = self._echoes.get(number, (None, None))
        if asker == peer and answered is not None and not answered.done():
            answered.set_result(None)

    # --- two processes with one key ---------------------------------------------------------------

    def twin(self, peer: PeerId) -> Record | None:
        """What the second process with the key of `peer`, maybe this node's, says of itself.

        None where no second one was heard of for `TWIN_S`.
        """
        record, at = self._twins.get(peer, (None, 0.0))
        return record if record is not None and self._now() - at < TWIN_S else None

    def _met(self, record: Record) -> None:
        peer, own = record.peer, record.peer == self._key.peer_id
        if self.twin(peer) is None:
            log.error(
                "member.duplicate_identity" if own else "member.two_processes",
                peer=peer,
                addrs=" ".join(record.addrs),
                hint="two processes run with this key: stop one, or give it a key of its own",
            )
        _put(self._twins, peer, (record, self._now()))

    def _compare(self, peer: PeerId, *connections: Connection) -> None:
        """A peer speaks on two connections: it moved, or two processes have its key."""
        if self._tasks is None or self._now() - self._compared.get(peer, -COMPARE_S) < COMPARE_S:
            return
        _put(self._compared, peer, self._now())
        comparing = self._ask_processes(connections)
        try:
            self._tasks.create_task(comparing, name=f"processes of {peer.short}")
        except RuntimeError:  # the group is about to end
            comparing.close()

    async def _ask_processes(self, connections: Sequence[Connection]) -> None:
        """Ask at the older connection first: who answers there lived when the newer one was."""
        try:
            first, second = [await self._ask_process(connection) for connection in connections]
            if first.instance != second.instance:
                self._met(second)
                for connection, other in zip(connections, (second, first), strict=True):
                    await self._ask_process(connection, other.encoded)
        except (WetwareError, EOFError, TimeoutError) as exc:  # one has gone: so there are not two
            log.debug("processes.not_asked", peer=connections[0].peer, why=exc)

    async def _ask_process(self, connection: Connection, other: bytes = b"") -> Record:
        async with (
            asyncio.timeout(OPEN_S_MAX),
            await connection.open_stream(PROCESS_PROTOCOL) as stream,
        ):
            await write_frame(stream, {"other": other})
            answer = await read_frame(stream, bytes_max=SMALL_FRAME_BYTES_MAX)
            record = Record.open(field(answer, "record", bytes_max=RECORD_BYTES_MAX))
        if record.peer != connection.peer:
            raise Malformed(f"{connection.peer} answered with the record of {record.peer}")
        return record

    async def _serve_process(self, stream: Stream) -> None:
        try:
            async with asyncio.timeout(OPEN_S_MAX):
                asked = await read_frame(stream, bytes_max=SMALL_FRAME_BYTES_MAX)
                other = field(asked, "other", bytes_max=RECORD_BYTES_MAX)
                if other:
                    self.swim.met(Record.parse(other))
                    self._rearm()
                await write_frame(stream, {"record": self._sign(self._fields()).encoded})
        except (WetwareError, EOFError, TimeoutError) as exc:
            log.debug("process.not_told", peer=stream.peer, why=exc)
            stream.reset()

    # --- dial back --------------------------------------------------------------------------------

    async def dial_back(
        self, peer: PeerId, addrs: Iterable[Multiaddr], *, timeout_s: float = 30.0
    ) -> list[DialBack]:
        """Ask a member to reach this node at `addrs` by new connections, and say what happened.

        Only addresses that this node's record names, at most DIAL_BACK_ADDRS_MAX, are tried. Raises
        OverlayError where the peer cannot be asked, and LimitExceeded where it was asked too often.
        """
        wanted = [addr.with_peer(None) for addr in addrs][:DIAL_BACK_ADDRS_MAX]
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self.reach.connect(peer)
                async with await connection.open_stream(DIAL_BACK_PROTOCOL) as stream:
                    await write_frame(stream, {"addrs": [str(addr) for addr in wanted]})
                    answer = await read_frame(stream, bytes_max=SMALL_FRAME_BYTES_MAX)
        except (TimeoutError, EOFError):
            raise OverlayError(
                f"{peer} did not answer within {timeout_s:g} s", code="overlay.timeout"
            ) from None
        if isinstance(why := answer.get("refused"), str):
            raise LimitExceeded(f"{peer} refused: {why[:200]}", hint="try again in a minute")
        try:
            return [
                DialBack(Multiaddr.parse(addr), why == "ok", str(why)[:40], float(took_s))
                for addr, why, took_s in answer["results"][:DIAL_BACK_ADDRS_MAX]
            ]
        except (TypeError, KeyError, ValueError, AttributeError, InvalidArgument):
            raise OverlayError(f"{peer} gave an answer that makes no sense") from None

    async def _serve_dial_back(self, stream: Stream) -> None:
        peer = stream.peer
        try:
            async with asyncio.timeout(OPEN_S_MAX):
                asked = await read_frame(stream, bytes_max=SMALL_FRAME_BYTES_MAX)
                texts = _dial_back_request(asked)
            async with asyncio.timeout((DIAL_BACK_ADDRS_MAX + 1) * DIAL_BACK_S_MAX):
                await write_frame(stream, await self._dial_all(peer, texts))
        except (WetwareError, EOFError, TimeoutError) as exc:
            self.counters["dial_backs_failed"] += 1
            log.debug("dial_back.failed", peer=peer, why=exc)
            stream.reset()

    async def _dial_all(self, peer: PeerId, texts: list[str]) -> Mapping[str, object]:
        rate = self._dial_backs.get(peer)
        if rate is None:
            rate = self._dial_backs[peer] = TokenBucket(DIAL_BACK_PER_S, DIAL_BACK_BURST, self._now)
            while len(self._dial_backs) > PENALTIES_MAX:
                self._dial_backs.popitem(last=False)
        if self._dial_backs_running >= DIAL_BACKS_MAX or not rate.take():
            return {"refused": "too many requests"}
        member = self.swim.member(peer)
        own = set()
        for text in member.record.addrs if member is not None else ():
            with contextlib.suppress(InvalidArgument):
                own.add(Multiaddr.parse(text).with_peer(None))
        results = []
        self._dial_backs_running += 1
        try:
            for text in texts:
                addr = Multiaddr.parse(text).with_peer(None)
                # Nobody makes this node knock at somebody else's door.
                why, took_s = ("unknown", 0.0) if addr not in own else await self._try(addr, peer)
                results.append([str(addr), why, took_s])
        finally:
            self._dial_backs_running -= 1
        return {"results": results}

    async def _try(self, addr: Multiaddr, peer: PeerId) -> tuple[str, float]:
        """A new connection with a handshake, by a host of its own: ours has one already."""
        started = self._now()
        async with LinkHost(Key.generate(), limits=LinkLimits(close_s=0.5)) as host:
            try:
                connection = await host.dial((addr,), peer=peer, timeout_s=DIAL_BACK_S_MAX)
            except PeerMismatch:
                why = "other peer"
            except DialError as exc:
                text = exc.message
                why = next(
                    (
                        short
                        for part, short in (("refused", "refused"), ("in time", "timeout"))
                        if part in text
                    ),
                    "failed",
                )
            else:
                why = "ok"
                connection.close()
        return why, self._now() - started


def _put(table: OrderedDict[PeerId, Any], peer: PeerId, value: object) -> None:
    """Keep it as the newest of `TWINS_MAX`."""
    table[peer] = value
    table.move_to_end(peer)
    while len(table) > TWINS_MAX:
        table.popitem(last=False)


def _dial_back_request(request: Mapping[str, Any]) -> list[str]:
    texts = request.get("addrs")
    if not (
        isinstance(texts, list)
        and len(texts) <= DIAL_BACK_ADDRS_MAX
        and all(isinstance(text, str) for text in texts)
    ):
        raise Malformed("not a request to dial back")
    return texts


def _memory_bytes() -> int:
    """Memory that is available, in whole MiB; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) >> 10 << 20
    return 0
