"""The service `cluster`: answers of bounded size, watches, and the record of who ordered an end."""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.broker.limits import LoginLimits
from wetware.client.cluster import Cluster, _shown
from wetware.errors import STOPPING, Disconnected, InvalidArgument, LimitExceeded
from wetware.identity import Key
from wetware.member import Member
from wetware.node.services import cluster
from wetware.node.services.cluster import SIGNED_BYTES_MAX, ClusterServant, ClusterService, to_wire
from wetware.overlay.admission.statements import Founding
from wetware.overlay.membership.proof import encode_founding
from wetware.overlay.membership.record import Record
from wetware.overlay.tunnel import TUNNEL_PROTOCOL
from wetware.rpc.limits import RpcLimits
from wetware.testing import FakeOverlay, Started

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
    return Member(record.peer, record.name, labels=labels, record=record.encoded)


def service_with(overlay: FakeOverlay, **ports: Any) -> ClusterService:
    """With the parts that a test is about."""
    names = ("admission", "membership", "audit", "check", "limits")
    ctx: Any = types.SimpleNamespace(
        overlay=overlay, members=overlay.members, watch_members=overlay.watch_members
    )
    return ClusterService(ctx, closed=False, **(dict.fromkeys(names) | ports))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # no one event tells of it
            await asyncio.sleep(0.002)


@pytest.mark.anyio
async def test_what_is_signed_fits_into_an_answer() -> None:
    members = [member(n) for n in range(100)]
    size = len(members[0].record)
    assert size > 7000
    overlay = FakeOverlay()
    overlay.members = lambda selector="": tuple(members)  # type: ignore[method-assign]
    admission = types.SimpleNamespace(founding=FOUNDING)
    servant = ClusterServant(service_with(overlay, admission=admission), None)  # type: ignore[arg-type]
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

    service = service_with(
        FakeOverlay(),
        admission=types.SimpleNamespace(issuer=types.SimpleNamespace(evict=end, revoke_ticket=end)),
        audit=types.SimpleNamespace(ended=lambda event, **_: recorded.append(event)),
    )
    servant = ClusterServant(service, None)  # type: ignore[arg-type]
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


@pytest.mark.anyio
async def test_a_watch_shows_members_and_each_change_until_the_node_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "WATCHES_MAX", 2)
    overlay = FakeOverlay()
    first, second, third = (member(n).peer_id for n in range(3))
    for n, peer in enumerate((first, second)):
        overlay.meet(peer, name=f"n{n}", labels=member(n).labels)
    overlay.meet(third, state="foreign", labels={"zone": "home"})
    service = service_with(overlay)
    ready = Started()
    running = asyncio.create_task(service.run(task_status=ready))
    await ready.wait()
    async with (
        asyncio.timeout(60),
        rpc.serve_unix(tmp_path / "s", lambda _: service.bootstrap(None)),  # type: ignore[arg-type]
        await rpc.connect_unix(tmp_path / "s") as connection,
    ):
        client = Cluster(connection.bootstrap(Cluster.INTERFACE))
        async with client.watch() as everybody, client.watch("name=n1") as one:
            with pytest.raises(LimitExceeded, match="WATCHES_MAX"):
                await client.watch().__aenter__()
            shown = [await anext(everybody) for _ in range(4)]
            assert [m.peer_id for m in shown] == [overlay.peer_id, first, second, third]
            assert [m.state for m in shown] == ["alive", "alive", "alive", "foreign"]
            assert dict(shown[3].labels) == {"zone": "home"}
            assert shown[2] == await anext(one)
            assert shown[2].labels == member(1).labels

            overlay.meet(first, state="dead")
            overlay.meet(second, state="suspect")
            for watch in (everybody, one):
                if watch is everybody:
                    assert (await anext(watch)).state == "dead"
                shown_now = await anext(watch)
                assert (shown_now.name, shown_now.state) == ("n1", "suspect")
            overlay.part(second)
            overlay.meet(first, state="alive")
            assert (await anext(one)).state == "removed"
            assert {(await anext(everybody)).state for _ in range(2)} == {"removed", "alive"}
            assert not one._items
        await until(lambda: not overlay._member_watchers)
        assert not service._watches
        with pytest.raises(InvalidArgument, match="bad selector"):
            await client.watch("=").__aenter__()
        async with client.watch("name=n0") as one:
            await anext(one)
            running.cancel()
            await asyncio.wait([running])
            with pytest.raises(Disconnected) as info:
                await anext(one)
            assert info.value.code == STOPPING
            with pytest.raises(Disconnected, match="not running"):
                await client.watch().__aenter__()
    assert not overlay._member_watchers


def test_what_describes_no_member_is_an_error() -> None:
    fields = to_wire(member(0))
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


@pytest.mark.anyio
async def test_a_tunnel_that_the_client_has_no_stream_for_is_closed_at_the_far_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reset: list[object] = []

    async def open_stream(protocol: str) -> Any:
        return types.SimpleNamespace(reset=lambda: reset.append(protocol))

    async def connect(peer: object) -> Any:
        return types.SimpleNamespace(open_stream=open_stream)

    def full() -> None:
        raise LimitExceeded("64 byte streams are open")

    monkeypatch.setattr(rpc, "ByteStream", full)
    service = service_with(
        FakeOverlay(),
        membership=types.SimpleNamespace(reach=types.SimpleNamespace(connect=connect)),
        audit=types.SimpleNamespace(record=lambda *_, **__: None),
        limits=LoginLimits(),
    )
    servant = ClusterServant(service, None)  # type: ignore[arg-type]
    ready = Started()
    running = asyncio.create_task(service.run(task_status=ready))
    await ready.wait()
    with pytest.raises(LimitExceeded):
        await service.start_tunnel(servant, None, Key.generate().peer_id)  # type: ignore[arg-type]
    assert reset == [TUNNEL_PROTOCOL]
    assert not service._tunnels
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
