"""What a program holds: capabilities by its own numbers, and the messages it calls them with.

A message is CBOR: [method, {parameter: value}], names in snake_case as in Python; its answer is the
results, {name: value}, or null. In both a capability is the tag TAG of the number that the program
knows it by.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any, Final

from wetware import rpc
from wetware.base import cbor
from wetware.base.log import get_logger
from wetware.errors import (
    InternalError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Revoked,
    Unsupported,
    WetwareError,
)
from wetware_proc.functions import DEPTH_MAX, TAG
from wetware_proc.schema import SCHEMA
from wetware_proc.served import called

MESSAGE_BYTES_MAX: Final = 1 << 20  # of a message or an answer
ITEMS_MAX: Final = 1 << 13
"""Values in a message, at all depths: they cost the node's loop more than their bytes do."""
GRANTS_MAX: Final = 64
NAME_BYTES_MAX: Final = 64
TABLE_FULL: Final = "limit.handles"  # the code of the error where a guest holds as many as it may
_NUMBER_MAX: Final = (1 << 31) - 1

log = get_logger("proc.grants")


def judged(given: list[dict[str, Any]]) -> dict[str, rpc.Ref]:
    """Grants of proc.capnp, by name. Raises InvalidArgument, Unsupported."""
    found: dict[str, rpc.Ref] = {}
    for name, each in by_name(given).items():
        if (ref := each["ref"]) is None:
            raise InvalidArgument(f"the grant {name!r} has no capability")
        found[name] = ref.cast(known(each["interface"], f"the grant {name!r}"))
    return found


def by_name(given: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Grants of proc.capnp, live or named. Raises InvalidArgument for too many, or a bad name."""
    if len(given) > GRANTS_MAX:
        raise InvalidArgument(f"{len(given)} grants; a process has at most {GRANTS_MAX}")
    found: dict[str, dict[str, Any]] = {}
    for each in given:
        name = each["name"]
        if not name or len(name.encode()) > NAME_BYTES_MAX or name in found:
            raise InvalidArgument(
                f"{name[:64]!r} cannot name a grant: each has a name of its own, of at most "
                f"{NAME_BYTES_MAX} bytes"
            )
        found[name] = each
    return found


def known(interface_id: object, what: str) -> rpc.Interface:
    """The interface of a capability, `what`, that a guest may hold. Raises Unsupported."""
    found = rpc.known(interface_id) if isinstance(interface_id, int) else None
    if found is None:
        raise Unsupported(
            f"this node does not know the interface of {what}",
            hint="enable the plugin there that has it",
            code="unsupported.interface",
        )
    if found == rpc.WW.ByteStream:  # its bytes are in no message
        raise Unsupported(f"{what} is a byte stream, which a program cannot read")
    return found


def decoded(data: bytes) -> Any:
    """What a guest says, or is told, with Tags in it. Raises InvalidArgument, LimitExceeded."""
    if cbor.items(data, ITEMS_MAX) > ITEMS_MAX:
        raise LimitExceeded(f"a message of more than {ITEMS_MAX} values (ITEMS_MAX)")
    return cbor.decode(data, bytes_max=MESSAGE_BYTES_MAX, tag=TAG, depth_max=DEPTH_MAX)


Held = rpc.Ref | rpc.Servant  # of somebody else's, or what the guest serves itself


class Handles:
    """The capabilities that one guest holds. Drivers share it; it may be used in any thread.

    A number is the guest's own, and is not used again. What nobody holds any more is released.

    """

    def __init__(self, grants: Mapping[str, rpc.Ref], handles_max: int) -> None:
        self._grants, self._handles_max = grants, handles_max
        self._refs: dict[int, Held] = {}
        self._numbers = itertools.count(1)

    def named(self, name: str) -> int:
        """A new handle of a grant. Raises NotFound, LimitExceeded."""
        if (ref := self._grants.get(name)) is None:
            raise NotFound(f"there is no grant {name[:NAME_BYTES_MAX]!r}", code="not_found.grant")
        return self.add(ref)

    def add(self, what: Held) -> int:
        number = next(self._numbers)
        self._add({number: what})
        return number

    def get(self, number: int) -> Held:
        if (ref := self._refs.get(number)) is None:
            raise NotFound(f"there is no handle {number}", code="not_found.handle")
        return ref

    def drop(self, number: int) -> None:
        self.get(number)
        del self._refs[number]  # a call that is on its way still holds it

    def close(self) -> None:
        self._refs.clear()

    def value(self, data: bytes) -> Any:
        """Plain data of the guest's, with its capabilities.

        Raises InvalidArgument, LimitExceeded, NotFound.
        """
        return cbor.untagged(decoded(data), self.get)

    def message(self, data: bytes) -> tuple[str, dict[str, Any]]:
        """A method, and its parameters with their capabilities. Raises as `value`."""
        match self.value(data):
            case [str(method), dict(params)]:
                return method, params
        raise InvalidArgument("a message is [method, {parameter: value}] in CBOR")

    def answer(self, results: Any) -> bytes:
        """Results for the guest, which has their capabilities then.

        Raises LimitExceeded and Unsupported, and has let go of them.
        """
        new: dict[int, Held] = {}
        data = cbor.encode(self._given(results, new))
        if len(data) > MESSAGE_BYTES_MAX:
            raise LimitExceeded(f"the answer has {len(data)} bytes: at most {MESSAGE_BYTES_MAX}")
        self._add(new)
        return data

    def _add(self, new: Mapping[int, Held]) -> None:
        if len(self._refs) + len(new) > self._handles_max or max(new, default=0) > _NUMBER_MAX:
            raise LimitExceeded(
                f"a program holds at most {self._handles_max} capabilities (handles_max)",
                hint="drop what is not used any more",
                code=TABLE_FULL,
            )
        self._refs.update(new)

    def _given(self, value: Any, new: dict[int, Held], interface: object = None) -> Any:
        """As CBOR has it. `interface` is what is said beside a capability that has no type."""
        if isinstance(value, rpc.Ref):
            own = value.interface
            found = known(own.id if own else interface, "a capability in the answer")
            number = next(self._numbers)
            new[number] = value if own else value.cast(found)
            return cbor.Tag(TAG, number)
        if isinstance(value, dict):
            said = value.get("interface")
            return {key: self._given(each, new, said) for key, each in value.items()}
        if isinstance(value, list):
            return [self._given(each, new, interface) for each in value]
        return value


async def call(ref: Held, method: str, params: dict[str, Any]) -> Any:
    """A guest's call. What it raises a guest may know: a WetwareError, or that it is cancelled.

    What another program serves is called by its own methods, each of which has one result.
    """
    if not isinstance(ref, rpc.Ref):
        raise Unsupported("a program does not call what it serves itself")
    try:
        if ref.interface == SCHEMA.Served:
            return {"result": await called(ref, method, params, known)}
        return await ref.call(method, **params)
    except WetwareError:
        raise
    except TypeError as exc:  # the guest's, which knows what it has sent
        raise InvalidArgument(str(exc)) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Revoked("the call was cut off") from None
    except Exception:
        log.exception("grant.failed")
        raise InternalError("the call failed") from None
