"""Building files, directories and symlinks, so that all who use a profile get the same CIDs.

Sources: https://specs.ipfs.tech/ipips/ipip-0499/ (the profiles), and Kubo's library for what they
leave open: https://github.com/ipfs/boxo/tree/main/ipld/unixfs
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from wetware.errors import InvalidArgument
from wetware_blob.format import dagpb, unixfs
from wetware_blob.format.cid import DAG_PB, RAW, Block, Cid
from wetware_blob.format.dagpb import Link
from wetware_blob.format.unixfs import Type, UnixFs
from wetware_blob.names import check_target, name_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the CID of a file or a directory depends on, beside its content.

    Attributes:
        name: As in IPIP-499.
        cid_version: 0 or 1.
        raw_leaves: Whether a chunk is a block as it is, or inside a dag-pb block.
        chunk_bytes: The length of all chunks but the last.
        links_max: Of a block of a file, at least 2.
        fanout: Of a HAMT.
        threshold_bytes: A directory that is larger becomes a HAMT.
        threshold_of_block: Whether that is the length of its block, or of its names and CIDs.
    """

    name: str
    cid_version: int
    raw_leaves: bool
    chunk_bytes: int
    links_max: int
    fanout: int = 256
    threshold_bytes: int = 256 << 10
    threshold_of_block: bool


V1_2025: Final = Profile(
    name="unixfs-v1-2025",
    cid_version=1,
    raw_leaves=True,
    chunk_bytes=1 << 20,
    links_max=1024,
    threshold_of_block=True,
)
V0_2015: Final = Profile(
    name="unixfs-v0-2015",
    cid_version=0,
    raw_leaves=False,
    chunk_bytes=256 << 10,
    links_max=174,
    threshold_of_block=False,
)
PROFILES: Final = {profile.name: profile for profile in (V1_2025, V0_2015)}


def profile_of(name: str) -> Profile:
    """The profile of that name, "" for V1_2025; raises InvalidArgument "invalid.profile"."""
    if (profile := PROFILES.get(name or V1_2025.name)) is None:
        raise InvalidArgument(
            f"there is no profile {name[:64]!r}",
            hint=f"one of {', '.join(PROFILES)}",
            code="invalid.profile",
        )
    return profile


@dataclass(frozen=True, slots=True)
class Root:
    """A file, a part of one, a directory or a symlink that is built.

    Attributes:
        cid: Of its uppermost block.
        size: The bytes of a file; 0 for what is none.
        tsize: The bytes of its blocks, each as often as it is linked to.
    """

    cid: Cid
    size: int
    tsize: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a directory.

    Attributes:
        name: Of a directory that was read: anything, "..", "/" and "" as well.
        cid: What it leads to.
        tsize: As the directory claims; 0 where it claims nothing.
    """

    name: str
    cid: Cid
    tsize: int


def _node(profile: Profile, links: Iterable[Link], data: UnixFs) -> tuple[Root, Block]:
    links = tuple(links)
    block = dagpb.encode(dagpb.Node(links, unixfs.encode(data)))
    cid = Cid.of(DAG_PB, block, profile.cid_version)
    tsize = len(block) + sum(link.tsize or 0 for link in links)
    return Root(cid, data.size or 0, tsize), Block(cid, block)


# --- files ---


def leaf(profile: Profile, chunk: bytes) -> Block:
    """The block of a chunk. Hashes it: run it in a thread."""
    if profile.raw_leaves:
        return Block(Cid.of(RAW, chunk), chunk)
    return _node(profile, (), UnixFs(Type.FILE, chunk or None, len(chunk)))[1]


class FileTree:
    """Joins the leaves of one file, as they come, in memory of O(depth x links).

    A balanced tree: every leaf is at the same depth, and every block but the last one of its level
    has `links_max` links.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._levels: list[list[Root]] = [[]]  # what has no parent yet, the leaves first

    def add(self, leaf: Cid, size: int, tsize: int) -> list[Block]:
        """Append a leaf: its bytes of the file, and those of its block.

        Returns the blocks that became complete. An empty file has one leaf, of no bytes.
        """
        self._levels[0].append(Root(leaf, size, tsize))
        blocks: list[Block] = []
        level = 0
        while len(self._levels[level]) == self._profile.links_max:
            blocks.append(self._join(level))
            level += 1
        return blocks

    def finish(self) -> tuple[Root, list[Block]]:
        """The file, and the blocks that were not complete before."""
        blocks: list[Block] = []
        level = 0
        while level + 1 < len(self._levels) or len(self._levels[level]) > 1:
            if self._levels[level]:
                blocks.append(self._join(level))
            level += 1
        (root,) = self._levels[level]
        return root, blocks

    def _join(self, level: int) -> Block:
        """Give what waits in a level its parent."""
        parts = self._levels[level]
        if level + 1 == len(self._levels):
            self._levels.append([])
        sizes = tuple(part.size for part in parts)
        root, block = _node(
            self._profile,
            (Link(bytes(part.cid), b"", part.tsize) for part in parts),
            UnixFs(Type.FILE, None, sum(sizes), sizes),
        )
        parts.clear()
        self._levels[level + 1].append(root)
        return block


