"""A node with few files: who only holds connections does not shut its owner out."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
from collections.abc import Iterator

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.errors import EXIT_FAILED
from wetware.testing import Home, NodeProcess, wait_for

FILES = 80
"""A node with all bundled plugins has 60 open before anybody comes, 7 for each schema."""
LIBP2P = True  # it opens files of its own


@pytest.fixture
def poor(home: Home) -> Iterator[NodeProcess]:
    """Started under `ulimit -n 80`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    node = home.start_node(files_max=FILES)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    try:
        yield node.wait_ready()
    finally:
        node.stop()


def test_idle_connections_leave_the_owner_a_place_and_the_log_short(poor: NodeProcess) -> None:
    poor.wait_log("files.few")
    poor.wait_log("overlay.up")
    target = Multiaddr.parse(poor.addr)
    before = len(poor.log.read_text().splitlines())
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            sock = stack.enter_context(socket.create_connection((target.host, target.port), 10))
            sock.setblocking(False)
        for _ in range(3):
            assert poor.ww("whoami").returncode == 0
        assert len(poor.log.read_text().splitlines()) - before < 100
    assert "accept.failed" not in poor.log.read_text()


def test_idle_programs_make_room_for_one_that_logs_in(poor: NodeProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(poor.info["socket"])
        assert poor.ww("whoami").returncode == 0
        assert poor.ww("pub", "chat", "hello").returncode == 0


def test_programs_that_are_all_logged_in_are_said_to_be_too_many(poor: NodeProcess) -> None:
    """Nobody's work is cut off; the one too many hears why."""
    held: list[subprocess.Popen[str]] = []
    while not held or held[-1].poll() is None:
        held.append(poor.start_ww("sub", "chat"))
        opened = len(held)
        wait_for(
            lambda p=held[-1], n=opened: (
                p.poll() is not None or poor.log.read_text().count("service.opened") >= n
            ),
            "it is in, or refused",
        )
    refused = held.pop()
    _, err = refused.communicate()
    assert refused.returncode == EXIT_FAILED, err
    assert "programs of this machine are logged in to the node, and it serves no more" in err
    assert "end some of them" in err
    assert len(held) >= 4
    assert all(p.poll() is None for p in held)
