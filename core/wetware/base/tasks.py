"""Tasks that go on beside the calls that began them."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


class Tasks:
    """Those of one owner, who ends them. An error of one is for who awaits it, and no other."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()  # the loop itself keeps no task alive

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        import asyncio

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end(self) -> None:
        """Cancel all, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await self.wait()

    async def wait(self) -> None:
        """Return when all that go on now have ended."""
        import asyncio

        if self._tasks:
            await asyncio.wait(self._tasks)

    def __len__(self) -> int:
        """How many go on."""
        return len(self._tasks)
