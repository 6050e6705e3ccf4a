"""Where a member is dialled back: nowhere but at its own addresses."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.identity import Key
from wetware.overlay.membership.dial_back import DialBacks

pytestmark = pytest.mark.anyio

PEER, RELAY = (Key.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
NAMED, AT, ELSEWHERE = "/ip4/10.0.0.2/tcp/1", "/ip4/5.0.0.9/tcp/4001", "/ip4/5.0.0.8/tcp/4001"


@pytest.mark.parametrize(
    ("remote", "tried"),
    [
        (None, [NAMED]),
        (Multiaddr("ip4", "5.0.0.9", 33333, PEER), [NAMED, AT]),
        (Multiaddr("ip4", "5.0.0.9", 33333, PEER, RELAY), [NAMED]),  # that is where the relay is
        (Multiaddr("ip4", "127.0.0.1", 33333, PEER), [NAMED]),
    ],
)
async def test_the_record_and_the_public_address_of_the_connection(
    remote: Multiaddr | None, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = remote and SimpleNamespace(remote=remote)
    reach: Any = SimpleNamespace(now=time.monotonic, connected=lambda peer: connection)
    backs = DialBacks(reach, lambda peer: [NAMED])
    dialled: list[str] = []

    async def dial(addr: Multiaddr, peer: Any) -> tuple[str, float]:
        dialled.append(str(addr))
        return "ok", 0.0

    monkeypatch.setattr(backs, "_try", dial)
    local = "/ip4/127.0.0.1/tcp/22"
    answer = await backs._answer(PEER, {"addrs": [NAMED, AT, ELSEWHERE, local]})
    assert dialled == tried
    whys = {addr: why for addr, why, _ in answer["results"]}  # type: ignore[attr-defined]
    assert whys == {a: "ok" if a in tried else "unknown" for a in (NAMED, AT, ELSEWHERE, local)}
