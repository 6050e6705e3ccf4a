"""The lab itself: its networks are what they say, so that tests of reach rest on something."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import time

import pytest

from .lab import Lab
from .probe import ANSWER_S, KINDS, prove


def _address() -> str:
    """The only address of this machine that is not loopback."""
    shown = subprocess.run(
        ["ip", "-4", "-o", "address"], capture_output=True, text=True, check=True
    )
    return " ".join(re.findall(r"inet (?!127)([\d.]+)", shown.stdout))


@pytest.mark.parametrize("delay_ms", [0, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_nat_is_what_it_claims(kind: str, delay_ms: float) -> None:
    with Lab(delay_ms) as lab:
        lab.host("machine", lab.internet if kind == "open" else lab.network(kind))
        prove(lab, "machine")


def _connected(lab: Lab, here: str, there: str) -> tuple[socket.socket, socket.socket]:
    with lab.inside(there), socket.create_server(("", 7000)) as server, lab.inside(here):
        near = socket.create_connection((lab.hosts[there].address, 7000), ANSWER_S)
        far, _ = server.accept()
    far.settimeout(ANSWER_S)
    return near, far


def test_a_delay_is_a_delay_and_bytes_arrive_whole() -> None:
    with Lab(delay_ms=20) as lab:
        lab.host("hub")
        lab.host("home", lab.network("port-restricted"))
        near, far = _connected(lab, "home", "hub")
        with near, far:
            began = time.monotonic()
            near.send(b"?")
            far.send(far.recv(1))
            near.recv(1)
            assert time.monotonic() - began >= 0.04
            sent = os.urandom(1 << 20)
            near.settimeout(10)
            far.settimeout(10)
            got = b""
            for at in range(0, len(sent), 1 << 15):
                near.sendall(sent[at : at + (1 << 15)])
                while len(got) < at + (1 << 15):
                    got += far.recv(1 << 15)
            assert got == sent


def test_machines_of_one_network_reach_each_other_and_nobody_reaches_in(lab: Lab) -> None:
    lan = lab.network("isolated")
    for name in ("one", "two"):
        lab.host(name, lan)
    lab.host("hub")
    near, far = _connected(lab, "one", "two")
    near.close()
    far.close()
    with lab.inside("one"), pytest.raises(OSError, match="unreachable") as failed:
        socket.create_connection((lab.hosts["hub"].address, 7000), ANSWER_S)
    assert failed.value.errno == errno.ENETUNREACH
    with lab.inside("hub"), pytest.raises(TimeoutError):
        socket.create_connection((lab.hosts["two"].address, 7000), ANSWER_S)


def test_a_router_forgets_a_connection_on_which_nothing_moves(lab: Lab) -> None:
    lab.host("hub")
    lab.host("home", lab.network("port-restricted", forget_s=1))
    lab.host("cafe", lab.network("port-restricted"))
    for name, forgotten in (("home", True), ("cafe", False)):
        near, far = _connected(lab, name, "hub")
        with near, far:
            near.send(b"a")
            assert far.recv(1) == b"a"
            time.sleep(2.2)
            near.send(b"b")
            if forgotten:
                with pytest.raises(TimeoutError):
                    far.recv(1)
            else:
                assert far.recv(1) == b"b"


def test_ipv6_is_there_where_it_is_asked_for_and_lost_where_it_is_broken(lab: Lab) -> None:
    for name, ip6 in (("one", "routed"), ("two", "routed"), ("lost", "broken"), ("none", "")):
        lab.host(name, lab.network("symmetric", ip6=ip6))
        prove(lab, name)
    assert not lab.hosts["none"].address6

    def dial(here: str, there: str) -> None:
        with lab.inside(here):
            began = time.monotonic()
            socket.create_connection((lab.hosts[there].address6, 7000), 1.0).close()
            assert time.monotonic() - began < 0.2

    for there in ("one", "two", "lost"):
        with lab.inside(there):
            listening = socket.create_server(("::", 7000), family=socket.AF_INET6)
        with listening:
            for here in ("one", "two", "lost"):
                if here == there or "lost" not in (here, there):
                    dial(here, there)
                else:
                    with pytest.raises(TimeoutError):
                        dial(here, there)
            with pytest.raises(OSError, match="Cannot assign"):  # it has no address to do so from
                dial("none", there)


def test_a_machine_moves_and_loses_its_link(lab: Lab) -> None:
    lab.host("hub")
    home = lab.network("port-restricted")
    lab.host("laptop", home)
    with lab.inside("laptop"):
        assert _address() == lab.hosts["laptop"].address == "10.1.0.2"
        lab.move("laptop", home)
        assert _address() == lab.hosts["laptop"].address == "10.1.0.3"
        lab.move("laptop", lab.network("symmetric"))
        assert _address() == lab.hosts["laptop"].address == "10.2.0.2"
        lab.move("laptop", lab.internet)
        prove(lab, "laptop")
        lab.link("laptop", up=False)
        with pytest.raises(OSError, match="unreachable"):
            socket.create_connection((lab.hosts["hub"].address, 7000), ANSWER_S)
        lab.link("laptop", up=True)
        prove(lab, "laptop")


def test_labs_do_not_meet_and_leave_nothing() -> None:
    here = os.readlink("/proc/thread-self/ns/net"), _address(), socket.if_nameindex()
    opened = len(os.listdir("/proc/self/fd"))
    with Lab() as one, Lab(delay_ms=1) as two:
        for lab in (one, two):
            lab.host("hub")
            lab.host("home", lab.network("full-cone"))
        assert one.hosts["hub"].address == two.hosts["hub"].address
        for lab in (one, two):
            prove(lab, "home")

    def fail() -> None:
        with Lab() as lab:
            lab.host("hub")
            with lab.inside("hub"):
                raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert (os.readlink("/proc/thread-self/ns/net"), _address(), socket.if_nameindex()) == here
    assert len(os.listdir("/proc/self/fd")) == opened
