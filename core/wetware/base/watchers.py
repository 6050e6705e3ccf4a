"""Those who want to hear of something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from wetware.base.log import get_logger

log = get_logger("watchers")
E = TypeVar("E")


class Watchers(Generic[E]):
    """Who is called back with every event. Callbacks run on the loop and must not block."""

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[E], None]] = {}

    def add(self, callback: Callable[[E], None], *first: E) -> Callable[[], None]:
        """Call back with `first`, then with what is told. Returns what ends it, idempotent."""
        token = object()
        self._callbacks[token] = callback
        for event in first:
            self._call(callback, event)
        return lambda: self._callbacks.pop(token, None) and None

    def tell(self, event: E) -> None:
        for callback in tuple(self._callbacks.values()):
            self._call(callback, event)

    def tell_all(self, *events: E) -> None:
        """Tell everybody all of it, then raise what the first of them raised.

        For what must not be taken for done where somebody failed to do it, e.g. a withdrawal.
        """
        callbacks = tuple(self._callbacks.values())
        failed = [self._call(callback, event) for event in events for callback in callbacks]
        for exc in filter(None, failed):
            raise exc

    def _call(self, callback: Callable[[E], None], event: E) -> Exception | None:
        try:
            callback(event)
        except Exception as exc:  # a watcher's defect is its own: the others hear of it
            log.exception("watcher.failed")
            return exc
        return None
