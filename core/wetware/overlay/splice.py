"""Two streams of the link tied together: what arrives on one leaves on the other in the same turn.

A relay's work for each byte. Nothing is read that is not taken at the other end: the window comes
back to the sender only for what has been passed on, so a slow end holds up its peer and no memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from wetware.errors import OverlayError

if TYPE_CHECKING:
    from wetware.base.bounds import TokenBucket
    from wetware.overlay.link import Stream
    from wetware.overlay.link.yamux import Bytes

_COPIED_BYTES: Final = 16 << 10
"""Smaller pieces that wait are copied together: a view of one byte keeps a message of 64 KiB."""


class _Way:
    """One direction."""

    def __init__(
        self,
        source: Stream,
        target: Stream,
        pace: Callable[[], TokenBucket],
        over: Callable[[_Way, Exception | None], None],
    ) -> None:
        self.source, self.target, self._pace, self._over = source, target, pace, over
        self._rest: deque[Bytes] = deque()  # at most the source's window
        self._ended = False

    def data(self, data: Bytes) -> None:
        rest = self._rest
        if not rest:
            rest.append(data)
            self.writable()
        elif len(data) >= _COPIED_BYTES:
            rest.append(data)
        elif isinstance(last := rest[-1], bytearray) and len(last) < _COPIED_BYTES:
            last += data
        else:
            rest.append(bytearray(data))

    def writable(self) -> None:
        """Pass on what the target takes."""
        try:
            while self._rest:
                data = self._rest.popleft()
                taken = self.target.write_nowait(data)
                self._credit(taken)
                if taken < len(data):
                    self._rest.appendleft(memoryview(data)[taken:])
                    return
        except OverlayError as exc:
            self._over(self, exc)
            return
        if self._ended:
            self._over(self, None)

    def _credit(self, count: int) -> None:
        bucket = self._pace()
        bucket.spend(count)
        if wait_s := bucket.wait_s():
            asyncio.get_running_loop().call_later(wait_s, self.source.consumed, count)
        elif count:
            self.source.consumed(count)

    def end(self, error: Exception | None) -> None:
        self._ended = True
        if error is not None or not self._rest:
            self._over(self, error)


async def splice(left: Stream, right: Stream, pace: Callable[[], TokenBucket]) -> None:
    """Carry both ways until one end has no more, or fails; both streams have ended then.

    Args:
        left: One end.
        right: The other one.
        pace: What each byte is taken from, asked for each piece.

    Raises what failed. What the end that is done had said before still arrives.
    """
    ended: asyncio.Future[_Way] = asyncio.get_running_loop().create_future()

    def over(way: _Way, error: Exception | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(way)
        else:
            ended.set_exception(error)

    forth, back = _Way(left, right, pace, over), _Way(right, left, pace, over)
    try:
        left.attach(forth.data, forth.end, back.writable)
        right.attach(back.data, back.end, forth.writable)
        way = await ended
        way.source.detach()
        way.target.detach()
        way.target.finish()
        way.source.reset()
    except BaseException:
        for stream in (left, right):
            stream.detach()
            stream.reset()
        raise
