"""Start, stop, and what refuses to start."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import stat
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.errors import EXIT_BUSY
from wetware.identity import Key
from wetware.overlay.admission.statements import Founding
from wetware.overlay.admission.store import Store
from wetware.overlay.admission.texts import Ticket
from wetware.testing import Home, NodeProcess, wait_for

LIBP2P = True  # as it is started by default


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_node_within_two_seconds(home: Home, number: int) -> None:
    node = home.start_node().wait_ready()
    subscriber = node.start_ww("sub", "chat")  # an open session does not hold it up
    node.wait_log("service.opened")
    started = time.monotonic()
    assert node.stop(number) == 0, node.log.read_text()
    assert time.monotonic() - started < 2.0
    assert subscriber.stderr is not None
    told = next(line for line in subscriber.stderr if "node" in line)  # it is gone
    subscriber.send_signal(signal.SIGINT)  # it waits for the node to come back
    _, err = subscriber.communicate(timeout=60)
    assert subscriber.returncode not in (0, None), told
    assert "Traceback" not in told + err
    assert "Traceback" not in node.log.read_text()
    assert not (node.data_dir / "node.json").exists()
    assert not (node.data_dir / "ww.sock").exists()


def test_first_start_makes_private_files_and_says_what_to_do_next(home: Home) -> None:
    with home.node() as node:
        node.wait_log("pub chat hello")  # it says so right after it is found by others
        text = node.log.read_text()
        assert f"wetware node {node.peer_id} is running" in text
        assert f"ww --data-dir {node.data_dir} ls\n" in text
        for path in (
            home.path / ".wetware/keys/default",
            node.data_dir / "node.key",
            node.data_dir / "plugins/auth_local/policy.json",
            node.data_dir / "node.json",
            node.data_dir / "ww.sock",
        ):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert stat.S_IMODE(node.data_dir.stat().st_mode) == 0o700


def test_the_same_data_directory_is_refused(home: Home) -> None:
    with home.node("n") as node:
        second = home.start_node("n")
        assert second.process.wait(60) == EXIT_BUSY
        said = second.log.read_text()
        assert f"pid {node.process.pid}" in said
        assert "try:" in said
        assert node.ww("whoami").returncode == 0


def test_the_same_port_is_refused_before_anything_is_made(home: Home, tmp_path: Path) -> None:
    with home.node() as node, Home(tmp_path / "other") as other:
        listen = node.addr.partition("/p2p/")[0]
        ticket = node.invite()
        for join in (None, ticket):
            second = other.start_node("n", listen=listen, join=join)
            assert second.process.wait(60) == EXIT_BUSY
            said = second.log.read_text()
            assert "the port is taken" in said
            assert "try:" in said
            assert "Traceback" not in said
            assert [path.name for path in second.data_dir.iterdir()] == ["lock"]
            assert not (other.path / ".wetware").exists()
        with home.node("third", join=ticket) as third:  # the ticket is not spent
            assert third.info["cluster"] == node.info["cluster"]


def test_another_auth_backend_than_the_cluster_s_is_named(home: Home) -> None:
    """The ticket is not spent, and what the cluster's own backend keeps is not called damaged."""
    founding = Founding(Key.generate().public, "evm", b"a contract")
    issuer = Key.generate().peer_id
    addrs = (Multiaddr.parse("/ip4/127.0.0.1/tcp/1").with_peer(issuer),)
    ticket = Ticket(founding, issuer, addrs, b"s" * 32, int(time.time() * 1000) + 10**7)
    node = home.start_node("joining", join=ticket.text)
    assert node.process.wait(60) == 78
    said = node.log.read_text()
    assert "has the auth backend 'evm', and this node is started with 'local'" in said
    assert "--auth evm" in said
    assert "damaged" not in said
    assert not (node.data_dir / "plugins").exists()

    (home.path / "member").mkdir(mode=0o700)
    store = Store(home.path / "member")
    store.join(founding, b"a chain", b"what another backend starts from", addrs)
    node = home.start_node("member")
    assert node.process.wait(60) == 78
    assert "has the auth backend 'evm', and this node is started with 'local'" in (
        node.log.read_text()
    )


def test_a_terminal_that_is_closed_ends_the_node_with_a_farewell(home: Home) -> None:
    with home.node("a") as a:
        ours, theirs = pty.openpty()
        joined = home.start_node("b", join=a).wait_ready()
        a.wait_members([joined.peer_id])
        joined.stop()
        a.wait_members([joined.peer_id], "left")  # so that it is alive again is of the next one
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "wetware", "--data-dir", str(joined.data_dir)),
                *("node", "--listen", "/ip4/127.0.0.1/tcp/0"),
            ],
            env=home.env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        try:
            a.wait_members([joined.peer_id])
            os.close(ours)
            assert process.wait(60) == 0
            a.wait_members([joined.peer_id], "left", within_s=60)
        finally:
            process.kill()
            process.wait()


def test_nohup_keeps_a_node_when_the_terminal_is_closed(home: Home) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        node = home.start_node()
    finally:
        signal.signal(signal.SIGHUP, before)
    node.wait_ready()
    node.process.send_signal(signal.SIGHUP)
    assert node.ww("whoami").returncode == 0
    assert node.stop() == 0


def test_a_killed_node_starts_again_as_itself(home: Home) -> None:
    node = home.start_node("n").wait_ready()
    before = node.peer_id
    node.process.kill()
    node.process.wait()
    with home.node("n") as again:
        assert again.peer_id == before
        assert again.ww("whoami").returncode == 0


def test_a_long_data_directory_gets_its_socket_elsewhere(home: Home) -> None:
    with home.node("d" * 120) as node:
        done = node.ww("status", "--json", check=True)
        assert json.loads(done.stdout)["peer_id"] == str(node.peer_id)


