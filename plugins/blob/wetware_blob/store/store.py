"""The store of one node: what others of the plugin use. The loop never waits for the disk here."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Sequence,
)
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import anyio

from wetware.base.disk import remedy
from wetware.base.finding import warning
from wetware.base.log import get_logger
from wetware.base.threads import to_its_end
from wetware.errors import ConfigError, InvalidArgument, LimitExceeded, WetwareError
from wetware_blob.format.cid import Cid
from wetware_blob.store import scrub
from wetware_blob.store.bits import Bits
from wetware_blob.store.blocks import Blocks, added
from wetware_blob.store.collect import DELETED_MAX, Children, Collected, Run, Walk, swept, vacuum
from wetware_blob.store.errors import Damaged, DiskFull, StoreFailed
from wetware_blob.store.index import (
    FILE,
    FILES_PER_DIRECTORY,
    INDEX_BYTES,
    SMALL_BYTES_MAX,
    Change,
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
    amended,
    count_pins,
    damaged_removed,
    kept,
    read_pins,
    removed,
)
from wetware_blob.store.quota import Quota
from wetware_blob.store.salvage import NEW, aside, salvage
from wetware_blob.store.scrub import Damage

if TYPE_CHECKING:
    from types import TracebackType

    from anyio.abc import TaskStatus

    from wetware.hookspecs import Clock, Finding
    from wetware_blob.format.cid import Block
    from wetware_blob.store.files import Database, Files

log = get_logger("blob.store")
T = TypeVar("T")

PUT_BYTES_MAX: Final = 16 << 20
"""Blocks that are written and synced together; more are put in parts."""
PUT_BLOCKS_MAX: Final = 1024
WRITERS: Final = 2
"""Threads that write the files of one part: an fsync waits, and others use that time."""
FREE_BYTES_MIN: Final = 4 << 20
"""That a put leaves free: what the index may grow by before its log is emptied."""
DOWNLOAD_KEPT_S: Final = 3 * 24 * 3600.0
"""For so long a download that was interrupted keeps its blocks, unless a write needs their room."""


class RunSync(Protocol):
    """Calls a function that blocks in a thread, as `PluginContext.run_sync`."""

    def __call__(self, function: Callable[..., Any], /, *args: object) -> Awaitable[Any]: ...


@dataclass(frozen=True, slots=True)
class Usage:
    """What an owner is charged, or the node; and how much they may be."""

    charged: int
    charged_max: int
    blocks: int = 0
    pins: int = 0


class Hold:
    """While it is open, what is written under it is not collected, nor what its root reaches.

    An upload has no root; what it writes is charged to its owner until it is pinned or given up. A
    hold with a root is of who reads or downloads it; a download that ended with an error keeps what
    it has for DOWNLOAD_KEPT_S.
    """

    def __init__(self, store: Store, owner: str, root: Cid | None) -> None:
        self.owner, self.root = owner, root
        self.keep = Bits()
        self.charged = 0
        self.noted = False
        self._store = store

    async def __aenter__(self) -> Hold:
        await self._store._begin(self)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._store._end(self, finished=exc_type is None)


class Store:
    """See `docs/adr/0019` for where a block lies.

    Args:
        files: Of the store's own directory.
        children: The links of a block.
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
        children: Children,
        *,
        run_sync: RunSync,
        clock: Clock,
        node_bytes_max: int,
        owner_bytes_max: int,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._files, self._children, self._run_sync = files, children, run_sync
        self._clock, self._sleep = clock, sleep
        self._quota = Quota(node_bytes_max - INDEX_BYTES, owner_bytes_max)
        self._index: Index
        self._blocks: Blocks
        self._holds: set[Hold] = set()
        self._run: Run | None = None
        self._collecting, self._making_room = asyncio.Lock(), asyncio.Lock()
        self._numbering = asyncio.Lock()
        self._next_file = 0
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
        log.error("blob.index_damaged")
        self._reopening = True
        with anyio.CancelScope(shield=True):
            while self._writing:
                await asyncio.wait(self._writing)
            async with self._collecting:  # rows may have other IDs
                await self._run_sync(self._index.close)
                self._next_file = 0
                self._quota = Quota(self._quota.node_bytes_max, self._quota.owner_bytes_max)
                for hold in self._holds:
                    self._quota.restore(hold.owner, hold.charged)
                await self._run_sync(self._open, True)
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

    def _open(self, damaged: bool = False) -> None:
        try:
            with suppress(FileExistsError):
                self._files.make_directory("")
            self._files.sync_directory("..")
            self._check_there()
            if not damaged and NEW not in self._files.names(""):
                try:
                    self._load()
                except Exception as exc:
                    if not is_damage(exc):
                        raise
                    why = str(exc)
                else:
                    return
                log.error("blob.index_damaged", why=why)
            salvage(self._files, self._clock.time())
            self._load()
        except Exception as exc:
            raise ConfigError(
                f"the blob store cannot be used: {exc}",
                hint=remedy(exc) or "restore it from a backup, or move it away",
                code="config.store",
            ) from exc

    def _check_there(self) -> None:
        """Without the index all files would be those of puts that did not come to their end."""
        names = self._files.names("")
        if any(map(str.isdecimal, names)) and not (FILE in names and self._files.size(FILE)):
            raise StoreFailed(f"its index {FILE} is gone, and there are files of blocks")

    def _load(self) -> None:
        self._kept = aside(self._files.names(""))
        index = Index(self._files)
        try:
            charged, owners = self._check(index, blocks := Blocks(self._files, index))
        except BaseException:
            index.abandon()
            raise
        self._index, self._blocks = index, blocks
        self._quota.written(0, charged)
        for owner, nbytes, pins in owners:
            self._quota.restore(owner, nbytes, pins)

    def _check(self, index: Index, blocks: Blocks) -> tuple[int, list[tuple[str, int, int]]]:
        """Make files and rows agree; what all is charged, and of each owner that and the pins."""
        found = blocks.sweep()
        if found.orphans or found.lost:
            log.info("blob.swept", orphans=found.orphans, lost=len(found.lost))
        for digest, row in index.find(found.lost).items():
            log.error("blob.damaged", block=digest.hex(), why="its file is gone")
            index.spoil(row)
        _, charged = index.totals()
        self.id = index.check_pins()
        with index.reading() as db:
            pins = read_pins(db)
            sql = "SELECT owner, SUM(charged), COUNT(*) FROM pins GROUP BY owner"
            owners = db.execute(sql).fetchall()
        for pin in pins:
            if isinstance(pin, BadPin):
                log.error("blob.pin_damaged", owner=pin.owner, name=pin.name)
        return charged, [(str(owner), int(nbytes), int(count)) for owner, nbytes, count in owners]

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
            await self._index.write(_began(hold.root, self._clock.time()))
        new, more = await self._look(hold.keep, part)
        room = sum(charge(len(data)) for data in new.values())
        owned = more + room if hold.root is None else 0
        self._quota.charge(hold.owner, owned)
        hold.charged += owned
        try:
            await self._promise(room)
        except BaseException:
            self._uncharge(hold, owned)
            raise
        await self._write(hold, new, room, owned)

    async def _look(self, keep: Bits, part: dict[bytes, bytes]) -> tuple[dict[bytes, bytes], int]:
        """What of it is not here, and what the rest is charged that is new under a hold.

        In a transaction: many callers are answered by one, where the lock of a reader would let
        four at a time in between two. Raises DiskFull where there is no room for it.
        """

        def apply(db: Database, _: list[str]) -> tuple[dict[bytes, bytes], int, bool]:
            found = self._index.find_in(db, part)
            there = {digest: row for digest, row in found.items() if not row.damaged}
            more = sum(row.charged for row in there.values() if keep.add(row.id))
            new = {digest: data for digest, data in part.items() if digest not in there}
            return new, more, self._has_room(sum(map(len, new.values())))

        new, more, room = await self._index.write(Change(apply))
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
        with suppress(LimitExceeded):
            self._quota.promise(room)
            return
        async with self._making_room:  # who comes while others collect waits for what they free
            try:
                self._quota.promise(room)
            except LimitExceeded as full:
                if not (self._garbage or self._collecting.locked()):
                    raise
                for unfinished in (True, False):
                    try:
                        await self.collect(unfinished=unfinished)
                    except WetwareError as exc:  # which names a pin that may be another owner's
                        log.warning("blob.not_collected", why=exc.message)
                        raise full from None
                    with suppress(LimitExceeded):
                        self._quota.promise(room)
                        return
                self._quota.promise(room)

    async def _write(self, hold: Hold, new: dict[bytes, bytes], room: int, owned: int) -> None:
        large = [(d, data) for d, data in new.items() if len(data) > SMALL_BYTES_MAX]
        numbers: dict[bytes, int] = {}
        written = False
        try:
            if large:
                first = await self._number(len(large))
                numbers = {digest: number for number, (digest, _) in enumerate(large, first)}
                await self._write_files(first, large)

            def done(stored: int) -> None:
                self._quota.written(room, stored)
                self._index.spoiled.difference_update(new)

            written = True  # from here on the index answers for the files
            if new:
                change = added(new, numbers, hold.keep, self._index.spoiled)
                await self._index.write(replace(change, done=done))
            else:
                self._quota.written(room, 0)
        except BaseException as exc:
            self._quota.written(room, 0)
            self._uncharge(hold, owned)
            if not written and numbers:
                names = [file_name(number, digest) for digest, number in numbers.items()]
                await self._run_sync(self._blocks.remove_files, names)
            if isinstance(exc, OSError):
                raise refusal(exc) from exc
            raise

    async def _number(self, many: int) -> int:
        """The first of so many numbers of files, all in one directory."""
        async with self._numbering:
            free = -self._next_file % FILES_PER_DIRECTORY
            if free < many or not self._blocks.usable(self._next_file):
                self._next_file = await self._run_sync(self._blocks.make_directory)
            first = self._next_file
            self._next_file += many
            return first

    async def _write_files(self, first: int, large: list[tuple[bytes, bytes]]) -> None:
        share = -(-len(large) // WRITERS)
        results = await asyncio.gather(
            *(
                self._run_sync(self._blocks.write_files, first + at, large[at : at + share])
                for at in range(0, len(large), share)
            ),
            return_exceptions=True,  # each is waited for: their files are removed then
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result
        await self._run_sync(self._blocks.name_files, first)

    def _uncharge(self, hold: Hold, nbytes: int) -> None:
        hold.charged -= nbytes
        self._quota.charge(hold.owner, -nbytes)

    # --- holds ------------------------------------------------------------------------------------

    def hold(self, owner: str, root: Cid | None = None) -> Hold:
        """See Hold."""
        return Hold(self, owner, root)

    async def _begin(self, hold: Hold) -> None:
        self._holds.add(hold)
        if hold.root is not None and (run := self._run) is not None:
            marked = asyncio.Event()
            run.late.append((hold.root, marked.set))
            try:
                await marked.wait()  # `collect` sets it also where it ends before
            except BaseException:
                self._end(hold, finished=True)
                raise

    def _end(self, hold: Hold, *, finished: bool) -> None:
        if hold not in self._holds:
            return
        if self._run is not None:
            self._run.ended.append(hold.keep)
        self._holds.discard(hold)
        self._garbage = True
        self._uncharge(hold, hold.charged)
        if hold.noted and finished and hold.root is not None:
            self._index.write_soon(_ended(hold.root))

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
        walk = await self._walked(hold, pin.root)
        charged, held = walk.charged, hold.charged
        self._quota.charge(pin.owner, charged - held, 1)
        hold.charged = 0

        def done(gone: list[int]) -> None:
            self._quota.charge(pin.owner, -sum(gone), -len(gone))

        async def write() -> None:
            try:
                await self._index.write(kept(replace(pin, charged=charged), done))
            except BaseException:
                self._quota.charge(pin.owner, -charged, -1)
                raise

        await self._to_its_end(write())

    async def _walked(self, hold: Hold, root: Cid) -> Walk:
        """Raises where something of it lacks."""
        walk = Walk(self._index, self._blocks, self._children, hold.keep, whole=True)
        await self._run_sync(walk.add, [root])
        while await self._run_sync(walk.step):
            pass
        return walk

    async def amend(self, pin: Pin, **terms: Any) -> bool:
        """Change these attributes of a pin, unless it was given up; whether it was there.

        The others stay as they are by then, also where the same was pinned anew meanwhile. All that
        it reaches is here then, and both are on the disk. Raises as `pin`.
        """
        async with self.hold(pin.owner, pin.root) as hold:
            await self._walked(hold, pin.root)
            return await self._to_its_end(self._index.write(amended(pin, terms)))

    async def unpin(self, owner: str, root: Cid | bytes, name: str | None) -> int:
        """Give a root up, under one name or all (None); returns how many pins that were.

        A pin that is damaged is named by its columns as they are (`BadPin`).
        """

        def done(gone: list[int]) -> None:
            self._quota.charge(owner, -sum(gone), -len(gone))
            self._garbage = True

        gone = await self._to_its_end(self._index.write(removed(owner, root, name, done)))
        return len(gone)

    async def drop_damaged(self) -> list[BadPin]:
        """Give up the pins whose rows are damaged; returns them, their columns as they were."""

        def done(gone: list[tuple[BadPin, int]]) -> None:
            for pin, charged in gone:  # both may be others than what was charged
                nbytes, pins = self._quota.of(pin.owner)
                self._quota.charge(pin.owner, -min(max(charged, 0), nbytes), -min(1, pins))
            self._garbage = True

        gone = await self._to_its_end(self._index.write(damaged_removed(done)))
        return [pin for pin, _ in gone]

    async def pins(self, owner: str | None = None, root: Cid | None = None) -> list[Pin]:
        """Those that are whole, the newest first; `scrub` finds the others."""
        found = await self._run_sync(self._read_pins, owner, root)
        return [pin for pin in found if isinstance(pin, Pin)]

    async def page(
        self, owner: str | None, root: Cid | None, skip: int, limit: int
    ) -> tuple[list[Pin], int]:
        """So many of `pins`, and how many there are in all.

        Those that are damaged are counted, and lack in their page.
        """

        def read() -> tuple[list[Pin | BadPin], int]:
            with self._index.reading() as db:
                some = read_pins(db, owner, root, skip=skip, limit=limit)
                matched = count_pins(db, owner, root)
            return list(some), matched

        found, matched = await self._run_sync(read)
        return [pin for pin in found if isinstance(pin, Pin)], matched

    def _read_pins(self, owner: str | None, root: Cid | None) -> list[Pin | BadPin]:
        with self._index.reading() as db:
            found = read_pins(db, owner, root)
        return list(found)

    async def damage(self) -> tuple[int, list[BadPin]]:
        """How many blocks are known to be damaged, and the pins that are."""
        found: tuple[int, list[BadPin]] = await self._run_sync(self._damage)
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

    def _damage(self) -> tuple[int, list[BadPin]]:
        with self._index.reading() as db:
            ((blocks,),) = db.execute("SELECT COUNT(*) FROM blocks WHERE damaged").fetchall()
            return int(blocks), [pin for pin in read_pins(db) if isinstance(pin, BadPin)]

    async def usage(self, owner: str | None = None) -> Usage:
        """Of an owner; None: of the node."""
        if owner is not None:
            charged, pins = self._quota.of(owner)
            return Usage(charged, self._quota.owner_bytes_max, pins=pins)
        blocks, charged = await self._run_sync(self._index.totals)
        return Usage(charged, self._quota.node_bytes_max, blocks)

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
            run = self._run = Run(self._index, self._blocks, self._children)
            try:
                await self._mark(run, unfinished=unfinished)
                return await self._sweep(run, dry_run=dry_run)
            except BaseException:
                self._garbage = True
                raise
            finally:
                self._run = None
                for _, marked in run.late:
                    marked()

    async def _mark(self, run: Run, *, unfinished: bool) -> None:
        held = [hold.root for hold in self._holds if hold.root is not None]
        pins = await self._run_sync(self._read_pins, None, None)
        for pin in pins:
            if isinstance(pin, BadPin):
                raise Damaged(
                    f"a pin of {pin.owner} named {pin.name!r} is damaged: what it keeps is unknown",
                    hint="pin the root again under that name, or give up what is damaged with "
                    "`ww blob gc --drop-damaged`; `ww blob verify` names all of it",
                )
        # As a write: after those that say of downloads that they have ended.
        downloads = await self._index.write(Change(self._downloads, must=True))
        downloads = downloads if unfinished else []
        for roots, whole in (([pin.root for pin in pins], True), ([*held, *downloads], False)):
            walk = run.walk(whole=whole)
            for some in batches(roots):  # each call in a thread costs about a root's time
                await self._run_sync(walk.add, some)
                while await self._run_sync(walk.step):
                    pass

    def _downloads(self, db: Database, _: list[str]) -> list[Cid]:
        since = self._clock.time() - DOWNLOAD_KEPT_S
        found = db.execute("SELECT root FROM downloads WHERE at > ?", (since,)).fetchall()
        return [Cid.decode(bytes(root)) for (root,) in found]

    async def _sweep(self, run: Run, *, dry_run: bool) -> Collected:
        blocks = charged = after = 0

        def is_kept(id_: int) -> bool:  # in this order: a hold that ends is in both for a while
            return any(id_ in hold.keep for hold in tuple(self._holds)) or run.kept(id_)

        def done(gone: Collected) -> None:
            self._quota.written(0, -gone.charged)

        while rows := await self._run_sync(self._index.after, after, DELETED_MAX):
            await self._run_sync(run.absorb)
            while run.late:
                root, marked = run.late[0]
                walk = run.walk(whole=False)
                await self._run_sync(walk.add, [root])
                while await self._run_sync(walk.step):
                    pass
                run.late.popleft()
                marked()
            after = rows[-1].id
            rows = [row for row in rows if not is_kept(row.id)]
            if rows and not dry_run:
                gone = await to_its_end(self._index.write(swept(rows, is_kept, done)))
                if not self._index.reserve.missing:
                    self._index.write_soon(vacuum())
            else:
                gone = Collected(len(rows), sum(row.charged for row in rows))
            blocks, charged = blocks + gone.blocks, charged + gone.charged
        return Collected(blocks, charged)

    async def scrub(self, rate_bytes_s: float | None, share: float = 0.0) -> AsyncIterator[Damage]:
        """Read everything and yield what is damaged, or lacks of a pin; None: as fast as it goes.

        The blocks are read from behind so large a share of them (0 to 1), and then those before.
        What lacks below a block that is fetched meanwhile comes, too.
        """
        for damage in await self._run_sync(scrub.bad_pins, self._index):
            yield damage
        first = int(share * await self._run_sync(self._index.last))
        for begin, end in ((first, None), (0, first)):
            after: int | None = begin
            while after is not None:
                after, nbytes, found = await self._run_sync(
                    scrub.step, self._index, self._blocks, after, end
                )
                for damage in found:
                    yield damage
                if rate_bytes_s is not None and nbytes:
                    await self._sleep(nbytes / rate_bytes_s)
        walk = Walk(self._index, self._blocks, self._children, Bits(), whole=False)
        for pin in await self.pins():
            await self._run_sync(walk.add, [pin.root])
            while await self._run_sync(walk.step) or walk.lacking:
                lacking, walk.lacking = set(walk.lacking), []
                for cid in lacking:
                    yield Damage(cid.digest)
                    if await self.have([cid.digest]):
                        await self._run_sync(walk.add, [cid])


def _began(root: Cid, at: float) -> Change[None]:
    def apply(db: Database, _: list[str]) -> None:
        db.execute("DELETE FROM downloads WHERE at <= ?", (at - DOWNLOAD_KEPT_S,))
        db.execute("INSERT OR REPLACE INTO downloads VALUES (?, ?)", (bytes(root), at))

    return Change(apply)


def _ended(root: Cid) -> Change[None]:
    def apply(db: Database, _: list[str]) -> None:
        db.execute("DELETE FROM downloads WHERE root = ?", (bytes(root),))

    return Change(apply, must=True)
