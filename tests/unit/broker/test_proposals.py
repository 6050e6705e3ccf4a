"""What a service proposes is judged when it is loaded, shown, and never read by a decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware import rpc
from wetware.broker.proposals import proposal_of, ungranted
from wetware.errors import Denied, PluginError
from wetware.hookspecs import RoleProfile
from wetware.node.services.cluster import ClusterService
from wetware.node.services.node import NodeService
from wetware_pubsub.service import PubSubService

from .cluster import BOX, Backend, MemNode
from .parts import Clock

PROPOSAL = {"reader": frozenset({"Box.get"}), "member": frozenset({"Box.*", "Item.read"})}


def service(roles: Any, name: str = "box") -> Any:
    return SimpleNamespace(name=name, interface=BOX.Box, roles=roles)


def test_a_proposal_is_copied_without_what_is_empty() -> None:
    roles = {**PROPOSAL, "admin": frozenset[str]()}
    found = proposal_of(service(roles))
    roles["member"] = frozenset({"*"})
    assert found == PROPOSAL
    assert proposal_of(service({})) == {}
    assert proposal_of(service({"member": frozenset({"*"})})) == {"member": {"*"}}


class Lying(Mapping[str, Any]):
    """Another proposal each time that it is looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def __getitem__(self, role: str) -> Any:
        if role != "member":
            raise KeyError(role)
        self.looks += 1
        return frozenset({"Box.get"} if self.looks == 1 else {"Cluster.evict"})

    def __iter__(self) -> Iterator[str]:
        return iter(("member",))

    def __len__(self) -> int:
        return 1


def test_a_proposal_is_looked_at_once() -> None:
    assert proposal_of(service(Lying())) == {"member": {"Box.get"}}


@pytest.mark.parametrize(
    ("roles", "why"),
    [
        (None, "roles is NoneType, not a mapping"),
        ({"operator": frozenset({"*"})}, "for a role 'operator': there are reader, member, admin"),
        ({"member": "*"}, "roles['member'] is str, not a frozenset"),
        ({"member": ["Box.get"]}, "is list, not a frozenset"),
        ({"member": frozenset({"Box.sell"})}, "'Box.sell' for 'member', which is no method of it"),
        ({"member": frozenset({"Box.get", "Cluster.evict"})}, "'Cluster.evict' for 'member'"),
        ({"reader": frozenset({"Session.*"})}, "'Session.*' for 'reader'"),
        ({"member": frozenset({"box"})}, "'box' for 'member'"),
        ({"member": frozenset({"Box.get\x1b[2J"})}, r"'Box.get\x1b[2J' for 'member'"),
        ({"member": frozenset({3})}, "3 for 'member'"),
        ({"member": frozenset(map(str, range(300)))}, "300 patterns for 'member'; 256 are allowed"),
    ],
)  # fmt: skip
def test_a_hostile_proposal_is_an_error_that_names_it(roles: Any, why: str) -> None:
    with pytest.raises(PluginError) as caught:
        proposal_of(service(roles))
    assert why in caught.value.message
    assert caught.value.message.isprintable()


def test_what_is_ungranted() -> None:
    def judge(**services: Any) -> bool:
        profiles = {
            role: RoleProfile({name: frozenset({"*"}) for name in names})
            for role, names in services.items()
        }
        return ungranted("box", PROPOSAL, lambda role: profiles.get(role, RoleProfile()))

    assert judge(admin=["*"], member=["pubsub"])
    assert judge(member=["pubsub"], reader=["pubsub"])
    assert not judge(member=["pubsub", "box"])
    assert not judge(member=["pubsub"], reader=["box"])
    assert not judge(member=["*"])
    # A cluster with roles of its own has decided without the standard ones.
    assert not judge(admin=["*"], chatter=["pubsub"])
    member = RoleProfile({"pubsub": frozenset({"*"})})
    for nothing in ({}, {"admin": frozenset({"*"})}):
        assert not ungranted("box", nothing, lambda _: member)


@pytest.mark.parametrize("made", [NodeService, ClusterService, PubSubService])
def test_the_bundled_services_propose_something_for_both(made: Any) -> None:
    assert {"reader", "member"} == set(proposal_of(made))


@pytest.mark.anyio
async def test_a_denial_says_what_an_operator_runs(tmp_path: Path) -> None:
    member = RoleProfile({"pubsub": frozenset({"*"})})
    backend = Backend({"member": member}, {"ada": {"member"}})
    node = MemNode("a", tmp_path, backend, Clock())
    async with rpc.runtime(), node.running(), node.login("ada") as ada:
        node.broker.proposals = {"box": PROPOSAL}
        with pytest.raises(Denied, match="it is installed, not granted to members yet") as caught:
            await ada.open("box", BOX.Box)
        assert caught.value.hint == "an operator runs `ww role accept box`"
        for other in ("blob", "box\x1b", "session"):  # is not here, and nothing is said of it
            with pytest.raises(Denied) as unknown:
                await ada.open(other, BOX.Box)
            assert "accept" not in unknown.value.hint
        # Who holds a part of a session has no roles, and is not told what is installed.
        part = await ada.attenuate(label="part")
        with pytest.raises(Denied) as narrow:
            await part.open("box", BOX.Box)
        assert "accept" not in narrow.value.hint
        # Once it is granted to others, a role is what is lacking.
        backend.profiles["reader"] = RoleProfile({"box": frozenset({"Box.get"})})
        with pytest.raises(Denied) as lacking:
            await ada.open("box", BOX.Box)
        assert "ww whoami" in lacking.value.hint


@pytest.mark.anyio
async def test_a_proposal_grants_nothing(tmp_path: Path) -> None:
    backend = Backend({"member": RoleProfile()}, {"ada": {"member"}})
    node = MemNode("a", tmp_path, backend, Clock())
    async with rpc.runtime(), node.running():
        node.broker.proposals = {"box": {"member": frozenset({"*"})}}
        async with node.login("ada") as ada:
            with pytest.raises(Denied):
                await ada.open("box", BOX.Box)


@pytest.mark.anyio
async def test_shares_outlive_a_start_without_their_service(tmp_path: Path) -> None:
    """A plugin that fails to load once takes its proposal along, and nobody's rights."""
    backend = Backend({"member": RoleProfile({"box": frozenset({"*"})})}, {"ada": {"member"}})
    node = MemNode("a", tmp_path, backend, Clock())
    async with rpc.runtime():
        async with node.running(), node.login("ada") as ada:
            node.broker.proposals = {"box": PROPOSAL}
            ref, _ = await ada.share(label="kept")
        async with node.running():
            node.broker.services, node.broker.proposals = {}, {}
            assert len(node.tree.shares) == 1
        async with node.running(), node.redeem(ref) as bearer:
            assert await (await bearer.open("box", BOX.Box)).get(key="a") == {"data": b""}
