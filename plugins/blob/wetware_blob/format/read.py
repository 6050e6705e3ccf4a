"""Reading what others built. Nothing that a block says is believed before it is judged.

A block is checked against what the block above it claims: the bytes of a part of a file, and the
place of a name in a HAMT. A few blocks can claim a tree of 2**40 by linking to the same ones again
and again: nothing here costs more than what is asked for, and a walk meets each block once.
Source: https://specs.ipfs.tech/unixfs/
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from anyio.to_thread import run_sync

from wetware.errors import InvalidArgument, NotFound
from wetware_blob.format import dagpb, unixfs
from wetware_blob.format.build import Entry
from wetware_blob.format.cid import RAW, BadBlock, Block, Cid
from wetware_blob.format.unixfs import Type, UnixFs
from wetware_blob.names import check_link, name_bytes
from wetware_blob.pieces import batches

DEPTH_MAX: Final = 64
"""Blocks from the root of a file to a leaf; 2**64 bytes of one-byte leaves need as many."""
SIZE_MAX: Final = 2**63 - 1
"""Of a file, in bytes."""
PATH_BYTES_MAX: Final = 4096
AHEAD_MAX: Final = 64
"""Entries of a directory whose blocks are fetched before it is their turn."""
INLINE_BYTES: Final = 64 << 10
"""Larger blocks are decoded in a thread: 45,000 links fit into 2 MiB, which take a second."""

Get = Callable[[Cid], Awaitable[bytes]]
"""The bytes of a block; it has checked their hash."""
Ahead = Callable[[Sequence[Cid]], None]
"""Is told what will be read next, in that order, before what it was told earlier."""
Kind = Literal["file", "directory", "symlink"]
Step = tuple[Kind | Literal["piece", "end"], str, bytes]
"""Of a tree, in order: what it is, its name, and where a link leads. Behind a file come its pieces
up to one of no bytes, and behind a directory what is in it up to its end."""


# --- one block ---


@dataclass(frozen=True, slots=True)
class Claim:
    """What the block above says of a block.

    Attributes:
        cid: Its name.
        depth: Blocks above it.
        size: That it is a part of a file, of so many bytes.
        fanout: That it is a part of a HAMT, with so many slots a block.
        path: The slots that lead to that part: the first bits of the hash of each name in it.
    """

    cid: Cid
    depth: int = 0
    size: int | None = None
    fanout: int | None = None
    path: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """What a block says, once it is judged.

    Attributes:
        kind: What it is, or is a part of.
        size: The bytes of a file: `data`, and what `parts` claim.
        tsize: The bytes of its blocks, each as often as it is linked to, as its links claim.
        data: Bytes of a file, before those of its parts; the target of a symlink.
        parts: The blocks with the rest of the file, or of the HAMT.
        entries: Of a directory, those that are in this block.
    """

    kind: Kind
    size: int
    tsize: int
    data: bytes = b""
    parts: tuple[Claim, ...] = ()
    entries: tuple[Entry, ...] = ()
    fanout: int | None = None


def judge(claim: Claim, block: bytes) -> View:
    """What the block says; raises BadBlock where that is not what was claimed, or nonsense."""
    try:
        return _judge(claim, block)
    except BadBlock as exc:
        raise BadBlock(f"block {claim.cid}: {exc}") from None


async def _judged(claim: Claim, get: Get) -> View:
    block = await get(claim.cid)
    if claim.cid.codec == RAW or len(block) <= INLINE_BYTES:
        return judge(claim, block)
    return await run_sync(judge, claim, block)


def _judge(claim: Claim, block: bytes) -> View:
    if claim.cid.codec == RAW:
        view = View("file", len(block), len(block), block)
    else:
        node = dagpb.decode(block)
        if node.data is None:
            raise BadBlock("dag-pb without UnixFS")
        said = unixfs.decode(node.data)
        tsize = len(block) + sum(link.tsize or 0 for link in node.links)
        match said.type:
            case Type.FILE | Type.RAW:
                view = _file(claim, node, said, tsize)
            case Type.DIRECTORY:
                entries = [_entry(link, link.name or b"") for link in node.links]
                if len({entry.name for entry in entries}) < len(entries):
                    raise BadBlock("a directory with two entries of one name")
                view = View("directory", 0, tsize, entries=tuple(entries))
            case Type.HAMT:
                view = _hamt(claim, node, said, tsize)
            case Type.SYMLINK:
                if node.links:
                    raise BadBlock("a symlink with links")
                view = View("symlink", len(said.data or b""), tsize, said.data or b"")
    if claim.size is not None and (view.kind, view.size) != ("file", claim.size):
        raise BadBlock(
            f"a {view.kind} of {view.size} bytes, where a part of a file is claimed, "
            f"of {claim.size} bytes"
        )
    if claim.fanout != view.fanout and claim.fanout is not None:
        raise BadBlock(f"a {view.kind}, where a part of a HAMT of {claim.fanout} slots is claimed")
    return view


def _file(claim: Claim, node: dagpb.Node, said: UnixFs, tsize: int) -> View:
    data = said.data or b""
    if len(said.sizes) != len(node.links) or any(link.name for link in node.links):
        raise BadBlock("a file with links that have names, or no sizes")
    if (said.size or 0) != len(data) + sum(said.sizes) or (said.size or 0) > SIZE_MAX:
        raise BadBlock(f"a file whose size is not the sum of its parts, or more than {SIZE_MAX}")
    if node.links and claim.depth >= DEPTH_MAX:
        raise BadBlock(f"a file deeper than {DEPTH_MAX} blocks")
    parts = tuple(
        Claim(target(link), claim.depth + 1, size)
        for link, size in zip(node.links, said.sizes, strict=True)
    )
    return View("file", said.size or 0, tsize, data, parts)


def _hamt(claim: Claim, node: dagpb.Node, said: UnixFs, tsize: int) -> View:
    fanout, level = said.fanout or 1, claim.depth + 1
    bits = unixfs.slot_bits(fanout)
    if said.hash != unixfs.MURMUR3 or fanout != 1 << bits or not 8 <= fanout <= unixfs.FANOUT_MAX:
        raise BadBlock("a HAMT of another hash than murmur3, or with a fan-out that is not taken")
    if bits * level > unixfs.HASH_BITS or (claim.depth and not node.links):
        raise BadBlock("a HAMT that is deeper than its hash is long, or with an empty part")
    width = len(unixfs.slot_prefix(0, fanout))
    parts, entries, found = [], [], 0
    for link in node.links:
        name = link.name or b""
        slot = unixfs.slot_of(name[:width], fanout)
        if slot is None or found >> slot:
            raise BadBlock("a HAMT with a link of no slot, or out of order")
        found |= 1 << slot
        path = claim.path << bits | slot
        if len(name) == width:
            parts.append(Claim(target(link), claim.depth + 1, fanout=fanout, path=path))
        elif unixfs.path_of(unixfs.name_hash(name[width:]), fanout, level) == path:
            entries.append(_entry(link, name[width:]))
        else:
            raise BadBlock("a HAMT with a name whose hash leads elsewhere")
    if found != int.from_bytes(said.data or b"", "big"):
        raise BadBlock("a HAMT with other links than its bits say")
    return View("directory", 0, tsize, parts=tuple(parts), entries=tuple(entries), fanout=fanout)


def _entry(link: dagpb.Link, name: bytes) -> Entry:
    try:
        return Entry(name.decode(), target(link), link.tsize or 0)
    except UnicodeDecodeError:
        raise BadBlock("a name that is not UTF-8") from None


def target(link: dagpb.Link) -> Cid:
    """What a link points to; raises BadBlock."""
    try:
        return Cid.decode(link.cid)
    except InvalidArgument as exc:
        raise BadBlock(f"a link that cannot be followed: {exc}") from None


def children(cid: Cid, block: bytes) -> list[Cid]:
    """The blocks that a block links to, each once, in the order of the links.

    Raises BadBlock for a block that is none of its codec, or that links to what is not UnixFS: a
    hash other than sha2-256, a codec other than raw and dag-pb.
    """
    if cid.codec == RAW:
        return []
    return list(dict.fromkeys(target(link) for link in dagpb.decode(block).links))


async def links_of(cid: Cid, block: bytes) -> list[Cid]:
    """As `children`; the loop goes on meanwhile."""
    if len(block) <= INLINE_BYTES:
        return children(cid, block)
    return await run_sync(children, cid, block)


# --- trees ---


def _nothing_ahead(_: Sequence[Cid]) -> None: ...


async def stat(root: Cid, get: Get) -> View:
    """What a CID leads to, as its own block says; raises BadBlock."""
    return await _judged(Claim(root), get)


async def described(root: Cid, get: Get) -> tuple[str, int]:
    """The kind and size of a CID, as PinInfo and Entry of blob.capnp have them."""
    try:
        found = await stat(root, get)
    except BadBlock:
        return "dag", 0
    return found.kind, found.size if found.kind == "file" else found.tsize


async def resolve(root: Cid, path: str, get: Get) -> Cid:
    """What a path below `root` leads to; no symlink is followed, and ".." is a name like others.

    Raises NotFound, BadBlock, or InvalidArgument for a path of more than PATH_BYTES_MAX.
    """
    if len(path.encode(errors="replace")) > PATH_BYTES_MAX:
        raise InvalidArgument(f"a path of more than {PATH_BYTES_MAX} bytes")
    cid = root
    for name in filter(None, path.split("/")):
        found = await _lookup(cid, name, get)
        if found is None:
            raise NotFound(
                f"there is no {name!r} on the path {path!r} of {root}", hint=f"ww blob ls {root}"
            )
        cid = found
    return cid


async def _lookup(directory: Cid, name: str, get: Get) -> Cid | None:
    hashed = unixfs.name_hash(name.encode(errors="surrogatepass"))
    claim = Claim(directory)
    while True:
        view = await _judged(claim, get)
        for entry in view.entries:
            if entry.name == name:
                return entry.cid
        if view.fanout is None:
            return None
        path = unixfs.path_of(hashed, view.fanout, claim.depth + 1)
        below = [part for part in view.parts if part.path == path]
        if not below:
            return None
        (claim,) = below


async def entries(root: Cid, get: Get, ahead: Ahead = _nothing_ahead) -> AsyncIterator[Entry]:
    """The entries of a directory, sorted by name, or of a HAMT, by the hash of their names nearly.

    Raises BadBlock, or InvalidArgument for what is no directory. Each block is read once: an entry
    is in one place of a HAMT alone, and a part without entries is refused.
    """
    waiting = [Claim(root)]
    while waiting:
        claim = waiting.pop()
        view = await _judged(claim, get)
        if view.kind != "directory":
            raise InvalidArgument(
                f"{root} is a {view.kind}, not a directory",
                hint="what it is: ww blob stat CID",
                code="invalid.not_a_directory",
            )
        if view.parts:
            ahead([part.cid for part in view.parts])
        for entry in view.entries:
            yield entry
        waiting.extend(reversed(view.parts))


async def read(
    root: Cid, start: int, end: int | None, get: Get, ahead: Ahead = _nothing_ahead
) -> AsyncIterator[bytes]:
    """The bytes of a file from `start` to before `end`, or to its end; in pieces as they come.

    Fewer where the file is shorter. Raises BadBlock, or InvalidArgument for what is no file.
    """
    if start < 0 or (end is not None and end < start):
        raise InvalidArgument(f"no range of bytes: {start} to {end}")
    waiting = [(0, Claim(root))]
    while waiting:
        at, claim = waiting.pop()
        view = await _judged(claim, get)
        if view.kind != "file":
            raise InvalidArgument(f"{root} is a {view.kind}, not a file", code="invalid.not_a_file")
        until = view.size + at if end is None else end
        if piece := view.data[max(start - at, 0) : until - at]:
            yield piece
        at += len(view.data)
        parts = []
        for part in view.parts:
            size = part.size or 0
            if size and at < until and at + size > start:  # what claims no bytes is not looked at
                parts.append((at, part))
            at += size
        if parts:
            ahead([part.cid for _, part in parts])
        waiting.extend(reversed(parts))


async def tree(
    root: Cid, get: Get, ahead: Ahead = _nothing_ahead, skip: int = 0
) -> AsyncIterator[Step]:
    """All that is in a directory, depth first, but the first `skip` files and links; see `Step`.

    Which blocks are read, and in which order, depends on what is in them and `skip` alone: a reader
    whose `get` is fed with those of another reader asks for the same. Raises BadBlock, and
    InvalidArgument for what is no directory, for names that no file can have, and for links that
    may lead out of it.
    """
    last: Block | None = None

    async def once(cid: Cid) -> bytes:
        nonlocal last
        if last is None or last.cid != cid:
            last = Block(cid, await get(cid))
        return last.data

    names: list[str] = []
    levels = [_listed(root, once, ahead)]
    while levels:
        entry = await anext(levels[-1], None)
        if entry is None:
            levels.pop()
            if names:
                yield "end", names.pop(), b""
            continue
        name, cid = entry.name, entry.cid
        path = "/".join((*names, name))
        name_bytes(name, path)
        kind: Kind = "file"
        if cid.codec != RAW:
            found = await stat(cid, once)
            kind = found.kind
        if kind == "directory":
            yield kind, name, b""
            names.append(name)
            levels.append(_listed(cid, once, ahead))
        elif skip:
            skip -= 1
        elif kind == "symlink":
            check_link(path, found.data)
            yield kind, name, found.data
        else:
            yield kind, name, b""
            async for piece in read(cid, 0, None, once, ahead):
                yield "piece", name, piece
            yield "piece", name, b""
    if skip:
        raise InvalidArgument(f"{root} has {skip} files fewer than are skipped")


async def _listed(root: Cid, get: Get, ahead: Ahead) -> AsyncIterator[Entry]:
    """As `entries`; what the next ones lead to is told to be read."""
    async for some in batches(entries(root, get, ahead), AHEAD_MAX, lambda _: 1):
        ahead([entry.cid for entry in some])
        for entry in some:
            yield entry


async def walk(root: Cid, get: Get, ahead: Ahead = _nothing_ahead) -> AsyncIterator[Block]:
    """Every block below `root` and itself, each once, depth first; raises BadBlock.

    The order of CAR files that can be read as they come.
    """
    seen = {root}
    waiting = [root]
    while waiting:
        cid = waiting.pop()
        block = await get(cid)
        yield Block(cid, block)
        below = [child for child in await links_of(cid, block) if child not in seen]
        seen.update(below)
        if below:
            ahead(below)
        waiting.extend(reversed(below))
