"""Real nodes become a cluster: they find each other, see each other die, and come back."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port
from wetware.testing import Home, NodeProcess, wait_for

SEEN_WITHIN_S = 30.0
DEAD_WITHIN_S = 30.0
"""Bounds for a busy machine; tests/bench/bench_cluster.py measures, and judges by the targets."""


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, list[NodeProcess]]]:
    """Five nodes from nothing, one command each, and how long they took to see each other."""
    with Home(tmp_path_factory.mktemp("five")) as home:
        first = home.start_node("n0").wait_ready()
        ticket = first.invite("--uses", "4")
        others = [home.start_node(f"n{i}", join=ticket) for i in range(1, 5)]
        nodes = [first, *(node.wait_ready() for node in others)]
        ready = time.time()
        start = dict.fromkeys((node.log for node in nodes), 0)
        for each in nodes:
            others_of = [node for node in nodes if node is not each]
            took_s = _seen_after_s(others_of, start, f"member.alive peer={each.peer_id}", ready)
            took_s = 0.0 if took_s > 43200 else took_s  # before the last one was ready
            assert took_s < SEEN_WITHIN_S
        for node in nodes:
            assert {m["state"] for m in node.members().values()} == {"alive"}
        yield home, nodes
        for node in nodes:
            node.stop()


def _mark(nodes: list[NodeProcess]) -> dict[Path, int]:
    return {node.log: len(node.log.read_text()) for node in nodes}


def _seen_after_s(
    nodes: list[NodeProcess], marks: dict[Path, int], what: str, since: float
) -> float:
    """Seconds from `since` (Unix time) until the last of `nodes` logged `what`.

    The nodes' own stamps: a `ww ls` takes half a second, and more on a busy machine.
    """
    last = 0.0
    for node in nodes:

        def logged(node: NodeProcess = node) -> str | None:
            text = node.log.read_text()[marks[node.log] :]
            return next((line for line in text.splitlines() if what in line), None)

        line = wait_for(logged, f"{what!r} at {node.data_dir.name}", within_s=60)
        hours, minutes, seconds = line.split(" ", 1)[0].split(":")
        of_day = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        last = max(last, (of_day - since % 86400) % 86400)
    return last


def _states(node: NodeProcess) -> dict[str, str]:
    return {peer: member["state"] for peer, member in node.members().items()}


def test_five_nodes_see_each_other(five: tuple[Home, list[NodeProcess]]) -> None:
    _, nodes = five
    for node in nodes:
        members = node.members()
        assert len(members) == 5
        assert {m["state"] for m in members.values()} == {"alive"}
        assert sorted(m["name"] for m in members.values()) == ["n0", "n1", "n2", "n3", "n4"]
        assert members[str(node.peer_id)]["self"] is True


def test_a_killed_node_is_dead_everywhere_and_comes_back_as_one(
    five: tuple[Home, list[NodeProcess]],
) -> None:
    home, nodes = five
    victim, others = nodes[4], nodes[:4]
    before = victim.members()[str(victim.peer_id)]
    marks, killed = _mark(others), time.time()
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    took_s = _seen_after_s(others, marks, f"member.dead peer={victim.peer_id}", killed)
    assert took_s < DEAD_WITHIN_S
    for node in others:
        assert _states(node)[str(victim.peer_id)] == "dead"

    back = home.start_node("n4").wait_ready()  # port 0: another address
    nodes[4] = back
    for node in others:
        node.wait_members([victim.peer_id], within_s=SEEN_WITHIN_S)

        def as_one(node: NodeProcess = node) -> bool:
            after = node.members()
            mine = after[str(victim.peer_id)]
            return (
                len(after) == 5
                and mine["incarnation"] > before["incarnation"]
                and mine["addrs"] == back.info["addrs"] != before["addrs"]
            )

        wait_for(as_one, "one member with its new address")


def test_a_stopped_process_is_dead_and_refutes_it(five: tuple[Home, list[NodeProcess]]) -> None:
    _, nodes = five
    victim, others = nodes[3], [*nodes[:3], nodes[4]]
    marks, stopped = _mark(nodes), time.time()
    victim.process.send_signal(signal.SIGSTOP)
    try:
        took_s = _seen_after_s(others, marks, f"member.dead peer={victim.peer_id}", stopped)
        assert took_s < 30
    finally:
        victim.process.send_signal(signal.SIGCONT)
    for node in others:
        node.wait_members([victim.peer_id])
    # It saw nobody else die meanwhile: it was away, and not they.
    assert set(_states(victim).values()) == {"alive"}
    assert "member.dead" not in victim.log.read_text()[marks[victim.log] :]


def test_a_clean_stop_is_seen_at_once(five: tuple[Home, list[NodeProcess]]) -> None:
    home, nodes = five
    assert nodes[2].stop() == 0
    for node in (nodes[0], nodes[1]):
        node.wait_members([nodes[2].peer_id], "left", within_s=60)
    nodes[2] = home.start_node("n2").wait_ready()
    nodes[0].wait_members([nodes[2].peer_id], within_s=SEEN_WITHIN_S)


def test_selectors_and_limits_hold_at_the_node(five: tuple[Home, list[NodeProcess]]) -> None:
    _, nodes = five
    assert [m["name"] for m in nodes[0].members("name=n1").values()] == ["n1"]
    assert [m["name"] for m in nodes[0].members("name=n[01],name!=n0").values()] == ["n1"]
    short = str(nodes[1].peer_id)[-8:]
    assert [m["name"] for m in nodes[0].members(short).values()] == ["n1"]
    assert nodes[0].members("service=nothing") == {}
    limited = nodes[0].ww("ls", "--limit", "2", check=True)
    assert len(limited.stdout.splitlines()) == 3
    assert "2 of 5 members" in limited.stderr
    wide = nodes[0].ww("ls", "n1", "--wide", check=True)
    assert "(loopback)" in wide.stdout
    assert [m["scopes"] for m in nodes[0].members("name=n1").values()] == [["loopback"]]
    bad = nodes[0].ww("ls", "=home")
    assert bad.returncode == 2
    assert "=home" in bad.stderr


def test_watch_prints_changes(five: tuple[Home, list[NodeProcess]]) -> None:
    home, nodes = five
    watch = nodes[0].start_ww("ls", "--watch", "name=n1")
    try:
        assert watch.stdout is not None
        assert "n1  alive" in watch.stdout.readline()
        nodes[1].stop()
        assert next(line for line in watch.stdout if "n1  left" in line)
        nodes[1] = home.start_node("n1").wait_ready()
        assert next(line for line in watch.stdout if "n1  alive" in line)
    finally:
        watch.send_signal(signal.SIGINT)
        watch.communicate(timeout=60)


def test_ping(five: tuple[Home, list[NodeProcess]]) -> None:
    _, nodes = five
    done = nodes[0].ww("ping", "n1", "--count", "2", "--interval", "0.1", check=True)
    assert len(done.stdout.splitlines()) == 2
    assert "2 sent, 0 lost" in done.stderr
    assert nodes[0].ww("ping", "nobody").returncode == 1


def test_a_restarted_cluster_needs_no_bootstrap(tmp_path: Path) -> None:
    """Both nodes stop, one comes back on another port: the stored addresses bring them together."""
    with Home(tmp_path) as home:
        port = free_port()
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        with home.node("a", listen=listen) as a, home.node("b", join=a) as b:
            b.wait_members([a.peer_id])
        with home.node("b") as b, home.node("a", listen=listen) as a:
            for node in (a, b):
                node.wait_members([a.peer_id, b.peer_id])
