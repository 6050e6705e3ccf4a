"""The service `blob`: this node's store, what other members have, and what a user may do with both.

What a user may do is decided here, at the node of their session. Other members are asked for blocks
and for keeping copies, never in a user's name.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.base.bounds import Claim, Places
from wetware.base.files import Files
from wetware.base.tasks import Tasks
from wetware.errors import (
    Disconnected,
    InvalidArgument,
    NotFound,
    OverlayError,
    WetwareError,
    stopping,
)
from wetware.hookspecs import Service
from wetware_blob import ingest
from wetware_blob.exchange.exchange import Exchange, pull
from wetware_blob.exchange.find import dht_key, finder
from wetware_blob.format.build import Profile, profile_of
from wetware_blob.format.cid import RAW, Cid
from wetware_blob.format.read import described
from wetware_blob.reading import CURSOR_S, CURSORS_MAX, LIST_MAX, BlobServant, Cursors, Opened
from wetware_blob.replicas.duties import COPIES_MAX
from wetware_blob.replicas.keeper import Keeper, selector
from wetware_blob.replicas.sibling import SiblingServant
from wetware_blob.schema import SCHEMA
from wetware_blob.store.errors import Damaged
from wetware_blob.store.pins import Pin
from wetware_blob.store.store import Store
from wetware_blob.transfers import State, Transfer, place

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.hookspecs import Finding, PluginContext
    from wetware.identity import Principal
    from wetware_blob.config import BlobConfig
    from wetware_blob.exchange.fetch import Fetch
    from wetware_blob.store.pins import BadPin

READ_PER_OWNER_MAX: Final = 32
"""Blobs that were read and are held, of one principal: the others need some of FETCHES_MAX."""
NAME_BYTES_MAX: Final = 255
MENDER: Final = "node:self"
"""Whose hold keeps a block that is fetched because it was damaged."""
SCRUB_FIRST_S: Final = 300.0
SCRUB_S: Final = 86_400.0
ANNOUNCE_S: Final = 3600.0
_VERIFIED_MAX: Final = 4096
"""What `verify` found and nobody took yet; each is in the node's log, too."""


