"""The peer store and the incarnation: what survives a restart, damage, and a flood."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key, PeerId
from wetware.overlay.membership import peers
from wetware.overlay.membership.peers import (
    ADDRS_MAX,
    INCARNATION_MAX,
    WORKED_MAX,
    IncarnationFile,
    PeerStore,
)

pytestmark = pytest.mark.anyio

NOW_MS = 1_800_000_000_000
FIXED = Key.from_seed(bytes(32)).peer_id


def peer_id() -> PeerId:
    return Key.generate().peer_id


def addr(port: int, host: str = "192.0.2.1") -> Multiaddr:
    return Multiaddr("ip4", host, port)


def store_at(path: Path, *, now_ms: int = NOW_MS, peers_max: int = 16) -> PeerStore:
    store = PeerStore(path / "peers.json", unix_ms=lambda: now_ms, peers_max=peers_max)
    store.load()
    return store


async def test_a_restart_knows_the_peers_and_their_order(tmp_path: Path) -> None:
    first, second = peer_id(), peer_id()
    store = store_at(tmp_path)
    store.named(first, [addr(1), addr(2)])
    store.named(second, [addr(3)])
    store.worked(first, addr(2))
    assert store.dirty
    await store.save()
    assert not store.dirty
    again = store_at(tmp_path)
    assert again.peers() == (first, second)  # the one seen last first
    assert again.addrs(first) == (addr(2).with_peer(first), addr(1).with_peer(first))
    assert again.addrs(second) == (addr(3).with_peer(second),)
    assert again.addrs(peer_id()) == ()
    assert not again.dirty
    assert stat.S_IMODE((tmp_path / "peers.json").stat().st_mode) == 0o600


async def test_writing_does_not_wait_for_names_that_nobody_answers_for(tmp_path: Path) -> None:
    loop, small, answered = asyncio.get_running_loop(), ThreadPoolExecutor(1), threading.Event()
    loop.set_default_executor(small)  # asyncio looks up host names in it
    lookup = loop.run_in_executor(None, answered.wait, 20)
    store = store_at(tmp_path)
    store.named(peer_id(), [addr(1)])
    try:
        async with asyncio.timeout(60):
            await store.save()
    finally:
        answered.set()
        await lookup
    assert len(store_at(tmp_path).peers()) == 1


def test_what_is_named_now_comes_before_what_worked_once(tmp_path: Path) -> None:
    peer, store = peer_id(), store_at(tmp_path)
    store.named(peer, [addr(1)])
    store.worked(peer, addr(1))
    store.named(peer, [addr(2), addr(3)])  # it moved
    assert [a.port for a in store.addrs(peer)] == [2, 3, 1]
    store.worked(peer, addr(3))
    assert [a.port for a in store.addrs(peer)] == [3, 2, 1]


def test_a_peer_may_name_many_addresses_and_few_are_kept(tmp_path: Path) -> None:
    peer, store = peer_id(), store_at(tmp_path)
    for port in range(1, 50):
        store.worked(peer, addr(port))
    store.named(peer, [addr(port) for port in range(100, 200)])
    assert len(store.addrs(peer)) == ADDRS_MAX
    store.named(peer, [])
    assert len(store.addrs(peer)) == WORKED_MAX


def test_the_store_is_bounded_and_drops_who_was_not_seen_for_longest(tmp_path: Path) -> None:
    store = store_at(tmp_path, peers_max=4)
    known = [peer_id() for _ in range(4)]
    for peer in known:
        store.named(peer, [addr(1)])
    store.worked(known[0], addr(1))  # seen again
    newcomer = peer_id()
    store.named(newcomer, [addr(1)])
    assert store.peers() == (newcomer, known[0], known[3], known[2])
    assert len(store.peers()) == 4


@pytest.mark.parametrize("age_days", [29, 31])
async def test_a_peer_not_seen_for_a_month_is_forgotten(tmp_path: Path, age_days: int) -> None:
    store, peer = store_at(tmp_path), peer_id()
    store.named(peer, [addr(1)])
    await store.save()
    later = store_at(tmp_path, now_ms=NOW_MS + age_days * 86_400_000)
    assert (peer in later.peers()) is (age_days < 30)


def entry(**changed: object) -> bytes:
    fields = {"peer": FIXED, "worked": [], "named": ["/ip4/192.0.2.1/tcp/1"], "seen_ms": NOW_MS}
    return json.dumps({"version": 1, "peers": [fields | changed]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 2, "peers": []}',
        b'{"version": 1}',
        b'{"version": 1, "peers": [1]}',
        b'{"version": 1, "peers": [{}]}',
        entry(peer="12D3KooWjunk"),
        entry(named="no list"),
        entry(named=["/ip4/192.0.2.1"]),
        entry(worked=[1]),
        entry(seen_ms=None),
        entry(seen_ms=True),
        b"[" * 100_000,
    ],
)
def test_a_damaged_store_is_set_aside_and_rebuilt(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "peers.json"
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "wetware"):
        store = store_at(tmp_path)
    assert [record.getMessage() for record in caplog.records] == ["peers.damaged"]
    assert store.peers() == ()
    assert (tmp_path / "peers.json.damaged").read_bytes() == content
    peer = peer_id()
    store.named(peer, [addr(1)])
    store.save_now()
    assert store_at(tmp_path).peers() == (peer,)


def test_a_huge_store_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "FILE_BYTES_MAX", 1000)
    (tmp_path / "peers.json").write_bytes(b" " * 5000)
    assert store_at(tmp_path).peers() == ()
    assert (tmp_path / "peers.json.damaged").exists()


async def test_a_store_that_cannot_be_written_is_tried_again_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    store = store_at(folder)
    store.named(peer_id(), [addr(1)])
    with caplog.at_level(logging.WARNING, "wetware"):
        await store.save()
        await store.save()
    assert [record.getMessage() for record in caplog.records] == ["peers.unwritable"]
    assert store.dirty
    folder.mkdir()
    await store.save()
    assert not store.dirty
    assert len(store_at(folder).peers()) == 1


async def test_forgetting_is_durable(tmp_path: Path) -> None:
    store, peer = store_at(tmp_path), peer_id()
    store.named(peer, [addr(1)])
    await store.save()
    store.forget(peer)
    store.forget(peer)
    await store.save()
    assert peer not in store_at(tmp_path).peers()


# --- incarnations ---


def test_incarnations_rise_by_the_clock_and_without_it(tmp_path: Path) -> None:
    path = tmp_path / "incarnation"
    first = IncarnationFile(path).begin(1000)
    assert first == 1000
    second = IncarnationFile(path).begin(10)  # the clock was set back
    assert second > first
    assert IncarnationFile(path).begin(NOW_MS) == NOW_MS


def test_refutations_are_covered_too(tmp_path: Path) -> None:
    path = tmp_path / "incarnation"
    file = IncarnationFile(path)
    used = file.begin(1000)
    for _ in range(5000):
        used += 1
        file.used(used)
    assert IncarnationFile(path).begin(1000) > used


@pytest.mark.parametrize("content", [b"", b"x", b"-5", b"%d" % INCARNATION_MAX, b"9" * 100])
def test_a_damaged_incarnation_falls_back_to_the_clock(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "incarnation"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "wetware"):
        assert IncarnationFile(path).begin(NOW_MS) == NOW_MS
    assert [record.getMessage() for record in caplog.records] == ["incarnation.unreadable"]


def test_an_incarnation_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "wetware"):
        assert IncarnationFile(tmp_path / "no" / "incarnation").begin(NOW_MS) == NOW_MS
    assert [record.getMessage() for record in caplog.records] == ["incarnation.unwritable"]
