"""`ww audit`: the record of a node's decisions."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wetware.cli.app import (
    Json,
    Styled,
    examples,
    here_only,
    node_data_dir,
    note,
    out,
    out_json,
    run_client,
    stamp,
    usage,
)
from wetware.errors import EXIT_FAILED

if TYPE_CHECKING:
    from wetware.client import Session
    from wetware_audit.chain import Checkpoint

Directory = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Of the log; default: this machine's node's."),
]

audit_app = typer.Typer(
    help="The record of the node's decisions: who got what, what was refused, what ended.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def mount(app: typer.Typer) -> None:
    """Mount the commands."""
    shown = examples("ww audit tail", "ww audit verify")
    app.add_typer(audit_app, name="audit", rich_help_panel="Capabilities", epilog=shown)


@audit_app.command("tail")
def tail_command(
    count: Annotated[int, typer.Option("--lines", "-n", min=1, max=1000, metavar="N")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    event: Annotated[
        str, typer.Option(metavar="NAME", help="Only events that begin so, e.g. call.denied.")
    ] = "",
    grant: Annotated[str, typer.Option(metavar="ID", help="Only about this grant.")] = "",
    principal: Annotated[str, typer.Option(metavar="PRINCIPAL", help="Only of this one.")] = "",
    json: Json = False,
) -> None:
    """Show the last records."""
    from wetware_audit.service import is_about

    def matches(record: dict[str, Any]) -> bool:
        return (
            str(record.get("event", "")).startswith(event)
            and (not grant or is_about(record, grant))
            and principal in ("", record.get("principal"))
        )

    async def work(session: Session) -> None:
        following: Any = session.audit.follow() if follow else nullcontext()
        async with following as records:  # before the old ones: none is missed
            last = 0
            for record in await session.audit.tail(
                count, event=event, grant=grant, principal=principal
            ):
                last = max(last, record.get("seq", 0))
                _print(record, json)
            if follow:
                async for record in records:
                    if record.get("seq", last + 1) > last and matches(record):
                        _print(record, json)

    run_client(work, reconnect=follow)


def _print(record: dict[str, Any], json: bool) -> None:
    if json:
        out(json_module.dumps(record))
        return
    at = stamp(record.get("time_ms", 0) / 1000)
    event = str(record.get("event", "?"))
    rest = " ".join(
        f"{name}={value}"
        for name, value in record.items()
        if name not in ("seq", "time_ms", "event", "hash") and value != ""
    )
    bad = event.endswith((".refused", ".denied", ".revoked", ".withdrawn"))
    out(
        f"{record.get('seq', '-'):>8}  {at}  ",
        Styled(event, "yellow" if bad else None),
        f"  {rest}",
    )


@audit_app.command("show")
def show_command(seq: Annotated[int, typer.Argument(metavar="SEQ", min=1)]) -> None:
    """Show one record."""
    out_json(run_client(lambda session: session.audit.show(seq)))


@audit_app.command("verify")
def verify_command(
    directory: Directory = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Signed checkpoints kept elsewhere: a file, or the text; repeatable.",
        ),
    ] = None,
    node: Annotated[
        str, typer.Option("--of", metavar="PEER", help="It has to be the log of this node.")
    ] = "",
    json: Json = False,
) -> None:
    """Check that no record was changed, dropped, inserted or moved. Needs no running node.

    The log alone shows tampering by somebody who cannot write all of it anew. With --checkpoint,
    of which other nodes and `ww audit checkpoint` have copies, also a log that was rewritten or
    cut off.
    """
    here_only("ww audit verify")
    from wetware.identity import PeerId
    from wetware_audit.verify import verify

    started = time.monotonic()

    def progress(records: int) -> None:
        if sys.stderr.isatty():
            note(f"{records} records …")

    report = verify(
        _log_dir(directory),
        node=PeerId.parse(node) if node else None,
        checkpoints=[c for text in checkpoint or () for c in _checkpoints(text)],
        progress=progress,
    )
    if json:
        out_json({**asdict(report), "ok": report.ok})
    else:
        for problem in report.problems:
            place = f"{problem.file or 'the log'}{f', record {problem.seq}' * bool(problem.seq)}"
            out(Styled("wrong", "red"), f"  {place}: {problem.what}")
        for text in report.notes:
            out(f"note   {text}")
        word = Styled("whole", "green") if report.ok else Styled("tampered with or damaged", "red")
        out(
            f"the log {report.log} of {report.node}, records {report.first} to {report.last}: ",
            word,
            f" ({report.records} records, {report.checkpoints} checkpoints, "
            f"{time.monotonic() - started:.1f} s)",
        )
        if report.ok and not report.checkpoints:
            note("no checkpoint was compared: a log that was rewritten whole looks like this, too")
    if not report.ok:
        raise SystemExit(EXIT_FAILED)


def _log_dir(directory: Path | None) -> Path:
    return directory if directory is not None else node_data_dir() / "plugins" / "audit"


def _checkpoints(text: str) -> Sequence[Checkpoint]:
    from wetware_audit.chain import Checkpoint, lines

    if text.lstrip().startswith("{"):
        return [Checkpoint.parse(text)]
    path = Path(text)
    if not path.is_file():
        usage(f"there is no file {text}", "`ww audit checkpoint > FILE` makes one")
    found = [Checkpoint.parse(line) for line in lines(path) if line.strip()]
    if not found:
        usage(f"{text} holds no checkpoint", "`ww audit checkpoint > FILE` makes one")
    return found


@audit_app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file; - is stdout.")],
    directory: Directory = None,
    since: Annotated[int, typer.Option("--from", min=1, metavar="SEQ")] = 1,
    until: Annotated[int, typer.Option("--to", min=0, metavar="SEQ", help="0: the last.")] = 0,
) -> None:
    """Write the records, one line of JSON each, as they are in the log. Needs no running node."""
    from wetware_audit.chain import files, lines, seq_of

    count = 0
    found = files(_log_dir(directory))
    if not found:
        usage(f"there is no audit log in {_log_dir(directory)}", "name it with --dir")
    stdout = str(file) == "-"
    with nullcontext(sys.stdout.buffer) if stdout else _new_file(file) as target:
        for path in found:
            for line in lines(path):
                if seq_of(line) >= since and (not until or seq_of(line) <= until):
                    target.write(line + b"\n")
                    count += 1
        target.flush()
    note(f"{count} records")


def _new_file(path: Path) -> Any:
    import os

    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.fdopen(os.open(path, flags, 0o600), "wb")
    except FileExistsError:
        usage(f"{path} exists already", "choose another name")


@audit_app.command("checkpoint")
def checkpoint_command(
    of: Annotated[
        str,
        typer.Option(
            metavar="PEER",
            help="What this node knows of the log of another one; 'all' for every node.",
        ),
    ] = "",
) -> None:
    """Print the node's signed word on what its log is now. Keep it somewhere else."""

    async def work(session: Session) -> list[Checkpoint]:
        if of:
            found: list[Checkpoint] = await session.audit.checkpoints("" if of == "all" else of)
            return found
        return [await session.audit.checkpoint()]

    found = run_client(work)
    for checkpoint in found:
        out(checkpoint.text)
    if not found:
        note("this node has heard of none; members tell each other every minute")
