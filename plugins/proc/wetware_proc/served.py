"""Objects that programs serve themselves: their methods and values are their own, and no schema's.

What travels is plain data, as of functions: nothing that arrives is code.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from wetware import rpc
from wetware.base import cbor
from wetware.errors import InvalidArgument, Unsupported
from wetware_proc.functions import packed_arguments, result

Known = Callable[[object, str], rpc.Interface]
"""The interface of an ID, for a capability that is called so; raises Unsupported."""


class Served:
    """An object of a program's: each method is an attribute, its parameters are keywords.

    counter = await process.served("counter")
    print(await counter.add(by=2))

    What it takes and returns is as `session.proc.call` has it, at most 1 MiB. Raises FunctionFailed
    with what the program says, WetwareError "proc.ended" where it has ended, LimitExceeded where it
    has too many calls to answer.

    Attributes:
        ref: The capability, to pass on.
    """

    def __init__(self, ref: rpc.Ref) -> None:
        self.ref = ref

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    async def _call(self, method: str, /, **params: Any) -> Any:
        return await called(self.ref, method, params, installed)


def installed(interface_id: object, what: str) -> rpc.Interface:
    """`Known` of a client."""
    from wetware.client.installed import interface_of_id

    found = interface_of_id(interface_id) if isinstance(interface_id, int) else None
    if found is None:
        raise Unsupported(f"the interface of {what} is not known here")
    return found


async def called(ref: rpc.Ref, method: str, params: Mapping[str, Any], known: Known) -> Any:
    """Call a method of a `Served` of proc.capnp; see Served."""
    args, caps = packed(dict(params))
    reply = await ref.call("call", method=method, args=args, caps=caps)
    return filled(result(reply["reply"]), reply["caps"], known)


def packed(value: Any) -> tuple[bytes, list[dict[str, Any]]]:
    """Plain data as CBOR, and the capabilities in it. Raises InvalidArgument."""
    data, given = packed_arguments(value)
    return data, [_passed(each) for each in given.values()]


def _passed(given: Any) -> dict[str, Any]:
    ref = getattr(given, "ref", given)
    interface = ref.interface if isinstance(ref, rpc.Ref) else ref.__ww_interface__
    if interface is None:
        raise InvalidArgument("a capability of unknown interface", hint="cast it first")
    return {"ref": ref, "interface": interface.id}


def filled(value: Any, caps: Sequence[Mapping[str, Any]], known: Known) -> Any:
    """What was decoded, with its capabilities. Raises InvalidArgument, Unsupported."""

    def came(number: int) -> rpc.Ref:
        ref: rpc.Ref | None = caps[number]["ref"] if 0 <= number < len(caps) else None
        if ref is None:
            raise InvalidArgument("a value names a capability that did not come with it")
        return ref.cast(known(caps[number]["interface"], "a capability that came"))

    return cbor.untagged(value, came)
