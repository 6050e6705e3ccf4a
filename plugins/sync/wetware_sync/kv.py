"""The service `kv`: keys of the store as capabilities. See sync.capnp."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio

from wetware import rpc
from wetware.errors import Busy, InvalidArgument, WetwareError
from wetware.hookspecs import Service
from wetware.identity import PeerId
from wetware_sync import carry
from wetware_sync.engine import (
    PAGE_KEYS_MAX,
    Compare,
    Delete,
    Engine,
    Event,
    Get,
    KeyValue,
    Outcome,
    Put,
    Txn,
    Watch,
)
from wetware_sync.errors import Moved
from wetware_sync.fencing import guarded_by
from wetware_sync.keys import USER, check_path, check_prefix
from wetware_sync.leases import LeaseServant, leased
from wetware_sync.managed.moves import Moves, Tell
from wetware_sync.schema import SCHEMA

if TYPE_CHECKING:
    from pathlib import Path

    from anyio.abc import TaskStatus

    from wetware.hookspecs import Finding, PluginContext
    from wetware.identity import Principal
    from wetware_sync.home import Home

_TARGETS: Final[dict[str, Literal["value", "mod_revision", "create_revision", "version"]]] = {
    "equal": "value",
    "modified": "mod_revision",
    "created": "create_revision",
    "version": "version",
}
_READER: Final = frozenset(
    {"Kv.open", "Kv.home", "Kv.status", "Kv.etcd", "Reader.*", "Watcher.*", "Cursor.*"}
)


class KvService(Service):
    """See `hookspecs.Service`. It runs the store."""

    name = "kv"
    interface = SCHEMA.Kv
    peer_interface = SCHEMA.Sibling
    roles = MappingProxyType(
        {"reader": _READER, "member": _READER | {"Kv.lease", "Writer.*", "Lease.*"}}
    )

    def __init__(self, home: Home) -> None:
        self.home = home
        self.moves = Moves(home)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Have the store open, if it is here."""
        for left in self.home.ctx.data_dir.glob("*-" + "[0-9a-f]" * 16):
            left.unlink()  # of backups that a crash cut off
        await self.home.run(task_status=task_status)

    def stream(self, work: Callable[[rpc.ByteStream], Awaitable[None]]) -> dict[str, Any]:
        """A stream, as a reply, and what is done with it until its end."""
        stream = rpc.ByteStream()

        async def run() -> None:
            async with stream:
                try:
                    await work(stream)
                    await stream.send_eof()
                except WetwareError as exc:
                    stream.abort(exc)

        self.home.tasks.start(run())
        return {"stream": stream.servant}

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return KvServant(self, str(principal))

    def peer_bootstrap(self, node: Principal) -> rpc.Servant:
        return SiblingServant(self, PeerId.parse(node.subject))

    def findings(self) -> Iterable[Finding]:
        return self.home.keeper.findings()


class KvServant(rpc.Servant, interface=SCHEMA.Kv):
    """See sync.capnp."""

    def __init__(self, service: KvService, owner: str) -> None:
        self._service, self._owner = service, owner

    async def open(self, prefix: str) -> dict[str, Any]:
        tree = Tree(self._service, self._owner, check_prefix(prefix))
        return {
            "reader": ReaderServant(tree),
            "writer": WriterServant(tree),
            "watcher": WatcherServant(tree),
        }

    async def home(self) -> dict[str, Any]:
        return self._service.home.describe()

    async def lease(self, ttl_ms: int, id: int, epoch: int) -> dict[str, Any]:
        engine = self._service.home.engine
        id_ = await leased(engine, ttl_ms, id, epoch, self._owner)
        servant = LeaseServant(engine, id_, self._owner)
        return {"lease": servant, "id": id_, "epoch": engine.epoch}

    async def status(self) -> dict[str, Any]:
        return await self._service.home.status()

    async def compact(self, revision: int) -> None:
        await self._service.home.engine.compact(revision)

    async def backup(self) -> dict[str, Any]:
        copy = self._service.home.ctx.data_dir / f"backup-{secrets.token_hex(8)}"
        await self._service.home.backup(copy)
        return self._service.stream(partial(_send, copy))

    async def restore(self) -> dict[str, Any]:
        home = self._service.home
        return self._service.stream(partial(_take, home.ctx, home.restore))

    async def etcd(self) -> dict[str, Any]:
        home = self._service.home
        placement = home.placements.current
        members = placement.members if placement else {}
        looked = await asyncio.gather(*map(self._service.moves.look, members))
        names = {member.peer_id: member.name for member in home.ctx.members()}
        parts = [
            {**part, "state": had.state, "name": names.get(part["node"], "")}
            for part, had in zip(looked, members.values(), strict=True)
        ]
        return {"parts": parts, **home.describe()}

    async def up(self, on: list[str]) -> dict[str, Any]:
        return self._service.stream(partial(_move, partial(self._service.moves.up, on)))

    async def replace(self, member: str, by: str) -> dict[str, Any]:
        move = partial(self._service.moves.replace, member, by)
        return self._service.stream(partial(_move, move))

    async def down(self, to: str) -> dict[str, Any]:
        return self._service.stream(partial(_move, partial(self._service.moves.down, to)))


