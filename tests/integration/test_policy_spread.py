"""What the operator changes at one node holds at every other, and at one that was away."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import wetware
from wetware.client import LoginRefused
from wetware.errors import ConfigError, Disconnected, OverlayError
from wetware.identity import Key, LoginStatus
from wetware.testing import Home, NodeProcess, wait_for

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

WITHIN_S = 60.0
"""For what takes a second or two on an idle machine."""

Three = tuple[NodeProcess, NodeProcess, NodeProcess]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    """Nodes a, b and c of one cluster that see each other."""
    with Home(tmp_path_factory.mktemp("three")) as home:
        a = home.start_node("a").wait_ready()
        ticket = a.invite("--uses", "2")
        b, c = (home.start_node(name, join=ticket) for name in "bc")
        for node in (b, c):
            node.wait_ready()
        for node in (a, b, c):
            node.wait_members([a.peer_id, b.peer_id, c.peer_id], within_s=WITHIN_S)
        yield a, b, c
        for node in (a, b, c):
            node.stop()


def version(node: NodeProcess) -> int:
    status = json.loads(node.ww("policy", "status", "--json", check=True).stdout)
    return int(status["version"])


def wait_version(node: NodeProcess, wanted: int) -> None:
    what = f"version {wanted} at {node.data_dir.name}"
    wait_for(lambda: version(node) >= wanted, what, within_s=WITHIN_S)


def add_user(node: NodeProcess, name: str) -> Key:
    """A user with a key of their own, known at `node`."""
    home = node.home
    home.ww("key", "new", name, check=True)
    node.ww("user", "add", name, "--key", str(home.key(name).peer_id), check=True)
    return home.key(name)


def start_sub(node: NodeProcess, user: str) -> subprocess.Popen[str]:
    """`ww sub` of a user at a node, logged in and subscribed."""
    before = node.log.read_text().count("service.opened")
    sub = node.home.start_ww("--key", user, "--data-dir", str(node.data_dir), "sub", "chat")

    def opened() -> bool:
        assert sub.poll() is None, sub.communicate()
        return node.log.read_text().count("service.opened") > before

    wait_for(opened, f"the session of {user} at {node.data_dir.name}", within_s=WITHIN_S)
    return sub


def test_a_user_removed_at_one_node_loses_the_sessions_at_all(three: Three) -> None:
    a, b, _ = three
    add_user(a, "ada")
    for node in three:
        wait_version(node, version(a))
    subs = [start_sub(node, "ada") for node in three]
    stays = b.start_ww("sub", "chat")
    done = a.ww("user", "remove", "ada", check=True)
    assert "is in force" in done.stderr
    for sub in subs:
        _, err = sub.communicate(timeout=WITHIN_S)
        assert sub.returncode == 77, err
        assert err.startswith("ww: "), err
        assert "Traceback" not in err
    for node in three:
        refused = node.ww("--key", "ada", "whoami")
        assert refused.returncode == 77
        assert "unknown principal" in refused.stderr
        assert "policy.forked" not in node.log.read_text()
    assert stays.poll() is None, "another user's session"
    stays.kill()
    assert len({version(node) for node in three}) == 1


def test_an_operator_s_change_at_a_joined_node_reaches_the_first(three: Three) -> None:
    a, b, c = three
    before = version(a)
    key = add_user(b, "bob")
    for node in (a, c):
        wait_version(node, before + 1)
        who = json.loads(node.ww("--key", "bob", "whoami", "--json", check=True).stdout)
        assert who["principal"] == f"local:{key.peer_id}"
        assert who["roles"] == ["member"]
        assert node.ww("--key", "bob", "invite").returncode == 77, "no operator"
    # A role that is narrowed at c ends what it no longer covers at a.
    sub = start_sub(a, "bob")
    c.ww("role", "set", "member", "cluster=Cluster.list", check=True)
    _, err = sub.communicate(timeout=WITHIN_S)
    assert sub.returncode == 77, err
    b_refused = wait_for(
        lambda: b.ww("--key", "bob", "pub", "chat", "x").returncode, "the change at b"
    )
    assert b_refused == 77


async def _tries(data_dir: Path, key: Key, granted: asyncio.Event, over: asyncio.Event) -> int:
    """Log in again and again; returns how often the node said no."""
    refused = 0
    while not over.is_set():
        try:
            async with wetware.connect(data_dir=data_dir, key=key):
                granted.set()
                return refused
        except LoginRefused as exc:
            refused += 1
            if refused >= 3 and exc.status is LoginStatus.UNKNOWN_PRINCIPAL:
                return refused
            if exc.status not in (LoginStatus.UNKNOWN_PRINCIPAL, LoginStatus.BACKEND_UNAVAILABLE):
                raise
        except (OverlayError, ConfigError, Disconnected):
            await asyncio.sleep(0.01)  # it does not serve yet
    return refused


@pytest.mark.long
async def test_a_node_that_was_away_refuses_the_removed_user_from_its_first_moment(
    three: Three,
) -> None:
    """The document on its disk still has the user: it asks the others before it decides."""
    a, _, c = three
    key = await asyncio.to_thread(add_user, a, "eve")
    await asyncio.to_thread(wait_version, c, version(a))
    async with wetware.connect(data_dir=c.data_dir, key=key) as session:
        assert (await session.whoami()).principal == f"local:{key.peer_id}"
    await asyncio.to_thread(c.stop)
    await asyncio.to_thread(a.ww, "user", "remove", "eve", check=True)
    assert "eve" in (c.data_dir / "plugins" / "auth_local" / "policy.json").read_text()

    granted, over = asyncio.Event(), asyncio.Event()
    trying = asyncio.create_task(_tries(c.data_dir, key, granted, over))
    back = c.home.start_node("c")
    try:
        refused = await asyncio.wait_for(trying, 120)
        assert not granted.is_set(), "a user who is no more was let in"
        assert refused >= 3
        await asyncio.to_thread(back.wait_ready)
        assert await asyncio.to_thread(version, back) == await asyncio.to_thread(version, a)
    finally:
        over.set()
        trying.cancel()
        c.process, c.log, c.info = back.process, back.log, back.info
