"""What people are told leads them on: after joining, of their node, of plugins that do not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wetware.testing import Home


@pytest.fixture
def home(tmp_path: Path):  # type: ignore[no-untyped-def]
    with Home(tmp_path / "a") as made:
        yield made


def test_a_member_and_their_node(home: Home, tmp_path: Path) -> None:
    with (
        home.node("founder") as a,
        Home(tmp_path / "b") as theirs,
        theirs.node("joined", join=a.invite()) as b,
    ):
        # The banner of a node that joined says how one becomes a user; the founder is one.
        b.wait_log("ww user add NAME --key KEY")
        assert "ww user add" not in a.log.read_text()
        theirs.ww("key", "new", check=True)
        refused = b.ww("status")
        assert refused.returncode == 77
        assert "ww user add NAME --key KEY" in refused.stderr
        key = theirs.ww("key", "show", check=True).stdout.strip()
        a.ww("user", "add", "bob", "--key", key, check=True)
        a.wait_members([b.peer_id])
        # At the founder's: what b is told must be nothing private of others.
        status = json.loads(theirs.ww("--node", a.addr, "status", "--json", check=True).stdout)
        assert {peer["peer_id"] for peer in status["peers"]} == {str(b.peer_id)}
        assert status["strangers"] >= 1, "the client itself"
        assert (status["overlay_error"], {p["reason"] for p in status["plugins"]}) == ("", {""})
        assert status["users"].startswith("an operator runs `ww user add")
        assert theirs.ww("--node", a.addr, "status", "--all").returncode == 77
        assert theirs.ww("--node", a.addr, "status").returncode == 0
        # An operator sees them all.
        all_ = home.ww("--node", a.addr, "status", "--all", "--json", check=True)
        details = json.loads(all_.stdout)
        assert {peer["member"] for peer in details["peers"]} == {True, False}
        told = a.ww("role", "set", "chatter", "pubsb", check=True).stderr
        assert "warning: the node has no service 'pubsb'" in told
        assert "did you mean pubsub?" in told
        assert "warning" not in a.ww("role", "set", "chatter", "pubsub", check=True).stderr


def test_a_plugin_that_was_installed_while_the_node_runs(tmp_path: Path) -> None:
    with Home(tmp_path, env={"WW_PLUGINS_DISABLE": "pubsub"}) as home, home.node() as node:
        before = node.ww("plugin", "list", check=True).stdout
        assert "restart the node" not in before
        with_it = {"WW_PLUGINS_DISABLE": ""}
        listed = node.ww("plugin", "list", check=True, env=with_it).stdout
        assert "pubsub is installed, not running: restart the node" in listed
        assert listed.count("restart the node") == 1
        rows = json.loads(node.ww("plugin", "list", "--json", check=True, env=with_it).stdout)
        assert {row["name"] for row in rows if not row["running"]} >= {"pubsub"}
        used = node.ww("pub", "chat", "hello", env=with_it)
        assert used.returncode == 1
        assert "not running at the node: restart the node" in used.stderr
    after = home.ww("--data-dir", str(node.data_dir), "plugin", "list", "--json", check=True).stdout
    assert {row["running"] for row in json.loads(after)} == {None}
