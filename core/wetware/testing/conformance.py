"""Whether a service, auth backend or recorder keeps its contract: run by the plugin's own tests.

    class TestCounter(ServiceConformance):
        def make(self, ctx):
            return CounterService(ctx)

pytest collects the checks, which need no fixture and no plugin of pytest's. Each runs in a loop of
its own that is watched (`run_watched`), between nodes that are connected in memory. A failed one
says what the code did: it raises, hangs, returns junk, leaves a task behind, ignores its
cancellation, gives too much, or blocks the loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from asyncio import create_task, gather, sleep, wait
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import anyio

from wetware import rpc
from wetware.base.access import Access
from wetware.base.finding import Finding
from wetware.base.log import get_logger
from wetware.broker.methods import matches
from wetware.broker.proposals import STANDARD_ROLES
from wetware.broker.tree import Tree
from wetware.errors import CapabilityError, InternalError, WetwareError
from wetware.hookspecs import (
    Accept,
    AuthBackend,
    NotMine,
    PluginContext,
    Recorder,
    Reject,
    RoleProfile,
    Service,
    Withdrawn,
)
from wetware.identity import Challenge, Channel, LoginStatus, Principal, Proof, Signer
from wetware.loader.judge import judge_auth, judge_recorder, judge_services
from wetware.overlay.rpc_pipe import RpcPipe
from wetware.testing.overlay import FakeOverlay, overlays
from wetware.testing.watched import run_watched, within

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.base.clock import Clock
    from wetware.broker.grants import Grant
    from wetware.overlay.peers import Overlay

ADA: Final = Principal("test", "ada")
EVE: Final = Principal("test", "eve")
JOIN_DOCUMENT_BYTES_MAX: Final = 512 << 10
_IN_FLIGHT_S: Final = 0.05
"""For calls to begin; those that are answered meanwhile were not in flight."""
_PROTOCOL: Final = "/wetware/conformance/1"
_EXTREMES: Final[Mapping[str, object]] = {
    "text": "\u202e" + "x" * 10_000,
    "subject": "a." * 5_000 + ">",
    "data": bytes(64 << 10),
    "int": (1 << 31) - 1,
    "float": float("nan"),
    "bool": True,
}
T = TypeVar("T")


def plugin_context(
    data_dir: Path,
    config: Any = None,
    *,
    name: str = "test",
    overlay: Overlay | None = None,
    clock: Clock = time,
    **more: Any,
) -> PluginContext:
    """What a node gives to a plugin, without a node; `more` goes to PluginContext as it is.

    Siblings are at other overlays that this one is connected to, of what is in its `services`.
    """
    if isinstance(overlay, FakeOverlay):
        more.setdefault("open_sibling", overlay.sibling)
    return PluginContext(
        name=name,
        config=config,
        log=get_logger(f"plugin.{name}"),
        data_dir=data_dir,
        clock=clock,
        overlay=overlay or FakeOverlay(),
        **more,
    )


def _check(body: Callable[[Any], Coroutine[Any, Any, None]]) -> Callable[[Any], None]:
    """A check as pytest calls it: in a watched loop."""

    def test(self: _Conformance) -> None:
        limit_s = self.limit_s
        run_watched(
            lambda: body(self), limit_s=5 * limit_s, ends_s=limit_s, blocked_s=self.blocked_s
        )

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


class _Conformance:
    """Attributes may be set in the subclass.

    Attributes:
        config: `ctx.config`: an instance of what the plugin's `ww_register_config` returns.
        limit_s: How long one step may take: a start, a call, a stop.
        blocked_s: How long a turn of the event loop may take.
    """

    config: Any = None
    limit_s: float = 10.0
    blocked_s: float = 1.0

    @contextlib.contextmanager
    def _directory(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ww-conformance-") as directory:
            yield Path(directory)

    @contextlib.asynccontextmanager
    async def _running(self, run: Callable[..., Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
        """Start as a node does it, and stop."""
        life = _Life(run, self.limit_s)
        await life.started()
        try:
            yield
        except BaseException:
            with contextlib.suppress(AssertionError):  # what went wrong first is told
                await life.stop()
            raise
        await life.stop()

    @contextlib.asynccontextmanager
    async def _maker(self) -> AsyncIterator[Callable[[], Any]]:
        """What makes the thing again and again: at one node, with one data directory."""
        raise NotImplementedError
        yield

    @_check
    async def test_it_starts_and_stops(self) -> None:
        """Twice: the second one finds what the first one left."""
        async with self._maker() as make:
            for _ in range(2):
                async with self._running(make().run):
                    await sleep(0)

    @_check
    async def test_it_stops_while_it_starts(self) -> None:
        """Cancelled in its first turns."""
        async with self._maker() as make:
            life = _Life(make().run, self.limit_s)
            await sleep(0)
            await sleep(0)
            await life.stop()


class _Life:
    """A `run` in a task group of its own, which a node would share; it begins at once."""

    def __init__(self, run: Callable[..., Coroutine[Any, Any, None]], limit_s: float) -> None:
        self._run, self._limit_s = run, limit_s
        self._started = anyio.Event()
        self._ended = False
        self._scope = anyio.CancelScope()
        self._task = create_task(self._host(), name="conformance")

    async def _host(self) -> None:
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    await tasks.start(self._call)
                    self._started.set()
        except BaseExceptionGroup as group:
            if isinstance(exc := _first(group), RuntimeError):
                exc = AssertionError(f"run() ended before it was started: {exc}")
            raise exc from None
        finally:
            self._started.set()

    async def _call(self, *, task_status: TaskStatus[None]) -> None:
        try:
            await self._run(task_status=task_status)
        except Exception as exc:
            raise AssertionError(f"run() raises {exc!r}") from exc
        self._ended = True

    async def started(self) -> None:
        await within(self._limit_s, self._started.wait(), "run(), which has not started,")
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        if self._ended and not self._scope.cancel_called:
            raise AssertionError("run() ended by itself")
        self._scope.cancel()
        await within(self._limit_s, self._task, "run(), which was cancelled,")


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


# --- services -------------------------------------------------------------------------------------


class ServiceConformance(_Conformance):
    """The checks of a service. A subclass gives `make`, and `examples` where zeros are refused.

    Attributes:
        examples: "Interface.method" → arguments of a call that has to succeed. Whatever is not
            named is called with the zero values of the schema, and with extreme ones: it may then
            refuse, by an error of `wetware.errors`.
        waits: Methods that wait for what no test brings, "Interface.method": these have to end when
            they are cancelled, and with their grant.
    """

    examples: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    waits: ClassVar[frozenset[str]] = frozenset()

    def make(self, ctx: PluginContext) -> Service:
        """The service, as `ww_register_services` makes it."""
        raise NotImplementedError

    def _declared(self) -> Service:
        with self._directory() as directory:
            return self.make(plugin_context(directory, self.config))

    @contextlib.asynccontextmanager
    async def _maker(self) -> AsyncIterator[Callable[[], Service]]:
        with self._directory() as directory:
            async with FakeOverlay() as overlay:
                ctx = plugin_context(directory, self.config, overlay=overlay)
                yield lambda: self.make(ctx)

    @contextlib.asynccontextmanager
    async def _nodes(self) -> AsyncIterator[tuple[list[Service], list[FakeOverlay]]]:
        """The service at two nodes that are connected."""
        with self._directory() as directory:
            async with rpc.runtime(), overlays(2) as nodes:
                services = []
                for number, overlay in enumerate(nodes):
                    data_dir = directory / str(number)
                    data_dir.mkdir(mode=0o700)
                    services.append(
                        self.make(plugin_context(data_dir, self.config, overlay=overlay))
                    )
                    overlay.services[services[-1].name] = services[-1]
                async with contextlib.AsyncExitStack() as stack:
                    for service in services:
                        await stack.enter_async_context(self._running(service.run))
                    yield services, list(nodes)

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[tuple[rpc.Ref, Grant]]:
        """Ada's capability of the service at a node, with all of its methods, and its grant."""
        async with self._nodes() as (services, overlays), _granted(services[0], ADA) as grant:
            servant = rpc.guarded(_bootstrap(services[0], ADA), grant)
            overlays[0].handle(
                _PROTOCOL, lambda stream: rpc.serve(RpcPipe(stream), servant), access=Access.MEMBER
            )
            stream = await overlays[1].open_stream(overlays[0].peer_id, _PROTOCOL)
            connection = await rpc.connect(RpcPipe(stream))
            try:
                yield connection.bootstrap(services[0].interface), grant
            finally:
                await connection.aclose()

    @_check
    async def test_it_is_declared(self) -> None:
        """The loader takes it, and its bootstrap is a servant of its interface, one a session."""
        service = self._declared()
        judge_services((service,))
        ada, eve = _bootstrap(service, ADA), _bootstrap(service, EVE)
        assert ada is not eve, "gives too much: bootstrap() is one object for two principals"

    @_check
    async def test_what_it_proposes_for_roles_grows(self) -> None:
        """No role has more than a higher one; the loader judges each by itself."""
        service = self._declared()
        proposed = service.roles
        methods = _methods(service.interface)
        covered = {
            role: {name for name in methods if matches(patterns, *name.split(":"))}
            for role, patterns in proposed.items()
        }
        held = [role for role in STANDARD_ROLES if role in covered]
        for lower, higher in pairwise(held):
            more = sorted(name.replace(":", ".") for name in covered[lower] - covered[higher])
            assert not more, f"gives too much: {lower} has {more[0]}, and {higher} has not"

    @_check
    async def test_what_ends_things_gives_nothing(self) -> None:
        """`ending` is called while nothing can be recorded: no capability comes of it."""
        service = self._declared()
        known = {name.replace(":", ".") for name in _methods(service.interface)}
        strange = sorted(service.ending - known)
        assert not strange, f"ending has {strange[0]!r}, which is no method of the service"
        for interface in service.interface.reachable():
            given = interface.reachable(lambda method: method.where in service.ending)
            assert len(given) == 1, (
                f"gives too much: ending methods of {interface.name} give a {given[1].name}"
            )

    @_check
    async def test_every_method_answers(self) -> None:
        """With examples, zeros and extremes; then what it gave ends with its grant."""
        async with self._session() as (ref, grant):
            held = await self._call_all(ref)
            grant.revoke("the test")
            await self._all_ended(held, "its grant ended")

    async def _all_ended(self, held: Sequence[rpc.Ref], what: str) -> None:
        for each in held:
            assert each.interface is not None
            for name in each.interface.methods:
                where = f"{each.interface.name}.{name}"
                try:
                    await within(self.limit_s, each.call(name), where)
                except CapabilityError:
                    continue
                except WetwareError as exc:
                    raise AssertionError(f"{where}, after {what}: {exc!r}") from exc
                raise AssertionError(f"gives too much: {where} works after {what}")

    @_check
    async def test_calls_are_cut(self) -> None:
        """Calls in flight end with their grant, and leave nothing."""
        async with self._session() as (ref, grant):
            assert ref.interface is not None
            calls = [
                create_task(ref.call(method.name, **_callbacks(method)))
                for method in ref.interface.methods.values()
            ]
            await wait(calls, timeout=_IN_FLIGHT_S)
            grant.revoke("the test")
            cut = gather(*calls, return_exceptions=True)
            await within(self.limit_s, cut, "a call whose grant was revoked")

    @_check
    async def test_its_siblings_answer(self) -> None:
        """If it has any: as the service's methods, for a node, and until that is no member more."""
        declared = self._declared()
        interface, node = declared.peer_interface, Principal("node", str(FakeOverlay().peer_id))
        if interface is None:
            made = declared.peer_bootstrap(node)
            assert made is None, "peer_interface is None, and peer_bootstrap() makes something"
            return
        assert declared.interface not in interface.reachable(), (
            f"gives too much: a node comes to hold a {declared.interface.name}"
        )
        async with self._nodes() as (services, (here, there)):
            one, other = (services[0].peer_bootstrap(node) for _ in range(2))
            bound = type(one).__ww_interface__ if isinstance(one, rpc.Servant) else None
            assert bound is not None, f"peer_bootstrap() returns {one!r}"
            assert bound.is_a(interface), f"peer_bootstrap() is a {bound.name}"
            assert one is not other, "gives too much: peer_bootstrap() is one object for two nodes"
            ref = await there.sibling(here.peer_id, declared.name)
            held = await self._call_all(ref)
            calls = [
                create_task(ref.call(method.name, **_callbacks(method)))
                for method in interface.methods.values()
            ]
            await wait(calls, timeout=_IN_FLIGHT_S)
            here.siblings.gone(there.peer_id)
            cut = gather(*calls, return_exceptions=True)
            await within(self.limit_s, cut, "a call of a node that is no member any more")
            await self._all_ended(held, "that node was put out")

    async def _call_all(self, ref: rpc.Ref) -> list[rpc.Ref]:
        """Call each method of each interface that can be come by; the references that were got."""
        held, met = [ref], set[rpc.Interface]()
        for each in held:  # which grows
            if each.interface in (None, rpc.WW.ByteStream) or each.interface in met:
                continue  # a stream of bytes is rpc's own, and its first call lasts as long as it
            met.add(each.interface)
            for method in each.interface.methods.values():
                where = f"{each.interface.name}.{method.name}"
                if where in self.waits:
                    call = create_task(each.call(method.name, **_callbacks(method)))
                    await wait([call], timeout=_IN_FLIGHT_S)
                    call.cancel()
                    await within(self.limit_s, wait([call]), f"{where}, cancelled,")
                    continue
                example = self.examples.get(where)
                if example is not None:
                    args = {**_callbacks(method), **example}
                    held += _refs(await within(self.limit_s, each.call(method.name, **args), where))
                for values in ({}, _extremes(method)):
                    args = {**_callbacks(method), **values}
                    try:
                        got = await within(self.limit_s, each.call(method.name, **args), where)
                    except InternalError as exc:
                        raise AssertionError(f"{where} raises, or returns junk: {exc}") from exc
                    except WetwareError:
                        continue  # it may refuse
                    held += _refs(got)
        return [each for each in held if each.interface is not None]


