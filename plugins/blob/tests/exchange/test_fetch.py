"""Blocks from several providers: who lies, stalls, breaks off or lacks them costs its own place.

Links in memory; who has the blocks is `find`'s word, as a test gives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from itertools import pairwise

import pytest

from wetware.errors import LimitExceeded, NotFound, WetwareError
from wetware.hookspecs import Access
from wetware.identity import PeerId
from wetware.overlay.link import Stream
from wetware.testing import FakeOverlay
from wetware.testing.overlay import overlays
from wetware_blob.exchange import fetch as fetching
from wetware_blob.exchange import wire
from wetware_blob.exchange.exchange import Exchange
from wetware_blob.exchange.fetch import Fetch
from wetware_blob.exchange.serve import serve
from wetware_blob.format.cid import BLOCK_BYTES_MAX, RAW, Block, Cid

from .parts import MemoryStore, Provider, blocks_of, exchange_on, found, framed, until

pytestmark = pytest.mark.anyio

BLOCKS = blocks_of(24)
BY_DIGEST = {block.cid.digest: block.data for block in BLOCKS}
ROOT = BLOCKS[0].cid


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider is judged within moments."""
    monkeypatch.setattr(fetching, "TICK_S", 0.01)
    monkeypatch.setattr(fetching, "STALL_S", 0.5)
    monkeypatch.setattr(fetching, "SLOW_S", 0.5)
    monkeypatch.setattr(fetching, "NOBODY_S", 1.0)
    monkeypatch.setattr(fetching, "RETRIES_S", (0.01, 0.01, 0.01))


def right(_n: int, digest: bytes, _stream: Stream) -> bytes:
    return framed(BY_DIGEST[digest])


def wrong(_n: int, digest: bytes, _stream: Stream) -> bytes:
    return framed(BY_DIGEST[digest][:-1] + b"?")


def lacking(_n: int, _digest: bytes, _stream: Stream) -> bytes:
    return wire.ABSENT_FRAME


async def never(_n: int, _digest: bytes, stream: Stream) -> bytes:
    while True:
        await stream.read()  # until it is reset


async def read_all(source: Fetch, blocks: Sequence[Block] = BLOCKS) -> None:
    """As a reader does: in order, and it says what comes next."""
    source.ahead([block.cid for block in blocks])
    for block in blocks:
        assert await source.get(block.cid) == block.data


@contextlib.asynccontextmanager
async def reader_and(count: int) -> AsyncIterator[tuple[FakeOverlay, list[FakeOverlay]]]:
    """Who fetches, and so many others."""
    async with overlays(count + 1) as (reader, *others):
        yield reader, others


def honest(overlay: FakeOverlay) -> Provider:
    return Provider(overlay, right)


def found_after(
    first: Sequence[FakeOverlay], condition: Callable[[], object], *others: FakeOverlay
) -> Callable[[Cid], AsyncGenerator[PeerId, None]]:
    """The others turn up once it holds: before that they cannot do the work of the first."""

    async def find(root: Cid) -> AsyncGenerator[PeerId, None]:
        for overlay in first:
            yield overlay.peer_id
        await until(condition)
        for overlay in others:
            yield overlay.peer_id

    return find


