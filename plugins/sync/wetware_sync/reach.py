"""The store from any node: a login of the user's own at its home, for as long as the session lasts.

The home decides what a user may do, so the user logs in there; no node asks it for another's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from wetware.errors import Denied, DialError, Disconnected, NotFound, TimedOut, WetwareError
from wetware_sync.engine import Unknown
from wetware_sync.errors import HomeDown

if TYPE_CHECKING:
    from wetware.rpc import Interface


class Session(Protocol):
    """What is used of a `wetware.Session`, whose module knows this one."""

    identity: Any

    @property
    def connection(self) -> Any: ...

    def node(self, selector: str) -> AbstractAsyncContextManager[Any]: ...

    def service(self, name: str, interface: Interface) -> Opening: ...


class Opening(Protocol):
    """And of `wetware.client.session.Opening`."""

    session: Any
    interface: Any

    async def call(self, method: str, /, **params: object) -> Any: ...


async def _stay(session: Session, node: str, ready: asyncio.Future[Session]) -> None:
    """Be logged in there until either connection ends."""
    try:
        async with session.node(f"id={node}") as there:
            ready.set_result(there)
            ends = [
                asyncio.ensure_future(each.connection.wait_closed()) for each in (session, there)
            ]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for end in ends:
                    end.cancel()
    except WetwareError as exc:
        if not ready.done():
            ready.set_exception(_down(node, exc))
    finally:
        ready.cancel()


def _down(node: str, exc: WetwareError) -> WetwareError:
    if not isinstance(exc, DialError | NotFound | TimedOut | Disconnected):
        return exc
    return HomeDown(
        f"the node that has the store, {node}, cannot be reached: {exc.message}",
        hint="start it again; with one home nothing takes its place, but a backup elsewhere",
    )


# The services of a session may be at different entrances. A login knows its session only while it
# lasts: else neither would ever be forgotten.
_LOGINS: WeakKeyDictionary[
    Session, dict[str, tuple[asyncio.Future[Session], asyncio.Task[None]]]
] = WeakKeyDictionary()


async def _at(session: Session, node: str) -> Session:
    """A session at this node, by `session`, which may be the one itself; raises HomeDown."""
    if node == session.identity.node:
        return session
    logins = _LOGINS.setdefault(session, {})
    if node in logins and _is_over(logins[node][0]):
        logins.pop(node)[1].cancel()
    if node not in logins:
        ready: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        ready.add_done_callback(lambda done: done.cancelled() or done.exception())
        logins[node] = ready, asyncio.create_task(_stay(session, node, ready), name="at home")
    ready, _ = logins[node]
    await asyncio.wait([ready])  # where it is given up, who waits is not cancelled with it
    if ready.cancelled():
        raise HomeDown(f"the login at {node} was given up", hint="try again")
    return ready.result()


def _is_over(login: asyncio.Future[Session]) -> bool:
    """Whether it has failed, or lost its connection."""
    if not login.done():
        return False
    failed = login.cancelled() or login.exception() is not None
    return failed or login.result().connection.closed


class AtHome:
    """A service of the store, by a session at any node.

    Args:
        here: As the session has it, at its own node.
        name: Of the service.

    Attributes:
        here: The same.
        node: Where it is used; "" before, and after it has failed there.
    """

    def __init__(self, here: Opening, name: str) -> None:
        self.here, self._name = here, name
        self.node = self._shunned = ""
        self._opened: Opening | None = None

    @property
    def survives(self) -> bool:
        """Whether the application wants to go on after a connection was lost."""
        return self.here.session.connection.again is not None

    async def service(self) -> Opening:
        """The service where the store is; raises HomeDown."""
        session = self.here.session
        if not self.node:
            self.node = await self._choose(session)
        if self.node == session.identity.node:
            return self.here
        if not self.node:
            raise HomeDown(
                "the node where the cluster was founded is not known here",
                hint="wait until it was heard, or set `[plugins.sync] home` to its peer ID",
            )
        there = await self._there(session)
        if self._opened is None or self._opened.session is not there:
            self._opened = there.service(self._name, self.here.interface)
        return self._opened

    async def _choose(self, session: Session) -> str:
        """The entrance for this session: not the one whose store failed, if there is another."""
        try:
            home = (await self.here.call("home"))["home"]
        except Denied:  # a share of one object: it was given where the store is
            return str(session.identity.node)
        others = [node for node in home["entrances"] if node != self._shunned]
        return str(others[0] if others else home["node"])

    async def _there(self, session: Session) -> Session:
        """A session where the store is: at another entrance where one is gone. Raises HomeDown."""
        tried = self.node
        try:
            return await _at(session, self.node)
        except HomeDown as exc:
            self.node = ""  # it may be another one by the next time
            home = (await self.here.call("home"))["home"]
            for node in home["entrances"]:
                if node == tried:
                    continue
                with contextlib.suppress(HomeDown):
                    there = await _at(session, node)
                    self.node = node
                    return there
            raise exc from None

    async def call(self, method: str, /, **params: object) -> Any:
        """Call it there."""
        opening = await self.service()
        with self._watched():
            return await opening.call(method, **params)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """An entrance that cannot reach its etcd is not asked again while there is another one."""
        try:
            yield
        except HomeDown:
            self._shunned, self.node = self.node, ""
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Raise HomeDown where the answer to a question is lost: it may be asked again."""
        try:
            with self._watched():
                yield
        except Disconnected as exc:
            raise HomeDown(
                f"the node that has the store went away: {exc.message}", hint="ask again"
            ) from exc

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Raise Unknown where the answer to a write is lost: it is never repeated."""
        try:
            with self._watched():
                yield
        except (Disconnected, TimedOut) as exc:
            raise Unknown(
                f"whether it was written is not known: {exc.message}",
                hint="read it, before writing again",
            ) from exc
