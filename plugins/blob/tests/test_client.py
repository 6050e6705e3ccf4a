"""`session.blob` over real RPC, against a servant in memory: what it sends and writes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded, NotFound, WetwareError
from wetware.rpc import handed
from wetware_blob import client, disk, names
from wetware_blob.client import BlobStore, Progress
from wetware_blob.disk import DiskError
from wetware_blob.format.cid import BadBlock

from .memory import Bytes, Cluster, Tree, cid_of, served

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
MIB = 1 << 20
TREE: Tree = {
    "a": b"x" * 10,
    "b\n\x1b[2J": b"",
    "dir": {"up": "../a", "empty": {}, "big": b"0123456789abcdef" * (MIB // 5)},
    "ä": "dir/big",
}


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
async def blob(cluster: Cluster, tmp_path: Path) -> AsyncIterator[BlobStore]:
    async with served(cluster, tmp_path / "socket") as store:
        yield store


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where files are put from and got to."""
    path = tmp_path / "home"
    path.mkdir()
    return path


def on_disk(path: Path) -> Tree:
    if path.is_symlink():
        return os.readlink(path)
    if path.is_dir():
        return {each.name: on_disk(each) for each in path.iterdir()}
    return path.read_bytes()


def lay(path: Path, tree: Tree) -> None:
    if isinstance(tree, bytes):
        path.write_bytes(tree)
    elif isinstance(tree, str):
        path.symlink_to(tree)
    else:
        path.mkdir()
        for name, below in tree.items():
            lay(path / name, below)


def small_steps(monkeypatch: pytest.MonkeyPatch, sync: int = 64 << 10, files: int = 4096) -> None:
    monkeypatch.setattr(disk, "CHUNK_BYTES", 16 << 10)
    monkeypatch.setattr(disk, "SYNC_BYTES", sync)
    monkeypatch.setattr(disk, "SYNC_FILES", files)


# --- putting --------------------------------------------------------------------------------------


async def test_put_takes_bytes_paths_and_streams(
    blob: BlobStore, cluster: Cluster, home: Path
) -> None:
    data = os.urandom(3 * MIB + 5)
    (home / "file").write_bytes(data)
    seen: list[Progress] = []
    done = [
        await blob.put(data, name="a", copies=3, where="zone=home", ack=2, public=True),
        await blob.put(home / "file", progress=seen.append),
        await blob.put(str(home / "file"), profile="unixfs-v0-2015"),
        await blob.put(Bytes(data, most=70_000)),
    ]
    assert {put.cid for put in done} == {cid_of(data)}
    assert [put.bytes for put in done] == [len(data)] * 4
    assert done[0].copies == 2
    first, path, _, stream = cluster.put_calls
    assert first["pin"] == {
        "name": "a", "copies": 3, "where": "zone=home", "ack": 2, "public": True,
    }  # fmt: skip
    assert [call["bytes_max"] for call in (first, path, stream)] == [len(data)] * 2 + [
        (1 << 64) - 1
    ]
    assert cluster.put_calls[2]["profile"] == "unixfs-v0-2015"
    assert seen[-1].bytes == seen[-1].total == len(data)
    assert (await blob.put(b"")).cid == cid_of(b"")


