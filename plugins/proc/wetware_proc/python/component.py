"""The component that runs Python, on wasmtime's functions for components: values, and its fiber.

The Python package declares the functions and does not promise them, as for wasm/engine.py: `Any`
stops here, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

from wasmtime import StoreContext, WasmtimeError
from wasmtime import _bindings as bindings
from wasmtime import _ffi as ffi
from wasmtime.component import Component, Linker, ResourceAny, ResourceHost, ResourceType, Variant
from wasmtime.component import _types as types
from wasmtime.component._types import FuncType

from wetware_proc.wasm import engine
from wetware_proc.wasm.engine import Fiber, OverLimit, Runtime, Trapped
from wetware_proc.wasm.errno import Errno, WasiError

if TYPE_CHECKING:
    from pathlib import Path

BYTES_MAX: Final = 4 << 20  # of one value that a guest gives
LIST_MAX: Final = 1024
RESOURCES_MAX: Final = 1024  # that a guest has at a time

_VALUE_BYTES: Final = ctypes.sizeof(bindings.wasmtime_component_val_t)
_BYTE_AT: Final = bindings.wasmtime_component_val_t.of.offset
_READABLE, _WRITABLE = 0x100, 0x200
_Words = ctypes.POINTER(ctypes.c_uint64)
_converting: Final = threading.Lock()
"""Whoever makes a variant of a value clears a set that is of the whole module of the package."""

Function = Callable[..., Any]
"""Gets the guest's world and the arguments: numbers, text, bytes, lists, what was made `Own`.

Returns the result, or a coroutine function that the loop is to call for it.
"""


__all__ = ["Failed", "Own", "PythonFiber", "Runner", "Variant", "compiled"]


def compiled(component: bytes, stack_bytes: int) -> bytearray:
    """The machine code of a component, for a Runtime with this stack."""
    return Component(engine.new_engine(stack_bytes), component).serialize()


class Own:
    """A result: something of the host, of a type of resource, that the guest gets a handle of.

    Functions get the `thing` for it; its `close`, if it has one, is called at the end.
    """

    def __init__(self, kind: str, thing: object) -> None:
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
        resources: Interface → its resource types, of which no two have the same name.
    """

    def __init__(
        self,
        runtime: Runtime,
        path: Path,
        offered: Mapping[str, Mapping[str, Function]],
        resources: Mapping[str, Sequence[str]],
    ) -> None:
        self.runtime = runtime
        try:
            self.component = Component.deserialize_file(runtime.engine, str(path))
        except WasmtimeError as exc:
            raise LookupError(str(exc)) from exc
        self.linker = Linker(runtime.engine)
        names = [each for found in resources.values() for each in found]
        self.kinds = {name: number for number, name in enumerate(names, 1)}
        self._callbacks: list[Any] = []  # C holds their addresses
        for name in self.component.type.imports(runtime.engine):
            bare = name.partition("@")[0]
            with self.linker.root() as root, root.add_instance(name) as instance:
                for name in resources.get(bare, ()):
                    instance.add_resource(name, ResourceType.host(self.kinds[name]), _dropped)
                for called, function in offered.get(bare, {}).items():
                    self._define(instance, called, function)
        self.linker.define_unknown_imports_as_traps(self.component)
        self.start: Any = self.component.get_export_index("run")

    def _define(self, instance: Any, name: str, function: Function) -> None:
        callback = _callback(function)
        self._callbacks.append(callback)
        engine.refuse(
            bindings.wasmtime_component_linker_instance_add_func_async(
                instance.ptr(), *engine.text(name), callback, None, engine.no_finalizer
            )
        )


