"""Amounts as people write them: durations, sizes and rates."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final

from wetware.errors import InvalidArgument

RATE_MAX: Final = 1e6
RATE_MIN: Final = 1e-9
"""Once in thirty years; a rate that is less is a mistake."""
QUOTA_MAX: Final = 2**63 - 1
TIME_MAX: Final = 253_402_300_799
"""Unix time, s, of the last moment that has a date."""

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AMOUNT: Final = r"(\d{1,30}(?:\.\d{1,30})?)"
_DURATION = re.compile(rf"{_AMOUNT}\s*(s|m|h|d|w)", re.ASCII)
_SIZE = re.compile(rf"{_AMOUNT}\s*(?:([kKMGT])(i?))?B?", re.ASCII)
_RATE = re.compile(rf"{_AMOUNT}/(s|m|h|d)(?::{_AMOUNT})?", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `10m`, `1h`, `7d`, `2w`; raises InvalidArgument."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not 0 < (seconds := float(match[1]) * _SECONDS[match[2]]) < 1e10:
        raise InvalidArgument(
            f"{text[:40]!r} is not a duration",
            hint="write e.g. 90s, 10m, 1h, 7d",
            code="invalid.duration",
        )
    return seconds


def parse_size(text: str) -> int:
    """Bytes of `1024`, `10k`, `1M`, `1MiB`; raises InvalidArgument."""
    match = _SIZE.fullmatch(text.strip())
    if match is not None:
        power = " kMGT".index((match[2] or " ").replace("K", "k"))
        size = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
        if 0 < size <= QUOTA_MAX:
            return size
    raise InvalidArgument(
        f"{text[:40]!r} is not a size", hint="write e.g. 4096, 10k, 1MiB", code="invalid.size"
    )


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket.

    Attributes:
        per_s: Calls per second, sustained.
        burst: Calls that can be saved up.
    """

    per_s: float
    burst: float

    def __post_init__(self) -> None:
        if not (RATE_MIN <= self.per_s <= RATE_MAX and 1 <= self.burst <= RATE_MAX):
            raise InvalidArgument(
                f"a rate of {self.per_s:g} a second with a burst of {self.burst:g}",
                hint=f"up to {RATE_MAX:.0f} a second, with a burst of 1 to {RATE_MAX:.0f}",
                code="invalid.rate",
            )

    @classmethod
    def parse(cls, text: str) -> Rate:
        """From `10/s`, `100/m`, `5/h` or `10/s:20` with a burst; raises InvalidArgument."""
        match = _RATE.fullmatch(text.strip())
        if match is None:
            raise InvalidArgument(
                f"{text[:40]!r} is not a rate",
                hint="write e.g. 10/s, 100/m, or 10/s:20 with a burst of 20",
                code="invalid.rate",
            )
        per_s = float(match[1]) / _SECONDS[match[2]]
        return cls(per_s, float(match[3]) if match[3] else _burst(per_s))

    @property
    def text(self) -> str:
        """What `parse` reads, in the smallest unit of time that gives a whole number."""
        text = f"{_decimal(self.per_s)}/s"
        for unit in "smhd":
            amount = round(self.per_s * _SECONDS[unit])
            if amount and amount / _SECONDS[unit] == self.per_s:
                text = f"{amount}/{unit}"
                break
        return text if self.burst == _burst(self.per_s) else f"{text}:{_decimal(self.burst)}"


def _burst(per_s: float) -> float:
    return float(max(1, math.ceil(per_s)))


def _decimal(value: float) -> str:
    """All digits of a float, without an exponent."""
    text = format(Decimal(repr(value)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
