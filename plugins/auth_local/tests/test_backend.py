"""The backend keeps the policy: nothing goes back, and a change once begun is carried out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from wetware import identity
from wetware.base.log import get_logger
from wetware.base.threads import Threads
from wetware.errors import ConfigError, InvalidArgument, KeyFileError
from wetware.hookspecs import Accept, NotMine, Reject, Withdrawn
from wetware.identity import Challenge, Channel, Key, Principal
from wetware.testing import FakeOverlay
from wetware_auth_local.backend import LocalBackend
from wetware_auth_local.client import SeenPolicies
from wetware_auth_local.config import AuthLocalConfig
from wetware_auth_local.policy import (
    HISTORY_MAX,
    ForkedPolicy,
    Policy,
    PolicyNotSaved,
    PolicyOutOfReach,
    Signed,
    StalePolicy,
    User,
    WrongCluster,
    resolution,
)
from wetware_auth_local.signer import Ed25519Signer

pytestmark = pytest.mark.anyio
ADA = Key.from_seed(b"a" * 32)
ADA_PRINCIPAL = Principal("local", ADA.peer_id)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WW_KEY", raising=False)
    monkeypatch.delenv("WW_PASSPHRASE", raising=False)


def make(
    tmp_path: Path,
    policy: Path | None = None,
    join_document: bytes | None = None,
    proposals: Mapping[str, Any] | None = None,
    *,
    authority: bool = True,
) -> LocalBackend:
    data_dir = tmp_path / "data"
    data_dir.mkdir(exist_ok=True)
    ctx: Any = SimpleNamespace(
        config=AuthLocalConfig(policy, catch_up_s=0),
        data_dir=data_dir,
        log=get_logger("test"),
        run_sync=Threads().run,
        clock=time,
        overlay=FakeOverlay(),
        join_document=join_document,
        joined=join_document is not None,
        authority=authority,
        proposals={} if proposals is None else proposals,
    )
    return LocalBackend(ctx)


async def founded(tmp_path: Path, **given: Any) -> LocalBackend:
    """A backend that has run: the first policy is on disk."""
    backend = make(tmp_path, **given)
    async with anyio.create_task_group() as tasks:
        await tasks.start(backend.run)
        tasks.cancel_scope.cancel()
    return backend


def operator(tmp_path: Path) -> Key:
    return Key.load(tmp_path / "home" / "keys" / "default")


def with_ada(policy: Policy, *roles: str) -> Policy:
    return policy.next(users={**policy.users, "ada": User(ADA.peer_id, frozenset(roles))})


def without_ada(policy: Policy) -> Policy:
    return policy.next(users={k: v for k, v in policy.users.items() if k != "ada"})


async def test_first_start_then_the_same_again(tmp_path: Path) -> None:
    first = make(tmp_path)
    assert first.policy.version == 1
    assert make(tmp_path).policy == first.policy


PROPOSALS = {"box": {"member": frozenset({"Box.get"})}}


async def test_the_first_run_founds_with_what_is_proposed(tmp_path: Path) -> None:
    """Before it the services are not there; after it nothing that they propose is read."""
    proposals: dict[str, Any] = {}
    backend = make(tmp_path, proposals=proposals)
    file = tmp_path / "data" / "policy.json"
    assert not file.exists()
    proposals |= PROPOSALS
    async with anyio.create_task_group() as tasks:
        await tasks.start(backend.run)
        assert Policy.open(file.read_bytes()) == backend.policy
        assert (await backend.join_document()) == file.read_bytes()
        member = backend.profile("member")
        assert member.services == {"box": {"Box.get"}}
        proposals |= {"box": {"member": frozenset({"*"})}, "new": PROPOSALS["box"]}
        assert backend.profile("member") == member
        tasks.cancel_scope.cancel()
    # Nor does a start without the service, or with another proposal, change it.
    for given in ({}, proposals):
        again = await founded(tmp_path, proposals=given)
        assert again.policy == backend.policy


async def test_a_node_whose_first_policy_finds_no_room_founds_with_the_next_start(
    small_disk: Any,
) -> None:
    backend = make(small_disk.path, proposals=PROPOSALS)
    small_disk.fill()
    with pytest.raises(ConfigError, match="cannot write the policy") as caught:
        await backend.run(task_status=anyio.TASK_STATUS_IGNORED)
    assert "free some disk space" in caught.value.hint
    assert not (small_disk.path / "data" / "policy.json").exists()
    small_disk.free()
    again = await founded(small_disk.path, proposals=PROPOSALS)
    assert again.policy.roles["member"] == {"box": {"Box.get"}}
    assert again.policy.operator == backend.policy.operator


async def test_a_start_on_a_full_disk(small_disk: Any) -> None:
    first = await founded(small_disk.path)
    small_disk.fill()
    assert make(small_disk.path).policy == first.policy


async def test_the_operator_s_key_is_encrypted_when_there_is_a_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WW_PASSPHRASE", "correct horse")
    make(tmp_path)
    with pytest.raises(KeyFileError) as caught:
        operator(tmp_path)
    assert caught.value.code == "key.passphrase"


async def test_a_cancelled_put_is_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever puts may be cut by the very change; memory and disk must not part."""
    backend = make(tmp_path)
    writing, go_on = threading.Event(), threading.Event()

    def slow(path: Path, data: bytes) -> None:
        writing.set()
        assert go_on.wait(60)
        identity.replace_private_file(path, data)

    monkeypatch.setattr("wetware.base.disk.replace_private_file", slow)
    document = with_ada(backend.policy, "member").sign(operator(tmp_path))
    put = asyncio.create_task(backend.put(document))
    await asyncio.to_thread(writing.wait, 20)
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert backend.policy.version == 1
    go_on.set()
    async with anyio.create_task_group() as tasks:
        await tasks.start(backend.run)
        tasks.cancel_scope.cancel()  # stopping waits for the change
    assert backend.policy.version == 2
    assert backend.roles(ADA_PRINCIPAL) == {"member"}
    assert make(tmp_path).policy.version == 2


