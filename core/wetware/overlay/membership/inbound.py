"""Frames from members: one stream of each peer, read at the pace that it is allowed.

A peer that breaks the framing loses its stream, and after some repetitions its turn for a while.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from wetware.base.bounds import TokenBucket
from wetware.base.log import get_logger
from wetware.errors import WetwareError
from wetware.overlay.membership.record import Malformed

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.link import Connection, Stream

log = get_logger("membership")

FRAMES_PER_S, FRAMES_BURST = 200.0, 2000
"""Frames taken from one peer. An honest one sends a handful in a second, and more when it joins;
who sends faster is read more slowly, and its own window stops it."""
BYTES_PER_S, BYTES_BURST = 2.0 * (1 << 20), 8 << 20
"""The same in bytes: a thousand records are half a MiB."""
FRAME_S_MAX = 10.0
"""From the length of a frame to its last byte."""
PENALTY_FREE = 2
"""Broken frames that are forgiven; each one more doubles the time for which a peer is not heard."""
PENALTY_S_MIN, PENALTY_S_MAX = 1.0, 300.0
PENALTIES_MAX = 4096


class Penalties:
    """Who broke the framing so often that it is not heard for a while."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._peers: OrderedDict[PeerId, tuple[int, float]] = OrderedDict()  # count, until

    def add(self, peer: PeerId) -> float:
        """One more broken frame; returns for how long the peer is not heard."""
        count, until = self._peers.pop(peer, (0, 0.0))
        if until and self._now() - until > PENALTY_S_MAX:
            count = 0  # it has behaved for a while
        count += 1
        over = count - PENALTY_FREE
        penalty_s = min(PENALTY_S_MAX, PENALTY_S_MIN * 2.0 ** min(over - 1, 32)) if over > 0 else 0
        self._peers[peer] = (count, self._now() + penalty_s)
        while len(self._peers) > PENALTIES_MAX:
            self._peers.popitem(last=False)
        return penalty_s

    def muted(self, peer: PeerId) -> bool:
        """Whether the peer is not heard now."""
        return peer in self._peers and self._now() < self._peers[peer][1]


class Inbound:
    """The streams that peers have opened.

    Args:
        frame_bytes_max: Of one frame.
        now: Monotonic seconds.
        receive: Gets each frame; raises WetwareError to end the stream, Malformed also to blame.
        moved: Told of a peer that opens a stream on another connection than the one before.
    """

    def __init__(
        self,
        frame_bytes_max: int,
        *,
        now: Callable[[], float],
        receive: Callable[[PeerId, bytes], None],
        moved: Callable[[Connection, Connection], None],
    ) -> None:
        self._frame_bytes_max, self._now = frame_bytes_max, now
        self._receive, self._moved = receive, moved
        self.counters: Counter[str] = Counter()
        self._streams: dict[PeerId, Stream] = {}
        self._paces: dict[PeerId, tuple[TokenBucket, TokenBucket]] = {}
        self._penalties = Penalties(now)

    def forget(self, peer: PeerId) -> None:
        """The last connection to a peer went."""
        self._paces.pop(peer, None)

    def end(self, peer: PeerId) -> None:
        """Hear nothing of a peer on the stream that it has."""
        if (stream := self._streams.get(peer)) is not None:
            stream.reset()

    def close(self) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.reset()

    async def listen(self, stream: Stream) -> None:
        """Take the frames of a stream until it ends, or its peer opens another."""
        peer = stream.peer
        if self._penalties.muted(peer):
            self.counters["streams_refused"] += 1
            stream.reset()
            return
        if (previous := self._streams.get(peer)) is not None:
            if previous.connection is not stream.connection:
                self._moved(previous.connection, stream.connection)
            previous.reset()
        self._streams[peer] = stream
        try:
            await self._read(peer, stream)
        except Malformed as exc:
            stream.reset()
            penalty_s = self._penalties.add(peer)
            self.counters["frames_malformed"] += 1
            log.warning("frame.malformed", peer=peer, why=exc, muted_s=penalty_s)
        except (WetwareError, EOFError) as exc:
            log.debug("stream.ended", peer=peer, why=exc)
            stream.reset()
        finally:
            if self._streams.get(peer) is stream:
                del self._streams[peer]

    async def _read(self, peer: PeerId, stream: Stream) -> None:
        frames, nbytes = self._pace(peer)
        while True:
            try:
                size = int.from_bytes(await stream.read_exactly(4), "big")
            except asyncio.IncompleteReadError as exc:
                if exc.partial:
                    raise Malformed("the stream ends within a frame") from None
                return
            if not 0 < size <= self._frame_bytes_max:
                raise Malformed(f"a frame of {size} bytes; 1 to {self._frame_bytes_max}")
            try:
                async with asyncio.timeout(FRAME_S_MAX):
                    frame = await stream.read_exactly(size)
            except TimeoutError:
                raise Malformed(f"a frame took longer than {FRAME_S_MAX:g} s") from None
            except asyncio.IncompleteReadError:
                raise Malformed("the stream ends within a frame") from None
            # Who sends faster is read more slowly: its window closes, and it has to wait.
            for bucket, count in ((frames, 1), (nbytes, size)):
                while not bucket.take(count):
                    self.counters["throttled"] += 1
                    await asyncio.sleep(0.1)
            if self._streams.get(peer) is not stream:
                return
            self.counters["frames_in"] += 1
            self._receive(peer, frame)
            # Others get the loop: frames that have all arrived would not wait for anything.
            await asyncio.sleep(0)

    def _pace(self, peer: PeerId) -> tuple[TokenBucket, TokenBucket]:
        """Kept while the peer is connected: a new stream is no new allowance."""
        pace = self._paces.get(peer)
        if pace is None:
            pace = self._paces[peer] = (
                TokenBucket(FRAMES_PER_S, FRAMES_BURST, self._now),
                TokenBucket(BYTES_PER_S, BYTES_BURST + self._frame_bytes_max, self._now),
            )
        return pace
