"""One node under a magnifying glass (`Lab`), and the simulator of the benchmark for many."""

from __future__ import annotations

import random
import sys
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware.identity import PeerId
from wetware.overlay.membership import wire
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.known import Change, ChangeKind, Known, State
from wetware.overlay.membership.record import Record, key_of
from wetware.overlay.membership.swim import Swim

sys.path.insert(0, str(Path(__file__).parents[3] / "bench"))

from membership_sim import UNIX_MS, key_number


class Lab:
    """Node 0, a clock in hand, and peers that are only what the test makes them say."""

    def __init__(self, **config: Any) -> None:
        self.time = 1000.0
        self.config = MembershipConfig(**config)
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.changes: list[Change] = []
        self.old: list[Record] = []
        self.verified = 0
        self._pings: deque[tuple[int, int]] = deque(maxlen=64)  # not answered yet
        self.facts: dict[bytes, bytes] = {}
        self.bad_facts: set[bytes] = set()
        self.refused: set[PeerId] = set()
        self.certified: dict[str, str] = {}
        self._numbers = {key_number(n).peer_id: n for n in range(64)}
        self.swim = Swim(
            self.record(0),
            config=self.config,
            sign=partial(Record.sign, key_number(0)),
            send=self._send,
            accept=self._accept,
            facts=lambda: self.facts,
            adopt=self._adopt,
            now=lambda: self.time,
            unix_ms=lambda: self.unix_ms,
            rng=random.Random(1),
            on_old=self.old.append,
            on_change=self.changes.append,
            verify=self._verify,
        )

    @property
    def unix_ms(self) -> int:
        return UNIX_MS + int(self.time * 1000)

    def _send(self, peer: PeerId, frame: bytes) -> None:
        assert len(frame) <= self.config.frame_bytes_max
        fields = cbor.decode(frame, bytes_max=1 << 20)
        self.sent.append((self._numbers[peer], fields))
        if fields["k"] == 1:
            self._pings.append((self._numbers[peer], fields["n"]))

    def _verify(self, record: Record) -> None:
        self.verified += 1
        record.verify()

    def _accept(self, record: Record) -> dict[str, str]:
        if record.peer in self.refused:
            raise InvalidArgument("not a member")
        return self.certified

    def _adopt(self, fact: bytes) -> bool:
        if fact in self.bad_facts:
            raise InvalidArgument("no fact")
        digest = wire_digest(fact)
        is_new = digest not in self.facts
        self.facts[digest] = fact
        return is_new

    # --- peers ---

    def record(self, number: int, **fields: Any) -> Record:
        values: dict[str, Any] = {
            "incarnation": 100,
            "instance": bytes([number]) * 8,
            "issued_ms": self.unix_ms,
            "name": f"n{number}",
            "host": f"h{number}",
        }
        return Record.sign(key_number(number), **(values | fields))

    def says(self, number: int, kind: int, **fields: Any) -> list[tuple[int, dict[str, Any]]]:
        """A peer sends a frame; returns what is sent because of it."""
        at = len(self.sent)
        self.swim.receive(key_number(number).peer_id, cbor.encode({"k": kind, **fields}))
        return self.sent[at:]

    def tells(self, number: int, *records: Record | bytes) -> list[tuple[int, dict[str, Any]]]:
        """A peer passes records on."""
        items = [r if isinstance(r, bytes) else r.encoded for r in records]
        return self.says(number, 8, r=items, z=True)

    def joined(self, *numbers: int) -> None:
        """These are members now; each brought its own record a while ago."""
        for number in numbers:
            self.tells(number, self.record(number))
        self.pass_s(2 * self.config.probe_s, answer=True)
        self.sent.clear()
        self.changes.clear()

    def claim(
        self, target: int, accuser: int, *, dead: bool = False, incarnation: int = 100
    ) -> bytes:
        state = wire.DEAD if dead else wire.SUSPECT
        return wire.CLAIM.pack(raw(target), incarnation, raw(accuser), state)

    def pass_s(self, seconds: float, *, answer: bool | set[int] = False) -> None:
        """Let time pass, ticking when due; pings are answered by everybody, by some, or by none."""
        end = self.time + seconds
        while True:
            for number, seq in list(self._pings):
                if answer is True or (answer and number in answer):
                    self._pings.remove((number, seq))
                    self.says(number, 2, n=seq, u=self.unix_ms)
            if self.swim.due > end:
                break
            self.time = max(self.time, self.swim.due)
            self.swim.tick()
        self.time = end

    def state(self, number: int) -> State | None:
        member = self.member(number)
        return None if member is None else member.state

    def member(self, number: int) -> Known | None:
        return self.swim.member(key_number(number).peer_id)

    def peer(self, number: int) -> PeerId:
        return key_number(number).peer_id

    def kinds(self) -> list[ChangeKind]:
        return [change.kind for change in self.changes]

    def frames(self, kind: int, to: int | None = None) -> list[dict[str, Any]]:
        return [f for n, f in self.sent if f["k"] == kind and (to is None or n == to)]

    def claims_sent(self) -> list[tuple[int, int, int, int]]:
        """(target, incarnation, accuser, state) of all claims in what was sent."""
        numbers = {key_of(peer): n for peer, n in self._numbers.items()}
        return [
            (numbers[target], incarnation, numbers[accuser], state)
            for _, frame in self.sent
            for target, incarnation, accuser, state in wire.CLAIM.iter_unpack(frame.get("c", b""))
        ]


def raw(number: int) -> bytes:
    return key_of(key_number(number).peer_id)


def wire_digest(fact: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(fact).digest()[:16]


def entry(number: int, incarnation: int = 100, revision: int = 0, state: int = 0) -> bytes:
    return wire.ENTRY.pack(raw(number), incarnation, revision, state)


@pytest.fixture
def lab() -> Lab:
    return Lab()
