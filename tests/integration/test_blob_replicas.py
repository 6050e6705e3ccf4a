"""Copies of pins at other members, by real nodes: made, made again, dropped, handed over."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

import wetware
from wetware.errors import EXIT_DENIED, EXIT_FAILED, EXIT_UNREACHABLE, EXIT_USAGE, WetwareError
from wetware.testing import Home, NodeProcess
from wetware_blob.client import Pin
from wetware_blob.replicas.duties import LEASE_S
from wetware_blob.replicas.keeper import STALLED_S

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

MIB = 1 << 20
GRACE_S = 3.0
ENV = {"WW_PLUGINS_BLOB_GRACE_S": str(GRACE_S)}
MADE_S = 60.0
"""Copies are made again within the grace, the time to see that a member is dead, and a few rounds;
on a loaded machine."""


@contextlib.contextmanager
def cluster(path: Path, count: int, env: dict[str, str] = ENV) -> Iterator[list[NodeProcess]]:
    with Home(path, env, libp2p=False) as home, contextlib.ExitStack() as stack:
        first = stack.enter_context(home.node("n0"))
        joined = [home.start_node(f"n{i}", join=first) for i in range(1, count)]
        for node in joined:
            stack.callback(node.stop)
            node.wait_ready()
        nodes = [first, *joined]
        for node in nodes:
            node.wait_members([other.peer_id for other in nodes if other is not node])
        yield nodes


@contextlib.asynccontextmanager
async def at(node: NodeProcess):  # type: ignore[no-untyped-def]  # of sessions
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        yield session


async def has(node: NodeProcess, cid: str) -> bool:
    """Whether it has the blob on its own disk."""
    async with at(node) as session, session.blob.open(cid, local=True) as blob:
        try:
            await blob.read()
        except WetwareError:
            return False
        return True


async def pins_of(session: wetware.Session, cid: str) -> Pin:
    (pin,) = await session.blob.pins(cid)
    return pin


async def until_held(session: wetware.Session, cid: str, holders: set[str]) -> None:
    """Wait until these have it, as the node knows."""
    with anyio.fail_after(MADE_S):
        while set((await pins_of(session, cid)).holders) != holders:
            await anyio.sleep(0.1)


async def until_gone(node: NodeProcess, cid: str) -> None:
    """Wait until it does not keep it any more."""
    with anyio.fail_after(MADE_S):
        while True:
            async with at(node) as session:
                await session.blob.gc()
            if not await has(node, cid):
                return
            await anyio.sleep(0.2)


async def test_copies_are_made_made_again_and_dropped(tmp_path: Path) -> None:
    with cluster(tmp_path, 4) as nodes:
        home, by_id = nodes[0], {str(node.peer_id): node for node in nodes}
        async with at(home) as session:
            put = await session.blob.put(os.urandom(3 * MIB), copies=3, ack=3)
            assert put.copies == 3
            before = set((await pins_of(session, put.cid)).holders)
            assert len(before) == 3
            assert str(home.peer_id) in before
            for peer, node in by_id.items():
                assert await has(node, put.cid) == (peer in before)

            victim = by_id[next(iter(before - {str(home.peer_id)}))]
            spare = next(iter(by_id.keys() - before))
            victim.stop(signal.SIGKILL)
            wanted = before - {str(victim.peer_id)} | {spare}
            await until_held(session, put.cid, wanted)
            assert await has(by_id[spare], put.cid)

            back = home.home.start_node(victim.data_dir.name).wait_ready()
            by_id[str(back.peer_id)] = back
            with anyio.fail_after(MADE_S):
                while True:  # one of them goes, and never one more
                    holders = (await pins_of(session, put.cid)).holders
                    assert len(holders) >= 3
                    keep = [peer for peer, node in by_id.items() if await kept(node, put.cid)]
                    assert len(keep) >= 3
                    if len(keep) == 3:
                        break
                    await anyio.sleep(0.1)

            await session.blob.unpin(put.cid)
            for node in by_id.values():
                await until_gone(node, put.cid)


async def kept(node: NodeProcess, cid: str) -> bool:
    async with at(node) as session:
        return any(pin.root == cid for pin in (await session.blob.all())[0])


@pytest.mark.long
async def test_the_home_dies_and_the_holders_make_a_copy_for_it(tmp_path: Path) -> None:
    with cluster(tmp_path, 4) as nodes:
        home = nodes[0]
        async with at(home) as session:
            put = await session.blob.put(os.urandom(MIB), copies=3, ack=3)
        assert sum([await has(node, put.cid) for node in nodes[1:]]) == 2
        home.stop(signal.SIGKILL)
        with anyio.fail_after(MADE_S):
            while not all([await has(node, put.cid) for node in nodes[1:]]):
                await anyio.sleep(0.2)


async def test_a_home_whose_store_was_lost_does_not_give_up_what_others_keep(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path, 3) as nodes:
        home, *others = nodes
        async with at(home) as session:
            put = await session.blob.put(data := os.urandom(MIB), copies=2, ack=2)
        home.stop()
        shutil.rmtree(home.data_dir / "plugins" / "blob" / "store")
        again = home.home.start_node(home.data_dir.name).wait_ready()
        with anyio.fail_after(MADE_S):  # as for a home that is gone
            while not all([await kept(node, put.cid) for node in others]):
                await anyio.sleep(0.2)
        assert not await kept(again, put.cid)
        async with at(again) as session:
            await session.blob.pin(put.cid)
            async with session.blob.open(put.cid, local=True) as blob:
                assert await blob.read() == data


async def test_a_member_without_room_is_passed_over(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as (home, roomy):
        small = Home(tmp_path, {**ENV, "WW_PLUGINS_BLOB_OWNER_BYTES_MAX": str(MIB)}, libp2p=False)
        with small, small.node("small", join=home.invite()) as full:
            home.wait_members([full.peer_id])
            async with at(home) as session:
                for _ in range(4):  # in any order of the two
                    put = await session.blob.put(os.urandom(2 * MIB), copies=2, ack=2)
                    holders = set((await pins_of(session, put.cid)).holders)
                    assert holders == {str(home.peer_id), str(roomy.peer_id)}


@pytest.mark.long
async def test_only_members_that_match_keep_copies(tmp_path: Path) -> None:
    """Also where one of them dies, and others are there."""
    with Home(tmp_path, ENV, libp2p=False) as home, contextlib.ExitStack() as stack:
        first = stack.enter_context(home.node("n0"))
        zones = {"n1": "x", "n2": "y", "n3": "x", "n4": "y", "n5": "x"}
        nodes = {"n0": first}
        for name, zone in zones.items():
            ticket = first.invite("--label", f"zone={zone}")
            nodes[name] = stack.enter_context(home.node(name, join=ticket))
        first.wait_members([node.peer_id for node in nodes.values() if node is not first])
        ids = {name: str(node.peer_id) for name, node in nodes.items()}
        async with at(first) as session:
            put = await session.blob.put(os.urandom(MIB), copies=3, ack=3, where="zone=x")
            holders = set((await pins_of(session, put.cid)).holders)
            assert len(holders) == 3
            assert holders < {ids[name] for name in ("n0", "n1", "n3", "n5")}
            victim = next(name for name in ("n1", "n3", "n5") if ids[name] in holders)
            nodes.pop(victim).stop(signal.SIGKILL)
            wanted = {ids[name] for name in ("n0", "n1", "n3", "n5")} - {ids[victim]}
            await until_held(session, put.cid, wanted)
            for node in nodes.values():
                assert await kept(node, put.cid) == (str(node.peer_id) in wanted)


@pytest.mark.long
async def test_copies_that_nobody_can_have_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    """Slow: STALLED_S is a minute."""
    # Not a grace of a few seconds, in which a loaded machine may not answer.
    with cluster(tmp_path, 2, {}) as (home, other):
        (tmp_path / "file").write_bytes(os.urandom(MIB))
        began = time.monotonic()
        terms = ("--replicas", "3", "--ack", "3")
        failed = home.ww("blob", "put", str(tmp_path / "file"), *terms, timeout=2 * STALLED_S)
        took_s = time.monotonic() - began
        assert failed.returncode not in (0, None)
        assert "2 of 3 members have it" in failed.stderr, failed.stderr
        assert "it is pinned here" in failed.stderr
        assert "try: " in failed.stderr
        assert STALLED_S <= took_s < STALLED_S + 20
        async with at(home) as session:
            ((pin, *more), _) = await session.blob.all()
            assert not more
            assert (pin.name, pin.copies) == ("file", 3)
            assert set(pin.holders) == {str(home.peer_id), str(other.peer_id)}


async def test_a_drain_hands_all_over(tmp_path: Path) -> None:
    with cluster(tmp_path, 3) as nodes:
        home = nodes[0]
        async with at(home) as session:
            one = await session.blob.put(os.urandom(MIB), copies=1)
            two = await session.blob.put(os.urandom(MIB), copies=2, ack=2)
            assert not any([await has(node, one.cid) for node in nodes[1:]])
        home.ww("blob", "drain", check=True)
        assert any([await has(node, one.cid) for node in nodes[1:]])
        assert all([await has(node, two.cid) for node in nodes[1:]])


@pytest.mark.long
async def test_who_is_evicted_or_leaves_hands_over_first(tmp_path: Path) -> None:
    with cluster(tmp_path, 4) as (asked, evicted, *others):
        whole = os.urandom(3 * MIB)

        async def put_at(node: NodeProcess) -> str:
            async with at(node) as session:
                return (await session.blob.put(whole)).cid  # one copy

        async def check(nodes: list[NodeProcess], cid: str) -> None:
            for node in nodes:
                async with at(node) as session, session.blob.open(cid) as blob:
                    assert await blob.read() == whole

        cid = await put_at(evicted)
        everybody = [asked, *others]
        assert not any([await has(node, cid) for node in everybody])
        done = asked.ww("evict", "--hand-over", "--yes", "n1", check=True)
        assert "blob: handing over: 1 pin left" in done.stderr
        assert evicted.process.wait(60) == EXIT_DENIED
        given = [await has(node, cid) for node in everybody]
        assert sum(given) == 1
        await check(everybody, cid)

        # Who was given it has promised to keep it for two minutes: another one leaves.
        leaver = others[given[1]]
        everybody.remove(leaver)
        whole = os.urandom(3 * MIB)
        cid = await put_at(leaver)
        done = leaver.ww("leave", "--hand-over", "--yes", check=True)
        assert "blob: handing over: 1 pin left" in done.stderr
        asked.wait_members([leaver.peer_id], "left")
        await check(everybody, cid)


async def test_of_two_members_one_takes_all_of_the_other(tmp_path: Path) -> None:
    """Also where two copies are wanted: there is nobody else."""
    with cluster(tmp_path, 2) as (asked, node):
        async with at(node) as session:
            one = await session.blob.put(os.urandom(MIB))
            two = await session.blob.put(os.urandom(MIB), copies=2, ack=2)
            await session.blob.put(b"for nobody", name="bound", where="name=n1")
        refused = asked.start_ww("evict", "--hand-over", "--yes", "n1")
        for cid in (one.cid, two.cid):
            with anyio.fail_after(MADE_S):
                while not await has(asked, cid):
                    await anyio.sleep(0.2)
        refused.send_signal(signal.SIGINT)
        refused.communicate(timeout=60)
        asked.wait_members([node.peer_id])  # what only it may have keeps it
        async with at(node) as session:
            (bound,) = [pin for pin in await session.blob.pins() if pin.name == "bound"]
            await session.blob.unpin(bound.root)
        # The node may have promised to keep what the other one has let go of after the first try.
        asked.ww("evict", "--hand-over", "--yes", "n1", check=True, timeout=60 + LEASE_S)
        assert await has(asked, one.cid)
        assert await has(asked, two.cid)


async def test_who_cannot_be_asked_is_not_evicted(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as (asked, node):
        async with at(node) as session:
            put = await session.blob.put(b"for one")
        refused = asked.ww("evict", "--hand-over", "--yes", "n0")
        assert refused.returncode == EXIT_USAGE
        assert "a node does not evict itself" in refused.stderr
        node.stop(signal.SIGKILL)
        for _ in range(2):  # also once it is known to be dead
            refused = asked.ww("evict", "--hand-over", "--yes", "n1")
            assert refused.returncode in (EXIT_FAILED, EXIT_UNREACHABLE)
            assert "stays a member; without --hand-over it goes" in refused.stderr
            asked.wait_members([node.peer_id], "dead")
        refused = node.ww("leave", "--hand-over", "--yes")
        assert refused.returncode == EXIT_UNREACHABLE
        assert "this node stays a member; without --hand-over it goes" in refused.stderr
        back = node.home.start_node("n1").wait_ready()
        try:
            asked.wait_members([back.peer_id])
            assert await has(back, put.cid)
        finally:
            back.stop()


async def test_a_drain_of_who_is_alone_is_refused(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as (node,):
        async with at(node) as session:
            await session.blob.put(b"x")
            with pytest.raises(WetwareError) as refused:
                await session.blob.drain()
            assert refused.value.code == "invalid.alone"
