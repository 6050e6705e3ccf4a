"""The service `proc`: who may run what, how much, and what became of it."""

from __future__ import annotations

import math
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.base.bounds import Claim, Places, less
from wetware.base.tasks import Tasks
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded, NotFound, Unsupported
from wetware.hookspecs import Service
from wetware_proc import grants
from wetware_proc.dirs import Dirs, HeldDir
from wetware_proc.driver import BOUNDS, Driver, DriverUnavailable, Image, Limits, Spec
from wetware_proc.process import Process
from wetware_proc.rooms import PROGRAM_CHARS_MAX, Rooms, SiblingServant
from wetware_proc.schema import SCHEMA
from wetware_proc.sources import read, size_of, within
from wetware_proc.supervise import Detached, Supervisor, grant_label

if TYPE_CHECKING:
    import asyncio

    from anyio.abc import TaskStatus

    from wetware.hookspecs import PluginContext
    from wetware.identity import Principal
    from wetware_proc.config import ProcConfig

CODE_BYTES_MAX: Final = 64 << 20
STDIN_BYTES_MAX: Final = 256 << 10
"""That come with a program, instead of on a stream."""
KIND: Final = "wasm"
"""Of a program whose kind is not said."""
PROCESSES_MAX: Final = 10_000
"""Of a node: as many as its address space has room for."""
LOADS_PER_OWNER_MAX: Final = 4
"""Programs that are read and compiled at a time."""
LOADS_MAX: Final = 16
READ_S: Final = 60.0
"""For a source to give the whole program: it has a place of all meanwhile."""
ENDED_MAX: Final = 1000
"""Processes of a node that have ended and are remembered: of who has most the oldest goes."""
PAGE_MAX: Final = 256
"""Processes that one answer tells of."""
USUAL: Final = Limits()
NAME_BYTES_MAX: Final = 255
PORTS_MAX: Final = 16
WAIT_S_MAX: Final = 25.0
"""Of `wait`: less than a call may take by default."""


