"""Copies for real: `duties` with the store, the members and the clock."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.base.bounds import Places, Recent
from wetware.base.finding import counted
from wetware.base.tasks import Tasks
from wetware.errors import InvalidArgument, LimitExceeded, TimedOut, WetwareError
from wetware.identity import PeerId
from wetware_blob.exchange.find import ROOTS_MAX
from wetware_blob.findings import findings
from wetware_blob.replicas.duties import (
    COPIES_MAX,
    LEASE_S,
    WHERE_CHARS_MAX,
    Copy,
    Kept,
    Replicas,
    Wanted,
)
from wetware_blob.store.index import STORE_ID_BYTES, batches
from wetware_blob.store.pins import Pin
from wetware_blob.store.quota import PINS_PER_OWNER_MAX

if TYPE_CHECKING:
    from wetware.hookspecs import Finding, PluginContext
    from wetware_blob.format.cid import Cid
    from wetware_blob.store.store import Store
    from wetware_blob.transfers import State

ROUND_S: Final = 30.0
"""At least so often all copies are looked at; more often where the grace is short."""
SOON_S: Final = 0.5
"""After a pin or a member has changed: what else changes then is seen in the same round."""
POLL_S: Final = 0.25
ASKED_AT_ONCE: Final = 32
TENDED_AT_ONCE: Final = 8
ANSWER_S: Final = 5.0
LEASE_ANSWER_S: Final = 20.0
"""All that a copy reaches is looked up, and the promise written, before it is given."""
KEEPING_MAX: Final = 4
"""Copies that are fetched at a time."""
KEEPING_PER_ASKER_MAX: Final = 2
WAITING_MAX: Final = 256
"""Copies that were promised room and wait for their turn; nobody is promised more."""
WAITING_PER_ASKER_MAX: Final = 64
REFUSED_S: Final = 20.0
"""For so long a copy is refused that could not be fetched: less than STALLED_S, so that who waits
for it sees it tried again."""
REFUSED_MAX: Final = 1024
NAMED_MAX: Final = 3
"""Pins that an error names."""
STALLED_S: Final = 60.0
"""Who waits for copies gives up when nothing has come of it for so long."""

Fetch = Callable[["Cid", str, Callable[..., Pin], Callable[[int], None]], Awaitable[object]]
"""Fetches a root for an owner and pins it: as what is made of both, its kind and size, and the
time; and tells what is charged for what has come."""


@dataclass(eq=False, slots=True)
class _Keeping:
    """A copy that is being fetched, or waits for its turn among those of who asked."""

    owner: str
    copy: Copy
    turn: asyncio.Semaphore
    fetched: int = 0

    def count(self, charged: int) -> None:
        self.fetched = charged
        if charged > self.copy.charged:
            raise LimitExceeded(
                f"{self.owner} said that it is charged {self.copy.charged} bytes, and it is more"
            )


class Disk:
    """`duties.Disk`: a copy is a pin of who asked for it, named by its home and the home's pin.

    Of homes that are `forgotten` (see BlobConfig) there is none, and none is taken.
    """

    def __init__(self, ctx: PluginContext, store: Store, fetch: Fetch) -> None:
        self._ctx, self._store, self._fetch = ctx, store, fetch
        self._forgotten: tuple[str, ...] = ctx.config.forgotten
        self._me = str(ctx.overlay.peer_id)
        self._pins: dict[bytes, Pin] = {}
        self._keeping: dict[bytes, _Keeping] = {}
        self._refused: Recent[bytes, None] = Recent(REFUSED_S, REFUSED_MAX, ctx.clock.monotonic)
        self._places = asyncio.Semaphore(KEEPING_MAX)
        self.tasks = Tasks()
        self.kept: Callable[[], Awaitable[None]]
        """Called when one has been kept."""

    @property
    def id(self) -> bytes:
        return self._store.id

    async def read(self, *, single: bool) -> list[Copy]:
        pins = {}
        for pin in await self._store.pins():
            copy = self.copy(pin)
            if copy.home != self._me and self._forgets(copy):
                await self._store.unpin(pin.owner, pin.root, pin.name)
            elif single or copy.copies > 1 or copy.home != self._me:
                pins[copy.id] = pin, copy
        self._pins = {id_: pin for id_, (pin, _) in pins.items()}
        return [copy for _, copy in pins.values()]

    def _forgets(self, copy: Copy) -> bool:
        store = copy.pin[:STORE_ID_BYTES].hex()
        return any(home in self._forgotten for home in (copy.home, f"{copy.home}/{store}"))

    def copy(self, pin: Pin) -> Copy:
        """What a pin is to the cluster: this node's own, or one that it keeps."""
        home, name = self._me, b""
        if pin.owner.startswith("node:"):
            home, _, text = pin.name.partition("/")
            name = bytes.fromhex(text)
        return Copy(
            pin.root,
            home,
            name or name_of(self.id, pin),
            pin.copies,
            pin.where,
            pin.charged,
            pin.lease_until,
        )

    async def keep(self, asker: str, copy: Copy) -> Kept:
        owner = f"node:{asker}"
        usage = await self._store.usage(owner)
        if (keeping := self._keeping.get(copy.id)) is not None:
            return Kept(room=True, bytes=keeping.fetched)
        others = [other for other in self._keeping.values() if other.owner == owner]
        promised = sum(other.copy.charged for other in others)
        if (
            self._forgets(copy)
            or copy.id in self._refused
            or len(self._keeping) >= WAITING_MAX
            or len(others) >= WAITING_PER_ASKER_MAX
            or usage.charged + promised + copy.charged > usage.charged_max
            or usage.pins + len(others) >= PINS_PER_OWNER_MAX
        ):
            return Kept(room=False)
        turn = others[0].turn if others else asyncio.Semaphore(KEEPING_PER_ASKER_MAX)
        self._keeping[copy.id] = keeping = _Keeping(owner, copy, turn)
        self.tasks.start(self._keep(keeping))
        return Kept(room=True)

    async def _keep(self, keeping: _Keeping) -> None:
        owner, copy = keeping.owner, keeping.copy
        name = f"{copy.home}/{copy.pin.hex()}"
        pin = partial(Pin, name=name, copies=copy.copies, where=copy.where)
        try:
            async with keeping.turn, self._places:
                await self._fetch(copy.root, owner, pin, keeping.count)
            await self.kept()
        except WetwareError as exc:
            self._refused.put(copy.id, None)
            self._ctx.log.warning("blob.copy_not_kept", root=str(copy.root), why=exc.message)
        finally:
            del self._keeping[copy.id]

    async def amend(self, copy: Copy) -> bool:
        if (pin := self._pins.get(copy.id)) is None:
            return False
        terms: dict[str, Any] = {"lease_until": copy.lease_until}
        if copy.home != self._me:  # of its own a user may have changed them since they were read
            terms |= {"copies": copy.copies, "where": copy.where}
        return await self._store.amend(pin, **terms)

    async def drop(self, copy: Copy) -> None:
        if (pin := self._pins.get(copy.id)) is not None:
            await self._store.unpin(pin.owner, pin.root, pin.name)

    async def check_whole(self) -> None:
        await self._store.check_pins()


