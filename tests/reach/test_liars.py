"""Members that lie about addresses: what that makes the others do to somebody else."""

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

from .cluster import Cluster
from .lab import Lab

pytestmark = pytest.mark.timeout(180)

WATCHED_S = 30.0
AT_MOST = {"record": 4 * 2, "punch": 2 * 4}
"""Of packets in that time: the first dial and three more of two addresses, two punches of four."""
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
def lying(monkeypatch: pytest.MonkeyPatch, lab: Lab, *ways: str) -> Iterator[None]:
    """A node that is started meanwhile lies in these ways about where it is, or others are."""
    with monkeypatch.context() as patched:
        script = str(Path(__file__).with_name("liar.py"))
        command = [sys.executable, script, ",".join(ways), lab.hosts["victim"].address]
        patched.setattr(nodes_module, "_ww", lambda: command)
        yield


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
        with lying(monkeypatch, lab, way):
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
    with lying(monkeypatch, lab, "observed"):
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
