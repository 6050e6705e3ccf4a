"""Who is in the cluster, for plugins and for clients: `ctx.members`, `ctx.watch_members`."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from wetware.errors import InvalidArgument
from wetware.identity import Key, PeerId
from wetware.member import Member
from wetware.node.members import Members
from wetware.overlay.admission.statements import FOUND
from wetware.overlay.membership.known import Change, ChangeKind, Known, State
from wetware.overlay.membership.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from wetware.member import Member

KEYS = [Key.from_seed(bytes([n]) * 32) for n in range(3)]
REMOTE = SimpleNamespace(remote=SimpleNamespace(relay=None))
OWN, FOREIGN = KEYS[0].peer_id, Key.from_seed(b"f" * 32).peer_id


def known(n: int, *, state: State = State.ALIVE, ahead_s: float | None = None) -> Known:
    record = Record.sign(
        KEYS[n],
        incarnation=7,
        instance=bytes(8),
        issued_ms=1,
        name=f"n{n}",
        host="h",
        addrs=(f"/ip4/127.0.0.1/tcp/{4000 + n}",),
        services=("box",),
        load=0.5,
        memory_bytes=10,
    )
    return Known(record, state, 90.0, {"zone": f"z{n}"}, 0.25, ahead_s)


class Admitted(tuple[PeerId, ...]):
    """The members of the admission."""

    __slots__ = ()

    def __new__(cls) -> Admitted:
        return super().__new__(cls, (FOREIGN, KEYS[1].peer_id))

    def is_foreign(self, peer: PeerId) -> bool:
        return peer == FOREIGN


class Cluster:
    """The parts of a node that `Members` looks at."""

    def __init__(self) -> None:
        self.table = [known(n) for n in range(3)]
        self.listeners: list[Callable[[Change], None]] = []
        self.twins: dict[PeerId, Any] = {}
        self.clock_wrong = ""
        chain = SimpleNamespace(labels={"zone": "far"})
        self.opened = 0
        admission: Any = SimpleNamespace(
            members=Admitted(), chain=lambda peer: chain, judge=SimpleNamespace(open=self._rights)
        )
        host: Any = SimpleNamespace(
            peer_id=OWN, connection=lambda peer: REMOTE if peer == KEYS[1].peer_id else None
        )
        clock: Any = SimpleNamespace(monotonic=lambda: 100.0)
        membership: Any = SimpleNamespace(
            members=lambda: tuple(self.table),
            member=lambda peer: next((m for m in self.table if m.record.peer == peer), None),
            watch=self.listeners.append,
            twins=SimpleNamespace(of=self.twins.get),
        )
        self.members = Members(
            membership,
            admission,
            host,
            clock=clock,
            clock_wrong=lambda: self.clock_wrong,
            skew_s_max=60.0,
        )

    def _rights(self, chain: bytes) -> Any:
        self.opened += 1
        return SimpleNamespace(rights={FOUND} if chain == b"founder" else ())

    def tell(self, kind: ChangeKind, what: Known) -> None:
        for listener in self.listeners:
            listener(Change(kind, what, None))


def test_nodes_and_foreign_peers_that_match_are_listed() -> None:
    members = Cluster().members
    everybody = members.list("")
    assert [m.name for m in everybody] == ["n0", "n1", "n2", ""]
    assert [m.state for m in everybody] == ["alive", "alive", "alive", "foreign"]
    assert [m.is_self for m in everybody] == [True, False, False, False]
    assert [m.connected for m in everybody] == [False, True, False, False]
    (one,) = members.list("zone=z1,service=box")
    assert one.as_dict() == {
        "peer_id": str(KEYS[1].peer_id),
        "name": "n1",
        "host": "h",
        "state": "alive",
        "since_s": 10.0,
        "incarnation": 7,
        "addrs": ["/ip4/127.0.0.1/tcp/4001"],
        "labels": {"zone": "z1"},
        "version": "",
        "services": ["box"],
        "load": 0.5,
        "memory_bytes": 10,
        "rtt_s": 0.25,
        "connected": True,
        "via": "",
        "self": False,
        "trouble": "",
    }
    assert Record.open(one.record).name == "n1"
    (foreign,) = members.list("zone=far")
    assert (foreign.peer_id, foreign.record) == (FOREIGN, b"")
    with pytest.raises(InvalidArgument, match="bad selector"):
        members.list("=")
    assert members.list(str(FOREIGN)) == (foreign,)


def test_the_founder_is_looked_for_once_and_known_as_long_as_it_is_a_member() -> None:
    cluster = Cluster()
    assert cluster.members.founder() is None
    founder = cluster.table[2]
    cluster.table[2] = replace(founder, record=replace(founder.record, chain=b"founder"))
    assert cluster.members.founder() == KEYS[2].peer_id
    looked = cluster.opened
    assert cluster.members.founder() == KEYS[2].peer_id
    assert cluster.opened == looked
    del cluster.table[2]
    assert cluster.members.founder() is None


def test_what_is_wrong_with_a_member_is_said() -> None:
    cluster = Cluster()
    cluster.clock_wrong = "nobody was asked"
    cluster.table[1:] = [known(1, ahead_s=-120.0), known(2, ahead_s=60.0)]
    assert [m.trouble for m in cluster.members.list("service=box")] == [
        "its clock is in doubt: nobody was asked",
        "its clock is 2 min behind",
        "",
    ]
    cluster.twins[OWN] = SimpleNamespace(name="copy", addrs=("/ip4/10.0.0.7/tcp/4001",))
    cluster.twins[KEYS[2].peer_id] = SimpleNamespace(name="x", addrs=())
    assert [m.trouble for m in cluster.members.list("service=box")] == [
        "another process uses this key: copy at /ip4/10.0.0.7/tcp/4001",
        "its clock is 2 min behind",
        "two processes use its key: x at no address",
    ]


def test_a_watch_tells_of_those_there_and_of_each_change() -> None:
    cluster = Cluster()
    told: list[Member] = []
    end = cluster.members.watch(told.append, "name=n1,state=alive")
    first = known(1)
    left = replace(first, state=State.LEFT)
    cluster.tell(ChangeKind.DUPLICATE, first)
    cluster.tell(ChangeKind.UPDATED, known(2))
    cluster.tell(ChangeKind.LEFT, left)
    cluster.tell(ChangeKind.UPDATED, left)
    cluster.tell(ChangeKind.ALIVE, first)
    cluster.tell(ChangeKind.REMOVED, first)
    cluster.tell(ChangeKind.REMOVED, first)
    assert [m.state for m in told] == ["alive", "left", "alive", "removed"]
    assert {m.name for m in told} == {"n1"}
    end()
    end()
    cluster.tell(ChangeKind.ALIVE, first)
    assert len(told) == 4


def test_a_watcher_that_fails_takes_nothing_from_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = Cluster()
    told: list[str] = []

    def fails(member: Member) -> None:
        if member.state == "dead":
            raise ValueError("boom")

    cluster.members.watch(fails, "")
    cluster.members.watch(lambda member: told.append(member.state), "name=n1")
    cluster.tell(ChangeKind.DIED, known(1, state=State.DEAD))
    assert told == ["alive", "dead"]
    assert "watcher.failed" in caplog.text


def test_an_address_of_a_newer_kind_has_another_scope() -> None:
    addrs = ("/ip4/8.8.8.8/tcp/1", "/ip4/8.8.8.8/udp/1/quic-v1")
    assert Member(KEYS[0].peer_id, addrs=addrs).scopes == ("public", "other")
