"""Guests of WebAssembly as fibers, on wasmtime's asynchronous C functions.

A guest has a stack of its own and no thread. It is polled on the loop; one that goes on computing
for longer than a tick is polled by a few worker threads instead, where it uses another core and
holds nobody up. So are all, while guests together use more than their share of the loop.

Python that a guest calls runs on the guest's stack and on the thread that polls it; whatever
concerns others, or waits, is handed to the loop, and the guest sleeps meanwhile.

The functions are declared here once more, without types: that takes a third of the time a call.
What is used of wasmtime beyond its promise is why it is pinned to a minor version. `Any` stops at
this module, and no other one imports wasmtime, but for the one that compiles.
"""

from __future__ import annotations

import asyncio
import ctypes
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from wasmtime import Config, Engine, FuncType, Linker, Module, Trap, ValType, WasmtimeError
from wasmtime import _bindings as bindings
from wasmtime import _ffi as ffi

from wetware.base.bounds import TokenBucket
from wetware.base.threads import to_its_end
from wetware_proc.wasm.errno import Errno, errno_of

STACK_BYTES: Final = 512 << 10
"""Of a guest."""
HOST_STACK_BYTES: Final = 1 << 20
"""Above it, for Python that the guest calls."""
TICK_S: Final = 0.002
"""A guest that is polled comes back by then."""
SLICE_TICKS: Final = 5
"""Of a worker, before the next guest has its turn."""
LOOP_SHARE: Final = 0.5
"""Of the loop's time, for all guests together; with more, some are polled by workers."""
LOOP_BURST_S: Final = 0.004
"""That they may take at once."""
TURN_S: Final = 0.0005
"""Of one guest on the loop, before others have theirs."""
PYTHON_S: Final = 0.001
"""Who calls Python on a worker, over and over, pauses once in so long, for PAUSE_S."""
PAUSE_S: Final = 0.0001
HELD_S: Final = 0.008
"""Who has held the loop for so long at a time is not polled on it again."""
LOOP_MEMORY_BYTES: Final = 64 << 20
"""Nor who may fill more than this with one instruction, in which nothing interrupts it."""
LOOP_FREED_BYTES: Final = 8 << 20
"""Of memory, that are given back on the loop when a guest ends."""
TABLE_ELEMENTS_MAX: Final = 200_000
"""Of one table: functions that are called by their number."""
TABLES_MAX: Final = 4

CONFIG: Final = f"2-{STACK_BYTES}-{HOST_STACK_BYTES}"
"""Changes when what is compiled does not fit any more."""

Later = Callable[[], int | Awaitable[int]]
"""Is called on the loop, on its own stack; what it gives is the result of the guest's call."""
Result = int | Later


@dataclass(frozen=True, slots=True)
class Call:
    """A function that guests may import.

    Attributes:
        name: As the guest imports it.
        params: A letter for each: i, 32 bits, or I, 64 bits; unsigned both.
        function: Gets the guest's own host and the parameters. It may raise what `errno_of` knows,
            and Exited.
        parks: It may return Later; costs a microsecond more.
        result: The guest gets one, of 32 bits.
        failed: What it gets for an error number.
    """

    name: str
    params: str
    function: Callable[..., Result]
    parks: bool = False
    result: bool = True
    failed: Callable[[int], int] = int


