"""Where programs run, and who finds them there: three real nodes, of which one has little room."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import wetware
from wetware.errors import Denied, InvalidArgument, NotFound
from wetware.testing import Home, NodeProcess, wait_for
from wetware_proc import placement
from wetware_proc.client import Exit

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

WITHIN_S = 60.0
"""For what takes a second or two on an idle machine."""
MIB = 1 << 20

Nodes = tuple[NodeProcess, NodeProcess, NodeProcess]
Guests = Callable[[str], bytes]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """a and b, with zone=home, and c, with zone=cloud, which has room for one usual process."""
    labels = {"a": "zone=home", "b": "zone=home", "c": "zone=cloud"}
    small = {"WW_PLUGINS_PROC_MEMORY_BYTES_MAX": str(64 * MIB)}
    with Home(tmp_path_factory.mktemp("home"), libp2p=False) as home, contextlib.ExitStack() as on:
        a = on.enter_context(home.node("a", args=["--label", labels["a"]]))
        started = [
            home.start_node(
                name, join=a, args=["--label", labels[name]], env=small if name == "c" else {}
            )
            for name in ("b", "c")
        ]
        for node in started:
            on.callback(node.stop)
            node.wait_ready()
        all_ = a, *started
        for node in all_:
            node.wait_members([other.peer_id for other in all_], within_s=WITHIN_S)
        for node in all_:
            wait_for(
                lambda node=node: len(node.members("service=proc")) == 3, "all have the service"
            )
        yield a, started[0], started[1]


@contextlib.asynccontextmanager
async def at(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        yield session


def test_a_command_runs_at_the_node_with_the_label(
    nodes: Nodes, guests: Guests, tmp_path: Path
) -> None:
    a, _, c = nodes
    program = tmp_path / "hello.wasm"
    program.write_bytes(guests("hello"))
    done = a.ww("run", "--on", "zone=cloud", "--name", "there", str(program), check=True)
    assert done.stdout == "hello\n"
    found = json.loads(a.ww("ps", "--json", check=True).stdout)
    (there,) = [each for each in found["processes"] if each["name"] == "there"]
    assert (there["node"], there["node_name"]) == (c.peer_id, "c")
    assert "there" in a.ww("ps", check=True).stdout
    nowhere = a.ww("run", "--on", "zone=nowhere", str(program))
    assert (nowhere.returncode, "no member has room" in nowhere.stderr) == (1, True), nowhere.stderr
    assert a.ww("run", "--on", "=", str(program)).returncode == 2


async def test_processes_are_spread_and_a_full_node_is_passed_by(
    nodes: Nodes, guests: Guests
) -> None:
    a, b, c = nodes
    cat = guests("cat")
    async with at(a) as session, contextlib.AsyncExitStack() as stack:

        async def spawn(on: str, **options: int) -> None:
            there = await stack.enter_async_context(session.proc.at(on, cat, **options))
            await stack.enter_async_context(there.spawn(cat, **options))

        async def running() -> Counter[str]:
            heard = await session.proc.everywhere()
            assert heard.missing == ()
            return Counter(
                str(member.peer_id)
                for member, found in heard.answers
                for each in found
                if not each.exit.kind
            )

        await spawn("zone=home")
        await spawn("zone=home")
        assert await running() == {a.peer_id: 1, b.peer_id: 1}
        await spawn("any")
        assert await running() == {a.peer_id: 1, b.peer_id: 1, c.peer_id: 1}
        for _ in range(2):
            await spawn("any")  # c is full
        assert await running() == {a.peer_id: 2, b.peer_id: 2, c.peer_id: 1}
        with pytest.raises(NotFound, match="1 that match are full, c"):
            await placement.nodes(session, "zone=cloud")
        with pytest.raises(NotFound):
            await spawn("zone=home", memory_bytes=5 << 30)


async def test_the_best_is_where_least_goes_on() -> None:
    rooms: list[placement.Room] = []

    async def told(on: str, programs: list[str]) -> list[placement.Room]:
        return rooms

    proc = SimpleNamespace(rooms=told, sent=[])
    session = SimpleNamespace(proc=proc, identity=SimpleNamespace(node="self"))

    async def order(**changed: dict[str, object]) -> str:
        usual = {
            "running": 2,
            "processes": 9,
            "memory_bytes": 1 << 30,
            "processors": 2,
            "load": 3.0,
        }
        rooms[:] = [
            placement.Room(**{**usual, "node": n, "name": n, "prepared": (), **changed.get(n, {})})  # type: ignore[arg-type]  # what a test gives
            for n in "abc"
        ]
        found = await placement.nodes(session, "any")  # type: ignore[arg-type]  # what is used of one
        return "".join(room.node for room in found)

    assert await order(a={"running": 4}, b={"running": 3}) == "cba"
    assert await order(a={"running": 3}, b={"processors": 4}, c={"prepared": (False,)}) == "bca"
    assert await order(a={"load": 3.9}, b={"running": 3}, c={"running": 4}) == "abc", "as by chance"
    assert await order(a={"load": 9.0}, b={"running": 3}, c={"running": 4}) == "bca"
    assert await order(a={"processes": 0}, b={"memory_bytes": 63 * MIB}) == "c"
    proc.sent += [("a", time.monotonic()), ("c", time.monotonic() - 3600)]
    assert await order(c={"running": 4}) == "bac", "what was sent there lately counts"


async def test_one_that_is_full_by_now_is_passed_by(
    nodes: Nodes, guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = nodes
    async with at(a) as session, session.node(str(c.peer_id)) as there:
        before = await session.proc.rooms()
        before.sort(key=lambda room: room.node != c.peer_id)

        async def late(*_: object, **__: object) -> list[placement.Room]:
            monkeypatch.undo()  # by the members' own word it is not
            return before

        async with there.proc.spawn(guests("cat")):
            monkeypatch.setattr(placement, "nodes", late)
            async with session.proc.at("any") as proc:
                assert proc.session.identity.node in {a.peer_id, b.peer_id}
            monkeypatch.setattr(placement, "nodes", late)
            before = before[:1]
            with pytest.raises(NotFound, match="1 that match are full"):
                async with session.proc.at("any"):
                    pass


async def test_who_may_have_no_more_at_a_member_goes_to_another(
    nodes: Nodes, guests: Guests
) -> None:
    """2 GiB are one principal's, of the 4 GiB of a node."""
    a, b, _ = nodes
    async with at(a) as session, contextlib.AsyncExitStack() as stack:
        found = Counter[str]()
        for _ in range(3):
            there = await stack.enter_async_context(
                session.proc.at("zone=home", memory_bytes=1200 * MIB)
            )
            found[there.session.identity.node] += 1
            await stack.enter_async_context(there.spawn(guests("cat"), memory_bytes=1200 * MIB))
            if len(found) == 2:
                break
        assert set(found) == {a.peer_id, b.peer_id}
        with pytest.raises(NotFound, match="no member has room"):
            async with session.proc.at("zone=home", memory_bytes=1200 * MIB):
                pass


