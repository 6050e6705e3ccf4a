"""What the broker asks of a recorder, and what happens where that fails."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from wetware.broker import records as module
from wetware.broker.records import Records
from wetware.errors import Busy, ConfigError, PluginError, Unrecorded
from wetware.node import serving
from wetware.node.serving import recording

from .cluster import Kept
from .parts import Clock

pytestmark = pytest.mark.anyio


class Recorder(Kept):
    """Does what a test says, in place of recording."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        super().__init__(self.records)
        self.raises: BaseException | None = None
        self.hangs = False
        self.ending: list[bool] = []

    async def _wrong(self) -> None:
        if self.raises is not None:
            raise self.raises
        if self.hangs:
            await asyncio.Event().wait()

    async def admit(self, record: Any) -> None:
        await self._wrong()
        await super().admit(record)

    def report(self, record: Any, *, ending: bool) -> None:
        if self.raises is not None:
            raise self.raises
        self.ending.append(ending)
        super().report(record, ending=ending)

    async def written(self) -> None:
        await self._wrong()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def records(recorder: Recorder) -> Records:
    return Records(Clock(), recorder)


async def test_a_record_is_plain_bounded_and_has_its_time(
    recorder: Recorder, records: Records
) -> None:
    await records.admit("login.granted", principal=3.5, n=7, ok=True, label="x" * 5000)
    records.record("grant.revoked")
    records.ended("role.withdrawn")
    (first, *_) = recorder.records
    assert list(first) == ["time_ms", "event", "principal", "n", "ok", "label"]
    assert (first["principal"], first["n"], first["ok"]) == ("3.5", 7, True)
    assert first["label"] == "x" * 1024 + "…"
    assert type(first["time_ms"]) is int
    assert [record["event"] for record in recorder.records[1:]] == [
        "grant.revoked",
        "role.withdrawn",
    ]
    assert recorder.ending == [False, True]


async def test_what_a_recorder_refuses_is_refused_with_its_words(
    recorder: Recorder, records: Records
) -> None:
    recorder.raises = Unrecorded("the disk is full", hint="free some")
    with pytest.raises(Unrecorded, match="the disk is full"):
        await records.admit("login.granted")
    assert not await records.written()


@pytest.mark.parametrize(
    "raises", [OSError("gone"), KeyError("x"), TimeoutError(), asyncio.CancelledError()]
)
async def test_a_recorder_that_raises_refuses(
    recorder: Recorder, records: Records, raises: BaseException
) -> None:
    recorder.raises = raises
    with pytest.raises(Unrecorded):
        await records.admit("login.granted")
    records.ended("grant.revoked")  # a revocation goes on
    assert not await records.written()


