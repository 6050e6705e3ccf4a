"""What a wallet signs: the same as wallets make of it, and read back in no other form."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from hypothesis import given
from hypothesis import strategies as st
from plugins.auth_evm.tests.login.world import ALICE, CLUSTER

from wetware.base import cbor
from wetware.errors import InvalidArgument
from wetware.identity import Key
from wetware_auth_evm.login.proofs import KeyProof, SessionProof
from wetware_auth_evm.login.statements import SESSION_S_MAX, SessionGrant, recover

KEY = Key.from_seed(b"s" * 32)
GRANT = SessionGrant(
    chain_id=8453,
    contract=bytes(range(20)),
    account=ALICE.account,
    session_key=KEY.peer_id,
    cluster=CLUSTER,
    scope=b"team".ljust(32, b"\0"),
    roles=("editor", "member"),
    epochs=(3, 0, 17),
    issued_at=1_900_000_000,
    expires_at=1_900_003_600,
    nonce=bytes(range(16)),
)

grants = st.builds(
    SessionGrant,
    chain_id=st.integers(1, 2**53 - 1),
    contract=st.binary(min_size=20, max_size=20),
    account=st.binary(min_size=20, max_size=20),
    session_key=st.binary(min_size=32, max_size=32).map(lambda seed: Key.from_seed(seed).peer_id),
    cluster=st.text("0123456789abcdef", min_size=16, max_size=64),
    scope=st.binary(min_size=32, max_size=32),
    roles=st.sets(
        st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,31}", fullmatch=True), min_size=1, max_size=16
    ).map(lambda names: tuple(sorted(names))),
    epochs=st.tuples(*[st.integers(0, 2**48 - 1)] * 3),
    issued_at=st.integers(1, 4_000_000_000),
    expires_at=st.just(0),
    nonce=st.binary(min_size=16, max_size=16),
).flatmap(
    lambda grant: st.integers(1, SESSION_S_MAX).map(
        lambda seconds: dataclasses.replace(grant, expires_at=grant.issued_at + seconds)
    )
)


@given(grants)
def test_typed_data_has_the_digest_that_wallets_sign(grant: SessionGrant) -> None:
    grant.check()
    signable = encode_typed_data(full_message=grant.typed_data())
    signed = Account.sign_message(signable, ALICE.wallet.secret)
    assert bytes(signed.message_hash) == grant.digest()
    assert recover(grant.digest(), bytes(signed.signature)) == ALICE.account


@given(grants)
def test_the_text_has_the_digest_that_wallets_sign_and_is_read_back(grant: SessionGrant) -> None:
    signed = Account.sign_message(encode_defunct(text=grant.text()), ALICE.wallet.secret)
    assert bytes(signed.message_hash) == grant.text_digest()
    assert SessionGrant.parse_text(grant.text()) == grant


def test_the_text_is_what_a_person_reads() -> None:
    assert (
        GRANT.text()
        == f"""\
{CLUSTER}.wetware wants you to sign in with your Ethereum account:
{ALICE.address}

Let the session key {KEY.peer_id} act for this account in the cluster {CLUSTER}, with the roles \
editor, member.

