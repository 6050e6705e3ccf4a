"""What a node is doing."""

from __future__ import annotations

import os
from math import nan
from typing import TYPE_CHECKING

from wetware.base.version import __version__
from wetware.node.process import rss_bytes
from wetware.overlay.membership.known import State

if TYPE_CHECKING:
    from wetware.node.parts import Parts


def status_of(node: Parts, details: bool) -> dict[str, object]:
    """The struct NodeStatus of core.capnp; `details` are for operators."""
    connections = node.host.connections()
    members = [c for c in connections if node.admission.is_member(c.peer)]
    overlay, lag, own = node.overlay.status(), node.lag.recent(), node.admission.own
    offset_s = node.membership.clock_offset_s
    return {
        "peer_id": str(node.key.peer_id),
        "name": node.name,
        "members": sum(m.state is State.ALIVE for m in node.membership.members()),
        "loop_lag_p99_s": lag.p99_s,
        "loop_lag_max_s": lag.max_s,
        "clock_offset_s": nan if offset_s is None else offset_s,
        "clock_wrong": node.tree.clock_wrong,
        "time_s": node.clock.time(),
        "certificate_not_after_ms": own.not_after_ms,
        "rights": sorted(own.rights),
        "cluster": node.cluster,
        "version": __version__,
        "uptime_s": node.clock.monotonic() - node.started_at,
        "addrs": [str(addr) for addr in node.addrs],
        "reached": node.reached,
        "peers": [
            {
                "peer_id": str(connection.peer),
                "addr": str(connection.remote),
                "via": node.called(connection.remote.relay) if connection.tunnelled else "",
                "member": node.admission.is_member(connection.peer),
                "bytes_in": connection.bytes_in,
                "bytes_out": connection.bytes_out,
            }
            for connection in (connections if details else members)
        ],
        "strangers": len(connections) - len(members),
        "users": node.users,
        "services": sorted(node.services),
        "ungranted": node.broker.ungranted(),
        "auth": node.backend.name,
        "auth_also": [backend.name for backend in node.also],
        "policy_epoch": node.backend.epoch,
        "sessions": node.broker.sessions,
        "overlay_state": overlay.state,
        "overlay_restarts": overlay.restarts,
        "overlay_error": (details and overlay.last_error) or "",
        "memory_bytes": rss_bytes(),
        "pid": os.getpid(),
        "plugins": [
            {
                "name": p.name,
                "dist": p.offer.dist,
                "state": p.state,
                "reason": p.reason if details else "",
            }
            for p in node.plugins.report
        ],
    }
