"""What a node knows of the logs of others: of each its highest checkpoint, kept for good.

A newer checkpoint takes the place of an older one only with a proof that the log goes on from
there. One that does not is kept beside it, and what was known before stays: a log that was cut off
or written anew is known to be so for ever, however long it grows afterwards. `ww audit verify`
compares this file with the records that the node's own log has of it, so that it cannot be changed
unseen either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import InvalidArgument
from wetware_audit.chain import LINE_BYTES_MAX, Checkpoint, lines

if TYPE_CHECKING:
    from pathlib import Path

    from wetware.identity import PeerId

HELD_FILE: Final = "others.jsonl"
VERSION: Final = 2
NODES_MAX: Final = 1024
"""Nodes whose checkpoints are kept; the one that was silent longest makes room."""
STRETCHES_MAX: Final = 8
"""Of one node. A node that breaks its word more often is not listened to any more."""
FIRST, SAME, AHEAD = "first", "same", "ahead"
REWRITTEN, REPLACED, UNPROVEN = "rewritten", "replaced", "unproven"
BREAKS: Final = {
    REWRITTEN: "its log was cut off or rewritten",
    REPLACED: "it has begun another log",
    UNPROVEN: "it could not show that its log continues what it had signed before",
}


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a node's log that is known to have only grown.

    Attributes:
        checkpoint: The highest one of it.
        broken: Why the next stretch does not continue it, of BREAKS; "" for the newest.
    """

    checkpoint: Checkpoint
    broken: str = ""


def compare(old: Checkpoint | None, new: Checkpoint) -> str:
    """What a node's new checkpoint is after the highest that is known of it.

    AHEAD needs a proof. A node tells one at a time, the latest it has signed: none comes late.
    """
    if old is None:
        return FIRST
    if new.log != old.log:
        return REPLACED
    if new.seq > old.seq:
        return AHEAD
    return SAME if (new.seq, new.head) == (old.seq, old.head) else REWRITTEN


class Held:
    """The stretches of every node, the oldest first.

    Attributes:
        damaged: Lines of the file that could not be read.
    """

    def __init__(self, file: Path) -> None:
        self._nodes: dict[PeerId, list[Stretch]] = {}
        found, self.damaged = read(file)
        for stretch in found:
            self._nodes.setdefault(stretch.checkpoint.node, []).append(stretch)

    def __iter__(self) -> Iterator[Stretch]:
        for some in self._nodes.values():
            yield from some

    def newest(self, node: PeerId) -> Checkpoint | None:
        """The highest checkpoint of a node's newest stretch."""
        some = self._nodes.get(node)
        return some[-1].checkpoint if some else None

    def is_full(self, node: PeerId) -> bool:
        """Whether no further stretch of a node is kept."""
        return len(self._nodes.get(node, ())) >= STRETCHES_MAX

    def breaks(self) -> dict[PeerId, str]:
        """The nodes that broke their word, and how first."""
        return {
            node: some[0].broken for node, some in self._nodes.items() if some and some[0].broken
        }

    def take(self, new: Checkpoint, broken: str = "") -> PeerId | None:
        """Take a newer checkpoint: of the same stretch, or of the next one if it is `broken`.

        Returns the node that made room for it, if one had to.
        """
        some = self._nodes.pop(new.node, [])
        if some:
            last = some.pop()
            if broken:
                some.append(Stretch(last.checkpoint, broken))
        self._nodes[new.node] = [*some, Stretch(new)]  # last: it is the one that spoke last
        if len(self._nodes) <= NODES_MAX:
            return None
        silent = next(iter(self._nodes))
        del self._nodes[silent]
        return silent

    def document(self) -> bytes:
        return b"".join(
            json.dumps(
                {"v": VERSION, "checkpoint": each.checkpoint.text, "broken": each.broken}
            ).encode()
            + b"\n"
            for each in self
        )


def read(file: Path) -> tuple[list[Stretch], int]:
    """(the stretches of a file, how many of its lines are none)."""
    good: list[Stretch] = []
    bad = 0
    if file.exists():
        for line in lines(file):
            try:
                good.append(_parse(line))
            except (ValueError, TypeError, KeyError, RecursionError, InvalidArgument):
                bad += 1
    return good, bad


def _parse(line: bytes) -> Stretch:
    if len(line) > LINE_BYTES_MAX:
        raise ValueError("too long")
    value: dict[str, Any] = json.loads(line)
    if value["v"] != VERSION or value["broken"] not in ("", *BREAKS):
        raise ValueError("of a form that this release does not know")
    return Stretch(Checkpoint.parse(value["checkpoint"]), value["broken"])
