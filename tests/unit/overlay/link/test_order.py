"""The order in which addresses are dialled."""

from __future__ import annotations

import ipaddress

from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key
from wetware.overlay.link.order import in_order

HOME = [ipaddress.ip_interface("192.168.1.7/24"), ipaddress.ip_interface("2600:7::7/64")]


def order(*texts: str) -> list[str]:
    kinds = {True: "ip6", False: "ip4"}
    addrs = [Multiaddr("dns" if "example" in t else kinds[":" in t], t, 4001) for t in texts]
    return [addr.host for addr in in_order(addrs, lambda: HOME)]


def test_families_take_turns_from_ip6_on() -> None:
    given = ("203.1.1.1", "203.1.1.2", "2600::1", "node.example.org", "2600::2")
    assert order(*given) == ["2600::1", "203.1.1.1", "2600::2", "203.1.1.2", "node.example.org"]


def test_the_own_network_is_first_and_other_private_ones_and_loopback_are_last() -> None:
    given = ("127.0.0.1", "10.0.0.5", "fd12::5", "203.1.1.1", "192.168.1.9", "2600:7::9")
    assert order(*given) == [
        "2600:7::9", "192.168.1.9", "203.1.1.1", "fd12::5", "10.0.0.5", "127.0.0.1",
    ]  # fmt: skip


def test_otherwise_the_order_is_kept_and_failing_to_look_is_no_failure() -> None:
    assert order("203.1.1.2", "203.1.1.1") == ["203.1.1.2", "203.1.1.1"]

    def fails() -> list[ipaddress.IPv4Interface]:
        raise OSError

    addrs = [Multiaddr("ip4", "192.168.1.9", 1), Multiaddr("ip4", "203.1.1.1", 1)]
    assert in_order(addrs, fails) == addrs[::-1]


def test_the_first_relay_is_third_and_others_are_last() -> None:
    hub = Multiaddr("ip4", "203.1.1.9", 1, Key.from_seed(bytes(32)).peer_id)
    relays = [hub.through(), hub.with_peer(Key.from_seed(bytes([1]) * 32).peer_id).through()]
    direct = [Multiaddr("ip4", f"203.1.1.{n}", 1) for n in range(3)]
    assert in_order([*relays, *direct], lambda: HOME) == [
        *direct[:2], relays[0], direct[2], relays[1]
    ]  # fmt: skip
    assert in_order(relays, lambda: HOME) == relays
