"""What a Python guest can call: of WASI 0.2 what CPython needs, and `host` of runner.wit.

There are no sockets: a program that tries hears that from Python, as an OSError. Files are in
files.py. What is not here is a trap, which only bytes that are no Python can reach.
Source: https://github.com/WebAssembly/WASI/tree/v0.2.9/wasip2
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from wetware.base.bounds import TokenBucket
from wetware.errors import NotFound, WetwareError
from wetware_proc import grants
from wetware_proc.grants import MESSAGE_BYTES_MAX, NAME_BYTES_MAX, Handles
from wetware_proc.python import files
from wetware_proc.python.component import Failed, Function, Own, Variant
from wetware_proc.serving import Calls
from wetware_proc.wasm.engine import Exited
from wetware_proc.wasm.errno import Errno, need
from wetware_proc.wasm.files import let_go

if TYPE_CHECKING:
    from wetware.base.threads import Threads
    from wetware_proc.driver import Output, Pipe, Spec
    from wetware_proc.python.component import PythonFiber

CODE_PIECE_BYTES: Final = 1 << 20
WRITE_BYTES: Final = 64 << 10
"""That a guest may write at once."""
RANDOM_BYTES: Final = 64 << 10

_CLOSED: Final = Failed(None)  # of a stream
Later = Callable[[], Coroutine[Any, Any, Any]]


class Pollable:
    """Something that a guest can wait for."""

    def __init__(self, ready: Callable[[], bool], wait: Callable[[], Awaitable[None]]) -> None:
        self.ready, self.wait = ready, wait


class World:
    """The world of one guest.

    Args:
        fiber: The guest.
        spec: What it gets.
        code: Its program.
        tmp: Opens its own directory, and gives a descriptor.
    """

    def __init__(self, fiber: PythonFiber, spec: Spec, code: bytes, tmp: Callable[[], int]) -> None:
        self._fiber, self._spec, self._code = fiber, spec, code
        self.files = files.Files(fiber, spec, tmp)
        self._rate = TokenBucket(spec.limits.output_bytes_s, spec.limits.output_bytes_s)
        self._handles = Handles(spec.grants, spec.limits.handles_max)
        self._calls = Calls(self._handles, spec)

    async def close(self, threads: Threads) -> None:
        """The guest is gone."""
        self._calls.end()
        self._handles.close()
        await let_go(self.files.table, threads)

    # --- host ---

    def given(self) -> str:
        spec = self._spec
        return _text(
            json.dumps({"args": spec.args, "env": dict(spec.env), "code": len(self._code)}).encode()
        )

    def code(self, at: int) -> str:
        return _text(self._code[at : at + CODE_PIECE_BYTES])

    def cap(self, name: str) -> Any:
        try:
            return self._handles.named(_name(name))
        except WetwareError as exc:
            return _failed(exc)

    def offer(self, name: str, handle: int) -> Later:
        return _later(lambda: self._spec.offer(_name(name), self._handles.get(handle)))

    def serve(self, name: str) -> Later:
        return _later(lambda: self._calls.serve(_name(name)))

    def accept(self) -> Later:
        async def accept() -> Any:
            try:
                return _text(await self._calls.accept())
            except WetwareError as exc:
                return _failed(exc)

        return accept

    def reply(self, number: int, message: str) -> Later:
        need(len(message) <= MESSAGE_BYTES_MAX, Errno.TOOBIG)
        return _later(lambda: self._calls.reply(number, message.encode("latin-1")))

    def call(self, handle: int, message: str) -> Later:
        need(len(message) <= MESSAGE_BYTES_MAX, Errno.TOOBIG)

        async def call() -> Any:
            try:
                ref = self._handles.get(handle)
                method, params = self._handles.message(message.encode("latin-1"))
                return _text(self._handles.answer(await grants.call(ref, method, params)))
            except WetwareError as exc:
                return _failed(exc)

        return call

    def drop(self, handle: int) -> None:
        with contextlib.suppress(NotFound):
            self._handles.drop(handle)

    # --- WASI ---

    def environment(self) -> list[Any]:
        return []

    def none(self) -> None:
        return None

    def exit(self, status: Variant | None) -> None:
        raise Exited(int(isinstance(status, Variant) and status.tag == "err"))

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def resolution_ns(self) -> int:
        return 1

    def wall_clock(self) -> Any:
        return files.datetime(time.time_ns())

    def wall_clock_resolution(self) -> Any:
        return files.datetime(1)

    def at_instant(self, at_ns: int) -> Own:
        async def wait() -> None:
            await asyncio.sleep(max(0, at_ns - time.monotonic_ns()) / 1e9)

        return Own("pollable", Pollable(lambda: time.monotonic_ns() >= at_ns, wait))

    def after_duration(self, duration_ns: int) -> Own:
        return self.at_instant(time.monotonic_ns() + duration_ns)

    def random_bytes(self, count: int) -> bytes:
        need(count <= RANDOM_BYTES, Errno.INVAL)
        return os.urandom(count)

    def block(self, pollable: Pollable) -> Later:
        async def wait() -> None:
            while not pollable.ready():
                await pollable.wait()

        return wait

    def poll(self, pollables: list[Pollable]) -> Any:
        need(bool(pollables), Errno.INVAL)

        def ready() -> list[int]:
            return [at for at, each in enumerate(pollables) if each.ready()]

        async def wait() -> list[int]:
            while not (found := ready()):
                tasks = [asyncio.ensure_future(each.wait()) for each in pollables]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in tasks:
                        task.cancel()
            return found

        return ready() or wait

    def stdin(self) -> Own:
        return Own("input-stream", self._spec.stdin)

    def stdout(self) -> Own:
        return Own("output-stream", self._spec.stdout)

    def stderr(self) -> Own:
        return Own("output-stream", self._spec.stderr)

    def read(self, pipe: Pipe, count: int) -> Any:
        def take() -> Any:
            data = pipe.take(min(count, WRITE_BYTES))
            return data if data or not pipe.ready else _CLOSED

        async def later() -> Any:
            return take()

        return later if self._fiber.elsewhere else take()  # a pipe is the loop's

    def readable(self, pipe: Pipe) -> Own:
        return Own("pollable", Pollable(lambda: pipe.ready, pipe.wait))

    def check_write(self, output: Output) -> int:
        return WRITE_BYTES

    def write(self, output: Output | files.Writer, data: bytes) -> Any:
        if isinstance(output, files.Writer):
            return output.write(data)

        def put() -> Any:
            try:
                room = output(data) if data else None
            except OSError:
                return _CLOSED
            self._rate.spend(len(data))
            return partial(wait, room) if room is not None or self._rate.wait_s() else None

        async def wait(room: Awaitable[None] | None) -> Any:
            try:
                if room is not None:
                    await room
            except OSError:
                return _CLOSED
            return await asyncio.sleep(self._rate.wait_s())

        async def later() -> Any:
            waits = put()
            return await waits() if callable(waits) else waits

        return later if self._fiber.elsewhere else put()

    def flush(self, output: Output) -> None:
        return None

    def writable(self, output: Output) -> Own:
        return Own("pollable", Pollable(lambda: True, lambda: asyncio.sleep(0)))

    def network(self) -> Own:
        return Own("network", None)

    def no_socket(self, *_: object) -> Failed:
        return Failed("not-supported")


def _later(function: Callable[[], Any]) -> Later:
    """On the loop, as all that concerns others."""

    async def call() -> Any:
        try:
            return function()
        except WetwareError as exc:
            return _failed(exc)

    return call


def _failed(error: WetwareError) -> Failed:
    return Failed(_text(f"{error.code}\n{error.message}".encode()[:MESSAGE_BYTES_MAX]))


def _name(text: str) -> str:
    need(len(text) <= NAME_BYTES_MAX, Errno.NAMETOOLONG)
    return text.encode("latin-1").decode(errors="replace")


def _text(data: bytes) -> str:
    return data.decode("latin-1")


def _methods(resource: str, **functions: Function) -> dict[str, Function]:
    return {
        f"[method]{resource}.{name.replace('_', '-')}": each for name, each in functions.items()
    }


OFFERED: Final[Mapping[str, Mapping[str, Function]]] = {
    **files.OFFERED,
    "wetware:python/host": {
        "given": World.given,
        "code": World.code,
        "cap": World.cap,
        "call": World.call,
        "drop": World.drop,
        "offer": World.offer,
        "serve": World.serve,
        "accept": World.accept,
        "reply": World.reply,
    },
    "wasi:cli/environment": {
        "get-environment": World.environment,
        "get-arguments": World.environment,
    },
    "wasi:cli/exit": {"exit": World.exit},
    "wasi:cli/stdin": {"get-stdin": World.stdin},
    "wasi:cli/stdout": {"get-stdout": World.stdout},
    "wasi:cli/stderr": {"get-stderr": World.stderr},
    "wasi:cli/terminal-stdin": {"get-terminal-stdin": World.none},
    "wasi:cli/terminal-stdout": {"get-terminal-stdout": World.none},
    "wasi:cli/terminal-stderr": {"get-terminal-stderr": World.none},
    "wasi:clocks/monotonic-clock": {
        "now": World.monotonic_ns,
        "resolution": World.resolution_ns,
        "subscribe-instant": World.at_instant,
        "subscribe-duration": World.after_duration,
    },
    "wasi:clocks/wall-clock": {
        "now": World.wall_clock,
        "resolution": World.wall_clock_resolution,
    },
    "wasi:io/poll": {
        **_methods("pollable", block=World.block),
        "poll": World.poll,
    },
    "wasi:io/streams": {
        **_methods(
            "input-stream",
            read=World.read,
            subscribe=World.readable,
        ),
        **_methods(
            "output-stream",
            check_write=World.check_write,
            write=World.write,
            blocking_write_and_flush=World.write,
            blocking_flush=World.flush,
            subscribe=World.writable,
        ),
    },
    "wasi:random/random": {
        "get-random-bytes": World.random_bytes,
    },
    "wasi:sockets/instance-network": {"instance-network": World.network},
    "wasi:sockets/ip-name-lookup": {"resolve-addresses": World.no_socket},
    "wasi:sockets/tcp-create-socket": {"create-tcp-socket": World.no_socket},
    "wasi:sockets/udp-create-socket": {"create-udp-socket": World.no_socket},
}
"""Interface → function."""
RESOURCES: Final = {
    "wasi:io/error": ("error",),
    "wasi:io/poll": ("pollable",),
    "wasi:io/streams": ("input-stream", "output-stream"),
    "wasi:filesystem/types": ("descriptor", "directory-entry-stream"),
    "wasi:sockets/network": ("network",),
    "wasi:cli/terminal-input": ("terminal-input",),
    "wasi:cli/terminal-output": ("terminal-output",),
}
