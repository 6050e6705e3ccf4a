"""`session.proc`: programs that run at the session's node, with nothing but what they are given.

ran = await session.proc.run(Path("hello.wasm"), "you")
print(ran.exit.code, ran.stdout)

async with session.proc.spawn(Path("cat.wasm")) as process:
    await process.stdin.send(b"hello")
    await process.stdin.send_eof()
    async for data in process.stdout:
        ...
    print(await process.wait())

async with session.proc.at("zone=home") as proc:  # where there is room, of these members
    await proc.run(Path("hello.wasm"))

made = await session.proc.start(Path("tick.wasm"), restart="always")  # it outlives the session
async for data in made.logs(follow=True):
    ...

await session.proc.call(function, 1, 2)  # of Python, which runs there
async for result in session.proc.map(function, range(1000), on="any"):
    ...

served = "python3", "-m", "http.server", "8080"  # a program of the node's machine
async with session.proc.spawn(*served, kind="native", ports={"web": 8080}) as web:
    async with forwarded(await web.export("web"), 0) as port:  # of native.client
        ...  # http://127.0.0.1:{port} leads there
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

from wetware import rpc
from wetware.base.structs import from_struct
from wetware.base.texts import NAMED
from wetware.errors import InvalidArgument, Unsupported
from wetware_proc.functions import packed_arguments
from wetware_proc.placement import Heard, Room, everywhere, granted, named, placed, where
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
from wetware_proc.served import Served
from wetware_proc.sources import Dir, Sending, Source, archived, file_bytes
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
    "Ran",
    "Running",
    "Sending",
    "Served",
]

FUNCTIONS_MAX: Final = 16  # functions that a session keeps loaded at its node
SENT_MAX: Final = 1000
"""Processes that were sent to nodes, and are remembered to choose the next one."""
INPUT_BYTES_MAX: Final = 256 << 10  # that travel with a program; more goes on a stream
_QUICK_S: Final = 0.5  # how long the output of a program that has all its input may wait
_AT_ONCE_S: Final = 0.005  # and of another one: most that end by then never read
_LOAD_S: Final = 600.0  # a node's first Python program waits for the runner
NATIVE: Final = "native"
"""The kind of programs of the node's machine, and the service that lets one run them."""
KINDS: Final = {".py": "python", ".pyz": "python"}
"""Of programs, by the suffix of a file; others are of WebAssembly."""
_SEND_S: Final = 700.0  # of directories: more than the node allows

Code = bytes | str | os.PathLike[str] | rpc.Ref
"""A program: its bytes, a path, a CID (a text that names no file here), or a `Ww.Source`.

A text that begins with "name:" is a name, `name:/tools/hello`, whatever files there are here, and
no other text is one. One of the kind "native" is named as it is found at the node, in /usr/bin for
example.

A CID is read with the user's own session at the node that runs it, so nobody runs what they may not
read. A bare reference is of the session that it came from, and runs at that session's node.
"""


