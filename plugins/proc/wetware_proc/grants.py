"""What a program calls the capabilities with that it was given: plain data, both ways.

A message is CBOR: [method, {parameter: value}], names in snake_case as in Python; its answer is the
results, {name: value}, or null. What a parameter or a result can be is what CBOR has: a capability
is not, yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.base import cbor
from wetware.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from wetware_proc.driver import Grant

MESSAGE_BYTES_MAX: Final = 1 << 20
GRANTS_MAX: Final = 64
NAME_BYTES_MAX: Final = 64


def judged(given: list[dict[str, Any]]) -> dict[str, rpc.Ref]:
    """Grants of proc.capnp, by name. Raises InvalidArgument, Unsupported."""
    if len(given) > GRANTS_MAX:
        raise InvalidArgument(f"{len(given)} grants; a process has at most {GRANTS_MAX}")
    found: dict[str, rpc.Ref] = {}
    for each in given:
        name = each["name"]
        if not name or len(name.encode()) > NAME_BYTES_MAX or name in found:
            raise InvalidArgument(
                f"{name[:64]!r} cannot name a grant: each has a name of its own, of at most "
                f"{NAME_BYTES_MAX} bytes"
            )
        if (ref := each["ref"]) is None:
            raise InvalidArgument(f"the grant {name!r} has no capability")
        if (interface := rpc.known(each["interface"])) is None:
            raise Unsupported(
                f"this node does not know the interface of the grant {name!r}",
                hint="enable the plugin there that has it",
                code="unsupported.interface",
            )
        found[name] = ref.cast(interface)
    return found


def callable_by_guests(ref: rpc.Ref) -> Grant:
    """Calls on `ref` in the form of messages."""

    async def call(message: bytes) -> bytes:
        value = cbor.decode(message, bytes_max=MESSAGE_BYTES_MAX)
        match value:
            case [str(method), dict(params)]:
                pass
            case _:
                raise InvalidArgument("a message is [method, {parameter: value}] in CBOR")
        try:
            results = await ref.call(method, **params)
        except TypeError as exc:  # the guest's, which knows what it has sent
            raise InvalidArgument(str(exc)) from None
        return cbor.encode(_plain(method, results))

    return call


def _plain(method: str, value: Any) -> Any:
    """Results as CBOR has them; what it cannot have is let go of, and refused."""
    if isinstance(value, rpc.Ref):
        value.close()
        raise Unsupported(f"{method} answers with a capability, which a program cannot hold yet")
    if isinstance(value, dict):
        return {key: _plain(method, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(method, each) for each in value]
    return value
