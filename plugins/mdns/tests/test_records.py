from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key
from wetware_mdns.records import (
    STRINGS_MAX,
    TEXT_BYTES_MAX,
    Sighting,
    announceable,
    decode,
    encode,
)

PEER = Key.from_seed(bytes(32)).peer_id
CLUSTER = "ab" * 20


def addr(host: str, port: int = 4001, peer: object = PEER) -> str:
    return f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}/p2p/{peer}"


def strings(*items: bytes) -> bytes:
    return b"".join(bytes((len(item),)) + item for item in items)


@pytest.mark.parametrize(
    "bad",
    [
        addr("127.0.0.1"),
        addr("127.8.8.8"),
        addr("::1"),
        addr("::ffff:127.0.0.1"),
        addr("0.0.0.0"),  # noqa: S104 - an address, not a socket
        addr("::"),
        addr("224.0.0.251"),
        addr("255.255.255.255"),
        addr("ff02::fb"),
        addr("fe80::1"),
        addr("fe80::1%eth0"),
        addr("192.168.1.2", port=0),
        "/ip4/192.168.1.2/tcp/4001",
        f"/dns4/db.example.org/tcp/4001/p2p/{PEER}",
        f"/ip4/192.168.1.2/udp/4001/quic-v1/p2p/{PEER}",
        "/ip4/192.168.1.2/tcp/4001/p2p/nobody",
        "",
    ],
)
def test_what_is_neither_announced_nor_believed(bad: str) -> None:
    good = addr("192.168.1.2")
    assert announceable((bad, good), 8) == (Multiaddr.parse(good),)
    text = strings(b"dnsaddr=" + bad.encode(), b"dnsaddr=" + good.encode())
    assert decode(text, 8).addrs == (Multiaddr.parse(good),)


def test_a_relay_is_not_announced_as_this_machine() -> None:
    relayed = f"/ip4/192.168.1.3/tcp/4001/p2p/{PEER}/p2p-circuit/p2p/{PEER}"
    good = addr("192.168.1.2")
    assert announceable((relayed, good), 8) == (Multiaddr.parse(good),)


def test_private_addresses_are_announced_first_and_none_twice() -> None:
    given = [addr("8.8.8.8"), addr("10.0.0.1"), addr("2a00:1450::1"), addr("fd00::1")]
    expected = [given[1], given[3], given[0], given[2]]
    assert [str(a) for a in announceable((*given, *given), 8)] == expected
    assert [str(a) for a in announceable(given, 2)] == expected[:2]


def test_what_is_announced_is_understood() -> None:
    mine = announceable([addr(f"10.0.0.{i}") for i in range(1, 9)], 8)
    assert decode(encode(mine, CLUSTER), 8) == Sighting(CLUSTER, mine)


def test_an_announcement_fits_in_a_packet() -> None:
    mine = announceable([addr(f"2001:470:aaaa:bbbb:cccc:dddd:eeee:{i:x}") for i in range(64)], 64)
    text = encode(mine, CLUSTER)
    assert len(text) <= TEXT_BYTES_MAX
    sighting = decode(text, 64)
    assert sighting.cluster == CLUSTER
    assert sighting.addrs == mine[: len(sighting.addrs)]
    assert len(sighting.addrs) >= 6


def test_a_record_speaks_for_one_peer_and_is_bounded() -> None:
    other = Key.generate().peer_id
    text = strings(
        *(b"dnsaddr=" + addr("10.0.0.1", port, PEER).encode() for port in range(1, 5)),
        b"dnsaddr=" + addr("10.0.0.2", peer=other).encode(),
    )
    assert [a.port for a in decode(text, 3).addrs] == [1, 2, 3]
    assert {a.peer for a in decode(text, 9).addrs} == {PEER}
    late = strings(*[b"x"] * STRINGS_MAX, b"dnsaddr=" + addr("10.0.0.1").encode())
    assert decode(late, 8).addrs == ()


@given(st.binary(max_size=2048))
def test_any_bytes_are_read(text: bytes) -> None:
    decode(text, 8)


@given(st.lists(st.binary(max_size=255 - 8), max_size=8))
def test_any_addresses_are_read(items: list[bytes]) -> None:
    decode(strings(*(b"dnsaddr=" + item for item in items), b"wwcluster=\xff\x00"), 8)
