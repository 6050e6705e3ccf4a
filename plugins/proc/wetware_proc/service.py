"""The service `proc`: who may run what, how much, and what became of it."""

from __future__ import annotations

import math
import secrets
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.base.bounds import Claim
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded, NotFound, Unsupported
from wetware.hookspecs import Service
from wetware_proc import grants
from wetware_proc.process import Process
from wetware_proc.rooms import SiblingServant
from wetware_proc.schema import SCHEMA
from wetware_proc.serving import ServedServant
from wetware_proc.sources import read, size_of, within
from wetware_proc.supervise import Detached, Supervisor, grant_label
from wetware_proc.table import Table

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.hookspecs import PluginContext
    from wetware.identity import Principal
    from wetware_proc.driver import Driver, Image

CODE_BYTES_MAX: Final = 64 << 20
INPUT_BYTES_MAX: Final = 256 << 10  # that come with a program, instead of on a stream
LOADS_PER_OWNER_MAX: Final = 4  # programs that are read and compiled at a time
LOADS_MAX: Final = 16
READ_S: Final = 60.0  # for a source to give the whole program: it has a place of all meanwhile
PAGE_MAX: Final = 256  # processes that one answer tells of
WAIT_S_MAX: Final = 25.0  # of `wait`: less than a call may take by default


class ProcService(Service):
    """See `hookspecs.Service`. `make_drivers` has drivers by the kind of program that each runs."""

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
                    "Served.*",
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
        self.table = Table(ctx)
        self.supervisor = Supervisor(self.table, ctx.data_dir / "detached")
        self._all = ChainMap[str, Any](
            self.supervisor.all, self.table.processes, self.table.ended
        )  # of what is in several of them the first counts

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        async with (
            self._make_drivers() as drivers,
            self.table.running(drivers),
            self.supervisor.running(),
        ):
            task_status.started()
            await anyio.sleep_forever()

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return ExecutorServant(self, str(principal))

    def peer_bootstrap(self, node: Principal) -> rpc.Servant:
        return SiblingServant(self.table.rooms)

    # --- for the servants ---

    async def load(self, owner: str, code: rpc.Ref | None, kind: str) -> tuple[Image, bytes]:
        """Read and prepare a program; returns its bytes, too."""
        if code is None:
            raise InvalidArgument("no program is given")
        self.table.check_running()
        mine = f"{LOADS_PER_OWNER_MAX} programs of {owner} are loaded (LOADS_PER_OWNER_MAX)"
        with self.table.places.hold(
            Claim(("load", owner), LOADS_PER_OWNER_MAX, mine),
            Claim("load", LOADS_MAX, f"{LOADS_MAX} programs are loaded (LOADS_MAX)"),
        ):
            parts: list[bytes] = []
            async with within(READ_S, "the program"):
                size = await size_of(code, "a program", CODE_BYTES_MAX)
                await read(code, "a program", size, parts.append)
            data = b"".join(parts)
            image = await self.table.prepare(data, kind)
            self.table.rooms.prepared(image.digest)
            return image, data

    async def start(
        self,
        owner: str,
        image: Image,
        given: Mapping[str, Any],
        read: bytes = b"",
        stdin: rpc.ByteStream | None = None,
    ) -> Process:
        """Spawn it; it reads `read`, and then `stdin`. Call it in the servant's method.

        Its grants are called under one of its own below the caller's, and closed when it has ended;
        it ends with that.
        """
        if given["named"]:
            raise InvalidArgument("what a process is given by its name is for one that is detached")
        id_, guard, derived = secrets.token_hex(8), rpc.current_guard(), None
        refs = grants.judged(given["grants"])
        with ExitStack() as place, ExitStack() as undo:
            for ref in refs.values():
                place.callback(ref.close)
            dirs = await self.table.dirs.hold(owner, given["dirs"], place)
            if guard is not None:
                derived = self.ctx.derive(guard, grant_label(given["name"], id_))
                undo.callback(derived.end, "there is no process")
                refs = {name: derived.under(name, ref) for name, ref in refs.items()}
                for ref in refs.values():
                    place.callback(ref.close)
            spec = self.table.spec(image, given, refs, dirs)
            process = Process(id_, owner, image, spec, read, stdin)
            process.grant = derived
            self.table.launch(process, place)
            if derived is not None:
                derived.on_end(lambda why: process.kill(why.message))
            self.table.rooms.prepared(spec.code)
            undo.pop_all()
        return process

    def found(self, owner: str | None) -> list[Process | Detached]:
        found = [process for process in self._all.values() if owner in (None, process.owner)]
        return sorted(found, key=lambda process: -process.started_at)

    def get(self, id_: str, owner: str | None = None) -> Process | Detached:
        """One of an owner, or of all; raises NotFound, which does not tell of another owner's."""
        process: Process | Detached | None = self._all.get(id_)
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
        image, _ = await self._service.load(self._owner, code, kind)
        return {"image": ImageServant(self._service, self._owner, image), "hash": image.digest}

    async def processes(self, skip: int, limit: int) -> dict[str, Any]:
        return _page(self._service.found(self._owner), skip, limit)

    async def open(self, id: str) -> dict[str, Any]:
        return {"process": ProcessServant(self._service.get(id, self._owner), self._principal)}

    async def end(self, id: str) -> None:
        await ProcessServant(self._service.get(id, self._owner), self._principal).kill()

    async def rooms(self, on: str, programs: list[str]) -> dict[str, Any]:
        return {"rooms": await self._service.table.rooms.find(self._owner, on, programs)}

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
        owner = self._owner
        image, data = await self._service.load(owner, code, kind)
        detach = self._service.supervisor.detach
        return {"id": await detach(owner, image, data, spec, policy, session)}


class ImageServant(rpc.Servant, interface=SCHEMA.Image):
    """See proc.capnp."""

    def __init__(self, service: ProcService, owner: str, image: Image) -> None:
        self._service, self._owner, self._image = service, owner, image

    async def spawn(
        self, spec: dict[str, Any], input: bytes, more: bool, wait_s: float
    ) -> dict[str, Any]:
        _check_wait(wait_s)
        if len(input) > INPUT_BYTES_MAX:
            raise LimitExceeded(
                f"input has {len(input)} bytes: at most {INPUT_BYTES_MAX} (INPUT_BYTES_MAX)",
                hint="write the rest to its stream",
            )
        with _streams(int(more)) as ins:
            process = await self._start(spec, input, *ins)
        try:
            over = await process.settled(wait_s)
            with _streams(0 if over else 2) as outs:
                process.open(*outs)
        except BaseException:
            process.release("its spawner does not wait for it")
            raise
        answer = {"process": Held(process, self._owner), "exit": _exit(process)}
        if over:
            output, errors = (bytes(each.data) for each in process.outlets)
            return {**answer, "output": output, "errors": errors}
        streams = zip((*["stdin"] * more, "stdout", "stderr"), (*ins, *outs), strict=True)
        return {**answer, **{name: stream.servant for name, stream in streams}}

    async def _start(self, spec: dict[str, Any], *read: Any) -> Process:
        return await self._service.start(self._owner, self._image, spec, *read)


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
        answer = {"port": None, "cap": None, "interface": 0, "served": None}
        if isinstance(found, rpc.Servant):
            what = "served" if isinstance(found, ServedServant) else "port"
            return {**answer, what: found}
        assert found.interface is not None  # noqa: S101  # it was judged when it was offered
        return {**answer, "cap": found, "interface": found.interface.id}

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
