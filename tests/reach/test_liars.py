"""Members that lie: what that makes the others do to somebody else, and what a relay achieves."""

from __future__ import annotations

import collections
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import wetware.testing.nodes as nodes_module
from wetware.testing import wait_for

from .cluster import Cluster
from .lab import Lab

pytestmark = pytest.mark.timeout(180)

WATCHED_S = 30.0
AT_MOST = {"record": 4 * 2, "punch": 2 * 4}
"""Of packets in that time: the first dial and three more of two addresses, two punches of four."""
LEFT_S = 60.0
"""A relay that holds what it carries: after 45, by reach.md, and then a busy machine connects."""
TCP, SYN_ACK, SYN = 6, 0x12, 0x02


@contextlib.contextmanager
def syns(lab: Lab, name: str, seconds: list[float]) -> Iterator[collections.Counter[str]]:
    """How many attempts to connect came to a machine, by where from; and when."""
    counted: collections.Counter[str] = collections.Counter()
    with lab.inside(name), socket.socket(socket.AF_INET, socket.SOCK_RAW, TCP) as wire:
        wire.settimeout(0.1)
        ended = threading.Event()

        def count() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    packet = wire.recv(1 << 16)
                    header = 4 * (packet[0] & 15)
                    if packet[header + 13] & SYN_ACK == SYN:
                        counted[socket.inet_ntoa(packet[12:16])] += 1
                        seconds.append(time.monotonic())

        thread = threading.Thread(target=count)
        thread.start()
        try:
            yield counted
        finally:
            ended.set()
            thread.join()


@contextlib.contextmanager
def lying(monkeypatch: pytest.MonkeyPatch, host: str, *ways: str) -> Iterator[None]:
    """A node that is started meanwhile does harm in these ways; see liar.py."""
    with monkeypatch.context() as patched:
        script = str(Path(__file__).with_name("liar.py"))
        command = [sys.executable, script, ",".join(ways), host]
        patched.setattr(nodes_module, "_ww", lambda: command)
        yield


@pytest.mark.long
@pytest.mark.parametrize("way", ["record", "punch"])
def test_a_member_that_names_a_victim_as_its_address_has_it_dialled_a_few_times(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    way: str,
) -> None:
    lab, when = cluster.lab, list[float]()
    for name in ("hub", "victim"):
        lab.host(name)
    lab.host("home", lab.network("port-restricted"))
    lab.host("liar", lab.network("symmetric"))  # so it stays relayed
    for name in ("hub", "home"):
        cluster.start(name, join="hub" if cluster.nodes else "")
    ticket = cluster.nodes["hub"].invite()
    with syns(lab, "victim", when) as counted:
        with lying(monkeypatch, lab.hosts["victim"].address, way):
            cluster.start("liar", ticket=ticket)
        time.sleep(WATCHED_S)
        record_property("attempts by source", dict(counted))
        record_property("after, s", [round(at - when[0], 1) for at in when])
        liar = str(cluster.nodes["liar"].peer_id)
        assert cluster.nodes["home"].members()[liar]["via"]
        assert lab.hosts["hub"].address not in counted
        assert 1 <= counted[lab.hosts["home"].network.address] <= AT_MOST[way]


def test_of_two_observers_one_lies_and_the_pair_stays_relayed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, when = cluster.lab, list[float]()
    for name in ("hub", "liar", "victim"):
        lab.host(name)
    for name in ("home", "cafe"):
        lab.host(name, lab.network("port-restricted"))
    cluster.start("hub")
    ticket = cluster.nodes["hub"].invite()
    with lying(monkeypatch, lab.hosts["victim"].address, "observed"):
        cluster.start("liar", ticket=ticket)
    with syns(lab, "victim", when) as counted:
        for name in ("home", "cafe"):
            cluster.start(name, join="hub", args=("--log-level", "debug"))
        cafe = cluster.nodes["cafe"]
        cafe.wait_members([node.peer_id for node in cluster.nodes.values()])
        smaller = min("home", "cafe", key=lambda name: cluster.nodes[name].peer_id)
        cluster.nodes[smaller].wait_log("symmetric")
        time.sleep(5.0)
        assert not counted
    assert cafe.members()[str(cluster.nodes["home"].peer_id)]["via"]


@pytest.mark.long
def test_a_relay_that_holds_what_it_carries_is_left_for_another(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """It carried the pair well before; what members say to it itself is answered at once."""
    lab, begun = cluster.lab, tmp_path / "begun"
    for name in ("liar", "hub"):
        lab.host(name)
    for name in ("home", "cafe"):
        lab.host(name, lab.network("symmetric"))
    with lying(monkeypatch, str(begun), "hold"):
        cluster.start("liar")
    for name in ("home", "cafe", "hub"):
        cluster.start(name, join="liar")
    home, cafe = cluster.nodes["home"], cluster.nodes["cafe"]
    hub, liar = (str(cluster.nodes[name].peer_id) for name in ("hub", "liar"))

    def relays() -> set[str]:
        return {
            node.members()[str(other.peer_id)]["via"]
            for node, other in ((home, cafe), (cafe, home))
        }

    for node in (home, cafe):
        node.wait_members(other.peer_id for other in cluster.nodes.values())
    wait_for(lambda: relays() == {liar}, "a pair that the liar carries")
    begun.touch()
    started = time.monotonic()
    wait_for(lambda: relays() == {hub}, "another relay", within_s=LEFT_S)
    record_property("left after, s", time.monotonic() - started)
    cluster.ww("home", "ping", "cafe", "-c", "3", "-i", "0.2", check=True)
    assert relays() == {hub}
    states = {member["state"] for node in (home, cafe) for member in node.members().values()}
    assert states == {"alive"}
