"""An OpenID provider, asked over HTTP: discovery, keys, and whether somebody is still there.

All that it says is bounded, and read as what the standards define (OpenID Connect Discovery 1.0,
RFC 7517): it is on the way to every login, and may be slow, broken or another one.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import AuthError
from wetware_auth_oidc.config import check_url
from wetware_auth_oidc.errors import BadToken, ProviderError

if TYPE_CHECKING:
    import httpx

ANSWER_BYTES_MAX: Final = 256 << 10
NONCE_CHARS_MAX: Final = 1024
KEYS_MAX: Final = 64
KEYS_S: Final = 300.0
"""For so long the provider's keys are taken as they were: a key that it withdrew ends then."""
KEYS_AGAIN_S: Final = 10.0
"""A token with an unknown key has them read anew, but no more often than this."""
TIMEOUT_S: Final = 5.0
_METADATA: Final = "/.well-known/openid-configuration"
_URLS: Final = (
    "jwks_uri",
    *(
        f"{name}_endpoint"
        for name in ("authorization", "token", "userinfo", "device_authorization", "revocation")
    ),
)
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity"}


class Provider:
    """One provider; `close` it.

    Args:
        issuer: Its URL, exactly as its tokens name it.
        now: Seconds, of a clock that does not jump.
        timeout_s: For each of its answers, whole.
    """

    def __init__(
        self,
        issuer: str,
        *,
        now: Callable[[], float] = time.monotonic,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.issuer = issuer
        self._now, self._timeout_s = now, timeout_s
        self._client: httpx.AsyncClient | None = None
        self._metadata: dict[str, Any] = {}
        self._metadata_at = float("-inf")
        self._keys: dict[str, dict[str, Any]] = {}
        self._keys_at = self._tried_at = float("-inf")
        self._lock = asyncio.Lock()
        self.dpop_nonce = ""  # what the latest answer wants in the next proof (RFC 9449, 8)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def ask(
        self,
        method: str,
        url: str,
        *,
        form: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """One request: the status, and the JSON object of the answer.

        A refusal of a token (401) need not be JSON, and nothing is an empty object. Raises
        ProviderError; redirects are not followed.
        """
        import httpx

        if self._client is None:
            # No cookie of one answer goes with the next question, which is about somebody else.
            nothing = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
            self._client = httpx.AsyncClient(timeout=self._timeout_s, cookies=nothing)
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream(
                    method,
                    url,
                    data=None if form is None else dict(form),
                    headers={**_HEADERS, **(headers or {})},
                    auth=auth,
                ) as answer,
            ):
                self.dpop_nonce = answer.headers.get("dpop-nonce", "")[:NONCE_CHARS_MAX]
                if "content-encoding" in answer.headers:  # what it would come to is not known
                    raise self._bad(url, "answers in an encoding that was not asked for")
                async for chunk in answer.aiter_raw():
                    body += chunk
                    if len(body) > ANSWER_BYTES_MAX:
                        raise self._bad(url, f"answers more than {ANSWER_BYTES_MAX} bytes")
        except TimeoutError:
            raise self._bad(url, f"does not answer within {self._timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:  # of a redirect's URL, too
            raise self._bad(url, f"cannot be asked: {exc or type(exc).__name__}") from exc
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            return answer.status_code, found
        if not body or answer.status_code == 401:
            return answer.status_code, {}
        kind = answer.headers.get("content-type", "")[:40]
        raise self._bad(url, f"answers {answer.status_code} {kind or 'without a type'}, not JSON")

    def _bad(self, url: str, why: str) -> ProviderError:
        return ProviderError(
            f"{url[:200]} {why}", hint=f"is {self.issuer} the issuer, and is it up?"
        )

    # --- what it is -------------------------------------------------------------------------------

    async def metadata(self) -> Mapping[str, Any]:
        """Its discovery document, checked; asked for anew after KEYS_S. Raises ProviderError."""
        if self._now() - self._metadata_at < KEYS_S:
            return self._metadata
        url = self.issuer.rstrip("/") + _METADATA
        try:
            status, found = await self.ask("GET", url)
        except ProviderError:
            if self._metadata:  # where to ask changes seldom, and what is asked there counts
                return self._metadata
            raise
        if status != 200:
            raise self._bad(url, f"answers {status}")
        if found.get("issuer") != self.issuer:
            raise self._bad(url, f"is of another issuer, {str(found.get('issuer'))[:100]!r}")
        for name in _URLS:
            if name != "jwks_uri" and name not in found:  # who signs only has no others
                continue
            try:
                check_url(found[name])
                if self.issuer.startswith("https:") and not found[name].startswith("https:"):
                    raise ValueError("it is not https")  # noqa: TRY301
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise self._bad(url, f"has no good {name}: {exc}") from exc
        self._metadata, self._metadata_at = found, self._now()
        return found

    async def endpoint(self, name: str) -> str:
        """One of the metadata's URLs; ProviderError where it offers none."""
        url = (await self.metadata()).get(name)
        if not isinstance(url, str):
            raise ProviderError(f"{self.issuer} offers no {name}")
        return url

    # --- keys -------------------------------------------------------------------------------------

    async def key(self, kid: str | None) -> dict[str, Any]:
        """The public key of a token's header, as RFC 7517 writes it.

        Without a name it has to be the provider's only key. Raises BadToken where it has none of
        that name, or several; ProviderError.
        """
        if not self._knows(kid):
            async with self._lock:
                if not self._knows(kid) and self._now() - self._tried_at > KEYS_AGAIN_S:
                    self._tried_at = self._now()
                    await self._read_keys()
        if self._now() - self._keys_at > KEYS_S:
            raise ProviderError(f"the keys of {self.issuer} could not be read a moment ago")
        if kid is None:
            if len(self._keys) != 1:
                raise BadToken("the token names no key, and its provider has several")
            (only,) = self._keys.values()
            return only
        if kid not in self._keys:
            raise BadToken(f"the token names the key {kid[:60]!r}, which its provider has not")
        return self._keys[kid]

    def _knows(self, kid: str | None) -> bool:
        return self._now() - self._keys_at <= KEYS_S and (kid is None or kid in self._keys)

    async def _read_keys(self) -> None:
        url = await self.endpoint("jwks_uri")
        status, found = await self.ask("GET", url)
        keys = found.get("keys")
        if status != 200 or not isinstance(keys, list):
            raise self._bad(url, f"answers {status} without keys")
        if len(keys) > KEYS_MAX:
            raise self._bad(url, f"has {len(keys)} keys; {KEYS_MAX} are read at most")
        read: dict[str, dict[str, Any]] = {}
        twice: set[str] = set()
        for key in keys:
            if not isinstance(key, dict) or key.get("use", "sig") != "sig":
                continue
            kid = key.get("kid", "")
            if not isinstance(kid, str):
                continue
            if kid in read:
                twice.add(kid)
            read[kid] = key
        # Which of two keys of one name was meant cannot be told: neither is used.
        self._keys = {kid: key for kid, key in read.items() if kid not in twice}
        self._keys_at = self._now()

    # --- people -----------------------------------------------------------------------------------

    async def userinfo(self, access_token: str) -> dict[str, Any] | None:
        """The claims of whose token it is, now; None where the provider refuses the token.

        Raises ProviderError where neither is said.
        """
        url = await self.endpoint("userinfo_endpoint")
        status, found = await self.ask(
            "GET", url, headers={"Authorization": f"Bearer {access_token}"}
        )
        if status == 401:
            return None
        if status != 200 or not isinstance(found.get("sub"), str):
            raise self._bad(url, f"answers {status}, without who it is about")
        return found


# --- answers to requests for tokens ---------------------------------------------------------------


def seconds_of(tokens: Mapping[str, Any]) -> float:
    """When an access token expires by what was said beside it, Unix time, s; else infinite."""
    given = tokens.get("expires_in")
    if isinstance(given, int | float) and not isinstance(given, bool):
        return time.time() + given
    return math.inf


def refused(found: Mapping[str, Any]) -> AuthError:
    """What the provider says to a request for tokens."""
    return AuthError(f"the provider refuses the login: {reason_of(found)}", code="auth.provider")


def reason_of(found: Mapping[str, Any]) -> str:
    """An OAuth error, as a person can read it, and no terminal obeys."""
    error, more = (str(found.get(name, ""))[:200] for name in ("error", "error_description"))
    text = f"{error}: {more}" if error and more else error or "without a reason"
    return "".join(char if char.isprintable() else "?" for char in text)
