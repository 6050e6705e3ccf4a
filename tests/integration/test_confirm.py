"""What cannot be undone is asked about, and an empty stdin is no answer."""

from __future__ import annotations

import json
import os
import pty

import pytest

from wetware.errors import EXIT_FAILED, EXIT_USAGE
from wetware.identity import Key
from wetware.testing import NodeProcess

pytestmark = pytest.mark.timeout(180)


def at_a_terminal(node: NodeProcess, answer: str, *args: str) -> tuple[int, str]:
    """(exit code, stderr) of `ww ARGS` with somebody at the terminal, who types `answer`."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        running = node.start_ww(*args, stdin=theirs, start_new_session=True)
        stderr = running.communicate(timeout=60)[1]
        return running.returncode, stderr
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("command", [("evict",), ("revoke", "--sessions")])
def test_nothing_is_ended_where_nobody_can_be_asked(
    node: NodeProcess, command: tuple[str, ...]
) -> None:
    what = "*" if command[0] == "revoke" else str(Key.generate().peer_id)
    shared = json.loads(node.ww("share", "pubsub:chat", "--json", check=True).stdout)
    done = node.ww(*command, what)
    assert done.returncode == EXIT_USAGE
    assert "There is no terminal to ask at" in done.stderr
    assert "try: the same command with --yes" in done.stderr
    code, asked = at_a_terminal(node, "n", *command, what)
    assert code == EXIT_FAILED
    assert what in asked or "everybody" in asked
    left = json.loads(node.ww("grants", "--json", check=True).stdout)
    assert shared["grant"]["id"] in {grant["id"] for grant in left}
    code, asked = at_a_terminal(node, "y", *command, what)
    assert code == 0, asked


def test_how_many_grants_ended_and_where(node: NodeProcess) -> None:
    node.ww("revoke", "--sessions", "*", "--yes", check=True)
    for name in ("a", "b"):
        node.ww("share", f"pubsub:{name}", check=True)
    done = node.ww("revoke", "--sessions", "*", "--yes", "--json", check=True)
    # Two closed sessions that the shares hang on are over already; ours has opened `grants`.
    assert json.loads(done.stdout) == {"ended": 4, "node": str(node.peer_id)}
    done = node.ww("revoke", "--sessions", "*", "--yes", check=True)
    assert done.stdout == "ended 2 grants\n"
    assert f"at {node.peer_id} only: every node has sessions and shares of its own" in done.stderr