async def test_two_puts_at_once_are_one_and_a_fork(tmp_path: Path) -> None:
    backend = make(tmp_path)
    key = operator(tmp_path)
    one = with_ada(backend.policy, "member").sign(key)
    two = with_ada(backend.policy, "admin").sign(key)
    done = await asyncio.gather(backend.put(one), backend.put(two), return_exceptions=True)
    assert [type(d) for d in done].count(ForkedPolicy) == 1
    assert make(tmp_path).policy == backend.policy


async def test_withdrawal_is_told_before_the_disk_is_written_and_survives_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make(tmp_path)
    key = operator(tmp_path)
    await backend.put(with_ada(backend.policy, "member").sign(key))
    told: list[Withdrawn] = []
    backend.watch(told.append)

    def full(path: Path, data: bytes) -> None:
        assert told, "the disk was written before the withdrawal took effect"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wetware.base.disk.replace_private_file", full)
    removal = without_ada(backend.policy).sign(key)
    with pytest.raises(PolicyNotSaved, match="No space left"):
        await backend.put(removal)
    assert [e.principal for e in told] == [ADA_PRINCIPAL]
    assert backend.roles(ADA_PRINCIPAL) == frozenset()
    monkeypatch.undo()
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    assert (await backend.put(removal))[0].version == 3
    assert make(tmp_path).policy.version == 3


async def login(backend: LocalBackend, key: Key) -> Accept | Reject:
    node = Key.generate().peer_id
    now_ms = int(time.time() * 1000)
    channel = Channel("unix", node.multihash)
    challenge = Challenge(b"n" * 32, node, "c", channel, backend.schemes, 1, now_ms + 10_000)
    answer = await backend.authenticate(challenge, await Ed25519Signer(key).sign(challenge))
    assert not isinstance(answer, NotMine)
    return answer


async def test_a_withdrawal_is_on_a_disk_that_is_full_and_an_addition_is_not(
    small_disk: Any, tmp_path: Path
) -> None:
    backend = make(small_disk.path)
    key = operator(tmp_path)
    await backend.put(with_ada(backend.policy, "member").sign(key))
    small_disk.fill()
    more = backend.policy.next(
        users={**backend.policy.users, "bob": User(Key.generate().peer_id, frozenset({"member"}))}
    )
    with pytest.raises(PolicyNotSaved):
        await backend.put(more.sign(key))
    gone = without_ada(more)
    await backend.put(gone.sign(key))
    assert not small_disk.free_bytes
    assert not list(backend.findings())
    assert make(small_disk.path).policy == gone