async def test_a_directory_is_put_and_got_as_it_is(
    blob: BlobStore, cluster: Cluster, home: Path
) -> None:
    lay(home / "tree", TREE)
    put = await blob.put(home / "tree", name="mine", progress=lambda _: None)
    assert list(cluster.blobs[put.cid]) == sorted(TREE, key=str.encode)
    assert cluster.put_calls[0]["form"] == "car"
    info = await blob.get(put.cid, home / "copy")
    assert info.kind == "directory"
    assert on_disk(home / "copy") == TREE
    assert (await blob.put(str(home / "copy"))).cid == put.cid
    assert sorted(os.listdir(home)) == ["copy", "tree"]


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("missing", "invalid.unreadable"),
        ("fifo", "invalid.special_file"),
        ("socket", "invalid.special_file"),
        ("latin-1", "invalid.name"),
        ("absolute link", "invalid.link"),
        ("link out", "invalid.link"),
    ],
)
async def test_what_cannot_be_put_is_named_and_nothing_is_pinned(
    what: str, code: str, blob: BlobStore, cluster: Cluster, home: Path
) -> None:
    inner = home / "tree" / "inner"
    inner.mkdir(parents=True)
    (inner / "first").write_bytes(bytes(MIB))
    bad = os.fsencode(inner) + b"/z\x1b"
    with contextlib.ExitStack() as stack:
        if what == "fifo":
            os.mkfifo(bad)
        elif what == "socket":
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(bad)
        elif what == "latin-1":
            bad += b"\xe4"
            os.close(os.open(bad, os.O_CREAT))
        elif what == "missing":
            bad = os.fsencode(home / "tree\n")
            (home / "tree").rename(home / "other")
        else:
            os.symlink(b"/etc/passwd" if what == "absolute link" else b"../../x", bad)
        with pytest.raises(InvalidArgument) as refused:
            await blob.put(
                home / ("tree\n" if what == "missing" else "tree"), progress=lambda _: None
            )
    assert refused.value.code == code
    assert refused.value.message.isprintable()
    assert ("z\\x1b" if what != "missing" else "tree\\n") in refused.value.message
    await let_go(cluster)
    assert cluster.pins == []


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # no one event tells of it
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("on_disk", [True, False])
async def test_a_file_of_a_disk_is_read_by_the_node_of_this_machine(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    sent: list[bytes] = []
    send = rpc.ByteStream.send

    async def spied(stream: rpc.ByteStream, item: bytes) -> None:
        sent.append(item)
        await send(stream, item)

    monkeypatch.setattr(rpc.ByteStream, "send", spied)
    monkeypatch.setattr(handed, "_on_disk", lambda _: on_disk)
    data = os.urandom(3 * MIB + 5)
    (home / "file").write_bytes(data)
    assert (await blob.put(home / "file")).cid == cid_of(data)
    assert bool(sent) is not on_disk
    with pytest.raises(LimitExceeded):
        await blob.put(home / "file", bytes_max=MIB)
    await let_go(cluster)


async def let_go(cluster: Cluster) -> None:
    """Nothing is held at the node any more."""
    await until(lambda: not cluster.live)


async def test_the_quota_ends_a_put_in_the_middle_and_says_so(
    blob: BlobStore, cluster: Cluster
) -> None:
    cluster.quota = 3 * MIB
    with pytest.raises(LimitExceeded, match="the quota is used up") as refused:
        await blob.put(bytes(20 * MIB))
    assert refused.value.code == "limit.blob_quota"
    with pytest.raises(LimitExceeded):
        await blob.put(Bytes(bytes(MIB)), bytes_max=1000)
    await let_go(cluster)


async def test_a_put_that_is_cancelled_pins_nothing(blob: BlobStore, cluster: Cluster) -> None:
    class Endless(Bytes):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            await asyncio.sleep(3600 if self.data else 0)
            self.data += b"x"
            return b"x" * 1000

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await blob.put(Endless())
    await let_go(cluster)
    assert cluster.pins == []


async def test_a_file_that_grows_is_put_as_it_was(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "log").write_bytes(b"x" * 3000)

    class Growing(io.FileIO):
        def read(self, count: int = -1) -> bytes:
            with (home / "log").open("ab") as file:
                file.write(b"y" * 1000)
            return super().read(count)

    monkeypatch.setattr(io, "FileIO", Growing)
    assert (await blob.put(home / "log")).cid == cid_of(b"x" * 3000)


# --- reading --------------------------------------------------------------------------------------


async def test_a_blob_is_a_stream_of_its_bytes(blob: BlobStore, cluster: Cluster) -> None:
    data = os.urandom(2 * MIB)
    root = cluster.add({"dir": {"file": data}, "other": b""})
    async with blob.open(f"{root}/dir/file") as file:
        assert file.cid == cid_of(data)
        assert b"".join([part async for part in file]) == data
        assert await file.read(10, 20) == data[10:20]
        assert await file.read(2 * MIB - 3) == data[-3:]
        assert await file.read(5, 5) == b""
        assert await file.stat() == len(data)
        assert (await file.info()).kind == "file"
        with pytest.raises(InvalidArgument, match="no directory"):
            await anext(file.ls())
    async with blob.open(root) as directory, directory.at("dir") as inner:
        assert [(e.name, e.kind, e.size) async for e in inner.ls()] == [("file", "file", len(data))]
        with pytest.raises(NotFound):
            async with directory.at("none"):
                pass
    await let_go(cluster)


async def test_a_large_directory_comes_in_pages(blob: BlobStore, cluster: Cluster) -> None:
    root = cluster.add({f"{n:05}": b"" for n in range(2500)})
    async with blob.open(root) as directory:
        assert [e.name async for e in directory.ls()] == [f"{n:05}" for n in range(2500)]


async def test_nobody_has_it(blob: BlobStore, home: Path) -> None:
    with pytest.raises(NotFound, match="nobody has") as missing:
        await blob.get("b00", home / "x")
    assert missing.value.code == "not_found.blob"
    with pytest.raises(InvalidArgument):
        await blob.get("Z", home / "x")
    assert os.listdir(home) == []


async def test_pins(blob: BlobStore, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAGE", 2)
    root = cluster.add({"a": b"x"})
    for n in range(5):
        assert (await blob.pin(root, name=f"{n}")).cid == root
    below = (await blob.put(b"x")).cid
    assert [pin.name for pin in await blob.pins()] == ["", "4", "3", "2", "1", "0"]
    assert len(await blob.pins(below)) == 1
    pins, usage = await blob.all()
    assert (len(pins), usage.pins) == (6, 6)
    assert await blob.unpin(root, "3") == 1
    removed = await blob.rm(below)
    assert (removed.pins, len(removed.pinned_by)) == (1, 4)
    assert await blob.unpin(root) == 4
    with pytest.raises(NotFound):
        await blob.pin("b00")
    assert (await blob.gc(dry_run=True)).bytes == 5000
    cluster.findings.insert(0, {"what": "block", "name": "b1", "mended": True})
    async with blob.verify() as findings:
        assert [(await anext(findings))["what"] for _ in range(2)] == ["block", "end"]
    await let_go(cluster)


# --- getting --------------------------------------------------------------------------------------


async def test_what_is_there_is_not_overwritten(
    blob: BlobStore, cluster: Cluster, home: Path
) -> None:
    file, tree = cluster.add(b"new"), cluster.add({"a": b"new"})
    lay(home / "file", b"old")
    lay(home / "dir", {"a": b"old"})
    lay(home / "link", "file")
    lay(home / "dangling", "nothing")
    for name in os.listdir(home):
        for cid in (file, tree):
            with pytest.raises(DiskError, match="exists") as refused:
                await blob.get(cid, home / name)
            assert refused.value.code == "blob.exists"
    for cid, name in ((file, "dir"), (tree, "dir"), (tree, "file")):
        with pytest.raises(DiskError, match="exists"):
            await blob.get(cid, home / name, force=True)
    assert on_disk(home) == {
        "file": b"old", "dir": {"a": b"old"}, "link": "file", "dangling": "nothing",
    }  # fmt: skip
    for name in ("file", "link", "dangling"):
        await blob.get(file, home / name, force=True)
    assert on_disk(home) == {
        "file": b"new", "dir": {"a": b"old"}, "link": b"new", "dangling": b"new",
    }  # fmt: skip
    with pytest.raises(DiskError, match="cannot write"):
        await blob.get(file, home / "none" / "x")
    for bad in ("/", "..", ""):
        with pytest.raises(InvalidArgument, match="names no file"):
            await blob.get(file, bad)


FILE = {"f": b"evil"}


@pytest.mark.parametrize(
    "hostile",
    [
        [("..", b"evil")],
        [("../out", b"evil")],
        [("/tmp/ww-blob-out", b"evil")],  # noqa: S108  # it must not write there
        [("a/out", b"evil")],
        [("a\0", b"evil")],
        [("", b"evil")],
        [("..", FILE)],
        [("l", "/"), ("l", FILE)],
        [("l", "../..")],
        [("l", "../../out")],
        [("l", "x/../../../out")],
        [("d", {"l": "..", "m": "l/.."})],
        # Links within the tree are fine, and nothing is ever written through one.
        [("l", "d"), ("l", FILE)],
        [("d", {}), ("l", "d"), ("l", FILE)],
        [("d", {}), ("l", "d/f"), ("l", b"evil")],
        [("a", b"1"), ("a", b"2")],
        [("a", {}), ("a", b"2")],
        [("x" * 256, b"")],
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
async def test_never_a_byte_outside(
    hostile: Tree,
    resumed: bool,
    blob: BlobStore,
    cluster: Cluster,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = cluster.add([("good", b"g"), ("x", b"0" * 90_000), ("sub", hostile)])
    cluster.raw.add(root)
    (home / "in").mkdir()
    if resumed:
        small_steps(monkeypatch, files=1)
        cluster.break_at = 80_000
        with pytest.raises(WetwareError):
            await blob.get(root, home / "in" / "tree")
        assert os.listdir(home / "in") == [f".tree.{root}.part"]
        cluster.break_at = 1 << 60
    with pytest.raises((InvalidArgument, BadBlock)):
        await blob.get(root, home / "in" / "tree")
    assert cluster.reads[-1] == ("tree", int(resumed))
    assert os.listdir(home / "in") == []
    assert os.listdir(home) == ["in"]
    assert not os.path.exists("/tmp/ww-blob-out")  # noqa: ASYNC240, S108  # as above


async def test_a_node_that_sends_other_blocks_is_not_believed(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from . import memory

    root, whole = cluster.add({"a": b"1", "b": b"2"}), memory.car_of
    cluster.raw.add(root)
    for sent, why in (
        (whole({"a": b"1", "b": b"3"}), "in the place of"),
        (whole({"a": b"1", "b": b"2"}).replace(b"1", b"3"), "another hash"),
        (whole({"a": b"1", "b": b"2"})[:-1], "a part of the directory"),
        (whole(b"1"), "in the place of"),
        (b"\1X", "not a CAR"),
        (b"", "a part of the directory"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "car_of", lambda _, sent=sent: sent)
            with pytest.raises((BadBlock, DiskError), match=why):
                await blob.get(root, home / "x")
        assert os.listdir(home) == []


def test_links_that_stay_within() -> None:
    stays_within = names.stays_within
    for target, depth in [("a", 0), ("a/b", 0), ("./a", 0), ("..", 1), ("../../a/b", 2), ("/", 9)]:
        assert stays_within(target.encode(), depth) == (target != "/")
    for target, depth in [("..", 0), ("../..", 1), ("a/..", 0), ("a/../..", 5), ("./../a", 0)]:
        assert not stays_within(target.encode(), depth)
    assert not stays_within(b"a", -1)


async def test_what_breaks_in_the_middle_is_resumed(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)
    data = os.urandom(MIB)
    root = cluster.add(data)
    cluster.break_at = MIB // 2 + 1000
    with pytest.raises(WetwareError):
        await blob.get(root, home / "file")
    part = home / f".file.{root}.part"
    assert os.listdir(home) == [part.name]
    content, expected = part / "content", json.loads((part / "state").read_bytes())["bytes"]
    assert MIB // 4 < expected <= content.stat().st_size
    assert content.read_bytes() == data[: content.stat().st_size]
    with content.open("r+b") as file:  # nobody knows whether what is behind it is on disk
        file.seek(expected)
        file.write(b"torn" * 10)
    cluster.break_at = 1 << 60
    seen: list[Progress] = []
    await blob.get(root, home / "file", progress=seen.append)
    assert cluster.reads == [("read", 0), ("read", expected)]
    assert (seen[0].bytes, seen[-1].bytes) == (expected, MIB)
    assert on_disk(home) == {"file": data}


async def test_the_first_bytes_are_not_kept(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)
    cluster.break_at = 50_000
    for tree in (os.urandom(MIB), {"a": os.urandom(MIB)}):
        with pytest.raises(WetwareError):
            await blob.get(cluster.add(tree), home / "x")
        assert os.listdir(home) == []


async def test_what_the_state_says_is_on_disk(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)
    monkeypatch.setattr(disk, "CHUNK_BYTES", 37_000)
    synced, said = [0], []
    fsync, rename = os.fsync, os.rename

    def watched_sync(fd: int) -> None:
        fsync(fd)
        synced.append(os.fstat(fd).st_size)

    def watched_rename(source: str, target: str, **fds: int) -> None:
        rename(source, target, **fds)
        if target == "state":
            (part,) = home.iterdir()
            said.append(json.loads((part / "state").read_bytes())["bytes"])
            assert said[-1] == synced[-1] == (part / "content").stat().st_size
        else:
            assert synced[-1] == len(data)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "rename", watched_rename)
    data = os.urandom(10 * disk.SYNC_BYTES + 99)
    await blob.get(cluster.add(data), home / "file")
    steps = [after - before for before, after in itertools.pairwise([0, *said])]
    assert len(said) > 5
    assert all(disk.SYNC_BYTES <= step < disk.SYNC_BYTES + MIB for step in steps)


async def test_a_tree_is_resumed_by_whole_files(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)
    tree: Tree = {
        f"d{n}": {"inner": {f"f{m}": os.urandom(9_000) for m in range(8)}, "link": f"../d{n}"}
        for n in range(9)
    }
    root, skipped = cluster.add(tree), []
    cluster.break_at = 150_000
    for _ in range(20):
        cluster.reads.clear()
        try:
            await blob.get(root, home / "tree")
        except WetwareError:
            assert os.listdir(home) == [f".tree.{root}.part"]
        skipped.append(cluster.reads[0][1])
        if (home / "tree").exists():
            break
    assert len(skipped) > 4
    assert skipped == sorted(set(skipped))
    assert on_disk(home) == {"tree": tree}


async def test_a_retry_after_a_kill_goes_on(cluster: Cluster, home: Path, tmp_path: Path) -> None:
    """The process that gets it is killed at about half of it, in both forms."""
    file = os.urandom(3 * MIB)
    tree = {f"{n}": {"f": os.urandom(MIB // 8)} for n in range(24)}
    async with served(cluster, tmp_path / "socket") as blob:
        for content in (file, tree):
            root = cluster.add(content)
            cluster.stall_at = 3 * MIB // 2
            cluster.reached.clear()
            cluster.reads.clear()
            program = f"""
import asyncio
from wetware import rpc
from wetware_blob import disk, names
from wetware_blob.client import BlobStore
disk.CHUNK_BYTES, disk.SYNC_BYTES = 1 << 15, 1 << 18
async def main():
    path = {str(tmp_path / "socket")!r}
    async with rpc.runtime(), await rpc.connect_unix(path) as connection:
        store = BlobStore(connection.bootstrap(BlobStore.INTERFACE))
        await store.get({root!r}, {str(home / "x")!r})
asyncio.run(main())
"""
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
            try:
                async with asyncio.timeout(60):
                    await cluster.reached.wait()
                    part = home / f".x.{root}.part"
                    await until((part / "state").exists)
                assert process.returncode is None
            finally:
                process.kill()
                await process.wait()
            assert os.listdir(home) == [part.name]
            cluster.stall_at = 1 << 60
            disk_sync, disk.SYNC_BYTES = disk.SYNC_BYTES, 1 << 18
            try:
                await blob.get(root, home / "x")
            finally:
                disk.SYNC_BYTES = disk_sync
            assert cluster.reads[-1][1] > 0
            assert on_disk(home) == {"x": content}
            remove(home / "x")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


async def test_who_cancels_leaves_nothing(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)
    cluster.stall_at = MIB // 2
    for tree in (os.urandom(MIB), {f"{n}": os.urandom(MIB // 8) for n in range(8)}):
        cluster.reached.clear()
        root = cluster.add(tree)
        getting = asyncio.create_task(blob.get(root, home / "x"))
        await cluster.reached.wait()
        await until(lambda: os.listdir(home))
        getting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await getting
        assert os.listdir(home) == []
    await let_go(cluster)


async def test_a_lost_session_is_told_and_what_came_is_kept(
    cluster: Cluster, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)
    cluster.stall_at = MIB // 2
    root = cluster.add(os.urandom(MIB))
    async with served(cluster, tmp_path / "socket"):
        connection = await rpc.connect_unix(tmp_path / "socket")
        blob = BlobStore(connection.bootstrap(BlobStore.INTERFACE))
        getting = asyncio.create_task(blob.get(root, home / "x"))
        await cluster.reached.wait()
        await until(lambda: list(home.glob(".*.part/state")))
        await connection.aclose()
        with pytest.raises(Disconnected) as lost:
            await getting
        assert "it goes on from what has come" in lost.value.hint
        assert os.listdir(home) == [f".x.{root}.part"]


async def test_one_process_at_a_time_gets_it(blob: BlobStore, cluster: Cluster, home: Path) -> None:
    for tree in (b"abc", {"a": b"abc"}):
        root = cluster.add(tree)
        part = disk.Part(home / "x", root, directory=isinstance(tree, dict))
        with contextlib.suppress(InvalidArgument):
            async with part.taken():
                with pytest.raises(DiskError, match="another process") as refused:
                    await blob.get(root, home / "x")
                raise InvalidArgument("so that nothing stays")
        assert refused.value.code == "blob.busy"
        await blob.get(root, home / "x")
        assert on_disk(home) == {"x": tree}
        remove(home / "x")


async def test_a_part_that_somebody_else_laid_is_not_taken(
    blob: BlobStore, cluster: Cluster, home: Path
) -> None:
    root = cluster.add(b"abc")
    name = f".x.{root}.part"
    (home / "outside").write_bytes(b"mine")
    (home / name).symlink_to("outside")
    with pytest.raises(DiskError, match="cannot write"):
        await blob.get(root, home / "x")
    (home / name).unlink()
    os.mkfifo(home / name)
    with pytest.raises(DiskError, match="cannot write"):
        await blob.get(root, home / "x")
    (home / name).unlink()
    (home / name).mkdir()
    (home / name / "content").symlink_to(home / "outside")
    (home / name / "state").write_text('{"bytes": 2, "files": 0}')
    await blob.get(root, home / "x")
    assert not (home / "x").is_symlink()
    if os.geteuid() == 0:
        (home / name).mkdir()
        os.chown(home / name, 1234, 1234)
        with pytest.raises(DiskError, match="not yours"):
            await blob.get(root, home / "x", force=True)
    assert (home / "outside").read_bytes() == b"mine"


async def test_a_state_that_is_broken_begins_anew(
    blob: BlobStore, cluster: Cluster, home: Path
) -> None:
    states = [b"", b"[]", b"{}", b'{"files": -1, "bytes": 1}', b"\xff", b"null"]
    states += [b'{"files": 0, "bytes": %d}' % size for size in (-1, 3, 1 << 70)]
    left: tuple[Tree, Tree] = b"22", {"left": {"over": b""}}
    for tree, method, content in ((b"1", "read", left[0]), ({"a": b"1"}, "tree", left[1])):
        root = cluster.add(tree)
        for state in states[: None if method == "read" else 6]:
            part = home / f".x.{root}.part"
            lay(part, {"content": content, "state": state, "state.new": b"x"})
            await blob.get(root, home / "x")
            assert on_disk(home) == {"x": tree}
            assert cluster.reads[-1] == (method, 0)
            remove(home / "x")


async def test_a_part_that_came_with_an_archive_leads_nowhere(
    blob: BlobStore, cluster: Cluster, home: Path
) -> None:
    lay(home / "mine", b"mine")
    file, tree = cluster.add(b"new"), cluster.add({"mine": b"new"})
    lay(home / f".x.{file}.part", {"state": b'{"files": 0, "bytes": 2}'})
    os.link(home / "mine", home / f".x.{file}.part" / "content")
    await blob.get(file, home / "x")
    state = b'{"files": 1, "bytes": 0}'
    for outside in ("..", "../..", f"{home}"):
        lay(home / f".t.{tree}.part", {"content": outside, "state": state})
        await blob.get(tree, home / "t")
        assert on_disk(home) == {"mine": b"mine", "x": b"new", "t": {"mine": b"new"}}
        assert cluster.reads[-1] == ("tree", 0)
        remove(home / "t")


async def test_a_full_disk_says_what_to_do(
    blob: BlobStore, cluster: Cluster, small_disk: Any
) -> None:
    for tree in (os.urandom(20 * MIB), {"a": os.urandom(20 * MIB)}):
        with pytest.raises(DiskError, match="No space left") as full:
            await blob.get(cluster.add(tree), small_disk.path / "x")
        assert "df -h" in full.value.hint
        assert os.listdir(small_disk.path) == []


async def test_a_car_goes_out_and_comes_in(blob: BlobStore, cluster: Cluster, home: Path) -> None:
    root = cluster.add({"a": b"1"})
    await blob.get(root, home / "a.car", car=True)
    with pytest.raises(DiskError, match="exists"):
        await blob.get(root, home / "a.car", car=True)
    put = await blob.put(home / "a.car", car=True, name="back")
    assert (put.cid, cluster.put_calls[0]["form"]) == (root, "car")
    cluster.break_at = 2
    with pytest.raises(WetwareError):
        await blob.get(root, home / "b.car", car=True)
    assert os.listdir(home) == ["a.car"]


async def test_long_names(blob: BlobStore, cluster: Cluster, home: Path) -> None:
    name = "ß" * 127
    await blob.get(cluster.add(b"1"), home / name)
    assert on_disk(home) == {name: b"1"}
    with pytest.raises(InvalidArgument, match="cannot be the name"):
        await blob.get(cluster.add({"x" * 256: b""}), home / "x")
    with pytest.raises(DiskError, match="too long"):
        await blob.get(cluster.add(b"1"), home / ("x" * 256))


async def test_a_node_that_sends_too_much_or_little(
    blob: BlobStore, cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from . import memory

    root = cluster.add(b"x" * 1000)
    for size in (999, 1001):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "size_of", lambda tree, size=size: size)
            with pytest.raises(DiskError, match=r"sent (more|fewer) bytes"):
                await blob.get(root, home / "x")
        assert os.listdir(home) == []


def test_findings_are_decoded_or_refused() -> None:
    from wetware_blob.client import _damage

    assert _damage(json.dumps({"what": "end"}).encode()) == {"what": "end"}
    for bad in (b"", b"[]", b"\xff", b"[" * 100_000, b"1"):
        with pytest.raises(InvalidArgument):
            _damage(bad)
