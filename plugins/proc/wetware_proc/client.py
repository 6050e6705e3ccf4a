"""`session.proc`: programs that run at the session's node, with nothing but what they are given.

ran = await session.proc.run(Path("hello.wasm"), "you")
print(ran.exit.code, ran.stdout)

async with session.proc.spawn(Path("cat.wasm")) as process:
    await process.stdin.send(b"hello")
    await process.stdin.send_eof()
    async for data in process.stdout:
        ...
    print(await process.wait())

await session.proc.run(Path("hello.wasm"), on="zone=home")  # where there is room, of these members

await session.proc.call(function, 1, 2)  # of Python, which runs there
async for result in session.proc.map(function, range(1000), on="any"):
    ...
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, Protocol, TypedDict, TypeVar, Unpack

from wetware import rpc
from wetware.base.structs import from_struct
from wetware.base.tasks import Tasks
from wetware.errors import (
    InternalError,
    InvalidArgument,
    LimitExceeded,
    Unsupported,
    WetwareError,
)
from wetware_proc.functions import packed_arguments
from wetware_proc.placement import Heard, Room, Session, everywhere, nodes, placed
from wetware_proc.schema import SCHEMA
from wetware_proc.sources import file_bytes
from wetware_proc.spread import Spread, prepared, returned

OUTPUT_BYTES_MAX: Final = 64 << 20
"""That `run` collects."""
FUNCTIONS_MAX: Final = 16
"""Functions that a session keeps loaded at its node."""
SENT_MAX: Final = 1000
"""Processes that were sent to nodes, and are remembered to choose the next one."""
STDIN_BYTES_MAX: Final = 256 << 10
"""That travel with a program; more goes on a stream."""
_QUICK_S: Final = 0.5  # how long the output of a program that has all its input may wait
_WAIT_S: Final = 20.0
_ANSWER_S: Final = 50.0  # for what waits so long
_LOAD_S: Final = 600.0  # a node's first Python program waits for the runner
KINDS: Final = {".py": "python", ".pyz": "python"}
"""Of programs, by the suffix of a file; others are of WebAssembly."""
SEND_S: Final = 700.0  # of directories: more than the node allows
_PIECE_BYTES: Final = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sending:
    """How far a directory is that is sent, in bytes."""

    bytes: int
    total: int
    doing: str = ""


@dataclass(frozen=True, slots=True)
class Archive:
    """A directory that is ready to be sent: see `Executor.archive`.

    Attributes:
        file: A file without a name.
        size: Of the archive, bytes.
        hash: SHA-256 of it, in hex.
        told: Is called with Sending as it is sent.
    """

    file: IO[bytes]
    size: int
    hash: str
    told: Callable[[Sending], object] | None = None

    def source(self) -> rpc.Servant:
        """For the node to read."""
        return _Source(self.size, partial(os.pread, self.file.fileno()), self.told)


class Blob(Protocol):
    """What `session.blob.open(CID)` gives."""

    cid: str
    ref: rpc.Ref


Dir = str | os.PathLike[str] | Blob | Archive
"""A directory of this machine, or a blob, which is read with the user's own session."""
Code = bytes | str | os.PathLike[str] | rpc.Ref | Blob
"""A program: its bytes, a path, a capability that is a `Ww.Source`, or a blob.

A blob is read with the user's own session at the node that runs it, so nobody runs what they may
not read. A bare reference is of the session that it came from, and runs at that session's node.
"""

Package = bytes | str | os.PathLike[str] | rpc.Ref | Blob
"""A wheel, in the same forms."""


