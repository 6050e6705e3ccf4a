"""The component that runs Python, on wasmtime's functions for components: values, and its fiber.

The Python package declares the functions and does not promise them, as for wasm/engine.py: `Any`
stops here, too.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from wasmtime import StoreContext, WasmtimeError
from wasmtime import _bindings as bindings
from wasmtime import _ffi as ffi
from wasmtime.component import (
    Component,
    Linker,
    Record,
    ResourceAny,
    ResourceHost,
    ResourceType,
    Variant,
)
from wasmtime.component._types import FuncType, ListType, ResultType

from wetware_proc.wasm import engine
from wetware_proc.wasm.engine import Fiber, OverLimit, Runtime, Trapped
from wetware_proc.wasm.errno import Errno

if TYPE_CHECKING:
    from pathlib import Path

BYTES_MAX: Final = 4 << 20
"""Of one value that a guest gives."""
LIST_MAX: Final = 1024
RESOURCES_MAX: Final = 1024
"""That a guest has at a time."""

_VALUE_BYTES: Final = ctypes.sizeof(bindings.wasmtime_component_val_t)
_BYTE_AT: Final = bindings.wasmtime_component_val_t.of.offset
_READABLE, _WRITABLE = 0x100, 0x200
_Words = ctypes.POINTER(ctypes.c_uint64)
_converting: Final = threading.Lock()
"""Whoever makes a variant of a value clears a set that is of the whole module of the package."""
_no_finalizer: Any = ctypes.cast(0, ctypes.CFUNCTYPE(None, ctypes.c_void_p))

Function = Callable[..., Any]
"""Gets the guest's world and the arguments: numbers, text, bytes, lists, what was made `Own`.

Returns the result, or a coroutine function that the loop is to call for it.
"""


__all__ = ["Failed", "Own", "PythonFiber", "Record", "Runner", "Variant", "compiled"]


def compiled(component: bytes, stack_bytes: int) -> bytearray:
    """The machine code of a component, for a Runtime with this stack."""
    return Component(engine.new_engine(stack_bytes), component).serialize()


class Own:
    """A result: something of the host that the guest gets a handle of.

    Args:
        kind: The number of its resource type.
        thing: What functions get for the handle.
    """

    def __init__(self, kind: int, thing: object) -> None:
        self.kind, self.thing = kind, thing


class Failed:
    """A result: the error of a function that can fail."""

    def __init__(self, error: Any) -> None:
        self.error = error


class Runner:
    """The component, loaded and linked.

    Args:
        runtime: Whose engine compiled it.
        path: What it compiled.
        offered: Interface, without its version → function → what it does.
        resources: Interface → resource → its number.
    """

    def __init__(
        self,
        runtime: Runtime,
        path: Path,
        offered: Mapping[str, Mapping[str, Function]],
        resources: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.runtime = runtime
        try:
            self.component = Component.deserialize_file(runtime.engine, str(path))
        except WasmtimeError as exc:
            raise LookupError(str(exc)) from exc
        self.linker = Linker(runtime.engine)
        self._callbacks: list[Any] = []  # C holds their addresses
        for name in self.component.type.imports(runtime.engine):
            bare = name.partition("@")[0]
            with self.linker.root() as root, root.add_instance(name) as instance:
                for resource, kind in resources.get(bare, {}).items():
                    instance.add_resource(resource, ResourceType.host(kind), _dropped)
                for called, function in offered.get(bare, {}).items():
                    self._define(instance, called, function)
        self.linker.define_unknown_imports_as_traps(self.component)
        self.start: Any = self.component.get_export_index("run")

    def _define(self, instance: Any, name: str, function: Function) -> None:
        callback = _callback(function)
        self._callbacks.append(callback)
        data = name.encode()
        engine.refuse(
            bindings.wasmtime_component_linker_instance_add_func_async(
                instance.ptr(), ctypes.create_string_buffer(data), len(data), callback, None,
                _no_finalizer,
            )
        )  # fmt: skip


class PythonFiber(Fiber):
    """A guest of the component. `hosts` is its world, alone.

    Args:
        runner: See Runner.
        options: See Fiber.
    """

    PARTS_MAX = 64, 16, 4

    def __init__(self, runner: Any, **options: Any) -> None:
        super().__init__(runner, **options)
        self._runner: Runner = runner
        self.things: dict[int, object] = {}
        self._numbers = 0

    async def _live(self, context: Any) -> int:
        runner = self._runner
        context = ctypes.cast(context, ctypes.POINTER(bindings.wasmtime_context_t))
        instance = bindings.wasmtime_component_instance_t()
        await self._finish(
            lambda trap, error: bindings.wasmtime_component_linker_instantiate_async(
                runner.linker.ptr(), context, runner.component.ptr(), ctypes.byref(instance), error
            )
        )
        function = bindings.wasmtime_component_func_t()
        bindings.wasmtime_component_instance_get_func(
            ctypes.byref(instance), context, runner.start.ptr(), ctypes.byref(function)
        )
        result = bindings.wasmtime_component_val_t()
        await self._finish(
            lambda trap, error: bindings.wasmtime_component_func_call_async(
                ctypes.byref(function), context, None, 0, ctypes.byref(result), 1, error
            )
        )
        code: int = result.of.s32
        return code

    def _give(self, result: Any) -> None:
        self._results(result)

    def _reason(self, failure: Any) -> Exception:
        _, found, words = str(failure).rpartition("wasm trap: ")  # after a trace, of our own names
        if not found:
            return super()._reason(failure)
        words = words.partition("\n")[0]
        return OverLimit("stack") if words == "call stack exhausted" else Trapped(words)

    def hold(self, thing: object) -> int:
        """Returns the number of a thing that the guest gets."""
        if len(self.things) >= RESOURCES_MAX:
            raise Errno.MFILE.error()
        self._numbers += 1
        self.things[self._numbers] = thing
        return self._numbers


def _dropped(store: Any, number: int) -> None:
    engine.current.fiber.things.pop(number, None)


def _callback(function: Function) -> Any:
    """What C calls for a function."""
    # Of parameters, and of the result: known at the first call, which several threads may make.
    kinds: tuple[list[Any], Any] | None = None

    def callback(
        data: Any, context: Any, kind: Any, args: Any, count: int, results: Any,
        result_count: int, error: Any, continuation: Any,
    ) -> None:  # fmt: skip
        nonlocal kinds
        fiber = engine.current.fiber
        if fiber.elsewhere:
            fiber.let_others()
        words = ctypes.cast(continuation, _Words)
        words[0], words[1] = engine.ALWAYS, 1
        try:
            store = StoreContext(context)
            if kinds is None:
                found = FuncType._from_ptr(kind, owner=store)
                kinds = [each for _, each in found.params], found.result
            params, result_kind = kinds
            given = [_taken(fiber, store, each, args[at]) for at, each in enumerate(params)]
            put = partial(_put, fiber, store, result_kind, results)
            result = function(fiber.hosts[0], *given)
            if callable(result):
                words[0], words[1] = engine.ONCE_SET, fiber.park(result, put, int.__neg__)
            else:
                put(result)
        except Exception as exc:
            fiber.fail(exc)
            error[0] = bindings.wasmtime_error_new(b"host")

    return bindings.wasmtime_component_func_async_callback_t(callback)


def _taken(fiber: PythonFiber, store: Any, kind: Any, value: Any) -> Any:
    """A value of the guest's."""
    if isinstance(kind, ListType):
        size = value.of.list.size
        if kind._is_bytes():
            _bound(size, BYTES_MAX)
            data = _bytes_of(value.of.list.data, size, _READABLE)[_BYTE_AT::_VALUE_BYTES].tobytes()
            bindings.wasmtime_component_vallist_delete(ctypes.byref(value.of.list))
            return data
        _bound(size, LIST_MAX)
    found = kind.convert_from_c(value)
    if isinstance(found, list):
        return [_thing(fiber, store, each) for each in found]
    return _thing(fiber, store, found)


