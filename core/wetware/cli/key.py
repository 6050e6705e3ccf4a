"""`ww key`: the user's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wetware.base import paths
from wetware.cli.app import Json, ask_passphrase, note, options, out, out_json, table
from wetware.cli.completion import complete_keys
from wetware.errors import InvalidArgument, KeyFileError

key_app = typer.Typer(help="Your keys.", no_args_is_help=True)


@key_app.command("new")
def key_new(
    name: Annotated[str, typer.Argument(help="A name, or a path.")] = "default",
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Encrypt the key with a passphrase.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a new Ed25519 key and print its public name."""
    from wetware.client import KeyChoice
    from wetware.identity import Key

    secret = paths.variable("WW_PASSPHRASE")
    if passphrase and secret is None:
        secret = ask_passphrase("New passphrase: ")
        if secret != ask_passphrase("The same again: "):
            raise InvalidArgument("the passphrases differ; no key was made")
        if not secret:
            raise InvalidArgument("the passphrase is empty", hint="leave --passphrase out")
    path = KeyChoice(name, None, None).path
    key = Key.generate()
    key.save(path, passphrase=secret)
    note(f"wrote {path}" + (" (encrypted)" if secret else ""))
    _show(key.peer_id, path, json)


@key_app.command("list")
def key_list(json: Json = False) -> None:
    """Show the keys in your keys directory."""
    from wetware.identity import Key

    directory = paths.keys_dir()
    rows = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.is_file() and not path.name.startswith("."):
            try:
                rows.append((path.name, str(Key.load(path).peer_id)))
            except KeyFileError as exc:
                encrypted = exc.code == "key.passphrase"
                rows.append((path.name, "(encrypted)" if encrypted else f"({exc.message})"))
    if json:
        return out_json([{"name": name, "key": key} for name, key in rows])
    if not rows:
        note(f"no keys in {directory}")
        return note("try: ww key new")
    table(("name", "key"), rows)


@key_app.command("show")
def key_show(
    name: Annotated[
        str | None, typer.Argument(help="A name or a file.", autocompletion=complete_keys)
    ] = None,
    json: Json = False,
) -> None:
    """Print the public name of a key: what an operator needs to add you."""
    from wetware.client import KeyChoice

    choice = KeyChoice(name or options.key, None, ask_passphrase)
    _show(choice.load().peer_id, choice.path, json)


def _show(peer_id: str, path: Path, json: bool) -> None:
    if json:
        return out_json({"key": peer_id, "file": path})
    out(peer_id)
