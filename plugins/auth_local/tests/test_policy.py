"""The policy document: signed, versioned, and refused wherever it is not right."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.errors import InvalidArgument, WetwareError
from wetware.identity import Key
from wetware_auth_local.policy import Policy, PolicySignature, User, from_toml

OPERATOR = Key.from_seed(bytes(32))
ADA = Key.from_seed(b"a" * 32)


def policy() -> Policy:
    first = Policy.first(OPERATOR.peer_id)
    return first.next(users={**first.users, "ada": User(ADA.peer_id, frozenset({"member"}))})


def test_signed_document_round_trip() -> None:
    assert Policy.open(policy().sign(OPERATOR)) == policy()


def test_first_document_is_the_same_on_every_node() -> None:
    one, two = Policy.first(OPERATOR.peer_id), Policy.first(OPERATOR.peer_id)
    assert one.digest == two.digest


def test_only_the_operator_signs() -> None:
    with pytest.raises(PolicySignature, match="only the operator"):
        policy().sign(ADA)


@pytest.mark.parametrize("field", ["version", "operator", "history", "users", "roles"])
def test_every_field_is_signed(field: str) -> None:
    envelope = json.loads(policy().sign(OPERATOR))
    changed = {
        "version": 7,
        "operator": str(ADA.peer_id),
        "history": ["0" * 64],
        "users": {"operator": {"key": str(OPERATOR.peer_id), "roles": ["admin", "member"]}},
        "roles": {"admin": {"*": ["*"]}, "member": {"*": ["*"]}},
    }[field]
    envelope["policy"][field] = changed
    with pytest.raises((PolicySignature, InvalidArgument)):
        Policy.open(json.dumps(envelope).encode())


def test_toml_round_trip() -> None:
    users, roles = from_toml(policy().to_toml())
    assert users == policy().users
    assert roles == policy().roles


@pytest.mark.parametrize(
    ("toml", "why"),
    [
        ("[", "not TOML"),
        ("nonsense = 1", "unknown field 'nonsense'"),
        ('[users."ada"]\nroles = []', "key of user 'ada' is missing"),
        ('[users."ada"]\nkey = "x"', "bad peer ID"),
        ('users = "x"', "users is not a table"),
        ("[roles.r]\npubsub = 3", "not a list of strings"),
    ],
)
def test_bad_toml_names_the_place(toml: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        from_toml(toml)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"users": {}}, "operator would lose"),
        ({"users": {"Bad Name": User(OPERATOR.peer_id, frozenset({"admin"}))}}, "user's name"),
        ({"users": {"o": User(OPERATOR.peer_id, frozenset({"nope"}))}}, "does not exist"),
        ({"roles": {"admin": {"pubsub": frozenset({"*"})}, "member": {}}}, "operator would lose"),
        ({"roles": {"admin": {"*": frozenset({"x y"})}}}, "not a method pattern"),
        ({"roles": {"admin": {"Bad": frozenset({"*"})}}}, "not a service's name"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        Policy.first(OPERATOR.peer_id).next(**change)  # type: ignore[arg-type]


def test_two_users_cannot_share_a_key() -> None:
    first = Policy.first(OPERATOR.peer_id)
    with pytest.raises(InvalidArgument, match="same key"):
        first.next(users={**first.users, "twin": User(OPERATOR.peer_id)})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(st.binary(max_size=64) | _JSON.map(lambda v: json.dumps(v).encode()))
def test_no_document_escapes_the_error_tree(document: bytes) -> None:
    with pytest.raises(WetwareError):
        Policy.open(document)


@given(st.fixed_dictionaries({}, optional={"policy": _JSON, "signature": _JSON}))
def test_no_envelope_escapes_the_error_tree(envelope: dict[str, object]) -> None:
    with pytest.raises(WetwareError):
        Policy.open(json.dumps(envelope).encode())
