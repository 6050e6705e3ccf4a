"""Service accounts: what their tokens have to name, and how a client comes to one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import ECKey, RSAKey

from wetware.errors import AuthError, ConfigError, InvalidArgument, KeyFileError
from wetware.hookspecs import Accept, Reject
from wetware.identity import LoginStatus, PeerId, Principal
from wetware_auth_oidc.accounts import new_session, obtained, workload_token
from wetware_auth_oidc.config import AuthOidcConfig, check_workloads, parse_roles
from wetware_auth_oidc.errors import ProviderError
from wetware_auth_oidc.provider import Provider
from wetware_auth_oidc.session import Account, StoredSession
from wetware_auth_oidc.tokens import SERVICE_S_MAX, key_audience, part_of, thumbprint

from .fake import CLIENT, OTHER, FakeProvider, fake_provider, signed, unsigned
from .nodes import ADA, EVE, MAY, Node, Start, config

pytestmark = pytest.mark.anyio
ROLES = {
    "deployer": {"claims": ["client:sub=ci", "k8s:sub=deployer"], "services": MAY},
    "eng": {"claims": ["groups=eng"], "services": MAY},
    "prod": {"claims": ["k8s:environment=prod"], "services": MAY},
}
OTHER_NODE = PeerId.from_public_key(b"n" * 32)


def session_of(issuer: str, token: str) -> StoredSession:
    """With ADA's key."""
    account = Account("token", "", CLIENT, "")
    return replace(new_session(config(issuer), account, "", ADA), access_token=token)


def test_the_thumbprint_is_that_of_rfc_8037() -> None:
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert thumbprint(public) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"  # appendix A.3


async def test_a_token_bound_to_the_key_logs_a_service_in(fake: FakeProvider, start: Start) -> None:
    async with start(roles=ROLES) as node:
        claims = fake.service_claims(ADA)
        verdict = await node.login(session_of(fake.issuer, signed(claims)))
        who = Principal("oidc", "client:ci")
        assert verdict == Accept(who, frozenset({"deployer"}), claims["exp"])
        assert node.backend.roles(who) == {"deployer"}
        assert node.backend.roles(Principal("oidc", "ci")) == frozenset()
        assert "/userinfo" not in fake.asked


