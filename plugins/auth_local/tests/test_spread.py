"""The policy is cluster-wide: real links on loopback, members that are away, lie, stall or fork."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wetware import rpc
from wetware.base import cbor
from wetware.base.multiaddr import Multiaddr
from wetware.base.threads import Threads
from wetware.errors import NotFound, OverlayError
from wetware.hookspecs import Accept, Access, Reject, Withdrawn
from wetware.identity import (
    Challenge,
    Channel,
    Key,
    LoginStatus,
    PeerId,
    Principal,
    replace_private_file,
)
from wetware.overlay.link import LinkHost, Stream
from wetware.testing import FakeOverlay, Started
from wetware_auth_local.backend import LocalBackend
from wetware_auth_local.client import PolicyClient
from wetware_auth_local.config import AuthLocalConfig
from wetware_auth_local.policy import HISTORY_MAX, Policy, Signed, User, resolution
from wetware_auth_local.signer import Ed25519Signer
from wetware_auth_local.spread import ANSWER_BYTES_MAX, PROTOCOL, REQUESTS_PER_PEER_BURST, Claim

pytestmark = pytest.mark.anyio

OPERATOR = Key.from_seed(b"o" * 32)
ADA = Key.from_seed(b"a" * 32)
ADA_PRINCIPAL = Principal("local", ADA.peer_id)
FIRST = Policy.first(OPERATOR.peer_id)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))


def with_ada(policy: Policy, *roles: str) -> Policy:
    return policy.next(
        users={**policy.users, "ada": User(ADA.peer_id, frozenset(roles or ("member",)))}
    )


def without_ada(policy: Policy) -> Policy:
    return policy.next(users={k: v for k, v in policy.users.items() if k != "ada"})


class Clock:
    """The machine's, that tests can put forward and back."""

    def __init__(self) -> None:
        self.ahead_s = 0.0  # of both
        self.set_s = 0.0  # of the wall clock alone

    def time(self) -> float:
        return time.time() + self.ahead_s + self.set_s

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


