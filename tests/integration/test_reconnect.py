"""A node stops, crashes and comes back while programs use it."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

import wetware
from wetware.client import LoginRefused
from wetware.errors import STOPPING, AuthError, Disconnected
from wetware.identity import Key, Proof
from wetware.testing import Home, NodeProcess
from wetware_auth_local.signer import Ed25519Signer

pytestmark = pytest.mark.anyio


@pytest.fixture
def node(home: Home) -> Iterator[NodeProcess]:
    """A node that a test may end and start again."""
    with home.node("a") as running:
        yield running


def start_again(node: NodeProcess) -> NodeProcess:
    """At its data directory; at another port, which clients of this machine need not know."""
    return node.home.start_node(node.data_dir.name).wait_ready()


def kill(node: NodeProcess) -> None:
    node.process.kill()
    node.process.wait()


async def test_a_stop_is_no_revocation(node: NodeProcess) -> None:
    key = node.home.key()
    async with (
        wetware.connect(data_dir=node.data_dir, key=key) as session,
        session.cluster.watch() as members,
    ):
        assert (await anext(members)).is_self
        stopping = asyncio.create_task(asyncio.to_thread(node.stop))
        with pytest.raises(Disconnected):
            await asyncio.wait_for(anext(members), 60)
        with pytest.raises(Disconnected):
            await asyncio.wait_for(session.whoami(), 60)
        await stopping


async def test_what_a_client_is_told_of_a_stop(node: NodeProcess) -> None:
    """While the connection still stands: the end of the grants comes before that of the node."""
    with node.home.node("b", join=node) as silent:
        node.wait_members([silent.peer_id])
        silent.process.send_signal(signal.SIGSTOP)  # so that a call waits
        try:
            async with wetware.connect(data_dir=node.data_dir, key=node.home.key()) as session:
                waiting = asyncio.create_task(session.cluster.ping(silent.peer_id))
                await session.whoami()
                stopping = asyncio.create_task(asyncio.to_thread(node.stop))
                with pytest.raises(Disconnected) as caught:
                    await waiting
                assert caught.value.code == STOPPING
                await stopping
        finally:
            silent.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_session_comes_back(node: NodeProcess, how: str) -> None:
    told: list[str] = []
    async with wetware.connect(
        data_dir=node.data_dir, key=node.home.key(), reconnect=told.append
    ) as session:
        before = session.identity
        async with session.cluster.watch() as members:
            assert (await anext(members)).is_self
            assert members.gap_s == 0
            if how == "kill":
                os.kill(node.process.pid, signal.SIGSTOP)
                call = asyncio.create_task(session.grants_service.end_sessions("nobody"))
                await asyncio.sleep(0)  # it is sent, and not answered
            await asyncio.to_thread(node.stop if how == "stop" else lambda: kill(node))
            if how == "kill":
                with pytest.raises(Disconnected):  # it may have run: never repeated
                    await asyncio.wait_for(call, 60)
            with wetware.time_limit(60):
                waiting = asyncio.create_task(session.cluster.list())
            again = await asyncio.to_thread(start_again, node)
            try:
                assert [m.is_self for m in await waiting] == [True]
                assert (await asyncio.wait_for(anext(members), 60)).is_self
                assert members.gap_s > 0
                assert session.identity.principal == before.principal
                assert session.identity.grant != before.grant
                assert session.timeout_s == 30
                assert (await session.whoami()) == session.identity
            finally:
                await asyncio.to_thread(again.stop)
    assert told[0].startswith("the connection to the node was lost")
    assert told[1].startswith("logged in again after")


async def test_a_session_at_another_node_comes_back(home: Home, node: NodeProcess) -> None:
    """By the same way: the login here finds that node again, at its new address."""
    told: list[str] = []
    other = await asyncio.to_thread(lambda: home.start_node("b", join=node).wait_ready())
    await asyncio.to_thread(node.wait_members, [other.peer_id])
    async with (
        wetware.connect(
            "name=b", data_dir=node.data_dir, key=home.key(), reconnect=told.append
        ) as session,
        session.cluster.watch("name=b") as members,
    ):
        assert session.identity.node == other.peer_id
        await anext(members)
        kill(other)
        again = await asyncio.to_thread(start_again, other)
        try:
            while not members.gap_s:
                member = await asyncio.wait_for(anext(members), 60)
            assert (member.peer_id, member.is_self) == (other.peer_id, True)
            assert (await session.whoami()).node == other.peer_id
            assert len(told) == 2
        finally:
            await asyncio.to_thread(again.stop)


async def test_who_was_removed_meanwhile_does_not_come_back(node: NodeProcess) -> None:
    bob = Key.generate()
    add = ("user", "add", "bob", "--key", str(bob.peer_id), "--role", "member")
    await asyncio.to_thread(node.ww, *add, check=True)
    async with (
        wetware.connect(data_dir=node.data_dir, key=bob, reconnect=True) as session,
        session.cluster.watch() as members,
    ):
        await anext(members)
        # This process is busy, as far as its loop can tell, until he is removed.
        kill(node)
        again = start_again(node)
        again.ww("user", "remove", "bob", check=True)
        try:
            with pytest.raises(LoginRefused):
                await asyncio.wait_for(anext(members), 60)
            with pytest.raises(LoginRefused):
                await session.whoami()
        finally:
            await asyncio.to_thread(again.stop)


async def test_nobody_is_asked_for_a_passphrase_or_at_a_wallet(
    node: NodeProcess, tmp_path: Any
) -> None:
    key = node.home.key()
    path = tmp_path / "locked"
    key.save(path, passphrase="secret")
    asked: list[str] = []

    def passphrase() -> str:
        asked.append("passphrase")
        return "secret"

    class Wallet:
        async def sign(self, challenge: Any) -> Proof:
            asked.append("wallet")
            return await Ed25519Signer(key).sign(challenge)

    here = node.data_dir
    async with (
        wetware.connect(data_dir=here, key=path, passphrase=passphrase, reconnect=True) as one,
        wetware.connect(data_dir=here, signer=Wallet(), reconnect=True) as two,
        one.cluster.watch() as members,
        two.cluster.watch() as others,
    ):
        await anext(members), await anext(others)
        assert asked == ["passphrase", "wallet"]
        kill(node)
        again = await asyncio.to_thread(start_again, node)
        try:
            for waiting in (members, others):
                with pytest.raises(AuthError, match="nobody is asked unawares"):
                    await asyncio.wait_for(anext(waiting), 60)
        finally:
            await asyncio.to_thread(again.stop)
    assert asked == ["passphrase", "wallet"]


# --- `ww sub` -------------------------------------------------------------------------------------


def say(node: NodeProcess, text: str) -> None:
    node.ww("pub", "chat", text, check=True)


def wait_subscribed(node: NodeProcess) -> None:
    """Until somebody is subscribed at the node."""

    async def look() -> None:
        async with wetware.connect(data_dir=node.data_dir, key=node.home.key()) as session:
            topic = await session.pubsub.join("chat")
            while not (await topic.info()).subscribers:
                await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(look(), 60))


def end_of(ww: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it said on stderr."""
    _, said = ww.communicate(timeout=60)
    return ww.returncode, said


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_sub_goes_on_when_its_node_is_back(node: NodeProcess, how: str) -> None:
    ww = node.start_ww("sub", "chat", "--count", "2")
    assert ww.stdout is not None
    wait_subscribed(node)
    say(node, "one")
    assert ww.stdout.readline() == "one\n"
    if how == "stop":
        node.stop()
    else:
        kill(node)
    again = start_again(node)
    wait_subscribed(again)
    say(again, "two")
    assert ww.stdout.readline() == "two\n"
    code, said = end_of(ww)
    assert code == 0, said
    assert "the connection to the node was lost; logging in again" in said
    assert "subscriptions miss what came meanwhile" in said
    again.stop()


