"""Who may speak what: one decision, per peer and protocol class.

Until nodes carry certificates, the members of a cluster are the peers that the configuration of
this node names (`[node] peers`), and membership is mutual: each side names the other.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from wetware.access import Access as Access
from wetware.log import get_logger

if TYPE_CHECKING:
    from wetware.identity import PeerId

log = get_logger("admission")

REFUSALS_LOGGED_S = 60.0
"""A refusal of the same peer and protocol is logged once in this time: logs are finite."""
REFUSALS_REMEMBERED_MAX = 1024


class Admission:
    """Decides whether a peer may open a stream. The only place that does.

    Args:
        members: Peer IDs that are members of the cluster.
        open_protocols: Protocol IDs of class OPEN that the configuration names.
    """

    def __init__(self, members: Iterable[PeerId] = (), open_protocols: Iterable[str] = ()) -> None:
        self._members = frozenset(members)
        self._open = frozenset(open_protocols)
        self._refused: OrderedDict[tuple[str, str], float] = OrderedDict()

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
            self._log_refusal(peer, protocol, access)
        return allowed

    def _log_refusal(self, peer: PeerId, protocol: str, access: Access) -> None:
        now, key = time.monotonic(), (str(peer), protocol)
        last = self._refused.get(key)
        if last is not None and now - last < REFUSALS_LOGGED_S:
            return
        self._refused[key] = now
        self._refused.move_to_end(key)
        if len(self._refused) > REFUSALS_REMEMBERED_MAX:
            self._refused.popitem(last=False)
        log.warning("protocol.refused", peer=peer, protocol=protocol, access=access.value)
