"""Networks to test reach in: machines, routers with NAT and an internet, all inside this process.

with Lab() as lab:
    lab.host("hub")  # on the internet, at 5.0.0.1
    lab.host("home", lab.network("port-restricted"))  # behind a router of its own, at 10.1.0.2
    prove(lab, "home")  # (probe.py) that the router does what its kind says
    with lab.inside("home"):
        subprocess.run(["ip", "address"])  # what is started or opened here is on that machine

Each machine is a network namespace without a name, known by an open file. So labs cannot collide,
the host's own network is never touched, and whatever happens to this process, a lab is gone when
this process and those on the machines have ended. IPv6 is where a network is told to have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from wetware.testing import end_with_parent

INTERNET = "5.0.0"
"""Its addresses are global to `ipaddress`; those of 203.0.113.0/24, made for this, are private."""
INTERNET6 = "2a00:5:0"
"""A /48; the internet is a link of it, and each network with IPv6 a /64, which no NAT hides."""
NOWHERE = f"{INTERNET}.254", "02:00:00:00:00:fe"
"""The default route there, to a MAC that nobody has: what is sent to a private address is lost."""
COMMAND_S_MAX = 20.0
THIS_NAMESPACE = "/proc/thread-self/ns/net"
CLONE_NEWNET = 0x40000000

ROUTER = """
table ip lab {{
  chain incoming {{ type nat hook prerouting priority dstnat; {dnat} }}
  chain outgoing {{
    type nat hook postrouting priority srcnat
    oifname wan masquerade {masquerade}
  }}
  chain router {{ type filter hook input priority filter; iifname wan ct state new drop; }}
  chain through {{
    type filter hook forward priority filter
    ct state invalid drop
    ct status dnat accept
    iifname wan ct state new drop
  }}
}}
"""
"""What nobody asked for is dropped without an answer, as by most routers at home."""
BLOCK = """
table ip block
delete table ip block
table ip block {{
  chain through {{ type filter hook forward priority filter - 1; {rule} }}
}}
"""
BROKEN6 = """
table ip6 lab {
  chain through { type filter hook forward priority filter; drop; }
}
"""
"""An address that is announced, and nothing that is sent from there or to it arrives."""
PARTED = """
table bridge parted
delete table bridge parted
table bridge parted {{
  chain through {{ type filter hook forward priority filter - 1; {rules} }}
}}
"""
NO_MULTICAST = """
table bridge lab {
  chain through {
    type filter hook forward priority filter
    ether daddr & ff:ff:ff:00:00:00 == 01:00:5e:00:00:00 drop
    ether daddr 33:33:00:00:00:fb drop
  }
}
"""
"""Of IPv6 that of mDNS alone: neighbours on the internet find each other by multicast."""


def missing() -> str:
    """Why there can be no lab on this machine; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a lab is made of Linux's network namespaces, by root"
    for command, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(command) is None:
            return f"no command `{command}` (Debian: apt install {package})"
    try:
        with Lab() as lab:
            lab.network("symmetric")
    except (OSError, RuntimeError) as exc:
        return f"this system lets nobody make a network namespace with NAT: {exc}"
    return ""


@dataclass(eq=False)
class Network:
    """A switch, and the addresses that it gives.

    Attributes:
        kind: One of KINDS (probe.py), or "isolated".
        switch: The namespace where its ports are.
        prefix: The first three bytes of its addresses.
        gateway: The default route of its machines; empty: none.
        address: Its router's on the internet, if it has one.
        last: Of the addresses, the last byte of the one given last.
        prefix6: The first eight bytes of its IPv6 addresses, if it gives any.
    """

    kind: str
    switch: int
    prefix: str
    gateway: str = ""
    address: str = ""
    last: int = 0
    prefix6: str = ""


@dataclass(eq=False)
class Host:
    """A machine with one interface, `eth0`."""

    namespace: int
    network: Network
    address: str

    @property
    def address6(self) -> str:
        """Empty: none."""
        prefix, last = self.network.prefix6, self.address.rpartition(".")[2]
        return prefix and f"{prefix}::{last}"


