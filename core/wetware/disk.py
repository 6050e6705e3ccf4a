"""What the writers of a node's decisions share: reserved space, and answers from their threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import asyncio

RESERVED_FILE: Final = "reserved"
RESERVED_BYTES: Final = 1 << 20
"""Given up when the disk is full, for what has taken effect and has to be written."""


def reserve(directory: Path) -> None:
    """Take the space; raises OSError where it is not there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    fd = os.open(directory / RESERVED_FILE, flags, 0o600)
    try:
        if os.fstat(fd).st_size < RESERVED_BYTES:
            os.posix_fallocate(fd, 0, RESERVED_BYTES)
    finally:
        os.close(fd)


def give_up_reserve(directory: Path) -> None:
    """Make room. Idempotent."""
    with contextlib.suppress(OSError):
        (directory / RESERVED_FILE).unlink()


def answer(
    loop: asyncio.AbstractEventLoop,
    future: asyncio.Future[Any],
    result: object,
    error: Exception | None,
    answered: Callable[[], None],
) -> None:
    """Settle, from another thread, what somebody waits for on the loop; then call `answered` there.

    One who has stopped waiting gets nothing; a loop that is closed, too.
    """

    def done() -> None:
        answered()
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(done)
