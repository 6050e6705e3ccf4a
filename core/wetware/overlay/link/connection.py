"""One connection, over TCP or a pipe: handshake, noise both ways, keepalive, the graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from cryptography.exceptions import InvalidTag

from wetware.base.bounds import TokenBucket
from wetware.base.log import get_logger
from wetware.base.multiaddr import Multiaddr
from wetware.errors import OverlayError, PeerMismatch, StreamReset, WetwareError
from wetware.overlay.link.limits import LinkLimits, Violation
from wetware.overlay.link.multistream import Proposer, Responder
from wetware.overlay.link.noise import (
    HANDSHAKE_BYTES_MAX,
    PLAINTEXT_BYTES_MAX,
    TAG_BYTES,
    NoiseHandshake,
    NoiseIdentity,
)
from wetware.overlay.link.yamux import GOAWAY_FRAME, Connection, Session, Stream, Totals

if TYPE_CHECKING:
    from collections import Counter

    from wetware.identity import PeerId
    from wetware.overlay.link.noise import Cipher
    from wetware.overlay.link.yamux import Bytes

log = get_logger("link.connection")

NOISE, YAMUX = "/noise", "/yamux/1.0.0"

RECEIVE_BYTES = 256 << 10
"""Of the scratch buffer that all connections of a host receive into; holds several messages."""
_FLUSH_BYTES = 256 << 10  # encrypted in one go: about 0.2 ms, after which others get the loop
_FLUSH_BYTES_MIN = 64 << 10  # on a path that does not take that much: see NoiseConnection._flush
_WAITING_BYTES = 64 << 10
"""Encrypted and not taken by TCP when the next flush is made: TCP is not to run dry meanwhile, but
nothing can overtake what is in there. One flush comes on top."""
_ALONE_BYTES = 32 << 10  # a part this long gets messages of its own: no copy at either end
_EARLY_BYTES_MAX = 64 << 10  # received before the handshake asked for it; honest peers send none
_THROTTLE_S = 0.02
_FRAMES_COUNTED = 256  # frames between two looks at their rate
_TAMPERED = "noise: a message was tampered with"
_NO_LINGER = struct.pack("ii", 1, 0)


class ConnectionOwner(Protocol):
    """What a connection needs of its host."""

    limits: LinkLimits
    totals: Totals
    noise: NoiseIdentity
    scratch: memoryview
    refused: Counter[str]

    def spawn(self, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task that ends with the host at the latest."""
        ...

    def admit_connection(self, conn: NoiseConnection) -> None:
        """A TCP connection was accepted; raises LimitExceeded to turn it away."""
        ...

    def admit_peer(self, conn: NoiseConnection) -> None:
        """The peer is known and all but connected; raises LimitExceeded to turn it away."""
        ...

    def established(self, conn: NoiseConnection) -> None:
        """The handshake is done; raises WetwareError to refuse the peer."""
        ...

    def lost(self, conn: NoiseConnection) -> None:
        """The connection, established or not, has ended. Called once."""
        ...

    def connection(self, peer: PeerId) -> Connection | None:
        """The one that new streams to a peer use."""
        ...

    def inbound(self, stream: Stream) -> None:
        """The peer opened a stream."""
        ...

    def stream_reset(self, stream: Stream) -> None:
        """A stream of the connection was reset."""
        ...


def socket_multiaddr(name: tuple[Any, ...] | None, peer: PeerId | None = None) -> Multiaddr:
    """The multiaddr of a socket's name as `getsockname` gives it."""
    if not name:  # already disconnected
        return Multiaddr("ip4", "0.0.0.0", 0, peer)  # noqa: S104  # a placeholder, not a bind
    host = str(name[0]).partition("%")[0]
    return Multiaddr("ip6" if ":" in host else "ip4", host, int(name[1]), peer)


