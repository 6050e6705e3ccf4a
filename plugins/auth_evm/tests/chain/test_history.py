"""What outlives the node: torn, damaged, edited files; kill -9; a full disk."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugins.auth_evm.tests.chain.net import BOUNDS, FakeClock, Net, raw
from plugins.auth_evm.tests.contract.chains import INSTALL, Log, find_anvil
from plugins.auth_evm.tests.contract.model import Model, encode_event
from plugins.auth_evm.tests.contract.people import ALICE, BOB, MEMBER, OWNER, TEAM

from wetware.base.disk import RESERVED_FILE
from wetware.errors import ConfigError
from wetware_auth_evm.chain import history as module
from wetware_auth_evm.chain.events import Event, decode
from wetware_auth_evm.chain.history import EVENTS_FILE, STATE_FILE, History
from wetware_auth_evm.chain.replica import Replica

pytestmark = pytest.mark.anyio
anvil = pytest.mark.skipif(find_anvil() is None, reason=f"anvil is not installed; run: {INSTALL}")
CONTRACT = "0x" + "c0" * 20
CHAIN_ID = 31337
ALICE_ = raw(ALICE)


def decoded(log: Log) -> Event:
    return decode(log.topics, log.data)


class Fed:
    """A replica that is fed with the events of a model, a block for each."""

    def __init__(self, directory: Path) -> None:
        self.clock = FakeClock()
        self.replica = blank(self.clock)
        self.history = History(directory)
        self.model = Model(CHAIN_ID, CONTRACT, OWNER)
        self.events = [decoded(encode_event(CONTRACT, e)) for e in self.model._pending]
        self.block = 0

    def grant(self, rights: int = 1, account: str = ALICE) -> None:
        now = int(self.clock.time())
        args = (TEAM, MEMBER, account, 0, now + 1000, rights)
        made = self.model.apply("grant", args, OWNER, now)
        self.events += [decoded(encode_event(CONTRACT, e)) for e in made]

    def step(self, *, final: bool = True) -> bool:
        self.block += 1
        hash_ = self.block.to_bytes(32, "big")
        head = (self.model.seq, self.model.head)
        self.replica.set_tip(self.block, *head, self.events)
        settled = self.replica.settle(self.block, hash_, *head) if final else []
        self.replica.verified(self.block, hash_, int(self.clock.time()))
        return self.history.save(self.replica, settled)


def blank(clock: FakeClock | None = None) -> Replica:
    clock = clock or FakeClock()
    return Replica(CHAIN_ID, raw(CONTRACT), TEAM, bounds=BOUNDS, clock=clock)


def loaded(directory: Path) -> Replica:
    replica = blank()
    History(directory).load(replica)
    return replica


def same(one: Replica, two: Replica) -> bool:
    def everything(r: Replica) -> tuple[Any, ...]:
        states = [
            (s.seq, s.head, s.owner, s.paused, s.grants, s.admins, s.keys, s.account_epochs)
            for s in (r.final, r.tip)
        ]
        return (states, r.final_block, r.tip_block, r.unsettled, r.held, r.regressed)

    return everything(one) == everything(two)


def test_what_was_kept_is_put_back(tmp_path: Path) -> None:
    fed = Fed(tmp_path / "new")
    fed.grant(1)
    fed.grant(1, BOB)
    assert fed.step()
    fed.grant(3)
    assert fed.step(final=False)
    fed.replica.held = {ALICE_: 7, None: 9}
    fed.history.save(fed.replica)
    again = loaded(tmp_path / "new")
    assert same(again, fed.replica)
    assert [e.seq for e in again.unsettled] == [4]
    assert again.unfit() == "nothing was verified yet"
    for name in (EVENTS_FILE, STATE_FILE):
        assert stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_it_goes_on_appending_after_a_restart(tmp_path: Path) -> None:
    fed = Fed(tmp_path)
    fed.grant()
    fed.step()
    fed.history = History(tmp_path)
    assert fed.history.load(blank())
    fed.grant(3)
    fed.step()
    assert same(loaded(tmp_path), fed.replica)
    assert len((tmp_path / EVENTS_FILE).read_text().splitlines()) == 3


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    fed = Fed(tmp_path)
    fed.step()
    before = (tmp_path / STATE_FILE).stat().st_ino
    fed.step()
    assert (tmp_path / STATE_FILE).stat().st_ino == before
    fed.block += module.BLOCKS_MAX
    fed.step()
    assert (tmp_path / STATE_FILE).stat().st_ino != before, "but for the final block now and then"
    assert loaded(tmp_path).final_block == fed.replica.final_block


# --- damage -------------------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "events_torn": lambda d: os.truncate(d / EVENTS_FILE, (d / EVENTS_FILE).stat().st_size - 5),
    "events_missing": lambda d: (d / EVENTS_FILE).unlink(),
    "events_empty": lambda d: (d / EVENTS_FILE).write_bytes(b""),
    "events_zeros": lambda d: (d / EVENTS_FILE).write_bytes(bytes(4096)),
    "events_bit": lambda d: _flip(d / EVENTS_FILE, 700),
    "events_not_ascii": lambda d: (d / EVENTS_FILE).write_bytes(b"\xff" * 100),
    "events_swapped": lambda d: (d / EVENTS_FILE).write_text(
        "".join(reversed((d / EVENTS_FILE).read_text().splitlines(keepends=True)))
    ),
    "events_long_line": lambda d: (d / EVENTS_FILE).write_text("ab" * 10_000_000),
    "state_torn": lambda d: os.truncate(d / STATE_FILE, 100),
    "state_empty": lambda d: (d / STATE_FILE).write_bytes(b""),
    "state_list": lambda d: (d / STATE_FILE).write_text("[]"),
    "state_deep": lambda d: (d / STATE_FILE).write_text("[" * 900),
    "state_version": lambda d: _edit(d / STATE_FILE, lambda k: k.update(v=2)),
    "state_seq": lambda d: _edit(d / STATE_FILE, lambda k: k.update(seq=1)),
    "state_type": lambda d: _edit(d / STATE_FILE, lambda k: k.update(seq="x")),
    "state_held_dropped": lambda d: _edit(d / STATE_FILE, lambda k: k.update(held=[])),
    "state_regressed_dropped": lambda d: _edit(d / STATE_FILE, lambda k: k.update(regressed="")),
    "state_final": lambda d: _edit(d / STATE_FILE, lambda k: k.update(final=[1, "00"])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_reported_and_read_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fed = Fed(tmp_path)
    fed.grant(1)
    fed.grant(1, BOB)
    fed.step()
    fed.replica.held, fed.replica.regressed = {ALICE_: 5}, "gone"
    fed.history.save(fed.replica)
    DAMAGE[damage](tmp_path)
    replica, history = blank(), History(tmp_path)
    assert history.load(replica) is False
    assert same(replica, blank()), "nothing of it is believed"
    assert "replica.damaged" in caplog.text
    # And the next node writes files that are right.
    fed.history, fed.replica, fed.clock = history, replica, FakeClock()
    fed.step()
    assert same(loaded(tmp_path), fed.replica)
    assert loaded(tmp_path).final.seq == 3


def test_files_of_another_contract_stop_the_node(tmp_path: Path) -> None:
    fed = Fed(tmp_path)
    fed.step()
    for other in (
        Replica(1, raw(CONTRACT), TEAM, bounds=BOUNDS, clock=FakeClock()),
        Replica(CHAIN_ID, b"\1" * 20, TEAM, bounds=BOUNDS, clock=FakeClock()),
        Replica(CHAIN_ID, raw(CONTRACT), MEMBER, bounds=BOUNDS, clock=FakeClock()),
    ):
        with pytest.raises(ConfigError, match="another one is configured") as caught:
            History(tmp_path).load(other)
        assert "--data-dir" in caught.value.hint


def test_files_that_cannot_be_read_stop_the_node(tmp_path: Path) -> None:
    """They may say that the chain regressed."""
    (tmp_path / STATE_FILE).mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        History(tmp_path).load(blank())


@anvil
async def test_edited_files_that_fit_together_do_not_fit_the_contract(
    chain: Net, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A forged grant, with hash and checksum made anew: read anew, and not allowed."""
    async with chain.follower(directory=tmp_path) as follower:
        chain.grant(BOB)
        chain.mine(2)
        await follower.look()
        replica = follower.replica
        model = Model(CHAIN_ID, chain.acl.address, OWNER)
        now = chain.chain.time
        made = [
            *model._pending,
            *model.apply("grant", (TEAM, MEMBER, ALICE, 0, now + 9, 1), OWNER, now),
        ]
        forged = [decoded(encode_event(chain.acl.address, e)) for e in made]
        fresh = chain.replica()
        fresh.set_tip(1, model.seq, model.head, forged)
        settled = fresh.settle(*replica.final_block, model.seq, model.head)
        fresh.tip_block = replica.tip_block
        history = History(tmp_path)
        assert history.save(fresh, settled)
    async with chain.follower(directory=tmp_path) as follower:
        assert follower.replica.known_roles(ALICE_) == {MEMBER: 1}, "the forgery was loaded"
        chain.mine(1)
        assert await follower.look() is None
        assert (follower.replica.unfit(), "replica.doubted" in caplog.text) == ("", True)
        assert follower.replica.rights(MEMBER, ALICE_) == 0
        assert follower.replica.known_roles(ALICE_) == {}
        chain.mine(2)
        await follower.look()
        assert follower.replica.rights(MEMBER, raw(BOB)) == 1
    async with chain.follower(directory=tmp_path) as follower:
        assert follower.replica.known_roles(raw(BOB)) == {MEMBER: 1}