@contextlib.asynccontextmanager
async def _granted(service: Service, principal: Principal) -> AsyncIterator[Grant]:
    """A service's grant with all methods, of a tree of its own."""
    tree = Tree(time)
    profile = RoleProfile({service.name: frozenset({"*"})})
    session = tree.session(principal, [tree.root(principal, "test", profile)])
    yield session.derive(kind="service", label=service.name, service=service.name)
    tree.close()


def _bootstrap(service: Service, principal: Principal) -> rpc.Servant:
    interface, servant = service.interface, service.bootstrap(principal)
    assert isinstance(interface, rpc.Interface), f"interface is {interface!r}"
    assert isinstance(servant, rpc.Servant), f"bootstrap() returns {servant!r}"
    bound = type(servant).__ww_interface__
    assert bound is not None, f"{type(servant).__name__} has no interface"
    assert bound.is_a(interface), f"bootstrap() is a {bound.name}, not a {interface.name}"
    return servant


def _methods(interface: rpc.Interface) -> set[str]:
    """All that a holder can come to call, as "Interface:method"."""
    return {f"{each.name}:{name}" for each in interface.reachable() for name in each.methods}


def _extremes(method: rpc.Method) -> dict[str, object]:
    kinds = method.param_kinds.items()
    return {param: _EXTREMES[kind] for param, kind in kinds if kind in _EXTREMES}


