"""A service in a task of a test's own."""

from __future__ import annotations

import asyncio


class Started(asyncio.Event):
    """The `task_status` of a service or an auth backend that a test runs without a task group."""

    def started(self, value: None = None) -> None:
        """Set the event: it serves."""
        self.set()
