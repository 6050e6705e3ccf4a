"""The router on the overlay's streams: one stream to each peer, one from it, and a heartbeat.

As in every GossipSub implementation a stream carries RPCs one way: each side speaks on the stream
that it opened. A peer that cannot keep up, or breaks the protocol, loses its stream; it starts
again with a greeting, and nobody else waits for it. Where a better connection comes up the stream
moves there: what was said on the old one is heard first, and nothing is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from wetware.errors import OverlayError, WetwareError
from wetware.hookspecs import Access, Clock, Overlay, PeerDown, PeerUp
from wetware.identity import PeerId, replace_private_file
from wetware_pubsub.order import Sequencer
from wetware_pubsub.router import PROTOCOLS, Received, Router
from wetware_pubsub.wire import SIGN_DOMAIN, FrameReader, Malformed

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.hookspecs import EventLogger
    from wetware.overlay.link import Stream
    from wetware_pubsub.config import PubSubConfig

_READ_BYTES = 64 << 10
_SLICE_S = 0.005  # received messages are checked for so long before others get the loop
_REOPEN_S_MIN, _REOPEN_S_MAX = 0.05, 10.0
_REOPEN_BEHIND_S = 1.0  # for a peer that did not keep up: let it breathe
_MOVE_S_MAX = 5.0  # for what is on its way on a stream that its peer has moved from
_EPOCH_FILE = "epoch"


class _FellBehind(OverlayError):
    """The peer's queue overflowed, or it took nothing for too long."""

    code = "overlay.fell_behind"


class EpochFile:
    """Keeps which epochs of message numbers may be in use, so that a restart never repeats one.

    A clock that was set back while the node was down would otherwise make every peer take its
    messages for replays.
    """

    def __init__(self, path: Path, log: EventLogger) -> None:
        self._path, self._log = path, log

    def load(self) -> int:
        """The first epoch that is certainly unused; 0 if the file is missing or damaged."""
        try:
            return max(0, int(self._path.read_text()[:32]))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as exc:
            self._log.warning("epoch.unreadable", file=self._path.name, error=exc)
            return 0

    def reserve(self, below: int) -> None:
        """Make durable that epochs below `below` may be in use.

        A failure is logged: the clock alone keeps numbers apart then.
        """
        try:
            replace_private_file(self._path, f"{below}\n".encode())
        except OSError as exc:
            self._log.warning("epoch.unwritable", file=self._path.name, error=exc)


async def _no_wait() -> None:
    """For who can never have too much."""


