"""One RPC connection, from its first byte to its last."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import capnp

from wetware.base.log import get_logger
from wetware.rpc import kjloop
from wetware.rpc.dispatch import Callee, Guarded, undelivered
from wetware.rpc.limits import RpcLimits, for_strangers, wire_bytes_max
from wetware.rpc.refs import RpcConnection
from wetware.rpc.transport import Pipe, RpcTransport, open_stream

if TYPE_CHECKING:
    from wetware.errors import WetwareError
    from wetware.rpc.refs import Ref
    from wetware.rpc.servant import Servant

log = get_logger("rpc")

_NESTED_READS: Final = 4
"""How often over a message may be read, in the sense of Cap'n Proto's traversal limit."""


class End(Callee):
    """Our end of a connection: holds all its pycapnp objects. Lives in the runtime until closed.

    It is one user of the runtime, from the caller's `acquire` on, and releases it when it closes.
    """

    def __init__(
        self,
        runtime: kjloop.Runtime,
        pipe: Pipe,
        limits: RpcLimits,
        bootstrap: Servant | Guarded | None,
        *,
        stranger_message_bytes_max: int | None = None,
        trust_s: float | None = None,
        refused: WetwareError | None = None,
    ) -> None:
        self._trusted_limits = limits
        if stranger_message_bytes_max is not None:
            limits = for_strangers(limits, stranger_message_bytes_max)
        super().__init__(runtime, limits, refused)
        self._closing = False
        self.transport = RpcTransport(
            pipe, limits, self._on_lost, self.on_sent, self.on_drained, runtime.partials
        )
        self.transport.trusted = limits is self._trusted_limits and trust_s is None
        self._trust_due: asyncio.TimerHandle | None = None
        self._stream: Any = open_stream(self.transport)
        reads = _NESTED_READS * wire_bytes_max(self._trusted_limits) // 8
        if bootstrap is None:
            self._rpc = capnp.TwoPartyClient(self._stream, traversal_limit_in_words=reads)
        else:
            self._rpc = capnp.TwoPartyServer(
                self._stream,
                bootstrap=self.export(bootstrap, None, None),
                traversal_limit_in_words=reads,
            )
        runtime.connections.add(self)
        if trust_s is not None:
            self._trust_due = self.loop.call_later(trust_s, self._not_trusted, trust_s)

    def trust(self) -> None:
        """The peer is no stranger any more: full limits, no deadline."""
        self.check_loop()
        if self.closed or self.transport.trusted:
            return
        self.transport.trusted = True
        self._end_trust_wait()
        self.limits = self._trusted_limits
        self.transport.use(self.limits)
        self.wake()
        self.on_drained()

    def carried(self, stream: Ref) -> Servant:
        from wetware.rpc.bytestream import carried  # see wetware.rpc

        return carried(stream)

    def _not_trusted(self, after_s: float) -> None:
        self._trust_due = None
        log.info("rpc.not_trusted", peer=self.transport.peer, after_s=after_s)
        self.transport.abort()

    def _end_trust_wait(self) -> None:
        if self._trust_due is not None:
            self._trust_due.cancel()
            self._trust_due = None

    def _on_lost(self, exc: Exception | None) -> None:
        if not self.closed:
            log.debug("rpc.lost", reason=str(exc))
        self.shut()
        self.lost.set()

    def shut(self) -> None:
        """Let go of everything that is pycapnp's: calls in flight fail, methods are cancelled."""
        if self.closed:
            return
        self.closed = True
        self.served._end = None
        self._end_trust_wait()
        # Before the session is released, which ends its grant: that would be the streams' reason.
        for stream in tuple(self.streams):
            stream.lost()
        self.end_calls()
        self.results_free.set()
        self._rpc.close()
        self._stream.close()

    async def aclose(self) -> None:
        """Close; wait, within `close_s`, for the last bytes and for methods to end. Idempotent."""
        if self._closing:
            await self.lost.wait()
            return
        self._closing = True
        tasks = list(self.tasks)
        self.shut()
        try:
            async with asyncio.timeout(self.limits.close_s):
                await self.lost.wait()
                if tasks:
                    await asyncio.wait(tasks)
        except TimeoutError:
            log.warning("rpc.close_slow", methods=len(self.tasks))
            self.transport.abort()
            await self.lost.wait()
        finally:
            self.runtime.connections.discard(self)
            await kjloop.release()


async def connect(
    pipe: Pipe,
    limits: RpcLimits = RpcLimits(),  # noqa: B008  # frozen
) -> RpcConnection:
    """Speak RPC as a client over a pipe, which belongs to the connection from here on."""
    return RpcConnection(await _open(pipe, limits, None))


async def serve(
    pipe: Pipe,
    bootstrap: Servant | Guarded,
    limits: RpcLimits = RpcLimits(),  # noqa: B008  # frozen
    *,
    stranger_message_bytes_max: int | None = None,
    trust_s: float | None = None,
    refused: WetwareError | None = None,
) -> None:
    """Serve `bootstrap` until the pipe ends; cancelling closes the connection.

    Returns normally however the peer ended it. Methods that run for the peer are cancelled then,
    and its references released.

    Args:
        pipe: Not started yet; belongs to the connection from here on.
        bootstrap: What the peer gets first.
        limits: Of the connection.
        stranger_message_bytes_max: The peer is a stranger until a servant calls
            `current_connection().trust()`: until then this is its `message_bytes_max`, and all
            else that it may hold shrinks with it (`limits.for_strangers`). None: it is no stranger.
        trust_s: The connection is closed if nobody trusted it within so many seconds. None: never.
        refused: What every call raises; None: they are taken.
    """
    end = await _open(
        pipe,
        limits,
        bootstrap,
        stranger_message_bytes_max=stranger_message_bytes_max,
        trust_s=trust_s,
        refused=refused,
    )
    try:
        await end.lost.wait()
    finally:
        await kjloop.finish(end.aclose())


async def _open(
    pipe: Pipe, limits: RpcLimits, bootstrap: Servant | Guarded | None, **options: Any
) -> End:
    runtime = await kjloop.acquire()
    try:
        return End(runtime, pipe, limits, bootstrap, **options)
    except BaseException:
        undelivered(runtime, bootstrap)
        pipe.abort()
        await kjloop.release()
        raise
