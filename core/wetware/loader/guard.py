"""Calls of foreign code: bounded in time, and nothing that they raise gets past."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Final, TypeVar

from wetware.hookspecs import PROJECT

if TYPE_CHECKING:
    import types

T = TypeVar("T")

STILL_S: Final = 10.0
"""After that the log says which plugin is waited for."""
_AGAIN_S: Final = 0.25
"""A plugin that swallows the first interruption gets another one."""


class Hung(BaseException):
    """A plugin took longer than its limit. No `except Exception` of the plugin catches it."""


def bounded(call: Callable[[], T], limit_s: float, still: Callable[[], None] = lambda: None) -> T:
    """Run a synchronous call of foreign code for at most `limit_s`; raises Hung after that.

    After STILL_S `still` is called, once, while the call goes on. What the process shares is
    imported to its end before the call is cut off.

    A timer signal interrupts it, so it works in the main thread only; elsewhere the call runs
    unguarded. It reaches Python code and interruptible system calls, not a loop inside a C
    extension. The signal handler and timer that were there before are restored. What the call
    prints goes to stderr: it would corrupt the output of `--json`.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if threading.current_thread() is not threading.main_thread():
            return call()
        armed, said = False, limit_s <= STILL_S

        def interrupt(_signum: int, frame: types.FrameType | None) -> None:
            nonlocal said
            if not armed:
                return
            if said:
                if _shared_import(frame):
                    return
                raise Hung
            said = True
            signal.setitimer(signal.ITIMER_REAL, limit_s - STILL_S, _AGAIN_S)
            still()

        handler = signal.signal(signal.SIGALRM, interrupt)
        started = time.monotonic()
        left_s, every_s = signal.setitimer(signal.ITIMER_REAL, min(STILL_S, limit_s), _AGAIN_S)
        try:
            armed = True
            return call()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            if left_s:
                # A timer that was due meanwhile fires now.
                left_s = max(left_s - (time.monotonic() - started), 1e-6)
                signal.setitimer(signal.ITIMER_REAL, left_s, every_s)


def _shared_import(frame: types.FrameType | None) -> bool:
    """Whether what is not a plugin's alone is being imported at `frame`.

    The import machinery itself is at work, or a module of the standard library or of wetware, with
    all that it imports. Cut off there, it would be half imported for the whole process.
    """
    within = False
    while frame is not None and frame.f_code is not bounded.__code__:
        if frame.f_code.co_name == "<module>":
            within = True
            top = str(frame.f_globals.get("__name__")).partition(".")[0]
            if top == PROJECT or top in sys.stdlib_module_names:
                return True
        elif not within and frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def forget_orphans(known: Set[str]) -> None:
    """Forget new submodules whose package is not there: its import failed.

    It would be imported again without them, and miss the names that importing them gives it.
    """
    for name in sorted(sys.modules.keys() - known):
        if "." in name and name.rpartition(".")[0] not in sys.modules:
            del sys.modules[name]
