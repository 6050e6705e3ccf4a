"""The limits of one RPC connection."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """What one connection may hold at a time. Both ends have the same kinds of limits.

    A caller's own limits (`*_out_*`) are lower than what a server puts up with (`*_in_*`), so that
    a well-behaved peer waits at home and never meets the server's limits.

    Attributes:
        message_bytes_max: Parameters or results of one call. More fails at the sender with
            LimitExceeded; a receiver drops the connection before it buffers such a message.
            1 MiB keeps other calls' latency low and fits Cap'n Proto's own traversal limit.
        calls_out_max: Calls that wait for their results; more wait for a place.
        call_bytes_out_max: Parameters of these calls; more wait. The peer's memory, and ours.
        call_wait_s: How long a call may wait for a place before it fails with LimitExceeded: calls
            that wait for each other in a circle must not hang for ever.
        calls_in_max: Servants' methods that run for this peer; more fail with LimitExceeded.
        answers_max: Calls that the peer has not finished with; more drop the connection. Only a
            peer that ignores its own limits comes here.
        call_bytes_in_max: Parameters of calls that are not answered yet; beyond it nothing more is
            read from the connection until some are.
        result_bytes_out_max: Results that wait to be sent; further results are held back.
        out_bytes_max: All bytes that wait to be sent; more drop the connection: the peer does not
            read. Above the sum of what calls and results may use.
        partial_bytes_total_max: Incomplete messages over all connections of the process; beyond it
            the connection that holds most is dropped, those that nobody trusts yet first. One
            connection holds at most one incomplete message.
        message_s: How long the peer may take for one message once it has begun it; more drops the
            connection. A line of 30 kB/s sends the longest message in that time. What we ourselves
            hold back does not count.
        exports_max: Our objects that the peer holds; more fail with LimitExceeded.
        imports_max: The peer's objects that we hold; more fail with LimitExceeded.
        streams_max: Byte streams with the peer, attached or not; more fail with LimitExceeded. A
            peer can make each hold `bytestream.WINDOW_BYTES` that are not read.
        write_stall_s: The connection is dropped when nothing could be sent for so long.
        close_s: How long closing waits for the last bytes, and for methods that are being
            cancelled.
    """

    message_bytes_max: int = 1 << 20
    calls_out_max: int = 512
    call_bytes_out_max: int = 8 << 20
    call_wait_s: float = 30.0
    calls_in_max: int = 1024
    answers_max: int = 4096
    call_bytes_in_max: int = 16 << 20
    result_bytes_out_max: int = 8 << 20
    out_bytes_max: int = 32 << 20
    partial_bytes_total_max: int = 64 << 20
    message_s: float = 60.0
    exports_max: int = 4096
    imports_max: int = 4096
    streams_max: int = 64
    write_stall_s: float = 30.0
    close_s: float = 1.0


_ENVELOPE_BYTES = 64 << 10
"""What Cap'n Proto adds to parameters or results: the call's head and 24 bytes a capability."""


def wire_bytes_max(limits: RpcLimits) -> int:
    """How long a message of a peer with the same limits can be, all included.

    pycapnp leaves a word unused behind every Text that it sets. The word does not count as part of
    the parameters, but it travels; with at least a pointer and a word of text before it, it is at
    most half as much again.
    """
    return limits.message_bytes_max * 3 // 2 + _ENVELOPE_BYTES


STRANGER_CALLS_MAX = 64
"""Calls, and objects each way, of a connection that nobody trusts yet: a login takes a few."""
_STRANGER_MESSAGES = 2
"""Messages' worth of parameters or results that such a connection may hold."""


def for_strangers(limits: RpcLimits, message_bytes_max: int) -> RpcLimits:
    """`limits`, narrowed for a peer that has proved nothing: a fraction of the memory."""
    held = _STRANGER_MESSAGES * message_bytes_max
    return replace(
        limits,
        message_bytes_max=min(limits.message_bytes_max, message_bytes_max),
        calls_out_max=min(limits.calls_out_max, STRANGER_CALLS_MAX),
        call_bytes_out_max=min(limits.call_bytes_out_max, held),
        calls_in_max=min(limits.calls_in_max, STRANGER_CALLS_MAX),
        answers_max=min(limits.answers_max, 4 * STRANGER_CALLS_MAX),
        call_bytes_in_max=min(limits.call_bytes_in_max, held),
        result_bytes_out_max=min(limits.result_bytes_out_max, held),
        out_bytes_max=min(limits.out_bytes_max, 4 * held),
        exports_max=min(limits.exports_max, STRANGER_CALLS_MAX),
        imports_max=min(limits.imports_max, STRANGER_CALLS_MAX),
        streams_max=0,  # nothing that a stranger can call has one
    )
