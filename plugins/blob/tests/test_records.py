"""The form `tree`: what is written is read again, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.errors import InvalidArgument
from wetware_blob import records
from wetware_blob.names import NAME_BYTES_MAX, TARGET_BYTES_MAX
from wetware_blob.records import DEPTH_MAX, PIECE_BYTES_MAX, Reader, Writer

from .memory import Bytes, Tree, write


async def read(
    data: bytes, most: int = 1 << 20, names: Iterable[str] = ()
) -> list[tuple[str, str, bytes]]:
    reader, found = Reader(Bytes(data, most), names=names), []
    while (record := await reader.record()) is not None:
        content = record.target
        while piece := await reader.piece():
            content += piece
        found.append((record.kind, record.name, content))
    assert await reader.record() is None
    return found


def written(tree: Tree, skip: int = 0) -> bytes:
    stream = Bytes()
    asyncio.run(write(Writer(stream, skip=skip), "", tree))
    return bytes(stream.data)


def flat(name: str, tree: Tree) -> list[tuple[str, str, bytes]]:
    if isinstance(tree, bytes):
        return [("file", name, tree)]
    if isinstance(tree, str):
        return [("symlink", name, tree.encode())]
    below = [record for each in tree.items() for record in flat(*each)]
    return [("directory", name, b""), *below, ("end", "", b"")]


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=9)
names = names.filter(lambda name: name not in (".", ".."))
leaves = st.binary(max_size=40) | names
trees = st.recursive(leaves, lambda below: st.dictionaries(names, below, max_size=4))


@given(trees, st.integers(1, 50))
def test_what_is_written_is_read(tree: Tree, most: int) -> None:
    assert asyncio.run(read(written(tree), most)) == flat("", tree)


@given(trees, st.data())
def test_who_has_some_records_goes_on_behind_them(tree: Tree, data: st.DataObject) -> None:
    expected = flat("", tree)
    skip = data.draw(st.integers(0, len(expected) - 1))
    names: list[str] = []
    for kind, name, _ in expected[:skip]:
        if kind == "directory":
            names.append(name)
        elif kind == "end":
            names.pop()
    assert asyncio.run(read(written(tree, skip), names=names)) == expected[skip:]


@given(trees, st.data())
def test_a_part_is_never_taken_for_the_whole(tree: Tree, data: st.DataObject) -> None:
    whole = written(tree)
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(InvalidArgument, match="ends before its end"):
        asyncio.run(read(whole[:end]))


def test_long_files_travel_in_pieces() -> None:
    content = bytes(range(256)) * 9000
    data = written({"a": content})
    assert asyncio.run(read(data)) == flat("", {"a": content})
    pieces = -(-len(content) // PIECE_BYTES_MAX)
    assert len(data) == 3 + 4 + len(content) + 4 * (pieces + 1) + 3


def test_what_was_not_read_of_a_file_is_skipped() -> None:
    data = written({"a": b"x" * 3000, "b": "a"})

    async def main() -> None:
        reader = Reader(Bytes(data, most=100))
        assert [(await reader.record()) for _ in range(2)][1] == records.Record("file", "a")
        assert len(await reader.piece()) <= 100
        assert await reader.record() == records.Record("symlink", "b", b"a")
        assert await reader.record() == records.Record("end")
        assert await reader.record() is None

    asyncio.run(main())


def name(kind: bytes, text: bytes) -> bytes:
    return kind + len(text).to_bytes(2) + text


D, E = name(b"D", b""), name(b"E", b"")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ends before"),
        (b"X\0\0", "no record of the kind 88"),
        (E, "did not begin"),
        (D + E + b"\0", "behind its end"),
        (name(b"F", b"") + bytes(4) + D, "behind its end"),
        (name(b"D", b"a") + E, "first record has a name"),
        (D + name(b"E", b"a"), "its end has a name"),
        (D + name(b"F", b"\xff") + bytes(4) + E, "not UTF-8"),
        (D + name(b"F", b"\xed\xa0\x80") + bytes(4) + E, "not UTF-8"),
        (name(b"F", b"") + (PIECE_BYTES_MAX + 1).to_bytes(4), "1048577 bytes"),
        (D * 1 + name(b"D", b"a") * DEPTH_MAX, f"more than {DEPTH_MAX} directories"),
    ],
)
def test_malformed_trees_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as refused:
        asyncio.run(read(data))
    assert refused.value.code == "invalid.tree"


LONG = "x" * (TARGET_BYTES_MAX + 1)


@pytest.mark.parametrize("bad", ["", "a\0b", LONG, "/", "..", "a/../b"])
def test_links_that_are_none_or_lead_out_are_refused(bad: str) -> None:
    link = name(b"L", b"l\n") + len(bad).to_bytes(4) + bad.encode() + bytes(4) * bool(bad)
    tree: Tree = {"l\n": bad}
    for refusing in (lambda: asyncio.run(read(D + link + E)), lambda: written(tree)):
        with pytest.raises(InvalidArgument, match="symbolic link") as refused:
            refusing()
        assert refused.value.code == "invalid.link"
        assert refused.value.message.isprintable()
    assert written({"d": {"l": "../a"}})
    with pytest.raises(InvalidArgument, match=r"d/l is a symbolic link to \.\./\.\./a"):
        written({"d": {"l": "../../a"}})


@pytest.mark.parametrize(
    "bad",
    ["", ".", "..", "/", "/etc/passwd", "a/b", "../x", "a\0b", "ß" * (NAME_BYTES_MAX // 2 + 1)],
)
@pytest.mark.parametrize("kind", [b"D", b"F", b"L"])
def test_names_that_lead_elsewhere_are_refused_by_name(kind: bytes, bad: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be the name of a file") as refused:
        asyncio.run(read(D + name(kind, bad.encode()) + bytes(64)))
    assert repr(bad) in refused.value.message
    assert refused.value.code == "invalid.name"
    with pytest.raises(InvalidArgument, match="cannot be the name of a file"):
        written({bad: b""})


def test_the_writer_refuses_what_the_reader_would() -> None:
    deep: Tree = b""
    for _ in range(DEPTH_MAX):
        deep = {"a": deep}
    assert len(asyncio.run(read(written(deep)))) == 2 * DEPTH_MAX + 1
    for tree in ({"a": deep}, {"a": "x" * (TARGET_BYTES_MAX + 1)}, {"\udc80": b""}, {"a": "\0"}):
        with pytest.raises(InvalidArgument):
            written(tree)

    async def torn() -> None:
        writer = Writer(Bytes())
        await writer.record("file")
        await writer.record("end")

    with pytest.raises(RuntimeError, match="has not ended"):
        asyncio.run(torn())
