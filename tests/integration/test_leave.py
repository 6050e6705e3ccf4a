"""A machine becomes a member without a running node, and leaves its cluster for good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wetware.errors import EXIT_BUSY, EXIT_DENIED, EXIT_FAILED, EXIT_USAGE
from wetware.testing import Home, NodeProcess

pytestmark = pytest.mark.timeout(240)


def kept(node: NodeProcess) -> set[str]:
    """What is in its data directory, at the top."""
    return {path.name for path in node.data_dir.iterdir()}


def test_a_node_leaves_is_seen_as_left_and_joins_again(home: Home) -> None:
    with home.node("a") as a:
        b = home.start_node("b", join=a).wait_ready()
        a.wait_members([b.peer_id])
        b.ww("share", "pubsub:chat", check=True)
        asked = b.ww("leave")
        assert asked.returncode == EXIT_USAGE, "nobody can be asked"
        assert f"Leave the cluster {a.info['cluster']}" in asked.stderr
        assert b.process.poll() is None

        done = b.ww("leave", "--yes", "--json", check=True)
        assert json.loads(done.stdout) == {
            "left": a.info["cluster"],
            "data_dir": str(b.data_dir),
            "purged": False,
        }
        assert b.process.wait(60) == 0, "a service is not started again"
        a.wait_members([b.peer_id], "left")
        assert kept(b) == {"left", "lock", "node.key", "incarnation", "plugins"}
        assert "auth_local" not in {path.name for path in (b.data_dir / "plugins").iterdir()}
        log = b.data_dir / "plugins" / "audit"
        assert any(log.iterdir())
        again = b.ww("leave", "--yes")
        assert again.returncode == EXIT_FAILED
        assert "belongs to no cluster" in again.stderr

        where = ("--data-dir", str(b.data_dir))
        said = home.ww(*where, "join", "-", input=a.invite(), check=True).stderr
        assert f"next: ww --data-dir {b.data_dir} node\n" in said
        with home.node("b") as back:
            assert back.peer_id == b.peer_id
            a.wait_members([back.peer_id])
            back.wait_members([a.peer_id])
            back.wait_log("shares=0")  # what was shared ended with the membership
            assert back.ww("audit", "verify").returncode == 0


def test_the_next_cluster_has_nothing_of_the_one_before(home: Home, tmp_path: Path) -> None:
    with Home(tmp_path / "other") as other, other.node("c") as c:
        b = home.start_node("b").wait_ready()  # alone in a cluster of its own: nobody needs it
        b.ww("leave", "--yes", check=True)
        assert b.process.wait(60) == 0
        with home.node("b", join=c) as moved:
            assert moved.peer_id == b.peer_id
            assert moved.info["cluster"] == c.info["cluster"] != b.info["cluster"]
            c.wait_members([moved.peer_id])
            assert moved.ww("whoami").returncode == EXIT_DENIED, "a user of the other cluster"
            other.ww("--node", moved.addr, "whoami", check=True)
        moved.ww("leave", "--purge", "--yes", check=True)
        assert kept(moved) == {"left", "lock"}
        with home.node("b") as anew:
            assert anew.peer_id != b.peer_id
            assert anew.info["cluster"] not in (b.info["cluster"], c.info["cluster"])


def test_the_founder_of_others_does_not_leave_unasked(home: Home) -> None:
    a = home.start_node("a").wait_ready()
    with home.node("inviter", join=a.invite("--inviter")) as inviter:
        a.wait_members([inviter.peer_id])
        refused = a.ww("leave")
        assert refused.returncode == EXIT_DENIED
        assert "this node has the cluster's key: without it the 1 others" in refused.stderr
        assert f"try: keep a copy of {a.data_dir / 'cluster.key'}" in refused.stderr
        assert a.process.poll() is None
        assert inviter.ww("leave").returncode == EXIT_USAGE, "the founder is there, too"
        a.ww("leave", "--yes", check=True)
        assert a.process.wait(60) == 0
        assert not (a.data_dir / "cluster.key").exists()
        inviter.wait_members([a.peer_id], "left")


def test_join_is_repeated_without_harm_and_goes_to_no_other_cluster(
    home: Home, tmp_path: Path
) -> None:
    with home.node("a") as a, Home(tmp_path / "other") as other, other.node("c") as c:
        ticket, where = a.invite(), ("--data-dir", str(home.path / "b"))
        for _ in range(2):
            done = home.ww(*where, "join", ticket, "--json", check=True)
            assert json.loads(done.stdout)["cluster"] == a.info["cluster"]
        with home.node("b") as b:
            a.wait_members([b.peer_id])
            home.ww(*where, "join", ticket, check=True)
            busy = home.ww(*where, "join", c.invite())
            assert busy.returncode == EXIT_BUSY
            assert f"pid {b.process.pid}" in busy.stderr
        refused = home.ww(*where, "join", c.invite())
        assert refused.returncode == 78
        assert "belongs to the cluster" in refused.stderr
        spent = home.ww("--data-dir", str(home.path / "d"), "join", ticket)
        assert spent.returncode == EXIT_DENIED
        assert "the ticket was used by another node" in spent.stderr
        assert not (home.path / "d" / "certificate").exists()
