"""`ww doctor` with real nodes: healthy, dead, stopped, far away, and without the right to ask."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

from wetware.testing import Home, NodeProcess


def _report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "Traceback" not in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    for finding in report["findings"]:
        assert bool(finding["remedy"]) is (finding["level"] != "ok"), finding
        assert finding["level"] == "ok" or "`" in finding["remedy"], finding
    return report


def _of(report: dict[str, Any], check: str) -> list[dict[str, str]]:
    return [finding for finding in report["findings"] if finding["check"] == check]


def _levels(report: dict[str, Any], check: str) -> set[str]:
    return {finding["level"] for finding in _of(report, check)}


def test_two_healthy_nodes(pair: tuple[NodeProcess, NodeProcess]) -> None:
    _, b = pair
    for node in pair:
        done = node.ww("doctor", "--json")
        report = _report(done)
        assert done.returncode == 0, report
        assert report["errors"] == 0
        for check in (
            *("data directory", "node key", "your key", "listen", "config", "plugins"),
            *("members", "identity", "certificate", "policy", "loop", "open files"),
        ):
            assert _levels(report, check) == {"ok"}, (check, report)
        (listen,) = _of(report, "listen")
        assert listen["text"].startswith("the node answers at /ip4/127.0.0.1/tcp/")
    (reach,) = _of(_report(b.ww("doctor", "--json")), "reach")
    where = b.addr.partition("/p2p/")[0]
    assert reach["text"].startswith(f"{where} is reached by")


def test_another_node_is_asked_over_the_network(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    done = a.home.ww("--node", a.addr, "doctor", "--json")
    report = _report(done)
    assert done.returncode == 0, report
    assert _levels(report, "certificate") == {"ok"}
    assert not _of(report, "data directory"), "that machine's files are not here"


def test_without_the_right_to_ask_it_goes_on(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    a.home.ww("key", "new", "ada", check=True)
    a.ww("user", "add", "ada", "--key", "ada", "--role", "member", check=True)
    done = a.home.ww("--data-dir", str(a.data_dir), "--key", "ada", "doctor", "--json")
    report = _report(done)
    assert done.returncode == 0, report
    (said,) = _of(report, "node")
    assert said["level"] == "warning"
    assert "cluster.check" in said["remedy"]
    assert _levels(report, "listen") == {"ok"}


def test_a_stranger_is_told_so(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    a.home.ww("key", "new", "mallory", check=True)
    done = a.home.ww("--data-dir", str(a.data_dir), "--key", "mallory", "doctor", "--json")
    report = _report(done)
    assert done.returncode == 1
    (said,) = _of(report, "node")
    assert "login refused" in said["text"]


def test_a_dead_member_is_named_and_a_killed_node_is_no_running_one(home: Home) -> None:
    with home.node("a", args=("--name", "ada")) as a:
        b = home.start_node("b", join=a, args=("--name", "bob")).wait_ready()
        a.wait_members([b.peer_id])
        b.process.kill()
        b.process.wait()
        killed = _report(b.ww("doctor", "--json"))
        (said,) = _of(killed, "node")
        assert "no node answers" in said["text"]
        assert said["level"] == "warning"
        assert _levels(killed, "listen") == {"ok"}, "its address is free again"
        a.wait_members([b.peer_id], "dead", within_s=60)
        report = _report(a.ww("doctor", "--json"))
        (dead,) = [f for f in _of(report, "members") if f["level"] == "warning"]
        assert dead["text"].startswith("dead: bob")
        assert "`ww evict bob`" in dead["remedy"]


def test_a_node_that_hangs_is_said_within_a_bound(home: Home) -> None:
    with home.node("a") as a:
        a.process.send_signal(signal.SIGSTOP)
        try:
            done = a.ww("doctor", "--json", timeout=60)
        finally:
            a.process.send_signal(signal.SIGCONT)
        report = _report(done)
        assert done.returncode == 1
        (listen,) = _of(report, "listen")
        assert listen["level"] == "error"
        assert "does not answer" in listen["text"]
        (said,) = _of(report, "node")
        assert said["level"] == "error"
