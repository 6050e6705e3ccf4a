"""The log on disk: one thread appends records, so that the loop never waits for the disk.

What waits together is written together and shares one fsync. A write that fails leaves no trace in
the file: it is cut back to where it was. What has taken effect already is kept, bounded, and
written when that is possible again, after a record of the gap that tells what was lost. While the
disk is full, what an operator or the auth backend ends has the space of a reserve (`base.disk`);
denials, and what holders end of their own, wait: else anybody could use the reserve up.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.base import disk, writer
from wetware.base.log import get_logger
from wetware.base.writer import RETRY_S, Write, Writer
from wetware.broker.records import FIELD_CHARS_MAX
from wetware.errors import ConfigError, Unrecorded
from wetware_audit.chain import (
    CHECKPOINTS_FILE,
    LINE_BYTES_MAX,
    OPENED,
    VERSION,
    Checkpoint,
    digest,
    encode,
    file_name,
    files,
    genesis,
    link,
    number,
    proof,
    read_checkpoints,
    split,
)
from wetware_audit.config import AuditConfig

if TYPE_CHECKING:
    from wetware.hookspecs import Clock
    from wetware.identity import PeerId

log = get_logger("audit")

OWED_RECORDS_MAX: Final = 16_384
"""Records of what has taken effect that wait for a disk that fails; beyond it they are counted."""
NOT_DURABLE: Final = "records of what had taken effect were lost in a crash"
_TAIL_READ_BYTES: Final = 1 << 20
"""How much of the last file is checked at a start; `ww audit verify` checks all."""
CHECKPOINTS_READ: Final = 100
"""The last ones, likewise: a year has half a million, whose signatures take minutes."""


@dataclass(slots=True)
class _Entry:
    """A record; `reserved`: it may take the reserve.

    One without fields is none: it is answered when what came before it is on the disk.
    """

    fields: dict[str, Any] | None
    reserved: bool = False


Written = Callable[[Sequence[Mapping[str, Any]]], None]


class AuditLog:
    """One node's log in a directory of its own.

    Args:
        directory: Created (0700).
        node: Whose log it is.
        sign: The node's signature of a checkpoint.
        clock: Stamps records.
        config: Section `[plugins.audit]`.
        open_file: Opens a file for appending; replaced in tests of failing disks.

    Attributes:
        findings: What was wrong with the log when it was opened: (event, fields), recorded by now.
        failing: Why nothing but ends is written; "" while all is.
        reserve: Space for them.

    Raises ConfigError where the directory or the last file cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        node: PeerId,
        sign: Callable[[bytes], bytes],
        *,
        clock: Clock,
        config: AuditConfig | None = None,
        open_file: Callable[[Path], Any] | None = None,
    ) -> None:
        self.directory, self.config = directory, config or AuditConfig()
        self._node, self._sign, self._clock = node, sign, clock
        self._open_file = open_file or _append_to
        self.failing = ""
        self.findings: list[tuple[str, dict[str, object]]] = []
        self._tip = (0, b"")  # assigned as one: the loop reads it while the thread writes
        self.log_id = ""
        self._oldest = 1
        """Number of the oldest file that is kept: the settings let go what was before it."""
        self.lost = 0
        self._lost_since_ms = self._failing_since_ms = self._refused = 0
        # Counted up by the loop and the thread respectively: neither writes the other's.
        self._overflowed = self._overflow_seen = 0
        self._size = 0
        self._file: Any = None
        self._synced = True
        self._torn = False
        self._sync_due = 0.0
        self._checkpointed, self._checkpoint_at = 0, clock.monotonic()
        self.last_checkpoint: Checkpoint | None = None
        self._written: Written = lambda _: None
        self._signed: Callable[[Checkpoint], None] = lambda _: None
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.reserve = disk.Reserve(directory)
            try:
                self._resume()
            except OSError:
                self.findings.clear()
                with self.reserve.open():
                    self._resume()
        except (OSError, ValueError) as exc:
            raise ConfigError(
                f"the audit log in {directory} cannot be used: {exc}",
                hint=disk.remedy(exc)
                or "`ww audit verify` says more; to begin a new log move the directory away",
                code="config.audit",
            ) from exc
        if self.reserve.marked:
            self.findings.append(("log.not_durable", {"what": self.reserve.marked}))
        if not self.reserve.fill():
            self._fails(f"there is no room for the reserve: {self.reserve.missing}")
        self._writer = Writer("audit log", self._commit, self._due_s, unavailable=Unrecorded)
        self._writer.start()

    @property
    def seq(self) -> int:
        return self._tip[0]

    @property
    def head(self) -> bytes:
        return self._tip[1]

    # --- resuming ---------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Go on after the last record, moving off a line that a crash cut short."""
        found = files(self.directory)
        broken = ""
        if found:
            broken = self._read_end(found[-1])
        if not self.log_id:
            self.log_id = secrets.token_hex(8)
            self._tip = (0, genesis(self._node, self.log_id))
        if found and number(found[0]) > self._oldest:
            begin, end = file_name(self._oldest), file_name(number(found[0]) - 1)
            self.findings.append(("log.missing", {"first": begin, "last": end}))
        if not found or broken:
            self._begin(number(found[-1]) + 1 if found else 1, broken)
        else:
            self._file = self._open_file(found[-1])
            self._size = found[-1].stat().st_size
            self._let_go()
        good, bad = read_checkpoints(self.directory / CHECKPOINTS_FILE, CHECKPOINTS_READ)
        mine = [c for c in good if c.log == self.log_id and c.node == self._node]
        if bad:
            self.findings.append(("log.damaged", {"file": CHECKPOINTS_FILE, "lines": bad}))
        if mine:
            last = max(mine, key=lambda checkpoint: checkpoint.seq)
            if last.seq > self.seq:
                self.findings.append(("log.truncated", {"last": self.seq, "checkpoint": last.seq}))
            else:
                self.last_checkpoint, self._checkpointed = last, last.seq

    def _read_end(self, path: Path) -> str:
        """Take over seq, head and ID from a file; returns what is broken, "" if nothing."""
        with path.open("rb") as file:
            first = file.readline(LINE_BYTES_MAX)
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - _TAIL_READ_BYTES)
            file.seek(start)
            tail = file.read()
        torn = tail.rpartition(b"\n")[2]
        if torn:
            keep = self.directory / f"torn-{number(path):08d}-{size}.bin"
            keep.write_bytes(torn)
            keep.chmod(0o600)
            os.truncate(path, size - len(torn))
            self.findings.append(("log.torn", {"file": path.name, "bytes": len(torn)}))
            tail = tail[: -len(torn)]
        rows = tail.splitlines()
        if start:
            rows = rows[1:]  # the first of them may be cut
        try:
            self._take_over(first, rows)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as exc:
            why = f"{path.name}: {str(exc)[:120]}"
            self.findings.append(("log.damaged", {"file": path.name, "why": str(exc)[:120]}))
            # Nothing of it can be gone on with: a new log, which names the old one.
            self.log_id = ""
            return why
        return ""

    def _take_over(self, first: bytes, rows: Sequence[bytes]) -> None:
        """Go on after the last of `rows`; raises ValueError and what comes of a wrong type."""
        opened = json.loads(first)
        if opened.get("v") != VERSION:
            what = f"it is of version {opened.get('v')!r}"[:40]
            raise ValueError(f"{what}, and this release knows {VERSION}")
        if opened["node"] != str(self._node):
            raise ValueError("it is the log of another node")
        self._oldest = int(opened["oldest"])
        previous = None
        for row in rows:
            body, hashed = split(row)
            if previous is not None and link(previous, digest(body)) != hashed:
                raise ValueError("its hashes do not fit")
            previous = hashed
        last = json.loads(rows[-1])
        self.log_id = str(opened["log"])
        self._tip = (int(last["seq"]), bytes.fromhex(last["hash"]))

    def _begin(self, count: int, broken: str) -> None:
        """Begin a file; its first record names the log, its node, and the hash before it."""
        if not self._synced:  # what it names as the hash before it has to be there after a crash
            os.fsync(self._file.fileno())
            self._synced = True
        path = self.directory / file_name(count)
        file = self._open_file(path)
        keep = self.config.files_max
        oldest = max(self._oldest, count - keep + 1) if keep else self._oldest
        fields: dict[str, Any] = {"v": VERSION, "log": self.log_id, "node": str(self._node)}
        fields |= {"prev": self.head.hex(), "file": count, "oldest": oldest, "files_max": keep}
        if broken:
            fields["broken"] = broken
        line, head = encode(self._stamp({"event": OPENED, **fields}, self.seq + 1), self.head)
        try:
            _write_all(file, line + b"\n")
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.close()
            path.unlink(missing_ok=True)
            raise
        if self._file is not None:
            self._file.close()
        self._file, self._size = file, len(line) + 1
        self._tip, self._oldest = (self.seq + 1, head), oldest
        self._sync_directory()
        self._let_go()

    def _let_go(self) -> None:
        """Remove the files that the last opening has said are not kept."""
        for old in files(self.directory):
            if number(old) < self._oldest:
                old.unlink(missing_ok=True)

    def _stamp(self, fields: Mapping[str, Any], seq: int) -> dict[str, Any]:
        return {"seq": seq, "time_ms": round(self._clock.time() * 1000), **fields}

    def _sync_directory(self) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    # --- from the loop ----------------------------------------------------------------------------

    def watch(self, written: Written, signed: Callable[[Checkpoint], None]) -> None:
        """Call back on the loop with the records that were written, and with checkpoints."""
        self._written, self._signed = written, signed

    async def append(self, fields: dict[str, Any]) -> int:
        """Write a record first; returns its number. Raises Unrecorded."""
        return int(await self._writer.write(_Entry(fields)))

    async def written(self) -> None:
        """Wait until what was handed in before is on the disk, as `fsync` says.

        Raises Unrecorded where it is not: the disk fails, which the log will tell of.
        """
        await self._writer.write(_Entry(None))

    def append_soon(self, fields: dict[str, Any], *, reserved: bool = False) -> None:
        """Write a record of what has taken effect, with reserved space if need be.

        Never waits, never raises.
        """
        if self._writer.queued >= 2 * writer.WAITING_MAX:  # the disk hangs; the gap will be said
            self._overflowed += 1
            return
        # When it happened, not when it is written: the disk may fail meanwhile.
        fields.setdefault("time_ms", round(self._clock.time() * 1000))
        self._writer.write_soon(_Entry(fields, reserved))

    def checkpoint(self) -> Checkpoint:
        """The log as it is now, signed. What waits for the disk is not in it."""
        now_ms = round(self._clock.time() * 1000)
        seq, head = self._tip
        return Checkpoint(self.log_id, self._node, seq, head, now_ms).sign(self._sign)

    def step(
        self, log_id: str, after: int, upto: Checkpoint, count: int
    ) -> tuple[Checkpoint, bytes]:
        """What to tell one who has heard of this log up to record `after`.

        Returns a checkpoint at most `count` records further on, `upto` if that is near enough, and
        the digests that lead to it; without them where it does not follow, or is not here any more.
        Reads the disk; raises ValueError where the log is damaged, OSError.
        """
        if log_id != upto.log or after >= upto.seq:
            return upto, b""
        last = min(after + count, upto.seq)
        found = proof(self.directory, log_id, after, last)
        if found is None:
            return upto, b""
        digests, head = found
        if last == upto.seq:
            return upto, digests
        now_ms = round(self._clock.time() * 1000)
        return Checkpoint(log_id, upto.node, last, head, now_ms).sign(self._sign), digests

    def close(self) -> None:
        """Write what waits and a last checkpoint, within CLOSE_S. Idempotent."""
        if not self._writer.close():
            log.error("audit.not_written", hint="the last records are lost")

    # --- the thread -------------------------------------------------------------------------------

    def _commit(self, batch: list[Write[_Entry]], last: bool) -> list[Write[_Entry]]:
        owed = self._write(batch)
        self._sync(force=last)
        self._maybe_checkpoint(force=last)
        if last:
            if owed:
                log.error("audit.records_lost", records=len(owed) + self.lost, error=self.failing)
            with contextlib.suppress(OSError):
                self._file.close()
        return owed

    def _due_s(self, owed: bool) -> float | None:
        waits = []
        if owed or self.lost or self.failing:
            waits.append(RETRY_S)
        if not self._synced and not self._torn and self.config.fsync != "never":
            waits.append(max(0.0, self._sync_due - time.monotonic()))
        if self.seq > self._checkpointed:
            due = self._checkpoint_at + self.config.checkpoint_s
            waits.append(max(0.05, due - self._clock.monotonic()))
        return min(waits) if waits else None

    def _write(self, batch: list[Write[_Entry]]) -> list[Write[_Entry]]:
        """Write; returns what is owed: it has taken effect, and the disk failed.

        Once the disk has failed, it is good again when there is room for the reserve.
        """
        if (overflowed := self._overflowed - self._overflow_seen) > 0:
            self._lose(overflowed)
            self._overflow_seen += overflowed
        if not batch and not self.lost and not self.failing:
            return []
        if self.failing and not self.reserve.fill():
            return self._write_apart(batch)
        try:
            records = self._put(batch, resumed=bool(self.failing))
        except OSError as exc:
            self._fails(exc.strerror or str(exc))
            return self._write_apart(batch)
        self._succeeded(batch, records)
        return []

    def _fails(self, why: str) -> None:
        if not self.failing:
            log.error("audit.failing", error=why, hint="free some disk space")
            self._failing_since_ms, self._refused = round(self._clock.time() * 1000), 0
        self.failing = why or "an error without a message"

    def _write_apart(self, batch: list[Write[_Entry]]) -> list[Write[_Entry]]:
        """The disk fails: refuse what has to be first, and write ends with the reserved space."""
        for entry in batch:
            if entry.future is not None and entry.what.fields is not None:
                self._refuse(entry)
        owed = [entry for entry in batch if entry.future is None]
        waiting = [entry for entry in batch if entry.what.fields is None]
        if ends := [entry for entry in owed if entry.what.reserved]:
            try:
                with self.reserve.open():
                    self._report(self._put([*ends, *waiting]))
            except OSError as exc:
                self._fails(exc.strerror or str(exc))
            else:
                owed = [entry for entry in owed if not entry.what.reserved]
        if owed:
            self.reserve.mark(NOT_DURABLE)
        for entry in waiting:
            self._writer.answer(entry, self.seq, self._unavailable() if owed else None)
        excess = len(owed) - OWED_RECORDS_MAX
        if excess > 0:
            self._lose(excess)
        return owed[max(0, excess) :]

    def _refuse(self, entry: Write[_Entry]) -> None:
        if self.config.on_full == "continue":
            self._lose(1)
            self._writer.answer(entry, self.seq, None)
            return
        self._refused += 1
        self._writer.answer(entry, 0, self._unavailable())

    def _unavailable(self) -> Unrecorded:
        return Unrecorded(
            f"it cannot be recorded: {self.failing}",
            hint="free disk space on the node; see `[plugins.audit] on_full`",
        )

    def _lose(self, count: int) -> None:
        if not self.lost:
            self._lost_since_ms = round(self._clock.time() * 1000)
        self.lost += count

    def _put(
        self, batch: Sequence[Write[_Entry]], *, resumed: bool = False
    ) -> list[dict[str, Any]]:
        """Append a batch, whole or not at all; raises OSError.

        If it `resumed`, after a record of how long nothing was admitted.
        """
        if self._torn:
            self._cut_back()
        if self._size >= self.config.file_bytes_max:
            self._begin(number(files(self.directory)[-1]) + 1, "")
        seq, head, records, out = self.seq, self.head, [], []
        pending: list[Mapping[str, Any]] = [
            e.what.fields for e in batch if e.what.fields is not None
        ]
        if self.lost:
            gap = {"event": "log.gap", "lost": self.lost, "since_ms": self._lost_since_ms}
            pending.insert(0, gap)
        if resumed:
            since_ms, refused = self._failing_since_ms, self._refused
            outage = {"event": "log.resumed", "since_ms": since_ms, "refused": refused}
            pending.insert(0, {**outage, "error": self.failing[:FIELD_CHARS_MAX]})
        for fields in pending:
            seq += 1
            record = self._stamp(fields, seq)
            line, head = encode(record, head)
            records.append(record)
            out.append(line)
        out.append(b"")
        data = b"\n".join(out)  # nothing but an fsync where somebody waits for what came before
        try:
            _write_all(self._file, data)
            if self.config.fsync == "batch" and any(entry.future for entry in batch):
                os.fsync(self._file.fileno())
                self._synced = True
            elif self._synced:
                wait_s = math.inf if self.config.fsync == "never" else self.config.interval_s
                self._synced, self._sync_due = False, time.monotonic() + wait_s
        except OSError:
            self._cut_back()
            raise
        self._size += len(data)
        self.lost = 0
        self._tip = (seq, head)
        return records

    def _cut_back(self) -> None:
        """Remove what a failed write may have left; the file is opened again.

        Raises OSError where that fails: nothing is written until it has been done.
        """
        self._torn = True
        path = files(self.directory)[-1]
        with contextlib.suppress(OSError):
            self._file.close()
        os.truncate(path, self._size)
        self._file = self._open_file(path)
        self._torn = False

    def _succeeded(
        self, batch: Sequence[Write[_Entry]], records: Sequence[Mapping[str, Any]]
    ) -> None:
        if self.failing:
            self.failing = ""
            log.info("audit.writes_again", refused=self._refused)
        self.reserve.unmark()
        self._report(records)  # first: who follows once this is answered is not told of it
        seq = self.seq - sum(entry.what.fields is not None for entry in batch)
        for entry in batch:
            seq += entry.what.fields is not None
            self._writer.answer(entry, seq, None)

    def _report(self, records: Sequence[Mapping[str, Any]]) -> None:
        if records:
            self._writer.call_soon(self._written, records)

    def _sync(self, *, force: bool) -> bool:
        """Sync if it is due, or in any case; returns False if that failed."""
        if self._synced or (not force and time.monotonic() < self._sync_due):
            return True
        if self._torn:  # no file is open
            return False
        self._synced = True
        try:
            os.fsync(self._file.fileno())
        except OSError as exc:
            self.failing = exc.strerror or str(exc)
            log.error("audit.failing", error=self.failing)  # noqa: TRY400  # no traceback needed
            return False
        return True

    def _maybe_checkpoint(self, *, force: bool) -> None:
        now, records = self._clock.monotonic(), self.seq - self._checkpointed
        due = now - self._checkpoint_at >= self.config.checkpoint_s
        if records <= 0 or not (force or due or records >= self.config.checkpoint_records):
            return
        if not self._sync(force=True):  # a word on what a crash may undo would accuse the node
            self._checkpoint_at = now
            return
        signed = self.checkpoint()
        try:
            with (self.directory / CHECKPOINTS_FILE).open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    _write_all(file, signed.text.encode() + b"\n")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)  # half a line would be damage
                    raise
        except OSError as exc:
            self._checkpoint_at = now  # the next try when it is due again
            log.error("audit.no_checkpoint", error=exc.strerror)  # noqa: TRY400
            return
        self._checkpointed, self._checkpoint_at, self.last_checkpoint = signed.seq, now, signed
        self._writer.call_soon(self._signed, signed)


def _write_all(file: Any, data: bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _append_to(path: Path) -> Any:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    return os.fdopen(fd, "ab", buffering=0)