class Lab:
    """Networks and machines. The internet is there from the start.

    Args:
        delay_ms: Of every packet over the internet, one way; by a switch in Python, so with some
            10,000 packets/s at most.
    """

    def __init__(self, delay_ms: float = 0) -> None:
        self.hosts: dict[str, Host] = {}
        self._delay_s = delay_ms / 1000
        self._stack = contextlib.ExitStack()
        self._networks = self._cables = 0

    def __enter__(self) -> Lab:
        with self._stack:
            self.internet = Network("open", self._namespace(), INTERNET, NOWHERE[0])
            if self._delay_s:
                self._delay(self.internet.switch)
            else:
                self._ip(self.internet.switch, "link add lan type bridge", "link set lan up")
                self._nft(self.internet.switch, NO_MULTICAST)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def network(self, kind: str, prefix: str = "", *, forget_s: int = 0, ip6: str = "") -> Network:
        """A network of its own, such as a home's.

        Args:
            kind: What its router does, one of KINDS; "full-cone" sends what comes in to the first
                machine. "isolated": there is no router, and no way out.
            prefix: Of its addresses, e.g. "192.168.1"; one that no other has if left out.
            forget_s: After how long without a packet the router forgets a connection, and drops
                what still comes of it. 0: after five days.
            ip6: "routed": its machines have IPv6 as well, and anybody reaches them there; "broken":
                they have the addresses and the route, and all is lost.
        """
        self._networks += 1
        router = self._namespace()
        network = Network(kind, router, prefix or f"10.{self._networks}.0")
        self._ip(router, "link add lan type bridge", "link set lan up")
        if kind == "isolated":
            return network
        network.gateway, network.last = f"{network.prefix}.1", 1
        self._ip(router, f"address add {network.gateway}/24 dev lan")
        dnat = f"iifname wan dnat to {network.prefix}.2;" if kind == "full-cone" else ""
        masquerade = "random,fully-random" if kind == "symmetric" else ""
        self._nft(router, ROUTER.format(dnat=dnat, masquerade=masquerade))
        with _inside(router):
            _sysctl("net/ipv4/ip_forward", 1)
            if forget_s:
                # Else a packet from inside, without a beginning, is a connection that it remembers.
                _sysctl("net/netfilter/nf_conntrack_tcp_loose", 0)
                for what in ("tcp_timeout_established", "udp_timeout", "udp_timeout_stream"):
                    _sysctl(f"net/netfilter/nf_conntrack_{what}", forget_s)
        network.address = self._plug(router, "wan", self.internet)
        if ip6:
            network.prefix6 = f"{INTERNET6}:{self._networks}"
            self._router6(network)
            if ip6 == "broken":
                self._nft(router, BROKEN6)
        return network

    def _router6(self, network: Network) -> None:
        """It answers for its machines on the internet, which is one link."""
        last = network.address.rpartition(".")[2]
        with _inside(network.switch):
            _sysctl("net/ipv6/conf/all/forwarding", 1)
            for interface in ("lan", "wan"):
                _enable6(interface)
            _sysctl("net/ipv6/conf/wan/proxy_ndp", 1)
            _sysctl("net/ipv6/neigh/wan/proxy_delay", 0)
        self._ip(
            network.switch,
            f"address add {network.prefix6}::1/64 dev lan nodad",
            f"address add {INTERNET6}::{last}/48 dev wan nodad",
        )

    def host(self, name: str, network: Network | None = None) -> Host:
        """A new machine: on the internet itself, if no network is given."""
        namespace, network = self._namespace(), network or self.internet
        host = Host(namespace, network, self._plug(namespace, "eth0", network))
        self.hosts[name] = host
        return host

    def move(self, name: str, network: Network) -> None:
        """Plug a machine into another network, or anew into its own; it gets another address."""
        host = self.hosts[name]
        self._ip(host.namespace, "link delete eth0")
        host.network, host.address = network, self._plug(host.namespace, "eth0", network)

    def link(self, name: str, *, up: bool) -> None:
        """Switch off the interface of a machine, or on again with the address that it had."""
        host = self.hosts[name]
        if up:
            self._up(host.namespace, "eth0", host.network)
        else:
            self._ip(host.namespace, "link set eth0 down")

    def admit_new(self, name: str, *, allowed: bool) -> None:
        """Whether a machine's router lets new connections out; those that exist go on anyway."""
        rule = "" if allowed else "ct state new drop;"
        self._nft(self.hosts[name].network.switch, BLOCK.format(rule=rule))

    def part(self, some: Collection[str]) -> None:
        """Nothing gets through between these machines on the internet and the others there."""
        there = {name: h.address for name, h in self.hosts.items() if h.network is self.internet}
        here = ", ".join(there.pop(name) for name in some)
        beyond = ", ".join(there.values())
        rules = ""
        if here and beyond:
            rules = f"ip saddr {{ {here} }} ip daddr {{ {beyond} }} drop; "
            rules += f"ip saddr {{ {beyond} }} ip daddr {{ {here} }} drop;"
        self._nft(self.internet.switch, PARTED.format(rules=rules))

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """What this thread starts and opens meanwhile is on that machine: processes, sockets.

        The files are those of the host. So a unix socket is reached from every machine.
        """
        with _inside(self.hosts[name].namespace):
            yield

    def _namespace(self) -> int:
        """A new one, until the end of the lab."""
        with _inside(None):
            namespace = os.open(THIS_NAMESPACE, os.O_RDONLY)
            self._stack.callback(os.close, namespace)
            with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
                _sysctl("net/ipv6/conf/all/disable_ipv6", 1)
                _sysctl("net/ipv6/conf/default/disable_ipv6", 1)
        self._ip(namespace, "link set lo up")
        return namespace

    def _plug(self, namespace: int, interface: str, network: Network) -> str:
        """Connect an interface, made for it, with a network; returns its address there."""
        self._cables += 1
        port, switch = f"port{self._cables}", f"/proc/{os.getpid()}/fd/{network.switch}"
        self._ip(namespace, f"link add {interface} type veth peer name {port} netns {switch}")
        master = "" if network is self.internet and self._delay_s else "master lan"
        self._ip(network.switch, f"link set {port} {master} up")
        network.last += 1
        address = f"{network.prefix}.{network.last}"
        self._ip(namespace, f"address add {address}/24 dev {interface}")
        if network.prefix6:
            with _inside(namespace):
                _enable6("lo")
                _enable6(interface)
            address6 = f"{network.prefix6}::{network.last}"
            self._ip(namespace, f"address add {address6}/64 dev {interface} nodad")
            self._ip(network.switch, f"neighbour add proxy {address6} dev wan")
        self._up(namespace, interface, network)
        return address

    def _up(self, namespace: int, interface: str, network: Network) -> None:
        commands = [f"link set {interface} up"]
        if network.gateway == NOWHERE[0]:
            commands.append("neighbour replace {} lladdr {} dev {}".format(*NOWHERE, interface))
        if network.gateway:
            commands.append(f"route replace default via {network.gateway}")
        if network.prefix6:
            commands.append(f"route replace default via {network.prefix6}::1 dev {interface}")
        self._ip(namespace, *commands)

    def _delay(self, namespace: int) -> None:
        script = Path(__file__).with_name("switch.py")
        command = [sys.executable, str(script), str(self._delay_s)]
        with _inside(namespace):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=end_with_parent)
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline(), "the switch has not started"

    def _ip(self, namespace: int, *commands: str) -> None:
        with _inside(namespace):
            _run(["ip", "-batch", "-"], "\n".join(commands))

    def _nft(self, namespace: int, rules: str) -> None:
        with _inside(namespace):
            _run(["nft", "-f", "-"], rules)


@contextlib.contextmanager
def _inside(namespace: int | None) -> Iterator[None]:
    """This thread, and what it starts, is in a namespace: a new one if None.

    `os.setns` and `os.unshare` are there from Python 3.12 on only.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(failed: int) -> None:
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    before = os.open(THIS_NAMESPACE, os.O_RDONLY)
    try:
        if namespace is None:
            check(libc.unshare(CLONE_NEWNET))
        else:
            check(libc.setns(namespace, CLONE_NEWNET))
        try:
            yield
        finally:
            check(libc.setns(before, CLONE_NEWNET))
    finally:
        os.close(before)


def _run(command: list[str], stdin: str) -> None:
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{stdin}")


def _sysctl(name: str, value: int) -> None:
    Path("/proc/sys", name).write_text(str(value))


def _enable6(interface: str) -> None:
    """With the addresses that it is given, at once."""
    for name, value in (("accept_dad", 0), ("accept_ra", 0), ("disable_ipv6", 0)):
        _sysctl(f"net/ipv6/conf/{interface}/{name}", value)
