"""CIDs: the names of blocks. Of all hashes this store speaks sha2-256 alone.

Each CID has one text, which is also what a grant names: v0 in base58btc, v1 in lower-case base32.
Source: https://github.com/multiformats/cid
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Final

from wetware.base.varint import uvarint_at
from wetware.errors import InvalidArgument, WetwareError
from wetware.identity.peer_id import base58_decode, base58_encode

RAW: Final = 0x55
DAG_PB: Final = 0x70
BLOCK_BYTES_MAX: Final = 2 << 20
"""As Bitswap: no IPFS node takes a larger one."""
CID_CHARS_MAX: Final = 128
"""Of a text that is looked at; ours have 46 and 59."""

_SHA2_256: Final = b"\x12\x20"  # and its 32 bytes of digest
_V1: Final = {RAW: b"\x01\x55" + _SHA2_256, DAG_PB: b"\x01\x70" + _SHA2_256}
_CODECS: Final = {prefix: codec for codec, prefix in _V1.items()}


class BadBlock(WetwareError):
    """The bytes of a block are not what its CID, or the block that links to it, says they are."""

    code = "blob.bad_block"


def _invalid(text: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"bad CID {text[:CID_CHARS_MAX]!r}: {why}",
        hint="a CID looks like bafy… or bafk… (59 characters, base32, lower case) or Qm… (46), "
        "and has a sha2-256 hash: `ww blob put` prints one; a name is written name:/site/live",
        code="invalid.cid",
    )


@dataclass(frozen=True, slots=True)
class Cid:
    """The name of a block.

    Attributes:
        version: 0 or 1.
        codec: RAW or DAG_PB: how the block is read. Version 0 is always DAG_PB.
        digest: The sha2-256 of the block, 32 bytes. Blocks are stored by it alone.
    """

    version: int
    codec: int
    digest: bytes

    @classmethod
    def of(cls, codec: int, block: bytes, version: int = 1) -> Cid:
        """The CID of a block. Hashing takes about 1 ms a MiB: run it in a thread."""
        return cls(version, codec, hashlib.sha256(block).digest())

    @classmethod
    def parse(cls, text: str) -> Cid:
        """The CID of a canonical text; raises InvalidArgument "invalid.cid"."""
        try:
            return _parse(text)
        except ValueError as exc:
            raise _invalid(text, str(exc)) from None

    @classmethod
    def decode(cls, data: bytes) -> Cid:
        """The CID that `data` is the whole binary form of; raises InvalidArgument "invalid.cid"."""
        try:
            return _decode(data)
        except ValueError as exc:
            raise _invalid(data[:CID_CHARS_MAX].hex(), str(exc)) from None

    def __bytes__(self) -> bytes:
        return (_V1[self.codec] if self.version else _SHA2_256) + self.digest

    def __str__(self) -> str:
        if not self.version:
            return base58_encode(bytes(self))
        return "b" + base64.b32encode(bytes(self)).decode().rstrip("=").lower()


def _parse(text: str) -> Cid:
    if len(text) > CID_CHARS_MAX:
        raise ValueError(f"longer than {CID_CHARS_MAX} characters")
    if text.startswith("Qm"):
        cid = _decode(base58_decode(text))
    elif text.startswith("b"):
        padding = "=" * (-(len(text) - 1) % 8)
        cid = _decode(base64.b32decode(text[1:].upper() + padding))
    else:
        raise ValueError("it begins with neither b nor Qm")
    if str(cid) != text:
        raise ValueError(f"it is written {cid}")
    return cid


def _decode(data: bytes) -> Cid:
    if len(data) == 36 and (codec := _CODECS.get(data[:4])) is not None:
        return Cid(1, codec, data[4:])
    if len(data) == 34 and data[:2] == _SHA2_256:
        return Cid(0, DAG_PB, data[2:])
    check_cid(data)
    raise ValueError("its hash is not sha2-256, or its block is neither raw nor dag-pb")


def check_cid(data: bytes) -> None:
    """Check that `data` is a CID in binary, of any hash and codec; raises ValueError."""
    if len(data) == 36 and data[:4] in _CODECS:  # nearly all are
        return
    if data[:2] == _SHA2_256:
        if len(data) != 34:
            raise ValueError("a CID of version 0 with a hash that is not 32 bytes")
        return
    version, at = uvarint_at(data, 0)
    if version != 1:
        raise ValueError(f"a CID of version {version}")
    _, at = uvarint_at(data, at)
    _, at = uvarint_at(data, at)
    length, at = uvarint_at(data, at)
    if len(data) - at != length:
        raise ValueError("a CID with a hash that is cut short, or with bytes after it")


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes, and the CID that they are claimed to have."""

    cid: Cid
    data: bytes

    def check(self) -> None:
        """Check the size and the hash; raises BadBlock. Takes about 1 ms a MiB."""
        if len(self.data) > BLOCK_BYTES_MAX:
            raise BadBlock(
                f"block {self.cid} has {len(self.data)} bytes; at most {BLOCK_BYTES_MAX} are taken"
            )
        if hashlib.sha256(self.data).digest() != self.cid.digest:
            raise BadBlock(f"the bytes of block {self.cid} have another hash")
