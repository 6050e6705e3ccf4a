"""What runs at a node: how much it may have together, and what has ended lately."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.bounds import Claim, Places, less
from wetware.base.tasks import Tasks
from wetware.errors import Disconnected, InvalidArgument, LimitExceeded
from wetware_proc.dirs import Dirs
from wetware_proc.driver import Driver, DriverUnavailable, Image, Limits, Spec
from wetware_proc.rooms import PROGRAM_CHARS_MAX, Rooms

if TYPE_CHECKING:
    from pathlib import Path

    from wetware import rpc
    from wetware.hookspecs import PluginContext
    from wetware_proc.config import ProcConfig
    from wetware_proc.process import Process

KIND: Final = "wasm"  # of a program whose kind is not said
PROCESSES_MAX: Final = 10_000  # of a node: as many as its address space has room for
ENDED_MAX: Final = 1000
"""Processes of a node that have ended and are remembered: of who has most the oldest goes."""
NAME_BYTES_MAX: Final = 255
PORTS_MAX: Final = 16


class Table:
    """The processes of a node."""

    def __init__(self, ctx: PluginContext) -> None:
        self.ctx = ctx
        self.config: ProcConfig = ctx.config
        self.drivers: Mapping[str, Driver] = {}  # by kind; none while nothing can run
        # By kind: what is on the machine itself, and needs no driver to load it.
        self.programs: dict[str, Callable[[], Image]] = {}
        self.processes: dict[str, Process] = {}  # those that run, by ID
        self.ended: OrderedDict[str, Process] = OrderedDict()  # but for detached ones
        self.dirs = Dirs(ctx.data_dir / "dirs", self.config.dirs_bytes_max)
        self.rooms = Rooms(ctx, self._free)
        self.places = Places()
        self._memory: Counter[str | None] = Counter()  # None: of all
        self._tasks = Tasks()

    @contextlib.asynccontextmanager
    async def running(self, drivers: Mapping[str, Driver]) -> AsyncIterator[None]:
        """Programs can run while the block does; then all are ended."""
        self.drivers = drivers
        try:
            yield
        finally:
            self.drivers = {}
            for process in self.processes.values():
                process.kill("the node stops")
            with anyio.CancelScope(shield=True):
                await self._tasks.wait()

    def check_running(self) -> None:
        if not self.drivers:
            raise Disconnected("the service is not running")

    def _free(self, owner: str) -> tuple[int, int, int]:
        self.check_running()
        running, config = len(self.processes), self.config
        own = sum(each.owner == owner for each in self.processes.values())
        return (
            running,
            min(PROCESSES_MAX - running, config.owner_processes_max - own),
            min(
                config.memory_bytes_max - self._memory[None],
                config.owner_memory_bytes_max - self._memory[owner],
            ),
        )

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

    def spec(
        self,
        image: Image,
        given: Mapping[str, Any],
        refs: Mapping[str, rpc.Ref],
        dirs: Mapping[str, Path] = MappingProxyType({}),
        usual: Limits | None = None,
    ) -> Spec:
        """A Spec of proc.capnp, for this image. Raises InvalidArgument, Unsupported."""
        name = given["name"] or "program"
        if len(name.encode()) > NAME_BYTES_MAX:
            raise InvalidArgument(
                f"a name of more than {NAME_BYTES_MAX} bytes", code="invalid.name"
            )
        if len(given["code"]) > PROGRAM_CHARS_MAX:
            raise InvalidArgument(f"a code's name of more than {PROGRAM_CHARS_MAX} characters")
        limits = {
            field: given["limits"][field] or getattr(usual or image.usual, field)
            for field in ("memory_bytes", "wall_s", "cpu_s")
        }
        spec = Spec(
            args=(name, *given["args"]),
            env={each["name"]: each["value"] for each in given["env"]},
            dirs={path: (directory, False) for path, directory in dirs.items()},
            limits=Limits(**limits),
            grants=refs,
            ports=_ports(given["ports"]),
            code=given["code"],
        )
        image.check(spec)
        return spec

    def launch(self, process: Process, place: ExitStack, *, remember: bool = True) -> None:
        """Run it to its end, when `place` is closed, and `remember` it then.

        Raises LimitExceeded and Disconnected, and has left `place` to the caller.
        """
        self._admit(place, process.owner, process.spec.limits.memory_bytes)
        self.processes[process.id] = process
        self._tasks.start(self._run(process, place.pop_all(), remember))

    def _admit(self, place: ExitStack, owner: str, nbytes: int) -> None:
        self.check_running()
        mine_max, config = self.config.owner_processes_max, self.config
        mine = f"{mine_max} processes of {owner} run at this node (owner_processes_max)"
        all_ = f"{PROCESSES_MAX} processes run at this node (PROCESSES_MAX)"
        place.enter_context(
            self.places.hold(Claim(owner, mine_max, mine), Claim("", PROCESSES_MAX, all_))
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

    async def _run(self, process: Process, place: ExitStack, remember: bool) -> None:
        with place:
            await process.run()
        del self.processes[process.id]
        if remember:
            self.ended[process.id] = process
        if len(self.ended) > ENDED_MAX:
            ((most, _),) = Counter(each.owner for each in self.ended.values()).most_common(1)
            del self.ended[next(id_ for id_, each in self.ended.items() if each.owner == most)]
        assert process.exit is not None  # noqa: S101  # it has run
        self.ctx.log.info("proc.ended", id=process.id, owner=process.owner, kind=process.exit.kind)


def _ports(given: list[dict[str, Any]]) -> dict[str, int]:
    ports = {each["name"]: each["number"] for each in given}
    if len(given) > PORTS_MAX or len(ports) < len(given):
        raise InvalidArgument(f"a process has at most {PORTS_MAX} ports, each of a name of its own")
    if not all(ports.values()) or not all(0 < len(name.encode()) <= 64 for name in ports):
        raise InvalidArgument("a port has a name, of at most 64 bytes, and a number")
    return ports
