"""Detached programs: when they are started again, what is kept of them, what they wrote."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import (
    Disconnected,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Revoked,
    Unsupported,
    WetwareError,
)
from wetware.testing import FakeClock, Started, plugin_context
from wetware_proc import logs, supervise
from wetware_proc.client import Executor, spec_of
from wetware_proc.client import Exit as ClientExit
from wetware_proc.config import ProcConfig
from wetware_proc.driver import Exit, Spec
from wetware_proc.logs import Log
from wetware_proc.service import ExecutorServant, ProcService
from wetware_proc.supervise import FAILURES_MAX, PAUSE_S_MAX, STEADY_S, Record, Restarts

from .test_service import Scripts, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
FAILED, DONE = Exit("exited", 1), Exit("exited", 0)


# --- when one is started again --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "exits"),
    [
        ("never", []),
        ("on-failure", ["exited 1", "trapped", "limit", "lost"]),
        ("always", ["exited 0", "exited 1", "trapped", "limit", "lost"]),
    ],
)
def test_a_policy_says_after_which_ends_it_is_started_again(policy: str, exits: list[str]) -> None:
    every = [DONE, FAILED, Exit("trapped"), Exit("limit", why="memory_bytes"), Exit("lost")]
    wanted = [each for each in every if Restarts(policy, FakeClock().monotonic).wanted(each)]
    shown = [f"{e.kind} {e.code}" if e.kind == "exited" else e.kind for e in wanted]
    assert shown == exits


def test_pauses_grow_to_their_longest_and_then_it_is_given_up() -> None:
    clock = FakeClock()
    restarts = Restarts("always", clock.monotonic, random.Random(1))
    pauses = []
    for _ in range(FAILURES_MAX):
        restarts.started()
        clock.now += 1
        pause_s = restarts.pause_s()
        assert pause_s is not None
        pauses.append(pause_s)
        clock.now += pause_s
    for number, pause_s in enumerate(pauses):
        expected = min(PAUSE_S_MAX, 2.0**number)
        assert 0.75 * expected <= pause_s <= 1.25 * expected
    restarts.started()
    assert restarts.pause_s() is None


def test_one_that_has_run_for_long_begins_anew() -> None:
    clock = FakeClock()
    restarts = Restarts("always", clock.monotonic)
    for _ in range(3 * FAILURES_MAX):
        restarts.started()
        clock.now += STEADY_S
        pause_s = restarts.pause_s()
        assert pause_s is not None
        assert pause_s < 2


def test_what_cannot_be_started_is_never_given_up() -> None:
    restarts = Restarts("always", FakeClock().monotonic)
    pauses = [restarts.pause_s(ran=False) for _ in range(3 * FAILURES_MAX)]
    assert None not in pauses
    assert pauses[-1] >= 0.75 * PAUSE_S_MAX  # type: ignore[operator]  # checked above
    assert restarts.pause_s() is not None


# --- what it wrote --------------------------------------------------------------------------------


def test_a_log_keeps_the_last_part_and_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SEGMENT_BYTES", 100)
    log, whole = Log(tmp_path), b""
    for number in range(200):
        piece = b"%d;" % number
        whole += piece
        Log(tmp_path).write(piece)  # a new one each time, as after restarts
        files = list(tmp_path.glob("log.*"))
        assert len(files) <= 2
        assert sum(file.stat().st_size for file in files) < 2 * 104
    got, at = b"", 0
    while True:
        start, data = log.read(at, 30)
        if not data:
            break
        assert len(data) <= 30
        got, at = got + data, start + len(data)
    assert at == len(whole)
    assert whole.endswith(got)
    assert 100 <= len(got) < 208
    assert log.read(len(whole) + 5, 30) == (len(whole) + 5, b"")


@pytest.mark.parametrize("torn", ["shorter", "zeros", "nothing"])
def test_a_log_whose_end_went_with_the_machine_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str
) -> None:
    monkeypatch.setattr(logs, "SEGMENT_BYTES", 100)
    log = Log(tmp_path)
    log.write(b"a" * 150)
    log.settle()
    log.write(b"b" * 40)
    last = tmp_path / "log.100"
    Log(tmp_path).recover()  # the node alone was started again: nothing is lost
    assert Log(tmp_path).read(100, 1000) == (100, b"a" * 50 + b"b" * 40)

    if torn == "shorter":
        os.truncate(last, 60)
    elif torn == "zeros":
        os.truncate(last, 60)
        os.truncate(last, 90)
    else:
        os.truncate(last, 0)
    monkeypatch.setattr(logs, "boot_id", lambda: "another")
    log = Log(tmp_path)
    log.recover()
    kept = b"a" * 50 + b"b" * 10 if torn != "nothing" else b""
    assert log.read(100, 1000) == ((100, kept) if kept else (200, logs.LOST))
    assert log.read(190, 1000) == (200, logs.LOST), "who had read to the end goes on there"
    log.write(b"on")
    assert log.read(200 + len(logs.LOST), 1000) == (200 + len(logs.LOST), b"on")
    Log(tmp_path).recover()
    assert len(list(tmp_path.glob("log.*"))) == 2


def test_a_log_that_was_ended_before_the_machine_went_down_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(tmp_path)
    log.write(b"all of it")
    log.settle()
    log.settle()
    monkeypatch.setattr(logs, "boot_id", lambda: "another")
    log = Log(tmp_path)
    log.recover()
    assert log.read(0, 100) == (0, b"all of it")


def test_a_record_is_what_was_kept() -> None:
    record = Record("id", "ada", "wasm", "ab", 2, {"name": "it"}, "always", "grant", 1.0)
    assert Record.decode(record.encode()) == record
    ended = replace(record, exit=Exit("limit", why="cpu_s"), over=True)
    assert Record.decode(ended.encode()) == ended


# --- the service ----------------------------------------------------------------------------------


async def nothing() -> None:
    pass


class Grants:
    """A node's durable grants, over restarts of the service."""

    def __init__(self) -> None:
        self.living: dict[str, Kept] = {}
        self.made: Callable[[], Awaitable[object]] = nothing

    async def derive_durable(self, session: rpc.Ref, label: str, asked: Any, keep: Any) -> Kept:
        if any(what == "none" for what, _ in asked.values()):
            raise Unsupported("there is no such service")
        kept = Kept(self, f"grant{len(self.living)}", label, asked)
        await keep(kept.id)
        self.living[kept.id] = kept
        await self.made()
        return kept

    async def derived(self, id_: str) -> Kept:
        if id_ not in self.living:
            raise Revoked("it was revoked while the node was down")
        return self.living[id_]


