"""The record of a real node's decisions: complete after a crash, and whole or known not to be."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware.errors import EXIT_CONFIG, EXIT_DENIED, EXIT_FAILED, Denied, WetwareError
from wetware.identity import Key
from wetware.testing import Home, NodeProcess, wait_for
from wetware_audit.chain import CHECKPOINT_DOMAIN, CHECKPOINTS_FILE, files
from wetware_audit.log import AuditLog

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

CRASHES, REVOCATIONS = 3, 20


def tail(node: NodeProcess, *args: str) -> list[dict[str, Any]]:
    done = node.ww("audit", "tail", "-n", "1000", "--json", *args, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def audit_dir(node: NodeProcess) -> Path:
    return node.data_dir / "plugins" / "audit"


async def test_every_decision_is_a_record(node: NodeProcess) -> None:
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        ref, grant = await session.share({"pubsub": []}, ["topic=chat"], label="for the record")
        async with wetware.connect(ref) as bearer:
            await bearer.pubsub.join("chat")
            with pytest.raises(Denied) as denied:
                await bearer.pubsub.join("other")
        await session.revoke(grant.id, "done")
        me = str((await session.whoami()).principal)
    decision = denied.value.hint.partition(" why ")[2].partition("`")[0]
    about = {record["event"]: record for record in tail(node, "--grant", grant.id)}
    assert {"grant.shared", "share.redeemed", "grant.revoked"} <= about.keys(), about
    assert about["grant.revoked"]["by"] == me
    assert about["grant.revoked"]["reason"] == "done"
    (refused,) = (
        record for record in tail(node, "--event", "call.denied") if record["decision"] == decision
    )
    assert "PubSub.join" in refused["method"]
    assert "topic=chat" in refused["reason"]
    logins = [r for r in tail(node, "--event", "login.") if r["principal"] == me]
    assert logins
    opened = tail(node, "--event", "service.opened")
    assert any(record["service"] == "pubsub" for record in opened)
    shown = node.ww("audit", "show", str(logins[-1]["seq"]), check=True)
    assert json.loads(shown.stdout)["event"] == logins[-1]["event"]
    text = "".join(path.read_text() for path in files(audit_dir(node)))
    assert ref not in text
    assert ref[40:80] not in text


def test_a_running_node_s_log_is_whole(node: NodeProcess) -> None:
    whole = node.ww("audit", "verify", "--json", check=True)
    assert json.loads(whole.stdout)["ok"]
    exported = node.ww("audit", "export", "-", check=True)
    lines = exported.stdout.splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, len(lines) + 1))


async def test_follow_shows_what_happens(node: NodeProcess) -> None:
    following = node.start_ww("audit", "tail", "--follow", "--json", "--event", "grant.shared")
    try:
        assert following.stdout is not None
        reading = asyncio.create_task(asyncio.to_thread(following.stdout.readline))
        async with wetware.connect(node.addr, key=node.home.key()) as session:
            for _ in range(100):
                await session.share({"pubsub": []}, label="seen")
                if (await asyncio.wait([reading], timeout=0.2))[0]:
                    break
        async with asyncio.timeout(60):
            assert json.loads(await reading)["event"] == "grant.shared"
    finally:
        following.kill()


def test_who_may_not_see_it(node: NodeProcess) -> None:
    node.home.ww("key", "new", "visitor", check=True)
    key = str(node.home.key("visitor").peer_id)
    node.ww("user", "add", "visitor", "--key", key, check=True)
    done = node.ww("--key", "visitor", "audit", "tail")
    assert done.returncode == EXIT_DENIED
    assert done.stdout == ""


async def test_after_a_crash_the_log_is_whole_and_has_every_login(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        node = home.start_node("n").wait_ready()
        done = 0

        async def login() -> None:
            nonlocal done
            while True:
                async with wetware.connect(node.addr, key=home.key()):
                    done += 1

        logging_in = [asyncio.create_task(login()) for _ in range(4)]
        async with asyncio.timeout(60):
            while done < 60:
                await asyncio.sleep(0.01)
        node.process.send_signal(signal.SIGKILL)
        failed = await asyncio.gather(*logging_in, return_exceptions=True)
        assert all(isinstance(error, WetwareError) for error in failed), failed
        acknowledged = done
        node.process.wait()
        before = node.ww("audit", "verify", "--json")
        assert json.loads(before.stdout)["ok"] or "torn" in before.stdout
        node = home.start_node("n").wait_ready()
        report = json.loads(node.ww("audit", "verify", "--json", check=True).stdout)
        assert report["ok"]
        logins = node.ww("audit", "export", "-", check=True).stdout.count('"login.granted"')
        assert logins >= acknowledged
        node.stop()


async def test_no_revocation_that_was_answered_is_missing_after_a_crash(tmp_path: Path) -> None:
    """Whatever moment the process is killed at; a loop, as the moment is what matters."""
    answered: set[str] = set()

    async def revoke(node: NodeProcess) -> None:
        async with wetware.connect(node.addr, key=node.home.key()) as session:
            while True:
                _, grant = await session.share({"pubsub": []})
                await session.revoke(grant.id)
                answered.add(grant.id)

    with Home(tmp_path) as home:
        for crash in range(CRASHES):
            node = home.start_node("n").wait_ready()
            revoking = [asyncio.create_task(revoke(node)) for _ in range(4)]
            async with asyncio.timeout(60):
                while len(answered) < (crash + 1) * REVOCATIONS:
                    await asyncio.sleep(0.001)
            node.process.send_signal(signal.SIGKILL)
            failed = await asyncio.gather(*revoking, return_exceptions=True)
            assert all(isinstance(error, WetwareError) for error in failed), failed
            node.process.wait()
        node = home.start_node("n").wait_ready()
        lines = node.ww("audit", "export", "-", check=True).stdout.splitlines()
        events = [json.loads(line) for line in lines]
        missing = answered - {e["grant"] for e in events if e["event"] == "grant.revoked"}
        assert not missing, f"{len(missing)} of {len(answered)}"
        live = node.ww("grants", "--all", "--json", check=True).stdout
        assert not [grant for grant in answered if grant in live]
        assert json.loads(node.ww("audit", "verify", "--json", check=True).stdout)["ok"]
        node.stop()


def test_tampering_is_found_without_the_node(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        node = home.start_node("n").wait_ready()
        for number in range(3):
            node.ww("share", "pubsub", "--label", f"share {number}", check=True)
        checkpoint = tmp_path / "checkpoint"
        checkpoint.write_text(node.ww("audit", "checkpoint", check=True).stdout)
        node.stop()
    copy = tmp_path / "copy"
    shutil.copytree(audit_dir(node), copy)
    home = Home(tmp_path / "auditor")  # another machine: it has nothing but the copy

    def verify(*args: str) -> tuple[int, str]:
        done = home.ww("audit", "verify", "--dir", str(copy), *args)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout

    assert verify("--checkpoint", str(checkpoint), "--of", str(node.peer_id))[0] == 0
    path = files(copy)[0]
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b"share 1" in line)
    seq = json.loads(lines[at])["seq"]
    for changed, where in (
        ([*lines[:at], lines[at].replace(b"share 1", b"share 9"), *lines[at + 1 :]], seq),
        ([*lines[:at], *lines[at + 1 :]], seq + 1),
        ([*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]], seq + 1),
        ([*lines[: at + 1], *lines[at:]], seq),
    ):
        path.write_bytes(b"".join(changed))
        code, said = verify()
        assert code == EXIT_FAILED
        assert f"{path.name}, record {where}:" in said
        assert "tampered with or damaged" in said
    path.write_bytes(b"".join(lines[:at]))
    (copy / CHECKPOINTS_FILE).unlink()
    assert verify()[0] == 0, "cut off at a record: the chain alone cannot tell"
    code, said = verify("--checkpoint", str(checkpoint))
    assert code == EXIT_FAILED
    assert "its end was cut off" in said
    path.write_bytes(whole)
    assert verify("--checkpoint", str(checkpoint))[0] == 0
    code, said = verify("--of", str(home.path.name))
    assert code != 0


@pytest.fixture
def signing(tmp_path: Path) -> Iterator[tuple[NodeProcess, NodeProcess]]:
    """Two nodes of a cluster that sign a checkpoint every second."""
    with (
        Home(tmp_path, {"WW_PLUGINS_AUDIT_CHECKPOINT_S": "1"}) as home,
        home.node("a") as a,
        home.node("b", join=a) as b,
    ):
        a.wait_members([b.peer_id])
        yield a, b


def test_members_keep_each_other_s_checkpoints(signing: tuple[NodeProcess, NodeProcess]) -> None:
    """What a node signed is known elsewhere, so that it cannot take it back alone."""
    a, b = signing
    a.ww("share", "pubsub", check=True)

    def heard() -> str:
        done = b.ww("audit", "checkpoint", "--of", str(a.peer_id), check=True)
        return done.stdout

    wait_for(heard, "a checkpoint of a at b")
    known = a.home.path / "known-at-b"
    known.write_text(heard())
    copy = a.home.path / "copy-of-a"
    shutil.copytree(audit_dir(a), copy)
    args = ("audit", "verify", "--dir", str(copy), "--checkpoint", str(known))
    assert a.home.ww(*args).returncode == 0
    (copy / CHECKPOINTS_FILE).unlink(missing_ok=True)
    path = files(copy)[0]
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    cut = a.home.ww(*args)
    assert cut.returncode == EXIT_FAILED
    assert "its end was cut off" in cut.stdout


async def grow(node: NodeProcess, count: int) -> None:
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        for _ in range(count):
            await (await session.attenuate(label="another record")).close()


@pytest.mark.long
@pytest.mark.parametrize("regrown", [130, 0])
async def test_a_log_that_was_cut_is_known_elsewhere_for_ever(tmp_path: Path, regrown: int) -> None:
    """100 records fewer at a restart; 130 more before the next checkpoint, or none."""
    with Home(tmp_path, {"WW_PLUGINS_AUDIT_CHECKPOINT_S": "1"}) as home, home.node("b") as b:
        a = home.start_node("a", join=b).wait_ready()
        b.wait_members([a.peer_id])

        def known() -> list[int]:
            done = b.ww("audit", "checkpoint", "--of", str(a.peer_id), check=True)
            return [json.loads(line)["seq"] for line in done.stdout.splitlines()]

        await grow(a, 120)
        end = len(a.ww("audit", "export", "-", check=True).stdout.splitlines())
        wait_for(lambda: max(known(), default=0) >= end, "the checkpoint of a at b")
        a.stop()
        (high,) = known()
        path = files(audit_dir(a))[-1]
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-100]))
        (audit_dir(a) / CHECKPOINTS_FILE).unlink()
        if regrown:
            key = Key.load(a.data_dir / "node.key")
            log = AuditLog(
                audit_dir(a),
                key.peer_id,
                lambda data: key.sign(CHECKPOINT_DOMAIN + data),
                clock=time,
            )
            for _ in range(regrown):
                log.append_soon({"event": "login.granted"})
            log.close()
        a = home.start_node("a").wait_ready()
        wait_for(lambda: tail(b, "--event", "peer.log_rewritten"), "what b says of it")
        for _ in range(10):
            before = max(known()[:1])
            await grow(a, 1)
            wait_for(lambda: known()[0] > before, "the next checkpoint")  # noqa: B023
        assert high in known()
        (record,) = tail(b, "--event", "peer.log_rewritten")
        assert json.loads(record["was"])["seq"] == high
        kept = tmp_path / "kept"
        kept.write_text(b.ww("audit", "checkpoint", "--of", str(a.peer_id), check=True).stdout)
        assert a.ww("audit", "verify").returncode == 0, "by itself it cannot tell"
        done = a.ww("audit", "verify", "--checkpoint", str(kept))
        assert done.returncode == EXIT_FAILED
        assert "the log was rewritten" in done.stdout or "was cut off" in done.stdout
        said = b.ww("doctor").stdout
        assert f"the log of {a.peer_id}: its log was cut off or rewritten" in said
        about = b.ww("audit", "verify", check=True).stdout
        assert "its log was cut off or rewritten" in about
        a.stop()


@pytest.mark.long
async def test_the_oldest_files_are_missed_unless_the_settings_let_them_go(tmp_path: Path) -> None:
    small = {"WW_PLUGINS_AUDIT_CHECKPOINT_S": "1", "WW_PLUGINS_AUDIT_FILE_BYTES_MAX": str(1 << 16)}
    with (
        Home(tmp_path, small) as home,
        Home(tmp_path, {**small, "WW_PLUGINS_AUDIT_FILES_MAX": "2"}) as less,
        home.node("b") as b,
    ):
        a = home.start_node("a", join=b).wait_ready()
        b.wait_members([a.peer_id])
        while len(files(audit_dir(a))) < 3:
            await grow(a, 100)
        kept = tmp_path / "kept"

        def heard() -> bool:
            kept.write_text(b.ww("audit", "checkpoint", "--of", str(a.peer_id), check=True).stdout)
            return bool(kept.read_text())

        wait_for(heard, "a checkpoint of a at b")
        a.stop()
        first = files(audit_dir(a))[0]
        aside = first.rename(tmp_path / first.name)
        for args in ((), ("--checkpoint", str(kept))):
            done = a.ww("audit", "verify", *args)
            assert done.returncode == EXIT_FAILED
            assert f"{first.name} at its beginning is gone (up to record " in done.stdout
            assert "no record says that the settings let it go" in done.stdout
        a = home.start_node("a").wait_ready()
        assert "its oldest files are gone" in a.ww("doctor").stdout
        a.stop()
        aside.rename(first)
        a = less.start_node("a").wait_ready()
        while files(audit_dir(a))[0] == first:
            await grow(a, 100)
        done = a.ww("audit", "verify", "--checkpoint", str(kept))
        assert done.returncode == 0, done.stdout
        assert "was let go by the settings" in done.stdout
        a.stop()


def test_the_recorder_is_chosen_and_a_log_of_before_goes_on(tmp_path: Path) -> None:
    """A missing recorder stops the start; "none" is said; a log that the core kept is moved."""
    with Home(tmp_path) as home:
        a = home.start_node("a").wait_ready()
        a.stop()
        records = audit_dir(a)
        before = [path.read_bytes() for path in files(records)]
        records.rename(a.data_dir / "audit")

        settings = home.path / ".wetware" / "ww.toml"
        settings.write_text('[node]\naudit = "ledger"\n')
        missing = home.start_node("a")
        assert missing.process.wait(60) == EXIT_CONFIG
        assert "no installed plugin is the recorder 'ledger'" in missing.log.read_text()

        settings.write_text('[node]\naudit = "none"\n')
        none = home.start_node("a").wait_ready()
        assert "audit.none" in none.log.read_text()
        assert "decisions are not recorded" in none.ww("doctor").stdout
        assert none.ww("audit", "tail").returncode != 0
        none.stop()
        assert not files(records)

        settings.unlink()
        a = home.start_node("a").wait_ready()
        assert not (a.data_dir / "audit").exists()
        assert files(records)[0].read_bytes().startswith(before[0])
        a.stop()
        assert a.ww("audit", "verify").returncode == 0
        last = a.ww("audit", "export", "-", check=True).stdout.splitlines()[-1]
        assert json.loads(last)["event"] == "node.stopped"
