"""The service `proc`: who may run what, how much, and what became of it."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.base.bounds import Claim, Places
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded, NotFound, WetwareError
from wetware.hookspecs import Service
from wetware_proc import grants
from wetware_proc.driver import Driver, DriverUnavailable, Image, Limits, Spec
from wetware_proc.process import Process
from wetware_proc.rooms import PROGRAM_CHARS_MAX, Rooms, SiblingServant
from wetware_proc.schema import SCHEMA

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.hookspecs import PluginContext
    from wetware.identity import Principal
    from wetware_proc.config import ProcConfig

CODE_BYTES_MAX: Final = 64 << 20
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
"""Processes of a node that have ended and are remembered."""
NAME_BYTES_MAX: Final = 255
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
                    "Image.*",
                    "Process.*",
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
        self.processes: dict[str, Process] = {}
        self.ended: OrderedDict[str, Process] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = Places()
        self.rooms = Rooms(ctx, self._free)
        self._memory: Counter[str | None] = Counter()  # None: of all
        self._running = False

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled."""
        async with self._make_drivers() as self.drivers:
            self._running = True
            try:
                task_status.started()
                await anyio.sleep_forever()
            finally:
                self._running = False
                for process in self.processes.values():
                    process.kill("the node stops")
                with anyio.CancelScope(shield=True):
                    if self._tasks:
                        await asyncio.wait(self._tasks)

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return ExecutorServant(self, str(principal))

    def peer_bootstrap(self, node: Principal) -> rpc.Servant:
        return SiblingServant(self.rooms)

    # --- for the servants ---

    def check_running(self) -> None:
        if not self._running:
            raise Disconnected("the service is not running")

    async def load(self, owner: str, code: rpc.Ref, kind: str) -> Image:
        """Read and prepare a program."""
        self.check_running()
        if (driver := self.drivers.get(kind or KIND)) is None:
            raise DriverUnavailable(
                f"this node runs no programs of the kind {kind[:32]!r}",
                hint=f"it runs {', '.join(sorted(self.drivers))}",
            )
        mine = f"{LOADS_PER_OWNER_MAX} programs of {owner} are loaded (LOADS_PER_OWNER_MAX)"
        with self._places.hold(
            Claim(("load", owner), LOADS_PER_OWNER_MAX, mine),
            Claim("load", LOADS_MAX, f"{LOADS_MAX} programs are loaded (LOADS_MAX)"),
        ):
            try:
                async with asyncio.timeout(READ_S) as timeout:
                    data = await _read(code)
            except TimeoutError:
                if not timeout.expired():
                    raise
                raise LimitExceeded(
                    f"the source has not given the program within {READ_S:g} s (READ_S)"
                ) from None
            image = await driver.load(data)
            self.rooms.prepared(image.digest)
            return image

    def _free(self) -> tuple[int, int, int]:
        self.check_running()
        running = len(self.processes)
        memory_bytes = self.config.memory_bytes_max - self._memory[None]
        return running, PROCESSES_MAX - running, memory_bytes

    def start(
        self, owner: str, image: Image, spec: Spec, refs: Iterable[rpc.Ref]
    ) -> tuple[Process, dict[str, Any]]:
        """Spawn it; returns its streams, too. Call it in the servant's method.

        `refs` are closed when it has ended.
        """
        self.check_running()
        self.rooms.prepared(spec.code)
        with ExitStack() as place:
            self._admit(place, owner, spec.limits.memory_bytes)
            streams = rpc.ByteStream(), rpc.ByteStream(), rpc.ByteStream()
            process = Process(secrets.token_hex(8), owner, image, spec, streams)
            for ref in refs:
                place.callback(ref.close)
            kept = place.pop_all()
        self.processes[process.id] = process
        task = asyncio.get_running_loop().create_task(self._run(process, kept))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        names = ("stdin", "stdout", "stderr")
        return process, {n: each.servant for n, each in zip(names, streams, strict=True)}

    def _admit(self, place: ExitStack, owner: str, nbytes: int) -> None:
        """Room for one more, until `place` is closed; raises LimitExceeded."""
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
            place.callback(self._give_back, key, nbytes)

    def _give_back(self, key: str | None, nbytes: int) -> None:
        self._memory[key] -= nbytes
        if not self._memory[key]:
            del self._memory[key]

    async def _run(self, process: Process, place: ExitStack) -> None:
        with place:
            await process.run(self.drivers[process.image.kind])
        del self.processes[process.id]
        self.ended[process.id] = process
        if len(self.ended) > ENDED_MAX:
            self.ended.popitem(last=False)
        assert process.exit is not None  # noqa: S101  # it has run
        self.ctx.log.info("proc.ended", id=process.id, owner=process.owner, kind=process.exit.kind)

    def found(self, owner: str | None) -> list[Process]:
        """Of an owner, or all, the newest first."""
        each = [*self.ended.values(), *self.processes.values()]
        found = [process for process in each if owner in (None, process.owner)]
        return sorted(found, key=lambda process: -process.started_at)

    def get(self, id_: str, owner: str | None = None) -> Process:
        """One of an owner, or of all; raises NotFound, which does not tell of another owner's."""
        process = self.processes.get(id_) or self.ended.get(id_)
        if process is None or owner not in (None, process.owner):
            raise NotFound(
                f"there is no process {id_[:32]!r} of yours at this node",
                hint="ww ps",
                code="not_found.process",
            )
        return process