async def test_a_recorder_that_hangs_refuses_and_delays_nothing(
    recorder: Recorder, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ADMIT_S", 0.05)
    monkeypatch.setattr(module, "WRITTEN_S", 0.05)
    recorder.hangs = True
    with pytest.raises(Unrecorded, match="within"):
        await records.admit("login.granted")
    assert not await records.written()
    recorder.hangs = False
    await records.admit("login.granted")
    assert await records.written()


async def test_without_a_recorder_nothing_is_refused() -> None:
    records = Records(Clock(), None)
    await records.admit("login.granted")
    records.ended("grant.revoked")
    assert await records.written()


# --- its life -------------------------------------------------------------------------------------


async def test_it_is_started_first_and_cancelled_last(recorder: Recorder, records: Records) -> None:
    life: list[str] = []

    async def run(*, task_status: Any) -> None:
        life.append("starting")
        await anyio.lowlevel.checkpoint()
        task_status.started()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            life.append("ended")

    recorder.run = run  # type: ignore[method-assign]

    async def node() -> None:
        async with recording(records):
            assert life == ["starting"]
            await records.admit("login.granted")
            raise KeyError("of the node")

    with pytest.raises(KeyError, match="of the node"):  # as it is, in no group
        await node()
    assert life == ["starting", "ended"]
    assert not records.failed


async def test_a_node_that_is_cancelled_ends_it(recorder: Recorder, records: Records) -> None:
    async def node() -> None:
        async with recording(records):
            try:
                await anyio.sleep_forever()
            finally:
                await asyncio.sleep(0.01)  # the node's own ends can still wait
                records.record("node.stopped")

    async def run(*, task_status: Any) -> None:
        task_status.started()
        await anyio.sleep_forever()

    recorder.run = run  # type: ignore[method-assign]
    running = asyncio.create_task(node())
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert [record["event"] for record in recorder.records] == ["node.stopped"]


async def test_one_that_does_not_start_stops_the_start(
    recorder: Recorder, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damaged(*, task_status: Any) -> None:
        raise ConfigError("it is damaged")

    async def hung(*, task_status: Any) -> None:
        await anyio.sleep_forever()

    async def returns(*, task_status: Any) -> None: ...

    monkeypatch.setattr(serving, "START_S_MAX", 0.05)
    recorder.run = damaged  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="it is damaged"):
        async with recording(records):
            pytest.fail("it was started")
    recorder.run = hung  # type: ignore[method-assign]
    with pytest.raises(Busy, match="was not ready") as late:
        async with recording(records):
            pytest.fail("it was started")
    assert late.value.code == "config.busy.recorder"
    recorder.run = returns  # type: ignore[method-assign]
    with pytest.raises(PluginError, match="returned before it had started"):
        async with recording(records):
            pytest.fail("it was started")


async def test_a_node_without_one_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async with recording(Records(Clock(), None)):
        pass
    assert "audit.none" in caplog.text


@pytest.mark.parametrize("how", ["raises", "returns", "cancels itself"])
async def test_one_that_ends_early_refuses_and_leaves_the_node_running(
    recorder: Recorder, records: Records, how: str
) -> None:
    go_on = anyio.Event()

    async def run(*, task_status: Any) -> None:
        task_status.started()
        await go_on.wait()
        if how == "raises":
            raise OSError("gone")
        if how == "cancels itself":
            raise asyncio.CancelledError

    recorder.run = run  # type: ignore[method-assign]
    async with recording(records):
        await records.admit("login.granted")
        go_on.set()
        with anyio.fail_after(60):
            while not records.failed:
                await anyio.sleep(0.01)
        with pytest.raises(Unrecorded, match="has ended"):
            await records.admit("login.granted")
        records.ended("grant.revoked")
    assert [record["event"] for record in recorder.records] == ["login.granted", "grant.revoked"]


# --- denials --------------------------------------------------------------------------------------


async def test_denials_of_a_kind_are_counted(recorder: Recorder, records: Records) -> None:
    for number in range(1000):
        records.denied("login.refused", key="10.0.0.1", address="10.0.0.1", n=number)
    records.denied("login.refused", key="10.0.0.2", address="10.0.0.2")
    records.flush_denials()
    records.flush_denials()
    refused = recorder.records
    assert [(r["address"], r.get("count")) for r in refused] == [
        ("10.0.0.1", None),
        ("10.0.0.2", None),
        ("10.0.0.1", 999),
    ]
    assert refused[-1]["n"] == 999, "with what the last of them was"


async def test_kinds_of_denials_are_bounded(
    recorder: Recorder, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DENIED_KEYS_MAX", 8)
    for number in range(1000):
        records.denied("login.refused", key=number, address=f"10.0.{number}")
    records.flush_denials()
    refused = recorder.records
    assert sum(r.get("count", 1) for r in refused) == 1000
    assert len(refused) <= 8 + 2


async def test_numbers_of_denials_are_recorded_now_and_then(
    recorder: Recorder, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DENIED_S", 0.01)
    running = asyncio.create_task(records.run())
    for _ in range(3):
        records.denied("call.denied", key=1)
    async with asyncio.timeout(60):
        while len(recorder.records) < 2:
            await asyncio.sleep(0.01)
    assert recorder.records[-1]["count"] == 2
    running.cancel()
    await asyncio.wait([running])
