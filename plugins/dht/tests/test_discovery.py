from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from wetware.errors import OverlayError
from wetware_dht import plugin
from wetware_dht.config import DhtConfig
from wetware_dht.discovery import cluster_key, pause

from .conftest import World

pytestmark = pytest.mark.anyio
Make = type[World]


def unavailable() -> OverlayError:
    return OverlayError("the libp2p guest is restarting", code="overlay.unavailable")


def test_the_key_names_the_cluster() -> None:
    digest = hashlib.sha256(b"wetware-cluster:" + b"ab" * 20).digest()
    assert cluster_key("ab" * 20) == b"\x12\x20" + digest
    assert cluster_key("ac" * 20) != cluster_key("ab" * 20)


# --- announcing -----------------------------------------------------------------------------------


async def test_provides_now_and_every_half_hour(make_world: Make) -> None:
    world = make_world(pauses=205)
    waits = await world.run("advertise")
    assert set(world.overlay.keys) == {cluster_key(world.overlay.cluster)}
    assert max(waits) == 30  # it looks at its addresses in between
    assert sum(waits) < 4 * 1800
    assert len(world.overlay.keys) == 4
    assert world.overlay.watchers == []


@pytest.mark.parametrize("failure", [False, unavailable()])
async def test_backs_off_while_nobody_takes_it(make_world: Make, failure: Any) -> None:
    world = make_world(pauses=9)
    world.overlay.taken = failure
    waits = await world.run("advertise")
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert len(world.overlay.keys) == 9


async def test_a_first_member_ends_the_back_off(make_world: Make) -> None:
    world = make_world(pauses=6)
    world.overlay.taken = unavailable()
    world.pauses.before[4] = world.connect
    assert await world.run("advertise") == [5, 10, 20, 40, 5, 10]


async def test_members_that_are_there_at_the_start_are_no_news(make_world: Make) -> None:
    world = make_world(pauses=1)
    world.connect(2)
    assert len(await world.run("advertise")) == 1
    assert len(world.overlay.keys) == 1


async def test_a_new_address_is_announced(make_world: Make) -> None:
    world = make_world(pauses=4)
    overlay = world.overlay

    def move() -> None:
        overlay.announced = (world.addr(peer=overlay.peer_id),)

    world.pauses.before[3] = move
    await world.run("advertise")
    assert len(overlay.keys) == 2


async def test_many_members_are_no_reason_to_announce_again(make_world: Make) -> None:
    world = make_world(pauses=5)
    world.connect(9)
    world.pauses.before[2] = world.connect
    await world.run("advertise")
    assert len(world.overlay.keys) == 1


# --- finding --------------------------------------------------------------------------------------


async def test_reports_what_a_lookup_gives(make_world: Make) -> None:
    world = make_world(pauses=1)
    world.overlay.found = (world.addr(), world.addr())
    await world.run("find")
    assert world.reported == [*world.overlay.found]


async def test_looks_up_with_back_off_while_few_are_known(make_world: Make) -> None:
    world = make_world(pauses=8)
    world.overlay.found = unavailable()
    assert await world.run("find") == [5, 10, 20, 40, 80, 160, 300, 300]
    assert len(world.overlay.keys) == 8


async def test_looks_up_slowly_with_enough_members(make_world: Make) -> None:
    world = make_world(pauses=3)
    world.connect(4)
    assert await world.run("find") == pytest.approx([900] * 3)


async def test_a_member_that_connects_starts_a_lookup(make_world: Make) -> None:
    world = make_world(pauses=6)

    def connect() -> None:
        world.connect()
        world.discovery._wake()  # as the watch that `advertise` holds does

    world.pauses.before[4] = connect
    assert await world.run("find") == [5, 10, 20, 40, 5, 10]


async def test_a_reader_that_stops_leaves_nothing_behind(make_world: Make) -> None:
    world = make_world(pauses=1)
    world.overlay.found = (world.addr(), world.addr())
    peers = world.discovery.find_peers()
    assert await anext(peers) == world.overlay.found[0]
    assert world.overlay.watchers == []


# --- the rest -------------------------------------------------------------------------------------


async def test_pause_ends_by_time_or_event() -> None:
    woken = asyncio.Event()
    assert await pause(woken, 0.01) is False
    woken.set()
    assert await pause(woken, 60) is True
    assert not woken.is_set()


def test_the_hooks() -> None:
    class Ctx:
        config = DhtConfig(enabled=False)

    assert plugin.ww_register_config() is DhtConfig
    assert plugin.ww_register_discovery(Ctx()) is None  # type: ignore[arg-type]