class Kept:
    ended: WetwareError | None = None

    def __init__(self, grants: Grants, id_: str, label: str, asked: Any) -> None:
        self._grants, self.id, self.label, self.asked = grants, id_, label, asked
        self._callbacks: list[Callable[[WetwareError], None]] = []
        self.missing, self.there = False, asyncio.Event()
        self.there.set()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[dict[str, rpc.Ref]]:
        await self.there.wait()
        if self.missing:
            raise Unsupported("the service is not running")
        yield {}

    def on_end(self, callback: Callable[[WetwareError], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: None

    def end(self, why: str) -> None:
        if self._grants.living.pop(self.id, None) is not None:
            self.ended = Revoked(why)
            for callback in self._callbacks:
                callback(self.ended)


class More(Scripts):
    """Programs that count how often they run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.go = asyncio.Event()

    async def fail(self, spec: Spec) -> Exit:
        self.runs += 1
        spec.stdout(b"run %d\n" % self.runs)
        return FAILED

    async def once(self, spec: Spec) -> Exit:
        """Fails, and holds the next time."""
        return await (self.hold(spec) if self.runs else self.fail(spec))

    async def hold(self, spec: Spec) -> Exit:
        self.runs += 1
        spec.stderr(b"holds\n")
        await self.go.wait()
        return DONE


class World:
    """A service that is started and stopped by the test, on one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.grants, self.scripts = Grants(), More()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Executor]:
        ctx = plugin_context(self._directory, ProcConfig(), name="proc", deriver=self.grants)
        self.service = ProcService(ctx, lambda: contextlib.nullcontext({"wasm": self.scripts}))
        started = Started()
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self.service.run(task_status=started))
            await started.wait()
            try:
                async with self.user("ada") as ada:
                    yield ada
            finally:
                task.cancel()

    @contextlib.asynccontextmanager
    async def user(self, name: str) -> AsyncIterator[Executor]:
        servant = ExecutorServant(self.service, name)
        async with rpc.loopback(servant) as connection:
            ref = connection.bootstrap(Executor.INTERFACE)
            yield Executor(Opened(ref))

    @property
    def root(self) -> Path:
        return self._directory / "detached"

    @property
    def disk(self) -> list[str]:
        found = [path for path in self.root.rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(self.root)) for path in found)

    def records(self) -> list[Any]:
        found = self._directory.glob("detached/*/record.json")
        return [json.loads(path.read_text()) for path in found]