async def test_where_nothing_can_be_written_a_crash_leaves_the_operator_alone(
    small_disk: Any, tmp_path: Path
) -> None:
    backend = make(small_disk.path)
    key = operator(tmp_path)
    await backend.put(with_ada(backend.policy, "member").sign(key))
    with backend._reserve.open():
        small_disk.fill()
    with pytest.raises(PolicyNotSaved):
        await backend.put(without_ada(backend.policy).sign(key))
    for _ in range(2):
        after = make(small_disk.path)  # as after a crash
        assert after.policy.version == 2
        assert isinstance(await login(after, ADA), Reject)
        assert isinstance(await login(after, key), Accept)
        texts = " ".join(finding.text for finding in after.findings())
        assert "version 3 of the policy withdraws something" in texts
        assert "no room for what a withdrawal needs" in texts
    small_disk.free()
    await after.put(after.newest.document())  # the operator has looked
    assert isinstance(await login(after, ADA), Accept)
    assert not list(make(small_disk.path).findings())


async def test_what_a_crash_lost_does_not_come_back_with_an_older_version_of_a_member(
    small_disk: Any, tmp_path: Path
) -> None:
    backend = make(small_disk.path)
    key, bob = operator(tmp_path), Key.generate()
    await backend.put(with_ada(backend.policy, "member").sign(key))
    third = backend.policy.next(
        users={**backend.policy.users, "bob": User(bob.peer_id, frozenset({"member"}))}
    )
    with backend._reserve.open():
        small_disk.fill()
    fourth = without_ada(third)
    for policy in (third, fourth):
        with pytest.raises(PolicyNotSaved):
            await backend.put(policy.sign(key))
    after = make(small_disk.path)  # as after a crash
    small_disk.free()
    await after.spread._adopt(Signed.open(third.sign(key)))
    assert after.policy == third
    for node in (after, make(small_disk.path)):
        assert isinstance(await login(node, ADA), Reject)
        assert isinstance(await login(node, bob), Reject)
        assert isinstance(await login(node, key), Accept)
    await node.spread._adopt(Signed.open(fourth.sign(key)))
    assert isinstance(await login(node, ADA), Reject)
    assert isinstance(await login(node, bob), Accept)
    assert not list(make(small_disk.path).findings())


async def test_an_older_mark_does_not_replace_a_later_one(small_disk: Any, tmp_path: Path) -> None:
    backend = make(small_disk.path)
    key = operator(tmp_path)
    await backend.put(with_ada(backend.policy, "member", "admin").sign(key))
    third = with_ada(backend.policy, "member")
    with backend._reserve.open():
        small_disk.fill()
    for policy in (third, without_ada(third)):
        with pytest.raises(PolicyNotSaved):
            await backend.put(policy.sign(key))
    after = make(small_disk.path)
    with pytest.raises(PolicyNotSaved):
        await after.spread._adopt(Signed.open(third.sign(key)))
    after = make(small_disk.path)
    small_disk.free()
    await after.spread._adopt(Signed.open(third.sign(key)))
    assert isinstance(await login(after, ADA), Reject)


async def test_additions_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make(tmp_path)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    document = with_ada(backend.policy, "member").sign(operator(tmp_path))
    monkeypatch.setattr("wetware.base.disk.replace_private_file", full)
    with pytest.raises(PolicyNotSaved):
        await backend.put(document)
    assert backend.roles(ADA_PRINCIPAL) == frozenset()


