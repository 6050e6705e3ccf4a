"""A data directory that was copied, and runs a second time: all concerned say so."""

from __future__ import annotations

import json
import shutil

import pytest

from wetware.testing import Home, NodeProcess, wait_for

pytestmark = pytest.mark.timeout(300)

WITHIN_S = 60.0
"""For what takes a second or two on an idle machine."""
GONE_WITHIN_S = 120.0
"""TWIN_S, and as much again on a busy machine."""


def trouble(node: NodeProcess, of: NodeProcess) -> str:
    return str(node.members()[str(of.peer_id)]["trouble"])


def identity(node: NodeProcess) -> dict[str, str]:
    report = json.loads(node.ww("doctor", "--json").stdout)
    return next(dict(f) for f in report["findings"] if f["check"] == "identity")


@pytest.mark.long
@pytest.mark.parametrize("which", ["founder", "member"])
def test_both_processes_and_the_others_say_so(home: Home, which: str) -> None:
    with home.node("a") as a, home.node("b", join=a) as b:
        for node in (a, b):
            node.wait_members([a.peer_id, b.peer_id], within_s=WITHIN_S)
        original, other = (a, b) if which == "founder" else (b, a)
        wait_for(lambda: str(other.peer_id) in _remembered(original), "it is on disk")
        names = shutil.ignore_patterns("lock", "node.json", "*.sock")
        shutil.copytree(original.data_dir, home.path / "copy", ignore=names)
        with home.node("copy") as copy:
            assert copy.peer_id == original.peer_id
            both = ((original, "copy", copy), (copy, original.data_dir.name, original))
            for node, name, twin in both:
                wait_for(lambda node=node: trouble(node, node), "a twin", within_s=WITHIN_S)
                where = f"{name} at {twin.addr.partition('/p2p/')[0]}"
                said = trouble(node, node)
                assert said.startswith(f"another process uses this key: {where}"), said
                found = identity(node)
                assert found["level"] == "error"
                assert where in found["text"]
                node.wait_log("member.duplicate_identity")
            said = trouble(other, original)
            assert said.startswith("two processes use its key"), said
            other.wait_log("member.two_processes")
            assert "two processes use its key" in other.ww("ls", check=True).stdout
        for node in (original, other):
            wait_for(
                lambda node=node: not trouble(node, original), "no twin", within_s=GONE_WITHIN_S
            )
        assert identity(original)["level"] == "ok"


def test_a_restart_is_no_second_process(home: Home) -> None:
    with home.node("a") as a:
        with home.node("b", join=a) as b:
            a.wait_members([b.peer_id], within_s=WITHIN_S)
            b.process.kill()
            b.process.wait()
        with home.node("b") as b:
            a.wait_members([b.peer_id], within_s=WITHIN_S)
            assert trouble(a, b) == trouble(b, b) == ""
            b.process.kill()
            b.process.wait()
        for node in (a, b):
            log = node.log.read_text()
            assert "two_processes" not in log
            assert "duplicate_identity" not in log


def _remembered(node: NodeProcess) -> str:
    file = node.data_dir / "peers.json"
    return file.read_text() if file.exists() else ""
