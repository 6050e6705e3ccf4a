"""Texts that people pass on: a prefix and base64url of CBOR with four bytes of checksum.

So that a copy that lost its end, or was changed, is called just that.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from wetware.base import cbor
from wetware.base.multiaddr import Multiaddr
from wetware.errors import InvalidArgument

NAMED: Final = "name:"
"""What a text begins with that is a name of the cluster, see `Session.named`: no other is one."""
TEXT_CHARS_MAX: Final = 16_384
ADDRS_MAX: Final = 16
_CHECKSUM_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class TextForm:
    """One kind of text.

    Attributes:
        prefix: With its version, e.g. "wwt1".
        what: For messages, and the code `invalid.WHAT`.
        keys: Of the CBOR map, exactly.
        hint: What to do about a damaged one.
    """

    prefix: str
    what: str
    keys: frozenset[str]
    hint: str

    def bad(self, why: str) -> InvalidArgument:
        """The error for a text that is not one."""
        return InvalidArgument(f"not a {self.what}: {why}", hint=self.hint, code=self.code)

    @property
    def code(self) -> str:
        return f"invalid.{self.what.replace(' ', '_')}"

    def encode(self, value: Mapping[str, Any]) -> str:
        """The text of a map with the keys, "v" among them."""
        data = cbor.encode(value)
        data += hashlib.sha256(data).digest()[:_CHECKSUM_BYTES]
        return self.prefix + _base64(data)

    def decode(self, text: str) -> dict[str, Any]:
        """The inverse of `encode`; raises InvalidArgument, which does not contain the text."""
        text = text.strip()
        if not text.startswith(self.prefix):
            raise self.bad(f"it does not begin with {self.prefix}")
        if len(text) > TEXT_CHARS_MAX:
            raise self.bad(f"longer than {TEXT_CHARS_MAX} characters")
        body = text[len(self.prefix) :]
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            data = b""
        # The decoder passes over bits that the last character leaves over, and takes "+" and "/".
        if _base64(data) != body:
            raise self.bad("it has characters that do not belong there, or lost its end")
        payload, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if hashlib.sha256(payload).digest()[:_CHECKSUM_BYTES] != checksum:
            raise self.bad("the checksum differs: it is incomplete or was changed")
        try:
            value = cbor.decode(payload, bytes_max=TEXT_CHARS_MAX)
        except InvalidArgument as exc:
            raise self.bad(exc.message) from None
        if type(value) is not dict or type(value.get("v")) is not int or value["v"] != 1:
            raise self.bad("of a version that this release does not know")
        if value.keys() != self.keys:
            raise self.bad("fields that do not belong there, or missing ones")
        return value


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def parse_addrs(value: object, *, addrs_max: int = ADDRS_MAX) -> tuple[Multiaddr, ...]:
    """Multiaddrs from a list of texts; raises InvalidArgument."""
    if type(value) is not list or len(value) > addrs_max:
        raise InvalidArgument(f"not a list of at most {addrs_max} addresses")
    if not all(type(text) is str for text in value):
        raise InvalidArgument("an address that is not text")
    return tuple(Multiaddr.parse(text) for text in value)
