"""The bounds of the Gate and the broker: what `setting` makes is in `[login]` and `[broker]`."""

from __future__ import annotations

from dataclasses import dataclass

from wetware.base.setting import setting


@dataclass(frozen=True, slots=True)
class LoginLimits:
    """What a stranger, and then a session, can make a node do.

    Attributes:
        terminals_per_connection_max: Login attempts that one connection may begin.
        addresses_max: Addresses whose attempts are remembered; the longest silent is forgotten.
        sessions_local_reserved: Of all sessions, how many only the unix socket can use, so that
            the node's owner gets in whatever others do.
        gates_per_connection_max: RPC streams to the Gate on one connection; a client needs one.
        gates_per_address_max: The same from one address, members aside.
        gates_max: The same in all, members aside: each costs some 80 KiB.
        stranger_message_bytes_max: Largest RPC message before a login; a proof fits.
        tunnels_per_session_max: Byte tunnels to other nodes of one session.
        tunnels_max: Byte tunnels that this node carries.
    """

    deadline_s: float = setting(
        10.0, "From challenge to verdict; a person may confirm in a wallet.", min=0.1, max=600
    )
    attempts_per_address_max: int = setting(
        60,
        "Failed login attempts a minute from one address (IPv6: one /64), the unix socket aside.",
        min=1,
        max=1_000_000,
    )
    sessions_max: int = setting(4096, "Live sessions of this node.", min=1)
    sessions_per_principal_max: int = setting(
        256, "Live sessions of one principal, so that one cannot use up all.", min=1
    )
    stranger_s_max: float = setting(
        60.0,
        "How long a connection to the node may last without a login; never less than `deadline_s` "
        "and five seconds.",
        min=1,
    )
    terminals_per_connection_max: int = 8
    addresses_max: int = 4096
    sessions_local_reserved: int = 32
    gates_per_connection_max: int = 4
    gates_per_address_max: int = 256
    gates_max: int = 2048
    stranger_message_bytes_max: int = 128 << 10
    tunnels_per_session_max: int = 8
    tunnels_max: int = 128


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """The grants of a node.

    Attributes:
        children_max: Derivations of one grant that may live at a time: a holder cannot fill the
            node's memory.
        depth_max: Derivations of derivations.
        clock_skew_s_max: If this node's clock differs by more from those of the other members,
            grants with an end are refused.
    """

    grants_max: int = setting(262_144, "Grants of this node, those of sessions included.", min=64)
    shares_per_principal_max: int = setting(
        4096, "References that may be out for one principal at a time.", min=1
    )
    children_max: int = 16_384
    depth_max: int = 32
    clock_skew_s_max: float = 30.0