async def test_a_policy_that_does_not_descend_is_a_fork(tmp_path: Path) -> None:
    backend = make(tmp_path)
    key = operator(tmp_path)
    second = with_ada(backend.policy, "admin")
    third = without_ada(second)
    for policy in (second, third):
        await backend.put(policy.sign(key))
    # Made on top of the old second version, which a stale node served.
    third_again = second.next(users=second.users)
    fourth_again = third_again.next(users=second.users)
    for policy in (third_again, fourth_again, fourth_again.next()):
        with pytest.raises(ForkedPolicy):
            await backend.put(policy.sign(key))
    with pytest.raises(StalePolicy):
        await backend.put(second.sign(key))
    assert backend.roles(ADA_PRINCIPAL) == frozenset()
    skipped = third.next().next().next()
    assert (await backend.put(skipped.sign(key)))[0].version == 6


async def test_another_operator_s_policy_is_refused(tmp_path: Path) -> None:
    backend = make(tmp_path)
    with pytest.raises(WrongCluster):
        await backend.put(Policy.first(ADA.peer_id).sign(ADA))


@pytest.mark.parametrize("loss", ["gone", "older", "other"])
async def test_a_lost_or_older_policy_file_stops_the_start(tmp_path: Path, loss: str) -> None:
    backend = await founded(tmp_path)
    key = operator(tmp_path)
    file = tmp_path / "data" / "policy.json"
    first = file.read_bytes()
    second = with_ada(backend.policy, "member")
    await backend.put(second.sign(key))
    if loss == "gone":
        file.unlink()
    elif loss == "older":
        file.write_bytes(first)
    else:
        file.write_bytes(replace(second, users=Policy.first(key.peer_id).users).sign(key))
    with pytest.raises(ConfigError):
        make(tmp_path)


async def test_adopting_a_policy(tmp_path: Path) -> None:
    document = tmp_path / "given.json"
    document.write_bytes(Policy.first(ADA.peer_id).sign(ADA))
    assert make(tmp_path, document).policy.operator == ADA.peer_id
    other = tmp_path / "other.json"
    bob = Key.generate()
    other.write_bytes(Policy.first(bob.peer_id).sign(bob))
    with pytest.raises(ConfigError, match="belongs to the cluster of"):
        make(tmp_path, other)


async def test_changing_what_a_role_may_do(tmp_path: Path) -> None:
    backend = make(tmp_path)
    key = operator(tmp_path)
    await backend.put(with_ada(backend.policy, "member").sign(key))
    told: list[Withdrawn] = []
    backend.watch(told.append)
    member = backend.policy.roles["member"]
    wider = {**backend.policy.roles, "member": {**member, "x": frozenset("*")}}
    await backend.put(backend.policy.next(roles=wider).sign(key))
    assert told == [], "a role that gained something withdraws nothing"
    narrower = {**wider, "member": {"pubsub": frozenset({"PubSub.*"})}}
    await backend.put(backend.policy.next(roles=narrower).sign(key))
    assert [e.roles for e in told] == [frozenset({"member"})]
    assert backend.roles(ADA_PRINCIPAL) == {"member"}, "she may log in again, with less"


async def test_an_operator_does_not_sign_on_top_of_a_stale_policy(tmp_path: Path) -> None:
    seen = SeenPolicies(tmp_path / "policies.json")
    key = Key.generate()
    first = Policy.first(key.peer_id)
    second = with_ada(first, "admin")
    third = without_ada(second)
    seen.check(first)
    seen.check(third)
    with pytest.raises(StalePolicy, match="stale, or lies"):
        seen.check(second)
    with pytest.raises(ForkedPolicy):
        seen.check(second.next())
    with pytest.raises(ForkedPolicy):
        seen.check(second.next().next())
    seen.check(third.next())
    other = Key.generate()
    seen.check(Policy.first(other.peer_id))  # another cluster has a history of its own


async def test_more_versions_than_the_history_names_need_the_operator(tmp_path: Path) -> None:
    backend = make(tmp_path)
    later = backend.policy
    for _ in range(HISTORY_MAX + 1):
        later = later.next()
    with pytest.raises(PolicyOutOfReach) as caught:
        await backend.put(later.sign(operator(tmp_path)))
    assert caught.value.hint
    assert backend.policy.version == 1


