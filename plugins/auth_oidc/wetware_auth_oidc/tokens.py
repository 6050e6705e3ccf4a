"""What an ID token has to be: signed by the provider, for this cluster, for a session's key, now.

OpenID Connect Core 1.0, section 3.1.3.7; RFC 8725 for what is refused beside it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from wetware_auth_oidc.errors import BadToken

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware_auth_oidc.provider import Provider

TOKEN_CHARS_MAX: Final = 16 << 10
ALGORITHMS: Final = tuple(
    f"{kind}{bits}" for kind in ("RS", "PS", "ES") for bits in (256, 384, 512)
)
"""Those of a key pair: with one of a shared secret, who knows the public key could sign."""
_KINDS: Final = {"RS": "RSA", "PS": "RSA", "ES": "EC"}
LEEWAY_S: Final = 60.0
"""By how much the clocks of provider and node may differ."""
SUBJECT_CHARS_MAX: Final = 255
SERVICE_S_MAX: Final = 3600.0
"""A token of a service account counts for so long, also where it says more."""
_NONCE_DOMAIN: Final = b"wetware-oidc-nonce:1\n"


def nonce_of(public_key: bytes) -> str:
    """The nonce of a login that lets a session's key act: its hash, so that the token names it.

    Args:
        public_key: Ed25519, 32 bytes.
    """
    return encoded(hashlib.sha256(_NONCE_DOMAIN + public_key).digest())


def encoded(data: bytes) -> str:
    """base64url without padding (RFC 7515)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def part_of(token: str, number: int) -> dict[str, Any]:
    """The header (0) or the claims (1) of a compact JWS, not verified; raises BadToken."""
    parts = token.split(".", 3)
    found = None
    if len(parts) == 3 and len(token) <= TOKEN_CHARS_MAX and token.isascii():
        part = parts[number]
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    if not isinstance(found, dict):
        raise BadToken("it is no signed token (JWS, three parts)")
    return found


async def verified(
    provider: Provider,
    token: str,
    *,
    client_id: str,
    nonce: str,
    now: float,
    expired_ok: bool = False,
    nonce_needed: bool = True,
) -> dict[str, Any]:
    """The claims of an ID token of a provider.

    Args:
        provider: Whose keys count.
        token: The ID token, compact.
        client_id: Whom it is for.
        nonce: What it has to be bound to.
        now: Unix time, s.
        expired_ok: It shows who somebody is, and another one that they still are.
        nonce_needed: False for one that a refresh brought: many providers leave the nonce out of
            these; one that is there is compared.

    Raises BadToken, ProviderError.
    """
    claims = await signed_claims(provider, token)
    check_issuer(claims, provider.issuer)
    several = audiences(claims)
    if client_id not in several:
        raise BadToken(f"it is for another client (aud), {str(claims.get('aud'))[:100]!r}")
    # With several audiences the one that asked for it has to be named, and always has to be us.
    if claims.get("azp", None if len(several) > 1 else client_id) != client_id:
        raise BadToken("another client asked for it (azp)")
    check_subject(claims)
    check_times(claims, now, expired_ok=expired_ok)
    named = claims.get("nonce")
    if named is None and not nonce_needed:
        return claims
    if not isinstance(named, str) or not hmac.compare_digest(named.encode(), nonce.encode()):
        raise BadToken("it was issued for another key (nonce)")
    return claims


async def signed_claims(provider: Provider, token: str) -> dict[str, Any]:
    """What a provider signed, whatever it is; raises BadToken, ProviderError."""
    from joserfc import jws
    from joserfc.errors import JoseError
    from joserfc.jwk import import_key

    header = part_of(token, 0)
    alg, kid = header.get("alg"), header.get("kid")
    if alg not in ALGORITHMS:
        raise BadToken(f"it is signed by {str(alg)[:20]!r}, and not with a provider's key pair")
    if kid is not None and not isinstance(kid, str):
        raise BadToken("its key has no name")
    if "crit" in header or header.get("b64", True) is not True:
        raise BadToken("its header asks for an extension")
    key = await provider.key(kid)
    if key.get("kty") != _KINDS[alg[:2]] or key.get("alg", alg) != alg:
        raise BadToken(f"it is signed by {alg}, and its key is of another kind")
    try:
        found = jws.deserialize_compact(token, import_key(key), algorithms=[alg])
        claims = json.loads(found.payload)
    except (JoseError, ValueError, TypeError, RecursionError) as exc:
        raise BadToken("its signature is wrong") from exc
    if not isinstance(claims, dict):
        raise BadToken("it has no claims")
    return claims


