"""core.capnp, loaded, and its structs as the dataclasses of `wetware.identity`.

Shared by the broker, which serves these interfaces, and the client, which calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wetware import rpc
from wetware.errors import InvalidArgument
from wetware.identity import NONCE_BYTES, Challenge, Channel, LoginStatus, PeerId, Proof

CORE = rpc.load(Path(__file__).parents[1] / "schema" / "core.capnp")

GATE_PROTOCOL = "/wetware/gate/1.0.0"
"""The libp2p protocol of a stream that carries RPC with a Gate as its bootstrap object."""


def status_name(status: LoginStatus) -> str:
    """The enumerant of `LoginStatus` in core.capnp."""
    head, *rest = status.name.lower().split("_")
    return head + "".join(word.capitalize() for word in rest)


_STATUS_BY_NAME = {status_name(status): status for status in LoginStatus}


def status_from_name(name: str) -> LoginStatus:
    """The inverse; a name from a newer peer is UNINITIALIZED, which never grants."""
    return _STATUS_BY_NAME.get(name, LoginStatus.UNINITIALIZED)


def challenge_to_wire(challenge: Challenge) -> dict[str, object]:
    """As the struct `Challenge` of core.capnp."""
    return {
        "nonce": challenge.nonce,
        "verifier": str(challenge.verifier),
        "cluster": challenge.cluster,
        "channel_kind": challenge.channel.kind,
        "channel_value": challenge.channel.value,
        "schemes": list(challenge.schemes),
        "policy_epoch": challenge.policy_epoch,
        "not_after_ms": challenge.not_after_ms,
    }


def challenge_from_wire(fields: Mapping[str, Any]) -> Challenge:
    """From the struct `Challenge`; raises InvalidArgument."""
    if len(fields["nonce"]) != NONCE_BYTES:
        raise InvalidArgument(f"a challenge's nonce has {NONCE_BYTES} bytes")
    return Challenge(
        nonce=fields["nonce"],
        verifier=PeerId.parse(fields["verifier"]),
        cluster=fields["cluster"],
        channel=Channel(fields["channel_kind"], fields["channel_value"]),
        schemes=tuple(fields["schemes"]),
        policy_epoch=fields["policy_epoch"],
        not_after_ms=fields["not_after_ms"],
    )


def proof_to_wire(proof: Proof) -> dict[str, object]:
    """As the struct `Proof`."""
    return {"scheme": proof.scheme, "payload": proof.payload, "signed": proof.signed}


def proof_from_wire(fields: Mapping[str, Any]) -> Proof:
    """From the struct `Proof`; the broker judges the content."""
    return Proof(fields["scheme"], fields["payload"], fields["signed"])
