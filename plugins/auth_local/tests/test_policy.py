"""The policy document: signed, versioned, and refused wherever it is not right."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wetware.errors import InvalidArgument, WetwareError
from wetware.identity import Key
from wetware_auth_local.policy import (
    HISTORY_MAX,
    SUPERSEDED_MAX,
    Policy,
    PolicySignature,
    Relation,
    Signed,
    User,
    from_toml,
    lost_grants,
    narrowed_roles,
    resolution,
)

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


PROPOSALS = {
    "box": {"reader": frozenset({"Box.get"}), "member": frozenset({"Box.*", "Box.Item.read"})},
    "log": {"admin": frozenset({"*"})},
}


def test_the_first_document_has_what_the_services_propose() -> None:
    assert Policy.first(OPERATOR.peer_id).roles == {
        "admin": {"*": {"*"}},
        "member": {},
        "reader": {},
    }
    first = Policy.first(OPERATOR.peer_id, PROPOSALS)
    assert first.roles == {
        "admin": {"*": {"*"}},  # which has all of it already
        "member": {"box": {"Box.*", "Box.Item.read"}},
        "reader": {"box": {"Box.get"}},
    }
    assert Policy.open(first.sign(OPERATOR)) == first


def test_a_proposal_is_added_to_what_the_roles_have() -> None:
    before = Policy.first(OPERATOR.peer_id).next(
        roles={
            "admin": {"*": frozenset({"*"})},
            "member": {"box": frozenset({"Box.get"}), "pubsub": frozenset({"*"})},
            "own": {"box": frozenset({"Box.get"})},
        },
        where={"member": {"box": ("key=a",)}},
    )
    after = before.accept("box", PROPOSALS["box"])
    assert after.roles == {
        "admin": {"*": {"*"}},
        "member": {"box": {"Box.get", "Box.*", "Box.Item.read"}, "pubsub": {"*"}},
        "own": {"box": {"Box.get"}},
        "reader": {"box": {"Box.get"}},  # made anew
    }
    assert after.where == before.where
    assert (after.version, after.descends_from(before)) == (before.version + 1, True)
    assert narrowed_roles(before, after) == frozenset(), "nobody's session ends with it"
    assert after.accept("box", PROPOSALS["box"]) is after
    assert after.accept("log", PROPOSALS["log"]) is after
    with pytest.raises(InvalidArgument, match="is not a method pattern"):
        before.accept("box", {"member": frozenset({"Box.get\x1b"})})


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
    users, roles, where = from_toml(policy().to_toml())
    assert users == policy().users
    assert roles == policy().roles
    assert where == {}


def chatter(*constraints: str, **more: tuple[str, ...]) -> Policy:
    """A policy with a role `chatter`, with constraints of pubsub and of `more`."""
    before = policy()
    roles = {**before.roles, "chatter": {"pubsub": frozenset({"*"}), "store": frozenset({"*"})}}
    return before.next(roles=roles, where={"chatter": {"pubsub": constraints, **more}})


def test_constraints_of_a_role_round_trip() -> None:
    before = chatter("topic=prefix:b/", "topic=glob:chät/*", "topic=prefix:b/")
    assert Policy.open(before.sign(OPERATOR)) == before
    users, roles, where = from_toml(before.to_toml())
    assert (users, roles) == (before.users, before.roles)
    assert (
        where == before.where == {"chatter": {"pubsub": ("topic=glob:chät/*", "topic=prefix:b/")}}
    )
    assert [(w.service, w.text) for w in before.profile("chatter").where] == [
        ("pubsub", "topic=glob:chät/*"),
        ("pubsub", "topic=prefix:b/"),
    ]
    assert before.profile("member").where == ()


def test_a_policy_without_constraints_is_the_document_that_it_always_was() -> None:
    assert all(
        isinstance(patterns, list)
        for services in policy().as_dict()["roles"].values()
        for patterns in services.values()
    )
    assert chatter().as_dict()["roles"]["chatter"] == {"pubsub": ["*"], "store": ["*"]}


def test_a_service_may_be_called_where_in_a_role_without_constraints() -> None:
    before = policy()
    after = before.next(roles={**before.roles, "r": {"where": frozenset({"A.b"})}})
    assert Policy.open(after.sign(OPERATOR)) == after
    with pytest.raises(InvalidArgument, match="a service 'where' and has constraints"):
        after.next(where={"r": {"where": ("topic=chat",)}})


def test_toml_is_written_by_people() -> None:
    _, _, where = from_toml(
        '[roles.r]\npubsub = ["*"]\n[roles.r.where]\npubsub = ["topic=equals:chat"]\n'
    )
    assert where == {"r": {"pubsub": ("topic=chat",)}}


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({"nobody": {"pubsub": ("topic=a",)}}, "role 'nobody', which does not exist"),
        ({"chatter": {"*": ("topic=a",)}}, "constraints of every service"),
        ({"chatter": {"blob": ("size=max:1",)}}, "'blob', which it does not cover"),
        ({"chatter": {"pubsub": ("topic=glob:[",)}}, "chatter"),
        ({"chatter": {"pubsub": ("topic",)}}, "chatter"),
        ({"chatter": {"pubsub": tuple(f"topic=t{n}" for n in range(99))}}, "99 constraints"),
    ],
)
def test_constraints_that_contradict_are_refused(
    where: dict[str, dict[str, tuple[str, ...]]], why: str
) -> None:
    with pytest.raises(InvalidArgument, match=why):
        chatter().next(where=where)


@pytest.mark.parametrize(
    "role",
    [
        {"pubsub": ["*"], "where": {"pubsub": "topic=a"}},
        {"pubsub": ["*"], "where": {"pubsub": [7]}},
        {"pubsub": ["*"], "where": {"pubsub": {"topic": "a"}}},
        {"pubsub": ["*"], "where": {"pubsub": ["topic=regex:a"]}},
        {"pubsub": ["*"], "where": 7},
    ],
)
def test_malformed_constraints_are_not_left_out(role: dict[str, object]) -> None:
    data = policy().as_dict()
    data["roles"]["r"] = role
    with pytest.raises(InvalidArgument):
        Policy.from_dict(data).check()


def test_constraints_go_with_what_they_are_on() -> None:
    before = chatter("topic=a", store=("key=b",))
    kept = before.next(roles={**before.roles, "chatter": {"store": frozenset({"*"})}})
    assert kept.where == {"chatter": {"store": ("key=b",)}}
    gone = {name: services for name, services in before.roles.items() if name != "chatter"}
    assert before.next(roles=gone).where == {}


def test_a_new_constraint_narrows_and_a_dropped_one_does_not() -> None:
    wide, narrow = chatter(), chatter("topic=a")
    narrower = chatter("topic=a", "topic=prefix:a")
    assert narrowed_roles(wide, narrow) == narrowed_roles(narrow, narrower) == {"chatter"}
    assert narrowed_roles(narrow, wide) == narrowed_roles(narrow, narrow) == frozenset()
    assert narrowed_roles(narrow, chatter("topic=b")) == {"chatter"}
    assert lost_grants(wide, narrow) == ["role chatter: pubsub beyond topic=a"]
    assert lost_grants(narrow, wide) == []


def test_after_a_fork_the_constraints_of_both_sides_apply() -> None:
    one, other = chatter("topic=a"), chatter("topic=b", store=("key=c",))
    assert resolution(one, other, "common").where == {
        "chatter": {"pubsub": ("topic=a", "topic=b"), "store": ("key=c",)}
    }
    assert resolution(one, other, "this").where == one.where
    assert resolution(one, other, "other").where == other.where


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


# --- forks ----------------------------------------------------------------------------------------

USERS = [Key.from_seed(bytes([n]) * 32).peer_id for n in range(1, 4)]
PATTERNS = ["*", "A.*", "B.*", "A.x", "A.y", "B.x"]


def signed(policy: Policy) -> Signed:
    return Signed.open(policy.sign(OPERATOR))


def changed(policy: Policy, data: st.DataObject) -> Policy:
    """The next version, with anything at all about three users and two roles."""
    roles = {
        name: data.draw(
            st.dictionaries(
                st.sampled_from(["*", "one", "two"]),
                st.frozensets(st.sampled_from(PATTERNS), min_size=1),
            )
        )
        for name in data.draw(st.sets(st.sampled_from(["r", "s"])))
    }
    users = {
        name: User(key, data.draw(st.frozensets(st.sampled_from([*roles, "admin"]))))
        for name, key in zip("abc", data.draw(st.permutations(USERS)), strict=True)
        if data.draw(st.booleans())
    }
    first = Policy.first(OPERATOR.peer_id)
    return policy.next(
        users={**first.users, **users}, roles={**roles, "admin": first.roles["admin"]}
    )


def grants(policy: Policy) -> set[tuple[str, str, str]]:
    """(key, service, method) for every method that a pattern here can name."""
    found = set()
    for user in policy.users.values():
        for role in user.roles:
            for service, patterns in policy.roles[role].items():
                for name in ["one", "two", "three"] if service == "*" else [service]:
                    for method in ["A.x", "A.y", "A.z", "B.x", "B.z", "C.z"]:
                        if patterns & {"*", f"{method[0]}.*", method}:
                            found.add((str(user.key), name, method))
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_both_branches_grant_is_all_that_comes_of_them(data: st.DataObject) -> None:
    root = changed(Policy.first(OPERATOR.peer_id), data)
    one, two = changed(root, data), changed(root, data)
    if one.digest == two.digest:
        return
    common = resolution(one, two, "common")
    assert grants(common) <= grants(one) & grants(two)
    assert grants(resolution(one, two, "this")) == grants(one)
    assert grants(resolution(one, two, "other")) == grants(two)
    assert not lost_grants(common, one)
    assert not lost_grants(common, two)


class Simulated:
    """A node that accepts by `judge` alone, as the backend does."""

    def __init__(self, document: Signed) -> None:
        self.has = document
        self.versions = [document.version]

    def offer(self, document: Signed) -> None:
        if self.has.judge(document) is Relation.NEWER:
            self.has = document
            self.versions.append(document.version)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_forks_converge_once_resolved_and_versions_never_go_back(data: st.DataObject) -> None:
    first = signed(Policy.first(OPERATOR.peer_id))
    nodes = [Simulated(first) for _ in range(4)]
    index = st.integers(0, len(nodes) - 1)
    for _ in range(data.draw(st.integers(1, 12))):
        one, two = nodes[data.draw(index)], nodes[data.draw(index)]
        match data.draw(st.sampled_from(["change", "gossip", "gossip", "resolve"])):
            case "change":
                one.offer(signed(changed(one.has.policy, data)))
            case "gossip":
                before = one.has
                one.offer(two.has)
                if before.judge(two.has) is Relation.FORK:
                    assert one.has is before
                    assert two.has.judge(before) is Relation.FORK, "one sees it, the other does not"
            case "resolve" if one.has.judge(two.has) is Relation.FORK:
                keep = data.draw(st.sampled_from(["common", "this", "other"]))
                new = signed(resolution(one.has.policy, two.has.policy, keep))
                for branch in (one, two):
                    assert branch.has.judge(new) is Relation.NEWER
                one.offer(new)
    # The operator resolves what is left, and everybody meets everybody.
    last = nodes[0].has
    for node in nodes[1:]:
        if not last.policy.descends_from(node.has.policy) and last.digest != node.has.digest:
            if node.has.policy.descends_from(last.policy):
                last = node.has
            else:
                last = signed(resolution(last.policy, node.has.policy, "common"))
    for node in nodes:
        node.offer(last)
        assert node.has.digest == last.digest
        assert node.versions == sorted(set(node.versions)), "a version went back"


def test_a_resolution_is_followed_by_every_node_on_the_branch_that_was_given_up() -> None:
    root = policy()
    lost = [root.next(users=Policy.first(OPERATOR.peer_id).users)]
    kept = root.next(roles={**root.roles, "more": {}})
    for _ in range(5):
        lost.append(lost[-1].next())
    for one, two in ((kept, lost[-1]), (lost[-1], kept)):
        new = resolution(one, two, "this")
        later = new.next().next()
        assert new.version == lost[-1].version + 1
        for had in (root, kept, *lost):
            assert signed(had).judge(signed(new)) is Relation.NEWER
            assert signed(had).judge(signed(later)) is Relation.NEWER, "after further changes"
            assert signed(new).judge(signed(had)) is Relation.OLDER


def test_what_is_superseded_is_bounded_signed_and_optional() -> None:
    assert "supersedes" not in policy().as_dict()
    one, two = policy().next(), policy().next(roles={**policy().roles, "x": {}})
    both = resolution(one, two, "this")
    assert both.supersedes == (two.digest,)
    assert Policy.open(both.sign(OPERATOR)) == both
    envelope = json.loads(both.sign(OPERATOR))
    del envelope["policy"]["supersedes"]
    with pytest.raises(PolicySignature):
        Policy.open(json.dumps(envelope).encode())
    many = tuple(f"{n:064x}" for n in range(SUPERSEDED_MAX + 1))
    with pytest.raises(InvalidArgument, match="supersedes"):
        both.next(supersedes=many)
    with pytest.raises(InvalidArgument, match="made from"):
        both.next(supersedes=(both.digest,))
    here, there = policy(), policy().next(roles={**policy().roles, "x": {}})
    for _ in range(HISTORY_MAX):
        here, there = here.next(), there.next()
    assert len(resolution(here, there, "this").supersedes) == HISTORY_MAX + 1


def test_claims_are_judged_without_the_document() -> None:
    first = Policy.first(OPERATOR.peer_id)
    second, other = first.next(), first.next(roles={**first.roles, "x": {}})
    mine = signed(second)
    assert mine.judge_claim(2, second.digest) is Relation.SAME
    assert mine.judge_claim(1, first.digest) is Relation.OLDER
    assert mine.judge_claim(1, "0" * 64) is None, "a fork, or a lie"
    assert mine.judge_claim(2, other.digest) is None
    assert mine.judge_claim(3, "0" * 64) is None
    for version, digest in ((1, second.digest), (3, second.digest), (2, first.digest)):
        with pytest.raises(InvalidArgument):
            mine.judge_claim(version, digest)


@given(st.binary(max_size=64) | _JSON.map(lambda v: json.dumps(v).encode()))
def test_no_signed_junk_escapes_the_error_tree(canonical: bytes) -> None:
    from wetware_auth_local.policy import DOMAIN

    with pytest.raises(WetwareError):
        Signed.unpack(canonical, OPERATOR.sign(DOMAIN + canonical), OPERATOR.peer_id)


def test_unpacking_takes_the_canonical_form_only() -> None:
    from wetware_auth_local.policy import DOMAIN

    document = signed(policy())
    assert Signed.unpack(document.canonical, document.signature, OPERATOR.peer_id).document() == (
        document.document()
    )
    spaced = json.dumps(policy().as_dict(), indent=1).encode()
    with pytest.raises(InvalidArgument, match="canonical"):
        Signed.unpack(spaced, OPERATOR.sign(DOMAIN + spaced), OPERATOR.peer_id)
