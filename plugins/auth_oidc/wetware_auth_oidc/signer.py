"""The user's side of a login: the session's key answers, and its tokens say whose it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from wetware.errors import AuthError, WetwareError
from wetware.identity import Challenge, LoginStatus, Proof
from wetware_auth_oidc import session as sessions
from wetware_auth_oidc.proofs import SCHEME, OidcProof, statement

if TYPE_CHECKING:
    from wetware.client import KeyChoice
    from wetware_auth_oidc.session import StoredSession

HINTS: Final[Mapping[LoginStatus, str]] = {
    LoginStatus.NO_ROLE: "`ww auth oidc can ROLE --explain` says which claims give it, and which "
    "you have; who administers your groups changes that",
    LoginStatus.UNKNOWN_PRINCIPAL: f"`{sessions.LOGIN}`",
    LoginStatus.EXPIRED: f"`{sessions.LOGIN}`; if it persists, compare the clocks of the machines",
    LoginStatus.BACKEND_UNAVAILABLE: "try again when the node can reach the provider",
}
"""What the user does about a refusal."""


class SessionSigner:
    """Answers for one session; renews its tokens where they are about to expire.

    Args:
        name: Of the session.
    """

    hints, unattended = HINTS, True

    def __init__(self, name: str) -> None:
        self._name = name

    def ready(self, challenge: Challenge) -> bool:
        """Whether somebody has logged in under this name, and can act without doing so again."""
        try:
            session = sessions.load(self._name)
        except WetwareError:  # `sign` says so, where nothing else is there
            return False
        renewable = session.refresh_token or session.account is not None
        return bool(renewable) or session.expires_at > time.time()

    async def sign(self, challenge: Challenge) -> Proof:
        """The proof; raises AuthError where somebody has to log in at the provider again."""
        if SCHEME not in challenge.schemes:
            raise AuthError(f"the node does not accept {SCHEME}", code="auth.no_signer")
        session = sessions.load(self._name)
        if session.account is not None and session.account.by == "token":
            from wetware_auth_oidc.accounts import workload_token

            session = replace(session, access_token=workload_token(session, challenge.verifier))
        elif session.expires_at - time.time() < sessions.RENEW_S:
            from wetware_auth_oidc.login import renewed  # and with it what speaks HTTP

            session = await renewed(self._name)
        return proof_of(session, challenge)


def proof_of(session: StoredSession, challenge: Challenge) -> Proof:
    """The answer to a challenge, by a session whose tokens are good."""
    tokens = (session.id_token, session.bound_token, session.access_token)
    key = session.key
    answer = key.sign(statement(challenge, *tokens))
    payload = OidcProof(key.public, answer, *tokens).encode()
    return Proof(SCHEME, payload, challenge.signed_bytes())


def make_signer(choice: KeyChoice) -> SessionSigner:
    """The entry point of `wetware.signer.v1`."""
    return SessionSigner(sessions.chosen_name(choice))