class Exited(Exception):
    """Ends the guest.

    Args:
        code: Its exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Trapped(Exception):
    """The guest did what no program may; `str` says what."""


class OverLimit(Exception):
    """The guest ran into a limit; `str` is its name."""


# --- functions of the C library ------------------------------------------------------------------

_Pointer = ctypes.c_void_p
_Words = ctypes.POINTER(ctypes.c_uint64)
_SyncCallback = ctypes.CFUNCTYPE(
    ctypes.c_size_t, _Pointer, _Pointer, _Words, ctypes.c_size_t
)  # data, caller, values of 16 bytes → trap
_AsyncCallback = ctypes.CFUNCTYPE(
    None, _Pointer, _Pointer, _Words, ctypes.c_size_t, _Words, ctypes.c_size_t, _Words, _Words
)  # data, caller, arguments, their number, results, their number, trap, continuation
_VALUE_WORDS: Final = ctypes.sizeof(bindings.wasmtime_val_t) // 8  # kind, payload, …


def _function(name: str, result: Any, *parameters: Any) -> Any:
    function = ffi.dll[name]
    function.restype, function.argtypes = result, parameters
    return function


_size, _text, _bool = ctypes.c_size_t, ctypes.c_char_p, ctypes.c_bool
_store_new = _function("wasmtime_store_new", *[_Pointer] * 4)
_store_delete = _function("wasmtime_store_delete", None, _Pointer)
_store_context = _function("wasmtime_store_context", _Pointer, _Pointer)
_store_limiter = _function("wasmtime_store_limiter", None, _Pointer, *[ctypes.c_int64] * 5)
_set_deadline = _function("wasmtime_context_set_epoch_deadline", None, _Pointer, ctypes.c_uint64)
_yield_at_deadline = _function(  # whatever its header says, it returns nothing
    "wasmtime_context_epoch_deadline_async_yield_and_update", None, _Pointer, ctypes.c_uint64
)
_increment_epoch = _function("wasmtime_engine_increment_epoch", None, _Pointer)
_prepare = _function("wasmtime_linker_instantiate_pre", *[_Pointer] * 4)
_prepared_delete = _function("wasmtime_instance_pre_delete", None, _Pointer)
_instantiate = _function("wasmtime_instance_pre_instantiate_async", *[_Pointer] * 6)
_export = _function(
    "wasmtime_instance_export_get", _bool, _Pointer, _Pointer, _text, _size, _Pointer
)
_caller_export = _function("wasmtime_caller_export_get", _bool, _Pointer, _text, _size, _Pointer)
_call = _function(
    "wasmtime_func_call_async",
    *[_Pointer] * 4, _size, _Pointer, _size, _Pointer, _Pointer,
)  # fmt: skip
_poll = _function("wasmtime_call_future_poll", _bool, _Pointer)
_future_delete = _function("wasmtime_call_future_delete", None, _Pointer)
_memory_data = _function("wasmtime_memory_data", *[_Pointer] * 3)
_memory_size = _function("wasmtime_memory_data_size", _size, _Pointer, _Pointer)
_trap_new = _function("wasmtime_trap_new", _Pointer, _text, _size)
_define_sync = _function(
    "wasmtime_linker_define_func_unchecked",
    _Pointer, _Pointer, _text, _size, _text, _size, _Pointer, _SyncCallback, _Pointer, _Pointer,
)  # fmt: skip
_define_async = _function(
    "wasmtime_linker_define_async_func",
    _Pointer, _Pointer, _text, _size, _text, _size, _Pointer, _AsyncCallback, _Pointer, _Pointer,
)  # fmt: skip
memoryview_of: Any = ctypes.pythonapi.PyMemoryView_FromMemory
memoryview_of.restype, memoryview_of.argtypes = (
    ctypes.py_object,
    (_Pointer, ctypes.c_ssize_t, ctypes.c_int),
)
_WRITABLE: Final = 0x200

# A continuation is asked, with its own argument, whether the call has its result. Two functions of
# C answer without a line of Python: abs(1) is true, and strlen is true once the first byte is set.
_libc = ctypes.CDLL(None)
ALWAYS: Final = ctypes.cast(_libc.abs, _Pointer).value
ONCE_SET: Final = ctypes.cast(_libc.strlen, _Pointer).value


def _address(wrapper: Any) -> Any:
    return ctypes.cast(wrapper.ptr(), _Pointer)


def refuse(error: Any) -> None:
    """Raise an error that a function returned."""
    if error:
        pointer = ctypes.cast(error, ctypes.POINTER(bindings.wasmtime_error_t))
        raise WasmtimeError._from_ptr(pointer)


# --- the engine ----------------------------------------------------------------------------------


def new_engine(stack_bytes: int = STACK_BYTES) -> Engine:
    """An engine; what one compiled another can load, in any process of this machine.

    Args:
        stack_bytes: Of a guest.
    """
    config = Config()
    config.epoch_interruption = True
    config.wasm_threads = False
    config.wasm_memory64 = False
    # The order matters: a stack of a guest that does not fit its fiber ends the process.
    bindings.wasmtime_config_async_stack_size_set(config.ptr(), stack_bytes + HOST_STACK_BYTES)
    bindings.wasmtime_config_max_wasm_stack_set(config.ptr(), stack_bytes)
    bindings.wasmtime_config_memory_may_move_set(config.ptr(), False)  # see Memory
    bindings.wasmtime_config_wasm_gc_set(config.ptr(), False)
    # With it a component's call of the host lends one resource at most: a rename takes two.
    bindings.wasmtime_config_concurrency_support_set(config.ptr(), False)
    return Engine(config)


class Ticker:
    """Interrupts the guests that are polled, every TICK_S, in a thread that sleeps without them."""

    _QUIET_TICKS = 50

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._beat = self._idle = self._closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wasm-ticks", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """A guest is about to be polled."""
        self._beat = True
        if self._idle:
            self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        engine, quiet = _address(self._engine), 0
        while not self._closed:
            time.sleep(TICK_S)
            _increment_epoch(engine)
            quiet = 0 if self._beat else quiet + 1
            self._beat = False
            if quiet > self._QUIET_TICKS:
                self._idle = True  # from here on a beat wakes this thread
                if not self._beat:
                    self._wake.wait()
                self._idle, quiet = False, 0
                self._wake.clear()


class Turns:
    """Places at the workers: owners have them in turn, however many guests each one has.

    Args:
        places: That are given at a time.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def take(self, owner: str) -> None:
        """Wait for a place; `give` it back."""
        if self._free:
            self._free -= 1
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # it was given
                self.give()
            raise

    def give(self) -> None:
        """Pass a place on to the next owner's first guest."""
        while self._waiting:
            owner, queue = self._waiting.popitem(last=False)
            future = queue.popleft()
            if queue:
                self._waiting[owner] = queue  # behind all others
            if not future.done():
                future.set_result(None)
                return
        self._free += 1


