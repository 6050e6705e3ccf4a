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

made = await session.proc.start(Path("tick.wasm"), restart="always")  # it outlives the session
async for data in made.logs(follow=True):
    ...

await session.proc.call(function, 1, 2)  # of Python, which runs there
async for result in session.proc.map(function, range(1000), on="any"):
    ...
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, TypedDict, TypeVar, Unpack

from wetware import rpc
from wetware.base.structs import from_struct
from wetware.errors import InvalidArgument, OverlayError, Unsupported
from wetware_proc.functions import packed_arguments
from wetware_proc.placement import (
    Heard,
    Lost,
    Room,
    Session,
    everywhere,
    granted,
    named,
    nodes,
    placed,
    where,
)
from wetware_proc.running import (
    Detached,
    Exit,
    Info,
    Mounted,
    Process,
    Ran,
    Running,
    collected,
    needed,
)
from wetware_proc.schema import SCHEMA
from wetware_proc.sending import Archive, Dir, Sending, Source, archived
from wetware_proc.sources import file_bytes
from wetware_proc.spread import Spread, prepared, returned

__all__ = [
    "Detached",
    "Executor",
    "Exit",
    "Image",
    "Info",
    "Mounted",
    "Options",
    "Process",
    "Programs",
    "Ran",
    "Running",
    "Sending",
]

FUNCTIONS_MAX: Final = 16
"""Functions that a session keeps loaded at its node."""
SENT_MAX: Final = 1000
"""Processes that were sent to nodes, and are remembered to choose the next one."""
INPUT_BYTES_MAX: Final = 256 << 10
"""That travel with a program; more goes on a stream."""
_QUICK_S: Final = 0.5  # how long the output of a program that has all its input may wait
_LOAD_S: Final = 600.0  # a node's first Python program waits for the runner
KINDS: Final = {".py": "python", ".pyz": "python"}
"""Of programs, by the suffix of a file; others are of WebAssembly."""
_SEND_S: Final = 700.0  # of directories: more than the node allows

T = TypeVar("T")

Code = bytes | str | os.PathLike[str] | rpc.Ref
"""A program: its bytes, a path, a CID (a text that names no file here), or a `Ww.Source`.

A CID is read with the user's own session at the node that runs it, so nobody runs what they may not
read. A bare reference is of the session that it came from, and runs at that session's node.
"""


class Options(TypedDict, total=False):
    """How a program is to run.

    Attributes:
        dirs: What it may read, by the absolute path where it finds it: directories of this machine,
            or CIDs, which are read with the user's own session.
        progress: Is called with `sending.Sending` as they are sent.
        env: Its environment; nothing of the caller's is in it.
        grants: What it can call, by the names that it asks for. A text, "pubsub:chat" or "pubsub",
            with constraints "pubsub:chat?data=max:1024&topic=chat", is opened at the node that runs
            it, by a login of the user's own there. What is not detached can have references as
            well, or objects that have one as `ref`, such as a topic: they are called where they
            are from, through this session where the program runs elsewhere.
        name: What it is called; by default as its file.
        kind: "wasm", "python"; by default what its file's name says.
        memory_bytes: It may have; 0: what is usual, like below.
        wall_s: It may run.
        cpu_s: Of a processor that it may use.
        ports: TCP ports that it listens at, by name, for `Process.export`; of a native program.
    """

    dirs: Mapping[str, Dir]
    progress: Callable[[Sending], object]
    env: Mapping[str, str]
    grants: Mapping[str, Any]
    name: str
    kind: str
    memory_bytes: int
    wall_s: float
    cpu_s: float
    ports: Mapping[str, int]


