"""How long a suspected node has to refute: the less, the more members suspect it as well.

Source: hashicorp/memberlist, suspicion.go; the formula is in `MembershipConfig.suspicion_s`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wetware.overlay.membership.config import MembershipConfig


class Suspicion:
    """A suspicion of one node, in a cluster of `nodes` living ones when it begins, `now`.

    Attributes:
        deadline: When the node is dead, unless it refutes.
    """

    def __init__(
        self, config: MembershipConfig, nodes: int, accusers: Iterable[bytes], now: float
    ) -> None:
        self._config, self._nodes, self._start = config, nodes, now
        self._accusers = set(accusers)
        self._shortest_s, _, self._wanted = config.suspicion_s(nodes)
        self.deadline = math.inf
        self._shorten()

    def confirm(self, accuser: bytes) -> bool:
        """Another member accuses it; whether that counts: the first few others do."""
        if accuser in self._accusers or len(self._accusers) > self._wanted:
            return False
        self._accusers.add(accuser)
        self._shorten()
        return True

    def hasten(self) -> None:
        """It is said to be dead: only the shortest time is left to it."""
        self.deadline = min(self.deadline, self._start + self._shortest_s)

    def postpone(self, seconds: float) -> None:
        """Time that does not count."""
        self._start += seconds
        self.deadline += seconds

    def _shorten(self) -> None:
        confirmations = min(len(self._accusers) - 1, self._wanted)
        _, timeout_s, _ = self._config.suspicion_s(self._nodes, confirmations)
        self.deadline = min(self.deadline, self._start + timeout_s)
