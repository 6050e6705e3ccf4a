"""Hostile bytes: a membership frame is used, or it is Malformed; nothing else comes of it."""

from __future__ import annotations

import random
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware.overlay.membership import wire
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.record import Malformed, Record, key_of
from wetware.overlay.membership.selector import Selector
from wetware.overlay.membership.swim import Swim

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from membership_sim import UNIX_MS, key_number

CONFIG = MembershipConfig(members_max=16)
KEYS = [key_of(key_number(n).peer_id) for n in range(8)]


@lru_cache(maxsize=64)
def record(number: int, incarnation: int = 1, left: bool = False) -> Record:
    return Record.sign(
        key_number(number),
        incarnation=incarnation,
        instance=bytes(8),
        issued_ms=UNIX_MS,
        labels={"zone": "home"},
        left=left,
    )


class Node:
    def __init__(self) -> None:
        self.time = 0.0
        self.facts: dict[bytes, bytes] = {}
        self.sent_bytes = 0
        self.swim = Swim(
            record(0),
            config=CONFIG,
            sign=partial(Record.sign, key_number(0)),
            send=self._send,
            accept=lambda _: {},
            facts=lambda: self.facts,
            adopt=self._adopt,
            now=lambda: self.time,
            unix_ms=lambda: UNIX_MS,
            rng=random.Random(1),
            on_change=lambda _: None,
        )
        for number in (1, 2, 3):
            frame = cbor.encode({"k": 8, "r": [record(number).encoded]})
            self.swim.receive(key_number(number).peer_id, frame)

    def _send(self, _: object, frame: bytes) -> None:
        assert len(frame) <= CONFIG.frame_bytes_max
        self.sent_bytes += len(frame)

    def _adopt(self, fact: bytes) -> bool:
        raise InvalidArgument("no fact")

    def feed(self, frame: bytes) -> bool:
        """Whether the frame was used; bounded state either way."""
        used = True
        try:
            self.swim.receive(key_number(1).peer_id, frame)
        except Malformed:
            used = False
        swim = self.swim
        assert len(swim.members()) <= CONFIG.members_max
        assert len(swim._fetching.pending) <= 4 * CONFIG.members_max + 1
        assert len(swim._sources) <= 4
        assert len(swim._gossip.rumours) <= 4 * CONFIG.members_max
        assert swim.record.incarnation < 1 << 53
        return used

    def go_on(self) -> None:
        """Nothing that was received makes a later tick fail."""
        for _ in range(60):
            self.time = self.swim.due
            self.swim.tick()


keys = st.sampled_from(KEYS) | st.binary(min_size=32, max_size=32)
numbers = st.integers(0, (1 << 64) - 1) | st.integers(0, 3)
entries = st.lists(
    st.builds(
        wire.ENTRY.pack,
        keys,
        numbers,
        st.integers(0, (1 << 32) - 1) | st.just(0),
        st.integers(0, 5),
    ),
    max_size=6,
).map(b"".join)
claims = st.lists(
    st.builds(wire.CLAIM.pack, keys, numbers, keys, st.integers(0, 4)), max_size=6
).map(b"".join)
records = st.builds(
    lambda n, i, left: record(n, i, left).encoded,
    st.integers(0, 7),
    st.integers(0, 3),
    st.booleans(),
)
junk: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
frames = st.fixed_dictionaries(
    {"k": st.integers(0, 9)},
    optional={
        "n": st.integers(-1, 1 << 54) | junk,
        "i": keys | junk,
        "u": st.integers(0, 1 << 54) | junk,
        "d": entries | junk,
        "c": claims | junk,
        "f": st.binary(max_size=3).map(lambda b: b * 16) | junk,
        "l": keys | st.just(b"") | junk,
        "h": keys | st.just(b"") | junk,
        "w": st.lists(keys, max_size=5).map(b"".join) | junk,
        "g": st.binary(max_size=3).map(lambda b: b * 16) | junk,
        "r": st.lists(records | st.binary(max_size=60), max_size=4) | junk,
        "b": st.lists(st.binary(max_size=60), max_size=4) | junk,
        "z": st.booleans() | junk,
        "zz": junk,
    },
)


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_random_bytes(data: list[bytes]) -> None:
    node = Node()
    for frame in data:
        node.feed(frame)
    node.go_on()


@settings(max_examples=150)
@given(st.lists(frames, max_size=8))
def test_frames_of_plausible_and_implausible_fields(data: list[dict[str, Any]]) -> None:
    node = Node()
    for fields in data:
        node.feed(cbor.encode(fields))
    node.go_on()


@settings(max_examples=100)
@given(
    frames, st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_mutated_frames(fields: dict[str, Any], flips: list[tuple[int, int]]) -> None:
    node = Node()
    data = bytearray(cbor.encode(fields))
    for at, mask in flips:
        data[at % len(data)] ^= mask
    node.feed(bytes(data))
    node.feed(bytes(data[: len(data) // 2]))
    node.go_on()


@given(st.binary(max_size=400) | records)
def test_records(data: bytes) -> None:
    try:
        opened = Record.open(data)
    except Malformed:
        return
    assert opened.encoded == data


@given(
    records, st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=3)
)
def test_mutated_records_are_never_accepted(data: bytes, flips: list[tuple[int, int]]) -> None:
    changed = bytearray(data)
    for at, mask in flips:
        changed[at % len(changed)] ^= mask
    if bytes(changed) == data:
        return
    with pytest.raises(Malformed):
        Record.open(bytes(changed))


@given(st.text(max_size=60))
def test_selectors(text: str) -> None:
    try:
        selector = Selector.parse(text)
    except InvalidArgument:
        return
    assert isinstance(selector.terms, tuple)
