"""Who may speak what: one decision, per peer and protocol class.

Until nodes carry certificates, the members of a cluster are the peers that the configuration of
this node names (`[node] peers`), and membership is mutual: each side names the other.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.log import get_logger

if TYPE_CHECKING:
    from wetware.identity import PeerId

log = get_logger("admission")


class Access(enum.Enum):
    """The class of a protocol: who may open a stream for it."""

    PUBLIC = "public"
    """Any peer: identify, ping, the Gate. Bounded and rate-limited per address."""
    MEMBER = "member"
    """Members of the cluster only: pubsub, membership, peer RPC, blob."""
    OPEN = "open"
    """Any peer, for protocols that the configuration names."""


class Admission:
    """Decides whether a peer may open a stream. The only place that does.

    Args:
        members: Peer IDs that are members of the cluster.
        open_protocols: Protocol IDs of class OPEN that the configuration names.
    """

    def __init__(self, members: Iterable[PeerId] = (), open_protocols: Iterable[str] = ()) -> None:
        self._members = frozenset(members)
        self._open = frozenset(open_protocols)

    def is_member(self, peer: PeerId) -> bool:
        """Whether `peer` is a member of the cluster."""
        return peer in self._members

    def __call__(self, peer: PeerId, protocol: str, access: Access) -> bool:
        """Whether `peer` may open a stream for `protocol`; refusals are logged."""
        match access:
            case Access.PUBLIC:
                allowed = True
            case Access.MEMBER:
                allowed = peer in self._members
            case Access.OPEN:
                allowed = protocol in self._open
        if not allowed:
            log.warning("protocol.refused", peer=peer, protocol=protocol, access=access.value)
        return allowed