def _thing(fiber: PythonFiber, store: Any, value: Any) -> Any:
    return fiber.things[value.to_host(store).rep] if isinstance(value, ResourceAny) else value


def _put(fiber: PythonFiber, store: Any, kind: Any, results: Any, value: Any) -> None:
    """Give the guest a value."""
    if kind is not None:
        _write(fiber, store, kind, value, results)


def _write(fiber: PythonFiber, store: Any, kind: Any, value: Any, to: Any) -> None:
    if isinstance(value, Own):
        kind.convert_to_c(store, ResourceHost.own(fiber.hold(value.thing), value.kind), to)
    elif isinstance(kind, ResultType):
        failed = isinstance(value, Failed)
        inner = kind.err if failed else kind.ok
        to.contents.kind = ffi.WASMTIME_COMPONENT_RESULT
        to.contents.of.result.is_ok = not failed
        to.contents.of.result.val = None
        if inner is not None:
            raw = bindings.wasmtime_component_val_t()
            _write(fiber, store, inner, value.error if failed else value, ctypes.pointer(raw))
            to.contents.of.result.val = bindings.wasmtime_component_val_new(ctypes.byref(raw))
    elif isinstance(kind, ListType) and kind._is_bytes():
        raw_list = bindings.wasmtime_component_vallist_t()
        size = len(value)
        bindings.wasmtime_component_vallist_new_uninit(ctypes.byref(raw_list), size)
        if size:
            view = _bytes_of(raw_list.data, size, _WRITABLE)
            view[::_VALUE_BYTES] = bytes([ffi.WASMTIME_COMPONENT_U8.value]) * size
            view[_BYTE_AT::_VALUE_BYTES] = value
        to.contents.kind = ffi.WASMTIME_COMPONENT_LIST
        to.contents.of.list = raw_list
    else:
        with _converting:
            kind.convert_to_c(store, value, to)


def _bytes_of(data: Any, size: int, how: int) -> memoryview:
    """A list of bytes is one of values of 24 bytes and more: all of them, as bytes."""
    if not size:
        return memoryview(b"")
    address = ctypes.cast(data, ctypes.c_void_p)
    view: memoryview = engine.memoryview_of(address, size * _VALUE_BYTES, how)
    return view


def _bound(size: int, most: int) -> None:
    if size > most:
        raise Errno.TOOBIG.error()
