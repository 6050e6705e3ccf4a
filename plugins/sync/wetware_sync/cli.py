"""`ww kv`, `ww name`, `ww lock`, `ww sem` and `ww elect`, through the client library."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path as Local
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wetware.base.finding import size
from wetware.cli.app import (
    Json,
    confirm,
    done,
    examples,
    note,
    out,
    out_json,
    run_client,
    stamp,
    table,
)
from wetware.errors import EXIT_FAILED, InvalidArgument, NotFound, Unsupported
from wetware_sync.engine import VALUE_BYTES_MAX

if TYPE_CHECKING:
    import asyncio
    from contextlib import AbstractAsyncContextManager

    from wetware.client import Session
    from wetware_sync.client import Entry, Event
    from wetware_sync.errors import Conflict
    from wetware_sync.holding import Held, Sync

END_S = 5.0
"""For a command whose lock is lost, between SIGTERM and SIGKILL."""


def _group(help_: str) -> typer.Typer:
    return typer.Typer(help=help_, no_args_is_help=True, rich_markup_mode=None)


kv_app = _group("Keys of the cluster, at one revision.")
name_app = _group("Names for CIDs, nodes and references.")
sync_app = _group("Where the store of keys and locks is.")
etcd_app = _group("An etcd for the store, run by three members: one may die.")
sync_app.add_typer(etcd_app, name="etcd")


def mount(app: typer.Typer) -> None:
    """Mount the commands."""
    section = "Services"
    for name, group, *shown in (
        ("kv", kv_app, "ww kv put /shop/price 12", "ww kv watch /shop/", "ww kv ls /"),
        ("name", name_app, "ww name set /site/live CID", "ww name get /site/live"),
        ("sync", sync_app, "ww sync etcd up --on a,b,c", "ww sync etcd status"),
    ):
        app.add_typer(group, name=name, rich_help_panel=section, epilog=examples(*shown))
    for name, run, *shown in (
        ("lock", lock_command, "ww lock deploy -- ./deploy.sh", "ww lock deploy --who"),
        ("sem", sem_command, "ww sem downloads 3 -- wget https://example.org/"),
        ("elect", elect_command, "ww elect scheduler -- ./scheduler", "ww elect scheduler --who"),
    ):
        app.command(name, rich_help_panel=section, epilog=examples(*shown))(run)


Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Path = Annotated[str, typer.Argument(metavar="KEY", help="A path: /shop/price.")]
Prefix = Annotated[str, typer.Argument(metavar="[PREFIX]", help="What the paths begin with.")]
Value = Annotated[
    str, typer.Argument(metavar="VALUE", help="Text; '-': what comes from standard input.")
]
At = Annotated[
    int | None,
    typer.Option("--at", metavar="REVISION", min=0, help="Only if that set it last; 0: if new."),
]


def _bytes(value: str) -> bytes:
    if value != "-":
        return value.encode()
    data = sys.stdin.buffer.read(VALUE_BYTES_MAX + 1)
    if len(data) > VALUE_BYTES_MAX:
        raise InvalidArgument(
            f"standard input has more than {VALUE_BYTES_MAX} bytes",
            hint="keep it as a blob, and its CID here",
        )
    return data


def _plain(path: str, entry: Entry) -> dict[str, Any]:
    """For JSON: the value as text where it is UTF-8, else as hex."""
    fields = {**asdict(entry), "key": path}
    value = fields.pop("value")
    try:
        return {**fields, "value": value.decode()}
    except UnicodeDecodeError:
        return {**fields, "hex": value.hex()}


# --- keys -----------------------------------------------------------------------------------------


@kv_app.command("get")
def get_command(key: Path, json: Json = False) -> None:
    """Print a key's value, as it is."""
    entry = run_client(lambda session: session.kv.get(key))
    if entry is None:
        raise NotFound(f"there is no key {key}", hint="ww kv ls", code="not_found.key")
    if json:
        return out_json(_plain(key, entry))
    sys.stdout.buffer.write(entry.value)
    if sys.stdout.isatty() and not entry.value.endswith(b"\n"):
        out("")


