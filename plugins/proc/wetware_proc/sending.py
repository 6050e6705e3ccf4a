"""What a client sends to a node: programs, and directories as archives, which the node reads."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from wetware import rpc
from wetware.base.tasks import Tasks
from wetware.base.texts import NAMED
from wetware.errors import WetwareError

_PIECE_BYTES: Final = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sending:
    """How far a directory is that is sent, in bytes."""

    bytes: int
    total: int
    doing: str = ""


@dataclass(frozen=True, slots=True)
class Archive:
    """A directory that is ready to be sent: see `archived`.

    Attributes:
        file: A file without a name.
        size: Of the archive, bytes.
        hash: SHA-256 of it, in hex.
        told: Is called with Sending as it is sent.
    """

    file: IO[bytes]
    size: int
    hash: str
    told: Callable[[Sending], object] | None = None

    def source(self) -> rpc.Servant:
        """For the node to read."""
        return Source(self.size, partial(os.pread, self.file.fileno()), self.told)


Dir = str | os.PathLike[str]
"""A name ("name:/site/live"), a directory of this machine, or a text that is neither: a CID."""


async def archived(
    stack: contextlib.ExitStack,
    directory: str | os.PathLike[str],
    told: Callable[[Sending], object] | None,
    blobs: Callable[[], Any],
) -> Archive:
    """A directory as an archive, which lives as long as the stack; `blobs` gives `session.blob`."""
    above = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108  # a file without a name
    file = stack.enter_context(tempfile.TemporaryFile(dir=above))  # noqa: SIM115  # it is
    path = Path(directory)
    is_name = isinstance(directory, str) and directory.startswith(NAMED)
    if is_name or (isinstance(directory, str) and not path.is_dir()):  # noqa: ASYNC240  # takes no time
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ww-", dir=above)), "it")
        await blobs().get(directory, path, progress=told)

    def packed() -> Archive:
        from wetware_proc.archive import pack

        pack(path, file)
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        return Archive(file, size, digest.hexdigest(), told)

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
