"""The session of a program that a node runs, on the socket that it has inherited."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from wetware import rpc
from wetware.base import paths
from wetware.broker.told import Identity
from wetware.client.installed import interface_of_id
from wetware.client.session import CALL_S, Session
from wetware.errors import DialError, InternalError, InvalidArgument, Unsupported

if TYPE_CHECKING:
    from wetware.rpc import Interface, Ref, Servant

VARIABLE: Final = "WW_FD"
"""The number of the socket."""
_CALLS_MAX: Final = 56
"""Of a program in flight, below what a node takes by default; more wait."""


def is_granted() -> bool:
    """Whether this process is such a program, and has not taken its socket yet."""
    return VARIABLE in os.environ


class GrantedSession(Session):
    """What a program was given, each by its name, and nothing else.

    `session.NAME` is the client of a service that was given under the service's own name. It cannot
    be attenuated, shared or used to log in elsewhere: the node has no way for that.
    """

    async def open(self, name: str, interface: Interface | None = None) -> Ref:
        """The capability that the program was given by this name.

        Args:
            name: As who started it has named it.
            interface: Of the capability; None: as it says itself, if that is known here.

        Raises NotFound "not_found.grant", Unsupported where its interface is not known.
        """
        reply = await self._call("open", name=name)
        interface = interface or interface_of_id(reply["interface"])
        if interface is None:
            raise Unsupported(
                f"the interface of {name!r} is not known here",
                hint="install its plugin, or give the interface: session.open(NAME, INTERFACE)",
                code="unsupported.no_schema",
            )
        ref: Ref | None = reply["service"]
        if ref is None:
            raise InternalError(f"the node answered without a capability for {name!r}")
        return ref.cast(interface)

    async def export(self, name: str, what: Servant | Ref) -> None:
        """Offer a capability to who started the program, as `Process.export(name)` there.

        It is there as long as the program runs. Raises Unsupported where the node does not know its
        interface, InvalidArgument for a name that is taken.
        """
        own = what.interface if isinstance(what, rpc.Ref) else what.__ww_interface__
        if own is None:
            raise InvalidArgument("what is offered has to have an interface; cast it first")
        await self._call("export", name=name, cap=what, interface=own.id)


@contextlib.asynccontextmanager
async def granted() -> AsyncIterator[GrantedSession]:
    """The session of this process, once. Raises DialError where the socket is none."""
    number = paths.variable(VARIABLE)
    os.environ.pop(VARIABLE, None)  # a connection is one conversation, and no child's
    try:
        sock = socket.socket(fileno=int(number or ""))
        sock.set_inheritable(False)
    except (ValueError, OSError) as exc:
        raise DialError(
            f"{VARIABLE}={number!r} is no socket of this process: {exc}",
            hint=f"unset {VARIABLE} to log in to this machine's node",
        ) from None
    async with rpc.runtime():
        limits = rpc.RpcLimits(calls_out_max=_CALLS_MAX)
        connection = await rpc.connect(rpc.SocketPipe(sock), limits)
        try:
            session = GrantedSession(
                connection.bootstrap(rpc.WW.Granted), Identity("", (), "", "", ""), None
            )
            session.timeout_s = CALL_S
            yield session
        finally:
            await connection.aclose()