@kv_app.command("put")
def put_command(key: Path, value: Value, at: At = None, json: Json = False) -> None:
    """Set a key; prints the revision."""
    data = _bytes(value)

    async def work(session: Session) -> int:
        if at is None:
            return await session.kv.put(key, data)
        return await session.kv.cas(key, data, modified=at)

    _tell_written(run_client(work), key, at, json)


@kv_app.command("del")
def del_command(key: Path, at: At = None, json: Json = False) -> None:
    """Delete a key."""

    async def work(session: Session) -> int:
        if at is None:
            return int(await session.kv.delete(key))
        return await session.kv.cas(key, None, modified=at)

    deleted = run_client(work)
    if at is not None:
        return _tell_written(deleted, key, at, json)
    if not deleted:
        raise NotFound(f"there is no key {key}", hint="ww kv ls", code="not_found.key")
    done(json, {"deleted": deleted}, f"{key} is deleted")


def _tell_written(revision: int, key: str, at: int | None, json: bool) -> None:
    if not revision:
        raise _conflict(f"{key} was not set last by the revision {at}", key)
    if json:
        return out_json({"revision": revision})
    note(f"{key} is written by the revision {revision}")


def _conflict(why: str, key: str) -> Conflict:
    from wetware_sync.errors import Conflict

    return Conflict(f"{why}: nothing is changed", hint=f"ww kv get {key} --json")


@kv_app.command("cas", epilog=examples("ww kv cas /shop/price 12 13"))
def cas_command(
    key: Path,
    old: Annotated[str, typer.Argument(metavar="OLD", help="Text; '-': as VALUE.")],
    new: Value,
    json: Json = False,
) -> None:
    """Set a key if it has the value OLD; prints the revision. Exits with 1 if it has not.

    `ww kv put --at` looks at the revision instead.
    """
    if old == new == "-":
        raise InvalidArgument("standard input is one value, not two", hint="write OLD as a text")
    before, after = _bytes(old), _bytes(new)

    async def work(session: Session) -> int:
        from wetware_sync.client import Compare, Write

        held, revision = await session.kv.txn([Compare(key, value=before)], [Write(key, after)])
        return revision if held else 0

    written = run_client(work)
    if not written:
        raise _conflict(f"{key} has not that value", key)
    _tell_written(written, key, None, json)


@kv_app.command("txn", epilog=examples("ww kv txn sale.json", "ww kv txn --json < sale.json"))
def txn_command(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="JSON; '-': standard input.")] = "-",
    json: Json = False,
) -> None:
    """Compare keys, and write others: all of it at one revision, or nothing.

    {"compare": [{"key": K, "value": V}], "then": [{"put": K, "value": V}], "else": [{"del": K}]}

    A comparison has one of value, hex, modified, created, version; what is put has value or hex.
    If all hold `then` is done, else `else`; there are at most 128 of each, and a MiB of values.
    Exits with 0 if they held, 1 if not: JSON says which, as `succeeded`.
    """
    from wetware_sync.transactions import JSON_BYTES_MAX, parse

    try:
        with open(0 if file == "-" else file, "rb", closefd=file != "-") as source:
            asked = parse(source.read(JSON_BYTES_MAX + 1))
    except OSError as exc:
        raise InvalidArgument(f"{file}: {exc.strerror}") from exc
    held, revision = run_client(lambda session: session.kv.txn(*asked))
    said = f"the comparisons {'held' if held else 'did not hold'}; the store is at {revision}"
    done(json, {"succeeded": held, "revision": revision}, said)
    if not held:
        raise SystemExit(EXIT_FAILED)


@kv_app.command("ls")
def ls_command(prefix: Prefix = "/", json: Json = False) -> None:
    """List keys."""

    async def work(session: Session) -> list[Entry]:
        return [entry async for entry in session.kv.ls(prefix, values=True)]

    head = prefix[: prefix.rfind("/") + 1]
    entries = run_client(work)
    if json:
        return out_json([_plain(head + entry.key, entry) for entry in entries])
    rows = [(head + e.key, str(e.modified), _shown(e.value)) for e in entries]
    if rows:
        return table(("key", "revision", "value"), rows)
    note(f"there is no key that begins with {prefix}")


def _shown(value: bytes) -> str:
    text = value[:60].decode(errors="replace")
    return text + "…" * (len(value) > 60)


