"""`ww blob`, through the client library."""

from __future__ import annotations

import contextlib
import json as json_module
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from wetware.base.finding import counted, size
from wetware.base.threads import in_daemon
from wetware.cli.app import (
    Json,
    confirm,
    done,
    examples,
    note,
    out,
    out_json,
    pairs,
    progress_bar,
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
from wetware_blob.names import shown

if TYPE_CHECKING:
    from wetware.client import Session
    from wetware_blob.client import BlobStore, Entry, Pin, Put, Report, Terms

T = TypeVar("T")

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


CidPath = Annotated[
    str,
    typer.Argument(
        metavar="CID[/PATH]", help="A CID, or what is below one; or name:/NAME[//PATH], a name."
    ),
]
CidOnly = Annotated[str, typer.Argument(metavar="CID", help="Or name:/NAME.")]
Name = Annotated[str, typer.Option("--name", metavar="TEXT", help="What the pin is called.")]
Local = Annotated[bool, typer.Option("--local", help="Only what the node itself has.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Where to write it.")
]
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
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def _terms(name: str, replicas: int, on: str, ack: int, public: bool) -> Terms:
    if ack > max(replicas, 1):
        raise InvalidArgument(
            f"--ack {ack} waits for more members than --replicas {replicas} has",
            hint=f"--replicas {ack}",
        )
    return {"name": name, "copies": replicas, "where": on, "ack": ack, "public": public}


def _watched(doing: str, work: Callable[[BlobStore, Report | None], Awaitable[T]]) -> T:
    async def watched(session: Session) -> T:
        with progress_bar(doing) as progress:
            return await work(session.blob, progress)

    return run_client(watched)


def _tell_put(put: Put, as_json: bool) -> None:
    if as_json:
        return out_json(put)
    out(put.cid)
    copies = f", {put.copies} copies" if put.copies > 1 else ""
    note(f"{size(put.bytes)}{copies}; at any member: ww blob get {put.cid}")


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
    if what != "-" and not name:
        file = os.path.basename(os.path.abspath(what))
        name = os.fsencode(file).decode(errors="replace")
    terms = _terms(name, replicas, on, ack, public)
    _put(what, "sending", json, profile=profile, **terms)


def _put(what: str, doing: str, json: bool, **how: Any) -> None:
    source = 0 if what == "-" else what
    _tell_put(_watched(doing, lambda blob, to: blob.put(source, progress=to, **how)), json)


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
    got = _get("getting", cid, path, local=local, force=force)
    done(json, {"path": path, "kind": got.kind, "size": got.size}, f"wrote {path}")


def _get(doing: str, cid: str, path: Path, **how: bool) -> Entry:
    return _watched(doing, lambda blob, to: blob.get(cid, path, progress=to, **how))


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
        from wetware.base.disk import write_all
        from wetware_blob.pieces import CHUNK_BYTES, batches, pieces

        async with (
            session.blob.open(cid, local=local) as blob,
            await blob.stream(start, end) as stream,
        ):
            async for batch in batches(pieces(stream), CHUNK_BYTES, len):
                try:
                    await in_daemon(write_all, sys.stdout.fileno(), b"".join(batch))
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
    _get("exporting", cid, path, car=True, local=local, force=force)
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
    _put(file, "importing", json, car=True, **_terms(name, replicas, on, ack, public))


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
    pairs(("cid", at), ("kind", info.kind), ("size", f"{info.size} ({size(info.size)})"))
    for pin in pins:
        at = ", ".join(shown(peer)[-8:] for peer in pin.holders)  # as `ww ls` shows them
        kept = f"{len(pin.holders)} of {max(pin.copies, 1)} copies, at {at}"
        out(f"pin   {shown(pin.name) or '-'}: {kept}")


@blob_app.command("ls")
def ls_command(
    cid: Annotated[
        str,
        typer.Argument(
            metavar="[CID[/PATH]]", help="A directory, or name:/NAME; nothing: your pins."
        ),
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
    rows = [(e.kind, str(e.size), e.cid, shown(e.name)) for e in entries]
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
        root = await session.blob.resolve(cid)
        return [pin for pin in (await session.blob.all())[0] if root in ("", pin.root)]

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
                shown(pin.name),
                pin.kind,
                size(pin.size),
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
    quota = f" of {size(usage.quota_bytes)}" if usage.quota_bytes else ""
    pairs(("pins", str(usage.pins)), ("charged", size(usage.charged_bytes) + quota))
    if usage.disk_bytes_max:
        disk = f"{size(usage.disk_bytes)} of {size(usage.disk_bytes_max)}"
        free = size(usage.free_bytes)
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
    _tell_put(_watched("fetching", lambda blob, to: blob.pin(cid, progress=to, **terms)), json)


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
        f"it is still in {pin.root} ({shown(pin.name) or 'no name'}): ww blob rm {pin.root}"
        for pin in removed.pinned_by
    ]
    if removed.others:
        kept.append(f"{counted(removed.others, 'pin')} of others: it stays for them")
    said = f"{counted(removed.pins, 'pin')} ended, {size(removed.freed_bytes)} freed"
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
    kept = f"{counted(found.kept_blocks, 'block')} kept, {size(found.kept_bytes)}"
    said = f"{counted(found.blocks, 'block')} {verb}, {size(found.bytes)}"
    dropped = (f"given up: {shown(name)}" for name in found.dropped)
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
                end = found.get("what") == "end"
                if json:
                    out(json_module.dumps(found))
                elif end:
                    note(shown(", ".join(f"{k} {v}" for k, v in found.items() if k != "what")))
                else:
                    state = "mended" if found.get("mended") else "damaged"
                    out(state, "  ", shown(f"{found.get('what')} {found.get('name')}"))
                if end:
                    return whole
                whole = whole and bool(found.get("mended"))
        raise WetwareError("the node ended the verification", hint="ww blob verify")

    if not run_client(work):
        raise SystemExit(EXIT_FAILED)


# --- backups --------------------------------------------------------------------------------------


@blob_app.command("backup")
def backup_command(directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Write what is pinned at the node: a CAR for each CID, and pins.json; for operators.

    CARs that are there from an earlier backup are not written again.
    """
    from wetware_blob.backup import back_up

    count, failed = run_client(lambda session: back_up(session.blob, directory, progress_bar))
    note(f"{counted(count, 'pin')} in {directory}")
    if failed:
        raise WetwareError("not in the backup: " + "; ".join(failed), hint="ww blob verify")


@blob_app.command("restore")
def restore_command(directory: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Put what a backup has, and pin it again; the pins are yours then, whoever had them."""
    from wetware_blob.backup import restore

    count = run_client(lambda session: restore(session.blob, directory, progress_bar))
    note(f"{counted(count, 'pin')} restored; ww blob ls")
