"""The bounds of the link: one named limit per queue, frame, table and wait.

Every field says why it has its value. A peer that breaks a rule of the protocol, or floods, loses
its connection (`Violation`); one that merely asks for more than a limit grants is refused or
slowed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from wetware.base.setting import setting
from wetware.errors import OverlayError

KIB, MIB = 1 << 10, 1 << 20
YAMUX_WINDOW_BYTES = 256 * KIB
"""What every new yamux stream may send before it hears of a window: fixed by yamux/1.0.0."""


class Violation(OverlayError):
    """The peer broke the protocol or a limit of it; its connection has ended."""

    code = "overlay.violation"


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """Connections, and what they may hold.

    Times are seconds, sizes are bytes, the rest are counts. What `setting` makes is in
    `[link]` of ww.toml.

    Attributes:
        connections_privileged: Inbound connections that only privileged peers (members) get, at
            most a quarter of all inbound ones; beyond it they take the places of strangers. So that
            a member's connection does not depend on finding a stranger to end.
        connections_per_peer_max: Two arise when both ends dial at once; beyond the limit the oldest
            connection of that peer ends: a peer that restarted is not shut out by its own past.
        stranger_idle_s: After this time without a stream, a stranger's connection is closed: what
            is not used is not held. An honest peer opens its first stream at once. What this side
            dialled has no other owner: a relay that an address named, say, and that led nowhere.
        handshakes_max: Inbound handshakes pending in all; one costs about 1 ms of CPU, and a file
            descriptor on top of connections_max. Beyond it the oldest of the address with most
            makes room for an address with fewer.
        handshakes_per_ip_max: Inbound handshakes pending from one address: the slow-loris bound.
        handshake_s: From TCP connect to the muxer; a handshake takes three round trips.
        negotiation_s: For the protocol of one stream to be agreed, in both directions.
        negotiation_proposals_max: Proposals in one negotiation; an honest dialler has a few.
        dial_s: Default for a whole `dial`, over all addresses.
        dial_stagger_s: Head start of an address over the next one (RFC 8305 suggests 250 ms).
        dial_addrs_max: Addresses tried in one dial; a peer may advertise any number.
        dials_max: TCP connections being opened at once, in all dials.
        duplicate_idle_s: A second connection to a peer with no streams on it ends after this time.
        streams_in_per_connection_max: Streams that the peer has open, running handlers included.
        streams_out_per_connection_max: Streams that this side has open.
        stream_opens_per_s: Sustained rate of streams that a peer opens; more is not useful work.
        stream_opens_burst: How many it may open at once above that rate.
        stranger_opens_per_s: The same for all strangers of one address together, whatever keys and
            connections they have; one that opens more is cut off. A stream costs a quarter of a
            millisecond and more, before anybody has a limit of its own on it.
        stranger_opens_burst: How many at once above that rate: a tenth of a second of work.
        stream_aborts_per_s: Sustained rate of streams that a peer opens and resets before agreeing
            on a protocol ("rapid reset"); an honest dialler does it when it is cancelled.
        stream_aborts_burst: How many at once above that rate.
        control_frames_per_s: Sustained rate of pings and of frames that say nothing.
        control_frames_burst: How many at once above that rate.
        frames_per_s: Sustained rate of frames of any kind from one connection; beyond it the link
            reads that connection more slowly. Above what a core can make use of.
        frames_burst: How many at once above that rate.
        control_queued_max: Control frames queued for a peer that does not read; then it is cut off.
        frame_bytes_max: The longest data frame accepted. It is never buffered as a whole; the bound
            is a sanity check, since a frame beyond the stream's window is a violation anyway.
        stream_window_bytes: How far the receive window of a stream that is read grows, from
            yamux's 256 KiB: bandwidth × round trip, e.g. 4 MiB = 320 Mbit/s at 100 ms. Twice as
            far on a connection that another node carries, whose path has two hops of these.
        buffered_per_connection_bytes_max: Received and not yet read, on one connection; beyond it
            the stream with most unread bytes is reset. Half may be promised as grown windows. The
            first windows of all streams that a peer may open are four times this.
        stream_unsent_bytes_max: Accepted by `write` and not yet sent, on one stream: backpressure
            begins here. Covers a loop turn at full speed.
        stream_unsent_bytes_min: What a stream may always hold unsent, however full the connection.
        unsent_per_connection_bytes_max: Unsent on one connection before its streams fall to the
            minimum: a peer that opens many streams and reads none.
        urgent_flush_bytes_max: What urgent streams together may send ahead of the others in one
            flush of a connection (at most half of it): a few dozen membership frames. More than
            that waits for the next flush, so that urgency cannot starve the rest.
        notsent_bytes_max: What the kernel queues beyond what the path carries (TCP_NOTSENT_LOWAT,
            where the platform has it). An urgent frame waits behind this much at most: 0.1 s at
            10 Mbit/s, where the usual send buffer holds 3 s.
        keepalive_s: Silence after which the peer is pinged; one that is carried, always.
        keepalive_timeout_s: Silence after that ping, or time in which a peer takes none of what
            waits for it, after which the connection ends. One that is carried ends as well where a
            ping is not answered for the sum of the two: its relay may hold what it carries.
        close_s: How long a graceful close tries to get rid of what is queued.
        linger_s: How long a stream that is finished here waits for the peer's FIN before a reset.
        handler_grace_s: How long a handler may go on after a reset; then it is cancelled.
        listen_backlog: Connections that the kernel holds before they are accepted.
    """

    connections_max: int = setting(
        1024,
        "Established connections; handshakes pending come on top. A connection costs some 50 KiB "
        "and a file descriptor (the usual limit of a process is 1024; raise both together). An "
        "eighth is kept for dials.",
        min=1,
    )
    connections_privileged: int = 128
    connections_per_peer_max: int = 4
    connections_per_ip_max: int = setting(
        64,
        "Inbound connections of strangers at one address (IPv6: one /64), so that a single host "
        "cannot take every place: it takes a dozen. A newcomer beyond it replaces the longest idle "
        "one. Clients may sit behind one NAT; privileged peers do not count.",
        min=1,
    )
    stranger_idle_s: float = 60.0
    handshakes_max: int = 128
    handshakes_per_ip_max: int = 64
    handshake_s: float = 10.0
    negotiation_s: float = 10.0
    negotiation_proposals_max: int = 32
    dial_s: float = 15.0
    dial_stagger_s: float = 0.25
    dial_addrs_max: int = 16
    dials_max: int = 64
    duplicate_idle_s: float = 10.0
    streams_in_per_connection_max: int = 1024
    streams_out_per_connection_max: int = 8192
    stream_opens_per_s: float = 1000.0
    stream_opens_burst: int = 2000
    stranger_opens_per_s: float = 50.0
    stranger_opens_burst: int = 400
    stream_aborts_per_s: float = 50.0
    stream_aborts_burst: int = 1000
    control_frames_per_s: float = 200.0
    control_frames_burst: int = 2000
    frames_per_s: float = 200_000.0
    frames_burst: int = 400_000
    control_queued_max: int = 16_384
    frame_bytes_max: int = 16 * MIB
    stream_window_bytes: int = 4 * MIB
    buffered_per_connection_bytes_max: int = 64 * MIB
    buffered_bytes_max: int = setting(
        256 * MIB, "Memory for what all connections received and nobody has read yet.", min=1
    )
    stream_unsent_bytes_max: int = 256 * KIB
    stream_unsent_bytes_min: int = 16 * KIB
    unsent_per_connection_bytes_max: int = 16 * MIB
    unsent_bytes_max: int = setting(
        128 * MIB, "Memory for what waits to be sent on all connections.", min=1
    )
    urgent_flush_bytes_max: int = 32 * KIB
    notsent_bytes_max: int = 128 * KIB
    keepalive_s: float = 15.0
    keepalive_timeout_s: float = 10.0
    close_s: float = 1.0
    linger_s: float = 30.0
    handler_grace_s: float = 5.0
    listen_backlog: int = 256

    def within(self, files: int) -> LinkLimits:
        """These limits, lowered to what fits into so many file descriptors."""
        pending = max(1, files // 8)
        return replace(
            self,
            connections_max=min(self.connections_max, max(1, files - 2 * pending)),
            handshakes_max=min(self.handshakes_max, pending),
            dials_max=min(self.dials_max, pending),
        )
