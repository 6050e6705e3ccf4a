"""The service `sync`: locks, semaphores, elections, barriers and counters, as recipes on the store.

Who wants a lock puts a key of their own, with their lease, below the lock's name. The key with the
lowest `create_revision` holds the lock, and each other one waits until those before it are gone:
first come, first served, and nobody is woken for nothing. That revision is the fencing token.
A lock is a semaphore of one place, which readers (`shared`) share by counting its writers alone.

Source: etcd's `concurrency` package; Burrows, "The Chubby lock service" (2006).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakValueDictionary

from wetware import rpc
from wetware.base import cbor
from wetware.errors import InvalidArgument, Unsupported, WetwareError
from wetware.hookspecs import Service
from wetware_sync.engine import (
    PAGE_KEYS_MAX,
    Compacted,
    Compare,
    Delete,
    Engine,
    Get,
    KeyValue,
    LeaseEnded,
    Order,
    Outcome,
    Page,
    Put,
    Txn,
)
from wetware_sync.errors import NotFree
from wetware_sync.fencing import Hold, changed, fenced
from wetware_sync.keys import BARRIER, COUNTER, LOCK, check_path
from wetware_sync.leases import LeaseServant, leased
from wetware_sync.schema import SCHEMA

if TYPE_CHECKING:
    from wetware.identity import Principal
    from wetware_sync.home import Home

T = TypeVar("T")

NAME_CHARS_MAX: Final = 200
NONCE_BYTES: Final = 16
VALUE_BYTES_MAX: Final = 64 << 10
RECORD_BYTES_MAX: Final = VALUE_BYTES_MAX + 1024
PLACES_MAX: Final = 500
COUNTER_MAX: Final = 2**63

_GROUPS: Final = {"lock": b"l", "shared": b"l", "semaphore": b"s", "election": b"e"}
_ALONE: Final = frozenset({"lock", "election"})
_WRITER: Final = b"w"
_READER: Final = b"r"


class SyncService(Service):
    """See `hookspecs.Service`."""

    name = "sync"
    interface = SCHEMA.Sync
    roles = MappingProxyType(
        {
            "reader": frozenset({"Sync.home", "Sync.look", "Sync.follow"}),
            "member": frozenset({"*"}),
        }
    )

    def __init__(self, home: Home) -> None:
        self.home = home
        self._counting: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return SyncServant(self, str(principal))

    def counting(self, key: bytes) -> asyncio.Lock:
        """Held while a counter is changed: of many who try at once all but one would try again."""
        return self._counting.setdefault(key, asyncio.Lock())


def _checked(name: str) -> bytes:
    if len(name) > NAME_CHARS_MAX:
        raise InvalidArgument(
            f"a name of {len(name)} characters; {NAME_CHARS_MAX} is the most (NAME_CHARS_MAX)",
            code="invalid.key",
        )
    return check_path(f"/{name}").encode()


@dataclass(frozen=True, slots=True)
class Lock:
    """Where those who want one thing have their keys.

    Attributes:
        scope: What their keys begin with.
        kind: Of the schema's Kind.
        name: As it was given.
    """

    scope: bytes
    kind: str
    name: str

    @classmethod
    def of(cls, name: str, kind: str) -> Lock:
        """Raises InvalidArgument "invalid.key"."""
        return cls(LOCK + _GROUPS[kind] + _checked(name) + b"\0", kind, name)

    def key(self, nonce: bytes) -> bytes:
        """Of one who wants it; raises InvalidArgument "invalid.nonce"."""
        if len(nonce) != NONCE_BYTES:
            raise InvalidArgument(f"a nonce has {NONCE_BYTES} bytes", code="invalid.nonce")
        return self.scope + (_READER if self.kind == "shared" else _WRITER) + nonce

    def ahead(self, places: int, revision: int = 0) -> Get:
        """The last `places` of those that one with this revision waits for; all before is free."""
        scope = self.scope + _WRITER if self.kind == "shared" else self.scope
        return Get(scope, prefix=True, limit=places, order=Order.NEWEST, created_before=revision)


@dataclass(frozen=True, slots=True)
class Record:
    """The value of such a key: who wants it, how many may hold it, what others see."""

    owner: str
    places: int
    value: bytes

    def encode(self) -> bytes:
        return cbor.encode([self.owner, self.places, self.value])

    @classmethod
    def of(cls, item: KeyValue) -> Record:
        return cls(*cbor.decode(item.value, bytes_max=RECORD_BYTES_MAX))


class SyncServant(rpc.Servant, interface=SCHEMA.Sync):
    """See sync.capnp."""

    def __init__(self, service: SyncService, owner: str) -> None:
        self._service, self._owner = service, owner

    async def home(self) -> dict[str, Any]:
        return self._service.home.describe()

    async def enter(self, ttl_ms: int, id: int, epoch: int) -> dict[str, Any]:
        engine = self._service.home.engine
        id_ = await leased(engine, ttl_ms, id, epoch, self._owner)
        holder = HolderServant(self._service.home, engine, id_, self._owner)
        return {"holder": holder, "id": id_, "epoch": engine.epoch}

    async def look(self, name: str, kind: str) -> dict[str, Any]:
        return await self.follow(name, kind, 0)

    async def follow(self, name: str, kind: str, revision: int) -> dict[str, Any]:
        engine, scope = self._service.home.engine, Lock.of(name, kind).scope
        if revision:
            with contextlib.suppress(Compacted):
                await _changed(engine, scope, revision + 1, self._owner, prefix=True)
        page = await engine.read(Get(scope, prefix=True, order=Order.OLDEST))
        return {"entries": _waiting(page.items, kind), "revision": page.revision}

    async def add(self, name: str, by: int) -> dict[str, Any]:
        engine, key = self._service.home.engine, COUNTER + _checked(name)
        if not by:
            page = await engine.read(Get(key))
            value = int(page.items[0].value) if page.items else 0
            return {"value": value, "revision": page.revision}

        def add(item: KeyValue | None) -> bytes:
            value = int(item.value) if item else 0
            if not -COUNTER_MAX <= value + by < COUNTER_MAX:
                raise InvalidArgument(
                    f"the counter is at {value}: with {by} it leaves 64 bits",
                    code="invalid.counter",
                )
            return b"%d" % (value + by)

        async with self._service.counting(key):
            revision, now = await changed(engine, key, add, self._owner)
        return {"value": int(now), "revision": revision}

    async def block(self, name: str, blocked: bool) -> None:
        key = BARRIER + _checked(name)
        await self._service.home.engine.txn(
            Txn((Put(key, b"") if blocked else Delete(key),)), self._owner
        )

    async def pass_(self, name: str, wait_ms: int) -> None:
        engine, key = self._service.home.engine, BARRIER + _checked(name)
        async with _at_most(wait_ms, f"the barrier {name!r} is up"):
            while (page := await engine.read(Get(key))).items:
                with contextlib.suppress(Compacted):
                    await _changed(engine, key, page.revision + 1, self._owner)


class HolderServant(LeaseServant, interface=SCHEMA.Holder):
    """See sync.capnp."""

    def __init__(self, home: Home, engine: Engine, id_: int, owner: str) -> None:
        super().__init__(engine, id_, owner)
        self._tasks, self._fence = home.tasks, home.ctx.fence

    async def acquire(
        self, name: str, kind: str, nonce: bytes, places: int, value: bytes, wait_ms: int
    ) -> dict[str, Any]:
        engine, lock = self._engine, Lock.of(name, kind)
        places = places or 1
        if places > (PLACES_MAX if kind == "semaphore" else 1):
            raise InvalidArgument(
                f"a semaphore has 1 to {PLACES_MAX} places, and all else has one",
                code="invalid.places",
            )
        if len(value) > VALUE_BYTES_MAX:
            raise InvalidArgument(
                f"a value of {len(value)} bytes; {VALUE_BYTES_MAX} is the most",
                code="invalid.value",
            )
        key = lock.key(nonce)
        record = Record(self._owner, places, value)
        txn = Txn((lock.ahead(places), Put(key, record.encode(), self._id)))
        put: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        wanted = self._tasks.start(_into(put, engine.txn(txn, self._owner)))
        try:
            outcome = await put
            page = outcome.results[0]
            assert isinstance(page, Page)  # noqa: S101  # what Get answers
            _check_places(page, places)
            if len(page.items) == places:
                async with _at_most(wait_ms, f"{name!r} is held by others"):
                    await self._turn(lock, key, outcome.revision, places)
        except BaseException:
            self._tasks.start(self._give_up(wanted, key))
            raise
        hold = Hold(engine.epoch, outcome.revision, key)
        return {"hold": hold.encode(), "revision": hold.revision}

    async def _turn(self, lock: Lock, key: bytes, revision: int, places: int) -> None:
        """Wait until fewer than `places` are before this one; raises LeaseEnded."""
        engine, owner = self._engine, self._owner
        ended = self._tasks.start(_changed(engine, key, revision + 1, owner))
        try:
            while True:
                page = await engine.read(lock.ahead(places, revision))
                _check_places(page, places)
                if len(page.items) < places:
                    break
                ahead = page.items[0].key if places == 1 else lock.scope
                freed = self._tasks.start(
                    _changed(engine, ahead, page.revision + 1, owner, prefix=places > 1)
                )
                try:
                    await asyncio.wait({ended, freed}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    freed.cancel()
                if ended.done():
                    break
                with contextlib.suppress(Compacted):
                    await freed
            if ended.done():
                await ended
            if ended.done() or not (await engine.read(Get(key))).items:
                raise LeaseEnded("the lease of who waits has ended, and with it the wait")
        finally:
            ended.cancel()

    async def _give_up(self, wanted: asyncio.Task[None], key: bytes) -> None:
        """Take back what was, or is just being, put: it would hold up all who come after."""
        await asyncio.wait([wanted])
        with contextlib.suppress(WetwareError):  # the lease takes it, then
            await self._engine.txn(Txn((Delete(key),)), self._owner)

    async def token(self, name: str, kind: str, nonce: bytes) -> dict[str, Any]:
        if kind not in _ALONE:
            raise Unsupported(
                f"several may hold {name!r} at once: none of them shuts out another",
                hint="take a lock, or be the leader",
                code="unsupported.fence",
            )
        engine, lock = self._engine, Lock.of(name, kind)
        page = await engine.read(Get(lock.scope, prefix=True, limit=1, order=Order.OLDEST))
        if not page.items or page.items[0].key != lock.key(nonce):
            raise fenced()
        revision = page.items[0].create_revision
        token = self._fence(
            engine.authority, f"{kind}/{name}", epoch=engine.epoch, counter=revision
        )
        return {"token": token}

    async def let_go(self, name: str, kind: str, nonce: bytes) -> None:
        key = Lock.of(name, kind).key(nonce)
        await self._engine.txn(Txn((Delete(key),)), self._owner)

    async def proclaim(self, name: str, kind: str, nonce: bytes, value: bytes) -> dict[str, Any]:
        key = Lock.of(name, kind).key(nonce)
        page = await self._engine.read(Get(key))
        if not page.items:
            raise fenced()
        record = Record(self._owner, Record.of(page.items[0]).places, value)
        held = Compare(key, "create_revision", page.items[0].create_revision)
        txn = Txn((Put(key, record.encode(), self._id),), (held,))
        outcome = await self._engine.txn(txn, self._owner)
        if not outcome.succeeded:
            raise fenced()
        return {"revision": outcome.revision}


def _check_places(page: Page, places: int) -> None:
    if others := {Record.of(item).places for item in page.items} - {places}:
        raise InvalidArgument(
            f"others say that this semaphore has {min(others)} places, not {places}",
            hint="all who use one have to say the same",
            code="invalid.places",
        )


def _waiting(items: Sequence[KeyValue], kind: str) -> list[dict[str, Any]]:
    """Structs Waiting of keys in their order."""
    entries: list[dict[str, Any]] = []
    writers = 0
    for number, item in enumerate(items[:PAGE_KEYS_MAX]):
        record = Record.of(item)
        reads = item.key[-NONCE_BYTES - 1 : -NONCE_BYTES] == _READER
        entries.append(
            {
                "principal": record.owner,
                "kind": "shared" if reads else "lock" if kind == "shared" else kind,
                "held": not writers if reads else number < record.places,
                "value": record.value,
                "revision": item.create_revision,
            }
        )
        writers += not reads
    return entries


async def _into(future: asyncio.Future[T], work: Awaitable[T]) -> None:
    """Have what comes of it in a future that may be given up: a shield takes a turn more."""
    try:
        result = await work
    except asyncio.CancelledError:
        future.cancel()
        raise
    except Exception as exc:
        if not future.done():
            future.set_exception(exc)
    else:
        if not future.done():
            future.set_result(result)


async def _changed(
    engine: Engine, key: bytes, revision: int, owner: str, *, prefix: bool = False
) -> None:
    """Return when the key has been deleted, or anything below the prefix changed, since then."""
    watch = engine.watch(key, revision, owner, prefix=prefix)
    try:
        while True:
            batch = await watch.next()
            if prefix or any(event.now is None for event in batch.events):
                return
    finally:
        watch.close()


@contextlib.asynccontextmanager
async def _at_most(wait_ms: int, what: str) -> AsyncIterator[None]:
    """Raise NotFree where the block takes longer."""
    try:
        async with asyncio.timeout(wait_ms / 1000):
            yield
    except TimeoutError:
        raise NotFree(
            f"{what}" + (f", after {wait_ms / 1000:g} s" if wait_ms else ""),
            hint="wait longer, or look who has it: `ww lock NAME --who`",
        ) from None
