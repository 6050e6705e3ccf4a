"""Calls of foreign code are bounded, and leave nothing half done."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.packaging.third_party import GOOD, install
from tests.unit.loader.world import CHECK, NODE, SHORT, Backend, World, context, status

from wetware import loader
from wetware.loader import State, guard
from wetware.loader.load import REQUIRED_S_MAX


def test_what_a_plugin_prints_goes_to_stderr(
    site: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "talks", GOOD)
    loader.load(world.config(), CHECK, offers=(*world.offers, *loader.find([str(site)])))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "talks on import" in captured.err


def test_the_guard_restores_handler_and_timer() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: calls.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with pytest.raises(guard.Hung):
            guard.bounded(lambda: time.sleep(60), 0.05)
        assert guard.bounded(lambda: 7, 1.0) == 7
        left_s, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 90 < left_s < 100
        signal.raise_signal(signal.SIGALRM)
        assert calls == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_the_guard_interrupts_again_what_swallows_the_first_time() -> None:
    swallowed = []

    def stubborn() -> None:
        try:
            time.sleep(60)
        except BaseException as exc:
            swallowed.append(type(exc).__name__)
        time.sleep(60)

    with pytest.raises(guard.Hung):
        guard.bounded(stubborn, 0.05)
    assert swallowed == ["Hung"]


def test_outside_the_main_thread_the_call_still_runs() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(guard.bounded(lambda: 7, 1.0)))
    thread.start()
    thread.join(10)
    assert results == [7]


def test_a_slow_plugin_that_the_node_needs_is_waited_for_and_the_log_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(ctx: object) -> Backend:
        """Not done before the log has said so, and so after any limit of the others."""
        while not caplog.records:
            time.sleep(0.001)
        return Backend("slow")

    world.plugin("auth_slow", ww_register_auth=slow)
    loaded = world.load("", NODE, auth="slow")
    caplog.set_level("INFO")
    monkeypatch.setattr(guard, "STILL_S", NODE.hook_s_max / 100)
    monkeypatch.setattr(loaded, "_policy", replace(NODE, hook_s_max=NODE.hook_s_max / 200))
    assert loaded.auth(context).name == "slow"
    (said,) = [record.ww for record in caplog.records]  # type: ignore[attr-defined]
    assert said == {
        "plugin": "auth_slow",
        "where": "in ww_register_auth",
        "after_s": guard.STILL_S,
        "at_most_s": REQUIRED_S_MAX,
    }


def package(site: Path, name: str, middle: str) -> None:
    """A package as `asyncio` is: it uses the name that importing its submodule gives it."""
    folder = site / name
    folder.mkdir()
    (folder / "base.py").write_text("VALUE = 7\n")
    text = f"from .base import *\n{middle}\nVALUE = base.VALUE\n"
    (folder / "__init__.py").write_text(text)


def test_a_module_of_the_standard_library_is_never_left_half_imported(
    site: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even by a plugin that is given up in the middle of importing it."""
    monkeypatch.setattr(sys, "stdlib_module_names", sys.stdlib_module_names | {"ww_shared"})
    over = SHORT.hook_s_max + 2 * guard._AGAIN_S  # the limit passes, and it is tried again
    wait = f"import time; end = time.monotonic() + {over}\nwhile time.monotonic() < end: pass"
    package(site, "ww_shared", wait)
    install(site, "slow", "import time, ww_shared; time.sleep(3600)")
    offers = (*world.offers, *loader.find([str(site)]))
    loaded = loader.load(world.config(), SHORT, offers=offers)
    assert status(loaded, "slow").reason == "hung on import: not done after 0.3 s"
    assert sys.modules["ww_shared"].VALUE == 7


def test_what_a_failed_import_leaves_behind_is_forgotten(site: Path, world: World) -> None:
    """The second import of it in a process says the same as the first, and not a NameError."""
    package(site, "ww_dep", "import ww_acme_driver")
    install(site, "needs", "import ww_dep")
    offers = (*world.offers, *loader.find([str(site)]))
    for _ in range(2):
        loaded = loader.load(world.config(), CHECK, offers=offers)
        assert "needs 'ww_acme_driver'" in status(loaded, "needs").reason
    (site / "ww_acme_driver.py").write_text("")
    importlib.invalidate_caches()
    loaded = loader.load(world.config(), CHECK, offers=offers)
    assert status(loaded, "needs").state is State.LOADED
