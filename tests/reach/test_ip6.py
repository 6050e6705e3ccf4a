"""Members behind NATs of IPv4 that have IPv6: what is dialled first, and where it leads nowhere."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from wetware.testing import wait_for

from .cluster import Cluster
from .lab import Lab
from .probe import prove

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

Record = Callable[[str, object], None]
Syns = list[tuple[float, str]]
WITHIN_S = 2.0
"""Of joining, a member reaches every other one."""
STAGGER_S = 0.25
DEBUG = ("--log-level", "debug")
PORT = 4001
ETH_P_ALL, IP4, IP6, TCP = 3, 0x0800, 0x86DD, 6


def place(cluster: Cluster, name: str, kind: str, *, ip6: str, args: tuple[str, ...] = ()) -> None:
    cluster.lab.host(name, cluster.lab.network(kind, ip6=ip6))
    prove(cluster.lab, name)
    announced = f"/ip4/{cluster.lab.hosts[name].network.address}/tcp/{PORT}"
    args = ("--announce", announced, *args) if kind == "full-cone" else args
    cluster.start(name, join="hub", args=(*args, *DEBUG))


@contextlib.contextmanager
def dialled(lab: Lab, *names: str) -> Iterator[Syns]:
    """When machines sent a SYN to a node, and to which address."""
    seen: Syns = []
    ended = threading.Event()

    def watch(wire: socket.socket) -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                packet, (_, version, kind, *_) = wire.recvfrom(256)
                if version == IP4 and packet[9] == TCP:
                    header, to = 4 * (packet[0] & 15), packet[16:20]
                elif version == IP6 and packet[6] == TCP:
                    header, to = 40, packet[24:40]
                else:
                    continue
                syn = packet[header + 13] & 0x12 == 0x02
                port = int.from_bytes(packet[header + 2 : header + 4], "big")
                if kind == socket.PACKET_OUTGOING and syn and port == PORT:
                    seen.append((time.monotonic(), str(ipaddress.ip_address(to))))

    with contextlib.ExitStack() as stack:
        for name in names:
            with lab.inside(name):
                wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
            wire.settimeout(0.1)
            stack.enter_context(wire)
            thread = threading.Thread(target=watch, args=(wire,))
            thread.start()
            stack.callback(thread.join)
        stack.callback(ended.set)
        yield seen


def first(seen: Syns, address: str) -> float:
    return min(at for at, to in seen if to == address)


async def test_members_with_ipv6_are_direct_at_once_and_nobody_punches(
    cluster: Cluster, record_property: Record
) -> None:
    """Behind NATs that could not be punched; nothing else is even dialled."""
    lab = cluster.lab
    lab.host("hub")
    cluster.start("hub")
    names = ("home", "cafe")
    for name in names:
        lab.host(name, lab.network("symmetric", ip6="routed"))
        prove(lab, name)
    with dialled(lab, *names) as seen:
        for name in names:
            cluster.start(name, join="hub", args=DEBUG)
        ways = await cluster.reach("home", "cafe", within_s=WITHIN_S)
    record_property("home to cafe", ways)
    assert all(isinstance(took, float) for took in ways.values()), ways
    for here, there in (names, names[::-1]):
        node, peer = cluster.nodes[here], cluster.nodes[there].peer_id
        member = node.members()[str(peer)]
        assert (member["connected"], member["via"]) == (True, "")
        up = [line for line in node.log.read_text().splitlines() if "connection.up" in line]
        [line] = [line for line in up if f"peer={peer}" in line]
        assert f"remote=/ip6/{lab.hosts[there].address6}/" in line
        assert "punch" not in node.log.read_text()
    hosts = {lab.hosts[name].address6 for name in names}
    assert {to for _, to in seen} <= {*hosts, lab.hosts["hub"].address}
    assert hosts & {to for _, to in seen}


async def test_broken_ipv6_costs_a_quarter_of_a_second(
    cluster: Cluster, record_property: Record
) -> None:
    """IPv6 is dialled first, then IPv4: of a server with both, from where IPv6 is lost."""
    lab = cluster.lab
    lab.host("hub")
    cluster.start("hub")
    # The smaller peer ID dials.
    home, server = sorted(("one", "two"), key=cluster.node_id)
    place(cluster, server, "full-cone", ip6="routed")
    lab.host(home, lab.network("symmetric", ip6="broken"))
    prove(lab, home)
    with dialled(lab, home) as seen:
        cluster.start(home, join="hub", args=DEBUG)
        ways = await cluster.reach(home, server, within_s=WITHIN_S)
    record_property("home to server", ways)
    assert all(isinstance(took, float) for took in ways.values()), ways
    there = lab.hosts[server]
    waited_s = first(seen, there.network.address) - first(seen, there.address6)
    record_property("IPv4 after, s", waited_s)
    assert 0.8 * STAGGER_S < waited_s < 1.0
    wait_for(
        lambda: cluster.nodes[home].members()[str(cluster.nodes[server].peer_id)]["via"] == "",
        "a direct connection",
    )


async def test_where_ipv6_is_broken_a_relay_is_used(
    cluster: Cluster, record_property: Record
) -> None:
    """IPv6 of either end leads nowhere, and the NATs of IPv4 cannot be punched."""
    cluster.lab.host("hub")
    cluster.start("hub")
    for name, ip6 in (("home", "broken"), ("cafe", "routed")):
        place(cluster, name, "symmetric", ip6=ip6)
    for here, there in (("home", "cafe"), ("cafe", "home")):
        ways = await cluster.reach(here, there, within_s=WITHIN_S)
        record_property(f"{here} to {there}", ways)
        assert all(isinstance(took, float) for took in ways.values()), ways
        member = cluster.nodes[here].members()[str(cluster.nodes[there].peer_id)]
        assert member["via"] == str(cluster.nodes["hub"].peer_id)
