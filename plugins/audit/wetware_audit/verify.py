"""Is a log what its node wrote? Works on a directory, without the node.

The chain of hashes shows a record that was changed, dropped, inserted, repeated or moved, as long
as what follows was not recomputed. A log that was rewritten from some record on, or cut off at its
end, contradicts a checkpoint that the node signed later than that: those beside the log, and those
that other nodes and people hold.

Each file says which one is the oldest that the settings keep: what is missing before it was let go,
anything else was deleted. And what the node keeps of the logs of others has to be what it recorded
of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wetware.errors import InvalidArgument, NotFound
from wetware.identity import PeerId, from_hex
from wetware_audit import held
from wetware_audit.chain import (
    CHECKPOINTS_FILE,
    VERSION,
    Checkpoint,
    digest,
    file_name,
    files,
    genesis,
    lines,
    link,
    number,
    opening,
    read_checkpoints,
    seq_of,
    split,
)

PROBLEMS_MAX = 20
PROGRESS_RECORDS = 100_000


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        what: In words.
        file: Where, or "".
        seq: Number of the record, 0 if unknown.
    """

    what: str
    file: str = ""
    seq: int = 0


@dataclass(slots=True)
class Report:
    """What `verify` found.

    Attributes:
        log: The log's ID.
        node: Whose.
        first: Number of the first record that is there; above 1 if older files were let go.
        last: Number of the last record.
        records: How many were verified.
        checkpoints: How many checkpoints the log agrees with.
        problems: At most PROBLEMS_MAX.
        notes: What is not wrong and should be known.
    """

    log: str = ""
    node: str = ""
    first: int = 0
    last: int = 0
    records: int = 0
    checkpoints: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def wrong(self, what: str, path: Path | None = None, seq: int = 0) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(what, path.name if path is not None else "", seq))