class SiblingServant(rpc.Servant, interface=SCHEMA.Sibling):
    """See sync.capnp."""

    def __init__(self, service: KvService, peer: PeerId) -> None:
        self._service, self._peer = service, peer

    async def place(self, placement: bytes) -> dict[str, bytes]:
        home = self._service.home
        if placement:
            await home.placements.take(placement)
            await home.settled()
        return {"placement": home.placements.signed}

    async def prepare(self, placement: bytes, seed: bytes) -> None:
        home = self._service.home
        if not await home.placements.take(placement):
            raise Busy("this member knows of a later placement of the store")
        await home.placements.keep_key(seed, placement)

    async def etcd(self) -> dict[str, Any]:
        return {"part": await self._service.home.keeper.describe()}

    async def bring(self) -> dict[str, Any]:
        service = self._service
        service.moves.check_bringer(self._peer)
        take = partial(service.moves.take_store, self._peer)
        return service.stream(partial(_take, service.home.ctx, take))


async def _move(move: Callable[[Tell], Awaitable[None]], stream: rpc.ByteStream) -> None:
    """Move the store, and tell how far it is."""

    async def tell(line: str) -> None:
        await stream.send(line.encode() + b"\n")

    await move(tell)


async def _send(copy: Path, stream: rpc.ByteStream) -> None:
    """Send a file, as long as somebody takes it, and remove it."""
    try:
        await carry.send(copy, stream)
    finally:
        await anyio.Path(copy).unlink()


async def _take(
    ctx: PluginContext, use: Callable[[Path], Awaitable[int]], stream: rpc.ByteStream
) -> None:
    """Take a copy of a store, have it used, and send the epoch."""
    copy = ctx.data_dir / f"restore-{secrets.token_hex(8)}"
    try:
        await carry.take(stream, copy)
        await stream.send(b"%d" % await use(copy))
    finally:
        await anyio.Path(copy).unlink(missing_ok=True)


class Tree:
    """The keys that begin with a prefix, for one principal."""

    def __init__(self, service: KvService, owner: str, prefix: str) -> None:
        self.service, self.owner, self._prefix = service, owner, prefix
        self.is_key = not prefix.endswith("/")

    @property
    def engine(self) -> Engine:
        return self.service.home.engine

    def key(self, name: str) -> bytes:
        """In the store; raises InvalidArgument "invalid.key"."""
        if self.is_key and name:
            raise InvalidArgument(
                f"what is open is the one key {self._prefix}, which is called '' here",
                hint=f"open {self._prefix}/ for the keys below it",
                code="invalid.key",
            )
        return USER + check_path(self._prefix + name).encode()

    def prefix(self, name: str) -> bytes:
        """Of keys in the store."""
        if self.is_key:
            return self.key(name)
        return USER + check_prefix(self._prefix + name).encode()

    def name(self, key: bytes) -> str:
        return key[len(USER) + len(self._prefix) :].decode()

    def entry(self, item: KeyValue, *, value: bool = True) -> dict[str, Any]:
        """The struct Entry."""
        return {
            "key": self.name(item.key),
            "value": item.value if value else b"",
            "created": item.create_revision,
            "modified": item.mod_revision,
            "version": item.version,
            "lease": item.lease,
        }

    def event(self, event: Event) -> dict[str, Any]:
        """The struct Event."""
        if event.now is not None:
            return {"entry": self.entry(event.now), "deleted": False}
        gone = {"key": self.name(event.key), "modified": event.revision}
        return {"entry": gone, "deleted": True}

    async def write(self, txn: Txn, fence: bytes) -> Outcome:
        """Run a transaction, only as long as what `fence` stands for is held."""
        return await guarded_by(self.engine, fence, txn, self.owner)