@kv_app.command("watch")
def watch_command(
    prefix: Prefix = "/",
    revision: Annotated[
        int, typer.Option("--from", metavar="REVISION", min=0, help="From there on; 0: from now.")
    ] = 0,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Stop after so many changes.")
    ] = None,
    json: Json = False,
) -> None:
    """Print each change of the keys that begin so, until interrupted; JSON has a line for each.

    It goes on where it was after a restart of the node, and of the one that has the keys. Where
    some changes are forgotten by then, or from the start, it says so, and goes on behind them.
    """
    head = prefix[: prefix.rfind("/") + 1]

    async def work(session: Session) -> None:
        from wetware_sync.engine import Compacted

        left, at, last = count, revision, max(0, revision - 1)
        while True:
            try:
                async for event in session.kv.watch(prefix, at):
                    last = event.revision
                    _tell_event(head, event, json)
                    if left is not None and not (left := left - 1):
                        return
            except Compacted as exc:
                if not exc.revision:
                    raise
                at = exc.revision
                _tell_gap(last, at, json)

    run_client(work, reconnect=True)


def _tell_gap(last: int, at: int, json: bool) -> None:
    """What was before is not told: which of it was about these keys, nobody knows any more."""
    if json:
        out(json_module.dumps({"gap": {"after": last, "before": at}}))
    note(f"ww: there is a gap: changes after the revision {last} and before {at} are forgotten")


def _tell_event(head: str, event: Event, json: bool) -> None:
    path = head + event.key
    if json:
        what = {"deleted": True} if event.entry is None else _plain(path, event.entry)
        out(json_module.dumps({"key": path, "revision": event.revision, **what}))
    elif event.entry is None:
        out(f"{event.revision}  {path}  deleted")
    else:
        out(f"{event.revision}  {path}  {_shown(event.entry.value)}")


@kv_app.command("status")
def status_command(json: Json = False) -> None:
    """Where the store is, how large, and what happens when a machine of it dies."""

    async def work(session: Session) -> dict[str, Any]:
        home = (await session.kv.home.call("home"))["home"]
        return {**await session.kv.status(), "home": home["node"]}

    status = run_client(work)
    if json:
        return out_json(status)
    for name in ("home", "engine", "failover", "revision", "compacted", "epoch", "keys", "bytes"):
        out(f"{name:<10}{status[name]}")
    if status["failing"]:
        note(f"nothing can be written: {status['failing']}")


@kv_app.command("compact")
def compact_command(
    revision: Annotated[int, typer.Argument(metavar="REVISION", min=1)], json: Json = False
) -> None:
    """Forget the history up to a revision; keys stay."""
    run_client(lambda session: session.kv.compact(revision))
    done(json, {"compacted": revision}, f"changes up to the revision {revision} are forgotten")


@kv_app.command("backup")
def backup_command(
    file: Annotated[Local, typer.Argument(metavar="FILE")], json: Json = False
) -> None:
    """Copy the store to a new file. It has the store's key: keep it as a secret."""
    try:
        nbytes = run_client(lambda session: session.kv.backup(file))
    except OSError as exc:
        raise InvalidArgument(f"{file}: {exc.strerror}") from exc
    said = f"{size(nbytes)} in {file}; it has the key that signs fencing tokens"
    done(json, {"bytes": nbytes}, said)


