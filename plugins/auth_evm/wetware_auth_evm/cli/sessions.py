"""`login`, `logout` and `forget`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from wetware.cli.app import node_data_dir, note, options, out, out_json
from wetware.errors import ConfigError, InvalidArgument, KeyFileError, NotFound
from wetware_auth_evm.chain.addresses import parse_address
from wetware_auth_evm.cli.shared import on_chain, open_wallet, own_address, profile_of, wallet_file
from wetware_auth_evm.cli.words import stamp, who
from wetware_auth_evm.login import session, wallets
from wetware_auth_evm.node.config import ROOT_NAME

if TYPE_CHECKING:
    from wetware_auth_evm.cli.given import Where
    from wetware_auth_evm.cli.reads import Chain
    from wetware_auth_evm.login.session import StoredSession


def login(
    where: Where,
    *,
    cluster: str,
    roles: str,
    hours: float,
    wallet_address: str,
    eip4361: bool,
    sign_with_file: bool,
    signature: str,
    json: bool,
) -> None:
    from wetware_auth_evm.cli import logins

    name = wallets.chosen(options.key)
    profile = profile_of(where, cluster=cluster)
    profile.need_cluster()
    if profile.scope == ROOT_NAME:
        raise InvalidArgument(
            f"{ROOT_NAME} is no cluster's scope", hint="give the scope of the cluster"
        )
    if signature:
        if roles or eip4361 or sign_with_file:
            raise InvalidArgument(
                "--signature is for what was printed before: roles and form are as they were then",
                hint="give --signature alone",
            )
        pending = session.load(name, profile.cluster, pending=True)
        if pending is None:
            raise KeyFileError(
                f"nothing of {name} waits for a signature in the cluster {profile.cluster}",
                hint="ww auth evm login --wallet-address ADDRESS prints what to sign",
                code="key.missing",
            )
        if wallet_address and parse_address(wallet_address) != pending.grant.account:
            raise InvalidArgument(
                f"the text that waits for a signature is of {who(pending.grant.account)}",
                hint="run login with --wallet-address anew",
            )
        given = logins.parse_signature(signature)
        stored = on_chain(profile, lambda chain: logins.judge(chain, pending, given))
        session.remove(name, profile.cluster, pending=True)
        _keep_session(name, stored, json)
        return
    file = None if wallet_address and not sign_with_file else wallet_file()
    account = parse_address(wallet_address) if wallet_address else own_address()
    # The key is opened before: the time to type would count as the session's.
    wallet = open_wallet(file) if file is not None else None
    asked = [part.strip() for part in roles.split(",") if part.strip()]
    if roles and not asked:
        raise InvalidArgument("--roles names none", hint="leave it out for all that you hold")
    seconds = int(hours * 3600)

    async def work(chain: Chain) -> StoredSession:
        pending = await logins.prepare(chain, account, asked, seconds, text=eip4361, say=note)
        if wallet is None:
            return pending
        return await logins.judge(chain, pending, wallet.sign(pending.digest))

    found = on_chain(profile, work)
    if not found.signature:
        session.save(name, found)
        _print_pending(name, found, json)
        return
    _keep_session(name, found, json)


def _print_pending(name: str, pending: StoredSession, json: bool) -> None:
    grant, text = pending.grant, pending.form == "eip4361"
    if text:
        if json:
            out_json({"form": "eip4361", "account": who(grant.account), "text": grant.text()})
        else:
            sys.stdout.write(grant.text() + "\n")
    else:
        out_json(grant.typed_data())
    form = "personal_sign (EIP-191)" if text else "eth_signTypedData_v4 (EIP-712)"
    option = "" if name == "default" else f" --key {name}"
    note(f"let {who(grant.account)} sign this with {form}, before {stamp(grant.expires_at)}; then:")
    note(f"ww{option} auth evm login --signature 0x…")


def _keep_session(name: str, stored: StoredSession, json: bool) -> None:
    path, grant = session.save(name, stored), stored.grant
    if json:
        out_json(
            {
                "account": who(grant.account),
                "cluster": grant.cluster,
                "roles": list(grant.roles),
                "expires_at": grant.expires_at,
                "form": stored.form,
                "file": str(path),
            }
        )
        return
    out(
        f"{who(grant.account)} is logged in to the cluster {grant.cluster} with "
        f"{', '.join(grant.roles)}, until {stamp(grant.expires_at)}"
    )
    note("try: ww whoami")


def logout(*, cluster: str, all_: bool) -> None:
    name = wallets.chosen(options.key)
    wallets.wallet_path(name)
    wanted = (
        [cluster]
        if cluster and not all_
        else sorted({found for who_, found in session.listing() if who_ == name})
    )
    if len(wanted) > 1 and not all_:
        raise InvalidArgument(
            f"there are sessions in {len(wanted)} clusters: {', '.join(wanted)}",
            hint="give --cluster ID, or --all",
        )
    gone = 0
    for each in wanted:
        gone += session.remove(name, each)
        session.remove(name, each, pending=True)
    if not gone:
        note(f"{name} is logged in nowhere" + (f" in {cluster}" if cluster else ""))
        return
    note(
        f"{gone} session{'s' if gone > 1 else ''} forgotten on this machine; a copy of the file "
        "would stay good until it expires: `ww auth evm renounce`, or revoke-all, ends that"
    )


def forget(*, force: bool) -> None:
    from wetware_auth_evm.chain.history import History as Kept

    directory = node_data_dir() / "plugins" / "auth_evm"
    if not directory.is_dir():
        raise NotFound(f"no node with this auth backend has run in {node_data_dir()}")
    kept = Kept(directory)
    try:
        status = kept.status()
    except (OSError, ValueError):
        status = None  # damaged: it is read anew in any case
        force = True
    if not force and (status is None or not status["regressed"]):
        raise InvalidArgument(
            "what the node keeps of the chain was not contradicted: there is nothing to forget",
            hint="ww auth evm status; to have it read anew all the same, --force",
        )
    try:
        kept.ask_to_forget()
    except OSError as exc:
        raise ConfigError(f"cannot write to {directory}: {exc.strerror}") from exc
    note(
        "the node reads the whole history of the contract anew, at its next look or start, and "
        "lets nobody in before"
    )
