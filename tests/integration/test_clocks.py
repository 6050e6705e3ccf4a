"""Nodes whose clocks differ by hours, or jump: who says so, and what still works."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from wetware.testing import Home, NodeProcess, wait_for

pytestmark = pytest.mark.timeout(240)

WITHIN_S = 60.0
"""For what takes a second or two on an idle machine."""

CLOCK = """
import os, time

_time, _time_ns = time.time, time.time_ns

def _offset_s():
    with open(os.environ["TEST_CLOCK_FILE"]) as file:
        return float(file.read() or 0)

time.time = lambda: _time() + _offset_s()
time.time_ns = lambda: _time_ns() + int(_offset_s() * 1e9)
"""


class Machine:
    """A machine with a clock of its own, which `set_s` puts ahead or back; all have one home."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        (path / "sitecustomize.py").write_text(CLOCK)
        self._offset = path / "offset"
        self.set_s(0)
        env = {"PYTHONPATH": str(path), "TEST_CLOCK_FILE": str(self._offset)}
        self.home = Home(path.parent / "home", env=env)

    def set_s(self, offset_s: float) -> None:
        """How far its clock is ahead from now on."""
        new = self._offset.with_suffix(".new")
        new.write_text(str(offset_s))
        new.replace(self._offset)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """`machine(NAME)`: another machine."""
    made: list[Machine] = []

    def make(name: str) -> Machine:
        made.append(Machine(tmp_path / name))
        return made[-1]

    yield make
    for each in made:
        each.home.__exit__()


def trouble(node: NodeProcess) -> dict[str, str]:
    """Name → what `ww ls` says is wrong, of those of which it says something."""
    return {m["name"]: m["trouble"] for m in node.members().values() if m["trouble"]}


def finding(node: NodeProcess, check: str) -> dict[str, str]:
    report = json.loads(node.ww("doctor", "--json").stdout)
    return next(dict(f) for f in report["findings"] if f["check"] == check)


def share(node: NodeProcess, *args: str) -> str:
    return node.ww("share", "pubsub:chat", *args, check=True).stdout.split()[0]


@pytest.mark.long
def test_who_is_two_hours_behind_is_seen_by_all_and_honours_nothing_that_has_an_end(
    machine: Callable[[str], Machine],
) -> None:
    late, right = machine("late"), machine("right")
    late.set_s(-7200)
    with late.home.node("founder") as founder:
        ref, forever = share(founder, "--expires", "1h"), share(founder, "--expires", "never")
        assert founder.ww("use", ref, "pub", "chat", "x").returncode == 0, "it is alone"
        with right.home.node("b", join=founder) as b, right.home.node("c", join=founder) as c:
            for node in (founder, b, c):
                node.wait_members([founder.peer_id, b.peer_id, c.peer_id], within_s=WITHIN_S)
            wait_for(lambda: "founder" in trouble(founder), "its own doubt", within_s=WITHIN_S)
            # Both of the others are right, by two clocks of three; the one in doubt is named.
            for node in (b, c):
                wait_for(  # until each has measured the other: of two clocks both are in doubt
                    lambda node=node: (
                        trouble(node) == {"founder": "its clock is 2 h behind"}
                        and finding(node, "clock of members")["level"] == "warning"
                        # The node's own doubt is looked at every other second, and may be of then.
                        and "s from it" not in node.ww("status", check=True).stdout
                    ),
                    "what is wrong with the founder, and not with itself",
                    within_s=WITHIN_S,
                )
                node.wait_log("member.clock_skewed")
            assert "+7200 s" in trouble(founder)["founder"]
            assert finding(founder, "clock of members")["level"] == "error"
            assert finding(founder, "grants")["level"] == "error"
            founder.wait_log("clock.skewed others_ahead_s=72")
            status = founder.ww("status", check=True).stdout
            assert "7200.0 s behind" in status
            assert "ends      of grants cannot be judged" in status
            done = founder.ww("use", ref, "pub", "chat", "x")
            assert (done.returncode, "clock" in done.stderr) == (77, True), done.stderr
            assert founder.ww("use", forever, "pub", "chat", "x").returncode == 0
            # Nobody's word is taken against the clocks of the others.
            done = founder.ww("clock", "--right")
            assert (done.returncode, "+7200 s" in done.stderr) == (2, True), done.stderr
            late.set_s(0)
            wait_for(lambda: not trouble(b), "a right clock", within_s=WITHIN_S)
            wait_for(
                lambda: "cannot be judged" not in founder.ww("status").stdout,
                "a right clock at the founder",
                within_s=WITHIN_S,
            )
            done = founder.ww("use", ref, "pub", "chat", "x")
            assert (done.returncode, "expired" in done.stderr) == (77, True), done.stderr