class Options(TypedDict, total=False):
    """How a program is to run.

    Attributes:
        dirs: What it may read, by the absolute path where it finds it; see Dir.
        env: Its environment; nothing of the caller's is in it.
        grants: What it can call, by the names that it asks for: references, or objects that have
            one as `ref`, such as a topic; of a detached program what they are of, as a text.
        name: What it is called; by default as its file.
        kind: "wasm", "python"; by default what its file's name says.
        memory_bytes: It may have; 0: what is usual, like below.
        wall_s: It may run.
        cpu_s: Of a processor that it may use.
        ports: TCP ports that it listens at, by name, for `Process.export`; of a native program.
    """

    dirs: Mapping[str, Dir]
    env: Mapping[str, str]
    grants: Mapping[str, Any]
    name: str
    kind: str
    memory_bytes: int
    wall_s: float
    cpu_s: float
    ports: Mapping[str, int]


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

    async def wait(self) -> Exit:
        """How it ended; its output is on its streams then, up to its end."""
        return await _ended(self.ref.call)

    async def kill(self) -> None:
        """End it; nothing more of it can happen when this returns. Idempotent."""
        await self.ref.call("kill")

    async def signal(self, name: str) -> None:
        """Send a native program a signal: HUP, INT, QUIT, USR1, USR2, TERM, KILL, STOP or CONT.

        Raises Unsupported "unsupported.signal" for other kinds of programs: those `kill` ends.
        """
        await self.ref.call("signal", name=name)

    async def info(self) -> Info:
        return from_struct(Info, (await self.ref.call("info"))["info"])

    async def export(self, name: str, wait_s: float = _WAIT_S) -> rpc.Ref:
        """What the program offers by this name: a port, or what it has exported.

        Waits for it. Raises NotFound "not_found.export".
        """
        from wetware.client.installed import interface_of_id

        with rpc.time_limit(_ANSWER_S):
            reply = await self.ref.call("export", name=name, wait_s=wait_s)
        if (port := reply["port"]) is not None:
            given: rpc.Ref = port
            return given
        if (interface := interface_of_id(reply["interface"])) is None:
            raise Unsupported(f"the interface of {name!r} is not known here")
        ref: rpc.Ref = _given(reply["cap"])
        return ref.cast(interface)


class Process(Running):
    """A process that runs. It is killed when the block ends in which it was spawned.

    Attributes:
        stdin: What it reads; `send_eof` is its end.
        stdout: What it writes.
        stderr: The same.
    """

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(_given(reply["process"]))
        self.stdin, self.stdout, self.stderr = (
            rpc.ByteStream(_given(reply[name])) for name in ("stdin", "stdout", "stderr")
        )


class _Came:
    """In place of a stream: what came with the answer, or was sent with the question."""

    def __init__(self, data: bytes = b"") -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._data:
            yield self._data

    async def send(self, data: bytes) -> None: ...

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


class _Fed(Process):
    """A process that was given all of its input at once, and may have ended already."""

    stdin: Any
    stdout: Any
    stderr: Any

    def __init__(self, reply: Mapping[str, Any]) -> None:
        Running.__init__(self, _given(reply["process"]))
        self._exit, self.stdin = from_struct(Exit, reply["exit"]), _Came()
        if self._exit.kind:
            self.stdout, self.stderr = _Came(reply["output"]), _Came(reply["errors"])
        else:
            self.stdout, self.stderr = (
                rpc.ByteStream(_given(reply[name])) for name in ("stdout", "stderr")
            )

    async def wait(self) -> Exit:
        return self._exit if self._exit.kind else await super().wait()


