"""What a `Ww.Source` has: read from another, who may say one thing and send another; or given.

A client gives a node programs, and directories as archives.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from wetware import rpc
from wetware.base.tasks import Tasks
from wetware.base.texts import NAMED
from wetware.errors import InvalidArgument, LimitExceeded, WetwareError

_PIECE_BYTES: Final = 1 << 20

T = TypeVar("T")

# --- reading -------------------------------------------------------------------------------------


async def file_bytes(path: str | os.PathLike[str], what: str = "") -> bytes:
    """A file of the user's, `what` for people; raises InvalidArgument "invalid.unreadable"."""
    try:
        return await _in_thread(Path(path).read_bytes)
    except OSError as exc:
        raise InvalidArgument(
            f"cannot read {what}{os.fspath(path)!r}: {exc.strerror}", code="invalid.unreadable"
        ) from exc


async def size_of(source: rpc.Ref, what: str, bytes_max: int) -> int:
    """How many bytes it says to have; raises LimitExceeded for more than `bytes_max`."""
    size: int = (await source.call("stat"))["size"]
    if size > bytes_max:
        raise LimitExceeded(f"{what} of {size} bytes; at most {bytes_max} are taken")
    return size


async def read(
    source: rpc.Ref, what: str, size: int, take: Callable[[bytes], Awaitable[object] | object]
) -> None:
    """Give all of it to `take`, piece by piece; raises InvalidArgument where it has not `size`."""
    reply, left = await source.call("read", start=0, end=size), size
    if reply["stream"] is None:
        raise InvalidArgument(f"the source of {what} has given no stream")
    async with rpc.ByteStream(reply["stream"]) as stream:
        async for data in stream:
            left -= len(data)
            if left < 0:
                break
            if (taking := take(data)) is not None:
                await taking  # type: ignore[misc]  # what is awaitable
    if left:
        raise InvalidArgument(f"{what} of {size} bytes has another length than it says")


@contextlib.asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Raise LimitExceeded where the block takes longer."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise LimitExceeded(
            f"the source has not given {what} within {seconds:g} s (READ_S)"
        ) from None


# --- giving --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sending:
    """How far a directory is that is sent, in bytes."""

    bytes: int
    total: int
    doing: str = ""


Dir = str | os.PathLike[str]
"""A name ("name:/site/live"), a directory of this machine, or a text that is neither: a CID."""


async def archived(
    stack: contextlib.ExitStack,
    directory: str | os.PathLike[str],
    told: Callable[[Sending], object] | None,
    blobs: Callable[[], Any],
) -> dict[str, Any]:
    """A directory as an archive, of the struct Dir of proc.capnp `tree` and `hash`.

    It is on disk, below TMPDIR or /var/tmp, and lives as long as the stack. `blobs` gives
    `session.blob`; `told` is called as it is sent. Raises as `archive.pack` and reading a blob do.
    """
    above = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108  # a file without a name
    file = stack.enter_context(tempfile.TemporaryFile(dir=above))  # noqa: SIM115  # it is
    path = Path(directory)
    is_name = isinstance(directory, str) and directory.startswith(NAMED)
    if is_name or (isinstance(directory, str) and not path.is_dir()):  # noqa: ASYNC240  # takes no time
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ww-", dir=above)), "it")
        await blobs().get(directory, path, progress=told)

    def packed() -> dict[str, Any]:
        from wetware_proc.archive import pack

        pack(path, file)
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        source = Source(size, partial(os.pread, file.fileno()), told)
        return {"tree": source, "hash": digest.hexdigest()}

    return await _in_thread(packed)


class Source(rpc.Servant, interface=rpc.WW.Source):
    """Bytes of ours, for the node to read: `data(count, start)` gives some of them."""

    def __init__(
        self,
        size: int,
        data: Callable[[int, int], bytes],
        told: Callable[[Sending], object] | None = None,
    ) -> None:
        self._size, self._data, self._told = size, data, told
        self._tasks = Tasks()

    async def stat(self) -> dict[str, Any]:
        return {"size": self._size}

    async def read(self, start: int, end: int) -> dict[str, Any]:
        stream = rpc.ByteStream()
        self._tasks.start(self._send(stream, start, min(end, self._size)))
        return {"stream": stream.servant}

    async def _send(self, stream: rpc.ByteStream, start: int, end: int) -> None:
        with contextlib.suppress(WetwareError):  # the node says itself why it wants no more
            for at in range(start, end, _PIECE_BYTES):
                await stream.send(await _in_thread(self._data, min(_PIECE_BYTES, end - at), at))
                if self._told is not None:
                    self._told(Sending(min(at + _PIECE_BYTES, end), self._size))
            await stream.send_eof()
            await stream.aclose()


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)