class Image:
    """A program that was loaded, to be spawned any number of times.

    Attributes:
        hash: SHA-256 of its bytes, in hex.
    """

    def __init__(
        self, programs: Programs, ref: rpc.Ref, hash_: str, name: str, code: str = "", *words: str
    ) -> None:
        self._programs, self._ref, self.hash = programs, ref, hash_
        self._name, self._code, self._words = name, code, words

    def spawn(self, *args: str, **options: Unpack[Options]) -> AbstractAsyncContextManager[Process]:
        """Run it; see Programs.spawn."""
        return self.fed(None, *args, **options)

    @contextlib.asynccontextmanager
    async def fed(
        self, stdin: bytes | None, *args: str, **options: Unpack[Options]
    ) -> AsyncIterator[Process]:
        """As `spawn`, for who gives it all of its input: where that is short in one message.

        Write `stdin` to the process all the same, for where it is not.
        """
        read = {"input": stdin, "more": False, "wait_s": _QUICK_S}
        if stdin is None or len(stdin) > INPUT_BYTES_MAX:
            read = {"input": b"", "more": True, "wait_s": 0.0}
        async with granted(self._programs, options.get("grants", {})) as options["grants"]:
            async with self._programs.archives(options) as archives:
                name = options.get("name") or self._name
                words = *self._words, *args
                spec = spec_of(name, words, options, self._code, archives)
                with rpc.time_limit(_SEND_S) if archives else contextlib.nullcontext():
                    try:
                        process = Process(await self._ref.call("spawn", spec=spec, **read))
                    except OverlayError as exc:
                        if read["more"]:
                            raise
                        raise Lost(exc.message, hint=exc.hint) from exc
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