class Detached:
    """A program that outlives who started it, by its ID at its node; nothing of it is held here.

    Attributes:
        id: As `ww ps` shows it.
    """

    def __init__(self, executor: Any, id_: str) -> None:
        self._executor, self.id = executor, id_

    async def _call(self, method: str, **params: Any) -> Any:
        process = _given((await self._executor.call("open", id=self.id))["process"])
        return await process.call(method, **params)

    async def wait(self) -> Exit:
        """How it ended for good: it is not started again."""
        return await _ended(self._call)

    async def kill(self) -> None:
        """End it for good; nothing more of it can happen when this returns. Idempotent."""
        await self._call("kill")

    async def signal(self, name: str) -> None:
        """See `Running.signal`; NotFound "not_found.running" where it is between two runs."""
        await self._call("signal", name=name)

    async def restart(self) -> None:
        """Have it started again now. Raises InvalidArgument where it has ended for good."""
        await self._call("restart")

    async def info(self) -> Info:
        """What `ww ps` shows of it."""
        return from_struct(Info, (await self._call("info"))["info"])

    async def logs(self, *, follow: bool = False) -> AsyncIterator[bytes]:
        """What it wrote, as far as it is kept: the last 1 MiB; with `follow` until it is over.

        Who follows and is slower than it misses what is not kept any more.
        """
        start, wait_s = 0, _WAIT_S if follow else 0.0
        while True:
            with rpc.time_limit(_ANSWER_S):
                reply = await self._call("logs", start=start, wait_s=wait_s)
            if data := reply["data"]:
                yield data
                start = reply["start"] + len(data)
            elif reply["over"] or not follow:
                return


class Image:
    """A program that was loaded, to be spawned any number of times.

    Attributes:
        hash: SHA-256 of its bytes, in hex.
    """

    def __init__(
        self, executor: Executor, ref: rpc.Ref, hash_: str, name: str, code: str = ""
    ) -> None:
        self._executor, self._ref, self.hash = executor, ref, hash_
        self._name, self._code = name, code

    @contextlib.asynccontextmanager
    async def spawn(self, *args: str, **options: Unpack[Options]) -> AsyncIterator[Process]:
        """Run it; see Executor.spawn."""
        async with self._begun(Process, "spawn", args, options) as process:
            yield process

    def fed(
        self, stdin: bytes, *args: str, **options: Unpack[Options]
    ) -> AbstractAsyncContextManager[Process]:
        """As `spawn`, for who gives it all of its input: where that is short in one message.

        Write `stdin` to the process all the same, for where it is not.
        """
        if len(stdin) > STDIN_BYTES_MAX:
            return self.spawn(*args, **options)
        return self._begun(_Fed, "run", args, options, stdin=stdin, wait_s=_QUICK_S)

    @contextlib.asynccontextmanager
    async def _begun(
        self,
        kind: type[Process],
        method: str,
        args: tuple[str, ...],
        options: Options,
        **params: object,
    ) -> AsyncIterator[Process]:
        async with self._executor.archives(options) as archives:
            spec = spec_of(options.get("name") or self._name, args, options, self._code, archives)
            with rpc.time_limit(SEND_S) if archives else contextlib.nullcontext():
                process = kind(await self._ref.call(method, spec=spec, **params))
        try:
            yield process
        finally:
            process.ref.close()
            for stream in (process.stdin, process.stdout, process.stderr):
                await stream.aclose()

    @property
    def closed(self) -> bool:
        """Whether it was let go of, or its connection is lost."""
        return self._ref.closed

    def close(self) -> None:
        """Let go of it. Idempotent."""
        self._ref.close()


