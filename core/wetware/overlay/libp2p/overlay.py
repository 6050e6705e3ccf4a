"""The asyncio face of the overlay: the libp2p guest, supervised, and its verbs."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from wetware.base.access import Access
from wetware.base.backoff import Backoff
from wetware.base.log import get_logger
from wetware.errors import InvalidArgument, OverlayError, WetwareError
from wetware.overlay.libp2p._loading import load_guest
from wetware.overlay.libp2p.contract import (
    OverlayLimits,
    OverlayStatus,
    OverlayTimeout,
    OverlayUnavailable,
    Provider,
    State,
)

if TYPE_CHECKING:
    from wetware.identity import Key
    from wetware.overlay.libp2p._guest import Guest
    from wetware.overlay.link import LinkHost, Stream

log = get_logger("overlay")

# Who may open what. Reading and writing the DHT is one protocol: members only, as writing is.
PROTOCOLS = {
    "/ipfs/id/1.0.0": Access.PUBLIC,
    "/ipfs/id/push/1.0.0": Access.PUBLIC,
    "/ipfs/ping/1.0.0": Access.PUBLIC,
    "/ipfs/kad/1.0.0": Access.MEMBER,
}
T = TypeVar("T")


class Overlay:
    """libp2p on the connections of a LinkHost: it answers identify and ping, and keeps a Kad-DHT.

    libp2p runs as a trio guest of the asyncio loop, in the same thread. It never opens a socket and
    never negotiates security: it is handed connections that the link has finished (noise, yamux).
    Whatever happens in it, an exception ends the guest alone; it is restarted, at once after a
    first failure and with back-off after that, while connections and streams of the link go on.
    Streams of its protocols wait for it, up to `wait_s`.

    There can be one running Overlay per thread.

    Args:
        host: The link host, entered. Its protocols are announced by identify.
        key: The key of `host`.
        limits: See OverlayLimits.
    """

    def __init__(
        self,
        host: LinkHost,
        key: Key,
        *,
        limits: OverlayLimits = OverlayLimits(),  # noqa: B008  # frozen
    ) -> None:
        self._host, self._key, self._limits = host, key, limits
        self._guest: Guest | None = None
        self._up = asyncio.Event()  # there is a guest
        self._state: State = "stopped"
        self._restarts = 0
        self._last_error: str | None = None
        self._rng = random.SystemRandom()

    # --- lifecycle -------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Run the guest until cancelled; call `ready()` when it serves for the first time.

        Returns by cancellation only: a guest that fails is logged, counted and started again.
        Ends within `stop_s` (0.8 s) of the cancellation, and trio's thread soon after; connections
        stay open.
        """
        if self._state != "stopped":
            raise RuntimeError("this overlay is running already")
        ends = [
            self._host.handle(protocol, self._serve, access=access)
            for protocol, access in PROTOCOLS.items()
        ]
        self._state, told, first = "starting", False, True
        backoff = Backoff(self._limits.restart_s_min, self._limits.restart_s_max, self._rng)
        try:
            while True:
                started = time.monotonic()

                def up(started: float = started) -> None:
                    nonlocal told
                    self._state = "running"
                    log.info("overlay.up", took_s=round(time.monotonic() - started, 3))
                    if not told:
                        told = True
                        ready()

                error = await self._one_run(up)
                if time.monotonic() - started > self._limits.healthy_s:
                    first = True
                    backoff.reset()
                delay_s, first = 0.0 if first else backoff.pause_s(), False
                self._state, self._restarts = "restarting", self._restarts + 1
                self._last_error = _one_line(error)
                log.error(
                    "overlay.failed",
                    error=self._last_error,
                    restarts=self._restarts,
                    again_s=round(delay_s, 1),
                    exc_info=error,
                )
                await asyncio.sleep(delay_s)
        finally:
            self._state = "stopped"
            for end in ends:
                end()

    async def _one_run(self, up: Callable[[], None]) -> BaseException:
        """One life of the guest; returns what ended it."""
        guest: Guest | None = None
        try:
            try:
                async with asyncio.timeout(self._limits.start_s):
                    module = await load_guest()
                    guest = module.Guest(self._host, self._key, self._limits)
                    guest.start()
                    await asyncio.shield(guest.ready)
            except TimeoutError:
                return OverlayTimeout(
                    f"libp2p was not ready within {self._limits.start_s:g} s (limit start_s)"
                )
            except Exception as exc:
                return exc
            self._guest = guest
            self._up.set()
            up()
            await asyncio.wait([guest.ended])
            return guest.ended.result() or OverlayError("the guest ended by itself")
        finally:
            self._guest = None
            self._up.clear()
            if guest is not None:
                await self._end(guest)

    async def _serve(self, stream: Stream) -> None:
        """A stream of a protocol of libp2p's: it waits for the guest while that is away."""
        try:
            async with asyncio.timeout(self._limits.wait_s):
                while (guest := self._guest) is None:
                    await self._up.wait()
        except TimeoutError:
            raise OverlayUnavailable(f"the libp2p guest is {self._state}") from None
        await guest.serve(stream)

    async def _end(self, guest: Guest) -> None:
        guest.stop()
        if not guest.ended.done():
            await asyncio.wait([guest.ended], timeout=self._limits.stop_s)
        if not guest.ended.done():
            # A task in it ignores its cancellation. It has lost its connections and its streams.
            log.error("overlay.stuck", after_s=self._limits.stop_s)

    def status(self) -> OverlayStatus:
        """The state now; never fails."""
        guest = self._guest
        return OverlayStatus(
            state=self._state,
            restarts=self._restarts,
            last_error=self._last_error,
            dht_peers=guest.dht_peers if guest else 0,
        )

    def crash(self, error: BaseException) -> None:
        """Raise `error` in the guest, as a defect of libp2p would; for tests and for operators.

        Has no effect while the guest is not running.
        """
        if self._guest is not None:
            self._guest.crash(error)

    # --- verbs -----------------------------------------------------------------------------------

    async def provide(self, key: bytes) -> bool:
        """Announce in the DHT that this node provides `key` (a multihash, or any 1 to 80 bytes).

        Returns whether some peer took the record; False when the DHT has no other node yet. libp2p
        announces it again every 22 h while the guest lives; after a restart of the guest the
        caller announces again.
        Raises InvalidArgument, OverlayTimeout or OverlayUnavailable.
        """
        return await self._call("provide", key, lambda guest: guest.provide(key))

    async def find_providers(self, key: bytes, *, count: int = 20) -> tuple[Provider, ...]:
        """Other peers that provide `key`, at most `count`; empty when none is found.

        Those that the network knows first, then those that have told this node itself.

        Raises InvalidArgument, OverlayTimeout or OverlayUnavailable.
        """
        return await self._call(
            "find_providers", key, lambda guest: guest.find_providers(key, count)
        )

    async def _call(
        self, verb: str, key: bytes, function: Callable[[Guest], Coroutine[Any, Any, T]]
    ) -> T:
        if not 0 < len(key) <= self._limits.dht_key_bytes_max:
            raise InvalidArgument(
                f"a DHT key has 1 to {self._limits.dht_key_bytes_max} bytes, not {len(key)}",
                hint="use the hash of the name",
            )
        guest = self._guest
        if guest is None:
            raise OverlayUnavailable(
                f"{verb}: the libp2p guest is {self._state}", hint="try again in a few seconds"
            )
        try:
            async with asyncio.timeout(self._limits.dht_s):
                return await guest.call(lambda: function(guest))
        except TimeoutError:
            raise OverlayTimeout(f"{verb}: no answer within {self._limits.dht_s:g} s") from None
        except WetwareError:
            raise
        except Exception as exc:
            if self._guest is not guest:
                raise OverlayUnavailable(
                    f"{verb}: the libp2p guest restarted meanwhile", hint="try again"
                ) from exc
            raise OverlayError(f"{verb} failed: {_one_line(exc)}", code=f"overlay.{verb}") from exc


ERROR_CHARS_MAX = 300


def _one_line(error: BaseException) -> str:
    """The innermost message of an exception, without the groups around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:ERROR_CHARS_MAX]
