"""Every way to log in that must fail, one test each, against a backend on a real chain.

What the core compares before a backend is asked (verifier, channel, nonce) is not relied on here:
the session key signs the whole challenge. Through real nodes: test_nodes.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plugins.auth_evm.tests.chain.net import DAY_S
from plugins.auth_evm.tests.contract.people import ROOT, word
from plugins.auth_evm.tests.login.world import ALICE, BOB, MALLORY, SCOPE, World, refused

from wetware.base import cbor
from wetware.hookspecs import Accept, NotMine, Reject
from wetware.identity import Challenge, Channel, Key, LoginStatus, Principal, Proof
from wetware_auth_evm.login.proofs import (
    KEY_SCHEME,
    SESSION_SCHEME,
    KeyProof,
    SessionProof,
    session_statement,
)
from wetware_auth_evm.login.session import StoredSession
from wetware_auth_evm.login.statements import SESSION_S_MAX, SessionGrant

pytestmark = pytest.mark.anyio

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


@pytest.fixture
async def alices(world: World) -> StoredSession:
    """A good session of Alice, who is a member."""
    await world.grant(ALICE.address)
    session = world.session_of(ALICE)
    assert isinstance(await world.login(session), Accept)
    return session


def changed(session: StoredSession, **changes: Any) -> StoredSession:
    """The same signature under another grant."""
    return dataclasses.replace(session, grant=dataclasses.replace(session.grant, **changes))


# --- whose session it is ---


async def test_a_grant_that_another_wallet_signed(world: World, alices: StoredSession) -> None:
    forged = world.session_of(MALLORY, account=ALICE.account)
    refused(await world.login(forged), LoginStatus.BAD_SIGNATURE, "not by the account")


async def test_the_session_of_another_wallet_without_its_key(
    world: World, alices: StoredSession
) -> None:
    """A node sees grant and signature at each login, and must not be able to use them."""
    result = await world.show(alices, key=Key.generate())
    refused(result, LoginStatus.BAD_SIGNATURE, "not by the key that the session names")


async def test_a_renamed_session_key(world: World, alices: StoredSession) -> None:
    own = Key.generate()
    stolen = dataclasses.replace(changed(alices, session_key=own.peer_id), key=own)
    refused(await world.show(stolen), LoginStatus.BAD_SIGNATURE, "not by the account")


async def test_another_account_in_the_grant(world: World, alices: StoredSession) -> None:
    await world.grant(BOB.address)
    refused(await world.show(changed(alices, account=BOB.account)), LoginStatus.BAD_SIGNATURE)


async def test_an_answer_beside_another_grant_of_the_same_key(
    world: World, alices: StoredSession
) -> None:
    """What the session key answers names the grant: it cannot be put beside another one."""
    await world.grant(MALLORY.address)
    challenge = world.challenge()
    planted = world.session_of(MALLORY, session_key=alices.grant.session_key)
    answer = alices.key.sign(session_statement(challenge, alices.proof.digest))
    payload = dataclasses.replace(planted.proof, answer=answer).encode()
    proof = Proof(SESSION_SCHEME, payload, challenge.signed_bytes())
    refused(await world.backend.authenticate(challenge, proof), LoginStatus.BAD_SIGNATURE)


# --- relay and replay ---


@pytest.mark.parametrize(
    "other",
    [
        {"verifier": Key.from_seed(b"o" * 32).peer_id},
        {"channel": Channel("noise", bytes(32))},
        {"nonce": bytes(32)},
        {"not_after_ms": 1},
        {"policy_epoch": 0},
        {"schemes": (SESSION_SCHEME,)},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_an_answer_to_another_challenge(
    world: World, alices: StoredSession, other: dict[str, Any]
) -> None:
    """Relayed from another node or connection, or seen before."""
    asked: Challenge = world.challenge()
    elsewhere = dataclasses.replace(asked, **other)
    answer = alices.key.sign(session_statement(elsewhere, alices.proof.digest))
    payload = dataclasses.replace(alices.proof, answer=answer).encode()
    proof = Proof(SESSION_SCHEME, payload, elsewhere.signed_bytes())
    refused(await world.backend.authenticate(asked, proof), LoginStatus.BAD_SIGNATURE)


async def test_the_signer_does_not_sign_for_another_cluster(
    world: World, alices: StoredSession
) -> None:
    from wetware.errors import AuthError

    with pytest.raises(AuthError, match="the session is for the cluster c1c1") as caught:
        await world.login(alices, world.challenge(cluster="d2" * 16))
    assert caught.value.code == "auth.wrong_cluster"


# --- what it is for ---


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"chain_id": 1}, "another chain"),
        ({"contract": bytes(20)}, "another contract"),
        ({"cluster": "d2" * 16}, "another cluster"),
        ({"scope": word("lab")}, "another scope"),
        ({"scope": ROOT}, "another scope"),
    ],
)
async def test_a_session_for_another_chain_contract_cluster_or_scope(
    world: World, alices: StoredSession, wrong: dict[str, Any], what: str
) -> None:
    # As Alice signed it for there, and as somebody makes hers look.
    refused(await world.show(world.session_of(ALICE, **wrong)), LoginStatus.WRONG_CLUSTER, what)
    refused(await world.show(changed(alices, **wrong)), LoginStatus.WRONG_CLUSTER, what)


async def test_widened_roles(world: World, alices: StoredSession) -> None:
    await world.grant(ALICE.address, "editor", 0b1011)
    principal = world.principal(ALICE)
    assert world.backend.roles(principal) == {"member", "editor"}
    # She has both, and signed for one: that is what the session gives.
    result = await world.login(alices)
    assert isinstance(result, Accept)
    assert result.roles == {"member"}
    wider = changed(alices, roles=("editor", "member"))
    refused(await world.show(wider), LoginStatus.BAD_SIGNATURE)


async def test_roles_that_the_contract_does_not_give(world: World, alices: StoredSession) -> None:
    session = world.session_of(ALICE, ("admin", "editor"))
    refused(await world.login(session), LoginStatus.NO_ROLE, "roles are member", "admin, editor")
    both = world.session_of(ALICE, ("admin", "member"))
    result = await world.login(both)
    assert isinstance(result, Accept)
    assert result.roles == {"member"}


async def test_a_stranger(world: World) -> None:
    refused(await world.login(world.session_of(MALLORY)), LoginStatus.NO_ROLE, "has no role")


@pytest.mark.parametrize("role", ["node", "guardian"])
async def test_a_reserved_role_gives_nothing(world: World, role: str) -> None:
    await world.grant(ALICE.address, role)
    refused(await world.login(world.session_of(ALICE, (role,))), LoginStatus.NO_ROLE, "no role")


async def test_a_role_that_the_configuration_does_not_know(world: World) -> None:
    await world.grant(ALICE.address, "pilot")
    result = await world.login(world.session_of(ALICE, ("pilot",)))
    refused(result, LoginStatus.NO_ROLE, "pilot", "configuration does not know")
    assert world.backend.profile("pilot").services == {}


async def test_rights_that_the_configuration_gives_nothing_for(world: World) -> None:
    await world.grant(ALICE.address, "member", 0b10)
    result = await world.login(world.session_of(ALICE))
    refused(result, LoginStatus.NO_ROLE, "configuration does not know")


# --- when it is for ---


async def test_an_expired_session(world: World, alices: StoredSession) -> None:
    world.chain.clock.pass_s(3599)
    world.chain.chain.time += 3598
    world.chain.mine(1)
    await world.look()
    assert isinstance(await world.show(alices), Accept)
    world.chain.clock.pass_s(1)
    refused(await world.show(alices), LoginStatus.EXPIRED, "expired", "ww auth evm login")


async def test_an_expired_session_at_a_node_whose_clock_was_set_back(
    world: World, alices: StoredSession
) -> None:
    """By the chain's clock it is over: the later of the two decides."""
    left_s = alices.grant.expires_at - world.chain.chain.time
    world.chain.chain.time += left_s
    world.chain.mine(1)
    await world.look()
    world.chain.clock.wall_s -= 50
    refused(await world.show(alices), LoginStatus.EXPIRED, "expired")
    # Set back further, it decides nothing at all.
    world.chain.clock.wall_s -= 50
    refused(await world.show(alices), LoginStatus.BACKEND_UNAVAILABLE, "this clock is slow")


