"""Logging in again: which failures pass, how long is waited, and what those who wait are told."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from wetware.client import LoginRefused, reconnect
from wetware.client.keys import KeyChoice, chooser
from wetware.client.reconnect import AWAY_S_MAX, DELAY_S, DELAY_S_MAX, Reconnecting, may_pass
from wetware.errors import (
    AuthError,
    DialError,
    Disconnected,
    InvalidArgument,
    KeyFileError,
    LimitExceeded,
    NotFound,
    OverlayError,
    PeerMismatch,
    WetwareError,
)
from wetware.identity import Key, LoginStatus

pytestmark = pytest.mark.anyio


class Connection:
    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self.again: Any = None

    @property
    def closed(self) -> bool:
        return self.lost.is_set()

    async def wait_closed(self) -> None:
        await self.lost.wait()


class Kept:
    """Stands for a Session."""

    def __init__(self, principal: str = "local:ada") -> None:
        self.connection, self.closed = Connection(), False
        self.identity = SimpleNamespace(principal=principal)

    def _renew(self, fresh: Kept) -> None:
        self.connection = fresh.connection


class Node:
    """Fails a login with each of `failures`, then lets in."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.left: list[Kept] = []

    async def enter(self, stack: contextlib.AsyncExitStack) -> Any:
        made = Kept()
        stack.callback(self.left.append, made)
        if self.failures:
            raise self.failures.pop(0)
        return made


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited between two tries; nothing is waited for."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(reconnect.asyncio, "sleep", note)
    return waits


async def test_a_lost_connection_is_replaced_with_growing_delays(slept: list[float]) -> None:
    kept, node = Kept(), Node(*[DialError("nobody is there")] * 9, Disconnected("gone again"))
    first, told = kept.connection, []
    async with Reconnecting(kept, node.enter, told.append).running():  # type: ignore[arg-type]
        again = first.again
        waiting = [asyncio.create_task(again(first)) for _ in range(2)]
        first.lost.set()
        for task in waiting:
            assert await asyncio.wait_for(task, 60) is kept.connection is not first
        assert await again(first) is kept.connection, "who comes later does not wait"
        assert len(node.left) == 10, "what a failed try has opened is closed"
        for n, waited in enumerate(slept):
            whole = min(DELAY_S * 2**n, DELAY_S_MAX)
            assert whole * 0.75 <= waited <= whole * 1.25
        assert len(slept) == 11
        assert len(told) == 2
        second = kept.connection
        second.lost.set()
        assert await asyncio.wait_for(second.again(second), 60) is kept.connection is not second
        assert len(node.left) == 11, "the lost one, as well"
        third = asyncio.create_task(again(kept.connection))
        await asyncio.sleep(0)
    with pytest.raises(Disconnected, match="session is over"):
        await asyncio.wait_for(third, 60)
    assert len(node.left) == 12


async def test_a_session_that_was_closed_meanwhile_is_not_logged_in_again(
    slept: list[float],
) -> None:
    kept, tried = Kept(), asyncio.Event()
    first = kept.connection

    async def enter(stack: contextlib.AsyncExitStack) -> Any:
        assert not kept.closed, "nothing is signed any more"
        kept.closed = True
        tried.set()
        raise DialError("nobody is there")

    async with Reconnecting(kept, enter, lambda _: None).running():  # type: ignore[arg-type]
        waiting = asyncio.create_task(first.again(first))
        first.lost.set()
        with pytest.raises(Disconnected, match="session is over"):
            await asyncio.wait_for(waiting, 60)
    assert tried.is_set()
    assert kept.connection is first


@pytest.mark.parametrize(
    "error",
    [
        LoginRefused(LoginStatus.NO_ROLE, "no role"),
        LoginRefused(LoginStatus.UNKNOWN_PRINCIPAL, "who is it"),
        AuthError("another cluster", code="auth.wrong_cluster"),
        KeyFileError("it is encrypted", code="key.passphrase"),
        PeerMismatch("somebody else is there"),
        DialError("another user's", code="overlay.dial.owner"),
        InvalidArgument("ambiguous", code="invalid.ambiguous"),
        NotFound("no such context", code="not_found.context"),
    ],
)
async def test_what_will_not_pass_ends_it(slept: list[float], error: WetwareError) -> None:
    assert not may_pass(error)
    kept = Kept()
    async with Reconnecting(kept, Node(error).enter, lambda _: None).running():  # type: ignore[arg-type]
        kept.connection.lost.set()
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                await asyncio.wait_for(kept.connection.again(kept.connection), 60)
            assert caught.value is error
    assert len(slept) == 1