class ProcService(Service):
    """See `hookspecs.Service`.

    Args:
        ctx: The plugin's context; its config is a ProcConfig.
        make_drivers: A context in which there are drivers, by the kind of program that each runs.
    """

    name = "proc"
    interface = SCHEMA.Executor
    peer_interface = SCHEMA.Sibling
    roles = MappingProxyType(
        {
            "reader": frozenset(),
            "member": frozenset(
                {
                    "Executor.load",
                    "Executor.processes",
                    "Executor.open",
                    "Executor.end",
                    "Executor.rooms",
                    "Executor.detach",
                    "Image.*",
                    "Process.*",
                    "Port.*",
                    "ByteStream.*",
                }
            ),
            "admin": frozenset({"*"}),
        }
    )
    ending = frozenset({"Executor.processes", "Executor.end", "Executor.all", "Executor.end_any"})

    def __init__(
        self,
        ctx: PluginContext,
        make_drivers: Callable[[], AbstractAsyncContextManager[Mapping[str, Driver]]],
    ) -> None:
        self.ctx, self._make_drivers = ctx, make_drivers
        self.drivers: Mapping[str, Driver]
        self.config: ProcConfig = ctx.config
        self.supervisor = Supervisor(self, ctx.data_dir / "detached")
        self.programs: dict[str, Callable[[], Image]] = {}  # by kind: of the machine itself
        self.processes: dict[str, Process] = {}
        self.ended: OrderedDict[str, Process] = OrderedDict()
        self._tasks = Tasks()
        self._places = Places()
        self.rooms = Rooms(ctx, self._free)
        self.dirs = Dirs(ctx.data_dir / "dirs", self.config.dirs_bytes_max)
        self._memory: Counter[str | None] = Counter()  # None: of all
        self._running = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with self._make_drivers() as self.drivers:
            self._running = True
            try:
                async with self.supervisor.running():
                    task_status.started()
                    await anyio.sleep_forever()
            finally:
                self._running = False
                for process in self.processes.values():
                    process.kill("the node stops")
                with anyio.CancelScope(shield=True):
                    await self._tasks.wait()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return ExecutorServant(self, str(principal))

    def peer_bootstrap(self, node: Principal) -> rpc.Servant:
        return SiblingServant(self.rooms)

    # --- for the servants and the supervisor ---

    def spec(
        self,
        image: Image,
        given: Mapping[str, Any],
        refs: Mapping[str, rpc.Ref],
        dirs: Mapping[str, HeldDir],
    ) -> Spec:
        """Of a detached program: time is not limited where that is not said."""
        wall_s, cpu_s = BOUNDS["wall_s"][1], image.usual.cpu_s and BOUNDS["cpu_s"][1]
        spec = judged(given, refs, dirs, replace(image.usual, wall_s=wall_s, cpu_s=cpu_s))
        image.check(spec)
        return spec

    def check_running(self) -> None:
        if not self._running:
            raise Disconnected("the service is not running")

    async def load(self, owner: str, code: rpc.Ref, kind: str) -> tuple[Image, bytes]:
        """Read and prepare a program; returns its bytes, too."""
        self.check_running()
        mine = f"{LOADS_PER_OWNER_MAX} programs of {owner} are loaded (LOADS_PER_OWNER_MAX)"
        with self._places.hold(
            Claim(("load", owner), LOADS_PER_OWNER_MAX, mine),
            Claim("load", LOADS_MAX, f"{LOADS_MAX} programs are loaded (LOADS_MAX)"),
        ):
            parts: list[bytes] = []
            async with within(READ_S, "the program"):
                size = await size_of(code, "a program", CODE_BYTES_MAX)
                await read(code, "a program", size, parts.append)
            data = b"".join(parts)
            image = await self.prepare(data, kind)
            self.rooms.prepared(image.digest)
            return image, data

    def _free(self) -> tuple[int, int, int]:
        self.check_running()
        running = len(self.processes)
        memory_bytes = self.config.memory_bytes_max - self._memory[None]
        return running, PROCESSES_MAX - running, memory_bytes

    async def prepare(self, code: bytes, kind: str) -> Image:
        """What `launch` runs. Raises DriverUnavailable, CodeRefused."""
        if (driver := self.drivers.get(kind or KIND)) is None:
            raise DriverUnavailable(
                f"this node runs no programs of the kind {kind[:32]!r}",
                hint=f"it runs {', '.join(sorted(self.drivers))}",
            )
        return await driver.load(code)

    def program(self, kind: str) -> Image:
        """What `launch` runs of a kind whose programs are on the machine."""
        if (made := self.programs.get(kind)) is None:
            raise DriverUnavailable(f"this node runs no programs of the kind {kind[:32]!r}")
        return made()

    async def detach(
        self,
        owner: str,
        image: Image,
        code: bytes | None,
        spec: Mapping[str, Any],
        policy: str,
        session: rpc.Ref | None,
    ) -> dict[str, Any]:
        """See `Executor.detach` in proc.capnp; `code` is None where it is on the machine."""
        if session is None:
            raise InvalidArgument("no session is given")
        self.check_running()
        dirs = await self.dirs.hold(owner, spec["dirs"])
        each = await self.supervisor.detach(owner, image, code, spec, dirs, policy, session)
        return {"id": each.id}

    def start(
        self,
        owner: str,
        image: Image,
        given: Mapping[str, Any],
        refs: Mapping[str, rpc.Ref],
        guard: rpc.Guard | None = None,
        dirs: Mapping[str, HeldDir] = MappingProxyType({}),
        stdin: rpc.ByteStream | bytes = b"",
    ) -> Process:
        """Spawn it. Call it in the servant's method.

        Its grants `refs` are called under one of its own below `guard`, and closed when it has
        ended, as its `dirs` are; it ends with that.
        """
        id_, derived = secrets.token_hex(8), None
        with ExitStack() as place, ExitStack() as undo:
            for ref in refs.values():
                place.callback(ref.close)
            for each in dirs.values():
                place.callback(each.close)
            if guard is not None:
                derived = self.ctx.derive(guard, grant_label(given["name"], id_))
                undo.callback(derived.end, "there is no process")
                refs = {name: derived.under(name, ref) for name, ref in refs.items()}
                for ref in refs.values():
                    place.callback(ref.close)
            spec = judged(given, refs, dirs, image.usual)
            image.check(spec)
            self.admit(place, owner, spec.limits.memory_bytes)
            self.rooms.prepared(spec.code)
            process = Process(id_, owner, image, spec, stdin)
            process.grant = derived
            if derived is not None:
                derived.on_end(lambda why: process.kill(why.message))
            self.launch(process, place)
            undo.pop_all()
        return process

    def launch(self, process: Process, place: ExitStack) -> asyncio.Task[None]:
        """Run it to its end; `place` is what `admit` gave, and is closed then."""
        self.processes[process.id] = process
        return self._tasks.start(self._run(process, place.pop_all()))

    def admit(self, place: ExitStack, owner: str, nbytes: int) -> None:
        """Room for one more, until `place` is closed. Raises LimitExceeded, Disconnected."""
        self.check_running()
        mine_max, config = self.config.owner_processes_max, self.config
        mine = f"{mine_max} processes of {owner} run at this node (owner_processes_max)"
        all_ = f"{PROCESSES_MAX} processes run at this node (PROCESSES_MAX)"
        place.enter_context(
            self._places.hold(Claim(owner, mine_max, mine), Claim("", PROCESSES_MAX, all_))
        )
        for whose, limit, setting in (
            (owner, config.owner_memory_bytes_max, "owner_memory_bytes_max"),
            (None, config.memory_bytes_max, "memory_bytes_max"),
        ):
            if self._memory[whose] + nbytes > limit:
                raise LimitExceeded(
                    f"processes {f'of {whose} ' if whose else ''}may have {self._memory[whose]} "
                    f"bytes of memory of {limit}, and this may have {nbytes} more ({setting})",
                    hint="give it less, end others with `ww kill`, or run it at another node",
                    code="limit.proc_memory",
                )
        for key in (owner, None):
            self._memory[key] += nbytes
            place.callback(less, self._memory, key, nbytes)

    async def _run(self, process: Process, place: ExitStack) -> None:
        with place:
            await process.run()
        del self.processes[process.id]
        if process.id not in self.supervisor.all:
            self.ended[process.id] = process
        if len(self.ended) > ENDED_MAX:
            ((most, _),) = Counter(each.owner for each in self.ended.values()).most_common(1)
            del self.ended[next(id_ for id_, each in self.ended.items() if each.owner == most)]
        assert process.exit is not None  # noqa: S101  # it has run
        self.ctx.log.info("proc.ended", id=process.id, owner=process.owner, kind=process.exit.kind)

    def found(self, owner: str | None) -> list[Process | Detached]:
        """Of an owner, or all, the newest first."""
        each: dict[str, Process | Detached] = {**self.ended, **self.processes}
        each.update(self.supervisor.all)
        found = [process for process in each.values() if owner in (None, process.owner)]
        return sorted(found, key=lambda process: -process.started_at)

    def get(self, id_: str, owner: str | None = None) -> Process | Detached:
        """One of an owner, or of all; raises NotFound, which does not tell of another owner's."""
        detached = self.supervisor.all.get(id_)
        process = detached or self.processes.get(id_) or self.ended.get(id_)
        if process is None or owner not in (None, process.owner):
            raise NotFound(
                f"there is no process {id_[:32]!r} of yours at this node",
                hint="ww ps",
                code="not_found.process",
            )
        return process


