"""`ww doctor`: what each check says of what it is shown, and that none of them raises or hangs."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.admission import Store
from wetware.admission.limits import AdmissionLimits
from wetware.config import load
from wetware.doctor import Finding, Machine, check_machine, check_node, error
from wetware.doctor import machine as on_machine
from wetware.doctor import node as on_node
from wetware.doctor.finding import judged
from wetware.errors import DialError, LimitExceeded
from wetware.identity import Key, PeerId
from wetware.lag import LagMeter
from wetware.link import LinkLimits
from wetware.multiaddr import Multiaddr
from wetware.testing import Home

pytestmark = pytest.mark.anyio

OWN, ADA, BOB = (Key.from_seed(bytes([n]) * 32) for n in (1, 2, 3))


def levels(findings: list[Finding]) -> list[str]:
    """The levels; and every finding that is not fine names the next command."""
    for finding in findings:
        assert finding.text
        if finding.level == "ok":
            assert finding.remedy == ""
        else:
            assert finding.remedy.count("`") >= 2, finding
    return [finding.level for finding in findings]


def only(findings: list[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "specifiers", "within"),
    [
        ("4.16.0", ">=4.6,<5", True),
        ("5.0", ">=4.6,<5", False),
        ("4.5.9", ">=4.6,<5", False),
        ("2.2.4", "==2.2.4", True),
        ("2.2.4.0", "==2.2.4", True),
        ("2.2.5", "==2.2.4", False),
        ("0.28.3", "==0.28.*", True),
        ("0.29.0", "==0.28.*", False),
        ("0.28", "==0.28.*", True),
        ("1.4.5", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("1.5", "!=1.5", False),
        ("3.0rc1", ">=3", True),
        ("3.11.7", ">=3.11", True),
        ("9", "", True),
    ],
)
def test_versions_are_compared_as_pip_does(version: str, specifiers: str, within: bool) -> None:
    assert on_machine.satisfies(version, specifiers) is within


def test_libraries_that_are_missing_or_do_not_fit_are_named() -> None:
    have = {"anyio": "4.6.1", "libp2p": "0.9.0"}
    requires = ["anyio<5,>=4.6", "libp2p==0.8.1", "cbor2<7,>=6", 'web3>=7; extra == "evm"']
    found = on_machine.judge_versions("3.11.7", ">=3.11", requires, have.get)
    assert levels(found) == ["ok", "error", "error", "ok"]
    assert "libp2p 0.9.0 is installed, not ==0.8.1" in found[1].text
    assert "pip install 'libp2p==0.8.1'" in found[1].remedy
    assert "cbor2 is not installed" in found[2].text
    assert levels(on_machine.judge_versions("3.10.1", ">=3.11", [], have.get)) == ["error"]


def test_what_runs_here_is_judged() -> None:
    assert {f.check for f in on_machine.check_versions()} >= {"python"}


# --- this machine ---------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("WW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_data_directory(tmp_path: Path) -> None:
    path = tmp_path / "node"
    assert levels(on_machine.check_data_dir(path)) == ["ok"]
    path.mkdir(mode=0o700)
    assert levels(on_machine.check_data_dir(path)) == ["ok"]
    for mode, level in ((0o755, "warning"), (0o770, "error"), (0o702, "error")):
        path.chmod(mode)
        (found,) = on_machine.check_data_dir(path)
        assert found.level == level, oct(mode)
        assert f"chmod 700 {path}" in found.remedy
    file = tmp_path / "file"
    file.touch()
    assert levels(on_machine.check_data_dir(file)) == ["error"]
    assert levels(on_machine.check_data_dir(file / "below")) == ["error"]


def test_a_data_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    (found,) = on_machine.check_data_dir(tmp_path)
    assert found.level == "error"
    assert "belongs to user" in found.text


def test_free_space_and_its_thresholds(tmp_path: Path) -> None:
    for free, level in (
        (on_machine.DISK_FREE_BYTES_MIN - 1, "error"),
        (on_machine.DISK_FREE_BYTES_LOW - 1, "warning"),
        (on_machine.DISK_FREE_BYTES_LOW, "ok"),
    ):
        assert levels(on_machine.judge_space(free, tmp_path)) == [level]


def test_a_durable_write_is_measured(tmp_path: Path) -> None:
    assert 0 < on_machine.fsync_s(tmp_path) < 60
    assert list(tmp_path.iterdir()) == []
    assert levels(on_machine.judge_fsync(0.001, tmp_path)) == ["ok"]
    assert levels(on_machine.judge_fsync(0.2, tmp_path)) == ["warning"]


def test_a_disk_that_takes_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_machine, "fsync_s", full)
    found = on_machine.check_disk(tmp_path)
    assert "error" in levels(found)
    assert "No space left" in found[-1].text


def test_the_node_s_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WW_PASSPHRASE", raising=False)
    assert levels(on_machine.check_node_key(tmp_path)) == ["ok"]
    OWN.save(tmp_path / "node.key")
    (found,) = on_machine.check_node_key(tmp_path)
    assert found.level == "ok"
    assert str(OWN.peer_id) in found.text
    (tmp_path / "node.key").chmod(0o640)
    (found,) = on_machine.check_node_key(tmp_path)
    assert found.level == "error"
    assert found.remedy == f"`chmod 600 {tmp_path / 'node.key'}`"
    (tmp_path / "node.key").chmod(0o600)
    (tmp_path / "node.key").write_text("no key")
    assert levels(on_machine.check_node_key(tmp_path)) == ["error"]
    (tmp_path / "node.key").unlink()
    (tmp_path / "certificate").touch()
    (found,) = on_machine.check_node_key(tmp_path)
    assert found.level == "error"
    assert "of no use without it" in found.text


def test_an_encrypted_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OWN.save(tmp_path / "node.key", passphrase="correct horse")
    monkeypatch.delenv("WW_PASSPHRASE", raising=False)
    (found,) = on_machine.check_node_key(tmp_path)
    assert (found.level, "WW_PASSPHRASE" in found.text) == ("ok", True)
    monkeypatch.setenv("WW_PASSPHRASE", "wrong")
    assert levels(on_machine.check_node_key(tmp_path)) == ["error"]
    monkeypatch.setenv("WW_PASSPHRASE", "correct horse")
    assert levels(on_machine.check_node_key(tmp_path)) == ["ok"]


def test_the_user_s_key(home: Path) -> None:
    config = load({"node.data_dir": home / "node"})
    assert levels(on_machine.check_user_key(None, config)) == ["ok"]  # the first start makes it
    (home / "node").mkdir(parents=True)
    (found,) = on_machine.check_user_key(None, config)
    assert (found.level, "`ww key new`" in found.remedy) == ("warning", True)
    Store(home / "node").found("evm", b"x")  # by a flag: the configuration does not say it
    (found,) = on_machine.check_user_key(None, config)
    assert (found.level, "logins go by 'evm'" in found.text) == ("ok", True)
    for file in (home / "node").iterdir():
        file.unlink()
    ADA.save(home / "keys" / "default")
    assert levels(on_machine.check_user_key(None, config)) == ["ok"]
    assert levels(on_machine.check_user_key("nobody", config)) == ["warning"]
    (home / "keys" / "default").chmod(0o644)
    assert levels(on_machine.check_user_key(None, config)) == ["error"]


def test_the_kernel_s_clock() -> None:
    assert on_machine.judge_kernel_clock(None) == []
    assert levels(on_machine.judge_kernel_clock(0x2001)) == ["ok"]
    assert levels(on_machine.judge_kernel_clock(0x40)) == ["warning"]
    assert on_machine._kernel_clock() is None or on_machine._kernel_clock() >= 0  # type: ignore[operator]


def test_open_files() -> None:
    assert levels(on_machine.judge_files(None, 1024)) == ["ok"]
    assert levels(on_machine.judge_files(65536, 1024, 900)) == ["ok"]
    assert levels(on_machine.judge_files(1024, 1024)) == ["warning"]
    assert levels(on_machine.judge_files(1024, 512, 900)) == ["error"]


def test_every_problem_of_the_configuration_is_a_finding(home: Path) -> None:
    home.mkdir()
    (home / "ww.toml").write_text('[node]\nauth = "Nope!"\nnam = "x"\n[login]\nsessions_max = -1\n')
    config, found = on_machine.check_config(Machine({}, None, None))
    assert config is not None
    bad = [f for f in found if f.check == "config"]
    assert levels(bad) == ["error"] * len(bad)
    text = "\n".join(f.text for f in bad)
    assert len(bad) >= 3
    for part in ("node.auth", "node.nam", "login.sessions_max"):
        assert part in text
    (home / "ww.toml").write_text("[node\n")
    config, found = on_machine.check_config(Machine({}, None, None))
    assert config is None
    assert levels(found) == ["error"]


def test_plugins() -> None:
    def plugin(name: str, state: str, remedy: str = "") -> Any:
        return SimpleNamespace(name=name, state=state, reason="so it is", remedy=remedy)

    found = on_machine.judge_plugins(
        [
            plugin("a", "loaded"),
            plugin("b", "failed"),
            plugin("c", "unavailable", "pip install 'wetware[c]'"),
            plugin("d", "disabled"),
        ]
    )
    assert levels(found) == ["warning", "warning", "ok"]
    assert "pip install 'wetware[c]'" in found[1].remedy


async def test_a_machine_without_a_node(home: Path) -> None:
    listen = Multiaddr("ip4", "127.0.0.1", free_port())
    seen: list[str] = []
    flags = {"node.data_dir": home / "node", "node.listen": (listen,)}
    found = await check_machine(Machine(flags, None, None), seen.append)
    assert "error" not in levels(found), found
    assert only(found, "listen").text == f"{listen} is free"
    assert {"versions", "config", "data directory", "listen", "your key"} <= set(seen)
    assert not (home / "node").exists(), "the doctor leaves nothing behind"


async def test_a_port_that_is_taken(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addr = Multiaddr("ip4", "127.0.0.1", taken.getsockname()[1])
        flags = {"node.data_dir": home / "node", "node.listen": (addr,)}
        found = only(await check_machine(Machine(flags, None, None)), "listen")
    assert found.level == "error"
    assert "the port is taken" in found.text
    assert f"sport = :{addr.port}" in found.remedy


async def test_another_machine_s_node_needs_no_files_here(home: Path) -> None:
    found = await check_machine(Machine({}, None, None, local=False))
    assert not {f.check for f in found} & {"data directory", "listen", "node key", "disk"}


async def test_a_running_node_is_recognised_and_its_addresses_are_dialled(home: Path) -> None:
    from wetware.link import LinkHost

    data_dir = home / "node"
    data_dir.mkdir(parents=True, mode=0o700)
    assert on_machine.holder_pid(data_dir) is None
    fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, f"{os.getpid()}\n".encode())
    assert on_machine.holder_pid(data_dir) is None, "a lock file without a lock is of a killed node"
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert on_machine.holder_pid(data_dir) == os.getpid()
        machine = Machine({"node.data_dir": data_dir}, None, None)
        starting = only(await check_machine(machine), "listen")
        assert (starting.level, f"kill {os.getpid()}" in starting.remedy) == ("warning", True)
        async with LinkHost(OWN) as host:
            (good,) = await host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
            nobody = Multiaddr("ip4", "127.0.0.1", free_port())
            addrs = [
                str(good.with_peer(OWN.peer_id)),
                str(good.with_peer(ADA.peer_id)),
                str(nobody.with_peer(OWN.peer_id)),
            ]
            (data_dir / "node.json").write_text(json.dumps({"addrs": addrs}))
            found = [f for f in await check_machine(machine) if f.check == "listen"]
        assert levels(found) == ["ok", "error", "error"]
        assert "refused" in found[2].text
    finally:
        os.close(fd)


async def test_a_check_that_fails_or_hangs_is_a_finding() -> None:
    async def broken() -> list[Finding]:
        raise ZeroDivisionError("by\nzero")

    async def refused() -> list[Finding]:
        raise DialError("nobody there", hint="start it")

    async def hangs() -> list[Finding]:
        await asyncio.Event().wait()
        return []

    for check, level, text in (
        (broken, "warning", "ZeroDivisionError: by zero"),
        (refused, "error", "nobody there"),
        (hangs, "warning", "0.01 s"),
    ):
        found = await judged("x", check, 0.01)
        assert levels(found) == [level]
        assert text in found[0].text


# --- a node ---------------------------------------------------------------------------------------


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
    def __init__(self, *members: Any, answers: Any = None) -> None:
        self._members = {m.peer: m for m in members}
        self.twins: dict[PeerId, Any] = {}
        self.knows_others = any(m.state != "foreign" for m in members[1:])
        self.asked: list[tuple[PeerId, list[Multiaddr]]] = []
        self.answers = answers or (lambda addr: "ok")

    def members(self) -> tuple[Any, ...]:
        return tuple(self._members.values())

    def member(self, peer: PeerId) -> Any:
        return self._members.get(peer)

    def twin(self, peer: PeerId) -> Any:
        return self.twins.get(peer)

    async def dial_back(self, peer: PeerId, addrs: list[Multiaddr]) -> list[Back]:
        self.asked.append((peer, addrs))
        answers = [self.answers(addr) for addr in addrs]
        return [Back(a, why == "ok", why) for a, why in zip(addrs, answers, strict=True)]


LOOPBACK = Multiaddr("ip4", "127.0.0.1", 4001, OWN.peer_id)
LAN = Multiaddr("ip4", "192.168.1.7", 4001, OWN.peer_id)


def make_node(tmp_path: Path, *members: Any, answers: Any = None, addrs: Any = (LAN,)) -> Any:
    now = time.time() * 1000
    leaf = SimpleNamespace(
        rights=frozenset({"member"}), not_before_ms=now - 1000, not_after_ms=now + 7 * 86_400_000
    )
    config = SimpleNamespace(
        node=SimpleNamespace(libp2p=True), admission=AdmissionLimits(), link=LinkLimits()
    )
    return SimpleNamespace(
        key=OWN,
        addrs=addrs,
        data_dir=tmp_path,
        clock=time,
        started_at=time.monotonic() - 1000,
        config=config,
        host=SimpleNamespace(connection=lambda peer: None),
        admission=SimpleNamespace(
            own=SimpleNamespace(leaf=leaf),
            early_s=dict,
            store=SimpleNamespace(reserve=SimpleNamespace(fill=lambda: True), unsure=""),
        ),
        membership=FakeMembership(member(OWN, "own"), *members, answers=answers),
        backend=SimpleNamespace(name="local", epoch=3, findings=list),
        plugins=SimpleNamespace(report=(), audit_lost={}),
        overlay=SimpleNamespace(
            status=lambda: SimpleNamespace(
                state="running", restarts=0, last_error=None, dht_peers=2
            )
        ),
        lag=LagMeter(),
        audit=SimpleNamespace(recorder=SimpleNamespace(name="audit", findings=list), failed=""),
        tree=SimpleNamespace(
            grants={},
            shares={},
            store=None,
            clock_wrong="",
            suspended=None,
            shares_suspended=None,
        ),
    )


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

    node.membership.dial_back = silent
    async with asyncio.timeout(10):
        found = await check_node(node)
    assert only(found, "reach").level == "warning"


async def test_members_that_are_gone_are_named(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada", "dead"), member(BOB, "bob", "suspect"))
    found = [f for f in await check_node(node) if f.check == "members"]
    assert [f.level for f in found] == ["error", "warning", "warning"]
    text = " ".join(f.text + f.remedy for f in found)
    for part in ("dead: ada", "suspect: bob", "`ww ping bob`", "`ww evict ada`"):
        assert part in text


async def test_foreign_peers_are_not_asked(tmp_path: Path) -> None:
    foreign = member(ADA, "", "foreign")
    node = make_node(tmp_path, foreign)
    found = await check_node(node)
    assert set(levels(found)) == {"ok"}
    assert node.membership.asked == []


async def test_two_members_of_other_machines_are_asked_first(tmp_path: Path) -> None:
    keys = [Key.generate() for _ in range(4)]
    near = [member(key, f"near{n}", host="own-host") for n, key in enumerate(keys[:2])]
    far = [member(key, f"far{n}") for n, key in enumerate(keys[2:])]
    node = make_node(tmp_path, *near, *far, addrs=(LOOPBACK, LAN))
    found = await on_node._reach(node)
    assert {peer for peer, _ in node.membership.asked} == {m.peer for m in far}
    assert all(addrs == [LAN.with_peer(None)] for _, addrs in node.membership.asked)
    assert levels(found) == ["ok"]


async def test_a_neighbour_may_dial_loopback(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada", host="own-host"), addrs=(LOOPBACK,))
    found = await on_node._reach(node)
    assert levels(found) == ["ok"]
    assert "127.0.0.1" in found[0].text


async def test_loopback_only_with_members_elsewhere(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada"), addrs=(LOOPBACK,))
    found = await on_node._reach(node)
    assert levels(found) == ["warning"]
    assert "--listen /ip4/0.0.0.0" in found[0].remedy
    assert node.membership.asked == []


async def test_an_address_that_nobody_reaches(tmp_path: Path) -> None:
    node = make_node(
        tmp_path, member(ADA, "ada"), member(BOB, "bob"), answers=lambda addr: "timeout"
    )
    found = await on_node._reach(node)
    assert levels(found) == ["warning", "error"]
    assert "ada (timeout)" in found[0].text
    assert "port 4001" in found[0].remedy


async def test_a_member_that_does_not_answer_the_question(tmp_path: Path) -> None:
    node = make_node(tmp_path, member(ADA, "ada"), member(BOB, "bob"))

    async def dial_back(peer: PeerId, addrs: list[Multiaddr]) -> list[Back]:
        if peer == ADA.peer_id:
            raise LimitExceeded("ada refused: too many requests")
        raise DialError("cannot reach bob")

    node.membership.dial_back = dial_back
    found = await on_node._reach(node)
    assert levels(found) == ["warning", "warning"]


def test_reach_is_judged_for_each_address() -> None:
    lan, other = LAN.with_peer(None), Multiaddr("ip4", "203.0.113.9", 4001)
    answers = {lan: [("ada", True, "ok"), ("bob", False, "timeout")], other: []}
    assert levels(on_node.judge_reach(answers, elsewhere=True)) == ["warning"]
    answers = {lan: [("ada", True, "ok")], other: [("ada", False, "other peer")]}
    found = on_node.judge_reach(answers, elsewhere=True)
    assert levels(found) == ["ok", "warning"]
    assert "another node answers there" in found[1].text


def test_clocks() -> None:
    def judge(**offsets: float) -> list[Finding]:
        return on_node.judge_clock(offsets, 60)

    assert on_node.judge_clock({}, 60, others=False) == []
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
            rights=frozenset({"member", "invite"}), not_before_ms=begin, not_after_ms=end
        )
        (found,) = on_node.judge_certificate(SimpleNamespace(leaf=leaf), now)  # type: ignore[arg-type]
        levels([found])
        return found

    fresh = judge(0, 7 * day, day)
    assert (fresh.level, fresh.text) == ("ok", "valid for 6 d more (rights: invite, member)")
    overdue = judge(0, 7 * day, 5 * day)
    assert (overdue.level, "overdue" in overdue.text) == ("warning", True)
    assert judge(0, 7 * day, 8 * day).level == "error"
    assert judge(2 * day, 7 * day, day).level == "error"


def test_versions_of_members() -> None:
    assert on_node.judge_member_versions("0.1.0", {}) == []
    assert levels(on_node.judge_member_versions("0.1.0", {"a": "0.1.7"})) == ["ok"]
    (found,) = on_node.judge_member_versions("0.1.0", {"a": "0.1.7", "b": "0.2.0"})
    assert found.level == "warning"
    assert "b 0.2.0" in found.text
    assert "wetware==0.2.0" in found.remedy


async def test_lag_is_not_judged_right_after_the_start(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.started_at = time.monotonic()
    (found,) = await on_node._loop(node)
    assert (found.level, "too early" in found.text) == ("ok", True)


def test_lag() -> None:
    assert levels(on_node.judge_lag(0.05, 1.0)) == ["ok"]
    assert levels(on_node.judge_lag(0.051, 1.0)) == ["warning"]


async def test_a_node_whose_decisions_are_not_recorded(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    assert await on_node._audit(node) == []
    node.audit.failed = "OSError: gone"
    (found,) = await on_node._audit(node)
    assert (found.level, "OSError: gone" in found.text) == ("error", True)
    node.audit.recorder = None
    (found,) = await on_node._audit(node)
    assert (found.level, 'audit = "none"' in found.text) == ("warning", True)


async def test_copies_that_a_plugin_did_not_get(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    node.plugins.audit_lost = {"siem": 2, "other": 0}
    (found,) = await on_node._plugins(node)
    assert (found.level, "siem lacks 2" in found.text) == ("warning", True)


@pytest.mark.parametrize(
    ("reasons", "level", "says"),
    [
        ({}, "ok", "5 live, 1 share"),
        ({"failing": "disk I/O error"}, "error", "none is made or redeemed"),
        ({"unsure": "every share of this node is suspended"}, "error", "is suspended"),
        ({"clock_wrong": "it was set back by 90 s"}, "error", "grants with an end are refused"),
        ({"suspended": "the chain is out of reach"}, "error", "all capabilities are suspended"),
    ],
)
def test_the_grants(reasons: dict[str, str], level: str, says: str) -> None:
    state = {"failing": "", "unsure": "", "clock_wrong": "", "suspended": ""}
    found = on_node.judge_grants(5, 1, **{**state, **reasons})
    assert levels(found) == [level]
    assert says in found[0].text


def test_the_space_for_evictions() -> None:
    assert on_node.judge_admission("", "") == []
    found = on_node.judge_admission("No space left on device", "an eviction may be lost")
    assert levels(found) == ["error", "error"]
    assert "No space left" in found[0].text
    assert "an eviction may be lost" in found[1].text


def test_the_libp2p_guest() -> None:
    def judge(state: str, restarts: int = 0) -> Finding:
        status: Any = SimpleNamespace(
            state=state, restarts=restarts, last_error="boom" if restarts else None, dht_peers=0
        )
        (found,) = on_node.judge_overlay(status)
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
    assert levels(await on_node._policy(node)) == ["error"]


async def test_a_second_process_with_the_same_key(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    other = SimpleNamespace(name="copy", addrs=("/ip4/10.0.0.7/tcp/4001",))
    node.membership.twins[OWN.peer_id] = other
    (found,) = await on_node._identity(node)
    assert levels([found]) == ["error"]
    assert "copy at /ip4/10.0.0.7/tcp/4001" in found.text


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path) as made:
        yield made


def _ww(home: Home, *args: str) -> Any:
    """With a port of its own: another test may hold the default one."""
    return home.ww(*args, env={"WW_NODE_LISTEN": f"/ip4/127.0.0.1/tcp/{free_port()}"})


def test_the_command_without_a_node(processes: Home) -> None:
    done = _ww(processes, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "no node is running here" in done.stdout
    assert "`ww node` starts one" in done.stdout
    assert "data directory" not in done.stdout  # it is fine, and folded
    *_, last = done.stdout.splitlines()
    assert "ww doctor --verbose" in last
    assert _ww(processes, "doctor", "--strict").returncode == 1
    assert not (processes.path / ".wetware").exists()


def test_the_command_s_levels_are_coloured(processes: Home) -> None:
    env = {"FORCE_COLOR": "1", "WW_NODE_LISTEN": f"/ip4/127.0.0.1/tcp/{free_port()}"}
    done = processes.ww("doctor", "--verbose", env=env)
    assert "\x1b[33mwarning\x1b[0m  node: " in done.stdout
    assert "\x1b[32mok\x1b[0m       data directory: " in done.stdout


def test_the_command_lists_what_is_fine(processes: Home) -> None:
    done = _ww(processes, "doctor", "--verbose")
    assert done.returncode == 0
    assert "ok       data directory: " in done.stdout


def test_the_command_s_errors_and_json(processes: Home) -> None:
    data_dir = processes.path / "open"
    data_dir.mkdir()
    data_dir.chmod(0o777)
    done = _ww(processes, "--data-dir", str(data_dir), "doctor", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    (found,) = [f for f in report["findings"] if f["check"] == "data directory"]
    assert found["level"] == "error"
    assert found["remedy"] == f"`chmod 700 {data_dir}`"
    text = _ww(processes, "--data-dir", str(data_dir), "doctor").stdout
    assert text.startswith("error    data directory: others can write to")


def test_the_command_with_a_broken_configuration(processes: Home) -> None:
    file = processes.path / ".wetware" / "ww.toml"
    file.parent.mkdir()
    file.write_text("[node\n")
    done = _ww(processes, "doctor")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "is not valid TOML" in done.stdout
