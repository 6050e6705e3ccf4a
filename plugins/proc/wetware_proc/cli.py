"""`ww run`, `ww ps` and `ww kill`, through the client library."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
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
    from wetware_proc.client import Blob, Exit, Process

EXIT_CODES: Final = {"trapped": 134, "limit": 137, "killed": 137}
"""As a shell says of a program that SIGABRT or SIGKILL has ended."""
_READ_BYTES: Final = 64 << 10


def mount(app: typer.Typer) -> None:
    """Mount the commands."""
    section = "Services"
    plain = {"allow_interspersed_args": False, "ignore_unknown_options": True}
    shown = examples("ww run hello.wasm you", "ww run --on zone=home --memory 16 bafk… < in > out")
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
    on: Annotated[
        str,
        typer.Option(metavar="SELECTOR", help='Of these members where there is room; "any": all.'),
    ] = "",
) -> None:
    """Run a program at the node as if it were a local one: its streams are yours, as its exit code.

    It has its arguments, standard streams and grants, and nothing else of yours or of the node. It
    ends with this command. With `--on SELECTOR` it runs where there is room, and you log in there.
    """
    variables = dict(variable(text, "--env NAME=VALUE") for text in env or ())
    wanted = dict(variable(text, "--grant out=pubsub:chat") for text in grant or ())

    @contextlib.asynccontextmanager
    async def spawned(session: Session) -> AsyncIterator[Process]:
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
            yield await stack.enter_async_context(running)

    async def work(session: Session) -> Exit:
        from wetware_proc.placement import nodes, placed

        running = spawned(session)
        if on:
            rooms = await nodes(
                session, on, programs=[await _digest(program)], memory_bytes=memory << 20
            )
            running = placed(session, on, rooms, spawned)
        async with running as process:
            return await attached(process)

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


async def _digest(program: str) -> str:
    """What members know it by that have prepared it."""
    import hashlib

    if not Path(program).is_file():  # noqa: ASYNC240  # a look that takes no time
        return program
    with open(program, "rb") as file:  # noqa: ASYNC230  # nothing else goes on
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.asynccontextmanager
async def _code(session: Session, program: str) -> AsyncIterator[str | Blob]:
    """A file that is here, or else a blob of the cluster."""
    if Path(program).exists():  # noqa: ASYNC240  # a look that takes no time
        yield program
        return
    try:
        async with session.blob.open(program) as blob:
            yield blob
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
    rows = [
        (
            each.id,
            each.name,
            member.name or member.peer_id.short,
            told(each.exit),
            stamp(each.started_ms / 1000),
            *((each.owner,) if everybody else ()),
        )
        for member, each in found
    ]
    if rows:
        table(("id", "name", "node", "state", "since", *owner), rows)
    else:
        note("no processes; ww run FILE")
    for each in heard.missing:
        note(f"not heard: {each.name or each.node}: {each.why}")


def kill_command(
    id_: Annotated[str, typer.Argument(metavar="ID", help="Of `ww ps`, or how it begins.")],
    everybody: Annotated[
        bool, typer.Option("--all", help="Whoever's it is; for operators.")
    ] = False,
    json: Json = False,
) -> None:
    """End a process of yours in the cluster; nothing more of it happens when this returns."""

    async def work(session: Session) -> str:
        from wetware_proc.placement import where

        async with where(session, id_, anybody=everybody) as (there, id):
            await there.proc.kill(id, anybody=everybody)
            return id

    ended = run_client(work)
    done(json, {"killed": ended}, f"{ended} has ended")
