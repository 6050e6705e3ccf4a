"""Processes as a client holds them: by a capability, with streams, or by an ID."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from wetware import rpc
from wetware.base.structs import from_struct
from wetware.errors import Disconnected, InternalError, LimitExceeded, WetwareError
from wetware_proc.schema import SCHEMA
from wetware_proc.served import Served, installed

OUTPUT_BYTES_MAX: Final = 64 << 20
"""That `run` collects, of each stream."""
_WAIT_S: Final = 20.0
_ANSWER_S: Final = 50.0  # for what waits so long


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended.

    Attributes:
        kind: "exited", by itself; "trapped"; "limit"; "killed"; "lost", with its node. "" where it
            runs.
        code: Of one that exited.
        why: For people.
    """

    kind: str
    code: int
    why: str


@dataclass(frozen=True, slots=True)
class Mounted:
    """A directory of a process: where, and the SHA-256 of its archive, in hex."""

    path: str
    hash: str


@dataclass(frozen=True, slots=True)
class Info:
    """A process, as the struct Info of proc.capnp has it."""

    id: str
    name: str
    owner: str
    hash: str
    started_ms: int
    memory_bytes: int
    cpu_ms: int
    exit: Exit
    kind: str
    code: str
    policy: str
    restarts: int
    waits: bool
    dirs: tuple[Mounted, ...]


@dataclass(frozen=True, slots=True)
class Ran:
    """A process that has ended, and all that it wrote."""

    exit: Exit
    stdout: bytes
    stderr: bytes


class Running:
    """A process by its capability.

    Attributes:
        ref: The capability, to pass on; who holds it alone does not keep it running.
    """

    def __init__(self, ref: rpc.Ref) -> None:
        self.ref = ref

    async def _call(self, method: str, **params: Any) -> Any:
        return await self.ref.call(method, **params)

    async def wait(self) -> Exit:
        """How it ended; its output is on its streams then, up to its end."""
        while True:
            with rpc.time_limit(_ANSWER_S):
                exit_ = from_struct(Exit, (await self._call("wait", wait_s=_WAIT_S))["exit"])
            if exit_.kind:
                return exit_

    async def kill(self) -> None:
        """End it for good; nothing more of it can happen when this returns. Idempotent."""
        await self._call("kill")

    async def signal(self, name: str) -> None:
        """Send a native program a signal: HUP, INT, QUIT, USR1, USR2, TERM, KILL, STOP or CONT.

        Of other kinds of programs TERM and KILL end it, and the rest raises Unsupported
        "unsupported.signal". Raises NotFound "not_found.running" where a detached one is between
        two runs.
        """
        await self._call("signal", name=name)

    async def info(self) -> Info:
        """What `ww ps` shows of it."""
        return from_struct(Info, (await self._call("info"))["info"])

    async def export(self, name: str, wait_s: float = _WAIT_S) -> rpc.Ref:
        """What the program offers by this name: a port, what it serves, or what it has got.

        Waits for it. Raises NotFound "not_found.export".
        """
        with rpc.time_limit(_ANSWER_S):
            reply = await self._call("export", name=name, wait_s=wait_s)
        for typed in ("port", "served"):
            if reply[typed] is not None:
                found: rpc.Ref = reply[typed]
                return found
        ref: rpc.Ref = needed(reply["cap"])
        return ref.cast(installed(reply["interface"], repr(name)))

    async def served(self, name: str, wait_s: float = _WAIT_S) -> Served:
        """What the program serves itself by this name; see `export`."""
        return Served((await self.export(name, wait_s)).cast(SCHEMA.Served))


class Process(Running):
    """A process that runs. It is killed when the block ends in which it was spawned.

    Attributes:
        stdin: What it reads; `send_eof` is its end.
        stdout: What it writes.
        stderr: The same.
    """

    stdin: rpc.ByteStream
    stdout: rpc.ByteStream
    stderr: rpc.ByteStream

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(needed(reply["process"]))
        self._exit = from_struct(Exit, reply["exit"])
        self.stdin = _stream(reply["stdin"])
        self.stdout = _stream(reply["stdout"], reply["output"])
        self.stderr = _stream(reply["stderr"], reply["errors"])

    async def wait(self) -> Exit:
        return self._exit if self._exit.kind else await super().wait()


