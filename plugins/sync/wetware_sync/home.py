"""The store of the cluster, which is at one node, and the error at every other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from wetware.base.files import Files
from wetware.errors import Unsupported
from wetware_sync.embedded.engine import EmbeddedEngine
from wetware_sync.engine import Closed

if TYPE_CHECKING:
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
        self._engine: Engine | None = None

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
        """Have the store open, if it is here."""
        if self.peer != self.ctx.overlay.peer_id:
            task_status.started()
            await anyio.sleep_forever()
        files = Files(self.ctx.data_dir / "store")
        engine = EmbeddedEngine(files, run_sync=self.ctx.run_sync)
        self._engine = engine
        try:
            await engine.run(task_status=task_status)
        finally:
            self._engine = None

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