class Gossip:
    """This node's part in the cluster's topics. Topics here are wire names.

    Args:
        overlay: Streams and peers.
        config: Limits.
        clock: The node's clock.
        log: Events.
        data_dir: Where message numbers are kept apart over restarts.
        deliver: Gets each message of a subscribed topic.
        room: Returns when there is room for what peers send.
        prefix: Topics that begin otherwise are not ours.
        rng: Chooses mesh and gossip peers.
    """

    def __init__(
        self,
        overlay: Overlay,
        *,
        config: PubSubConfig,
        clock: Clock,
        log: EventLogger,
        data_dir: Path,
        deliver: Callable[[Received], None],
        room: Callable[[], Awaitable[None]] = _no_wait,
        prefix: str,
        rng: random.Random | None = None,
    ) -> None:
        self._overlay, self._config, self._log = overlay, config, log
        self._subscribers_room = room
        epochs = EpochFile(data_dir / _EPOCH_FILE, log)
        self.router = Router(
            overlay.peer_id,
            sign=lambda data: overlay.sign(SIGN_DOMAIN, data),
            config=config,
            deliver=deliver,
            wake=self._wake,
            lost=self._wake,
            monotonic=clock.monotonic,
            # Not a secret: whom to gossip with must be hard to predict, not impossible.
            rng=rng or random.SystemRandom(),
            sequencer=Sequencer(clock.time, floor=epochs.load(), reserve=epochs.reserve),
            prefix=prefix,
        )
        self._wakes: dict[PeerId, asyncio.Event] = {}
        self._speakers: dict[PeerId, asyncio.Task[None]] = {}
        self._inbound: dict[PeerId, Stream] = {}
        self._ends: dict[Stream, asyncio.Future[bool]] = {}  # done when one was read to its end
        self._room = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            self._tasks = await stack.enter_async_context(asyncio.TaskGroup())
            stack.callback(self._hang_up)
            for protocol in PROTOCOLS:
                stack.callback(self._overlay.handle(protocol, self._listen, access=Access.MEMBER))
            stack.callback(self._overlay.watch_peers(self._peer_changed))
            task_status.started()
            while True:
                await asyncio.sleep(self._config.heartbeat_s)
                self.router.heartbeat()
                for peer in self._wakes:
                    self._wake(peer)  # to see whether there is a better connection

    def _hang_up(self) -> None:
        for stream in list(self._inbound.values()):
            stream.reset()

    def subscribe(self, topic: str) -> None:
        """Deliver the topic's messages. Idempotent."""
        self.router.subscribe(topic)

    def unsubscribe(self, topic: str) -> None:
        """Deliver no more. Idempotent."""
        self.router.unsubscribe(topic)

    async def publish(self, topic: str, data: bytes, count: int = 1) -> bytes:
        """Publish now, and return the seqno once there is room for more.

        The publisher is paced by the faster half of its peers: a single slow one does not hold it
        up, and loses its stream when its queue is full. Raises InvalidArgument for too long a
        message.
        """
        seqno = self.router.publish(topic, data, count)
        if self._is_crowded(topic):
            with anyio.move_on_after(self._config.publish_wait_s):
                while self._is_crowded(topic):
                    self._room.clear()
                    await self._room.wait()
        return seqno

    def _is_crowded(self, topic: str) -> bool:
        targets = self.router.targets(topic)
        return 2 * sum(map(self.router.is_crowded, targets)) > len(targets)

    # --- peers ---

    def _peer_changed(self, change: PeerUp | PeerDown) -> None:
        peer = change.peer
        if isinstance(change, PeerUp):
            self.router.peer_up(peer)
            if peer not in self._speakers and self._tasks is not None:
                self._wakes[peer] = asyncio.Event()
                task = self._tasks.create_task(self._speak(peer), name=f"pubsub to {peer.short}")
                self._speakers[peer] = task
        else:
            self.router.peer_down(peer)
            self._wakes.pop(peer, None)
            if (speaker := self._speakers.pop(peer, None)) is not None:
                speaker.cancel()

    def _wake(self, peer: PeerId) -> None:
        if (wake := self._wakes.get(peer)) is not None:
            wake.set()

    # --- to a peer ---

    async def _speak(self, peer: PeerId) -> None:
        """Keep a stream to the peer open for as long as it is connected."""
        wake = self._wakes[peer]
        pause_s = _REOPEN_S_MIN
        while True:
            stream = None
            try:
                stream = await self._overlay.open_stream(peer, *PROTOCOLS)
                self.router.stream_opened(
                    peer, stream.protocol, outbound=stream.connection.initiator
                )
                while await self._write(peer, stream, wake):
                    old, stream = stream, await self._overlay.open_stream(peer, *PROTOCOLS)
                    old.finish()
                    self.router.greet(peer)  # should the peer have lost the old one
                pause_s = _REOPEN_S_MIN
            except _FellBehind as exc:
                self._log.warning("peer.fell_behind", peer=peer, reason=exc)
                pause_s = max(pause_s, _REOPEN_BEHIND_S)
            except WetwareError as exc:
                self._log.debug("stream.lost", peer=peer, reason=exc)
            except Exception as exc:  # one peer's trouble must not end the service
                self._log.error("stream.failed", peer=peer, exc_info=exc)
            finally:
                self.router.stream_closed(peer)
                if stream is not None:
                    stream.reset()
                self._room.set()
            # Apart, or two nodes that refuse each other would knock in step.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311  # only a pause
            pause_s = min(2 * pause_s, _REOPEN_S_MAX)

    async def _write(self, peer: PeerId, stream: Stream, wake: asyncio.Event) -> bool:
        """Send until the stream ends; True, and it is whole, where it is to move elsewhere."""
        opened = self.router.generation(peer)
        watch = asyncio.create_task(self._watch(stream, wake))
        try:
            while not watch.done():
                if self.router.generation(peer) != opened:
                    raise _FellBehind("its queue is full")
                if stream.connection.superseded:
                    return True
                if data := self.router.take(peer):
                    async with asyncio.timeout(self._config.stall_s):
                        await stream.write(data)
                    self._room.set()
                else:
                    wake.clear()
                    await wake.wait()
        except TimeoutError:
            raise _FellBehind(f"it took nothing for {self._config.stall_s:g} s") from None
        else:
            return False
        finally:
            watch.cancel()
            await asyncio.wait([watch])

    async def _watch(self, stream: Stream, wake: asyncio.Event) -> None:
        """Notice the end of a stream on which the peer has nothing to say."""
        try:
            while await stream.read(_READ_BYTES):
                pass
            await anyio.sleep_forever()  # it closed its side, as js does: ours is still good
        except WetwareError:
            pass
        finally:
            wake.set()

    # --- from a peer ---

    async def _listen(self, stream: Stream) -> None:
        peer = stream.peer
        goes_on = await self._follow(stream)
        if (previous := self._inbound.get(peer)) is not None:
            previous.reset()
        self._inbound[peer] = stream
        end = self._ends[stream] = asyncio.get_running_loop().create_future()
        if not goes_on:
            self.router.inbound_opened(peer)
        try:
            await self._read(peer, stream)
            end.set_result(True)
        except Malformed as exc:
            self._log.warning("frame.malformed", peer=peer, reason=exc)
            stream.reset()
        except WetwareError as exc:
            self._log.debug("stream.ended", peer=peer, reason=exc)
        finally:
            end.cancel()
            del self._ends[stream]
            if self._inbound.get(peer) is stream:
                del self._inbound[peer]
                if peer not in self._speakers:
                    self.router.peer_down(peer)

    async def _follow(self, stream: Stream) -> bool:
        """Hear the peer's earlier stream to its end, if it has moved; whether it came to one."""
        previous = self._inbound.get(stream.peer)
        if previous is None or previous.connection is stream.connection:
            return False
        done, _ = await asyncio.wait([self._ends[previous]], timeout=_MOVE_S_MAX)
        return any(not end.cancelled() for end in done)

    async def _read(self, peer: PeerId, stream: Stream) -> None:
        reader = FrameReader(self.router.limits)
        loop = asyncio.get_running_loop()
        while data := await stream.read(_READ_BYTES):
            started = loop.time()
            for body in reader.feed(data):
                for message in self.router.receive(peer, body):
                    self.router.message(peer, message)
                    await self._subscribers_room()
                    if loop.time() - started > _SLICE_S:
                        await asyncio.sleep(0)
                        if self._inbound.get(peer) is not stream:
                            return  # replaced by a newer stream meanwhile
                        started = loop.time()
                if loop.time() - started > _SLICE_S:  # also where there was no message in it
                    await asyncio.sleep(0)
                    if self._inbound.get(peer) is not stream:
                        return
                    started = loop.time()
            if loop.time() - started > _SLICE_S:
                await asyncio.sleep(0)