class BlobService(Service):
    """See `hookspecs.Service`."""

    name = "blob"
    interface = SCHEMA.Store
    peer_interface = SCHEMA.Sibling
    roles = MappingProxyType(
        {
            "reader": frozenset({"Store.open", "Blob.*", "ByteStream.*"}),
            "member": frozenset(
                {
                    "Store.open",
                    "Store.put",
                    "Store.pin",
                    "Store.unpin",
                    "Store.pins",
                    "Store.rm",
                    "Store.usage",
                    "Blob.*",
                    "ByteStream.*",
                    "Transfer.*",
                }
            ),
            "admin": frozenset({"*"}),
        }
    )
    ending = frozenset({"Store.unpin", "Store.rm", "Store.pins", "Store.gc"})

    def __init__(self, ctx: PluginContext) -> None:
        self.ctx = ctx
        config: BlobConfig = ctx.config
        self.store = Store(
            Files(ctx.data_dir / "store"),
            run_sync=ctx.run_sync,
            clock=ctx.clock,
            node_bytes_max=config.node_bytes_max,
            owner_bytes_max=config.owner_bytes_max,
        )
        self.exchange = Exchange(ctx.overlay, self.store, find=finder(ctx), run_sync=ctx.run_sync)
        self.keeper = Keeper(ctx, self.store, self.fetch)
        self.tasks = Tasks()
        self.transfers = Places()
        self.uploads = set[ingest.Blocks]()
        self.cursors = Cursors(CURSOR_S, CURSORS_MAX, ctx.clock.monotonic)
        self._reading = Places()
        self._running = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with anyio.create_task_group() as group:
            await group.start(self.store.run)  # cancelled last, as what is below still writes
            try:
                async with anyio.create_task_group() as above:
                    await above.start(self.exchange.run)
                    above.start_soon(self._scrub)
                    above.start_soon(self._announce)
                    above.start_soon(self.keeper.run)
                    self._running = True
                    task_status.started()
                    await anyio.sleep_forever()
            finally:
                self._running = False
                with anyio.CancelScope(shield=True):
                    await self.tasks.end()
                group.cancel_scope.cancel()

    async def _scrub(self) -> None:
        """Read everything once a day, and mend what can be mended.

        It begins soon and anywhere: on a machine that never runs for a day all is read in time.
        """
        config: BlobConfig = self.ctx.config
        wait_s = SCRUB_FIRST_S
        while config.scrub_rate:
            await anyio.sleep(wait_s)
            wait_s = SCRUB_S
            try:
                async for what, name, mended in self.scrub(config.scrub_rate, random.random()):  # noqa: S311 not secret
                    if what == "block":
                        self.ctx.log.warning("blob.scrubbed", block=name, mended=mended)
            except WetwareError as exc:  # the service goes on: what can be read is served
                self.ctx.log.warning("blob.not_scrubbed", why=exc.message)

    async def scrub(
        self, rate_bytes_s: float | None, share: float
    ) -> AsyncIterator[tuple[str, str, bool]]:
        """See `Store.scrub`: "block" or "pin", its name, and whether it was fetched again."""
        async for damage in self.store.scrub(rate_bytes_s, share):
            if isinstance(damage, bytes):
                yield "block", damage.hex(), await self.mend(damage)
            else:
                yield "pin", _damaged_name(damage), False

    async def _announce(self) -> None:
        """Tell the DHT of what is public: it forgets, and so does a libp2p that starts again."""
        while True:
            try:
                for pin in await self.store.pins():
                    if pin.public:
                        await self._provide(pin.root)
            except WetwareError as exc:
                self.ctx.log.warning("blob.not_announced", why=exc.message)
            await anyio.sleep(ANNOUNCE_S)

    async def _provide(self, root: Cid) -> None:
        try:
            await self.ctx.overlay.provide(dht_key(root))
        except OverlayError as exc:
            self.ctx.log.info("blob.not_announced", root=str(root), why=exc.message)

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return StoreServant(self, str(principal))

    def findings(self) -> Iterable[Finding]:
        """Of the index, and of the last round of looking after copies."""
        yield from self.store.findings()
        yield from self.keeper.found

    async def hand_over(self, tell: Callable[[str], object]) -> None:
        self.check_running()
        await self.keeper.drain(tell)

    def peer_bootstrap(self, node: Principal) -> rpc.Servant:
        return SiblingServant(self.store, self.keeper, node.subject)

    # --- for the servants ---

    def check_running(self) -> None:
        if not self._running:
            raise Disconnected("the service is not running")

    def opened(self, owner: str, root: Cid, *, local: bool) -> Opened:
        return Opened(partial(self._source, owner, root, local=local), self.tasks, self.cursors)

    @contextlib.contextmanager
    def _source(self, owner: str, root: Cid, *, local: bool) -> Iterator[Fetch]:
        many = f"{READ_PER_OWNER_MAX} blobs of {owner} are read at this node (READ_PER_OWNER_MAX)"
        with (
            self._reading.hold(Claim(owner, READ_PER_OWNER_MAX, many)),
            self.exchange.opened(root, owner, local=local) as source,
        ):
            yield source

    async def put(
        self,
        state: State,
        owner: str,
        made: Callable[..., Pin],
        ack: int,
        source: ingest.Counted,
        form: str,
        profile: Profile,
    ) -> None:
        """Take what comes and pin it."""
        state.bytes = lambda: source.count
        state.doing = "reading"
        async with (
            self.store.hold(owner) as hold,
            ingest.Blocks(self.store, hold, self.ctx.run_sync, self.uploads) as blocks,
        ):
            if form == "file":
                root = await ingest.put_file(source, profile, blocks)
            else:
                root = await ingest.put_car(source, blocks)
            state.doing = "writing"
            await blocks.finish()
            kind, size = await described(root, lambda cid: self.store.get(cid.digest))
            state.root = root
            now_s = self.ctx.clock.time()
            pin = made(owner, root, kind=kind, size=size, created_at=now_s)
            await self.store.pin(hold, pin)
        state.bytes = lambda: pin.size or source.count  # in a stream there is more than its content
        await self._replicate(state, pin, ack)

    async def pin(
        self, state: State, owner: str, made: Callable[..., Pin], ack: int, root: Cid
    ) -> None:
        """Fetch what is not here, and pin it."""
        state.root, state.doing = root, "fetching"
        pin = await self.fetch(root, owner, made, lambda _: None, state)
        state.bytes = lambda: pin.size
        await self._replicate(state, pin, ack)

    async def fetch(
        self,
        root: Cid,
        owner: str,
        made: Callable[..., Pin],
        count: Callable[[int], object],
        state: State | None = None,
    ) -> Pin:
        """Fetch what is not here, and pin it; see `keeper.Fetch`."""
        state = state or State()
        async with self.exchange.open(root, owner) as source:
            kind, size = await described(root, source.get)
            state.total = size
            await pull(source, root, count)
            state.doing = "writing"
            now_s = self.ctx.clock.time()
            pin = made(owner, root, kind=kind, size=size, created_at=now_s)
            async with self.store.hold(owner) as hold:
                await self.store.pin(hold, pin)
        return pin

    async def _replicate(self, state: State, pin: Pin, ack: int) -> None:
        state.copies = 1
        if pin.public:
            await self._provide(pin.root)
        await self.keeper.made(pin, ack, state)

    async def unpin(self, owner: str, root: Cid, name: str | None) -> int:
        """End pins; copies of them at other members are told."""
        count = await self.store.unpin(owner, root, name)
        self.keeper.changed()
        return count

    async def mend(self, digest: bytes) -> bool:
        """Fetch a block that is damaged here from who has it; whether it is whole now."""
        cid = Cid(1, RAW, digest)
        try:
            async with self.exchange.open(cid, MENDER) as source:
                await source.get(cid)
                await source.kept()
        except WetwareError:
            return False
        return bool(await self.store.have([digest]))


