"""`ww run`, `ww ps` and `ww kill`, through the client library."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from wetware.base.threads import in_daemon
from wetware.cli.app import (
    Json,
    done,
    examples,
    note,
    out_json,
    printable,
    run_client,
    stamp,
    table,
)
from wetware.cli.streams import output_failed
from wetware.errors import InvalidArgument, WetwareError

if TYPE_CHECKING:
    from wetware import rpc
    from wetware.client import Session
    from wetware_proc.client import Exit, Info, Process

EXIT_CODES: Final = {"trapped": 134, "limit": 137, "killed": 137}
"""As a shell says of a program that SIGABRT or SIGKILL has ended."""
_READ_BYTES: Final = 64 << 10


def mount(app: typer.Typer) -> None:
    """Mount the commands."""
    section = "Services"
    plain = {"allow_interspersed_args": False, "ignore_unknown_options": True}
    shown = examples("ww run hello.wasm you", "ww run --memory 16 bafk… < in > out")
    app.command("run", rich_help_panel=section, epilog=shown, context_settings=plain)(run_command)
    shown = examples("ww ps", "ww ps --all --json")
    app.command("ps", rich_help_panel=section, epilog=shown)(ps_command)
    shown = examples("ww kill 3f9a0c51d2e4b687")
    app.command("kill", rich_help_panel=section, epilog=shown)(kill_command)


def run_command(
    program: Annotated[
        str, typer.Argument(metavar="FILE|CID", help="A WebAssembly program (WASI preview 1).")
    ],
    args: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGS]...", help="What it is given.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", metavar="NAME=VALUE", help="Of its environment."),
    ] = None,
    grant: Annotated[
        list[str] | None,
        typer.Option(
            "--grant",
            "-g",
            metavar="NAME=SERVICE:OBJECT",
            help="What it can call.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="TEXT", help="What `ww ps` calls it.")] = "",
    memory: Annotated[
        int, typer.Option(min=0, metavar="MIB", help="Memory that it may have; 0: as usual.")
    ] = 0,
    time: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds that it may run; 0: as usual.")
    ] = 0,
    cpu: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds of a processor; 0: as usual.")
    ] = 0,
) -> None:
    """Run a program at the node as if it were a local one: its streams are yours, as its exit code.

    It has its arguments, standard streams and grants, and nothing else of yours or of the node. It
    ends with this command. With `ww --node NODE run …` it runs there.
    """
    variables = dict(variable(text, "--env NAME=VALUE") for text in env or ())
    wanted = dict(variable(text, "--grant out=pubsub:chat") for text in grant or ())

    async def work(session: Session) -> Exit:
        async with contextlib.AsyncExitStack() as stack:
            code = await stack.enter_async_context(_code(session, program))
            given = {
                name: await stack.enter_async_context(named(session, what))
                for name, what in wanted.items()
            }
            running = session.proc.spawn(
                code,
                *(args or ()),
                env=variables,
                grants=given,
                name=name or Path(program).name,
                memory_bytes=memory << 20,
                wall_s=time,
                cpu_s=cpu,
            )
            return await attached(await stack.enter_async_context(running))

    end = run_client(work)
    if end.kind != "exited":
        note(f"ww: {printable(program)}: {told(end)}")
    raise SystemExit(min(end.code, 255) if end.kind == "exited" else EXIT_CODES.get(end.kind, 1))


def variable(text: str, hint: str) -> tuple[str, str]:
    """Of "NAME=VALUE"; raises InvalidArgument."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InvalidArgument(f"{text!r} has no name and value", hint=hint)
    return name, value


@contextlib.asynccontextmanager
async def _code(session: Session, program: str) -> AsyncIterator[str | rpc.Ref]:
    """A file that is here, or else a blob of the cluster."""
    if Path(program).exists():  # noqa: ASYNC240  # a look that takes no time
        yield program
        return
    try:
        async with session.blob.open(program) as blob:
            yield blob.ref
    except InvalidArgument as exc:
        if exc.code != "invalid.cid":
            raise
        raise InvalidArgument(
            f"there is no file {program!r}, and no CID is written like that",
            hint="ww run hello.wasm, or ww run CID of what `ww blob put` has put",
        ) from exc


@contextlib.asynccontextmanager
async def named(session: Session, text: str) -> AsyncIterator[rpc.Ref]:
    """The capability of "SERVICE:OBJECT", or of "SERVICE", under a grant of its own."""
    from wetware.client.installed import known_interface

    service, colon, name = text.partition(":")
    weaker = await session.attenuate({text: ()}, label=f"process: {text}"[:128])
    try:
        interface = known_interface(service)
        if interface is None:
            raise InvalidArgument(f"the interface of the service {service!r} is not known here")
        ref = await weaker.open(service, interface)
        if not colon:
            yield ref
            return
        for method in interface.methods.values():
            if method.named and len(method.gives) == 1 and set(method.params) == {method.named}:
                (given,) = (await ref.call(method.name, **{method.named: name})).values()
                yield given
                return
        raise InvalidArgument(
            f"the service {service!r} has no objects with names", hint=f"grant {service!r}"
        )
    finally:
        await weaker.close()


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


async def _print(stream: rpc.ByteStream, fd: int) -> None:
    from wetware.base.disk import write_all

    async for data in stream:
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
    everybody: Annotated[
        bool, typer.Option("--all", help="Of everybody at the node; for operators.")
    ] = False,
    json: Json = False,
) -> None:
    """List your processes at the node, those that have ended lately included."""
    found: list[Info] = run_client(lambda session: session.proc.processes(all=everybody))
    if json:
        return out_json(found)
    if not found:
        return note("no processes; ww run FILE")
    owner = ("owner",) if everybody else ()
    rows = [
        (
            each.id,
            printable(each.name).replace("\n", "\\n"),
            told(each.exit),
            stamp(each.started_ms / 1000),
            *((each.owner,) if everybody else ()),
        )
        for each in found
    ]
    table(("id", "name", "state", "since", *owner), rows)


def kill_command(
    id_: Annotated[str, typer.Argument(metavar="ID", help="As `ww ps` shows it.")],
    everybody: Annotated[
        bool, typer.Option("--all", help="Whoever's it is; for operators.")
    ] = False,
    json: Json = False,
) -> None:
    """End a process of yours at the node; nothing more of it happens when this returns."""
    run_client(lambda session: session.proc.kill(id_, anybody=everybody))
    done(json, {"killed": id_}, f"{printable(id_)} has ended")