# --- crashes ------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
from plugins.auth_evm.tests.chain.test_history import Fed
from wetware_auth_evm.chain import history

fed = Fed(Path(sys.argv[1]))
fed.grant()
fed.step()
fed.grant(3)
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "between":
    history.replace_private_file = die
elif sys.argv[2] == "torn":
    pwrite = os.pwrite
    def torn(fd, data, at):
        pwrite(fd, data[: len(data) // 2], at)
        die()
    os.pwrite = torn
elif sys.argv[2] == "before":
    os.pwrite = die
fed.step()
"""


@pytest.mark.parametrize("when", ["before", "torn", "between"])
def test_kill_9_while_the_files_are_written(tmp_path: Path, when: str) -> None:
    """The older state is there, whole, and it goes on from it."""
    from plugins.auth_evm.tests.contract.chains import PLUGIN

    root = PLUGIN.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), when],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    replica, history = blank(), History(tmp_path)
    assert history.load(replica)
    assert replica.final.seq == 2
    fed = Fed(tmp_path)
    fed.history, fed.replica = history, replica
    fed.grant()
    fed.grant(3)
    fed.step()
    assert loaded(tmp_path).final.seq == 3
    assert same(loaded(tmp_path), fed.replica)


def test_every_prefix_of_a_crash_is_right_or_read_anew(tmp_path: Path) -> None:
    """However much of the events reached the disk, what is loaded is a state that there was."""
    fed = Fed(tmp_path)
    heads = {0: blank().final.head}
    for rights in (1, 3, 7):
        fed.grant(rights)
        fed.step()
        heads[fed.replica.final.seq] = fed.replica.final.head
    whole = (tmp_path / EVENTS_FILE).read_bytes()
    rng = random.Random(5)
    for size in [0, len(whole), *(rng.randrange(len(whole)) for _ in range(40))]:
        (tmp_path / EVENTS_FILE).write_bytes(whole[:size])
        final = loaded(tmp_path).final
        assert heads[final.seq] == final.head
        assert final.seq in (0, fed.replica.final.seq)


# --- the disk -----------------------------------------------------------------------------------


def full(*args: object, **more: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_no_decision_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fed = Fed(tmp_path)
    fed.grant(1)
    fed.step()
    kept = fed.replica.final.seq
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for rights in (3, 7, 15):
            fed.grant(rights)
            assert fed.step() is False
            assert fed.replica.rights(MEMBER, ALICE_) == rights
    assert caplog.text.count("replica.not_saved") == 1, "said once"
    assert loaded(tmp_path).final.seq == kept, "the older state is whole"
    assert fed.step() is True
    assert same(loaded(tmp_path), fed.replica)


def test_who_is_held_is_on_a_disk_that_is_full(small_disk: Any) -> None:
    fed = Fed(small_disk.path)
    fed.grant(1)
    fed.step()
    small_disk.fill()
    fed.grant(3)
    assert fed.step() is False
    fed.replica._hold(ALICE_, 90)
    assert fed.step() is True
    assert not small_disk.free_bytes
    assert loaded(small_disk.path).is_held(ALICE_)
    fed.replica.regressed = "it went back"
    assert fed.step() is True
    assert loaded(small_disk.path).regressed == "it went back"


def test_who_may_have_been_held_before_a_crash_is_not_let_in(small_disk: Any) -> None:
    fed = Fed(small_disk.path)
    fed.grant(1)
    fed.step()
    with fed.history.reserve.open():
        small_disk.fill()
    fed.replica._hold(ALICE_, 90)
    assert fed.step() is False
    for _ in range(2):
        assert "crashed on a full disk" in loaded(small_disk.path).regressed
    small_disk.free()
    assert fed.step() is True  # the node goes on, and writes it after all
    assert not loaded(small_disk.path).regressed
    assert loaded(small_disk.path).is_held(ALICE_)
    fed.history.reserve.mark("x")
    fed.history.forget()  # what the operator does
    assert not loaded(small_disk.path).regressed


@pytest.mark.parametrize("written", [0, 1, 100, 703])
def test_a_disk_that_takes_a_part_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    fed = Fed(tmp_path)
    fed.grant(1)
    fed.step()
    pwrite = os.pwrite

    def some(fd: int, data: bytes, at: int) -> int:
        if written:
            pwrite(fd, data[:written], at)
        return full()  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", some)
        fed.grant(3)
        assert fed.step() is False
    assert loaded(tmp_path).final.seq == 2
    fed.grant(7)
    assert fed.step() is True
    assert same(loaded(tmp_path), fed.replica)


def test_short_writes_are_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:50], at))
    fed = Fed(tmp_path)
    fed.grant(1)
    fed.step()
    assert same(loaded(tmp_path), fed.replica)


def test_the_small_file_is_not_replaced_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = Fed(tmp_path)
    fed.step()
    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_private_file", full)
        fed.grant(3)
        assert fed.step() is False
    assert loaded(tmp_path).final.seq == 1
    assert fed.step() is True
    assert same(loaded(tmp_path), fed.replica)


def test_a_disk_that_stays_full_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PENDING_MAX", 3)
    fed = Fed(tmp_path)
    fed.step()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for rights in range(1, 6):
            fed.grant(rights)
            fed.step()
    assert "replica.not_kept" in caplog.text
    assert fed.history._pending == []
    assert fed.step() is False, "there would be a gap"
    assert loaded(tmp_path).final.seq == 1


def test_a_long_history_read_at_once_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is on what a failing disk did not take, not on what there is."""
    monkeypatch.setattr(module, "PENDING_MAX", 3)
    fed = Fed(tmp_path)
    for rights in range(1, 9):
        fed.grant(rights)
    assert fed.step() is True
    assert same(loaded(tmp_path), fed.replica)


# --- the operator -------------------------------------------------------------------------------


def test_forgetting_removes_everything(tmp_path: Path) -> None:
    fed = Fed(tmp_path)
    fed.replica.regressed = "what was final is not"
    fed.step()
    assert (status := fed.history.status()) is not None
    assert status["regressed"] == "what was final is not"
    assert (status["seq"], status["final"][0], status["held"]) == (1, 1, [])
    fed.history.ask_to_forget()
    assert fed.history.forget_asked()
    again = History(tmp_path)
    assert again.load(blank()) is False
    assert again.status() is None
    assert [path.name for path in tmp_path.iterdir()] == [RESERVED_FILE]
    again.forget()
