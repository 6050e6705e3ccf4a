"""`ww policy status`, `show` and `resolve`, as an operator types them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from wetware.errors import Unsupported
from wetware.identity import Key
from wetware_auth_local import cli
from wetware_auth_local.client import PolicyClient, SeenPolicies
from wetware_auth_local.policy import Policy, User

OPERATOR = Key.from_seed(b"o" * 32)
ADA = Key.from_seed(b"a" * 32)
FIRST = Policy.first(OPERATOR.peer_id)


class Store:
    """A PolicyStore that has one document, and knows of others."""

    def __init__(self, policy: Policy, *others: Policy, kind: str = "fork") -> None:
        self.policy, self.others, self.kind = policy, others, kind
        self.proposal: dict[str, frozenset[str]] = {}
        self.how = ""

    async def call(self, method: str, **args: Any) -> dict[str, Any]:
        if method == "get":
            return {"document": self.policy.sign(OPERATOR)}
        if method == "put":
            self.policy = Policy.open(args["document"])
            return {"version": self.policy.version, "withdrawn": 1}
        if method == "divergent":
            (found,) = (other for other in self.others if other.digest == args["digest"])
            return {"document": found.sign(OPERATOR)}
        return {
            "status": {
                "version": self.policy.version,
                "digest": self.policy.digest,
                "saved": True,
                "alone": not self.others,
                "age_s": 3.2 if self.others else 0.0,
                "members": len(self.others),
                "refused": 0,
                "divergences": [
                    {
                        "kind": self.kind,
                        "version": other.version,
                        "digest": other.digest,
                        "peer": str(ADA.peer_id),
                    }
                    for other in self.others
                ],
            }
        }


@pytest.fixture
def operate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `ww ARGS` as the operator against a Store."""
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    keys = tmp_path / "home" / "keys"
    keys.mkdir(parents=True)
    OPERATOR.save(keys / "default")

    def run(store: Store, *args: str) -> Any:
        import asyncio

        async def services() -> list[SimpleNamespace]:
            return [SimpleNamespace(name=name) for name in ("pubsub", "sync")]

        async def status() -> dict[str, Any]:
            return {"auth": "acme", "auth_also": ["ldap"], "users": "acme invites them"}

        async def proposal(service: str) -> tuple[Any, str]:
            return store.proposal, store.how

        session = SimpleNamespace(
            auth_local=PolicyClient(store), services=services, status=status, proposal=proposal
        )
        monkeypatch.setattr(cli, "run_client", lambda work: asyncio.run(work(session)))
        app = typer.Typer()
        cli.mount(app)
        return CliRunner().invoke(app, list(args))

    return run


def with_ada(policy: Policy, *roles: str) -> Policy:
    return policy.next(users={**policy.users, "ada": User(ADA.peer_id, frozenset(roles))})


def test_resolve_says_what_is_no_longer_granted(operate: Any) -> None:
    one, two = with_ada(FIRST, "member"), with_ada(FIRST, "member", "admin")
    store = Store(one, two)
    done = operate(store, "policy", "show")
    assert "ww policy resolve" in done.output
    done = operate(store, "policy", "resolve")
    assert done.exit_code == 0, done.output
    assert store.policy.roles_of(ADA.peer_id) == {"member"}
    assert store.policy.descends_from(one)
    assert store.policy.descends_from(two)
    assert "was by the other branch: user ada: role admin" in done.output
    assert "by this node" not in done.output
    again = operate(store, "policy", "resolve")
    assert again.exit_code != 0
    assert "no fork" in str(again.exception)


def test_resolve_with_a_file_and_a_choice(operate: Any, tmp_path: Path) -> None:
    one, two = with_ada(FIRST), with_ada(FIRST, "admin").next()
    file = tmp_path / "other.json"
    file.write_bytes(two.sign(OPERATOR))
    store = Store(one)
    assert "choose common" in str(operate(store, "policy", "resolve", "--keep", "x").exception)
    done = operate(store, "policy", "resolve", str(file), "--keep", "other")
    assert done.exit_code == 0, done.output
    assert store.policy.roles_of(ADA.peer_id) == {"admin"}
    assert store.policy.version == two.version + 1
    missing = operate(store, "policy", "resolve", str(tmp_path / "none"))
    assert "cannot read" in str(missing.exception)


