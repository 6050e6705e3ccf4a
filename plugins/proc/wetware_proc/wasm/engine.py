"""Guests of WebAssembly as fibers, on wasmtime's asynchronous C functions.

A guest has a stack of its own and no thread. It is polled on the loop; one that goes on computing
for longer than a tick is polled by a few worker threads instead, where it uses another core and
holds nobody up. So are all, while guests together use more than their share of the loop.

Python that a guest calls runs on the guest's stack and on the thread that polls it; whatever
concerns others, or waits, is handed to the loop, and the guest sleeps meanwhile.

What is used of wasmtime beyond its promise is why it is pinned to a minor version. `Any` stops at
this module, and no other one imports wasmtime, but for those that compile, and that run components.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from wasmtime import Config, Engine, FuncType, Linker, Module, Store, Trap, ValType, WasmtimeError
from wasmtime import _bindings as bindings
from wasmtime import _ffi as ffi

from wetware.base.bounds import TokenBucket
from wetware.base.threads import to_its_end
from wetware_proc.wasm.errno import Errno, errno_of, need

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
POOLED_MAX: Final = 256
"""Guests at a time that are in the pool. Each leaves its stack there, of at most 1.5 MiB."""

CONFIG: Final = f"2-{STACK_BYTES}-{HOST_STACK_BYTES}"
"""Changes when what is compiled does not fit any more."""

Later = Callable[[], int | Awaitable[int | None] | None]
"""Is called on the loop, on its own stack; what it gives is the result of the guest's call."""
Result = int | Later | None
"""None is 0."""


@dataclass(frozen=True, slots=True)
class Imports:
    """A module that guests may import.

    Attributes:
        module: Its name.
        host: The class whose methods the functions are: each gets the guest's own host, and the
            parameters. It may raise what `errno_of` knows, and Exited.
        functions: Name of each → a letter for each parameter: i, 32 bits, or I, 64 bits; unsigned
            both. The guest gets a number of 32 bits, and nothing where a `-` follows.
        failed: What it gets for an error number.
    """

    module: str
    host: type
    functions: Mapping[str, str]
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
# As the package has it, but without the types of its parameters, which take half of the time.
_Callback = ctypes.CFUNCTYPE(
    None, _Pointer, _Pointer, _Words, ctypes.c_size_t, _Words, ctypes.c_size_t, _Words, _Words
)  # data, caller, arguments, their number, results, their number, trap, continuation
_VALUE_WORDS: Final = ctypes.sizeof(bindings.wasmtime_val_t) // 8  # kind, payload, …
no_finalizer: Any = ctypes.cast(0, ctypes.CFUNCTYPE(None, ctypes.c_void_p))
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


def text(name: str) -> tuple[Any, int]:
    """A name, and its length, for a function of C."""
    data = name.encode()
    return ctypes.create_string_buffer(data, len(data)), len(data)


_START, _MEMORY, _HOST = text("_start"), text("memory"), text("host")


def refuse(error: Any) -> None:
    """Raise an error that a function returned."""
    if error:
        raise WasmtimeError._from_ptr(error)


# --- the engine ----------------------------------------------------------------------------------


