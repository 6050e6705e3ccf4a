"""Settings of auth_local."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wetware.hookspecs import setting


@dataclass(frozen=True, slots=True)
class AuthLocalConfig:
    """Users and roles in a document that the operator signs.

    What `setting` makes is in `[plugins.auth_local]` of ww.toml.

    Attributes:
        catch_up_s: How long a login waits, after a start, for the first comparison of the policy
            with the other members': five seconds are some dials.
        recheck_s: How often, with jitter, the policy is compared with every connected member's.
            Changes do not wait for it; it finds what an announcement that was lost did not bring.
        exchange_s: For a member to answer, a whole document included: 512 KiB at 50 KiB/s.
    """

    policy: Path | None = setting(
        None,
        "A signed policy document (`ww policy export`) to begin with, so that this node joins an "
        "existing operator's cluster. Read only at the first start.",
    )
    policy_age_s_max: float = setting(
        86_400.0,
        "A node of a larger cluster admits nobody once its policy was compared with no other "
        "node's for so long: so long may a removed user still log in at a node that is cut off. "
        "Live sessions go on.",
        min=1,
        max=10 * 365 * 86_400,
    )
    catch_up_s: float = 5.0
    recheck_s: float = 30.0
    exchange_s: float = 10.0
