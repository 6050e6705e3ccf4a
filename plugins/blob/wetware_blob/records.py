"""A tree of files as a stream of records: the form `tree` of blob.capnp.

Both ends are strict: what is not as the schema has it raises InvalidArgument "invalid.tree", and
no name gets through that could lead out of its directory. Neither end remembers names, so that it
needs the same memory for any tree: the caller who keeps them finds a name that is there twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from anyio import EndOfStream

from wetware.errors import InvalidArgument

if TYPE_CHECKING:
    from anyio.abc import ByteReceiveStream, ByteSendStream

PIECE_BYTES_MAX: Final = 1 << 20
DEPTH_MAX: Final = 256
"""Directories within each other: who writes them to a disk holds a descriptor of each."""
TARGET_BYTES_MAX: Final = 4095
"""Of a symbolic link: Linux's PATH_MAX."""
_READ_BYTES: Final = 256 << 10

Kind = Literal["directory", "end", "file", "symlink"]
_KINDS: Final[dict[int, Kind]] = {68: "directory", 69: "end", 70: "file", 76: "symlink"}
_LETTERS: Final = {kind: bytes([letter]) for letter, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Record:
    """A record. `name` is "" of the first one, and of the end of a directory."""

    kind: Kind
    name: str = ""


def check_name(name: str) -> None:
    """Refuse what is no name of a file in one directory."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise InvalidArgument(
            f"{name[:255]!r} cannot be the name of a file",
            hint="read what is beside it by its path: ww blob ls CID, ww blob get CID/PATH",
            code="invalid.name",
        )


def _check_target(target: bytes) -> None:
    if not 0 < len(target) <= TARGET_BYTES_MAX or b"\0" in target:
        raise _malformed(f"a link leads to 1 to {TARGET_BYTES_MAX} bytes without a NUL")


class _Tree:
    """What both ends know of where they are."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._begun = depth > 0

    def _step(self, record: Record) -> None:
        kind, depth = record.kind, self.depth
        if kind == "end":
            if not depth or record.name:
                raise _malformed("a directory ends that did not begin, or its end has a name")
            self.depth -= 1
            return
        if self._begun and not depth:
            raise _malformed("it goes on behind its end")
        if self._begun:
            check_name(record.name)
        elif record.name:
            raise _malformed("its first record has a name")
        self._begun = True
        if kind == "directory":
            if depth == DEPTH_MAX:
                raise InvalidArgument(
                    f"more than {DEPTH_MAX} directories are within each other",
                    hint="put what is below as a tree of its own",
                    code="invalid.tree",
                )
            self.depth += 1


class Reader(_Tree):
    """Reads a tree from `stream`.

    Args:
        stream: Of what anyio has; its errors pass.
        depth: How many directories have begun and not ended before the first record that comes, of
            a tree of which some records were read before.

    Attributes:
        depth: How many have at this point.
    """

    def __init__(self, stream: ByteReceiveStream, *, depth: int = 0) -> None:
        super().__init__(depth)
        self._stream = stream
        self._data = memoryview(b"")
        self._piece = 0  # bytes of the piece that have not come yet
        self._within = False  # a file or link

    async def record(self) -> Record | None:
        """The next one, or None behind the last; what was not read of a file is skipped."""
        while self._within:
            await self.piece()
        if self._begun and not self.depth:
            if await self._more():
                raise _malformed("it goes on behind its end")
            return None
        head = await self._exactly(3)
        kind = _KINDS.get(head[0])
        if kind is None:
            raise _malformed(f"there is no record of the kind {head[0]}")
        try:
            name = (await self._exactly(int.from_bytes(head[1:]))).decode()
        except UnicodeDecodeError:
            raise _malformed("a name is not UTF-8") from None
        record = Record(kind, name)
        self._step(record)
        self._within = kind in ("file", "symlink")
        return record

    async def piece(self) -> bytes:
        """Some bytes of the file that began last; b"" at its end."""
        if not self._within:
            return b""
        if not self._piece:
            self._piece = int.from_bytes(await self._exactly(4))
            if self._piece > PIECE_BYTES_MAX:
                raise _malformed(f"a piece has {self._piece} bytes: {PIECE_BYTES_MAX} at most")
            if not self._piece:
                self._within = False
                return b""
        if not await self._more():
            raise _malformed("it ends before its end")
        data, self._data = self._data[: self._piece], self._data[self._piece :]
        self._piece -= len(data)
        return bytes(data)

    async def target(self) -> bytes:
        """Where the link leads that began last."""
        found = b""
        while data := await self.piece():
            found += data
            if len(found) > TARGET_BYTES_MAX:
                break
        _check_target(found)
        return found

    async def _more(self) -> bool:
        """Whether there is a byte; waits for it."""
        if not self._data:
            try:
                self._data = memoryview(await self._stream.receive(_READ_BYTES))
            except EndOfStream:
                return False
        return True

    async def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            if not await self._more():
                raise _malformed("it ends before its end")
            rest = count - len(found)
            found += self._data[:rest]
            self._data = self._data[rest:]
        return bytes(found)


class Writer(_Tree):
    """Writes a tree to `stream`, in the order of the calls.

    Args:
        stream: Of what anyio has; its errors pass. It is not closed.
        skip: Records that the other end has already.

    Attributes:
        depth: How many directories have begun and not ended.
        records: How many there were, the skipped ones included.
    """

    def __init__(self, stream: ByteSendStream, *, skip: int = 0) -> None:
        super().__init__(0)
        self._stream, self._skip = stream, skip
        self.records = 0
        self._within = False

    async def directory(self, name: str) -> None:
        """A directory begins."""
        await self._record(Record("directory", name))

    async def end(self) -> None:
        """The directory ends that began last and has not ended."""
        await self._record(Record("end"))

    async def file(self, name: str) -> bool:
        """A file begins: `piece` follows until one of no bytes, unless False says it is skipped."""
        self._within = await self._record(Record("file", name))
        return self._within

    async def link(self, name: str, target: bytes) -> None:
        """A symbolic link."""
        _check_target(target)
        if await self._record(Record("symlink", name)):
            head = len(target).to_bytes(4)
            await self._stream.send(b"".join((head, target, bytes(4))))

    async def piece(self, data: bytes) -> None:
        """Some bytes of the file that began last; none: its end."""
        if not self._within:
            raise RuntimeError("no file has begun")
        self._within = bool(data)
        view = memoryview(data)
        for at in range(0, len(data) or 1, PIECE_BYTES_MAX):
            part = view[at : at + PIECE_BYTES_MAX]
            await self._stream.send(len(part).to_bytes(4))
            if part:
                await self._stream.send(bytes(part) if len(part) < len(data) else data)

    async def _record(self, record: Record) -> bool:
        if self._within:
            raise RuntimeError("a file has not ended")
        try:
            name = record.name.encode()
        except UnicodeEncodeError:
            raise _malformed(f"the name {record.name!r} is not UTF-8") from None
        if len(name) > 0xFFFF:
            raise _malformed(f"the name {record.name[:64]!r}… has more than 65535 bytes")
        self._step(record)
        self.records += 1
        if self.records <= self._skip:
            return False
        await self._stream.send(_LETTERS[record.kind] + len(name).to_bytes(2) + name)
        return True


def _malformed(what: str) -> InvalidArgument:
    return InvalidArgument(f"this is no tree of files: {what}", code="invalid.tree")
