"""Names used by all tests of the contract."""

from __future__ import annotations

from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from .model import ANY, GUARDIAN, NOBODY, ROOT


def _person(name: str) -> str:
    return to_checksum_address(keccak(name.encode())[12:])


def word(name: str) -> bytes:
    """A role or scope by name."""
    return name.encode().ljust(32, b"\0")


OWNER, ADMIN, ADMIN_2, ALICE, BOB, CAROL, STRANGER = map(
    _person, ("owner", "admin", "admin 2", "alice", "bob", "carol", "stranger")
)
TEAM, LAB = word("team"), word("lab")
MEMBER, NODE = word("member"), word("node")
KEY, KEY_2 = keccak(b"key"), keccak(b"key 2")
ALL = 2**128 - 1

__all__ = [
    "ADMIN",
    "ADMIN_2",
    "ALICE",
    "ALL",
    "ANY",
    "BOB",
    "CAROL",
    "GUARDIAN",
    "KEY",
    "KEY_2",
    "LAB",
    "MEMBER",
    "NOBODY",
    "NODE",
    "OWNER",
    "ROOT",
    "STRANGER",
    "TEAM",
    "word",
]