class Options(TypedDict, total=False):
    """How a program is to run.

    Attributes:
        dirs: What it may read, by the absolute path where it finds it: directories of this machine,
            or CIDs or names ("name:/site/live"), which are read with the user's own session.
        progress: Is called with `Sending` as they are sent.
        env: Its environment; nothing of the caller's is in it.
        grants: What it can call, by the names that it asks for. A text, "pubsub:chat" or "pubsub",
            with constraints "pubsub:chat?data=max:1024&topic=chat", is opened at the node that runs
            it, by a login of the user's own there. What is not detached can have references as
            well, or objects that have one as `ref`, such as a topic: they are called where they
            are from, through this session where the program runs elsewhere.
        name: What it is called; by default as its file.
        kind: "wasm", "python", or "native"; by default what its file's name says.
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
        self, programs: Executor, ref: rpc.Ref, hash_: str, name: str, code: str = "", *words: str
    ) -> None:
        self._programs, self._ref, self.hash = programs, ref, hash_
        self._name, self._code, self._words = name, code, words

    def spawn(self, *args: str, **options: Unpack[Options]) -> AbstractAsyncContextManager[Process]:
        """Run it; see Executor.spawn."""
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
            read = {"input": b"", "more": True, "wait_s": _AT_ONCE_S}
        async with granted(self._programs, options.get("grants", {})) as options["grants"]:
            async with _archived(options, self._programs) as archives:
                name = options.get("name") or self._name
                words = *self._words, *args
                spec = spec_of(name, words, options, self._code, archives)
                with rpc.time_limit(_SEND_S) if archives else contextlib.nullcontext():
                    process = Process(await self._ref.call("spawn", spec=spec, **read))
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
    """The service `proc` of a session, and `native`: programs of whatever kind.

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
    def session(self) -> Any:
        """Raises Unsupported for a capability that came without one."""
        session = getattr(self._ref, "session", None)
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
        options: Options = {"kind": kind}
        code = await self._taken(code, options)
        if kind == NATIVE:
            image = (await self.session.native.call("program"))["image"]
            return Image(self, needed(image), "", options["name"], "", str(code))
        async with self._source(code) as (source, cid):
            with rpc.time_limit(_LOAD_S):
                reply = await self._ref.call("load", code=source, kind=options["kind"])
        name = options.get("name", "")
        return Image(self, needed(reply["image"]), reply["hash"], name, cid)

    async def _taken(self, code: Code, options: Options) -> bytes | str | rpc.Ref:
        """The program, read if it is a file; its name and kind are in the options then."""
        if options.get("kind") == NATIVE:
            if not isinstance(code, str):
                raise InvalidArgument("a native program is on the node's machine: give its name")
            options["name"] = options.get("name") or Path(code).name
            return code
        taken: bytes | str
        if isinstance(code, str) and code.startswith(NAMED):
            path = Path(code)
            taken = await self.session.blob.resolve(code)
        elif isinstance(code, os.PathLike) or (isinstance(code, str) and Path(code).exists()):  # noqa: ASYNC240  # takes no time
            path = Path(code)
            taken = await file_bytes(path)
        else:
            return code
        options["name"] = options.get("name") or path.name
        options["kind"] = options.get("kind") or KINDS.get(path.suffix, "")
        return taken

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
                    hint="ww run hello.wasm, or ww run CID of what `ww blob put` has put, or "
                    "ww run name:/NAME",
                ) from exc

    @contextlib.asynccontextmanager
    async def at(
        self, on: str, code: Code = b"", *, kind: str = "", memory_bytes: int = 0
    ) -> AsyncIterator[Executor]:
        """`session.proc` of a member that has room: `async with session.proc.at("any") as proc`.

        One logs in there with the session's key. Of several members it is the one that can run a
        program best, see `placement.nodes`.

        Args:
            on: A selector of members, "zone=home"; "any": all of them; "": the session's node.
            code: What is to run there: a member that has prepared it is preferred.
            kind: See Options, like below.
            memory_bytes: That it needs.

        Raises NotFound "not_found.room".
        """
        if not on:
            yield self
            return
        native, programs = kind == NATIVE, list[str]()
        if code and not native:
            programs = _known(await self._taken(code, {}))
        service = NATIVE if native else "proc"
        async with placed(
            self.session, on, service=service, programs=programs, memory_bytes=memory_bytes
        ) as there:
            yield there.proc

    def spawn(
        self, code: Any, *args: str, **options: Unpack[Options]
    ) -> AbstractAsyncContextManager[Process]:
        """Run a program: `async with session.proc.spawn(...) as process`.

        Args:
            code: See Code.
            args: Its arguments.
            options: See Options.

        Raises WetwareError "proc.code", LimitExceeded; Unsupported "unsupported.limit" for one that
        the node cannot enforce.
        """
        return self._spawned(None, code, args, options)

    @contextlib.asynccontextmanager
    async def _spawned(
        self, stdin: bytes | None, code: Any, args: tuple[str, ...], options: Options
    ) -> AsyncIterator[Process]:
        """See `spawn` and `Image.fed`."""
        with contextlib.closing(await self.load(code, options.get("kind", ""))) as image:
            async with image.fed(stdin, *args, **options) as process:
                yield process

    async def run(
        self, code: Any, *args: str, stdin: bytes = b"", **options: Unpack[Options]
    ) -> Ran:
        """Run a program to its end; see `spawn`.

        Raises LimitExceeded for more than OUTPUT_BYTES_MAX of output.
        """
        async with self._spawned(stdin, code, args, options) as process:
            return await collected(process, stdin)

    async def start(
        self,
        code: Any,
        *args: str,
        restart: str = "never",
        **options: Unpack[Options],
    ) -> Detached:
        """Start a program that goes on when the session ends, and when its node is started again.

        Args:
            code: As `spawn` takes it, like below.
            args: Its arguments.
            restart: When it is started again: "never", "on-failure" (unless it exited with 0),
                "always"; with pauses that grow, and not for ever where it ends at once each time.
            options: See Options; grants are texts. Time is not limited where no limit is given.

        Raises WetwareError "proc.code"; InvalidArgument "invalid.live_grant" for a reference.
        """
        code = await self._taken(code, options)
        kind, name = options.get("kind", ""), options.get("name", "")
        given: dict[str, Any] = {"policy": restart, "session": self.session.ref}
        async with _archived(options, self) as archives:
            with rpc.time_limit(_SEND_S if archives else _LOAD_S):
                if kind == NATIVE:
                    spec = spec_of(name, (str(code), *args), options, "", archives)
                    reply = await self.session.native.call("detach", spec=spec, **given)
                else:
                    async with self._source(code) as (source, cid):
                        spec = spec_of(name, args, options, cid, archives)
                        given |= {"code": source, "kind": kind}
                        reply = await self._ref.call("detach", spec=spec, **given)
        return Detached(self, reply["id"])

    def detached(self, id_: str) -> Detached:
        """One of one's own that was started at the session's node, by its ID."""
        return Detached(self, id_)

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
            options: See Options. A grant is `ww.grant(NAME)` there.

        Returns what the function returned, like `args`; a capability is a reference, which works
        as long as it is held.
        Raises FunctionFailed with its traceback where it raised, CallEnded where it ran into a
        limit or was ended, and what `spawn` raises.
        """
        job = await prepared(function, packages)
        options.setdefault("name", job.name)
        data, refs = packed_arguments(args)
        given: Options = {**options, "kind": "python"}
        given["grants"] = {**options.get("grants", {}), **refs}
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
            on: Members that take part, see `at`; "": the session's node alone. What the function
                returns of capabilities works while the results are asked for.
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


def _known(code: bytes | str | rpc.Ref) -> list[str]:
    """What members that have prepared a program call it."""
    if isinstance(code, rpc.Ref):
        raise InvalidArgument(
            "a reference to a program is read by the node that it came from alone",
            hint="give its bytes, a path or a blob, or spawn it with session.node(…).proc",
        )
    return [code if isinstance(code, str) else hashlib.sha256(code).hexdigest()]


@contextlib.asynccontextmanager
async def _archived(options: Options, programs: Executor) -> AsyncIterator[list[dict[str, Any]]]:
    """The directories of Options, each as the struct Dir of proc.capnp."""
    told = options.get("progress")
    with contextlib.ExitStack() as stack:
        yield [
            {"path": path, **await archived(stack, each, told, lambda: programs.session.blob)}
            for path, each in options.get("dirs", {}).items()
        ]


def spec_of(
    name: str,
    args: tuple[str, ...],
    options: Options,
    code: str,
    dirs: list[dict[str, Any]],
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
        "dirs": dirs,
    }


def _named(name: str, text: str) -> dict[str, Any]:
    what, where = named(text)
    return {"name": name, "what": what, "where": where}


def _grant(name: str, value: Any) -> dict[str, Any]:
    ref = getattr(value, "ref", value)
    if not isinstance(ref, rpc.Ref) or ref.interface is None:
        raise InvalidArgument(f"the grant {name!r} is no capability of a known interface")
    return {"name": name, "ref": ref, "interface": ref.interface.id}
