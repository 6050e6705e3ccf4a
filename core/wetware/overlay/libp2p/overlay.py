"""The asyncio face of the overlay: the libp2p guest, supervised, and its verbs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from wetware.base.log import get_logger
from wetware.errors import DialError, InvalidArgument, OverlayError, WetwareError
from wetware.overlay.libp2p._loading import load_guest

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import Key, PeerId
    from wetware.overlay.libp2p._guest import Guest
    from wetware.overlay.link import LinkHost

log = get_logger("overlay")
T = TypeVar("T")

State = Literal["starting", "running", "restarting", "stopped"]


class OverlayUnavailable(OverlayError):
    """The libp2p guest is starting, restarting or stopped; links and streams are not affected."""

    code = "overlay.unavailable"


class OverlayTimeout(OverlayError):
    """The network did not answer in time."""

    code = "overlay.timeout"


@dataclass(frozen=True, slots=True)
class OverlayLimits:
    """Every limit of the control plane.

    Attributes:
        start_s: For one start of the guest, import included; a guest that hangs is replaced.
        stop_s: For the guest to end when it is told to.
        restart_s_min: Wait before the second restart in a row; the first one is immediate.
        restart_s_max: The wait doubles up to here.
        healthy_s: A guest that ran this long is no longer "in a row" with the crash before.
        ping_s: For one ping.
        identify_s: For one identify exchange, ours or a peer's.
        identify_bytes: Of an identify message; js-libp2p's own are below 2 KiB.
        identify_streams_max: Identify exchanges that we run at a time.
        dht_s: For one DHT verb; a lookup of many rounds takes seconds.
        dht_key_bytes_max: Of a DHT key: what other implementations accept for provider records.
        dht_stream_s: Life of an inbound DHT stream; libp2p serves 12 at a time and never ends them.
        dht_streams_per_peer_max: Inbound DHT streams of one peer.
        dht_provider_keys_max: Keys with provider records that we keep for others (~1 KiB each).
        dht_value_bytes_max: Of a value record that we keep for others (IPNS's own limit).
        guest_streams_max: Streams of one connection that wait for the guest to accept them.
        calls_max: Verbs under way; further ones are refused.
        dials_max: Dials by libp2p at a time.
        dial_s: For one dial by libp2p.
        dial_addrs_max: Addresses that are tried per peer; a peer announces as many as it likes.
        peers_max: Unconnected peers whose addresses are remembered.
        peers_sweep_s: Interval between sweeps of the remembered peers.
        adoptions_max: Times that libp2p may let go of a live connection before it is not offered
            again.
    """

    start_s: float = 60.0
    stop_s: float = 0.8
    restart_s_min: float = 0.1
    restart_s_max: float = 30.0
    healthy_s: float = 60.0
    ping_s: float = 10.0
    identify_s: float = 10.0
    identify_bytes: int = 64 << 10
    identify_streams_max: int = 64
    dht_s: float = 30.0
    dht_key_bytes_max: int = 80
    dht_stream_s: float = 60.0
    dht_streams_per_peer_max: int = 4
    dht_provider_keys_max: int = 20_000
    dht_value_bytes_max: int = 10 << 10
    guest_streams_max: int = 64
    calls_max: int = 64
    dials_max: int = 16
    dial_s: float = 10.0
    dial_addrs_max: int = 16
    peers_max: int = 1000
    peers_sweep_s: float = 60.0
    adoptions_max: int = 3


@dataclass(frozen=True, slots=True)
class OverlayStatus:
    """What the libp2p guest is doing.

    Attributes:
        state: "running" is the only state in which the verbs work.
        restarts: Times that the guest was started again after it had failed.
        last_error: Why it ended the last time, one line, or None.
        connections: Link connections that libp2p uses.
        dht_peers: Peers in the DHT's routing table.
    """

    state: State
    restarts: int
    last_error: str | None
    connections: int
    dht_peers: int


@dataclass(frozen=True, slots=True)
class PeerReport:
    """What a peer says of itself (identify). Nothing of it is verified except the peer ID.

    Attributes:
        peer: Who answered.
        protocols: Protocol IDs that it serves.
        agent: Its software, e.g. "js-libp2p/3.3.11".
        addrs: Multiaddrs that it says it listens on, in text form; not all can be dialled.
        observed: Our address as it sees it, in text form, or None.
    """

    peer: PeerId
    protocols: tuple[str, ...]
    agent: str
    addrs: tuple[str, ...]
    observed: str | None


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that provides a key.

    Attributes:
        peer: The provider.
        addrs: Its addresses that wetware can dial, with the peer ID.
    """

    peer: PeerId
    addrs: tuple[Multiaddr, ...]


class Overlay:
    """libp2p on the connections of a LinkHost: identify, ping, Kad-DHT in server mode.

    libp2p runs as a trio guest of the asyncio loop, in the same thread. It never opens a socket and
    never negotiates security: it is handed connections that the link has finished (noise, yamux).
    Whatever happens in it, an exception ends the guest alone; it is restarted, at once after a
    first failure and with back-off after that, while connections and streams of the link go on.
    Streams of its protocols wait for it, within the link's bound.

    There can be one running Overlay per thread.

    Args:
        host: The link host, entered. Its protocols are announced by identify.
        key: The key of `host`.
        limits: See OverlayLimits.
    """

    def __init__(
        self, host: LinkHost, key: Key, *, limits: OverlayLimits = OverlayLimits()
    ) -> None:
        self._host, self._key, self._limits = host, key, limits
        self._guest: Guest | None = None
        self._state: State = "stopped"
        self._restarts = 0
        self._last_error: str | None = None

    # --- lifecycle -------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Run the guest until cancelled; call `ready()` when it serves for the first time.

        Returns by cancellation only: a guest that fails is logged, counted and started again.
        Ends within `stop_s` (0.8 s) of the cancellation, and trio's thread soon after; connections
        stay open.
        """
        if self._state != "stopped":
            raise RuntimeError("this overlay is running already")
        self._state = "starting"
        self._host.guest_expected = True
        told, in_a_row = False, 0
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
                    in_a_row = 0
                delay = 0.0
                if in_a_row:
                    doubled = self._limits.restart_s_min * 2 ** min(in_a_row - 1, 30)
                    delay = min(self._limits.restart_s_max, doubled)
                in_a_row += 1
                self._state, self._restarts = "restarting", self._restarts + 1
                self._last_error = _one_line(error)
                log.error(
                    "overlay.failed",
                    error=self._last_error,
                    restarts=self._restarts,
                    again_s=delay,
                    exc_info=error,
                )
                await asyncio.sleep(delay)
        finally:
            self._state = "stopped"
            self._host.guest_expected = False

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
            up()
            await asyncio.wait([guest.ended])
            return guest.ended.result() or OverlayError("the guest ended by itself")
        finally:
            self._guest = None
            if guest is not None:
                await self._end(guest)

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
            connections=guest.connections if guest else 0,
            dht_peers=guest.dht_peers if guest else 0,
        )

    def crash(self, error: BaseException) -> None:
        """Raise `error` in the guest, as a defect of libp2p would; for tests and for operators.

        Has no effect while the guest is not running.
        """
        if self._guest is not None:
            self._guest.crash(error)

    # --- verbs -----------------------------------------------------------------------------------

    async def ping(self, peer: PeerId) -> float:
        """Round-trip time to a connected peer, s.

        Raises DialError (not connected), ProtocolRefused, OverlayTimeout or OverlayUnavailable.
        """
        self._connected(peer)
        return await self._call("ping", lambda g: g.ping(peer), self._limits.ping_s)

    async def identify(self, peer: PeerId) -> PeerReport:
        """Ask a connected peer what it is; a fresh exchange, nothing cached.

        Raises DialError (not connected), ProtocolRefused, OverlayTimeout or OverlayUnavailable.
        """
        self._connected(peer)
        return await self._call("identify", lambda g: g.identify(peer), self._limits.identify_s)

    async def provide(self, key: bytes) -> bool:
        """Announce in the DHT that this node provides `key` (a multihash, or any 1 to 80 bytes).

        Returns whether some peer took the record; False when the DHT has no other node yet. libp2p
        announces it again every 22 h while the guest lives; after a restart of the guest the
        caller announces again.
        Raises InvalidArgument, OverlayTimeout or OverlayUnavailable.
        """
        self._check_key(key)
        return await self._call("provide", lambda g: g.provide(key), self._limits.dht_s)

    async def find_providers(self, key: bytes, *, count: int = 20) -> tuple[Provider, ...]:
        """Other peers that provide `key`, at most `count`; empty when none is found.

        Those that the network knows first, then those that have told this node itself.

        Raises InvalidArgument, OverlayTimeout or OverlayUnavailable.
        """
        self._check_key(key)
        return await self._call(
            "find_providers", lambda g: g.find_providers(key, count), self._limits.dht_s
        )

    def _check_key(self, key: bytes) -> None:
        if not 0 < len(key) <= self._limits.dht_key_bytes_max:
            raise InvalidArgument(
                f"a DHT key has 1 to {self._limits.dht_key_bytes_max} bytes, not {len(key)}",
                hint="use the hash of the name",
            )

    def _connected(self, peer: PeerId) -> None:
        if self._host.connection(peer) is None:
            raise DialError(f"not connected to {peer}", hint="dial the peer first")

    async def _call(
        self,
        verb: str,
        make: Callable[[Guest], Callable[[], Coroutine[Any, Any, T]]],
        timeout_s: float,
    ) -> T:
        guest = self._guest
        if guest is None:
            raise OverlayUnavailable(
                f"{verb}: the libp2p guest is {self._state}", hint="try again in a few seconds"
            )
        try:
            async with asyncio.timeout(timeout_s):
                return await guest.call(make(guest))
        except TimeoutError:
            raise OverlayTimeout(f"{verb}: no answer within {timeout_s:g} s") from None
        except WetwareError:
            raise
        except asyncio.CancelledError:
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
