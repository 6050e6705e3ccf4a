"""One question and one answer, on a stream of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final

from wetware.base.log import get_logger
from wetware.errors import WetwareError
from wetware.overlay.frames import read_frame, write_frame

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.link import Stream

log = get_logger("exchange")

QUESTION_S_MAX: Final = 5.0
"""From the beginning of a stream to the end of its question."""


async def ask(
    opening: Awaitable[Stream], question: Mapping[str, object], *, bytes_max: int, timeout_s: float
) -> dict[str, Any]:
    """Open a stream, send a frame, and return the frame that answers it.

    Raises OverlayError, InvalidArgument for what is no frame, EOFError for an early end, and
    TimeoutError.
    """
    async with asyncio.timeout(timeout_s), await opening as stream:
        await write_frame(stream, question)
        return await read_frame(stream, bytes_max=bytes_max)


def answering(
    answer: Callable[[PeerId, dict[str, Any]], Awaitable[Mapping[str, object]]],
    *,
    bytes_max: int,
    timeout_s: float,
) -> Callable[[Stream], Coroutine[Any, Any, None]]:
    """The handler of a protocol whose questions `answer` answers; what fails costs the stream.

    Args:
        answer: Gets who asks and the question; raises WetwareError where there is no answer.
        bytes_max: Of a question.
        timeout_s: For an answer.
    """

    async def serve(stream: Stream) -> None:
        try:
            async with asyncio.timeout(QUESTION_S_MAX):
                question = await read_frame(stream, bytes_max=bytes_max)
            async with asyncio.timeout(timeout_s):
                await write_frame(stream, await answer(stream.peer, question))
        except (WetwareError, EOFError, TimeoutError) as exc:
            log.debug("not_answered", protocol=stream.protocol, peer=stream.peer, why=exc)
            stream.reset()

    return serve
