"""The driver of native programs: `run` makes a sandbox, and joins it to a spec."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Final

from anyio import wait_readable, wait_writable

from wetware import rpc
from wetware.base.bounds import TokenBucket
from wetware.base.finding import error, ok, warning
from wetware.base.threads import to_its_end
from wetware.errors import InvalidArgument, Unsupported, WetwareError
from wetware_proc.driver import CodeRefused, Exit, Image, Limits, Output, Pipe, Spec
from wetware_proc.native import seccomp
from wetware_proc.native.ports import Ports
from wetware_proc.native.sandbox import Sandbox, bwrap
from wetware_proc.native.session import GrantedServant
from wetware_proc.native.starter import landlocked

if TYPE_CHECKING:
    from collections.abc import Iterable
    from io import FileIO

    from wetware.hookspecs import Finding

KIND: Final = "native"
_READ_BYTES: Final = 64 << 10
_UNENFORCED: Final = {
    "memory_bytes": "without a cgroup the kernel limits the memory of each process by itself",
    "cpu_s": "without a cgroup the kernel limits the time of each process by itself",
}
_STREAMS_MAX: Final = 16
_PROBE_S: Final = 20.0
_CHECK: Final = "native programs"


class NativeImage(Image):
    """No program yet: that is the first argument of the spec, and is in the sandbox."""

    usual = Limits(memory_bytes=0, cpu_s=0)
    signals = True

    def __init__(self) -> None:
        super().__init__("", KIND)

    def check(self, spec: Spec) -> None:
        """Raise InvalidArgument, and Unsupported for a limit that cannot be enforced here."""
        if len(spec.args) < 2:
            raise InvalidArgument("no program is named", hint="ww run -- PROGRAM [ARGS]")
        for name, why in _UNENFORCED.items():
            if getattr(spec.limits, name):
                raise Unsupported(
                    f"the limit {name} cannot be enforced on a native program here: {why}",
                    hint="leave it out, and there is none; or run it as WebAssembly",
                    code="unsupported.limit",
                )


class NativeDriver:
    """See wetware_proc.driver.Driver."""

    def __init__(self) -> None:
        self._found: list[Finding] = []

    async def probe(self) -> None:
        """Look whether a program can be run here."""
        spec = Spec(args=("probe", "true"), limits=Limits(memory_bytes=0, cpu_s=0, wall_s=_PROBE_S))
        try:
            end = await self.run(NativeImage(), spec)
        except WetwareError as exc:
            self._found = [error(_CHECK, exc.message, exc.hint)]
            return
        if end.code != 0:
            self._found = [
                error(_CHECK, f"`true` {end.kind} {end.code} in a sandbox", "see the log")
            ]
            return
        also = [
            *(["a filter of system calls"] if seccomp.program() else []),
            *(["Landlock"] if landlocked() else []),
        ]
        self._found = [
            ok(
                _CHECK,
                f"bubblewrap works ({', '.join([bwrap(), *also])}); limited: time, processes, "
                "files, /tmp",
            ),
            warning(
                _CHECK,
                "the memory and the processor time of a native program cannot be limited on this "
                "machine: whoever may run one may use all of it",
                "give the service `native` to whom you would give an account; a limit that is "
                "asked for is refused",
            ),
        ]

    def findings(self) -> Iterable[Finding]:
        """For `ww doctor`: as `probe` has found it."""
        return self._found

    async def load(self, code: bytes) -> Image:
        raise Unsupported(
            "a native program is not loaded: it is on the machine, or in a directory of its own",
            hint="ww run -- PROGRAM, of the service `native`",
            code="unsupported.native",
        )

    async def run(self, image: Image, spec: Spec) -> Exit:
        """See Driver. Raises as NativeImage.check, DriverUnavailable, LimitExceeded."""
        if not isinstance(image, NativeImage):
            raise InvalidArgument("this image is of another driver")
        image.check(spec)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sandbox = Sandbox(
                spec.args[1:],
                env=spec.env,
                dirs=spec.dirs,
                tmp_bytes=spec.limits.tmp_bytes if spec.limits.tmp_files else 0,
                way_out=theirs,
            )
            theirs.close()
            try:
                return await _life(sandbox, spec, ours)
            finally:
                sandbox.close()


async def _life(sandbox: Sandbox, spec: Spec, way_out: socket.socket) -> Exit:
    ports = Ports(sandbox)
    tasks: list[asyncio.Task[None]] = []
    over_time = False
    try:
        await sandbox.ready()
        for name, number in spec.ports.items():
            spec.offer(name, ports.servant(number))
        limits = rpc.RpcLimits(
            calls_in_max=spec.limits.calls_max,
            exports_max=spec.limits.handles_max,
            imports_max=spec.limits.handles_max,
            streams_max=_STREAMS_MAX,
        )
        session = rpc.serve(rpc.SocketPipe(way_out), GrantedServant(spec), limits)
        feed = _feed(spec.stdin, sandbox.stdin)
        tasks = [asyncio.ensure_future(session), asyncio.ensure_future(feed)]
        rate = TokenBucket(spec.limits.output_bytes_s, spec.limits.output_bytes_s)
        outs = [
            asyncio.ensure_future(_take(out, output, rate))
            for out, output in ((sandbox.stdout, spec.stdout), (sandbox.stderr, spec.stderr))
        ]
        tasks += outs
        sandbox.go()
        tasks.append(asyncio.ensure_future(_signal(spec.signals, sandbox)))
        try:
            async with asyncio.timeout(spec.limits.wall_s) as timeout:
                await sandbox.over()
        except TimeoutError:
            over_time = timeout.expired()
        sandbox.kill()  # what it has left behind
        await asyncio.gather(*outs)
    finally:
        sandbox.kill()
        for task in tasks:
            task.cancel()
        code = await to_its_end(_end(sandbox, ports, tasks))
    for task in outs:
        task.result()  # a defect of an output is raised
    if over_time:
        return Exit("limit", why="wall_s")
    if code is None:
        raise CodeRefused(f"{spec.args[1]!r} could not be started: its stderr says why")
    return Exit("exited", code)


async def _end(sandbox: Sandbox, ports: Ports, tasks: list[asyncio.Task[None]]) -> int | None:
    code = await sandbox.gone()
    await ports.close()
    await asyncio.gather(*tasks, return_exceptions=True)
    return code


async def _feed(pipe: Pipe, stdin: FileIO) -> None:
    """What it reads, to the end of the pipe, or of who reads it."""
    with stdin:
        try:
            while data := await pipe.read(_READ_BYTES):
                view = memoryview(data)
                while view:
                    if (count := stdin.write(view)) is None:
                        await wait_writable(stdin)
                    else:
                        view = view[count:]
        except BrokenPipeError:
            pipe.close()


async def _signal(pipe: Pipe, sandbox: Sandbox) -> None:
    while number := await pipe.read(1):
        await sandbox.signal(number[0])


async def _take(out: FileIO, output: Output, rate: TokenBucket) -> None:
    """What it writes; where the output fails nobody reads that any more."""
    with out, contextlib.suppress(OSError):
        while True:
            await wait_readable(out)
            if not (data := out.read(_READ_BYTES)):
                return
            rate.spend(len(data))
            if wait_s := rate.wait_s():
                await asyncio.sleep(wait_s)
            if (waiting := output(data)) is not None:
                await waiting