# --- directories and symlinks ---


def symlink(target: bytes, profile: Profile) -> tuple[Root, Block]:
    """Raises InvalidArgument for a target that no symlink has."""
    check_target(target)
    return _node(profile, (), UnixFs(Type.SYMLINK, target))


def directory(entries: Iterable[Entry], profile: Profile) -> tuple[Root, list[Block]]:
    """A directory, in one block or as a HAMT; its own block is the last one.

    Raises InvalidArgument for a name that is there twice or that no file can have.
    """
    links: dict[bytes, Link] = {}
    for entry in entries:
        name = name_bytes(entry.name)
        if name in links:
            raise InvalidArgument(f"a directory with two entries {entry.name!r}")
        links[name] = Link(bytes(entry.cid), name, entry.tsize)
    root, block = _node(profile, (links[name] for name in sorted(links)), UnixFs(Type.DIRECTORY))
    if profile.threshold_of_block:
        size = len(block.data)
    else:
        size = sum(len(name) + len(link.cid) for name, link in links.items())
    if size <= profile.threshold_bytes:
        return root, [block]
    hashed = [(unixfs.name_hash(name), link) for name, link in links.items()]
    blocks: list[Block] = []
    return _shard(profile, hashed, 0, blocks), blocks


def _shard(
    profile: Profile, hashed: list[tuple[int, Link]], level: int, blocks: list[Block]
) -> Root:
    """One block of a HAMT and, before it, all below; they are appended to `blocks`."""
    fanout = profile.fanout
    if unixfs.slot_bits(fanout) * (level + 1) > unixfs.HASH_BITS:
        raise InvalidArgument(
            f"{len(hashed)} names of one directory have the same hash, of which no HAMT can have "
            "more than one",
            hint="rename one of them: names like that are made on purpose",
        )
    slots: dict[int, list[tuple[int, Link]]] = {}
    for each in hashed:
        slot = unixfs.path_of(each[0], fanout, level + 1) % fanout
        slots.setdefault(slot, []).append(each)
    links, bits = [], 0
    for slot in sorted(slots):
        prefix = unixfs.slot_prefix(slot, fanout)
        (_, link), *more = slots[slot]
        if more:
            below = _shard(profile, slots[slot], level + 1, blocks)
            links.append(Link(bytes(below.cid), prefix, below.tsize))
        else:
            links.append(Link(link.cid, prefix + (link.name or b""), link.tsize))
        bits |= 1 << slot
    root, block = _node(
        profile,
        links,
        UnixFs(
            Type.HAMT,
            bits.to_bytes((bits.bit_length() + 7) // 8, "big"),
            hash=unixfs.MURMUR3,
            fanout=fanout,
        ),
    )
    blocks.append(block)
    return root
