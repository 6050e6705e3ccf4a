"""What a node finds in its libp2p guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wetware.base.finding import Finding, counted, error, ok, warning

if TYPE_CHECKING:
    from wetware.overlay.libp2p import OverlayStatus


def findings(status: OverlayStatus) -> list[Finding]:
    """The state of the libp2p guest, and whether it had to be started again."""
    why = f", the last time: {status.last_error}" if status.last_error else ""
    times = counted(status.restarts, "restart") + why
    remedy = "calls, members and sessions go on without it; the log says why, `ww status` how often"
    if status.state == "stopped":
        return [error("libp2p", f"it is not running{why}", "restart the node: `ww node`")]
    if status.restarts or status.state == "restarting":
        return [warning("libp2p", f"{status.state}, {times}", remedy)]
    return [ok("libp2p", f"{status.state}, {counted(status.dht_peers, 'peer')} in the DHT")]
