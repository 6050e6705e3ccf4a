"""What a user keeps: wallets and profiles."""

from __future__ import annotations

import json as jsons
from typing import TYPE_CHECKING, NoReturn

from wetware.base import paths
from wetware.cli.app import ask_passphrase, node_data_dir, note, options, out, out_json
from wetware.errors import InvalidArgument, WetwareError
from wetware_auth_evm.chain.errors import BadSettings, ChainError, WrongChain
from wetware_auth_evm.cli import profiles
from wetware_auth_evm.cli.shared import (
    FILE_CHARS_MAX,
    identified,
    on_chain,
    profile_of,
    read_file,
    wallet_file,
)
from wetware_auth_evm.cli.words import who
from wetware_auth_evm.login import wallets

if TYPE_CHECKING:
    from wetware_auth_evm.chain.profile import Profile
    from wetware_auth_evm.cli.given import Where
    from wetware_auth_evm.cli.reads import Chain
    from wetware_auth_evm.login.wallets import WalletFile


def _new_passphrase(wanted: bool) -> str | None:
    secret = paths.variable("WW_PASSPHRASE")
    if wanted and secret is None:
        secret = ask_passphrase("New passphrase: ")
        if secret != ask_passphrase("The same again: "):
            raise InvalidArgument("the passphrases differ; nothing was written")
        if not secret:
            raise InvalidArgument("the passphrase is empty", hint="leave --passphrase out")
    return secret


def new_key(*, name: str, passphrase: bool, json: bool) -> None:
    if wallets.wallet_path(name).exists():
        wallets.create(name)  # says that it is never overwritten
    _show_wallet(wallets.create(name, passphrase=_new_passphrase(passphrase)), json, made=True)


def import_key(*, file: str, name: str, passphrase: bool, json: bool) -> None:
    target = name or wallets.chosen(options.key)
    wallets.wallet_path(target)
    if file.removeprefix("0x").isalnum() and len(file.removeprefix("0x")) == 64:
        raise InvalidArgument(
            "a key on the command line stays in the shell's history",
            hint="give it on stdin: ww auth evm import-key -",
        )
    text = read_file(file, "the key")
    sealed = text.lstrip().startswith("{")
    secret = None if sealed else _new_passphrase(passphrase)
    found = wallets.import_(
        target,
        text,
        opened_by=lambda: ask_passphrase("Passphrase of the keystore: "),
        passphrase=secret,
    )
    _show_wallet(found, json, made=True)


def _show_wallet(file: WalletFile, json: bool, *, made: bool = False) -> None:
    if made:
        note(f"wrote {file.path}" + (" (encrypted)" if file.encrypted else ""))
        if not file.encrypted:
            note("its key is in the clear: for try-outs, not for what is worth something")
    if json:
        out_json(
            {
                "name": file.name,
                "address": who(file.address),
                "file": str(file.path),
                "encrypted": file.encrypted,
            }
        )
    else:
        out(who(file.address))


def address(*, json: bool) -> None:
    _show_wallet(wallet_file(), json)


def export_profile(where: Where, *, file: str, cluster: str) -> None:
    from dataclasses import replace

    from wetware_auth_evm import contract as artifact
    from wetware_auth_evm.chain.finality import is_loopback

    profile = profile_of(where, cluster=cluster)

    async def work(chain: Chain) -> Profile:
        return replace(
            chain.profile,
            genesis_hash=chain.profile.genesis_hash or await chain.genesis(),
            code_hash=chain.profile.code_hash or artifact.load().runtime_hash,
            nodes=chain.profile.nodes or _node_addrs(),
        )

    found = on_chain(profile, work)
    if file == "-":
        out_json(found.as_dict())
    else:
        profiles.save(found, paths.absolute(file, "the profile"))
        note(f"wrote {file}")
    if not found.cluster:
        note("the cluster is not known here: those who use this have to give --cluster")
    if any(map(is_loopback, found.endpoints)):
        note("an endpoint is on this machine alone: others cannot use it")
    note("an endpoint's URL may hold a key: give this to members only")


def _node_addrs() -> tuple[str, ...]:

    try:
        found = jsons.loads((node_data_dir() / paths.RUNTIME_FILE).read_bytes()[:FILE_CHARS_MAX])
        peer = str(found["peer_id"])
        return tuple(
            addr if "/p2p/" in addr else f"{addr}/p2p/{peer}"
            for addr in map(str, found["addrs"][: profiles.NODES_MAX])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def use_profile(*, file: str, offline: bool) -> None:
    found = profiles.from_text(read_file(file, "the profile"), file)
    if not (found.contract and found.endpoints):
        raise BadSettings(f"{file} names no contract or no endpoint")
    if not offline:
        try:
            identified(found)
        except WrongChain as exc:
            _not_used(exc)
        except ChainError as exc:
            _not_used(exc, "--offline keeps it without asking")
    path = profiles.save(found)
    note(f"kept as {path}")
    shadow = profiles.resolve(data_dir=node_data_dir(), config=options.config)
    if shadow.contract != found.contract or shadow.chain_id != found.chain_id:
        note(
            f"it is not what commands use here: {shadow.source} is taken before it; --profile "
            "names a file"
        )


def _not_used(exc: WetwareError, hint: str = "") -> NoReturn:
    exc.message = f"the profile was not kept: {exc.message}"
    exc.hint = f"{exc.hint}; {hint}" if hint and exc.hint else hint or exc.hint
    raise exc
