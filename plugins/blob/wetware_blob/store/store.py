"""The store of one node: what others of the plugin use. The loop never waits for the disk here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio

from wetware.base.disk import remedy
from wetware.base.finding import warning
from wetware.base.log import get_logger
from wetware.base.threads import to_its_end
from wetware.errors import ConfigError, InvalidArgument, LimitExceeded, WetwareError
from wetware_blob.format.cid import Cid
from wetware_blob.store.bits import Bits
from wetware_blob.store.blocks import Blocks
from wetware_blob.store.collect import DELETED_MAX, Collected, Walk
from wetware_blob.store.errors import Damaged, DiskFull, StoreFailed
from wetware_blob.store.index import (
    FILE,
    INDEX_BYTES,
    ROW_BYTES,
    SMALL_BYTES_MAX,
    Index,
    batches,
    charge,
    file_name,
    is_damage,
    refusal,
)
from wetware_blob.store.pins import (
    BadPin,
    Pin,
    amend_pin,
    keep_pin,
    pin_rows,
    pins_after,
    read_pin,
    remove_damaged,
    remove_pins,
)
from wetware_blob.store.quota import Quota
from wetware_blob.store.salvage import NEW, aside, salvage

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.base.files import Database, Files
    from wetware.hookspecs import Clock, Finding
    from wetware_blob.format.cid import Block
    from wetware_blob.store.index import Row

log = get_logger("blob.store")
T = TypeVar("T")
RunSync = Callable[..., Awaitable[Any]]
"""Calls a function that blocks in a thread, as `PluginContext.run_sync`."""

PUT_BYTES_MAX: Final = 16 << 20
"""Blocks that are written and synced together; more are put in parts."""
PUT_BLOCKS_MAX: Final = 1024
FREE_BYTES_MIN: Final = 4 << 20
"""That a put leaves free: what the index may grow by before its log is emptied."""
SCRUBBED_MAX: Final = 4
"""Blocks, of up to 2 MiB each, that are read before there is a pause."""
DOWNLOAD_KEPT_S: Final = 3 * 24 * 3600.0
"""For so long a download that was interrupted keeps its blocks, unless a write needs their room."""
DOWNLOADS_MAX: Final = 1000
"""Downloads that were interrupted and keep theirs: the last ones."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an owner is charged, or the node; and how much they may be."""

    charged: int
    charged_max: int
    blocks: int = 0
    pins: int = 0


@dataclass(slots=True, eq=False)
class Hold:
    """What is written under it is not collected while it is open; see `Store.hold`.

    Attributes:
        keep: The rows of blocks that were written or seen under it.
        charged: To its owner, for an upload that is not pinned yet.
        noted: It is on the disk that a download has begun.
    """

    owner: str
    root: Cid | None
    keep: Bits = field(default_factory=Bits)
    charged: int = 0
    noted: bool = False


