"""The membership of a running node: SWIM on the link's streams, and what others ask about members.

`Membership` joins the parts: `swim` decides and knows no IO, `reach` keeps the connections, `peers`
remembers them, `courier` and `inbound` carry frames, `wetware.overlay.admission` says who is a
member at all. Each side speaks on the stream that it opened: frames of four bytes of length and a
CBOR map.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wetware.base.access import Access
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.base.watchers import Watchers
from wetware.errors import InvalidArgument, OverlayError, WetwareError
from wetware.overlay.admission.members import Admitted, Removed
from wetware.overlay.membership.courier import PROTOCOL, Courier
from wetware.overlay.membership.dial_back import DIAL_BACK_PROTOCOL, DialBacks
from wetware.overlay.membership.inbound import Inbound
from wetware.overlay.membership.known import Change, ChangeKind, Known, State
from wetware.overlay.membership.peers import (
    INCARNATION_FILE,
    PEERS_FILE,
    IncarnationFile,
    PeerStore,
)
from wetware.overlay.membership.reach import Reach, ReachLimits, is_public
from wetware.overlay.membership.record import ADDRS_MAX, Malformed, Record
from wetware.overlay.membership.reservations import Reservations
from wetware.overlay.membership.swim import Swim, middle
from wetware.overlay.membership.twins import PROCESS_PROTOCOL, Twins
from wetware.overlay.peers import PeerDown, PeerUp

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.identity import Key, PeerId
    from wetware.overlay.admission.decision import Admission
    from wetware.overlay.admission.service import Introductions
    from wetware.overlay.link import LinkHost
    from wetware.overlay.membership.config import MembershipConfig

log = get_logger("membership")

ADDRS_BEFORE_RELAYS = 4
"""Addresses of a record before those of its relays."""
HOUSEKEEP_S = 1.0
SAVE_S = 5.0
DESCRIBE_S = 2.0
PING_AGAIN_S = 1.0
REJUDGE_S = 30.0
"""How often all certificates are looked at again; sooner when a tombstone came."""
ADMITS_MAX = 1024
"""New members whose admission the backend still has to confirm; a later record asks again."""
REFUSED_S = 30.0
"""Records of a peer whose admission was refused are not believed again for so long."""


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
        reach_limits: For tests.
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
        self.reach = Reach(
            host,
            introductions,
            self._store,
            members=self._states,
            config=config,
            clock=clock,
            limits=reach_limits,
            rng=self._rng,
        )
        self.reservations = Reservations(key.peer_id, self.reach, self._store.addrs, self.refresh)
        self.swim = self._begin()
        self.courier = Courier(self.reach, config.queue_bytes_max, self._unreachable)
        self.twins = Twins(key.peer_id, self.reach, lambda: self._sign(self._fields()), self._met)
        self.inbound = Inbound(
            config.frame_bytes_max,
            now=self._now,
            receive=self._receive,
            moved=self.twins.compare,
        )
        self.dial_backs = DialBacks(self.reach, self._addrs_of)
        self._watchers: Watchers[Change] = Watchers()
        self._admits: OrderedDict[PeerId, bytes] = OrderedDict()
        self._admit_wake = asyncio.Event()
        self._refused: OrderedDict[PeerId, float] = OrderedDict()  # until
        self._rejudge_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._running = self._left = False

    def _begin(self) -> Swim:
        """Swim with nobody else in it, and the node's record as it is now."""
        return Swim(
            self._sign(self._fields()),
            config=self._config,
            sign=partial(Record.sign, self._key),
            send=lambda peer, frame: self.courier.send(peer, frame),
            accept=self._accept,
            facts=lambda: self._admission.facts.encoded,
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
            self._running = True
            # Anew: what the node says first is complete, wherever it was made.
            self.swim = self._begin()
            for protocol, handler in (
                (PROTOCOL, self.inbound.listen),
                (DIAL_BACK_PROTOCOL, self.dial_backs.serve),
                (PROCESS_PROTOCOL, self.twins.serve),
            ):
                stack.callback(self._host.handle(protocol, handler, access=Access.MEMBER))
            stack.callback(self._admission.members.changes.add(self._admission_changed))
            stack.callback(self._admission.new_facts.add(self._fact))
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
                self._running = False

    def _close(self) -> None:
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.courier.close()
        self.inbound.close()
        self._store.save_now()

    async def leave(self) -> None:
        """Tell some members that this node goes; at most `leave_s`. Idempotent."""
        if self._left:
            return
        self._left = True
        self.swim.leave()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.leave_s):
                await self.courier.drained()

    def _tick(self) -> None:
        """Let swim do what is due, and come back when it asks to."""
        self._timer = None
        try:
            self.swim.tick()
        except Exception:  # a defect must not silence the node for good
            log.exception("membership.tick_failed")
            if self._running:
                self._timer_due = self._now() + HOUSEKEEP_S
                self._timer = asyncio.get_running_loop().call_later(HOUSEKEEP_S, self._tick)
            return
        self._rearm()

    def _rearm(self) -> None:
        """After every call of swim: the time of its next tick may have moved."""
        if not self._running:
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
                self.courier.look_after()
                self._hide()
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

    def network_changed(self) -> None:
        """This machine may have other addresses, and reach others than before."""
        self.refresh()
        self.reach.network_changed()

    def _hide(self) -> None:
        """Keep relays where nobody on the internet can dial this node."""
        own = map(Multiaddr.parse, self._described.get("addrs", ()))
        hidden = not is_public(own)
        if hidden != self.reach.hidden:
            self.reach.hidden = hidden
            self.reach.changed()
        if hidden:
            self.reservations.look_after()

    def _fields(self) -> dict[str, Any]:
        chain = self._admission.own.encoded
        fields = {"chain": chain, **self._describe()}
        addrs = tuple(fields.get("addrs", ()))
        # Others keep the first few.
        addrs = (
            *addrs[:ADDRS_BEFORE_RELAYS],
            *self.reservations.addrs,
            *addrs[ADDRS_BEFORE_RELAYS:],
        )
        fields["addrs"] = tuple(map(str, addrs[:ADDRS_MAX]))
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
        own, is_foreign = self._key.peer_id, self._admission.members.is_foreign
        return any(peer != own and not is_foreign(peer) for peer in self._store.peers())

    def watch(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Call back, on the loop, for every change from now on. Returns what ends the watch."""
        return self._watchers.add(callback)

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
                return min([await self.round_trip(peer) for _ in range(2)])
        except TimeoutError:
            raise OverlayError(
                f"{peer} did not answer within {timeout_s:g} s",
                hint="`ww ls` says when it was last alive",
                code="overlay.timeout",
            ) from None

    async def round_trip(self, peer: PeerId) -> float:
        """Until a member answers, seconds; asks again and again if it does not."""
        took: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        def answered(started: float) -> None:
            if not took.done():
                took.set_result(self._now() - started)

        while not took.done():
            # What was sent on a connection that is dead is lost: the next one has another stream.
            self.swim.ping(peer, partial(answered, self._now()))
            await asyncio.wait([took], timeout=PING_AGAIN_S)
        return took.result()

    # --- changes ----------------------------------------------------------------------------------

    def _states(self) -> Mapping[PeerId, str]:
        return {peer: member.state.value for peer, member in self.swim.members().items()}

    def _changed(self, change: Change) -> None:
        """Swim saw a change (it must not be called from here)."""
        member, peer, kind = change.member, change.member.record.peer, change.kind
        if kind is ChangeKind.DUPLICATE:
            self.twins.seen(member.record)
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
        self._watchers.tell(change)

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
            self.courier.peer_up(peer)
            if not self._admission.members.is_foreign(peer):  # that speaks nothing of ours
                self.swim.peer_up(peer)
        else:
            log.info("peer.lost", peer=peer)
            self.courier.drop(peer)
            self.inbound.forget(peer)
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
        self.courier.drop(peer)
        self.inbound.end(peer)
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
                self._admission.judge.verify(member.record.chain)
            except WetwareError as exc:
                log.info("member.invalid", peer=peer, why=exc)
                self._expel(peer, exc.code)
        for peer in self._store.peers():
            if self._admission.judge.evicted(peer) is not None:  # while it, or this node, was away
                self._store.forget(peer)
                self.reach.forget(peer)

    def _accept(self, record: Record) -> Mapping[str, str]:
        """Whether a record's certificate makes its node a member; the labels that it grants.

        Raises WetwareError.
        """
        peer = record.peer
        chain = self._admission.judge.verify(record.chain)
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
            if self._admission.judge.verify(record.chain).peer == record.peer:
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
                    await self._admission.members.admit(peer, chain)
                except WetwareError as exc:
                    log.info("member.refused", peer=peer, why=exc)
                    self._refuse(peer)
                    self._expel(peer, exc.code)
                except Exception:
                    log.exception("member.admit_failed", peer=peer)
            await self._admit_wake.wait()

    # --- frames -----------------------------------------------------------------------------------

    def _receive(self, peer: PeerId, frame: bytes) -> None:
        try:
            self.swim.receive(peer, frame)
        except WetwareError:
            raise
        except Exception as exc:
            log.exception("membership.receive_failed", peer=peer)
            raise Malformed("a frame that could not be handled") from exc
        finally:
            self._rearm()

    def _unreachable(self, peer: PeerId) -> None:
        self.swim.unreachable(peer)
        self._rearm()

    def _met(self, record: Record) -> None:
        self.swim.met(record)
        self._rearm()

    def _addrs_of(self, peer: PeerId) -> tuple[str, ...]:
        member = self.swim.member(peer)
        return () if member is None else member.record.addrs


def _memory_bytes() -> int:
    """Memory that is available, in whole MiB; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) >> 10 << 20
    return 0
