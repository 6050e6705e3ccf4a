"""`ww kv`, `ww name`, `ww lock`, `ww sem` and `ww elect` against real nodes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from wetware.testing import Home, NodeProcess, wait_for

pytestmark = pytest.mark.timeout(240)

Pair = tuple[NodeProcess, NodeProcess]


def test_keys(pair: Pair) -> None:
    _, b = pair
    put = b.ww("kv", "put", "/cli/price", "12", "--json", check=True)
    revision = json.loads(put.stdout)["revision"]
    assert b.ww("kv", "get", "/cli/price", check=True).stdout == "12"
    stale = b.ww("kv", "put", "/cli/price", "13", "--at", str(revision - 1))
    assert (stale.returncode, "nothing is changed" in stale.stderr) == (1, True)
    put = b.ww("kv", "put", "/cli/price", "13", "--at", str(revision), "--json", check=True)
    second = json.loads(put.stdout)["revision"]
    b.ww("kv", "put", "/cli/bytes", "-", input="a\nb", check=True)
    listed = json.loads(b.ww("kv", "ls", "/cli/", "--json", check=True).stdout)
    assert [(e["key"], e["value"]) for e in listed] == [
        ("/cli/bytes", "a\nb"),
        ("/cli/price", "13"),
    ]
    shown = b.ww("kv", "ls", "/cli/p", check=True).stdout.split()
    assert shown == ["KEY", "REVISION", "VALUE", "/cli/price", str(second), "13"]
    b.ww("kv", "del", "/cli/price", check=True)
    gone = b.ww("kv", "get", "/cli/price")
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "there is no key /cli/price" in gone.stderr
    bad = b.ww("kv", "put", "cli", "1")
    assert (bad.returncode, "is no path" in bad.stderr) == (2, True)
    seen = b.ww("kv", "watch", "/cli/", "--from", str(revision), "--count", "2", check=True).stdout
    assert seen == f"{revision}  /cli/price  12\n{second}  /cli/price  13\n"
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
        holder.communicate("\n", timeout=60)
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
            each.communicate("\n", timeout=60)
            assert each.returncode == 0
    finally:
        holder.kill()
        leader.kill()


@pytest.mark.parametrize("what", ["lock lost", "sem lost 1", "elect lost"])
def test_a_command_is_ended_when_what_is_held_is_lost(pair: Pair, what: str) -> None:
    """`ww lock` is stopped beyond its lease, and its child was not: then it learns of it."""
    (a, b), how = pair, what.split()
    code = "import time; print('up', flush=True); time.sleep(600)"
    holder = a.start_ww(*how, "--ttl", "2", "--", sys.executable, "-c", code)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        holder.send_signal(signal.SIGSTOP)
        b.ww(*how, "--wait", "20", "--", "true", check=True)
        holder.send_signal(signal.SIGCONT)
        _, err = holder.communicate(timeout=60)
        assert (holder.returncode, "what was held is lost" in err) == (1, True), err
    except subprocess.TimeoutExpired:
        raise AssertionError("the command runs on without its lock") from None
    finally:
        holder.send_signal(signal.SIGCONT)
        holder.kill()


def test_all_that_a_command_has_started_ends_with_it(pair: Pair) -> None:
    """Also what takes no SIGTERM: else it would go on while the next one holds the lock."""
    a, b = pair
    script = "trap '' TERM; sleep 600 & echo $$ $!; wait; sleep 600"
    holder = a.start_ww("lock", "all", "--ttl", "2", "--", "sh", "-c", script)
    try:
        assert holder.stdout is not None
        pids = list(map(int, holder.stdout.readline().split()))
        assert list(map(runs, pids)) == [True, True]
        holder.send_signal(signal.SIGSTOP)
        b.ww("lock", "all", "--wait", "20", "--", "true", check=True)
        holder.send_signal(signal.SIGCONT)
        holder.communicate(timeout=60)
        assert holder.returncode == 1
        wait_for(lambda: not any(map(runs, pids)), "nothing of it runs any more")
    finally:
        holder.send_signal(signal.SIGCONT)
        holder.kill()
    killed = b.ww("lock", "all", "--", "sh", "-c", "kill -9 $$")
    assert killed.returncode == 128 + signal.SIGKILL


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes between open and read
        return False


def test_transactions(pair: Pair, tmp_path: Path) -> None:
    _, b = pair
    b.ww("kv", "put", "/sale/stock", "3", check=True)
    sale = {
        "compare": [{"key": "/sale/stock", "value": "3"}, {"key": "/sale/sold", "modified": 0}],
        "then": [{"put": "/sale/stock", "value": "2"}, {"put": "/sale/sold", "hex": "00ff"}],
        "else": [{"put": "/sale/missed", "value": "ü"}, {"del": "/sale/stock"}],
    }
    done = json.loads(b.ww("kv", "txn", "--json", input=json.dumps(sale), check=True).stdout)
    assert done["succeeded"]
    listed = json.loads(b.ww("kv", "ls", "/sale/", "--json", check=True).stdout)
    assert [(e["key"], e.get("value"), e.get("hex"), e["modified"]) for e in listed] == [
        ("/sale/sold", None, "00ff", done["revision"]),
        ("/sale/stock", "2", None, done["revision"]),
    ]
    file = tmp_path / "sale.json"
    file.write_text(json.dumps(sale))
    missed = b.ww("kv", "txn", str(file), "--json")
    (entry,) = json.loads(b.ww("kv", "ls", "/sale/missed", "--json", check=True).stdout)
    assert entry["value"] == "ü"
    assert (missed.returncode, json.loads(missed.stdout)) == (
        1,
        {"succeeded": False, "revision": entry["modified"]},
    )
    assert entry["modified"] > done["revision"]
    assert b.ww("kv", "get", "/sale/missed", check=True).stdout == "ü"
    assert b.ww("kv", "get", "/sale/stock").returncode == 1
    told = b.ww("kv", "txn", input=json.dumps({"then": [{"del": "/sale/missed"}]}), check=True)
    assert (told.stdout, "the comparisons held" in told.stderr) == ("", True)
    for wrong, why in (
        ("{", "it is no JSON"),
        (json.dumps({"if": []}), "compare, then and else"),
        (json.dumps({"then": [{"put": "sale", "value": ""}]}), "'sale' is no path"),
    ):
        refused = b.ww("kv", "txn", input=wrong)
        assert (refused.returncode, why in refused.stderr) == (2, True), refused.stderr
    none = b.ww("kv", "txn", str(tmp_path / "none"))
    assert (none.returncode, "No such file" in none.stderr) == (2, True)


def test_compare_and_set(pair: Pair) -> None:
    _, b = pair
    made = b.ww("kv", "put", "/cas/a", "1", "--at", "0", "--json", check=True)
    new = json.loads(made.stdout)
    b.ww("kv", "cas", "/cas/a", "1", "-", input="2", check=True)
    other = b.ww("kv", "cas", "/cas/a", "1", "3")
    assert (other.returncode, other.stdout) == (1, "")
    assert "/cas/a has not that value: nothing is changed" in other.stderr
    stale = b.ww("kv", "put", "/cas/a", "3", "--at", str(new["revision"]))
    assert (stale.returncode, "was not set last by the revision" in stale.stderr) == (1, True)
    assert b.ww("kv", "get", "/cas/a", check=True).stdout == "2"
    assert b.ww("kv", "cas", "/cas/none", "-", "1", input="").returncode == 1  # none is not b""
    for wrong in (["1"], ["1", "2", "3"], ["-", "-"]):
        assert b.ww("kv", "cas", "/cas/a", *wrong).returncode == 2


@pytest.mark.long
def test_a_watch_goes_on_after_a_restart_and_says_where_there_is_a_gap(home: Home) -> None:
    with ExitStack() as stack:
        a = stack.enter_context(home.node("a"))
        b = stack.enter_context(home.node("b", join=a))
        for node in (a, b):
            node.wait_members([a.peer_id, b.peer_id])
        first = put(b, "/w/a", "1")
        watch = b.start_ww("kv", "watch", "/w/", "--from", str(first), "--json")
        other = b.start_ww("kv", "watch", "/w/", "--from", str(first))
        assert next_of(watch)["value"] == "1"
        assert other.stdout is not None
        assert other.stdout.readline() == f"{first}  /w/a  1\n"

        a.stop(signal.SIGKILL)
        a = stack.enter_context(home.node("a", peers=[b.addr]))
        second = put(a, "/w/a", "2")
        event = next_of(watch)
        assert (event["revision"], event["value"]) == (second, "2")
        assert other.stdout.readline() == f"{second}  /w/a  2\n"

        for each in (watch, other):
            each.send_signal(signal.SIGSTOP)
        a.stop(signal.SIGKILL)  # with it the cursors, which would be kept up
        a = stack.enter_context(home.node("a", peers=[b.addr]))
        third = put(a, "/w/a", "3")
        fourth = put(a, "/w/a", "4")
        a.ww("kv", "compact", str(third), check=True)
        for each in (watch, other):
            each.send_signal(signal.SIGCONT)
        assert next_of(watch) == {"gap": {"after": second, "before": fourth}}
        assert (next_of(watch)["revision"], other.stdout.readline()) == (
            fourth,
            f"{fourth}  /w/a  4\n",
        )
        other.send_signal(signal.SIGINT)
        _, err = other.communicate(timeout=60)
        assert f"there is a gap: changes after the revision {second} and before {fourth}" in err


def put(node: NodeProcess, key: str, value: str) -> int:
    """Its revision, once it is written: the store may have to be found first."""

    def written() -> int:
        done = node.ww("kv", "put", key, value, "--json")
        return 0 if done.returncode else int(json.loads(done.stdout)["revision"])

    return wait_for(written, "it is written", within_s=60)


def next_of(watch: subprocess.Popen[str]) -> dict[str, Any]:
    assert watch.stdout is not None
    line = watch.stdout.readline()
    assert line, "the watch has ended"
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_signal_ends_the_command_and_then_its_lock(pair: Pair) -> None:
    """Whoever ends `ww lock`, e.g. `timeout`, does not leave a command behind without its lock."""
    a, b = pair
    holder = a.start_ww("lock", "ended", "--", "sh", "-c", "echo up; sleep 600; true")
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        holder.send_signal(signal.SIGTERM)
        holder.communicate(timeout=60)  # what runs on would hold the pipe
        assert holder.returncode == 128 + signal.SIGTERM
        b.ww("lock", "ended", "--wait", "0", "--", "true", check=True)
    finally:
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
