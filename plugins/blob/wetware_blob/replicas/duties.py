"""What a member owes to the copies of pins: who keeps one, makes one, and may drop its own.

Every member decides by itself, from its own pins and what others answer. No I/O here but through
`Disk` and `Cluster`, no tasks, no sleeping: a simulation can run it.

A pin lives at its home, where a user pinned it; `copies` counts the home. The others are at the
members that come first in the order of `ranked`. What is safe about it is one rule: a member drops
a copy only once it has the promises of `copies` others to keep theirs, none of which is about to
drop its own, and while it has promised nothing itself. All else may be wrong for a while.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from wetware.base.bounds import less
from wetware.errors import Denied, WetwareError

if TYPE_CHECKING:
    from wetware.hookspecs import Clock
    from wetware_blob.format.cid import Cid

LEASE_S: Final = 120.0
"""A promise to keep a copy: long enough to ask all others for theirs."""
MARGIN_S: Final = 10.0
"""That a promise must last beyond the decision to drop: the disk has to be told."""
ASKED_MAX: Final = 64
"""Members that are asked to keep one copy, in one round."""
PROGRESS_BYTES: Final = 1 << 20
"""That more have been fetched counts as progress: a member that only says so is soon found out."""
COPIES_MAX: Final = 16
"""Of a pin."""
WHERE_CHARS_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Copy:
    """A pin that several members keep, as each of them knows it: Copy in blob.capnp.

    Attributes:
        charged: Bytes, to who keeps it.
        lease_until: Unix time, s, of this node's own promise; on its disk.
    """

    root: Cid
    home: str
    pin: bytes
    copies: int
    where: str = ""
    charged: int = 0
    lease_until: float = 0.0

    @property
    def id(self) -> bytes:
        """Names it in the cluster; a home cannot make one that is another's.

        Nor can who looks after it while its home is gone give other blocks out for it.
        """
        return hashlib.sha256(self.pin + bytes(self.root) + self.home.encode()).digest()


@dataclass(frozen=True, slots=True)
class Kept:
    """How it stands with a copy that a member was asked to keep: see Sibling.keep."""

    room: bool
    done: bool = False
    bytes: int = 0


Wanted = tuple[bytes, list[tuple[int, str]]]
"""What a home says: the ID of its store, and of each copy how many, and where; 0: that store has
no such pin."""


class Cluster(Protocol):
    """The other members as this one sees them, by peer ID. What fails raises WetwareError."""

    def alive(self, where: str = "") -> Collection[str]:
        """Those that match and can be asked, and this one if it matches."""
        ...

    def gone(self, peer: str) -> bool:
        """Whether it is away for longer than the grace, or no member any more."""
        ...

    async def holding(self, ids: list[bytes]) -> Mapping[str, Collection[bytes]]:
        """Which of these they have; who does not answer is not in it."""
        ...

    async def wanted(self, home: str, ids: list[bytes]) -> Wanted:
        """What the home wants of these."""
        ...

    async def keep(self, peer: str, copy: Copy) -> Kept: ...

    async def lease(self, peer: str, copy: Copy) -> float:
        """See `Replicas.lease`."""
        ...

    async def drop(self, peer: str, ids: list[bytes]) -> None: ...


class Disk(Protocol):
    """This node's own pins, durably.

    Attributes:
        id: Of the store, 8 bytes; another one once that was made anew.
    """

    @property
    def id(self) -> bytes: ...

    async def read(self, *, single: bool) -> list[Copy]:
        """Those that have copies; `single`: also this node's own that have none."""
        ...

    async def keep(self, asker: str, copy: Copy) -> Kept:
        """Fetch and pin it; returns how that goes."""
        ...

    async def amend(self, copy: Copy) -> bool:
        """Write its terms and lease where it is there; whether it is, with all that it reaches."""
        ...

    async def drop(self, copy: Copy) -> None: ...

    async def check_whole(self) -> None:
        """Raises where a pin may be damaged or lost: none must be said then not to be wanted."""
        ...


def ranked(root: Cid, peers: Iterable[str]) -> list[str]:
    """Rendezvous hashing: an order of members that is another one for each root."""
    return sorted(peers, key=lambda peer: hashlib.sha256(root.digest + peer.encode()).digest())


