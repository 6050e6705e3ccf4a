"""What members know of each other's logs: nothing that a node signed can be taken back unseen."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.hookspecs import Access, PeerUp
from wetware.identity import Key, PeerId
from wetware_audit import spread
from wetware_audit.chain import CHECKPOINTS_FILE, Checkpoint, files, read_checkpoints
from wetware_audit.held import HELD_FILE, NODES_MAX, STRETCHES_MAX, Held, read
from wetware_audit.log import AuditLog
from wetware_audit.spread import PROTOCOL, Checkpoints
from wetware_audit.verify import verify

from .parts import KEY, OTHER, Clock, open_log, recorder_on, signer, until, write

pytestmark = pytest.mark.anyio


class Stream:
    """One end of a stream in memory."""

    def __init__(self, peer: PeerId) -> None:
        self.peer, self.reader = peer, asyncio.StreamReader()
        self.other: Stream
        self.sent = 0

    async def write(self, data: bytes) -> None:
        self.sent += len(data)
        self.other.reader.feed_data(data)

    async def read_exactly(self, count: int) -> bytes:
        return await self.reader.readexactly(count)

    def reset(self) -> None:
        self.other.reader.feed_eof()
        self.reader.feed_eof()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.other.reader.feed_eof()


class Overlay:
    """Nodes in one process that are connected when the test says so."""

    def __init__(self, peer: PeerId, all_: dict[PeerId, Overlay]) -> None:
        self.peer, self.all = peer, all_
        self.connected: set[PeerId] = set()
        self.handlers: dict[str, Any] = {}
        self.watcher: Any = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.told = 0
        all_[peer] = self

    def peers(self) -> tuple[PeerId, ...]:
        return tuple(self.connected)

    def handle(self, protocol: str, handler: Any, *, access: Access) -> Callable[[], None]:
        assert access is Access.MEMBER
        self.handlers[protocol] = handler
        return lambda: None

    def watch_peers(self, callback: Any) -> Callable[[], None]:
        self.watcher = callback
        for peer in self.connected:
            callback(PeerUp(peer))
        return lambda: None

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        mine, theirs = Stream(peer), Stream(self.peer)
        mine.other, theirs.other = theirs, mine
        other = self.all[peer]
        task = asyncio.create_task(other.handlers[protocol](theirs))
        other.tasks.add(task)
        self.told += 1
        return mine

    def connect(self, other: Overlay) -> None:
        for one, two in ((self, other), (other, self)):
            one.connected.add(two.peer)
            if one.watcher is not None:
                one.watcher(PeerUp(two.peer))

    def cut(self, other: Overlay) -> None:
        self.connected.discard(other.peer)
        other.connected.discard(self.peer)


class Node:
    """A node that keeps a log and tells of it."""

    def __init__(self, directory: Path, key: Key, all_: dict[PeerId, Overlay]) -> None:
        self.directory, self.key, self.clock = directory, key, Clock()
        self.overlay = all_.get(key.peer_id) or Overlay(key.peer_id, all_)

    @contextlib.asynccontextmanager
    async def running(self, **changes: Any) -> AsyncIterator[Node]:
        self.log: AuditLog = open_log(
            self.directory, key=self.key, clock=self.clock, checkpoint_records=10, **changes
        )
        self.audit = recorder_on(self.log)
        self.checkpoints = Checkpoints(
            SimpleNamespace(overlay=self.overlay, run_sync=self.audit.ctx.run_sync),  # type: ignore[arg-type]
            self.log,
            self.audit.record,
            self.directory,
            monotonic=self.clock.monotonic,
        )
        self.audit.on_checkpoint = self.checkpoints.signed
        task = asyncio.create_task(self.checkpoints.run())
        await asyncio.sleep(0)
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait([task])
            self.log.close()

    def records(self, event: str) -> list[Any]:
        found = [line for path in files(self.directory) for line in path.read_bytes().splitlines()]
        return [record for record in map(json.loads, found) if record["event"].startswith(event)]

    async def grow(self, count: int) -> Checkpoint:
        """Write records, the last of them signed."""
        last = await write(self.log, count)
        while True:
            signed = self.log.last_checkpoint
            if signed is not None and signed.seq == last:
                return signed
            if self.log.seq == last and (last - (signed.seq if signed else 0)) < 10:
                last = await write(self.log, 1)
            await asyncio.sleep(0.001)


def cut(directory: Path, count: int) -> None:
    """The last records, and the checkpoints that would tell."""
    (directory / CHECKPOINTS_FILE).unlink()
    path = files(directory)[-1]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-count]))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "SAVE_S", 0.01)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Node, Node]:
    all_: dict[PeerId, Overlay] = {}
    a, b = Node(tmp_path / "a", KEY, all_), Node(tmp_path / "b", OTHER, all_)
    a.overlay.connect(b.overlay)
    return a, b


def high(node: Node, of: Node) -> int:
    found = node.checkpoints.held.newest(of.key.peer_id)
    return 0 if found is None else found.seq


async def test_one_checkpoint_of_a_log_is_kept_and_it_rises(pair: tuple[Node, Node]) -> None:
    a, b = pair
    async with b.running(), a.running():
        for _ in range(5):
            signed = await a.grow(30)
            await until(lambda signed=signed: high(b, a) == signed.seq)
        assert b.checkpoints.known(str(KEY.peer_id)) == [signed]
        await until(lambda: read(b.directory / HELD_FILE)[0][-1].checkpoint == signed)
        (first,) = b.records("peer.checkpoint")
        assert Checkpoint.parse(first["checkpoint"]).seq < signed.seq
        b.clock.now += spread.ANCHOR_S
        signed = await a.grow(10)
        await until(lambda: len(b.records("peer.checkpoint")) == 2)
        assert Checkpoint.parse(b.records("peer.checkpoint")[1]["checkpoint"]) == signed
        assert not b.records("peer.log_")
    assert verify(a.directory, checkpoints=[signed]).ok
    assert verify(b.directory).ok
    assert Held(b.directory / HELD_FILE).newest(KEY.peer_id) == signed


@pytest.mark.parametrize("regrown", [130, 0])
async def test_a_log_that_was_cut_is_known_to_be_so_for_ever(
    pair: tuple[Node, Node], regrown: int
) -> None:
    """130: it is longer again when the next checkpoint is told; 0: it is shorter."""
    a, b = pair
    async with b.running():
        async with a.running():
            signed = await a.grow(200)
            await until(lambda: high(b, a) == signed.seq)
            a.overlay.cut(b.overlay)
        cut(a.directory, 100)
        async with a.running():
            assert not a.log.findings, "by itself it cannot tell"
            await a.grow(regrown or 1)
            a.overlay.connect(b.overlay)
            await until(lambda: b.records("peer.log_rewritten"))
            for _ in range(10):
                later = await a.grow(20)
                await until(lambda later=later: high(b, a) == later.seq)
        (record,) = b.records("peer.log_rewritten")
        assert Checkpoint.parse(record["was"]) == signed
    assert later.seq > signed.seq
    async with b.running():  # also after a restart
        assert b.checkpoints.held.breaks() == {KEY.peer_id: "rewritten"}
        known = b.checkpoints.known(str(KEY.peer_id))
    assert set(known) == {signed, later}
    assert verify(a.directory).ok
    report = verify(a.directory, checkpoints=known)
    assert "the log was rewritten" in report.problems[0].what
    about = verify(b.directory)
    assert about.ok, about.problems
    assert any("its log was cut off or rewritten" in note for note in about.notes)


async def test_a_log_that_was_begun_anew_does_not_hide_the_one_before(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair
    async with b.running():
        async with a.running():
            signed = await a.grow(50)
            await until(lambda: high(b, a) == signed.seq)
            a.overlay.cut(b.overlay)
        for path in a.directory.iterdir():
            path.unlink()
        async with a.running():
            a.overlay.connect(b.overlay)
            later = await a.grow(50)
            await until(lambda: b.records("peer.log_replaced"))
            await until(lambda: set(b.checkpoints.known()) == {signed, later})
    report = verify(a.directory, checkpoints=[signed, later])
    assert "is not here: another was put in its place" in report.problems[0].what


async def test_after_a_long_absence_the_proof_comes_in_steps(
    pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "STEP_RECORDS_MAX", 64)
    a, b = pair
    async with b.running(), a.running(file_bytes_max=1 << 14):
        signed = await a.grow(10)
        await until(lambda: high(b, a) == signed.seq)
        a.overlay.cut(b.overlay)
        signed = await a.grow(1000)
        before = a.overlay.told
        a.overlay.connect(b.overlay)
        await until(lambda: high(b, a) == signed.seq)
        assert a.overlay.told - before >= 1000 // 64
        assert b.checkpoints.known(str(KEY.peer_id)) == [signed]
        assert not b.records("peer.log_")


async def test_what_the_settings_let_go_cannot_be_proved_and_is_said(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair
    few = {"file_bytes_max": 4096, "files_max": 1}
    async with b.running(), a.running(**few):
        signed = await a.grow(10)
        await until(lambda: high(b, a) == signed.seq)
        a.overlay.cut(b.overlay)
        later = await a.grow(200)
        a.overlay.connect(b.overlay)
        await until(lambda: high(b, a) == later.seq and b.records("peer.log_"))
        (record,) = b.records("peer.log_")
        assert record["event"] == "peer.log_unproven"
        assert Checkpoint.parse(record["was"]) == signed


async def test_what_is_kept_of_others_cannot_be_changed_unseen(pair: tuple[Node, Node]) -> None:
    a, b = pair
    async with b.running():
        async with a.running():
            signed = await a.grow(200)
            await until(lambda: high(b, a) == signed.seq)
            a.overlay.cut(b.overlay)
        cut(a.directory, 100)
        async with a.running():
            later = await a.grow(130)
            a.overlay.connect(b.overlay)
            await until(lambda: b.records("peer.log_rewritten"))
    file = b.directory / HELD_FILE
    first, second = file.read_bytes().splitlines(keepends=True)
    assert verify(b.directory).ok
    for kept in (second, first, b"", b"{}\n" + first + second):
        file.write_bytes(kept)
        report = verify(b.directory)
        assert not report.ok
        assert report.problems[-1].file == HELD_FILE
    assert f"what {KEY.peer_id} had signed" not in report.problems[-1].what
    file.unlink()
    (was, now) = verify(b.directory).problems
    assert f"it lacks what {KEY.peer_id} had signed at record {signed.seq}" in was.what
    assert f"at record {later.seq} or later" in now.what or "or later" in now.what


async def told(node: Node, key: Key, frame: dict[str, Any], digests: bytes = b"") -> Any:
    """Tell a node what no node of ours would; its answer, or None if it breaks off."""
    from wetware.overlay.frames import read_frame, write_frame

    overlay = Overlay(key.peer_id, dict(node.overlay.all))
    stream = await overlay.open_stream(node.key.peer_id, PROTOCOL)
    await read_frame(stream, bytes_max=4096)  # type: ignore[arg-type]
    await write_frame(stream, frame)  # type: ignore[arg-type]
    await stream.write(digests)
    try:
        return await read_frame(stream, bytes_max=4096)  # type: ignore[arg-type]
    except EOFError:
        return None


def word(key: Key, seq: int, head: int = 7, *, log: str = "l", at: int = 0) -> str:
    return Checkpoint(log, key.peer_id, seq, bytes([head]) * 32, at or seq).sign(signer(key)).text


async def test_nothing_but_a_proof_moves_what_is_known(pair: tuple[Node, Node]) -> None:
    _, b = pair
    mallory = Key.from_seed(b"mallory".ljust(32, b"."))
    async with b.running():
        assert await told(b, mallory, {"checkpoint": word(mallory, 5), "records": 0}) == {
            "taken": True
        }
        for frame, digests in (
            ({"checkpoint": word(mallory, 6), "records": 10**9}, b""),
            ({"checkpoint": word(mallory, 6), "records": -1}, b""),
            ({"checkpoint": word(mallory, 6), "records": 1}, b"x"),
            ({"checkpoint": word(KEY, 6), "records": 0}, b""),
            ({"checkpoint": word(mallory, 6)[:-3], "records": 0}, b""),
            ({"checkpoint": 5, "records": 0}, b""),
            ({}, b""),
        ):
            telling = asyncio.create_task(told(b, mallory, frame, digests))
            await asyncio.sleep(0.01)
            for task in tuple(b.overlay.tasks):  # the one that waits for the rest of a proof
                if digests == b"x":
                    task.cancel()
                    telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await telling is None
        assert high_of(b, mallory) == 5
        assert not b.records("peer.log_")
        frame = {"checkpoint": word(mallory, 6), "records": 1}
        await told(b, mallory, frame, b"\0" * 32)
        await b.log.written()
        (record,) = b.records("peer.log_")
        assert record["event"] == "peer.log_rewritten"


def high_of(node: Node, key: Key) -> int:
    found = node.checkpoints.held.newest(key.peer_id)
    return 0 if found is None else found.seq


async def test_who_breaks_its_word_without_end_fills_nothing(pair: tuple[Node, Node]) -> None:
    _, b = pair
    mallory = Key.from_seed(b"mallory".ljust(32, b"."))
    async with b.running():
        for number in range(3 * STRETCHES_MAX):
            frame = {"checkpoint": word(mallory, 5, log=f"log {number}"), "records": 0}
            assert await told(b, mallory, frame) == {"taken": number < STRETCHES_MAX}
        logs = {checkpoint.log for checkpoint in b.checkpoints.known()}
        assert logs == {f"log {number}" for number in range(STRETCHES_MAX)}, "the first ones stay"
        await b.log.written()
        assert len(b.records("peer.log_replaced")) == STRETCHES_MAX - 1


def test_nodes_are_bounded_and_the_one_that_was_silent_longest_makes_room(tmp_path: Path) -> None:
    held = Held(tmp_path / HELD_FILE)
    keys = [Key.from_seed(str(n).encode().ljust(32, b".")) for n in range(NODES_MAX + 1)]
    for key in keys[:-1]:
        assert held.take(Checkpoint("l", key.peer_id, 1, b"", 0)) is None
    held.take(Checkpoint("l", keys[0].peer_id, 2, b"", 0))
    assert held.take(Checkpoint("l", keys[-1].peer_id, 1, b"", 0)) == keys[1].peer_id


def test_a_damaged_file_keeps_what_is_good(tmp_path: Path) -> None:
    file = tmp_path / HELD_FILE
    held = Held(file)
    held.take(Checkpoint.parse(word(KEY, 5)))
    good = held.document()
    wrong = [b"", b"{}", b"[" * 1000, b"null", b"\xff", good.replace(b'"v": 2', b'"v": 1').strip()]
    wrong.append(good.replace(b'"broken": ""', b'"broken": "mended"').strip())
    file.write_bytes(b"\n".join([*wrong, good]))
    again = Held(file)
    assert again.damaged == len(wrong)
    assert again.document() == good


def test_checkpoints_of_the_form_before_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / HELD_FILE
    file.write_text(word(KEY, 5) + "\n")
    assert read(file) == ([], 1)
    assert read_checkpoints(file)[1] == 0
