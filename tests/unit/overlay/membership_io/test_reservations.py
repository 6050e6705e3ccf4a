"""Which relays a node behind a NAT asks, and how often."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.errors import OverlayError
from wetware.identity import Key, PeerId
from wetware.overlay.membership import reservations as module
from wetware.overlay.membership.reach import is_public
from wetware.overlay.membership.reservations import Reservations

pytestmark = pytest.mark.anyio

PUBLIC = Multiaddr("ip4", "8.8.8.8", 4001)
AT_HOME = Multiaddr("ip6", "2600::1", 4001)


class Connection:
    def __init__(
        self, peer: PeerId, remote: Multiaddr = PUBLIC, *, local: str = "10.0.0.2"
    ) -> None:
        self.peer, self.initiator = peer, True
        self.remote, self.local = remote.with_peer(peer), replace(remote, host=local)


class Reach:
    def __init__(self) -> None:
        self.up: dict[PeerId, Connection] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def now(self) -> float:
        return 0.0

    def carriers(self) -> dict[PeerId, Connection]:
        return self.up

    def spawn(self, coro: Any, name: str) -> bool:
        self.tasks.append(asyncio.ensure_future(coro))
        return True

    async def idle(self) -> None:
        await asyncio.gather(*self.tasks)


class Ended:
    """A reservation that is granted, and over."""

    async def read(self) -> bytes:
        raise OverlayError("it was reset")


async def test_a_relay_that_grants_and_ends_it_over_and_over_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Connection] = []
    changes: list[None] = []

    async def ask(connection: Connection, peer: PeerId | None) -> Ended:
        asked.append(connection)
        return Ended()

    monkeypatch.setattr(module, "ask_to_carry", ask)
    reach, hub, own = Reach(), Key.generate().peer_id, Key.generate().peer_id
    reservations = Reservations(
        own,
        reach,  # type: ignore[arg-type]
        lambda _peer: (PUBLIC,),
        lambda: changes.append(None),
    )
    first = reach.up[hub] = Connection(hub)
    for _ in range(5):
        reservations.look_after()
        await reach.idle()
    assert asked == [first]
    assert len(changes) == 2
    assert reservations.addrs == ()
    # One that has restarted is asked at once.
    second = reach.up[hub] = Connection(hub)
    reservations.look_after()
    await reach.idle()
    assert asked == [first, second]


async def test_a_global_ipv6_address_alone_is_no_sign_that_anybody_is_let_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not is_public([AT_HOME, Multiaddr("ip4", "192.168.1.2", 4001)])
    assert is_public([AT_HOME, PUBLIC])
    neighbour, hub, own = (Key.generate().peer_id for _ in range(3))
    known = {neighbour: (AT_HOME,), hub: (AT_HOME, PUBLIC)}
    asked = []

    async def ask(connection: Connection, peer: PeerId | None) -> Ended:
        asked.append(connection.peer)
        return Ended()

    monkeypatch.setattr(module, "ask_to_carry", ask)
    reach = Reach()
    reach.up = {  # the neighbour is nearer
        neighbour: Connection(neighbour, AT_HOME, local="2600::2"),
        hub: Connection(hub),
    }
    known[neighbour] = (reach.up[neighbour].remote,)
    reservations = Reservations(own, reach, known.__getitem__, lambda: None)  # type: ignore[arg-type]
    reservations.look_after()
    await reach.idle()
    assert asked == [hub]


NAMED = Multiaddr("dns", "hub.example.org", 4001)


@pytest.mark.parametrize(
    ("known", "dialled", "named"),
    [
        ((AT_HOME,), AT_HOME, [AT_HOME]),
        # What was dialled is kept beside the name.
        ((NAMED, PUBLIC), PUBLIC, [NAMED, PUBLIC]),
        ((NAMED, AT_HOME), AT_HOME, [NAMED, AT_HOME]),
        # The name of a machine in this network.
        ((NAMED, Multiaddr("ip4", "10.0.0.3", 4001)), Multiaddr("ip4", "10.0.0.3", 4001), []),
        # It was punched: strangers do not get in there.
        ((AT_HOME,), PUBLIC, []),
    ],
)
async def test_a_relay_that_has_only_a_name_or_an_ipv6_address_is_asked_where_it_was_dialled(
    monkeypatch: pytest.MonkeyPatch,
    known: tuple[Multiaddr, ...],
    dialled: Multiaddr,
    named: list[Multiaddr],
) -> None:
    async def ask(connection: Connection, peer: PeerId | None) -> Ended:
        return Ended()

    monkeypatch.setattr(module, "ask_to_carry", ask)
    reach, hub, own = Reach(), Key.generate().peer_id, Key.generate().peer_id
    reach.up[hub] = Connection(hub, dialled)
    found: list[tuple[Multiaddr, ...]] = []
    reservations = Reservations(
        own,
        reach,  # type: ignore[arg-type]
        lambda _peer: tuple(addr.with_peer(hub) for addr in known),
        lambda: found.append(reservations.addrs),
    )
    reservations.look_after()
    await reach.idle()
    assert list(found[0] if found else ()) == [addr.with_peer(hub).through(own) for addr in named]