class ReaderServant(rpc.Servant, interface=SCHEMA.Reader):
    """See sync.capnp."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    async def get(self, key: str) -> dict[str, Any]:
        tree = self._tree
        page = await tree.engine.read(Get(tree.key(key)))
        found = {"found": bool(page.items), "revision": page.revision}
        return {**found, "entry": tree.entry(page.items[0])} if page.items else found

    async def ls(self, prefix: str, after: str, limit: int, values: bool) -> dict[str, Any]:
        tree = self._tree
        get = Get(
            tree.prefix(prefix),
            prefix=not tree.is_key,
            after=tree.key(after) if after else b"",
            limit=min(limit or PAGE_KEYS_MAX, PAGE_KEYS_MAX),
        )
        page = await tree.engine.read(get)
        entries = [tree.entry(item, value=values) for item in page.items]
        return {"entries": entries, "more": page.more, "revision": page.revision}


class WriterServant(rpc.Servant, interface=SCHEMA.Writer):
    """See sync.capnp."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    async def put(self, key: str, value: bytes, lease: int, fence: bytes) -> dict[str, Any]:
        txn = Txn((Put(self._tree.key(key), value, lease),))
        return {"revision": (await self._tree.write(txn, fence)).revision}

    async def delete(self, key: str, below: bool, fence: bytes) -> dict[str, Any]:
        tree = self._tree
        what = tree.prefix(key) if below else tree.key(key)
        outcome = await tree.write(Txn((Delete(what, below and not tree.is_key),)), fence)
        return {"deleted": outcome.results[0], "revision": outcome.revision}

    async def txn(
        self,
        compare: Sequence[Mapping[str, Any]],
        then: Sequence[Mapping[str, Any]],
        else_: Sequence[Mapping[str, Any]],
        fence: bytes,
    ) -> dict[str, Any]:
        compares = tuple(map(self._compare, compare))
        txn = Txn(tuple(map(self._write, then)), compares, tuple(map(self._write, else_)))
        outcome = await self._tree.write(txn, fence)
        return {"succeeded": outcome.succeeded, "revision": outcome.revision}

    def _compare(self, what: Mapping[str, Any]) -> Compare:
        ((kind, operand),) = what["has"].items()
        return Compare(self._tree.key(what["key"]), _TARGETS[kind], operand)

    def _write(self, what: Mapping[str, Any]) -> Put | Delete:
        key = self._tree.key(what["key"])
        if "value" in what["what"]:
            return Put(key, what["what"]["value"], what["lease"])
        return Delete(key)


class WatcherServant(rpc.Servant, interface=SCHEMA.Watcher):
    """See sync.capnp."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    async def watch(self, prefix: str, revision: int, epoch: int) -> dict[str, Any]:
        tree = self._tree
        key, engine = tree.prefix(prefix), tree.engine
        if epoch not in (0, engine.epoch):
            raise Moved(
                "the store was moved or restored since: its revisions are others now",
                hint="read what there is, and watch from there",
            )
        revision = revision or (await engine.status()).revision + 1
        watch = engine.watch(key, revision, tree.owner, prefix=not tree.is_key)
        cursor = CursorServant(tree, watch)
        return {"cursor": cursor, "revision": revision, "epoch": engine.epoch}


class CursorServant(rpc.Servant, interface=SCHEMA.Cursor):
    """See sync.capnp."""

    def __init__(self, tree: Tree, watch: Watch) -> None:
        self._tree, self._watch = tree, watch
        self._busy = False

    async def next(self) -> dict[str, Any]:
        if self._busy:
            raise InvalidArgument("another call waits at this cursor", code="invalid.cursor")
        self._busy = True
        try:
            batch = await self._watch.next()
        finally:
            self._busy = False
        events = [self._tree.event(event) for event in batch.events]
        return {"events": events, "revision": batch.revision + 1}

    def released(self) -> None:
        self._watch.close()
