"""Which ID tokens are taken; each that is not has a name."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from wetware.identity import Key
from wetware_auth_oidc.config import check_url
from wetware_auth_oidc.errors import BadToken, ProviderError
from wetware_auth_oidc.provider import KEYS_AGAIN_S, KEYS_S, Provider
from wetware_auth_oidc.tokens import check_access_token, nonce_of, verified

from .fake import CLIENT, EC, OTHER, RSA, FakeProvider, by_secret, signed, unsigned

pytestmark = pytest.mark.anyio
ADA = Key.from_seed(b"a" * 32)


class Judge:
    """Judges tokens as a node does, with a clock of its own for what is kept."""

    def __init__(self, fake: FakeProvider) -> None:
        self.now = 0.0
        self.provider = Provider(fake.issuer, now=lambda: self.now, timeout_s=1)

    async def __call__(self, token: str, **options: Any) -> dict[str, Any]:
        given = {"client_id": CLIENT, "nonce": nonce_of(ADA.public), "now": time.time(), **options}
        return await verified(self.provider, token, **given)


@pytest.fixture
async def judge(fake: FakeProvider) -> AsyncIterator[Judge]:
    found = Judge(fake)
    yield found
    await found.provider.close()


@pytest.mark.parametrize("key", [RSA, EC], ids=["RS256", "ES256"])
async def test_a_good_token_is_taken(fake: FakeProvider, judge: Judge, key: Any) -> None:
    claims = await judge(signed(fake.claims(ADA), key))
    assert claims["sub"] == "ada"


BAD: dict[str, tuple[Any, str]] = {
    "alg none": (lambda f: unsigned(f.claims(ADA)), "not with a provider's key pair"),
    "HS256 with the public key": (
        lambda f: by_secret(f.claims(ADA), RSA.as_pem(private=False)),
        "not with a provider's key pair",
    ),
    "another key": (lambda f: signed(f.claims(ADA), OTHER), "which its provider has not"),
    "another key under a known name": (
        lambda f: signed(f.claims(ADA), OTHER, kid="r1"),
        "its signature is wrong",
    ),
    "another kind of key": (lambda f: signed(f.claims(ADA), EC, kid="r1"), "of another kind"),
    "no key named of two": (lambda f: signed(f.claims(ADA), kid=None), "has several"),
    "wrong issuer": (lambda f: signed(f.claims(ADA, iss="https://evil.org")), "another issuer"),
    "no issuer": (lambda f: signed(f.claims(ADA, iss=None)), "another issuer"),
    "wrong audience": (lambda f: signed(f.claims(ADA, aud="other")), "another client (aud)"),
    "audience in part": (lambda f: signed(f.claims(ADA, aud=["te", "am"])), "another client (aud)"),
    "two audiences without azp": (lambda f: signed(f.claims(ADA, aud=[CLIENT, "x"])), "azp"),
    "wrong azp": (lambda f: signed(f.claims(ADA, azp="other")), "azp"),
    "wrong nonce": (lambda f: signed(f.claims(ADA, nonce="x")), "another key (nonce)"),
    "no nonce": (lambda f: signed(f.claims(ADA, nonce=None)), "another key (nonce)"),
    "another session's key": (
        lambda f: signed(f.claims(Key.from_seed(b"e" * 32))),
        "another key (nonce)",
    ),
    "expired": (lambda f: signed(f.claims(ADA, exp=time.time() - 120)), "it expired 120 s ago"),
    "no expiry": (lambda f: signed(f.claims(ADA, exp=None)), "no time 'exp'"),
    "an expiry that is text": (lambda f: signed(f.claims(ADA, exp="9999999999")), "no time 'exp'"),
    "from the future": (lambda f: signed(f.claims(ADA, iat=time.time() + 300)), "clocks"),
    "not yet": (lambda f: signed(f.claims(ADA, nbf=time.time() + 300)), "clocks"),
    "no subject": (lambda f: signed(f.claims(ADA, sub=None)), "(sub)"),
    "a subject with a line end": (lambda f: signed(f.claims(ADA, sub="a\nb")), "(sub)"),
    "an extension": (
        lambda f: signed(f.claims(ADA)).replace(signed(f.claims(ADA)).split(".")[0], _CRIT),
        "extension",
    ),
    "two parts": (lambda f: ".".join(signed(f.claims(ADA)).split(".")[:2]), "three parts"),
    "no text of base64": (lambda f: "a.b.c", "three parts"),
    "too long": (lambda f: signed(f.claims(ADA, more="x" * 20_000)), "three parts"),
    "no claims": (lambda f: signed([1]), "no claims"),  # type: ignore[arg-type]
}
_CRIT = "eyJhbGciOiJSUzI1NiIsImtpZCI6InIxIiwiY3JpdCI6WyJ4Il0sIngiOjF9"


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_refused(fake: FakeProvider, judge: Judge, name: str) -> None:
    make, why = BAD[name]
    with pytest.raises(BadToken) as refused:
        await judge(make(fake))
    assert why in refused.value.message


async def test_a_flipped_bit_anywhere_is_refused(fake: FakeProvider, judge: Judge) -> None:
    token = signed(fake.claims(ADA))
    for at in range(0, len(token) - 1, 7):
        other = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
        with pytest.raises(BadToken):
            await judge(other)


async def test_clocks_may_differ_by_a_minute_and_not_by_five(
    fake: FakeProvider, judge: Judge
) -> None:
    token = signed(fake.claims(ADA))
    await judge(token, now=time.time() - 50)
    with pytest.raises(BadToken, match="clocks of provider and node differ") as refused:
        await judge(token, now=time.time() - 300)
    assert refused.value.late


async def test_a_refreshed_token_may_leave_the_nonce_out_and_not_name_another(
    fake: FakeProvider, judge: Judge
) -> None:
    await judge(signed(fake.claims(ADA, nonce=None)), nonce_needed=False)
    with pytest.raises(BadToken, match="nonce"):
        await judge(signed(fake.claims(ADA, nonce="x")), nonce_needed=False)


def test_an_access_token_that_the_id_token_does_not_name_is_refused() -> None:
    # The example of OpenID Connect Core 1.0, appendix A.3.
    claims = {"at_hash": "77QmUPtjPfzWtF2AnpK9RQ"}
    token = "jHkWEdUXMU1BwAsC4vtUsZwnNvTIxEl0z9K3vx5KF0Y"
    check_access_token(claims, "RS256", token)
    check_access_token({}, "RS256", "any")
    with pytest.raises(BadToken, match="at_hash"):
        check_access_token(claims, "RS256", token + "x")


# --- keys -----------------------------------------------------------------------------------------


async def test_a_new_key_is_found_at_once_and_a_withdrawn_one_ends(
    fake: FakeProvider, judge: Judge
) -> None:
    await judge(signed(fake.claims(ADA)))
    fake.keys = [OTHER.as_dict(private=False)]
    judge.now += KEYS_AGAIN_S + 1
    await judge(signed(fake.claims(ADA)))  # still kept, and good
    await judge(signed(fake.claims(ADA), OTHER))
    with pytest.raises(BadToken):
        await judge(signed(fake.claims(ADA)))
    fake.keys = [RSA.as_dict(private=False)]
    judge.now += KEYS_S + 1
    with pytest.raises(BadToken):
        await judge(signed(fake.claims(ADA), OTHER))


async def test_strangers_cannot_have_the_keys_read_all_day(
    fake: FakeProvider, judge: Judge
) -> None:
    for number in range(50):
        with pytest.raises(BadToken):
            await judge(signed(fake.claims(ADA), OTHER, kid=f"k{number}"))
    assert fake.asked.count("/jwks") == 1


async def test_known_keys_are_not_waited_for_behind_unknown_ones(
    fake: FakeProvider, judge: Judge
) -> None:
    await judge(signed(fake.claims(ADA)))
    judge.now += KEYS_AGAIN_S + 1
    fake.stall_s = 3
    stranger = asyncio.create_task(judge(signed(fake.claims(ADA), OTHER, kid="made up")))
    await asyncio.sleep(0)
    async with asyncio.timeout(0.9):  # the provider is given up after a second
        await judge(signed(fake.claims(ADA)))
    with pytest.raises(ProviderError):
        await stranger
    for _ in range(5):  # and while it cannot be asked it is not asked each time
        with pytest.raises(BadToken):
            await judge(signed(fake.claims(ADA), OTHER, kid="made up"))
    assert fake.asked.count("/jwks") == 2


async def test_of_two_keys_with_one_name_neither_counts(fake: FakeProvider, judge: Judge) -> None:
    fake.keys.append({**OTHER.as_dict(private=False), "kid": "r1"})
    for key in (RSA, OTHER):
        with pytest.raises(BadToken, match="which its provider has not"):
            await judge(signed(fake.claims(ADA), key, kid="r1"))
    await judge(signed(fake.claims(ADA), EC))


async def test_a_key_for_encryption_signs_nothing(fake: FakeProvider, judge: Judge) -> None:
    fake.keys = [{**RSA.as_dict(private=False), "use": "enc"}]
    with pytest.raises(BadToken):
        await judge(signed(fake.claims(ADA)))


async def test_a_thousand_keys_are_refused(fake: FakeProvider, judge: Judge) -> None:
    key = EC.as_dict(private=False)
    fake.keys = [{**key, "kid": f"k{number}"} for number in range(1000)]
    with pytest.raises(ProviderError, match="1000 keys"):
        await judge(signed(fake.claims(ADA)))


async def test_ten_thousand_keys_and_10_mb_are_refused(fake: FakeProvider, judge: Judge) -> None:
    key = EC.as_dict(private=False)
    many = json.dumps({"keys": [{**key, "kid": f"k{n}"} for n in range(10_000)]}).encode()
    for body in (many, b" " * 10_000_000):
        fake.raw["/jwks"] = (200, "application/json", body)
        judge.now += KEYS_AGAIN_S + 1
        with pytest.raises(ProviderError, match="answers more than"):
            await judge(signed(fake.claims(ADA)))


# --- a provider that is broken, or another one ----------------------------------------------------


async def test_a_discovery_document_of_another_issuer_is_refused(
    fake: FakeProvider, judge: Judge
) -> None:
    fake.metadata["issuer"] = "https://evil.org"
    with pytest.raises(ProviderError, match="another issuer"):
        await judge(signed(fake.claims(ADA)))


@pytest.mark.parametrize("url", ["http://keys.example.org/jwks", "file:///etc/passwd", 7, None, ""])
async def test_a_discovery_document_that_points_elsewhere_is_refused(
    fake: FakeProvider, judge: Judge, url: Any
) -> None:
    fake.metadata["jwks_uri"] = url
    with pytest.raises(ProviderError, match="has no good jwks_uri"):
        await judge(signed(fake.claims(ADA)))


@pytest.mark.parametrize("status", [200, 500, 302])
async def test_html_is_no_answer(fake: FakeProvider, judge: Judge, status: int) -> None:
    fake.raw["/jwks"] = (status, "text/html", b"<html>sorry</html>")
    with pytest.raises(ProviderError, match=f"answers {status} text/html, not JSON"):
        await judge(signed(fake.claims(ADA)))


@pytest.mark.parametrize("where", ["https://xn--a/", "/jwks", "http://[", "file:///etc/passwd"])
async def test_a_redirect_is_no_answer_wherever_it_leads(
    fake: FakeProvider, judge: Judge, where: str
) -> None:
    fake.raw["/jwks"] = (302, "text/html", b"moved")
    fake.headers["/jwks"] = f"Location: {where}\r\n"
    with pytest.raises(ProviderError):
        await judge(signed(fake.claims(ADA)))


async def test_an_answer_that_is_packed_is_not_unpacked(fake: FakeProvider, judge: Judge) -> None:
    bomb = gzip.compress(gzip.compress(bytes(100_000_000)))
    fake.raw["/jwks"] = (200, "application/json", bomb)
    fake.headers["/jwks"] = "Content-Encoding: gzip, gzip\r\n"
    with pytest.raises(ProviderError, match="an encoding that was not asked for"):
        await judge(signed(fake.claims(ADA)))


async def test_no_cookie_goes_from_one_person_to_the_next(fake: FakeProvider, judge: Judge) -> None:
    fake.people = {"a": {"sub": "ada"}, "e": {"sub": "eve"}}
    fake.headers["/userinfo"] = "Set-Cookie: session=ada; Path=/\r\n"
    await judge.provider.userinfo("a")
    await judge.provider.userinfo("e")
    assert fake.cookies == []


async def test_a_slow_provider_is_waited_for_so_long(fake: FakeProvider, judge: Judge) -> None:
    fake.stall_s = 3
    with pytest.raises(ProviderError, match="does not answer within 1 s"):
        await judge(signed(fake.claims(ADA)))


async def test_userinfo_says_yes_no_or_nothing(fake: FakeProvider, judge: Judge) -> None:
    fake.people["good"] = {"sub": "ada"}
    assert await judge.provider.userinfo("good") == {"sub": "ada"}
    assert await judge.provider.userinfo("gone") is None
    for status in (200, 403, 429, 500, 503):
        fake.raw["/userinfo"] = (status, "application/json", b"{}")
        with pytest.raises(ProviderError):
            await judge.provider.userinfo("good")


@pytest.mark.parametrize(
    "url", ["http://acme.org", "ftp://acme.org", "acme.org", "https://u:p@acme.org", "https://a#b"]
)
def test_an_issuer_is_https(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|https|user"):
        check_url(url)
