"""A real node whose disk is full: an operator ends things, from a login of their own each time."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware.errors import WetwareError
from wetware.testing import Home, wait_for

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


@pytest.mark.parametrize("where", ["node", "node, keys and logs"])
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
            done = node.ww(*refused)
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


def _ticket_id(node: Any) -> str:
    listed = node.ww("invite", "--list", "--json", check=True).stdout
    import json

    return str(json.loads(listed)[0]["id"])
