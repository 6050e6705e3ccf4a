"""`session.blob`: content-addressed storage for applications.

put = await session.blob.put("photo.tar", copies=3)
async with session.blob.open(put.cid) as blob:
    async for data in blob:
        ...
await session.blob.get(put.cid, "copy.tar")
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

import anyio.abc

from wetware import rpc
from wetware.base.structs import from_struct
from wetware.base.texts import NAMED
from wetware.base.threads import in_daemon
from wetware.errors import InternalError, InvalidArgument, Unsupported, WetwareError
from wetware_blob import disk
from wetware_blob.format import car as car_format
from wetware_blob.format.build import Profile, profile_of
from wetware_blob.format.cid import Cid
from wetware_blob.pieces import received
from wetware_blob.schema import SCHEMA

END: Final = (1 << 64) - 1
"""Of a range: up to the end; of a size: no bound."""
PAGE: Final = 1000
"""Pins or entries of one answer."""
_READ_BYTES: Final = 4 << 20
"""Of a file, by one call in a thread; so much is sent while as much is read."""
_WAIT_S: Final = 20.0
_REPORT_S: Final = 0.5  # where somebody watches
_ANSWER_S: Final = 50.0  # for what waits so long


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is.

    Attributes:
        bytes: Done so far.
        total: Of how many; 0 while that is not known.
        copies: Members that have all of it on disk.
        doing: For people.
    """

    bytes: int
    total: int = 0
    copies: int = 0
    doing: str = ""


Report = Callable[[Progress], None]


class Terms(TypedDict, total=False):
    """What a pin is to be.

    Attributes:
        name: For people.
        copies: Members that keep it, the node included; 0 and 1: the node alone.
        where: A selector of the members that may.
        ack: How many have it on disk before the call returns.
        public: The DHT is told that the node has it.
    """

    name: str
    copies: int
    where: str
    ack: int
    public: bool


@dataclass(frozen=True, slots=True)
class Put:
    """What was put or pinned.

    Attributes:
        cid: Its CID.
        bytes: Its size, as `Pin` has it.
        copies: Members that have all of it on disk.
    """

    cid: str
    bytes: int
    copies: int


@dataclass(frozen=True, slots=True)
class Pin:
    """A pin, as the struct PinInfo of blob.capnp has it."""

    root: str
    name: str
    owner: str
    kind: str
    size: int
    charged_bytes: int
    created_ms: int
    copies: int
    where: str
    holders: tuple[str, ...]
    public: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What pins are charged, and what the node has: the struct Usage of blob.capnp."""

    pins: int
    charged_bytes: int
    quota_bytes: int
    blocks: int
    disk_bytes: int
    disk_bytes_max: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """The struct Entry of blob.capnp: of a directory, or a blob itself, which has no name.

    The name is as it is in the directory: not safe to use as a path or to print.
    """

    name: str
    cid: str
    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class Removed:
    """What `rm` did: pins that ended, own pins that still reach it, how many of others do."""

    pins: int
    pinned_by: tuple[Pin, ...]
    others: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would, and what it kept; `dropped` are damaged pins."""

    blocks: int
    bytes: int
    kept_blocks: int
    kept_bytes: int
    dropped: list[str]


