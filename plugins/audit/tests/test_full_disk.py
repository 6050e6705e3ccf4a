"""The audit log on a disk that is full to the last byte."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from wetware.base.disk import MARK_BYTES, RESERVED_BYTES, RESERVED_FILE
from wetware.errors import Unrecorded
from wetware_audit.chain import CHECKPOINTS_FILE, files
from wetware_audit.verify import verify

from .parts import open_log, records_to, until

pytestmark = pytest.mark.anyio


def text(directory: Path) -> str:
    return "".join(path.read_text() for path in files(directory))


async def test_nobody_uses_the_reserve_up_with_denials_and_ends_of_their_own(
    small_disk: Any, tmp_path: Path
) -> None:
    directory = small_disk.path / "audit"
    log = open_log(directory)
    audit = records_to(log)
    small_disk.fill()
    for number in range(3000):
        audit.denied("call.denied", key=number, why="x" * 900)
        audit.record("grant.revoked", by="its holder", why="x" * 900)
    with pytest.raises(Unrecorded):
        await audit.admit("login.granted")
    audit.ended("grant.revoked", by="an operator")
    await until(lambda: "an operator" in text(directory))
    assert log.reserve.marked, "what waits would be lost in a crash, and that be said"

    def taken_back() -> bool:  # no room alone may be a large piece that is tried and does not fit
        whole = (directory / RESERVED_FILE).stat().st_size > RESERVED_BYTES // 2
        return whole and not small_disk.free_bytes

    await until(taken_back)  # what the record has left
    copy = tmp_path / "copy"  # what a kill -9 leaves
    shutil.copytree(directory, copy)
    assert verify(copy).ok
    assert "an operator" in text(copy)
    small_disk.free()
    await until(lambda: not log.failing)
    log.close()
    assert verify(directory).ok
    assert text(directory).count("grant.revoked") == 3001


async def test_records_that_a_crash_may_have_lost_are_said_at_the_next_start(
    small_disk: Any, tmp_path: Path
) -> None:
    directory = small_disk.path / "audit"
    log = open_log(directory)
    audit = records_to(log)
    with log.reserve.open():
        small_disk.fill()
    assert (directory / RESERVED_FILE).stat().st_size == MARK_BYTES
    size = files(directory)[-1].stat().st_size
    while files(directory)[-1].stat().st_size < -(-size // 4096) * 4096 - 400:
        audit.ended("grant.revoked", n=0)  # what the last block has room for
        await asyncio.sleep(0.01)
    for number in range(1, 6):
        audit.ended("grant.revoked", n=number)
    await until(lambda: log.reserve.marked)
    shutil.copytree(directory, tmp_path / "copy")
    small_disk.free()
    await until(lambda: not log.reserve.marked)
    log.close()
    after = open_log(tmp_path / "copy")
    again = records_to(after)
    await again.admit("login.granted")
    after.close()
    assert "log.not_durable" in text(tmp_path / "copy")
    assert verify(tmp_path / "copy").ok
    third = open_log(tmp_path / "copy")
    assert not third.findings, "it is said once"
    third.close()


async def test_a_start_on_a_full_disk_goes_on_and_says_that_the_reserve_is_missing(
    small_disk: Any,
) -> None:
    directory = small_disk.path / "audit"
    log = open_log(directory)
    await log.append({"event": "x"})
    log.close()
    with files(directory)[-1].open("ab") as file:  # torn by a crash
        file.write(b'{"seq":')
    (directory / RESERVED_FILE).unlink()
    small_disk.fill()
    with pytest.raises(Exception, match="No space left") as refused:
        open_log(directory)  # what is torn has no place to be put aside to
    assert "free" in refused.value.hint
    small_disk.free()
    open_log(directory).close()
    (directory / RESERVED_FILE).unlink()
    small_disk.fill()
    log = open_log(directory)
    assert "No space left" in log.reserve.missing
    assert "reserve" in log.failing
    assert not (directory / RESERVED_FILE).exists()
    with pytest.raises(Unrecorded):
        await log.append({"event": "x"})
    small_disk.free()
    await until(lambda: not log.failing)
    await log.append({"event": "x"})
    log.close()


async def test_a_new_file_is_begun_on_a_full_disk(small_disk: Any) -> None:
    directory = small_disk.path / "audit"
    log = open_log(directory, file_bytes_max=65_536)
    audit = records_to(log)
    small_disk.fill()
    for part in range(1, 4):
        for number in range(100):
            audit.ended("grant.revoked", n=number, why="x" * 600)
        await until(lambda: text(directory).count("grant.revoked") == part * 100)  # noqa: B023
    log.close()
    assert len(files(directory)) > 1
    assert verify(directory).ok


async def test_a_torn_end_is_put_aside_on_a_full_disk(small_disk: Any) -> None:
    directory = small_disk.path / "audit"
    open_log(directory).close()
    with files(directory)[-1].open("ab") as file:
        file.write(b'{"seq":')
    small_disk.fill()
    log = open_log(directory)
    assert [event for event, _ in log.findings] == ["log.torn"]
    log.close()
    assert len(list(directory.glob("torn-*.bin"))) == 1


async def test_a_checkpoint_that_has_no_room_leaves_no_half_of_it(small_disk: Any) -> None:
    directory = small_disk.path / "audit"
    log = open_log(directory, checkpoint_records=1)
    await log.append({"event": "x"})
    path = directory / CHECKPOINTS_FILE
    await until(lambda: path.exists() and path.read_bytes().endswith(b"\n"))
    good = path.read_bytes()
    with path.open("ab") as file:  # up to near the end of a block
        file.write(good * ((4096 - len(good)) // len(good)))
    whole = (directory / CHECKPOINTS_FILE).read_bytes()
    small_disk.fill()
    log.append_soon({"event": "y"}, reserved=True)
    await until(lambda: "y" in text(directory))
    log.close()
    small_disk.free()
    assert (directory / CHECKPOINTS_FILE).read_bytes() == whole
    log = open_log(directory)
    assert not log.findings
    log.close()