def owner_of(principal: str) -> str:
    """Who answers for what a principal's call spawns: under a share, who gave it."""
    guard = rpc.current_guard()
    return (guard and guard.payer) or principal


class ExecutorServant(rpc.Servant, interface=SCHEMA.Executor):
    """See proc.capnp."""

    def __init__(self, service: ProcService, principal: str) -> None:
        self._service, self._principal = service, principal

    @property
    def _owner(self) -> str:
        return owner_of(self._principal)

    async def load(self, code: rpc.Ref | None, kind: str) -> dict[str, Any]:
        if code is None:
            raise InvalidArgument("no program is given")
        image, _ = await self._service.load(self._owner, code, kind)
        return {"image": ImageServant(self._service, self._owner, image), "hash": image.digest}

    async def processes(self, skip: int, limit: int) -> dict[str, Any]:
        return _page(self._service.found(self._owner), skip, limit)

    async def open(self, id: str) -> dict[str, Any]:
        return {"process": ProcessServant(self._service.get(id, self._owner), self._principal)}

    async def end(self, id: str) -> None:
        await ProcessServant(self._service.get(id, self._owner), self._principal).kill()

    async def rooms(self, on: str, programs: list[str]) -> dict[str, Any]:
        return {"rooms": await self._service.rooms.find(self._owner, on, programs)}

    async def all(self, skip: int, limit: int) -> dict[str, Any]:
        return _page(self._service.found(None), skip, limit)

    async def end_any(self, id: str) -> None:
        await ProcessServant(self._service.get(id), self._principal).kill()

    async def detach(
        self,
        code: rpc.Ref | None,
        kind: str,
        spec: dict[str, Any],
        policy: str,
        session: rpc.Ref | None,
    ) -> dict[str, Any]:
        if code is None:
            raise InvalidArgument("no program is given")
        owner = self._owner
        image, data = await self._service.load(owner, code, kind)
        return await self._service.detach(owner, image, data, spec, policy, session)