URI: wetware:{KEY.peer_id}
Version: 1
Chain ID: 8453
Nonce: 000102030405060708090a0b0c0d0e0f
Issued At: 2030-03-17T17:46:40Z
Expiration Time: 2030-03-17T18:46:40Z
Resources:
- wetware:contract:0x000102030405060708090a0b0c0d0e0f10111213
- wetware:scope:0x7465616d00000000000000000000000000000000000000000000000000000000
- wetware:epochs:3.0.17
- wetware:role:editor
- wetware:role:member"""
    )


OTHER = dataclasses.replace(
    GRANT,
    chain_id=1,
    contract=bytes(20),
    account=bytes(20),
    session_key=Key.from_seed(b"t" * 32).peer_id,
    cluster="d2" * 16,
    scope=bytes(32),
    roles=("admin", "writer"),
    epochs=(0, 0, 0),
    issued_at=GRANT.issued_at + 60,
    expires_at=GRANT.expires_at + 60,
    nonce=bytes(16),
)
LINES = len(GRANT.text().split("\n"))


@pytest.mark.parametrize("number", range(LINES))
@pytest.mark.parametrize(
    "change", ["another's", "dropped", "doubled", "space", "case", "empty", "return"]
)
def test_a_text_altered_in_any_line_is_another_or_none(number: int, change: str) -> None:
    lines, others = GRANT.text().split("\n"), OTHER.text().split("\n")
    line = lines[number]
    new = {
        "another's": [others[number]],
        "dropped": [],
        "doubled": [line, line],
        "space": [line + " "],
        "case": [line.swapcase()],
        "empty": [""],
        "return": [line + "\r"],
    }[change]
    text = "\n".join([*lines[:number], *new, *lines[number + 1 :]])
    if text == GRANT.text():
        return  # the empty lines, emptied
    try:
        found = SessionGrant.parse_text(text)
    except InvalidArgument:
        return
    # A role fewer or another nonce is another session: its digest is not what was signed.
    assert found != GRANT
    assert found.text() == text
    assert found.text_digest() != GRANT.text_digest()


@pytest.mark.parametrize(
    "change",
    [
        {"chain_id": 0},
        {"chain_id": 2**53},
        {"contract": bytes(19)},
        {"account": bytes(21)},
        {"session_key": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"},
        {"cluster": "C1" * 16},
        {"cluster": "c1"},
        {"cluster": "c1" * 16 + "\n"},
        {"scope": bytes(31)},
        {"roles": ()},
        {"roles": ("b", "a")},
        {"roles": ("a", "a")},
        {"roles": ("a\n- wetware:role:admin",)},
        {"roles": ("a, admin",)},
        {"roles": tuple(f"r{n:02}" for n in range(17))},
        {"epochs": (0, 0, 2**48)},
        {"epochs": (0, 0, -1)},
        {"issued_at": 0},
        {"expires_at": GRANT.issued_at},
        {"expires_at": GRANT.issued_at + SESSION_S_MAX + 1},
        {"nonce": bytes(15)},
    ],
    ids=str,
)
def test_what_nobody_should_sign(change: dict[str, Any]) -> None:
    from wetware.identity import PeerId

    if "session_key" in change:
        change = {"session_key": PeerId.parse(change["session_key"])}
    with pytest.raises(InvalidArgument):
        dataclasses.replace(GRANT, **change).check()
    GRANT.check()


@given(st.text(max_size=600))
def test_no_text_is_taken_but_a_sessions(text: str) -> None:
    with pytest.raises(InvalidArgument):
        SessionGrant.parse_text(text)


@given(st.data())
def test_a_text_with_any_part_replaced_is_another_or_none(data: st.DataObject) -> None:
    text = GRANT.text()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    part = data.draw(st.text(max_size=40) | st.just(OTHER.text()[start:end]))
    changed = text[:start] + part + text[end:]
    try:
        found = SessionGrant.parse_text(changed)
    except InvalidArgument:
        return
    assert found.text() == changed
    assert (found == GRANT) == (changed == text)


# --- proofs ---


def test_proofs_are_read_back() -> None:
    for form in ("eip712", "eip4361", "erc1271"):
        proof = SessionProof(GRANT, form, b"s" * 65, b"a" * 64)  # type: ignore[arg-type]
        assert SessionProof.decode(proof.encode()) == proof
    key = KeyProof(b"k" * 32, b"a" * 64, b"c" * 20)
    assert KeyProof.decode(key.encode()) == key


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=50)
    | st.binary(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=8,
)  # fmt: skip


@given(
    st.binary(max_size=400)
    | plain.map(cbor.encode)
    | st.fixed_dictionaries(
        {
            "form": st.sampled_from(["eip712", "eip4361", "erc1271"]) | plain,
            "grant": st.just(GRANT.plain()) | st.just(GRANT.text()) | plain,
            "signature": st.binary(max_size=70) | plain,
            "answer": st.binary(min_size=64, max_size=64) | plain,
        }
    ).map(cbor.encode)
)
def test_no_bytes_do_anything_but_decode_or_be_refused(payload: bytes) -> None:
    for kind in (SessionProof, KeyProof):
        try:
            found = kind.decode(payload)
        except InvalidArgument:
            continue
        assert kind.decode(found.encode()) == found


@given(st.sampled_from(sorted(GRANT.plain())), plain)
def test_a_session_with_any_field_replaced_is_another_or_none(name: str, value: Any) -> None:
    changed = {**GRANT.plain(), name: value}
    try:
        found = SessionGrant.from_plain(changed)
    except InvalidArgument:
        return
    assert found.plain() == changed
    assert (found.digest() == GRANT.digest()) == (changed == GRANT.plain())


def test_a_proof_is_bounded() -> None:
    huge = SessionProof(GRANT, "erc1271", b"s" * ((16 << 10) + 1), b"a" * 64)
    with pytest.raises(InvalidArgument, match="1 to 16384 bytes"):
        SessionProof.decode(huge.encode())
    with pytest.raises(InvalidArgument, match="at most 32768"):
        SessionProof.decode(cbor.encode({"form": "x" * 40_000}))
