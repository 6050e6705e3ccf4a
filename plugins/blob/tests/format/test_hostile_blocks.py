"""Blocks whose hash is right and that lie: refused, or no dearer than what is asked of them."""

from __future__ import annotations

import struct
import time

import pytest

from wetware.errors import InvalidArgument
from wetware_blob.format.build import V1_2025, Entry, directory
from wetware_blob.format.cid import BadBlock, Cid
from wetware_blob.format.dagpb import Link
from wetware_blob.format.read import (
    DEPTH_MAX,
    children,
    entries,
    read,
    resolve,
    stat,
    walk,
)
from wetware_blob.format.unixfs import Type, UnixFs, name_hash

from .trees import Blocks, collected

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


# --- claims ---


async def all_of(blocks: Blocks, root: Cid, got: list[object]) -> None:
    """Read all that a tree has; `got` has what came before an error."""
    is_directory = (await stat(root, blocks.get)).kind == "directory"
    found = entries(root, blocks.get) if is_directory else read(root, 0, None, blocks.get)
    async for each in found:
        got.append(each)  # noqa: PERF401  # it keeps what came


async def refused(blocks: Blocks, root: Cid, why: str, before: list[object] | None = None) -> None:
    """Reading all that the tree has fails, after what is expected `before`."""
    got: list[object] = []
    with pytest.raises(BadBlock, match=why) as error:
        await all_of(blocks, root, got)
    assert error.value.code == "blob.bad_block"
    assert before is None or got == before


@pytest.mark.parametrize("claimed", [0, 2, 4, 2**40])
async def test_a_leaf_of_another_size_than_its_parent_claims_is_refused(claimed: int) -> None:
    blocks = Blocks()
    root = blocks.parts([(blocks.raw(b"abc"), claimed), (blocks.raw(b"de"), 2)])
    if not claimed:  # what claims to be empty is not looked at, and gives nothing
        assert await collected(read(root, 0, None, blocks.get)) == [b"de"]
    else:
        await refused(blocks, root, f"of {claimed} bytes")


async def test_nothing_of_a_block_is_given_before_it_is_judged() -> None:
    blocks = Blocks()
    inner = blocks.parts([(blocks.raw(b"abc"), 3)], data=b"x", size=4)
    root = blocks.parts([(blocks.raw(b"ok"), 2), (inner, 5)])
    await refused(blocks, root, "a file of 4 bytes, where", before=[b"ok"])


async def test_data_before_the_parts_of_a_file_is_read() -> None:
    blocks = Blocks()
    root = blocks.parts([(blocks.raw(b"world"), 5)], data=b"hello ", size=11)
    for start, end in ((0, None), (0, 3), (3, 8), (6, 7), (9, None)):
        got = await collected(read(root, start, end, blocks.get))
        assert b"".join(got) == b"hello world"[start:end]


async def test_a_part_of_a_file_is_a_file() -> None:
    blocks = Blocks()
    folder = blocks.node((), UnixFs(Type.DIRECTORY))
    await refused(blocks, blocks.parts([(folder, 3)]), "a directory of 0 bytes, where")
    link = blocks.node((), UnixFs(Type.SYMLINK, b"abc"))
    await refused(blocks, blocks.parts([(link, 3)]), "a symlink of 3 bytes, where")


NAMED = Link(bytes(Cid(1, 0x55, bytes(32))), b"name", 1)
PART = Link(NAMED.cid, b"", 1)


