"""`session.sync`: what programs of many machines agree by, from any node.

async with session.sync.lock("deploy") as held:
    await session.kv.put("/deploy/version", b"7", fence=held)

What is held is held under one lease of the session. When that is lost the block is cancelled and
LeaseEnded raised; since what the block has sent may still be on its way, writes are fenced.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self, TypeVar

import anyio

from wetware import rpc
from wetware.base.tasks import Tasks
from wetware.errors import WetwareError
from wetware_sync.engine import LeaseEnded
from wetware_sync.errors import NotFree
from wetware_sync.lease import TTL_S, Lease
from wetware_sync.reach import AtHome
from wetware_sync.schema import SCHEMA

WAIT_MS_MAX: Final = 2**32 - 1
NONCE_BYTES: Final = 16
LET_GO_S: Final = 2.0
"""For the end of a block; beyond it the lock is let go in the background."""
LET_GO_AGAIN_S: Final = 0.25
"""Between two tries: until one is heard the others wait for a lock that nobody has."""


class _Fenceable(Protocol):
    """What is used of a `wetware.Session`, whose module knows this one."""

    async def attenuate(
        self,
        services: Mapping[str, Iterable[str]] | None,
        *,
        fence: bytes,
        label: str,
    ) -> Self: ...

    async def close(self) -> None: ...


S = TypeVar("S", bound=_Fenceable)


@dataclass(frozen=True, slots=True)
class Waiting:
    """One who holds something, or waits for it.

    Attributes:
        principal: Who.
        kind: "lock", "shared", "semaphore" or "election".
        held: Whether it is held by them.
        value: What they say, of a leader.
        revision: When they came.
    """

    principal: str
    kind: str
    held: bool
    value: bytes
    revision: int


class Held:
    """Something that is held.

    Attributes:
        name: Of the lock.
        hold: For the `fence` of writes to the store; a secret.
        revision: That its fencing token has.
    """

    def __init__(self, lease: Lease, which: dict[str, Any], reply: dict[str, Any]) -> None:
        self._lease, self._which = lease, which
        self._fenced: list[_Fenceable] | None = []
        self.name: str = which["name"]
        self.hold: bytes = reply["hold"]
        self.revision: int = reply["revision"]

    @property
    def lost(self) -> WetwareError | None:
        """Why it is not held any more; None while it is."""
        return self._lease.ended

    async def token(self) -> bytes:
        """Its fencing token, for a service of one node: see `fence`.

        The store signs it when it is asked for. Raises Denied "capability.denied.fenced" where it
        is not held any more, Unsupported "unsupported.fence" of what several may hold at once.
        """
        with self._lease.home.read():
            reply = await (await self._lease.ref()).call("token", **self._which)
        token: bytes = reply["token"]
        return token

    async def fence(
        self, session: S, services: Mapping[str, Iterable[str]] | None = None, *, label: str = ""
    ) -> S:
        """A part of a session whose node refuses it once it has seen a later holder of the lock.

        It is for services that are entered at that node alone (`Service.entries`), and ends with
        the block. Nothing makes others show a token: whoever may write without one still can.

        Args:
            session: At the service's node: `async with session.node("name=db") as there`.
            services: Of it, as `Session.attenuate` takes them; None: all.
            label: What it is for, in `ww grants`.

        Raises Unsupported "unsupported.fence" for services that members have in common, and of
        what several may hold at once; LeaseEnded where it is not held any more.
        """
        if self._fenced is None or self.lost is not None:
            raise LeaseEnded(f"{self.name!r} is not held any more", hint="take it again")
        label = label or f"while {self.name} is held"
        fenced = await session.attenuate(services, fence=await self.token(), label=label)
        self._fenced.append(fenced)
        return fenced

    async def _end(self) -> None:
        """End what was fenced: calls that still go on there would keep the next holder waiting."""
        fenced, self._fenced = self._fenced or (), None
        await asyncio.gather(*(each.close() for each in fenced))

    async def proclaim(self, value: bytes) -> None:
        """Change what others see; raises Denied where it is not held any more."""
        with self._lease.home.written():
            await (await self._lease.ref()).call("proclaim", value=value, **self._which)


class Sync:
    """The service `sync` of a session. Names are parts with slashes between: "deploy", "a/b".

    Args:
        here: The service as the session has it.
    """

    INTERFACE = SCHEMA.Sync

    def __init__(self, here: Any) -> None:
        self.home = AtHome(here, "sync")
        self._leases: dict[float, Lease] = {}
        self._taking = asyncio.Lock()  # one of anyio takes a turn of the loop to be had
        self._owed = Tasks()

    def lock(
        self, name: str, *, shared: bool = False, wait_s: float | None = None, ttl_s: float = TTL_S
    ) -> contextlib.AbstractAsyncContextManager[Held]:
        """Hold a lock for the block; with `shared` together with others that say so.

        Args:
            name: Of the lock. It is not reentrant: a second one of the same program waits.
            shared: As a reader.
            wait_s: For it to be free; 0: not at all, None: as long as it takes.
            ttl_s: How long it stays taken when this program is cut off or dies: 2 s to a day.

        Raises NotFree, LeaseEnded from the block when it is lost, HomeDown.
        """
        return self._held(name, "shared" if shared else "lock", wait_s, ttl_s)

    def semaphore(
        self, name: str, places: int, *, wait_s: float | None = None, ttl_s: float = TTL_S
    ) -> contextlib.AbstractAsyncContextManager[Held]:
        """Hold one of `places` places for the block; otherwise as `lock`."""
        return self._held(name, "semaphore", wait_s, ttl_s, places=places)

    def election(
        self,
        name: str,
        value: bytes = b"",
        *,
        wait_s: float | None = None,
        ttl_s: float = TTL_S,
    ) -> contextlib.AbstractAsyncContextManager[Held]:
        """Be the leader for the block, with a value that others see; otherwise as `lock`."""
        return self._held(name, "election", wait_s, ttl_s, value=value)

    async def waiting(self, name: str, kind: str = "lock") -> tuple[Waiting, ...]:
        """Who holds it and who waits, in their order."""
        reply = await self.home.call("look", name=name, kind=kind)
        return _waiting(reply)

    async def leaders(self, name: str) -> AsyncIterator[Waiting | None]:
        """The leader now, and each one after; None while there is none."""
        told: object = self
        revision = 0
        while True:
            with rpc.time_limit(None):
                reply = await self.home.call(
                    "follow", name=name, kind="election", revision=revision
                )
            revision = reply["revision"]
            leader = next((each for each in _waiting(reply) if each.held), None)
            if leader != told:
                told = leader
                yield leader

    async def add(self, counter: str, by: int = 1) -> int:
        """Add to a counter; returns what it is then. Raises Unknown, too."""
        with self.home.written():
            return int((await self.home.call("add", name=counter, by=by))["value"])

    async def count(self, counter: str) -> int:
        """What a counter is."""
        return int((await self.home.call("add", name=counter, by=0))["value"])

    async def block(self, barrier: str) -> None:
        """Raise a barrier: who passes it waits."""
        with self.home.written():
            await self.home.call("block", name=barrier, blocked=True)

    async def unblock(self, barrier: str) -> None:
        """Let everybody through."""
        with self.home.written():
            await self.home.call("block", name=barrier, blocked=False)

    async def pass_(self, barrier: str, *, wait_s: float | None = None) -> None:
        """Wait until the barrier is not up; raises NotFree after `wait_s`."""
        with rpc.time_limit(None):
            await self.home.call("pass_", name=barrier, wait_ms=_wait_ms(wait_s))

    # --- holding ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _held(
        self,
        name: str,
        kind: str,
        wait_s: float | None,
        ttl_s: float,
        *,
        places: int = 1,
        value: bytes = b"",
    ) -> AsyncIterator[Held]:
        lease = await self._lease(ttl_s)
        which = {"name": name, "kind": kind, "nonce": secrets.token_bytes(NONCE_BYTES)}
        with lease.living():
            try:
                with rpc.time_limit(None):
                    reply = await (await lease.ref()).call(
                        "acquire", places=places, value=value, wait_ms=_wait_ms(wait_s), **which
                    )
            except NotFree:
                raise
            except BaseException:  # it may have been taken, and the answer is lost
                self._let_go_soon(lease, which)
                raise
            held, is_free = Held(lease, which, reply), False
            try:
                yield held
            finally:
                try:
                    with anyio.move_on_after(LET_GO_S, shield=True):
                        await held._end()
                        await self._let_go(lease, which)
                        is_free = True
                finally:  # also where a cancellation of asyncio's own breaks that off
                    if not is_free:
                        self._let_go_soon(lease, which)

    async def _lease(self, ttl_s: float) -> Lease:
        """The one lease of this session that lasts so long."""
        async with self._taking:
            lease = self._leases.get(ttl_s)
            if lease is None or lease.ended is not None:
                lease = Lease(self.home, "enter", ttl_s)
                await lease.__aenter__()
                self._leases[ttl_s] = lease
            return lease

    def _let_go_soon(self, lease: Lease, which: dict[str, Any]) -> None:
        """As soon as the store can be reached."""
        self._owed.start(self._let_go(lease, which))

    async def _let_go(self, lease: Lease, which: dict[str, Any]) -> None:
        while lease.ended is None:
            with contextlib.suppress(WetwareError):
                await (await lease.ref()).call("let_go", **which)
                return
            await asyncio.sleep(LET_GO_AGAIN_S)


def _wait_ms(wait_s: float | None) -> int:
    return WAIT_MS_MAX if wait_s is None else min(WAIT_MS_MAX, max(0, int(wait_s * 1000)))


def _waiting(reply: dict[str, Any]) -> tuple[Waiting, ...]:
    return tuple(Waiting(**struct) for struct in reply["entries"])
