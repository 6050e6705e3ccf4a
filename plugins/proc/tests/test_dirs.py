"""Directories that programs read: hostile archives, what is kept for whom, and who may write."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import io
import json
import os
import socket
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from wetware import rpc
from wetware.errors import InvalidArgument, LimitExceeded
from wetware.testing import Home
from wetware_proc import archive, dirs
from wetware_proc.archive import ArchiveRefused, measure, pack, unpack

if TYPE_CHECKING:
    from plugins.proc.tests.conftest import Run

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]  # the first builds the C library
MIB = 1 << 20

Entry = tuple[str, dict[str, Any], bytes]
"""Name, fields of the header, content."""


def tar(*entries: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=form) as made:
        for name, fields, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            made.addfile(info, io.BytesIO(content))
    return file.getvalue()


def a_file(name: str, content: bytes = b"x") -> Entry:
    return name, {}, content


def a_directory(name: str) -> Entry:
    return name, {"type": tarfile.DIRTYPE}, b""


def a_link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Entry:
    return name, {"type": kind, "linkname": target}, b""


def header(**fields: bytes) -> bytes:
    """Of a file "f", with some of its 512 bytes as they are given, by `at_OFFSET`."""
    data = bytearray(tar(a_file("f", b"")))[:512]
    for at, value in fields.items():
        start = int(at.removeprefix("at_"))
        data[start : start + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


def pax(*records: tuple[str, str], kind: bytes = b"x") -> bytes:
    """An extended header, with records that nobody has judged."""
    text = b""
    for key, value in records:
        body = f" {key}={value}\n".encode()
        length = len(body) + len(str(len(body)))
        length = len(body) + len(str(length))
        text += str(length).encode() + body
    size = b"%011o\0" % len(text)
    return header(at_124=size, at_156=kind) + text + bytes(-len(text) % 512)


END = bytes(1024)
HOSTILE: dict[str, bytes] = {
    "above": tar(a_file("../f")),
    "above in the middle": tar(a_directory("a"), a_file("a/../../f")),
    "absolute": tar(a_file("/etc/f")),
    "an empty part": tar(a_directory("a"), a_file("a//f")),
    "a name of NULs": pax(("path", "a\0b")) + header() + END,
    "a long name": tar(a_file("n" * 256)),
    "a deep one": tar(*(a_directory("/".join("d" * n)) for n in range(1, 140))),
    "twice": tar(a_file("f"), a_file("f", b"other")),
    "a directory twice": tar(a_directory("d"), a_directory("d")),
    "a file as a directory": tar(a_file("f"), a_file("f/g")),
    "without its directory": tar(a_file("d/f")),
    "a link out": tar(a_link("l", "../f")),
    "a link out from below": tar(a_directory("d"), a_link("d/l", "../../f")),
    "an absolute link": tar(a_link("l", "/etc/passwd")),
    "a link through a link": tar(a_link("l", "."), a_link("m", "l/../..")),
    "a link up through a link": tar(a_directory("d"), a_link("l", "d"), a_link("m", "l/..")),
    "written through a link": tar(a_link("l", "d"), a_directory("d"), a_file("l/f")),
    "a link in a file's place": tar(a_file("f"), a_link("f", "g")),
    "a hard link": tar(a_file("f"), a_link("g", "f", tarfile.LNKTYPE)),
    "a character device": tar(("d", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, b"")),
    "a block device": tar(("d", {"type": tarfile.BLKTYPE, "devmajor": 8}, b"")),
    "a FIFO": tar(("p", {"type": tarfile.FIFOTYPE}, b"")),
    "of an unknown type": header(at_156=b"Z") + END,
    "sparse, as GNU has it": header(at_156=b"S", at_257=b"ustar  \0") + END,
    "sparse, as PAX has it": pax(("GNU.sparse.map", "0,1"), ("GNU.sparse.size", "99"))
    + header()
    + END,
    "sparse, in very many pieces": pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"))
    + header(at_124=b"%011o\0" % MIB)
    + b"99999999\n"
    + b"1\n" * (MIB // 2)
    + END,
    "sparse, in very many headers": header(at_156=b"S", at_257=b"ustar  \0", at_482=b"\1")
    + (b"00000000001\0" * 42 + b"\1" + bytes(7)) * 2000
    + END,
    "truncated in a header": tar(a_file("f"))[:300],
    "truncated in a file": tar(a_file("f", bytes(4096)))[:2048],
    "truncated behind a file": tar(a_file("f", bytes(512)))[:1024],
    "larger than it is": header(at_124=b"%011o\0" % MIB) + END,
    "of a negative size": header(at_124=b"\xff" * 12) + END,
    "back to its beginning": pax(("size", "-1536")) + header() + END,
    "a header of a mebibyte": pax(("comment", "c" * MIB)) + header() + END,
    "a header of all memory": header(at_156=b"x", at_124=b"%011o\0" % (400 * MIB)) + END,
    "a GNU name of all memory": header(at_156=b"L", at_124=b"%011o\0" % (400 * MIB)) + END,
    "headers of headers": pax(("a", "b")) * 5000 + header() + END,
    "a damaged header": tar(a_file("f"))[:1024] + b"\1" * 512 + END,
    "no archive": b"#!/bin/sh\n" * 100,
    "nothing": b"",
    "gzip": gzip.compress(tar(a_file("f"))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused(name: str, tmp_path: Path) -> None:
    content = tmp_path / "above" / "content"
    content.mkdir(parents=True)
    with pytest.raises(ArchiveRefused):
        unpack(io.BytesIO(HOSTILE[name]), content)
    with contextlib.suppress(ArchiveRefused):  # what is there twice it does not find
        measure(io.BytesIO(HOSTILE[name]))
    assert [each.name for each in tmp_path.iterdir()] == ["above"]
    assert [each.name for each in (tmp_path / "above").iterdir()] == ["content"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("back to its beginning", "its own beginning"),
        ("a header of a mebibyte", "more than 65536 bytes"),
        ("a header of all memory", "more than 65536 bytes"),
        ("a GNU name of all memory", "more than 65536 bytes"),
        ("headers of headers", "more than 65536 bytes"),
        ("sparse, in very many pieces", "more than 65536 bytes"),
        ("sparse, in very many headers", "more than 65536 bytes"),
    ],
)
def test_it_is_refused_before_it_takes_memory_or_time(name: str, why: str) -> None:
    with pytest.raises(ArchiveRefused, match=why):
        measure(io.BytesIO(HOSTILE[name]))


@pytest.mark.parametrize("what", ["entries", "bytes"])
def test_a_bomb_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "ENTRIES_MAX", 8)
    monkeypatch.setattr(archive, "ARCHIVE_BYTES_MAX", MIB)
    bomb = {
        "entries": tar(*(a_file(str(n), b"") for n in range(9))),
        "bytes": tar(a_file("f", bytes(2 * MIB))),
    }
    with pytest.raises(ArchiveRefused, match="entries, or is too large"):
        unpack(io.BytesIO(bomb[what]), tmp_path)
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) == 0


def test_what_was_packed_is_unpacked_and_read_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d" / ("n" * 200) / ("m" * 200)).mkdir(parents=True)
    (root / "d" / ("n" * 200) / ("m" * 200) / "ä").write_text("deep")
    (root / "run").write_bytes(b"#!/bin/sh\n")
    (root / "run").chmod(0o755)
    (root / "d" / "up").symlink_to("../run")
    (root / "large").write_bytes(os.urandom(3 * MIB + 1))
    packed = [io.BytesIO(), io.BytesIO()]
    for file in packed:
        pack(root, file)
        os.utime(root / "run", (1, 1))
    assert packed[0].getvalue() == packed[1].getvalue(), "times are none of its content"
    target = tmp_path / "target"
    target.mkdir()
    packed[0].seek(0)
    assert 3 * MIB < measure(packed[0]) < 4 * MIB
    umask = os.umask(0o077)  # as a node may have it
    try:
        unpack(packed[0], target)
    finally:
        os.umask(umask)
    found = {str(each.relative_to(target)) for each in target.rglob("*")}
    assert found == {str(each.relative_to(root)) for each in root.rglob("*")}
    assert (target / "large").read_bytes() == (root / "large").read_bytes()
    assert (target / "d" / "up").read_bytes() == b"#!/bin/sh\n"
    assert target.stat().st_mode & 0o777 == (target / "d").stat().st_mode & 0o777 == 0o755
    assert (target / "run").stat().st_mode & 0o777 == 0o555
    assert (target / "large").stat().st_mode & 0o777 == 0o444


def test_what_would_not_be_unpacked_is_not_packed(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(InvalidArgument) as refusal:
            pack(tmp_path, io.BytesIO())
        for path in tmp_path.iterdir():
            path.unlink()
        return refusal.value.code

    (tmp_path / "out").symlink_to("/etc/passwd")
    assert refused() == "invalid.archive"
    os.mkfifo(tmp_path / "pipe")
    assert refused() == "invalid.special_file"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        assert refused() == "invalid.special_file"
    (tmp_path / os.fsdecode(b"\xff")).touch()
    assert refused() == "invalid.archive"
    with pytest.raises(InvalidArgument, match="No such file"):
        pack(tmp_path / "nothing", io.BytesIO())


# --- what a node keeps ----------------------------------------------------------------------------


class Bytes(rpc.Servant, interface=rpc.WW.Source):
    """A source that counts how often it is read, and may lie about its size."""

    def __init__(self, data: bytes, more: int = 0) -> None:
        self._data, self._more, self.reads = data, more, 0

    async def stat(self) -> dict[str, Any]:
        return {"size": len(self._data) + self._more}

    async def read(self, start: int, end: int) -> dict[str, Any]:
        self.reads += 1
        stream = rpc.ByteStream()

        async def send() -> None:
            await stream.send(self._data)
            await stream.send_eof()

        self._task = asyncio.ensure_future(send())
        return {"stream": stream.servant}


class Held(NamedTuple):
    path: Path
    close: Callable[[], None]


class Node:
    """The directories of a node, and sources that users give."""

    def __init__(self, kept: dirs.Dirs, socket: Path, where: Path) -> None:
        self.kept, self._socket, self._where = kept, socket, where

    async def hold(self, owner: str, source: Bytes, hash_: str = "") -> Held:
        async with (
            rpc.serve_unix(self._socket, lambda peer: source),
            await rpc.connect_unix(self._socket) as connection,
        ):
            ref = connection.bootstrap(rpc.WW.Source)
            given = [{"path": "/data", "tree": ref, "hash": hash_}]
            with contextlib.ExitStack() as place:
                path = (await self.kept.hold(owner, given, place))["/data"]
                return Held(path, place.pop_all().close)

    def here(self) -> set[str]:
        return {each.name for each in self._where.iterdir()}


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    where = tmp_path / "dirs"
    (where / "left").mkdir(parents=True)
    (where / "left" / "file").touch()
    kept = dirs.Dirs(where, 4 * MIB)
    await kept.begin(())
    async with rpc.runtime():
        yield Node(kept, tmp_path / "socket", where)


async def test_it_is_unpacked_once_and_for_those_who_have_it(node: Node) -> None:
    assert node.here() == set(), "what an earlier process left is gone"
    data = tar(a_file("x", b"content"))
    hash_ = hashlib.sha256(data).hexdigest()
    first, again, other = Bytes(data), Bytes(data), Bytes(data)
    held = await node.hold("ada", first)
    assert (held.path.name, (held.path / "x").read_bytes()) == (hash_, b"content")
    assert (await node.hold("ada", again, hash_)).path == held.path
    assert again.reads == 0
    assert (await node.hold("bob", other, hash_)).path == held.path
    assert other.reads == 1, "a hash is no permission"
    with pytest.raises(InvalidArgument, match="without its archive"):
        await node.kept.hold(
            "eve", [{"path": "/", "tree": None, "hash": hash_}], contextlib.ExitStack()
        )
    assert node.here() == {hash_}


async def test_what_nobody_uses_makes_room(node: Node) -> None:
    def source(letter: bytes) -> Bytes:
        return Bytes(tar(a_file("x", letter * MIB)))

    first, second = await node.hold("ada", source(b"a")), await node.hold("bob", source(b"b"))
    first.close()
    first.close()
    third = await node.hold("ada", source(b"c"))
    assert node.here() == {second.path.name, third.path.name}
    with pytest.raises(LimitExceeded, match="dirs_bytes_max"):
        await node.hold("cem", source(b"d"))
    assert node.here() == {second.path.name, third.path.name}
    second.close()
    third.close()
    kept = await node.hold("ada", source(b"e"))
    with pytest.raises(LimitExceeded, match="half of dirs_bytes_max"):
        await node.hold("ada", source(b"e"))
    kept.close()
    assert not node.kept.held


async def test_a_start_of_the_node_keeps_what_it_is_told_and_nothing_else(
    node: Node, tmp_path: Path
) -> None:
    data = tar(a_file("x", b"kept"))
    kept = await node.hold("ada", Bytes(data))
    await node.hold("ada", Bytes(tar(a_file("x", b"other"))))
    hash_ = kept.path.name
    again = dirs.Dirs(tmp_path / "dirs", 4 * MIB)
    await again.begin({hash_, "0" * 64})
    assert node.here() == {hash_}
    place = contextlib.ExitStack()
    assert again.kept("ada", {"/data": hash_, "/gone": "0" * 64}, place) == {"/data": kept.path}
    assert again.held == {"ada": measure(io.BytesIO(data))}, "as when it was unpacked"
    other = Node(again, tmp_path / "socket", tmp_path / "dirs")
    source = Bytes(data)
    assert (await other.hold("bob", source)).path == kept.path
    assert source.reads == 1, "a hash is no permission after a restart either"
    (await other.hold("bob", Bytes(tar(a_file("x", bytes(MIB)))))).close()
    (await other.hold("bob", Bytes(tar(a_file("y", bytes(MIB)))))).close()
    (await other.hold("bob", Bytes(tar(a_file("z", bytes(MIB)))))).close()
    assert hash_ in node.here(), "what is held makes no room"


async def test_what_is_refused_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tar(a_file("x"))
    for source in (Bytes(tar(a_file("a"), a_file("../x"))), Bytes(good, 1), Bytes(good, -1)):
        with pytest.raises(InvalidArgument):
            await node.hold("ada", source)
    with pytest.raises(LimitExceeded, match="at most"):
        await node.hold("ada", Bytes(good, archive.ARCHIVE_BYTES_MAX))
    with pytest.raises(InvalidArgument, match="paths of their own"):
        await node.kept.hold(
            "ada", [{"path": "/a", "tree": None, "hash": ""}] * 2, contextlib.ExitStack()
        )
    monkeypatch.setattr(dirs, "READ_S", 0.05)

    asked = asyncio.Event()

    class Silent(Bytes):
        async def read(self, start: int, end: int) -> dict[str, Any]:
            self.stream = rpc.ByteStream()
            asked.set()
            return {"stream": self.stream.servant}

    with pytest.raises(LimitExceeded, match="has not given"):
        await node.hold("ada", Silent(good))
    assert node.here() == set()
    monkeypatch.undo()
    asked.clear()
    holding = asyncio.ensure_future(node.hold("ada", Silent(good)))
    async with asyncio.timeout(60):
        await asked.wait()
    assert node.here()
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert node.here() == set()
    assert not node.kept.held
    for n in range(3):  # of the bytes that were reserved none is lost
        (await node.hold("ada", Bytes(tar(a_file(str(n), bytes(MIB)))))).close()


# --- what a program sees --------------------------------------------------------------------------

READ_ONLY = {
    "write": "Read-only file system",
    "append": "Read-only file system",
    "truncate": "Read-only file system",
    "unlink": "Read-only file system",
    "create": "Read-only file system",
    "mkdir": "Read-only file system",
    "symlink": "Read-only file system",
    "read link": "ok",
    "write link": "Read-only file system",
}


def told(text: str) -> dict[str, str]:
    return dict(line.split(": ") for line in text.splitlines()[1:])


async def test_a_guest_reads_and_cannot_change_it(run: Run, tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.mkdir()
    unpack(io.BytesIO(tar(a_file("x", b"of ada\n"), a_link("link", "x"))), content)
    await run("data", "/data", dirs={"/data": (content, False)})
    assert run.lines[0] == "of ada"
    found = told(run.out.decode())
    assert {"above", "passwd"} == {how for how, what in found.items() if how not in READ_ONLY}
    assert found["above"] != "ok"
    assert found["passwd"] != "ok"
    assert {how: found[how] for how in READ_ONLY} == READ_ONLY
    assert {each.name for each in content.iterdir()} == {"x", "link"}
    assert (content / "x").read_bytes() == b"of ada\n"


def test_a_directory_and_a_blob_on_the_command_line(
    tmp_path: Path, guests: Callable[[str], bytes]
) -> None:
    program, content = tmp_path / "data.wasm", tmp_path / "content"
    program.write_bytes(guests("data"))
    content.mkdir()
    (content / "x").write_text("of ada\n")
    (content / "link").symlink_to("x")
    with Home(tmp_path / "home", libp2p=False) as home, home.node() as node:
        given = node.ww("run", "--dir", f"/data={content}", str(program), "/data", check=True)
        assert given.stdout.startswith("of ada\n")
        assert told(given.stdout)["write"] == "Read-only file system"
        cid = node.ww("blob", "put", "--name", "mine", str(content), check=True).stdout.split()[0]
        for what in (cid, "mine"):
            of_blob = node.ww("run", "--dir", f"/={what}", str(program), "/", check=True)
            assert of_blob.stdout.startswith("of ada\n")
        ended = json.loads(node.ww("ps", "--json", check=True).stdout)["processes"]
        hashes = {each["dirs"][0]["hash"] for each in ended}
        assert [each["dirs"][0]["path"] for each in ended] == ["/", "/", "/data"]
        assert len(hashes) == 1, "the same content is the same directory"
        (content / "out").symlink_to("/etc/passwd")
        refused = node.ww("run", "--dir", f"/data={content}", str(program), "/data")
        assert (refused.returncode, "may lead out" in refused.stderr) == (2, True), refused.stderr
        missing = node.ww("run", "--dir", "/data=nothing", str(program), "/data")
        assert missing.returncode == 2
        assert "Traceback" not in missing.stderr
        refused = node.ww("run", "--detach", "--dir", f"d={cid}", str(program), "d")
        assert (refused.returncode, "path is absolute" in refused.stderr) == (2, True)
