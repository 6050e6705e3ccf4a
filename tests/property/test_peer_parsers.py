"""Whatever a peer makes of a valid encoding: it is used or refused, in time linear in its length.

Mutants of valid encodings go through every parser of `peer_parsers`: only the errors that it
documents come out, and no input takes longer than `allowed_s`. Then each parser reads inputs that
grow: a byte of a long one may not take much longer than a byte of a short one. Time is that of the
thread, and what is too slow is measured again, so that a busy machine fails nothing.

A long run by hand, and the replay of a seed:

    WW_SECONDS=300 .venv/bin/pytest -n0 -s tests/property/test_peer_parsers.py
    WW_SEED=1234 .venv/bin/pytest -n0 -s tests/property/test_peer_parsers.py
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import cbor2
import pytest

from wetware.base import multiaddr

from .peer_parsers import CORE, Parser, of_auth_evm

SEED = int(os.environ.get("WW_SEED", random.SystemRandom().randrange(2**32)))
SECONDS = float(os.environ.get("WW_SECONDS", 0))
MUTANTS = 250
"""Of each parser, in a run without WW_SECONDS."""
SECONDS_EACH_MAX = 2.0
"""Of such a run: the slow parsers get fewer mutants."""
FAMILIES, FAMILIES_LONG = 10, 20
"""Ways to grow that are tried in each parser: others in each run."""
ALLOWED_S, ALLOWED_S_PER_BYTE = 0.05, 5e-6
"""Three times what the slowest parser needs: 1.5 us a byte, for empty frames of pub-sub."""
GROWN_BYTES_MAX = 1 << 20
GROWTH = 16
"""How much longer the long ones are: a byte takes as long in linear work, and 16 times in quadratic
work."""
STEEP = 4.0
"""What is allowed: a long input no longer fits the caches, which costs up to 2.6 times."""
STEEP_S_MIN = 0.003
"""What takes less is not looked at: it is no work worth speaking of, nor can it be measured."""

EVM_NEEDS = "needs the extra: pip install 'wetware[evm]'"
try:
    PARSERS = [*CORE, *of_auth_evm()]
except ImportError:
    PARSERS = CORE
parsers = pytest.mark.parametrize("parser", PARSERS, ids=str)


def test_the_parsers_of_auth_evm_are_among_them() -> None:
    pytest.importorskip("eth_hash", reason=EVM_NEEDS)
    assert len(PARSERS) > len(CORE)


# --- mutants --------------------------------------------------------------------------------------

CHUNKS = (
    *(bytes((byte,)) for byte in b"aA01_.-/!*?,:=\\\"' \n\0[{(<\x7f\x80\x81\x9f\xa1\xbf\xc1\xff"),
    b'{"a":', b"[]", b"..", b"//", b"e9", b"\xc3\xa4", b"\xed\xa0\x80", b"\xff\xff\xff\xff",
    b"\x80\x80\x80\x80", b"\x00\x00\x00\x00", b"\x1b\xff\xff\xff\xff\xff\xff\xff\xff",
)  # fmt: skip
ATOMS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**39, 2**48 - 1, 2**53, 2**63, 2**64 - 1, -(2**63),
    0.5, 1e308, -1.0, float("nan"), float("inf"), "", "a", "a" * 300, "\0", "ä", "*", "/", "0x",
    [], {}, [[]], [0] * 300, {"v": 1}, {"": None}, ["a", "b"],
)  # fmt: skip
OWN_ATOMS: dict[str, tuple[Any, ...]] = {
    "cbor": (b"", b"\0", bytes(16), bytes(20), bytes(32), bytes(64), b"\xff" * 300),
    "json": (10**400, -(10**400), 10**30, 1e30, "\ud800", "0" * 64, "0x" + "f" * 64),
}


class Mutator:
    """Makes mutants of the encodings of one parser."""

    def __init__(self, parser: Parser, rng: random.Random) -> None:
        self.parser, self.rng = parser, rng
        self.values = [self.decode(seed) for seed in parser.seeds] if self.has_values else []

    @property
    def has_values(self) -> bool:
        return self.parser.form in ("cbor", "json")

    def decode(self, data: bytes) -> Any:
        return json.loads(data) if self.parser.form == "json" else cbor2.loads(data)

    def encode(self, value: Any) -> bytes:
        if self.parser.form == "json":
            return json.dumps(value, separators=(",", ":"), default=str).encode()
        return cbor2.dumps(value)

    def __call__(self) -> bytes:
        """A mutant, at most a little longer than what can reach the parser."""
        rng, parser = self.rng, self.parser
        count = rng.choice((1, 1, 2, 3))
        if self.has_values and rng.random() < 0.6:
            value = copy.deepcopy(rng.choice(self.values))
            for _ in range(count):
                value = self.with_other_value(value)
            data = self.encode(value)
            count = rng.choice((0, 0, 0, 1))
        elif parser.grow and rng.random() < 0.02:
            data = rng.choice(parser.grow)(rng.randint(1, min(parser.bytes_max, 20_000)))
        else:
            data = rng.choice(parser.seeds)
        for _ in range(count):
            data = self.with_other_bytes(data)
        return data[: parser.bytes_max * 5 // 4 + 64]

    def with_other_bytes(self, data: bytes) -> bytes:
        rng = self.rng
        at = rng.randint(0, len(data))
        end = min(at + rng.choice((1, 2, 4, 8, 40)), len(data))
        match rng.randrange(9):
            case 0 if at < len(data):
                return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]
            case 1:
                return data[:at] + rng.randbytes(1) + data[at + 1 :]
            case 2:
                return data[:at] + rng.choice(CHUNKS) + data[at:]
            case 3:
                return data[:at] + rng.choice(CHUNKS) + data[end:]
            case 4:
                return data[:at] + data[end:]
            case 5:
                return data[:end] + data[at:]
            case 6:
                return data[:at]
            case 7:
                other = rng.choice(self.parser.seeds)
                return data[:at] + other[rng.randint(0, len(other)) :]
            case _:
                chunk = data[at:end] if rng.random() < 0.5 else b""
                chunk = chunk or rng.choice(CHUNKS)
                room = max(self.parser.bytes_max - len(data), 0) / len(chunk)
                times = int((room + 1) ** rng.random())  # short ones as often as long ones
                return data[:at] + chunk * times + data[at:]

    def with_other_value(self, value: Any) -> Any:
        """With one part replaced, dropped, doubled, moved or put into a list."""
        rng = self.rng
        places = list(_places(value))
        if not places:
            return self.atom()
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1:
                holder[key] = self.atom()
            case 2:
                del holder[key]
            case 3 if isinstance(holder, list):
                holder[key:key] = [holder[key]] * rng.choice((1, 2, 20))
            case 3:
                holder[rng.choice(("", "a", "v", f"{key}x"))] = holder[key]
            case 4:
                other, at = rng.choice(places)
                with contextlib.suppress(LookupError):
                    holder[key] = copy.deepcopy(other[at])
            case _:
                holder[key] = [holder[key]]
        return value

    def atom(self) -> Any:
        own = OWN_ATOMS[self.parser.form] if self.rng.random() < 0.3 else ATOMS
        return copy.deepcopy(self.rng.choice(own))

    # --- ways to grow ---

    def families(self, count: int) -> Iterator[Callable[[int], bytes]]:
        """Functions from a length to an input of about that length."""
        yield from self.parser.grow
        for _ in range(count):
            grown = self.values and self.rng.random() < 0.5 and self.grown_value()
            yield grown or self.grown_bytes()

    def grown_bytes(self) -> Callable[[int], bytes]:
        """A part of a valid encoding, or some bytes, again and again in the middle of one."""
        rng, seed = self.rng, self.rng.choice(self.parser.seeds)
        at = rng.randint(0, len(seed))
        chunk = rng.choice(CHUNKS) if rng.random() < 0.5 else seed[at : at + rng.randint(1, 60)]
        chunk = chunk or b"a"
        return lambda n: seed[:at] + chunk * max((n - len(seed)) // len(chunk), 0) + seed[at:]

    def grown_value(self) -> Callable[[int], bytes] | None:
        """A list of more items, or a map with more keys, in an otherwise valid value."""
        value = copy.deepcopy(self.rng.choice(self.values))
        holders = [holder for holder, _ in _places(value)]
        if not holders:
            return None
        holder = self.rng.choice(holders)
        item = copy.deepcopy(self.rng.choice([at for _, at in _items(holder)]))
        size = len(self.encode(item)) + (0 if isinstance(holder, list) else 8)
        before = copy.copy(holder)

        def grow(n: int) -> bytes:
            count = n // max(size, 1)
            if isinstance(holder, list):
                holder[:] = before + [item] * count
            else:
                holder.clear()
                holder.update(before | {f"k{i:05}": item for i in range(count)})
            return self.encode(value)

        return grow


def _items(holder: Any) -> list[tuple[Any, Any]]:
    return list(holder.items() if isinstance(holder, dict) else enumerate(holder))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every part of a value."""
    if isinstance(value, dict | list):
        for key, item in _items(value):
            yield value, key
            yield from _places(item)