async def test_what_arrives_is_verified_and_kept() -> None:
    async with reader_and(1) as (reader, (other,)):
        serve(other, MemoryStore(BLOCKS).get)
        store = MemoryStore()
        async with (
            exchange_on(reader, store, found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            assert store.holds == [("ada", ROOT)]
            await read_all(source)
            await source.kept()
            assert store.blocks == BY_DIGEST
            await until(lambda: not source._wanted)
            assert source._held_bytes == source._asked == 0
        assert store.holds == []


async def test_an_empty_block_arrives() -> None:
    empty = Block(Cid.of(RAW, b""), b"")
    async with reader_and(1) as (reader, (other,)):
        serve(other, MemoryStore([empty]).get)
        async with (
            exchange_on(reader, MemoryStore(), found(other.peer_id)) as made,
            made.open(empty.cid, "ada") as source,
        ):
            assert await source.get(empty.cid) == b""


async def test_what_the_store_has_is_not_fetched() -> None:
    async with reader_and(1) as (reader, (other,)):
        provider = honest(other)
        store = MemoryStore(BLOCKS[:20])
        async with (
            exchange_on(reader, store, found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            await read_all(source)
        assert set(provider.asked) == {block.cid.digest for block in BLOCKS[20:]}
        assert len(provider.asked) == 4


async def test_a_download_that_was_cut_goes_on_where_it_was() -> None:
    async with reader_and(1) as (reader, (other,)):
        store = MemoryStore()
        half = len(BLOCKS) // 2

        def until_half(n: int, digest: bytes, stream: Stream) -> bytes:
            if n >= half:
                stream.reset()
            return framed(BY_DIGEST[digest])

        provider = Provider(other, until_half)
        async with exchange_on(reader, store, found(other.peer_id)) as made:
            with pytest.raises(NotFound, match=other.peer_id.short):
                async with made.open(ROOT, "ada") as source:
                    await read_all(source)
            provider._answer = right
            stored = len(store.blocks)
            assert 0 < stored <= half
            assert not store.finished
            provider.asked.clear()
            async with made.open(ROOT, "ada") as source:
                await read_all(source)
            assert store.finished
        assert len(provider.asked) == len(BLOCKS) - stored


async def test_reading_starts_before_the_download_ends_and_does_not_wait_for_the_disk() -> None:
    async with reader_and(1) as (reader, (other,)):
        go_on = asyncio.Event()

        async def first_alone(n: int, digest: bytes, _: Stream) -> bytes:
            if n:
                await go_on.wait()
            return framed(BY_DIGEST[digest])

        Provider(other, first_alone)
        store = MemoryStore()
        store.writable.clear()
        async with (
            exchange_on(reader, store, found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            source.ahead([block.cid for block in BLOCKS])
            assert await source.get(ROOT) == BLOCKS[0].data
            assert not store.blocks
            go_on.set()
            await read_all(source)
            assert not store.blocks
            store.writable.set()
            await source.kept()
            assert store.blocks == BY_DIGEST


# --- providers that are of no use -----------------------------------------------------------------


async def test_a_lie_in_the_last_block_costs_its_provider_its_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def last_wrong(n: int, digest: bytes, stream: Stream) -> bytes:
        return (wrong if digest == BLOCKS[-1].cid.digest else right)(n, digest, stream)

    async with reader_and(2) as (reader, (liar, other)):
        Provider(liar, last_wrong)
        find = found_after([liar], lambda: caplog.records, other)
        fallback = honest(other)
        store = MemoryStore()
        with caplog.at_level(logging.WARNING, "wetware.blob.fetch"):
            async with (
                exchange_on(reader, store, find) as made,
                made.open(ROOT, "ada") as source,
            ):
                await read_all(source)
                await source.kept()
    assert store.blocks == BY_DIGEST
    assert fallback.asked == [BLOCKS[-1].cid.digest]
    (record,) = [r for r in caplog.records if r.message == "provider.dropped"]
    assert record.ww["peer"] == liar.peer_id  # type: ignore[attr-defined]  # as EventLogger has it


async def test_one_who_lied_is_not_asked_again_and_is_named() -> None:
    async with reader_and(1) as (reader, (liar,)):
        provider = Provider(liar, wrong)
        async with (
            exchange_on(reader, MemoryStore(), found(liar.peer_id, liar.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            for _ in range(3):
                with pytest.raises(NotFound, match="another hash") as caught:
                    await source.get(ROOT)
                assert caught.value.code == "not_found.blob"
                assert liar.peer_id.short in caught.value.message
        assert len(provider.asked) == 1


async def test_three_of_five_lie() -> None:
    async with reader_and(5) as (reader, others):
        liars = [Provider(overlay, wrong) for overlay in others[:3]]
        for overlay in others[3:]:
            honest(overlay)
        find = found_after(others[:3], lambda: all(liar.asked for liar in liars), *others[3:])
        store = MemoryStore()
        async with (
            exchange_on(reader, store, find) as made,
            made.open(ROOT, "ada") as source,
        ):
            await read_all(source)
            await source.kept()
            assert source._bad == {overlay.peer_id for overlay in others[:3]}
        assert store.blocks == BY_DIGEST


async def stalls(n: int, digest: bytes, stream: Stream) -> bytes:
    return await never(n, digest, stream) if n > 3 else right(n, digest, stream)


async def stalls_within_a_block(n: int, digest: bytes, stream: Stream) -> bytes:
    if n > 3:
        await stream.write(right(n, digest, stream)[:1000])
        await never(n, digest, stream)
    return right(n, digest, stream)


async def truncates(n: int, digest: bytes, stream: Stream) -> bytes:
    if n > 3:
        await stream.write(right(n, digest, stream)[:-1])
        stream.close()
    return right(n, digest, stream)


def breaks_off(n: int, digest: bytes, stream: Stream) -> bytes:
    if n > 3:
        stream.reset()
    return right(n, digest, stream)


def babbles(n: int, digest: bytes, stream: Stream) -> bytes:
    return right(n, digest, stream) + (right(n, digest, stream) * 9 if n > 3 else b"")


def sends_what_is_too_long(n: int, digest: bytes, stream: Stream) -> bytes:
    if n > 3:
        return (BLOCK_BYTES_MAX + 1).to_bytes(4, "big") + bytes(1000)
    return right(n, digest, stream)


@pytest.mark.parametrize(
    ("answer", "right_ones", "reason"),
    [
        (stalls, 4, "it sent nothing"),
        (stalls_within_a_block, 4, "it sent nothing"),
        (truncates, 4, "before it had answered"),
        (breaks_off, 4, ""),
        (babbles, 4, "nobody has asked|another hash"),
        (sends_what_is_too_long, 4, "BLOCK_BYTES_MAX"),
        (lacking, 0, ""),
        (never, 0, "it sent nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_others_are_asked_for_what_a_provider_does_not_send(
    answer: object,
    right_ones: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For one reason alone: others are left out, which hold too if it is judged soon enough."""
    # A block's time begins before its first bytes, so one that stalls is slow a tick earlier.
    monkeypatch.setattr(fetching, "SLOW_S", fetching.BLOCK_S)
    monkeypatch.setattr(fetching, "RETRIES_S", (fetching.BLOCK_S,))
    monkeypatch.setattr(fetching, "LACKS_MAX", len(BLOCKS))
    async with reader_and(2) as (reader, (bad, other)):
        provider = Provider(bad, answer)  # type: ignore[arg-type]  # of several kinds
        honest(other)
        find = found_after([bad], lambda: len(provider.asked) > right_ones, other)
        store = MemoryStore()
        with caplog.at_level(logging.WARNING, "wetware.blob.fetch"):
            async with (
                exchange_on(reader, store, find) as made,
                made.open(ROOT, "ada") as source,
            ):
                await read_all(source)
                await source.kept()
                await until(lambda: not source._wanted)
                assert source._held_bytes == source._asked == 0
    assert store.blocks == BY_DIGEST
    dropped = [r.ww for r in caplog.records if r.message == "provider.dropped"]  # type: ignore[attr-defined]  # as EventLogger has it
    assert {fields["peer"] for fields in dropped} == ({bad.peer_id} if reason else set())
    assert all(re.search(reason, str(fields["reason"])) for fields in dropped)


@pytest.mark.parametrize("answer", [stalls, truncates, breaks_off, sends_what_is_too_long])
async def test_without_another_one_the_error_names_who_failed(answer: object) -> None:
    async with reader_and(1) as (reader, (bad,)):
        Provider(bad, answer)  # type: ignore[arg-type]  # of several kinds
        async with (
            exchange_on(reader, MemoryStore(), found(bad.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            with pytest.raises(NotFound, match=bad.peer_id.short):
                await read_all(source)


async def test_10_000_offered_cids_that_are_lacked_cost_a_few_questions() -> None:
    cids = [Cid(1, RAW, n.to_bytes(32, "big")) for n in range(10_000)]
    async with reader_and(1) as (reader, (empty,)):
        provider = Provider(empty, lacking)
        async with (
            exchange_on(reader, MemoryStore(), found(empty.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            source.ahead(cids)
            reads = [asyncio.ensure_future(source.get(cid)) for cid in cids]
            failed = await asyncio.gather(*reads, return_exceptions=True)
            assert all(isinstance(one, NotFound) for one in failed)
            assert not source._wanted
        assert len(provider.asked) <= fetching.LACKS_MAX + 2


async def test_a_slow_provider_does_not_hold_up_the_others() -> None:
    async def trickles(n: int, digest: bytes, stream: Stream) -> bytes:
        data = right(n, digest, stream)
        for at in range(len(data)):
            await stream.write(data[at : at + 1])
            await asyncio.sleep(0.02)
        return b""

    async with reader_and(2) as (reader, (slow, other)):
        provider = Provider(slow, trickles)
        honest(other)
        find = found_after([slow], lambda: provider.asked, other)
        async with (
            exchange_on(reader, MemoryStore(), find) as made,
            made.open(ROOT, "ada") as source,
        ):
            async with asyncio.timeout(60):
                await read_all(source)
            assert "a block took" in source._troubles[slow.peer_id]


async def test_who_is_slow_and_alone_is_waited_for() -> None:
    async def slowly(n: int, digest: bytes, stream: Stream) -> bytes:
        data = right(n, digest, stream)
        for start, end in pairwise(range(0, len(data) + 4000, 4000)):
            await stream.write(data[start:end])
            await asyncio.sleep(0.2)
        return b""

    async with reader_and(1) as (reader, (slow,)):
        Provider(slow, slowly)
        async with (
            exchange_on(reader, MemoryStore(), found(slow.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            assert await source.get(ROOT) == BLOCKS[0].data


async def test_one_that_was_lost_is_asked_again_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with reader_and(1) as (reader, (other,)):
        cut = asyncio.Event()

        def then_lost(n: int, digest: bytes, stream: Stream) -> bytes:
            if n == 8 and not cut.is_set():
                cut.set()
                stream.connection.abort(WetwareError("cut by the test"))
            return right(n, digest, stream)

        Provider(other, then_lost)
        monkeypatch.setattr(fetching, "RETRIES_S", (0.05,) * 100)  # it is back sooner
        async with (
            exchange_on(reader, MemoryStore(), found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            reading = asyncio.ensure_future(read_all(source))
            await cut.wait()
            await reader.connect(other)
            await reading


async def test_a_fetch_moves_to_a_better_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with reader_and(1) as (reader, (other,)):
        provider = honest(other)
        opened, open_stream = [], reader.open_stream

        async def counted(peer: PeerId, *protocols: str) -> Stream:
            opened.append(peer)
            return await open_stream(peer, *protocols)

        monkeypatch.setattr(reader, "open_stream", counted)
        relayed = property(lambda _: len(opened) == 1 and len(provider.asked) > 5)
        monkeypatch.setattr(type(reader.host.connections()[0]), "superseded", relayed)
        async with (
            exchange_on(reader, MemoryStore(), found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            await read_all(source)
            assert not source._troubles
        assert len(opened) == 2
        assert sorted(provider.asked) == sorted(BY_DIGEST)


async def test_providers_join_while_it_runs_and_share_the_work() -> None:
    async with reader_and(2) as (reader, (one, two)):
        joined = asyncio.Event()

        async def until_the_other_is_there(n: int, digest: bytes, stream: Stream) -> bytes:
            if n == 3:
                await joined.wait()
            return right(n, digest, stream)

        first, second = Provider(one, until_the_other_is_there), honest(two)

        async def find(root: Cid) -> AsyncGenerator[PeerId, None]:
            yield one.peer_id
            await until(lambda: len(first.asked) > 3)
            yield two.peer_id
            await until(lambda: second.asked)
            joined.set()

        async with (
            exchange_on(reader, MemoryStore(), find) as made,
            made.open(ROOT, "ada") as source,
        ):
            await read_all(source)
        assert len(first.asked) + len(second.asked) == len(BLOCKS)
        assert set(first.asked) | set(second.asked) == set(BY_DIGEST)


async def test_one_that_lacks_what_is_wanted_makes_room_for_one_that_has_it() -> None:
    async with reader_and(fetching.PROVIDERS_MAX + 1) as (reader, others):
        *empty, full = others
        for overlay in empty:
            Provider(overlay, lacking)
        honest(full)
        async with (
            exchange_on(reader, MemoryStore(), found(*(o.peer_id for o in others))) as made,
            made.open(ROOT, "ada") as source,
        ):
            assert await source.get(ROOT) == BLOCKS[0].data


# --- nobody ---------------------------------------------------------------------------------------


async def test_nobody_is_said_at_once_where_nobody_is_found() -> None:
    async with (
        FakeOverlay() as alone,
        exchange_on(alone, MemoryStore()) as made,
        made.open(ROOT, "ada") as source,
    ):
        async with asyncio.timeout(0.5):
            with pytest.raises(NotFound, match=f"nobody has {ROOT}") as caught:
                await source.get(ROOT)
        assert caught.value.code == "not_found.blob"
        assert caught.value.hint


async def test_the_wait_for_somebody_is_bounded() -> None:
    ended = False

    async def find(root: Cid) -> AsyncGenerator[PeerId, None]:
        nonlocal ended
        try:
            await asyncio.Event().wait()
            yield PeerId("")
        finally:
            ended = True

    async with FakeOverlay() as alone, exchange_on(alone, MemoryStore(), find) as made:
        async with made.open(ROOT, "ada") as source:
            async with asyncio.timeout(60):
                with pytest.raises(NotFound, match="nobody has"):
                    await source.get(ROOT)
            assert not ended
        assert ended


async def test_who_does_not_serve_the_protocol_is_no_provider() -> None:
    async with (
        reader_and(1) as (reader, (other,)),
        exchange_on(reader, MemoryStore(), found(other.peer_id)) as made,
        made.open(ROOT, "ada") as source,
    ):
        with pytest.raises(NotFound, match="does not speak"):
            await source.get(ROOT)


async def test_who_turns_up_later_is_found_by_the_next_read() -> None:
    async with reader_and(1) as (reader, (other,)):
        peers: list[PeerId] = []

        async def find(root: Cid) -> AsyncGenerator[PeerId, None]:
            for peer in peers:
                yield peer

        async with (
            exchange_on(reader, MemoryStore(), find) as made,
            made.open(ROOT, "ada") as source,
        ):
            with pytest.raises(NotFound):
                await source.get(ROOT)
            honest(other)
            peers.append(other.peer_id)
            assert await source.get(ROOT) == BLOCKS[0].data


# --- bounds ---------------------------------------------------------------------------------------


async def test_memory_is_bounded_while_the_disk_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "BYTES_MAX", 8 << 20)
    blocks = blocks_of(40, 1 << 20)
    async with reader_and(2) as (reader, others):
        providers = []
        for overlay in others:
            serving = MemoryStore(blocks)
            providers.append(serving)
            serve(overlay, serving.get)
        store = MemoryStore()
        store.writable.clear()
        async with (
            exchange_on(reader, store, found(*(o.peer_id for o in others))) as made,
            made.open(ROOT, "ada") as source,
        ):
            source.ahead([block.cid for block in blocks])
            reading = asyncio.ensure_future(read_all(source, blocks))
            await until(lambda: source._held_bytes == 8 << 20)
            for _ in range(200):
                await asyncio.sleep(0)
            assert sum(len(one.read) for one in providers) == 8
            assert not reading.done()
            store.writable.set()
            await reading
        assert len(store.blocks) >= 40 - 8


async def test_blocks_that_are_larger_than_those_before_do_not_break_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "BYTES_MAX", 8 << 20)
    small, large = blocks_of(300, 1000), blocks_of(60, BLOCK_BYTES_MAX, seed=8)
    async with reader_and(1) as (reader, (other,)):
        serve(other, MemoryStore([*small, *large]).get)
        store = MemoryStore()
        async with (
            exchange_on(reader, store, found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            await read_all(source, small)
            store.writable.clear()
            source.ahead([block.cid for block in large])
            reading = asyncio.ensure_future(read_all(source, large))
            await until(lambda: source._held_bytes > 8 << 20)
            assert source._asked > 4
            for _ in range(200):
                await asyncio.sleep(0)
            # The window of a stream comes on top: what is in it is not consumed.
            buffered = reader.host.connections()[0]._session.held_bytes
            assert source._held_bytes + buffered <= (8 << 20) + BLOCK_BYTES_MAX + (4 << 20)
            store.writable.set()
            await reading
            await source.kept()
        assert store.blocks.keys() >= {block.cid.digest for block in large}


async def test_what_is_read_ahead_and_never_taken_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "BYTES_MAX", 8 << 20)
    blocks = blocks_of(24, 1 << 20)
    async with reader_and(1) as (reader, (other,)):
        serve(other, MemoryStore(blocks).get)
        store = MemoryStore()
        async with (
            exchange_on(reader, store, found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            source.ahead([block.cid for block in blocks[:16]])
            await until(lambda: len(store.blocks) == 8)
            for _ in range(200):
                await asyncio.sleep(0)
            assert len(store.blocks) == 8  # the reader is not that far
            await read_all(source, blocks[16:])
            assert source._held_bytes <= 8 << 20
            await read_all(source, blocks[:16])


# --- sharing and ending ---------------------------------------------------------------------------


async def test_readers_of_one_cid_share_a_fetch() -> None:
    async with reader_and(1) as (reader, (other,)):
        provider = honest(other)

        async def read(made: Exchange) -> None:
            async with made.open(ROOT, "ada") as source:
                await read_all(source)

        async with exchange_on(reader, MemoryStore(), found(other.peer_id)) as made:
            await asyncio.gather(*(read(made) for _ in range(10)))
        assert sorted(provider.asked) == sorted(BY_DIGEST)


async def test_a_reader_that_gives_up_does_not_end_it_for_the_others() -> None:
    async with reader_and(1) as (reader, (other,)):
        go_on = asyncio.Event()

        async def later(n: int, digest: bytes, stream: Stream) -> bytes:
            await go_on.wait()
            return right(n, digest, stream)

        provider = Provider(other, later)
        async with (
            exchange_on(reader, MemoryStore(), found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            one, two = (asyncio.ensure_future(source.get(ROOT)) for _ in range(2))
            await until(lambda: provider.asked)
            one.cancel()
            await asyncio.wait([one])
            go_on.set()
            assert await two == BLOCKS[0].data


async def test_cancelling_frees_everything() -> None:
    async with reader_and(2) as (reader, others):
        providers = [Provider(overlay, stalls) for overlay in others]
        store = MemoryStore()
        async with exchange_on(reader, store, found(*(o.peer_id for o in others))) as made:
            before = asyncio.all_tasks()

            async def read() -> None:
                async with made.open(ROOT, "ada") as source:
                    await read_all(source)

            reading = asyncio.create_task(read())
            await until(lambda: all(len(provider.asked) > 4 for provider in providers))
            reading.cancel()
            await asyncio.wait([reading])
            assert reading.cancelled()
            await until(lambda: not any(provider.streams for provider in providers))
            await until(lambda: asyncio.all_tasks() - before == set())
            assert not made._fetches
            assert not store.holds
            assert not any(connection.in_use for connection in reader.host.connections())


async def test_a_node_that_stops_says_so_to_its_readers() -> None:
    async with reader_and(1) as (reader, (other,)):
        provider = Provider(other, never)
        async with contextlib.AsyncExitStack() as stack:
            made = await stack.enter_async_context(
                exchange_on(reader, MemoryStore(), found(other.peer_id))
            )

            async def read() -> None:
                async with made.open(ROOT, "ada") as source:
                    await source.get(ROOT)

            reading = asyncio.create_task(read())
            await until(lambda: provider.asked)
            await stack.aclose()
            with pytest.raises(WetwareError, match="stopping"):
                await reading


async def test_a_block_that_cannot_be_kept_ends_the_download() -> None:
    async with reader_and(1) as (reader, (other,)):
        honest(other)
        store = MemoryStore(BLOCKS[-2:])
        store.fails = LimitExceeded("the quota is used up", code="limit.blob_quota")
        async with (
            exchange_on(reader, store, found(other.peer_id)) as made,
            made.open(ROOT, "ada") as source,
        ):
            with pytest.raises(LimitExceeded, match="quota"):
                await read_all(source)
            assert await source.get(BLOCKS[-1].cid) == BLOCKS[-1].data
            told = []
            for _ in range(2):
                with pytest.raises(LimitExceeded, match="quota") as error:
                    await source.kept()
                told.append(error.value)
            assert told[0] is not told[1], "it would collect tracebacks"
            store.fails = None
            async with made.open(ROOT, "ada") as another:
                await read_all(another)


async def test_the_number_of_roots_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wetware_blob.exchange.exchange.FETCHES_MAX", 2)
    async with FakeOverlay() as alone, exchange_on(alone, MemoryStore(BLOCKS)) as made:
        async with made.open(BLOCKS[0].cid, "ada"), made.open(BLOCKS[1].cid, "ada"):
            with pytest.raises(LimitExceeded, match="FETCHES_MAX"):
                async with made.open(BLOCKS[2].cid, "ada"):
                    pass
            async with made.open(BLOCKS[1].cid, "bob") as source:
                assert await source.get(BLOCKS[1].cid) == BLOCKS[1].data
        async with made.open(BLOCKS[2].cid, "ada"):
            pass


async def test_many_fetches_share_the_memory() -> None:
    async with (
        FakeOverlay() as alone,
        exchange_on(alone, MemoryStore(BLOCKS)) as made,
        contextlib.AsyncExitStack() as stack,
    ):
        opened = [await stack.enter_async_context(made.open(b.cid, "ada")) for b in BLOCKS]
        assert {fetch.bytes_max for fetch in opened} == {fetching.BYTES_MIN}
        async with made.open(ROOT, "bob") as shared:
            assert shared is opened[0]
        last = opened[0]  # to be closed
        await stack.pop_all().aclose()
        assert last.bytes_max == fetching.BYTES_MAX


async def test_only_members_are_served() -> None:
    seen: list[Access] = []

    class Overlay(FakeOverlay):
        def handle(self, protocol, handler, *, access):  # type: ignore[no-untyped-def]  # as its parent
            seen.append(access)
            return super().handle(protocol, handler, access=access)

    async with Overlay() as alone, exchange_on(alone, MemoryStore()):
        assert seen == [Access.MEMBER]
