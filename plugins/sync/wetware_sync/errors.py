"""What the services raise, beside what the engine does (engine.py)."""

from __future__ import annotations

from wetware.errors import EXIT_BUSY, OverlayError, WetwareError


class NotFree(WetwareError):
    """Others hold it, or the barrier is up, and the time to wait is over: nothing was taken."""

    code = "sync.busy"
    exit_code = EXIT_BUSY


class Conflict(WetwareError):
    """It was changed by somebody else: nothing was written."""

    code = "sync.conflict"


class Moved(WetwareError):
    """The store was restored or moved since: its revisions are others, what was held is lost."""

    code = "sync.moved"


class HomeDown(OverlayError):
    """The node that has the store is not there, and with the embedded engine no other has it."""

    code = "overlay.home_down"