class Runtime:
    """The engine, the imports that it offers, and the threads that poll who computes.

    Args:
        calls: Name of an import module → what it offers. The host objects of a Fiber are in the
            same order.
        workers: Threads.
        beside: Another runtime, whose threads and share of the loop this one uses.
        stack_bytes: Of a guest.
    """

    def __init__(
        self,
        calls: Sequence[tuple[str, Sequence[Call]]],
        workers: int = 0,
        *,
        beside: Runtime | None = None,
        stack_bytes: int = STACK_BYTES,
    ) -> None:
        self.engine = new_engine(stack_bytes)
        self._linker = Linker(self.engine)
        self._callbacks: list[Any] = []  # C holds their addresses
        for place, (module, offered) in enumerate(calls):
            for call in offered:
                self._define(module, call, place)
        self.ticker = Ticker(self.engine)
        self._beside = beside
        if beside is not None:
            self.loop_s: TokenBucket = beside.loop_s
            self.workers: ThreadPoolExecutor = beside.workers
            self.turns: Turns = beside.turns
        else:
            self.loop_s = TokenBucket(LOOP_SHARE, LOOP_BURST_S)
            self.workers = ThreadPoolExecutor(workers, thread_name_prefix="wasm")
            self.turns = Turns(workers + 1)  # none of them waits for the loop

    def close(self) -> None:
        """Only when no guest runs."""
        if self._beside is None:
            self.workers.shutdown()
        self.ticker.close()

    def load(self, path: Path) -> Program:
        """Map a compiled module, which must be one of our own: it is machine code. Blocks.

        Raises LookupError where it was compiled by another engine, and ValueError where it imports
        what there is not, or exports no `_start`.
        """
        try:
            module = Module.deserialize_file(self.engine, str(path))
        except WasmtimeError as exc:
            raise LookupError(str(exc)) from exc
        start = next((each.type for each in module.exports if each.name == "_start"), None)
        # A Fiber calls it unseen.
        if not isinstance(start, FuncType) or start.params or start.results:
            raise ValueError("it exports no function `_start`: it is a library, and no program")
        prepared = _Pointer()
        try:
            refuse(_prepare(_address(self._linker), _address(module), ctypes.byref(prepared)))
        except WasmtimeError as exc:
            raise ValueError(str(exc)) from exc
        return Program(self, module, prepared)

    def _define(self, module: str, call: Call, place: int) -> None:
        kinds = [ValType.i32() if letter == "i" else ValType.i64() for letter in call.params]
        signature = FuncType(kinds, [ValType.i32()] * call.result)
        make, define = (_parking, _define_async) if call.parks else (_prompt, _define_sync)
        callback = make(call, place)
        self._callbacks.append(callback)
        names = module.encode(), len(module), call.name.encode(), len(call.name)
        linker, kind = _address(self._linker), _address(signature)
        refuse(define(linker, *names, kind, callback, None, None))


