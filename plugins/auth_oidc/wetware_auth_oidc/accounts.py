"""Service accounts: clients of the provider, and workloads of a platform. No person logs in.

A client gets its tokens by a secret or a key of its own (RFC 6749, section 4.4; RFC 7523), bound to
the session's key (DPoP, RFC 9449). A workload's token is in a file that its platform renews, e.g.
Kubernetes, and names the session's key or a node as its audience. One that is bound to neither is
never shown: whoever sees it could use it.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from wetware.errors import AuthError, KeyFileError
from wetware.identity import Key, PeerId, read_private_file
from wetware_auth_oidc.errors import BadToken, ProviderError
from wetware_auth_oidc.provider import refused, seconds_of
from wetware_auth_oidc.session import Account, StoredSession
from wetware_auth_oidc.tokens import (
    SERVICE_S_MAX,
    TOKEN_CHARS_MAX,
    check_bound,
    encoded,
    key_audience,
    part_of,
    public_jwk,
)

if TYPE_CHECKING:
    from wetware_auth_oidc.config import AuthOidcConfig
    from wetware_auth_oidc.provider import Provider

SECRET_BYTES_MAX: Final = 16 << 10
ASSERTION_S: Final = 60
NODE: Final = "{node}"
_ASSERTION: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_DOCS: Final = "docs/how-to/oidc.md says what service accounts need at the provider"


def new_session(
    config: AuthOidcConfig, account: Account, client_id: str, key: Key
) -> StoredSession:
    """Of a service account, without a token: it has expired."""
    return StoredSession(
        config.issuer, client_id, "", key.seed.hex(), "", "", "", "", 0.0, account
    )  # fmt: skip


async def obtained(session: StoredSession, provider: Provider) -> StoredSession:
    """The session of a client with a fresh token; raises AuthError, KeyFileError, ProviderError."""
    account, key = session.account, session.key
    assert account is not None  # noqa: S101  # the caller has looked
    at = await provider.endpoint("token_endpoint")
    alg = await _proof_alg(provider)
    form = {"grant_type": "client_credentials", "client_id": session.client_id}
    if account.scope:
        form["scope"] = account.scope
    if urlsplit(account.audience).scheme:
        form["resource"] = account.audience
    secret, auth = _secret(Path(account.file)), None
    if account.by == "secret":  # RFC 6749, section 2.3.1
        auth = (quote(session.client_id, safe=""), quote(secret.decode().strip(), safe=""))
    nonce = ""
    for _ in range(2):  # the second time with what the provider wants in the proof
        if account.by == "key":
            form["client_assertion_type"] = _ASSERTION
            form["client_assertion"] = _assertion(secret, session.client_id, at, account.file)
        headers = {"DPoP": _proof(key, alg, at, nonce)}
        status, found = await provider.ask("POST", at, form=form, headers=headers, auth=auth)
        nonce = provider.dpop_nonce
        if found.get("error") != "use_dpop_nonce" or not nonce:
            break
    if status in (400, 401):
        raise refused(found)
    token = found.get("access_token")
    if status != 200 or not isinstance(token, str):
        raise ProviderError(f"{at} answers {status} without a token")
    try:
        claims = part_of(token, 1)
        check_bound(claims, key.public, None)
        expires_at = min(claims["exp"], claims["iat"] + SERVICE_S_MAX, seconds_of(found))
    except BadToken as exc:
        raise AuthError(f"the provider's token is refused: {exc.message}", hint=_DOCS) from exc
    except (KeyError, TypeError) as exc:
        raise ProviderError(f"{at} gives a token without its times") from exc
    return replace(session, access_token=token, expires_at=expires_at)


def workload_token(session: StoredSession, verifier: PeerId | None) -> str:
    """What the platform wrote, if it is for this session's key, or for the node `verifier`.

    Raises AuthError for another one.
    """
    assert session.account is not None  # noqa: S101  # the caller has looked
    path = session.account.file
    if verifier is not None:
        path = path.replace(NODE, str(verifier))
    try:
        with Path(path).open("rb") as file:  # whoever can read it is a matter of the platform
            token = file.read(TOKEN_CHARS_MAX + 1).decode("ascii").strip()
        check_bound(part_of(token, 1), session.key.public, verifier)
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is no text"
        raise AuthError(
            f"cannot read the workload's token {path}: {why}",
            hint=f"its audience has to be {key_audience(session.key.public)}, or wetware:NODE",
            code="auth.needs_login",
        ) from exc
    except BadToken as exc:
        raise AuthError(
            f"the workload's token {path} is not shown to the node: {exc.message}", hint=exc.hint
        ) from exc
    return token


def _secret(path: Path) -> bytes:
    try:
        data = read_private_file(path, SECRET_BYTES_MAX)
    except FileNotFoundError:
        raise KeyFileError(f"there is no {path}", hint="`ww auth oidc login` names it") from None
    if not data.strip() or len(data) > SECRET_BYTES_MAX or not data.isascii():
        raise KeyFileError(f"{path} has no secret, and no key")
    return data


async def _proof_alg(provider: Provider) -> str:
    offered = (await provider.metadata()).get("dpop_signing_alg_values_supported")
    for alg in ("EdDSA", "Ed25519"):  # the same, by RFC 8037 and RFC 9864
        if isinstance(offered, list) and alg in offered:
            return alg
    raise AuthError(
        f"{provider.issuer} cannot bind tokens to a session's key (DPoP with Ed25519), and whoever "
        "sees one that is bound to nothing could use it",
        hint="use a workload's token: docs/how-to/oidc.md",
        code="auth.provider",
    )


def _proof(key: Key, alg: str, at: str, nonce: str) -> str:
    """That who asks has the session's key (RFC 9449, section 4.2)."""
    claims = {"jti": secrets.token_urlsafe(16), "htm": "POST", "htu": at, "iat": round(time.time())}
    if nonce:
        claims["nonce"] = nonce
    header = {"typ": "dpop+jwt", "alg": alg, "jwk": public_jwk(key.public)}
    text = ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))
    return f"{text}.{encoded(key.sign(text.encode()))}"


def _assertion(data: bytes, client_id: str, at: str, path: str) -> str:
    """Who asks, by the client's own key (RFC 7523, section 2.2)."""
    from joserfc import jws

    key = _private_key(data, path)
    alg = {"RSA": "RS256", "P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}[_kind(key)]
    now = round(time.time())
    claims = {
        "iss": client_id, "sub": client_id, "aud": at, "jti": secrets.token_urlsafe(16),
        "iat": now, "exp": now + ASSERTION_S,
    }  # fmt: skip
    header = {"alg": alg} | ({"kid": key.kid} if key.kid else {})
    return jws.serialize_compact(header, json.dumps(claims).encode(), key, algorithms=[alg])


def _private_key(data: bytes, path: str) -> Any:
    """Of a file with a PEM or a JWK; raises KeyFileError."""
    from joserfc.errors import JoseError
    from joserfc.jwk import import_key

    for kind in ("RSA", "EC"):
        try:
            key = import_key(json.loads(data) if data.lstrip().startswith(b"{") else data, kind)
            if key.is_private:
                return key
        except (JoseError, ValueError, TypeError, KeyError):
            continue
    raise KeyFileError(f"{path} has no private key", hint="RSA or EC, as PEM or JWK")


def _kind(key: Any) -> str:
    return str(key.curve_name) if key.key_type == "EC" else "RSA"
