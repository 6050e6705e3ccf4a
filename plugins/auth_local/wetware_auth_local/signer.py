"""The user's side of a login: an Ed25519 signature over the challenge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from wetware.errors import AuthError
from wetware.identity import Challenge, Key, LoginStatus, Proof

if TYPE_CHECKING:
    from wetware.client import KeyChoice

SCHEME = "local-ed25519"
HINTS: Final = {
    LoginStatus.UNKNOWN_PRINCIPAL: "an operator adds you with `ww user add NAME --key KEY`; "
    "`ww key show` prints your key",
    LoginStatus.NO_ROLE: "an operator gives a role with `ww user add NAME --role ROLE`",
}
"""What the user does about a refusal."""


class Ed25519Signer:
    """Signs with a key in memory."""

    hints, unattended = HINTS, True

    def __init__(self, key: Key) -> None:
        self._key = key

    async def sign(self, challenge: Challenge) -> Proof:
        """The proof: public key (32 bytes), then signature (64)."""
        if SCHEME not in challenge.schemes:
            raise AuthError(f"the node does not accept {SCHEME}", code="auth.no_signer")
        statement = challenge.signed_bytes()
        return Proof(SCHEME, self._key.public + self._key.sign(statement), statement)


def make_signer(choice: KeyChoice) -> Ed25519Signer:
    """The entry point of `wetware.signer.v1`."""
    return Ed25519Signer(choice.load())
