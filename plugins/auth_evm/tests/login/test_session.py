"""The user's sessions on disk, and the signers that use them."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from pathlib import Path

import pytest
from plugins.auth_evm.tests.login.world import ALICE, BOB, CLUSTER

from wetware.client import KeyChoice
from wetware.errors import AuthError, ConfigError, InvalidArgument, KeyFileError
from wetware.identity import Challenge, Channel, Key, verify
from wetware_auth_evm.chain.profile import Profile
from wetware_auth_evm.login import session as sessions
from wetware_auth_evm.login.proofs import (
    SCHEMES,
    KeyProof,
    SessionProof,
    key_statement,
    session_statement,
)
from wetware_auth_evm.login.session import StoredSession
from wetware_auth_evm.login.statements import recover
from wetware_auth_evm.signer import make_key_signer, make_session_signer

pytestmark = pytest.mark.anyio

PROFILE = Profile(31337, bytes(range(20)), "team", ("http://127.0.0.1:1",), cluster=CLUSTER)
NOW = 4_000_000_000.0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WW_KEY", "WW_ACCOUNT", "WW_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WW_HOME", str(tmp_path))
    return tmp_path


def made(now: float = NOW, seconds: int = 3600) -> StoredSession:
    grant, key = sessions.new_session(
        PROFILE, ALICE.account, ["member", "admin", "member"], (1, 2, 3), now, seconds
    )
    return StoredSession(key, grant, ALICE.wallet.sign(grant.digest()), "eip712")


def challenge(cluster: str = CLUSTER, schemes: tuple[str, ...] = SCHEMES) -> Challenge:
    return Challenge(
        nonce=secrets.token_bytes(32),
        verifier=Key.from_seed(b"v" * 32).peer_id,
        cluster=cluster,
        channel=Channel("noise", bytes(32)),
        schemes=schemes,
        policy_epoch=1,
        not_after_ms=int(NOW * 1000),
    )


def choice(key: Key | Path | str | None, home: Path) -> KeyChoice:
    return KeyChoice(key, home / "keys", None)


def test_a_new_session_is_for_the_profile() -> None:
    session = made()
    grant = session.grant
    assert (grant.chain_id, grant.contract, grant.cluster) == (31337, PROFILE.contract, CLUSTER)
    assert grant.scope == b"team".ljust(32, b"\0")
    assert grant.roles == ("admin", "member")
    assert grant.epochs == (1, 2, 3)
    assert (grant.issued_at, grant.expires_at) == (int(NOW), int(NOW) + 3600)
    assert grant.session_key == session.key.peer_id
    assert made().grant.nonce != grant.nonce
    for seconds in (0, -1, 86_401):
        with pytest.raises(InvalidArgument, match="a session of"):
            made(seconds=seconds)
    with pytest.raises(InvalidArgument):
        sessions.new_session(PROFILE, ALICE.account, [], (0, 0, 0), NOW)
    with pytest.raises(ConfigError, match="cluster"):
        sessions.new_session(
            dataclasses.replace(PROFILE, cluster=""), ALICE.account, ["a"], (0, 0, 0), NOW
        )


def test_a_session_is_kept_private_and_read_back(home: Path) -> None:
    session = made()
    path = sessions.save("default", session)
    assert path == home / "evm" / "sessions" / f"default@{CLUSTER}.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    found = sessions.load("default", CLUSTER)
    assert found is not None
    assert (found.grant, found.signature, found.form) == (
        session.grant, session.signature, session.form
    )  # fmt: skip
    assert found.key.public == session.key.public
    assert session.key.seed.hex() not in repr(found)
    assert list(sessions.listing()) == [("default", CLUSTER)]
    assert sessions.load("default", "d2" * 16) is None
    assert sessions.load("other", CLUSTER) is None
    assert sessions.remove("default", CLUSTER)
    assert not sessions.remove("default", CLUSTER)
    assert list(sessions.listing()) == []


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "a@b", "x" * 65, ".hidden", "a\n"])
def test_a_session_has_a_plain_name(name: str) -> None:
    with pytest.raises(InvalidArgument):
        sessions.load(name, CLUSTER)
    with pytest.raises(InvalidArgument):
        sessions.load("default", name)


def test_a_session_that_others_can_read_is_not_used() -> None:
    path = sessions.save("default", made())
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="readable by others") as caught:
        sessions.load("default", CLUSTER)
    assert caught.value.code == "key.mode"


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"form": "pgp"},
        {"signature": ""},
        {"signature": "zz"},
        {"session_key": "00" * 31},
        {"session_key": "11" * 32},
        {"grant": {}},
        {"grant": None},
        None,
    ],
    ids=str,
)
def test_a_damaged_session_is_said_to_be(change: dict[str, object] | None) -> None:
    path = sessions.save("default", made())
    document = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps({**document, **change}))
    with pytest.raises(KeyFileError, match="is damaged") as caught:
        sessions.load("default", CLUSTER)
    assert "ww auth evm login" in caught.value.hint
    assert document["session_key"] not in str(caught.value)


def test_a_session_under_another_clusters_name_is_not_used() -> None:
    path = sessions.save("default", made())
    os.rename(path, path.with_name(f"default@{'d2' * 16}.json"))
    with pytest.raises(KeyFileError, match="is damaged"):
        sessions.load("default", "d2" * 16)


# --- signers ---


async def test_the_session_of_the_challenges_cluster_answers(home: Path) -> None:
    session = made()
    sessions.save("default", session)
    asked = challenge()
    proof = await make_session_signer(choice(None, home)).sign(asked)
    assert proof.scheme == "evm-session"
    assert proof.signed == asked.signed_bytes()
    shown = SessionProof.decode(proof.payload)
    assert shown.grant == session.grant
    assert recover(shown.digest, shown.signature) == ALICE.account
    assert verify(session.key.public, shown.answer, session_statement(asked, shown.digest))


async def test_a_wallet_without_a_session_says_what_to_do(home: Path) -> None:
    sessions.save("default", made())
    with pytest.raises(AuthError, match="has no session in the cluster d2d2") as caught:
        await make_session_signer(choice(None, home)).sign(challenge("d2" * 16))
    assert (caught.value.code, caught.value.hint) == ("auth.needs_login", "`ww auth evm login`")
    with pytest.raises(AuthError, match="'work' has no session") as caught:
        await make_session_signer(choice("work", home)).sign(challenge())
    assert caught.value.hint == "`ww --key work auth evm login`"


async def test_an_expired_session_says_what_to_do(home: Path) -> None:
    sessions.save("default", made(now=1000.0))
    with pytest.raises(AuthError, match="expired") as caught:
        await make_session_signer(choice(None, home)).sign(challenge())
    assert (caught.value.code, caught.value.hint) == ("auth.needs_login", "`ww auth evm login`")


async def test_the_name_of_the_wallet_is_that_of_the_key(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions.save("work", made())
    monkeypatch.setenv("WW_KEY", "work")
    proof = await make_session_signer(choice(None, home)).sign(challenge())
    assert proof.scheme == "evm-session"
    proof = await make_session_signer(choice("work", home)).sign(challenge())
    assert proof.scheme == "evm-session"


async def test_a_chosen_key_without_a_session_answers_as_a_bound_key(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key.generate()
    key.save(home / "keys" / "robot")
    asked = challenge()
    for chosen in ("robot", home / "keys" / "robot", key):
        proof = await make_session_signer(choice(chosen, home)).sign(asked)
        assert proof.scheme == "evm-key"
        shown = KeyProof.decode(proof.payload)
        assert (shown.key, shown.account) == (key.public, b"")
        assert verify(key.public, shown.answer, key_statement(asked, b""))
    monkeypatch.setenv("WW_ACCOUNT", BOB.address)
    shown = KeyProof.decode((await make_key_signer(choice(key, home)).sign(asked)).payload)
    assert shown.account == BOB.account
    assert verify(key.public, shown.answer, key_statement(asked, BOB.account))
    monkeypatch.setenv("WW_ACCOUNT", "Bob")
    with pytest.raises(InvalidArgument, match="WW_ACCOUNT: 'Bob' is not an address"):
        make_key_signer(choice(key, home))
    # The default key is not taken for a bound one by itself.
    key.save(home / "keys" / "default")
    monkeypatch.delenv("WW_ACCOUNT")
    with pytest.raises(AuthError, match="has no session"):
        await make_session_signer(choice(None, home)).sign(asked)


async def test_a_node_that_does_not_take_the_scheme(home: Path) -> None:
    sessions.save("default", made())
    with pytest.raises(AuthError, match="does not accept evm-session"):
        await make_session_signer(choice(None, home)).sign(challenge(schemes=("local-ed25519",)))
    with pytest.raises(AuthError, match="does not accept evm-key"):
        await make_key_signer(choice(Key.generate(), home)).sign(challenge(schemes=("x",)))