def name_of(store: bytes, pin: Pin) -> bytes:
    """Which one it is of its home's pins: the ID of the store, and a hash."""
    text = repr((pin.owner, bytes(pin.root), pin.name))
    return store + hashlib.sha256(text.encode()).digest()[: 16 - len(store)]


def selector(where: str) -> str:
    """Of the members that can have copies."""
    return f"service=blob,state=alive{',' if where else ''}{where}"


class Members:
    """`duties.Cluster`: the siblings."""

    def __init__(self, ctx: PluginContext) -> None:
        self._ctx, self._grace_s = ctx, ctx.config.grace_s
        self._places = asyncio.Semaphore(ASKED_AT_ONCE)

    def alive(self, where: str = "") -> Collection[str]:
        return {str(member.peer_id) for member in self._ctx.members(selector(where))}

    def gone(self, peer: str) -> bool:
        for member in self._ctx.members():
            if str(member.peer_id) == peer:
                away = member.state not in ("alive", "suspect")
                return away and member.since_s >= self._grace_s
        return True

    async def _call(self, peer: str, method: str, answer_s: float = ANSWER_S, **given: Any) -> Any:
        sibling = await self._ctx.sibling(PeerId.parse(peer))
        with contextlib.closing(sibling), rpc.time_limit(answer_s):
            return await sibling.call(method, **given)

    async def holding(self, ids: list[bytes]) -> dict[str, set[bytes]]:
        found: dict[str, set[bytes]] = {}

        async def ask(peer: str) -> None:
            with contextlib.suppress(WetwareError):
                async with self._places:
                    holding = (await self._call(peer, "holding", ids=ids))["holding"]
                found[peer] = {id_ for id_, yes in zip(ids, holding, strict=False) if yes}

        async with asyncio.TaskGroup() as tasks:
            for peer in self.alive():
                if peer != str(self._ctx.overlay.peer_id):
                    tasks.create_task(ask(peer))
        return found

    async def wanted(self, home: str, ids: list[bytes]) -> Wanted:
        answer = await self._call(home, "wanted", ids=ids)
        store, found = answer["store"], answer["wanted"]
        if len(store) != STORE_ID_BYTES:
            raise InvalidArgument(f"{home} has a store whose ID is no ID")
        if len(found) != len(ids):
            raise InvalidArgument(f"{home} answers {len(found)} of {len(ids)}")
        if any(
            each["copies"] > COPIES_MAX or len(each["where"]) > WHERE_CHARS_MAX for each in found
        ):
            raise InvalidArgument(f"{home} wants what no pin can")
        return store, [(each["copies"], each["where"]) for each in found]

    async def keep(self, peer: str, copy: Copy) -> Kept:
        told = {
            "root": bytes(copy.root),
            "home": copy.home,
            "pin": copy.pin,
            "copies": copy.copies,
            "where": copy.where,
            "bytes": copy.charged,
        }
        return Kept(**await self._call(peer, "keep", copy=told))

    async def lease(self, peer: str, copy: Copy) -> float:
        return float((await self._call(peer, "lease", LEASE_ANSWER_S, id=copy.id))["seconds"])

    async def drop(self, peer: str, ids: list[bytes]) -> None:
        for some in batches(ids, ROOTS_MAX):
            await self._call(peer, "drop", ids=some)


