"""The recorder: a log on disk, and what is known of others' logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread

from wetware.base.log import get_logger
from wetware.broker.records import plain
from wetware_audit.findings import judge_audit
from wetware_audit.held import BREAKS
from wetware_audit.log import AuditLog
from wetware_audit.service import AuditService
from wetware_audit.spread import Checkpoints

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.hookspecs import Finding, PluginContext, Service
    from wetware_audit.chain import Checkpoint

log = get_logger("audit")


class AuditRecorder:
    """Keeps records in a log of signed hashes. See `wetware.hookspecs.Recorder`.

    Args:
        ctx: Its own; the log is in `ctx.data_dir`.
        sign: The node's signature of checkpoints.

    Attributes:
        log: Once `run` has opened it.
        checkpoints: Likewise: what is known of others' logs.
    """

    name = "audit"

    def __init__(self, ctx: PluginContext, sign: Callable[[bytes], bytes]) -> None:
        self.ctx, self._sign = ctx, sign
        self.on_checkpoint: Callable[[Checkpoint], None] = lambda _: None
        self._service = AuditService(ctx)
        self.services: tuple[Service, ...] = (self._service,)
        self.log: AuditLog
        self.checkpoints: Checkpoints

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Open the log; close it once cancelled. Raises ConfigError where it cannot be used."""
        ctx = self.ctx
        before = ctx.data_dir.parent.parent / "audit"  # where the core kept it
        if before.is_dir() and not any(ctx.data_dir.iterdir()):
            before.rename(ctx.data_dir)
        self.use(
            AuditLog(
                ctx.data_dir, ctx.overlay.peer_id, self._sign, clock=ctx.clock, config=ctx.config
            )
        )
        try:
            self.checkpoints = Checkpoints(ctx, self.log, self.record, ctx.data_dir)
            self._service.checkpoints = self.checkpoints
            self.on_checkpoint = self.checkpoints.signed
            task_status.started()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                # Not `ctx.run_sync`: readers of a long log who have gone may have left its threads
                # at work for a while, and the node waits for this to stop.
                await to_thread.run_sync(self.log.close)

    def use(self, opened: AuditLog) -> None:
        """Record to this log from now on, and what was wrong with it."""
        self.log = self._service.log = opened
        opened.watch(self._service.written, lambda checkpoint: self.on_checkpoint(checkpoint))
        for event, fields in opened.findings:
            log.error(event, **fields, hint="`ww audit verify` says more")
            self.report({"event": event, **fields})

    async def admit(self, record: Mapping[str, Any]) -> None:
        """Write a record of what is about to be given; raises Unrecorded."""
        await self.log.append(dict(record))

    def report(self, record: Mapping[str, Any], *, ending: bool = False) -> None:
        """Write a record of what has taken effect, as soon as the disk allows."""
        self.log.append_soon(dict(record), reserved=ending)

    async def written(self) -> None:
        """Wait until what was reported is on the disk, as `fsync` says; raises Unrecorded."""
        await self.log.written()

    def record(self, event: str, **fields: object) -> None:
        log.info(event, **fields)
        self.report({"event": event, **{name: plain(value) for name, value in fields.items()}})

    def findings(self) -> Iterable[Finding]:
        """Whether decisions are recorded, and whether this log and those of members are whole."""
        breaks = self.checkpoints.held.breaks().items()
        return judge_audit(
            self.log.failing,
            [event for event, _ in self.log.findings],
            [f"{peer}: {BREAKS[why]}" for peer, why in breaks if not self.ctx.evicted(peer)],
            on_full=self.log.config.on_full,
            lost=self.log.lost,
            last=self.log.seq,
        )