def _callbacks(method: rpc.Method) -> dict[str, rpc.Servant]:
    """An object for each parameter that wants one; it takes every call."""
    return {param: _taker(interface) for param, interface in method.takes.items()}


def _taker(interface: rpc.Interface) -> rpc.Servant:
    async def take(self: rpc.Servant, **_: object) -> dict[str, object] | None:
        return None

    async def answer(self: rpc.Servant, **_: object) -> dict[str, object] | None:
        return {}

    methods: dict[str, Any] = {
        name: answer if method.results else take for name, method in interface.methods.items()
    }
    made: type[rpc.Servant] = type("Taker", (rpc.Servant,), methods, interface=interface)
    return made()


def _refs(value: Any) -> list[rpc.Ref]:
    """The references in what a call gave."""
    if isinstance(value, rpc.Ref):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [ref for each in inner for ref in _refs(each)]


# --- auth backends --------------------------------------------------------------------------------


class AuthConformance(_Conformance):
    """The checks of an auth backend. A subclass gives what raises NotImplementedError here.

    Attributes:
        name: The plugin's name, e.g. "auth_acme".
        cluster: The ID of the cluster that challenges name.
    """

    name: str = ""
    cluster: str = "ab" * 20

    def make(self, ctx: PluginContext) -> AuthBackend:
        """The backend, as `ww_register_auth` makes it."""
        raise NotImplementedError

    async def member(self, backend: AuthBackend) -> Signer:
        """The signer of somebody who has a role, given if need be; the same one each time."""
        raise NotImplementedError

    def stranger(self) -> Signer:
        """A signer that nobody knows: for another key, in the same scheme."""
        raise NotImplementedError

    async def withdraw(self, backend: AuthBackend) -> None:
        """Take the member's roles away. Where nobody can lose a role, say `withdraw = None`."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def _maker(self) -> AsyncIterator[Callable[[], AuthBackend]]:
        """Backends of one cluster."""
        founded: list[bytes] = []
        with self._directory() as directory:
            async with FakeOverlay() as overlay:
                ctx = plugin_context(directory, self.config, name=self.name, overlay=overlay)

                def make() -> AuthBackend:
                    founding = founded[0] if founded else None
                    backend = self.make(dataclasses.replace(ctx, founding=founding))
                    founded.append(backend.founding)
                    return backend

                yield make
        assert len(set(founded)) == 1, "founding differs after a restart"

    @contextlib.asynccontextmanager
    async def _backend(self) -> AsyncIterator[AuthBackend]:
        with self._directory() as directory:
            async with rpc.runtime(), FakeOverlay() as overlay:
                ctx = plugin_context(directory, self.config, name=self.name, overlay=overlay)
                backend = self.make(ctx)
                async with self._running(backend.run):
                    yield backend

    def _challenge(self, backend: AuthBackend) -> Challenge:
        """As a node makes it; each is another node's, on another connection."""
        return Challenge(
            nonce=os.urandom(32),
            verifier=FakeOverlay().peer_id,
            cluster=self.cluster,
            channel=Channel("noise", os.urandom(32)),
            schemes=backend.schemes,
            policy_epoch=backend.epoch,
            not_after_ms=round(time.time() * 1000) + 10_000,
        )

    async def _judged(
        self, backend: AuthBackend, challenge: Challenge, proof: Proof
    ) -> Accept | Reject | NotMine:
        verdict = await within(
            self.limit_s, backend.authenticate(challenge, proof), "authenticate()"
        )
        assert isinstance(verdict, Accept | Reject | NotMine), f"authenticate() returns {verdict!r}"
        if isinstance(verdict, Reject):
            assert isinstance(verdict.status, LoginStatus), f"Reject.status is {verdict.status!r}"
            assert verdict.status is not LoginStatus.GRANTED, "gives too much: a Reject is GRANTED"
            assert verdict.status is not LoginStatus.UNINITIALIZED, "a Reject says nothing"
        return verdict

    async def _refused(
        self, backend: AuthBackend, challenge: Challenge, proof: Proof, what: str
    ) -> None:
        try:
            verdict = await self._judged(backend, challenge, proof)
        except Exception as exc:
            if isinstance(exc, AssertionError):
                raise
            raise AssertionError(f"authenticate() raises for {what}: {exc!r}") from exc
        assert not isinstance(verdict, Accept), f"gives too much: it accepts {what}"

    @_check
    async def test_it_is_declared(self) -> None:
        """The loader takes it, and what it says of itself has the types that it should have."""
        async with self._backend() as backend:
            judge_auth(self.name.removeprefix("auth_") or backend.name, backend)
            assert backend.schemes, "schemes is empty"
            assert all(isinstance(scheme, str) for scheme in backend.schemes), "schemes"
            assert isinstance(backend.founding, bytes), "founding is no bytes"
            assert backend.founding, "founding is empty: any two clusters would be one"
            assert isinstance(backend.epoch, int), "epoch is no int"
            judge_services(backend.services)
            document = await within(self.limit_s, backend.join_document(), "join_document()")
            assert isinstance(document, bytes), "join_document() returns no bytes"
            assert len(document) <= JOIN_DOCUMENT_BYTES_MAX, "join_document() is too large"
            assert all(isinstance(each, Finding) for each in backend.findings()), "findings()"
            peer = FakeOverlay().peer_id
            admitted = await within(self.limit_s, backend.admit_node(peer), "admit_node()")
            assert isinstance(admitted, bool), f"admit_node() returns {admitted!r}"

    @_check
    async def test_a_member_is_let_in(self) -> None:
        """With roles that have profiles, and that `roles` knows as well."""
        async with self._backend() as backend:
            signer = await self.member(backend)
            challenge = self._challenge(backend)
            verdict = await self._judged(backend, challenge, await signer.sign(challenge))
            assert isinstance(verdict, Accept), f"a member is refused: {verdict!r}"
            principal = verdict.principal
            assert isinstance(principal, Principal), f"Accept.principal is {principal!r}"
            assert principal.backend == backend.name, f"{principal} is of another backend"
            assert verdict.roles, "a member has no role"
            known = backend.roles(principal)
            assert verdict.roles <= known, (
                f"gives too much: {set(verdict.roles - known)} is no role"
            )
            for role in verdict.roles:
                profile = backend.profile(role)
                assert isinstance(profile, RoleProfile), f"profile({role!r}) is {profile!r}"

    @_check
    async def test_strangers_are_refused(self) -> None:
        """Who is unknown, and who has no role by a name that there is not."""
        async with self._backend() as backend:
            member, stranger = await self.member(backend), self.stranger()
            challenge = self._challenge(backend)
            proof = await stranger.sign(challenge)
            await self._refused(backend, challenge, proof, "a stranger's proof")
            good = await member.sign(challenge)
            other = dataclasses.replace(good, scheme="no-such-scheme")
            await self._refused(backend, challenge, other, "a proof of another scheme")
            for name in (backend.name, "another"):
                roles = backend.roles(Principal(name, "nobody-of-this-name"))
                assert roles == frozenset(), f"gives too much: nobody has {set(roles)}"
            profile = backend.profile("no-such-role")
            assert isinstance(profile, RoleProfile), f"an unknown role's profile is {profile!r}"
            assert not any(profile.services.values()), "gives too much: to an unknown role"

    @_check
    async def test_junk_is_refused(self) -> None:
        """A member's proof with other bytes, and bytes that are no proof at all."""
        async with self._backend() as backend:
            challenge = self._challenge(backend)
            good = await (await self.member(backend)).sign(challenge)
            stranger = await self.stranger().sign(challenge)
            payload = good.payload
            flipped = [
                payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :]
                for at in range(0, len(payload), max(1, len(payload) // 32))
            ]
            half = len(payload) // 2
            mixed = [
                payload[:half] + stranger.payload[half:],
                stranger.payload[:half] + payload[half:],
            ]
            for junk in (b"", b"\0", os.urandom(64), payload[:-1], payload * 2, *mixed, *flipped):
                if junk != payload:
                    proof = dataclasses.replace(good, payload=junk)
                    await self._refused(backend, challenge, proof, f"junk ({len(junk)} bytes)")

    @_check
    async def test_a_proof_is_for_one_challenge(self) -> None:
        """What was signed for another node, cluster, connection or time proves nothing here."""
        async with self._backend() as backend:
            member = await self.member(backend)
            challenge = self._challenge(backend)
            other = self._challenge(backend)
            for change in ("nonce", "verifier", "cluster", "channel", "not_after_ms"):
                value = getattr(other, change)
                if change == "cluster":
                    value = "cd" * 20
                if change == "not_after_ms":
                    value += 1000
                elsewhere = dataclasses.replace(challenge, **{change: value})
                proof = await member.sign(elsewhere)
                # The core compares the statement; the backend decides by the payload.
                proof = dataclasses.replace(proof, signed=challenge.signed_bytes())
                await self._refused(backend, challenge, proof, f"a proof for another {change}")

    @_check
    async def test_what_is_withdrawn_is_gone(self) -> None:
        """The watchers are told, and the next login is refused."""
        if self.withdraw is None:
            return
        async with self._backend() as backend:
            member = await self.member(backend)
            challenge = self._challenge(backend)
            before = await self._judged(backend, challenge, await member.sign(challenge))
            assert isinstance(before, Accept), f"a member is refused: {before!r}"
            told: list[object] = []
            tell, late = told.append, list[object]()
            end = backend.watch(tell)
            backend.watch(tell)()  # ends itself, and not the other that has the same callback
            backend.watch(late.append)()
            await within(self.limit_s, self.withdraw(backend), "withdraw()")
            about = [each for each in told if isinstance(each, Withdrawn)]
            assert any(each.principal in (None, before.principal) for each in about), (
                "gives too much: no watcher was told that roles were withdrawn"
            )
            assert not late, "a watch that was ended is told"
            end()
            kept = backend.roles(before.principal) & before.roles
            lost = frozenset().union(*(each.roles or before.roles for each in about))
            assert not kept & lost, f"gives too much: {set(kept & lost)} was withdrawn"
            challenge = self._challenge(backend)
            after = await self._judged(backend, challenge, await member.sign(challenge))
            if isinstance(after, Accept):
                assert not after.roles & lost, "gives too much: a withdrawn role logs in"


# --- recorders ------------------------------------------------------------------------------------


class RecorderConformance(_Conformance):
    """The checks of a recorder. A subclass gives what raises NotImplementedError here.

    Attributes:
        name: The plugin's name.
    """

    name: str = ""

    def make(self, ctx: PluginContext, sign: Callable[[bytes], bytes]) -> Recorder:
        """The recorder, as `ww_register_recorder` makes it."""
        raise NotImplementedError

    def recorded(self, data_dir: Path) -> Sequence[Mapping[str, Any]]:
        """What a crash would leave: the records that are kept now, the oldest first.

        `data_dir` is the `ctx.data_dir` of the recorder, which may be running.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def _made(self) -> Iterator[tuple[Callable[[], Recorder], Callable[[], list[str]]]]:
        """What makes a recorder in one directory, and what tells the events on record there."""
        with self._directory() as directory:
            data_dir = directory / "plugins" / (self.name or "test")
            data_dir.mkdir(parents=True, mode=0o700)
            overlay = FakeOverlay()
            domain = f"wetware-{self.name}-checkpoint:2\n".encode()

            def sign(data: bytes) -> bytes:
                return overlay.key.sign(domain + data)

            def make() -> Recorder:
                ctx = plugin_context(data_dir, self.config, name=self.name, overlay=overlay)
                return self.make(ctx, sign)

            def recorded() -> list[str]:
                events = [str(record.get("event")) for record in self.recorded(data_dir)]
                return [event for event in events if event.startswith("test.")]

            yield make, recorded

    @contextlib.asynccontextmanager
    async def _maker(self) -> AsyncIterator[Callable[[], Recorder]]:
        with self._made() as (make, _):
            yield make

    @_check
    async def test_it_is_declared(self) -> None:
        """The loader takes it, and what it says of itself has the types that it should have."""
        with self._made() as (make, _):
            recorder = make()
            async with self._running(recorder.run):
                judge_recorder(self.name or recorder.name, recorder)
                judge_services(recorder.services)
                assert all(isinstance(each, Finding) for each in recorder.findings()), "findings()"

    @_check
    async def test_what_is_admitted_is_on_record(self) -> None:
        """When `admit` returns, in the order of the calls, and after a restart."""
        with self._made() as (make, recorded):
            wanted = [f"test.{number}" for number in range(20)]
            recorder = make()
            async with self._running(recorder.run):
                for event in wanted:
                    await within(self.limit_s, _admitted(recorder, event), "admit()")
                    assert recorded()[-1:] == [event], f"admit() returned, and {event} is not there"
                many = [_admitted(recorder, "test.many") for _ in range(64)]
                await within(self.limit_s, gather(*many), "64 calls of admit() at a time")
            wanted += ["test.many"] * 64
            assert recorded() == wanted, "the record is not complete, or not in order"
            async with self._running(make().run):
                assert recorded() == wanted, "a restart loses or changes what is on record"

    @_check
    async def test_what_is_reported_is_on_record_once_written(self) -> None:
        """And at the latest when it has stopped; `report` itself does not wait."""
        with self._made() as (make, recorded):
            recorder = make()
            async with self._running(recorder.run):
                for number in range(1000):
                    recorder.report(_record(f"test.{number}"), ending=number % 2 == 0)
                await within(self.limit_s, recorder.written(), "written()")
                wanted = [f"test.{number}" for number in range(1000)]
                assert recorded() == wanted, (
                    "written() returned, and what was reported is not there"
                )
                recorder.report(_record("test.last"), ending=False)
            assert recorded() == [*wanted, "test.last"], "what waited when it stopped is lost"

    @_check
    async def test_it_admits_nothing_once_it_has_ended(self) -> None:
        """What cannot be recorded is not given: `admit` raises."""
        with self._made() as (make, recorded):
            recorder = make()
            async with self._running(recorder.run):
                pass
            try:
                await within(self.limit_s, recorder.admit(_record("test.late")), "admit()")
            except AssertionError:
                raise
            except Exception:  # whatever it raises, nothing is given
                return
            assert "test.late" in recorded(), "gives too much: it admits what it does not record"


async def _admitted(recorder: Recorder, event: str) -> None:
    try:
        await recorder.admit(_record(event))
    except Exception as exc:
        raise AssertionError(f"admit() raises {exc!r}") from exc


def _record(event: str) -> dict[str, str | int | bool]:
    return {"time_ms": round(time.time() * 1000), "event": event, "principal": str(ADA)}