async def _read(code: rpc.Ref) -> bytes:
    size = (await code.call("stat"))["size"]
    if size > CODE_BYTES_MAX:
        raise LimitExceeded(
            f"a program of {size} bytes; at most {CODE_BYTES_MAX} are taken (CODE_BYTES_MAX)"
        )
    parts, left = [], size
    reply = await code.call("read", start=0, end=size)
    if reply["stream"] is None:
        raise InvalidArgument("the source of the program has given no stream")
    async with rpc.ByteStream(reply["stream"]) as stream:
        async for data in stream:
            parts.append(data)
            left -= len(data)
            if left < 0:
                break
    if left:
        raise InvalidArgument(f"a program of {size} bytes has another length than it says")
    return b"".join(parts)


class ExecutorServant(rpc.Servant, interface=SCHEMA.Executor):
    """See proc.capnp."""

    def __init__(self, service: ProcService, principal: str) -> None:
        self._service, self._principal = service, principal

    @property
    def _owner(self) -> str:
        """Who answers for what is spawned: under a share, who gave it."""
        guard = rpc.current_guard()
        return (guard and guard.payer) or self._principal

    async def load(self, code: rpc.Ref | None, kind: str) -> dict[str, Any]:
        if code is None:
            raise InvalidArgument("no program is given")
        image = await self._service.load(self._owner, code, kind)
        return {"image": ImageServant(self._service, self._owner, image), "hash": image.digest}

    async def processes(self) -> dict[str, Any]:
        return {"processes": [_info(each) for each in self._service.found(self._owner)]}

    async def open(self, id: str) -> dict[str, Any]:
        return {"process": ProcessServant(self._service.get(id, self._owner), self._principal)}

    async def end(self, id: str) -> None:
        await self._end(self._service.get(id, self._owner))

    async def rooms(self, on: str, programs: list[str]) -> dict[str, Any]:
        return {"rooms": await self._service.rooms.find(self._owner, on, programs)}

    async def all(self) -> dict[str, Any]:
        return {"processes": [_info(each) for each in self._service.found(None)]}

    async def end_any(self, id: str) -> None:
        await self._end(self._service.get(id))

    async def _end(self, process: Process) -> None:
        process.kill(f"by {self._principal}")
        await process.wait()


class ImageServant(rpc.Servant, interface=SCHEMA.Image):
    """See proc.capnp."""

    def __init__(self, service: ProcService, owner: str, image: Image) -> None:
        self._service, self._owner, self._image = service, owner, image

    async def spawn(self, spec: dict[str, Any]) -> dict[str, Any]:
        given = grants.judged(spec["grants"])
        judged_ = judged(spec, given)
        process, streams = self._service.start(self._owner, self._image, judged_, given.values())
        return {"process": Held(process, self._owner), **streams}


def judged(given: dict[str, Any], granted: Mapping[str, rpc.Ref]) -> Spec:
    """A Spec of proc.capnp; raises InvalidArgument."""
    name = given["name"] or "program"
    if len(name.encode()) > NAME_BYTES_MAX:
        raise InvalidArgument(f"a name of more than {NAME_BYTES_MAX} bytes", code="invalid.name")
    if len(given["code"]) > PROGRAM_CHARS_MAX:
        raise InvalidArgument(f"a code's name of more than {PROGRAM_CHARS_MAX} characters")
    usual = Limits()
    limits = {
        field: given["limits"][field] or getattr(usual, field)
        for field in ("memory_bytes", "wall_s", "cpu_s")
    }
    env = {each["name"]: each["value"] for each in given["env"]}
    calls = {name: grants.callable_by_guests(ref) for name, ref in granted.items()}
    return Spec(
        args=(name, *given["args"]),
        env=env,
        limits=Limits(**limits),
        grants=calls,
        code=given["code"],
    )


class ProcessServant(rpc.Servant, interface=SCHEMA.Process):
    """See proc.capnp."""

    def __init__(self, process: Process, principal: str) -> None:
        self._process, self._principal = process, principal

    async def wait(self, wait_s: float) -> dict[str, Any]:
        if not 0 <= wait_s <= WAIT_S_MAX or math.isnan(wait_s):
            raise InvalidArgument(f"waitS is 0 to {WAIT_S_MAX:g}, not {wait_s}")
        await self._process.wait(wait_s)
        return {"exit": _exit(self._process)}

    async def kill(self) -> None:
        self._process.kill(f"by {self._principal}")
        await self._process.wait()

    async def info(self) -> dict[str, Any]:
        return {"info": _info(self._process)}


class Held(ProcessServant, interface=SCHEMA.Process):
    """The one that its spawner holds. Make it in the servant's method that returns it."""

    def __init__(self, process: Process, principal: str) -> None:
        super().__init__(process, principal)
        self._unguard: Callable[[], None] = lambda: None
        if (guard := rpc.current_guard()) is not None:
            self._unguard = guard.on_end(self._cut)

    def released(self) -> None:
        """Its spawner let go of it, or is gone."""
        self._unguard()
        self._process.kill("its spawner has let go of it")

    def _cut(self, why: WetwareError) -> None:
        self._process.kill(why.message)


def _exit(process: Process) -> dict[str, Any]:
    exit_ = process.exit
    if exit_ is None:
        return {"kind": "", "code": 0, "why": ""}
    return {"kind": exit_.kind, "code": max(exit_.code, 0), "why": exit_.why}


def _info(process: Process) -> dict[str, Any]:
    return {
        "id": process.id,
        "name": process.spec.args[0],
        "owner": process.owner,
        "hash": process.image.digest,
        "started_ms": int(process.started_at * 1000),
        "memory_bytes": process.spec.limits.memory_bytes,
        "cpu_ms": int((process.exit.cpu_s if process.exit else 0) * 1000),
        "exit": _exit(process),
        "kind": process.image.kind,
        "code": process.spec.code,
    }