class Executor:
    """The service `proc` of a session.

    Args:
        ref: A reference to an Executor.

    Attributes:
        sent: Nodes that processes were sent to lately, and when, see `placement.nodes`.
    """

    INTERFACE = SCHEMA.Executor

    def __init__(self, ref: Any) -> None:
        self._ref = ref
        self.sent: deque[tuple[str, float]] = deque(maxlen=SENT_MAX)
        self._functions: OrderedDict[bytes, Image] = OrderedDict()

    @property
    def session(self) -> Session:
        session: Session | None = getattr(self._ref, "session", None)
        if session is None:
            raise Unsupported(
                "a capability alone leads to no other node", hint="use the session's: session.proc"
            )
        return session

    async def load(self, code: Code, kind: str = "") -> Image:
        """A program of a kind, by default that of its file, ready to be spawned.

        Raises WetwareError "proc.code" for what is none, "unsupported.driver" where its kind does
        not run.
        """
        given, cid = await _given_code(code)
        kind = kind or _kind(code)
        with rpc.time_limit(_LOAD_S):
            reply = await self._ref.call("load", code=given, kind=kind)
        return Image(self, _given(reply["image"]), reply["hash"], _name(code), cid)

    @contextlib.asynccontextmanager
    async def archive(
        self, directory: Dir, told: Callable[[Sending], object] | None = None
    ) -> AsyncIterator[Archive]:
        """A directory that is packed once, to be given to any number of processes in the block.

        It is packed on disk, below TMPDIR or /var/tmp. Raises InvalidArgument for what cannot be
        read, or would not be unpacked, see `archive.pack`; LimitExceeded; what reading a blob does.
        """
        if isinstance(directory, Archive):
            yield directory
            return
        from wetware_proc.archive import pack

        async with contextlib.AsyncExitStack() as stack:
            above = os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108  # a file without a name
            file = stack.enter_context(tempfile.TemporaryFile(dir=above))  # noqa: SIM115  # it is
            if isinstance(directory, str | os.PathLike):
                path = Path(directory)
            else:
                part = stack.enter_context(tempfile.TemporaryDirectory(prefix="ww-", dir=above))
                path = Path(part) / "content"
                await self.session.blob.get(directory.cid, path, progress=told)
            digest = await _in_thread(_packed, pack, path, file)
            yield Archive(file, file.tell(), digest, told)

    @contextlib.asynccontextmanager
    async def archives(self, options: Options) -> AsyncIterator[dict[str, Archive]]:
        """The `dirs` of Options, each packed once."""
        async with contextlib.AsyncExitStack() as stack:
            yield {
                path: await stack.enter_async_context(self.archive(each))
                for path, each in options.get("dirs", {}).items()
            }

    @contextlib.asynccontextmanager
    async def spawn(
        self, code: Code, *args: str, on: str = "", **options: Unpack[Options]
    ) -> AsyncIterator[Process]:
        """Run a program: `async with session.proc.spawn(...) as process`.

        Args:
            code: See Code.
            args: Its arguments.
            on: A selector of the members that it may run at, "zone=home"; "any": all of them; "":
                the session's node. Of several it is the one that has most room, see
                `placement.nodes`, where one logs in with the session's key.
            options: See Options. Grants are called through this session where it runs elsewhere.

        Raises WetwareError "proc.code", LimitExceeded; NotFound "not_found.room".
        """
        if on:
            async with self._spawn_on(on, code, args, options) as process:
                yield process
            return
        image = await self.load(code, options.get("kind", ""))
        try:
            async with image.spawn(*args, **options) as process:
                yield process
        finally:
            image.close()

    @contextlib.asynccontextmanager
    async def _spawn_on(
        self, on: str, code: Code, args: Sequence[str], options: Options
    ) -> AsyncIterator[Process]:
        if isinstance(code, rpc.Ref):
            raise InvalidArgument(
                "a reference to a program is read by the node that it came from alone",
                hint="give its bytes, a path or a blob, or spawn it with session.node(…).proc",
            )
        session = self.session
        if isinstance(code, bytes | str | os.PathLike):
            if not isinstance(code, bytes):
                options.setdefault("name", Path(code).name)
                options.setdefault("kind", _kind(code))
            code = await _bytes(code)
            program = hashlib.sha256(code).hexdigest()
        else:
            program = code.cid
        memory = options.get("memory_bytes", 0)
        rooms = await nodes(session, on, programs=[program], memory_bytes=memory)

        @contextlib.asynccontextmanager
        async def run(there: Session) -> AsyncIterator[Process]:
            async with contextlib.AsyncExitStack() as stack:
                given: Code = code
                if not isinstance(code, bytes):
                    given = await stack.enter_async_context(there.blob.open(program))
                yield await stack.enter_async_context(there.proc.spawn(given, *args, **options))

        async with self.archives(options) as archives:
            options["dirs"] = archives
            async with placed(session, on, rooms, run) as process:
                yield process

    async def run(
        self, code: Code, *args: str, stdin: bytes = b"", on: str = "", **options: Unpack[Options]
    ) -> Ran:
        """Run a program to its end; see `spawn`.

        Raises LimitExceeded for more than OUTPUT_BYTES_MAX of output.
        """
        if on:
            async with self.spawn(code, *args, on=on, **options) as process:
                return await collected(process, stdin)
        image = await self.load(code, options.get("kind", ""))
        try:
            async with image.fed(stdin, *args, **options) as process:
                return await collected(process, stdin)
        finally:
            image.close()

    async def start(
        self,
        code: Code,
        *args: str,
        restart: str = "never",
        **options: Unpack[Options],
    ) -> Detached:
        """Start a program that goes on when the session ends, and when its node is started again.

        Args:
            code: See Code.
            args: Its arguments.
            restart: When it is started again: "never", "on-failure" (unless it exited with 0),
                "always"; with pauses that grow, and not for ever where it ends at once each time.
            options: See Options; a grant is "SERVICE:OBJECT" or "SERVICE", or that with
                constraints behind a ?, e.g. "pubsub:chat?data=max:1024&topic=chat". Time is not
                limited where no limit is given.

        Raises WetwareError "proc.code"; InvalidArgument "invalid.live_grant" for a reference.
        """
        given, cid = await _given_code(code)
        async with self.archives(options) as archives:
            spec = spec_of(options.get("name") or _name(code), args, options, cid, archives)
            with rpc.time_limit(SEND_S if archives else _LOAD_S):
                reply = await self._ref.call(
                    "detach",
                    code=given,
                    kind=options.get("kind") or _kind(code),
                    spec=spec,
                    policy=restart,
                    session=self.session.ref,
                )
        return Detached(self._ref, reply["id"])

    def detached(self, id_: str) -> Detached:
        """One of one's own that was started, by its ID."""
        return Detached(self._ref, id_)

    async def call(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        packages: Sequence[Package] = (),
        on: str = "",
        **options: Unpack[Options],
    ) -> Any:
        """What a Python function returns that runs there: `await session.proc.call(f, 1, 2)`.

        It travels as its own source: it imports and defines in itself what it needs. What it
        prints comes on this process's stderr.

        Args:
            function: Defined with `def`; no closure, no coroutine.
            args: None, bool, int, float, str, bytes, lists, dicts with text as keys, and
                capabilities: references, or objects that have one as `ref`.
            packages: Pure-Python wheels that it can import: their bytes, paths, or blobs.
            on: See `spawn`.
            options: See Options. A grant is `ww.grant(NAME)` there.

        Returns what the function returned, plain data like `args`, without capabilities.
        Raises FunctionFailed with its traceback where it raised, CallEnded where it ran into a
        limit or was ended, and what `spawn` raises.
        """
        job = await prepared(function, packages)
        options.setdefault("name", job.name)
        data, refs = packed_arguments(args)
        given: Options = {**options, "kind": "python"}
        given["grants"] = {**options.get("grants", {}), **refs}
        if on:
            async with self.spawn(job.program, on=on, **given) as process:
                return await returned(process, data)
        image = await self._loaded(job.program)
        async with image.fed(data, **given) as process:
            return await returned(process, data)

    async def _loaded(self, program: bytes) -> Image:
        """A function's, loaded once; the last FUNCTIONS_MAX are kept."""
        image = self._functions.get(program)
        if image is None or image.closed:
            image = await self.load(program, "python")
            kept = self._functions.setdefault(program, image)
            if kept.closed:
                self._functions[program] = image
            elif kept is not image:  # another call was faster
                image.close()
                image = kept
        self._functions.move_to_end(program)
        if len(self._functions) > FUNCTIONS_MAX:
            self._functions.popitem(last=False)[1].close()
        return image

    async def map(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        /,
        *,
        concurrency: int = 0,
        retries: int = 2,
        ordered: bool = True,
        packages: Sequence[Package] = (),
        on: str = "",
        **options: Unpack[Options],
    ) -> AsyncIterator[Any]:
        """Call a function for each item; gives the results as they come, each once.

        A call whose node died, or whose process was killed, is made again at another node: the
        function may have run, wholly or in part, before; there `ww.attempt()` says which try it
        is. What the function itself raises ends all, as `call` says.

        Args:
            function: See `call`.
            items: Its argument, each; asked for as there is room for calls.
            concurrency: Calls at a time; 0: as many as the nodes have processors.
            retries: Of one call.
            ordered: Results are in the order of the items, and not in that in which they come.
            packages: See `call`.
            on: Members that take part, see `spawn`; "": the session's node alone.
            options: See `call`.
        """
        job = await prepared(function, packages)
        options.setdefault("name", job.name)
        spread = Spread(self, job, on, options, concurrency=concurrency, retries=retries)
        async with contextlib.aclosing(spread.results(items, ordered=ordered)) as results:
            async for result in results:
                yield result

    async def processes(self, *, all: bool = False) -> list[Info]:
        """One's own that run or have ended lately, the newest first; `all` is for operators."""
        found: dict[str, Info] = {}
        skip = 0
        while True:
            page = await self._ref.call("all" if all else "processes", skip=skip, limit=0)
            found.update({each["id"]: from_struct(Info, each) for each in page["processes"]})
            skip += len(page["processes"])
            if not page["processes"] or skip >= page["matched"]:
                return list(found.values())

    async def everywhere(self, *, all: bool = False) -> Heard[list[Info]]:
        """As `processes`, of every member, where one logs in; see `placement.everywhere`."""
        return await everywhere(self.session, lambda there: there.proc.processes(all=all))

    async def rooms(self, on: str = "", programs: Sequence[str] = ()) -> list[Room]:
        """What the members say of themselves of which the selector `on` holds; "": all of them.

        `programs`, hashes or CIDs, are what `Room.prepared` is about.
        """
        reply = await self._ref.call("rooms", on=on, programs=list(programs))
        return [from_struct(Room, each) for each in reply["rooms"]]

    async def kill(self, id_: str, *, anybody: bool = False) -> None:
        """End one of one's own, or with `anybody`, which is for operators, whoever's it is.

        Raises NotFound "not_found.process".
        """
        await self._ref.call("end_any" if anybody else "end", id=id_)