class Store:
    """See `docs/adr/0019` for where a block lies.

    Args:
        files: Of the store's own directory.
        run_sync: Calls in a thread.
        clock: For when pins and downloads began.
        node_bytes_max: Of the disk that all of the store may take.
        owner_bytes_max: Charged bytes of one owner's pins and uploads.
        sleep: Between two parts of a scrub.

    Attributes:
        id: 8 bytes, random: another one once the store was made anew. Known while it runs.
    """

    id: bytes

    def __init__(
        self,
        files: Files,
        *,
        run_sync: RunSync,
        clock: Clock,
        node_bytes_max: int,
        owner_bytes_max: int,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._files, self._run_sync = files, run_sync
        self._clock, self._sleep = clock, sleep
        self._quota = Quota(node_bytes_max - INDEX_BYTES, owner_bytes_max)
        self._index: Index
        self._blocks: Blocks
        self._holds: set[Hold] = set()
        self._collecting, self._making_room = asyncio.Lock(), asyncio.Lock()
        self._writing: set[asyncio.Future[Any]] = set()
        self._reopening = False
        self._kept: list[str] = []
        self._garbage = True  # whether something may have become garbage since the last collection

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Open the store, and serve it until cancelled. Raises ConfigError."""
        await self._run_sync(self._open)
        self._index.start()
        try:
            task_status.started()
            while True:
                await self._index.malformed.wait()
                await self._reopen()
        finally:
            with anyio.CancelScope(shield=True):
                await self._run_sync(self._index.close)

    async def _reopen(self) -> None:
        """Salvage the index, once nobody writes: what is written meanwhile is refused."""
        self._reopening = True
        with anyio.CancelScope(shield=True):
            while self._writing:
                await asyncio.wait(self._writing)
            async with self._collecting:  # rows may have other IDs
                await self._run_sync(self._index.close)
                self._quota = Quota(self._quota.node_bytes_max, self._quota.owner_bytes_max)
                for hold in self._holds:
                    self._quota.restore(hold.owner, hold.charged)
                await self._run_sync(self._open, "it was found as it was used")
                self._index.start()
        self._reopening = False

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """A write of more than one step: who is cancelled waits for it, and so does `_reopen`."""
        if self._reopening:
            work.close()
            raise StoreFailed("the index of the blob store is being repaired", hint="try again")
        task = asyncio.ensure_future(work)
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return await to_its_end(task)

    def _open(self, damage: str = "") -> None:
        try:
            with contextlib.suppress(FileExistsError):
                self._files.make_directory("")
            self._files.sync_directory("..")
            names = self._files.names("")
            if any(map(str.isdecimal, names)) and not (FILE in names and self._files.size(FILE)):
                # All files would be those of puts that did not come to their end.
                raise StoreFailed(f"its index {FILE} is gone, and there are files of blocks")  # noqa: TRY301 as below
            if NEW in names:
                damage = "it was not salvaged to the end"
            if not damage:
                try:
                    self._load()
                except Exception as exc:
                    if not is_damage(exc):
                        raise
                    damage = str(exc)
            if damage:
                log.error("blob.index_damaged", why=damage)
                salvage(self._files, self._clock.time())
                self._load()
        except Exception as exc:
            raise ConfigError(
                f"the blob store cannot be used: {exc}",
                hint=remedy(exc) or "restore it from a backup, or move it away",
                code="config.store",
            ) from exc

    def _load(self) -> None:
        self._kept = aside(self._files.names(""))
        index = Index(self._files)
        try:
            blocks = Blocks(self._files, index)
            blocks.sweep()
            _, charged = index.totals()
            self.id = index.check_pins()
            with index.reading() as db:
                sql = "SELECT owner, SUM(charged), COUNT(*) FROM pins GROUP BY owner"
                owners = db.execute(sql).fetchall()
                rows = pin_rows(db)
            for pin in _checked(rows)[1]:
                log.error("blob.pin_damaged", owner=pin.owner, name=pin.name)
        except BaseException:
            index.abandon()
            raise
        self._index, self._blocks = index, blocks
        self._quota.written(0, charged)
        for owner, nbytes, pins in owners:
            self._quota.restore(str(owner), int(nbytes), int(pins))

    # --- blocks -----------------------------------------------------------------------------------

    async def have(self, digests: Collection[bytes]) -> set[bytes]:
        """Those of some blocks that are here, and not known to be damaged."""
        found = await self._run_sync(self._index.find, digests)
        return {digest for digest, row in found.items() if not row.damaged}

    async def get(self, digest: bytes) -> bytes:
        """The bytes of a block, verified. Raises NotFound "not_found.blob", and Damaged."""
        data: bytes = await self._run_sync(self._blocks.read, digest)
        return data

    async def put(self, hold: Hold, blocks: Sequence[Block]) -> None:
        """Write blocks whose hashes were checked; they are on the disk when it returns.

        Raises LimitExceeded before a limit is passed, DiskFull, and StoreFailed: then nothing is
        promised of any of them. Who is cancelled waits for the part that is being written.
        """
        part: dict[bytes, bytes] = {}
        size = 0
        for block in blocks:
            if block.cid.digest in part:
                continue
            if len(part) >= PUT_BLOCKS_MAX or (part and size + len(block.data) > PUT_BYTES_MAX):
                await self._to_its_end(self._put(hold, part))
                part, size = {}, 0
            part[block.cid.digest] = block.data
            size += len(block.data)
        if part:
            await self._to_its_end(self._put(hold, part))

    async def _put(self, hold: Hold, part: dict[bytes, bytes]) -> None:
        self._check_open(hold)
        if hold.root is not None and not hold.noted:
            hold.noted = True
            root, now = hold.root, self._clock.time()
            await self._index.write(lambda db: _note_download(db, root, now))
        new, more = await self._look(hold.keep, part)
        room = sum(charge(len(data)) for data in new.values())
        owned = more + room if hold.root is None else 0
        self._charge(hold, owned)
        promised = stored = 0
        try:
            await self._promise(room)
            promised = room
            stored = await self._write(hold.keep, new)
        except BaseException:
            self._charge(hold, -owned)
            raise
        finally:
            self._quota.written(promised, stored)

    async def _look(self, keep: Bits, part: dict[bytes, bytes]) -> tuple[dict[bytes, bytes], int]:
        """What of it is not here, and what the rest is charged that is new under a hold.

        In a transaction: many callers are answered by one, where the lock of a reader would let
        four at a time in between two. Raises DiskFull where there is no room for it.
        """

        def look(db: Database) -> tuple[dict[bytes, bytes], int, bool]:
            found = self._index.find_in(db, part)
            there = {digest: row for digest, row in found.items() if not row.damaged}
            more = sum(row.charged for row in there.values() if self._index.keep(row.id, keep))
            new = {digest: data for digest, data in part.items() if digest not in there}
            return new, more, self._has_room(sum(map(len, new.values())))

        new, more, room = await self._index.write(look)
        if not room:
            raise DiskFull(
                "the disk of the blob store has no room for more",
                hint="free some disk space, or run `ww blob gc`",
            )
        return new, more

    def _has_room(self, nbytes: int) -> bool:
        reserve = self._index.reserve
        if self._files.free_bytes() < nbytes + FREE_BYTES_MIN:
            return False
        return not reserve.missing or reserve.fill()

    async def _promise(self, room: int) -> None:
        """Room in the node's quota, if need be by collecting what nothing keeps."""
        with contextlib.suppress(LimitExceeded):
            self._quota.promise(room)
            return
        async with self._making_room:  # who comes while others collect waits for what they free
            for unfinished in (True, False):
                try:
                    self._quota.promise(room)
                except LimitExceeded as full:
                    if not (self._garbage or self._collecting.locked()):
                        raise
                    try:
                        await self.collect(unfinished=unfinished)
                    except WetwareError as exc:  # which names a pin that may be another owner's
                        log.warning("blob.not_collected", why=exc.message)
                        raise full from None
                else:
                    return
            self._quota.promise(room)

    async def _write(self, keep: Bits, new: dict[bytes, bytes]) -> int:
        """Blocks that are not here, or damaged; returns what they are charged more than before."""
        if not new:
            return 0
        large = [(d, data) for d, data in new.items() if len(data) > SMALL_BYTES_MAX]
        small_bytes = sum(len(data) for data in new.values() if len(data) <= SMALL_BYTES_MAX)
        size = small_bytes + ROW_BYTES * len(new)
        files: dict[bytes, int] = {}
        try:
            if large:
                files = await self._run_sync(self._blocks.write, large)
            stored, trash = await self._index.write(
                lambda db: self._blocks.add(db, new, files, keep), size=size
            )
        except Exception as exc:  # not where the loop is closed: the row may be written still
            names = [file_name(number, digest) for digest, number in files.items()]
            await self._run_sync(self._blocks.remove_files, names)
            if isinstance(exc, OSError):
                raise refusal(exc) from exc
            raise
        self._index.spoiled.difference_update(new)
        if trash:
            await self._run_sync(self._blocks.remove_files, trash)
        return stored

    # --- holds ------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def hold(self, owner: str, root: Cid | None = None) -> AsyncIterator[Hold]:
        """While it is open, what is written under it is not collected, nor what its root reaches.

        An upload has no root; what it writes is charged to its owner until it is pinned or given
        up. A hold with a root is of who reads or downloads it; a download that ended with an error
        keeps what it has for DOWNLOAD_KEPT_S.
        """
        hold = Hold(owner, root)
        self._holds.add(hold)
        try:
            if root is not None and self._index.marking is not None:
                await self._walk([root], hold.keep, whole=False)
            yield hold
            if hold.noted and root is not None:
                sql, key = "DELETE FROM downloads WHERE root = ?", (bytes(root),)
                self._index.write_soon(lambda db: db.execute(sql, key), must=True)
        finally:
            self._charge(hold, -hold.charged)
            self._holds.discard(hold)
            self._garbage = True

    def _charge(self, hold: Hold, more: int) -> None:
        if hold in self._holds:  # else all of it was given back
            self._quota.charge(hold.owner, more)
            hold.charged += more

    def _check_open(self, hold: Hold) -> None:
        if hold not in self._holds:
            raise InvalidArgument("the hold is not open")

    # --- pins -------------------------------------------------------------------------------------

    async def pin(self, hold: Hold, pin: Pin) -> None:
        """Keep a root with all that it reaches; on the disk when it returns.

        What the hold was charged becomes what the pin is. Raises NotFound and Damaged where a block
        lacks, BadBlock where one cannot be read, LimitExceeded.
        """
        self._check_open(hold)
        if pin.owner != hold.owner:
            raise InvalidArgument(f"the hold is of {hold.owner}, and the pin of {pin.owner}")
        charged = (await self._walk([pin.root], hold.keep, whole=True)).charged
        self._quota.charge(pin.owner, charged - hold.charged, 1)
        hold.charged = 0

        async def write() -> None:
            try:
                kept = replace(pin, charged=charged)
                gone = await self._index.write(lambda db: keep_pin(db, kept))
            except BaseException:
                self._quota.charge(pin.owner, -charged, -1)
                raise
            self._quota.charge(pin.owner, -sum(gone), -len(gone))

        await self._to_its_end(write())

    async def _walk(self, roots: Collection[Cid], keep: Bits, *, whole: bool) -> Walk:
        """To its end; see `Walk`."""
        walk = Walk(self._index, self._blocks, keep, whole=whole)
        for some in batches(roots):  # each call in a thread costs about a root's time
            await self._run_sync(walk.add, some)
            while await self._run_sync(walk.step):
                pass
        return walk

    async def amend(self, pin: Pin, **terms: Any) -> bool:
        """Change these attributes of a pin, unless it was given up; whether it was there.

        The others stay as they are by then, also where the same was pinned anew meanwhile. All that
        it reaches is here then, and both are on the disk. Raises as `pin`.
        """
        async with self.hold(pin.owner, pin.root) as hold:
            await self._walk([pin.root], hold.keep, whole=True)
            change = self._index.write(lambda db: amend_pin(db, pin, terms))
            return await self._to_its_end(change)

    async def unpin(self, owner: str, root: Cid | bytes, name: str | None) -> int:
        """Give a root up, under one name or all (None); returns how many pins that were.

        A pin that is damaged is named by its columns as they are (`BadPin`).
        """

        async def write() -> int:
            remove = self._index.write(lambda db: remove_pins(db, owner, root, name), must=True)
            gone = await remove
            self._quota.charge(owner, -sum(gone), -len(gone))
            self._garbage = True
            return len(gone)

        return await self._to_its_end(write())

    async def drop_damaged(self) -> list[BadPin]:
        """Give up the pins whose rows are damaged; returns them, their columns as they were."""

        async def write() -> list[BadPin]:
            gone = await self._index.write(remove_damaged, must=True)
            for pin, charged in gone:  # both may be others than what was charged
                nbytes, pins = self._quota.of(pin.owner)
                self._quota.charge(pin.owner, -min(max(charged, 0), nbytes), -min(1, pins))
            self._garbage = True
            return [pin for pin, _ in gone]

        return await self._to_its_end(write())

    async def pins(self, owner: str | None = None, root: Cid | None = None) -> list[Pin]:
        """Those that are whole, the newest first; `damage` has the others."""
        found: tuple[list[Pin], list[BadPin]] = await self._run_sync(self._read_pins, owner, root)
        return found[0]

    def _read_pins(
        self, owner: str | None = None, root: Cid | None = None
    ) -> tuple[list[Pin], list[BadPin]]:
        with self._index.reading() as db:
            rows = pin_rows(db, owner, root)
        return _checked(rows)

    async def reaching(self, block: Cid) -> list[Pin]:
        """The pins that reach a block, as far as is known where others lack."""
        row = (await self._run_sync(self._index.find, [block.digest])).get(block.digest)
        found = []
        for pin in await self.pins() if row else ():
            reached = Bits()
            await self._walk([pin.root], reached, whole=False)
            if row.id in reached:
                found.append(pin)
        return found

    async def page(
        self, owner: str | None, root: Cid | None, after: int, limit: int
    ) -> tuple[list[Pin], int]:
        """So many of `pins`, the oldest first, and where to go on behind them; 0: at their end.

        Those that are damaged count, and lack in their page.
        """

        def read() -> list[tuple[Any, ...]]:
            with self._index.reading() as db:
                return pins_after(db, after, limit, owner, root)

        rows = await self._run_sync(read)
        pins, _ = await self._run_sync(_checked, [row[1:] for row in rows])
        return pins, rows[-1][0] if len(rows) == limit else 0

    async def damage(self) -> tuple[int, list[BadPin]]:
        """How many blocks are known to be damaged, and the pins that are."""

        def read() -> tuple[int, list[BadPin]]:
            with self._index.reading() as db:
                ((blocks,),) = db.execute("SELECT COUNT(*) FROM blocks WHERE damaged").fetchall()
            return int(blocks), self._read_pins()[1]

        found: tuple[int, list[BadPin]] = await self._run_sync(read)
        return found

    async def check_pins(self) -> None:
        """Raises StoreFailed where there may be pins that are damaged, or that a salvage lost."""
        await self._run_sync(self._index.check_pins)
        _, pins = await self.damage()
        if pins:
            raise StoreFailed(f"damaged pins: {len(pins)}", hint="`ww blob verify` names them")
        for finding in self.findings():
            raise StoreFailed(finding.text, hint=finding.remedy)

    def findings(self) -> Iterator[Finding]:
        """Whether the index had to be made anew."""
        for name in self._kept:
            yield warning(
                "blob.index",
                "the index of blobs was damaged, and made anew from what could be read; the old "
                f"one is kept as {name}, and until the node starts without it no other node gives "
                "up a copy of a pin that may be lost",
                "`ww blob verify` names what is lost, and fetches what others have; look at the "
                f"disk, pin again what `ww blob pin ls --all` lacks, remove {name} from the "
                "directory `store` of the plugin's data, and restart the node",
            )

    async def usage(self, owner: str | None = None) -> Usage:
        """Of an owner; None: of the node."""
        if owner is not None:
            charged, pins = self._quota.of(owner)
            return Usage(charged, self._quota.owner_bytes_max, pins=pins)
        blocks, charged = await self._run_sync(self._index.totals)
        return Usage(charged, self._quota.node_bytes_max, blocks, self._quota.pins)

    async def free_bytes(self) -> int:
        """Of the disk, for anybody."""
        free: int = await self._run_sync(self._files.free_bytes)
        return free

    # --- maintenance ------------------------------------------------------------------------------

    async def collect(self, *, dry_run: bool = False, unfinished: bool = True) -> Collected:
        """Delete what nothing keeps. Raises Damaged where it cannot be known what a pin keeps.

        Args:
            dry_run: Delete nothing, and say what would be.
            unfinished: Keep what downloads have that were interrupted.
        """
        async with self._collecting:
            self._garbage = dry_run or unfinished
            self._index.marking = marked = Bits()
            holds = tuple(self._holds)  # what they are given from here on is marked, too
            try:
                await self._mark(marked, holds, unfinished=unfinished)
                return await self._sweep(marked, dry_run=dry_run)
            except BaseException:
                self._garbage = True
                raise
            finally:
                self._index.marking = None

    async def _mark(self, marked: Bits, holds: Collection[Hold], *, unfinished: bool) -> None:
        def begin(db: Database) -> list[Any]:  # as a write: after those that say of downloads …
            for hold in holds:
                marked.update(hold.keep)
            since = self._clock.time() - DOWNLOAD_KEPT_S  # … that they have ended
            return db.execute("SELECT root FROM downloads WHERE at > ?", (since,)).fetchall()

        downloads = await self._index.write(begin, must=True)
        pins, damaged = await self._run_sync(self._read_pins)
        for bad in damaged:
            raise Damaged(
                f"a pin of {bad.owner} named {bad.name!r} is damaged: what it keeps is unknown",
                hint="pin the root again under that name, or give up what is damaged with "
                "`ww blob gc --drop-damaged`; `ww blob verify` names all of it",
            )
        roots = [hold.root for hold in holds if hold.root is not None]
        if unfinished:
            roots += [Cid.decode(bytes(root)) for (root,) in downloads]
        for some, whole in (([pin.root for pin in pins], True), (roots, False)):
            await self._walk(some, marked, whole=whole)

    async def _sweep(self, marked: Bits, *, dry_run: bool) -> Collected:
        async def delete() -> list[Row]:
            gone = await self._index.write(
                lambda db: self._blocks.delete(db, rows, marked), must=True
            )
            names = [row.name for row in gone if row.file is not None]
            await self._run_sync(self._blocks.remove_files, names)
            self._quota.written(0, -sum(row.charged for row in gone))
            return gone

        blocks = charged = after = 0
        while rows := await self._run_sync(self._index.after, after, DELETED_MAX):
            after = rows[-1].id
            rows = [row for row in rows if row.id not in marked]
            if rows and not dry_run:
                rows = await to_its_end(delete())
                if not self._index.reserve.missing:
                    self._index.write_soon(_vacuum)
            blocks, charged = blocks + len(rows), charged + sum(row.charged for row in rows)
        return Collected(blocks, charged)

    async def scrub(
        self, rate_bytes_s: float | None, share: float = 0.0
    ) -> AsyncIterator[bytes | BadPin]:
        """Read everything and yield what is damaged, or lacks of a pin; None: as fast as it goes.

        That is the digest of a block, or a pin. The blocks are read from behind so large a share of
        them (0 to 1), and then those before. What lacks below a block that is fetched meanwhile
        comes, too.
        """
        for pin in (await self.damage())[1]:
            yield pin
        first = int(share * await self._run_sync(self._index.last))
        for begin, end in ((first, None), (0, first)):
            after = begin
            while rows := await self._run_sync(self._index.after, after, SCRUBBED_MAX):
                rows = [row for row in rows if end is None or row.id <= end]
                for digest in await self._run_sync(self._blocks.damaged, rows):
                    yield digest
                if not rows:
                    break
                after = rows[-1].id
                if rate_bytes_s is not None:
                    await self._sleep(sum(row.size for row in rows) / rate_bytes_s)
        walk = Walk(self._index, self._blocks, Bits(), whole=False)
        for root in [pin.root for pin in await self.pins()]:
            await self._run_sync(walk.add, [root])
            while await self._run_sync(walk.step) or walk.lacking:
                lacking, walk.lacking = set(walk.lacking), []
                for cid in lacking:
                    yield cid.digest
                    if await self.have([cid.digest]):
                        await self._run_sync(walk.add, [cid])


def _checked(rows: Collection[tuple[Any, ...]]) -> tuple[list[Pin], list[BadPin]]:
    """Those that are whole, and the others. It takes long, and needs no lock."""
    pins = list(map(read_pin, rows))
    damaged = [pin for pin in pins if isinstance(pin, BadPin)]
    return [pin for pin in pins if isinstance(pin, Pin)], damaged


def _note_download(db: Database, root: Cid, at: float) -> None:
    db.execute("INSERT OR REPLACE INTO downloads VALUES (?, ?)", (bytes(root), at))
    db.execute(
        "DELETE FROM downloads WHERE at <= ? OR root NOT IN "
        "(SELECT root FROM downloads ORDER BY at DESC LIMIT ?)",
        (at - DOWNLOAD_KEPT_S, DOWNLOADS_MAX),
    )


def _vacuum(db: Database) -> None:
    """Give free pages back to the disk. It writes more than the reserve may have."""
    db.execute("PRAGMA incremental_vacuum(256)").fetchall()
