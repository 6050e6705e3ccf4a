"""What this node has of the store's etcd, as the placement says."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.finding import error, ok
from wetware.errors import ConfigError, Unsupported, WetwareError
from wetware_sync.managed.child import Child, find
from wetware_sync.managed.pipes import Pipes, Room
from wetware_sync.managed.placement import CUT, RUNS, SERVES

if TYPE_CHECKING:
    from wetware.hookspecs import Finding, PluginContext
    from wetware.identity import PeerId
    from wetware_sync.managed.placement import Part, Placement, Placements

ENGINE: Final = "wetware_sync.etcd.engine"
"""Its packages are an extra."""


class Keeper:
    """Runs an etcd and its forwarders while this node is to have one.

    Attributes:
        child: That etcd; None while there is none.
    """

    def __init__(self, ctx: PluginContext, placements: Placements) -> None:
        self._ctx, self._placements = ctx, placements
        self._directory = ctx.data_dir / "etcd"
        self.child: Child | None = None

    def _part(self) -> Part | None:
        placement = self._placements.current
        return placement.members.get(self._ctx.overlay.peer_id) if placement else None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            changed, part = self._placements.changed, self._part()
            placement = self._placements.current
            if placement is None or (part is not None and part.state == CUT):
                await changed.wait()  # what one has that was cut is kept: the move may fail
                continue
            await self._ctx.run_sync(self._clean, part)
            if part is None:
                await changed.wait()
                continue
            try:
                await self._keep(placement, part)
            except* (OSError, WetwareError) as exc:
                self._ctx.log.warning("sync.no_etcd", why=str(exc.exceptions[0]))
                with anyio.move_on_after(5):
                    await changed.wait()

    def _clean(self, part: Part | None) -> None:
        """Remove what is of no use any more: an etcd that was left cannot come back."""
        keep = str(part.since) if part else ""
        if self._directory.exists():
            for each in self._directory.iterdir():
                if each.name != keep:
                    shutil.rmtree(each)

    async def _keep(self, placement: Placement, part: Part) -> None:
        """Have an etcd as long as this node has this part."""
        me = self._ctx.overlay.peer_id
        directory = self._directory / str(part.since)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Long, and not to be done when the store waits for it.
        await self._ctx.run_sync(import_module, ENGINE)
        room = Room(directory)
        try:
            pipes = Pipes(self._ctx, room, self._admitted)
            token = f"{self._ctx.overlay.cluster}-{part.since}"
            self.child = Child(room, me, token, run_sync=self._ctx.run_sync)
            others = tuple(sorted(placement.members.keys() - {me}))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pipes.run, lambda: self._placements.changed)
                new = placement.home is not None
                tasks.start_soon(partial(self.child.run, others, new=new))
                while (now := self._part()) and now.since == part.since and now.state != CUT:
                    await self._placements.changed.wait()
                tasks.cancel_scope.cancel()
        finally:
            self.child = None
            room.close()

    def _admitted(self) -> tuple[PeerId, ...]:
        placement = self._placements.current
        return placement.having(SERVES, RUNS) if placement else ()

    def findings(self) -> Iterable[Finding]:
        """For `ww doctor`."""
        if self.child is not None and self.child.failing:
            yield error(
                "the store's etcd",
                f"it does not run here: {self.child.failing}",
                "ww sync etcd status; or have another member in its place: ww sync etcd replace",
            )
        elif self.child is not None:
            yield ok("the store's etcd", f"{self.child.version} runs")

    async def describe(self) -> dict[str, Any]:
        """A struct EtcdPart: of the etcd here, or of that which this machine would run."""
        part: dict[str, Any] = {"node": str(self._ctx.overlay.peer_id)}
        mine = self._part()
        child = self.child
        if mine is None:
            try:
                await self._ctx.run_sync(import_module, ENGINE)
                _, part["version"] = await self._ctx.run_sync(find)
            except (ConfigError, Unsupported) as exc:
                part["failing"] = f"{exc.message}; {exc.hint}" if exc.hint else exc.message
            return part
        if child is None:
            return {**part, "state": mine.state, "failing": "its etcd does not run"}
        part |= {"state": mine.state, "version": child.version, "starts": child.starts}
        try:
            async with child.etcd() as etcd:
                status = await etcd.health()
        except WetwareError as exc:
            return {**part, "failing": child.failing or exc.message}
        alarms = "; ".join(status.errors)
        lonely = "it knows no leader: more than half of them are away"
        return {
            **part,
            "leads": status.leader == status.header.member_id,
            "index": status.raftIndex,
            "bytes": status.dbSize,
            "failing": alarms if status.leader else lonely,
        }