async def test_what_the_disk_refused_is_what_later_versions_build_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its members have been told of it: another document of its version would be a fork."""
    backend = make(tmp_path)
    key = operator(tmp_path)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    added = with_ada(backend.policy, "member")
    with monkeypatch.context() as patch:
        patch.setattr("wetware.base.disk.replace_private_file", full)
        with pytest.raises(PolicyNotSaved):
            await backend.put(added.sign(key))
    with pytest.raises(ForkedPolicy):
        await backend.put(backend.policy.next().sign(key))
    assert backend.newest.policy == added
    await backend._settle()
    assert backend.policy == added
    assert backend.roles(ADA_PRINCIPAL) == {"member"}


async def test_an_operator_who_saw_one_branch_resolves_the_fork(tmp_path: Path) -> None:
    seen = SeenPolicies(tmp_path / "policies.json")
    key = Key.generate()
    one = with_ada(Policy.first(key.peer_id), "admin")
    two = with_ada(Policy.first(key.peer_id), "member")
    seen.check(two)
    with pytest.raises(ForkedPolicy) as caught:
        seen.check(one)
    assert "ww policy resolve" in caught.value.hint
    seen.check(resolution(one, two, "common"))
    with pytest.raises(InvalidArgument, match="no fork"):
        resolution(one, one.next(), "this")


async def test_beside_another_authority_it_founds_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not this cluster's authority") as refused:
        make(tmp_path, authority=False)
    assert "ww policy export" in refused.value.hint
    assert not (tmp_path / "home").exists(), "no operator's key was made"
    file = tmp_path / "policy.json"
    file.write_bytes(Policy.first(ADA.peer_id).sign(ADA))
    assert make(tmp_path, file, authority=False).policy.operator == ADA.peer_id
    again = make(tmp_path, authority=False)
    assert again.policy.operator == ADA.peer_id, "it has it by now"
    assert again.contact.met, "the file may be old: it is compared before anybody is let in"


async def test_a_joining_node_adopts_the_cluster_s_policy(tmp_path: Path) -> None:
    document = Policy.first(ADA.peer_id).next()
    backend = make(tmp_path, join_document=document.sign(ADA))
    assert backend.policy == document
    assert backend.founding == ADA.public
    assert await backend.join_document() == document.sign(ADA)
    assert not (tmp_path / "home").exists(), "a joining node made an operator's key"
    assert backend.contact.met
    later = document.next()
    await backend.put(later.sign(ADA))
    again = make(tmp_path, join_document=document.sign(ADA))
    assert again.policy == later, "the document of the join is the same at every start"
    assert again.contact.met


async def test_a_join_document_that_does_not_fit_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is damaged"):
        make(tmp_path, join_document=b"{}")
    await founded(tmp_path)
    with pytest.raises(ConfigError, match="belongs to the cluster of"):
        make(tmp_path, join_document=Policy.first(ADA.peer_id).sign(ADA))


async def test_of_two_first_documents_the_later_one_is_adopted(tmp_path: Path) -> None:
    first = Policy.first(ADA.peer_id)
    file = tmp_path / "given.json"
    file.write_bytes(first.next().sign(ADA))
    assert make(tmp_path, file, join_document=first.sign(ADA)).policy.version == 2
    bob = Key.generate()
    with pytest.raises(ConfigError, match="joined the cluster"):
        make(tmp_path, file, join_document=Policy.first(bob.peer_id).sign(bob))


async def test_a_new_constraint_ends_the_sessions_of_its_role_and_a_dropped_one_does_not(
    tmp_path: Path,
) -> None:
    backend = make(tmp_path)
    key = operator(tmp_path)
    first = with_ada(
        backend.policy.next(
            roles={**backend.policy.roles, "chatter": {"pubsub": frozenset({"*"})}}
        ),
        "chatter",
    )
    await backend.put(first.sign(key))
    told: list[Any] = []
    backend.watch(told.append)
    narrow = backend.policy.next(where={"chatter": {"pubsub": ("topic=a",)}})
    await backend.put(narrow.sign(key))
    assert [(event.principal, event.roles) for event in told] == [
        (ADA_PRINCIPAL, frozenset({"chatter"}))
    ]
    assert [where.text for where in backend.profile("chatter").where] == ["topic=a"]
    await backend.put(backend.policy.next(where={}).sign(key))
    assert len(told) == 1
    assert backend.profile("chatter").where == ()