async def _ended(call: Callable[..., Awaitable[Any]]) -> Exit:
    """How it ended, when it has."""
    while True:
        with rpc.time_limit(_ANSWER_S):
            exit_ = from_struct(Exit, (await call("wait", wait_s=_WAIT_S))["exit"])
        if exit_.kind:
            return exit_


async def collected(process: Process, stdin: bytes = b"") -> Ran:
    """Give it all of its input, and take all of its output."""
    left = OUTPUT_BYTES_MAX

    async def feed() -> None:
        with contextlib.suppress(WetwareError):  # it need not read all
            await process.stdin.send(stdin)
            await process.stdin.send_eof()

    async def take(stream: rpc.ByteStream) -> bytes:
        nonlocal left
        parts = []
        async for data in stream:
            parts.append(data)
            left -= len(data)
            if left < 0:
                raise LimitExceeded(
                    f"more than {OUTPUT_BYTES_MAX} bytes of output (OUTPUT_BYTES_MAX)",
                    hint="spawn it, and read its output as it comes",
                )
        return b"".join(parts)

    feeding = asyncio.ensure_future(feed())
    try:
        stdout, stderr = await asyncio.gather(take(process.stdout), take(process.stderr))
        return Ran(await process.wait(), stdout, stderr)
    finally:
        feeding.cancel()