def new_engine(stack_bytes: int = STACK_BYTES, *, pooled: bool = False) -> Engine:
    """An engine; what one compiled another can load, in any process of this machine.

    Args:
        stack_bytes: Of a guest.
        pooled: It maps memory, a table and a stack for each of POOLED_MAX guests now, and clears
            them for the next one, which costs less than to map them anew. Raises OSError where
            this process may not map as much.
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
    if pooled:
        _add_pool(config, stack_bytes)
    return Engine(config)


_MAP_NORESERVE: Final = 0x4000  # the module mmap knows it from Python 3.13 on


def _add_pool(config: Config, stack_bytes: int) -> None:
    # Where the engine cannot map its pool it ends the process: so look whether there is room, in
    # which memory is not accessible yet, and tables and stacks are, and as much again left.
    guest_bytes = TABLE_ELEMENTS_MAX * 8 + stack_bytes + HOST_STACK_BYTES
    with contextlib.ExitStack() as stack:
        for nbytes, access in ((5 << 30, 0), (guest_bytes, mmap.PROT_READ | mmap.PROT_WRITE)):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            stack.enter_context(mmap.mmap(-1, 2 * POOLED_MAX * nbytes, flags, access))
    pool = bindings.wasmtime_pooling_allocation_config_new()
    for name, value in (
        ("total_core_instances", POOLED_MAX),
        ("total_memories", POOLED_MAX),
        ("total_tables", POOLED_MAX),  # a module with two of them does not fit
        ("total_stacks", POOLED_MAX),
        ("total_component_instances", 0),
        ("total_gc_heaps", 0),
        ("table_elements", TABLE_ELEMENTS_MAX),
    ):
        getattr(bindings, f"wasmtime_pooling_allocation_config_{name}_set")(pool, value)
    bindings.wasmtime_pooling_allocation_strategy_set(config.ptr(), pool)
    bindings.wasmtime_pooling_allocation_config_delete(pool)


class Ticker:
    """Interrupts the guests that are polled, every TICK_S, in a thread that sleeps without them.

    A guest may miss a tick: only when it goes on has it a new deadline, which is the next one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._closed = engine, False
        self._polled: set[object] = set()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wasm-ticks", daemon=True)
        self._thread.start()

    def begin(self, guest: object) -> None:
        """A guest is polled, in any thread, until `end`."""
        self._polled.add(guest)
        if not self._wake.is_set():  # to look costs a tenth of setting it
            self._wake.set()

    def end(self, guest: object) -> None:
        self._polled.discard(guest)

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed and self._wake.wait():
            time.sleep(TICK_S)  # first: a guest that is polled often wakes this thread once a tick
            self._wake.clear()
            self._engine.increment_epoch()
            if self._polled:
                self._wake.set()


class Workers:
    """Threads that poll who computes, and the share of the loop of all who do not.

    Owners have the threads in turn, however many guests each one has.

    Args:
        count: Of the threads.
    """

    def __init__(self, count: int) -> None:
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="wasm")
        self.loop_s = TokenBucket(LOOP_SHARE, LOOP_BURST_S)
        self._free = count + 1  # none of them waits for the loop
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
    """The engine, and the imports that it offers.

    Args:
        imports: What guests may import. The hosts of a Fiber are in the same order.
        workers: Which several runtimes may share.
        stack_bytes: Of a guest.
        pooled: See new_engine, also for what it raises.
    """

    def __init__(
        self,
        imports: Sequence[Imports],
        workers: Workers,
        stack_bytes: int = STACK_BYTES,
        *,
        pooled: bool = False,
    ) -> None:
        self.engine = new_engine(stack_bytes, pooled=pooled)
        self._places = threading.BoundedSemaphore(POOLED_MAX) if pooled else None
        self._linker = Linker(self.engine)
        self._callbacks: list[Any] = []  # C holds their addresses
        for place, each in enumerate(imports):
            for name in each.functions:
                self._define(each, name, place)
        self.ticker = Ticker(self.engine)
        self.workers = workers

    def close(self) -> None:
        """Only when no guest runs."""
        self.ticker.close()

    def take(self) -> bool:
        """Whether there is room for another guest, which `give`s it back when it is gone."""
        return self._places is None or self._places.acquire(blocking=False)

    def give(self) -> None:
        """In any thread."""
        if self._places is not None:
            self._places.release()

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
        prepared = ctypes.POINTER(bindings.wasmtime_instance_pre_t)()
        where = ctypes.byref(prepared)
        try:
            refuse(
                bindings.wasmtime_linker_instantiate_pre(self._linker.ptr(), module.ptr(), where)
            )
        except WasmtimeError as exc:
            raise ValueError(str(exc)) from exc
        return Program(self, module, prepared)

    def _define(self, imports: Imports, name: str, place: int) -> None:
        letters, dash, _ = imports.functions[name].partition("-")
        kinds = [ValType.i32() if letter == "i" else ValType.i64() for letter in letters]
        kind = FuncType(kinds, [] if dash else [ValType.i32()])
        callback = _Callback(_called(getattr(imports.host, name), letters, imports.failed, place))
        self._callbacks.append(callback)
        refuse(
            bindings.wasmtime_linker_define_async_func(
                self._linker.ptr(), *text(imports.module), *text(name), kind.ptr(),
                ctypes.cast(callback, bindings.wasmtime_func_async_callback_t), None, no_finalizer,
            )
        )  # fmt: skip


