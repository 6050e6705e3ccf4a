"""The etcd engine: etcd decides; here are the watches of this entrance, and who is charged.

One watch of all that is ours in etcd feeds the hub, from which this entrance's watchers read, and
the books. A transaction is one of etcd's, in one round trip, unless it compares values, deletes a
prefix, or comes near a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.log import get_logger
from wetware.errors import Busy, ConfigError, InvalidArgument, WetwareError
from wetware.identity import Key
from wetware_sync.charges import Added, Room, Waiting, check_leases, limit
from wetware_sync.engine import (
    PAGE_BYTES_MAX,
    WRITES_MAX,
    Batch,
    Closed,
    Compacted,
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Limits,
    Order,
    Outcome,
    Page,
    Put,
    Status,
    Txn,
    Unknown,
    Watch,
    check_get,
    check_ttl,
    check_watch,
    closed,
    lease_ended,
)
from wetware_sync.errors import HomeDown
from wetware_sync.etcd.books import Books, Gap, LeaseUsed, most
from wetware_sync.etcd.layout import (
    DATA,
    END,
    LEASES,
    PREFIX,
    STORE,
    decode_store,
    encode_store,
    end_of,
    event_of,
    item_of,
    lease_key,
    unwrap,
)
from wetware_sync.etcd.messages import holds, outcome_of, range_of, request_of
from wetware_sync.etcd.wire import (
    READ_S,
    Etcd,
    Failed,
    Member,
    asking,
    cancelled,
    pb,
    ranged,
    transaction,
)
from wetware_sync.hub import Hub

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

log = get_logger("sync.etcd")

CHUNK_KEYS: Final = 64
"""That are read at a time: etcd bounds their number alone, so this is 16 MiB at most."""
SCANNED_EVENTS: Final = 4096
"""That one watcher's step through the history looks at."""
TRIES_MAX: Final = 16
"""Of a transaction whose keys others write all the time, and of a read that was compacted."""
PROBE_S: Final = 2.0
LOST_S: Final = 5.0
"""Without any member that feeds us, before watches end. With PROBE_S and READ_S a watch is fed by
another member, or ended, within 10 s after its member was cut from the others."""
AGAIN_S: Final = 0.1
GRANT_S: Final = 1.0
GRANTS_MAX: Final = 3
"""A lease is asked for so often, each time for so long: with the same ID it is the same one."""
LATE_S: Final = 10.0
"""After which a write without an answer has been carried out or never will be."""
HISTORY_REVISIONS_MAX: Final = 100_000
HISTORY_BYTES_MAX: Final = 64 << 20
_MARK_REVISIONS: Final = 1000
_MARK_BYTES: Final = 1 << 20