class Programs:
    """Starts programs, of the kinds of one service: see Executor, and `native.client.Native`.

    Args:
        ref: A reference to the service.
    """

    SERVICE: str

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    @property
    def session(self) -> Session:
        """Raises Unsupported for a capability that came without one."""
        session: Session | None = getattr(self._ref, "session", None)
        if session is None:
            raise Unsupported(
                "a capability alone leads to no other node", hint="use the session's: session.proc"
            )
        return session

    # --- what the services differ in ---

    async def load(self, code: Any, kind: str = "") -> Image:
        raise NotImplementedError

    async def _detach(self, code: Any, kind: str, spec: dict[str, Any], **params: Any) -> Any:
        raise NotImplementedError

    async def _taken(self, code: Any, options: Options) -> Any:
        """The program, read if it is a file; its name and kind are in the options then."""
        return code

    def _known(self, code: Any) -> list[str]:
        """What members that have prepared it call it."""
        return []

    # --- what they have in common ---

    @contextlib.asynccontextmanager
    async def archives(self, options: Options) -> AsyncIterator[dict[str, Archive]]:
        """The `dirs` of Options, each packed once, on disk, below TMPDIR or /var/tmp.

        Raises InvalidArgument for what cannot be read, or would not be unpacked, see
        `archive.pack`; LimitExceeded; what reading a blob does.
        """
        told = options.get("progress")
        with contextlib.ExitStack() as stack:
            yield {
                path: each
                if isinstance(each, Archive)
                else await archived(stack, each, told, lambda: self.session.blob)
                for path, each in options.get("dirs", {}).items()
            }

    def spawn(
        self, code: Any, *args: str, on: str = "", **options: Unpack[Options]
    ) -> AbstractAsyncContextManager[Process]:
        """Run a program: `async with session.proc.spawn(...) as process`.

        Args:
            code: See Code; of `session.native` a program as it is found there, in /usr/bin for
                example.
            args: Its arguments.
            on: A selector of the members that it may run at, "zone=home"; "any": all of them; "":
                the session's node. Of several it is the one that has most room, see
                `placement.nodes`, where one logs in with the session's key.
            options: See Options.

        Raises WetwareError "proc.code", LimitExceeded; NotFound "not_found.room"; Unsupported
        "unsupported.limit" for one that the node cannot enforce.
        """
        return self._spawned(None, code, args, on, options)

    @contextlib.asynccontextmanager
    async def _spawned(
        self, stdin: bytes | None, code: Any, args: tuple[str, ...], on: str, options: Options
    ) -> AsyncIterator[Process]:
        """See `spawn` and `Image.fed`."""
        code = await self._taken(code, options)
        async with contextlib.AsyncExitStack() as stack:
            if on:

                async def run(there: Session, stack: contextlib.AsyncExitStack) -> Process:
                    spawned = self._at(there)._spawned(stdin, code, args, "", options)
                    return await stack.enter_async_context(spawned)

                yield await stack.enter_async_context(self._placed(on, code, options, run))
                return
            image = await self.load(code, options.get("kind", ""))
            stack.callback(image.close)
            yield await stack.enter_async_context(image.fed(stdin, *args, **options))

    def _at(self, session: Any) -> Programs:
        programs: Programs = getattr(session, self.SERVICE)
        return programs

    @contextlib.asynccontextmanager
    async def _placed(
        self,
        on: str,
        code: Any,
        options: Options,
        run: Callable[[Session, contextlib.AsyncExitStack], Awaitable[T]],
    ) -> AsyncIterator[T]:
        """See `placement.placed`."""
        rooms = await nodes(
            self.session,
            on,
            service=self.SERVICE,
            programs=self._known(code),
            memory_bytes=options.get("memory_bytes", 0),
        )
        async with self.archives(options) as archives:  # once, for whoever takes it
            options["dirs"] = archives
            async with placed(self.session, on, rooms, run) as made:
                yield made

    async def run(
        self, code: Any, *args: str, stdin: bytes = b"", on: str = "", **options: Unpack[Options]
    ) -> Ran:
        """Run a program to its end; see `spawn`.

        Raises LimitExceeded for more than OUTPUT_BYTES_MAX of output.
        """
        async with self._spawned(stdin, code, args, on, options) as process:
            return await collected(process, stdin)

    async def start(
        self,
        code: Any,
        *args: str,
        restart: str = "never",
        on: str = "",
        **options: Unpack[Options],
    ) -> Detached:
        """Start a program that goes on when the session ends, and when its node is started again.

        Args:
            code: As `spawn` takes it, like below.
            args: Its arguments.
            restart: When it is started again: "never", "on-failure" (unless it exited with 0),
                "always"; with pauses that grow, and not for ever where it ends at once each time.
            on: Of which members one is chosen; it stays at that one.
            options: See Options; grants are texts. Time is not limited where no limit is given.

        Raises WetwareError "proc.code"; InvalidArgument "invalid.live_grant" for a reference.
        """
        code = await self._taken(code, options)
        if on:

            async def run(there: Session, stack: contextlib.AsyncExitStack) -> Detached:
                made = await self._at(there).start(code, *args, restart=restart, **options)
                return Detached(self, made.id, there.identity.node)

            async with self._placed(on, code, options, run) as made:
                return made
        kind, session = options.get("kind", ""), self.session.ref
        async with self.archives(options) as archives:
            spec = spec_of(options.get("name", ""), args, options, "", archives)
            with rpc.time_limit(_SEND_S if archives else _LOAD_S):
                reply = await self._detach(code, kind, spec, policy=restart, session=session)
        return Detached(self, reply["id"])

    def detached(self, id_: str) -> Detached:
        """One of one's own that was started at the session's node, by its ID."""
        return Detached(self, id_)


