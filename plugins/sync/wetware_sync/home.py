"""The store of the cluster, where this node has it, and the error where it has not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.files import Files
from wetware.base.private_files import read_private_file
from wetware.base.tasks import Tasks
from wetware.errors import ConfigError, Unsupported, WetwareError
from wetware.identity import PeerId
from wetware_sync.embedded import backup
from wetware_sync.embedded.engine import EmbeddedEngine
from wetware_sync.engine import Closed
from wetware_sync.managed.keeper import Keeper
from wetware_sync.managed.placement import SERVES, Placement, Placements

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.hookspecs import PluginContext
    from wetware_sync.config import SyncConfig
    from wetware_sync.engine import Engine
    from wetware_sync.etcd.wire import Etcd

AGAIN_S: Final = 0.5
"""Between two tries to open the store."""
FILE_BYTES_MAX: Final = 64 << 10


class Home:
    """What the services of this plugin share.

    Args:
        ctx: The plugin's; its config is a SyncConfig.

    Attributes:
        tasks: What goes on beside calls; it ends with the store.
        placements: Where the store is.
        keeper: The etcd of this node, if it is to have one.
        has_own_etcd: The store is in one that is no child of members: `engine = "etcd"`.
    """

    def __init__(self, ctx: PluginContext) -> None:
        self.ctx = ctx
        self.has_own_etcd: bool = ctx.config.engine == "etcd"
        self._me = ctx.overlay.peer_id
        self.directory = ctx.data_dir / "store"
        self.tasks = Tasks()
        self.placements = Placements(ctx)
        self.keeper = Keeper(ctx, self.placements)
        self._engine: Engine | None = None
        self._failing = ""
        self._pausing, self._paused = anyio.Lock(), False
        self._kind = ""  # of the engine that runs, or "" for none
        self._ended = anyio.Event()

    @property
    def place(self) -> tuple[str, tuple[PeerId, ...]]:
        """The engine that has the store, "embedded" or "etcd", and where users log in for it.

        That is empty where nobody is known to have it (now).
        """
        if self.has_own_etcd:
            return "etcd", tuple(map(PeerId.parse, self.ctx.config.entrances))
        if (now := self.placements.current) is not None and now.home is None:
            return "etcd", now.having(SERVES)
        home = self.placements.home
        return "embedded", (home,) if home else ()

    @property
    def engine(self) -> Engine:
        """The engine that runs now; raises Unsupported "unsupported.not_home", Closed."""
        kind, there = self.place
        if not there and kind == "etcd" and not self.has_own_etcd:
            raise Closed("the store is being moved", hint="`ww sync etcd status`")
        if self._me not in there:
            raise Unsupported(
                f"the store of keys and locks is not here, but at {_shown(there)}",
                hint="log in there; `session.kv`, `session.sync`, `session.names` do it themselves",
                code="unsupported.not_home",
            )
        if self._engine is None:
            why = f": {self._failing}" if self._failing else ""
            raise Closed(f"the store is not open{why}", hint="`ww doctor` at this node")
        return self._engine

    def _wanted(self) -> str:
        """Which engine is to run here now: "embedded", "etcd" or "" for none."""
        kind, there = self.place
        return "" if self._paused or self._me not in there else kind

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Have the store open whenever it is here."""
        await self.ctx.run_sync(self.placements.load)
        await self._end_move()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.placements.spread)
                tasks.start_soon(self.keeper.run)
                await self._serve(task_status)
        finally:
            with anyio.CancelScope(shield=True):
                await self.tasks.end()

    async def _end_move(self) -> None:
        """Nothing has moved where a crash has cut a move off."""
        placement, me = self.placements.current, self._me
        if placement is not None and placement.home == me and placement.members:
            await self.placements.put(Placement(placement.version + 1, me))

    async def _serve(self, task_status: TaskStatus[None]) -> None:
        run = {"embedded": self._run_embedded, "etcd": self._run_etcd}
        while True:
            self._kind = self._wanted()
            async with anyio.create_task_group() as tasks:
                if self._kind:
                    await tasks.start(run[self._kind])
                task_status.started()
                task_status = anyio.TASK_STATUS_IGNORED
                while self._wanted() == self._kind:
                    await self.placements.changed.wait()
                tasks.cancel_scope.cancel()
            self._kind = ""
            ended, self._ended = self._ended, anyio.Event()
            ended.set()

    async def _run_embedded(self, *, task_status: TaskStatus[None]) -> None:
        engine = EmbeddedEngine(Files(self.directory), run_sync=self.ctx.run_sync)
        try:
            async with anyio.create_task_group() as tasks:
                await tasks.start(engine.run)
                self._engine = engine
                task_status.started()
        finally:
            self._engine = None

    async def _run_etcd(self, *, task_status: TaskStatus[None]) -> None:
        """The etcd of this node may come and go, and the others may be away."""
        from wetware_sync.etcd.engine import EtcdEngine  # here: its packages are an extra

        task_status.started()
        while True:
            try:
                engine = EtcdEngine(await self.etcd())
                async with anyio.create_task_group() as tasks:
                    await tasks.start(engine.run)
                    self._engine, self._failing = engine, ""
            except* WetwareError as exc:
                self._failing = str(exc.exceptions[0])
                self.ctx.log.warning("sync.etcd_not_open", why=self._failing)
            finally:
                self._engine = None
            await anyio.sleep(AGAIN_S)

    async def etcd(self) -> Etcd:
        """What speaks to the etcd that has the store; raises Closed, ConfigError."""
        if self.has_own_etcd:
            return await self.ctx.run_sync(own_etcd, self.ctx.config)
        if self.keeper.child is None:
            raise Closed("its etcd does not run", hint="ww sync etcd status")
        return self.keeper.child.etcd()

    async def settled(self) -> None:
        """Return when nothing is open that is not to be."""
        while self._kind != self._wanted() and self._kind:
            await self._ended.wait()

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """The store is closed for the block, and opened where it is then. Raises as `engine`."""
        async with self._pausing:
            _ = self.engine
            self._paused = True
            self.placements.wake()
            with anyio.CancelScope(shield=True):  # else nothing would be open any more
                try:
                    await self.settled()
                    yield
                finally:
                    self._paused = False
                    self.placements.wake()

    async def backup(self, path: Path) -> None:
        """Copy the store to a new file; raises as `engine` and the engine's."""
        engine = self.engine
        if isinstance(engine, EmbeddedEngine):
            await engine.backup(path)
        else:
            await self.dump(path)

    async def dump(self, path: Path) -> None:
        """Copy the store in etcd to a new file, whether it is served or not."""
        from wetware_sync.etcd import copies

        async with await self.etcd() as etcd:
            await copies.backup(etcd, path, self.ctx.run_sync)

    async def restore(self, source: Path) -> int:
        """Put a copy in the place of the store; returns the new epoch. Raises InvalidArgument."""
        if self._wanted() == "etcd":  # also where a restore was cut off, and nothing is open
            return await self.load(source)
        async with self.paused():
            return await self.ctx.run_sync(backup.restore, Files(self.directory), source)

    async def load(self, source: Path) -> int:
        """Put a copy into etcd, in the place of what is there; returns its epoch."""
        from wetware_sync.etcd import copies

        async with await self.etcd() as etcd:
            return await copies.load(etcd, source, self.ctx.run_sync)

    def describe(self) -> dict[str, Any]:
        """A struct Home, as a reply."""
        there = {m.peer_id for m in self.ctx.members("state=alive")}
        me = self._me
        kind, entrances = self.place
        best = sorted(entrances, key=lambda peer: (peer != me, peer not in there))
        return {"home": {"node": best[0] if best else "", "engine": kind, "entrances": best}}

    async def status(self) -> dict[str, Any]:
        """A struct Status, as a reply."""
        engine = self.engine
        status = asdict(await engine.status())
        status |= {"bytes": status.pop("nbytes"), "watchers": status.pop("watches")}
        return {"status": {**status, "authority": engine.authority.peer_id}}


def _shown(peers: tuple[PeerId, ...]) -> str:
    return " and ".join(peers) or "no known node"


def own_etcd(config: SyncConfig) -> Etcd:
    """With what the files say that are named; blocks. Raises ConfigError."""
    from wetware_sync.etcd.wire import Etcd, Login, Tls

    if not config.endpoints:
        raise ConfigError("[plugins.sync] endpoints: this node is an entrance, and names no etcd")
    tls = login = None
    try:
        if config.ca:
            key = read_private_file(Path(config.key), FILE_BYTES_MAX) if config.key else b""
            cert = Path(config.cert).read_bytes() if config.cert else b""
            tls = Tls(Path(config.ca).read_bytes(), cert, key)
        if config.user:
            secret = read_private_file(Path(config.password_file), FILE_BYTES_MAX)
            login = Login(config.user, secret.decode().strip())
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"[plugins.sync]: {exc}") from exc
    return Etcd(config.endpoints, tls, login)
