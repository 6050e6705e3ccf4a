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
from wetware_proc.grants import MESSAGE_BYTES_MAX, NAME_BYTES_MAX
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
WRITE_BYTES: Final = 64 << 10  # that a guest may write at once
RANDOM_BYTES: Final = 64 << 10

_CLOSED: Final = Failed(None)  # of a stream
Later = Callable[[], Coroutine[Any, Any, Any]]


class Pollable:
    """Something that a guest can wait for."""

    def __init__(self, ready: Callable[[], bool], wait: Callable[[], Awaitable[None]]) -> None:
        self.ready, self.wait = ready, wait


class World:
    """The world of one guest, whose program is `code`; `tmp` opens its own directory."""

    def __init__(self, fiber: PythonFiber, spec: Spec, code: bytes, tmp: Callable[[], int]) -> None:
        self._fiber, self._spec, self._code = fiber, spec, code
        self.files = files.Files(fiber, spec, tmp)
        self._rate = TokenBucket(spec.limits.output_bytes_s, spec.limits.output_bytes_s)
        self._calls = Calls(spec)
        self._handles = self._calls.handles

    async def close(self, threads: Threads) -> None:
        self._calls.end()
        await let_go(self.files.table, threads)

    # --- host ---

    def given(self) -> str:
        spec, seed = self._spec, os.urandom(32).hex()
        head = {"args": spec.args, "env": dict(spec.env), "seed": seed, "code": len(self._code)}
        return f"{json.dumps(head)}\n{self.code(0)}"

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
        async def accept() -> str:
            return _text(await self._calls.accept())

        return _later(accept)

    def reply(self, number: int, message: str) -> Later:
        need(len(message) <= MESSAGE_BYTES_MAX, Errno.TOOBIG)
        return _later(lambda: self._calls.reply(number, message.encode("latin-1")))

    def call(self, handle: int, message: str) -> Later:
        need(len(message) <= MESSAGE_BYTES_MAX, Errno.TOOBIG)

        async def call() -> str:
            ref = self._handles.get(handle)
            method, params = self._handles.message(message.encode("latin-1"))
            return _text(self._handles.answer(await grants.call(ref, method, params)))

        return _later(call)

    def drop(self, handle: int) -> None:
        with contextlib.suppress(NotFound):
            self._handles.drop(handle)

    # --- WASI ---

    def exit(self, status: Variant | None) -> None:
        raise Exited(int(isinstance(status, Variant) and status.tag == "err"))

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

    def stream(self, kind: str, name: str) -> Own:
        return Own(kind, getattr(self._spec, name))

    def read(self, pipe: Pipe, count: int) -> Any:
        def take() -> Any:
            data = pipe.take(min(count, WRITE_BYTES))
            return data if data or not pipe.ready else _CLOSED

        return self._on_loop(take)

    def readable(self, pipe: Pipe) -> Own:
        return Own("pollable", Pollable(lambda: pipe.ready, pipe.wait))

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

        return self._on_loop(put)

    def _on_loop(self, function: Callable[[], Any]) -> Any:
        """A pipe and an output are the loop's: there at once, or else when it has its turn."""

        async def later() -> Any:
            waits = function()
            return await waits() if callable(waits) else waits

        return later if self._fiber.elsewhere else function()

    def writable(self, output: Output) -> Own:
        return Own("pollable", Pollable(lambda: True, lambda: asyncio.sleep(0)))


def _later(function: Callable[[], Any]) -> Later:
    """On the loop, as all that concerns others."""

    async def call() -> Any:
        try:
            found = function()
            return await found if isinstance(found, Coroutine) else found
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


def _always(result: object) -> Function:
    """Answers the same to everybody, whatever the question."""
    return lambda *_: result


_HOST: Final = ("given", "code", "cap", "call", "drop", "offer", "serve", "accept", "reply")
_NO_SOCKET: Final = _always(Failed("not-supported"))
OFFERED: Final[Mapping[str, Mapping[str, Function]]] = {
    **files.OFFERED,
    "wetware:python/host": {name: getattr(World, name) for name in _HOST},
    "wasi:cli/environment": {"get-environment": _always([]), "get-arguments": _always([])},
    "wasi:cli/exit": {"exit": World.exit},
    "wasi:cli/stdin": {"get-stdin": lambda world: world.stream("input-stream", "stdin")},
    "wasi:cli/stdout": {"get-stdout": lambda world: world.stream("output-stream", "stdout")},
    "wasi:cli/stderr": {"get-stderr": lambda world: world.stream("output-stream", "stderr")},
    "wasi:cli/terminal-stdin": {"get-terminal-stdin": _always(None)},
    "wasi:cli/terminal-stdout": {"get-terminal-stdout": _always(None)},
    "wasi:cli/terminal-stderr": {"get-terminal-stderr": _always(None)},
    "wasi:clocks/monotonic-clock": {
        "now": lambda world: time.monotonic_ns(),
        "resolution": _always(1),
        "subscribe-instant": World.at_instant,
        "subscribe-duration": World.after_duration,
    },
    "wasi:clocks/wall-clock": {
        "now": lambda world: files.datetime(time.time_ns()),
        "resolution": _always(files.datetime(1)),
    },
    "wasi:io/poll": {"[method]pollable.block": World.block, "poll": World.poll},
    "wasi:io/streams": {
        "[method]input-stream.read": World.read,
        "[method]input-stream.subscribe": World.readable,
        "[method]output-stream.check-write": _always(WRITE_BYTES),
        "[method]output-stream.write": World.write,
        "[method]output-stream.blocking-write-and-flush": World.write,
        "[method]output-stream.blocking-flush": _always(None),
        "[method]output-stream.subscribe": World.writable,
    },
    "wasi:random/random": {"get-random-bytes": World.random_bytes},
    "wasi:sockets/instance-network": {"instance-network": lambda world: Own("network", None)},
    "wasi:sockets/ip-name-lookup": {"resolve-addresses": _NO_SOCKET},
    "wasi:sockets/tcp-create-socket": {"create-tcp-socket": _NO_SOCKET},
    "wasi:sockets/udp-create-socket": {"create-udp-socket": _NO_SOCKET},
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
