"""`Cluster.list` with what members signed: an answer of bounded size, whatever they say."""

from __future__ import annotations

import asyncio
import types
from typing import Any

import pytest

from wetware import cluster
from wetware.admission import Founding
from wetware.cluster import SIGNED_BYTES_MAX, ClusterServant
from wetware.identity import Key
from wetware.membership.proof import encode_founding
from wetware.membership.record import Record
from wetware.membership.swim import Member, State
from wetware.rpc.limits import RpcLimits

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