async def test_the_signer_does_not_use_an_expired_session(
    world: World, alices: StoredSession
) -> None:
    from wetware.errors import AuthError

    world.chain.clock.pass_s(3600)
    with pytest.raises(AuthError, match="has expired") as caught:
        await world.login(alices)
    assert (caught.value.code, caught.value.hint) == ("auth.needs_login", "`ww auth evm login`")


async def test_a_session_of_the_future(world: World, alices: StoredSession) -> None:
    now = int(world.chain.clock.time())
    late = world.session_of(ALICE, issued_at=now + 31, expires_at=now + 100)
    refused(await world.login(late), LoginStatus.EXPIRED, "31 s in the future", "clocks")
    # A wallet's clock may be a little ahead.
    soon = world.session_of(ALICE, issued_at=now + 30, expires_at=now + 100)
    assert isinstance(await world.login(soon), Accept)


async def test_an_over_long_session(world: World, alices: StoredSession) -> None:
    day = world.session_of(ALICE, seconds=SESSION_S_MAX)
    assert isinstance(await world.login(day), Accept)
    longer = world.session_of(ALICE, seconds=SESSION_S_MAX + 1)
    refused(await world.show(longer), LoginStatus.MALFORMED, "expires at")


async def test_a_session_that_is_longer_than_this_node_allows(world: World) -> None:
    await world.grant(ALICE.address)
    world.config = dataclasses.replace(world.config, session_s_max=600)
    await world.backend.endpoints.aclose()
    world.start()
    await world.look()
    assert isinstance(await world.login(world.session_of(ALICE, seconds=600)), Accept)
    result = await world.login(world.session_of(ALICE, seconds=601))
    refused(result, LoginStatus.EXPIRED, "session_s_max", "600")