def check_issuer(claims: Mapping[str, Any], issuer: str) -> None:
    """Raise BadToken where another one issued it."""
    if claims.get("iss") != issuer:
        raise BadToken(f"it is by another issuer, {str(claims.get('iss'))[:100]!r}")


def audiences(claims: Mapping[str, Any]) -> list[Any]:
    """Whom a token is for: one, or a list of them."""
    named = claims.get("aud")
    return named if isinstance(named, list) else [named]


def check_subject(claims: Mapping[str, Any]) -> None:
    """Raise BadToken where it does not say who it is about."""
    subject = claims.get("sub")
    if (
        not isinstance(subject, str)
        or not 1 <= len(subject) <= SUBJECT_CHARS_MAX
        or not subject.isprintable()
    ):
        raise BadToken("it does not say who it is about (sub)")


def check_times(claims: Mapping[str, Any], now: float, *, expired_ok: bool = False) -> None:
    """Raise BadToken where it is not good now (Unix time, s)."""
    expires, issued = _time(claims, "exp"), _time(claims, "iat")
    if now >= expires + LEEWAY_S and not expired_ok:
        raise BadToken(f"it expired {now - expires:.0f} s ago", late=True)
    starts = max(issued, _time(claims, "nbf") if "nbf" in claims else issued)
    if starts > now + LEEWAY_S:
        raise BadToken(
            f"it begins in {starts - now:.0f} s: the clocks of provider and node differ", late=True
        )


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 40:
        raise BadToken(f"it has no time {name!r}")
    return float(value)


# --- of service accounts --------------------------------------------------------------------------


async def verified_service(
    provider: Provider, token: str, *, key: bytes, verifier: PeerId, audience: str, now: float
) -> dict[str, Any]:
    """The claims of a service account's token that the session's key may use at this node.

    Args:
        provider: Whose keys count.
        token: A JWT, compact.
        key: The session's public key, 32 bytes.
        verifier: This node.
        audience: Whom one is for that is bound by `cnf`.
        now: Unix time, s.

    Raises BadToken, ProviderError.
    """
    claims = await signed_claims(provider, token)
    check_issuer(claims, provider.issuer)
    if not any(each in audiences(claims) for each in (audience, *_own(key, verifier))):
        raise BadToken(f"it is for somebody else (aud), {str(claims.get('aud'))[:100]!r}")
    check_bound(claims, key, verifier)
    check_subject(claims)
    check_times(claims, now)
    if now - claims["iat"] >= SERVICE_S_MAX:
        raise BadToken(f"it is older than {SERVICE_S_MAX:g} s", late=True)
    return claims


def check_bound(claims: Mapping[str, Any], key: bytes, verifier: PeerId | None) -> None:
    """Raise BadToken for one that neither names the session's key, nor this node alone.

    Whoever has seen one that names a node can use it there, and that is only the node itself.
    """
    bound = claims.get("cnf")
    if isinstance(bound, Mapping) and bound.get("jkt") == thumbprint(key):
        return
    if not any(each in audiences(claims) for each in _own(key, verifier)):
        raise BadToken(
            "it is bound neither to this session's key nor to this node, so that whoever sees it "
            "could use it",
            hint=f"its audience has to be {key_audience(key)}, or wetware:NODE",
        )


def key_audience(key: bytes) -> str:
    """The audience of a token that is for a session's key."""
    return f"wetware:{nonce_of(key)}"


def _own(key: bytes, verifier: PeerId | None) -> tuple[str, ...]:
    return (key_audience(key), *([] if verifier is None else [f"wetware:{verifier}"]))


def public_jwk(key: bytes) -> dict[str, str]:
    """An Ed25519 key as RFC 8037 writes it."""
    return {"crv": "Ed25519", "kty": "OKP", "x": encoded(key)}


def thumbprint(key: bytes) -> str:
    """Of an Ed25519 key (RFC 7638)."""
    text = json.dumps(public_jwk(key), separators=(",", ":"), sort_keys=True)
    return encoded(hashlib.sha256(text.encode()).digest())


# --- beside an ID token ---------------------------------------------------------------------------


def check_access_token(claims: Mapping[str, Any], header_alg: str, access_token: str) -> None:
    """Raise BadToken where the ID token names another access token (`at_hash`); it need not."""
    named = claims.get("at_hash")
    if named is None:
        return
    digest = hashlib.new(f"sha{header_alg[2:]}", access_token.encode()).digest()
    wanted = encoded(digest[: len(digest) // 2])
    if not isinstance(named, str) or not hmac.compare_digest(named.encode(), wanted.encode()):
        raise BadToken("it came with another access token (at_hash)")
