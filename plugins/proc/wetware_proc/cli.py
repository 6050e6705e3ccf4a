"""`ww run`, `ps`, `logs`, `wait`, `restart` and `kill`, through the client library."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, TypeVar

import typer
from typer.core import TyperCommand

from wetware.base.threads import in_daemon
from wetware.cli.app import (
    Json,
    done,
    examples,
    note,
    out,
    out_json,
    printable,
    progress_bar,
    run_client,
    stamp,
    table,
)
from wetware.cli.streams import output_failed
from wetware.errors import InvalidArgument, WetwareError

if TYPE_CHECKING:
    from wetware import rpc
    from wetware.client import Session
    from wetware_proc.client import Detached, Exit, Options, Process

T = TypeVar("T")

EXIT_CODES: Final = {"trapped": 134, "limit": 137, "killed": 137}
"""As a shell says of a program that SIGABRT or SIGKILL has ended."""
NATIVE: Final = "wetware_proc.native"
PATIENCE_S: Final = 3.0  # before one hears why a program does not run yet
_READ_BYTES: Final = 64 << 10
Texts = list[str] | None
ProcessId = Annotated[str, typer.Argument(metavar="ID", help="Of `ww ps`, or how it begins.")]


def mount(app: typer.Typer) -> None:
    """Mount the commands."""
    section = "Services"
    plain = {"allow_interspersed_args": False, "ignore_unknown_options": True}
    shown = examples("ww run hello.wasm you", "ww run --on zone=home --memory 16 bafk… < in > out")
    app.command("run", cls=Run, rich_help_panel=section, epilog=shown, context_settings=plain)(
        run_command
    )
    shown = examples("ww ps", "ww ps --all --json")
    app.command("ps", rich_help_panel=section, epilog=shown)(ps_command)
    for name, command, shown in (
        ("kill", kill_command, "ww kill 3f9a0c51d2e4b687"),
        ("restart", restart_command, "ww restart 3f9a"),
        ("wait", wait_command, "ww wait 3f9a"),
        ("logs", logs_command, "ww logs -f 3f9a"),
        ("forward", forward_command, "ww forward 8080 3f9a:web"),
    ):
        app.command(name, rich_help_panel=section, epilog=examples(shown))(command)


class Run(TyperCommand):
    """Keeps whether there was a `--` before the program: then that is one of the machine's."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # typer's
        given = list(args)
        rest = super().parse_args(ctx, args)
        words = 1 + len(ctx.params.get("args") or ())
        ctx.meta[NATIVE] = given[-1 - words : -words] == ["--"]
        return rest


