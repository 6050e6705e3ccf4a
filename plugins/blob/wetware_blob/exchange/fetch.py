"""Blocks from several providers at once: verified, kept, and given to whoever reads.

Wants are handed out in the order of the DAG, to providers with room: one that answers gets more of
them, so a fast one serves most. A provider that lies, stalls or breaks off loses what it was asked
for to the others. Reading does not wait for the disk: a block goes to its readers once its hash is
right, and is written beside that. What is in memory is bounded by BYTES_MAX.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

import anyio

from wetware.base.log import get_logger
from wetware.errors import (
    NotFound,
    OverlayError,
    ProtocolRefused,
    StreamReset,
    WetwareError,
    stopping,
)
from wetware.rpc.wire import fresh
from wetware_blob.exchange import wire
from wetware_blob.format.cid import Block, Cid
from wetware_blob.store.errors import Damaged
from wetware_blob.store.index import charge

if TYPE_CHECKING:
    from wetware.hookspecs import Overlay
    from wetware.identity import PeerId
    from wetware.overlay.link import Stream
    from wetware_blob.store.store import Hold, RunSync, Store

log = get_logger("blob.fetch")

BYTES_MAX: Final = 16 << 20
"""In memory of one fetch: on the way, to be written, and read ahead."""
BYTES_MIN: Final = 4 << 20
"""The same where there are many fetches."""
AHEAD_MAX: Final = 4096
"""Blocks that are known to be read later; those that come last are forgotten."""
PROVIDERS_MAX: Final = 4
"""Streams of one fetch; who else has the blob waits for one to end."""
STALL_S: Final = 5.0
"""For a provider to send a byte of what was wanted."""
SLOW_S: Final = 5.0
"""For a block, where the others have shown that they are faster."""
BLOCK_S: Final = 60.0
"""For a block, however alone its provider is."""
NOBODY_S: Final = 20.0
"""Without a block, after which nobody has what is wanted."""
LACKS_MAX: Final = 16
"""Blocks beyond what it has sent that a provider may lack."""
TICK_S: Final = 0.5
RETRIES_S: Final = (0.1, 0.5, 2.0)
"""Pauses before a lost provider is asked again."""

_WANTS_FIRST: Final = 2  # of a provider; one more for each block that it sends
_SLOWER: Final = 4  # blocks that each of the others sends while a slow provider sends one
_EXPECTED_BYTES: Final = 1 << 20  # a block's size, before one has come
_NAMED_MAX: Final = 8  # providers, in an error
_CHECK_BYTES: Final = 4 << 20  # hashed in one call, and given to readers together

Find = Callable[[Cid], AsyncGenerator["PeerId", None]]


@dataclass(slots=True, eq=False)
class _Wanted:
    """One block on its way; `future` is its bytes, which are verified."""

    cid: Cid
    searches: int  # that had begun when it was first wanted
    future: asyncio.Future[bytes]
    readers: int = 0
    taken: bool = False
    stored: bool = False
    lacking: set[PeerId] = field(default_factory=set)


class _Provider:
    """A stream to one who has blocks. `asked` is answered in its order."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.peer = stream, stream.peer
        self.asked: deque[_Wanted] = deque()
        self.wants_max = _WANTS_FIRST
        self.sent = self.lacked = 0
        self.receiving_bytes = 0  # the size of the block that is being received
        self.paused = False  # nothing is read of it, as too much is in memory
        self.silent_s = self.block_s = 0.0
        self.found_before = 0  # by all, when its turn at the first of `asked` began
        self.why: WetwareError | None = None  # it ended; None where another stream may follow

    @property
    def has_room(self) -> bool:
        return len(self.asked) < self.wants_max and not self.stream.connection.superseded

    def next_turn(self, found: int) -> None:
        self.silent_s = self.block_s = 0.0
        self.found_before = found