class Program:
    """A module that is loaded and linked; instances are made of it quickly."""

    def __init__(self, runtime: Runtime, module: Module, prepared: Any) -> None:
        self.runtime, self._module, self.prepared = runtime, module, prepared

    def __del__(self) -> None:
        _prepared_delete(self.prepared)


# --- what a guest calls --------------------------------------------------------------------------

current = threading.local()
"""`fiber`: the one that this thread polls."""


def _masks(params: str, step: int, first: int) -> tuple[tuple[int, int], ...]:
    """Where each parameter is, in words, and which of its bits count."""
    return tuple(
        (first + step * at, 0xFFFF_FFFF if letter == "i" else (1 << 64) - 1)
        for at, letter in enumerate(params)
    )


def _prompt(call: Call, place: int) -> Any:
    """The callback of a call that returns at once."""
    function, failed, masks = call.function, call.failed, _masks(call.params, 2, 0)

    def callback(data: int, caller: int, words: Any, count: int) -> int:
        fiber: Fiber = current.fiber
        fiber.memory.caller = caller
        if fiber.elsewhere:
            fiber.let_others()
        try:
            result = function(fiber.hosts[place], *[words[at] & mask for at, mask in masks])
            if call.result:
                words[0] = result
        except Exception as exc:
            if (number := errno_of(exc)) is None:
                return fiber.crash(exc)
            words[0] = failed(number) & 0xFFFF_FFFF
        return 0

    return _SyncCallback(callback)


def _parking(call: Call, place: int) -> Any:
    """The callback of a call that may take a while."""
    function, failed, masks = call.function, call.failed, _masks(call.params, _VALUE_WORDS, 1)

    def callback(
        data: int, caller: int, words: Any, count: int,
        results: Any, result_count: int, trap: Any, continuation: Any,
    ) -> None:  # fmt: skip
        fiber: Fiber = current.fiber
        fiber.memory.caller = caller
        if fiber.elsewhere:
            fiber.let_others()
        result: Result = 0
        try:
            result = function(fiber.hosts[place], *[words[at] & mask for at, mask in masks])
        except Exception as exc:
            if (number := errno_of(exc)) is None:
                trap[0] = fiber.crash(exc)
            else:
                result = failed(number)
        if isinstance(result, int):
            results[0], results[1] = 0, result & 0xFFFF_FFFF
            continuation[0], continuation[1] = ALWAYS, 1
        else:
            continuation[0], continuation[1] = ONCE_SET, fiber.park(result, results, failed)

    return _AsyncCallback(callback)


class Memory:
    """The memory of one guest. It grows, and never moves: `memory_may_move`."""

    def __init__(self) -> None:
        self.caller = 0  # the instance that calls; valid during its call
        self.context = 0
        self._found: Any = None
        self._size = 0
        self._all: Any = None

    def view(self, at: int, count: int) -> memoryview:
        """Writable; valid during a call of the guest and its Later. Raises OSError EFAULT."""
        if self._all is None or at + count > self._size:  # also of no bytes, before all others
            self._reach(at + count)
        view: memoryview = self._all[at : at + count]
        return view

    @property
    def size(self) -> int | None:
        """In bytes; None where the guest has none that it exports, or has not used it in a call."""
        if self._found is None:
            return None
        size: int = _memory_size(self.context, ctypes.byref(self._found))
        return size

    def read(self, at: int, count: int) -> bytes:
        return bytes(self.view(at, count))

    def write(self, at: int, data: bytes) -> None:
        self.view(at, len(data))[:] = data

    def pack(self, at: int, form: str, *values: object) -> None:
        """Write values as `struct` does."""
        end = at + struct.calcsize(form)
        if self._all is None or end > self._size:
            self._reach(end)
        struct.pack_into(form, self._all, at, *values)

    def close(self) -> None:
        """The guest is about to be gone."""
        self._size, self._all, self._found, self.context = 0, None, None, 0

    def _reach(self, end: int) -> None:
        """See how large it is by now."""
        if not self.context:
            raise Errno.FAULT.error()
        if self._found is None:
            found = bindings.wasmtime_extern_t()
            if not (self.caller and _caller_export(self.caller, b"memory", 6, ctypes.byref(found))):
                raise Errno.FAULT.error()
            kind: Any = found.kind  # a number, whatever the types say
            if kind != ffi.WASMTIME_EXTERN_MEMORY.value:
                raise Errno.FAULT.error()
            self._found = bindings.wasmtime_memory_t.from_buffer_copy(found.of.memory)
        memory = ctypes.byref(self._found)
        self._size = _memory_size(self.context, memory)
        self._all = memoryview_of(_memory_data(self.context, memory), self._size, _WRITABLE)
        if end > self._size:
            raise Errno.FAULT.error()


