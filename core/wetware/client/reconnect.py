"""Logging in again where a connection was lost, until that works or it is known that it will not.

A call is never repeated: whether it ran is not known. Calls that are made meanwhile wait, and
subscriptions subscribe again (`rpc.Subscription`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from wetware.base.backoff import Backoff
from wetware.client.login import LoginRefused
from wetware.errors import (
    AuthError,
    Disconnected,
    LimitExceeded,
    NotFound,
    OverlayError,
    WetwareError,
)
from wetware.identity import LoginStatus

if TYPE_CHECKING:
    from wetware.client.session import Session
    from wetware.rpc import RpcConnection

DELAY_S: Final = 0.25
"""Before the first try; it doubles with each one, up to DELAY_S_MAX. With jitter: the clients of a
node do not come back at the same moment."""
DELAY_S_MAX: Final = 15.0
AWAY_S_MAX: Final = 3600.0
"""After which it is given up: a machine that is started again is back by then."""

_MAY_PASS: Final = (
    LoginStatus.BACKEND_UNAVAILABLE,  # a node that has just started
    LoginStatus.TOO_MANY_TRIES,
    LoginStatus.EXPIRED,
)
_FOR_GOOD: Final = ("overlay.peer_mismatch", "overlay.dial.owner")
"""Somebody else is at the node's address, or at its socket."""

Enter: TypeAlias = "Callable[[contextlib.AsyncExitStack], Awaitable[Session]]"


def may_pass(error: WetwareError) -> bool:
    """Whether what a login failed with may be over at the next try."""
    match error:
        case LoginRefused(status=status):
            return status in _MAY_PASS
        case OverlayError():
            return error.code not in _FOR_GOOD
        case NotFound():
            return error.code == "not_found.member"  # the selector's nodes are not there yet
    return isinstance(error, LimitExceeded)  # what is left of the lost session counts for a while


class Reconnecting:
    """Keeps one session logged in.

    Args:
        session: Logged in.
        enter: Logs in again, where it was before, and asks nobody.
        tell: Told in words of each loss and return.
    """

    def __init__(self, session: Session, enter: Enter, tell: Callable[[str], None]) -> None:
        self._session, self._enter, self._tell = session, enter, tell
        self._back = self._next()

    def _next(self) -> asyncio.Future[None]:
        """When the session is logged in again; for a connection that is not lost yet, too."""
        self._session.connection.again = self._again
        back: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        back.add_done_callback(lambda done: done.exception())  # perhaps nobody waits for it
        return back

    async def _again(self, lost: RpcConnection) -> RpcConnection:
        """See `RpcConnection.again`."""
        while (now := self._session.connection) is lost or now.closed:
            await asyncio.shield(self._back)
        return now

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Log in again as often as need be, for as long as the block lasts."""
        task = asyncio.create_task(self._run(), name="reconnecting")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        places = contextlib.AsyncExitStack()
        try:
            while True:
                await self._session.connection.wait_closed()
                if self._session.closed:
                    break
                await places.aclose()
                fresh = await self._log_in(places)
                if self._session.closed:
                    break
                was, now = self._session.identity.principal, fresh.identity.principal
                if now != was:
                    raise AuthError(
                        f"logging in again was as {now}, and the session was {was}'s: its key is "
                        "another one now",
                        hint="log in once more",
                        code="auth.other_user",
                    )
                self._session._renew(fresh)
                back, self._back = self._back, self._next()
                back.set_result(None)
        except WetwareError as exc:
            self._back.set_exception(exc)
        finally:
            await places.aclose()
            if not self._back.done():
                self._back.set_exception(Disconnected("the session is over"))

    async def _log_in(self, places: contextlib.AsyncExitStack) -> Session:
        loop = asyncio.get_running_loop()
        backoff = Backoff(DELAY_S, DELAY_S_MAX, random.Random())  # noqa: S311 - no secret
        lost_at = loop.time()
        self._tell("the connection to the node was lost; logging in again")
        while True:
            await asyncio.sleep(backoff.pause_s())
            if self._session.closed:  # nothing is signed for it any more
                raise Disconnected("the session is over")
            try:
                async with contextlib.AsyncExitStack() as place:
                    session = await self._enter(place)
                    places.push_async_exit(place.pop_all())
            except WetwareError as exc:
                if not may_pass(exc) or loop.time() - lost_at > AWAY_S_MAX:
                    raise
            else:
                away_s = loop.time() - lost_at
                self._tell(
                    f"logged in again after {away_s:.1f} s: subscriptions miss what came meanwhile"
                )
                return session