def test_no_node_is_said_plainly(home: Home) -> None:
    done = home.ww("status")
    assert done.returncode == 69
    assert "no node is running here" in done.stderr
    assert "ww node" in done.stderr


def test_an_encrypted_node_key_needs_its_passphrase(home: Home) -> None:
    sealed = Home(home.path, env={"WW_PASSPHRASE": "correct horse"})
    with sealed:
        with sealed.node("n") as node:
            before = node.peer_id
        without = home.start_node("n")
        assert without.process.wait(60) == 78
        assert "WW_PASSPHRASE" in without.log.read_text()
        with sealed.node("n") as again:
            assert again.peer_id == before


def test_a_removed_user_s_session_ends_at_once(home: Home) -> None:
    with home.node() as node:
        home.ww("key", "new", "ada", check=True)
        node.ww("user", "add", "ada", "--key", "ada", "--role", "member", check=True)
        sub = home.start_ww("--data-dir", str(node.data_dir), "--key", "ada", "sub", "chat")
        wait_for(lambda: node.log.read_text().count("service.opened") >= 2, "ada's session")
        started = time.monotonic()
        node.ww("user", "remove", "ada", check=True)
        _, err = sub.communicate(timeout=60)
        took_s = time.monotonic() - started
        assert sub.returncode == 77, err
        assert "revoked" in err
        assert took_s < 10
        refused = home.ww("--data-dir", str(node.data_dir), "--key", "ada", "whoami")
        assert refused.returncode == 77
        assert "unknown principal" in refused.stderr


def test_roles_allow_what_they_say_and_no_more(home: Home) -> None:
    with home.node() as node:
        home.ww("key", "new", "ro", check=True)
        node.ww("role", "set", "reader", "pubsub=PubSub.join,Topic.subscribe", check=True)
        node.ww("user", "add", "ro", "--key", "ro", "--role", "reader", check=True)
        as_ro = ("--data-dir", str(node.data_dir), "--key", "ro")
        refused = home.ww(*as_ro, "pub", "chat", "x")
        assert refused.returncode == 77
        assert "Topic.publish" in refused.stderr
        for command in (["user", "list"], ["status"]):
            done = home.ww(*as_ro, *command)
            assert done.returncode == 77, done.stdout


def test_policy_travels_to_another_node_and_never_goes_back(home: Home) -> None:
    with home.node("a") as a, home.node("b") as b:
        home.ww("key", "new", "ada", check=True)
        first = a.ww("policy", "export", check=True).stdout
        a.ww("user", "add", "ada", "--key", "ada", check=True)
        second = a.ww("policy", "export", check=True).stdout
        assert home.ww("--data-dir", str(b.data_dir), "--key", "ada", "whoami").returncode == 77
        b.ww("policy", "import", "-", input=second, check=True)
        done = home.ww("--data-dir", str(b.data_dir), "--key", "ada", "whoami", check=True)
        assert "member" in done.stdout
        stale = b.ww("policy", "import", "-", input=first)
        assert stale.returncode == 77
        assert "older" in stale.stderr
        forged = second.replace('"member"', '"admin"', 1)
        assert b.ww("policy", "import", "-", input=forged).returncode != 0
        toml = a.ww("policy", "export", "--toml", check=True).stdout
        a.ww("policy", "import", "-", input=toml.replace('["member"]', '["admin"]'), check=True)
        assert json.loads(a.ww("user", "list", "--json").stdout)["ada"]["roles"] == ["admin"]


def test_no_process_is_left_behind(home: Home) -> None:
    node = home.start_node().wait_ready()
    children = f"/proc/{node.process.pid}/task/{node.process.pid}/children"
    with open(children) as file:
        pids = file.read().split()
    node.stop()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_the_configured_and_the_running_auth_backend_are_told_apart(home: Home) -> None:
    other = {"WW_NODE_AUTH": "evm"}  # as if the file had been changed since the start

    def listed(node: NodeProcess) -> dict[str, tuple[bool, bool]]:
        done = node.ww("plugin", "list", "--json", env=other, check=True)
        return {
            each["name"]: (each["auth_selected"], each["auth_running"])
            for each in json.loads(done.stdout)
            if each["name"].startswith("auth_")
        }

    with home.node() as node:
        assert listed(node) == {
            "auth_evm": (True, False),
            "auth_local": (False, True),
            "auth_oidc": (False, False),
        }
        said = node.ww("plugin", "list", env=other, check=True).stdout
        assert "auth backend (configured)" in said
        assert "auth backend (running)" in said
        pid = node.process.pid
        assert (
            f"the node that runs here (pid {pid}) has the auth backend 'local', and 'evm' is "
            "configured (WW_NODE_AUTH)" in said
        )
        same = node.ww("plugin", "list", check=True).stdout
        assert "auth backend (configured, running)" in same
        assert "runs here" not in same
        node.process.kill()
        node.process.wait()
        assert (node.data_dir / "node.json").exists()
        assert listed(node) == {
            "auth_evm": (True, False),
            "auth_local": (False, False),
            "auth_oidc": (False, False),
        }


def test_what_others_cannot_reach_this_node_by_is_printed_with_a_warning(home: Home) -> None:
    with home.node() as node:
        for args, what in (
            (["invite"], "the ticket"),
            (["invite", "--json"], "the ticket"),
            (["invite", "--peer", str(Key.generate().peer_id)], "the certificate"),
            (["share", "pubsub:chat"], "the reference"),
        ):
            done = node.ww(*args, check=True)
            assert f"warning: {what} leads to this machine only" in done.stderr
            assert "warning" not in done.stdout
