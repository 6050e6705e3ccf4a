"""The service `cluster`: answers of bounded size, watches, and the record of who ordered an end."""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wetware import cluster, rpc
from wetware.admission import Founding
from wetware.cluster import SIGNED_BYTES_MAX, ClusterServant, ClusterService, Foreign, describe
from wetware.cluster_client import Cluster, _shown
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded
from wetware.identity import Key
from wetware.membership.proof import encode_founding
from wetware.membership.record import Record
from wetware.membership.selector import Selector
from wetware.membership.swim import Change, ChangeKind, Member, State
from wetware.rpc.limits import RpcLimits
from wetware.testing import Started

FOUNDING = Founding(bytes(32), "local", b"")


def member(n: int) -> Member:
    """With as much in its record as fits."""
    labels = {f"k{i:02}" + "x" * 55: "v" * 128 for i in range(19)}
    record = Record.sign(
        Key.from_seed(n.to_bytes(32, "big")),
        incarnation=1,
        instance=bytes(8),
        issued_ms=1,
        name=f"n{n}",
        labels=labels,
        chain=bytes(4 << 10),
    )
    return Member(record, State.ALIVE, 0.0, labels, None, None)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # no one event tells of it
            await asyncio.sleep(0.002)


@pytest.mark.anyio
async def test_what_is_signed_fits_into_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [member(n) for n in range(100)]
    size = len(members[0].record.encoded)
    assert size > 7000
    node: Any = types.SimpleNamespace(
        admission=types.SimpleNamespace(founding=FOUNDING),
        host=types.SimpleNamespace(connection=lambda peer: None),
        key=Key.from_seed(bytes(32)),
        clock=types.SimpleNamespace(monotonic=lambda: 1.0),
    )
    monkeypatch.setattr(cluster, "view", lambda node, selector: members)
    monkeypatch.setattr(cluster, "trouble", lambda node, member: "")
    servant = ClusterServant(types.SimpleNamespace(node=node), None)  # type: ignore[arg-type]
    plain: Any = await servant.list("", 0, False)
    assert len(plain["members"]) == 100
    assert not any("record" in each for each in plain["members"])
    signed: Any = await servant.list("", 0, True)
    kept = signed["members"]
    assert len(kept) == SIGNED_BYTES_MAX // size < signed["matched"] == 100
    assert [Record.open(each["record"]).name for each in kept] == [each["name"] for each in kept]
    assert signed["founding"] == encode_founding(FOUNDING)
    described = sum(len(str(each)) for each in plain["members"][: len(kept)])
    assert described + SIGNED_BYTES_MAX < RpcLimits().message_bytes_max


@pytest.mark.anyio
@pytest.mark.parametrize("verb", ["evicted", "revoked"])
async def test_who_ordered_an_end_is_recorded_also_when_they_are_gone_while_the_disk_works(
    verb: str,
) -> None:
    recorded: list[str] = []
    in_force = asyncio.Event()

    async def end(*_: object) -> None:
        in_force.set()
        await asyncio.Event().wait()  # the disk

    node: Any = types.SimpleNamespace(
        admission=types.SimpleNamespace(evict=end, revoke_ticket=end),
        audit=types.SimpleNamespace(ended=lambda event, **_: recorded.append(event)),
        key=Key.from_seed(bytes(32)),
    )
    servant = ClusterServant(types.SimpleNamespace(node=node), None)  # type: ignore[arg-type]
    peer = str(Key.generate().peer_id)
    calls = {
        "evicted": lambda: servant.evict(peer, ""),
        "revoked": lambda: servant.revoke_ticket("t"),
    }
    call = asyncio.create_task(calls[verb]())
    await in_force.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert recorded == [f"operator.{verb}"]


