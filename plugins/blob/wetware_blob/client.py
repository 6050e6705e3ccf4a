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
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

import anyio.abc
from anyio import EndOfStream

from wetware import rpc
from wetware.base.structs import from_struct
from wetware.errors import InternalError, InvalidArgument, OverlayError, WetwareError
from wetware_blob import disk
from wetware_blob.records import Writer
from wetware_blob.schema import SCHEMA

END: Final = (1 << 64) - 1
"""Of a range: up to the end; of a size: no bound."""
PAGE: Final = 1000
"""Pins or entries of one answer."""
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


_NO_TERMS: Final[Terms] = {"name": "", "copies": 0, "where": "", "ack": 0, "public": False}


@dataclass(frozen=True, slots=True)
class Put:
    """What was put or pinned.

    Attributes:
        cid: Its CID.
        bytes: How many were taken or fetched for it.
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
    damaged: int


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
    """An entry of a directory, or a blob itself, which has no name.

    Attributes:
        name: As it is in the directory: not safe to use as a path or to print.
        cid: Its CID.
        kind: "file", "directory", "symlink", or "dag" for what is no UnixFS.
        size: Of a file its bytes, of others what their blocks take.
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

    def __init__(self, cid: str, opening: Callable[[], Awaitable[tuple[Any, str]]]) -> None:
        self.cid, self._opening = cid, opening
        self._stream: rpc.ByteStream | None = None

    async def __aenter__(self) -> BlobFile:
        ref, self.cid = await self._opening()
        self.ref = _given(ref)
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

        async def opening() -> tuple[Any, str]:
            reply = await self.ref.call("at", path=path)
            return reply["blob"], reply["cid"]

        return BlobFile("", opening)

    async def tree(self, skip: int = 0) -> rpc.ByteStream:
        """All of it as `records` has it, but the first `skip` records."""
        return rpc.ByteStream(_given((await self.ref.call("tree", skip=skip))["stream"]))

    async def car(self) -> rpc.ByteStream:
        """All its blocks as a CAR v1."""
        return rpc.ByteStream(_given((await self.ref.call("car"))["stream"]))


