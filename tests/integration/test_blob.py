"""Blobs between real nodes: what is put at one is had at another, by who may and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import pytest

import wetware
from wetware import rpc
from wetware.errors import (
    Denied,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Revoked,
    WetwareError,
)
from wetware.rpc.handed import readable
from wetware.testing import NodeProcess

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

MIB = 1 << 20


async def test_what_is_put_at_one_node_is_had_at_another(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, b = pair
    data = os.urandom(5 * MIB + 17)
    (tmp_path / "file").write_bytes(data)
    async with (
        wetware.connect(a.addr, key=a.home.key()) as at_a,
        wetware.connect(b.addr, key=a.home.key()) as at_b,
    ):
        put = await at_a.blob.put(tmp_path / "file", name="file")
        async with at_b.blob.open(put.cid) as blob:
            assert await blob.stat() == len(data)
            assert await blob.read(3 * MIB - 1, 3 * MIB + 1) == data[3 * MIB - 1 : 3 * MIB + 1]
            assert await blob.read() == data
        (pin,) = await at_a.blob.pins(put.cid)
        assert (pin.name, pin.kind, pin.size) == ("file", "file", len(data))
        assert not await at_b.blob.pins(put.cid), "who read it at another node has pinned nothing"
        await at_b.blob.get(put.cid, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def opened(node: NodeProcess) -> list[str]:
    found: list[str] = []
    for fd in Path(f"/proc/{node.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found.append(os.readlink(fd))
    return found


async def test_a_node_reads_a_file_of_its_own_machine_by_itself(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, path = pair[0], tmp_path / "file"
    path.write_bytes(data := os.urandom(9 * MIB + 17))
    with path.open("rb") as file:
        if not readable(file.fileno()):
            pytest.skip("the temporary directory is on no disk")

    async def sent(*_: object) -> None:
        raise AssertionError("it was sent")

    async with wetware.connect(data_dir=node.data_dir, key=node.home.key()) as session:
        with monkeypatch.context() as patched:
            patched.setattr(rpc.ByteStream, "send", sent)
            put = await session.blob.put(path)
            os.truncate(path, 1 << 40)  # what is not there takes no time to read, and no end
            with pytest.raises(LimitExceeded) as refused:
                await session.blob.put(path, bytes_max=2 * MIB)
        assert refused.value.code == "limit.blob_bytes"
        async with session.blob.open(put.cid) as blob:
            assert await blob.read() == data
    assert str(path) not in opened(node)


async def test_a_tree_comes_as_it_went(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, b = pair
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub" / "ä\nb").write_bytes(b"")
    (tree / "large").write_bytes(os.urandom(2 * MIB))
    (tree / "link").symlink_to("sub/ä\nb")
    for number in range(300):
        (tree / "sub" / f"{number}").write_text(str(number))
    async with (
        wetware.connect(a.addr, key=a.home.key()) as at_a,
        wetware.connect(b.addr, key=a.home.key()) as at_b,
    ):
        put = await at_a.blob.put(tree)
        async with at_b.blob.open(put.cid) as blob:
            assert {entry.name: entry.kind async for entry in blob.ls()} == {
                "sub": "directory",
                "large": "file",
                "link": "symlink",
            }
            async with blob.at("sub/299") as inner:
                assert await inner.read() == b"299"
            with pytest.raises(NotFound):
                await blob.at("sub/300").__aenter__()
            with pytest.raises(InvalidArgument) as refused:
                await blob.stat()
            assert refused.value.code == "invalid.not_a_file"
        await at_b.blob.get(put.cid, tmp_path / "copy")

    def files(root: Path) -> dict[str, object]:
        return {
            str(path.relative_to(root)): os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
            for path in root.rglob("*")
        }

    assert files(tmp_path / "copy") == files(tree)


async def test_what_nobody_has(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    cid = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"
    async with wetware.connect(a.addr, key=a.home.key()) as session:
        began = time.monotonic()
        async with session.blob.open(cid, local=True) as blob:
            with pytest.raises(NotFound):
                await blob.stat()
        assert time.monotonic() - began < 2, "nobody else was asked"
        async with session.blob.open(cid) as blob:
            with pytest.raises(NotFound) as missing:
                await blob.stat()
        assert missing.value.code == "not_found.blob"


async def test_a_share_of_one_blob_reaches_no_other(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair
    async with wetware.connect(a.addr, key=a.home.key()) as session:
        mine = await session.blob.put(b"a" * 100)
        other = await session.blob.put(b"b" * 100)
        nobodys = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"
        ref, _ = await session.share({f"blob:{mine.cid}": []})
        ranged, _ = await session.share(
            {f"blob:{mine.cid}": ["Blob.read", "ByteStream.*"]},
            ["start=range:0..10", "end=range:0..10"],
        )
        async with wetware.connect(ref) as stranger:
            async with stranger.blob.open(mine.cid) as blob:
                assert await blob.read() == b"a" * 100
            denials = []
            for cid in (other.cid, nobodys):
                with pytest.raises(Denied) as denied:
                    await stranger.blob.open(cid).__aenter__()
                denials.append(denied.value.code)
            assert denials[0] == denials[1], "whether somebody has it is not to be learned"
            for beyond in (stranger.blob.pins(), stranger.blob.put(b"x"), stranger.blob.gc()):
                with pytest.raises(Denied):
                    await beyond
        async with wetware.connect(ranged) as stranger, stranger.blob.open(mine.cid) as blob:
            assert await blob.read(0, 10) == b"a" * 10
            for start, end in ((0, 11), (11, 12)):
                with pytest.raises(Denied):
                    await blob.read(start, end)
            for beyond in (blob.stat(), blob.info(), blob.car(), blob.tree()):
                with pytest.raises(Denied):
                    await beyond


@pytest.mark.parametrize("limits", [["end=max:10"], ["start=range:5..10"]])
async def test_a_range_binds_whatever_gives_bytes(
    pair: tuple[NodeProcess, NodeProcess], limits: list[str]
) -> None:
    a, _ = pair
    async with wetware.connect(a.addr, key=a.home.key()) as session:
        mine = await session.blob.put(b"a" * 100)
        ref, _ = await session.share({f"blob:{mine.cid}": []}, limits)
        async with wetware.connect(ref) as stranger, stranger.blob.open(mine.cid) as blob:
            assert await blob.read(5, 10) == b"a" * 5
            for beyond in (blob.car(), blob.tree(), blob.read()):
                with pytest.raises(Denied):
                    await beyond
            for method in ("car", "tree"):  # a part of either is not the part of the file
                with pytest.raises(InvalidArgument):
                    await blob.ref.call(method, start=5, end=10)


async def test_a_revoked_share_ends_what_is_being_read(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, _ = pair
    async with wetware.connect(a.addr, key=a.home.key()) as session:
        put = await session.blob.put(os.urandom(8 * MIB))
        ref, grant = await session.share({f"blob:{put.cid}": []})
        async with wetware.connect(ref) as stranger, stranger.blob.open(put.cid) as blob:
            stream = await blob.stream()
            await stream.receive()
            await session.revoke(grant.id)

            async def drain() -> None:
                while True:
                    await stream.receive()

            with pytest.raises(Revoked):
                await asyncio.wait_for(drain(), 60)


async def test_what_is_refused_leaves_nothing(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    async with wetware.connect(a.addr, key=a.home.key()) as session:
        before = await session.blob.usage()

        async def half() -> None:
            with pytest.raises(WetwareError):
                await session.blob.put(b"x", name="n" * 256)
            with pytest.raises(InvalidArgument):
                await session.blob.put(b"x", profile="no-such-profile")
            with pytest.raises(WetwareError):
                await session.blob.put(b"no car at all", car=True)

        await half()
        assert await session.blob.usage() == before


async def test_rm_says_what_still_keeps_it(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, _ = pair
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(100_000))
    async with wetware.connect(a.addr, key=a.home.key()) as session:
        whole = await session.blob.put(tree, name="whole")
        one = await session.blob.put(tree / "file", name="one")
        removed = await session.blob.rm(one.cid)
        assert removed.pins == 1
        assert [pin.name for pin in removed.pinned_by] == ["whole"]
        removed = await session.blob.rm(whole.cid)
        assert not removed.pinned_by
        assert removed.freed_bytes > 100_000
        async with session.blob.open(one.cid, local=True) as blob:
            with pytest.raises(NotFound):
                await blob.stat()
