"""Who is asked for a blob: the members, the nearest first, and the DHT where none has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from wetware.errors import Disconnected, OverlayError
from wetware.identity import Key
from wetware_blob.exchange import find
from wetware_blob.format.cid import RAW, Cid

pytestmark = pytest.mark.anyio

ROOT = Cid.of(RAW, b"x")
PEERS = [Key.generate().peer_id for _ in range(4)]


class Context:
    """`answers` of the members, the nearest last: whether they have it, or what fails."""

    def __init__(self, *answers: Any, announced: tuple[str, ...] | None = ()) -> None:
        self.answers = dict(zip(PEERS, answers, strict=False))
        self.announced = announced
        self.asked: list[Any] = []
        self.log = SimpleNamespace(debug=lambda *_, **__: None)
        self.overlay = SimpleNamespace(find_providers=self.find_providers)

    def members(self, selector: str) -> list[Any]:
        assert selector == "service=blob,state=alive"
        me = SimpleNamespace(peer_id=Key.generate().peer_id, is_self=True, rtt_s=None)
        return [me] + [
            SimpleNamespace(peer_id=peer, is_self=False, rtt_s=1.0 / (n + 1))
            for n, peer in enumerate(self.answers)
        ]

    async def sibling(self, peer: Any) -> Any:
        self.asked.append(peer)

        async def call(method: str, roots: list[bytes]) -> dict[str, Any]:
            assert (method, roots) == ("have", [ROOT.digest])
            answer = self.answers[peer]
            if isinstance(answer, Exception):
                raise answer
            return {"have": answer}

        return SimpleNamespace(call=call, close=lambda: None)

    async def find_providers(self, key: bytes) -> tuple[str, ...]:
        assert key == find.dht_key(ROOT)
        if self.announced is None:
            raise OverlayError("there is no DHT")
        return self.announced

    async def found(self) -> list[Any]:
        return [peer async for peer in find.finder(cast("Any", self))(ROOT)]


def addr(peer: Any) -> str:
    return f"/ip4/127.0.0.1/tcp/1/p2p/{peer}"


async def test_the_members_that_say_that_they_have_it() -> None:
    ctx = Context([True], [False], Disconnected("gone"), [True], announced=(addr(PEERS[1]),))
    assert set(await ctx.found()) == {PEERS[0], PEERS[3]}
    assert ctx.asked == PEERS[::-1]


async def test_where_none_has_it_those_that_the_dht_names_once_each() -> None:
    stranger = Key.generate().peer_id
    announced = tuple(map(addr, (PEERS[1], stranger, PEERS[1], PEERS[0])))
    ctx = Context([False], [], Disconnected("gone"), [True, True], announced=announced)
    assert await ctx.found() == [PEERS[1], PEERS[0]]
    ctx.announced = None
    assert await ctx.found() == []


async def test_of_many_members_the_nearest_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "MEMBERS_MAX", 2)
    ctx = Context(*[[True]] * 4)
    assert set(await ctx.found()) == {PEERS[3], PEERS[2]}