Source = bytes | str | os.PathLike[str] | anyio.abc.ByteReceiveStream


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

    # --- putting ----------------------------------------------------------------------------------

    async def put(
        self,
        source: Source,
        *,
        profile: str = "",
        bytes_max: int = 0,
        progress: Report | None = None,
        **terms: Unpack[Terms],
    ) -> Put:
        """Put and pin a file; see BlobStore.

        Args:
            source: Its bytes, a path, or a stream.
            profile: How it is cut into blocks, "" for the node's default: other CIDs come of it.
            bytes_max: LimitExceeded beyond so many; 0: as many as a file has, no bound for others.
            progress: Called as it goes.
            terms: Of the pin.

        Raises LimitExceeded "limit.blob_quota" and "limit.blob_pins", InvalidArgument for a file
        that cannot be read.
        """
        return await self._put_bytes("file", source, profile, bytes_max, progress, terms)

    async def import_car(
        self,
        source: Source,
        *,
        bytes_max: int = 0,
        progress: Report | None = None,
        **terms: Unpack[Terms],
    ) -> Put:
        """Put the blocks of a CAR, and pin its root; as `put`."""
        return await self._put_bytes("car", source, "", bytes_max, progress, terms)

    async def put_dir(
        self,
        path: str | os.PathLike[str],
        *,
        profile: str = "",
        bytes_max: int = 0,
        progress: Report | None = None,
        **terms: Unpack[Terms],
    ) -> Put:
        """Put and pin a directory with all that is in it; see `disk.read_tree` and `put`."""
        with disk.reading(path):
            total = 0 if progress is None else await disk.run(disk.tree_bytes, Path(path))

        async def feed(stream: anyio.abc.ByteSendStream) -> None:
            await disk.read_tree(Path(path), Writer(stream))

        return await self._put("tree", feed, profile, bytes_max or END, progress, total, terms)

    async def _put_bytes(
        self,
        form: str,
        source: Source,
        profile: str,
        bytes_max: int,
        progress: Report | None,
        terms: Terms,
    ) -> Put:
        size, fd = 0, -1
        if isinstance(source, str | os.PathLike):
            with disk.reading(source):
                fd = await disk.run(os.open, source, os.O_RDONLY | os.O_CLOEXEC)
            size, more = os.fstat(fd).st_size, _reader(source, fd)
        elif isinstance(source, anyio.abc.ByteReceiveStream):
            more = source.receive
        else:
            size, more = len(source), _pieces(source)

        async def feed(stream: anyio.abc.ByteSendStream) -> None:
            left = size or END  # of a file that grows meanwhile, what it was
            with contextlib.suppress(EndOfStream):
                while left:
                    data = (await more(disk.CHUNK_BYTES))[:left]
                    await stream.send(data)
                    left -= len(data)

        try:
            bound = bytes_max or size or END
            return await self._put(form, feed, profile, bound, progress, size, terms)
        finally:
            if fd >= 0:
                os.close(fd)

    async def _put(
        self,
        form: str,
        feed: Callable[[anyio.abc.ByteSendStream], Awaitable[None]],
        profile: str,
        bytes_max: int,
        progress: Report | None,
        total: int,
        terms: Terms,
    ) -> Put:
        reply = await self._ref.call(
            "put", pin=_NO_TERMS | terms, form=form, profile=profile, bytes_max=bytes_max
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
            cid: A CID, or a CID, a slash and a path.
            local: What this node has alone; the cluster is not asked.

        Raises InvalidArgument "invalid.cid" when it is entered.
        """

        async def opening() -> tuple[Any, str]:
            root, _, path = cid.partition("/")
            blob = (await self._ref.call("open", cid=root, local=local))["blob"]
            if not path.strip("/"):
                return blob, root
            with contextlib.closing(_given(blob)) as above:
                reply = await above.call("at", path=path)
            return reply["blob"], reply["cid"]

        return BlobFile(cid, opening)

    async def get(
        self,
        cid: str,
        path: str | os.PathLike[str],
        *,
        local: bool = False,
        resume: bool = True,
        force: bool = False,
        progress: Report | None = None,
    ) -> Entry:
        """Write a file or directory to `path`, whole and on disk when it returns.

        Until then it lies beside under `.NAME.CID.part`. That is removed if this is cancelled, and
        stays for a retry to go on from if it fails, or the process is killed. See `disk.Part`.

        Args:
            cid: As `open` takes it.
            path: What is there is not overwritten.
            local: What this node has alone.
            resume: Go on with what an earlier call has left.
            force: Replace a file that is there.
            progress: Called as it goes.

        Raises NotFound "not_found.blob", disk.DiskError; InvalidArgument for names and links that
        lead out of the directory, of which nothing is left then.
        """
        async with self.open(cid, local=local) as blob:
            info = await blob.info()
            if info.kind not in ("file", "directory"):
                raise InvalidArgument(
                    f"{cid} is a {info.kind}, which is neither a file nor a directory",
                    hint=f"ww blob export --car {cid}",
                    code="invalid.kind",
                )
            directory = info.kind == "directory"
            part = disk.Part(Path(path), blob.cid, directory=directory, force=force, resume=resume)

            def told() -> None:
                if progress is not None:
                    progress(Progress(part.bytes, info.size))

            try:
                await disk.run(part.open)
                told()
                if directory:
                    async with await blob.tree(part.start) as stream:
                        await part.write_tree(stream, told)
                else:
                    async with await blob.stream(part.start) as stream:
                        await part.write_file(stream, info.size, told)
                await disk.run(part.publish)
            except BaseException as exc:
                gone = isinstance(exc, asyncio.CancelledError | InvalidArgument)
                if gone or not part.resumable:
                    await disk.run(part.discard)
                elif isinstance(exc, OverlayError):
                    exc.hint = "the same again: it goes on from what has come"
                raise
            finally:
                part.close()
            return info

    async def export_car(
        self,
        cid: str,
        path: str | os.PathLike[str],
        *,
        local: bool = False,
        force: bool = False,
        progress: Report | None = None,
    ) -> None:
        """Write all blocks of a blob to `path` as a CAR v1, whole and on disk when it returns."""
        async with self.open(cid, local=local) as blob, await blob.car() as stream:
            part = disk.Part(Path(path), blob.cid, directory=False, force=force, resume=False)

            def told() -> None:
                if progress is not None:
                    progress(Progress(part.bytes))

            try:
                await disk.run(part.open)
                await part.write_file(stream, None, told)
                await disk.run(part.publish)
            except BaseException:
                await disk.run(part.discard)
                raise
            finally:
                part.close()

    # --- pins -------------------------------------------------------------------------------------

    async def pin(self, cid: str, *, progress: Report | None = None, **terms: Unpack[Terms]) -> Put:
        """Fetch all of it that is not here, and pin it; a pin of that root and name is replaced."""
        reply = await self._ref.call("pin", root=cid, pin=_NO_TERMS | terms)
        return await _finished(reply["transfer"], progress)

    async def unpin(self, cid: str, name: str = "") -> int:
        """End own pins of `cid` of that name, or all; returns how many."""
        pins: int = (await self._ref.call("unpin", root=cid, name=name))["pins"]
        return pins

    async def pins(self, cid: str = "") -> list[Pin]:
        """Own pins, the newest first, of `cid` alone unless that is ""."""
        return (await self._pages("pins", root=cid))[0]

    async def all(self) -> tuple[list[Pin], Usage]:
        """The pins of everybody at this node, and what its disk has; for operators."""
        pins, last = await self._pages("all")
        return pins, from_struct(Usage, last["usage"])

    async def _pages(self, method: str, **params: object) -> tuple[list[Pin], dict[str, Any]]:
        found: list[Pin] = []
        skip, matched = 0, 1
        while skip < matched:
            reply = await self._ref.call(method, skip=skip, limit=PAGE, **params)
            found += (from_struct(Pin, pin) for pin in reply["pins"])
            skip, matched = skip + PAGE, reply["matched"]
        return found, reply

    async def rm(self, cid: str) -> Removed:
        """End all own pins of `cid`, and free what nothing keeps any more."""
        return from_struct(Removed, await self._ref.call("rm", root=cid))

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


class _Lost(Exception):  # it is no error of ours: the transfer says what it is
    """The node takes no more."""


class _Sending:
    """A stream to the node, of which the transfer says why it has ended."""

    def __init__(self, stream: rpc.ByteStream) -> None:
        self._stream = stream

    async def send(self, item: bytes) -> None:
        try:
            await self._stream.send(item)
        except (WetwareError, anyio.ClosedResourceError) as exc:
            raise _Lost from exc


async def _fed(
    stream: rpc.ByteStream, feed: Callable[[anyio.abc.ByteSendStream], Awaitable[None]]
) -> None:
    """Send all; raises what goes wrong here."""
    with contextlib.suppress(_Lost):
        await feed(_Sending(stream))  # type: ignore[arg-type]  # all of it that is used
        await stream.send_eof()


async def _finished(transfer: rpc.Ref | None, report: Report | None, total: int = 0) -> Put:
    """Wait for the end of a transfer, and let go of it; raises what ended it."""
    with contextlib.closing(_given(transfer)):
        while True:
            with rpc.time_limit(_ANSWER_S):
                wait_s = _WAIT_S if report is None else _REPORT_S
                state = (await _given(transfer).call("progress", wait_s=wait_s))["state"]
            if report is not None:
                total = state["total"] or total
                report(Progress(state["bytes"], total, state["copies"], state["doing"]))
            if state["done"]:
                return Put(state["root"], state["bytes"], state["copies"])


def _reader(path: str | os.PathLike[str], fd: int) -> Callable[[int], Awaitable[bytes]]:
    async def more(max_bytes: int) -> bytes:
        with disk.reading(path):
            data = await disk.run(os.read, fd, max_bytes)
        if not data:
            raise EndOfStream
        return data

    return more


def _pieces(data: bytes) -> Callable[[int], Awaitable[bytes]]:
    at = 0

    async def more(max_bytes: int) -> bytes:
        nonlocal at
        at += max_bytes
        if at - max_bytes >= len(data):
            raise EndOfStream
        return data[at - max_bytes : at]

    return more


def _damage(item: bytes) -> dict[str, Any]:
    """See `Store.verify` in blob.capnp; raises InvalidArgument."""
    try:
        value = json.loads(item)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidArgument("the node sent what is no finding", code="invalid.message")
    return value