class BlobFile(anyio.abc.ByteReceiveStream):
    """One CID, and what is below it; enter it with `async with`.

    It is a stream of the file's bytes from the first on. A stream that fails in the middle raises:
    a part is never taken for the whole.

    Attributes:
        cid: Its CID, once it is entered.
        ref: The capability, to pass on; it is a `Ww.Source`.
    """

    ref: rpc.Ref

    def __init__(self, cid: str, opening: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self.cid, self._opening = cid, opening
        self._stream: rpc.ByteStream | None = None

    async def __aenter__(self) -> BlobFile:
        reply = await self._opening()
        self.ref, self.cid = _given(reply["blob"]), reply["cid"]
        return self

    async def aclose(self) -> None:
        """Let go of it. Idempotent."""
        if self._stream is not None:
            self._stream.abort(WetwareError("the reader has closed it"))
        self.ref.close()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """The next bytes of the file; EndOfStream behind the last."""
        if self._stream is None:
            self._stream = await self.stream()
        return await self._stream.receive(max_bytes)

    async def stream(self, start: int = 0, end: int = END) -> rpc.ByteStream:
        """The bytes from `start` up to `end`, which is not included, as they come.

        Raises NotFound "not_found.blob" where nobody has it.
        """
        return rpc.ByteStream(_given((await self.ref.call("read", start=start, end=end))["stream"]))

    async def read(self, start: int = 0, end: int = END) -> bytes:
        """The bytes from `start` up to `end`, all in memory."""
        async with await self.stream(start, end) as stream:
            return b"".join([data async for data in stream])

    async def stat(self) -> int:
        """How many bytes the file has; looks for it in the cluster for a bounded time."""
        size: int = (await self.ref.call("stat"))["size"]
        return size

    async def info(self) -> Entry:
        """What it is; its name is ""."""
        return from_struct(Entry, (await self.ref.call("info"))["info"])

    async def ls(self) -> AsyncIterator[Entry]:
        """The entries of the directory, in the order of its blocks."""
        skip, more = 0, True
        while more:
            reply = await self.ref.call("ls", skip=skip, limit=PAGE)
            for entry in reply["entries"]:
                yield from_struct(Entry, entry)
            skip += len(reply["entries"])
            more = reply["more"] and bool(reply["entries"])

    def at(self, path: str) -> BlobFile:
        """What is below under a path of names; enter it as this one."""
        return BlobFile("", lambda: self.ref.call("at", path=path))

    async def tree(self, skip: int = 0) -> rpc.ByteStream:
        """All of a directory as a CAR: see `Blob.tree` in blob.capnp."""
        return rpc.ByteStream(_given((await self.ref.call("tree", skip=skip))["stream"]))

    async def car(self) -> rpc.ByteStream:
        """All its blocks as a CAR v1."""
        return rpc.ByteStream(_given((await self.ref.call("car"))["stream"]))


Source = bytes | str | os.PathLike[str] | int | anyio.abc.ByteReceiveStream
Feed = Callable[[rpc.ByteStream], Awaitable[None]]


class BlobStore:
    """The service `blob` of a session.

    What puts and pins takes the `Terms` of the pin, and a `progress` that is called a few times a
    second. It has no time limit: an error ends it, Disconnected where the session is lost, or who
    cancels it; then nothing is pinned.

    Args:
        ref: A reference to a Store.
    """

    INTERFACE = SCHEMA.Store

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    async def resolve(self, text: str) -> str:
        """A CID, and what is below it, as it is written, or what a name stands for now.

        Args:
            text: "CID", "CID/PATH", "name:/site/live" or "name:/site/live//PATH". All that take a
                CID here take a name as well.

        Raises InvalidArgument "invalid.cid" for a name that stands for something else, and what
        `Session.named` does.
        """
        if not text.startswith(NAMED):
            return text
        session = getattr(self._ref, "session", None)
        if session is None:
            raise Unsupported(
                f"{text!r} is a name, and a capability alone knows none",
                hint="use the session's: session.blob",
                code="unsupported.names",
            )
        meant: str = await session.named(text)
        try:
            Cid.parse(meant.partition("/")[0])
        except InvalidArgument as exc:
            raise InvalidArgument(
                f"the name {text.removeprefix(NAMED)} stands for what is no CID",
                hint="`ww name get` shows what it stands for",
                code="invalid.cid",
            ) from exc
        return meant

    # --- putting ----------------------------------------------------------------------------------

    async def put(
        self,
        source: Source,
        *,
        car: bool = False,
        profile: str = "",
        bytes_max: int = 0,
        progress: Report | None = None,
        **terms: Unpack[Terms],
    ) -> Put:
        """Put and pin a file, or a directory with all that is in it; see BlobStore.

        Args:
            source: Bytes, a path, a descriptor, which stays open, or a stream.
            car: It is a CAR, whose blocks are put, and its root pinned.
            profile: How it is cut into blocks, "" for the node's default: other CIDs come of it.
            bytes_max: LimitExceeded beyond so many; 0: as many as a file has, no bound for others.
            progress: Called as it goes.
            terms: Of the pin.

        Raises LimitExceeded "limit.blob_quota" and "limit.blob_pins", InvalidArgument for what
        cannot be read or kept; see `disk.blocks_of`.
        """
        async with contextlib.AsyncExitStack() as opened:
            form, total = "car" if car else "file", 0
            if not car and await disk.run(_is_directory, source):
                form, path = "car", str(Path(source))  # type: ignore[arg-type]  # it is one
                size, feed = 0, opened.enter_context(_tree(path, profile_of(profile)))
                if progress is not None:
                    with disk.reading(path):
                        total = await disk.run(disk.tree_bytes, path)
            else:
                size, feed = await opened.enter_async_context(_file(source))
                total = size
            reply = await self._ref.call(
                "put", pin=terms, form=form, profile=profile, bytes_max=bytes_max or size or END
            )
            stream = rpc.ByteStream(_given(reply["stream"]))
            feeding = asyncio.create_task(_fed(stream, feed))
            ending = asyncio.create_task(_finished(reply["transfer"], progress, total))
            try:
                await asyncio.wait((feeding, ending), return_when=asyncio.FIRST_EXCEPTION)
                if feeding.done():
                    feeding.result()
                return await ending
            finally:
                for task in (feeding, ending):
                    task.cancel()
                await asyncio.gather(feeding, ending, return_exceptions=True)
                # Last: what ends the stream ends the work, of whose end nobody is told any more.
                stream.abort(WetwareError("the put is over"))

    # --- getting ----------------------------------------------------------------------------------

    def open(self, cid: str, *, local: bool = False) -> BlobFile:
        """A blob, or what is below one: `async with session.blob.open("CID/path") as blob`.

        Args:
            cid: A CID, or a CID, a slash and a path, or a name, see `resolve`.
            local: What this node has alone; the cluster is not asked.

        Raises InvalidArgument "invalid.cid" when it is entered.
        """

        async def opening() -> dict[str, Any]:
            root, _, path = (await self.resolve(cid)).partition("/")
            blob = (await self._ref.call("open", cid=root, local=local))["blob"]
            if not path.strip("/"):
                return {"blob": blob, "cid": root}
            with contextlib.closing(_given(blob)) as above:
                reply: dict[str, Any] = await above.call("at", path=path)
                return reply

        return BlobFile(cid, opening)

    async def get(
        self,
        cid: str,
        path: str | os.PathLike[str],
        *,
        car: bool = False,
        local: bool = False,
        force: bool = False,
        progress: Report | None = None,
    ) -> Entry:
        """Write a file or directory to `path`, whole and on disk when it returns.

        Until then it lies beside under `.NAME.CID.part`. That is removed if this is cancelled, and
        stays for a retry to go on from if it fails, or the process is killed. See `disk.Part`.

        Args:
            cid: As `open` takes it.
            path: What is there is not overwritten.
            car: All its blocks, as a CAR v1, whatever it is; never resumed.
            local: What this node has alone.
            force: Replace a file that is there.
            progress: Called as it goes.

        Raises NotFound "not_found.blob", disk.DiskError; InvalidArgument for names and links that
        lead out of the directory, of which nothing is left then.
        """
        async with self.open(cid, local=local) as blob:
            info = await blob.info()
            if not car and info.kind not in ("file", "directory"):
                raise InvalidArgument(
                    f"{cid} is a {info.kind}, which is neither a file nor a directory",
                    hint=f"ww blob export --car {cid}",
                    code="invalid.kind",
                )
            part = disk.Part(
                Path(path),
                blob.cid,
                directory=info.kind == "directory" and not car,
                size=info.size if info.kind == "file" and not car else None,
                force=force,
                resume=not car,
                told=lambda count: progress and progress(Progress(count, 0 if car else info.size)),
            )
            async with part.taken():
                if car:
                    stream = await blob.car()
                elif info.kind == "file":
                    stream = await blob.stream(part.start)
                else:
                    stream = await blob.tree(part.start)
                async with stream:
                    await part.write(stream)
            return info

    # --- pins -------------------------------------------------------------------------------------

    async def pin(self, cid: str, *, progress: Report | None = None, **terms: Unpack[Terms]) -> Put:
        """Fetch all of it that is not here, and pin it; a pin of that root and name is replaced."""
        root = await self.resolve(cid)
        reply = await self._ref.call("pin", root=root, pin=terms)
        return await _finished(reply["transfer"], progress)

    async def unpin(self, cid: str, name: str = "") -> int:
        """End own pins of `cid` of that name, or all; returns how many."""
        root = await self.resolve(cid)
        pins: int = (await self._ref.call("unpin", root=root, name=name))["pins"]
        return pins

    async def pins(self, cid: str = "") -> list[Pin]:
        """Own pins, the newest first, of `cid` alone unless that is ""."""
        return (await self._pages("pins", root=await self.resolve(cid)))[0]

    async def all(self) -> tuple[list[Pin], Usage]:
        """The pins of everybody at this node, and what its disk has; for operators."""
        pins, last = await self._pages("all")
        return pins, from_struct(Usage, last["usage"])

    async def _pages(self, method: str, **params: object) -> tuple[list[Pin], dict[str, Any]]:
        found: dict[tuple[str, str, str], Pin] = {}
        after, more = 0, True
        while more:
            reply = await self._ref.call(method, after=after, limit=PAGE, **params)
            for pin in (from_struct(Pin, pin) for pin in reply["pins"]):
                key = pin.owner, pin.root, pin.name
                found.pop(key, None)  # it was made anew meanwhile
                found[key] = pin
            after, more = reply["next"], reply["next"] > after
        return [*reversed(found.values())], reply

    async def rm(self, cid: str) -> Removed:
        """End all own pins of `cid`, and free what nothing keeps any more."""
        root = await self.resolve(cid)
        return from_struct(Removed, await self._ref.call("rm", root=root))

    # --- the node's store -------------------------------------------------------------------------

    async def usage(self) -> Usage:
        """What own pins are charged, and the limit."""
        return from_struct(Usage, (await self._ref.call("usage"))["usage"])

    async def gc(self, *, dry_run: bool = False, drop_damaged: bool = False) -> Collected:
        """Remove what nothing keeps, or say what that is; for operators.

        With `drop_damaged` pins that are damaged are given up first, and their copies elsewhere.
        """
        with rpc.time_limit(None):
            found = await self._ref.call("gc", dry_run=dry_run, drop_damaged=drop_damaged)
        return from_struct(Collected, found)

    async def drain(self, *, progress: Report | None = None) -> None:
        """Hand all that is pinned at the node to others, before it leaves; for operators."""
        await _finished((await self._ref.call("drain"))["transfer"], progress)

    def verify(self) -> rpc.Subscription[dict[str, Any]]:
        """Read all that the node has; what is damaged comes as it is found, see blob.capnp.

        Enter it with `async with` and read it with `async for` up to `what: "end"`. For operators.
        """
        return rpc.Subscription(lambda sink: self._ref.call("verify", sink=sink), _damage)


def _given(ref: Any) -> Any:
    """A reference that an answer has to have."""
    if ref is None:
        raise InternalError("the node answered without a capability")
    return ref


def _is_directory(source: Source) -> bool:
    return isinstance(source, str | os.PathLike) and os.path.isdir(source)


@contextlib.asynccontextmanager
async def _file(source: Source) -> AsyncIterator[tuple[int, Feed]]:
    """How many bytes it has, 0 where that is not known, and what sends them."""
    if isinstance(source, anyio.abc.ByteReceiveStream):
        yield 0, partial(_copied, partial(received, source), END)
    elif isinstance(source, bytes):
        yield len(source), partial(_copied, partial(disk.run, io.BytesIO(source).read), END)
    else:
        name = "standard input" if source == 0 else str(source)
        closing = not isinstance(source, int)
        with disk.reading(name):
            opened = await in_daemon(partial(io.FileIO, source, closefd=closing))
        with opened as file:
            found = os.fstat(file.fileno())
            regular = stat.S_ISREG(found.st_mode)

            async def more(count: int) -> bytes:
                with disk.reading(name):
                    return await (disk.run if regular else in_daemon)(os.read, file.fileno(), count)

            size = found.st_size if regular and closing else 0  # one that grows is what it was

            async def feed(stream: rpc.ByteStream) -> None:
                if not (size and await stream.send_file(file.fileno(), size)):
                    await _copied(more, size or END, stream)

            yield size, feed


@contextlib.contextmanager
def _tree(path: str, profile: Profile) -> Iterator[Feed]:
    """What sends the blocks of a directory."""
    blocks = disk.blocks_of(path, profile)

    async def feed(stream: anyio.abc.ByteSendStream) -> None:
        await stream.send(car_format.header(None))
        await _copied(lambda _: disk.run(disk.sections, blocks), END, stream)

    with contextlib.closing(blocks):
        yield feed


async def _copied(
    more: Callable[[int], Awaitable[bytes]], left: int, stream: anyio.abc.ByteSendStream
) -> None:
    """Send so many bytes of what `more` gives; what comes next is read meanwhile."""

    async def read() -> bytes:
        return await more(min(left, _READ_BYTES)) if left else b""

    reading = asyncio.create_task(read())
    try:
        while data := await reading:
            left -= len(data)
            reading = asyncio.create_task(read())
            await stream.send(data)
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _fed(stream: rpc.ByteStream, feed: Feed) -> None:
    """Send all. What ends it goes to the node, whose transfer says it, or what has ended that."""
    try:
        await feed(stream)
        await stream.send_eof()
    except WetwareError as exc:
        stream.abort(exc)


async def _finished(transfer: rpc.Ref | None, report: Report | None, total: int = 0) -> Put:
    """Wait for the end of a transfer, and let go of it; raises what ended it."""
    wait_s = _WAIT_S if report is None else _REPORT_S
    with contextlib.closing(_given(transfer)) as held:
        while True:
            with rpc.time_limit(_ANSWER_S):
                state = (await held.call("progress", wait_s=wait_s))["state"]
            if report is not None:
                total = state["total"] or total
                report(Progress(state["bytes"], total, state["copies"], state["doing"]))
            if state["done"]:
                return Put(state["root"], state["bytes"], state["copies"])


def _damage(item: bytes) -> dict[str, Any]:
    """See `Store.verify` in blob.capnp; raises InvalidArgument."""
    try:
        value = json.loads(item)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidArgument("the node sent what is no finding", code="invalid.message")
    return value
