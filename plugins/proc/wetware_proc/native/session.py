"""What a native program has of its node: its grants, and a place for what it offers.

It is the first object on the one socket that the program inherits. Whoever has that socket has just
this: there is no method here to log in, to share or to redeem, or to reach another node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.errors import InvalidArgument, NotFound, Unsupported

if TYPE_CHECKING:
    from wetware_proc.driver import Spec


class GrantedServant(rpc.Servant, interface=rpc.WW.Granted):
    """See ww.capnp."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec

    async def services(self) -> dict[str, Any]:
        found = [
            {"name": name, "interface": _interface(ref).name, "methods": ["*"]}
            for name, ref in sorted(self._spec.grants.items())
        ]
        return {"services": found}

    async def open(self, name: str) -> dict[str, Any]:
        ref = self._spec.grants.get(name)
        if ref is None:
            raise NotFound(
                f"this program was given nothing named {name[:64]!r}",
                hint=f"it has: {', '.join(sorted(self._spec.grants)) or 'nothing'}",
                code="not_found.grant",
            )
        return {"service": ref, "interface": _interface(ref).id}

    async def export(self, name: str, cap: rpc.Ref | None, interface: int) -> None:
        if cap is None:
            raise InvalidArgument("what is offered has a capability")
        if (known := rpc.known(interface)) is None:
            raise Unsupported(
                f"the node does not know the interface of {name!r}",
                hint="offer what is of a service that the node has",
                code="unsupported.interface",
            )
        self._spec.offer(name, cap.cast(known))


def _interface(ref: rpc.Ref) -> rpc.Interface:
    assert ref.interface is not None  # noqa: S101  # of a grant
    return ref.interface