class _Source(rpc.Servant, interface=rpc.WW.Source):
    """Bytes of ours, for the node to read: `data(count, start)` gives some of them."""

    def __init__(
        self,
        size: int,
        data: Callable[[int, int], bytes],
        told: Callable[[Sending], object] | None = None,
    ) -> None:
        self._size, self._data, self._told = size, data, told
        self._tasks = Tasks()

    async def stat(self) -> dict[str, Any]:
        return {"size": self._size}

    async def read(self, start: int, end: int) -> dict[str, Any]:
        stream = rpc.ByteStream()
        self._tasks.start(self._send(stream, start, min(end, self._size)))
        return {"stream": stream.servant}

    async def _send(self, stream: rpc.ByteStream, start: int, end: int) -> None:
        with contextlib.suppress(WetwareError):  # the node says itself why it wants no more
            for at in range(start, end, _PIECE_BYTES):
                await stream.send(await _in_thread(self._data, min(_PIECE_BYTES, end - at), at))
                if self._told is not None:
                    self._told(Sending(min(at + _PIECE_BYTES, end), self._size))
            await stream.send_eof()
            await stream.aclose()


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


def _packed(pack: Callable[[Path, IO[bytes]], None], path: Path, file: IO[bytes]) -> str:
    """The SHA-256 of the archive that is written, in hex; `file` is at its end then."""
    pack(path, file)
    file.flush()
    size = file.tell()
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]  # it is one
    file.seek(size)
    return digest.hexdigest()


