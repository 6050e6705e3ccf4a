"""What is read: a Blob, and the streams that come of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from anyio import ClosedResourceError, EndOfStream

from wetware import rpc
from wetware.base.bounds import Recent
from wetware.base.log import get_logger
from wetware.errors import InternalError, InvalidArgument, NotFound, WetwareError
from wetware_blob.format import car
from wetware_blob.format.cid import RAW, BadBlock, Block, Cid
from wetware_blob.format.read import described, entries, read, resolve, stat, tree, walk
from wetware_blob.schema import SCHEMA

if TYPE_CHECKING:
    from wetware.base.tasks import Tasks
    from wetware_blob.exchange.fetch import Fetch
    from wetware_blob.format.build import Entry

log = get_logger("blob")

LIST_MAX: Final = 1000
"""Entries of one answer."""
CURSOR_S: Final = 60.0
CURSORS_MAX: Final = 16
"""Directories of which it is known where the last list has ended; a block of each is in memory."""
_END: Final = 2**64 - 1


Cursors = Recent["BlobServant", tuple[int, AsyncIterator["Entry"]]]
"""Where the last list of a directory has ended: so many entries, and what has those behind them.
Without that a directory of many pages would be read from its beginning for each."""


class Opened:
    """The blocks below a root, while some Blob of it is held. Nothing is looked up before `source`.

    Args:
        context: Gives the source, and keeps its blocks; see `Exchange.opened`.
        tasks: Where what goes on beside the calls is kept.
        cursors: Of its directories, and others.
    """

    def __init__(
        self,
        context: Callable[[], contextlib.AbstractContextManager[Fetch]],
        tasks: Tasks,
        cursors: Cursors,
    ) -> None:
        self._context, self.tasks, self.cursors = context, tasks, cursors
        self._held = contextlib.ExitStack()
        self._source: Fetch | None = None
        self.users = 0

    async def source(self) -> Fetch:
        if self._source is None or self._source.error is not None:
            self._let_go()  # who asks again tries again
            self._source = self._held.enter_context(self._context())
        source = self._source
        await asyncio.shield(source.ready)
        return source

    def leave(self) -> None:
        self.users -= 1
        if not self.users:
            self._let_go()

    def _let_go(self) -> None:
        self._source = None
        self._held.close()


class BlobServant(rpc.Servant, interface=SCHEMA.Blob):
    """See blob.capnp. Make it in a method of the servant that returns it."""

    def __init__(self, opened: Opened, cid: Cid) -> None:
        self._opened, self._cid = opened, cid
        opened.users += 1
        self._held = True
        self._unguard: Callable[[], None] = lambda: None
        if (guard := rpc.current_guard()) is not None:
            self._unguard = guard.on_end(lambda _: self._leave())

    def released(self) -> None:
        """Nobody holds it any more."""
        self._unguard()
        self._leave()

    def _leave(self) -> None:
        if self._held:
            self._held = False
            self._opened.cursors.discard(self)
            self._opened.leave()

    async def info(self) -> dict[str, Any]:
        return {"info": await _described(await self._opened.source(), "", self._cid)}

    async def stat(self) -> dict[str, Any]:
        return {"size": await self._size(await self._opened.source())}

    async def _size(self, source: Fetch) -> int:
        found = await stat(self._cid, source.get)
        if found.kind != "file":
            raise InvalidArgument(
                f"{self._cid} is a {found.kind}, not a file",
                hint="get all of it, or list a directory: ww blob get CID, ww blob ls CID",
                code="invalid.not_a_file",
            )
        return found.size

    async def read(self, start: int, end: int) -> dict[str, Any]:
        source = await self._opened.source()
        size = await self._size(source)

        async def send(stream: rpc.ByteStream) -> None:
            sent = start
            async for piece in read(self._cid, start, min(end, size), source.get, source.ahead):
                await stream.send(piece)
                sent += len(piece)
            if sent < min(end, size):
                raise BadBlock(f"{self._cid} has {size} bytes as it says, and ends after {sent}")

        if start > end:
            raise InvalidArgument(f"no range of bytes: {start} to {end}", code="invalid.range")
        return self._streamed(send)

    async def ls(self, skip: int, limit: int) -> dict[str, Any]:
        source = await self._opened.source()
        limit = min(limit or LIST_MAX, LIST_MAX)
        found: list[Entry] = []
        cursors = self._opened.cursors
        at, following = cursors.get(self) or (0, entries(self._cid, source.get, source.ahead))
        if at > skip:
            at, following = 0, entries(self._cid, source.get, source.ahead)
        cursors.discard(self)
        async for entry in following:
            at += 1
            if at > skip:
                found.append(entry)
            if len(found) == limit:
                cursors.put(self, (at, following))
                break
        source.ahead([each.cid for each in found if each.cid.codec != RAW])
        return {
            "entries": [await _listed(source, each) for each in found],
            "more": len(found) == limit,
        }

    async def at(self, path: str) -> dict[str, Any]:
        source = await self._opened.source()
        cid = await resolve(self._cid, path, source.get)
        return {"blob": BlobServant(self._opened, cid), "cid": str(cid)}

    async def tree(self, skip: int, start: int, end: int) -> dict[str, Any]:
        _check_all(start, end)
        source = await self._opened.source()
        await source.get(self._cid)  # what cannot be had is said at once

        async def send(stream: rpc.ByteStream) -> None:
            async def sent(cid: Cid) -> bytes:
                data = await source.get(cid)
                await stream.send(car.section(Block(cid, data)))
                return data

            await stream.send(car.header(self._cid))
            async for _ in tree(self._cid, sent, source.ahead, skip):
                pass

        return self._streamed(send)

    async def car(self, start: int, end: int) -> dict[str, Any]:
        _check_all(start, end)
        source = await self._opened.source()
        await source.get(self._cid)

        async def send(stream: rpc.ByteStream) -> None:
            await stream.send(car.header(self._cid))
            async for block in walk(self._cid, source.get, source.ahead):
                await stream.send(car.section(block))

        return self._streamed(send)

    def _streamed(self, send: Callable[[rpc.ByteStream], Awaitable[None]]) -> dict[str, Any]:
        stream = rpc.ByteStream()
        self._opened.users += 1  # what is read is kept, though the Blob be let go meanwhile
        self._opened.tasks.start(self._feed(stream, send))
        return {"stream": stream.servant}

    async def _feed(
        self, stream: rpc.ByteStream, send: Callable[[rpc.ByteStream], Awaitable[None]]
    ) -> None:
        try:
            await send(stream)
            await stream.send_eof()
            while True:  # the other end closes it when it has read all
                await stream.receive()
        except (EndOfStream, ClosedResourceError):
            await stream.aclose()
        except WetwareError as exc:
            stream.abort(exc)
        except Exception:
            log.exception("blob.read_failed", cid=str(self._cid))
            stream.abort(InternalError("reading failed; the node's log says why"))
        finally:
            stream.abort(NotFound("the blob is not read any more", code="not_found.blob"))
            self._opened.leave()


async def _listed(source: Fetch, entry: Entry) -> dict[str, Any]:
    """What a directory says of a raw leaf is all that there is to say: it is not fetched."""
    if entry.cid.codec == RAW:
        cid = str(entry.cid)
        return {"name": entry.name, "cid": cid, "kind": "file", "size": entry.tsize}
    return await _described(source, entry.name, entry.cid)


def _check_all(start: int, end: int) -> None:
    if (start, end) != (0, _END):
        raise InvalidArgument(
            "a part of it is not given in this form", hint="read a range", code="invalid.range"
        )


async def _described(source: Fetch, name: str, cid: Cid) -> dict[str, Any]:
    """An Entry of blob.capnp."""
    kind, size = await described(cid, source.get)
    return {"name": name, "cid": str(cid), "kind": kind, "size": size}