# --- the signature ---


def high_s(signature: bytes) -> bytes:
    """The other signature that means the same."""
    s = ORDER - int.from_bytes(signature[32:64], "big")
    return signature[:32] + s.to_bytes(32, "big") + bytes([55 - signature[64]])


async def test_high_s(world: World, alices: StoredSession) -> None:
    twin = dataclasses.replace(alices, signature=high_s(alices.signature))
    refused(await world.login(twin), LoginStatus.BAD_SIGNATURE, "upper half")


@pytest.mark.parametrize("v", [0, 1, 2, 26, 29, 30, 31, 37, 38, 255])
async def test_any_other_v(world: World, alices: StoredSession, v: int) -> None:
    other = dataclasses.replace(alices, signature=alices.signature[:64] + bytes([v]))
    refused(await world.login(other), LoginStatus.BAD_SIGNATURE, "v is neither 27 nor 28")


def compact(signature: bytes) -> bytes:
    """64 bytes: v in the highest bit of s (EIP-2098)."""
    s = int.from_bytes(signature[32:64], "big") | (signature[64] - 27) << 255
    return signature[:32] + s.to_bytes(32, "big")


async def test_any_other_length(world: World, alices: StoredSession) -> None:
    good = alices.signature
    for signature in (compact(good), good[:64], good + b"\0", b"\0" + good, good * 2, b"\x1b"):
        other = dataclasses.replace(alices, signature=signature)
        refused(await world.login(other), LoginStatus.BAD_SIGNATURE, "65 bytes")
    empty = dataclasses.replace(alices, signature=b"")
    refused(await world.login(empty), LoginStatus.MALFORMED)


