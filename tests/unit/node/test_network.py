"""When a node notices that its machine has moved or slept."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Callable

import pytest

from wetware.base.interfaces import Network
from wetware.node import network as module
from wetware.node.network import LOOK_S, SLEPT_S, hints, watch_network

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def at(*texts: str) -> Network:
    return Network(tuple(map(ipaddress.ip_interface, texts)), ())


class Machine:
    """A network, a clock and hints that the test sets; `seen` is what the watch has told."""

    def __init__(self) -> None:
        self.here, self.ahead_s = at("10.0.0.1/24"), 0.0
        self.failing = False
        self.seen: list[Network] = []
        self.looked = 0
        ours, self.kernel = socket.socketpair()
        ours.setblocking(False)
        self.watch = watch_network(
            self.seen.append,
            first=self.here,
            look=self.look,
            unix_s=lambda: time.monotonic() + self.ahead_s,
            hints=lambda: ours,
        )

    def look(self) -> Network:
        self.looked += 1
        if self.failing:
            raise OSError("no descriptor is free")
        return self.here

    async def until(self, condition: Callable[[], object], deadline_s: float = 60.0) -> None:
        async with asyncio.timeout(deadline_s):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def machine(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    machine = Machine()
    task = asyncio.create_task(machine.watch)
    yield machine
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    machine.kernel.close()


async def test_a_change_is_told_once_and_a_hint_alone_is_none(machine: Machine) -> None:
    machine.here = at("10.0.0.2/24")
    await machine.until(lambda: machine.seen)
    machine.kernel.send(b"something changed, it says")
    looked = machine.looked
    await machine.until(lambda: machine.looked >= looked + 5)
    assert machine.seen == [at("10.0.0.2/24")]


async def test_a_hint_is_followed_at_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 60.0)
    looked = machine.looked
    await machine.until(lambda: machine.looked > looked)  # from now on it waits for a minute
    machine.here = at()
    machine.kernel.send(b"x")
    await machine.until(lambda: machine.seen == [at()])


async def test_a_sleep_is_told_although_the_network_is_the_same(machine: Machine) -> None:
    await machine.until(lambda: machine.looked)
    machine.ahead_s += SLEPT_S + 1
    await machine.until(lambda: machine.seen)
    looked = machine.looked
    await machine.until(lambda: machine.looked >= looked + 5)
    assert machine.seen == [at("10.0.0.1/24")]


async def test_a_look_that_fails_changes_nothing(machine: Machine) -> None:
    machine.failing, machine.here = True, at("10.0.0.2/24")
    looked = machine.looked
    await machine.until(lambda: machine.looked >= looked + 3)
    assert machine.seen == []
    machine.failing = False
    await machine.until(lambda: machine.seen)


async def test_without_hints_it_looks_often_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_NETLINK", raising=False)
    assert hints() is None
    seen: list[Network] = []
    here = at("10.0.0.2/24")
    watch = asyncio.create_task(watch_network(seen.append, first=at(), look=lambda: here))
    started = time.monotonic()
    while not seen:
        assert time.monotonic() - started < 2 * LOOK_S + 1
        await asyncio.sleep(0.01)
    watch.cancel()


@pytest.mark.skipif(not hasattr(socket, "AF_NETLINK"), reason="no netlink")
def test_the_kernel_takes_the_subscription() -> None:
    sock = hints()
    assert sock is not None
    with sock:
        assert sock.getsockname()[1] == module._GROUPS