class Keeper:
    """The copies of this node's pins, and those that it keeps for others.

    Args:
        ctx: The plugin's context; its config is a BlobConfig.
        store: Its store.
        fetch: Fetches and pins.

    Attributes:
        found: For `ww doctor`, in the last round.
        asked: Places for other members that ask what takes long.
    """

    def __init__(self, ctx: PluginContext, store: Store, fetch: Fetch) -> None:
        self._ctx, self._store, self._grace_s = ctx, store, ctx.config.grace_s
        self.disk, members = Disk(ctx, store, fetch), Members(ctx)
        me = str(ctx.overlay.peer_id)
        self.replicas = Replicas(me, self.disk, members, ctx.clock, grace_s=self._grace_s)
        self.disk.kept = self.replicas.refresh
        self.found: list[Finding] = []
        self.asked = Places()
        self._changed = asyncio.Event()
        self._coming: dict[bytes, int] = {}  # bytes of a copy that others have fetched at most

    async def run(self) -> None:
        """Look after copies until cancelled."""
        unwatch = self._ctx.watch_members(lambda _: self._changed.set(), "service=blob")
        try:
            while True:
                try:
                    await self._round()
                except WetwareError as exc:  # the service goes on: what is here is served
                    self._ctx.log.warning("blob.copies_not_tended", why=exc.message)
                pause_s = min(ROUND_S, self._grace_s / 4) * random.uniform(0.75, 1.25)  # noqa: S311 no secret
                with anyio.move_on_after(pause_s):
                    await self._changed.wait()
                    await anyio.sleep(SOON_S)
        finally:
            unwatch()
            with anyio.CancelScope(shield=True):
                await self.disk.tasks.end()

    def changed(self) -> None:
        """Pins have: do not wait for the next round."""
        self._changed.set()

    async def _round(self) -> None:
        self._changed.clear()
        await self.replicas.refresh()
        places = asyncio.Semaphore(TENDED_AT_ONCE)

        async def tend(id_: bytes) -> None:
            async with places:
                try:
                    nbytes = await self.replicas.tend(id_)
                    if nbytes > self._coming.get(id_, 0):
                        self._coming[id_] = nbytes
                except WetwareError as exc:
                    self._ctx.log.warning("blob.copy_not_tended", why=exc.message)

        for id_ in self._coming.keys() - self.replicas.copies.keys():
            del self._coming[id_]
        for ids in batches(self.replicas.copies, ROOTS_MAX):
            await self.replicas.survey(ids)
            async with asyncio.TaskGroup() as tasks:
                for id_ in ids:
                    tasks.create_task(tend(id_))
        lacking = [str(copy.root) for copy in self.replicas.lacking()]
        blocks, pins = await self._store.damage()
        usage, free_bytes = await self._store.usage(), await self._store.free_bytes()
        self.found = [*findings(lacking, blocks, len(pins), usage, free_bytes)]

    def holders(self, pin: Pin) -> list[str]:
        """Who has a pin that is here, as far as is known."""
        return self.replicas.holders(self.disk.copy(pin))

    async def made(self, pin: Pin, ack: int, state: State) -> None:
        """Return when so many have a pin that was just made here. Raises TimedOut.

        The copies are made also where nobody waits for them.
        """
        id_ = self.disk.copy(pin).id
        await self.replicas.refresh()
        self.replicas.pinned(id_)
        self._changed.set()
        most, stalled = (0, 0), self._stalled(STALLED_S)
        while (copies := len(self.holders(pin))) < ack:
            state.copies, state.doing = copies, f"copying: {copies} of {ack} members have it"
            most = max(most, (copies, await self.replicas.tend(id_)))  # who goes is no progress
            if stalled(most):
                raise _too_few(
                    f"{copies} of {ack} members have it, and nothing came for {STALLED_S:g} s; "
                    "it is pinned here, and copies are made when they can be"
                )
            await anyio.sleep(POLL_S)
        state.copies = copies

    async def drain(self, tell: Callable[[str], object]) -> None:
        """Hand all over that is pinned here; nothing new is taken until the next start.

        Where that fails, or is cancelled, this node is as before, unless another call goes on or
        has come to its end. Raises StoreFailed where pins are damaged: nobody knows what else is to
        be handed over.

        Args:
            tell: Takes how far it is, in words.
        """
        await self.disk.check_whole()
        others = self._ctx.members("service=blob,state=alive")
        if all(member.is_self for member in others) and await self._store.pins():
            raise InvalidArgument(
                "there is no other member that could take what is pinned here",
                hint="ww ls service=blob",
                code="invalid.alone",
            )
        self.replicas.draining += 1
        try:
            await self._hand_over(tell)
        except BaseException:
            self.replicas.draining -= 1
            self._changed.set()
            raise

    async def _hand_over(self, tell: Callable[[str], object]) -> None:
        replicas = self.replicas
        await replicas.refresh()
        stalled = self._stalled(STALLED_S + LEASE_S)
        while (left := replicas.copies.keys() - replicas.handed) or not replicas.single:
            many = counted(len(left), "pin")
            tell(f"handing over: {many} left")
            self._changed.set()
            if stalled((len(replicas.handed), sum(self._coming.values()))):
                some = [replicas.copies[id_] for id_ in itertools.islice(left, NAMED_MAX)]
                named = ", ".join(f"{c.root} (on {c.where or 'any'})" for c in some)
                raise _too_few(f"other members have too few copies of {many}: {named}")
            await anyio.sleep(POLL_S)
        await self.disk.check_whole()  # they may be found while it goes on

    def _stalled(self, stalled_s: float) -> Callable[[tuple[int, int]], bool]:
        """Tells of what it is given again and again whether that is the same for so long."""
        now, last, until = self._ctx.clock.monotonic, (-1, -1), 0.0

        def stalled(come: tuple[int, int]) -> bool:
            nonlocal last, until
            if come != last:
                last, until = come, now() + stalled_s
            return now() > until

        return stalled


def _too_few(what: str) -> TimedOut:
    return TimedOut(
        what,
        hint="see who is there and has room: ww ls service=blob; ww doctor",
        code="overlay.copies",
    )
