"""The meter of the loop's delay, by hand and on a loop that is blocked on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import pytest

from wetware.node.lag import (
    LAG_LOGGED_S,
    LAG_TICKS_PER_S,
    LAG_WINDOW_S,
    Lag,
    LagMeter,
)

pytestmark = pytest.mark.anyio

INTERVAL_S = 1 / LAG_TICKS_PER_S
WINDOW = LAG_WINDOW_S * LAG_TICKS_PER_S


def test_before_the_first_tick_all_is_zero() -> None:
    assert LagMeter().recent() == Lag()


def test_quantiles_are_exact() -> None:
    meter = LagMeter()
    for n in range(1, 501):
        meter.record(n / 50_000, n * INTERVAL_S)  # 0.02 ms to 10 ms
    assert meter.recent() == Lag(0.0099, 0.01)


def test_the_ticks_that_a_delay_swallowed_count() -> None:
    meter = LagMeter()
    for n in range(9 * LAG_TICKS_PER_S):
        meter.record(0.0, n * INTERVAL_S)
    meter.record(1.0, 10.0)  # a second of ten
    assert len(meter._recent) == 10 * LAG_TICKS_PER_S
    assert 0.85 <= meter.recent().p99_s <= 1.0
    assert meter.recent().max_s == 1.0


def test_it_forgets() -> None:
    meter = LagMeter()
    meter.record(3.0, 0.0)
    for n in range(LAG_WINDOW_S * LAG_TICKS_PER_S):
        meter.record(0.001, n * INTERVAL_S)
    assert meter.recent().max_s == 0.001


def test_memory_is_bounded_and_a_day_of_delay_is_no_work() -> None:
    meter = LagMeter()
    for n in range(50_000):
        meter.record(n % 7 / 1000, n * INTERVAL_S)
    meter.record(86_400.0, 1e6)  # e.g. a machine that was suspended
    assert len(meter._recent) == WINDOW
    assert meter.recent().max_s == 86_400.0


def test_the_log_hears_of_lag_once_a_minute_and_of_the_longest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    meter = LagMeter()

    def heard() -> list[dict[str, object]]:
        found = [vars(record)["ww"] for record in caplog.records if record.message == "loop.lag"]
        caplog.clear()
        return found

    with caplog.at_level(logging.WARNING):
        meter.record(LAG_LOGGED_S, 1.0)  # at the bound, not beyond it
        assert heard() == []
        meter.record(0.4, 2.0)
        assert heard() == [{"lag_ms": 400, "times": 1}]
        meter.record(2.0, 5.0)
        meter.record(0.3, 9.0)
        assert heard() == []
        meter.record(0.0, 2.0 + LAG_WINDOW_S)
        assert heard() == [{"lag_ms": 2000, "times": 2}]
        meter.record(0.0, 500.0)
        assert heard() == []


async def test_a_blocked_loop_is_measured_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    meter = LagMeter()
    task = asyncio.create_task(meter.run())
    async with asyncio.timeout(60):
        with caplog.at_level(logging.WARNING):
            while len(meter._recent) < 2:
                await asyncio.sleep(0.01)
            time.sleep(0.5)  # noqa: ASYNC251  # the deliberate blocking
            while meter.recent().max_s < 0.4:
                await asyncio.sleep(0.01)
    assert meter.recent().max_s >= 0.5 - INTERVAL_S
    assert meter.recent().p99_s > 0.3
    assert [record.message for record in caplog.records] == ["loop.lag"]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_running_costs_less_than_a_thousandth_of_a_core() -> None:
    meter = LagMeter()
    start = time.process_time()
    for n in range(LAG_TICKS_PER_S * 60):
        meter.record(0.0003, n * INTERVAL_S)
    # The recording of a minute; the loop's own timer costs about as much again.
    assert time.process_time() - start < 60 / 1000 / 2


async def test_a_cancelled_meter_leaves_no_timer() -> None:
    loop = asyncio.get_running_loop()
    ticks: list[float] = []

    def now() -> float:
        ticks.append(loop.time())
        return ticks[-1]

    meter = LagMeter(now=now)
    task = asyncio.create_task(meter.run())
    async with asyncio.timeout(60):
        while len(ticks) < 3:
            await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    count = len(ticks)
    await asyncio.sleep(3 * INTERVAL_S)
    assert len(ticks) == count