class Log:
    """An EventLogger that keeps."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def _keep(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    debug = info = warning = error = exception = _keep

    def named(self, event: str) -> list[dict[str, object]]:
        return [fields for name, fields in self.events if name == event]


class Node:
    """A backend on a host of its own."""

    def __init__(self, host: LinkHost, backend: LocalBackend, clock: Clock, log: Log) -> None:
        self.host, self.backend, self.clock, self.log = host, backend, clock, log
        self.withdrawn: list[Withdrawn] = []
        backend.watch(self.withdrawn.append)

    async def dial(self, *others: Node) -> None:
        for other in others:
            await self.host.dial(other.host.listen_addrs)

    async def leave(self, other: Node) -> None:
        connection = self.host.connection(other.host.peer_id)
        assert connection is not None
        connection.close()
        await connection.wait_closed()

    async def put(self, policy: Policy) -> Policy:
        await self.backend.put(policy.sign(OPERATOR))
        return policy

    async def login(self, key: Key) -> Accept | Reject:
        challenge = Challenge(
            nonce=bytes(32),
            verifier=self.host.peer_id,
            cluster="test",
            channel=Channel("noise", bytes(32)),
            schemes=self.backend.schemes,
            policy_epoch=self.backend.epoch,
            not_after_ms=2**50,
        )
        verdict = await self.backend.authenticate(
            challenge, await Ed25519Signer(key).sign(challenge)
        )
        assert isinstance(verdict, Accept | Reject)
        return verdict

    async def why_not(self, key: Key = OPERATOR) -> str:
        verdict = await self.login(key)
        assert isinstance(verdict, Reject), "admitted"
        assert verdict.status is LoginStatus.BACKEND_UNAVAILABLE
        return verdict.reason


@contextlib.asynccontextmanager
async def host_of(key: Key | None = None) -> AsyncIterator[LinkHost]:
    async with LinkHost(key or Key.generate(), admit=lambda *_: True) as host:
        await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        yield host


@contextlib.asynccontextmanager
async def node_at(
    path: Path,
    policy: Policy = FIRST,
    *,
    joined: bool = False,
    clock: Clock | None = None,
    key: Key | None = None,
    **config: Any,
) -> AsyncIterator[Node]:
    """A node that began with `policy`, or has what its directory says."""
    path.mkdir(exist_ok=True)  # noqa: ASYNC240  # a temporary directory
    given = path / "given.json"
    given.write_bytes(policy.sign(OPERATOR))
    clock, log = clock or Clock(), Log()
    async with host_of(key) as host:
        ctx: Any = SimpleNamespace(
            config=AuthLocalConfig(given, **{"catch_up_s": 5.0, "recheck_s": 1.0, **config}),
            data_dir=path,
            log=log,
            run_sync=Threads().run,
            clock=clock,
            overlay=FakeOverlay(host=host),
            join_document=policy.sign(OPERATOR) if joined else None,
            joined=joined,
            authority=True,
            proposals={},
        )
        backend = LocalBackend(ctx)
        running = Started()
        task = asyncio.create_task(backend.run(task_status=running))
        await running.wait()
        try:
            yield Node(host, backend, clock, log)
        finally:
            assert not task.done(), "the backend ended"
            task.cancel()
            await asyncio.wait([task])


@contextlib.asynccontextmanager
async def nodes(tmp_path: Path, count: int, **config: Any) -> AsyncIterator[list[Node]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(node_at(tmp_path / f"node{i}", **config))
            for i in range(count)
        ]


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # no one event tells of it
            await asyncio.sleep(0.005)


async def agree(*members: Node, version: int) -> None:
    await until(lambda: all(node.backend.epoch == version for node in members))
    assert len({node.backend.newest.digest for node in members}) == 1


# --- spreading ------------------------------------------------------------------------------------


async def test_a_removed_user_s_sessions_end_along_a_line(tmp_path: Path) -> None:
    # Re-checks are far apart: what arrives was announced.
    async with nodes(tmp_path, 4, recheck_s=600.0) as line:
        for one, two in itertools.pairwise(line):
            await one.dial(two)
        second = await line[0].put(with_ada(FIRST))
        await agree(*line, version=2)
        for node in line:
            assert isinstance(await node.login(ADA), Accept)
        started = time.monotonic()
        await line[-1].put(without_ada(second))
        await until(lambda: all(node.withdrawn for node in line))
        assert time.monotonic() - started < 5.0  # some ms; the machine may be busy
        for node in line:
            assert [event.principal for event in node.withdrawn] == [ADA_PRINCIPAL]
            assert node.backend.roles(ADA_PRINCIPAL) == frozenset()
        await agree(*line, version=3)
        assert not any(node.backend.spread.refused for node in line)


async def test_many_changes_in_a_row_all_arrive_everywhere(tmp_path: Path) -> None:
    async with nodes(tmp_path, 4) as ring:
        for one, two in zip(ring, [*ring[1:], ring[0]], strict=True):
            await one.dial(two)
        policy = FIRST
        for _ in range(30):
            policy = await ring[0].put(policy.next())
        await agree(*ring, version=31)
        assert not any(node.backend.spread.refused for node in ring)


async def test_a_node_that_missed_versions_catches_up_and_keeps_them(tmp_path: Path) -> None:
    async with node_at(tmp_path / "a") as a:
        async with node_at(tmp_path / "b") as b:
            await a.dial(b)
            second = await a.put(with_ada(FIRST))
            await agree(a, b, version=2)
        policy = without_ada(second)
        for _ in range(9):
            policy = policy.next()
        await a.put(policy)
        async with node_at(tmp_path / "b") as b:
            assert b.backend.epoch == 2
            await b.dial(a)
            await agree(a, b, version=12)
            assert [event.principal for event in b.withdrawn] == [ADA_PRINCIPAL]
    async with node_at(tmp_path / "b") as b:
        assert b.backend.policy == policy


async def test_a_large_document_spreads(tmp_path: Path) -> None:
    users = {
        f"user{i}": User(Key.from_seed(i.to_bytes(32, "big")).peer_id, frozenset({"member"}))
        for i in range(1, 3000)
    }
    async with nodes(tmp_path, 3) as line:
        await line[0].dial(line[1])
        await line[1].dial(line[2])
        policy = await line[0].put(FIRST.next(users={**FIRST.users, **users}))
        await agree(*line, version=2)
        assert line[2].backend.policy == policy


async def test_a_full_disk_neither_stops_a_withdrawal_nor_its_spreading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(tmp_path, 3) as line:
        await line[0].dial(line[1])
        await line[1].dial(line[2])
        second = await line[0].put(with_ada(FIRST))
        await agree(*line, version=2)
        replace, full = replace_private_file, True

        def some(path: Path, data: bytes) -> None:
            if full and "node1" in path.parts:
                raise OSError(28, "No space left on device")
            replace(path, data)

        monkeypatch.setattr("wetware.base.disk.replace_private_file", some)
        await line[0].put(without_ada(second))
        await until(lambda: all(node.withdrawn for node in line))
        await agree(line[0], line[2], version=3)
        assert line[1].backend.epoch == 2
        assert line[1].backend.roles(ADA_PRINCIPAL) == frozenset()
        full = False
        await agree(*line, version=3)  # tried again by itself


# --- catching up before deciding ------------------------------------------------------------------


async def test_a_stale_node_compares_before_it_admits(tmp_path: Path) -> None:
    async with node_at(tmp_path / "a") as a:
        async with node_at(tmp_path / "b") as b:
            await a.dial(b)
            second = await a.put(with_ada(FIRST))
            await agree(a, b, version=2)
        await a.put(without_ada(second))
        async with node_at(tmp_path / "b", catch_up_s=30.0) as b:
            login = asyncio.create_task(b.login(ADA))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(login), 0.2)
            await b.dial(a)
            verdict = await login
            assert isinstance(verdict, Reject)
            assert verdict.status is LoginStatus.UNKNOWN_PRINCIPAL
            assert b.backend.epoch == 3


async def test_it_waits_for_every_member_that_is_connected(tmp_path: Path) -> None:
    """The first that answers may be as stale."""
    async with (
        node_at(tmp_path / "a") as a,
        node_at(tmp_path / "b", with_ada(FIRST)) as b,
        node_at(tmp_path / "c", joined=True, catch_up_s=30.0) as c,
    ):
        held = {node.host.peer_id: asyncio.Event() for node in (a, b)}
        ask = c.backend.spread._ask

        async def slow(peer: PeerId, *rest: Any) -> Any:
            await held[peer].wait()
            return await ask(peer, *rest)

        c.backend.spread._ask = slow  # type: ignore[method-assign]
        await c.dial(a, b)
        held[a.host.peer_id].set()
        await until(lambda: c.backend.spread.members == 1)
        login = asyncio.create_task(c.login(ADA))
        await asyncio.wait([login], timeout=0.1)
        assert not login.done()
        held[b.host.peer_id].set()
        assert isinstance(await login, Accept)


async def test_a_single_node_never_waits(tmp_path: Path) -> None:
    async with node_at(tmp_path / "a", catch_up_s=60.0) as a:
        a.clock.ahead_s = 1e8
        async with asyncio.timeout(60):
            assert isinstance(await a.login(OPERATOR), Accept)
    async with node_at(tmp_path / "a", catch_up_s=60.0) as a, asyncio.timeout(60):
        assert isinstance(await a.login(OPERATOR), Accept)
        # Strangers are told at once, whatever the state.
        assert (await a.login(ADA)).status is LoginStatus.UNKNOWN_PRINCIPAL  # type: ignore[union-attr]


async def test_a_node_that_joined_admits_nobody_until_it_met_a_member(tmp_path: Path) -> None:
    async with node_at(tmp_path / "a") as a:
        async with node_at(tmp_path / "b", joined=True, catch_up_s=0.0) as b:
            assert "has yet to compare" in await b.why_not()
        async with node_at(tmp_path / "b", joined=True, catch_up_s=0.0) as b:
            assert "has yet to compare" in await b.why_not()
            await b.dial(a)
            await until(lambda: b.backend.spread.members)
            assert isinstance(await b.login(OPERATOR), Accept)
        # By then it has met one, within the bound.
        async with node_at(tmp_path / "b", joined=True, catch_up_s=0.0) as b:
            assert isinstance(await b.login(OPERATOR), Accept)
            assert b.log.named("policy.stale") == []


async def _met(tmp_path: Path, **config: Any) -> None:
    """Two nodes that have compared."""
    async with nodes(tmp_path, 2, **config) as (a, b):
        await a.dial(b)
        await until(lambda: a.backend.spread.members and b.backend.spread.members)


async def test_a_node_out_of_touch_for_too_long_admits_nobody(tmp_path: Path) -> None:
    config = {"catch_up_s": 0.0, "policy_age_s_max": 3600.0}
    async with nodes(tmp_path, 2, **config) as (a, b):
        await a.dial(b)
        await until(lambda: a.backend.spread.members and b.backend.spread.members)
        await b.leave(a)
        await until(lambda: not b.backend.spread.members)
        b.clock.ahead_s = 3500.0
        assert isinstance(await b.login(OPERATOR), Accept)
        b.clock.ahead_s = 3700.0
        b.clock.set_s = -3700.0  # a clock that is set back does not help
        why = await b.why_not()
        assert "1.0 h" in why
        assert "policy_age_s_max" in why
        assert await b.why_not() == why
        assert len(b.log.named("policy.stale")) == 1
        assert b.withdrawn == [], "live sessions go on"
        await b.dial(a)
        await until(lambda: isinstance(b.backend.contact.age_s, float) and b.backend.spread.members)
        assert isinstance(await b.login(OPERATOR), Accept)


async def test_the_age_survives_a_restart(tmp_path: Path) -> None:
    config = {"catch_up_s": 0.0, "policy_age_s_max": 3600.0}
    await _met(tmp_path, **config)
    clock = Clock()
    clock.ahead_s = 3000.0
    async with node_at(tmp_path / "node1", clock=clock, **config) as b:
        assert isinstance(await b.login(OPERATOR), Accept)
    # It stopped after 3000 s without contact; the clock is then set back, but not before that.
    clock.ahead_s = 3700.0
    async with node_at(tmp_path / "node1", clock=clock, **config) as b:
        await b.why_not()
    clock.ahead_s = 3000.0
    async with node_at(tmp_path / "node1", clock=clock, **config) as b:
        assert "has yet to compare" in await b.why_not(), "the last time is in the future"
        assert b.log.named("contact.clock_set_back")


async def test_a_damaged_contact_file_admits_nobody(tmp_path: Path) -> None:
    await _met(tmp_path)
    for damage in (b"", b"{", b"[]", b'{"met": 1, "age_s": NaN, "at_s": 0}', b'{"met": true}'):
        (tmp_path / "node1" / "contact.json").write_bytes(damage)
        async with node_at(tmp_path / "node1", catch_up_s=0.0) as b:
            await b.why_not()
            assert b.log.named("contact.damaged")


async def test_the_owner_can_make_the_last_node_a_cluster_of_one(tmp_path: Path) -> None:
    async with node_at(tmp_path / "a", joined=True, catch_up_s=0.0) as a:
        await a.why_not()
    # As the README says.
    (tmp_path / "a" / "contact.json").write_text('{"met": false, "age_s": null, "at_s": 0}')
    async with node_at(tmp_path / "a", joined=True, catch_up_s=60.0) as a, asyncio.timeout(60):
        assert isinstance(await a.login(OPERATOR), Accept)


async def test_a_node_that_missed_too_many_versions_says_what_to_do(tmp_path: Path) -> None:
    policy = FIRST
    for _ in range(HISTORY_MAX + 1):
        policy = policy.next()
    async with node_at(tmp_path / "a", policy) as a, node_at(tmp_path / "b") as b:
        await b.dial(a)
        await until(lambda: b.log.named("policy.out_of_reach"))
        assert "policy.json" in str(b.log.named("policy.out_of_reach")[0]["hint"])
        assert "missed more than 128" in await b.why_not()
        assert b.backend.epoch == 1
        await a.backend.put(policy.next().sign(OPERATOR))
        await until(lambda: [d.signed.version for d in _divergences(b)] == [HISTORY_MAX + 3])
        assert len(b.log.named("policy.out_of_reach")) == 1
    # A node in between can still bring it there.
    between = FIRST.next().next()
    async with (
        node_at(tmp_path / "c", between) as c,
        node_at(tmp_path / "a") as a,
        node_at(tmp_path / "b", catch_up_s=30.0) as b,
    ):
        await b.dial(a)
        await b.dial(c)
        await agree(a, b, version=HISTORY_MAX + 3)
        assert isinstance(await b.login(OPERATOR), Accept)


def _divergences(node: Node) -> list[Any]:
    return list(node.backend.spread.divergences.values())


# --- forks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("longer", [0, 2])
async def test_a_fork_is_reported_once_and_resolved_by_the_operator(
    tmp_path: Path, longer: int
) -> None:
    second = with_ada(FIRST)
    async with node_at(tmp_path / "a", second) as a, node_at(tmp_path / "b", second) as b:
        one = await a.put(without_ada(second))
        two = await b.put(with_ada(second, "admin", "member"))
        for _ in range(longer):
            two = await b.put(two.next())
        await a.dial(b)
        await until(lambda: _divergences(a) and _divergences(b))
        await until(lambda: a.backend.spread.members and b.backend.spread.members)
        await asyncio.sleep(1.2)  # a re-check: it is not reported again
        for node, mine, other in ((a, one, two), (b, two, one)):
            (report,) = node.log.named("policy.forked")
            assert report["hint"] == "ww policy resolve"
            assert report["digest"] == other.digest
            assert node.backend.policy == mine, "a branch was given up"
            assert [d.signed.policy for d in _divergences(node)] == [other]
            assert not node.backend.spread.refused
        assert a.backend.roles(ADA_PRINCIPAL) == frozenset()
        # A later version of one branch is the same fork.
        two = await b.put(two.next())
        await until(lambda: [d.signed.policy for d in _divergences(a)] == [two])
        assert len(a.log.named("policy.forked")) == 1
        resolved = resolution(one, two, "common")
        await a.put(resolved)
        await agree(a, b, version=resolved.version)
        await until(lambda: not _divergences(a) and not _divergences(b))
        assert b.backend.roles(ADA_PRINCIPAL) == frozenset()
        assert [event.principal for event in b.withdrawn] == [ADA_PRINCIPAL]
    # A node that was away the whole time, on the branch that was given up, follows too.
    async with node_at(tmp_path / "a") as a, node_at(tmp_path / "c", two) as c:
        later = await a.put(resolved.next())
        await c.dial(a)
        await agree(a, c, version=later.version)


# --- hostile members ------------------------------------------------------------------------------


class Hostile:
    """A member that answers as it is told to."""

    def __init__(self, host: LinkHost) -> None:
        self.host, self.asked = host, 0
        self.answer: Callable[[Stream, dict[str, Any]], Coroutine[Any, Any, None]] | None = None
        host.handle(PROTOCOL, self._serve, access=Access.MEMBER)

    async def _serve(self, stream: Stream) -> None:
        size = int.from_bytes(await stream.read_exactly(4), "big")
        request = cbor.decode(await stream.read_exactly(size), bytes_max=1000)
        self.asked += 1
        assert self.answer is not None
        await self.answer(stream, request)

    async def send(self, peer: PeerId, data: bytes) -> Stream:
        stream = await self.host.open_stream(peer, PROTOCOL)
        await stream.write(data)
        return stream


def framed(message: object) -> bytes:
    data = cbor.encode(message)
    return len(data).to_bytes(4, "big") + data


def claim_of(policy: Policy) -> dict[str, object]:
    return Claim(policy.version, policy.digest).message()


def signed(policy: Policy, key: Key = OPERATOR) -> dict[str, object]:
    document = Signed(policy, key.sign(b"wetware-policy:1\n" + policy.canonical()))
    return {"policy": document.canonical, "signature": document.signature}


NEXT = FIRST.next()
FORGED = signed(with_ada(FIRST, "admin"), ADA)
ANOTHER = Policy.first(ADA.peer_id).next()


def lies() -> Iterator[Any]:
    """(name, what it claims, what it sends when the document is pulled)."""
    yield "forged", claim_of(with_ada(FIRST, "admin")), framed(FORGED)
    yield "another operator", claim_of(ANOTHER), framed(signed(ANOTHER, ADA))
    yield "digest of another", {"version": 2, "digest": bytes(32)}, framed(signed(NEXT))
    yield (
        "version of another",
        {"version": 9, "digest": claim_of(NEXT)["digest"]},
        framed(signed(NEXT)),
    )
    yield "ours as later", {"version": 9, "digest": claim_of(FIRST)["digest"]}, b""
    yield "not a map", claim_of(NEXT), framed([1, 2])
    yield "not CBOR", claim_of(NEXT), b"\x00\x00\x00\x04\xff\xff\xff\xff"
    yield "other fields", claim_of(NEXT), framed({**signed(NEXT), "more": 1})
    yield "wrong types", claim_of(NEXT), framed({"policy": "x", "signature": 3})
    yield "empty", claim_of(NEXT), framed({})
    yield "oversize", claim_of(NEXT), (ANSWER_BYTES_MAX + 1).to_bytes(4, "big")
    yield "huge", claim_of(NEXT), b"\xff\xff\xff\xff"
    yield (
        "signed junk",
        claim_of(NEXT),
        framed({"policy": b"[]", "signature": OPERATOR.sign(b"wetware-policy:1\n[]")}),
    )
    yield "stalls", claim_of(NEXT), framed(signed(NEXT))[:50]
    yield "never the same", claim_of(NEXT), None
    yield "version zero", {"version": 0, "digest": bytes(32)}, b""
    yield "version true", {"version": True, "digest": bytes(32)}, b""
    yield "version huge", {"version": 2**63, "digest": bytes(32)}, b""
    yield "short digest", {"version": 2, "digest": b"x"}, b""


@pytest.mark.parametrize(("claim", "document"), [pytest.param(*c, id=n) for n, *c in lies()])
async def test_a_lying_member_is_refused_and_the_cluster_goes_on(
    tmp_path: Path, claim: dict[str, object], document: bytes | None
) -> None:
    stalls = document is not None and document.startswith(framed(signed(NEXT))[:50])
    config = {"exchange_s": 1.0 if stalls and len(document or b"") == 50 else 20.0}
    async with nodes(tmp_path, 2, catch_up_s=0.0, **config) as (a, b), host_of() as host:
        hostile = Hostile(host)
        count = 0

        async def answer(stream: Stream, request: dict[str, Any]) -> None:
            nonlocal count
            if "pull" not in request:
                await stream.write(framed(claim))
            elif document is None:
                count += 1
                await stream.write(framed({"version": 2 + count, "digest": count.to_bytes(32)}))
            else:
                await stream.write(document)
                await stream.read()

        hostile.answer = answer
        await host.dial(a.host.listen_addrs)
        await until(lambda: a.backend.spread.refused)
        (warning,) = a.log.named("peer.refused")
        assert warning["peer"] == host.peer_id
        assert a.backend.policy == FIRST
        assert a.backend.spread.members == 0
        assert not _divergences(a)
        await a.dial(b)
        await b.put(NEXT.next())
        await agree(a, b, version=3)
        assert isinstance(await a.login(OPERATOR), Accept)
        assert len(a.log.named("peer.refused")) == 1, "once a minute"
        assert not b.backend.spread.refused


async def test_members_that_stall_do_not_hold_a_change_up(tmp_path: Path) -> None:
    async with (
        nodes(tmp_path, 2, exchange_s=30.0, recheck_s=600.0) as (a, b),
        contextlib.AsyncExitStack() as stack,
    ):
        pulled = 0

        async def stall(stream: Stream, request: dict[str, Any]) -> None:
            nonlocal pulled
            if "pull" not in request:
                await stream.write(framed(claim_of(NEXT)))
                return
            pulled += 1
            await stream.read()

        for _ in range(3):
            hostile = Hostile(await stack.enter_async_context(host_of()))
            hostile.answer = stall
            await hostile.host.dial(a.host.listen_addrs)
        await until(lambda: pulled == 3)
        await a.dial(b)
        await b.put(NEXT)
        await agree(a, b, version=2)


async def test_an_older_document_is_not_taken(tmp_path: Path) -> None:
    third = NEXT.next()
    async with node_at(tmp_path / "a", third) as a, host_of() as host:
        hostile = Hostile(host)

        async def old(stream: Stream, request: dict[str, Any]) -> None:
            assert "pull" not in request, "it asked for what it knows to be older"
            await stream.write(framed(claim_of(NEXT)))

        hostile.answer = old
        await host.dial(a.host.listen_addrs)
        await until(lambda: a.backend.spread.members)
        assert a.backend.policy == third

        # It announces the older one as later, and is asked for it.
        async def older(stream: Stream, request: dict[str, Any]) -> None:
            await stream.write(framed(signed(NEXT) if "pull" in request else claim_of(NEXT)))

        hostile.answer = older
        lie = framed({"version": 3, "digest": bytes(32)})
        await hostile.send(a.host.peer_id, lie)
        await until(lambda: a.backend.spread.refused)
        assert a.backend.policy == third


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x10\x00" + bytes(4096),
        b"\x00\x00\x00\x01\xff",
        framed([]),
        framed({"pull": "text"}),
        framed({"version": "x", "digest": bytes(32)}),
        b"\x00\x00\x00\x00",
    ],
)
async def test_malformed_requests_are_refused(tmp_path: Path, data: bytes) -> None:
    async with node_at(tmp_path / "a") as a, host_of() as host:
        await host.dial(a.host.listen_addrs)
        stream = await host.open_stream(a.host.peer_id, PROTOCOL)
        await stream.write(data)
        with pytest.raises((OverlayError, EOFError)):
            await stream.read_exactly(1)
        await until(lambda: a.backend.spread.refused)
        assert not a.backend.contact.met, "junk does not make a cluster"
        assert isinstance(await a.login(OPERATOR), Accept)


async def test_requests_are_bounded_in_rate_and_number(tmp_path: Path) -> None:
    async with node_at(tmp_path / "a", exchange_s=1.0) as a, host_of() as host:
        await host.dial(a.host.listen_addrs)
        silent = [await host.open_stream(a.host.peer_id, PROTOCOL) for _ in range(5)]
        with pytest.raises((OverlayError, EOFError)):
            await silent[4].read_exactly(1)
        for stream in silent[:4]:  # too slow
            with pytest.raises((OverlayError, EOFError)):
                await stream.read_exactly(1)
        await until(lambda: a.backend.spread.refused["slow"] == 4)
        rate = a.backend.spread.refused["auth_local.peer.rate"]
        assert rate == 1
        for _ in range(int(REQUESTS_PER_PEER_BURST) * 4):
            with contextlib.suppress(OverlayError, EOFError):
                async with await host.open_stream(a.host.peer_id, PROTOCOL) as stream:
                    await stream.write(framed(claim_of(FIRST)))
                    await stream.read_exactly(4)
            if a.backend.spread.refused["auth_local.peer.rate"] > rate:
                break
        else:
            pytest.fail("the rate is not bounded")
        assert len(a.log.named("peer.refused")) == 1


async def test_a_peer_that_does_not_speak_it_does_not_hold_the_start_up(tmp_path: Path) -> None:
    await _met(tmp_path)
    async with (
        node_at(tmp_path / "node0") as a,
        host_of() as stranger,
        node_at(tmp_path / "node1", catch_up_s=60.0) as b,
    ):
        await stranger.dial(b.host.listen_addrs)
        await b.dial(a)
        async with asyncio.timeout(60):
            assert isinstance(await b.login(OPERATOR), Accept)
        assert not b.backend.spread.refused


async def test_the_status_and_the_other_branch_s_document(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        a = await stack.enter_async_context(node_at(tmp_path / "a", NEXT))
        b = await stack.enter_async_context(node_at(tmp_path / "b", with_ada(FIRST)))
        (service,) = a.backend.services
        path = tmp_path / "s"
        await stack.enter_async_context(rpc.runtime())
        await stack.enter_async_context(
            rpc.serve_unix(path, lambda _: service.bootstrap(ADA_PRINCIPAL))
        )
        connection = await rpc.connect_unix(path)
        stack.push_async_callback(connection.aclose)
        store = PolicyClient(connection.bootstrap(PolicyClient.INTERFACE))
        status = await store.status()
        assert (status["version"], status["alone"], status["age_s"]) == (2, True, 0.0)
        await a.dial(b)
        await until(lambda: _divergences(a) and a.backend.spread.members)
        status = await store.status()
        assert not status["alone"]
        assert status["saved"]
        assert status["members"] == 1
        assert 0 <= status["age_s"] < 60
        assert status["divergences"] == [
            {
                "kind": "fork",
                "version": 2,
                "digest": b.backend.newest.digest,
                "peer": str(b.host.peer_id),
            }
        ]
        assert await store.divergent() == [b.backend.policy]
        _, new, _ = await store.resolve(OPERATOR, await store.divergent(), "common")
        await agree(a, b, version=3)
        assert b.backend.policy == new
        assert (await store.status())["divergences"] == []
        with pytest.raises(NotFound):
            await store._ref.call("divergent", digest="x" * 64)
