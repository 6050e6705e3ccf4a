"""The bounds of the Gate and the broker: sections `[login]` and `[broker]` of ww.toml."""

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


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """Bounds of the grants of a node: section `[broker]` of ww.toml.

    Attributes:
        grants_max: Grants in the tree, those of sessions included.
        children_max: Derivations of one grant that may live at a time: a holder cannot fill the
            node's memory.
        depth_max: Derivations of derivations.
        shares_per_principal_max: Sturdy references that may be out for one principal.
        lease_s: For how long a node may use a reference of another one without hearing from it.
        adoptions_per_session_max: References to other nodes that a session holds through this one.
        adoptions_max: The same of all sessions.
        clock_skew_s_max: If this node's clock differs by more from those of the other members,
            grants with an end are refused.
    """

    grants_max: int = field(
        default=262_144, metadata={"help": "Grants of this node.", "min": 64, "max": 1 << 24}
    )
    children_max: int = field(
        default=16_384,
        metadata={"help": "Living derivations of one grant.", "min": 16, "max": 1 << 24},
    )
    depth_max: int = field(
        default=32, metadata={"help": "Derivations of derivations.", "min": 4, "max": 256}
    )
    shares_per_principal_max: int = field(
        default=4096,
        metadata={"help": "Living shares of one principal.", "min": 1, "max": 1 << 24},
    )
    lease_s: float = field(
        default=15.0,
        metadata={
            "help": "Seconds that a reference of another node works without hearing from it.",
            "min": 1,
            "max": 3600,
        },
    )
    adoptions_per_session_max: int = field(
        default=64,
        metadata={"help": "References of other nodes per session.", "min": 1, "max": 65_536},
    )
    adoptions_max: int = field(
        default=4096,
        metadata={"help": "References of other nodes in all.", "min": 1, "max": 1 << 20},
    )
    clock_skew_s_max: float = field(
        default=30.0,
        metadata={
            "help": "Seconds of clock difference beyond which grants with an end are refused.",
            "min": 1,
            "max": 86_400,
        },
    )