def _stream(ref: rpc.Ref | None, came: bytes | None = None) -> rpc.ByteStream:
    """The stream, or where there is none, one with what came with the answer, or that is over."""
    if ref is not None:
        return rpc.ByteStream(ref)
    stream = rpc.ByteStream()
    if came is None:
        stream.abort(Disconnected("the process takes no more input"))
        return stream
    if came:
        stream.fed(memoryview(came))
    stream.fed(memoryview(b""))  # the end
    return stream


class Detached(Running):
    """A program that outlives who started it, by its ID; nothing of it is held here.

    Where the session logs in again after a loss (`connect(reconnect=True)`), `wait` and `logs` go
    on.

    Attributes:
        id: As `ww ps` shows it.
        proc: Through what it was started, or found.
    """

    def __init__(self, proc: Any, id_: str) -> None:
        self.proc, self.id = proc, id_

    async def _call(self, method: str, **params: Any) -> Any:
        ref = self.proc._ref
        while True:
            connection = getattr(ref, "session", ref).connection
            try:
                process = needed((await ref.call("open", id=self.id))["process"])
                return await process.call(method, **params)
            except Disconnected as lost:
                if method not in ("wait", "logs"):  # others are not repeated
                    raise
                await rpc.regained(connection, lost)

    async def restart(self) -> None:
        """Have it started again now. Raises InvalidArgument where it has ended for good."""
        await self._call("restart")

    async def logs(
        self, *, follow: bool = False, missed: Callable[[int], object] | None = None
    ) -> AsyncIterator[bytes]:
        """What it wrote, as far as it is kept: the last 1 MiB; with `follow` until it is over.

        Where the session logs in again it goes on behind what has come. `missed` is called with how
        many bytes are not kept any more of what comes next: who follows was slow, or away.
        """
        at, wait_s = 0, _WAIT_S if follow else 0.0
        while True:
            with rpc.time_limit(_ANSWER_S):
                reply = await self._call("logs", start=at, wait_s=wait_s)
            if data := reply["data"]:
                if missed is not None and 0 < at < reply["start"]:
                    missed(reply["start"] - at)
                yield data
                at = reply["start"] + len(data)
            elif reply["over"] or not follow:
                return


@contextlib.asynccontextmanager
async def fed(process: Process, stdin: bytes) -> AsyncIterator[None]:
    """In the block a process is given all of its input, of which it need not read all."""

    async def feed() -> None:
        with contextlib.suppress(WetwareError):
            await process.stdin.send(stdin)
            await process.stdin.send_eof()

    feeding = asyncio.ensure_future(feed())
    try:
        yield
    finally:
        feeding.cancel()


async def taken(stream: rpc.ByteStream, bytes_max: int, limit: str, hint: str) -> bytes:
    """All that comes. Raises LimitExceeded for more than `bytes_max`, of the name `limit`."""
    data = bytearray()
    async for piece in stream:
        data += piece
        if len(data) > bytes_max:
            raise LimitExceeded(f"more than {bytes_max} bytes of output ({limit})", hint=hint)
    return bytes(data)


async def collected(process: Process, stdin: bytes = b"") -> Ran:
    """Give it all of its input, and take all of its output."""
    streams = (process.stdout, process.stderr)
    limit = OUTPUT_BYTES_MAX, "OUTPUT_BYTES_MAX", "spawn it, and read its output as it comes"
    async with fed(process, stdin):
        takes = (taken(stream, *limit) for stream in streams)
        stdout, stderr = await asyncio.gather(*takes)
        return Ran(await process.wait(), stdout, stderr)


def needed(ref: Any) -> Any:
    """A reference that an answer has to have."""
    if ref is None:
        raise InternalError("the node answered without a capability")
    return ref