class BadProvider(OverlayError):
    """It broke its word, and is not asked again."""

    code = "overlay.bad_provider"


class SlowProvider(OverlayError):
    """It sends nothing, or so slowly that others are asked instead."""

    code = "overlay.slow_provider"


_DROPPED: Final = (BadProvider, SlowProvider, ProtocolRefused, wire.Malformed)


class Fetch:
    """Reads the blocks of one root: those that the store has, and others from providers.

    Args:
        root: What providers are looked for by.
        owner: Whose hold keeps the blocks.
        store: Is asked first, and keeps what comes.
        find: Who may have the root; may go on for as long as somebody is likely to turn up. None:
            what the store has is all that is read.

    Attributes:
        error: Why it ended; nothing comes from providers then.
        ready: Done when blocks are held; fails if they cannot be.
        users: Who has it open; see `Exchange`.
        task: That runs it.
        bytes_max: In memory, from BYTES_MIN to BYTES_MAX.
        charged: What the store charges for the blocks that came from others, bytes.
    """

    def __init__(
        self,
        root: Cid,
        owner: str,
        *,
        overlay: Overlay,
        store: Store,
        find: Find | None,
        run_sync: RunSync,
    ) -> None:
        self.root, self._owner = root, owner
        self._overlay, self._store, self._find, self._run_sync = overlay, store, find, run_sync
        self.error: WetwareError | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.users = 0
        self.task: asyncio.Task[None]
        self.bytes_max = BYTES_MAX
        self.charged = 0
        self._tasks = anyio.create_task_group()
        self._wanted: dict[bytes, _Wanted] = {}
        # Nobody is asked for these: readers wait for the ones, `ahead` told of the others.
        self._pending: OrderedDict[bytes, _Wanted] = OrderedDict()
        self._ahead: OrderedDict[bytes, _Wanted] = OrderedDict()
        self._noted: dict[bytes, Cid] = {}  # `ahead` told of them; the store has not been asked
        self._arrived: deque[tuple[_Provider, _Wanted, list[bytes]]] = deque()
        self._unstored: list[_Wanted] = []
        self._spare: dict[bytes, _Wanted] = {}  # stored, and not read yet
        self._held_bytes = self._asked = self._found = 0
        self._expected_bytes = _EXPECTED_BYTES
        self._note, self._arrival, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._verified, self._kept = asyncio.Event(), asyncio.Event()
        self._kept.set()
        self._dispatching = False
        # providers
        self._providers: list[_Provider] = []
        self._talking: set[PeerId] = set()
        self._bad: set[PeerId] = set()
        self._troubles: dict[PeerId, str] = {}  # the last of each
        self._places = asyncio.Semaphore(PROVIDERS_MAX)
        self._need = asyncio.Event()
        self._searches, self._searching, self._queued = 0, False, False
        self._fruitless_s = 0.0

    # --- for readers ------------------------------------------------------------------------------

    async def get(self, cid: Cid) -> bytes:
        """A block with the right hash.

        Raises NotFound "not_found.blob" where nobody has it, and what the store raises where the
        block cannot be kept.
        """
        wanted = self._wanted.get(cid.digest)
        if wanted is None:
            with contextlib.suppress(NotFound, Damaged):
                return await self._store.get(cid.digest)
            if self.error is not None:
                raise fresh(self.error)
            wanted = self._want(cid)
        if self._ahead.pop(cid.digest, None) is not None:
            wanted.searches = self._searches
            self._pending[cid.digest] = wanted
            self._look_for_providers()
        wanted.readers += 1
        try:
            data = await asyncio.shield(wanted.future)
        finally:
            wanted.readers -= 1
            if not wanted.readers and self._pending.get(cid.digest) is wanted:
                self._forget(wanted)
        wanted.taken = True
        if wanted.stored:
            self._release(wanted)
        return data

    def ahead(self, cids: Sequence[Cid]) -> None:
        """What is read next, in this order and before what was told of earlier: a hint."""
        noted = {cid.digest: cid for cid in cids[:AHEAD_MAX]} | self._noted
        self._noted = dict(islice(noted.items(), AHEAD_MAX))
        self._note.set()

    async def lacks(self, cids: Sequence[Cid]) -> list[Cid]:
        """Those that are not in the store."""
        have = await self._store.have([cid.digest for cid in cids])
        return [cid for cid in cids if cid.digest not in have]

    async def kept(self) -> None:
        """Return once all that was read is on disk. Raises what the store raised."""
        await self._kept.wait()
        if self.error is not None:
            raise fresh(self.error)

    def close(self) -> None:
        """Nobody reads any more."""
        self._tasks.cancel_scope.cancel()

    # --- the work ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Fetch until `close`; cancelled, it is a download that was not finished."""
        try:
            async with (
                self._store.hold(self._owner, self.root) as hold,
                self._tasks,
            ):
                self.ready.set_result(None)
                for event, work in (
                    (self._note, self._look_ahead),
                    (self._arrival, self._check),
                    (self._verified, partial(self._keep, hold)),
                    (self._need, self._search),
                ):
                    self._tasks.start_soon(_whenever, event, work)
                self._tasks.start_soon(self._watch)
        except* WetwareError as exc:
            error: BaseException = exc
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            assert isinstance(error, WetwareError)  # noqa: S101  # the group has no others
            self.error = error
        except* Exception:
            log.exception("fetch.failed", cid=self.root)
            self.error = OverlayError("the download failed", hint="the node's log says why")
        finally:
            self._end(self.error or stopping())

    def _end(self, error: WetwareError) -> None:
        self.error = error
        if not self.ready.done():
            self.ready.set_exception(fresh(error))
        for wanted in list(self._wanted.values()):
            self._fail(wanted, error)
        self._kept.set()

    def _forget(self, wanted: _Wanted) -> None:
        for each in (self._pending, self._ahead, self._wanted):
            each.pop(wanted.cid.digest, None)

    def _fail(self, wanted: _Wanted, error: WetwareError) -> None:
        self._forget(wanted)
        if not wanted.future.done():
            wanted.future.set_exception(fresh(error))
            wanted.future.exception()  # there may be no reader to retrieve it

    def _want(self, cid: Cid) -> _Wanted:
        """A block that the store does not have; at the end of `_ahead` if it is new."""
        if (wanted := self._wanted.get(cid.digest)) is None:
            future = asyncio.get_running_loop().create_future()
            wanted = self._wanted[cid.digest] = _Wanted(cid, self._searches, future)
            self._ahead[cid.digest] = wanted
        return wanted

    def _look_for_providers(self) -> None:
        if not (self._talking or self._searching):
            self._need.set()
        self._dispatch_soon()

    def _put_first(self, wants: Sequence[_Wanted]) -> None:
        for wanted in reversed(wants):
            self._pending[wanted.cid.digest] = wanted
            self._pending.move_to_end(wanted.cid.digest, last=False)

    async def _look_ahead(self) -> None:
        noted, self._noted = self._noted, {}
        for cid in reversed(await self.lacks(list(noted.values()))):
            self._want(cid)
            if cid.digest in self._ahead:
                self._ahead.move_to_end(cid.digest, last=False)
        while len(self._ahead) > AHEAD_MAX:
            self._forget(next(reversed(self._ahead.values())))
        self._look_for_providers()

    async def _check(self) -> None:
        """Hash what has come, in a thread; give what is right to its readers."""
        batch, total = [], 0
        while self._arrived and total < _CHECK_BYTES:
            batch.append(self._arrived.popleft())
            total += sum(map(len, batch[-1][2]))
        work = [(wanted.cid.digest, pieces) for _, wanted, pieces in batch]
        for (provider, wanted, pieces), data in zip(
            batch, await self._run_sync(_verified, work), strict=True
        ):
            if data is None:
                self._held_bytes -= sum(map(len, pieces))
                self._put_first([wanted])
                self._lied(provider.peer, wanted.cid)
                continue
            self._kept.clear()
            self._unstored.append(wanted)
            self._fruitless_s = 0.0
            self._found += 1
            wanted.future.set_result(data)
        self._verified.set()
        if self._arrived:
            self._arrival.set()

    async def _keep(self, hold: Hold) -> None:
        """Write what was verified."""
        batch, self._unstored = self._unstored, []
        await self._store.put(hold, [Block(w.cid, w.future.result()) for w in batch])
        for wanted in batch:
            self.charged += charge(len(wanted.future.result()))
            wanted.stored = True
            if wanted.taken:
                self._release(wanted)
            else:
                self._spare[wanted.cid.digest] = wanted
        self._dispatch_soon()
        if self._unstored:
            self._verified.set()
        else:
            self._kept.set()

    def _release(self, wanted: _Wanted) -> None:
        """Forget a block that is stored: it need not be in memory."""
        if self._wanted.get(wanted.cid.digest) is wanted:
            self._spare.pop(wanted.cid.digest, None)
            del self._wanted[wanted.cid.digest]
            self._held_bytes -= len(wanted.future.result())
            self._dispatch_soon()

    # --- what to ask whom for ---------------------------------------------------------------------

    def _dispatch_soon(self) -> None:
        """`_dispatch`, once, for all that happens in this turn of the loop."""
        if not self._dispatching:
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Hand wants to providers, as far as there is room for what they send."""
        self._dispatching = False
        self._room.set()
        free = [provider for provider in self._providers if provider.has_room]
        new: dict[_Provider, list[bytes]] = {}
        while free and self._make_room():
            provider = min(free, key=lambda p: len(p.asked) / p.wants_max)
            wanted = next(
                (
                    w
                    for w in chain(self._pending.values(), self._ahead.values())
                    if provider.peer not in w.lacking
                ),
                None,
            )
            if wanted is None:
                free.remove(provider)
                if self._queued and self._pending and not provider.asked:
                    self._drop(provider)  # who waits for its place may have what it lacks
                continue
            self._pending.pop(wanted.cid.digest, None)
            self._ahead.pop(wanted.cid.digest, None)
            if not provider.asked:
                provider.next_turn(self._found)
            provider.asked.append(wanted)
            self._asked += 1
            new.setdefault(provider, []).append(wanted.cid.digest)
            if not provider.has_room:
                free.remove(provider)
        for provider, digests in new.items():
            frame = wire.want_frame(digests)
            try:
                taken = provider.stream.write_nowait(frame)
            except WetwareError as exc:
                self._drop(provider, exc)
            else:
                if taken < len(frame):
                    self._drop(provider, BadProvider("it does not read what is wanted of it"))

    def _make_room(self) -> bool:
        """Whether one more block may be asked for.

        A block that a reader waits for may take the place of one that is stored, and was not read.
        """
        needed = (self._asked + 1) * self._expected_bytes
        while self._held_bytes + needed > self.bytes_max and self._pending and self._spare:
            self._release(next(iter(self._spare.values())))
        return self._held_bytes + needed <= self.bytes_max

    def _give_up(self) -> None:
        """Look for others where no provider has a block; fail it where they were looked for."""
        if self._searching:
            return
        for wanted in [w for w in self._pending.values() if self._talking <= w.lacking]:
            if not wanted.readers:
                self._forget(wanted)
            elif wanted.searches < self._searches:
                self._fail(wanted, self._not_found(wanted.cid))
            else:
                self._need.set()

    def _not_found(self, cid: Cid) -> NotFound:
        if self._find is None:
            return NotFound(
                f"{cid} is not at this node, or damaged",
                hint="without --local the other members are asked",
                code="not_found.blob",
            )
        last = list(self._troubles.items())[-_NAMED_MAX:]
        troubles = "; ".join(f"{peer.short}: {why}" for peer, why in last)
        return NotFound(
            f"nobody has {cid}" + (f" ({troubles})" if troubles else ""),
            code="not_found.blob",
            hint="`ww ls` shows whether those who have it are up",
        )

    async def _search(self) -> None:
        """Find providers."""
        self._searches += 1
        self._searching, self._fruitless_s = True, 0.0
        async with contextlib.aclosing((self._find or _nobody)(self.root)) as found:
            async for peer in found:
                if peer in self._bad or peer in self._talking:
                    continue
                self._queued = self._places.locked()
                self._dispatch_soon()
                await self._places.acquire()
                self._queued = False
                self._talking.add(peer)
                self._tasks.start_soon(self._talk, peer)
        self._searching = False
        self._give_up()

    async def _watch(self) -> None:
        """Drop who keeps others waiting, and give up what nobody turns up for."""
        while True:
            await asyncio.sleep(TICK_S)
            for provider in tuple(self._providers):
                if provider.stream.connection.superseded and not provider.asked:
                    self._drop(provider)  # `_talk` opens another on the better connection
                elif provider.asked and not provider.paused:
                    self._judge(provider)
            wanted = next(iter(self._pending.values()), None)
            if wanted is None or any(p.peer not in wanted.lacking for p in self._providers):
                self._fruitless_s = 0.0
                continue
            self._fruitless_s += TICK_S
            if self._fruitless_s >= NOBODY_S:
                self._fail(wanted, self._not_found(wanted.cid))

    def _judge(self, provider: _Provider) -> None:
        # Ticks are counted, and not the clock: this node may have been what stood still.
        provider.silent_s += TICK_S
        provider.block_s += TICK_S
        others = [p for p in self._providers if p is not provider]
        found = self._found - provider.found_before
        idle = any(not p.asked and p.peer not in provider.asked[0].lacking for p in others)
        if provider.silent_s >= STALL_S:
            self._drop(provider, SlowProvider(f"it sent nothing for {STALL_S:g} s"))
        elif provider.block_s >= (
            SLOW_S if others and (idle or found >= _SLOWER * len(others)) else BLOCK_S
        ):
            self._drop(provider, SlowProvider(f"a block took {provider.block_s:g} s"))

    # --- one provider -----------------------------------------------------------------------------

    async def _talk(self, peer: PeerId) -> None:
        """Have a stream to a provider until there is no use in it."""
        try:
            await self._keep_asking(peer)
        finally:
            self._places.release()
            self._talking.discard(peer)
        self._give_up()

    async def _keep_asking(self, peer: PeerId) -> None:
        pauses = iter(RETRIES_S)
        while peer not in self._bad:
            try:
                why, sent = await self._ask(peer)
            except WetwareError as exc:  # there is no stream
                why, sent = exc, 0
                self._blame(peer, why)
            if why is None and not self._queued:
                continue
            if why is None or isinstance(why, _DROPPED):
                return
            if sent:
                pauses = iter(RETRIES_S)
            if (pause_s := next(pauses, None)) is None:
                log.warning("provider.dropped", peer=peer, cid=self.root, reason=why)
                return
            await asyncio.sleep(pause_s)

    async def _ask(self, peer: PeerId) -> tuple[WetwareError | None, int]:
        """Have a stream; why it ended, None where another one is to take its place.

        And how many blocks came.
        """
        stream = await self._overlay.open_stream(peer, wire.PROTOCOL)
        provider = _Provider(stream)
        self._providers.append(provider)
        try:
            self._dispatch_soon()
            while True:
                await self._receive(provider)
        except WetwareError as exc:
            self._drop(provider, exc)
        except asyncio.IncompleteReadError:
            broken = BadProvider("it ended the stream before it had answered")
            self._drop(provider, broken if provider.asked else StreamReset("it closed the stream"))
        finally:
            self._drop(provider)
        return provider.why, provider.sent

    async def _receive(self, provider: _Provider) -> None:
        """The next answer; nobody knows yet whether a block is the right one."""
        while self._held_bytes > self.bytes_max and provider in self._providers:
            provider.paused = True
            self._room.clear()
            await self._room.wait()
        provider.paused = False
        length = await wire.read_head(provider.stream)
        provider.silent_s = 0.0
        if not provider.asked:
            raise BadProvider("it answers what nobody has asked")
        if length is None:
            wanted = self._answered(provider)
            provider.lacked += 1
            wanted.lacking.add(provider.peer)
            self._put_first([wanted])
            if provider.lacked > LACKS_MAX + provider.sent:
                raise BadProvider(f"it lacks {provider.lacked} blocks of what it offers")
            self._give_up()
            return
        provider.receiving_bytes = left = length
        self._held_bytes += length
        self._expected_bytes = max(length, self._expected_bytes * 7 // 8, 1)
        pieces: list[bytes] = []
        while left:
            if not (piece := await provider.stream.read(left)):
                raise asyncio.IncompleteReadError(b"", left)
            provider.silent_s = 0.0
            pieces.append(piece)
            left -= len(piece)
        provider.receiving_bytes = 0
        provider.sent += 1
        provider.wants_max = min(provider.wants_max + 1, wire.WANTS_MAX)
        self._arrived.append((provider, self._answered(provider), pieces))
        self._arrival.set()

    def _answered(self, provider: _Provider) -> _Wanted:
        self._asked -= 1
        wanted = provider.asked.popleft()
        provider.next_turn(self._found)
        self._dispatch_soon()
        return wanted

    def _drop(self, provider: _Provider, why: Exception | None = None) -> None:
        """End a provider's stream; others are asked for what it has not sent. Idempotent."""
        if provider not in self._providers:
            return
        self._providers.remove(provider)
        error = why if isinstance(why, WetwareError) or why is None else StreamReset(str(why))
        provider.why = error
        self._room.set()
        if isinstance(error, (BadProvider, wire.Malformed)):
            self._bad.add(provider.peer)
        if error is not None:
            self._blame(provider.peer, error)
        self._asked -= len(provider.asked)
        self._held_bytes -= provider.receiving_bytes
        self._put_first(provider.asked)
        provider.asked.clear()
        provider.stream.reset()
        self._dispatch_soon()

    def _lied(self, peer: PeerId, cid: Cid) -> None:
        """What a peer sent is not the block. Its stream may have ended, or be another one now."""
        why = BadProvider(f"what it sent for {cid} has another hash")
        for provider in self._providers:
            if provider.peer == peer:
                self._drop(provider, why)
                return
        if peer not in self._bad:
            self._bad.add(peer)
            self._blame(peer, why)

    def _blame(self, peer: PeerId, why: WetwareError) -> None:
        lost = isinstance(why, OverlayError) and not isinstance(why, _DROPPED)
        (log.debug if lost else log.warning)(
            "provider.lost" if lost else "provider.dropped", peer=peer, cid=self.root, reason=why
        )
        self._troubles.pop(peer, None)
        self._troubles[peer] = why.message


async def _whenever(event: asyncio.Event, work: Callable[[], Awaitable[None]]) -> None:
    """Work each time that there is some."""
    while True:
        await event.wait()
        event.clear()
        await work()


async def _nobody(_: Cid) -> AsyncGenerator[PeerId, None]:
    return
    yield


def _verified(blocks: Sequence[tuple[bytes, list[bytes]]]) -> list[bytes | None]:
    """The blocks whose digests are right, each in one piece; None for the others."""
    joined = [(digest, b"".join(pieces)) for digest, pieces in blocks]
    return [data if hashlib.sha256(data).digest() == digest else None for digest, data in joined]