def test_the_founder_sees_a_member_two_hours_ahead(machine: Callable[[str], Machine]) -> None:
    right, fast = machine("right"), machine("fast")
    fast.set_s(7200)
    with right.home.node("a") as a, fast.home.node("fast", join=a) as b:
        a.wait_members([b.peer_id], within_s=WITHIN_S)
        b.wait_members([a.peer_id], within_s=WITHIN_S)
        # Of two, nobody can say which is right: both say so.
        for node, other, how in ((a, "fast", "ahead"), (b, "a", "behind")):
            wait_for(lambda node=node: len(trouble(node)) == 2, "both", within_s=WITHIN_S)
            assert trouble(node)[other] == f"its clock is 2 h {how}"
            table = node.ww("ls", check=True).stdout
            assert f"its clock is 2 h {how}" in table


def test_who_is_behind_the_certificates_of_the_others_knows_that(
    machine: Callable[[str], Machine],
) -> None:
    """It lets nobody in, as they begin in its future; that is a comparison, too."""
    right, late = machine("right"), machine("late")
    with right.home.node("a") as a:
        with late.home.node("b", join=a) as b:
            b.wait_members([a.peer_id], within_s=WITHIN_S)
        late.set_s(-7200)
        with late.home.node("b") as b:
            b.wait_log("introduction.refused", within_s=WITHIN_S)
            b.wait_log("clock.skewed others_ahead_s=7", within_s=WITHIN_S)
            b.wait_log("clock.wrong reason=", within_s=WITHIN_S)
            a.wait_log("admission.not_yet", within_s=WITHIN_S)  # and the other side is told


@pytest.mark.long
def test_a_glitch_of_an_hour_is_mended_by_a_command(machine: Callable[[str], Machine]) -> None:
    desk, other = machine("desk"), machine("other")
    with desk.home.node("a") as a, other.home.node("b", join=a) as b:
        for node in (a, b):
            node.wait_members([a.peer_id, b.peer_id], within_s=WITHIN_S)
        ref = share(a, "--expires", "1d")
        restart = partial(desk.home.start_node, "a", listen=a.addr.partition("/p2p/")[0])
        desk.set_s(3600)
        wait_for(lambda: trouble(b), "the glitch is seen", within_s=WITHIN_S)
        wait_for(lambda: trouble(a), "the glitch is seen", within_s=WITHIN_S)
        share(a, "--expires", "never")  # so that the time is on disk
        desk.set_s(0)
        wait_for(
            lambda: "set back by" in a.ww("clock", check=True).stdout, "a doubt", within_s=WITHIN_S
        )
        for _ in range(2):  # running, and after a restart
            assert "set back by" in a.ww("clock", check=True).stdout
            assert a.ww("use", ref, "pub", "chat", "x").returncode == 77
            a.stop()
            a = restart().wait_ready()
            wait_for(lambda a=a: "the other nodes'" in a.ww("clock").stdout, "b", within_s=WITHIN_S)
        done = a.ww("clock", "--right", check=True)
        assert "grants   with an end work" in done.stdout
        assert a.ww("use", ref, "pub", "chat", "x", check=True)
        a.wait_log("clock.trusted")
        a.stop()
        a = restart().wait_ready()
        wait_for(
            lambda: "with an end work" in a.ww("clock", check=True).stdout,
            "no doubt",
            within_s=WITHIN_S,
        )
        assert json.loads(a.ww("clock", "--json", check=True).stdout)["clock_wrong"] == ""
        assert a.ww("use", ref, "pub", "chat", "x", check=True)
        a.stop()


def test_who_founds_in_a_glitch_is_mended_by_a_command(machine: Callable[[str], Machine]) -> None:
    """Its own certificate begins in its future; nobody else says anything of its clock."""
    desk, other = machine("desk"), machine("other")
    desk.set_s(7200)
    with desk.home.node("a") as a:
        ref = share(a, "--expires", "1d")
        desk.set_s(0)
        wait_for(
            lambda: "set back by" in a.ww("clock", check=True).stdout, "a doubt", within_s=WITHIN_S
        )
        done = a.ww("clock", "--right", check=True)
        assert "grants   with an end work" in done.stdout
        a.wait_log("certificate.renewed", within_s=WITHIN_S)
        assert a.ww("use", ref, "pub", "chat", "x", check=True)
        with other.home.node("b", join=a) as b:
            for node in (a, b):
                node.wait_members([a.peer_id, b.peer_id], within_s=WITHIN_S)
            assert trouble(b) == {}