def test_several_branches_become_one(operate: Any) -> None:
    branches = [with_ada(FIRST), with_ada(FIRST, "member"), with_ada(FIRST, "admin").next().next()]
    store = Store(*branches)
    unclear = operate(store, "policy", "resolve", "--keep", "other")
    assert "there are 2 other branches" in str(unclear.exception)
    assert operate(store, "policy", "resolve").exit_code == 0
    assert all(store.policy.descends_from(branch) for branch in branches)
    assert store.policy.roles_of(ADA.peer_id) == frozenset()


def test_an_operator_does_not_resolve_without_the_branch_that_they_have_seen(
    operate: Any, tmp_path: Path
) -> None:
    seen = SeenPolicies(tmp_path / "home" / "policies.json")
    seen.remember(with_ada(FIRST, "admin", "member"))
    store = Store(with_ada(FIRST), with_ada(FIRST, "member"))
    done = operate(store, "policy", "resolve")
    assert "does not descend from version 2 that you have seen" in str(done.exception)
    assert store.policy.version == 2


def test_a_service_that_nobody_knows_is_told(operate: Any) -> None:
    done = operate(Store(FIRST), "role", "set", "chatter", "pubsb", "sync")
    assert done.exit_code == 0, done.output
    assert "no service 'pubsb', which the role names; did you mean pubsub?" in done.output
    assert "'sync'" not in done.output


class Elsewhere(Store):
    """A node whose users are kept by another backend."""

    async def call(self, method: str, **args: Any) -> dict[str, Any]:
        raise Unsupported("this node has no service 'auth_local'", code="unsupported.service")


@pytest.mark.parametrize("command", ["user list", "role list", "user remove ada", "policy status"])
def test_where_the_users_are_under_another_backend(operate: Any, command: str) -> None:
    done = operate(Elsewhere(FIRST), *command.split())
    assert isinstance(done.exception, Unsupported)
    assert "auth backend is 'acme'" in done.exception.message
    assert done.exception.hint == "acme invites them"


def test_status(operate: Any) -> None:
    alone = operate(Store(FIRST), "policy", "status")
    assert "alone in the cluster" in alone.output
    with_others = operate(Store(FIRST.next(), with_ada(FIRST)), "policy", "status")
    assert "3 s ago" in with_others.output
    assert "changed in two places" in with_others.output
    behind = operate(Store(FIRST, with_ada(FIRST), kind="out_of_reach"), "policy", "status")
    assert "started afresh" in behind.output
    data = json.loads(operate(Store(FIRST), "policy", "status", "--json").output)
    assert (data["version"], data["digest"]) == (1, FIRST.digest)


def test_a_role_gets_constraints_and_keeps_them(operate: Any) -> None:
    store = Store(FIRST)
    set_ = operate(store, "role", "set", "chatter", "pubsub", "--where", "topic=glob:chat/*")
    assert set_.exit_code == 0, set_.output
    assert store.policy.where == {"chatter": {"pubsub": ("topic=glob:chat/*",)}}

    again = operate(store, "role", "set", "chatter", "pubsub=PubSub.join", "sync")
    assert again.exit_code == 0, again.output
    assert "keeps its constraints of pubsub: topic=glob:chat/*" in again.output
    assert store.policy.where == {"chatter": {"pubsub": ("topic=glob:chat/*",)}}
    listed = operate(store, "role", "list")
    (row,) = (line for line in listed.output.splitlines() if "glob" in line)
    assert row.split() == ["chatter", "pubsub", "PubSub.join", "topic=glob:chat/*"]

    assert operate(store, "role", "set", "chatter", "pubsub", "--no-where").exit_code == 0
    assert store.policy.where == {}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("pubsub", "--where", "topik=a"), "PubSub.join:topic"),
        (("pubsub", "--where", "topic=max:a"), "max"),
        (("pubsub", "--where", "topic=chat/*"), "glob:"),
        (("pubsub", "--where", "blob/size=max:1"), "blob"),
        (("pubsub", "sync", "--methods", "*"), "--methods is for a single SERVICE"),
        (("pubsub", "--where", "topic=a", "--no-where"), "--no-where"),
    ],
)
def test_constraints_that_bind_nothing_are_refused(
    operate: Any, args: tuple[str, ...], says: str
) -> None:
    store = Store(FIRST)
    refused = operate(store, "role", "set", "chatter", *args)
    assert refused.exit_code != 0
    error = refused.exception
    assert says in f"{error} {getattr(error, 'hint', '')}"
    assert store.policy == FIRST


def test_constraints_of_a_service_that_this_machine_lacks_are_said_to_be_unchecked(
    operate: Any,
) -> None:
    store = Store(FIRST)
    done = operate(store, "role", "set", "r", "ledger", "--where", "book=a")
    assert done.exit_code == 0, done.output
    assert "constraints of ledger were not checked" in done.output


