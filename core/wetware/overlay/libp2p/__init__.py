"""The control plane: libp2p as a supervised guest. The only package that knows trio and libp2p.

Importing it imports neither; `Overlay.run` does, in a thread. See docs/adr/0002 and 0003.
"""

from wetware.overlay.libp2p.contract import (
    OverlayLimits,
    OverlayStatus,
    OverlayTimeout,
    OverlayUnavailable,
    Provider,
)
from wetware.overlay.libp2p.overlay import Overlay

__all__ = [
    "Overlay",
    "OverlayLimits",
    "OverlayStatus",
    "OverlayTimeout",
    "OverlayUnavailable",
    "Provider",
]