class ImageServant(rpc.Servant, interface=SCHEMA.Image):
    """See proc.capnp."""

    def __init__(self, service: ProcService, owner: str, image: Image) -> None:
        self._service, self._owner, self._image = service, owner, image

    async def spawn(self, spec: dict[str, Any]) -> dict[str, Any]:
        with _streams(3) as (stdin, stdout, stderr):
            process = await self._start(spec, stdin)
        process.open(stdout, stderr)
        return {
            "process": Held(process, self._owner),
            "stdin": stdin.servant,
            "stdout": stdout.servant,
            "stderr": stderr.servant,
        }

    async def run(self, spec: dict[str, Any], stdin: bytes, wait_s: float) -> dict[str, Any]:
        _check_wait(wait_s)
        if len(stdin) > STDIN_BYTES_MAX:
            raise LimitExceeded(
                f"stdin has {len(stdin)} bytes: at most {STDIN_BYTES_MAX} (STDIN_BYTES_MAX)",
                hint="spawn it, and write to its stream",
            )
        process = await self._start(spec, stdin)
        try:
            over = await process.settled(wait_s)
            with _streams(0 if over else 2) as streams:
                process.open(*streams)
        except BaseException:
            process.release("its spawner does not wait for it")
            raise
        output, errors = (bytes(each.data) if over else b"" for each in process.outlets)
        stdout, stderr = [each.servant for each in streams] or (None, None)
        return {
            "process": Held(process, self._owner),
            "exit": _exit(process),
            "output": output,
            "errors": errors,
            "stdout": stdout,
            "stderr": stderr,
        }

    async def _start(self, spec: dict[str, Any], stdin: rpc.ByteStream | bytes) -> Process:
        if spec["named"]:
            raise InvalidArgument("what a process is given by its name is for one that is detached")
        refs, guard = grants.judged(spec["grants"]), rpc.current_guard()
        dirs = await self._service.dirs.hold(self._owner, spec["dirs"])
        return self._service.start(self._owner, self._image, spec, refs, guard, dirs, stdin)


@contextmanager
def _streams(count: int) -> Iterator[list[rpc.ByteStream]]:
    """Streams of a process, which end if it cannot have them. Raises LimitExceeded."""
    made: list[rpc.ByteStream] = []
    try:
        for _ in range(count):
            made.append(rpc.ByteStream())  # noqa: PERF401 - those that were made are ended
        yield made
    except BaseException:
        for each in made:
            each.abort(Disconnected("there is no process"))
        raise


def judged(
    given: Mapping[str, Any],
    granted: Mapping[str, rpc.Ref],
    dirs: Mapping[str, HeldDir] = MappingProxyType({}),
    usual: Limits = USUAL,
) -> Spec:
    """A Spec of proc.capnp; raises InvalidArgument."""
    name = given["name"] or "program"
    if len(name.encode()) > NAME_BYTES_MAX:
        raise InvalidArgument(f"a name of more than {NAME_BYTES_MAX} bytes", code="invalid.name")
    if len(given["code"]) > PROGRAM_CHARS_MAX:
        raise InvalidArgument(f"a code's name of more than {PROGRAM_CHARS_MAX} characters")
    limits = {
        field: given["limits"][field] or getattr(usual, field)
        for field in ("memory_bytes", "wall_s", "cpu_s")
    }
    env = {each["name"]: each["value"] for each in given["env"]}
    return Spec(
        args=(name, *given["args"]),
        env=env,
        dirs={path: (each.path, False) for path, each in dirs.items()},
        limits=Limits(**limits),
        grants=granted,
        ports=_ports(given.get("ports", [])),
        code=given["code"],
    )


