"""The shared reserve, and the writers that go on without a disk."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.base.disk import MARK_BYTES, RESERVED_BYTES, RESERVED_FILE, Reserve, remedy
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.errors import ConfigError, KeyFileError
from wetware.identity import Key, PeerId
from wetware.node.data_dir import locked
from wetware.overlay.membership.peers import IncarnationFile, PeerStore
from wetware.testing import Home

PEER = PeerId.parse(str(Key.from_seed(b"p" * 32).peer_id))


def size(directory: Path) -> int:
    return (directory / RESERVED_FILE).stat().st_size


def test_what_an_open_reserve_leaves_is_taken_back_to_the_last_block(small_disk: Any) -> None:
    reserve = Reserve(small_disk.path)
    assert reserve.fill()
    small_disk.fill()
    with reserve.open():
        assert small_disk.free_bytes == RESERVED_BYTES - MARK_BYTES
        (small_disk.path / "end").write_bytes(bytes(10_000))
    assert not small_disk.free_bytes
    assert size(small_disk.path) == RESERVED_BYTES - 3 * 4096
    assert "No space left" in reserve.missing
    assert not reserve.fill()
    (small_disk.path / "end").unlink()
    assert reserve.fill()
    assert not reserve.missing
    assert not small_disk.free_bytes


def test_a_copy_with_holes_is_no_reserve(small_disk: Any) -> None:
    with (small_disk.path / RESERVED_FILE).open("wb") as file:
        file.truncate(RESERVED_BYTES)
    small_disk.fill()
    reserve = Reserve(small_disk.path)
    assert not reserve.fill()
    assert reserve.missing


@pytest.mark.parametrize("found", [b"", b"\0" * 100])
def test_an_empty_file_is_no_reserve(small_disk: Any, found: bytes) -> None:
    small_disk.fill()
    (small_disk.path / RESERVED_FILE).write_bytes(b"")
    reserve = Reserve(small_disk.path)
    assert not reserve.fill()
    assert "No space left" in reserve.missing
    assert not (small_disk.path / RESERVED_FILE).exists()


def test_a_mark_outlives_the_process_and_the_use_of_the_reserve(small_disk: Any) -> None:
    reserve = Reserve(small_disk.path)
    reserve.fill()
    small_disk.fill()
    reserve.mark("an end")
    with reserve.open():
        pass
    assert Reserve(small_disk.path).marked == "an end"
    assert size(small_disk.path) == RESERVED_BYTES
    reserve.unmark()
    assert not Reserve(small_disk.path).marked


def test_a_file_that_must_be_written_is_and_another_one_is_not(small_disk: Any) -> None:
    reserve = Reserve(small_disk.path)
    reserve.fill()
    small_disk.fill()
    with pytest.raises(OSError, match="No space left"):
        reserve.replace(small_disk.path / "a", b"x")
    assert size(small_disk.path) == RESERVED_BYTES
    reserve.replace(small_disk.path / "b", b"x", must=True)
    assert (small_disk.path / "b").read_bytes() == b"x"
    assert sorted(p.name for p in small_disk.path.iterdir()) == ["b", "ballast", RESERVED_FILE]


def test_what_to_do_is_said_of_a_full_disk_alone() -> None:
    assert "free some disk space" in remedy(OSError(errno.ENOSPC, "x"))
    assert remedy(OSError(errno.EACCES, "x")) == ""
    assert remedy(ValueError()) == ""


# --- writers that need no reserve: they say it, keep what was there, and go on -------------------


def peers(directory: Path) -> Callable[[], None]:
    store = PeerStore(directory / "file", unix_ms=lambda: 1)

    def write() -> None:
        store.worked(PEER, Multiaddr("ip4", "10.0.0.1", 1 + len(store._peers[PEER].worked)
                                     if PEER in store.peers() else 1))  # fmt: skip
        store.dirty = True
        store.save_now()

    return write


def incarnation(directory: Path) -> Callable[[], None]:
    file = IncarnationFile(directory / "file")
    return lambda: file._reserve(7)


def epoch(directory: Path) -> Callable[[], None]:
    from wetware_pubsub.gossip import EpochFile

    file = EpochFile(directory / "file", get_logger("test"))
    return lambda: file.reserve(7)


def principals(directory: Path) -> Callable[[], None]:
    from wetware_auth_evm.node.roster import Roster

    roster: Any = SimpleNamespace(_file=directory / "file", _log=get_logger("test"), _failing=False)
    return lambda: Roster._write(roster, b"x") and None


def seen_policies(directory: Path) -> Callable[[], None]:
    from wetware_auth_local.client import SeenPolicies
    from wetware_auth_local.policy import Policy

    policy = Policy.first(Key.from_seed(b"o" * 32).peer_id)
    return lambda: SeenPolicies(directory / "file").remember(policy)


@pytest.mark.parametrize("writer", [peers, incarnation, epoch, principals, seen_policies])
def test_it_goes_on_and_leaves_nothing_half_written(
    small_disk: Any, writer: Callable[[Path], Callable[[], None]]
) -> None:
    directory = small_disk.path / "d"
    directory.mkdir()
    write = writer(directory)
    small_disk.fill()
    write()
    assert list(directory.iterdir()) == []
    small_disk.free()
    write()
    assert [path.name for path in directory.iterdir()] == ["file"]


def test_a_key_that_cannot_be_replaced_stays(small_disk: Any) -> None:
    old, path = Key.generate(), small_disk.path / "key"
    old.save(path)
    small_disk.fill()
    with pytest.raises((KeyFileError, OSError)) as caught:
        Key.generate().save(path)
    assert caught.value
    assert Key.load(path).peer_id == old.peer_id
    assert sorted(p.name for p in small_disk.path.iterdir()) == ["ballast", "key"]


def test_the_try_out_chain_refuses_a_block_and_stays_whole(small_disk: Any) -> None:
    from wetware_auth_evm.dev.chain import Store

    store = Store(small_disk.path / "chain")
    store[b"a"] = b"1"
    store.sql.commit()
    small_disk.fill()

    def write() -> None:
        while True:
            store[os.urandom(8)] = os.urandom(8192)
            store.sql.commit()

    with pytest.raises(sqlite3.OperationalError, match="full"):
        write()
    store.sql.rollback()
    kept = store.sql.execute("SELECT count(*) FROM state").fetchone()
    store.sql.close()
    again = Store(small_disk.path / "chain")
    assert again[b"a"] == b"1"
    assert again.sql.execute("SELECT count(*) FROM state").fetchone() == kept
    small_disk.free()
    again[b"b"] = b"2"
    again.sql.commit()
    again.sql.close()


def test_a_data_directory_is_locked_on_a_full_disk(small_disk: Any) -> None:
    directory = small_disk.path / "n"
    with locked(directory):
        pass
    small_disk.fill()
    with locked(directory):
        assert (directory / "lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"), locked(directory):
            pass


def test_a_first_start_on_a_full_disk_says_so(small_disk: Any, tmp_path: Path) -> None:
    with Home(tmp_path / "home") as home:
        small_disk.fill()
        done = home.ww(
            "--data-dir", str(small_disk.path / "n"), "node", "--listen", "/ip4/127.0.0.1/tcp/0"
        )
    assert done.returncode
    assert "No space left" in done.stderr
    assert "defect" not in done.stderr
    assert "unexpected" not in done.stderr, done.stderr
