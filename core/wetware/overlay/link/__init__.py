"""The data path between peers: TCP, multistream-select, noise and yamux, on asyncio alone.

Wire-compatible with js, go, rust and py libp2p, and importing none of them. A `LinkHost` listens,
dials and hands out `Stream`s; `LinkLimits` bounds everything that a peer can make it do.
"""

from __future__ import annotations

from wetware.overlay.link.host import LinkHost
from wetware.overlay.link.limits import LinkLimits, Violation
from wetware.overlay.link.pipe import Pipe
from wetware.overlay.link.tcp import check_free
from wetware.overlay.link.yamux import Connection, Stream

__all__ = [
    "Connection",
    "LinkHost",
    "LinkLimits",
    "Pipe",
    "Stream",
    "Violation",
    "check_free",
]