class Executor(Programs):
    """The service `proc` of a session.

    Args:
        ref: A reference to an Executor.

    Attributes:
        sent: Nodes that processes were sent to lately, and when, see `placement.nodes`.
    """

    INTERFACE = SCHEMA.Executor
    SERVICE = "proc"

    def __init__(self, ref: Any) -> None:
        super().__init__(ref)
        self.sent: deque[tuple[str, float]] = deque(maxlen=SENT_MAX)
        self._functions: OrderedDict[bytes, Image] = OrderedDict()

    async def load(self, code: Code, kind: str = "") -> Image:
        """A program of a kind, by default that of its file, ready to be spawned.

        Raises WetwareError "proc.code" for what is none, "unsupported.driver" where its kind does
        not run.
        """
        options: Options = {"kind": kind}
        code = await self._taken(code, options)
        async with self._source(code) as (source, cid):
            with rpc.time_limit(_LOAD_S):
                reply = await self._ref.call("load", code=source, kind=options["kind"])
        name = options.get("name", "")
        return Image(self, needed(reply["image"]), reply["hash"], name, cid)

    async def _taken(self, code: Code, options: Options) -> bytes | str | rpc.Ref:
        if not isinstance(code, str | os.PathLike) or (
            isinstance(code, str) and not Path(code).exists()  # noqa: ASYNC240  # takes no time
        ):
            return code
        path = Path(code)
        options["name"] = options.get("name") or path.name
        options["kind"] = options.get("kind") or KINDS.get(path.suffix, "")
        return await file_bytes(path)

    def _known(self, code: Any) -> list[str]:
        if isinstance(code, rpc.Ref):
            raise InvalidArgument(
                "a reference to a program is read by the node that it came from alone",
                hint="give its bytes, a path or a blob, or spawn it with session.node(…).proc",
            )
        return [code if isinstance(code, str) else hashlib.sha256(code).hexdigest()]

    @contextlib.asynccontextmanager
    async def _source(self, code: Any) -> AsyncIterator[tuple[rpc.Ref | rpc.Servant, str]]:
        """What a node reads it from, and its CID, if it has one."""
        if isinstance(code, bytes):
            yield Source(len(code), lambda count, at: code[at : at + count]), ""
        elif isinstance(code, rpc.Ref):
            yield code, ""
        else:
            try:
                async with self.session.blob.open(code) as blob:
                    yield blob.ref, blob.cid
            except InvalidArgument as exc:
                if exc.code != "invalid.cid":
                    raise
                raise InvalidArgument(
                    f"there is no file {code!r}, and no CID is written like that",
                    hint="ww run hello.wasm, or ww run CID of what `ww blob put` has put",
                ) from exc

    async def _detach(self, code: Any, kind: str, spec: dict[str, Any], **params: Any) -> Any:
        async with self._source(code) as (source, spec["code"]):
            return await self._ref.call("detach", code=source, kind=kind, spec=spec, **params)

    def find(self, id_: str, *, anybody: bool = False) -> AbstractAsyncContextManager[Detached]:
        """A process anywhere in the cluster: `async with session.proc.find(ID) as process`.

        It is used by a login at its node, which ends with the block. See `placement.where`.
        """
        return where(self.session, id_, anybody=anybody)

    async def call(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        packages: Sequence[Any] = (),
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

        Returns what the function returned, like `args`; a capability is a reference, which works
        as long as it is held. With `on` there can be none: "unsupported".
        Raises FunctionFailed with its traceback where it raised, CallEnded where it ran into a
        limit or was ended, and what `spawn` raises.
        """
        job = await prepared(function, packages)
        options.setdefault("name", job.name)
        data, refs = packed_arguments(args)
        given: Options = {**options, "kind": "python"}
        given["grants"] = {**options.get("grants", {}), **refs}
        if on:
            async with self._spawned(data, job.program, (), on, given) as process:
                return await returned(process, data)
        image = await self._loaded(job.program)
        async with image.fed(data, **given) as process:
            return await returned(process, data, lasts=True)

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
        packages: Sequence[Any] = (),
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
            concurrency: Calls at a time; 0: as many as the members have processors, without `on` 1.
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
    what, where = named(text)
    return {"name": name, "what": what, "where": where}


def _grant(name: str, value: Any) -> dict[str, Any]:
    ref = getattr(value, "ref", value)
    if not isinstance(ref, rpc.Ref) or ref.interface is None:
        raise InvalidArgument(f"the grant {name!r} is no capability of a known interface")
    return {"name": name, "ref": ref, "interface": ref.interface.id}
