"""The contract's events: decoding them strictly, and folding them into the hash of the history.

The layouts are those of docs/reference/auth-evm-contract.md. A log is taken only in the one form
that the contract emits: anything else is a lie or a defect of the endpoint that it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from eth_hash.auto import keccak

from wetware_auth_evm.chain.errors import BadLog

WORD: Final = 32
ROOT: Final = bytes(WORD)
"""The scope whose records hold in every scope."""
ANY_ROLE: Final = bytes(WORD)
"""In an admin's record: every role."""
NOBODY: Final = bytes(20)

_SIGNATURES: Final = {
    "Granted": "bytes32 role,uint40 not_before,uint40 expiry,uint128 rights,uint48 serial,"
    "address by,uint8 via",
    "Revoked": "bytes32 role,address by",
    "RevokedAll": "address by",
    "ScopeReset": "",
    "AdminSet": "bytes32 role,uint40 expiry,uint128 rights,uint48 serial,address by",
    "KeyBound": "bytes32 role,bytes32 key,uint40 expiry",
    "KeyUnbound": "bytes32 role,bytes32 key,address by",
    "Paused": "",
    "Unpaused": "",
    "OwnerProposed": "uint40 ready_at",
    "OwnerChanged": "address previous",
}
"""Event → the fields of its data. All have the topics seq (uint48), account and scope."""


class Event(NamedTuple):
    """One change of the contract.

    Attributes:
        name: E.g. "Granted".
        seq: Its number, from 1.
        account: Whom it is about, 20 bytes.
        scope: Where, 32 bytes.
        data: The other fields: integers, and bytes for bytes32 and addresses.
        leaf: Hash of the log.
        raw: The log: topics, then data.
    """

    name: str
    seq: int
    account: bytes
    scope: bytes
    data: Mapping[str, Any]
    leaf: bytes
    raw: bytes


@dataclass(frozen=True, slots=True)
class _Layout:
    name: str
    fields: tuple[tuple[str, str, int], ...]
    """(name, kind: "uint", "address" or "bytes32", bits)"""


def _layout(name: str, text: str) -> tuple[bytes, _Layout]:
    fields: list[tuple[str, str, int]] = []
    types = ["uint48", "address", "bytes32"]
    for part in filter(None, text.split(",")):
        kind, label = part.split()
        types.append(kind)
        bits = int(kind[4:]) if kind.startswith("uint") else 160 if kind == "address" else 256
        fields.append((label, kind.rstrip("0123456789") if kind != "bytes32" else kind, bits))
    return keccak(f"{name}({','.join(types)})".encode()), _Layout(name, tuple(fields))


LAYOUTS: Final = dict(_layout(name, text) for name, text in _SIGNATURES.items())


def _uint(word: bytes, bits: int, what: str) -> int:
    value = int.from_bytes(word, "big")
    if value >> bits:
        raise BadLog(f"{what} is wider than {bits} bits")
    return value


def _address(word: bytes, what: str) -> bytes:
    if any(word[:12]):
        raise BadLog(f"{what} is no address")
    return word[12:]


def decode(topics: tuple[bytes, ...], data: bytes) -> Event:
    """A log of the contract; raises BadLog for anything that it does not emit."""
    if len(topics) != 4 or any(len(topic) != WORD for topic in topics):
        raise BadLog(f"{len(topics)} topics")
    layout = LAYOUTS.get(topics[0])
    if layout is None:
        raise BadLog("an unknown event")
    if len(data) != WORD * len(layout.fields):
        raise BadLog(f"{layout.name} with {len(data)} bytes of data")
    values: dict[str, Any] = {}
    for index, (label, kind, bits) in enumerate(layout.fields):
        word = data[index * WORD : (index + 1) * WORD]
        if kind == "uint":
            values[label] = _uint(word, bits, label)
        elif kind == "address":
            values[label] = _address(word, label)
        else:
            values[label] = word
    raw = b"".join((*topics, data))
    return Event(
        name=layout.name,
        seq=_uint(topics[1], 48, "seq"),
        account=_address(topics[2], "account"),
        scope=topics[3],
        data=values,
        leaf=keccak(raw),
        raw=raw,
    )


def genesis(chain_id: int, contract: bytes) -> bytes:
    name = b"WetwareACL/1".ljust(WORD, b"\0")
    return keccak(name + chain_id.to_bytes(WORD, "big") + contract.rjust(WORD, b"\0"))


def fold(head: bytes, leaf: bytes) -> bytes:
    """The hash of the history with one more event."""
    return keccak(head + leaf)


def role_id(name: str) -> bytes:
    """A role's name as the contract has it; raises ValueError for one that it cannot hold."""
    encoded = name.encode()
    if not 1 <= len(encoded) <= WORD or b"\0" in encoded:
        raise ValueError(f"a role's name has 1 to {WORD} bytes of UTF-8, not {len(encoded)}")
    return encoded.ljust(WORD, b"\0")


def role_name(role: bytes) -> str | None:
    """The inverse of `role_id`; None for what is no name."""
    text = role.rstrip(b"\0")
    try:
        return text.decode() if text and b"\0" not in text else None
    except UnicodeDecodeError:
        return None