class Program:
    """A module that is loaded and linked; instances are made of it quickly."""

    def __init__(self, runtime: Runtime, module: Module, prepared: Any) -> None:
        self.runtime, self._module, self.prepared = runtime, module, prepared

    def __del__(self) -> None:
        bindings.wasmtime_instance_pre_delete(self.prepared)


# --- what a guest calls --------------------------------------------------------------------------

current = threading.local()
"""`fiber`: the one that this thread polls."""


def _called(
    function: Callable[..., Result], letters: str, failed: Callable[[int], int], place: int
) -> Callable[..., None]:
    """What C calls for a function: where each parameter is, in words, and which bits count."""
    masks = tuple(
        (1 + _VALUE_WORDS * at, 0xFFFF_FFFF if letter == "i" else (1 << 64) - 1)
        for at, letter in enumerate(letters)
    )

    def callback(
        data: int, caller: int, words: Any, count: int,
        results: Any, result_count: int, trap: Any, continuation: Any,
    ) -> None:  # fmt: skip
        fiber: Fiber = current.fiber
        fiber.memory.caller = caller
        continuation[0], continuation[1] = ALWAYS, 1
        if fiber.elsewhere:
            fiber.let_others()
        try:
            result = function(fiber.hosts[place], *[words[at] & mask for at, mask in masks])
        except Exception as exc:
            if (number := errno_of(exc)) is None:
                fiber.fail(exc)
                made = bindings.wasmtime_trap_new(*_HOST)
                trap[0] = ctypes.cast(made, _Pointer).value or 0
                return
            result = failed(number)
        if callable(result):
            continuation[0], continuation[1] = ONCE_SET, fiber.park(result, results, failed)
        else:
            results[0], results[1] = 0, (result or 0) & 0xFFFF_FFFF

    return callback


class Memory:
    """The memory of one guest. It grows, and never moves: `memory_may_move`."""

    def __init__(self) -> None:
        self.caller = 0  # the instance that calls; valid during its call
        self.context: Any = None
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
        size: int = bindings.wasmtime_memory_data_size(self.context, ctypes.byref(self._found))
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
        self._size, self._all, self._found, self.context = 0, None, None, None

    def _reach(self, end: int) -> None:
        """See how large it is by now."""
        need(self.context, Errno.FAULT)
        if self._found is None:
            found = bindings.wasmtime_extern_t()
            need(self.caller, Errno.FAULT)
            caller = ctypes.cast(self.caller, ctypes.POINTER(bindings.wasmtime_caller_t))
            where = ctypes.byref(found)
            need(bindings.wasmtime_caller_export_get(caller, *_MEMORY, where), Errno.FAULT)
            kind: Any = found.kind  # a number, whatever the types say
            need(kind == ffi.WASMTIME_EXTERN_MEMORY.value, Errno.FAULT)
            self._found = bindings.wasmtime_memory_t.from_buffer_copy(found.of.memory)
        memory = ctypes.byref(self._found)
        self._size = bindings.wasmtime_memory_data_size(self.context, memory)
        data = bindings.wasmtime_memory_data(self.context, memory)
        self._all = memoryview_of(data, self._size, _WRITABLE)
        need(end <= self._size, Errno.FAULT)


# --- a guest that runs ---------------------------------------------------------------------------


