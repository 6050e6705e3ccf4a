"""Python functions that are called at nodes: their programs, what they get, and what they return.

A function travels as its own source, without the module around it. Its arguments are on its stdin,
its result on its stdout, both as CBOR; what it prints is on its stderr. Nothing is unpickled: what
comes back is plain data, and whoever computed it owns nothing here.
"""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import inspect
import io
import textwrap
import types
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from wetware import rpc
from wetware.base import cbor
from wetware.errors import InvalidArgument, WetwareError

VALUE_BYTES_MAX: Final = 16 << 20  # of arguments, or of a result
DEPTH_MAX: Final = 64  # lists and dicts in each other, of arguments or of a result
CACHED_MAX: Final = 64
"""Functions whose programs are remembered: to make one takes half a millisecond."""
ATTEMPT: Final = "WW_ATTEMPT"
"""The variable that tells a function which try of the same call this is."""
TAG: Final = 39  # of CBOR: what it holds is an identifier. Source: IANA's registry of CBOR tags
MARK: Final = bytes((6 << 5 | 24, TAG))
"""Is in each value that has a capability, and perhaps in others."""
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the same function is the same bytes, whenever it is packed


class FunctionFailed(WetwareError):
    """The function raised.

    Attributes:
        traceback: As Python printed it where the function ran.
    """

    code = "proc.raised"

    def __init__(self, traceback: str) -> None:
        lines = traceback.strip().splitlines()
        super().__init__(lines[-1] if lines else "the function raised")
        self.traceback = traceback
        self.add_note(traceback.rstrip())


class CallEnded(WetwareError):
    """The function did not return: its process was ended, or ended itself."""

    code = "proc.ended"


@dataclass(frozen=True, slots=True)
class Function:
    """A function that can travel: its name, for people, and the program that a node runs."""

    name: str
    program: bytes


@functools.lru_cache(CACHED_MAX)
def function(call: Callable[..., Any], wheels: tuple[bytes, ...] = ()) -> Function:
    """The program of a function, with pure-Python wheels that it can import.

    Raises InvalidArgument for what needs more than its own source.
    """
    if not isinstance(call, types.FunctionType) or call.__name__ == "<lambda>":
        _refuse(call, "only a function that is defined with `def` can travel")
    if inspect.iscoroutinefunction(call) or inspect.isgeneratorfunction(call):
        _refuse(call, "it has to return its result: it is a coroutine or a generator")
    if call.__code__.co_freevars:
        _refuse(call, f"it uses {_words(call.__code__.co_freevars)} of the function around it")
    needed = sorted(_globals(call.__code__) & call.__globals__.keys() - {call.__name__})
    if needed := [name for name in needed if not hasattr(builtins, name)]:
        _refuse(call, f"it uses {_words(needed)} of the module around it")
    try:
        lines, first = inspect.getsourcelines(call)
    except (OSError, TypeError):
        _refuse(call, "it has no source here")
    text = textwrap.dedent("".join(lines))
    definition = ast.parse(text).body[0].lineno - 1  # behind its decorators
    body = "".join(text.splitlines(keepends=True)[definition:])
    # At the line where it is, so that a traceback names it.
    padding = "\n" * (first + definition - 1)
    source = f"{padding}{body}\n__import__('ww')._serve({call.__name__})\n".encode()
    name = f"{Path(call.__code__.co_filename).name}:{call.__name__}"
    return Function(name, _packed(source, wheels) if wheels else source)


def _globals(code: types.CodeType) -> set[str]:
    """Names that it looks up outside of itself, functions in it included."""
    found = {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _globals(constant)
    return found


def _refuse(call: object, why: str) -> Any:
    raise InvalidArgument(
        f"{getattr(call, '__qualname__', call)!s} cannot run elsewhere: {why}",
        hint="import and define in it what it needs, and pass the rest as arguments",
        code="invalid.function",
    )


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _packed(source: bytes, wheels: Sequence[bytes]) -> bytes:
    """A zip archive of the source and all that is in the wheels."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(zipfile.ZipInfo("__main__.py", _EPOCH), source)
        for wheel in wheels:
            try:
                with zipfile.ZipFile(io.BytesIO(wheel)) as given:
                    for name in given.namelist():
                        if name.endswith((".so", ".pyd")):
                            raise InvalidArgument(
                                f"a package has the machine code {name}",
                                hint="give its pure-Python wheel (…-none-any.whl), if it has one",
                                code="invalid.package",
                            )
                        entry = zipfile.ZipInfo(name, _EPOCH)
                        made.writestr(entry, given.read(name), zipfile.ZIP_DEFLATED)
            except zipfile.BadZipFile as exc:
                raise InvalidArgument(
                    f"a package is no wheel: {exc}", code="invalid.package"
                ) from exc
    return data.getvalue()


def packed_arguments(args: Sequence[Any]) -> tuple[bytes, dict[str, Any]]:
    """Arguments as the function reads them, and the capabilities among them, as its grants.

    Raises InvalidArgument for what is no plain data.
    """
    grants: dict[str, Any] = {}

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(getattr(value, "ref", value), rpc.Ref | rpc.Servant):
            grants[f"argument {len(grants)}"] = value
            return cbor.Tag(TAG, len(grants) - 1)
        raise InvalidArgument(
            f"an argument has a {type(value).__name__}: data that travels are None, bool, int, "
            "float, str, bytes, lists, dicts with text as keys, and capabilities",
            code="invalid.data",
        )

    try:
        data = cbor.encode(plain(args))
        cbor.decode(data, bytes_max=VALUE_BYTES_MAX, depth_max=DEPTH_MAX, tag=TAG)
    except (RecursionError, OverflowError) as exc:
        raise InvalidArgument(f"an argument cannot travel: {exc}", code="invalid.data") from None
    return data, grants


def result(data: bytes) -> Any:
    """What a function returned, which nobody has to believe. Raises FunctionFailed, CallEnded.

    A capability in it is a `cbor.Tag` of the number in its name: `process.export("result 1")`.
    """
    try:
        match cbor.decode(data, bytes_max=VALUE_BYTES_MAX, depth_max=DEPTH_MAX, tag=TAG):
            case [True, value]:
                return value
            case [False, str(traceback)]:
                raise FunctionFailed(traceback)
    except InvalidArgument as exc:
        raise CallEnded(f"what the function returned is no data: {exc.message}") from None
    raise CallEnded("what came back is no result of a function")
