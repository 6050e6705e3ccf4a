"""Every member reaches every member, wherever it is."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from itertools import permutations

import pytest

from wetware.testing import wait_for

from .cluster import Cluster
from .lab import Lab
from .probe import prove

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

PUNCHED_S = 5.0
DIRECT_S = 15.0
"""After a move: until it is noticed, and three tries."""
TRIED_S = 25.0
"""In which a pair spends all the tries that it has at once."""
WITHIN_S = 2.0
"""Of joining, a member reaches every other one."""

TOPOLOGIES = [
    ("open", "open"),
    ("open", "full-cone"),
    ("port-restricted", "port-restricted"),
    ("symmetric", "port-restricted"),
    ("symmetric", "symmetric"),
]


def _place(lab: Lab, name: str, kind: str) -> None:
    lab.host(name, lab.internet if kind == "open" else lab.network(kind))
    prove(lab, name)


@pytest.fixture
def three(cluster: Cluster) -> Cluster:
    """A hub on the internet, `home` and `cafe` each behind a NAT that lets nobody in."""
    _place(cluster.lab, "hub", "open")
    cluster.start("hub")
    for name in ("home", "cafe"):
        _place(cluster.lab, name, "port-restricted")
        cluster.start(name, join="hub")
    return cluster


def _all_alive(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        node.wait_members(other.peer_id for other in cluster.nodes.values())


def test_members_behind_nats_are_listed_alive_by_all(three: Cluster) -> None:
    _all_alive(three)


def test_ping_from_home_to_cafe(three: Cluster) -> None:
    _all_alive(three)
    three.ww("home", "ping", "cafe", "-c", "2", "-i", "0.2", check=True)


def test_login_at_cafe_from_home(three: Cluster) -> None:
    _all_alive(three)
    printed = three.ww("home", "--node", "cafe", "whoami", check=True).stdout
    assert str(three.nodes["cafe"].peer_id) in printed


def test_a_message_from_home_reaches_cafe_and_the_hub_does_not_subscribe(three: Cluster) -> None:
    _all_alive(three)
    listening = three.nodes["cafe"].start_ww("sub", "chat", "--count", "1")
    try:
        for _ in range(10):
            three.ww("home", "pub", "chat", "hello", check=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = listening.communicate(timeout=0.5)
                assert out.strip() == "hello", err
                return
    finally:
        listening.kill()
    pytest.fail("ten messages, and none has arrived")


@pytest.mark.parametrize(("one", "other"), TOPOLOGIES)
async def test_every_member_reaches_every_other_one(
    cluster: Cluster, one: str, other: str, record_property: Callable[[str, object], None]
) -> None:
    """By ping, `session.node`, a tunnel and pub-sub, as soon as it has joined."""
    for name, kind in (("hub", "open"), ("one", one), ("other", other)):
        _place(cluster.lab, name, kind)
        cluster.start(name, join="hub" if cluster.nodes else "")
    missed: dict[tuple[str, str], dict[str, object]] = {}
    # First the two of which neither has joined by the other.
    for pair in sorted(permutations(cluster.nodes, 2), key=lambda pair: "hub" in pair):
        ways = await cluster.reach(*pair, within_s=WITHIN_S)
        record_property(" to ".join(pair), ways)
        if failed := {way: why for way, why in ways.items() if isinstance(why, str)}:
            missed[pair] = failed
    assert not missed


@pytest.mark.parametrize(
    ("one", "other", "punched"),
    [
        ("port-restricted", "port-restricted", True),
        ("full-cone", "port-restricted", True),
        pytest.param("symmetric", "port-restricted", False, marks=pytest.mark.long),
    ],
)
def test_a_pair_becomes_direct_where_its_nats_let_it(
    cluster: Cluster, one: str, other: str, punched: bool
) -> None:
    """Through the relay at first; a stream that was opened there goes on."""
    for name, kind in (("hub", "open"), ("one", one), ("other", other)):
        _place(cluster.lab, name, kind)
        cluster.start(name, join="hub" if cluster.nodes else "")
    _all_alive(cluster)
    hub = str(cluster.nodes["hub"].peer_id)
    seen: list[str] = []
    deadline = time.monotonic() + PUNCHED_S
    while time.monotonic() < deadline and (not seen or seen[-1] == hub):
        listed = json.loads(cluster.ww("one", "ls", "other", "--json", check=True).stdout)
        [member] = listed["members"]
        if member["connected"]:
            seen.append(member["via"])
    assert seen[0] == hub or punched  # that may have been quick
    assert seen[-1] == ("" if punched else hub)


@pytest.mark.long
def test_a_pair_becomes_direct_when_one_of_it_leaves_a_symmetric_nat(cluster: Cluster) -> None:
    """What was tried in vain before does not count against what is tried there."""
    for name, kind in (
        *(("hub", "open"), ("rented", "open")),
        *(("home", "port-restricted"), ("laptop", "symmetric")),
    ):
        _place(cluster.lab, name, kind)
        cluster.start(name, join="hub" if cluster.nodes else "")
    _all_alive(cluster)
    home, laptop = (cluster.nodes[name] for name in ("home", "laptop"))
    time.sleep(TRIED_S)
    assert home.members()[laptop.peer_id]["via"]
    cluster.lab.move("laptop", cluster.lab.network("port-restricted"))

    def direct() -> bool:
        member = home.members()[laptop.peer_id]
        return bool(member["connected"] and not member["via"])

    wait_for(direct, "home reaches the laptop directly", within_s=DIRECT_S)


async def test_machines_on_a_lan_without_a_way_out_find_each_other(cluster: Cluster) -> None:
    lan = cluster.lab.network("isolated")
    for name in ("one", "two"):
        cluster.lab.host(name, lan)
        cluster.start(name, join="one" if cluster.nodes else "")
    _all_alive(cluster)
    # With other addresses than those that they remember of each other.
    for name in ("one", "two"):
        cluster.nodes[name].stop()
        cluster.lab.move(name, lan)
    for name in ("one", "two"):
        cluster.start(name)
    _all_alive(cluster)
    ways = await cluster.reach("one", "two", within_s=WITHIN_S)
    assert all(isinstance(took, float) for took in ways.values()), ways


def test_a_ticket_of_a_node_behind_a_nat_lets_in_who_has_never_seen_the_cluster(
    cluster: Cluster,
) -> None:
    """Through the relay that it names, which the newcomer stays connected to, also over a start."""
    for name, kind in (("hub", "open"), ("home", "symmetric"), ("late", "symmetric")):
        _place(cluster.lab, name, kind)
    cluster.start("hub")
    ticket = cluster.nodes["hub"].invite("--inviter")
    cluster.start("home", ticket=ticket).wait_log("relay.reserved")
    late = cluster.start("late", join="home")
    _all_alive(cluster)
    late.stop()
    cluster.start("late")
    _all_alive(cluster)
    hub = str(cluster.nodes["hub"].peer_id)

    def paths() -> set[str]:
        listed = cluster.nodes["late"].members()
        others = [listed[cluster.nodes[name].peer_id] for name in ("hub", "home")]
        return {member["via"] if member["connected"] else "no way" for member in others}

    wait_for(lambda: paths() == {"", hub}, "the hub directly, and home through it")