class Fiber:
    """One guest. `run` is its life; cancelling that ends it.

    Args:
        programs: What it runs, in one or more runtimes with the same workers: it lives in the first
            one that has room, and the last always has.
        memory_bytes: That its memory may have.
        cpu_s: That it may use.
        owner: With whose other guests it shares the workers.

    Attributes:
        elsewhere: A worker polls it.
        hosts: The objects that its calls go to, in the order of the import modules.
        memory: Its memory.
    """

    PARTS_MAX = 1, TABLES_MAX, 1  # instances, tables, memories
    START_TICKS = 1  # until it first comes back

    def __init__(
        self, programs: Sequence[Program], *, memory_bytes: int, cpu_s: float, owner: str = ""
    ) -> None:
        self._programs, self._owner = programs, owner
        self._memory_bytes, self._cpu_ns_max = memory_bytes, int(cpu_s * 1e9)
        self.hosts: tuple[object, ...] = ()
        self.memory = Memory()
        self._store: Any = None
        self._cpu_ns = self._polled_at = 0
        self._defect: BaseException | None = None
        # A call that waits for the loop: what is to be done, and where the result belongs.
        self._later: Later | None = None
        self._results: Any = None
        self._failed: Callable[[int], int] = int
        self._flag = ctypes.create_string_buffer(2)
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
        self.limit()
        try:
            return await self._live(self.memory.context)
        except Exited as exc:
            return exc.code
        finally:
            self.close()

    def limit(self) -> None:
        """Make its store, unless there is one, and have its limits hold there."""
        if self._store is None:
            self._program = next(each for each in self._programs if each.runtime.take())
            self._runtime = self._program.runtime
            self._store = Store(self._runtime.engine)
            self.memory.context = self._store._context()
        self._store.set_limits(self._memory_bytes, TABLE_ELEMENTS_MAX, *self.PARTS_MAX)
        self._store.set_epoch_deadline(self.START_TICKS)
        bindings.wasmtime_context_epoch_deadline_async_yield_and_update(self.memory.context, 1)

    def close(self) -> None:
        """Free its store: it runs no more."""
        size = self.memory.size
        self.memory.close()
        if size is None or size > LOOP_FREED_BYTES:
            self._runtime.workers.threads.submit(self._free)  # its driver waits for it
        else:
            self._free()

    def _free(self) -> None:
        self._store.close()
        self._runtime.give()

    async def _live(self, context: Any) -> int:
        """In a store: instantiate and run; returns the exit code."""
        where = ctypes.byref(bindings.wasmtime_instance_t())
        await self._finish(
            partial(
                bindings.wasmtime_instance_pre_instantiate_async,
                self._program.prepared, context, where,
            )
        )  # fmt: skip
        start = bindings.wasmtime_extern_t()
        bindings.wasmtime_instance_export_get(context, where, *_START, ctypes.byref(start))
        function, none = ctypes.byref(start.of.func), ctypes.byref(bindings.wasmtime_val_t())
        await self._finish(
            partial(bindings.wasmtime_func_call_async, context, function, none, 0, None, 0)
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

    async def _finish(self, begin: Callable[..., Any]) -> None:
        """Poll what `begin` begins until it is done."""
        trap = ctypes.POINTER(bindings.wasm_trap_t)()
        error = ctypes.POINTER(bindings.wasmtime_error_t)()
        future = begin(ctypes.byref(trap), ctypes.byref(error))
        try:
            await self._drive(future)
        finally:
            bindings.wasmtime_call_future_delete(future)  # an unfinished one is unwound
        failure = (
            Trap._from_ptr(trap) if trap else WasmtimeError._from_ptr(error) if error else None
        )
        if self._defect is not None:
            raise self._defect
        if failure is not None:
            raise self._reason(failure)

    async def _drive(self, future: Any) -> None:
        while True:
            if self._computes or self._held_loop or self._runtime.workers.loop_s.wait_s(0):
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

    def _took(self, since: float) -> float:
        """The guest has had the loop since then; returns for how long, in s."""
        took = time.perf_counter() - since
        self._runtime.workers.loop_s.spend(took)
        return took

    def _poll_once(self, future: Any) -> bool:
        """Let the guest go on until it is done, parks, or the next tick comes."""
        current.fiber = self
        self._runtime.ticker.begin(self)
        self._polled_at = time.thread_time_ns()
        done = bindings.wasmtime_call_future_poll(future)
        self._cpu_ns += time.thread_time_ns() - self._polled_at
        self._runtime.ticker.end(self)
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

        workers = self._runtime.workers
        await workers.take(self._owner)
        work = workers.threads.submit(ticks)
        done = asyncio.wrap_future(work)
        done.add_done_callback(lambda _: workers.give())
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
            if result is not None and not isinstance(result, int):
                result = await result
        except Exception as exc:
            if (number := errno_of(exc)) is None:
                raise
            result = self._failed(number)
        self._give(result)
        self._flag[0] = b"\1"

    def _give(self, result: int | None) -> None:
        self._results[0], self._results[1] = 0, (result or 0) & 0xFFFF_FFFF

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