async def _bytes(code: bytes | str | os.PathLike[str]) -> bytes:
    return code if isinstance(code, bytes) else await file_bytes(code)


async def _given_code(code: Code) -> tuple[rpc.Ref | rpc.Servant, str]:
    """What a node reads it from, and its CID, if it has one."""
    if isinstance(code, bytes | str | os.PathLike):
        data = await _bytes(code)
        return _Source(len(data), lambda count, at: data[at : at + count]), ""
    return (code, "") if isinstance(code, rpc.Ref) else (code.ref, code.cid)


def _kind(code: Code) -> str:
    return KINDS.get(Path(_name(code)).suffix, "wasm")


def _name(code: Code) -> str:
    return Path(code).name if isinstance(code, str | os.PathLike) else ""


def spec_of(
    name: str,
    args: tuple[str, ...],
    options: Options,
    code: str,
    dirs: Mapping[str, Archive],
) -> dict[str, Any]:
    """The struct Spec of proc.capnp."""
    grants = options.get("grants", {})
    return {
        "name": name,
        "args": list(args),
        "env": [{"name": n, "value": value} for n, value in options.get("env", {}).items()],
        "limits": {limit: options.get(limit, 0) for limit in ("memory_bytes", "wall_s", "cpu_s")},
        "grants": [_grant(n, value) for n, value in grants.items() if not isinstance(value, str)],
        "ports": [{"name": n, "number": p} for n, p in options.get("ports", {}).items()],
        "code": code,
        "named": [_named(n, value) for n, value in grants.items() if isinstance(value, str)],
        "dirs": [
            {"path": path, "tree": each.source(), "hash": each.hash} for path, each in dirs.items()
        ],
    }


def _named(name: str, text: str) -> dict[str, Any]:
    what, _, where = text.partition("?")
    return {"name": name, "what": what, "where": where.split("&") if where else []}


def _grant(name: str, value: Any) -> dict[str, Any]:
    ref = getattr(value, "ref", value)
    if not isinstance(ref, rpc.Ref) or ref.interface is None:
        raise InvalidArgument(f"the grant {name!r} is no capability of a known interface")
    return {"name": name, "ref": ref, "interface": ref.interface.id}


def _given(ref: Any) -> Any:
    """A reference that an answer has to have."""
    if ref is None:
        raise InternalError("the node answered without a capability")
    return ref
