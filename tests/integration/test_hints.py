"""What people are told leads them on: after joining, of their node, of plugins that do not run."""

from __future__ import annotations

import json
import select
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
        b.wait_log("ww key new")
        # Nor is a user told to do what an operator may.
        a.wait_log("ww node --join TICKET")
        assert "ww node --join TICKET" not in b.log.read_text()
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
        shown = theirs.ww("--node", a.addr, "status", check=True).stderr
        assert "no members" not in shown, "nobody else than the client itself"
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


def test_what_a_hint_says_is_typed_as_it_stands(home: Home) -> None:
    with home.node() as node:
        hint = f"ww --data-dir {node.data_dir} grants"
        assert f"try: `{hint}` shows" in node.ww("revoke", "0" * 16).stderr
        wrong = json.loads(node.ww("revoke", "0" * 16, "--json").stderr)["error"]
        assert hint in wrong["hint"]
        assert f"  ww --data-dir {node.data_dir} sub chat" in node.log.read_text()
        elsewhere = home.ww("status")  # without it, as without it before
        assert "ww node" in elsewhere.stderr


def test_who_holds_a_reference_is_told_what_they_can_do(home: Home, tmp_path: Path) -> None:
    """They have no login, and no roles."""
    with home.node() as node, Home(tmp_path / "b") as theirs:
        made = json.loads(node.ww("share", "pubsub:chat", "--json", check=True).stdout)
        ref, grant = made["ref"], made["grant"]["id"]
        outside = theirs.ww("use", ref, "ls")
        assert outside.returncode == 77
        assert "`ww use REF services` shows what the reference covers" in outside.stderr
        sub = theirs.start_ww("use", ref, "sub", "chat", "--json")
        assert sub.stdout is not None
        while sub.poll() is None:  # until it hears: a subscription says nothing when it begins
            node.ww("pub", "chat", "x", check=True)
            if select.select([sub.stdout], [], [], 0.1)[0]:
                break
        node.ww("revoke", grant, check=True)
        _, said = sub.communicate(timeout=60)
        assert sub.returncode == 77
        assert "ask who gave you the reference for another one" in said


def test_nothing_published_is_said(home: Home) -> None:
    with home.node() as node:
        assert "nothing was published" in node.ww("pub", "chat", "-", input="", check=True).stderr
        assert node.ww("pub", "chat", "", check=True).stderr == ""
        assert node.ww("pub", "chat", "-", input="x", check=True).stderr == ""


def test_contexts_say_what_they_stand_for_and_where_commands_go(home: Home) -> None:
    nothing = home.ww("context", "add", "x")
    assert nothing.returncode == 2
    assert "try: ww context add x --node NODE, --key KEY or --data-dir DIR" in nothing.stderr
    home.ww("context", "add", "x", "--key", "default", check=True)
    home.ww("context", "add", "y", "--key", "default", check=True)
    home.ww("context", "use", "x", check=True)
    assert home.ww("context", "rm", "y", check=True).stderr == "forgot y\n"
    gone = home.ww("context", "rm", "x", check=True)
    assert "commands go to local from now on" in gone.stderr


def test_a_clock_is_told_in_words(home: Home) -> None:
    with home.node() as node:
        shown = node.ww("clock", check=True).stdout
        assert "others   no other node to compare it with" in shown
        assert "grants   with an end work" in shown
