"""Native programs: `run` makes a sandbox, and joins it to a spec."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, Final

from anyio import wait_readable, wait_writable

from wetware import rpc
from wetware.base.bounds import TokenBucket
from wetware.base.finding import error, ok, warning
from wetware.base.threads import in_daemon, to_its_end
from wetware.errors import InvalidArgument, NotFound, Unsupported, WetwareError
from wetware_proc.driver import CodeRefused, Exit, Image, Limits, Output, Pipe, Spec
from wetware_proc.native import cgroup, seccomp
from wetware_proc.native.ports import Ports, PortServant
from wetware_proc.native.sandbox import Sandbox, bwrap
from wetware_proc.native.starter import landlocked

if TYPE_CHECKING:
    from io import FileIO

    from wetware.hookspecs import Finding

KIND: Final = "native"
_READ_BYTES: Final = 64 << 10
_STREAMS_MAX: Final = 16
_SPENT_S: Final = 0.05  # between two looks at the time that it used
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
        for name in ("memory_bytes", "cpu_s"):
            if getattr(spec.limits, name) and name not in cgroup.enforced():
                raise Unsupported(
                    f"the limit {name} cannot be enforced on a native program here: without a "
                    "control group the kernel limits each of its processes by itself",
                    hint="leave it out, and there is none; or run it as WebAssembly; or have "
                    "control groups delegated to the node, see `ww doctor`",
                    code="unsupported.limit",
                )

    async def run(self, spec: Spec) -> Exit:
        """See Image. Raises as `check`, DriverUnavailable, LimitExceeded."""
        self.check(spec)
        with contextlib.ExitStack() as held:
            ours, theirs = map(held.enter_context, socket.socketpair())
            group = None
            if spec.limits.memory_bytes or spec.limits.cpu_s:
                group = cgroup.Group(spec.limits.memory_bytes)
                held.callback(group.close)
            sandbox = Sandbox(
                spec.args[1:],
                env=spec.env,
                dirs=spec.dirs,
                tmp_bytes=spec.limits.tmp_bytes if spec.limits.tmp_files else 0,
                way_out=theirs,
            )
            held.callback(sandbox.close)
            theirs.close()
            return await _life(sandbox, group, spec, ours)


async def probe() -> list[Finding]:
    """Whether a program can be run here, for `ww doctor`."""
    spec = Spec(args=("probe", "true"), limits=Limits(memory_bytes=0, cpu_s=0, wall_s=_PROBE_S))
    try:
        end = await NativeImage().run(spec)
    except WetwareError as exc:
        return [error(_CHECK, exc.message, exc.hint)]
    if end.code != 0:
        return [error(_CHECK, f"`true` {end.kind} {end.code} in a sandbox", "see the log")]
    has = [bwrap()]
    if seccomp.program():
        has.append("a filter of system calls")
    if landlocked():
        has.append("Landlock")
    names = {"memory_bytes": "memory", "cpu_s": "processor time"}
    enforced = [name for field, name in names.items() if field in cgroup.enforced()]
    limited = ", ".join(["time", "processes", "files", "/tmp", *enforced])  # noqa: S108  # its own
    found = [ok(_CHECK, f"bubblewrap works ({', '.join(has)}); limited: {limited}")]
    if missing := [name for name in names.values() if name not in enforced]:
        found.append(
            warning(
                _CHECK,
                f"the {' and the '.join(missing)} of a native program cannot be limited on "
                "this machine: whoever may run one may use all of it",
                "give the service `native` to whom you would give an account; a limit that is "
                "asked for is refused. Or have control groups delegated to the node: "
                "`Delegate=yes` in its unit of systemd",
            )
        )
    return found


async def _life(
    sandbox: Sandbox, group: cgroup.Group | None, spec: Spec, way_out: socket.socket
) -> Exit:
    ports = Ports(sandbox)
    tasks: list[asyncio.Task[None]] = []
    why = ""

    async def spend(group: cgroup.Group) -> None:
        nonlocal why
        try:
            while (left_s := spec.limits.cpu_s - group.cpu_s) > 0:  # noqa: ASYNC110  # no event
                await asyncio.sleep(max(left_s / (os.cpu_count() or 1), _SPENT_S))
            why = "cpu_s"
        finally:
            sandbox.kill()

    try:
        await sandbox.ready()
        if group is not None:
            await to_its_end(in_daemon(group.add, sandbox.pid))  # the kernel may take its time
        for name, number in spec.ports.items():
            spec.offer(name, PortServant(ports, number))
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
        if group is not None and spec.limits.cpu_s:
            tasks.append(asyncio.ensure_future(spend(group)))
        try:
            async with asyncio.timeout(spec.limits.wall_s):
                await sandbox.over()
        except TimeoutError:
            why = "wall_s"
        sandbox.kill()  # what it has left behind
        await asyncio.gather(*outs)
    finally:
        sandbox.kill()
        for task in tasks:
            task.cancel()
        code = await to_its_end(_end(sandbox, ports, tasks))
    for task in outs:
        task.result()  # a defect of an output is raised
    if group is not None and group.out_of_memory:
        why = "memory_bytes"
    cpu_s = sandbox.cpu_s if group is None else group.cpu_s
    if why:
        return Exit("limit", why=why, cpu_s=cpu_s)
    if code is None:
        raise CodeRefused(f"{spec.args[1]!r} could not be started: its stderr says why")
    return Exit("exited", code, cpu_s=cpu_s)


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


class GrantedServant(rpc.Servant, interface=rpc.WW.Granted):
    """What a program has of its node: its grants, and a place for what it offers. See ww.capnp.

    It is the first object on the one socket that the program inherits. Whoever has that socket has
    just this: there is no method here to log in, to share or to redeem, or to reach another node.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec

    async def services(self) -> dict[str, Any]:
        found = [
            {"name": name, "interface": _interface(ref).name, "methods": ["*"]}
            for name, ref in sorted(self._spec.grants.items())
        ]
        return {"services": found}

    async def open(self, name: str) -> dict[str, Any]:
        ref = self._spec.grants.get(name)
        if ref is None:
            raise NotFound(
                f"this program was given nothing named {name[:64]!r}",
                hint=f"it has: {', '.join(sorted(self._spec.grants)) or 'nothing'}",
                code="not_found.grant",
            )
        return {"service": ref, "interface": _interface(ref).id}

    async def export(self, name: str, cap: rpc.Ref | None, interface: int) -> None:
        if cap is None:
            raise InvalidArgument("what is offered has a capability")
        if (known := rpc.known(interface)) is None:
            raise Unsupported(
                f"the node does not know the interface of {name!r}",
                hint="offer what is of a service that the node has",
                code="unsupported.interface",
            )
        self._spec.offer(name, cap.cast(known))


def _interface(ref: rpc.Ref) -> rpc.Interface:
    assert ref.interface is not None  # noqa: S101  # of a grant
    return ref.interface