def test_sub_of_a_user_who_was_removed_meanwhile_ends(node: NodeProcess) -> None:
    home = node.home
    home.ww("key", "new", "bob", check=True)
    node.ww("user", "add", "bob", "--key", "bob", "--role", "member", check=True)
    ww = node.start_ww("--key", "bob", "sub", "chat")
    wait_subscribed(node)
    os.kill(ww.pid, signal.SIGSTOP)
    kill(node)
    again = start_again(node)
    again.ww("user", "remove", "bob", check=True)
    os.kill(ww.pid, signal.SIGCONT)
    code, said = end_of(ww)
    assert code == 77, said
    assert "login refused" in said
    again.stop()


def test_sub_does_not_ask_for_a_passphrase_again(node: NodeProcess) -> None:
    node.home.key().save(node.home.path / "locked", passphrase="secret")
    ours, theirs = pty.openpty()
    try:
        ww = node.start_ww("--key", "./locked", "sub", "chat", stdin=theirs, start_new_session=True)
        assert ww.stderr is not None
        asked = ""
        while not asked.endswith("Passphrase:"):  # what is typed before it is thrown away
            char = ww.stderr.read(1)
            assert char, asked
            asked += char
        os.write(ours, b"secret\n")
        wait_subscribed(node)
        kill(node)
        again = start_again(node)
        code, said = end_of(ww)
    finally:
        os.close(ours)
        os.close(theirs)
    assert code == 77, said
    assert "Passphrase" not in said
    assert "nobody is asked unawares for a passphrase" in said
    assert "WW_PASSPHRASE" in said
    again.stop()
