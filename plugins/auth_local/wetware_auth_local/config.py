"""Settings of auth_local."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AuthLocalConfig:
    """`[plugins.auth_local]`.

    Attributes:
        policy: A signed policy document (`ww policy export`) to begin with, so that this node joins
            an existing operator's cluster. Read only at the first start.
        catch_up_s: How long a login waits, after a start, for the first comparison of the policy
            with the other members': five seconds are some dials.
        policy_age_s_max: A node that belongs to a larger cluster admits nobody once its last
            comparison is longer ago: so long may a removed user still log in at a node that is cut
            off. Live sessions go on.
        recheck_s: How often, with jitter, the policy is compared with every connected member's.
            Changes do not wait for it; it finds what an announcement that was lost did not bring.
        exchange_s: For a member to answer, a whole document included: 512 KiB at 50 KiB/s.
    """

    policy: Path | None = field(
        default=None, metadata={"help": "Signed policy document to begin with, at the first start."}
    )
    catch_up_s: float = field(
        default=5.0,
        metadata={
            "help": "How long logins wait, after a start, to compare the policy with other nodes.",
            "min": 0,
            "max": 60,
        },
    )
    policy_age_s_max: float = field(
        default=86_400.0,
        metadata={
            "help": "A node that was out of touch with the other nodes for longer admits nobody.",
            "min": 1,
            "max": 10 * 365 * 86_400,
        },
    )
    recheck_s: float = field(
        default=30.0,
        metadata={
            "help": "How often the policy is compared with every connected node's.",
            "min": 1,
            "max": 3600,
        },
    )
    exchange_s: float = field(
        default=10.0,
        metadata={
            "help": "For another node to answer, with a document if need be.",
            "min": 1,
            "max": 300,
        },
    )
