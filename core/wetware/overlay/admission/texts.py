"""What people pass on to let a node in: tickets `wwt1…` and bundles `wwc1…`, for `--join`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from wetware.base.multiaddr import Multiaddr
from wetware.base.texts import ADDRS_MAX, TextForm, parse_addrs
from wetware.errors import AdmissionRefused, InvalidArgument
from wetware.identity import PeerId
from wetware.overlay.admission.statements import TIME_MS_MAX, Chain, Founding

SECRET_BYTES: Final = 32
_HINT: Final = "copy all of what `ww invite` printed, on one line"
_TICKET: Final = TextForm(
    "wwt1", "ticket", frozenset({"v", "founding", "issuer", "addrs", "secret", "to"}), _HINT
)
_BUNDLE: Final = TextForm("wwc1", "bundle", frozenset({"v", "founding", "chain", "addrs"}), _HINT)


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
        return _TICKET.encode(
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
        value = _TICKET.decode(text)
        secret, end, issuer = value["secret"], value["to"], value["issuer"]
        if type(secret) is not bytes or len(secret) != SECRET_BYTES or type(issuer) is not bytes:
            raise _TICKET.bad("a field of a wrong type or length")
        if type(end) is not int or not 0 <= end <= TIME_MS_MAX:
            raise _TICKET.bad("its end is out of range")
        try:
            return cls(
                founding=Founding.from_plain(value["founding"]),
                issuer=PeerId.from_multihash(issuer),
                addrs=parse_addrs(value["addrs"]),
                secret=secret,
                not_after_ms=end,
            )
        except (InvalidArgument, ValueError) as exc:
            raise _TICKET.bad(str(exc)) from None


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
        return _BUNDLE.encode(
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
        value = _BUNDLE.decode(text)
        try:
            founding = Founding.from_plain(value["founding"])
            return cls(founding, Chain.open(value["chain"], founding), parse_addrs(value["addrs"]))
        except (InvalidArgument, AdmissionRefused) as exc:
            raise _BUNDLE.bad(exc.message) from None


def parse_join(text: str) -> Ticket | Bundle:
    """What `--join` takes; raises InvalidArgument."""
    if text.strip().startswith(_BUNDLE.prefix):
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
