"""The user's side: a session that is renewed, by several processes, at a provider that fails."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from wetware.errors import AuthError, KeyFileError
from wetware.identity import Key
from wetware_auth_oidc import session as sessions
from wetware_auth_oidc.errors import ProviderError
from wetware_auth_oidc.login import renewed
from wetware_auth_oidc.session import StoredSession

from .fake import FakeProvider, signed

pytestmark = pytest.mark.anyio
ADA = Key.from_seed(b"a" * 32)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WW_HOME", str(tmp_path))


def expired(fake: FakeProvider) -> StoredSession:
    """One whose tokens have to be renewed; the provider does so, once."""
    session = replace(fake.session(ADA), refresh_token="r1", expires_at=time.time() - 1)
    sessions.save("default", session)
    fake.tokens = {
        "id_token": signed(fake.claims(ADA)),
        "access_token": "a2",
        "refresh_token": "r2",
        "expires_in": 300,
    }
    return session


async def test_tokens_are_renewed_until_the_first_of_them_ends(fake: FakeProvider) -> None:
    expired(fake)
    found = await renewed("default")
    assert found == sessions.load("default")
    assert (found.access_token, found.refresh_token) == ("a2", "r2")
    assert 290 < found.expires_at - time.time() <= 300


async def test_a_token_without_a_nonce_is_bound_by_the_first(fake: FakeProvider) -> None:
    first = expired(fake)
    fake.tokens["id_token"] = signed(fake.claims(ADA, nonce=None))
    found = await renewed("default")
    assert found.bound_token == first.id_token
    sessions.save("default", replace(found, expires_at=0))
    assert (await renewed("default")).bound_token == first.id_token


async def test_a_new_refresh_token_is_kept_whatever_fails_after_it(fake: FakeProvider) -> None:
    expired(fake)
    fake.raw["/jwks"] = (503, "text/html", b"down")
    with pytest.raises(ProviderError):
        await renewed("default")
    assert sessions.load("default").refresh_token == "r2"
    fake.raw.clear()
    assert (await renewed("default")).access_token == "a2"


async def test_a_refusal_wants_a_login_and_an_outage_does_not(fake: FakeProvider) -> None:
    expired(fake)
    fake.raw["/token"] = (503, "application/json", b'{"error": "temporarily_unavailable"}')
    with pytest.raises(ProviderError, match="503"):
        await renewed("default")
    fake.raw.clear()
    fake.tokens = {"error": "invalid_grant", "error_description": "gone\x1b[2J"}
    with pytest.raises(AuthError, match="renews no more: invalid_grant: gone") as refused:
        await renewed("default")
    assert "\x1b" not in refused.value.message
    assert "ww auth oidc login" in refused.value.hint


async def test_a_renewed_token_that_is_not_ours_is_refused(fake: FakeProvider) -> None:
    expired(fake)
    fake.tokens["id_token"] = signed(fake.claims(ADA, aud="other"))
    with pytest.raises(AuthError, match=r"is refused: it is for another client") as refused:
        await renewed("default")
    assert "ww auth oidc login" in refused.value.hint


async def test_of_several_at_once_one_renews(fake: FakeProvider) -> None:
    expired(fake)
    fake.stall_s = 0.1
    found = await asyncio.gather(*(renewed("default") for _ in range(5)))
    assert len({each.access_token for each in found}) == 1
    assert fake.asked.count("/token") == 1


async def test_a_file_that_others_can_read_is_refused(fake: FakeProvider) -> None:
    expired(fake)
    path = sessions.path_of("default")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(KeyFileError):
        sessions.load("default")
    path.chmod(0o600)
    path.write_text('{"issuer": 1}')
    with pytest.raises(KeyFileError, match="damaged"):
        sessions.load("default")
