"""Who serves a protocol, and the life of an inbound stream: agreement, handler, end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from wetware.base.access import Access
from wetware.base.log import get_logger
from wetware.errors import InvalidArgument, OverlayError, StreamReset
from wetware.identity import PeerId
from wetware.overlay.link.limits import Violation
from wetware.overlay.link.multistream import HEADER, Responder, encode_line
from wetware.overlay.link.yamux import Connection, Stream

if TYPE_CHECKING:
    from wetware.overlay.link.limits import LinkLimits

log = get_logger("link")

Handler = Callable[[Stream], Coroutine[Any, Any, None]]
Admit = Callable[[PeerId, str, Access], bool]

_REFUSALS_LOGGED_MAX = 8  # per connection: a peer must not be able to fill the log


class Serving:
    """The protocols of a host and the tasks that serve its inbound streams.

    Args:
        limits: See LinkLimits.
        admit: See LinkHost.
        refused: Counts by reason what is turned away.
        spawn: Runs a task that ends with the host at the latest.
    """

    def __init__(
        self,
        limits: LinkLimits,
        admit: Admit,
        refused: Counter[str],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._limits, self._admit, self._refused, self._spawn = limits, admit, refused, spawn
        self.handlers: dict[str, tuple[Handler, Access]] = {}
        self.tasks: dict[Stream, asyncio.Task[None]] = {}
        self._refusals_logged: Counter[Connection] = Counter()

    def handle(self, protocol: str, handler: Handler, access: Access) -> Callable[[], None]:
        """See `LinkHost.handle`."""
        encode_line(protocol)
        if not protocol.startswith("/") or protocol == HEADER:
            raise InvalidArgument(f"{protocol!r} is not a protocol name: it begins with /")
        if protocol in self.handlers:
            raise InvalidArgument(f"{protocol} is served already", code="invalid.protocol_taken")
        entry = self.handlers[protocol] = (handler, access)

        def end() -> None:
            if self.handlers.get(protocol) is entry:
                del self.handlers[protocol]

        return end

    def admits(self, peer: PeerId, protocol: str, access: Access) -> bool:
        """Whether `peer` may open a stream for `protocol`: `admit`, failing closed."""
        try:
            return self._admit(peer, protocol, access)
        except Exception:  # fail closed
            log.error("admit.failed", exc_info=True)
            return False

    def start(self, stream: Stream) -> None:
        """Serve a new inbound stream."""
        stream.hold()
        task = self.tasks[stream] = self._spawn(self._serve(stream))
        task.add_done_callback(lambda _task: self._served(stream))

    def stream_reset(self, stream: Stream) -> None:
        """A stream was reset: who serves it is cancelled if it does not end by itself."""
        task = self.tasks.get(stream)
        if task is not None and not task.done():
            timer = asyncio.get_running_loop().call_later(self._limits.handler_grace_s, task.cancel)
            task.add_done_callback(lambda _task: timer.cancel())

    def lost(self, conn: Connection) -> None:
        self._refusals_logged.pop(conn, None)

    async def _serve(self, stream: Stream) -> None:
        try:
            handler = await self._agree(stream)
            await handler(stream)
        except (OverlayError, EOFError) as exc:  # the peer ended it early: nobody's defect
            log.debug("handler.ended", protocol=stream.protocol, peer=stream.peer, reason=exc)
            stream.reset()
        except Exception:  # a handler's defect ends its stream only
            log.error("handler.failed", protocol=stream.protocol, peer=stream.peer, exc_info=True)
            stream.reset()
        except BaseException:
            stream.reset()
            raise
        else:
            stream.finish()

    def _served(self, stream: Stream) -> None:
        del self.tasks[stream]
        if not stream.closing:  # cancelled before it began
            stream.reset()
        stream.release()

    async def _agree(self, stream: Stream) -> Handler:
        """Negotiate the protocol of an inbound stream; who serves it."""
        responder = Responder(
            partial(self._serves, stream), proposals_max=self._limits.negotiation_proposals_max
        )
        try:
            async with asyncio.timeout(self._limits.negotiation_s):
                while responder.chosen is None:
                    data = await stream.read()
                    if not data:
                        raise StreamReset("closed before a protocol was agreed")
                    # At most a few dozen short lines: a new stream takes 16 KiB.
                    stream.write_nowait(responder.receive(data))
        except TimeoutError:
            self._refused["stream.negotiation_timeout"] += 1
            raise OverlayError("no protocol was agreed in time", code="overlay.timeout") from None
        except Violation:
            self._refused["stream.negotiation"] += 1
            raise
        stream.unread(responder.rest())
        stream.protocol = responder.chosen
        return self.handlers[responder.chosen][0]

    def _serves(self, stream: Stream, protocol: str) -> bool:
        """Whether an inbound stream gets `protocol`."""
        if stream.connection.closed:  # its books are closed: `lost` was called
            return False
        entry = self.handlers.get(protocol)
        if entry is not None and self.admits(stream.peer, protocol, entry[1]):
            return True
        self._refused["stream.protocol"] += 1
        self._refusals_logged[stream.connection] += 1
        if self._refusals_logged[stream.connection] <= _REFUSALS_LOGGED_MAX:
            reason = "not served" if entry is None else "not admitted"
            log.info("stream.refused", peer=stream.peer, protocol=protocol, reason=reason)
        return False
