"""A real node whose disk is full: an operator ends things, from a login of their own each time."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware.base.disk import Reserve
from wetware.broker.store import NOT_DURABLE
from wetware.errors import WetwareError
from wetware.testing import Home, wait_for

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    "where", ["node", pytest.param("node, keys and logs", marks=pytest.mark.long)]
)
async def test_an_operator_ends_things_on_a_full_disk_and_a_crash_brings_nothing_back(
    small_disk: Any, tmp_path: Path, where: str
) -> None:
    with Home((tmp_path if where == "node" else small_disk.path) / "home") as home:
        node = home.start_node(str(small_disk.path / "n")).wait_ready()
        home.ww("key", "new", "ada", check=True)
        ada = str(home.key("ada").peer_id)
        node.ww("user", "add", "ada", "--key", ada, "--role", "member", check=True)
        node.invite()
        async with wetware.connect(node.addr, key=home.key()) as session:
            ref, grant = await session.share({"pubsub": []}, label="one")
            other_ref, other = await session.share({"pubsub": []}, label="two")
        async with wetware.connect(node.addr, key=home.key("ada")) as session:
            theirs_ref, theirs = await session.share({"pubsub": []}, label="ada's")
        small_disk.fill()

        for refused in (("share", "pubsub"), ("pub", "chat", "hi"), ("invite",)):
            for _ in range(20):  # the log goes on in what its last block has left
                small_disk.fill()
                done = node.ww(*refused)
                if done.returncode:
                    break
            assert done.returncode, (refused, done.stdout)
            assert "cannot be" in done.stderr, done.stderr  # recorded, or the log written
        for ending in (
            ("revoke", grant.id, "--reason", "stolen"),
            ("revoke", "--all", theirs.id),
            ("user", "remove", "ada"),
            ("invite", "--revoke", _ticket_id(node)),
            ("grants", "--all"),
            ("status",),
        ):
            done = node.ww(*ending)
            assert done.returncode == 0, (ending, done.stdout, done.stderr)
        for gone in (ref, theirs_ref):
            with pytest.raises(WetwareError):
                async with wetware.connect(gone):
                    pass
        assert node.ww("--key", "ada", "whoami").returncode
        doctor = node.ww("doctor")
        assert "cannot be written" in doctor.stdout, doctor.stdout

        node.process.send_signal(signal.SIGKILL)
        node.process.wait()
        small_disk.fill()  # what the process held back is nobody's
        listen = node.addr.partition("/p2p/")[0]  # references name it
        node = home.start_node(str(small_disk.path / "n"), listen=listen).wait_ready()
        for gone in (ref, theirs_ref):
            with pytest.raises(WetwareError) as ended:
                async with wetware.connect(gone):
                    pass
            assert ended.value.code == "capability.revoked"
        assert node.ww("--key", "ada", "whoami").returncode
        async with wetware.connect(node.addr, key=home.key()) as session:
            await session.grants_service.end_sessions("", "all of it")
        with pytest.raises(WetwareError) as ended:
            async with wetware.connect(other_ref):
                pass
        assert ended.value.code == "capability.revoked"

        small_disk.free()
        wait_for(lambda: node.ww("share", "pubsub").returncode == 0, "the disk is used again")
        assert "audit.writes_again" in node.log.read_text()
        assert node.ww("audit", "verify").returncode == 0
        log = node.ww("audit", "export", "-", check=True).stdout
        events = ("stolen", "grant.revoked", "sessions.ended", "operator.revoked")
        for event in (*events, "login.unrecorded"):
            assert event in log, event
        assert other.id


async def test_shares_that_a_crash_may_have_brought_back_wait_for_an_operator(
    tmp_path: Path,
) -> None:
    with Home(tmp_path) as home:
        with home.node("n") as node:
            listen = node.addr.partition("/p2p/")[0]
            async with wetware.connect(node.addr, key=home.key()) as session:
                ref, _ = await session.share({"pubsub": []})
        Reserve(node.data_dir / "broker").mark(NOT_DURABLE)
        Reserve(node.data_dir).mark(NOT_DURABLE)
        Reserve(node.data_dir / "plugins" / "auth_local").mark("version 2 of the policy")
        home.ww("key", "new", "ada", check=True)
        with home.node("n", listen=listen) as node:
            with pytest.raises(WetwareError) as refused:
                async with wetware.connect(ref):
                    pass
            assert refused.value.code == "capability.suspended.not_durable"
            assert "ww grants --resume" in refused.value.hint
            doctor = node.ww("doctor").stdout
            for said in (" grants --resume`", "nobody can join or renew", "its operator alone"):
                assert said in doctor, doctor
            for event in ("shares.suspended", "admission.suspended", "policy.unsure"):
                assert event in node.log.read_text()
            node.ww("policy", "import", "-", input=node.ww("policy", "export").stdout, check=True)
            done = node.ww("grants", "--resume", check=True)
            assert "no share is suspended: 1 of this node work" in done.stderr
            async with wetware.connect(ref) as bearer:
                await bearer.pubsub.join("chat")
            doctor = node.ww("doctor").stdout
            for said in (" grants --resume`", "nobody can join or renew", "its operator alone"):
                assert said not in doctor, doctor


def _ticket_id(node: Any) -> str:
    listed = node.ww("invite", "--list", "--json", check=True).stdout
    import json

    return str(json.loads(listed)[0]["id"])
