"""The bounds of the Gate and the broker: section `[login]` of ww.toml."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LoginLimits:
    """Bounds of what a stranger, and then a session, can make a node do.

    Attributes:
        deadline_s: From challenge to verdict; a person may have to confirm in a wallet.
        terminals_per_connection_max: Login attempts that one connection may begin.
        attempts_per_address_max: Login attempts a minute from one address (not on the unix socket).
        addresses_max: Addresses whose attempts are remembered; the longest silent is forgotten.
        sessions_max: Live sessions of this node.
        sessions_per_principal_max: Live sessions of one principal, so that one cannot use up all.
    """

    deadline_s: float = field(
        default=10.0,
        metadata={"help": "Seconds from challenge to verdict.", "min": 0.1, "max": 600},
    )
    terminals_per_connection_max: int = field(
        default=8,
        metadata={"help": "Login attempts per connection.", "min": 1, "max": 1024},
    )
    attempts_per_address_max: int = field(
        default=60,
        metadata={"help": "Login attempts per minute and address.", "min": 1, "max": 1_000_000},
    )
    addresses_max: int = field(
        default=4096,
        metadata={"help": "Addresses whose attempts are counted.", "min": 16, "max": 1_000_000},
    )
    sessions_max: int = field(
        default=4096, metadata={"help": "Live sessions of this node.", "min": 1, "max": 1_000_000}
    )
    sessions_per_principal_max: int = field(
        default=256,
        metadata={"help": "Live sessions of one principal.", "min": 1, "max": 1_000_000},
    )