class Opened:
    """As a session's reference to its service."""

    def __init__(self, ref: rpc.Ref) -> None:
        self.call, self.ref, self.connection = ref.call, ref, ref.connection
        self.session = self


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(supervise, "PAUSE_S_MIN", 0.01)
    monkeypatch.setattr(supervise, "PAUSE_S_MAX", 0.02)
    async with rpc.runtime():
        yield World(tmp_path)


async def test_it_goes_on_when_its_spawner_and_the_node_have_gone(world: World) -> None:
    async with world.running() as ada:
        made = await ada.start(b"hold", "a", restart="on-failure", env={"X": "1"}, name="it")
        (info,) = await ada.processes()
        assert (info.id, info.name, info.policy, info.restarts) == (made.id, "it", "on-failure", 0)
        assert (info.exit.kind, info.waits) == ("", False)
        async with asyncio.timeout(60):
            async for data in made.logs(follow=True):
                assert data == b"holds\n"
                break
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await made.wait()
    assert [record["over"] for record in world.records()] == [False]
    async with world.running() as ada:
        await until(lambda: world.scripts.runs == 2)
        again = ada.detached(made.id)
        await until_shown(ada, lambda each: not each.waits)
        (info,) = await ada.processes()
        assert (info.exit.kind, info.restarts) == ("", 1)
        world.scripts.go.set()
        assert (await again.wait()).kind == "exited"
        assert world.grants.living == {}
        assert b"".join([data async for data in again.logs()]) == b"holds\nholds\n"
        with pytest.raises(InvalidArgument, match="for good"):
            await again.restart()
    async with world.running() as ada:
        (info,) = await ada.processes()
        assert (info.exit.kind, info.exit.code, info.waits) == ("exited", 0, False)
        assert world.scripts.runs == 2
        assert [path for path in world.disk if path.endswith("/code")] == []


async def until_shown(ada: Executor, condition: Callable[[Any], bool]) -> None:
    shown = False
    async with asyncio.timeout(60):
        while not shown:
            await asyncio.sleep(0.01)
            shown = all(condition(each) for each in await ada.processes())


async def test_one_that_is_not_to_be_started_again_is_lost_with_its_node(world: World) -> None:
    async with world.running() as ada:
        await ada.start(b"hold")
        await until(lambda: world.scripts.runs == 1)
    async with world.running() as ada:
        await until_shown(ada, lambda each: not each.waits)
        (info,) = await ada.processes()
        assert (info.exit.kind, info.exit.why) == ("lost", "its node has ended")
        await ada.detached(info.id).wait()
        assert world.scripts.runs == 1
    assert world.grants.living == {}


