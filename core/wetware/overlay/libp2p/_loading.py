"""Import libp2p without stalling the loop, and keep its import from changing the process.

The import takes 2 to 4 s and 90 MB: it runs in a thread of its own, and it can be stopped, so that
a node that is told to stop while it starts does not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.abc
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

log = get_logger("overlay.libp2p")

_GUEST, _ADAPTER = "wetware.overlay.libp2p._guest", "wetware.overlay.libp2p._adapter"
MESSAGE_CHARS_MAX = 400
"""Of one log line of libp2p: peers can put bytes of their choice into them."""
TRIO_IDLE_THREAD_S = 0.2
"""How long trio's I/O thread outlives the guest (trio's own value is 10 s)."""
STOP_S: Final = 0.5
"""For a stopped import to end; on a busy machine one foreign package takes seconds."""
_ONE = threading.Lock()
"""Held while it is imported: by one that nobody waits for any more, before the next begins."""


class _Stopped(BaseException):
    """Ends an import from inside; not an Exception, so that no `except ImportError` swallows it."""


class _StopFinder(importlib.abc.MetaPathFinder):
    """Finds nothing, but raises in the importing thread once the import is no longer wanted."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.thread_id: int | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Between two modules of libp2p no other package is half imported: those cannot be undone.
        if (
            fullname.startswith("libp2p.")
            and self.stop.is_set()
            and threading.get_ident() == self.thread_id
        ):
            raise _Stopped
        return None


class _ToEvents(logging.Handler):
    """Passes libp2p's log records on as events, at debug level: peers can cause most of them."""

    def emit(self, record: logging.LogRecord) -> None:
        if log_debug():
            log.debug(
                "libp2p.message",
                logger=record.name,
                level=record.levelname.lower(),
                message=record.getMessage()[:MESSAGE_CHARS_MAX],
            )


async def load_guest() -> ModuleType:
    """Import `wetware.overlay.libp2p._guest`, and with it trio and libp2p; at once if that is done.

    When cancelled, the import ends, with its thread, as soon as it can be undone; that is waited
    for for STOP_S. Raises whatever the import raises.
    """
    if (loaded := sys.modules.get(_GUEST)) is not None and not getattr(
        getattr(loaded, "__spec__", None), "_initializing", False
    ):
        return loaded
    loop = asyncio.get_running_loop()
    done: asyncio.Future[ModuleType] = loop.create_future()
    finder = _StopFinder()

    def deliver(module: ModuleType | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        elif module is not None:
            done.set_result(module)

    def work() -> None:
        finder.thread_id = threading.get_ident()
        with _ONE, contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
            sys.meta_path.insert(0, finder)
            try:
                module = importlib.import_module(_GUEST)
            except _Stopped:
                _unload()
                loop.call_soon_threadsafe(done.cancel)
            except BaseException as exc:  # handed to the waiting task, whatever it is
                _unload()
                loop.call_soon_threadsafe(deliver, None, exc)
            else:
                loop.call_soon_threadsafe(deliver, module, None)
            finally:
                sys.meta_path.remove(finder)

    thread = threading.Thread(target=work, name="wetware-import-libp2p", daemon=True)
    thread.start()
    given_up = False
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        finder.stop.set()
        await asyncio.wait([done], timeout=STOP_S)
        given_up = done.cancel()
        if not done.cancelled():
            done.exception()
        raise
    finally:
        if not given_up:  # it has handed over its result, and is about to end
            thread.join()


def _unload() -> None:
    """Forget a partial import: libp2p's circular imports work in one order only, from the start."""
    for name in tuple(sys.modules):
        if name in (_GUEST, _ADAPTER) or name.partition(".")[0] == "libp2p":
            del sys.modules[name]


def tame() -> None:
    """Undo what the import of libp2p does to the process. Called by `_guest` after the import."""
    library = logging.getLogger("libp2p")
    if not os.environ.get("LIBP2P_DEBUG"):  # whoever sets it wants libp2p's own logging
        # libp2p clears the handlers and stops propagation: its warnings would go to stderr.
        if not any(isinstance(handler, _ToEvents) for handler in library.handlers):
            library.addHandler(_ToEvents())
        library.setLevel(logging.INFO if log_debug() else logging.WARNING)
    # It calls `logging.warning(…)`, which installs a handler on the root logger.
    swarm_connection = importlib.import_module("libp2p.network.connection.swarm_connection")
    vars(swarm_connection)["logging"] = logging.getLogger("libp2p.network.swarm_connection")
    thread_cache = importlib.import_module("trio._core._thread_cache")
    if hasattr(thread_cache, "IDLE_TIMEOUT"):
        vars(thread_cache)["IDLE_TIMEOUT"] = TRIO_IDLE_THREAD_S


def log_debug() -> bool:
    """Whether somebody wants debug events of the overlay."""
    return logging.getLogger("wetware.overlay.libp2p").isEnabledFor(logging.DEBUG)
