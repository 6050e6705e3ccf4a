"""The store of the cluster, which is at one node, and the error at every other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from wetware.base.files import Files
from wetware.errors import Unsupported
from wetware_sync.embedded import backup
from wetware_sync.embedded.engine import EmbeddedEngine
from wetware_sync.engine import Closed

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.abc import TaskStatus

    from wetware.hookspecs import PluginContext
    from wetware.identity import PeerId
    from wetware_sync.engine import Engine


class Home:
    """What the services of this plugin share.

    Args:
        ctx: The plugin's; its config is a SyncConfig.
    """

    def __init__(self, ctx: PluginContext) -> None:
        self.ctx = ctx
        self._directory = ctx.data_dir / "store"
        self._engine: Engine | None = None
        self._restoring = anyio.Lock()
        self._replace, self._closed, self._replaced = anyio.Event(), anyio.Event(), anyio.Event()

    @property
    def peer(self) -> PeerId | None:
        """Where the store is; None where the founder is not known (yet)."""
        return self.ctx.config.home or self.ctx.overlay.founder()

    @property
    def engine(self) -> Engine:
        """The engine that runs now; raises Unsupported "unsupported.not_home", Closed."""
        if self.peer != self.ctx.overlay.peer_id:
            raise Unsupported(
                f"the store of keys and locks is not here, but at {self.peer or 'no known node'}",
                hint="log in there; `session.kv`, `session.sync`, `session.names` do it themselves",
                code="unsupported.not_home",
            )
        if self._engine is None:
            raise Closed("the store is not open", hint="the node's log says why; `ww doctor`")
        return self._engine

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Have the store open, if it is here; it is closed while another one takes its place."""
        if self.peer != self.ctx.overlay.peer_id:
            task_status.started()
            await anyio.sleep_forever()
        while True:
            engine = EmbeddedEngine(Files(self._directory), run_sync=self.ctx.run_sync)
            try:
                async with anyio.create_task_group() as tasks:
                    await tasks.start(engine.run)
                    self._engine = engine
                    task_status.started()
                    await self._replace.wait()
                    tasks.cancel_scope.cancel()
            finally:
                self._engine = None
            task_status = anyio.TASK_STATUS_IGNORED
            self._replace = anyio.Event()
            self._closed.set()
            await self._replaced.wait()

    async def backup(self, path: Path) -> None:
        """Copy the store to a new file; raises as `engine` and the engine's."""
        engine = self.engine
        assert isinstance(engine, EmbeddedEngine)  # noqa: S101  # the only one so far
        await engine.backup(path)

    async def restore(self, source: Path) -> int:
        """Put a copy in the place of the store; returns the new epoch. Raises InvalidArgument."""
        async with self._restoring:
            _ = self.engine
            self._closed, self._replaced = anyio.Event(), anyio.Event()
            self._replace.set()
            with anyio.CancelScope(shield=True):  # else nothing would be open any more
                await self._closed.wait()
                try:
                    epoch = await self.ctx.run_sync(backup.restore, Files(self._directory), source)
                finally:
                    self._replaced.set()
        return epoch

    def describe(self) -> dict[str, Any]:
        """A struct Home, as a reply."""
        return {"home": {"node": str(self.peer or ""), "engine": "embedded"}}

    async def status(self) -> dict[str, Any]:
        """A struct Status, as a reply."""
        engine = self.engine
        status = await engine.status()
        return {
            "status": {
                "engine": status.engine,
                "epoch": status.epoch,
                "revision": status.revision,
                "compacted": status.compacted,
                "keys": status.keys,
                "bytes": status.nbytes,
                "leases": status.leases,
                "watchers": status.watches,
                "authority": str(engine.authority.peer_id),
                "failing": status.failing,
                "failover": status.failover,
            }
        }