Make = Callable[[FakeProvider, Node], str]
BAD: dict[str, tuple[Make, str]] = {
    "bound to nothing": (
        lambda f, _: signed(f.service_claims(ADA, cnf=None)),
        "bound neither to this session's key nor to this node",
    ),
    "bound to another key": (
        lambda f, _: signed(f.service_claims(EVE)),
        "bound neither to this session's key nor to this node",
    ),
    "a binding of another kind": (
        lambda f, _: signed(f.service_claims(ADA, cnf={"x5t#S256": thumbprint(ADA.public)})),
        "bound neither to this session's key nor to this node",
    ),
    "a binding that is text": (
        lambda f, _: signed(f.service_claims(ADA, cnf=thumbprint(ADA.public))),
        "bound neither to this session's key nor to this node",
    ),
    "bound, and for another audience": (
        lambda f, _: signed(f.service_claims(ADA, aud="payroll")),
        "for somebody else (aud)",
    ),
    "for another node": (
        lambda f, _: signed(f.service_claims(ADA, cnf=None, aud=f"wetware:{OTHER_NODE}")),
        "for somebody else (aud)",
    ),
    "for another session's key": (
        lambda f, _: signed(f.service_claims(ADA, cnf=None, aud=key_audience(EVE.public))),
        "for somebody else (aud)",
    ),
    "of the client that people log in with": (
        lambda f, _: signed(f.service_claims(ADA, sub="ci", client_id=CLIENT)),
        "that people log in with",
    ),
    "of that client, as Keycloak says it": (
        lambda f, _: signed(f.service_claims(ADA, client_id=None, azp=CLIENT)),
        "that people log in with",
    ),
    "an ID token": (lambda f, _: signed(f.claims(ADA)), "bound neither"),
    "an issuer that nobody named": (
        lambda f, _: signed(f.service_claims(ADA, iss="https://evil.org")),
        "nobody's accounts are by",
    ),
    "no issuer": (lambda f, _: signed(f.service_claims(ADA, iss=None)), "nobody's accounts"),
    "an issuer that is a list": (
        lambda f, _: signed(f.service_claims(ADA, iss=[f.issuer])),
        "nobody's accounts",
    ),
    "another's signature": (
        lambda f, _: signed(f.service_claims(ADA), OTHER, kid="r1"),
        "signature is wrong",
    ),
    "alg none": (lambda f, _: unsigned(f.service_claims(ADA)), "not with a provider's key pair"),
    "expired": (
        lambda f, _: signed(f.service_claims(ADA, exp=time.time() - 120)),
        "it expired 120 s ago",
    ),
    "good for a day, and old": (
        lambda f, _: signed(
            f.service_claims(ADA, iat=time.time() - SERVICE_S_MAX - 5, exp=time.time() + 80_000)
        ),
        "older than 3600 s",
    ),
    "from the future": (
        lambda f, _: signed(f.service_claims(ADA, iat=time.time() + 300)),
        "clocks",
    ),
    "no subject": (lambda f, _: signed(f.service_claims(ADA, sub=None)), "(sub)"),
    "opaque": (lambda f, _: "mF_9.B5f-4.1JqM", "no signed token"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_of_a_service_is_refused(
    fake: FakeProvider, start: Start, name: str
) -> None:
    make, why = BAD[name]
    async with start(roles=ROLES) as node:
        verdict = await node.login(session_of(fake.issuer, make(fake, node)))
        assert isinstance(verdict, Reject)
        assert why in verdict.reason
        assert not node.backend.roles(Principal("oidc", "client:ci"))


async def test_a_workloads_token_counts_for_its_key_or_at_its_node(
    fake: FakeProvider, start: Start
) -> None:
    async with fake_provider() as platform:
        del platform.metadata["token_endpoint"]  # it signs, and nothing else
        workloads = (f"k8s={platform.issuer}",)
        async with start(roles=ROLES, workloads=workloads) as node:
            for audience in (key_audience(ADA.public), ["x", f"wetware:{node.peer}"]):
                token = signed(platform.claims(ADA, "deployer", nonce=None, aud=audience))
                verdict = await node.login(session_of(fake.issuer, token))
                assert isinstance(verdict, Accept), verdict
                assert verdict.principal == Principal("oidc", "k8s:deployer")
                assert verdict.roles == {"deployer"}  # `groups=eng` is of people
            stolen = replace(session_of(fake.issuer, token), seed=EVE.seed.hex())
            assert isinstance(await node.login(stolen), Accept)  # at this node, by this node
            node.peer = OTHER_NODE
            assert isinstance(await node.login(stolen), Reject)


async def test_jobs_of_one_account_have_the_roles_of_their_own_tokens(
    fake: FakeProvider, start: Start
) -> None:
    async with (
        fake_provider() as platform,
        start(roles=ROLES, workloads=(f"k8s={platform.issuer}",)) as node,
    ):

        async def login(**more: Any) -> Accept | Reject:
            aud = key_audience(ADA.public)
            claims = platform.claims(ADA, "deployer", nonce=None, aud=aud, **more)
            return await node.login(session_of(fake.issuer, signed(claims)))

        prod = await login(environment="prod")
        other = await login(iat=time.time() - 60)
        assert isinstance(prod, Accept)
        assert isinstance(other, Accept)
        assert (prod.roles, other.roles) == ({"deployer", "prod"}, {"deployer"})
        assert node.backend.roles(prod.principal) == {"deployer", "prod"}
        assert node.told == []


async def test_a_services_roles_end_with_its_token(fake: FakeProvider, start: Start) -> None:
    async with start(roles=ROLES) as node:
        old = fake.service_claims(ADA, exp=time.time() - 30)  # within what clocks may differ
        verdict = await node.login(session_of(fake.issuer, signed(old)))
        assert isinstance(verdict, Accept)
        assert node.backend.roles(verdict.principal) == frozenset()
        long = fake.service_claims(ADA, exp=time.time() + 80_000)
        verdict = await node.login(session_of(fake.issuer, signed(long)))
        assert isinstance(verdict, Accept)
        assert verdict.expires_at == long["iat"] + SERVICE_S_MAX


async def test_a_person_is_not_called_like_a_service(fake: FakeProvider, start: Start) -> None:
    async with start(roles=ROLES) as node:
        verdict = await node.login(fake.session(ADA, "client:ci"))
        assert isinstance(verdict, Reject)
        assert "a name of service accounts" in verdict.reason
        for name in ("auth0:ci", "client"):
            assert isinstance(await node.login(fake.session(ADA, name)), Accept)
        verdict = await node.login(fake.session(EVE, "ci", groups=[]))
        assert isinstance(verdict, Reject)
        assert verdict.status is LoginStatus.NO_ROLE


def test_claims_name_their_source_and_others_may_have_colons() -> None:
    names = ["a:sub=x", "client:sub=x", "cognito:groups=x", "https://acme.org/team=x"]
    claims = parse_roles({"r": {"claims": names, "services": MAY}}, ["a"])["r"].claims
    assert [each[0] for each in claims] == ["a", "client", "", ""]


@pytest.mark.parametrize(
    "workloads",
    [
        ("k8s=http://acme.org",),
        ("client=https://acme.org",),
        ("K8s=https://acme.org",),
        ("https://acme.org",),
        ("a=https://a.org", "a=https://b.org"),
        ("a=https://a.org", "b=https://a.org"),
        ("a=https://id.example.org",),
        tuple(f"a{n}=https://a{n}.org" for n in range(9)),
    ],
)
def test_workloads_that_cannot_be_told_apart_are_refused(workloads: tuple[str, ...]) -> None:
    with pytest.raises((ConfigError, InvalidArgument)):  # noqa: PT012  # either of the two checks
        check_workloads(workloads)
        AuthOidcConfig("https://id.example.org", CLIENT, roles=ROLES, workloads=workloads).checked()


# --- the account's side ---------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("s3cret\n")
    path.chmod(0o600)
    return path


async def obtain(fake: FakeProvider, path: Path, by: str = "secret") -> StoredSession:
    session = new_session(config(fake.issuer), Account(by, str(path), CLIENT, ""), "ci", ADA)
    provider = Provider(fake.issuer)
    try:
        return await obtained(session, provider)
    finally:
        await provider.close()


async def test_a_client_takes_only_a_token_that_names_its_key(
    fake: FakeProvider, secret: Path
) -> None:
    with pytest.raises(AuthError, match="cannot bind tokens"):
        await obtain(fake, secret)
    fake.metadata["dpop_signing_alg_values_supported"] = ["ES256", "Ed25519"]
    good = fake.service_claims(ADA, exp=time.time() + 80_000)
    fake.tokens = {"access_token": signed(good), "token_type": "DPoP"}
    found = await obtain(fake, secret)
    assert found.access_token == fake.tokens["access_token"]
    assert found.expires_at == good["iat"] + SERVICE_S_MAX
    for token in (signed(fake.service_claims(ADA, cnf=None)), "opaque"):
        fake.tokens = {"access_token": token, "token_type": "Bearer"}
        with pytest.raises(AuthError, match="the provider's token is refused"):
            await obtain(fake, secret)
    fake.tokens = {"access_token": signed(fake.service_claims(ADA, iat=None))}
    with pytest.raises(ProviderError, match="without its times"):
        await obtain(fake, secret)
    fake.tokens = {"error": "invalid_client"}
    with pytest.raises(AuthError, match="invalid_client"):
        await obtain(fake, secret)


def given(secret: Path, data: bytes | None = None, mode: int = 0o600) -> Path:
    if data is not None:
        secret.write_bytes(data)
    secret.chmod(mode)
    return secret


async def test_a_secret_that_others_can_read_is_not_used(fake: FakeProvider, secret: Path) -> None:
    fake.metadata["dpop_signing_alg_values_supported"] = ["EdDSA"]
    with pytest.raises(KeyFileError, match="readable by others"):
        await obtain(fake, given(secret, mode=0o640))
    for key in (RSAKey.generate_key(2048), ECKey.generate_key("P-256")):
        with pytest.raises(KeyFileError, match="no private key"):
            await obtain(fake, given(secret, key.as_pem(private=False)), "key")
    with pytest.raises(KeyFileError, match="there is no"):
        await obtain(fake, secret.with_name("none"))
    assert "/token" not in fake.asked


async def test_a_workloads_token_that_is_not_bound_is_not_shown(
    fake: FakeProvider, tmp_path: Path
) -> None:
    here = PeerId.from_public_key(b"h" * 32)
    account = Account("token", str(tmp_path / "{node}.jwt"), CLIENT, "")
    session = new_session(config(fake.issuer), account, "", ADA)
    file = tmp_path / f"{here}.jwt"
    with pytest.raises(AuthError, match="cannot read") as missing:
        workload_token(session, here)
    assert key_audience(ADA.public) in missing.value.hint
    for audience in ("payroll", f"wetware:{OTHER_NODE}", key_audience(EVE.public)):
        file.write_text(signed(fake.service_claims(ADA, cnf=None, aud=audience)))
        with pytest.raises(AuthError, match="is not shown to the node"):
            workload_token(session, here)
    token = signed(fake.service_claims(ADA, cnf=None, aud=f"wetware:{here}"))
    file.write_text(token + "\n")
    assert workload_token(session, here) == token
    assert json.dumps(part_of(token, 1)["aud"]) == f'"wetware:{here}"'
