"""Addresses as people write them, and the hash that all of the chain is made of.

Imports nothing heavy: the hash is imported when it is first used, which takes 60 ms that a command
with a session does without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from wetware.errors import InvalidArgument


@functools.cache
def _keccak() -> Callable[[bytes], bytes]:
    from eth_hash.auto import keccak as implementation

    return implementation


def keccak(data: bytes) -> bytes:
    """Keccak-256, 32 bytes."""
    return _keccak()(data)


def checksum(address: bytes) -> str:
    """An address as people write it (EIP-55)."""
    text = address.hex()
    hashed = keccak(text.encode()).hex()
    return "0x" + "".join(
        c.upper() if int(h, 16) >= 8 else c for c, h in zip(text, hashed, strict=False)
    )


def parse_address(text: str) -> bytes:
    """20 bytes; raises InvalidArgument for what is none, or has a wrong checksum."""
    plain = text.strip()
    try:
        address = bytes.fromhex(plain[2:]) if plain[:2] in ("0x", "0X") else b""
    except ValueError:
        address = b""
    if len(address) != 20 or len(plain) != 42:
        raise InvalidArgument(
            f"{plain[:60]!r} is not an address", hint="write 0x and 40 hex digits"
        )
    digits = plain[2:]
    if digits not in (digits.lower(), digits.upper()) and checksum(address)[2:] != digits:
        raise InvalidArgument(
            f"{plain} has a typing error: its checksum is wrong",
            hint="copy the address again; all in small letters, it is taken without a check",
        )
    return address
