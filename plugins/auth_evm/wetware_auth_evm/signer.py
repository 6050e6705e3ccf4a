"""The user's side of a login: a session key, or a key that an account bound on chain, answers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.base import paths
from wetware.errors import AuthError, InvalidArgument
from wetware.identity import Challenge, Key, LoginStatus, Proof
from wetware_auth_evm.login import session as sessions
from wetware_auth_evm.login.proofs import (
    KEY_SCHEME,
    SESSION_SCHEME,
    KeyProof,
    key_statement,
    session_statement,
)

if TYPE_CHECKING:
    from wetware.client import KeyChoice
    from wetware_auth_evm.login.session import StoredSession

ACCOUNT_VARIABLE: Final = "WW_ACCOUNT"
"""For whom a bound key acts, where several accounts bound it."""
HINTS: Final = {
    LoginStatus.NO_ROLE: "who may grant it runs `ww auth evm grant ROLE ADDRESS`; "
    "`ww auth evm can ROLE ADDRESS --explain` says what is missing",
    LoginStatus.UNKNOWN_PRINCIPAL: "`ww auth evm list` shows which keys are bound to whom",
    LoginStatus.EXPIRED: sessions.LOGIN,
    LoginStatus.WRONG_CLUSTER: sessions.LOGIN,
    LoginStatus.BACKEND_UNAVAILABLE: "`ww auth evm status` shows what the endpoints say",
}
"""What the user does about a refusal."""


class SessionSigner:
    """Answers for one session, in its own cluster only."""

    hints, unattended = HINTS, True

    def __init__(
        self, session: StoredSession, *, now: Callable[[], float] = time.time, name: str = "default"
    ) -> None:
        self._session, self._now, self._name = session, now, name

    async def sign(self, challenge: Challenge) -> Proof:
        """The proof; raises AuthError for another cluster, and for a session that has expired."""
        _offered(challenge, SESSION_SCHEME)
        session, grant = self._session, self._session.grant
        if challenge.cluster != grant.cluster:
            raise AuthError(
                f"the session is for the cluster {grant.cluster}, and the node is of "
                f"{challenge.cluster}",
                hint=f"log in there: {sessions.LOGIN}",
                code="auth.wrong_cluster",
            )
        if not session.seconds_left(self._now()):
            raise sessions.needs_login(self._name, grant.cluster, "the session has expired")
        proof = session.proof
        answer = session.key.sign(session_statement(challenge, session.digest))
        payload = replace(proof, answer=answer).encode()
        return Proof(SESSION_SCHEME, payload, challenge.signed_bytes())


class BoundKeySigner:
    """Answers with a key that an account bound on chain (`ww auth evm bind-key`).

    `account` is for whom, 20 bytes; b"": the one account that bound it.
    """

    hints, unattended = HINTS, True

    def __init__(self, key: Key, account: bytes = b"") -> None:
        self._key, self._account = key, account

    async def sign(self, challenge: Challenge) -> Proof:
        """The proof; raises AuthError where the node does not take it."""
        _offered(challenge, KEY_SCHEME)
        answer = self._key.sign(key_statement(challenge, self._account))
        payload = KeyProof(self._key.public, answer, self._account).encode()
        return Proof(KEY_SCHEME, payload, challenge.signed_bytes())


class _ChoosingSigner:
    """The session of the challenge's cluster; a key that was chosen by name, where there is none.

    The client takes the signer of the scheme that the node prefers, before it knows whether the
    user has a session: so a chosen key of a headless user answers here, too.
    """

    hints, unattended = HINTS, True

    def __init__(self, choice: KeyChoice) -> None:
        self._choice = choice

    def ready(self, challenge: Challenge) -> bool:
        """Whether the user has a session in that cluster, or says for whom a key acts on chain."""
        name = chosen_name(self._choice)
        found = None if name is None else sessions.load(name, challenge.cluster)
        live = found is not None and found.seconds_left(time.time()) > 0
        return live or paths.variable(ACCOUNT_VARIABLE) is not None

    async def sign(self, challenge: Challenge) -> Proof:
        choice = self._choice
        name = chosen_name(choice)
        if name is not None:
            found = sessions.load(name, challenge.cluster)
            if found is not None:
                return await SessionSigner(found, name=name).sign(challenge)
        named = choice.key is not None or paths.variable("WW_KEY") is not None
        if named and (isinstance(choice.key, Key) or choice.path.exists()):
            return await make_key_signer(choice).sign(challenge)
        raise sessions.needs_login(name or "default", challenge.cluster)


def chosen_name(choice: KeyChoice) -> str | None:
    """The wallet that `--key`, else WW_KEY, names, else "default"; None for a key or a file."""
    chosen = choice.chosen
    if isinstance(chosen, Key | Path) or os.sep in chosen:
        return None
    return chosen


def make_session_signer(choice: KeyChoice) -> _ChoosingSigner:
    """The entry point of `wetware.signer.v1`: of `evm-session`, and so of `evm-key` as well."""
    return _ChoosingSigner(choice)


def make_key_signer(choice: KeyChoice) -> BoundKeySigner:
    """With the chosen key, as bound on chain; raises KeyFileError."""
    return BoundKeySigner(choice.load(), _account_from_env())


def _account_from_env() -> bytes:
    text = paths.variable(ACCOUNT_VARIABLE)
    if text is None:
        return b""
    from wetware_auth_evm.chain.addresses import parse_address

    try:
        return parse_address(text)
    except InvalidArgument as exc:
        raise InvalidArgument(f"{ACCOUNT_VARIABLE}: {exc.message}", hint=exc.hint) from None


def _offered(challenge: Challenge, scheme: str) -> None:
    if scheme not in challenge.schemes:
        raise AuthError(f"the node does not accept {scheme}", code="auth.no_signer")
