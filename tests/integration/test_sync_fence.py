"""Who held a lock, and goes on as if nothing had been, writes nothing: at the store, nor elsewhere.

The lock's home is `a`, the service with state at `c`, and the two holders log in at `b` and at `a`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import wetware
from wetware.broker.fences import Fence
from wetware.errors import Disconnected, InvalidArgument, Unsupported, WetwareError
from wetware.identity import Key
from wetware.testing import Home, NodeProcess
from wetware_sync.engine import Closed, LeaseEnded
from wetware_sync.errors import HomeDown
from wetware_sync.fencing import Hold

from . import holders
from .holders import FENCED, LOCK, PATH, WRITTEN, Holder, found, holding, ledger_of, shown, write

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

Trio = tuple[NodeProcess, NodeProcess, NodeProcess]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return holders.install(tmp_path_factory.mktemp("plugin") / "site")


@contextlib.contextmanager
def three(path: Path, schema: Path) -> Iterator[Trio]:
    env = {"PYTHONPATH": str(schema.parents[1])}
    with Home(path, env=env, libp2p=False) as home, contextlib.ExitStack() as stack:
        a = stack.enter_context(home.node("a"))
        b, c = (stack.enter_context(home.node(name, join=a)) for name in "bc")
        for node in (a, b, c):
            node.wait_members([a.peer_id, b.peer_id, c.peer_id])
        yield a, b, c


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory, schema: Path) -> Iterator[Trio]:
    with three(tmp_path_factory.mktemp("home"), schema) as running:
        yield running


@contextlib.asynccontextmanager
async def at(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(
        data_dir=node.data_dir, key=node.home.key(), reconnect=True
    ) as session:
        yield session


async def test_a_service_of_one_node_is_fenced_while_the_block_lasts(
    trio: Trio, schema: Path
) -> None:
    a, b, _ = trio
    async with at(a) as one, at(b) as other:
        async with one.node("name=c") as there, other.node("name=c") as there_too:
            async with one.sync.lock("block") as held:
                part = await held.fence(there, {"ledger": ()})
                mine = await ledger_of(part, schema)
                await mine.append(line="first")
                (fenced,) = [g for g in await there.grants() if g.label == "while block is held"]
                assert any("fence lock/block" in term for term in fenced.terms)
            with pytest.raises(WetwareError):  # it ended with the block
                await mine.append(line="late")
            assert fenced.id not in {grant.id for grant in await there.grants()}
            with pytest.raises(LeaseEnded, match="not held any more"):
                await held.fence(there, {"ledger": ()})
            async with other.sync.election("block") as leader:
                part = await leader.fence(there_too, {"ledger": ()})
                await (await ledger_of(part, schema)).append(line="second")
        async with one.node("name=c") as there:
            assert (await (await ledger_of(there, schema)).read())["lines"] == ["first", "second"]


async def test_what_many_nodes_have_in_common_takes_no_token(trio: Trio) -> None:
    _, b, _ = trio
    async with at(b) as session, session.sync.lock("many") as held:
        for service in ("pubsub", "blob", "kv", "kv:/shop/", "proc", "cluster"):
            with pytest.raises(Unsupported, match="no broker sees all calls") as refused:
                await held.fence(session, {service: ()})
            assert refused.value.code == "unsupported.fence"
        with pytest.raises(Unsupported, match="'pubsub'"):
            await held.fence(session, {"ledger": (), "pubsub": ()})
        with pytest.raises(Unsupported, match=r"'\*'"):  # whatever there is, and comes
            await held.fence(session)
    async with at(b) as session, session.sync.semaphore("many", 2) as held:
        with pytest.raises(Unsupported, match="several may hold"):
            await held.fence(session, {"ledger": ()})


async def test_a_paused_holder_writes_nothing_with_its_old_token(trio: Trio, schema: Path) -> None:
    a, b, _ = trio
    async with holding(b, schema) as old:
        assert await old.write("one") == WRITTEN
        old.pause()
        async with at(a) as session, session.sync.lock(LOCK, wait_s=30) as held:
            assert await write(session, held, "two", schema) == WRITTEN
            old.go_on()
            await refused(old, "three")
            assert await write(session, held, "four", schema) == WRITTEN
            after = await found(session, schema)
            assert (after["kv"], after["name"]) == ("four", "four")
            assert after["ledger"][-3:] == ["one", "two", "four"]


async def test_a_forged_token_and_that_of_another_lock(trio: Trio, schema: Path) -> None:
    a, b, _ = trio
    async with at(a) as session, at(b) as other:
        async with other.sync.lock("another") as before:
            pass
        async with session.sync.lock("real", wait_s=30) as held, other.sync.lock("another") as own:
            assert await write(session, held, "real", schema) == WRITTEN
            raw = await held.token()
            token, hold = Fence.decode(raw), Hold.decode(held.hold)
            assert (token.lock, token.mark) == ("lock/real", (hold.epoch, held.revision))
            signed = token.signature
            for forged in (
                Fence(token.authority, token.epoch, token.lock, token.counter + 1, signed),
                Fence(token.authority, token.epoch + 1, token.lock, token.counter, signed),
                Fence(token.authority, token.epoch, "lock/another", token.counter, signed),
            ):
                with pytest.raises(InvalidArgument, match="signature") as refused:
                    await other.attenuate({"ledger": ()}, fence=forged.encode())
                assert refused.value.code == "invalid.fence"
            # A key of one's own signs tokens of locks of one's own; they outrank nobody's.
            key = Key.generate()
            theirs = Fence.issue(key, token.lock, epoch=token.epoch + 9, counter=2**40).encode()
            assert (await write(other, shown(own.hold, theirs), "x", schema))["ledger"] == "written"
            # Nor does one of another lock, though it is a later one.
            assert own.revision > held.revision
            assert (await write(other, own, "y", schema))["ledger"] == "written"
            assert await write(session, held, "still", schema) == WRITTEN
            # At the store: another revision, key or epoch than what is held; and what was.
            for wrong in (
                Hold(hold.epoch, hold.revision + 1, hold.key),
                Hold(hold.epoch, hold.revision, Hold.decode(own.hold).key),
                Hold(hold.epoch, hold.revision, hold.key[:-1] + bytes([hold.key[-1] ^ 1])),
                Hold(hold.epoch + 1, hold.revision, hold.key),
                Hold(hold.epoch, 2**64 - 1, hold.key),
                Hold.decode(before.hold),
            ):
                said = await write(other, shown(wrong.encode(), raw), "no", schema)
                assert (said["kv"], said["name"]) == (FENCED["kv"], FENCED["name"])
            entry = await other.kv.get(PATH)
            assert entry is not None
            for junk in (
                b"junk",
                held.hold[:-1],
                raw,
                Hold(hold.epoch, 0, hold.key[:-1]).encode(),  # as that of each key there is not
                Hold(hold.epoch, entry.created, b"k" + PATH.encode()).encode(),  # no lock's
            ):
                said = await write(other, shown(junk, raw), "no", schema)
                assert (said["kv"], said["name"]) == ("invalid.hold", "invalid.hold")


@pytest.mark.long
async def test_a_paused_holder_writes_nothing_after_restarts_and_a_restore(
    tmp_path: Path, schema: Path
) -> None:
    """Of the lock's home, of the service's node, and of the store's copy, made while it held."""
    copy = tmp_path / "copy"
    with three(tmp_path / "home", schema) as (a, b, c), contextlib.ExitStack() as stack:
        async with at(b) as session, holding(b, schema) as old:
            assert await old.write("one") == WRITTEN
            await session.kv.backup(copy)
            for _ in range(20):  # of which the copy knows nothing
                await session.kv.put("/counted", b"")
            old.pause()
            async with session.sync.lock(LOCK, wait_s=30) as held:
                assert await write(session, held, "two", schema) == WRITTEN
                second, revision = shown(held.hold, await held.token()), held.revision
            old.go_on()

            c.stop(signal.SIGKILL)
            c = stack.enter_context(a.home.node("c", peers=[a.addr]))
            for node in (a, b):
                node.wait_members([c.peer_id])
            await refused(old, "three")
            a.stop(signal.SIGKILL)
            a = stack.enter_context(a.home.node("a", peers=[b.addr, c.addr]))
            await opened(session)
            await refused(old, "four")

            await session.kv.restore(copy)
            await opened(session)
            await refused(old, "five")
            async with at(b) as fresh:
                for _ in range(2):  # one who only had to wait, and one who comes after it
                    async with fresh.sync.lock(LOCK, wait_s=30) as held:
                        assert Hold.decode(held.hold).epoch == 2
                        assert held.revision < revision  # it counts from the copy
                        assert await write(fresh, held, "six", schema) == WRITTEN
                        await refused(old, "seven")
                        assert await write(fresh, second, "eight", schema) == FENCED
                after = await found(fresh, schema)
            assert (after["kv"], after["name"]) == ("six", "six")
            assert after["ledger"] == ["one", "two", "six", "six"]


async def refused(old: Holder, text: str) -> None:
    """All of its writes are, as soon as it reaches those that decide; none is written before."""
    async with asyncio.timeout(60):
        while (said := await old.write(text)) != FENCED:
            assert "written" not in said.values()
            await asyncio.sleep(0.05)


async def opened(session: wetware.Session) -> None:
    """The store is open."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(HomeDown, Closed, Disconnected):
                await session.kv.status()
                return
            await asyncio.sleep(0.05)
