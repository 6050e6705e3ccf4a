"""What the benches of the cluster print: figures beside their targets and memberlist's formulas."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable
from typing import Any

from wetware.overlay.membership.config import MembershipConfig


def machine() -> str:
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores, load {load:.1f} at the start, Python {platform.python_version()}"
    )


def quantile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


class Report:
    """Prints as it goes, or collects for `--json`; remembers which targets were missed."""

    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self.figures: dict[str, Any] = {}
        self.missed: list[str] = []

    def say(self, text: str = "") -> None:
        if not self._json:
            print(text, flush=True)

    def figure(
        self,
        section: str,
        name: str,
        value: float,
        unit: str = "s",
        *,
        at_most: float | None = None,
        beside: str = "",
        digits: int = 2,
    ) -> None:
        """One figure. `at_most` is its target, `beside` what others publish or what it is of."""
        entry: dict[str, Any] = {"value": round(value, 6), "unit": unit}
        text = f"  {name:52} {value:9.{digits}f} {unit:8}"
        if at_most is not None:
            met = value <= at_most
            entry |= {"at_most": at_most, "met": met}
            text += f" target ≤ {at_most:g}: {'met' if met else 'MISSED'}"
            if not met:
                self.missed.append(f"{section}: {name}")
        if beside:
            entry["beside"] = beside
            text += f"{';' if at_most is not None else ''} {beside}"
        self.figures.setdefault(section, {})[name] = entry
        self.say(text.rstrip())


def suspicion_range(nodes: int) -> tuple[float, float]:
    """memberlist's suspicionTimeout, shortest and longest, with our settings, which are its."""
    config = MembershipConfig()
    shortest = config.suspicion_mult * max(1.0, math.log10(max(1.0, nodes))) * config.probe_s
    return shortest, config.suspicion_max_mult * shortest


def detection_s() -> float:
    """SWIM's expected time to the first suspicion of a silent death."""
    return math.e / (math.e - 1) * MembershipConfig().probe_s


def retransmit_limit(nodes: int) -> int:
    """memberlist's retransmitLimit."""
    return MembershipConfig().retransmit_mult * math.ceil(math.log10(nodes + 1))


def formulas(nodes: int) -> str:
    shortest, longest = suspicion_range(nodes)
    return (
        f"memberlist's formulas for N={nodes}: first suspicion of a silent death after "
        f"e/(e-1) × probe = {detection_s():.2f} s on average, then a suspicion of "
        f"{shortest:.1f} to {longest:.1f} s; retransmit limit {retransmit_limit(nodes)}"
    )