@pytest.mark.parametrize(
    "error",
    [
        LoginRefused(LoginStatus.BACKEND_UNAVAILABLE, "not synchronised yet"),
        LoginRefused(LoginStatus.TOO_MANY_TRIES, "later"),
        LimitExceeded("sessions_per_principal_max"),
        OverlayError("the entry node is stopping"),
        NotFound("no living member", code="not_found.member"),
    ],
)
async def test_what_may_pass_is_given_up_after_a_while(
    slept: list[float], error: WetwareError, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert may_pass(error)
    kept, node = Kept(), Node(*[error] * 3)
    clock = iter([0.0, 1.0, AWAY_S_MAX + 1])
    loop = SimpleNamespace(
        time=lambda: next(clock), create_future=asyncio.get_running_loop().create_future
    )
    monkeypatch.setattr(reconnect.asyncio, "get_running_loop", lambda: loop)
    async with Reconnecting(kept, node.enter, lambda _: None).running():  # type: ignore[arg-type]
        kept.connection.lost.set()
        with pytest.raises(type(error)):
            await kept.connection.again(kept.connection)
    assert len(slept) == 2


async def test_nobody_else_goes_on_with_a_session(slept: list[float]) -> None:
    """The file of the key may have got another one meanwhile."""
    kept = Kept()

    async def enter(stack: contextlib.AsyncExitStack) -> Any:
        return Kept("local:bob")

    async with Reconnecting(kept, enter, lambda _: None).running():  # type: ignore[arg-type]
        kept.connection.lost.set()
        with pytest.raises(AuthError, match="as local:bob, and the session was local:ada's"):
            await asyncio.wait_for(kept.connection.again(kept.connection), 60)


async def test_a_session_that_was_closed_is_not_opened_again(slept: list[float]) -> None:
    kept = Kept()
    async with Reconnecting(kept, Node().enter, lambda _: None).running():  # type: ignore[arg-type]
        kept.closed = True
        kept.connection.lost.set()
        with pytest.raises(Disconnected):
            await asyncio.wait_for(kept.connection.again(kept.connection), 60)
    assert not slept


@pytest.mark.parametrize(
    ("signers", "picked"),
    [
        ({"key": None, "login": True}, "login"),
        ({"key": None, "login": False}, "key"),
        ({"login": False, "key": None}, "key"),
        ({"no key": KeyFileError("no key", code="key.missing"), "login": False}, "login"),
        ({"broken": ImportError("x"), "key": None}, "key"),
        ({"login": False, "other": True}, "other"),
    ],
)
def test_a_login_goes_before_a_key_and_that_before_a_login_to_come(
    signers: dict[str, Any], picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(group: str, scheme: str) -> Any:
        def make(choice: object) -> Any:
            ready = signers[scheme]
            if isinstance(ready, Exception):
                raise ready
            more = {} if ready is None else {"ready": lambda challenge: ready}
            return SimpleNamespace(name=scheme, **more)

        return make

    monkeypatch.setattr("wetware.client.keys.find", find)
    challenge: Any = SimpleNamespace(schemes=tuple(signers))
    choose = chooser(None, KeyChoice(None, None, None))
    assert choose(challenge).name == picked  # type: ignore[attr-defined]


def test_a_key_that_cannot_be_used_is_told_of_before_a_login_that_nobody_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find(group: str, scheme: str) -> Any:
        def make(choice: object) -> Any:
            if scheme == "key":
                raise KeyFileError("wrong passphrase", code="key.passphrase")
            return SimpleNamespace(ready=lambda challenge: False, unattended=True)

        return make

    monkeypatch.setattr("wetware.client.keys.find", find)
    challenge: Any = SimpleNamespace(schemes=("login", "key"))
    choice = KeyChoice(None, None, None)
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        chooser(None, choice)(challenge)
    with pytest.raises(AuthError) as caught:
        chooser(None, choice, unattended=True)(challenge)
    assert caught.value.code == "auth.attended"


def test_nobody_is_asked_unawares() -> None:
    wallet = SimpleNamespace(sign=None)
    challenge: Any = SimpleNamespace(schemes=("local-ed25519",))
    choice = KeyChoice(Key.generate(), None, None)
    assert chooser(wallet, choice)(challenge) is wallet
    with pytest.raises(AuthError) as caught:
        chooser(wallet, choice, unattended=True)(challenge)
    assert caught.value.code == "auth.attended"
    quiet = SimpleNamespace(sign=None, unattended=True)
    assert chooser(quiet, choice, unattended=True)(challenge) is quiet
    assert chooser(None, choice, unattended=True)(challenge), "a key signs by itself"
