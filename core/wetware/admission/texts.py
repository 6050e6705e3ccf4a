"""What people pass on to let a node in: tickets `wwt1…` and bundles `wwc1…`, for `--join`.

A text is its prefix and base64url of CBOR with four bytes of checksum, so that a copy that lost its
end is called just that.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from wetware import cbor
from wetware.admission.statements import TIME_MS_MAX, Chain, Founding
from wetware.errors import AdmissionRefused, InvalidArgument
from wetware.identity import PeerId
from wetware.multiaddr import Multiaddr

TICKET_PREFIX: Final = "wwt1"
BUNDLE_PREFIX: Final = "wwc1"
SECRET_BYTES: Final = 32
ADDRS_MAX: Final = 16
TEXT_CHARS_MAX: Final = 16_384
_CHECKSUM_BYTES = 4


def _bad(what: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"not a {what}: {why}",
        hint="copy all of what `ww invite` printed, on one line",
        code=f"invalid.{what}",
    )


def _to_text(prefix: str, value: Mapping[str, Any]) -> str:
    data = cbor.encode(value)
    data += hashlib.sha256(data).digest()[:_CHECKSUM_BYTES]
    return prefix + base64.urlsafe_b64encode(data).decode().rstrip("=")


def _from_text(prefix: str, what: str, text: str, keys: frozenset[str]) -> dict[str, Any]:
    text = text.strip()
    if not text.startswith(prefix):
        raise _bad(what, f"it does not begin with {prefix}")
    if len(text) > TEXT_CHARS_MAX:
        raise _bad(what, f"longer than {TEXT_CHARS_MAX} characters")
    body = text[len(prefix) :]
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _bad(what, "it has characters that do not belong there, or lost its end") from None
    payload, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if hashlib.sha256(payload).digest()[:_CHECKSUM_BYTES] != checksum:
        raise _bad(what, "the checksum differs: it is incomplete or was changed")
    try:
        value = cbor.decode(payload, bytes_max=TEXT_CHARS_MAX)
    except InvalidArgument as exc:
        raise _bad(what, exc.message) from None
    if type(value) is not dict or type(value.get("v")) is not int or value["v"] != 1:
        raise _bad(what, "of a version that this release does not know")
    if value.keys() != keys:
        raise _bad(what, "fields that do not belong there, or missing ones")
    return value


def parse_addrs(value: object, *, addrs_max: int = ADDRS_MAX) -> tuple[Multiaddr, ...]:
    """Multiaddrs from a list of texts; raises InvalidArgument."""
    if type(value) is not list or len(value) > addrs_max:
        raise InvalidArgument(f"not a list of at most {addrs_max} addresses")
    if not all(type(text) is str for text in value):
        raise InvalidArgument("an address that is not text")
    return tuple(Multiaddr.parse(text) for text in value)


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to join, for whoever redeems it first. A secret.

    Attributes:
        founding: Of the cluster.
        issuer: The node that issued it, the only one that redeems it.
        addrs: Where that node may be reached.
        secret: 32 random bytes, of which the issuer keeps the hash.
        not_after_ms: Unix time, ms, by the issuer's clock.
        id: The issuer's name for it; "" in one that was parsed.
    """

    founding: Founding
    issuer: PeerId
    addrs: tuple[Multiaddr, ...]
    secret: bytes = field(repr=False)
    not_after_ms: int
    id: str = ""

    @property
    def text(self) -> str:
        """`wwt1…`."""
        return _to_text(
            TICKET_PREFIX,
            {
                "v": 1,
                "founding": self.founding.plain(),
                "issuer": self.issuer.multihash,
                "addrs": [str(addr) for addr in self.addrs[:ADDRS_MAX]],
                "secret": self.secret,
                "to": self.not_after_ms,
            },
        )

    @classmethod
    def parse(cls, text: str) -> Ticket:
        """The inverse of `text`; raises InvalidArgument "invalid.ticket"."""
        keys = frozenset({"v", "founding", "issuer", "addrs", "secret", "to"})
        value = _from_text(TICKET_PREFIX, "ticket", text, keys)
        secret, end, issuer = value["secret"], value["to"], value["issuer"]
        if type(secret) is not bytes or len(secret) != SECRET_BYTES or type(issuer) is not bytes:
            raise _bad("ticket", "a field of a wrong type or length")
        if type(end) is not int or not 0 <= end <= TIME_MS_MAX:
            raise _bad("ticket", "its end is out of range")
        try:
            return cls(
                founding=Founding.from_plain(value["founding"]),
                issuer=PeerId.from_multihash(issuer),
                addrs=parse_addrs(value["addrs"]),
                secret=secret,
                not_after_ms=end,
            )
        except (InvalidArgument, ValueError) as exc:
            raise _bad("ticket", str(exc)) from None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A certificate for a peer that was known beforehand, and where its cluster is. No secret.

    Attributes:
        founding: Of the cluster.
        chain: The certificate.
        addrs: Where members may be reached.
    """

    founding: Founding
    chain: Chain
    addrs: tuple[Multiaddr, ...] = ()

    @property
    def text(self) -> str:
        """`wwc1…`."""
        return _to_text(
            BUNDLE_PREFIX,
            {
                "v": 1,
                "founding": self.founding.plain(),
                "chain": self.chain.encoded,
                "addrs": [str(addr) for addr in self.addrs[:ADDRS_MAX]],
            },
        )

    @classmethod
    def parse(cls, text: str) -> Bundle:
        """The inverse of `text`, signatures checked; raises InvalidArgument "invalid.bundle"."""
        keys = frozenset({"v", "founding", "chain", "addrs"})
        value = _from_text(BUNDLE_PREFIX, "bundle", text, keys)
        try:
            founding = Founding.from_plain(value["founding"])
            return cls(founding, Chain.open(value["chain"], founding), parse_addrs(value["addrs"]))
        except (InvalidArgument, AdmissionRefused) as exc:
            raise _bad("bundle", exc.message) from None


def parse_join(text: str) -> Ticket | Bundle:
    """What `--join` takes; raises InvalidArgument."""
    if text.strip().startswith(BUNDLE_PREFIX):
        return Bundle.parse(text)
    return Ticket.parse(text)


def parse_peer_addrs(values: Sequence[str]) -> tuple[Multiaddr, ...]:
    """Addresses that name their peer, of those given; what cannot be parsed is left out."""
    found = []
    for text in values[:ADDRS_MAX]:
        try:
            addr = Multiaddr.parse(text)
        except InvalidArgument:
            continue
        if addr.peer is not None:
            found.append(addr)
    return tuple(found)