class Watched:
    """A node with a table of members."""

    def __init__(self) -> None:
        self.key = Key.from_seed(bytes(32))
        self.members = [member(n) for n in range(3)]
        self.foreign = Foreign(Key.from_seed(b"f" * 32).peer_id, {"zone": "home"})
        self.listeners: list[Callable[[Change], None]] = []
        self.host = types.SimpleNamespace(
            connection=lambda peer: None, handle=lambda *_, **__: lambda: None
        )
        self.clock = types.SimpleNamespace(monotonic=lambda: 1.0)
        self.membership = self

    def watch(self, listener: Callable[[Change], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def tell(self, kind: ChangeKind, what: Member) -> None:
        for listener in self.listeners:
            listener(Change(kind, what, None))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    node = Watched()

    def view(_: object, selector: Selector) -> list[Member | Foreign]:
        everybody: list[Member | Foreign] = [*node.members, node.foreign]
        return [each for each in everybody if selector.matches(each)]

    monkeypatch.setattr(cluster, "view", view)
    monkeypatch.setattr(cluster, "trouble", lambda node, member: "")
    return node


@pytest.mark.anyio
async def test_a_watch_shows_members_and_each_change_until_the_node_stops(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "WATCHES_MAX", 2)
    service = ClusterService(watched)  # type: ignore[arg-type]
    ready = Started()
    running = asyncio.create_task(service.run(task_status=ready))
    await ready.wait()
    first, second, _ = watched.members
    async with (
        asyncio.timeout(20),
        rpc.serve_unix(tmp_path / "s", lambda _: service.bootstrap(None)),  # type: ignore[arg-type]
        await rpc.connect_unix(tmp_path / "s") as connection,
    ):
        client = Cluster(connection.bootstrap(Cluster.INTERFACE))
        async with client.watch() as everybody, client.watch("name=n1") as one:
            with pytest.raises(LimitExceeded, match="WATCHES_MAX"):
                await client.watch().__aenter__()
            shown = [await anext(everybody) for _ in range(4)]
            assert [m.name for m in shown] == ["n0", "n1", "n2", ""]
            assert [m.state for m in shown] == ["alive", "alive", "alive", "foreign"]
            assert shown[3].peer_id == watched.foreign.peer
            assert dict(shown[3].labels) == {"zone": "home"}
            assert shown[1] == await anext(one)
            assert shown[1].labels == second.labels

            watched.tell(ChangeKind.DUPLICATE, second)
            watched.tell(ChangeKind.DIED, replace(first, state=State.DEAD))
            watched.tell(ChangeKind.SUSPECTED, replace(second, state=State.SUSPECT))
            for watch in (everybody, one):
                if watch is everybody:
                    assert (await anext(watch)).state == "dead"
                shown_now = await anext(watch)
                assert (shown_now.name, shown_now.state) == ("n1", "suspect")
            watched.tell(ChangeKind.REMOVED, second)
            watched.tell(ChangeKind.UPDATED, first)
            watched.tell(ChangeKind.REMOVED, second)
            assert (await anext(one)).state == "removed"
            assert {(await anext(everybody)).state for _ in range(2)} == {"removed", "alive"}
            assert not one._items
        await until(lambda: not watched.listeners)
        assert not service._watches
        async with client.watch("name=n1") as one:
            await anext(one)
            running.cancel()
            await asyncio.wait([running])
            with pytest.raises(Disconnected, match="stopping"):
                await anext(one)
            with pytest.raises(Disconnected, match="not running"):
                await client.watch().__aenter__()
    assert not watched.listeners


@pytest.mark.anyio
async def test_a_member_that_leaves_the_selection_is_shown_once_more(watched: Watched) -> None:
    class Sink:
        items: list[bytes]

        async def call(self, name: str, *, items: list[bytes], dropped: int) -> None:
            self.items = items

        def close(self) -> None:
            pass

    service, sink = ClusterService(watched), Sink()  # type: ignore[arg-type]
    ready = Started()
    running = asyncio.create_task(service.run(task_status=ready))
    await ready.wait()
    watch = service.start_watch(Selector.parse("name=n1,state=alive"), sink)  # type: ignore[arg-type]
    await until(lambda: watch.delivered == 1)
    left = replace(watched.members[1], state=State.LEFT)
    watched.tell(ChangeKind.LEFT, left)
    watched.tell(ChangeKind.UPDATED, left)
    watched.tell(ChangeKind.UPDATED, watched.members[0])
    await until(lambda: watch.delivered == 2)
    assert [_shown(item).state for item in sink.items] == ["left"]
    running.cancel()
    await asyncio.wait([running])


def test_what_describes_no_member_is_an_error(watched: Watched) -> None:
    fields = describe(watched, watched.members[0])  # type: ignore[arg-type]
    good = json.dumps(fields).encode()
    assert _shown(good).name == "n0"
    for wrong in (
        b"",
        b"[]",
        b"null",
        b"[" * 10_000,
        b"\xff",
        json.dumps(fields | {"peer_id": 5}).encode(),
        json.dumps(fields | {"labels": [1]}).encode(),
        json.dumps(fields | {"labels": {"a": "b"}}).encode(),
        json.dumps(fields | {"addrs": 1}).encode(),
        json.dumps(fields | {"load": "x"}).encode(),
        json.dumps(fields | {"incarnation": float("inf")}).encode(),
        json.dumps({**fields, "memory_bytes": None}).encode(),
        *(json.dumps({k: v for k, v in fields.items() if k != gone}).encode() for gone in fields),
    ):
        with pytest.raises(InvalidArgument):
            _shown(wrong)