PROPOSAL = {"reader": frozenset({"Blob.get"}), "member": frozenset({"*"})}


def test_a_proposal_is_shown_asked_about_and_signed_once(operate: Any) -> None:
    store = Store(FIRST)
    store.proposal = PROPOSAL
    asked = operate(store, "role", "accept", "blob")
    assert "reader gets Blob.get of blob" in asked.output
    assert "member gets * (every method) of blob" in asked.output
    assert asked.exception.code == "invalid.unconfirmed"
    assert store.policy is FIRST

    done = operate(store, "role", "accept", "blob", "--yes")
    assert done.exit_code == 0, done.output
    assert store.policy.version == 2
    assert store.policy.roles["member"] == {"blob": {"*"}}
    assert store.policy.roles["reader"] == {"blob": {"Blob.get"}}
    assert "version 2 is in force" in done.output

    again = operate(store, "role", "accept", "blob")
    assert again.exit_code == 0, again.output
    assert "the roles have all that blob proposes" in again.output
    assert store.policy.version == 2
    added = json.loads(operate(store, "role", "accept", "blob", "--json").output)
    assert added == {
        "service": "blob",
        "proposed": {"reader": ["Blob.get"], "member": ["*"]},
        "added": {},
        "version": 2,
    }


def test_what_is_signed_is_what_was_shown(operate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy may change while the operator reads: what they saw is added to that one."""
    store = Store(FIRST)
    store.proposal = PROPOSAL

    def confirm(question: str, *, yes: bool) -> None:
        assert question == "Sign that into the policy, as version 2?"
        store.policy = FIRST.next(roles={**FIRST.roles, "own": {"sync": frozenset({"*"})}})
        store.proposal = {"admin": frozenset({"*"}), "member": frozenset({"Blob.destroy"})}

    monkeypatch.setattr(cli, "confirm", confirm)
    assert operate(store, "role", "accept", "blob").exit_code == 0
    assert store.policy.version == 3
    assert store.policy.roles["own"] == {"sync": {"*"}}
    assert store.policy.roles["member"] == {"blob": {"*"}}


def test_another_nodes_proposal_is_not_signed_unread(
    operate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry node that lies would write the cluster's roles."""
    store = Store(FIRST)
    store.proposal = PROPOSAL
    monkeypatch.setitem(cli.options.given, "node", "hub")
    refused = operate(store, "role", "accept", "blob", "--yes")
    assert "member gets * (every method) of blob" in refused.output
    assert refused.exception.code == "invalid.unconfirmed"
    assert "not this machine's" in str(refused.exception)
    assert store.policy is FIRST
    monkeypatch.setattr(cli, "confirm", lambda question, *, yes: None)  # somebody has read it
    assert operate(store, "role", "accept", "blob").exit_code == 0
    assert store.policy.roles["member"] == {"blob": {"*"}}


def test_a_service_that_proposes_nothing(operate: Any) -> None:
    done = operate(Store(FIRST), "role", "accept", "blob")
    assert done.exit_code == 0, done.output
    assert "ww role set ROLE blob" in done.output


@pytest.mark.parametrize(
    ("service", "proposal", "says"),
    [
        ("blob", {"operator": frozenset({"*"})}, "proposes something for operator"),
        ("*", PROPOSAL, "do not trust this node"),
        ("blob", {"member": frozenset({"\x1b[2J"})}, "is not a method pattern"),
    ],
)
def test_a_node_that_lies_about_a_proposal(
    operate: Any, service: str, proposal: dict[str, frozenset[str]], says: str
) -> None:
    store = Store(FIRST)
    store.proposal = proposal
    done = operate(store, "role", "accept", service, "--yes")
    assert says in f"{done.exception} {getattr(done.exception, 'hint', '')}"
    assert "\x1b" not in done.output
    assert store.policy is FIRST


def test_where_roles_are_in_the_nodes_configuration(operate: Any) -> None:
    """What to write is printed, and no policy is asked for."""
    store = Elsewhere(FIRST)
    store.proposal, store.how = PROPOSAL, "[roles.member]\nblob = 1\n"
    done = operate(store, "role", "accept", "blob")
    assert (done.exit_code, done.output) == (0, store.how)
    printed = json.loads(operate(store, "role", "accept", "blob", "--json").output)
    assert printed["write"] == store.how
    store.how = ""
    unknown = operate(store, "role", "accept", "blob")
    assert unknown.exception.hint == "acme invites them"