class Replicas:
    """The copies of one node.

    Args:
        me: Its peer ID.
        disk: Its pins.
        cluster: The others.
        clock: For grace and leases.
        grace_s: A member that has not been heard of for so long has no copy any more.

    Attributes:
        copies: What is on the disk, by ID: this node's own, and those kept for others.
        loaded: Whether the pins have been read: before, nothing is said of them.
        single: Whether this node's own that have no copies are among them, as when it drains.
        draining: Not 0: it takes none, counts for none and promises none, as it is about to leave.
        handed: Copies that can be had without this node, from when it drains.
    """

    def __init__(
        self, me: str, disk: Disk, cluster: Cluster, clock: Clock, *, grace_s: float
    ) -> None:
        self._me, self._disk, self._cluster = me, disk, cluster
        self._clock, self._grace_s = clock, grace_s
        self.copies: dict[bytes, Copy] = {}
        self.draining = 0
        self.loaded = self.single = False
        self.handed: set[bytes] = set()
        self._said: dict[bytes, dict[str, float]] = {}  # who has it → when it said so last
        self._fresh: set[bytes] = set()  # pinned since the start: nobody can have them and be away
        self._forgotten: set[bytes] = set()  # by their homes, of which the stores were made anew
        self._leases: dict[bytes, float] = {}  # promised, or about to be
        self._changing: set[bytes] = set()  # about to be dropped, or written with other terms
        self._ending: Counter[tuple[bytes, str]] = Counter()  # who is being told to drop which
        self._reads = 0
        self._began_s = clock.monotonic()

    # --- what it has ------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Read the pins. What has been pinned or given up before is known when it returns.

        Or soon, where another one has begun meanwhile, which knows more.
        """
        self._reads += 1
        reads, single = self._reads, bool(self.draining)
        found = {copy.id: copy for copy in await self._disk.read(single=single)}
        if reads != self._reads:
            return
        over = [id_ for id_, copy in self.copies.items() if id_ not in found and self._mine(copy)]
        told: dict[str, list[bytes]] = {}
        for id_ in over:
            for peer in self._said.get(id_, ()):
                told.setdefault(peer, []).append(id_)
        self.copies, self.loaded, self.single = found, True, single
        for known in (self._said, self._leases):
            for id_ in known.keys() - found.keys():
                del known[id_]
        for ids in (self._fresh, self._forgotten, self.handed):
            ids.intersection_update(found)
        if not single:
            self.handed.clear()
        with contextlib.suppress(WetwareError):
            if over:
                await self._disk.check_whole()
            for peer in told.keys() & set(self._cluster.alive()):
                await self._end(peer, told[peer])

    async def _end(self, peer: str, ids: list[bytes]) -> None:
        """Tell a member that these are pinned no more, but what has been pinned anew since.

        What is pinned anew while it is told does not count its copy, which is about to go.
        """
        ids = [id_ for id_ in ids if id_ not in self.copies]
        ending = [(id_, peer) for id_ in ids]
        self._ending.update(ending)
        try:
            with contextlib.suppress(WetwareError):  # who is not reached asks, see `survey`
                if ids:
                    await self._cluster.drop(peer, ids)
        finally:
            for id_, _ in ending:
                less(self._ending, (id_, peer))
                self._said.get(id_, {}).pop(peer, None)

    def _mine(self, copy: Copy) -> bool:
        return copy.home == self._me

    def pinned(self, id_: bytes) -> None:
        """It was pinned here just now."""
        self._fresh.add(id_)

    def holders(self, copy: Copy) -> list[str]:
        """Who has it, as far as is known, this node included."""
        since = self._clock.monotonic() - self._grace_s
        said = self._said.get(copy.id, {})
        found = [
            peer
            for peer, at in said.items()
            if at >= since and (copy.id, peer) not in self._ending and not self._cluster.gone(peer)
        ]
        return found if self.draining else [self._me, *found]

    def lacking(self) -> list[Copy]:
        """This node's own of which there are too few, as far as is known."""
        own = [copy for copy in self.copies.values() if self._mine(copy)]
        return [copy for copy in own if len(self.holders(copy)) < copy.copies]

    # --- for others -------------------------------------------------------------------------------

    def has(self, ids: Collection[bytes]) -> list[bool]:
        """Whether this node has and keeps these."""
        return [id_ in self.copies and not self.draining for id_ in ids]

    async def wants(self, ids: Collection[bytes]) -> Wanted:
        """What this node wants of copies of its own. Raises where it cannot know."""
        found = [self.copies.get(id_) for id_ in ids]
        wanted = [(c.copies, c.where) if c and self._mine(c) else (0, "") for c in found]
        if (0, "") in wanted:
            await self._disk.check_whole()
        return self._disk.id, wanted

    async def _gone(self, copy: Copy) -> bool:
        """Whether the home of what is asked for here is, or has forgotten it."""
        if self._cluster.gone(copy.home) or copy.id in self._forgotten:
            return True
        with contextlib.suppress(WetwareError):
            store, ((copies, _),) = await self._cluster.wanted(copy.home, [copy.id])
            return not copies and not copy.pin.startswith(store)
        return False

    async def keep(self, asker: str, copy: Copy) -> Kept:
        """Keep one for its home, or for who looks after it while that is gone. Raises Denied."""
        if self.draining or copy.home == self._me:
            return Kept(room=False)
        if asker != copy.home and not await self._gone(copy):
            raise Denied(f"{copy.home} is there, and {asker} asks for copies of a pin of it")
        if copy.id in self.copies:
            return Kept(room=True, done=True, bytes=copy.charged)
        return await self._disk.keep(asker, copy)

    async def lease(self, id_: bytes) -> float:
        """Promise to keep a copy, whatever others do, for so many seconds from now; 0: no.

        The promise is on the disk when this returns. Who is about to drop its own promises nothing:
        of two that ask each other for theirs one may drop at most.
        """
        copy = self.copies.get(id_)
        if copy is None or self.draining or id_ in self._changing:
            return 0.0
        now = self._clock.time()
        if copy.lease_until - now < LEASE_S / 2:
            until = now + LEASE_S
            self._leases[id_] = until  # at once: a drop must not begin while it is written
            if not await self._disk.amend(copy := replace(copy, lease_until=until)):
                return 0.0
            if id_ in self.copies:
                self.copies[id_] = replace(self.copies[id_], lease_until=until)
        return copy.lease_until - self._clock.time()

    async def dropped(self, home: str, ids: Collection[bytes]) -> None:
        """Their home says that they are pinned no more."""
        for id_ in ids:
            if (copy := self.copies.get(id_)) is not None and copy.home == home != self._me:
                await self._drop(copy)

    async def _drop(self, copy: Copy) -> None:
        await self._disk.drop(copy)
        self.copies.pop(copy.id, None)

    # --- its duties -------------------------------------------------------------------------------

    async def survey(self, ids: list[bytes]) -> None:
        """Ask who has these, and their homes whether they are wanted still."""
        now = self._clock.monotonic()
        for peer, held in (await self._cluster.holding(ids)).items():
            for id_ in ids:
                if id_ in held:
                    self._said.setdefault(id_, {})[peer] = now
                else:
                    self._said.get(id_, {}).pop(peer, None)
        homes: dict[str, list[bytes]] = {}
        for id_ in ids:
            if (copy := self.copies.get(id_)) is not None and not self._mine(copy):
                homes.setdefault(copy.home, []).append(id_)
        for home in homes.keys() & set(self._cluster.alive()):
            try:
                store, wanted = await self._cluster.wanted(home, homes[home])
            except WetwareError:
                continue  # only the home's word counts
            for id_, (copies, where) in zip(homes[home], wanted, strict=True):
                with contextlib.suppress(WetwareError):  # the next round comes to it again
                    await self._heed(id_, store, copies, where)

    async def _heed(self, id_: bytes, store: bytes, copies: int, where: str) -> None:
        if (copy := self.copies.get(id_)) is None or id_ in self._changing:
            return
        self._forgotten.discard(id_)
        if not copies and not copy.pin.startswith(store):
            self._forgotten.add(id_)
        elif not copies:
            await self._drop(copy)
        elif (copy.copies, copy.where) != (copies, where):
            if self._leases.get(id_, 0.0) > max(copy.lease_until, self._clock.time()):
                return  # a promise is being written
            self._changing.add(id_)
            try:
                changed = replace(copy, copies=copies, where=where)
                if await self._disk.amend(changed) and id_ in self.copies:
                    self.copies[id_] = changed
            finally:
                self._changing.discard(id_)

    async def tend(self, id_: bytes) -> int:
        """Make copies where they lack and it is this node's duty; drop its own if it is surplus.

        Returns how many bytes of those that are being made have been fetched.
        """
        if (copy := self.copies.get(id_)) is None:
            return 0
        holders = self.holders(copy)
        lacking = self._wanted(copy, holders) - len(holders)
        if lacking > 0:
            return await self._make(copy, holders) if self._responsible(copy, holders) else 0
        if self.draining:
            if id_ not in self.handed and await self._promised(copy):
                self.handed.add(id_)
        elif lacking < 0 and not self._mine(copy) and self._surplus(copy, holders):
            await self._promised(copy, drop=True)
        return 0

    def _wanted(self, copy: Copy, holders: list[str]) -> int:
        """How many are to have it.

        Where this node is about to leave, and fewer others than that can, all of them, and one at
        the least: these make the copies that lack when members come.
        """
        if not self.draining or len(holders) >= copy.copies:
            return copy.copies
        others = {*self._cluster.alive(copy.where), *holders} - {self._me}
        return max(1, min(copy.copies, len(others)))

    def _responsible(self, copy: Copy, holders: list[str]) -> bool:
        settled = self._clock.monotonic() - self._began_s >= self._grace_s
        if not (settled or self.draining or copy.id in self._fresh):
            return False  # who has one may be away just now
        if self._mine(copy):
            return True
        if not (self._cluster.gone(copy.home) or copy.id in self._forgotten):
            return False
        alive = self._cluster.alive()
        there = ranked(copy.root, (peer for peer in holders if peer == self._me or peer in alive))
        return not there or there[0] == self._me

    async def _make(self, copy: Copy, holders: list[str]) -> int:
        nbytes, lacking = 0, self._wanted(copy, holders) - len(holders)
        others = set(self._cluster.alive(copy.where)) - {*holders, self._me, copy.home}
        for peer in ranked(copy.root, others)[:ASKED_MAX]:
            try:
                kept = await self._cluster.keep(peer, copy)
            except WetwareError:
                continue
            if kept.done:
                self._said.setdefault(copy.id, {})[peer] = self._clock.monotonic()
            nbytes += min(kept.bytes, copy.charged) // PROGRESS_BYTES * PROGRESS_BYTES
            lacking -= kept.room
            if not lacking:
                break
        return nbytes

    def _surplus(self, copy: Copy, holders: list[str]) -> bool:
        """Whether enough others come before this node: the home, then those that match."""
        match = self._cluster.alive(copy.where)
        order = ranked(copy.root, (peer for peer in holders if peer != copy.home))
        order.sort(key=lambda peer: peer not in match)
        if copy.home in holders:
            order.insert(0, copy.home)
        return self._me not in order[: copy.copies]

    async def _promised(self, copy: Copy, *, drop: bool = False) -> bool:
        """Whether as many others as are to promise to keep theirs; then it may be dropped here."""
        if copy.id in self._changing:
            return False
        self._changing.add(copy.id)
        try:
            promised = max(copy.lease_until, self._leases.get(copy.id, 0.0))
            if promised > self._clock.time() or not await self._leased(copy):
                return False
            if drop:
                await self._drop(copy)
            return True
        finally:
            self._changing.discard(copy.id)

    async def _leased(self, copy: Copy) -> bool:
        ends: list[float] = []
        holders = self.holders(copy)
        wanted = self._wanted(copy, holders)
        others = set(holders) & set(self._cluster.alive()) - {self._me}
        for peer in sorted(ranked(copy.root, others), key=lambda peer: peer != copy.home):
            asked = self._clock.monotonic()
            try:
                lease_s = await self._cluster.lease(peer, copy)
            except WetwareError:
                continue
            if lease_s > 0:
                ends.append(asked + lease_s)
            if len(ends) == wanted:
                return min(ends) > self._clock.monotonic() + MARGIN_S
        return False
