"""The audit log on disk: what was acknowledged is there, and what could not be written is said."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import wetware_audit.log as module
from wetware.base.disk import MARK_BYTES, RESERVED_BYTES, RESERVED_FILE
from wetware.errors import ConfigError, Unrecorded
from wetware_audit.chain import (
    CHECKPOINTS_FILE,
    LINE_BYTES_MAX,
    Checkpoint,
    files,
    read_checkpoints,
)
from wetware_audit.log import AuditLog
from wetware_audit.verify import verify

from .parts import KEY, OTHER, Clock, Disk, open_log, records_to, until, write

pytestmark = pytest.mark.anyio

Record = dict[str, Any]


def records(directory: Path) -> list[Record]:
    return [
        json.loads(line) for path in files(directory) for line in path.read_bytes().splitlines()
    ]


def events(directory: Path) -> list[str]:
    return [str(record["event"]) for record in records(directory)]


def aside(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in directory.glob("torn-*.bin")]


# --- the file -------------------------------------------------------------------------------------


async def test_what_was_acknowledged_is_in_the_file(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    numbers = await asyncio.gather(*(log.append({"event": "e", "n": n}) for n in range(200)))
    assert sorted(numbers) == list(range(2, 202))
    on_disk = records(tmp_path)  # before it is closed
    assert [record["seq"] for record in on_disk] == list(range(1, 202))
    assert {r["seq"]: r.get("n") for r in on_disk[1:]} == dict(
        zip(numbers, range(200), strict=True)
    )
    log.close()
    assert verify(tmp_path, node=KEY.peer_id).ok


async def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    for start in range(3):
        log = open_log(tmp_path)
        assert log.seq == 1 + 5 * start, "no second beginning"
        await write(log, 5)
        assert not log.findings
        log.close()
    report = verify(tmp_path)
    assert report.ok
    assert report.last == 16
    assert len(files(tmp_path)) == 1


async def test_a_start_reads_the_last_checkpoints_and_not_those_of_a_year(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path, checkpoint_records=1)
    while len(read_checkpoints(tmp_path / CHECKPOINTS_FILE)[0]) < 2 * module.CHECKPOINTS_READ:
        await write(log, 10)
        await asyncio.sleep(0.01)
    log.close()
    parsed: list[bytes] = []
    real = Checkpoint.parse

    def parse(text: str | bytes) -> Checkpoint:
        parsed.append(text if isinstance(text, bytes) else text.encode())
        return real(text)

    monkeypatch.setattr(Checkpoint, "parse", parse)
    again = open_log(tmp_path)
    assert len(parsed) == module.CHECKPOINTS_READ
    assert again.last_checkpoint == log.last_checkpoint
    assert not again.findings
    again.close()


async def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    log = open_log(tmp_path / "audit")
    log.close()
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert files(tmp_path / "audit")[0].stat().st_mode & 0o777 == 0o600


async def test_files_are_rotated_and_let_go(tmp_path: Path) -> None:
    log = open_log(tmp_path, file_bytes_max=1 << 12, files_max=3)
    await write(log, 200)
    assert len(files(tmp_path)) == 3
    log.close()
    log = open_log(tmp_path, file_bytes_max=1 << 12, files_max=3)
    await write(log, 1)
    log.close()
    report = verify(tmp_path)
    assert report.ok, report.problems
    assert report.first > 1
    assert any("was let go by the settings" in note for note in report.notes)


async def test_hostile_text_stays_in_its_field(tmp_path: Path) -> None:
    text = '","hash":"00"}\n{"seq":9,"event":"login.granted"}\u2028\x00'
    log = open_log(tmp_path)
    await write(log, 1, reason=text)
    log.close()
    assert [record.get("reason") for record in records(tmp_path)] == [None, text]
    assert verify(tmp_path).ok


async def test_a_record_fits_into_a_line(tmp_path: Path) -> None:
    """The widest there can be: every character becomes twelve."""
    log = open_log(tmp_path)
    audit = records_to(log)
    await audit.admit("e", **{f"f{n}": "\U0001f600" * 5000 for n in range(8)})
    log.close()
    (line,) = files(tmp_path)[0].read_bytes().splitlines()[1:]
    assert len(line) <= LINE_BYTES_MAX
    assert json.loads(line)["f0"].endswith("…")
    assert verify(tmp_path).ok


# --- after a crash --------------------------------------------------------------------------------


async def test_a_torn_last_record_is_put_aside_and_said(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    await write(log, 5)
    log.close()
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    for torn in (whole[:-1], whole[:-40], whole + b'{"seq":7,"ti', whole + b"\x00" * 512):
        path.write_bytes(torn)
        log = open_log(tmp_path)
        assert [event for event, _ in log.findings] in (
            ["log.torn"],
            ["log.torn", "log.truncated"],  # the record is one that a checkpoint has signed
        )
        await write(log, 1, "after")
        log.close()
        rest = torn.rpartition(b"\n")[2]
        assert rest in aside(tmp_path)
        assert events(tmp_path)[-1] == "after"
        # It tells of what this test cut off.
        (tmp_path / CHECKPOINTS_FILE).unlink()
        assert verify(tmp_path).ok
        path.write_bytes(whole)


async def test_a_damaged_end_begins_another_log_that_names_it(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    await write(log, 5)
    log.close()
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes().replace(b'"n":3', b'"n":4'))
    log = open_log(tmp_path)
    assert [event for event, _ in log.findings] == ["log.damaged"]
    await write(log, 1)
    log.close()
    assert len(files(tmp_path)) == 2
    report = verify(tmp_path)
    assert any("another log begins here" in problem.what for problem in report.problems)


async def test_the_log_of_another_node_is_not_gone_on_with(tmp_path: Path) -> None:
    open_log(tmp_path, key=OTHER).close()
    log = open_log(tmp_path)
    assert log.findings[0][0] == "log.damaged"
    log.close()
    begun = [json.loads(path.read_bytes().splitlines()[0]) for path in files(tmp_path)]
    assert [record["node"] for record in begun] == [str(OTHER.peer_id), str(KEY.peer_id)]


async def test_a_log_that_lost_its_end_is_said_at_the_start(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    await write(log, 5)
    log.close()
    path = files(tmp_path)[0]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    log = open_log(tmp_path)
    assert log.findings == [("log.truncated", {"last": 4, "checkpoint": 6})]
    audit = records_to(log)
    await audit.admit("e")
    log.close()
    assert "log.truncated" in events(tmp_path), "it is on record, too"


async def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file")
    with pytest.raises(ConfigError) as caught:
        open_log(tmp_path / "audit")
    assert caught.value.code == "config.audit"
    assert caught.value.hint


# --- a disk that fails ----------------------------------------------------------------------------


async def test_a_full_disk_refuses_what_is_given_and_never_what_is_taken(tmp_path: Path) -> None:
    disk = Disk()
    log = open_log(tmp_path, open_file=disk)
    audit = records_to(log)
    await audit.admit("login.granted", n=1)
    disk.left = 30  # less than a record: what a real disk would write in part
    with pytest.raises(Unrecorded, match="No space left") as caught:
        await audit.admit("login.granted", n=2)
    assert "free disk space" in caught.value.hint
    started = time.monotonic()
    audit.record("grant.revoked", n=3)  # no wait, no error
    assert time.monotonic() - started < 2
    disk.left = 0
    with pytest.raises(Unrecorded):
        await audit.admit("login.granted", n=4)
    assert log.failing
    disk.left = None
    await until(lambda: not log.failing)
    await audit.admit("login.granted", n=5)
    log.close()
    found = records(tmp_path)
    assert [record["n"] for record in found if "n" in record] == [1, 3, 5]
    (outage,) = (record for record in found if record["event"] == "log.resumed")
    assert (outage["refused"], outage["since_ms"]) == (2, 1_000_000)
    assert verify(tmp_path).ok, "nothing of a failed write is left"


async def test_what_has_taken_effect_is_stamped_when_it_happened(tmp_path: Path) -> None:
    disk, clock = Disk(), Clock()
    log = open_log(tmp_path, open_file=disk, clock=clock)
    audit = records_to(log, clock)
    disk.left = 0
    audit.record("grant.revoked")
    await until(lambda: log.failing)
    clock.now += 60
    disk.left = None
    await until(lambda: not log.failing)
    log.close()
    assert [r["time_ms"] for r in records(tmp_path) if r["event"] == "grant.revoked"] == [1_000_000]


async def test_on_full_continue_goes_on_and_records_the_gap(tmp_path: Path) -> None:
    disk, clock = Disk(), Clock()
    log = open_log(tmp_path, open_file=disk, clock=clock, on_full="continue")
    audit = records_to(log, clock)
    disk.left = 0
    for _ in range(3):
        await audit.admit("login.granted")
    assert log.failing
    clock.now += 5
    disk.left = None
    await until(lambda: not log.failing)
    await audit.admit("login.granted")
    log.close()
    gap = next(record for record in records(tmp_path) if record["event"] == "log.gap")
    assert (gap["lost"], gap["since_ms"]) == (3, 1_000_000)
    assert events(tmp_path).count("login.granted") == 1
    assert verify(tmp_path).ok


async def test_a_long_outage_is_bounded_and_the_gap_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OWED_RECORDS_MAX", 10)
    disk = Disk()
    log = open_log(tmp_path, open_file=disk)
    audit = records_to(log)
    disk.left = 0
    for number in range(25):
        audit.record("grant.revoked", n=number)
    await until(lambda: log.lost == 15)
    disk.left = None
    await until(lambda: not log.failing)
    log.close()
    found = records(tmp_path)
    assert [r["n"] for r in found if r["event"] == "grant.revoked"] == list(range(15, 25))
    assert [r["lost"] for r in found if r["event"] == "log.gap"] == [15]
    assert verify(tmp_path).ok


async def test_a_disk_that_fails_while_no_file_can_be_opened_leaves_the_log_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    crowded = False

    def opened(path: Path) -> Any:
        if crowded:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return disk(path)

    monkeypatch.setattr(module, "RETRY_S", 0.02)
    log = open_log(tmp_path, open_file=opened)
    await write(log, 3)
    disk.left, crowded = 20, True
    with pytest.raises(Unrecorded):
        await write(log, 1)
    log.append_soon({"event": "grant.revoked", "grant": "kept"})
    disk.left = None
    await asyncio.sleep(0.1)  # room again, and still no file to be opened
    crowded = False
    async with asyncio.timeout(60):
        while True:
            try:
                await write(log, 1)
                break
            except Unrecorded:
                await asyncio.sleep(0.02)
    log.close()
    assert verify(tmp_path).ok
    assert "grant.revoked" in events(tmp_path)


async def test_the_reserved_space_is_for_what_has_taken_effect(tmp_path: Path) -> None:
    """On a disk that is full but for it: a revocation is recorded, a login is not."""

    class Full(Disk):
        def __call__(self, path: Path) -> Any:
            file = super().__call__(path)
            inner = file.write

            def write_(data: Any) -> int:
                held = self.full and (tmp_path / RESERVED_FILE).stat().st_size > MARK_BYTES
                self.left = 0 if held else None
                return int(inner(data))

            file.write = write_
            return file

        full = False

    disk = Full()
    log = open_log(tmp_path, open_file=disk)
    audit = records_to(log)
    assert (tmp_path / RESERVED_FILE).stat().st_size == RESERVED_BYTES
    disk.full = True
    login = asyncio.create_task(audit.admit("login.granted"))
    audit.denied("call.denied", key=1)
    audit.record("grant.revoked", by="its holder")
    with pytest.raises(Unrecorded):
        await login
    assert "grant.revoked" not in events(tmp_path), "nobody else takes it"
    audit.ended("grant.revoked")
    await until(lambda: "grant.revoked" in events(tmp_path))
    with pytest.raises(Unrecorded):  # also once there is the room that the reserve had
        await audit.admit("login.granted")
    assert "login.granted" not in events(tmp_path)
    assert log.failing
    assert events(tmp_path).count("grant.revoked") == 1
    disk.full = False
    await until(lambda: not log.failing)
    await audit.admit("login.granted")
    assert (tmp_path / RESERVED_FILE).stat().st_size == RESERVED_BYTES
    log.close()
    assert events(tmp_path).count("grant.revoked") == 2
    assert "call.denied" in events(tmp_path)
    assert verify(tmp_path).ok


async def test_a_disk_that_hangs_delays_no_revocation_and_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wetware.base.writer.WAITING_MAX", 20)
    go_on = threading.Event()

    class Hanging(Disk):
        def __call__(self, path: Path) -> Any:
            file = super().__call__(path)
            inner = file.write

            def write_(data: Any) -> int:
                if hang.is_set():
                    go_on.wait(60)
                return int(inner(data))

            file.write = write_
            return file

    hang = threading.Event()
    log = open_log(tmp_path, open_file=Hanging())
    audit = records_to(log)
    hang.set()
    waiting = [asyncio.create_task(audit.admit("login.granted")) for _ in range(20)]
    await asyncio.sleep(0)
    with pytest.raises(Unrecorded, match="WAITING_MAX"):
        await audit.admit("login.granted")
    for _ in range(500):
        audit.record("grant.revoked")
    assert log._writer.queued <= 2 * 20
    go_on.set()
    await asyncio.gather(*waiting)
    await audit.admit("login.granted")
    log.close()
    found = records(tmp_path)
    kept = sum(record["event"] == "grant.revoked" for record in found)
    assert kept + sum(r["lost"] for r in found if r["event"] == "log.gap") == 500
    assert verify(tmp_path).ok


# --- fsync ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["batch", "interval", "never"])
async def test_when_records_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    log = open_log(tmp_path, fsync=policy, interval_s=0.2, checkpoint_s=1000)
    await asyncio.sleep(0)
    synced: list[float] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(time.monotonic())
        real(fd)

    monkeypatch.setattr(module.os, "fsync", fsync)
    await write(log, 5)
    before = len(synced)
    if policy == "batch":
        assert before == 5, "each of them before it was acknowledged"
    else:
        assert before <= 1
    log.append_soon({"event": "grant.revoked"})
    if policy == "never":
        await asyncio.sleep(0.5)
        assert not synced
    else:
        await until(lambda: len(synced) > before)
    log.close()


async def test_a_file_is_on_the_disk_before_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path, file_bytes_max=1 << 16, interval_s=3600, checkpoint_s=1000)
    synced: dict[str, int] = {}
    real = os.fsync

    def fsync(fd: int) -> None:
        synced[Path(os.readlink(f"/proc/self/fd/{fd}")).name] = os.fstat(fd).st_size
        real(fd)

    monkeypatch.setattr(module.os, "fsync", fsync)
    while len(files(tmp_path)) < 2:
        log.append_soon({"event": "grant.revoked", "reason": "x" * 1000})
        await asyncio.sleep(0)
    first = files(tmp_path)[0]
    assert synced[first.name] == first.stat().st_size
    log.close()


async def test_no_record_is_signed_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(
        tmp_path, fsync="interval", interval_s=3600, checkpoint_records=5, checkpoint_s=1000
    )
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, os.fstat(fd).st_size))
        real(fd)

    monkeypatch.setattr(module.os, "fsync", fsync)
    await write(log, 5)
    await until(lambda: any(name == CHECKPOINTS_FILE for name, _ in synced))
    (kept,) = files(tmp_path)
    (name, size), *_ = synced
    signed = read_checkpoints(tmp_path / CHECKPOINTS_FILE)[0][0]
    assert name == kept.name
    assert kept.read_bytes()[:size].count(b"\n") >= signed.seq
    log.close()


async def test_what_waits_together_shares_an_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path, checkpoint_s=1000)
    count = 0
    real = os.fsync

    def fsync(fd: int) -> None:
        nonlocal count
        count += 1
        time.sleep(0.01)
        real(fd)

    monkeypatch.setattr(module.os, "fsync", fsync)
    await asyncio.gather(*(log.append({"event": "e"}) for _ in range(300)))
    assert count < 30
    log.close()


async def test_checkpoints_are_signed_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    log = open_log(tmp_path, checkpoint_records=10)
    await write(log, 35)
    log.close()
    report = verify(tmp_path)
    assert report.checkpoints >= 4
    assert log.last_checkpoint is not None
    assert log.last_checkpoint.seq == report.last


# --- what has taken effect, before its answer -----------------------------------------------------


async def test_who_waits_knows_that_what_was_recorded_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path, interval_s=3600, checkpoint_s=1000)
    audit = records_to(log)
    synced = 0
    real = os.fsync

    def fsync(fd: int) -> None:
        nonlocal synced
        real(fd)
        synced = os.fstat(fd).st_size

    monkeypatch.setattr(module.os, "fsync", fsync)
    for number in range(20):
        audit.record("grant.revoked", n=number)
        assert await audit.written()
        assert records(tmp_path)[-1]["n"] == number
        assert synced == files(tmp_path)[0].stat().st_size
    log.close()
    assert not await audit.written()
    assert verify(tmp_path).ok


async def test_a_disk_that_fails_keeps_nobody_waiting_and_the_gap_is_recorded(
    tmp_path: Path,
) -> None:
    disk = Disk()
    log = open_log(tmp_path, open_file=disk)
    audit = records_to(log)
    disk.left = 0
    audit.record("grant.revoked", n=1)
    assert not await audit.written()
    disk.left = None
    await until(lambda: not log.failing)
    assert await audit.written()
    log.close()
    assert [r["event"] for r in records(tmp_path)][-2:] == ["log.resumed", "grant.revoked"]


async def test_a_disk_that_hangs_keeps_nobody_waiting_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wetware.broker.records.WRITTEN_S", 0.05)
    go_on = threading.Event()
    log = open_log(tmp_path)
    audit = records_to(log)
    real = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda fd: (go_on.wait(60), real(fd))[1])
    audit.record("grant.revoked")
    assert not await audit.written()
    go_on.set()
    assert await audit.written()
    log.close()
    assert "grant.revoked" in events(tmp_path)


async def test_admission_is_refused_once_the_node_stops(tmp_path: Path) -> None:
    log: AuditLog = open_log(tmp_path)
    log.close()
    with pytest.raises(Unrecorded, match="stopping"):
        await log.append({"event": "e"})
    log.append_soon({"event": "e"})
    log.close()
    assert len(records(tmp_path)) == 1