def _ports(given: list[dict[str, Any]]) -> dict[str, int]:
    ports = {each["name"]: each["number"] for each in given}
    if len(given) > PORTS_MAX or len(ports) < len(given):
        raise InvalidArgument(f"a process has at most {PORTS_MAX} ports, each of a name of its own")
    if not all(ports.values()) or not all(0 < len(name.encode()) <= 64 for name in ports):
        raise InvalidArgument("a port has a name, of at most 64 bytes, and a number")
    return ports


class ProcessServant(rpc.Servant, interface=SCHEMA.Process):
    """See proc.capnp."""

    def __init__(self, process: Process | Detached, principal: str) -> None:
        self._process, self._principal = process, principal

    @property
    def _detached(self) -> Detached:
        if isinstance(self._process, Detached):
            return self._process
        raise Unsupported(
            "it is not detached: what it writes goes to who started it, and it starts once",
            hint="`ww run --detach`",
            code="unsupported.attached",
        )

    @property
    def _runs(self) -> Process:
        process = self._process
        if isinstance(process, Detached):
            process = process.process or process
        if isinstance(process, Process):
            return process
        raise NotFound("the process does not run now", hint="ww ps", code="not_found.running")

    async def wait(self, wait_s: float) -> dict[str, Any]:
        _check_wait(wait_s)
        await self._process.wait(wait_s)
        return {"exit": _exit(self._process)}

    async def kill(self) -> None:
        self._process.kill(f"by {self._principal}")
        await self._process.wait()

    async def info(self) -> dict[str, Any]:
        return {"info": _info(self._process)}

    async def logs(self, start: int, wait_s: float) -> dict[str, Any]:
        _check_wait(wait_s)
        return await self._detached.read(start, wait_s)

    async def restart(self) -> None:
        self._detached.restart()

    async def export(self, name: str, wait_s: float) -> dict[str, Any]:
        _check_wait(wait_s)
        found = await self._runs.exported(name, wait_s)
        if isinstance(found, rpc.Servant):
            return {"port": found, "cap": None, "interface": 0}
        assert found.interface is not None  # noqa: S101  # it was judged when it was offered
        return {"port": None, "cap": found, "interface": found.interface.id}

    async def signal(self, name: str) -> None:
        await self._runs.signal(name)


class Held(ProcessServant, interface=SCHEMA.Process):
    """The one that its spawner holds. Make it in the servant's method that returns it."""

    def released(self) -> None:
        """Its spawner let go of it, or is gone."""
        self._runs.release("its spawner has let go of it")


def _page(found: list[Process | Detached], skip: int, limit: int) -> dict[str, Any]:
    page = found[skip : skip + min(limit or PAGE_MAX, PAGE_MAX)]
    return {"processes": [_info(each) for each in page], "matched": len(found)}


def _check_wait(wait_s: float) -> None:
    if not 0 <= wait_s <= WAIT_S_MAX or math.isnan(wait_s):
        raise InvalidArgument(f"waitS is 0 to {WAIT_S_MAX:g}, not {wait_s}")


def _exit(process: Process | Detached) -> dict[str, Any]:
    exit_ = process.exit
    if exit_ is None:
        return {"kind": "", "code": 0, "why": ""}
    return {"kind": exit_.kind, "code": max(exit_.code, 0), "why": exit_.why}


def _info(process: Process | Detached) -> dict[str, Any]:
    return {
        "id": process.id,
        "owner": process.owner,
        "started_ms": int(process.started_at * 1000),
        "cpu_ms": int((process.exit.cpu_s if process.exit else 0) * 1000),
        "exit": _exit(process),
        **process.info,
    }