@pytest.mark.parametrize(
    ("links", "said", "why"),
    [
        ([], None, "without UnixFS"),
        ([], b"", "no type"),
        ([], UnixFs(Type.FILE, b"abc", 2), "not the sum"),
        ([], UnixFs(Type.FILE, b"abc"), "not the sum"),
        ([], UnixFs(Type.FILE, None, 3), "not the sum"),
        ([], UnixFs(Type.FILE, None, 3, (3,)), "no sizes"),
        ([PART], UnixFs(Type.FILE, None, 3), "no sizes"),
        ([PART], UnixFs(Type.FILE, None, 5, (3,)), "not the sum"),
        ([PART] * 2, UnixFs(Type.FILE, None, 2**64 - 2, (2**63 - 1,) * 2), "or more than"),
        ([NAMED], UnixFs(Type.FILE, None, 3, (3,)), "links that have names"),
        ([NAMED], UnixFs(Type.SYMLINK, b"x"), "symlink with links"),
        ([NAMED, PART, NAMED], UnixFs(Type.DIRECTORY), "two entries"),
        ([PART, PART], UnixFs(Type.DIRECTORY), "two entries"),
        ([Link(NAMED.cid, b"\xff", 0)], UnixFs(Type.DIRECTORY), "not UTF-8"),
        ([Link(b"\x01\x55\x00\x00", b"a", 0)], UnixFs(Type.DIRECTORY), "cannot be followed"),
        ([], b"\x08\x03", "3 is not a valid"),
        ([], b"\x08\x06", "6 is not a valid"),
        ([], b"\x08\x02\x08\x02", "twice"),
        ([], b"\x08\x02\x12\x00\x12\x00", "twice"),
        ([], b"\x18\x00\x08\x02", "out of order"),
        ([], b"\x08\x02\x4a\x00", "not known"),
        ([], b"\x08\x02\x22\x01\x01", "not known"),  # packed
        ([], b"\x08\x02\x12\x05abc", "cut short"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    links: list[Link], said: UnixFs | bytes | None, why: str
) -> None:
    blocks = Blocks()
    with pytest.raises(BadBlock, match=why):
        await stat(blocks.node(links, said), blocks.get)


async def test_mode_and_time_are_read_and_dropped() -> None:
    blocks = Blocks()
    said = b"\x08\x02\x12\x01x\x18\x01\x38\xa4\x03\x42\x07\x08\x01\x15" + struct.pack("<I", 5)
    assert (await stat(blocks.node((), said), blocks.get)).size == 1


async def test_a_directory_in_any_order_is_read_and_its_names_are_as_they_are() -> None:
    blocks = Blocks()
    wanted = ["z", "../../etc/passwd", "a", "/abs", "..", ".", "", "new\nline", "\0"]
    root = blocks.node(
        (Link(NAMED.cid, name.encode(), None) for name in wanted), UnixFs(Type.DIRECTORY)
    )
    found = await collected(entries(root, blocks.get))
    assert [(entry.name, entry.tsize) for entry in found] == [(name, 0) for name in wanted]


# --- HAMTs ---


def placed(name: bytes, level: int = 0) -> bytes:
    """The name of the link that has an entry at a level."""
    return b"%02X" % (name_hash(name) >> (56 - 8 * level) & 0xFF) + name


def sorted_links(*names: bytes) -> dict[bytes, Cid]:
    return {name: Cid(1, 0x55, bytes(32)) for name in sorted(names)}


A, B = placed(b"a"), placed(b"b")


@pytest.mark.parametrize(
    ("links", "more", "why"),
    [
        (sorted_links(A), {"hash": 0x12}, "another hash"),
        (sorted_links(A), {"hash": None}, "another hash"),
        (sorted_links(A), {"fanout": None}, "fan-out"),
        (sorted_links(A), {"fanout": 4}, "fan-out"),
        (sorted_links(A), {"fanout": 255}, "fan-out"),
        (sorted_links(A), {"fanout": 2048}, "fan-out"),
        (sorted_links(A), {"fanout": 2**63}, "fan-out"),
        (sorted_links(A), {"data": bytes(32)}, "than its bits say"),
        (sorted_links(A), {"data": None}, "than its bits say"),
        (sorted_links(A), {"data": b"\xff" * 32}, "than its bits say"),
        (sorted_links(A), {"data": b"\xff" * 100_000}, "than its bits say"),
        (sorted_links(b"%02X" % (int(A[:2], 16) ^ 1) + b"a"), {}, "leads elsewhere"),
        (sorted_links(A[:2] + b"b"), {}, "leads elsewhere"),
        (sorted_links(b"+1a"), {}, "no slot"),
        (sorted_links(b"0a"), {}, "no slot"),
        (dict(reversed(sorted_links(A, B).items())), {}, "out of order"),
        (sorted_links(A, A[:2]), {"data": (1 << int(A[:2], 16)).to_bytes(32, "big")}, "order"),
    ],
)
async def test_a_hamt_that_is_none_is_refused(
    links: dict[bytes, Cid], more: dict[str, object], why: str
) -> None:
    blocks = Blocks()
    with pytest.raises(BadBlock, match=why):
        await stat(blocks.shard(links, **more), blocks.get)


async def test_a_part_of_a_hamt_is_one_of_its_own_kind() -> None:
    blocks = Blocks()
    below = placed(b"a", 1)
    good = blocks.shard(sorted_links(below))
    assert [e.name for e in await collected(entries(blocks.shard({A[:2]: good}), blocks.get))] == [
        "a"
    ]
    folder = blocks.node([Link(NAMED.cid, below, 1)], UnixFs(Type.DIRECTORY))
    await refused(blocks, blocks.shard({A[:2]: folder}), "a directory, where a part of a HAMT")
    await refused(blocks, blocks.shard({A[:2]: blocks.raw(b"x")}), "a file, where a part of a HAMT")
    other = blocks.shard({b"0" + below: NAMED_CID}, fanout=1024, data=_bit(int(below[:2], 16)))
    await refused(blocks, blocks.shard({A[:2]: other}), "leads elsewhere|no slot|where a part")


NAMED_CID = Cid(1, 0x55, bytes(32))


def _bit(slot: int) -> bytes:
    return (1 << slot).to_bytes(128, "big")


# --- bombs ---

# Found by turning murmur3 round: it is no cryptographic hash, and takes 1 s a name.
HASH_0 = [
    bytes.fromhex(text)
    for text in (
        "4f0f587f100f661a157b5f4c1925432a",
        "4c1b4605543c6e654970435e5f753961",
    )
]
HASHES_1_TO_11 = [
    bytes.fromhex(text)
    for text in (
        "637b1a4a6431470e793c133d032e2439",
        "765e356039126c3c402b670608687a58",
        "5007394a345d3d2b234f7462482c7961",
        "6c521f116d5875477838612b5f337d79",
        "3a25795c79490447791d155a1d321b2e",
        "6f116e6c234661594679217737036977",
        "6b3e72734c3469322201220906243d56",
        "452c343d1328627f72757f4742294345",
        "686115376239172e6e6e3e67432b7339",
        "0a7b1a0240446c4148733a7f7001426d",
        "797a3e6f6b120f182420626a46433870",
    )
]


def seconds(since: float) -> float:
    return time.process_time() - since


async def test_a_file_of_2_to_the_40_bytes_in_few_blocks_costs_what_is_read_of_it() -> None:
    blocks = Blocks()
    began = time.process_time()
    cid, size = blocks.raw(b"ab"), 2
    while size < 2**40:
        cid, size = blocks.parts([(cid, size), (cid, size)]), size * 2
    assert sum(map(len, blocks.data.values())) < 6_000
    found = await stat(cid, blocks.get)
    assert found.size == 2**40
    assert sum(blocks.asked.values()) == 1
    assert await collected(read(cid, 2**39 - 1, 2**39 + 3, blocks.get)) == [b"b", b"ab", b"a"]
    assert sum(blocks.asked.values()) < 1 + 3 * 40
    assert len(await collected(walk(cid, blocks.get))) == len(blocks.data) == 40
    assert seconds(began) < 5


async def test_a_kibibyte_that_claims_2_to_the_40_bytes_lies_and_is_refused() -> None:
    blocks = Blocks()
    cid = blocks.parts([(blocks.raw(b"x"), 2**20)] * 4)
    root = blocks.parts([(cid, 2**38)] * 4)
    assert sum(map(len, blocks.data.values())) < 1 << 10
    assert (await stat(root, blocks.get)).size == 2**40
    with pytest.raises(BadBlock, match="is claimed, of 274877906944 bytes"):
        await collected(read(root, 2**39, 2**39 + 1, blocks.get))


async def test_parts_of_no_bytes_are_not_walked() -> None:
    blocks = Blocks()
    cid = blocks.raw(b"")
    for _ in range(DEPTH_MAX):
        cid = blocks.parts([(cid, 0), (cid, 0)])
    root = blocks.parts([(cid, 0), (blocks.raw(b"x"), 1), (cid, 0), (blocks.raw(b"y"), 1)])
    assert await collected(read(root, 0, None, blocks.get)) == [b"x", b"y"]
    assert sum(blocks.asked.values()) == 3
    assert len(await collected(walk(cid, blocks.get))) == DEPTH_MAX + 1


async def test_a_file_that_is_too_deep_is_refused_and_a_walk_of_it_is_not() -> None:
    blocks = Blocks()
    cid = blocks.raw(b"x")
    for _ in range(DEPTH_MAX):
        cid = blocks.parts([(cid, 1)])
    assert await collected(read(cid, 0, None, blocks.get)) == [b"x"]
    for _ in range(5000):
        cid = blocks.parts([(cid, 1)])
    blocks.asked.clear()
    await refused(blocks, cid, f"deeper than {DEPTH_MAX}")
    assert sum(blocks.asked.values()) <= DEPTH_MAX + 2
    assert len(await collected(walk(cid, blocks.get))) == len(blocks.data)


async def test_a_block_of_links_to_one_block_is_walked_once() -> None:
    blocks = Blocks()
    cid = blocks.raw(b"x")
    for _ in range(6):
        cid = blocks.parts([(cid, 1)] * 4000)
    assert len(children(cid, blocks.data[cid])) == 1
    began = time.process_time()
    assert len(await collected(walk(cid, blocks.get))) == 7
    assert seconds(began) < 2


async def test_blocks_that_many_ways_lead_to_are_walked_once() -> None:
    blocks = Blocks()
    pair = blocks.raw(b"a"), blocks.raw(b"b")
    for _ in range(40):  # each block of a pair links to both of the pair below
        one, two = pair
        pair = blocks.parts([(one, 1), (two, 1)]), blocks.parts([(two, 1), (one, 1)])
    walked = await collected(walk(pair[0], blocks.get))
    assert len(walked) == len({block.cid for block in walked}) == 81
    assert set(blocks.asked.values()) == {1}


async def test_a_hamt_of_parts_that_repeat_is_refused_after_one_way_down() -> None:
    """256 links a block to the same block, 8 levels: 2**64 ways to what is at the bottom."""
    blocks = Blocks()
    slots = [b"%02X" % slot for slot in range(256)]
    for bottom in (
        blocks.shard({}),  # empty
        blocks.shard(sorted_links(placed(b"a", 7))),
    ):
        cid = bottom
        for _ in range(7):
            cid = blocks.shard(dict.fromkeys(slots, cid))
        blocks.asked.clear()
        began = time.process_time()
        with pytest.raises(BadBlock, match=r"leads elsewhere|empty part"):
            await collected(entries(cid, blocks.get))
        assert sum(blocks.asked.values()) <= 8
        with pytest.raises(BadBlock, match=r"leads elsewhere|empty part"):
            await resolve(cid, "b", blocks.get)
        blocks.data[NAMED_CID] = b""
        assert len(await collected(walk(cid, blocks.get))) in (8, 9)
        assert seconds(began) < 2


async def test_a_hamt_that_repeats_below_one_true_way_ends_with_the_second_way() -> None:
    """The bottom has an entry whose way there is the first that is walked."""
    blocks = Blocks()
    name = HASH_0[0]
    assert name_hash(name) == 0
    cid = blocks.shard(sorted_links(b"00" + name))
    for _ in range(7):
        cid = blocks.shard({b"%02X" % slot: cid for slot in range(256)})
    blocks.asked.clear()
    await refused(blocks, cid, "leads elsewhere", before=[Entry(name.decode(), NAMED_CID, 0)])
    assert sum(blocks.asked.values()) == 1 + 9
    assert await resolve(cid, name.decode(), blocks.get) == NAMED_CID


async def test_names_of_one_hash_are_neither_built_nor_read() -> None:
    """Names can be made for any hash."""
    blocks = Blocks()
    one, two = HASH_0
    assert name_hash(one) == name_hash(two) == 0
    small = directory([Entry(n.decode(), NAMED_CID, 0) for n in (one, two)], V1_2025)
    blocks.add(small[1])
    assert len(await collected(entries(small[0].cid, blocks.get))) == 2  # no HAMT, no trouble
    some = [Entry(n.decode(), NAMED_CID, 0) for n in (one, two)]
    many = [Entry(f"{n} {'x' * 200}", NAMED_CID, 0) for n in range(2000)]
    with pytest.raises(InvalidArgument, match="2 names of one directory have the same hash"):
        directory(some + many, V1_2025)
    cid = blocks.shard({b"00": NAMED_CID})
    for _ in range(8):
        cid = blocks.shard({b"00": cid})
    await refused(blocks, cid, "deeper than its hash")


async def test_names_whose_hashes_begin_alike_cost_what_their_blocks_do() -> None:
    blocks = Blocks()
    assert [name_hash(name) for name in HASHES_1_TO_11] == list(range(1, 12))
    crowd = [name.decode() for name in HASHES_1_TO_11]  # the first 60 bits in common
    many = [f"{n} {'x' * 200}" for n in range(2000)]
    root = blocks.directory([Entry(n, NAMED_CID, 0) for n in crowd + many], V1_2025)
    found = await collected(entries(root.cid, blocks.get))
    assert {entry.name for entry in found} == {*crowd, *many}
    assert set(blocks.asked.values()) == {1}
    blocks.asked.clear()
    assert await resolve(root.cid, crowd[7], blocks.get) == NAMED_CID
    assert sum(blocks.asked.values()) == 8