class PythonFiber(Fiber):
    """A guest of the component, see Fiber. `hosts` is its world, alone."""

    PARTS_MAX = 64, 16, 4
    START_TICKS = 2  # short functions end by then, and are not handed to a worker

    def __init__(self, runner: Any, **options: Any) -> None:
        super().__init__((runner,), **options)
        self.runner: Runner = runner
        self._instance: Any = None
        self.things: dict[int, object] = {}
        self._numbers = 0

    async def prepare(self) -> None:
        """Instantiate the component: what costs a start most, and knows nothing of a program."""
        self.limit()
        self._instance = bindings.wasmtime_component_instance_t()
        context = self.memory.context
        await self._finish(
            lambda trap, error: bindings.wasmtime_component_linker_instantiate_async(
                self.runner.linker.ptr(), context, self.runner.component.ptr(),
                ctypes.byref(self._instance), error,
            )
        )  # fmt: skip
        self._cpu_ns = 0

    def take(self, memory_bytes: int, cpu_s: float, owner: str) -> None:
        self._memory_bytes, self._cpu_ns_max, self._owner = memory_bytes, int(cpu_s * 1e9), owner
        self._held_loop = memory_bytes > engine.LOOP_MEMORY_BYTES

    async def _live(self, context: Any) -> int:
        if self._instance is None:
            await self.prepare()
        function = bindings.wasmtime_component_func_t()
        bindings.wasmtime_component_instance_get_func(
            ctypes.byref(self._instance), context, self.runner.start.ptr(), ctypes.byref(function)
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
    thing = engine.current.fiber.things.pop(number, None)
    if (close := getattr(thing, "close", None)) is not None:
        with contextlib.suppress(OSError, WasiError):
            close()


def _callback(function: Function) -> Any:
    """What C calls for a function."""
    # Of parameters, and of the result: known at the first call, which several threads may make.
    kinds: tuple[list[Any], _Put] | None = None

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
                kinds = [each for _, each in found.params], _putting(found.result)
            params, put = kinds
            given = [_taken(fiber, store, each, args[at]) for at, each in enumerate(params)]
            result = function(fiber.hosts[0], *given)
            if callable(result):
                give = partial(put, fiber, store, results)
                words[0], words[1] = engine.ONCE_SET, fiber.park(result, give, int.__neg__)
            else:
                put(fiber, store, results, result)
        except Exception as exc:
            fiber.fail(Trapped(str(exc)) if isinstance(exc, WasiError) else exc)
            error[0] = bindings.wasmtime_error_new(b"host")

    return bindings.wasmtime_component_func_async_callback_t(callback)


def _taken(fiber: PythonFiber, store: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.ListType):
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


_Put = Callable[["PythonFiber", Any, Any, Any], None]
"""Writes a value for a guest: the guest, its store, where to, what."""


def _putting(kind: Any) -> _Put:
    """How values of a type are written: what the package knows of a type takes it long to say."""
    if isinstance(kind, types.ResultType):
        return _result(_putting(kind.ok), _putting(kind.err))
    if isinstance(kind, types.OptionType):
        return _option(_putting(kind.payload))
    if isinstance(kind, types.RecordType):
        return _record({name: _putting(each) for name, each in kind.fields})
    if isinstance(kind, types.TupleType):
        return _several("tuple", [_putting(each) for each in kind.elements])
    if isinstance(kind, types.ListType):
        return _bytes if kind._is_bytes() else _several("list", repeat(_putting(kind.element)))

    def put(fiber: PythonFiber, store: Any, to: Any, value: Any) -> None:
        if isinstance(value, Own):
            number = fiber.runner.kinds[value.kind]
            value = ResourceHost.own(fiber.hold(value.thing), number)
        with _converting:
            kind.convert_to_c(store, value, to)

    return _nothing if kind is None else put


def _nothing(fiber: PythonFiber, store: Any, to: Any, value: Any) -> None:
    pass


def _boxed(put: _Put, fiber: PythonFiber, store: Any, value: Any) -> Any:
    if put is _nothing:
        return None
    raw = bindings.wasmtime_component_val_t()
    put(fiber, store, ctypes.pointer(raw), value)
    return bindings.wasmtime_component_val_new(ctypes.byref(raw))


def _result(ok: _Put, err: _Put) -> _Put:
    def put(fiber: PythonFiber, store: Any, to: Any, value: Any) -> None:
        failed = isinstance(value, Failed)
        boxed = _boxed(err if failed else ok, fiber, store, value.error if failed else value)
        to.contents.kind = ffi.WASMTIME_COMPONENT_RESULT
        to.contents.of.result.is_ok = not failed
        to.contents.of.result.val = boxed

    return put


def _option(some: _Put) -> _Put:
    def put(fiber: PythonFiber, store: Any, to: Any, value: Any) -> None:
        boxed = None if value is None else _boxed(some, fiber, store, value)
        to.contents.kind = ffi.WASMTIME_COMPONENT_OPTION
        to.contents.of.option = boxed

    return put


def _record(fields: dict[str, _Put]) -> _Put:
    def put(fiber: PythonFiber, store: Any, to: Any, value: Any) -> None:
        raw = bindings.wasmtime_component_valrecord_t()
        bindings.wasmtime_component_valrecord_new_uninit(ctypes.byref(raw), len(fields))
        for at, (name, put_field) in enumerate(fields.items()):
            place = raw.data[at]
            put_field(fiber, store, ctypes.pointer(place.val), value[name])
            place.name = ffi.str_to_capi(name)
        to.contents.kind = ffi.WASMTIME_COMPONENT_RECORD
        to.contents.of.record = raw

    return put


def _several(form: str, elements: Iterable[_Put]) -> _Put:
    """Of a tuple or a list."""
    made = getattr(bindings, f"wasmtime_component_val{form}_t")
    make_room = getattr(bindings, f"wasmtime_component_val{form}_new_uninit")
    kind = getattr(ffi, f"WASMTIME_COMPONENT_{form.upper()}")

    def put(fiber: PythonFiber, store: Any, to: Any, value: Any) -> None:
        raw = made()
        make_room(ctypes.byref(raw), len(value))
        for at, (put_element, each) in enumerate(zip(elements, value, strict=False)):
            put_element(fiber, store, ctypes.pointer(raw.data[at]), each)
        to.contents.kind = kind
        setattr(to.contents.of, form, raw)

    return put


def _bytes(fiber: PythonFiber, store: Any, to: Any, value: bytes) -> None:
    raw = bindings.wasmtime_component_vallist_t()
    size = len(value)
    bindings.wasmtime_component_vallist_new_uninit(ctypes.byref(raw), size)
    if size:
        view = _bytes_of(raw.data, size, _WRITABLE)
        view[::_VALUE_BYTES] = bytes([ffi.WASMTIME_COMPONENT_U8.value]) * size
        view[_BYTE_AT::_VALUE_BYTES] = value
    to.contents.kind = ffi.WASMTIME_COMPONENT_LIST
    to.contents.of.list = raw


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