@pytest.mark.parametrize("r", [0, 1, ORDER - 1, ORDER, 2**256 - 1])
@pytest.mark.parametrize("s", [0, 1, ORDER // 2])
@pytest.mark.parametrize("v", [27, 28])
async def test_numbers_out_of_range(
    world: World, alices: StoredSession, r: int, s: int, v: int
) -> None:
    signature = r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes([v])
    other = dataclasses.replace(alices, signature=signature)
    refused(await world.login(other), LoginStatus.BAD_SIGNATURE)


@pytest.mark.parametrize("form", ["eip712", "eip4361"])
async def test_a_signature_of_the_other_form(world: World, form: Any) -> None:
    await world.grant(ALICE.address)
    other = {"eip712": "eip4361", "eip4361": "eip712"}[form]
    session = dataclasses.replace(world.session_of(ALICE, form=form), form=other)
    refused(await world.login(session), LoginStatus.BAD_SIGNATURE, "not by the account")


async def test_a_text_altered_in_any_line(world: World) -> None:
    """Of the EIP-4361 form, as it is sent: what the wallet did not show is not taken."""
    await world.grant(ALICE.address)
    await world.grant(ALICE.address, "editor")
    session = world.session_of(ALICE, form="eip4361")
    assert isinstance(await world.login(session), Accept)
    now, key = session.grant, Key.generate()
    others = dataclasses.replace(
        now,
        chain_id=1,
        contract=bytes(20),
        account=BOB.account,
        session_key=key.peer_id,
        cluster="d2" * 16,
        scope=bytes(32),
        roles=("editor",),
        epochs=(1, 1, 1),
        issued_at=now.issued_at - 60,
        expires_at=now.expires_at + 60,
        nonce=bytes(16),
    )
    lines, changes = now.text().split("\n"), others.text().split("\n")
    tried = 0
    for number, line in enumerate(lines):
        for new in (changes[number], line + " ", line.upper(), ""):
            if new == line:
                continue
            text = "\n".join([*lines[:number], new, *lines[number + 1 :]])
            challenge = world.challenge()
            digest = session.proof.digest
            for signs in (session.key, key):
                payload = cbor.encode(
                    {
                        "form": "eip4361",
                        "grant": text,
                        "signature": session.signature,
                        "answer": signs.sign(session_statement(challenge, digest)),
                    }
                )
                proof = Proof(SESSION_SCHEME, payload, challenge.signed_bytes())
                result = await world.backend.authenticate(challenge, proof)
                assert isinstance(result, Reject), (number, new)
                tried += 1
    assert tried > 60


async def test_one_changed_field_of_the_typed_data(world: World, alices: StoredSession) -> None:
    """Each is under the signature: none can be changed by who carries it."""
    grant = alices.grant
    for change in (
        {"nonce": bytes(16)},
        {"issued_at": grant.issued_at - 1},
        {"expires_at": grant.expires_at + 1},
        {"roles": ("member", "zebra")},
    ):
        result = await world.show(changed(alices, **change))
        refused(result, LoginStatus.BAD_SIGNATURE, "not by the account")


# --- epochs ---


async def test_a_session_of_before_revoke_all_stays_dead_after_a_new_grant(world: World) -> None:
    await world.grant(ALICE.address)
    before = world.session_of(ALICE)
    assert isinstance(await world.login(before), Accept)
    world.send("revokeAll", ALICE.address)
    await world.look()
    refused(await world.login(before), LoginStatus.NO_ROLE)
    await world.grant(ALICE.address)
    assert world.backend.roles(world.principal(ALICE)) == {"member"}
    refused(await world.login(before), LoginStatus.EXPIRED, "revokeAll", "ww auth evm login")
    # She has the role, and logs in anew.
    after = world.session_of(ALICE)
    assert isinstance(await world.login(after), Accept)
    # The old key with the new epochs is not what she signed.
    newer = changed(before, epochs=after.grant.epochs)
    refused(await world.show(newer), LoginStatus.BAD_SIGNATURE)


@pytest.mark.parametrize("scope", [word(SCOPE), ROOT])
async def test_a_session_of_before_reset_scope_stays_dead(world: World, scope: bytes) -> None:
    await world.grant(ALICE.address)
    before = world.session_of(ALICE)
    assert isinstance(await world.login(before), Accept)
    world.send("resetScope", scope)
    await world.grant(ALICE.address)
    refused(await world.login(before), LoginStatus.EXPIRED, "resetScope")
    assert isinstance(await world.login(world.session_of(ALICE)), Accept)


async def test_epochs_of_the_future(world: World, alices: StoredSession) -> None:
    """A session cannot be made to live again by a revokeAll to come."""
    scope, root, _ = alices.grant.epochs
    later = world.session_of(ALICE, epochs=(scope, root, world.backend.epoch + 1))
    refused(await world.login(later), LoginStatus.EXPIRED)
    world.send("revokeAll", ALICE.address)  # gets that very number
    await world.settle()
    refused(await world.login(later), LoginStatus.NO_ROLE)


# --- bytes ---


async def test_another_scheme_is_not_ours(world: World) -> None:
    challenge = world.challenge()
    proof = Proof("local-ed25519", b"", challenge.signed_bytes())
    assert isinstance(await world.backend.authenticate(challenge, proof), NotMine)


async def test_a_session_keys_answer_is_of_no_use_as_a_bound_keys(
    world: World, alices: StoredSession
) -> None:
    """And the other way round: each begins with the name of its scheme."""
    world.send(
        "bindKey", word(SCOPE), [word("member")], alices.key.public, world.chain.chain.time + DAY_S,
        sender=ALICE.address,
    )  # fmt: skip
    await world.settle()
    challenge = world.challenge()
    for statement in (
        session_statement(challenge, alices.proof.digest),
        challenge.signed_bytes(),
    ):
        proof = KeyProof(alices.key.public, alices.key.sign(statement))
        result = await world.backend.authenticate(
            challenge, Proof(KEY_SCHEME, proof.encode(), challenge.signed_bytes())
        )
        refused(result, LoginStatus.BAD_SIGNATURE)
    answer = alices.key.sign(challenge.signed_bytes())  # as auth_local's users answer
    payload = dataclasses.replace(alices.proof, answer=answer).encode()
    result = await world.backend.authenticate(
        challenge, Proof(SESSION_SCHEME, payload, challenge.signed_bytes())
    )
    refused(result, LoginStatus.BAD_SIGNATURE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
async def test_a_good_proof_with_any_byte_changed(
    world: World, alices: StoredSession, data: st.DataObject
) -> None:
    challenge = world.challenge()
    answer = alices.key.sign(session_statement(challenge, alices.proof.digest))
    good = dataclasses.replace(alices.proof, answer=answer).encode()
    at = data.draw(st.integers(0, len(good) - 1))
    cut = data.draw(st.integers(0, 3))
    new = data.draw(st.binary(max_size=4))
    payload = good[:at] + new + good[at + cut :]
    for scheme in (SESSION_SCHEME, KEY_SCHEME):
        proof = Proof(scheme, payload, challenge.signed_bytes())
        result = await world.backend.authenticate(challenge, proof)
        if isinstance(result, Accept):
            assert scheme == SESSION_SCHEME
            assert SessionProof.decode(payload) == SessionProof.decode(good)
        else:
            assert isinstance(result, Reject)


@pytest.mark.parametrize(
    "subject",
    [
        "", ":", "31337", "31337:", "31337:0x", "1:{a}", "031337:{a}", "31337:{lower}", "x:{a}",
        "31337:{a}/", "31337:{a}/nonsense", "31337:{a}00", "٣:{a}", "31337:{a} ",
    ],
)  # fmt: skip
async def test_a_principal_by_any_other_name_has_nothing(
    world: World, alices: StoredSession, subject: str
) -> None:
    """One account has one name: what is withdrawn from one name is withdrawn."""
    name = subject.format(a=ALICE.address, lower=ALICE.address.lower())
    assert world.backend.roles(Principal("evm", name)) == frozenset()
    assert world.backend.roles(Principal("local", f"31337:{ALICE.address}")) == frozenset()


def test_the_grant_is_checked_by_its_own_rules() -> None:
    assert SessionGrant.__dataclass_params__.frozen  # type: ignore[attr-defined]
