"""`ww blob`, through the client library."""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from wetware.cli.app import (
    Json,
    confirm,
    done,
    examples,
    note,
    out,
    out_json,
    pairs,
    printable,
    run_client,
    stamp,
    table,
    usage,
)
from wetware.cli.streams import output_failed
from wetware.errors import (
    EXIT_FAILED,
    CapabilityError,
    InvalidArgument,
    NotFound,
    WetwareError,
)

if TYPE_CHECKING:
    from wetware.client import Session
    from wetware_blob.client import Pin, Put, Report, Terms

PINS_FILE: Final = "pins.json"
"""Of a backup."""
PINS_FILE_BYTES_MAX: Final = 64 << 20

blob_app = typer.Typer(
    help="Files and directories, kept by the members of the cluster under their CIDs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
pin_app = typer.Typer(help="What is kept, and how.", no_args_is_help=True, rich_markup_mode=None)
blob_app.add_typer(pin_app, name="pin")


def mount(app: typer.Typer) -> None:
    """Mount the commands."""
    shown = examples("ww blob put photo.tar --replicas 3", "ww blob get CID", "ww blob ls")
    app.add_typer(blob_app, name="blob", rich_help_panel="Services", epilog=shown)


CidPath = Annotated[str, typer.Argument(metavar="CID[/PATH]", help="A CID, or what is below one.")]
CidOnly = Annotated[str, typer.Argument(metavar="CID")]
Name = Annotated[str, typer.Option("--name", metavar="TEXT", help="What the pin is called.")]
Replicas = Annotated[
    int, typer.Option("--replicas", min=0, max=16, metavar="N", help="Members that keep it.")
]
On = Annotated[
    str, typer.Option("--on", metavar="SELECTOR", help="Members that may, e.g. zone=home.")
]
Ack = Annotated[
    int,
    typer.Option("--ack", min=0, max=16, metavar="N", help="Return when so many have it on disk."),
]
Public = Annotated[bool, typer.Option("--public", help="Tell the DHT who has it.")]
Local = Annotated[bool, typer.Option("--local", help="Only what the node itself has.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Where to write it.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


@contextlib.contextmanager
def watched(what: str) -> Iterator[Report | None]:
    """A bar with rate and remaining time, on stderr; nothing where that is no terminal."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        tasks: list[Any] = []

        def report(at: Any) -> None:
            total = at.total or None
            shown = printable(at.doing).replace("\n", " ")[:60] or what
            if not tasks:  # what an earlier attempt left is no speed
                tasks.append(bar.add_task(shown, total=total, completed=at.bytes))
            bar.update(tasks[0], description=shown, total=total, completed=at.bytes)

        yield report


def size_text(count: int) -> str:
    """A number of bytes for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def counted(count: int, what: str) -> str:
    """As in "1 pin", and "2 pins"."""
    return f"{count} {what}{'s' * (count != 1)}"


def _tell_put(put: Put, as_json: bool) -> None:
    if as_json:
        return out_json(put)
    out(put.cid)
    copies = f", {put.copies} copies" if put.copies > 1 else ""
    note(f"{size_text(put.bytes)}{copies}; at any member: ww blob get {put.cid}")


# --- in and out -----------------------------------------------------------------------------------


@blob_app.command("put", epilog=examples("ww blob put photo.tar --replicas 3 --ack 2"))
def put_command(
    what: Annotated[str, typer.Argument(metavar="FILE|DIR|-", help="'-': standard input.")],
    name: Name = "",
    replicas: Replicas = 0,
    on: On = "",
    ack: Ack = 0,
    public: Public = False,
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How it is cut into blocks: unixfs-v1-2025, unixfs-v0-2015."
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Put a file or directory, and pin it; prints its CID."""
    file = os.fsencode(Path(os.path.abspath(what)).name).decode(errors="replace")
    called = name or ("" if what == "-" else file)
    terms = _terms(called, replicas, on, ack, public)

    async def work(session: Session) -> Put:
        with watched("sending") as progress:
            if what != "-" and Path(what).is_dir():  # noqa: ASYNC240  # before anything runs
                return await session.blob.put_dir(what, profile=profile, progress=progress, **terms)
            with _source(what) as source:
                return await session.blob.put(source, profile=profile, progress=progress, **terms)

    _tell_put(run_client(work), json)


def _terms(name: str, replicas: int, on: str, ack: int, public: bool) -> Terms:
    if ack > max(replicas, 1):
        raise InvalidArgument(
            f"--ack {ack} waits for more members than --replicas {replicas} has",
            hint=f"--replicas {ack}",
        )
    return {"name": name, "copies": replicas, "where": on, "ack": ack, "public": public}


@contextlib.contextmanager
def _source(what: str) -> Iterator[Any]:
    """What `put` takes: a path, or a stream where reading may have to wait for somebody."""
    from wetware_blob import disk

    if what == "-":
        yield disk.Pipe(0)
    elif Path(what).is_file() or not Path(what).exists():
        yield what
    else:
        with disk.reading(what), open(what, "rb", buffering=0) as file:
            yield disk.Pipe(file.fileno())


@blob_app.command("get")
def get_command(
    cid: CidPath,
    output: Output = None,
    local: Local = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a file or directory here, whole or not at all.

    It is called as its CID, or as the last name of the path, unless -o says otherwise. Where that
    was interrupted by an error, the same command goes on from there.
    """
    path = output or Path(cid.rstrip("/").rpartition("/")[2])

    async def work(session: Session) -> Any:
        with watched("getting") as progress:
            return await session.blob.get(cid, path, local=local, force=force, progress=progress)

    got = run_client(work)
    done(json, {"path": path, "kind": got.kind, "size": got.size}, f"wrote {path}")


@blob_app.command("cat", epilog=examples("ww blob cat CID --range 0:1000"))
def cat_command(
    cid: CidPath,
    range_: Annotated[
        str,
        typer.Option("--range", metavar="A:B", help="The bytes from A up to B; either may lack."),
    ] = "",
    local: Local = False,
) -> None:
    """Write a file to standard output."""
    start, end = parse_range(range_)

    async def work(session: Session) -> None:
        from wetware_blob import disk

        async with (
            session.blob.open(cid, local=local) as blob,
            await blob.stream(start, end) as stream,
        ):
            async for data in disk.chunks(stream):
                try:
                    await disk.in_daemon(disk.write_all, sys.stdout.fileno(), data)
                except OSError as exc:
                    output_failed(exc)

    run_client(work)


def parse_range(text: str) -> tuple[int, int]:
    """The two ends of "A:B"; raises InvalidArgument."""
    ends = [end.strip() for end in (text or ":").split(":")]
    if len(ends) != 2 or not all(end == "" or (end.isascii() and end.isdigit()) for end in ends):
        raise InvalidArgument(
            f"{text!r} is no range of bytes", hint="--range 0:1000, --range 1000:"
        )
    start, end = int(ends[0] or 0), int(ends[1] or (1 << 64) - 1)
    if not start <= end < 1 << 64:
        raise InvalidArgument(f"the range {text!r} ends before it begins", hint="--range 0:1000")
    return start, end


@blob_app.command("export")
def export_command(
    cid: CidPath,
    car: Annotated[bool, typer.Option("--car", help="As a CAR v1, the one form there is.")] = True,
    output: Output = None,
    local: Local = False,
    force: Force = False,
) -> None:
    """Write all blocks as a CAR file, CID.car unless -o says otherwise."""
    path = output or Path(cid.rstrip("/").rpartition("/")[2] + ".car")

    async def work(session: Session) -> None:
        with watched("exporting") as progress:
            await session.blob.export_car(cid, path, local=local, force=force, progress=progress)

    run_client(work)
    note(f"wrote {path}")


@blob_app.command("import")
def import_command(
    file: Annotated[str, typer.Argument(metavar="CAR|-", help="'-': standard input.")],
    name: Name = "",
    replicas: Replicas = 0,
    on: On = "",
    ack: Ack = 0,
    public: Public = False,
    json: Json = False,
) -> None:
    """Take the blocks of a CAR file, and pin its root; prints its CID."""
    terms = _terms(name, replicas, on, ack, public)

    async def work(session: Session) -> Put:
        with watched("importing") as progress, _source(file) as source:
            return await session.blob.import_car(source, progress=progress, **terms)

    _tell_put(run_client(work), json)


# --- looking --------------------------------------------------------------------------------------


@blob_app.command("stat")
def stat_command(cid: CidPath, local: Local = False, json: Json = False) -> None:
    """What a CID is, and your pins of it."""

    async def work(session: Session) -> tuple[str, Any, list[Pin]]:
        async with session.blob.open(cid, local=local) as blob:
            info, pins = await blob.info(), []
            with contextlib.suppress(CapabilityError):  # one blob may be all that was shared
                pins = await session.blob.pins(blob.cid)
            return blob.cid, info, pins

    at, info, pins = run_client(work)
    if json:
        return out_json({"cid": at, "kind": info.kind, "size": info.size, "pins": pins})
    pairs(("cid", at), ("kind", info.kind), ("size", f"{info.size} ({size_text(info.size)})"))
    for pin in pins:
        at = ", ".join(one_line(peer)[-8:] for peer in pin.holders)  # as `ww ls` shows them
        kept = f"{len(pin.holders)} of {max(pin.copies, 1)} copies, at {at}"
        damaged = f", {pin.damaged} blocks are damaged here" if pin.damaged else ""
        out(f"pin   {one_line(pin.name) or '-'}: {kept}{damaged}")


def one_line(text: str) -> str:
    """A name as it is shown: nothing in it can control a terminal."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


@blob_app.command("ls")
def ls_command(
    cid: Annotated[
        str, typer.Argument(metavar="[CID[/PATH]]", help="A directory; nothing: your pins.")
    ] = "",
    local: Local = False,
    json: Json = False,
) -> None:
    """List a directory, or what you have pinned."""
    if not cid:
        return _list_pins("", everybody=False, json=json)

    async def work(session: Session) -> list[Any]:
        async with session.blob.open(cid, local=local) as blob:
            return [entry async for entry in blob.ls()]

    entries = run_client(work)
    if json:
        return out_json(entries)
    rows = [(e.kind, str(e.size), e.cid, one_line(e.name)) for e in entries]
    table(("kind", "size", "cid", "name"), rows)


@pin_app.command("ls")
def pin_ls_command(
    cid: Annotated[str, typer.Argument(metavar="[CID]")] = "",
    everybody: Annotated[
        bool, typer.Option("--all", help="Of everybody at the node; for operators.")
    ] = False,
    json: Json = False,
) -> None:
    """List pins, the newest first."""
    _list_pins(cid, everybody=everybody, json=json)


def _list_pins(cid: str, *, everybody: bool, json: bool) -> None:
    async def work(session: Session) -> list[Pin]:
        if not everybody:
            return await session.blob.pins(cid)
        return [pin for pin in (await session.blob.all())[0] if cid in ("", pin.root)]

    pins = run_client(work)
    if json:
        return out_json(pins)
    if not pins:
        return note("nothing is pinned; ww blob put FILE")
    table(
        ("cid", "name", "kind", "size", "copies", "since", *(("owner",) if everybody else ())),
        [
            (
                pin.root,
                one_line(pin.name),
                pin.kind + (" (damaged)" if pin.damaged else ""),
                size_text(pin.size),
                f"{len(pin.holders)}/{max(pin.copies, 1)}",
                stamp(pin.created_ms / 1000),
                *((pin.owner,) if everybody else ()),
            )
            for pin in pins
        ],
    )


@blob_app.command("usage")
def usage_command(json: Json = False) -> None:
    """What your pins are charged."""
    usage = run_client(lambda session: session.blob.usage())
    if json:
        return out_json(usage)
    quota = f" of {size_text(usage.quota_bytes)}" if usage.quota_bytes else ""
    pairs(("pins", str(usage.pins)), ("charged", size_text(usage.charged_bytes) + quota))
    if usage.disk_bytes_max:
        disk = f"{size_text(usage.disk_bytes)} of {size_text(usage.disk_bytes_max)}"
        free = size_text(usage.free_bytes)
        pairs(("node", f"{usage.blocks} blocks, {disk}; {free} are free on the disk"))


# --- keeping --------------------------------------------------------------------------------------


@pin_app.command("add")
def pin_add_command(
    cid: CidOnly,
    name: Name = "",
    replicas: Replicas = 0,
    on: On = "",
    ack: Ack = 0,
    public: Public = False,
    json: Json = False,
) -> None:
    """Keep what a CID reaches; a pin of that name is replaced."""
    terms = _terms(name, replicas, on, ack, public)

    async def work(session: Session) -> Put:
        with watched("fetching") as progress:
            return await session.blob.pin(cid, progress=progress, **terms)

    _tell_put(run_client(work), json)


@pin_app.command("rm")
def pin_rm_command(cid: CidOnly, name: Name = "", json: Json = False) -> None:
    """End your pins of a CID, or the one of that name; its blocks go with the next collection."""

    async def work(session: Session) -> int:
        return _some(await session.blob.unpin(cid, name), cid)

    count = run_client(work)
    done(json, {"pins": count}, f"{counted(count, 'pin')} ended")


def _some(count: int, cid: str) -> int:
    if not count:
        raise NotFound(f"you have no such pin of {cid}", hint="ww blob ls")
    return count


@blob_app.command("rm")
def rm_command(cid: CidOnly, json: Json = False) -> None:
    """End all your pins of a CID, and free what nothing keeps any more; says what still does."""

    async def work(session: Session) -> Any:
        removed = await session.blob.rm(cid)
        if not removed.pinned_by:
            _some(removed.pins, cid)
        return removed

    removed = run_client(work)
    kept = [
        f"it is still in {pin.root} ({one_line(pin.name) or 'no name'}): ww blob rm {pin.root}"
        for pin in removed.pinned_by
    ]
    if removed.others:
        kept.append(f"{counted(removed.others, 'pin')} of others: it stays for them")
    said = f"{counted(removed.pins, 'pin')} ended, {size_text(removed.freed_bytes)} freed"
    done(json, removed, said, *kept)


@blob_app.command("gc")
def gc_command(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    drop_damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="First give up the pins that are damaged.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Remove what nothing keeps from the node's disk; for operators.

    It is refused while a pin is damaged: `ww blob verify` names it. One that is given up with
    --drop-damaged is gone for good, here and at the members that keep copies of it.
    """
    if dry_run and drop_damaged:
        usage("--drop-damaged gives up pins: with --dry-run nothing goes")
    if drop_damaged:
        confirm("Give up all pins that are damaged, here and at members with copies?", yes=yes)
    elif yes:
        usage("--yes is for --drop-damaged")
    found = run_client(lambda session: session.blob.gc(dry_run=dry_run, drop_damaged=drop_damaged))
    verb = "would be removed" if dry_run else "removed"
    kept = f"{counted(found.kept_blocks, 'block')} kept, {size_text(found.kept_bytes)}"
    said = f"{counted(found.blocks, 'block')} {verb}, {size_text(found.bytes)}"
    dropped = (f"given up: {one_line(name)}" for name in found.dropped)
    done(json, found, f"{said}; {kept}", *dropped)


@blob_app.command("drain")
def drain_command() -> None:
    """Hand all that is pinned at the node to other members, before it leaves for good.

    It returns when as many others have each of it as are wanted. The node stays, and takes no
    copies until it is started again; `ww evict --hand-over` evicts it, too. For operators.
    """
    run_client(lambda session: session.blob.drain())
    note("all that is pinned there is at other members; it takes no copies until its next start")


@blob_app.command("verify")
def verify_command(json: Json = False) -> None:
    """Read all that the node has, and say what is damaged; for operators.

    What another member has is mended from there. Fails if something stays damaged.
    """

    async def work(session: Session) -> bool:
        whole = True
        async with session.blob.verify() as findings:
            async for found in findings:
                if json:
                    out(json_module.dumps(found))
                if found.get("what") == "end":
                    if not json:
                        counts = (f"{k} {v}" for k, v in found.items() if k != "what")
                        note(one_line(", ".join(counts)))
                    return whole
                whole = whole and bool(found.get("mended"))
                if not json:
                    state = "mended" if found.get("mended") else "damaged"
                    roots = " ".join(map(str, found.get("roots") or ()))
                    text = f"{found.get('what')} {found.get('name')} {roots}"
                    out(f"{state}  {one_line(text.strip())}")
        raise WetwareError("the node ended the verification", hint="ww blob verify")

    if not run_client(work):
        raise SystemExit(EXIT_FAILED)


# --- backups --------------------------------------------------------------------------------------


@blob_app.command("backup")
def backup_command(directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write what is pinned at the node: a CAR for each CID, and pins.json; for operators.

    CARs that are there from an earlier backup are not written again.
    """

    async def work(session: Session) -> tuple[int, list[str]]:
        from wetware.identity import replace_private_file
        from wetware_blob import disk

        pins, _ = await session.blob.all()
        with disk.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        failed: list[str] = []
        for cid in dict.fromkeys(pin.root for pin in pins):
            if not (cid.isascii() and cid.isalnum()):
                raise InvalidArgument(f"{cid!r} is no CID", code="invalid.cid")
            path = directory / f"{cid}.car"
            if path.exists():  # a look that takes no time
                continue
            try:
                with watched(cid) as progress:
                    await session.blob.export_car(cid, path, progress=progress)
            except NotFound as exc:
                failed.append(f"{cid}: {exc.message}")
        saved = [
            {"root": p.root, "name": p.name, "owner": p.owner, "copies": p.copies,
             "where": p.where, "public": p.public}
            for p in pins
        ]  # fmt: skip
        with disk.writing(directory):
            replace_private_file(directory / PINS_FILE, json_module.dumps(saved).encode())
        return len(pins), failed

    count, failed = run_client(work)
    note(f"{counted(count, 'pin')} in {directory}")
    if failed:
        raise WetwareError("not in the backup: " + "; ".join(failed), hint="ww blob verify")


@blob_app.command("restore")
def restore_command(directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Put what a backup has, and pin it again; the pins are yours then, whoever had them."""
    saved = read_pins(directory)

    async def work(session: Session) -> None:
        present: set[str] = set()
        for root, terms in reversed(saved):  # the newest comes last, as it did
            with watched(root) as progress:
                if root in present:
                    await session.blob.pin(root, progress=progress, **terms)
                    continue
                path = directory / f"{root}.car"
                put = await session.blob.import_car(path, progress=progress, **terms)
                if put.cid != root:
                    raise InvalidArgument(f"{path} has another root: {put.cid}")
                present.add(root)

    run_client(work)
    note(f"{counted(len(saved), 'pin')} restored; ww blob ls")


def read_pins(directory: Path) -> list[tuple[str, Terms]]:
    """The pins of a backup; raises InvalidArgument."""
    from wetware_blob import disk

    path = directory / PINS_FILE
    with disk.reading(path), path.open("rb") as file:
        data = file.read(PINS_FILE_BYTES_MAX + 1)
    try:
        if len(data) > PINS_FILE_BYTES_MAX:
            raise ValueError("too long")  # noqa: TRY301  # one error for all
        found: list[tuple[str, Terms]] = []
        for pin in json_module.loads(data):
            root: str = pin["root"]
            if not (root.isascii() and root.isalnum()):
                raise ValueError("no CID")  # noqa: TRY301
            terms = _terms(str(pin["name"]), int(pin["copies"]), str(pin["where"]), 0, False)
            terms["public"] = bool(pin["public"])
            found.append((root, terms))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise InvalidArgument(
            f"{path} is not what `ww blob backup` writes", hint="ww blob backup DIR"
        ) from exc
    return found
