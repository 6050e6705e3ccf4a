"""`ww kv`, `ww name`, `ww lock`, `ww sem` and `ww elect` against real nodes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from wetware.testing import NodeProcess, wait_for

pytestmark = pytest.mark.timeout(240)

Pair = tuple[NodeProcess, NodeProcess]


def test_keys(pair: Pair) -> None:
    _, b = pair
    put = b.ww("kv", "put", "/cli/price", "12", "--json", check=True)
    revision = json.loads(put.stdout)["revision"]
    assert b.ww("kv", "get", "/cli/price", check=True).stdout == "12"
    stale = b.ww("kv", "put", "/cli/price", "13", "--at", str(revision - 1))
    assert (stale.returncode, "nothing is changed" in stale.stderr) == (1, True)
    b.ww("kv", "put", "/cli/price", "13", "--at", str(revision), check=True)
    b.ww("kv", "put", "/cli/bytes", "-", input="a\nb", check=True)
    listed = json.loads(b.ww("kv", "ls", "/cli/", "--json", check=True).stdout)
    assert [(e["key"], e["value"]) for e in listed] == [
        ("/cli/bytes", "a\nb"),
        ("/cli/price", "13"),
    ]
    shown = b.ww("kv", "ls", "/cli/p", check=True).stdout.split()
    assert shown == ["KEY", "REVISION", "VALUE", "/cli/price", str(revision + 1), "13"]
    b.ww("kv", "del", "/cli/price", check=True)
    gone = b.ww("kv", "get", "/cli/price")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "there is no key /cli/price" in gone.stderr
    bad = b.ww("kv", "put", "cli", "1")
    assert (bad.returncode, "is no path" in bad.stderr) == (2, True)
    seen = b.ww("kv", "watch", "/cli/", "--from", str(revision), "--count", "2", check=True).stdout
    assert seen == f"{revision}  /cli/price  12\n{revision + 1}  /cli/price  13\n"
    status = b.ww("kv", "status", check=True).stdout
    assert "none: while the home of the store is down nothing can be read or written" in status


def test_names(pair: Pair) -> None:
    a, b = pair
    b.ww("name", "set", "/cli/live", "bafy1", check=True)
    a.ww("name", "set", "/cli/live", "bafy2", check=True)
    assert b.ww("name", "get", "/cli/live", check=True).stdout == "bafy2\n"
    assert "bafy1" in b.ww("name", "get", "/cli/live", "--history", check=True).stdout
    taken = b.ww("name", "set", "/cli/live", "x", "--at", "0")
    assert (taken.returncode, "was set by the revision" in taken.stderr) == (1, True)
    assert "/cli/live" in b.ww("name", "ls", check=True).stdout
    b.ww("name", "rm", "/cli/live", check=True)
    assert b.ww("name", "get", "/cli/live").returncode == 1


def test_a_command_runs_while_the_lock_is_held_and_its_code_is_ours(pair: Pair) -> None:
    a, b = pair
    code = "import os, sys; print(len(os.environ['WW_FENCE']) > 100); sys.exit(7)"
    done = b.ww("lock", "cli", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (7, "True\n"), done.stderr
    holder = a.start_ww("lock", "cli", "--", sys.executable, "-c", "input()")
    try:
        wait_for(lambda: "held" in b.ww("lock", "cli", "--who").stdout, "the lock is held")
        busy = b.ww("lock", "cli", "--wait", "0", "--", "true")
        assert (busy.returncode, "is held by others" in busy.stderr) == (75, True)
        holder.communicate("\n", timeout=20)
        assert holder.returncode == 0
        b.ww("lock", "cli", "--wait", "0", "--", "true", check=True)
    finally:
        holder.kill()
    assert b.ww("lock", "cli", "--", "no-such-program").returncode == 127
    assert b.ww("lock", "cli").returncode == 2


def test_places_of_a_semaphore_and_a_leader(pair: Pair) -> None:
    a, b = pair
    holder = a.start_ww("sem", "cli", "1", "--", sys.executable, "-c", "input()")
    leader = a.start_ww("elect", "cli", "--value", "me", "--", sys.executable, "-c", "input()")
    try:
        wait_for(lambda: "me" in b.ww("elect", "cli", "--who").stdout, "there is a leader")
        wait_for(lambda: "held" in b.ww("sem", "cli", "1", "--who").stdout, "the place is taken")
        assert b.ww("sem", "cli", "1", "--wait", "0", "--", "true").returncode == 75
        for each in (holder, leader):
            each.communicate("\n", timeout=20)
            assert each.returncode == 0
    finally:
        holder.kill()
        leader.kill()


def test_a_command_is_ended_when_its_lock_is_lost(pair: Pair) -> None:
    """`ww lock` is stopped beyond its lease, and its child was not: then it learns of it."""
    a, b = pair
    code = "import time; print('up', flush=True); time.sleep(60)"
    holder = a.start_ww("lock", "lost", "--ttl", "2", "--", sys.executable, "-c", code)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        holder.send_signal(signal.SIGSTOP)
        b.ww("lock", "lost", "--wait", "20", "--", "true", check=True)
        holder.send_signal(signal.SIGCONT)
        _, err = holder.communicate(timeout=20)
        assert (holder.returncode, "what was held is lost" in err) == (1, True), err
    except subprocess.TimeoutExpired:
        raise AssertionError("the command runs on without its lock") from None
    finally:
        holder.send_signal(signal.SIGCONT)
        holder.kill()


def test_a_backup_is_restored_if_that_is_confirmed(pair: Pair) -> None:
    _, b = pair
    copy = b.home.path / "copy"
    b.ww("kv", "put", "/cli/kept", "1", check=True)
    made = b.ww("kv", "backup", str(copy), check=True)
    assert "the key that signs fencing tokens" in made.stderr
    again = b.ww("kv", "backup", str(copy))
    assert (again.returncode, "File exists" in again.stderr) == (2, True)
    b.ww("kv", "put", "/cli/kept", "2", check=True)
    asked = b.ww("kv", "restore", str(copy))
    assert (asked.returncode, "--yes" in asked.stderr) == (2, True), asked.stderr
    assert "epoch 2" in b.ww("kv", "restore", str(copy), "--yes", check=True).stderr
    wait_for(lambda: b.ww("kv", "get", "/cli/kept").stdout == "1", "the store is the copy")