# --- a guest that runs ---------------------------------------------------------------------------


class Fiber:
    """One guest. `run` is its life; cancelling that ends it.

    Args:
        program: What it runs.
        memory_bytes: That its memory may have.
        cpu_s: That it may use.
        owner: With whose other guests it shares the workers.

    Attributes:
        elsewhere: A worker polls it.
        hosts: The objects that its calls go to, in the order of the import modules.
        memory: Its memory.
    """

    PARTS_MAX = 1, TABLES_MAX, 1  # instances, tables, memories

    def __init__(
        self, program: Program, *, memory_bytes: int, cpu_s: float, owner: str = ""
    ) -> None:
        self._program, self._runtime, self._owner = program, program.runtime, owner
        self._memory_bytes, self._cpu_ns_max = memory_bytes, int(cpu_s * 1e9)
        self.hosts: tuple[object, ...] = ()
        self.memory = Memory()
        self._cpu_ns = self._polled_at = 0
        self._defect: BaseException | None = None
        # A call that waits for the loop: what is to be done, and where the result belongs.
        self._later: Later | None = None
        self._results: Any = None
        self._failed: Callable[[int], int] = int
        self._flag = ctypes.create_string_buffer(2)
        self._turn_s = 0.0  # on the loop, since others had their turn
        self._computes = False  # since its last call
        self._held_loop = memory_bytes > LOOP_MEMORY_BYTES
        self._stopping = self.elsewhere = False
        self._paused_at = 0.0

    @property
    def cpu_ns(self) -> int:
        """That it has used so far; also from within its calls."""
        running = time.thread_time_ns() - self._polled_at if self._polled_at else 0
        return self._cpu_ns + running

    async def run(self) -> int:
        """Instantiate the module and call `_start`; returns its exit code.

        Raises Trapped, OverLimit, and what is a defect of the host.
        """
        store = _store_new(_address(self._runtime.engine), None, None)
        self.memory.context = context = _store_context(store)
        try:
            _store_limiter(store, self._memory_bytes, TABLE_ELEMENTS_MAX, *self.PARTS_MAX)
            _set_deadline(context, 1)
            _yield_at_deadline(context, 1)
            return await self._live(context)
        except Exited as exc:
            return exc.code
        finally:
            size = self.memory.size
            self.memory.close()
            if size is None or size > LOOP_FREED_BYTES:
                workers = self._runtime.workers
                await to_its_end(asyncio.wrap_future(workers.submit(_store_delete, store)))
            else:
                _store_delete(store)

    async def _live(self, context: Any) -> int:
        """In a store: instantiate and run; returns the exit code."""
        instance = bindings.wasmtime_instance_t()
        where = ctypes.byref(instance)
        await self._finish(lambda *out: _instantiate(self._program.prepared, context, where, *out))
        start = bindings.wasmtime_extern_t()
        _export(context, where, b"_start", 6, ctypes.byref(start))
        function, values = ctypes.byref(start.of.func), bindings.wasmtime_val_t()
        await self._finish(
            lambda *out: _call(context, function, ctypes.byref(values), 0, None, 0, *out)
        )
        return 0

    def let_others(self) -> None:
        """Let other threads have Python, in a call on a worker.

        Who gives the interpreter's lock back and takes it again at once keeps the loop from it for
        ever: each time the loop is woken for it, and finds it taken.
        """
        if time.perf_counter() - self._paused_at > PYTHON_S:
            time.sleep(PAUSE_S)
            self._paused_at = time.perf_counter()

    def leave_loop(self) -> None:
        """What the guest calls from now on may take long: it is polled by workers."""
        self._held_loop = True

    def park(self, later: Later, results: Any, failed: Callable[[int], int]) -> int:
        """The call that is being made goes on on the loop. Returns the address of its flag."""
        self._later, self._results, self._failed = later, results, failed
        self.memory.caller = 0
        self._flag[0] = b"\0"
        return ctypes.addressof(self._flag)

    def fail(self, exc: BaseException) -> None:
        """End the guest, which is about to trap, with an exception."""
        self._defect = exc

    def crash(self, exc: BaseException) -> int:
        """End the guest with an exception. Returns a trap."""
        self.fail(exc)
        trap: int = _trap_new(b"host", 4)
        return trap

    async def _finish(self, begin: Callable[..., Any]) -> None:
        """Poll what `begin` begins until it is done."""
        trap = ctypes.POINTER(bindings.wasm_trap_t)()
        error = ctypes.POINTER(bindings.wasmtime_error_t)()
        future = begin(ctypes.byref(trap), ctypes.byref(error))
        try:
            await self._drive(future)
        finally:
            _future_delete(future)  # an unfinished one: the guest's stack is unwound
        failure = (
            Trap._from_ptr(trap) if trap else WasmtimeError._from_ptr(error) if error else None
        )
        if self._defect is not None:
            raise self._defect
        if failure is not None:
            raise self._reason(failure)

    async def _drive(self, future: Any) -> None:
        while True:
            if self._computes or self._held_loop or self._runtime.loop_s.wait_s(0):
                done = await self._poll_elsewhere(future)
            else:
                before = time.perf_counter()
                done = self._poll_once(future)
                if self._took(before) > HELD_S:
                    self._held_loop = True
            if done:
                return
            if self._cpu_ns > self._cpu_ns_max:
                raise OverLimit("cpu_s")
            self._computes = self._later is None
            if not self._computes:
                await self._answer()
            if self._turn_s > TURN_S:
                self._turn_s = 0.0
                await asyncio.sleep(0)

    def _took(self, since: float) -> float:
        """The guest has had the loop since then; returns for how long, in s."""
        took = time.perf_counter() - since
        self._turn_s += took
        self._runtime.loop_s.spend(took)
        return took

    def _poll_once(self, future: Any) -> bool:
        """Let the guest go on until it is done, parks, or the next tick comes."""
        current.fiber = self
        self._runtime.ticker.beat()
        self._polled_at = time.thread_time_ns()
        done: bool = _poll(future)
        self._cpu_ns += time.thread_time_ns() - self._polled_at
        self._polled_at = 0
        current.fiber = None
        return done

    async def _poll_elsewhere(self, future: Any) -> bool:
        def ticks() -> bool:
            self.elsewhere = True
            try:
                for _ in range(SLICE_TICKS):
                    if self._poll_once(future):
                        return True
                    if self._later is not None or self._stopping or self._cpu_ns > self._cpu_ns_max:
                        break
                return False
            finally:
                self.elsewhere = False

        turns = self._runtime.turns
        await turns.take(self._owner)
        work = self._runtime.workers.submit(ticks)
        done = asyncio.wrap_future(work)
        done.add_done_callback(lambda _: turns.give())
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not work.cancel():  # it has begun: nobody but that thread may touch the guest
                self._stopping = True
                await to_its_end(done)
            raise

    async def _answer(self) -> None:
        """Do what the guest's call asked for, and give it the result."""
        later, self._later = self._later, None
        assert later is not None  # noqa: S101 - the caller has looked
        before = time.perf_counter()
        try:
            result = later()
            self._took(before)
            if not isinstance(result, int):
                result = await result
        except Exception as exc:
            if (number := errno_of(exc)) is None:
                raise
            result = self._failed(number)
        self._give(result)
        self._flag[0] = b"\1"

    def _give(self, result: int) -> None:
        self._results[0], self._results[1] = 0, result & 0xFFFF_FFFF

    def _reason(self, failure: Trap | WasmtimeError) -> Exception:
        """What ended a guest. Nothing of a message: names in it are the guest's."""
        if isinstance(failure, Trap):
            if (code := failure.trap_code) is None:
                return Trapped("unknown trap")
            if code.name == "STACK_OVERFLOW":
                return OverLimit("stack")
            return Trapped(code.name.replace("_", " ").lower())
        text = str(failure)
        if "limit" in text:  # its memory or tables are larger from the start
            return OverLimit("tables" if "table" in text else "memory_bytes")
        return Trapped("it cannot be instantiated")
