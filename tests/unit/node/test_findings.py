"""What a running node finds when it looks at itself, and asks two others."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.findings import ADA, BOB, OWN, levels, only

from wetware.base.finding import Finding, error
from wetware.base.multiaddr import Multiaddr
from wetware.base.threads import Threads
from wetware.broker import findings as grants
from wetware.errors import Busy, DialError, LimitExceeded
from wetware.identity import Key, PeerId
from wetware.node import findings as on_node
from wetware.node.findings import check_node
from wetware.node.lag import Lag, LagMeter, judge_lag
from wetware.overlay.admission.findings import certificate, durable
from wetware.overlay.admission.limits import AdmissionLimits
from wetware.overlay.libp2p import findings as overlay
from wetware.overlay.link import LinkLimits
from wetware.overlay.membership import findings as membership

pytestmark = pytest.mark.anyio


def member(key: Key, name: str, state: str = "alive", **fields: Any) -> Any:
    record = SimpleNamespace(
        name=name,
        host=fields.pop("host", f"{name}-host"),
        version=fields.pop("version", "0.1.0"),
        peer=key.peer_id,
    )
    return SimpleNamespace(
        **{
            "peer": key.peer_id,
            "record": record,
            "state": SimpleStr(state),
            "since": 0.0,
            "clock_offset_s": None,
            **fields,
        }
    )


class SimpleStr(str):
    """As an enum of strings."""

    @property
    def value(self) -> str:
        return str(self)


@dataclasses.dataclass
class Back:
    addr: Multiaddr
    reached: bool
    why: str
    took_s: float = 0.01


class FakeMembership:
    peer_id = OWN.peer_id

    def __init__(self, *members: Any, answers: Any = None) -> None:
        self._members = {m.peer: m for m in members}
        self.known_twins: dict[PeerId, Any] = {}
        self.twins = SimpleNamespace(of=self.known_twins.get)
        self.dial_backs = self
        self.knows_others = len(members) > 1
        self.asked: list[tuple[PeerId, list[Multiaddr]]] = []
        self.answers = answers or (lambda addr: "ok")

    def members(self) -> tuple[Any, ...]:
        return tuple(self._members.values())

    def member(self, peer: PeerId) -> Any:
        return self._members.get(peer)

    async def ask(self, peer: PeerId, addrs: list[Multiaddr]) -> list[Back]:
        self.asked.append((peer, addrs))
        answers = [self.answers(addr) for addr in addrs]
        return [Back(a, why == "ok", why) for a, why in zip(addrs, answers, strict=True)]


LOOPBACK = Multiaddr("ip4", "127.0.0.1", 4001, OWN.peer_id)
LAN = Multiaddr("ip4", "192.168.1.7", 4001, OWN.peer_id)


def make_node(tmp_path: Path, *members: Any, answers: Any = None, addrs: Any = (LAN,)) -> Any:
    now = time.time() * 1000
    leaf = SimpleNamespace(
        rights=frozenset({"member"}),
        not_before_ms=now - 1000,
        not_after_ms=now + 7 * 86_400_000,
        when_ms=lambda part: now + part * 7 * 86_400_000,
    )
    reserve = SimpleNamespace(fill=lambda: True)
    store = SimpleNamespace(files=SimpleNamespace(reserve=reserve, threads=Threads(), unsure=""))
    config = SimpleNamespace(
        node=SimpleNamespace(libp2p=True), admission=AdmissionLimits(), link=LinkLimits()
    )
    return SimpleNamespace(
        key=OWN,
        reached="reached directly at /ip4/5.0.0.9/tcp/4001",
        addrs=addrs,
        data_dir=tmp_path,
        clock=time,
        started_at=time.monotonic() - 1000,
        config=config,
        host=SimpleNamespace(connection=lambda peer: None),
        admission=SimpleNamespace(
            own=SimpleNamespace(leaf=leaf),
            early_s=dict,
            store=store,
        ),
        store=store,
        membership=FakeMembership(member(OWN, "own"), *members, answers=answers),
        backend=SimpleNamespace(name="local", epoch=3, findings=list),
        also=(),
        plugins=SimpleNamespace(report=()),
        services={},
        overlay=SimpleNamespace(
            status=lambda: SimpleNamespace(
                state="running", restarts=0, last_error=None, dht_peers=2
            )
        ),
        lag=LagMeter(),
        broker=SimpleNamespace(ungranted=list),
        audit=SimpleNamespace(recorder=SimpleNamespace(name="audit", findings=list), failed=""),
        tree=SimpleNamespace(
            grants={},
            shares={},
            store=None,
            clock_wrong="",
            suspended={},
            shares_suspended=None,
        ),
    )


async def reach(node: Any) -> list[Finding]:
    return await membership.reach(node.membership, node.addrs, lambda peer: False)


async def test_a_healthy_node(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada", clock_offset_s=0.01))
    found = await check_node(node)
    assert set(levels(found)) == {"ok"}, found
    checks = {finding.check for finding in found}
    assert checks >= {"members", "certificate", "reach", "policy", "loop", "libp2p", "disk"}
    assert only(found, "reach").text == f"{LAN.with_peer(None)} is reached by ada"


async def test_a_node_alone_is_well(tmp_path: Path) -> None:
    found = await check_node(make_node(tmp_path))
    assert set(levels(found)) == {"ok"}
    assert "alone" in only(found, "members").text
    assert "alone" in only(found, "reach").text


async def test_no_failing_check_spoils_the_others(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada"))
    node.lag = node.overlay = node.backend = node.admission = None
    found = await check_node(node)
    levels(found)
    failed = {f.check for f in found if "could not be judged" in f.text}
    assert failed == {"loop", "libp2p", "policy", "certificate", "admission", "clock of members"}
    assert only(found, "members").level == "ok"


async def test_a_check_of_a_node_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_node, "REACH_S_MAX", 0.05)
    node = make_node(tmp_path, member(ADA, "ada"))

    async def silent(peer: PeerId, addrs: list[Multiaddr]) -> list[Back]:
        await asyncio.Event().wait()
        return []

    node.membership.ask = silent
    async with asyncio.timeout(60):
        found = await check_node(node)
    assert only(found, "reach").level == "warning"


async def test_members_that_are_gone_are_named(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada", "dead"), member(BOB, "bob", "suspect"))
    found = [f for f in await check_node(node) if f.check == "members"]
    assert [f.level for f in found] == ["error", "warning", "warning"]
    text = " ".join(f.text + f.remedy for f in found)
    for part in ("dead: ada", "suspect: bob", "`ww ping bob`", "`ww evict ada`"):
        assert part in text


async def test_two_members_of_other_machines_are_asked_first(tmp_path: Path) -> None:
    keys = [Key.generate() for _ in range(4)]
    near = [member(key, f"near{n}", host="own-host") for n, key in enumerate(keys[:2])]
    far = [member(key, f"far{n}") for n, key in enumerate(keys[2:])]
    node = make_node(tmp_path, *near, *far, addrs=(LOOPBACK, LAN))
    found = await reach(node)
    assert {peer for peer, _ in node.membership.asked} == {m.peer for m in far}
    assert all(addrs == [LAN.with_peer(None)] for _, addrs in node.membership.asked)
    assert levels(found) == ["ok"]


async def test_a_neighbour_may_dial_loopback(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada", host="own-host"), addrs=(LOOPBACK,))
    found = await reach(node)
    assert levels(found) == ["ok"]
    assert "127.0.0.1" in found[0].text


async def test_loopback_only_with_members_elsewhere(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada"), addrs=(LOOPBACK,))
    found = await reach(node)
    assert levels(found) == ["warning"]
    assert "--listen /ip4/0.0.0.0" in found[0].remedy
    assert node.membership.asked == []


async def test_an_address_that_nobody_reaches(tmp_path: Path) -> None:
    node = make_node(
        tmp_path, member(ADA, "ada"), member(BOB, "bob"), answers=lambda addr: "timeout"
    )
    found = await reach(node)
    assert levels(found) == ["warning", "error"]
    assert "ada (timeout)" in found[0].text
    assert "port 4001" in found[0].remedy


async def test_a_member_that_does_not_answer_the_question(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada"), member(BOB, "bob"))

    async def dial_back(peer: PeerId, addrs: list[Multiaddr]) -> list[Back]:
        if peer == ADA.peer_id:
            raise LimitExceeded("ada refused: too many requests")
        raise DialError("cannot reach bob")

    node.membership.ask = dial_back
    found = await reach(node)
    assert levels(found) == ["warning", "warning"]


def test_reach_is_judged_for_each_address() -> None:
    lan, other = LAN.with_peer(None), Multiaddr("ip4", "203.0.113.9", 4001)
    answers = {lan: [("ada", True, "ok"), ("bob", False, "timeout")], other: []}
    assert levels(membership.judge_reach(answers, elsewhere=True)) == ["warning"]
    answers = {lan: [("ada", True, "ok")], other: [("ada", False, "other peer")]}
    found = membership.judge_reach(answers, elsewhere=True)
    assert levels(found) == ["ok", "warning"]
    assert "another node answers there" in found[1].text


def test_clocks() -> None:
    def judge(**offsets: float) -> list[Finding]:
        return membership.judge_clock(offsets, 60)

    assert membership.judge_clock({}, 60, others=False) == []
    assert levels(judge()) == ["warning"]  # not to know is not well
    assert levels(judge(a=0.2, b=-0.1)) == ["ok"]
    assert levels(judge(a=40.0, b=41.0)) == ["warning"]
    (found,) = judge(a=100.0, b=101.0, c=0.0)
    assert (found.level, "behind" in found.text) == ("error", True)
    (found,) = judge(a=-100.0)
    assert (found.level, "ahead of" in found.text) == ("error", True)
    assert levels(judge(a=0.1, c=7200.0)) == ["warning"]  # of three clocks, two agree
    (found,) = judge(a=0.1, b=0.2, c=95.0)
    assert found.level == "warning"
    assert "c (95.0 s ahead)" in found.text


def test_certificates() -> None:
    day = 86_400_000

    def judge(begin: float, end: float, now: float) -> Finding:
        leaf = SimpleNamespace(
            rights=frozenset({"member", "invite"}),
            not_before_ms=begin,
            not_after_ms=end,
            when_ms=lambda part: begin + part * (end - begin),
        )
        (found,) = certificate(SimpleNamespace(leaf=leaf), now)  # type: ignore[arg-type]
        levels([found])
        return found

    fresh = judge(0, 7 * day, day)
    assert (fresh.level, fresh.text) == ("ok", "valid for 6 d more (rights: invite, member)")
    overdue = judge(0, 7 * day, 5 * day)
    assert (overdue.level, "overdue" in overdue.text) == ("warning", True)
    assert judge(0, 7 * day, 8 * day).level == "error"
    assert judge(2 * day, 7 * day, day).level == "error"


def test_versions_of_members() -> None:
    assert on_node.judge_versions("0.1.0", {}) == []
    assert levels(on_node.judge_versions("0.1.0", {"a": "0.1.7"})) == ["ok"]
    (found,) = on_node.judge_versions("0.1.0", {"a": "0.1.7", "b": "0.2.0"})
    assert found.level == "warning"
    assert "b 0.2.0" in found.text
    assert "wetware==0.2.0" in found.remedy


async def test_lag_is_not_judged_right_after_the_start(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    (found,) = node.lag.findings(0.0)
    assert (found.level, "too early" in found.text) == ("ok", True)


def test_lag() -> None:
    assert levels(judge_lag(Lag(0.05, 1.0))) == ["ok"]
    assert levels(judge_lag(Lag(0.051, 1.0))) == ["warning"]


async def test_a_node_whose_decisions_are_not_recorded(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    assert on_node.audit(node.audit) == []
    node.audit.failed = "OSError: gone"
    (found,) = on_node.audit(node.audit)
    assert (found.level, "OSError: gone" in found.text) == ("error", True)
    node.audit.recorder = None
    (found,) = on_node.audit(node.audit)
    assert (found.level, 'audit = "none"' in found.text) == ("warning", True)


@pytest.mark.parametrize(
    ("reasons", "level", "says"),
    [
        ({}, "ok", "5 live, 1 share"),
        ({"store": SimpleNamespace(failing="disk I/O error")}, "error", "none is made or redeemed"),
        ({"shares_suspended": Busy("every share is suspended")}, "error", "is suspended"),
        ({"clock_wrong": "it was set back by 90 s"}, "error", "grants with an end are refused"),
        (
            {"suspended": {"evm": Busy("users of evm are suspended: the chain is far {}")}},
            "error",
            "suspended: the chain is far",
        ),
    ],
)
def test_the_grants(reasons: dict[str, Any], level: str, says: str, tmp_path: Path) -> None:
    tree = make_node(tmp_path).tree
    vars(tree).update({"grants": range(5), "shares": range(1)} | reasons)
    found = grants.findings(tree)
    assert levels(found) == [level]
    assert says in found[0].text


async def test_the_space_for_evictions() -> None:
    reserve = SimpleNamespace(fill=lambda: True, missing="")
    files: Any = SimpleNamespace(reserve=reserve, threads=Threads(), unsure="")
    assert await durable(files) == []
    reserve.fill, reserve.missing = (lambda: False), "No space left on device"
    files.unsure = "an eviction may be lost"
    found = await durable(files)
    assert levels(found) == ["error", "error"]
    assert "No space left" in found[0].text
    assert "an eviction may be lost" in found[1].text


def test_the_libp2p_guest() -> None:
    def judge(state: str, restarts: int = 0) -> Finding:
        status: Any = SimpleNamespace(
            state=state, restarts=restarts, last_error="boom" if restarts else None, dht_peers=0
        )
        (found,) = overlay.findings(status)
        levels([found])
        return found

    assert judge("running").level == "ok"
    assert judge("starting").level == "ok"
    assert judge("running", 2).level == "warning"
    assert "2 restarts, the last time: boom" in judge("running", 2).text
    assert judge("stopped", 1).level == "error"


async def test_a_backend_that_has_something_to_say(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.backend.findings = lambda: [error("policy", "out of touch for 2 d", "`ww ls`")]
    assert levels(on_node.policy(node.backend)) == ["error"]


async def test_a_second_process_with_the_same_key(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    other = SimpleNamespace(name="copy", addrs=("/ip4/10.0.0.7/tcp/4001",))
    node.membership.known_twins[OWN.peer_id] = other
    (found,) = membership.identity(node.membership)
    assert levels([found]) == ["error"]
    assert "copy at /ip4/10.0.0.7/tcp/4001" in found.text


async def test_a_service_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    def fails() -> list[Finding]:
        raise ValueError("boom")

    node = make_node(tmp_path)
    node.services = {
        "box": SimpleNamespace(findings=lambda: [error("box", "it is full", "`ww box` and `ls`")]),
        "bad": SimpleNamespace(findings=fails),
    }
    found = await check_node(node)
    assert only(found, "box").text == "it is full"
    assert "could not be judged: ValueError: boom" in only(found, "service bad").text


def test_services_that_nobody_has_accepted() -> None:
    (found,) = grants.roles(["blob"])
    assert levels([found]) == ["warning"]
    assert found.text == "blob is installed, not granted to members yet"
    assert found.remedy == "`ww role accept blob`"
    assert grants.roles([]) == []
