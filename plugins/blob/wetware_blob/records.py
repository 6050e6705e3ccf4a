"""A tree of files as a stream of records: the form `tree` of blob.capnp.

Both ends are strict: what is not as the schema has it raises InvalidArgument "invalid.tree", and
no name or link gets through that could lead out of its tree. Neither end remembers names but those
of the directories that are open, so that it needs the same memory for any tree: the caller who
keeps them finds a name that is there twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from anyio import EndOfStream

from wetware.errors import InvalidArgument
from wetware_blob.names import TARGET_BYTES_MAX, check_link, name_bytes

if TYPE_CHECKING:
    from anyio.abc import ByteReceiveStream, ByteSendStream

T = TypeVar("T")

PIECE_BYTES_MAX: Final = 1 << 20
DEPTH_MAX: Final = 256
"""Directories within each other: who writes them to a disk holds a descriptor of each."""
_READ_BYTES: Final = 256 << 10

Kind = Literal["directory", "end", "file", "symlink"]
_KINDS: Final[dict[int, Kind]] = {68: "directory", 69: "end", 70: "file", 76: "symlink"}
_LETTERS: Final = {kind: bytes([letter]) for letter, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Record:
    """A record.

    Attributes:
        kind: Its kind; what is in a file follows in pieces.
        name: "" of the first one, and of the end of a directory.
        target: Where a symbolic link leads.
    """

    kind: Kind
    name: str = ""
    target: bytes = b""


async def received(stream: ByteReceiveStream, max_bytes: int) -> bytes:
    """The next bytes of a stream; b"" at its end."""
    try:
        return await stream.receive(max_bytes)
    except EndOfStream:
        return b""


async def batches(
    items: AsyncIterable[T], most: int, size: Callable[[T], int]
) -> AsyncIterator[list[T]]:
    """Items as they come, as many at a time as their sizes make `most`, or a little more."""
    batch, total = [], 0
    async for item in items:
        batch.append(item)
        total += size(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class _Tree:
    """What both ends know of where they are."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = list(names)
        self._begun = bool(self._names)

    @property
    def _over(self) -> bool:
        return self._begun and not self._names

    def _step(self, record: Record) -> bytes:
        """Judge what comes next; returns its name."""
        kind, name, names = record.kind, record.name, self._names
        if kind == "end":
            if not names or name:
                raise _malformed("a directory ends that did not begin, or its end has a name")
            names.pop()
            return b""
        if self._over:
            raise _malformed("it goes on behind its end")
        if not self._begun and name:
            raise _malformed("its first record has a name")
        path = "/".join((*names[1:], name))
        data = name_bytes(name, path) if self._begun else b""
        self._begun = True
        if kind == "symlink":
            check_link(path, record.target)
        if kind == "directory":
            if len(names) == DEPTH_MAX:
                raise InvalidArgument(
                    f"more than {DEPTH_MAX} directories are within each other",
                    hint="put what is below as a tree of its own",
                    code="invalid.tree",
                )
            names.append(name)
        return data


class Reader(_Tree):
    """Reads a tree from `stream`.

    Args:
        stream: Of what anyio has; its errors pass.
        names: Of a tree of which some records were read before, the directories that are open.
    """

    def __init__(self, stream: ByteReceiveStream, *, names: Iterable[str] = ()) -> None:
        super().__init__(names)
        self._stream = stream
        self._data = memoryview(b"")
        self._piece = 0  # bytes of the piece that have not come yet
        self._within = False  # a file or link

    async def record(self) -> Record | None:
        """The next one, or None behind the last; what was not read of a file is skipped."""
        while self._within:
            await self.piece()
        if self._over:
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
        record = Record(kind, name, await self._target() if kind == "symlink" else b"")
        self._step(record)
        self._within = kind == "file"
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

    async def _target(self) -> bytes:
        """All of a link's, or enough to refuse it."""
        self._within, found = True, b""
        while len(found) <= TARGET_BYTES_MAX and (data := await self.piece()):
            found += data
        return found

    async def _more(self) -> bool:
        """Whether there is a byte; waits for it."""
        if not self._data:
            self._data = memoryview(await received(self._stream, _READ_BYTES))
        return bool(self._data)

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
    """

    def __init__(self, stream: ByteSendStream, *, skip: int = 0) -> None:
        super().__init__()
        self._stream, self._skip = stream, skip
        self._within = False

    async def record(self, kind: Kind, name: str = "", target: bytes = b"") -> bool:
        """A record; `piece` follows a file until one of no bytes. False: it is skipped."""
        if self._within:
            raise RuntimeError("a file has not ended")
        data = self._step(Record(kind, name, target))
        if self._skip:
            self._skip -= 1
            return False
        self._within = kind == "file"
        parts = [_LETTERS[kind], len(data).to_bytes(2), data]
        if kind == "symlink":
            parts += len(target).to_bytes(4), target, bytes(4)
        await self._stream.send(b"".join(parts))
        return True

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


def _malformed(what: str) -> InvalidArgument:
    return InvalidArgument(f"this is no tree of files: {what}", code="invalid.tree")
