"""Checkpoints of all members, at all members: so that no node can rewrite its log alone.

A node tells its connected members each checkpoint that it signs, with a proof that the log goes on
from what they know; what they keep is in `wetware_audit.held`. `/wetware/audit/2.0.0`, opened by
who tells:

    ← {log, seq}                    the highest checkpoint that the other end has; "" and 0: none
    → {checkpoint, records} digests of as many records, those that lead from there to the checkpoint
    ← {taken}

A proof is the digests of the records between, 32 bytes for each, and says nothing of what is in
them. After a long absence it comes in steps: the node signs a checkpoint for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.base.bounds import Throttle
from wetware.base.log import get_logger
from wetware.errors import InvalidArgument, OverlayError
from wetware.hookspecs import Access, PeerUp
from wetware.identity import PeerId, replace_private_file
from wetware.overlay.frames import read_frame, write_frame
from wetware_audit.chain import (
    CHECKPOINT_CHARS_MAX,
    DIGEST_BYTES,
    LOG_CHARS_MAX,
    Checkpoint,
    continues,
)
from wetware_audit.held import (
    AHEAD,
    FIRST,
    HELD_FILE,
    NODES_MAX,
    REWRITTEN,
    SAME,
    UNPROVEN,
    Held,
    compare,
)

if TYPE_CHECKING:
    from wetware.hookspecs import PeerDown, PluginContext
    from wetware.overlay.link import Stream
    from wetware_audit.log import AuditLog

log = get_logger("audit")

PROTOCOL: Final = "/wetware/audit/2.0.0"
FRAME_BYTES_MAX: Final = CHECKPOINT_CHARS_MAX + 256
STEP_RECORDS_MAX: Final = 4096
"""Records of one proof: 128 KiB of digests, and some milliseconds of hashing at the other end."""
SAVE_S: Final = 5.0
"""What was heard is on disk so much later; what contradicts the past, at once."""
ANCHOR_S: Final = 3600.0
"""Between two records of how far the log of one node is known, in this node's own log."""
SEND_S: Final = 10.0
REFUSED_LINES_PER_MINUTE: Final = 6
"""What is said of a member's wrong checkpoints: it must not be able to fill the logs."""


