"""Frames to members: each peer has a bounded queue, and one stream that this side opened.

A peer that does not read loses the oldest of what waits for it, and then its stream; nobody else
waits for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from wetware.base.backoff import Backoff
from wetware.base.log import get_logger
from wetware.errors import DialError, OverlayError, WetwareError

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.link import Stream
    from wetware.overlay.membership.reach import Reach

log = get_logger("membership")

PROTOCOL: Final = "/wetware/membership/1.0.0"
QUEUE_FRAMES_MAX = 512
"""Frames that wait for one peer; the bytes are bounded by `queue_bytes_max` of the config."""
OPEN_S_MAX = 5.0
"""For a stream to be opened on a live connection."""
STALL_S_MAX = 10.0
"""A peer that takes nothing for so long loses its stream, and starts anew when it reads again."""
REOPEN_S_MIN, REOPEN_S_MAX = 0.05, 10.0
IDLE_S = 60.0
"""A stream to a peer that is not kept connected ends after so long without a frame."""


class Outlet:
    """What goes to one peer."""

    def __init__(self, courier: Courier, peer: PeerId) -> None:
        self._courier, self.peer = courier, peer
        self.frames: deque[bytes] = deque()  # whole ones, with their lengths
        self.bytes = 0
        self.head = b""  # the rest of a frame of which a part was sent
        self.stream: Stream | None = None
        self.opening = self.closed = False
        self._backoff = Backoff(REOPEN_S_MIN, REOPEN_S_MAX, courier.reach.rng)
        self._retry_at = 0.0
        self._stalled_at: float | None = None
        self._used_at = courier.now()

    @property
    def waits(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self.frames or self.head)

    def send(self, frame: bytes) -> None:
        """Queue a frame; the oldest give way where the queue is full."""
        courier = self._courier
        self._used_at = courier.now()
        self.frames.append(len(frame).to_bytes(4, "big") + frame)
        self.bytes += len(frame) + 4
        while self.bytes > courier.queue_bytes_max or len(self.frames) > QUEUE_FRAMES_MAX:
            self.bytes -= len(self.frames.popleft())
            courier.counters["frames_dropped"] += 1
        if self.stream is not None:
            self._pump(self.stream)
        else:
            self.open()

    def _pump(self, stream: Stream) -> None:
        """Hand to the link what it takes."""
        try:
            while self.waits:
                if self.head:
                    data = self.head
                else:
                    data = self.frames.popleft()
                    self.bytes -= len(data)
                taken = stream.write_nowait(data)
                self.head = data[taken:]
                if self.head:
                    if taken or self._stalled_at is None:
                        self._stalled_at = self._courier.now()
                    return
            self._stalled_at = None
            self._courier.emptied.set()
        except OverlayError:
            self._ended(stream)

    def open(self) -> None:
        if not self.opening:
            name = f"membership {self.peer.short}"
            self.opening = self._courier.reach.spawn(self._connect(), name)

    async def _connect(self) -> None:
        """Open the stream, on the connection that there is or a new one."""
        reach, peer = self._courier.reach, self.peer
        try:
            if (pause_s := self._retry_at - self._courier.now()) > 0:
                if reach.connected(peer) is None:
                    self._unreachable(DialError(f"{peer} was not reached a moment ago"))
                    return
                await asyncio.sleep(pause_s)
            connection = await reach.connect(peer, patient=True)
            async with asyncio.timeout(OPEN_S_MAX):
                stream = await connection.open_stream(PROTOCOL)
        except TimeoutError:
            self._unreachable(DialError(f"{peer} opens no stream"))
        except WetwareError as exc:
            self._unreachable(exc)
        except Exception as exc:  # one peer's trouble is not the others'
            log.exception("membership.open_failed", peer=peer)
            self._unreachable(exc)
        else:
            if self.closed:
                stream.reset()  # the peer went, or was evicted, meanwhile
                return
            stream.urgent = True
            self.stream = stream
            # Each side speaks on its own stream: nothing is expected here but its end.
            stream.attach(
                lambda _data: self._ended(stream),
                lambda _exc: self._ended(stream),
                lambda: self._pump(stream),
            )
            if self.stream is not None:
                self._pump(stream)
        finally:
            self.opening = False

    def _unreachable(self, exc: Exception) -> None:
        if self.closed:
            return
        courier = self._courier
        if courier.now() >= self._retry_at:
            self._retry_at = courier.now() + self._backoff.pause_s()
            log.debug("peer.not_told", peer=self.peer, why=exc)
        self.clear()
        courier.unreachable(self.peer)

    def _ended(self, stream: Stream) -> None:
        """The stream is over; the next frame opens another."""
        if self.stream is not stream:
            return
        self.stream, self._stalled_at, self.head = None, None, b""
        stream.detach()
        stream.reset()
        # Not at once, or a peer that refuses every stream would keep this node busy.
        again_at = self._courier.now() + self._backoff.pause_s()
        self._retry_at = max(self._retry_at, again_at)
        if self.frames:
            self.open()

    def peer_up(self) -> None:
        """It can be tried at once."""
        self._retry_at = 0.0
        self._backoff.reset()

    def look_after(self) -> bool:
        """End a stream that does not move; whether this outlet is of use to anybody."""
        idle = self._courier.now() - self._used_at > IDLE_S
        if self.stream is None:
            return self.opening or bool(self.frames) or not idle
        if self.stream.connection.superseded and not self.head:
            old, self.stream = self.stream, None
            old.detach()
            old.finish()  # what was written still arrives
            self.open()
            return True
        if self._stalled_at is None:
            self._backoff.reset()
        elif self._courier.now() - self._stalled_at > STALL_S_MAX:
            log.warning("peer.fell_behind", peer=self.peer, stalled_s=STALL_S_MAX)
            self.clear()
            self._courier.counters["streams_stalled"] += 1
            self._ended(self.stream)
            return True
        return not idle or self._courier.reach.wants(self.peer)

    def clear(self) -> None:
        """What waits is not sent any more."""
        self._courier.counters["frames_dropped"] += len(self.frames)
        self.frames.clear()
        self.bytes, self.head = 0, b""
        self._courier.emptied.set()

    def close(self) -> None:
        self.closed = True
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.detach()
            if self.head:  # a clean end within a frame would look like a broken peer
                stream.reset()
            else:
                stream.finish()  # what was written still leaves
        self.clear()


class Courier:
    """The outlets to all peers; `unreachable` is told of those that cannot be told anything."""

    def __init__(
        self, reach: Reach, queue_bytes_max: int, unreachable: Callable[[PeerId], None]
    ) -> None:
        self.reach, self.queue_bytes_max, self.unreachable = reach, queue_bytes_max, unreachable
        self.now = reach.now
        self.counters: Counter[str] = Counter()
        self.emptied = asyncio.Event()  # some outlet has nothing to send any more
        self._outlets: dict[PeerId, Outlet] = {}

    def outlet(self, peer: PeerId) -> Outlet:
        if (outlet := self._outlets.get(peer)) is None:
            outlet = self._outlets[peer] = Outlet(self, peer)
        return outlet

    def send(self, peer: PeerId, frame: bytes) -> None:
        """Never raises, and never waits."""
        self.outlet(peer).send(frame)

    def peer_up(self, peer: PeerId) -> None:
        if (outlet := self._outlets.get(peer)) is not None:
            outlet.peer_up()

    def drop(self, peer: PeerId) -> None:
        """Nothing goes to a peer any more. Idempotent."""
        if (outlet := self._outlets.pop(peer, None)) is not None:
            outlet.close()

    def look_after(self) -> None:
        """Every second: end what does not move, and what nobody uses."""
        for peer, outlet in list(self._outlets.items()):
            if not outlet.look_after():
                self.drop(peer)

    async def drained(self) -> None:
        """Wait until nothing waits to be sent."""
        while any(outlet.waits for outlet in self._outlets.values()):
            self.emptied.clear()
            await self.emptied.wait()

    def close(self) -> None:
        for outlet in self._outlets.values():
            outlet.close()