@kv_app.command("restore")
def restore_command(
    file: Annotated[Local, typer.Argument(metavar="FILE")],
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Put a backup in the place of the store: all that is there now is gone, and all locks lost."""
    confirm("replace all keys, names and locks of the cluster by the backup?", yes=yes)
    try:
        epoch = run_client(lambda session: session.kv.restore(file))
    except OSError as exc:
        raise InvalidArgument(f"{file}: {exc.strerror}") from exc
    done(json, {"epoch": epoch}, f"the store is that of {file} now, with the epoch {epoch}")


# --- where it is ----------------------------------------------------------------------------------


@etcd_app.command("up")
def etcd_up_command(
    on: Annotated[
        str, typer.Option("--on", metavar="A,B,C", help="3 or 5 members: names or peer IDs.")
    ],
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Move the store to an etcd that these members run. Keys stay, what is held is lost.

    Each needs etcd on its PATH. What fails before the end leaves the store where it was.
    """
    confirm("move all keys and names there, and end all locks, leases and watches?", yes=yes)
    _move(lambda session: session.kv.etcd_up(on.split(",")), json)


@etcd_app.command("status")
def etcd_status_command(json: Json = False) -> None:
    """What each member says that runs the store's etcd."""
    found = run_client(lambda session: session.kv.etcd())
    if json:
        return out_json(found)
    if not found["parts"]:
        return note(f"the store is in no etcd of members, but at {found['home']['node']}")
    rows = [
        (
            part["name"] or part["node"],
            part["state"] + (", leads" if part["leads"] else ""),
            part["version"],
            str(part["index"]),
            size(part["bytes"]),
            part["failing"]
            or ("ok" if part["starts"] < 2 else f"ok, started {part['starts']} times"),
        )
        for part in found["parts"]
    ]
    table(("member", "state", "etcd", "index", "size", "works"), rows)


@etcd_app.command("replace")
def etcd_replace_command(
    member: Annotated[str, typer.Argument(metavar="MEMBER", help="That is gone, or is to go.")],
    by: Annotated[str, typer.Option("--with", metavar="D", help="That takes its place.")],
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Have another member run etcd in the place of one. Nothing is interrupted."""
    confirm(f"have {by} in the place of {member}, whose etcd is removed?", yes=yes)
    _move(lambda session: session.kv.etcd_replace(member, by), json)


@etcd_app.command("down")
def etcd_down_command(
    to: Annotated[str, typer.Option("--to", metavar="NODE", help="That has the store then.")],
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Move the store from etcd to one node. Keys stay, what is held is lost."""
    confirm(f"move all keys and names to {to}, and end all locks, leases and watches?", yes=yes)
    _move(lambda session: session.kv.etcd_down(to), json)


def _move(move: Callable[[Session], AsyncIterator[str]], json: bool) -> None:
    async def work(session: Session) -> None:
        async for line in move(session):
            if json:
                out_json({"step": line})
            else:
                note(line)

    run_client(work)


# --- names ----------------------------------------------------------------------------------------


@name_app.command("set")
def name_set_command(
    path: Path,
    value: Annotated[str, typer.Argument(metavar="CID|node:PEER|ww1…")],
    at: At = None,
    ttl: Annotated[
        float, typer.Option("--ttl", metavar="SECONDS", min=0, help="How long; 0: for good.")
    ] = 0,
    json: Json = False,
) -> None:
    """Set a name. Who may read it has what it stands for, a reference too."""
    revision = run_client(lambda s: s.names.set(path, value, ttl_s=ttl, expected=at))
    done(json, {"revision": revision}, f"{path} stands for {value}")


@name_app.command("get")
def name_get_command(
    path: Path,
    history: Annotated[
        bool, typer.Option("--history", help="The values before, the newest first.")
    ] = False,
    json: Json = False,
) -> None:
    """Print what a name stands for."""
    name = run_client(lambda session: session.names.get(path))
    if json:
        return out_json(name)
    out(name.value)
    if history:
        rows = [(stamp(past.set_ms / 1000), past.by, past.value) for past in name.history]
        table(("set", "by", "value"), rows)


@name_app.command("ls")
def name_ls_command(prefix: Prefix = "/", json: Json = False) -> None:
    """List names."""

    async def work(session: Session) -> list[Any]:
        return [name async for name in session.names.ls(prefix)]

    names = run_client(work)
    if json:
        return out_json(names)
    if names:
        return table(("name", "value"), [(name.path, name.value) for name in names])
    note(f"there is no name that begins with {prefix}")


@name_app.command("rm")
def name_rm_command(path: Path, json: Json = False) -> None:
    """Remove a name."""
    removed = run_client(lambda session: session.names.rm(path))
    if not removed:
        raise NotFound(f"there is no name {path}", hint="ww name ls", code="not_found.name")
    done(json, {"removed": True}, f"{path} is removed")


# --- locks ----------------------------------------------------------------------------------------


LockName = Annotated[str, typer.Argument(metavar="NAME", help="Parts with slashes: deploy, a/b.")]
Command = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- COMMAND…", help="What is run while it is held."),
]
Wait = Annotated[
    float | None,
    typer.Option("--wait", metavar="SECONDS", min=0, help="At most so long; default: for good."),
]
Ttl = Annotated[
    float,
    typer.Option("--ttl", metavar="SECONDS", help="How long it stays taken if this machine dies."),
]
Who = Annotated[bool, typer.Option("--who", help="Show who holds it and who waits; take nothing.")]


def lock_command(
    name: LockName,
    command: Command = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Together with others that say so.")
    ] = False,
    wait: Wait = None,
    ttl: Ttl = 15.0,
    who: Who = False,
    json: Json = False,
) -> None:
    """Run a command while a lock is held. It is ended when the lock is lost.

    Its exit code is the command's, 75 where the lock was not free in time, 1 where it was lost. The
    command finds the fencing token in WW_FENCE, as hex. Where its input is no terminal, all that it
    has started ends with it; on a terminal it tells its own.
    """
    if who:
        return _tell_waiting(name, "lock", json)
    _run(command, lambda sync: sync.lock(name, shared=shared, wait_s=wait, ttl_s=ttl))