def judge_terms(ctx: PluginContext, given: dict[str, Any]) -> tuple[Callable[..., Pin], int]:
    """Makes a pin of what else it has; and how many are to have it. Raises "invalid.pin"."""

    def bad(what: str, hint: str) -> InvalidArgument:
        return InvalidArgument(what, hint=hint, code="invalid.pin")

    name, copies, ack = given["name"], given["copies"] or 1, given["ack"] or 1
    if len(name.encode()) > NAME_BYTES_MAX:
        raise bad(f"a name of more than {NAME_BYTES_MAX} bytes", "give it a shorter one")
    if copies > COPIES_MAX:
        raise bad(f"{copies} copies; at most {COPIES_MAX} are kept", "ask for fewer")
    if ack > copies:
        raise bad(f"{ack} copies are to be waited for, of {copies}", "wait for at most all of them")
    ctx.members(selector(given["where"]))  # raises where it is none
    made = partial(Pin, name=name, copies=copies, where=given["where"], public=given["public"])
    return made, ack


class StoreServant(rpc.Servant, interface=SCHEMA.Store):
    """See blob.capnp."""

    def __init__(self, service: BlobService, principal: str) -> None:
        self._always, self._principal = service, principal

    @property
    def _service(self) -> BlobService:
        """Raises Disconnected unless it runs."""
        self._always.check_running()
        return self._always

    @property
    def _owner(self) -> str:
        """Whose pins and quota a call is about: under a share, those of who gave it.

        Otherwise each share would be a quota more, and its pins nobody's once it has ended.
        """
        guard = rpc.current_guard()
        return (guard and guard.payer) or self._principal

    async def open(self, cid: str, local: bool) -> dict[str, Any]:
        root = Cid.parse(cid)
        return {"blob": BlobServant(self._service.opened(self._owner, root, local=local), root)}

    async def put(
        self, pin: dict[str, Any], form: str, profile: str, bytes_max: int
    ) -> dict[str, Any]:
        service, how = self._service, profile_of(profile)
        made, ack = judge_terms(service.ctx, pin)
        owner = self._owner

        async def work(state: State) -> None:
            try:
                await service.put(state, owner, made, ack, source, form, how)
            except WetwareError as exc:
                stream.abort(exc)
                raise
            finally:
                stream.abort(stopping())

        transfer = Transfer(service.tasks, place(service.transfers, owner), work)
        # Not before there is a place; `work` begins after this call.
        stream = rpc.ByteStream(run_sync=service.ctx.run_sync)
        source = ingest.Counted(stream, bytes_max)
        return {"stream": stream.servant, "transfer": transfer}

    async def pin(self, root: str, pin: dict[str, Any]) -> dict[str, Any]:
        service = self._service
        made, ack = judge_terms(service.ctx, pin)
        cid, owner = Cid.parse(root), self._owner

        async def work(state: State) -> None:
            await service.pin(state, owner, made, ack, cid)

        return {"transfer": Transfer(service.tasks, place(service.transfers, owner), work)}

    async def unpin(self, root: str, name: str) -> dict[str, Any]:
        count = await self._service.unpin(self._owner, Cid.parse(root), name or None)
        return {"pins": count}

    async def pins(self, root: str, after: int, limit: int) -> dict[str, Any]:
        return await self._pins(self._owner, root, after, limit)

    async def _pins(self, owner: str | None, root: str, after: int, limit: int) -> dict[str, Any]:
        if after >= 1 << 63:
            raise InvalidArgument(f"no answer had {after} as its `next`", code="invalid.page")
        shown, next_ = await self._service.store.page(
            owner, Cid.parse(root) if root else None, after, min(limit or LIST_MAX, LIST_MAX)
        )
        return {"pins": [self._told(pin) for pin in shown], "next": next_}

    def _told(self, pin: Pin) -> dict[str, Any]:
        return {
            "root": str(pin.root),
            "name": pin.name,
            "owner": pin.owner,
            "kind": pin.kind,
            "size": pin.size,
            "charged_bytes": pin.charged,
            "created_ms": int(pin.created_at * 1000),
            "copies": pin.copies,
            "where": pin.where,
            "holders": self._service.keeper.holders(pin),
            "public": pin.public,
        }

    async def rm(self, root: str) -> dict[str, Any]:
        service, cid = self._service, Cid.parse(root)
        count = await service.unpin(self._owner, cid, None)
        freed = 0
        try:
            freed = (await service.store.collect()).charged
        except (Damaged, NotFound) as exc:  # of somebody's pin it is not known what it keeps
            service.ctx.log.warning("blob.not_collected", why=exc.message)
        pins = await service.store.reaching(cid)
        mine = [pin for pin in pins if pin.owner == self._owner]
        return {
            "pins": count,
            "pinned_by": [self._told(pin) for pin in mine[:LIST_MAX]],
            "others": len(pins) - len(mine),
            "freed_bytes": freed,
        }

    async def usage(self) -> dict[str, Any]:
        found = await self._service.store.usage(self._owner)
        return {
            "usage": {
                "pins": found.pins,
                "charged_bytes": found.charged,
                "quota_bytes": found.charged_max,
            }
        }

    async def gc(self, dry_run: bool, drop_damaged: bool) -> dict[str, Any]:
        store, dropped = self._service.store, list[str]()
        if dry_run and drop_damaged:
            raise InvalidArgument("nothing is dropped in a dry run")
        if drop_damaged:
            dropped = [_damaged_name(pin) for pin in await store.drop_damaged()]
            for name in dropped:
                self._service.ctx.log.warning("blob.pin_dropped", pin=name)
            self._service.keeper.changed()
        gone = await store.collect(dry_run=dry_run)
        kept = await store.usage()
        left = (gone.blocks, gone.charged) if dry_run else (0, 0)
        return {
            "blocks": gone.blocks,
            "bytes": gone.charged,
            "kept_blocks": kept.blocks - left[0],
            "kept_bytes": kept.charged - left[1],
            "dropped": dropped[:LIST_MAX],
        }

    async def verify(self, sink: rpc.Ref | None) -> dict[str, Any]:
        service = self._service
        pump = rpc.Pump(sink, items_max=_VERIFIED_MAX, bytes_max=1 << 20)
        task = service.tasks.start(_verify(service, pump))

        def ended(_: rpc.Pump) -> None:
            task.cancel()

        pump.start(ended)
        return {"subscription": pump}

    async def drain(self) -> dict[str, Any]:
        service = self._service

        async def drain(state: State) -> None:
            await service.keeper.drain(lambda text: setattr(state, "doing", text))

        room = place(service.transfers, self._owner)
        return {"transfer": Transfer(service.tasks, room, drain)}

    async def all(self, after: int, limit: int) -> dict[str, Any]:
        found = await self._pins(None, "", after, limit)
        usage = await self._service.store.usage()
        free = await self._service.store.free_bytes()
        return {
            **found,
            "usage": {
                "pins": usage.pins,
                "blocks": usage.blocks,
                "disk_bytes": usage.charged,
                "disk_bytes_max": usage.charged_max,
                "free_bytes": free,
            },
        }


def _damaged_name(pin: BadPin) -> str:
    return f"{pin.name!r} of {pin.owner}"


async def _verify(service: BlobService, pump: rpc.Pump) -> None:
    """Read all of the store; what is damaged is fetched again, and pushed with how that went."""
    counts = {"damaged": 0, "mended": 0}
    try:
        async for what, name, mended in service.scrub(None, 0):
            counts["damaged"] += 1
            counts["mended"] += mended
            pump.offer(json.dumps({"what": what, "name": name, "mended": mended}).encode())
    except WetwareError as exc:
        pump.end(exc)
    else:
        pump.offer(json.dumps({"what": "end", **counts}).encode())