def run_command(
    ctx: typer.Context,
    program: Annotated[
        str,
        typer.Argument(
            metavar="FILE|CID|-- PROGRAM",
            help="A WebAssembly program (WASI preview 1), or Python: .py, .pyz, or name:/NAME, a "
            "name of the cluster; after `--` one of the node's machine.",
        ),
    ],
    args: Annotated[Texts, typer.Argument(metavar="[ARGS]...", help="What it is given.")] = None,
    env: Annotated[
        Texts, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Of its environment.")
    ] = None,
    grant: Annotated[
        Texts,
        typer.Option(
            "--grant", "-g", metavar="NAME=SERVICE:OBJECT[?PARAM=VALUE&…]", help="What it can call."
        ),
    ] = None,
    directory: Annotated[
        Texts,
        typer.Option(
            "--dir",
            metavar="PATH=CID|NAME|DIR",
            help="What it may read at PATH: name:/NAME, a name of the cluster; a directory here; "
            "what a pin of yours is called; a CID. The first that it is.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="TEXT", help="What `ww ps` calls it.")] = "",
    kind: Annotated[
        str, typer.Option(metavar="wasm|python", help="Of a program whose name does not say it.")
    ] = "",
    memory: Annotated[
        int, typer.Option(min=0, metavar="MIB", help="Memory that it may have; 0: as usual.")
    ] = 0,
    time: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds that it may run; 0: as usual.")
    ] = 0,
    cpu: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds of a processor; 0: as usual.")
    ] = 0,
    on: Annotated[
        str,
        typer.Option(metavar="SELECTOR", help='Of these members where there is room; "any": all.'),
    ] = "",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Go on without this command; print its ID.")
    ] = False,
    restart: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="Start it again, without this command: on-failure, always, or never.",
        ),
    ] = "",
    port: Annotated[
        Texts,
        typer.Option("--port", metavar="NAME=NUMBER", help="It listens there; after `--` only."),
    ] = None,
) -> None:
    """Run a program at the node as if it were a local one: its streams are yours, as its exit code.

    It has its arguments, standard streams and grants, and nothing else of yours or of the node. It
    ends with this command. With `--on SELECTOR` it runs where there is room, and you log in there.
    With `--detach` or `--restart` it goes on, survives a restart of the node, and writes to a log.
    After `--` it is a program of the node's machine, where the operator offers the service
    `native`, and `ww forward` leads to its ports.
    """
    directories = variables(directory, "--dir /data=DIR")
    options: Options = {
        "env": variables(env, "--env NAME=VALUE"),
        "grants": variables(grant, "--grant out=pubsub:chat"),
        "name": name or Path(program).name,
        "kind": "native" if ctx.meta[NATIVE] else kind,
        "memory_bytes": memory << 20,
        "wall_s": time,
        "cpu_s": cpu,
        "ports": _ports(port),
    }

    async def work(session: Session) -> Exit | str:
        given = program, *(args or ())
        dirs = options["dirs"] = {
            path: await _dir(session, what) for path, what in directories.items()
        }
        async with contextlib.AsyncExitStack() as stack:
            kind, memory_bytes = options["kind"], options["memory_bytes"]
            there = session.proc.at(on, program, kind=kind, memory_bytes=memory_bytes)
            programs = await stack.enter_async_context(there)
            with progress_bar("sending") if dirs else contextlib.nullcontext() as told, _patience():
                if told is not None:
                    options["progress"] = told
                if detach or restart:
                    policy = restart or "never"
                    return (await programs.start(*given, restart=policy, **options)).id
                process = await stack.enter_async_context(programs.spawn(*given, **options))
            return await attached(process)

    end = run_client(work)
    if isinstance(end, str):
        return out(end)
    ended(program, end)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Say why it takes long, where it does."""
    import asyncio

    said = "the node prepares the program; the first Python program of a node takes it a minute"
    soon = asyncio.get_running_loop().call_later(PATIENCE_S, note, f"ww: {said}")
    try:
        yield
    finally:
        soon.cancel()


def ended(program: str, end: Exit) -> NoReturn:
    """Exit as the program did."""
    if end.kind != "exited":
        note(f"ww: {printable(program)}: {told(end)}")
    raise SystemExit(min(end.code, 255) if end.kind == "exited" else EXIT_CODES.get(end.kind, 1))


def variables(texts: Texts, hint: str) -> dict[str, str]:
    """Of "NAME=VALUE", each; raises InvalidArgument."""
    found = {}
    for text in texts or ():
        name, equals, found[name] = text.partition("=")
        if not (name and equals):
            raise InvalidArgument(f"{text!r} has no name and value", hint=hint)
    return found


async def _dir(session: Session, what: str) -> str:
    """A name, a directory that is here, or else the CID of a blob, which a pin may name."""
    from wetware.base.texts import NAMED

    if what.startswith(NAMED) or Path(what).is_dir():  # noqa: ASYNC240  # a look that takes no time
        return what
    return next((pin.root for pin in await session.blob.pins() if pin.name == what), what)


def _ports(texts: Texts) -> dict[str, int]:
    found = variables(texts, hint := "--port web=8080")
    for number in found.values():
        if not number.isdecimal() or not 0 < int(number) < 1 << 16:
            raise InvalidArgument(f"{number!r} is no number of a port", hint=hint)
    return {name: int(number) for name, number in found.items()}


async def attached(process: Process) -> Exit:
    """Join this program's standard streams to a process's, until it has ended."""
    import asyncio

    feeding = asyncio.ensure_future(_feed(process.stdin))
    try:
        await asyncio.gather(_print(process.stdout, 1), _print(process.stderr, 2))
        return await process.wait()
    finally:
        feeding.cancel()


async def _feed(stdin: rpc.ByteStream) -> None:
    from anyio import ClosedResourceError

    with contextlib.suppress(OSError, WetwareError, ClosedResourceError):  # it need not read all
        while data := await in_daemon(os.read, 0, _READ_BYTES):
            await stdin.send(data)
        await stdin.send_eof()


async def _print(pieces: AsyncIterable[bytes], fd: int) -> None:
    from wetware.base.disk import write_all

    async for data in pieces:
        try:
            await in_daemon(write_all, fd, data)
        except OSError as exc:
            output_failed(exc)


def told(end: Exit) -> str:
    """For people."""
    if not end.kind:
        return "runs"
    if end.kind == "exited":
        return f"exited {end.code}"
    return f"{end.kind}: {printable(end.why)}" if end.why else end.kind


def ps_command(
    everybody: Annotated[bool, typer.Option("--all", help="Of everybody; for operators.")] = False,
    json: Json = False,
) -> None:
    """List your processes in the cluster, those that have ended lately included.

    Each node is asked by a login of yours there; those that do not answer in time are named.
    """
    heard = run_client(lambda session: session.proc.everywhere(all=everybody))
    found = [(member, each) for member, infos in heard.answers for each in infos]
    found.sort(key=lambda pair: -pair[1].started_ms)
    if json:
        at = [
            {"node": str(member.peer_id), "node_name": member.name, **asdict(each)}
            for member, each in found
        ]
        return out_json({"processes": at, "missing": heard.missing})
    owner = ("owner",) if everybody else ()
    again = ("restarts",) if any(each.policy for _, each in found) else ()
    rows = [
        (
            each.id,
            each.name,
            member.name or member.peer_id.short,
            f"waits; {told(each.exit)}" if each.waits else told(each.exit),
            *((f"{each.restarts}, {each.policy}" if each.policy else "-",) if again else ()),
            stamp(each.started_ms / 1000),
            *((each.owner,) if everybody else ()),
        )
        for member, each in found
    ]
    if rows:
        table(("id", "name", "node", "state", *again, "since", *owner), rows)
    else:
        note("no processes; ww run FILE")
    for each in heard.missing:
        note(f"not heard: {each.name or each.node}: {each.why}")


def _of(
    id_: str,
    work: Callable[[Detached], Awaitable[T]],
    *,
    everybody: bool = False,
    reconnect: bool = False,
) -> tuple[str, T]:
    """Work with a process of the user's, or of everybody's, wherever in the cluster it is.

    Returns its whole ID, and what `work` does.
    """

    async def at(session: Session) -> tuple[str, T]:
        async with session.proc.find(id_, anybody=everybody) as process:
            return process.id, await work(process)

    return run_client(at, reconnect=reconnect)


def kill_command(
    id_: ProcessId,
    everybody: Annotated[
        bool, typer.Option("--all", help="Whoever's it is; for operators.")
    ] = False,
    signal: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Send a native program of yours that, e.g. TERM, in place of ending it.",
        ),
    ] = "",
    json: Json = False,
) -> None:
    """End a process of yours in the cluster; nothing more of it happens when this returns."""
    name = signal.upper().removeprefix("SIG")
    if name and everybody:
        raise InvalidArgument("a signal is for a process of yours", hint="leave out --all")

    if name:
        id, _ = _of(id_, lambda process: process.signal(name))
        return done(json, {"id": id, "signal": name}, f"{id} was sent {name}")
    id, _ = _of(id_, lambda it: it.proc.kill(it.id, anybody=everybody), everybody=everybody)
    done(json, {"killed": id}, f"{id} has ended")


def restart_command(id_: ProcessId, json: Json = False) -> None:
    """Have a detached process of yours started again now, whether it runs or waits."""
    started, _ = _of(id_, lambda process: process.restart())
    done(json, {"restarted": started}, f"{started} is started again")


def wait_command(id_: ProcessId) -> None:
    """Wait until a process of yours has ended for good; exits with its code, as `ww run` does."""
    _, end = _of(id_, lambda process: process.wait(), reconnect=True)
    ended(id_, end)


def logs_command(
    id_: ProcessId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until it has ended for good.")
    ] = False,
) -> None:
    """Print what a detached process of yours wrote, on both streams: the last 1 MiB is kept."""

    def missed(nbytes: int) -> None:
        note(f"ww: {nbytes} bytes of the log are missing here: they are not kept any more")

    _of(id_, lambda it: _print(it.logs(follow=follow, missed=missed), 1), reconnect=follow)


def forward_command(
    local: Annotated[
        int, typer.Argument(min=0, max=65535, metavar="LOCAL", help="A port here; 0: any.")
    ],
    what: Annotated[
        str, typer.Argument(metavar="PROCESS:NAME", help="As `ww ps` and `ww run --port` have it.")
    ],
) -> None:
    """Lead connections to a port of this machine's loopback interface to one of a program.

    It goes on until Ctrl-C, or until the program ends.
    """
    id_, colon, name = what.partition(":")
    if not (colon and id_ and name):
        raise InvalidArgument(f"{what!r} is no PROCESS:NAME", hint="ww forward 8080 3f9a…:web")

    async def work(process: Detached) -> None:
        from wetware_proc.native.client import forwarded

        async with forwarded(await process.export(name), local) as number:
            note(f"127.0.0.1:{number} leads to {printable(what)}")
            await process.wait()

    _of(id_, work)