class EtcdEngine:
    """Implements `Engine`, on a cluster of etcd that several entrances use.

    `run` returns when another store has taken the place of this one, or it has to be read anew:
    all watches have ended with Closed then, and it is to be run again. It raises HomeDown where no
    member of etcd can be reached when it begins; later it waits for them.

    Args:
        etcd: Where the store is.
        limits: Of keys, bytes and leases of the store, and of watches of this entrance.
    """

    authority: Key
    epoch: int

    def __init__(self, etcd: Etcd, *, limits: Limits | None = None) -> None:
        self._etcd, self._limits = etcd, limits or Limits()
        self._closed = True

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        self._waiting = Waiting("try again later; etcd is slow, or this entrance is busy")
        self._acked = 0
        self._owed: list[tuple[int, int, Added]] = []  # until the log has their revision
        self._numbers = itertools.count()
        self._progress = asyncio.Event()
        self._fed_by: Member | None = None
        self._lost: HomeDown | None = None
        async with self._etcd:
            try:
                await self._open()
                async with anyio.create_task_group() as tasks:
                    self._tasks = tasks
                    self._closed = False
                    task_status.started()
                    tasks.start_soon(self._probe)
                    await self._follow()
                    tasks.cancel_scope.cancel()
            finally:
                self._closed = True
                if hub := getattr(self, "_hub", None):
                    hub.close(closed())

    async def _open(self) -> None:
        """Read whose store it is, or make it; and count all that is there."""
        epoch, seed, revision = await self._read_store()
        self.authority, self.epoch = Key.from_seed(seed), epoch
        self._books = books = Books(self._limits)
        last = 0
        for start, end in ((LEASES, end_of(LEASES)), (DATA, end_of(DATA)), (STORE, STORE + b"\0")):
            async for kv in self._scan(start, end, revision):
                last = max(last, kv.mod_revision)
                if start != STORE:
                    books.count(kv)
        self._opened = revision
        self._seen = last  # there is an event of ours at this one
        self._marks: deque[tuple[int, int]] = deque([(revision, 0)])
        self._garbage = 0
        self._hub = Hub(last, self._limits, self._from_etcd)

    async def _read_store(self) -> tuple[int, bytes, int]:
        """Epoch, seed, and the revision at which they were read."""
        fresh = pb.TxnRequest(
            compare=[pb.Compare(key=STORE, target=pb.Compare.VERSION, result=pb.Compare.EQUAL)],
            success=[
                pb.RequestOp(
                    request_put=pb.PutRequest(key=STORE, value=encode_store(1, Key.generate().seed))
                )
            ],
        )
        reply = await self._etcd.read(ranged(pb.RangeRequest(key=STORE)))
        if not reply.kvs:
            # Two who come at once make one, and an answer that is lost does not matter.
            await self._etcd.read(transaction(fresh))
            reply = await self._etcd.read(ranged(pb.RangeRequest(key=STORE)))
        epoch, seed = decode_store(reply.kvs[0].value)
        if not seed:
            raise Closed(
                "the store in etcd is being loaded",
                hint="wait until that has ended; where it failed, load it again",
            )
        return epoch, seed, reply.header.revision

    async def _scan(self, start: bytes, end: bytes, revision: int) -> AsyncIterator[Any]:
        """Etcd's KeyValues of a range as they were at a revision."""
        more = True
        while more:
            request = pb.RangeRequest(key=start, range_end=end, revision=revision, limit=CHUNK_KEYS)
            reply = await self._etcd.read(ranged(request))
            for kv in reply.kvs:
                yield kv
                start = kv.key + b"\0"
            more = reply.more

    # --- the verbs --------------------------------------------------------------------------------

    async def read(self, get: Get) -> Page:
        check_get(get)
        self._check_open()
        for _ in range(TRIES_MAX):
            with contextlib.suppress(Compacted):  # between two of its chunks
                return await self._page(get)
        raise Busy("it was compacted while it was read, again and again", hint="try again")

    async def _page(self, get: Get) -> Page:
        room, items = Room(), list[KeyValue]()
        revision, more, start = 0, True, get
        while more and not room.is_over and len(items) < get.limit:
            whole = get.order is not Order.KEY  # etcd sorts all of it at each call
            many = get.limit if whole else min(CHUNK_KEYS, get.limit - len(items))
            request = range_of(start, limit=many, revision=revision)
            reply = await self._etcd.read(ranged(request))
            revision = revision or reply.header.revision
            taken = room.take(map(item_of, reply.kvs))
            items += taken
            more = reply.more or len(taken) < len(reply.kvs)
            if whole:
                break
            if more:
                start = Get(get.key, get.prefix, items[-1].key, created_before=get.created_before)
        return Page(tuple(items), revision, more)

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        size = txn.check()
        self._check_open()
        with self._waiting.hold(size):
            for branch in (txn.then, txn.otherwise):
                for operation in branch:
                    if isinstance(operation, Put) and operation.lease:
                        await self._check_lease(operation.lease, owner)
            added = most(txn, owner)
            fits = self._books.begin(added)
            revision = 0
            try:
                if not fits or _deletes_prefixes(txn):
                    await self._look(txn, added, fits=fits)
                outcome, wrote = await self._run_txn(txn, owner)
                if wrote:
                    revision = outcome.revision
                    self._acked = max(self._acked, revision)
            except (Unknown, asyncio.CancelledError):
                if not self._closed:
                    self._tasks.start_soon(self._done_late, added)
                raise
            except BaseException:
                self._books.done(added)
                raise
            if revision > self._seen:
                heapq.heappush(self._owed, (revision, next(self._numbers), added))
            else:
                self._books.done(added)
            return outcome

    def watch(self, key: bytes, revision: int, owner: str, *, prefix: bool = False) -> Watch:
        check_watch(key, revision, prefix=prefix)
        self._check_open()
        if self._lost is not None:
            raise self._lost
        return self._hub.watch(key, revision, owner, prefix=prefix)

    async def grant(self, ttl_s: float, owner: str) -> int:
        check_ttl(ttl_s)
        self._check_open()
        check_leases(self._limits, self._books.leases.values(), owner)
        id_ = secrets.randbelow((1 << 62) - 1) + 1
        self._books.leases[id_] = LeaseUsed(owner)  # as the log will say
        request = pb.LeaseGrantRequest(ID=id_, TTL=math.ceil(ttl_s))
        record = pb.PutRequest(key=lease_key(id_), value=owner.encode(), lease=id_)
        try:
            try:
                await self._etcd.write(
                    asking("leases.LeaseGrant", request, GRANT_S), repeats=GRANTS_MAX - 1
                )
            except ConfigError as exc:  # asked for again, where the first answer was lost
                if "lease already exists" not in exc.message:
                    raise
            reply = await self._etcd.write(
                asking("kv.Put", record, GRANT_S), repeats=GRANTS_MAX - 1
            )
        except BaseException:
            self._books.leases.pop(id_, None)
            raise
        self._acked = max(self._acked, reply.header.revision)
        return id_

    async def keep(self, lease: int, owner: str) -> float:
        self._check_open()
        await self._check_lease(lease, owner)

        async def keep(member: Member) -> Any:
            call = member.leases.LeaseKeepAlive(timeout=READ_S, metadata=member.metadata)
            try:
                await call.write(pb.LeaseKeepAliveRequest(ID=lease))
                return await call.read()
            finally:
                await cancelled(call)

        reply = await self._etcd.read(keep)
        if not getattr(reply, "TTL", 0):
            raise lease_ended(lease)
        return float(reply.TTL)

    async def end(self, lease: int, owner: str) -> None:
        self._check_open()
        await self._check_lease(lease, owner)
        await self._etcd.write(asking("leases.LeaseRevoke", pb.LeaseRevokeRequest(ID=lease)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READ_S):
                while lease in self._books.leases:
                    await self._progress.wait()

    async def compact(self, revision: int) -> None:
        self._check_open()
        reply = await self._etcd.read(ranged(pb.RangeRequest(key=STORE, count_only=True)))
        if not 0 <= revision <= reply.header.revision:
            raise InvalidArgument(f"revision {revision} is not from 0 to {reply.header.revision}")
        with contextlib.suppress(TimeoutError):  # the books want to know what it forgets
            await self._reach(min(revision, self._acked))
        await self._forget(revision)

    async def status(self) -> Status:
        self._check_open()
        etcd, count = self._etcd, self._books
        reply = await etcd.read(ranged(pb.RangeRequest(key=STORE, count_only=True)))
        member = await etcd.health()
        with contextlib.suppress(TimeoutError):
            await self._reach(self._acked)
        many = len(await etcd.members())
        spare = (many - 1) // 2
        return Status(
            engine="etcd",
            epoch=self.epoch,
            revision=reply.header.revision,
            compacted=await self._compacted(),
            keys=count.all.keys,
            nbytes=count.all.nbytes,
            leases=len(count.leases),
            watches=len(self._hub),
            failing="; ".join(member.errors),
            failover=f"{spare} of the {many} members of etcd may die, and it goes on"
            if spare
            else f"none: etcd has {many} member(s), and needs all of them",
        )

    # --- transactions -----------------------------------------------------------------------------

    async def _run_txn(self, txn: Txn, owner: str) -> tuple[Outcome, bool]:
        """The outcome, and whether anything was written."""
        by_value = {each.key for each in txn.compares if each.target == "value"}
        if not by_value:
            reply = await self._etcd.write(transaction(request_of(txn, owner)))
            return outcome_of(reply, reply.header.revision, txn)
        # Those are decided here, and etcd is asked whether the keys are still the same.
        numbers = tuple(each for each in txn.compares if each.target != "value")
        for _ in range(TRIES_MAX):
            rows = {key: row for key, (row, _) in (await self._rows(by_value)).items()}
            true = all(
                holds(each, rows.get(each.key)) for each in txn.compares if each.target == "value"
            )
            inner = Txn(txn.then, numbers, txn.otherwise) if true else Txn(txn.otherwise)
            same = tuple(
                Compare(key, "mod_revision", rows[key].mod_revision if key in rows else 0)
                for key in by_value
            )
            request = request_of(Txn((), same), owner)
            request.success.append(pb.RequestOp(request_txn=request_of(inner, owner)))
            reply = await self._etcd.write(transaction(request))
            if reply.succeeded:
                answer = reply.responses[0].response_txn
                outcome, wrote = outcome_of(answer, reply.header.revision, inner)
                succeeded = true and outcome.succeeded
                return Outcome(succeeded, outcome.revision, outcome.results), wrote
        raise Busy(
            f"others wrote the keys that are compared, {TRIES_MAX} times: nothing was written",
            hint="try again; compare revisions instead of values",
        )

    async def _look(self, txn: Txn, noted: Added, *, fits: bool) -> None:
        """Judge a transaction by what is there; raises LimitExceeded."""
        async with _in_time("the log of etcd lags"):
            await self._reach(self._acked)
        puts = {each.key for branch in (txn.then, txn.otherwise) for each in branch
                if isinstance(each, Put)}  # fmt: skip
        there = await self._rows({each.key for each in txn.compares} | puts)
        rows = {key: row for key, (row, _) in there.items()}
        true = all(holds(each, rows.get(each.key)) for each in txn.compares)
        branch = txn.then if true else txn.otherwise
        if not fits:
            added = Added(noted.owner)
            for each in branch:
                if not isinstance(each, Put):
                    continue
                if each.key in there:
                    row, whose = there[each.key]
                    added.put(each, whose, row.lease, len(row.value))
                else:
                    added.put(each)
            self._books.check_instead(added, noted)
        writes = 0
        for each in branch:
            if isinstance(each, Delete) and each.prefix:
                key = DATA + each.key
                request = pb.RangeRequest(key=key, range_end=end_of(key), count_only=True)
                writes += (await self._etcd.read(ranged(request))).count
            elif not isinstance(each, Get):
                writes += 1
        limit("keys written by one transaction", writes, WRITES_MAX)

    async def _rows(self, keys: Iterable[bytes]) -> dict[bytes, tuple[KeyValue, str]]:
        """The keys that there are, and whose they are."""
        found: dict[bytes, tuple[KeyValue, str]] = {}
        left = [pb.RequestOp(request_range=pb.RangeRequest(key=DATA + key)) for key in keys]
        while left:
            some, left = left[:CHUNK_KEYS], left[CHUNK_KEYS:]
            reply = await self._etcd.read(transaction(pb.TxnRequest(success=some), READ_S))
            for answer in reply.responses:
                for kv in answer.response_range.kvs:
                    found[kv.key[len(DATA) :]] = item_of(kv), unwrap(kv.value)[0]
        return found

    async def _check_lease(self, lease: int, owner: str) -> None:
        """That it is the owner's; raises LeaseEnded."""
        if (mine := self._books.leases.get(lease)) is not None:
            whose = mine.owner
        else:  # of another entrance, where the log lags; or of nobody
            reply = await self._etcd.read(ranged(pb.RangeRequest(key=lease_key(lease))))
            whose = reply.kvs[0].value.decode() if reply.kvs else ""
        if whose != owner:
            raise lease_ended(lease)

    async def _done_late(self, added: Added) -> None:
        await anyio.sleep(LATE_S)
        self._books.done(added)

    # --- the log ----------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Publish what happens; returns when the store is another one, or must be counted anew."""
        since: float | None = None
        clock = asyncio.get_running_loop().time

        def started(member: Member) -> None:
            nonlocal since
            since = self._lost = None
            self._fed_by = member

        while True:
            try:
                async with contextlib.aclosing(
                    self._etcd.events(self._seen + 1, PREFIX, END, previous=True, started=started)
                ) as feed:
                    async for events in feed:
                        if self._publish(events):
                            log.info("sync.store_replaced", epoch=self.epoch)
                            return
            except Gap:
                log.warning("sync.counted_anew", revision=self._seen)
                return
            except Compacted as exc:
                if exc.revision - 1 > self._opened:
                    log.warning("sync.counted_anew", revision=self._seen)
                    return
                self._seen = exc.revision - 1
                self._hub.skip(self._seen)
            except HomeDown as exc:
                self._fed_by = None
                since = since or clock()
                if clock() - since >= LOST_S and self._lost is None:
                    log.warning("sync.etcd_lost", why=exc.message)
                    self._lost = exc
                    self._hub.close(exc)
                await anyio.sleep(AGAIN_S)

    def _publish(self, events: list[Any]) -> bool:
        """Of the log, whole revisions; returns whether the store is another one now."""
        for event in events:
            if event.kv.mod_revision > self._opened:
                if event.kv.key == STORE:
                    return True
                self._garbage += self._books.follow(event)
        self._seen = events[-1].kv.mod_revision
        self._hub.publish((event_of(e) for e in events if e.kv.key.startswith(DATA)), 0)
        while self._owed and self._owed[0][0] <= self._seen:
            self._books.done(heapq.heappop(self._owed)[2])
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()
        self._mark()
        return False

    def _mark(self) -> None:
        """Forget what is too long ago."""
        revision, garbage = self._marks[-1]
        if self._seen - revision < _MARK_REVISIONS and self._garbage - garbage < _MARK_BYTES:
            return
        self._marks.append((self._seen, self._garbage))
        forget = 0
        while (
            self._seen - self._marks[0][0] > HISTORY_REVISIONS_MAX
            or self._garbage - self._marks[0][1] > HISTORY_BYTES_MAX
        ):
            forget = self._marks.popleft()[0]
        if forget:
            self._tasks.start_soon(self._forget_soon, forget)

    async def _forget_soon(self, revision: int) -> None:
        with contextlib.suppress(WetwareError):  # another entrance does, or it comes again
            await self._forget(revision)

    async def _forget(self, revision: int) -> None:
        if revision <= 0:
            return
        request = pb.CompactionRequest(revision=revision)
        with contextlib.suppress(Compacted):  # it is, already
            await self._etcd.read(asking("kv.Compact", request))
        self._hub.publish((), revision)

    async def _compacted(self) -> int:
        """Up to where; 0 for nothing."""
        try:
            async with (
                _in_time("etcd does not say what is compacted"),
                contextlib.aclosing(self._etcd.events(1, STORE)) as events,
            ):
                async for _ in events:  # that which made it
                    break
        except Compacted as exc:
            return exc.revision - 1
        return 0

    async def _from_etcd(self, key: bytes, revision: int, prefix: bool) -> Batch:
        """A step through the history, for a watcher that lags."""
        target, nbytes, scanned, found = self._hub.revision, 0, 0, list[Event]()
        # One earlier: etcd would watch from the revision that is compacted, without its deletions.
        start = max(1, revision - 1)
        async with contextlib.aclosing(self._etcd.events(start, PREFIX, END)) as history:
            async for events in history:
                for at, some in itertools.groupby(events, lambda event: event.kv.mod_revision):
                    if at > target:
                        return Batch(tuple(found), target)
                    for event in some:
                        scanned += 1
                        name = event.kv.key
                        if at < revision or not name.startswith(DATA):
                            continue
                        name = name[len(DATA) :]
                        if name.startswith(key) if prefix else name == key:
                            found.append(event_of(event))
                            nbytes += len(event.kv.value)
                    done = nbytes >= PAGE_BYTES_MAX or scanned >= SCANNED_EVENTS
                    if at == target or (done and at >= revision):
                        return Batch(tuple(found), at)
        raise AssertionError("a watch ends by raising")

    async def _reach(self, revision: int) -> None:
        """Wait until the log is known up to there; raises TimeoutError."""
        async with asyncio.timeout(READ_S):
            while self._seen < revision:
                await self._progress.wait()

    async def _probe(self) -> None:
        """Leave a member that does not see the others any more: what it feeds us stands still."""
        request = ranged(pb.RangeRequest(key=STORE, count_only=True))
        while True:
            await anyio.sleep(PROBE_S)
            if (member := self._fed_by) is not None:
                try:
                    await self._etcd.at(member, request)
                except Failed as exc:
                    log.info("sync.etcd_left", endpoint=member.endpoint, why=str(exc))
                    self._fed_by = None
                    self._etcd.leave(member)

    def _check_open(self) -> None:
        if self._closed:
            raise closed()


def _deletes_prefixes(txn: Txn) -> bool:
    return any(
        isinstance(each, Delete) and each.prefix
        for branch in (txn.then, txn.otherwise)
        for each in branch
    )


@contextlib.asynccontextmanager
async def _in_time(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(2 * READ_S):
            yield
    except TimeoutError:
        raise HomeDown(what, hint="try again; nothing was written") from None