async def test_where_the_program_was_prepared_is_preferred(nodes: Nodes, guests: Guests) -> None:
    a, b, c = nodes
    code = guests("quota")
    hash_ = hashlib.sha256(code).hexdigest()
    async with at(a) as session:
        async with session.node(str(b.peer_id)) as there:
            (await there.proc.load(code)).close()
        rooms = await session.proc.rooms("zone=home", [hash_])
        assert {room.node: room.prepared for room in rooms} == {
            a.peer_id: (False,),
            b.peer_id: (True,),
        }
        best, *_ = await placement.nodes(session, "zone=home", programs=[hash_])
        assert best.node == b.peer_id
        with pytest.raises(InvalidArgument, match="16"):
            await session.proc.rooms("", ["x"] * 17)
        with pytest.raises(InvalidArgument, match="128"):
            await session.proc.rooms("", ["x" * 129])
        assert len(await session.proc.rooms()) == 3
        assert c.peer_id in {room.node for room in await session.proc.rooms()}


async def test_a_blob_of_one_node_runs_at_another_for_a_client_of_a_third(
    nodes: Nodes, guests: Guests, tmp_path: Path
) -> None:
    a, b, c = nodes
    (tmp_path / "x").write_text("of ada\n")
    async with at(c) as session:
        cid = (await session.blob.put(guests("hello"))).cid
        other = (await session.blob.put(b"no program")).cid
    async with at(b) as session:
        async with session.proc.at(f"id={a.peer_id}", cid) as proc:
            assert (await proc.run(cid)).stdout == b"hello\n"
        async with session.proc.at("zone=cloud") as proc:
            data = await proc.run(guests("data"), "/data", dirs={"/data": tmp_path})
            assert data.stdout.startswith(b"of ada\n")
        heard = await session.proc.everywhere()
        (info,) = [
            each for member, found in heard.answers for each in found if each.code == cid
            if member.peer_id == a.peer_id
        ]  # fmt: skip
        assert info.hash == hashlib.sha256(guests("hello")).hexdigest()
        weaker = await session.attenuate({"proc": (), f"blob:{other}": ()})
        with pytest.raises(Denied):  # who may not read it does not run it
            await weaker.proc.run(cid)
        with pytest.raises(InvalidArgument, match="alone"):
            async with session.blob.open(cid) as blob, session.proc.at("any", blob.ref):
                pass