async def test_before_it_is_started_again_it_is_not_shown_as_running(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running() as ada:
        made = await ada.start(b"hold", restart="always")
        await until(lambda: world.scripts.runs == 1)
    (kept,) = world.grants.living.values()
    kept.missing = True
    monkeypatch.setattr(supervise, "PAUSE_S_MIN", 30.0)
    monkeypatch.setattr(supervise, "PAUSE_S_MAX", 30.0)
    async with world.running() as ada:
        await until_shown(ada, lambda each: "cannot be started" in each.exit.why)
        (info,) = await ada.processes()
        assert (info.exit.kind, info.waits) == ("lost", True)
        kept.missing = False
        await ada.detached(made.id).restart()
        await until_shown(ada, lambda each: not each.waits and not each.exit.kind)
        await until(lambda: world.scripts.runs == 2)


async def test_one_that_fails_at_once_is_given_up(world: World) -> None:
    async with world.running() as ada:
        made = await ada.start(b"fail", restart="on-failure")
        exit_ = await made.wait()
        assert (exit_.kind, exit_.code) == ("exited", 1)
        assert "given up after 11 ends" in exit_.why
        assert world.scripts.runs == FAILURES_MAX + 1
        lines = b"".join([data async for data in made.logs(follow=True)]).splitlines()
        assert lines == [b"run %d" % (number + 1) for number in range(FAILURES_MAX + 1)]
    assert world.grants.living == {}
    async with world.running() as ada:
        assert world.scripts.runs == FAILURES_MAX + 1


async def test_kill_ends_it_for_good_also_between_two_runs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running() as ada:
        running = await ada.start(b"hold", restart="always")
        await running.kill()
        assert (await running.wait()).why == "by ada"
        monkeypatch.setattr(supervise, "PAUSE_S_MIN", 30.0)
        monkeypatch.setattr(supervise, "PAUSE_S_MAX", 30.0)
        waiting = await ada.start(b"fail", restart="always")
        await until(lambda: world.service.supervisor.all[waiting.id].record.restarts)
        info = await waiting.info()
        assert (info.waits, info.exit.code) == (True, 1)
        await waiting.kill()
        assert (await waiting.wait()).kind == "killed"
        await waiting.kill()
    assert world.grants.living == {}
    async with world.running() as ada:
        assert {each.exit.kind for each in await ada.processes()} == {"killed"}
        assert not world.service.table.processes


async def test_restart_starts_it_now_and_forgets_its_failures(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running() as ada:
        made = await ada.start(b"hold", restart="never")
        for runs in (2, 3):
            await made.restart()
            await until(lambda runs=runs: world.scripts.runs == runs)
        await until_shown(ada, lambda each: each.exit.kind == "")
        assert (await made.info()).restarts == 2
        async with ada.spawn(b"cat") as attached:
            with pytest.raises(Unsupported, match="not detached"):
                await attached.ref.call("restart")
            with pytest.raises(Unsupported, match="not detached"):
                await attached.ref.call("logs", start=0, wait_s=0.0)


async def test_who_restarts_it_often_does_not_have_it_given_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "PAUSE_S_MIN", 30.0)
    monkeypatch.setattr(supervise, "PAUSE_S_MAX", 30.0)
    monkeypatch.setattr(supervise, "FAILURES_MAX", 2)
    async with world.running() as ada:
        made = await ada.start(b"fail", restart="always")
        each = world.service.supervisor.all[made.id]
        for restarts in range(1, 6):
            await until(lambda n=restarts: each.record.restarts == n)
            await made.restart()
        assert not (await made.info()).exit.why


async def test_how_it_ended_long_ago_is_not_told_of_one_that_its_node_has_ended(
    world: World,
) -> None:
    async with world.running() as ada:
        await ada.start(b"once", restart="always")
        await until(lambda: world.scripts.runs == 2)
        await until_shown(ada, lambda each: not each.exit.kind)
    assert [record["exit"]["kind"] for record in world.records()] == ["exited"]
    world.grants.living[world.records()[0]["grant"]].there.clear()
    async with world.running() as ada:
        assert {each.exit.kind for each in await ada.processes()} == {"lost"}


async def test_a_grant_is_ended_also_where_the_node_ended_before_it(world: World) -> None:
    async with world.running() as ada:
        made = await ada.start(b"fail")
        (kept,) = world.grants.living.values()
        await made.wait()
    world.grants.living[kept.id] = kept
    async with world.running() as ada:
        await until(lambda: not world.grants.living)
        assert (await ada.detached(made.id).info()).exit.kind == "exited"


async def test_the_end_of_its_grant_ends_it(world: World) -> None:
    async with world.running() as ada:
        made = await ada.start(b"hold", restart="always")
        (kept,) = world.grants.living.values()
        assert kept.label == f"process program {made.id}"
        kept.end("the role was withdrawn")
        exit_ = await made.wait()
        assert (exit_.kind, exit_.why) == ("killed", "the role was withdrawn")
        down = await ada.start(b"hold", restart="always")
        await until(lambda: world.scripts.runs == 2)
    world.grants.living.clear()  # while the node is down
    async with world.running() as ada:
        exit_ = await ada.detached(down.id).wait()
        assert (exit_.kind, exit_.why) == ("killed", "it was revoked while the node was down")
        assert world.scripts.runs == 2


@pytest.mark.parametrize("granted", [True, False])
async def test_what_was_being_made_when_the_node_ended_leaves_nothing(
    world: World, granted: bool
) -> None:
    async with world.running() as ada:
        reached = asyncio.Event()

        async def stop() -> None:
            reached.set()
            await asyncio.Event().wait()

        world.grants.made = stop
        starting = asyncio.ensure_future(ada.start(b"hold", restart="always"))
        await reached.wait()
        (info,) = await ada.processes()
        assert info.waits, "it does not run yet"
        crashed = {path: path.read_bytes() for path in world.root.rglob("*") if path.is_file()}
        (grant,) = world.grants.living.values()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    world.grants.living = {grant.id: grant} if granted else {}
    for path, data in crashed.items():  # as a crash leaves the disk
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    async with world.running() as ada:
        await until(lambda: not world.service.supervisor.all)
        assert world.grants.living == {}
    assert world.scripts.runs == 0
    assert [path for path in world.disk if path.endswith(".json")] == []


async def test_what_the_disk_does_not_take_is_not_started(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with world.running() as ada:
        for first in (True, False):  # the code, then the record that it is granted

            async def fill() -> None:
                monkeypatch.setattr(supervise, "replace_private_file", full)

            with monkeypatch.context() as patch:
                world.grants.made = fill
                if first:
                    patch.setattr(supervise, "replace_private_file", full)
                with pytest.raises(WetwareError) as refused:
                    await ada.start(b"hold")
            assert refused.value.code == "proc.disk"
            assert not world.service.supervisor.all
            assert world.grants.living == {}
            assert world.scripts.runs == 0


async def test_one_that_is_killed_before_it_runs_is_not_waited_for(world: World) -> None:
    async with world.running() as ada:

        async def kill() -> None:
            for each in list(world.service.supervisor.all.values()):
                each.kill("at once")

        world.grants.made = kill
        async with asyncio.timeout(60):
            made = await ada.start(b"hold", restart="always")
            assert await made.wait() == ClientExit("killed", 0, "at once")
    assert world.scripts.runs == 0


async def test_who_follows_and_is_slow_hears_how_much_is_missing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SEGMENT_BYTES", 100)
    async with world.running() as ada:
        made = await ada.start(b"hold")
        each, seen, missing = world.service.supervisor.all[made.id], bytearray(), list[int]()
        async for data in made.logs(follow=True, missed=missing.append):
            if not seen:
                for number in range(10):
                    each.log.write(b"%d" % number * 150)
                each.tell()
                world.scripts.go.set()
            seen += data
        assert bytes(seen) == b"holds\n" + b"9" * 106  # of 1506 bytes the last two files
        assert missing == [1394]
        late = [data async for data in made.logs(missed=missing.append)]
        assert b"".join(late) == bytes(seen[6:])
        assert len(missing) == 1, "what went before one came is no gap"


async def test_only_what_can_be_named_is_kept(world: World) -> None:
    async with world.running() as ada:
        given = {"out": "pubsub:chat?data=max:1k&topic=chat", "all": "blob"}
        await ada.start(b"hold", grants=given)
        (kept,) = world.grants.living.values()
        assert kept.asked == {
            "out": ("pubsub:chat", ["data=max:1k", "topic=chat"]),
            "all": ("blob", []),
        }
        async with world.user("ada") as other:
            with pytest.raises(InvalidArgument) as refused:
                await ada.start(b"hold", grants={"out": other._ref.ref})
        assert refused.value.code == "invalid.live_grant"
        image = await ada.load(b"hold")
        spec = spec_of("it", (), {"grants": given}, "", [])
        with pytest.raises(InvalidArgument, match="detached"):
            await image._ref.call("spawn", spec=spec)
        with pytest.raises(InvalidArgument, match="policy"):
            await ada.start(b"hold", restart="sometimes")
        with pytest.raises(WetwareError, match="no such script"):
            await ada.start(b"none")
        with pytest.raises(Unsupported):
            await ada.start(b"hold", grants={"out": "none"})
        for name in ("", "n" * 65):
            with pytest.raises(InvalidArgument, match="cannot name"):
                await ada.start(b"hold", grants={name: "pubsub:chat"})
        assert len(world.service.supervisor.all) == len(world.grants.living) == 1


async def test_one_that_ends_because_its_node_stops_comes_back(world: World) -> None:
    """Its calls fail then, and it may take that for the end of its work."""
    async with world.running() as ada:
        made = await ada.start(b"hold", restart="on-failure")
        await until(lambda: world.scripts.runs == 1)
        (kept,) = world.grants.living.values()
        kept.ended = Disconnected("the node is stopping")
        world.scripts.go.set()
        await until(lambda: not world.service.table.processes)
    kept.ended = None
    world.scripts.go.clear()
    async with world.running() as ada:
        await until(lambda: world.scripts.runs == 2)
        assert (await ada.detached(made.id).info()).restarts == 1


async def test_a_fault_of_ours_is_told_and_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(given: object, refs: object) -> Spec:
        raise RuntimeError("a defect")

    async with world.running() as ada:
        made = await ada.start(b"hold", restart="always")
        await until(lambda: world.scripts.runs == 1)
        with monkeypatch.context() as patch:
            patch.setattr(world.service.table, "spec", broken)
            await made.restart()
            await until_shown(ada, lambda each: "its log says why" in each.exit.why)
            async with asyncio.timeout(60):
                with pytest.raises(InternalError):
                    await ada.start(b"hold")
        await until(lambda: world.scripts.runs == 2)


async def test_what_cannot_be_started_at_first_leaves_nothing(world: World) -> None:
    async with world.running() as ada:
        with pytest.raises(LimitExceeded, match="memory"):
            await ada.start(b"hold", memory_bytes=4 << 30)
        assert await ada.processes() == []
    assert world.grants.living == {}
    assert [path for path in world.disk if path.endswith(".json")] == []


async def test_its_directories_are_held_until_it_is_over(world: World, tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "x").write_text("of ada")
    given = {"/data": tmp_path / "content"}
    async with world.running() as ada:
        held = world.service.table.dirs.held
        for wrong in (
            {"memory_bytes": 4 << 30},
            {"restart": "sometimes"},
            {"grants": {"": "blob"}},
        ):
            with pytest.raises(WetwareError):
                await ada.start(b"hold", dirs=given, **wrong)  # type: ignore[arg-type]  # one of them
            assert not held
        made = await ada.start(b"hold", dirs=given, restart="always")
        assert list(held) == ["ada"]
        await made.restart()
        await until(lambda: world.scripts.runs == 2)
        ((info,), (kept,)) = await ada.processes(), (tmp_path / "dirs").iterdir()
        assert [(each.path, each.hash) for each in info.dirs] == [("/data", kept.name)]
    async with world.running() as ada:
        await until(lambda: world.scripts.runs == 3)
        held = world.service.table.dirs.held
        assert list(held) == ["ada"]
        await ada.detached(made.id).kill()
        assert not held


async def test_how_many_are_kept_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "DETACHED_PER_OWNER_MAX", 2)
    monkeypatch.setattr(supervise, "ENDED_MAX", 3)
    async with world.running() as ada, world.user("bob") as bob:
        for _ in range(2):
            await ada.start(b"hold")
        with pytest.raises(LimitExceeded, match="2 detached processes of ada") as refused:
            await ada.start(b"hold")
        assert refused.value.code == "limit.detached"
        assert len(world.grants.living) == 2
        for _ in range(5):
            await (await bob.start(b"fail")).wait()
        await until(lambda: len(world.service.supervisor.all) == 2 + 3)
        assert len(await bob.processes()) == 3
        with pytest.raises(NotFound):
            await bob.detached((await ada.processes())[0].id).info()
        monkeypatch.setattr(supervise, "CODE_BYTES_MAX", 8)
        with pytest.raises(LimitExceeded, match="CODE_BYTES_MAX"):
            await bob.start(b"sleep")
    assert len([path for path in world.disk if path.endswith(".json")]) == 2 + 3


async def test_damage_on_disk_is_told_and_runs_nothing(world: World, tmp_path: Path) -> None:
    async with world.running() as ada:
        damaged = await ada.start(b"hold", restart="always")
        await until(lambda: world.scripts.runs == 1)
        unread = await ada.start(b"sleep", restart="always")
    (tmp_path / "detached" / unread.id / "record.json").write_text('{"id": 5')
    (tmp_path / "detached" / damaged.id / "code").write_bytes(b"fail")
    (tmp_path / "detached" / ("0" * 16)).mkdir()
    async with world.running() as ada:
        assert not (tmp_path / "detached" / ("0" * 16)).exists()
        await until_shown(ada, lambda each: "damaged" in each.exit.why)
        assert [each.id for each in await ada.processes()] == [damaged.id]
        assert world.scripts.runs == 1
