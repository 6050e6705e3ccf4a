"""The bounds of the Gate and the broker: section `[login]` of ww.toml."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LoginLimits:
    """Bounds of what a stranger, and then a session, can make a node do.

    Attributes:
        deadline_s: From challenge to verdict; a person may have to confirm in a wallet.
        terminals_per_connection_max: Login attempts that one connection may begin.
        attempts_per_address_max: Failed login attempts a minute from one address (not on the unix
            socket); of IPv6 a /64 is one address.
        addresses_max: Addresses whose attempts are remembered; the longest silent is forgotten.
        sessions_max: Live sessions of this node.
        sessions_local_reserved: Of these, how many only the unix socket can use, so that the
            node's owner gets in whatever others do.
        sessions_per_principal_max: Live sessions of one principal, so that one cannot use up all.
        gates_per_connection_max: RPC streams to the Gate on one connection; a client needs one.
        gates_per_address_max: RPC streams to the Gate from one address.
        gates_max: RPC streams to the Gate in all: each costs some 80 KiB.
        stranger_message_bytes_max: Largest RPC message before a login; a proof fits.
        stranger_s_max: How long a connection to the Gate lasts without a login; never less than
            `deadline_s` and five seconds.
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
    sessions_local_reserved: int = field(
        default=32,
        metadata={"help": "Sessions kept for the unix socket.", "min": 0, "max": 1_000_000},
    )
    gates_per_connection_max: int = field(
        default=4,
        metadata={"help": "RPC streams to the Gate per connection.", "min": 1, "max": 1024},
    )
    gates_per_address_max: int = field(
        default=256,
        metadata={"help": "RPC streams to the Gate per address.", "min": 1, "max": 1_000_000},
    )
    gates_max: int = field(
        default=2048,
        metadata={"help": "RPC streams to the Gate in all.", "min": 1, "max": 1_000_000},
    )
    stranger_message_bytes_max: int = field(
        default=128 << 10,
        metadata={
            "help": "Largest RPC message before somebody has logged in.",
            "min": 65536,
            "max": 1 << 20,
        },
    )
    stranger_s_max: float = field(
        default=60.0,
        metadata={
            "help": "Seconds that a connection to the Gate may last without a login.",
            "min": 1,
            "max": 3600,
        },
    )
    tunnels_per_session_max: int = field(
        default=8,
        metadata={"help": "Byte tunnels to other nodes of one session.", "min": 1, "max": 1024},
    )
    tunnels_max: int = field(
        default=128,
        metadata={"help": "Byte tunnels that this node carries.", "min": 1, "max": 65536},
    )
