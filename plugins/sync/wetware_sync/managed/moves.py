"""The store moves: to the etcd of some members, from one of them to another, and back to one node.

Each move is a placement that prepares it, and one that counts. Until the latter the store is where
it was, and whatever fails before is undone by one more placement; who was away then learns of that
as of any other. So a move that is cut off at any point leaves one place that has the store, or none
that serves it, but never two.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.files import Files
from wetware.errors import Busy, InvalidArgument, NotFound, Unsupported, WetwareError
from wetware.identity import PeerId
from wetware_sync import carry
from wetware_sync.embedded import backup
from wetware_sync.embedded.store import FILE
from wetware_sync.managed.child import EtcdError
from wetware_sync.managed.pipes import peer_socket
from wetware_sync.managed.placement import CUT, RUNS, SERVES, Part, Placement

if TYPE_CHECKING:
    from wetware_sync.etcd.wire import Etcd
    from wetware_sync.home import Home

MEMBERS: Final = (3, 5)
START_S: Final = 60.0
"""For the etcds to find each other, and for one that joins to have what the others have."""
LOOK_S: Final = 0.2
LOAD_S: Final = 900.0
"""For a member to take all of the store."""

Tell = Callable[[str], Awaitable[None]]


async def within(limit_s: float, ask: Callable[[], Awaitable[None]]) -> None:
    """Ask until etcd does not refuse any more; raises EtcdError."""
    why: WetwareError | None = None
    with anyio.move_on_after(limit_s):
        while True:
            try:
                return await ask()
            except WetwareError as exc:
                why = exc
            await anyio.sleep(LOOK_S)
    raise EtcdError(f"etcd is not ready after {limit_s:g} s: {why}")


class Moves:
    """Those that this node makes, one at a time."""

    def __init__(self, home: Home) -> None:
        self._home, self._ctx, self._placements = home, home.ctx, home.placements
        self._me = home.ctx.overlay.peer_id
        self._going_on = anyio.Lock()

    def _alone(self) -> anyio.Lock:
        if self._going_on.locked():
            raise Busy("the store is being moved already", hint="ww sync etcd status")
        return self._going_on

    def find(self, name: str) -> PeerId:
        """A member that is alive, by its name or peer ID; raises NotFound, InvalidArgument."""
        living = self._ctx.members("state=alive")
        found = {member.peer_id for member in living if name in (member.name, member.peer_id)}
        if not found:
            raise NotFound(f"no living member is called {name}", hint="ww ls")
        if len(found) > 1:
            raise InvalidArgument(f"{len(found)} members are called {name}: name peer IDs")
        return found.pop()

    # --- up ---------------------------------------------------------------------------------------

    async def up(self, names: Sequence[str], tell: Tell) -> None:
        """Move the store from here to an etcd of these members; raises what hinders it."""
        async with self._alone():
            _ = self._home.engine
            if self._home.has_own_etcd or self._placements.home != self._me:
                raise Unsupported("the store is in an etcd already", hint="ww sync etcd status")
            peers = sorted({self.find(name) for name in names})
            if len(peers) not in MEMBERS or len(peers) != len(names):
                raise InvalidArgument(f"name 3 or 5 members, each once, not {', '.join(names)}")
            await tell("looking at the etcd of each")
            await self._check(peers)
            now = self._placements.current
            version = now.version + 1 if now else 1
            parts = {peer: Part(version, RUNS) for peer in peers}
            signed = await self._placements.put(Placement(version, self._me, parts))
            try:
                await tell("starting etcd at each")
                await self._prepare(peers, signed)
                await self._wait_until_ready(peers)
                async with self._home.paused():
                    await tell("the store is closed, and copied")
                    source = self._home.directory / FILE
                    await self._load(self._me if self._me in peers else peers[0], source)
                    parts = {peer: Part(version, SERVES) for peer in peers}
                    await self._placements.put(Placement(version + 1, None, parts))
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self._give_up(version, Placement(version + 1, self._me), [self._me])
                raise
            await tell("the store is in etcd")
            await self._tell_all(peers)

    async def _check(self, peers: Sequence[PeerId]) -> None:
        parts = await asyncio.gather(*map(self.look, peers))
        bad = [f"{part['node']}: {part['failing']}" for part in parts if part["failing"]]
        if bad:
            raise Unsupported("; ".join(bad), hint="nothing was changed", code="unsupported.etcd")

    async def look(self, peer: PeerId) -> dict[str, Any]:
        """A struct EtcdPart of a member; without a `state` where it is away: that is what fails."""
        try:
            if peer == self._me:
                part = await self._home.keeper.describe()
            else:
                part = (await self._placements.ask(peer, "etcd"))["part"]
        except WetwareError as exc:
            return {"node": str(peer), "failing": exc.message}
        return {"failing": "", **part, "node": str(peer)}

    async def _prepare(self, peers: Sequence[PeerId], signed: bytes) -> None:
        for peer in peers:
            if peer != self._me:
                seed = self._placements.seed
                await self._placements.ask(peer, "prepare", placement=signed, seed=seed)

    async def _wait_until_ready(self, peers: Sequence[PeerId]) -> None:
        await within(START_S, lambda: self._check(peers))

    async def _load(self, peer: PeerId, source: Path) -> None:
        """Bring a store, which is closed, to a member."""
        if peer == self._me:
            await self.take_store(self._me, source)
            return
        await self._placements.tell(peer)
        stream = (await self._placements.ask(peer, "bring"))["stream"]
        with anyio.move_on_after(LOAD_S):
            if await carry.bring(source, stream):
                return
        raise EtcdError(f"{peer} has not taken the store")

    def check_bringer(self, sender: PeerId) -> bool:
        """Whether what a member brings is for the etcd here, or else for the embedded engine.

        As the placement says; raises Unsupported where that says neither.
        """
        now = self._placements.current
        if now is not None and now.home == sender and self._me in now.having(RUNS):
            return True
        if now is None or now.home is not None or self._serving or sender not in now.having(RUNS):
            raise Unsupported("no store is to be brought here")
        return False

    async def take_store(self, sender: PeerId, source: Path) -> int:
        """Have a store that a member has brought; returns its epoch. Raises as `check_bringer`."""
        if self.check_bringer(sender):
            return await self._home.load(source)
        return await self._ctx.run_sync(backup.restore, Files(self._home.directory), source)

    @property
    def _serving(self) -> tuple[PeerId, ...]:
        now = self._placements.current
        return now.having(SERVES) if now else ()

    async def _give_up(
        self, version: int, instead: Placement, electors: Collection[PeerId]
    ) -> None:
        """The move that this version has prepared has not happened."""
        now = self._placements.current
        if now is not None and now.version == version:  # else that counts, or another one does
            await self._placements.agree(instead, electors)
            await self._tell_all(tuple(now.members))

    async def _tell_all(self, peers: Sequence[PeerId]) -> None:
        """Those that are away learn of it when they come."""

        async def tell(peer: PeerId) -> None:
            with contextlib.suppress(WetwareError):
                await self._placements.tell(peer)

        await asyncio.gather(*(tell(peer) for peer in peers if peer != self._me))

    # --- replace ----------------------------------------------------------------------------------

    async def replace(self, old: str, new: str, tell: Tell) -> None:
        """Have another member in the place of one; run again it goes on where it was cut off.

        One that is there leaves when the other one has what it has. One that is away leaves first:
        etcd takes nobody in while one of its members is away.
        """
        async with self._alone():
            now = self._now()
            gone, peer = self._leaver(old), self.find(new)
            if peer in now.having(SERVES):
                raise InvalidArgument(f"{new} has a part in the store's etcd already")
            part = await self.look(peer)
            if part["failing"] and peer not in now.members:
                raise Unsupported(f"{new}: {part['failing']}", code="unsupported.etcd")
            parts = dict(now.members)
            async with await self._home.etcd() as etcd:
                if gone in parts and (await self.look(gone))["failing"]:
                    await tell(f"{old} is away, and leaves")
                    await _remove(etcd, gone)
                    del parts[gone]
                since = parts[peer].since if peer in parts else now.version + 1
                electors = tuple(other for other in now.having(SERVES) if other in parts)
                await tell(f"{new} joins")
                # Refused until all have been connected for some seconds.
                await within(START_S, lambda: _add(etcd, peer))
                try:
                    joining = Placement(now.version + 1, None, {**parts, peer: Part(since, RUNS)})
                    await self._placements.agree(joining, electors)
                    await self._prepare([peer], self._placements.signed)
                    await within(START_S, lambda: _promote(etcd, peer))
                except BaseException:
                    with anyio.CancelScope(shield=True), contextlib.suppress(WetwareError):
                        await self._undo(etcd, peer)
                    raise
                if gone in parts:
                    await tell(f"{old} leaves")
                    await _remove(etcd, gone)
                    del parts[gone]
            parts[peer] = Part(since, SERVES)
            version = self._now().version + 1
            await self._placements.agree(Placement(version, None, parts), electors)
            await tell(f"{new} is in the place of {old}")
            await self._tell_all([*parts, gone])

    def _now(self, *, halted: bool = False) -> Placement:
        """The placement, of which this node has to be a part that serves; raises Unsupported.

        With `halted` also one where a move to one node was cut off, which this one takes up again.
        """
        now = self._placements.current
        mine = RUNS if halted and not self._serving else SERVES
        if now is None or now.home is not None or self._me not in now.having(mine):
            raise Unsupported(
                "the store is in no etcd of members, or this node has no part in it",
                hint="ww sync etcd status",
            )
        return now

    def _leaver(self, name: str) -> PeerId:
        """One that has a part, alive or not, or had one that nobody has now; raises NotFound."""
        now = self._now()
        named = {member.name: member.peer_id for member in self._ctx.members()}
        for peer in now.members:
            if name == peer or named.get(name) == peer:
                return peer
        if len(now.having(SERVES)) % 2 == 0:
            return named.get(name) or PeerId.parse(name)
        raise NotFound(f"{name} has no part in the store's etcd", hint="ww sync etcd status")

    async def _undo(self, etcd: Etcd, peer: PeerId) -> None:
        joined = await _of(etcd, peer)
        if joined is not None and not joined.isLearner:
            return  # it counts; whoever runs the command again goes on from there
        await _remove(etcd, peer)
        now = self._now()
        parts = {other: part for other, part in now.members.items() if other != peer}
        again = Placement(now.version + 1, None, parts)
        await self._placements.agree(again, now.having(SERVES))
        await self._tell_all([peer])

    # --- down -------------------------------------------------------------------------------------

    async def down(self, to: str, tell: Tell) -> None:
        """Move the store to the embedded engine of one node."""
        async with self._alone():
            now = self._now(halted=True)
            target = self.find(to)
            before = {peer: Part(p.since, SERVES) for peer, p in now.members.items()}
            parts = await asyncio.gather(*map(self.look, now.members))
            away = {part["node"] for part in parts if "state" not in part}
            halted = {
                peer: Part(part.since, CUT if peer in away else RUNS)
                for peer, part in now.members.items()
            }
            version = now.version + 1
            copy = self._ctx.data_dir / f"restore-{secrets.token_hex(8)}"
            try:
                await tell("the store is closed, and copied")
                closing = Placement(version, None, halted)
                await self._close(closing)
                await self._home.settled()
                await self._home.dump(copy)
                await self._load(target, copy)
                back = Placement(version + 1, target, {})
                await self._placements.agree(back, tuple(now.members))
            except BaseException:
                with anyio.CancelScope(shield=True), contextlib.suppress(WetwareError):
                    again = Placement(version + 1, None, before)
                    await self._give_up(version, again, tuple(before))
                raise
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.Path(copy).unlink(missing_ok=True)
            await tell(f"the store is at {to}")
            await self._tell_all([target, *now.members])

    async def _close(self, closing: Placement) -> None:
        """Nobody serves it any more, or can: who has not agreed is not let in to the others."""
        took = await self._placements.agree(closing, tuple(closing.members))
        if missing := {*closing.having(RUNS)} - took:
            raise Busy(f"{', '.join(sorted(missing))} went away meanwhile", hint="try again")


async def _of(etcd: Etcd, peer: PeerId) -> Any:
    """The etcd of a member, as the others know it; None: it is none of them."""
    url = f"unix://{peer_socket(peer)}"
    return next((each for each in await etcd.members() if url in each.peerURLs), None)


async def _add(etcd: Etcd, peer: PeerId) -> None:
    if await _of(etcd, peer) is None:
        await etcd.add(f"unix://{peer_socket(peer)}")


async def _promote(etcd: Etcd, peer: PeerId) -> None:
    found = await _of(etcd, peer)
    if found is None:
        raise EtcdError(f"{peer} was removed meanwhile")
    if found.isLearner:
        await etcd.promote(found.ID)


async def _remove(etcd: Etcd, peer: PeerId) -> None:
    if found := await _of(etcd, peer):
        await etcd.remove(found.ID)