def verify(
    directory: Path,
    *,
    node: PeerId | None = None,
    checkpoints: Iterable[Checkpoint] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Verify all files of a log.

    Args:
        directory: Where the log is.
        node: Whose log it has to be; None: whoever the log names.
        checkpoints: Known from elsewhere, beside those in the directory.
        progress: Called now and then with how many records were verified.

    Raises NotFound if there is no log.
    """
    found = files(directory)
    if not found:
        raise NotFound(
            f"there is no audit log in {directory}",
            hint="name the node's data directory with --data-dir, or the log's with --dir",
        )
    report = Report()
    own, bad = read_checkpoints(directory / CHECKPOINTS_FILE)
    if bad:
        report.wrong(f"{bad} of its lines are no signed checkpoints", directory / CHECKPOINTS_FILE)
    verifier = _Verifier(report, node, own, list(checkpoints), progress)
    verifier.run(found)
    verifier.compare_held(directory / held.HELD_FILE)  # a running node writes it before the log
    return report


class _Verifier:
    def __init__(
        self,
        report: Report,
        node: PeerId | None,
        own: Sequence[Checkpoint],
        others: Sequence[Checkpoint],
        progress: Callable[[int], None],
    ) -> None:
        self._report, self._node, self._progress = report, node, progress
        self._all, self._others = [*own, *others], others
        self._ends: dict[str, int] = {}
        self._expected: dict[int, set[bytes]] = {}
        self._seq, self._head = 0, b""
        self._count, self._oldest = 0, 1
        # Of each other node's log, as this log has recorded it: what was broken, and the newest.
        self._recorded: dict[str, tuple[list[Checkpoint], Checkpoint]] = {}

    def run(self, found: list[Path]) -> None:
        for path in found:
            if self._count and number(path) != self._count + 1:
                self._report.wrong(f"the file before it is missing ({self._count + 1:08d})", path)
                self._head = b""
            self._count = number(path)
            self._file(path, first=path is found[0])
        report = self._report
        self._missing(number(found[0]))
        report.last = self._ends[report.log] = self._seq
        for checkpoint in self._all:
            self._compare(checkpoint)

    def compare_held(self, path: Path) -> None:
        """What the node keeps of others' logs, with what it has recorded of them."""
        report = self._report
        stretches, bad = held.read(path)
        if bad:
            report.wrong(f"{bad} of its lines are no checkpoints of others", path)
        kept = {s.checkpoint for s in stretches}
        for was, newest in self._recorded.values():
            for one in was:
                if one not in kept:
                    report.wrong(f"it lacks what {one.node} had signed at record {one.seq}", path)
            if not any(c.log == newest.log and c.seq >= newest.seq for c in kept):
                what = f"it lacks what {newest.node} has signed at record {newest.seq} or later"
                report.wrong(what, path)
        for stretch in stretches:
            if stretch.broken:
                about = stretch.checkpoint
                what = f"{held.BREAKS[stretch.broken]}, after record {about.seq}"
                report.notes.append(f"of another node, {about.node}, is known: {what}")

    def _record_of_peer(self, line: bytes) -> None:
        record = json.loads(line)
        node, event = str(record.get("node")), record["event"]
        was, newest = self._recorded.pop(node, ([], None))
        if event == "peer.forgotten":
            return
        if (text := record.get("was")) is not None:
            was.append(Checkpoint.parse(text))
        if (text := record.get("now", record.get("checkpoint"))) is not None:
            newest = Checkpoint.parse(text)
        if newest is not None:
            self._recorded[node] = was, newest

    def _missing(self, first: int) -> None:
        """What there is no more before the file `first`: let go, or deleted."""
        report = self._report
        before = f" (up to record {report.first - 1})" if report.first > 1 else ""
        if first > self._oldest:
            gone = _names(self._oldest, first - 1)
            what = f"{gone} at its beginning is gone{before}"
            report.wrong(f"{what}, and no record says that the settings let it go")
        elif first > 1:
            gone = _names(1, first - 1)
            report.notes.append(f"{gone}{before} was let go by the settings (files_max)")

    def _compare(self, checkpoint: Checkpoint) -> None:
        """With what there is of its log."""
        report, seq = self._report, checkpoint.seq
        if str(checkpoint.node) != report.node:
            report.wrong(f"a checkpoint is of another node, {checkpoint.node}")
        elif (last := self._ends.get(checkpoint.log)) is None:
            what = f"the log {checkpoint.log}, of which there is a checkpoint at record {seq}"
            if checkpoint in self._others or self._oldest == 1:
                report.wrong(f"{what}, is not here: another was put in its place, or it was moved")
            else:
                report.notes.append(f"{what} beside this one, is not here: it may have been let go")
        elif seq > last:
            report.wrong(
                f"the log ends at record {last}, and the node has signed that it had {seq}: its "
                "end was cut off",
                seq=last,
            )
        elif checkpoint.log == report.log and seq < report.first:
            report.notes.append(f"the checkpoint at record {seq} is about files that were let go")

    def _file(self, path: Path, *, first: bool) -> None:
        report, previous, seq = self._report, self._head, self._seq
        expected = self._expected
        start = True
        lost = False
        for line in lines(path):
            if start:
                start = False
                previous, seq = self._opened(path, previous, seq, first=first)
                expected = self._expected
            try:
                body, stated = split(line)
            except ValueError:
                report.wrong("a line is not a record", path, seq + 1)
                lost = True
                continue
            hashed = link(previous, digest(body))
            number_of = seq_of(body)
            if hashed != stated:
                if not lost:
                    what = "the hashes do not fit: a record was changed, dropped, inserted or moved"
                    report.wrong(what, path, number_of or seq + 1)
            elif number_of != seq + 1:
                report.wrong(f"record {number_of} follows record {seq}", path, number_of)
            lost = False
            if body.find(b',"event":"peer.', 0, 100) > 0:
                with contextlib.suppress(ValueError, TypeError, KeyError, InvalidArgument):
                    self._record_of_peer(line)
            previous, seq = stated, number_of or seq + 1
            report.records += 1
            if expected and (signed := expected.get(seq)) is not None:
                if signed == {stated}:
                    report.checkpoints += 1
                else:
                    what = "it is not the record that the node has signed: the log was rewritten"
                    report.wrong(what, path, seq)
            if not report.records % PROGRESS_RECORDS:
                self._progress(report.records)
        if start:
            report.wrong("the file is empty", path)
        self._head, self._seq = previous, seq

    def _opened(self, path: Path, previous: bytes, seq: int, *, first: bool) -> tuple[bytes, int]:
        """The first record of a file; returns (hash before it, number before it)."""
        report = self._report
        try:
            record = opening(path)
            if record.get("v") != VERSION:
                version = str(record.get("v"))[:20]
                report.wrong(f"it is of version {version}, and this release knows {VERSION}", path)
                return previous, seq
            log, node, stated, begins = _header(record)
        except (ValueError, KeyError, TypeError, RecursionError, InvalidArgument):
            report.wrong("it does not begin with the record of its opening", path)
            return previous, seq
        if record["file"] != number(path):
            report.wrong(f"it is the file {file_name(record['file'])} under another name", path)
        self._oldest = max(self._oldest, record["oldest"])
        if self._node is not None and node != self._node:
            report.wrong(f"it is the log of {node}, not of {self._node}", path)
        if report.log and log != report.log:
            why = str(record.get("broken", ""))[:200]
            report.wrong(f"another log begins here{f' because of {why}' if why else ''}", path)
            first, previous = begins == 1, b""
        elif not first and previous and stated != previous:
            report.wrong("it does not follow the file before it", path, begins)
        if report.log != log:
            if report.log:
                self._ends[report.log] = seq
            report.log, report.node = log, str(node)
            self._expected = {}
            for checkpoint in self._all:
                if checkpoint.log == log:
                    self._expected.setdefault(checkpoint.seq, set()).add(checkpoint.head)
        if begins == 1 and stated != genesis(node, log):
            report.wrong("its beginning is not that of the log it names", path, 1)
        if not report.first:
            report.first = begins
            if self._expected.get(begins - 1, {stated}) != {stated}:
                what = "what was before it is not what the node has signed: the log was rewritten"
                report.wrong(what, path, begins - 1)
        return stated, begins - 1


def _names(first: int, last: int) -> str:
    return file_name(first) if first == last else f"{file_name(first)} to {file_name(last)}"


def _header(record: dict[str, Any]) -> tuple[str, PeerId, bytes, int]:
    """(log, node, hash before it, number) of a file's first record.

    Raises ValueError and what comes of a wrong type.
    """
    node, log, seq = record["node"], record["log"], record["seq"]
    if not (type(node) is type(log) is str and log.isprintable()):
        raise ValueError("a field of a wrong type")
    if not all(type(record[name]) is int and record[name] > 0 for name in ("file", "oldest")):
        raise ValueError("a field of a wrong type")
    return log, PeerId.parse(node), from_hex(record["prev"]), seq
