"""Checkpoints of all members, at all members: so that no node can rewrite its log alone.

A node tells its connected members each checkpoint that it signs; they keep the latest few of each
node, on disk. `ww audit checkpoint --of NODE` asks any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from wetware.access import Access
from wetware.audit.chain import CHECKPOINT_CHARS_MAX, Checkpoint, read_checkpoints
from wetware.bounds import Throttle
from wetware.errors import InvalidArgument, OverlayError
from wetware.hookspecs import PeerUp
from wetware.identity import PeerId, replace_private_file
from wetware.log import get_logger

if TYPE_CHECKING:
    from wetware.audit import Audit
    from wetware.hookspecs import Overlay, PeerDown
    from wetware.link import Stream

log = get_logger("audit")

PROTOCOL: Final = "/wetware/audit/1.0.0"
OTHERS_FILE: Final = "others.jsonl"
NODES_MAX: Final = 1024
"""Nodes whose checkpoints are kept; the one that was silent longest makes room."""
PER_NODE_MAX: Final = 4
SAVE_S: Final = 5.0
"""What was heard is on disk so much later."""
SEND_S: Final = 10.0
REFUSED_LINES_PER_MINUTE: Final = 6
"""What is said of a member's wrong checkpoints: it must not be able to fill the logs."""


class _Source(Protocol):
    on_checkpoint: Callable[[Checkpoint], None]


class Checkpoints:
    """What a node knows of the logs of others, and tells of its own.

    Args:
        overlay: Streams to members.
        audit: The node's, of which the checkpoints are told.
        directory: Where what was heard is kept.
    """

    def __init__(self, overlay: Overlay, audit: Audit, directory: Path) -> None:
        self._overlay, self._audit = overlay, audit
        self._file = directory / OTHERS_FILE
        self._known: OrderedDict[PeerId, deque[Checkpoint]] = OrderedDict()
        self._changed = asyncio.Event()
        self._own: Checkpoint | None = audit.log.last_checkpoint if audit.log is not None else None
        self._tasks: asyncio.TaskGroup | None = None
        self._telling: set[PeerId] = set()
        self._refused = Throttle(REFUSED_LINES_PER_MINUTE, NODES_MAX, time.monotonic)
        self._rewritten = Throttle(REFUSED_LINES_PER_MINUTE, NODES_MAX, time.monotonic)
        for checkpoint in read_checkpoints(self._file)[0]:
            self._keep(checkpoint)
        self._changed.clear()

    def known(self, node: str = "") -> list[Checkpoint]:
        """Of a node (its peer ID), or of all; the latest first."""
        found = [
            checkpoint
            for peer, some in self._known.items()
            if node in ("", str(peer))
            for checkpoint in some
        ]
        return sorted(found, key=lambda checkpoint: checkpoint.time_ms, reverse=True)

    async def run(self) -> None:
        """Tell and hear until cancelled."""
        self._audit.on_checkpoint = self._signed
        forget = self._overlay.handle(PROTOCOL, self._hear, access=Access.MEMBER)
        unwatch: Callable[[], None] = lambda: None  # noqa: E731
        try:
            async with asyncio.TaskGroup() as self._tasks:
                unwatch = self._overlay.watch_peers(self._peer)
                while True:
                    await self._changed.wait()
                    await asyncio.sleep(SAVE_S)
                    self._changed.clear()
                    await asyncio.to_thread(self._save)
        finally:
            self._tasks = None
            unwatch()
            forget()
            self._audit.on_checkpoint = lambda _: None
            if self._changed.is_set():
                self._save()

    # --- telling ----------------------------------------------------------------------------------

    def _signed(self, checkpoint: Checkpoint) -> None:
        self._own = checkpoint
        for peer in self._overlay.peers():
            self._tell_soon(peer)

    def _peer(self, event: PeerUp | PeerDown) -> None:
        if isinstance(event, PeerUp):
            self._tell_soon(event.peer)

    def _tell_soon(self, peer: PeerId) -> None:
        """One at a time to each: what is signed meanwhile is the one that is sent next."""
        if self._tasks is not None and self._own is not None and peer not in self._telling:
            self._telling.add(peer)
            self._tasks.create_task(self._tell(peer), name="audit checkpoint")

    async def _tell(self, peer: PeerId) -> None:
        sent: Checkpoint | None = None
        try:
            while self._own is not None and self._own is not sent:
                sent = self._own
                async with asyncio.timeout(SEND_S):
                    async with await self._overlay.open_stream(peer, PROTOCOL) as stream:
                        await stream.write(sent.text.encode())
                        stream.close()
                        await stream.read()  # its end: it was heard
        except (OverlayError, TimeoutError) as exc:
            log.debug("audit.not_told", peer=peer, error=str(exc))
        finally:
            self._telling.discard(peer)

    # --- hearing ----------------------------------------------------------------------------------

    async def _hear(self, stream: Stream) -> None:
        """A member tells of its own log, and of no other's; what else it says is refused."""
        peer = stream.peer
        try:
            async with asyncio.timeout(SEND_S):
                checkpoint = await self._read(stream)
        except (InvalidArgument, TimeoutError) as exc:
            if (left_out := self._refused.lines(peer)) is not None:
                why = exc if isinstance(exc, InvalidArgument) else f"nothing within {SEND_S:g} s"
                log.warning("audit.refused", peer=peer, why=why, unlogged=left_out)
            stream.reset()
            return
        self._contradiction(checkpoint)
        self._keep(checkpoint)

    async def _read(self, stream: Stream) -> Checkpoint:
        """The sender's word on its own log; raises InvalidArgument for anything else."""
        data = b""
        while piece := await stream.read():
            data += piece
            if len(data) > CHECKPOINT_CHARS_MAX:
                raise InvalidArgument("a checkpoint that is too long")
        checkpoint = Checkpoint.parse(data)
        if checkpoint.node != stream.peer:
            raise InvalidArgument("a checkpoint of another node than the one that sent it")
        return checkpoint

    def _contradiction(self, new: Checkpoint) -> None:
        """A log that goes back, or has two hashes for one record, is reported."""
        for old in self._known.get(new.node, ()):
            if old.log != new.log:
                continue
            if (old.seq == new.seq and old.head != new.head) or (
                new.seq < old.seq and new.time_ms > old.time_ms
            ):
                if (left_out := self._rewritten.lines(new.node)) is not None:
                    log.error(
                        "audit.rewritten",
                        node=new.node,
                        was=old.seq,
                        now=new.seq,
                        unlogged=left_out,
                    )
                    self._audit.record(
                        "peer.log_rewritten", node=new.node, was=old.text, now=new.text
                    )
                return

    def _keep(self, checkpoint: Checkpoint) -> None:
        some = self._known.setdefault(checkpoint.node, deque(maxlen=PER_NODE_MAX))
        self._known.move_to_end(checkpoint.node)
        if checkpoint not in some:
            some.append(checkpoint)
            self._changed.set()
        while len(self._known) > NODES_MAX:
            self._known.popitem(last=False)

    def _save(self) -> None:
        text = "".join(f"{c.text}\n" for some in tuple(self._known.values()) for c in tuple(some))
        with contextlib.suppress(OSError):  # heard again with the next ones
            replace_private_file(self._file, text.encode())