class NoiseConnection(Connection, asyncio.BufferedProtocol, asyncio.Protocol):
    """See `Connection`: this one is secured by noise and multiplexed by yamux.

    asyncio gives it what TCP brings as a BufferedProtocol; a pipe as a Protocol.

    Attributes:
        established: Whether the handshake is done.
        ready: Done when it is; fails if it ends before that.
    """

    def __init__(
        self,
        owner: ConnectionOwner,
        *,
        initiator: bool,
        expect: PeerId | None = None,
        carrier: Multiaddr | None = None,
    ) -> None:
        self._owner, self._limits = owner, owner.limits
        self._scratch = owner.scratch
        self._loop = asyncio.get_running_loop()
        self.initiator, self._expect = initiator, expect
        self.remote = self.local = Multiaddr("ip4", "0.0.0.0", 0)  # noqa: S104  # until connected
        self.tunnelled, self._carrier = carrier is not None, carrier
        self.established = self.closed = False
        self.error: Exception | None = None
        self.bytes_in = self.bytes_out = 0
        self.opened_at = 0.0
        self.ready: asyncio.Future[NoiseConnection] = self._loop.create_future()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._handshake_task: asyncio.Task[None] | None = None
        # receiving
        self._tail = b""  # ciphertext of a message that is not complete yet
        self._early = bytearray()  # what the handshake has not taken yet
        self._more: asyncio.Future[None] | None = None
        self._receive_cipher: Cipher | None = None
        self._receiving = self._flushing = False
        self._frames = TokenBucket(self._limits.frames_per_s, self._limits.frames_burst)
        self._throttle: asyncio.TimerHandle | None = None
        # sending
        self._send_cipher: Cipher | None = None
        self._scheduled = self._paused = False
        self._flush_bytes = _FLUSH_BYTES
        self._eager = self._lone = True  # see _output_data
        # ending
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._last_seen = (0, 0)
        self._probed_at: int | None = None  # bytes_in when a probe left that is not over yet
        limits = owner.limits
        if carrier is not None:  # as much on its way as on the carrier's two hops
            limits = replace(limits, stream_window_bytes=2 * limits.stream_window_bytes)
        self._session = Session(
            self,
            initiator=initiator,
            limits=limits,
            totals=owner.totals,
            loop=self._loop,
            on_output=self._output,
            on_data=self._output_data,
            on_stream=owner.inbound,
            on_reset=owner.stream_reset,
            on_violation=self.abort,
            refused=owner.refused,
        )

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self.established else "handshake"
        return f"<Connection {self.remote} {state}>"

    # --- for applications -------------------------------------------------------------------------

    @property
    def used_at(self) -> float:
        return max(self.opened_at, self._session.used_at)

    @property
    def superseded(self) -> bool:
        best = self._owner.connection(self.peer) if self.tunnelled else None
        return best is not None and best is not self

    @property
    def accepts_streams(self) -> bool:
        return self.established and not (self.closed or self._session.remote_gone)

    @property
    def doubted(self) -> bool:
        """Whether the peer has not answered a probe yet."""
        return self._probed_at == self.bytes_in

    def probe(self, timeout_s: float) -> None:
        """Ping now: the connection ends unless the peer sends something within `timeout_s`.

        Nothing happens while another probe waits for its answer. One that has been answered says
        nothing of what came after that.
        """
        if self.closed or self.doubted:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._last_seen, self._probed_at = self._progress(), self.bytes_in
        self._session.ping()
        self._timer = self._loop.call_later(
            timeout_s, self._keepalive_over, self._last_seen, timeout_s
        )

    def close(self) -> None:
        if self.closed:
            return
        self.closed = self._closing = True
        if not self.established:
            self.abort(OverlayError("closed by this node", code="overlay.closed"))
            return
        self._close_timer = self._loop.call_later(self._limits.close_s, self._give_up)
        self._session.going = True
        self._schedule()  # what was written before still leaves

    async def wait_closed(self) -> None:
        await asyncio.shield(self._done)

    def abort(self, reason: Exception) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._end(reason)

    def _refuse(self, counted_as: str, reason: Exception) -> None:
        self._owner.refused[counted_as] += 1
        self.abort(reason)

    # --- TCP --------------------------------------------------------------------------------------

    def _limit_notsent(self, transport: asyncio.Transport) -> None:
        """Keep the kernel's queue short, so that urgent frames do not wait behind megabytes."""
        sock = transport.get_extra_info("socket")
        option: int | None = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        if sock is not None and option is not None:
            with contextlib.suppress(OSError):  # an old kernel: as without
                sock.setsockopt(socket.IPPROTO_TCP, option, self._limits.notsent_bytes_max)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the handshake (asyncio calls this)."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  # narrows the type
        self._transport = transport  # asyncio has set TCP_NODELAY
        transport.set_write_buffer_limits(high=_WAITING_BYTES, low=_WAITING_BYTES)
        self._limit_notsent(transport)
        self.remote = (
            self._carrier.through()
            if self._carrier is not None
            else socket_multiaddr(transport.get_extra_info("peername"))
        )
        self.local = socket_multiaddr(transport.get_extra_info("sockname"))
        if self.closed:
            transport.abort()
            return
        try:
            if not self.initiator:
                self._owner.admit_connection(self)
        except WetwareError as exc:
            self.abort(exc)
            return
        self._handshake_task = self._owner.spawn(self._run_handshake())

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive to: the host's scratch, after the cut message (asyncio calls this)."""
        tail = self._tail
        if not tail:
            return self._scratch
        # No other callback runs between this and buffer_updated, so all can share one buffer.
        self._scratch[: len(tail)] = tail
        return self._scratch[len(tail) :]

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt and deliver what was received (asyncio calls this)."""
        total = len(self._tail) + nbytes
        self._tail = b""
        self._arrived(self._scratch[:total], nbytes)

    def data_received(self, data: Bytes) -> None:
        """The same with bytes that do not change: what a pipe brings."""
        tail, self._tail = self._tail, b""
        self._arrived(memoryview(b"".join((tail, data)) if tail else data), len(data))

    def _arrived(self, view: memoryview, nbytes: int) -> None:
        self.bytes_in += nbytes
        self._receiving = True
        try:
            self._received(view, len(view))
        except InvalidTag:
            self._refuse("connection.tampered", Violation(_TAMPERED))
        except Violation as exc:
            self._refuse("connection.violation", exc)
        finally:
            self._receiving = False
        self._eager = self._lone
        session = self._session
        if self._scheduled:
            self._scheduled = False
            self._flush()
        if session.remote_gone and not session.streams and self.established:
            self.close()
        if session.frames_in >= _FRAMES_COUNTED:
            if not self._frames.take(session.frames_in):
                self._slow_down()
            session.frames_in = 0

    def eof_received(self) -> bool:
        """The peer closed its end; nothing useful can follow (asyncio calls this)."""
        return False

    def pause_writing(self) -> None:
        """TCP takes no more (asyncio calls this)."""
        self._paused = True

    def resume_writing(self) -> None:
        """TCP takes more (asyncio calls this)."""
        self._paused = False
        # Not from in here: asyncio looks at its buffer afterwards, and a close would confuse it.
        if not self._scheduled:
            self._schedule()

    def connection_lost(self, exc: Exception | None) -> None:
        """TCP has ended (asyncio calls this)."""
        self._end(exc or OverlayError("the peer closed the connection", code="overlay.closed"))
        if self._close_timer is not None:
            self._close_timer.cancel()
        if not self._done.done():
            self._done.set_result(None)

    # --- receiving --------------------------------------------------------------------------------

    def _received(self, view: memoryview, total: int) -> None:
        cipher = self._receive_cipher
        if cipher is None:
            self._early += view
            if len(self._early) > _EARLY_BYTES_MAX + RECEIVE_BYTES:
                raise Violation("more bytes than a handshake has")
            self._wake_handshake()
            return
        at, feed, decrypt = 0, self._session.feed, cipher.decrypt
        while total - at >= 2:
            stop = at + 2 + (view[at] << 8 | view[at + 1])
            if stop > total:
                break
            plain = decrypt(view[at + 2 : stop])
            at = stop
            if self.established:
                feed(plain)
                if self._session.dead:
                    return
            else:
                self._early += plain
                if len(self._early) > _EARLY_BYTES_MAX:
                    raise Violation("more bytes than a handshake has")
                self._wake_handshake()
        if at < total:
            self._tail = bytes(view[at:total])

    def _slow_down(self) -> None:
        """Read no more for a moment: this peer sends frames faster than a core can use."""
        if self._transport is None or self.closed or self._throttle is not None:
            return
        self._owner.refused["connection.throttled"] += 1
        self._transport.pause_reading()
        self._throttle = self._loop.call_later(_THROTTLE_S, self._speed_up)

    def _speed_up(self) -> None:
        self._throttle = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # --- sending ----------------------------------------------------------------------------------

    def _output(self) -> None:
        """The session has frames: they leave at the end of this loop turn, together."""
        if not self._scheduled:
            self._scheduled = True
            if not self._receiving:
                self._loop.call_soon(self._flush_scheduled)

    def _schedule(self) -> None:
        self._scheduled = True
        self._loop.call_soon(self._flush_scheduled)

    def _output_data(self) -> None:
        """A stream has data. A lone frame leaves at once, which saves it a turn of the loop.

        "Lone" is a guess: the last flush had a single write to send, and something came in, or a
        turn ended, since the last frame that left like this. What follows in the same turn waits
        for its end and leaves together.
        """
        if self._scheduled:
            return
        if self._receiving:
            self._scheduled = True
        elif self._eager:
            self._eager = False
            self._flush()
        else:
            self._schedule()

    def flush(self) -> None:
        if not self._receiving:
            self._flush()

    def _flush_scheduled(self) -> None:
        if self._scheduled:
            self._scheduled = False
            ring = self._session.urgent or self._session.ring
            self._eager = self._lone = len(ring) < 2 and (not ring or len(ring[0]._out) < 2)
            self._flush()

    def _flush(self) -> None:
        """Encrypt and send what is queued, as far as TCP takes it."""
        if self._paused or self._transport is None or self._session.dead or not self.established:
            return
        if self._flushing:
            if not self._scheduled:
                self._schedule()
            return
        # Taking frames makes streams writable, and those who write then may ask for a flush: what
        # was taken has to leave first.
        self._flushing = True
        try:
            parts = self._session.pull(self._flush_bytes)
            if parts:
                self._write(parts)
        finally:
            self._flushing = False
        # What TCP does not take waits where no urgent frame can overtake it: let that be little.
        if self._paused:
            self._flush_bytes = max(self._flush_bytes >> 1, _FLUSH_BYTES_MIN)
            return
        if self._flush_bytes < _FLUSH_BYTES:
            self._flush_bytes <<= 1
        if self._session.pending:
            if not self._scheduled:
                self._schedule()
        elif self._closing:
            # Last of all: some implementations hang up at once when they hear it.
            self._write([GOAWAY_FRAME])
            self._transport.close()
            self._end(None)

    def _write(self, parts: list[bytes | memoryview]) -> None:
        transport, cipher = self._transport, self._send_cipher
        assert transport is not None  # noqa: S101  # callers check
        assert cipher is not None  # noqa: S101
        size = sum(map(len, parts))
        if size <= _ALONE_BYTES:
            plain = parts[0] if len(parts) == 1 else b"".join(parts)
            out = (size + TAG_BYTES).to_bytes(2, "big") + cipher.encrypt(plain)
        else:
            out = b"".join(self._messages(parts, cipher))
        self.bytes_out += len(out)
        # As a view: what TCP does not take at once is cut off without a copy.
        transport.write(out if size <= _ALONE_BYTES else memoryview(out))

    @staticmethod
    def _messages(parts: list[bytes | memoryview], cipher: Cipher) -> list[bytes]:
        """Noise messages with their length prefixes. Long parts get their own, the rest share."""
        out: list[bytes] = []
        small: list[bytes | memoryview] = []
        small_bytes = 0
        encrypt = cipher.encrypt

        def seal(plain: bytes | memoryview) -> None:
            out.append((len(plain) + TAG_BYTES).to_bytes(2, "big"))
            out.append(encrypt(plain))

        for part in parts:
            rest = part
            if len(part) >= _ALONE_BYTES:
                if small:
                    seal(b"".join(small))
                    small, small_bytes = [], 0
                seal(rest[:PLAINTEXT_BYTES_MAX])
                rest = rest[PLAINTEXT_BYTES_MAX:]
                if not rest:
                    continue
            if small_bytes + len(rest) > PLAINTEXT_BYTES_MAX:
                seal(b"".join(small))
                small, small_bytes = [], 0
            small.append(rest)
            small_bytes += len(rest)
        if small:
            seal(b"".join(small))
        return out

    # --- the handshake ----------------------------------------------------------------------------

    def _wake_handshake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    async def _take(self, n: int | None = None) -> bytes:
        """The next `n` bytes of the handshake; without it, those that are there, at least one."""
        early = self._early
        while True:
            # Also where enough is there: what came last may have ended the connection.
            if self._session.dead:
                raise self.error or OverlayError("the connection ended", code="overlay.closed")
            if len(early) >= (n or 1):
                break
            self._more = self._loop.create_future()
            try:
                await self._more
            finally:
                self._more = None
        data = bytes(early[:n])
        del early[: len(data)]
        return data

    def _send(self, data: bytes) -> None:
        """Handshake bytes: plain before noise, one message afterwards."""
        if self._send_cipher is not None:
            data = (len(data) + TAG_BYTES).to_bytes(2, "big") + self._send_cipher.encrypt(data)
        self.bytes_out += len(data)
        if self._transport is not None:
            self._transport.write(data)

    async def _negotiate(self, protocol: str, admit: Callable[[], None] = lambda: None) -> None:
        """Agree on a protocol, once `admit` does not raise."""

        def agrees(proposal: str) -> bool:
            if proposal == protocol:
                admit()
            return proposal == protocol

        side: Proposer | Responder
        if self.initiator:
            side = Proposer((protocol,))
            self._send(side.start())
        else:
            side = Responder(agrees, proposals_max=self._limits.negotiation_proposals_max)
        while side.chosen is None:
            answer = side.receive(await self._take())
            if answer:
                self._send(answer)
        if self.initiator:
            admit()
        self._early[:0] = side.rest()

    async def _noise(self) -> None:
        handshake = NoiseHandshake(self._owner.noise, initiator=self.initiator)
        sent_at = math.inf
        for step in range(3):
            if (step % 2 == 0) == self.initiator:
                message = handshake.write_message()
                self._send(len(message).to_bytes(2, "big") + message)
                sent_at = self._loop.time()
            else:
                size = int.from_bytes(await self._take(2), "big")
                if sent_at < math.inf:  # no peer can answer such a message before it has it
                    self._session.rtt_s = self._loop.time() - sent_at
                if size > HANDSHAKE_BYTES_MAX:
                    raise Violation("noise: an oversize handshake message")
                handshake.read_message(await self._take(size))
        secured = handshake.secured
        assert secured is not None  # noqa: S101  # set by the third message
        if self._expect is not None and secured.peer != self._expect:
            raise PeerMismatch(f"{secured.peer} answered, not {self._expect}")
        if secured.peer == self._owner.noise.peer_id:
            raise PeerMismatch("the address is this node's own", code="overlay.dial_self")
        self.peer, self.channel_binding = secured.peer, secured.binding
        self._send_cipher, self._receive_cipher = secured.send, secured.receive
        early = bytes(self._early)
        self._early.clear()
        self._received(memoryview(early), len(early))

    async def _run_handshake(self) -> None:
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                await self._negotiate(NOISE)
                await self._noise()
                # A peer that is turned away does not hear that all is well first.
                await self._negotiate(YAMUX, partial(self._owner.admit_peer, self))
            self.remote = self.remote.with_peer(self.peer)
            self.established = True
            self.opened_at = self._loop.time()
            self._owner.established(self)
            early = bytes(self._early)
            self._early.clear()
            if early:
                self._session.feed(early)
        except TimeoutError:
            late = f"the handshake took longer than {self._limits.handshake_s:g} s"
            self._refuse("handshake.timeout", OverlayError(late, code="overlay.timeout"))
        except InvalidTag:
            self._refuse("handshake.failed", Violation(_TAMPERED))
        except (WetwareError, OSError) as exc:
            self._refuse("handshake.failed", exc)
        except BaseException as exc:
            self.abort(OverlayError("the handshake was cancelled", code="overlay.closed"))
            if not isinstance(exc, asyncio.CancelledError):
                log.error("handshake.defect", exc_info=True)
                return
            raise
        if not self._session.dead:
            self._timer = self._loop.call_later(self._limits.keepalive_s, self._keepalive)
            if not self.ready.done():
                self.ready.set_result(self)
            self._flush()

    # --- keepalive and the end --------------------------------------------------------------------

    def _progress(self) -> tuple[int, int]:
        """Grows while the peer sends, and while it takes what is sent to it."""
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self.bytes_in, self.bytes_out - waiting

    def _keepalive(self) -> None:
        seen = self._progress()
        if self._held_up():
            return
        stuck = self._paused and seen[1] == self._last_seen[1]
        if seen[0] == self._last_seen[0] or stuck:
            if not stuck:
                self._session.ping()
            timeout_s = self._limits.keepalive_timeout_s
            self._timer = self._loop.call_later(timeout_s, self._keepalive_over, seen, timeout_s)
        else:
            if self.tunnelled and self._session.pinged_at == math.inf:
                self._session.ping()
            self._timer = self._loop.call_later(self._limits.keepalive_s, self._keepalive)
        self._last_seen = seen

    def _keepalive_over(self, before: tuple[int, int], waited_s: float) -> None:
        seen, self._probed_at = self._progress(), None
        if seen[0] == before[0] or (self._paused and seen[1] == before[1]):
            why = "sent nothing" if seen[0] == before[0] else "took none of what waits for it"
            silent = f"the peer {why} for {waited_s:g} s after a ping"
            if self._transport is not None:
                sock = self._transport.get_extra_info("socket")
                if sock is not None:  # else the kernel goes on sending, and the peer hears nothing
                    with contextlib.suppress(OSError):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self._refuse("connection.keepalive", OverlayError(silent, code="overlay.keepalive"))
            return
        if self._held_up():
            return
        self._last_seen = seen
        self._timer = self._loop.call_later(self._limits.keepalive_s, self._keepalive)

    def _held_up(self) -> bool:
        """Whether a relay holds what it carries; then the connection has ended.

        What arrives may have been said long ago. Only an answer tells.
        """
        late_s = self._loop.time() - self._session.pinged_at
        limits = self._limits
        if not self.tunnelled or late_s < limits.keepalive_s + limits.keepalive_timeout_s:
            return False
        why = f"a ping through the relay was not answered for {late_s:.3g} s"
        self._refuse("connection.keepalive", OverlayError(why, code="overlay.keepalive"))
        return True

    def _give_up(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._end(None)

    def _end(self, reason: Exception | None) -> None:
        if self._session.dead:
            return
        self.closed = True
        if not self._closing:
            self.error = reason
        for timer in (self._timer, self._throttle):
            if timer is not None:
                timer.cancel()
        why = reason or OverlayError("closed by this node", code="overlay.closed")
        self._session.end(StreamReset(f"the connection ended: {why}"))
        # The connection is a cycle, which is collected some time later: until then it must not hold
        # what came, nor should its error, by the frames of its traceback.
        self._early.clear()
        self._tail = b""
        why.__traceback__ = None
        self._wake_handshake()
        if not self.ready.done():
            self.ready.set_exception(why)
            self.ready.exception()  # a dial that was given up leaves nobody to look
        self._owner.lost(self)
        if self._transport is None and not self._done.done():
            self._done.set_result(None)
