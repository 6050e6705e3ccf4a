"""What is built is read as it was: files, ranges of them, directories, HAMTs and symlinks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.errors import InvalidArgument, NotFound
from wetware_blob.format.build import (
    PROFILES,
    V0_2015,
    V1_2025,
    Entry,
    Profile,
    directory,
    symlink,
)
from wetware_blob.format.cid import Cid
from wetware_blob.format.read import PATH_BYTES_MAX, entries, read, resolve, stat, walk
from wetware_blob.names import TARGET_BYTES_MAX

from .trees import TINY, Blocks, collected, run, unhurried

pytestmark = pytest.mark.anyio

profiles = st.sampled_from(TINY)
names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20
).filter(lambda name: name not in (".", ".."))


@unhurried
@given(st.binary(max_size=700), profiles, st.data())
def test_any_range_of_a_file_is_that_of_its_bytes(
    content: bytes, profile: Profile, data: st.DataObject
) -> None:
    blocks = Blocks()
    root = blocks.file(content, profile)
    assert root.size == len(content)
    start = data.draw(st.integers(0, len(content) + 9))
    end = data.draw(st.none() | st.integers(start, len(content) + 20))

    pieces = run(collected(read(root.cid, start, end, blocks.get, blocks.ahead)))
    assert b"".join(pieces) == content[start:end]
    assert all(pieces)
    found = run(stat(root.cid, blocks.get))
    assert (found.kind, found.size, found.tsize) == ("file", len(content), root.tsize)


def test_a_range_reads_the_blocks_that_it_needs_and_says_which_come_next() -> None:
    profile = TINY[0]
    blocks = Blocks()
    content = bytes(range(250))  # 32 leaves, 4 levels above them
    root = blocks.file(content, profile)
    assert run(collected(read(root.cid, 100, 103, blocks.get, blocks.ahead))) == [b"def"]
    assert len(blocks.asked) == 5
    assert set(blocks.ahead_of) == set(blocks.asked) - {root.cid}

    blocks.asked.clear()
    blocks.ahead_of.clear()
    run(collected(read(root.cid, 0, None, blocks.get, blocks.ahead)))
    assert set(blocks.asked) == set(blocks.data)
    assert set(blocks.ahead_of) == set(blocks.data) - {root.cid}
    assert set(blocks.asked.values()) == {1}


def test_every_number_of_leaves_gives_a_tree_of_the_least_depth() -> None:
    profile = replace(TINY[0], chunk_bytes=1)
    for count in range(1, 90):
        blocks = Blocks()
        root = blocks.file(bytes(range(count)), profile)
        depth, leaves = 0, 1
        while leaves < count:
            depth, leaves = depth + 1, leaves * 3
        run(collected(read(root.cid, count - 1, None, blocks.get)))
        assert len(blocks.asked) == depth + 1
        assert len(run(collected(walk(root.cid, blocks.get)))) == len(blocks.data)


async def test_a_file_that_repeats_itself_has_each_block_once() -> None:
    blocks = Blocks()
    root = blocks.file(bytes(8 * 27), TINY[0])
    assert len(blocks.data) == 4  # a leaf, and one block of each level
    walked = await collected(walk(root.cid, blocks.get))
    assert {block.cid: block.data for block in walked} == blocks.data
    assert walked[0].cid == root.cid
    lengths = map(len, blocks.data.values())
    assert root.tsize == sum(n * each for n, each in zip((27, 9, 3, 1), lengths, strict=True))


@unhurried
@given(st.sets(names, max_size=60), profiles)
def test_a_directory_has_the_entries_that_it_was_given(wanted: set[str], profile: Profile) -> None:
    blocks = Blocks()
    given_ = {name: Entry(name, blocks.raw(name.encode()), len(name.encode())) for name in wanted}
    root = blocks.directory(given_.values(), profile)
    found = run(collected(entries(root.cid, blocks.get)))
    assert {entry.name: entry for entry in found} == given_
    assert len(found) == len(given_)
    for name in wanted:
        assert run(resolve(root.cid, f"/{name}", blocks.get)) == given_[name].cid
    with pytest.raises(NotFound):
        run(resolve(root.cid, "not there, as it is longer than the others", blocks.get))
    found = run(stat(root.cid, blocks.get))
    assert (found.kind, found.size, found.tsize) == ("directory", 0, root.tsize)


@unhurried
@given(st.sets(names, min_size=1, max_size=40), profiles, st.randoms())
def test_the_order_in_which_entries_come_makes_no_difference(
    wanted: set[str], profile: Profile, random: st.DataObject
) -> None:
    blocks = Blocks()
    given_ = [Entry(name, blocks.raw(b""), 0) for name in wanted]
    first = directory(given_, profile)
    random.shuffle(given_)
    assert directory(given_, profile) == first


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: p.name)
async def test_a_directory_at_its_threshold_is_one_block_and_a_hamt_beyond(
    profile: Profile,
) -> None:
    blocks = Blocks()
    cid = blocks.raw(b"")
    some = [Entry(f"{n:03}", cid, 0) for n in range(100)]
    (block,) = directory(some, profile)[1]
    exact = len(block.data) if profile is V1_2025 else 100 * (3 + 36)
    assert len(directory(some, replace(profile, threshold_bytes=exact))[1]) == 1
    root, parts = directory(some, replace(profile, threshold_bytes=exact - 1))
    assert len(parts) > 1
    assert root.cid.version == profile.cid_version
    blocks.add(parts)
    found = await collected(entries(root.cid, blocks.get, blocks.ahead))
    assert sorted(entry.name for entry in found) == [entry.name for entry in some]
    assert set(blocks.asked) == {part.cid for part in parts}
    assert set(blocks.ahead_of) == set(blocks.asked) - {root.cid}


@pytest.mark.parametrize("fanout", [8, 16, 32, 512, 1024])
async def test_a_hamt_of_another_fan_out_is_read(fanout: int) -> None:
    blocks = Blocks()
    profile = replace(V1_2025, threshold_bytes=0, fanout=fanout)
    some = [Entry(str(n), blocks.raw(b"%d" % n), 2) for n in range(300)]
    root = blocks.directory(some, profile)
    assert {e.name: e for e in await collected(entries(root.cid, blocks.get))} == {
        e.name: e for e in some
    }
    for entry in some[:20]:
        assert await resolve(root.cid, entry.name, blocks.get) == entry.cid


async def test_a_path_leads_through_directories_and_hamts() -> None:
    blocks = Blocks()
    file = blocks.file(b"hello", TINY[0])
    tree = Entry("leaf", file.cid, file.tsize)
    for name in ("c", "b", "a"):
        others = [Entry(f"other {n}", file.cid, 0) for n in range(20 if name == "b" else 0)]
        root = blocks.directory([tree, *others], TINY[0])
        tree = Entry(name, root.cid, root.tsize)
    for path in ("b/c/leaf", "/b/c/leaf", "//b//c/leaf/"):
        assert await resolve(root.cid, path, blocks.get) == file.cid
    assert await resolve(root.cid, "", blocks.get) == root.cid
    for path in ("c", "b/c/leaf/x", "b/../b", ".", "b/c/lea", "other 1", "\ud800"):
        with pytest.raises(NotFound, match="no '"):
            await resolve(root.cid, path, blocks.get)
    with pytest.raises(InvalidArgument, match="path of more"):
        await resolve(root.cid, "a/" * PATH_BYTES_MAX, blocks.get)


async def test_a_symlink() -> None:
    blocks = Blocks()
    root, block = symlink(b"../\xff", V1_2025)
    blocks.add([block])
    found = await stat(root.cid, blocks.get)
    assert (found.kind, found.tsize, found.data) == ("symlink", len(block.data), b"../\xff")
    assert symlink(b"foo", V0_2015)[1].data == b"\x0a\x07\x08\x04\x12\x03foo"
    for target in (b"", b"a\0b", bytes(TARGET_BYTES_MAX + 1)):
        with pytest.raises(InvalidArgument, match="symbolic link"):
            symlink(target, V1_2025)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256, "\N{SNOWMAN}" * 86])
def test_a_name_that_no_file_has_is_not_built(name: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be the name"):
        directory([Entry(name, Cid(1, 0x55, bytes(32)), 0)], V1_2025)


def test_a_name_that_is_not_text_or_that_is_there_twice_is_not_built() -> None:
    cid = Cid(1, 0x55, bytes(32))
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        directory([Entry("\udcff", cid, 0)], V1_2025)
    with pytest.raises(InvalidArgument, match="two entries 'a'"):
        directory([Entry("a", cid, 0), Entry("a", cid, 1)], V1_2025)


async def test_what_is_no_file_is_not_read_and_no_directory_not_listed() -> None:
    blocks = Blocks()
    root = blocks.directory([], V1_2025)
    file = blocks.file(b"x", V1_2025)
    with pytest.raises(InvalidArgument, match="is a directory, not a file"):
        await collected(read(root.cid, 0, None, blocks.get))
    with pytest.raises(InvalidArgument, match="is a file, not a directory"):
        await collected(entries(file.cid, blocks.get))
    for start, end in ((-1, 2), (2, 1), (0, -1)):
        with pytest.raises(InvalidArgument, match="no range"):
            await collected(read(file.cid, start, end, blocks.get))
