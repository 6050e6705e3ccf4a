"""Sturdy references: `ww1…`, a capability as a text.

It names the node that issued it and where that may be reached, and holds 32 random bytes, of which
the node keeps the hash. Whoever has the text has the capability: it is a secret, and never logged.

Source: Miller, Morningstar, Frantz, "Capability-based Financial Instruments" (2000), on sturdy
references; E and Cap'n Proto use the name for the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from wetware.base.texts import ADDRS_MAX, TextForm, parse_addrs
from wetware.errors import InvalidArgument
from wetware.identity import PeerId

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr

PREFIX: Final = "ww1"
ID_BYTES: Final = 8
SECRET_BYTES: Final = 32
_FORM: Final = TextForm(
    PREFIX,
    "reference",
    frozenset({"v", "peer", "addrs", "id", "secret"}),
    "copy all of what `ww share` printed, on one line",
)


@dataclass(frozen=True, slots=True)
class SturdyRef:
    """What a text `ww1…` says.

    Attributes:
        peer: The node that issued it, and redeems it.
        addrs: Where that node may be reached.
        id: The share's grant, 16 hex digits.
        secret: 32 bytes.
    """

    peer: PeerId
    addrs: tuple[Multiaddr, ...]
    id: str
    secret: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """`ww1…`. A secret."""
        return _FORM.encode(
            {
                "v": 1,
                "peer": self.peer.multihash,
                "addrs": [str(addr.with_peer(None)) for addr in self.addrs[:ADDRS_MAX]],
                "id": bytes.fromhex(self.id),
                "secret": self.secret,
            }
        )

    @classmethod
    def parse(cls, text: str) -> SturdyRef:
        """The inverse of `text`; raises InvalidArgument "invalid.reference" without quoting it."""
        value = _FORM.decode(text)
        peer, id_, secret = value["peer"], value["id"], value["secret"]
        if type(peer) is not bytes or type(id_) is not bytes or type(secret) is not bytes:
            raise _FORM.bad("a field of a wrong type")
        if len(id_) != ID_BYTES or len(secret) != SECRET_BYTES:
            raise _FORM.bad("a field of a wrong length")
        try:
            issuer = PeerId.from_multihash(peer)
            addrs = tuple(addr.with_peer(issuer) for addr in parse_addrs(value["addrs"]))
        except (InvalidArgument, ValueError) as exc:
            raise _FORM.bad(str(exc)) from None
        return cls(issuer, addrs, id_.hex(), secret)


def is_ref(text: str) -> bool:
    """Whether a text wants to be a sturdy reference, and not an address or a selector."""
    return text.strip().startswith(PREFIX)
