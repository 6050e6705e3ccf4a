"""Closed, full and ASCII-only streams: an error of the command's own, or none at all."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wetware.testing import Home, NodeProcess


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with (
        Home(tmp_path_factory.mktemp("streams")) as home,
        home.node("n", args=["--name", "Büro"]) as made,
    ):
        yield made


def _sh(node: NodeProcess, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a shell's line in which `ww` is this node's."""
    ww = shlex.join([sys.executable, "-m", "wetware", "--data-dir", str(node.data_dir)])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'ww() {{ {ww} "$@"; }}\n{script}'],
        env={**node.home.env, **env},
        cwd=node.home.path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": ""}], ids=["-u", "buffered"])
@pytest.mark.parametrize(
    "command", ["status", "config reference", "audit export -", "role list", "--help"]
)
def test_a_closed_pipe_ends_a_command_quietly(
    node: NodeProcess, command: str, unbuffered: dict[str, str]
) -> None:
    """The core's commands and a plugin's."""
    done = _sh(node, f"ww {command} | true", **unbuffered)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_a_subscriber_whose_reader_left(node: NodeProcess) -> None:
    script = "(sleep 2; seq 300 | ww pub streams/gone) & ww sub streams/gone | head -1; wait"
    done = _sh(node, script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("command", ["status", "audit export -", "user list", "whoami --json"])
@pytest.mark.parametrize(
    ("where", "why"), [(">/dev/full", "No space left"), (">&-", "Bad file descriptor")]
)
def test_an_output_that_cannot_be_written(
    node: NodeProcess, command: str, where: str, why: str
) -> None:
    done = _sh(node, f"ww {command} {where}", PYTHONUNBUFFERED="")
    assert done.returncode == 1
    said = f"cannot write to standard output: {why}"
    start = '{"error": {"code": "output", "message": "' if "--json" in command else "ww: "
    assert done.stderr.splitlines()[-1].startswith(start + said)
    assert done.stderr.count("cannot write") == 1


def test_messages_that_cannot_be_written(node: NodeProcess) -> None:
    done = _sh(
        node, "(sleep 2; ww pub streams/full hello) & ww sub streams/full >/dev/full; wait $!"
    )
    assert "ww: cannot write to standard output: No space left" in done.stderr
    assert "unexpected" not in done.stderr


def test_what_writes_nothing_needs_no_output(node: NodeProcess) -> None:
    assert _sh(node, "ww pub chat hello <&- >&-").returncode == 0


@pytest.mark.parametrize(
    "command", ["pub chat", "node --join -", "use - whoami", "policy import -"]
)
def test_a_closed_input(node: NodeProcess, command: str) -> None:
    done = _sh(node, f"ww {command} <&-")
    assert done.returncode == 2
    assert "standard input: Bad file descriptor" in done.stderr


def test_a_closed_or_full_standard_error(node: NodeProcess) -> None:
    for where in ("2>&-", "2>/dev/full"):
        assert _sh(node, f"ww pub --verbose chat hello {where}").returncode == 0
        assert _sh(node, f"ww key show nobody {where}").returncode == 78


def test_a_name_that_the_encoding_does_not_have(node: NodeProcess) -> None:
    """Backslashes for that name, and the columns stay columns."""
    ascii_, plain = (
        _sh(node, "ww ls", PYTHONIOENCODING=encoding).stdout.splitlines()
        for encoding in ("ascii", "utf-8")
    )
    assert "B\\xfcro" in ascii_[1]
    assert "Büro" in plain[1]
    assert ascii_[0].index("STATE") == ascii_[1].index("alive")
    assert _sh(node, "ww ping Büro", PYTHONIOENCODING="ascii").returncode == 0
    for command in ("status", "--help", "share pubsub:Büro", "key list"):
        done = _sh(node, f"ww {command}", PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr


def test_a_node_outlives_the_reader_of_its_log(node: NodeProcess) -> None:
    """`ww node 2>&1 | head`: it serves on, until it is told to stop."""
    home = node.home
    reading, writing = os.pipe()
    os.close(reading)
    data_dir = home.path / "unread"
    process = subprocess.Popen(
        [sys.executable, "-m", "wetware", "--data-dir", str(data_dir), "node"],
        env={**home.env, "WW_NODE_LISTEN": "/ip4/127.0.0.1/tcp/0"},
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    unread = NodeProcess(home, data_dir, process, Path(os.devnull))
    try:
        unread.wait_ready()
        assert unread.ww("status").returncode == 0
    finally:
        unread.stop()
    assert process.returncode == 0
