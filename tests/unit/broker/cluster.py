"""Brokers in one process that talk over real RPC: a cluster without an overlay."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from wetware import rpc
from wetware.broker.broker import Broker
from wetware.broker.gate import GateServant
from wetware.broker.limits import BrokerLimits, LoginLimits
from wetware.broker.protocol import CORE
from wetware.broker.records import Records
from wetware.broker.session import SessionServant
from wetware.broker.store import GrantStore
from wetware.broker.sturdy import SturdyRef
from wetware.broker.tree import Tree
from wetware.client.session import Session, opened, redeemed
from wetware.client.values import terms_to_struct
from wetware.hookspecs import RoleProfile, Service, Withdrawn
from wetware.identity import Channel, Key, Principal

from .parts import Clock

BOX = rpc.load(Path(__file__).with_name("box.capnp"))


class ItemServant(rpc.Servant, interface=BOX.Item):
    def __init__(self, box: BoxService, key: str) -> None:
        self._box, self._key = box, key

    async def read(self) -> dict[str, Any]:
        return {"data": self._box.data.get(self._key, b"")}

    async def box(self) -> dict[str, Any]:
        return {"box": BoxServant(self._box)}


class BoxServant(rpc.Servant, interface=BOX.Box):
    def __init__(self, service: BoxService) -> None:
        self._service = service

    async def put(self, key: str, data: bytes) -> dict[str, Any]:
        self._service.data[key] = data
        self._service.puts += 1
        return {"size": len(data)}

    async def get(self, key: str) -> dict[str, Any]:
        return {"data": self._service.data.get(key, b"")}

    async def open(self, key: str) -> dict[str, Any]:
        await self._service.gate.wait()
        return {"item": ItemServant(self._service, key)}

    async def items(self) -> dict[str, Any]:
        entries = [
            {"key": key, "item": ItemServant(self._service, key)} for key in self._service.data
        ]
        return {"entries": entries, "first": entries[0] if entries else {}}

    async def watch(self, sink: rpc.Ref) -> None:
        self._service.sinks.append(sink)

    async def slow(self) -> None:
        self._service.running += 1
        try:
            await asyncio.Event().wait()
        finally:
            self._service.running -= 1

    async def any(self) -> dict[str, Any]:
        return {"cap": self._service.passed or ItemServant(self._service, "any")}

    async def keep(self, item: rpc.Ref) -> None:
        self._service.item = item

    async def kept(self) -> dict[str, Any]:
        return {"item": self._service.item}

    async def hand(self, session: rpc.Ref | None, item: rpc.Ref | None) -> None:
        self._service.handed = rpc.current_guard(), session, item


class BoxService(Service):
    name = "box"
    interface = BOX.Box
    entries = "one"

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.sinks: list[rpc.Ref] = []
        self.item: Any = None
        self.passed: Any = None  # in place of an item of its own
        self.handed: Any = None
        self.running = self.puts = 0
        self.gate = asyncio.Event()
        self.gate.set()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return BoxServant(self)


class Backend:
    """Users and their roles, as the test says."""

    name = "fake"
    schemes = ("fake",)
    founding = b"x"
    epoch = 1
    services = ()

    def __init__(self, profiles: dict[str, RoleProfile], users: dict[str, set[str]]) -> None:
        self.profiles, self.users = profiles, users
        self.callbacks: list[Callable[[Any], None]] = []

    def roles(self, principal: Principal) -> frozenset[str]:
        return frozenset(self.users.get(principal.subject, ()))

    def profile(self, role: str) -> RoleProfile:
        return self.profiles.get(role, RoleProfile())

    def watch(self, callback: Callable[[Any], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: None

    def withdraw(self, name: str, role: str) -> None:
        self.users[name].discard(role)
        for callback in self.callbacks:
            callback(Withdrawn(Principal("fake", name), frozenset({role}), "withdrawn"))


class Kept:
    """A recorder in memory."""

    name = "kept"
    services = ()

    def __init__(self, records: list[Any]) -> None:
        self._records = records

    async def run(self, *, task_status: Any) -> None:
        task_status.started()

    async def admit(self, record: Any) -> None:
        self._records.append(record)

    def report(self, record: Any, *, ending: bool) -> None:
        self._records.append(record)

    async def written(self) -> None:
        pass

    def findings(self) -> tuple[()]:
        return ()


class MemNode:
    """A broker with the service `box`, served at a unix socket."""

    def __init__(
        self, name: str, directory: Path, backend: Backend, clock: Clock, **limits: Any
    ) -> None:
        self.key = Key.from_seed(name.encode().ljust(32, b"."))
        self.name, self.path, self.clock = name, directory / f"{name}.sock", clock
        self.backend, self.directory = backend, directory / name
        self.limits = BrokerLimits(**limits)
        self.records: list[Any] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[MemNode]:
        self.box = BoxService()
        self.store = GrantStore(self.directory, self.clock)
        self.tree = Tree(self.clock, store=self.store, limits=self.limits)
        self.broker = Broker(
            peer_id=self.key.peer_id,
            cluster="c",
            backend=self.backend,  # type: ignore[arg-type]
            services={"box": self.box},  # type: ignore[dict-item]
            clock=self.clock,
            audit=Records(self.clock, Kept(self.records)),
            limits=LoginLimits(
                terminals_per_connection_max=1024,
                sessions_max=100_000,
                sessions_per_principal_max=100_000,
            ),
            tree=self.tree,
        )
        self.broker.restore()
        channel = Channel("unix", self.key.peer_id.multihash)
        try:
            async with rpc.serve_unix(self.path, lambda _: GateServant(self.broker, channel, None)):
                yield self
        finally:
            self.broker.close()
            self.store.close()

    @contextlib.asynccontextmanager
    async def login(self, user: str, roles: Iterable[str] = ("member",)) -> AsyncIterator[Session]:
        """A session over a connection of its own; who the user is was settled before."""
        grant = self.broker.open_session(Principal("fake", user), roles)
        servant = SessionServant(self.broker, grant, frozenset(roles))
        path = self.path.with_suffix(f".{grant.id}")
        async with (
            rpc.serve_unix(path, lambda _: rpc.guarded(servant, grant)),
            await rpc.connect_unix(path) as connection,
        ):
            ref = connection.bootstrap(CORE.Session)
            yield await opened(ref, None, self.broker.peer_id)

    @contextlib.asynccontextmanager
    async def redeem(self, text: str) -> AsyncIterator[Session]:
        async with await rpc.connect_unix(self.path) as connection:
            yield await redeemed(connection, SturdyRef.parse(text))


async def box(session: Session) -> rpc.Ref:
    return await session.open("box", BOX.Box)


__all__ = ["BOX", "Backend", "BoxService", "MemNode", "box", "terms_to_struct"]
