"""Who may open a stream for a protocol: the classes that `wetware.overlay.admission` decides by."""

from __future__ import annotations

import enum


class Access(enum.Enum):
    """The class of a protocol: who may open a stream for it."""

    PUBLIC = "public"
    """Any peer: identify, ping, the Gate. Bounded and rate-limited per address."""
    MEMBER = "member"
    """Members of the cluster only: pubsub, membership, peer RPC, blob."""
    OPEN = "open"
    """Any peer, for protocols that the configuration names."""