def sem_command(
    name: LockName,
    places: Annotated[int, typer.Argument(metavar="PLACES", min=1, help="The same for all.")],
    command: Command = None,
    wait: Wait = None,
    ttl: Ttl = 15.0,
    who: Who = False,
    json: Json = False,
) -> None:
    """Run a command in one of some places of a semaphore; otherwise as `ww lock`."""
    if who:
        return _tell_waiting(name, "semaphore", json)
    _run(command, lambda sync: sync.semaphore(name, places, wait_s=wait, ttl_s=ttl))


def elect_command(
    name: LockName,
    command: Command = None,
    value: Annotated[str, typer.Option("--value", help="What others see of the leader.")] = "",
    wait: Wait = None,
    ttl: Ttl = 15.0,
    who: Who = False,
    json: Json = False,
) -> None:
    """Run a command while this is the leader; otherwise as `ww lock`."""
    if who:
        return _tell_waiting(name, "election", json)
    _run(command, lambda sync: sync.election(name, value.encode(), wait_s=wait, ttl_s=ttl))


def _tell_waiting(name: str, kind: str, json: bool) -> None:
    waiting = run_client(lambda session: session.sync.waiting(name, kind))
    if json:
        return out_json(waiting)
    rows = [("held" if w.held else "waits", w.kind, w.principal, _shown(w.value)) for w in waiting]
    if rows:
        return table(("state", "kind", "by", "value"), rows)
    note(f"nobody holds {name}")


def _run(
    command: list[str] | None, hold: Callable[[Sync], AbstractAsyncContextManager[Held]]
) -> None:
    if not command:
        raise InvalidArgument("what is to be run?", hint="ww lock NAME -- COMMAND ARGUMENTS")

    async def work(session: Session) -> int:
        async with hold(session.sync) as held:
            token = b""
            with contextlib.suppress(Unsupported):  # of what several may hold at once
                token = await held.token()
            return await _child(command, token)

    raise SystemExit(run_client(work, reconnect=True))


async def _child(command: list[str], token: bytes) -> int:
    """Run it to its end; where this is cancelled, end it. Returns the code that a shell would.

    A signal that ends this program is the command's: the lock is held until that has ended.
    """
    import asyncio
    import os
    import signal

    environment = {**os.environ, "WW_FENCE": token.hex()}
    grouped = not sys.stdin.isatty()  # in a group of its own, where it need not be the terminal's
    process: asyncio.subprocess.Process | None = None
    early: list[int] = []

    def send(number: int) -> None:
        if process is None:
            early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if grouped else os.kill)(process.pid, number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, send, number)
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, process_group=0 if grouped else None
        )
    except OSError as exc:
        note(f"ww: {command[0]}: {exc.strerror}")
        return 127 if isinstance(exc, FileNotFoundError) else 126
    for each in early:
        send(each)
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:
            await _end(process, send, grouped=grouped)
    return code if code >= 0 else 128 - code


async def _end(
    process: asyncio.subprocess.Process, send: Callable[[int], None], *, grouped: bool
) -> None:
    """End a command, and what is in a process group of its own with it."""
    import signal

    import anyio

    send(signal.SIGTERM)
    with anyio.CancelScope(shield=True):
        with anyio.move_on_after(END_S):
            await process.wait()
        if grouped or process.returncode is None:
            send(signal.SIGKILL)
        await process.wait()
