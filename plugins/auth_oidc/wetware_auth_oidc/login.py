"""Logging in at the provider: in a browser of this machine, or with a code typed on another one.

RFC 6749 with PKCE (RFC 7636) and a loopback redirect (RFC 8252); the device grant (RFC 8628). Both
ask for a token whose nonce is the hash of a fresh key, the session's.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlencode, urlsplit

from wetware.errors import AuthError, TimedOut
from wetware.identity import Key
from wetware_auth_oidc import session as sessions
from wetware_auth_oidc.errors import BadToken, ProviderError
from wetware_auth_oidc.provider import Provider, reason_of, refused, seconds_of
from wetware_auth_oidc.session import StoredSession
from wetware_auth_oidc.tokens import encoded, nonce_of, verified

if TYPE_CHECKING:
    from wetware_auth_oidc.config import AuthOidcConfig

LOGIN_S: Final = 600.0
"""For so long somebody may take to log in."""
REQUEST_BYTES_MAX: Final = 16 << 10
_DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
_DONE: Final = "You are logged in. You can close this page, and go on in the terminal."
_FAILED: Final = "The login failed. The terminal says why."


@dataclass(frozen=True, slots=True)
class _Asked:
    """A login by redirect that was begun: what the answer has to fit."""

    key: Key
    state: str
    verifier: str
    redirect: str

    @classmethod
    def at(cls, port: int) -> _Asked:
        return cls(
            Key.generate(),
            secrets.token_urlsafe(32),
            secrets.token_urlsafe(48),
            f"http://127.0.0.1:{port}/callback",
        )

    async def url(self, provider: Provider, config: AuthOidcConfig) -> str:
        question = {
            "response_type": "code",
            "client_id": config.client_id,
            "redirect_uri": self.redirect,
            "scope": " ".join(config.scopes),
            "state": self.state,
            "nonce": nonce_of(self.key.public),
            "code_challenge": encoded(hashlib.sha256(self.verifier.encode()).digest()),
            "code_challenge_method": "S256",
        }
        if "offline_access" in config.scopes:  # OpenID Connect Core 1.0, section 11
            question["prompt"] = "consent"
        at = await provider.endpoint("authorization_endpoint")
        return f"{at}{'&' if '?' in at else '?'}{urlencode(question)}"

    def answer(self, target: str) -> dict[str, str] | None:
        """What the browser was sent back with; None where it is not of this login."""
        try:
            parts = urlsplit(target)
        except ValueError:
            return None
        found = {name: each[0] for name, each in parse_qs(parts.query).items()}
        ours = hmac.compare_digest(found.get("state", "").encode(), self.state.encode())
        return found if ours and parts.path == "/callback" else None

    async def session(
        self, provider: Provider, config: AuthOidcConfig, found: Mapping[str, str]
    ) -> StoredSession:
        if "code" not in found:
            raise refused(found)
        status, tokens = await _ask_tokens(
            provider,
            config,
            grant_type="authorization_code",
            code=found["code"],
            redirect_uri=self.redirect,
            code_verifier=self.verifier,
        )
        if status != 200:
            raise refused(tokens)
        return await _session(provider, config, self.key, tokens)


async def by_browser(
    provider: Provider, config: AuthOidcConfig, show: Callable[[str], object]
) -> StoredSession:
    """Log in through a browser on this machine.

    Args:
        provider: Where.
        config: Client and scopes.
        show: Given the URL to open.

    Raises AuthError, ProviderError, TimedOut after LOGIN_S.
    """
    came: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # Another page of this browser may call here, too.
            found = asked.answer(await _target(reader))
            text = _DONE if found is not None and "code" in found else _FAILED
            status = "404 Not Found" if found is None else "200 OK"
            head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
            writer.write((head + text + "\n").encode())
            await writer.drain()
            if found is not None and not came.done():
                came.set_result(found)
        except (ValueError, TimeoutError, OSError):
            pass  # no browser, or one that went away
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=REQUEST_BYTES_MAX)
    async with server:
        asked = _Asked.at(server.sockets[0].getsockname()[1])
        show(await asked.url(provider, config))
        try:
            async with asyncio.timeout(LOGIN_S):
                found = await came
        except TimeoutError:
            raise TimedOut(
                f"nobody logged in within {LOGIN_S:g} s", hint=f"`{sessions.LOGIN}` again"
            ) from None
        return await asked.session(provider, config, found)


async def by_address(
    provider: Provider, config: AuthOidcConfig, ask: Callable[[str], str]
) -> StoredSession:
    """Log in through a browser of another machine, whose last address somebody pastes here.

    Args:
        provider: Where.
        config: Client and scopes.
        ask: Given the URL to open; returns the address at which the browser ended.

    Raises AuthError, ProviderError.
    """
    asked = _Asked.at(8400)  # nobody listens there: the browser says so, and shows the address
    found = asked.answer(ask(await asked.url(provider, config)).strip())
    if found is None:
        raise AuthError(
            "this is not the address at which this login ended",
            hint=f"it begins with {asked.redirect}?",
            code="auth.provider",
        )
    return await asked.session(provider, config, found)


async def _target(reader: asyncio.StreamReader) -> str:
    """Of a GET; raises ValueError, TimeoutError."""
    async with asyncio.timeout(10):
        line = await reader.readline()
        while (await reader.readline()).strip():  # its headers say nothing of use
            pass
    method, target, _ = line.decode("ascii").split(" ", 2)
    if method != "GET":
        raise ValueError(method)
    return target


async def by_code(
    provider: Provider, config: AuthOidcConfig, show: Callable[[str, str, str], object]
) -> StoredSession:
    """Log in with a browser of any machine.

    Args:
        provider: Where.
        config: Client and scopes.
        show: Given the URL to open, the code to type there, and a URL with the code in it or "".

    Raises AuthError, ProviderError, TimedOut.
    """
    key = Key.generate()
    at = await provider.endpoint("device_authorization_endpoint")
    question = {
        "client_id": config.client_id,
        "scope": " ".join(config.scopes),
        "nonce": nonce_of(key.public),
    }
    status, found = await provider.ask("POST", at, form=question, auth=_credentials(config))
    if status != 200:
        raise refused(found)
    try:
        device_code = str(found["device_code"])
        interval = min(60.0, max(1.0, float(found.get("interval", 5))))
        until = time.monotonic() + min(LOGIN_S, float(found["expires_in"]))
        where, code = str(found["verification_uri"]), str(found["user_code"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ProviderError(f"{at} gives no code: {exc}") from exc
    show(where, code, str(found.get("verification_uri_complete", "")))
    while time.monotonic() < until:
        await asyncio.sleep(interval)
        status, tokens = await _ask_tokens(
            provider, config, grant_type=_DEVICE_GRANT, device_code=device_code
        )
        if status == 200:
            return await _session(provider, config, key, tokens)
        if tokens.get("error") == "slow_down":
            interval += 5
        elif tokens.get("error") != "authorization_pending":
            raise refused(tokens)
    raise TimedOut("nobody typed the code in time", hint=f"`{sessions.LOGIN} --device` again")


async def renewed(name: str) -> StoredSession:
    """The session with fresh tokens, kept in place of the old one.

    Raises AuthError where the provider refuses, or there is nothing to renew it with;
    ProviderError, with the old one kept.
    """
    async with sessions.locked(name):
        session = sessions.load(name)
        if session.expires_at - time.time() > sessions.RENEW_S:  # another process was faster
            return session
        if session.account is None and not session.refresh_token:
            raise sessions.needs_login(name, "the login has expired")
        provider = Provider(session.issuer)
        try:
            if session.account is None:
                return await _renew(name, session, provider)
            from wetware_auth_oidc.accounts import obtained

            found = await obtained(session, provider)
            sessions.save(name, found)
            return found
        finally:
            await provider.close()


async def _renew(name: str, session: StoredSession, provider: Provider) -> StoredSession:
    status, tokens = await _ask_tokens(
        provider, session, grant_type="refresh_token", refresh_token=session.refresh_token
    )
    if status in (400, 401):
        raise sessions.needs_login(name, f"the provider renews no more: {reason_of(tokens)}")
    if status != 200:
        raise ProviderError(f"{session.issuer} answers {status} to a renewal: {reason_of(tokens)}")
    # Before anything can go wrong: many providers take the old one no more.
    if isinstance(tokens.get("refresh_token"), str):
        session = replace(session, refresh_token=tokens["refresh_token"])
        sessions.save(name, session)
    id_token, access_token = tokens.get("id_token"), tokens.get("access_token")
    if not isinstance(id_token, str) or not isinstance(access_token, str):
        raise ProviderError(f"{session.issuer} renews a login without an ID token")
    nonce = nonce_of(session.key.public)
    try:
        claims = await verified(
            provider, id_token, client_id=session.client_id, nonce=nonce, now=time.time(),
            nonce_needed=False,
        )  # fmt: skip
    except BadToken as exc:
        raise sessions.needs_login(name, f"the renewed ID token is refused: {exc.message}") from exc
    found = replace(
        session,
        id_token=id_token,
        bound_token="" if "nonce" in claims else session.bound_token or session.id_token,
        access_token=access_token,
        expires_at=_end(claims, tokens),
    )
    sessions.save(name, found)
    return found


async def _session(
    provider: Provider, config: AuthOidcConfig, key: Key, tokens: Mapping[str, Any]
) -> StoredSession:
    """Of what a provider gave; raises AuthError where it is not for us."""
    id_token, access_token = tokens.get("id_token"), tokens.get("access_token")
    if not isinstance(id_token, str) or not isinstance(access_token, str):
        raise ProviderError(f"{provider.issuer} gives no ID token: is `openid` among the scopes?")
    try:
        claims = await verified(
            provider, id_token, client_id=config.client_id, nonce=nonce_of(key.public),
            now=time.time(),
        )  # fmt: skip
    except BadToken as exc:
        raise AuthError(
            f"the provider's ID token is refused: {exc.message}",
            hint=f"if it leaves the nonce out of logins by code: {sessions.LOGIN} --no-browser",
        ) from exc
    return StoredSession(
        issuer=provider.issuer,
        client_id=config.client_id,
        client_secret=config.client_secret,
        seed=key.seed.hex(),
        id_token=id_token,
        bound_token="",
        access_token=access_token,
        refresh_token=str(tokens.get("refresh_token", "")),
        expires_at=_end(claims, tokens),
    )


def _end(claims: Mapping[str, Any], tokens: Mapping[str, Any]) -> float:
    """When the first of an ID token and its access token expires, Unix time, s."""
    return min(float(claims["exp"]), seconds_of(tokens))


async def _ask_tokens(
    provider: Provider, config: AuthOidcConfig | StoredSession, **form: str
) -> tuple[int, dict[str, Any]]:
    at = await provider.endpoint("token_endpoint")
    form["client_id"] = config.client_id
    return await provider.ask("POST", at, form=form, auth=_credentials(config))


def _credentials(config: AuthOidcConfig | StoredSession) -> tuple[str, str] | None:
    return (config.client_id, config.client_secret) if config.client_secret else None