async def test_a_detached_program_starts_where_there_is_room_and_is_used_from_here(
    nodes: Nodes, guests: Guests, tmp_path: Path
) -> None:
    """What it is given is opened there: with neither this node nor the client in the middle."""
    a, b, c = nodes
    grants = {"out": "pubsub:chat?data=max:64"}
    async with at(a) as session:
        async with session.proc.at("zone=cloud") as proc:
            made = await proc.start(guests("beat"), "40", grants=grants)
            assert proc.session.identity.node == c.peer_id
            labels = {each.label for each in await proc.session.grants()}
            assert f"process program {made.id}" in labels
        assert not [each for each in await session.grants() if "process" in each.label]
        async with session.proc.find(made.id) as found:
            assert (await found.info()).policy == "never"
            lines = b"".join([data async for data in found.logs(follow=True)])
            assert lines == b"beat \n" * 40
            assert await found.wait() == Exit("exited", 3, "")
        async with session.proc.at(f"id={b.peer_id}") as proc:
            made = await proc.start(guests("beat"), grants=grants)
            await made.kill()
            assert (await made.wait()).kind == "killed"
            async with proc.spawn(guests("beat"), "1", grants=grants) as process:
                assert await process.stdout.receive() == b"beat \n"
        with pytest.raises(NotFound, match="no member has room"):
            async with session.proc.at("zone=nowhere"):
                pass
        async with session.proc.spawn(guests("beat"), grants={"out": "pubsub:chat"}) as process:
            assert await process.stdout.receive() == b"beat \n"
            labels = {each.label for each in await session.grants()}
            assert "process: pubsub:chat" in labels
        assert "process: pubsub:chat" not in {each.label for each in await session.grants()}
    (tmp_path / "beat.wasm").write_bytes(guests("beat"))
    command = ("run", "--detach", "--on", "zone=cloud", "--grant", "out=pubsub:chat")
    id_ = a.ww(*command, str(tmp_path / "beat.wasm"), "1", check=True).stdout.strip()
    assert b.ww("wait", id_).returncode == 3
    (shown,) = [e for e in json.loads(a.ww("ps", "--json").stdout)["processes"] if e["id"] == id_]
    assert shown["node_name"] == "c"


async def test_a_process_is_found_by_the_beginning_of_its_id(nodes: Nodes, guests: Guests) -> None:
    a, b, c = nodes
    async with (
        at(b) as session,
        session.proc.at(f"id={c.peer_id}") as proc,
        proc.spawn(guests("cat")) as process,
    ):
        id_ = (await process.info()).id
        async with at(a) as other:
            async with other.proc.find(id_[:8]) as found:
                assert (found.proc.session.identity.node, found.id) == (c.peer_id, id_)
            with pytest.raises(InvalidArgument, match="short"):
                async with other.proc.find(id_[:3]):
                    pass
            with pytest.raises(NotFound, match="in the cluster"):
                async with other.proc.find("0" * 16):
                    pass
        killed = a.ww("kill", id_[:8], check=True)
        assert id_ in killed.stderr
        assert (await process.wait()).kind == "killed"


async def test_one_that_does_not_answer_is_named_and_not_waited_for(
    nodes: Nodes, guests: Guests
) -> None:
    a, b, c = nodes
    async with (
        at(a) as session,
        session.proc.at(f"id={b.peer_id}") as proc,
        proc.spawn(guests("cat")) as process,
    ):
        c.process.send_signal(signal.SIGSTOP)
        try:
            before = time.monotonic()
            heard = await session.proc.everywhere()
            took_s = time.monotonic() - before
            assert [each.name for each in heard.missing] == ["c"]
            ids = {each.id for _, found in heard.answers for each in found}
            assert (await process.info()).id in ids
            assert took_s < placement.ASK_ALL_S
            shown = b.ww("ps")
            assert (shown.returncode, "not heard: c" in shown.stderr) == (0, True)
            rooms = await session.proc.rooms("name!=none")
            assert {room.node for room in rooms} == {a.peer_id, b.peer_id}
        finally:
            c.process.send_signal(signal.SIGCONT)
    for node in (a, b):
        node.wait_members([c.peer_id], within_s=WITHIN_S)
