"""The data path between peers: TCP, multistream-select, noise and yamux, on asyncio alone.

Wire-compatible with js, go, rust and py libp2p, and importing none of them. A `LinkHost` listens,
dials and hands out `Stream`s; `LinkLimits` bounds everything that a peer can make it do.
"""

from __future__ import annotations

from wetware.overlay.link.connection import Connection
from wetware.overlay.link.host import GuestPort, LinkHost, allow_public_only, check_free
from wetware.overlay.link.limits import LinkLimits, LinkStats, Violation
from wetware.overlay.link.pipe import Pipe, StreamPipe
from wetware.overlay.link.yamux import Stream

__all__ = [
    "Connection",
    "GuestPort",
    "LinkHost",
    "LinkLimits",
    "LinkStats",
    "Pipe",
    "Stream",
    "StreamPipe",
    "Violation",
    "allow_public_only",
    "check_free",
]