# --- the judgement --------------------------------------------------------------------------------


class TooSlow(BaseException):
    """No Exception, so that no parser mistakes it for a bad input."""


def allowed_s(size: int) -> float:
    """What a parser may take for an input of `size` bytes."""
    return ALLOWED_S + size * ALLOWED_S_PER_BYTE


@contextlib.contextmanager
def _alarm(after_s: float) -> Iterator[None]:
    """Raise TooSlow in what runs for so long, by the time of the process."""

    def ring(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def took_s(parser: Parser, data: bytes) -> float:
    """How long the parser takes; raises TooSlow, or what it does not document."""
    gc.disable()  # it looks at all that the tests have made; a node chooses when
    try:
        with _alarm(10 * allowed_s(len(data))):
            started = time.thread_time()
            with contextlib.suppress(*parser.refuses):
                parser.parse(data)
            return time.thread_time() - started
    finally:
        gc.enable()


def judged_s(parser: Parser, data: bytes) -> float:
    """The same; fails for an error that is not documented, and for what takes too long."""
    shown = data if len(data) <= 600 else data[:300] + b" ... " + data[-300:]
    where = f"{parser}, seed {SEED}, {len(data)} bytes: {shown!r}"
    try:
        took = took_s(parser, data)
        again = 4
        while took > allowed_s(len(data)) and again:
            took, again = min(took, took_s(parser, data)), again - 1
    except TooSlow:
        pytest.fail(f"no end after {10 * allowed_s(len(data)):.3f} s: {where}")
    except Exception as exc:
        raise AssertionError(f"{type(exc).__name__} is not documented: {where}") from exc
    if took > allowed_s(len(data)):
        pytest.fail(f"{took:.3f} s, allowed are {allowed_s(len(data)):.3f} s: {where}")
    return took


def steepness(parser: Parser, grow: Callable[[int], bytes]) -> float:
    """How many times longer a byte takes in an input of GROWTH times the bytes.

    0 where even the long one takes next to nothing. A short one may be refused at once where the
    long one is read, since a length in it says more than there is: the least of three counts, and
    quadratic work is steep beside each of them.
    """
    size = min(parser.bytes_max, GROWN_BYTES_MAX) * 9 // 10  # what is too long is refused at once
    steep = float("inf")
    for shorter in (GROWTH, 8, 4):
        if steep > STEEP:
            steep = min(steep, _steepness(parser, grow(size // shorter), grow(size)))
    return steep


def _steepness(parser: Parser, small: bytes, large: bytes) -> float:
    times = max((len(large) or 1) / (len(small) or 1), 2.0)
    steep, small_s, large_s = float("inf"), float("inf"), float("inf")
    for _ in range(6):
        large_s = min(large_s, judged_s(parser, large))
        if large_s <= STEEP_S_MIN:
            return 0.0
        # The small one three times: a pause in it would hide that the large one is steep.
        small_s = min(small_s, *(judged_s(parser, small) for _ in range(3)))
        # As for GROWTH times the bytes, if the time is a power of the length.
        steep = (large_s / small_s / times) ** (math.log(GROWTH) / math.log(times))
        if steep <= STEEP:
            return steep
    return steep


def mutants_of(parser: Parser, seed: object, seconds: float) -> tuple[int, float, int]:
    """Let the parser read mutants; (how many, the slowest one's time in s, its bytes)."""
    make = Mutator(parser, random.Random(f"{seed} {parser}"))
    count, slowest = 0, (0.0, 0)
    end = time.monotonic() + (seconds or SECONDS_EACH_MAX)
    while time.monotonic() < end and (seconds or count < MUTANTS):
        data = make()
        slowest = max(slowest, (judged_s(parser, data), len(data)))
        count += 1
    return count, *slowest


@parsers
def test_a_valid_encoding_is_used(parser: Parser) -> None:
    assert parser.seeds
    for seed in parser.seeds:
        assert len(seed) <= parser.bytes_max
        parser.parse(seed)


@pytest.mark.timeout(max(120.0, 3 * SECONDS / len(PARSERS) + 60))
@parsers
def test_a_mutant_is_used_or_refused_in_linear_time(
    parser: Parser, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    record_property("seed", SEED)
    for seed in parser.seeds:  # what is imported at the first use is not the parser's time
        parser.parse(seed)
    count, slowest_s, size = mutants_of(parser, SEED, SECONDS / len(PARSERS))
    if SECONDS:
        with capsys.disabled():
            print(  # noqa: T201  # the seed replays it
                f"\n{parser}: seed {SEED}, {count} mutants, the slowest took "
                f"{slowest_s * 1000:.2f} ms for {size} bytes"
            )


@pytest.mark.parametrize(
    "families", [FAMILIES, pytest.param(FAMILIES_LONG, marks=pytest.mark.long)]
)
@parsers
def test_a_byte_takes_as_long_in_a_long_input(
    parser: Parser, families: int, record_property: Any
) -> None:
    record_property("seed", SEED)
    for seed in parser.seeds:
        parser.parse(seed)
    make = Mutator(parser, random.Random(f"{SEED} {parser}"))
    for number, grow in enumerate(make.families(families)):
        assert (steep := steepness(parser, grow)) <= STEEP, (
            f"{parser}, seed {SEED}, way {number} to grow: {steep:.1f} times, {grow(400)[:400]!r}"
        )


# --- the test is tested ---------------------------------------------------------------------------

BACKTRACKING = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}\.?)+\Z")
"""The pattern that host names of addresses had once: exponential where the end does not fit."""


def test_the_pattern_that_backtracked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiaddr, "_is_host_name", BACKTRACKING.match)
    with pytest.raises(pytest.fail.Exception, match=r"no end after|allowed are"):
        mutants_of(PARSERS[0], 0, 20.0)


@pytest.mark.parametrize(
    "parse",
    [
        lambda data: [data[at:] for at in range(0, len(data), 4)],
        lambda data: [b for b in data[::8] if b + 1 in list(data[::8])],
        lambda data: re.search(rb"(a|b)*c", data),
    ],
)
def test_quadratic_work_is_found(parse: Callable[[bytes], object]) -> None:
    parser = Parser("quadratic", parse, [b"aaaa"], (), 40_000)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        assert steepness(parser, lambda n: b"a" * n) <= STEEP


def test_linear_work_is_none() -> None:
    parser = Parser("linear", lambda data: sum(data), [b"a"], (), GROWN_BYTES_MAX)
    assert steepness(parser, lambda n: b"a" * n) <= STEEP


def test_an_error_that_is_not_documented_is_found() -> None:
    parser = Parser("raises", lambda data: {}[data[:1]], [b""], (ValueError,))
    with pytest.raises(AssertionError, match="KeyError is not documented"):
        mutants_of(parser, 0, 5.0)