class Checkpoints:
    """What a node knows of the logs of others, and tells of its own.

    Args:
        ctx: Streams to members, and threads.
        audit_log: The node's own, of which the checkpoints are told.
        record: Writes an event with its fields to that log.
        directory: Where what was heard is kept.
        monotonic: Seconds.
    """

    def __init__(
        self,
        ctx: PluginContext,
        audit_log: AuditLog,
        record: Callable[..., None],
        directory: Path,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._overlay, self._run_sync = ctx.overlay, ctx.run_sync
        self._log, self._record, self._monotonic = audit_log, record, monotonic
        self._file = directory / HELD_FILE
        self.held = Held(self._file)
        if self.held.damaged:
            found = {"file": HELD_FILE, "lines": self.held.damaged}
            log.error("log.damaged", **found, hint="`ww audit verify` says what it should hold")
            record("log.damaged", **found)
        self._changed = asyncio.Event()
        self._saving = asyncio.Lock()
        self._writing = threading.Lock()
        self._documents = self._written = 0
        self._anchored: dict[PeerId, float] = {}
        self._to_anchor: set[PeerId] = set()
        self._own: Checkpoint | None = audit_log.last_checkpoint
        self._tasks: asyncio.TaskGroup | None = None
        self._telling: set[PeerId] = set()
        self._hearing: set[PeerId] = set()
        self._refused = Throttle(REFUSED_LINES_PER_MINUTE, NODES_MAX, monotonic)
        self._broken = Throttle(REFUSED_LINES_PER_MINUTE, NODES_MAX, monotonic)

    def known(self, node: str = "") -> list[Checkpoint]:
        """Of a node (its peer ID), or of all; the latest first."""
        found = [s.checkpoint for s in self.held if node in ("", str(s.checkpoint.node))]
        return sorted(found, key=lambda checkpoint: checkpoint.time_ms, reverse=True)

    async def run(self) -> None:
        """Tell and hear until cancelled."""
        forget = self._overlay.handle(PROTOCOL, self._hear, access=Access.MEMBER)
        unwatch: Callable[[], None] = lambda: None  # noqa: E731
        try:
            async with asyncio.TaskGroup() as self._tasks:
                unwatch = self._overlay.watch_peers(self._peer)
                while True:
                    await self._changed.wait()
                    await asyncio.sleep(SAVE_S)
                    await self._save()
        finally:
            self._tasks = None
            unwatch()
            forget()
            with contextlib.suppress(OSError):  # also where a write was given up, or is under way
                self._write(*self._document())

    # --- telling ----------------------------------------------------------------------------------

    def signed(self, checkpoint: Checkpoint) -> None:
        """Tell members of a new checkpoint of this node's log."""
        self._own = checkpoint
        if self._tasks is not None:  # else the node stops, and its overlay is gone
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
        told = -1
        sent: Checkpoint | None = None
        try:
            while sent is not self._own:
                async with asyncio.timeout(SEND_S):
                    before, sent = await self._tell_once(peer)
                if sent is None or before <= told:  # it did not take it, or does not get on
                    return
                told = before
        except (OverlayError, InvalidArgument, TimeoutError, EOFError) as exc:
            log.debug("audit.not_told", peer=peer, error=str(exc))
        except (OSError, ValueError) as exc:
            log.warning("audit.no_proof", peer=peer, error=str(exc), hint="`ww audit verify`")
        finally:
            self._telling.discard(peer)

    async def _tell_once(self, peer: PeerId) -> tuple[int, Checkpoint | None]:
        """(what the peer knew before, what it took now)."""
        own = self._own
        if own is None:
            return 0, None
        async with await self._overlay.open_stream(peer, PROTOCOL) as stream:
            log_id, seq = parse_known(await read_frame(stream, bytes_max=FRAME_BYTES_MAX))
            checkpoint, digests = await self._run_sync(
                self._log.step, log_id, seq, own, STEP_RECORDS_MAX
            )
            records = len(digests) // DIGEST_BYTES
            await write_frame(stream, {"checkpoint": checkpoint.text, "records": records})
            await stream.write(digests)
            answer = await read_frame(stream, bytes_max=FRAME_BYTES_MAX)
            return seq, checkpoint if answer.get("taken") is True else None

    # --- hearing ----------------------------------------------------------------------------------

    async def _hear(self, stream: Stream) -> None:
        """A member tells of its own log, and of no other's; what else it says is refused."""
        peer = stream.peer
        if peer in self._hearing:
            stream.reset()
            return
        self._hearing.add(peer)
        try:
            async with asyncio.timeout(SEND_S):
                old = self.held.newest(peer)
                checkpoint, digests = await self._read(stream, old)
                taken = await self._judge(old, checkpoint, digests)
                await write_frame(stream, {"taken": taken})
        except (InvalidArgument, EOFError, TimeoutError) as exc:
            if (left_out := self._refused.lines(peer)) is not None:
                why = f"nothing within {SEND_S:g} s" if isinstance(exc, TimeoutError) else exc
                log.warning("audit.refused", peer=peer, why=why, unlogged=left_out)
            stream.reset()
        finally:
            self._hearing.discard(peer)

    async def _read(self, stream: Stream, old: Checkpoint | None) -> tuple[Checkpoint, bytes]:
        """The sender's word on its own log, and its proof; raises InvalidArgument."""
        known = {"log": "", "seq": 0} if old is None else {"log": old.log, "seq": old.seq}
        await write_frame(stream, known)
        told = await read_frame(stream, bytes_max=FRAME_BYTES_MAX)
        checkpoint, records = parse_told(told)
        if checkpoint.node != stream.peer:
            raise InvalidArgument("a checkpoint of another node than the one that sent it")
        return checkpoint, await stream.read_exactly(records * DIGEST_BYTES)

    async def _judge(self, old: Checkpoint | None, new: Checkpoint, digests: bytes) -> bool:
        """Take a checkpoint that continues what is known, or say that it does not.

        Returns whether it is the newest that is known now.
        """
        verdict = compare(old, new)
        if verdict == SAME:
            return True
        if verdict == AHEAD and old is not None and continues(old, new, digests):
            self._take(new)
            self._changed.set()
            return True
        if verdict == AHEAD:
            verdict = REWRITTEN if digests else UNPROVEN
        if old is None or verdict == FIRST:
            self._take(new)
            await self._save()
            return True
        return await self._contradicts(old, new, verdict)

    async def _contradicts(self, old: Checkpoint, new: Checkpoint, why: str) -> bool:
        """It does not continue the last one: what is known stays, and this goes on beside it."""
        full = self.held.is_full(new.node)
        if not full:
            self._anchored[new.node] = self._monotonic()  # by the record of it
            self._take(new, why)
            await self._save()
            self._record(f"peer.log_{why}", node=new.node, was=old.text, now=new.text)
        if (left_out := self._broken.lines(new.node)) is not None:
            log.error(
                f"audit.log_{why}", node=new.node, was=old.seq, now=new.seq, unlogged=left_out
            )
        return not full

    def _take(self, new: Checkpoint, broken: str = "") -> None:
        last = self._anchored.get(new.node)
        if last is None or self._monotonic() - last >= ANCHOR_S:
            self._to_anchor.add(new.node)
        if (silent := self.held.take(new, broken)) is not None:
            self._to_anchor.discard(silent)
            self._anchored.pop(silent, None)
            self._record("peer.forgotten", node=silent)

    def _document(self) -> tuple[int, bytes]:
        self._documents += 1
        return self._documents, self.held.document()

    def _write(self, number: int, document: bytes) -> None:
        with self._writing:
            if number > self._written:  # a thread that nobody waits for any more may be late
                replace_private_file(self._file, document)
                self._written = number

    async def _save(self) -> None:
        """Write down what is known, then record it where that is due."""
        async with self._saving:
            self._changed.clear()
            due, self._to_anchor = self._to_anchor, set()
            newest = {node: self.held.newest(node) for node in due}
            try:
                await self._run_sync(self._write, *self._document())
            except OSError as exc:  # tried again with what is heard next
                log.warning("audit.not_saved", file=HELD_FILE, error=exc.strerror)
                self._to_anchor |= due
                return
            for node, checkpoint in newest.items():
                if checkpoint is not None:
                    self._anchored[node] = self._monotonic()
                    self._record("peer.checkpoint", node=node, checkpoint=checkpoint.text)


def parse_known(frame: dict[str, Any]) -> tuple[str, int]:
    """(log, number) of the highest checkpoint that a peer has; raises InvalidArgument."""
    log_id, seq = frame.get("log"), frame.get("seq")
    if type(log_id) is not str or len(log_id) > LOG_CHARS_MAX or type(seq) is not int or seq < 0:
        raise InvalidArgument("a frame that names no record of a log")
    return log_id, seq


def parse_told(frame: dict[str, Any]) -> tuple[Checkpoint, int]:
    """(a checkpoint, how many digests follow) as a peer tells it; raises InvalidArgument."""
    text, records = frame.get("checkpoint"), frame.get("records")
    if type(text) is not str or type(records) is not int:
        raise InvalidArgument("a frame without a checkpoint")
    if not 0 <= records <= STEP_RECORDS_MAX:
        raise InvalidArgument(f"a proof of {records} records; at most {STEP_RECORDS_MAX}")
    return Checkpoint.parse(text), records
