"""Who may take how much of the disk: decided here, before anything is written.

An owner is charged what each of their pins reaches and what their running uploads have written,
each by itself; the node what lies on its disk. Both in the bytes of `index.charge`.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from wetware.errors import LimitExceeded

PINS_PER_OWNER_MAX: Final = 100_000
"""A start reads all of them, and so does each collection."""


class Quota:
    """Counts, in memory. Safe in several threads; never waits for the disk."""

    def __init__(self, node_bytes_max: int, owner_bytes_max: int) -> None:
        self.node_bytes_max, self.owner_bytes_max = node_bytes_max, owner_bytes_max
        self._lock = threading.Lock()
        self.stored = 0
        self._promised = 0
        self._owners: Counter[str] = Counter()
        self._pins: Counter[str] = Counter()

    def of(self, owner: str) -> tuple[int, int]:
        """The bytes that an owner is charged, and the number of their pins."""
        return self._owners[owner], self._pins[owner]

    @property
    def pins(self) -> int:
        """Of all owners."""
        return self._pins.total()

    def charge(self, owner: str, more: int, pins: int = 0) -> None:
        """More bytes and pins of an owner; less than nothing gives some back.

        Raises LimitExceeded "limit.blob_quota" and "limit.blob_pins" where they would have more
        than they may.
        """
        with self._lock:
            if pins > 0 and self._pins[owner] + pins > PINS_PER_OWNER_MAX:
                raise LimitExceeded(
                    f"{owner} has {self._pins[owner]} pins at this node (PINS_PER_OWNER_MAX)",
                    hint="remove what is not needed with `ww blob rm`, or pin a directory of it",
                    code="limit.blob_pins",
                )
            if more > 0 and self._owners[owner] + more > self.owner_bytes_max:
                raise LimitExceeded(
                    f"{owner} has {self._owners[owner]} bytes of {self.owner_bytes_max} in pins "
                    f"and uploads, and this needs {more} more (owner_bytes_max)",
                    hint="remove what is not needed with `ww blob rm`",
                    code="limit.blob_quota",
                )
            for counter, count in ((self._owners, more), (self._pins, pins)):
                counter[owner] += count
                if not counter[owner]:
                    del counter[owner]

    def restore(self, owner: str, nbytes: int, pins: int = 0) -> None:
        """What was charged before the store was opened: also where it is more than allowed now."""
        self._owners[owner] += nbytes
        self._pins[owner] += pins

    def promise(self, more: int) -> None:
        """Room for what is about to be written; raises LimitExceeded "limit.blob_node"."""
        with self._lock:
            taken = self.stored + self._promised
            if taken + more > self.node_bytes_max:
                raise LimitExceeded(
                    f"the node's blob store has {taken} bytes of {self.node_bytes_max}, and this "
                    f"needs {more} more (node_bytes_max)",
                    hint="remove pins, raise the limit, or put it at another node",
                    code="limit.blob_node",
                )
            self._promised += more

    def written(self, promised: int, stored: int) -> None:
        """A promise is over, and so much was written; less than nothing: it was deleted."""
        with self._lock:
            self._promised -= promised
            self.stored += stored
