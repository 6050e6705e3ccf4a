"""What `ww auth evm …` does. Imported when a command runs, not before."""

from __future__ import annotations

import asyncio
import json as jsons
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from wetware.base import paths
from wetware.cli.app import (
    Style,
    Styled,
    ask_passphrase,
    confirm,
    node_data_dir,
    note,
    options,
    out,
    out_json,
    run_client,
    table,
)
from wetware.cli.given import read_text
from wetware.errors import (
    EXIT_DENIED,
    EXIT_FAILED,
    ConfigError,
    InvalidArgument,
    KeyFileError,
    NotFound,
    WetwareError,
)
from wetware_auth_evm.chain.addresses import parse_address
from wetware_auth_evm.chain.errors import ChainError, WrongChain
from wetware_auth_evm.chain.events import NOBODY
from wetware_auth_evm.chain.profile import Profile
from wetware_auth_evm.cli import abi, explain, profiles, words
from wetware_auth_evm.cli.reads import Chain, History, Logged, Probe, View
from wetware_auth_evm.cli.words import role_text, scope_text, stamp, when, who
from wetware_auth_evm.cli.writes import Outcome, Sending, Transaction, send
from wetware_auth_evm.login import wallets
from wetware_auth_evm.node.config import ROOT_NAME
from wetware_auth_evm.node.roles import RESERVED

if TYPE_CHECKING:
    from wetware_auth_evm.chain.state import State
    from wetware_auth_evm.cli.given import Where, Write
    from wetware_auth_evm.login.session import StoredSession
    from wetware_auth_evm.login.statements import SessionGrant
    from wetware_auth_evm.login.wallets import Wallet, WalletFile

T = TypeVar("T")
BATCH_MAX: Final = 100
SIGNATURE_CHARS_MAX: Final = 2 * (16 << 10) + 2
FILE_CHARS_MAX: Final = 64 << 10
BEHIND_BLOCKS_TOLD: Final = 5
CLOCK_S_TOLD: Final = 120
"""`status` tells of a chain whose newest block is older."""


# --- shared ---------------------------------------------------------------------------------------


def _profile(where: Where, *, need_contract: bool = True, cluster: str = "") -> Profile:
    return profiles.resolve(
        rpc=where.rpc,
        contract=where.contract,
        chain_id=where.chain_id,
        scope=where.scope,
        cluster=cluster or where.cluster,
        file=where.profile,
        data_dir=node_data_dir(),
        config=options.config,
        need_contract=need_contract,
    )


def _on_chain(
    profile: Profile, work: Callable[[Chain], Awaitable[T]], *, contract: bool = True
) -> T:
    """Run `work` with the chain, after it was seen to be the right one."""

    async def main() -> T:
        async with Chain(profile) as chain:
            await chain.identify(contract=contract)
            return await work(chain)

    return asyncio.run(main())


def _scope(profile: Profile) -> bytes:
    return words.parse_scope(profile.scope)


def _wallet_file() -> WalletFile:
    return wallets.get(wallets.chosen(options.key))


def _own_address() -> bytes:
    return _wallet_file().address


def _open(file: WalletFile) -> Wallet:
    return file.open(lambda: ask_passphrase(f"Passphrase of {file.name}: "))


def _how(write: Write) -> Sending:
    if write.wait not in ("final", "mined", "none"):
        raise InvalidArgument(f"--wait {write.wait[:20]}", hint="write final, mined or none")
    if write.timeout is not None and not 0 <= write.timeout <= 86_400:
        raise InvalidArgument(f"--timeout {write.timeout:g}", hint="write seconds, up to a day")
    return Sending(
        wait=write.wait,  # type: ignore[arg-type]  # looked at above
        timeout_s=write.timeout,
        nonce=write.nonce,
        fee_gwei=write.fee_gwei,
    )


def _change(
    where: Where,
    write: Write,
    function: str,
    args: Callable[[Profile], Sequence[Any]],
    *,
    question: str = "",
    yes: bool = False,
    before: Callable[[Chain], Awaitable[None]] | None = None,
) -> None:
    """Send one call of the contract, or print it.

    Args:
        where: Which contract.
        write: How.
        function: Of the contract.
        args: Its arguments, for a profile.
        question: To confirm, for what is dangerous.
        yes: It is confirmed.
        before: What to say or check before it is sent.
    """
    how, profile = _how(write), _profile(where)
    call = abi.calldata(function, *args(profile))
    if write.calldata:
        _print_calldata(profile, profile.contract, call)
        return
    file = _wallet_file()
    if question:
        confirm(question, yes=yes)
    wallet = _open(file)

    async def work(chain: Chain) -> Outcome:
        if before is not None:
            await before(chain)
        tx = Transaction(profile.contract, call, chain.profile.chain_id)
        return await send(chain, wallet, tx, how, note)

    _report(_on_chain(profile, work), write)


def _print_calldata(profile: Profile, to: bytes, call: bytes) -> None:
    async def chain_id(chain: Chain) -> int:
        return chain.profile.chain_id

    number = profile.chain_id or _on_chain(profile, chain_id, contract=False)
    out_json(Transaction(to, call, number).as_dict())


def _report(outcome: Outcome, write: Write) -> None:
    if write.json:
        out_json(outcome.as_dict())
        return
    for event in outcome.events:
        out(words.event_text(event, time.time()))
    if outcome.status == "sent":
        out(f"0x{outcome.tx.hex()}")


def _read_file(file: str, what: str) -> str:
    return read_text(file, what, bytes_max=FILE_CHARS_MAX)


# --- the chain and the contract -------------------------------------------------------------------


def dev(*, json: bool) -> None:
    """`ww auth evm dev`."""
    data_dir = node_data_dir()
    running = _running_dev(data_dir)
    if running is not None:
        if json:
            out_json(running.as_dict())
            return
        out(running.endpoints[0])
        note(f"chain {running.chain_id} runs already; its contract is {who(running.contract)}")
        return
    from wetware.base.log import get_logger
    from wetware_auth_evm.dev import tryout

    if options.key:  # the chain grants with this wallet, which it finds by this name
        os.environ["WW_KEY"] = options.key
    wallet = wallets.load_or_create(wallets.chosen(options.key))
    directory = profiles.dev_path(data_dir).parent
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    chain = tryout.start(directory, owner=wallet.address, log=get_logger("plugin.auth_evm"))
    try:
        if json:
            out_json(
                {
                    "url": chain.url,
                    "chain_id": chain.chain_id,
                    "contract": who(chain.contract),
                    "owner": who(wallet.address),
                    "engine": chain.engine,
                }
            )
        else:
            out(chain.url)
        note(
            f"chain {chain.chain_id} ({chain.engine}) with the contract {who(chain.contract)}, "
            f"owned by {who(wallet.address)}; Ctrl-C ends it"
        )
        note("try, in another terminal: ww auth evm status")
        _wait_for_the_end()
    finally:
        chain.close()


def _wait_for_the_end() -> None:
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        note("the chain ends")


def _running_dev(data_dir: Path) -> Profile | None:
    """The try-out chain of this data directory, if it answers."""
    if not profiles.dev_path(data_dir).exists():
        return None
    found = profiles.resolve(data_dir=data_dir, config=options.config)

    async def there(chain: Chain) -> bool:
        return True

    try:
        return found if found.dev and _on_chain(found, there) else None
    except ChainError:
        return None


def deploy(where: Where, write: Write, *, owner: str, write_config: bool) -> None:
    """`ww auth evm deploy`."""
    how = _how(write)
    profile = _profile(where, need_contract=False)
    if write_config:
        _check_no_section()
    address = parse_address(owner) if owner else _own_address()
    if not any(address):
        raise InvalidArgument("the owner's address is zero")
    if write.calldata:
        _print_calldata(profile, b"", abi.deployment(address))
        return
    if how.wait == "none":
        raise InvalidArgument("a deployment is waited for", hint="--wait mined, or --wait final")
    wallet = _open(_wallet_file())

    async def work(chain: Chain) -> tuple[Outcome, Profile]:
        tx = Transaction(b"", abi.deployment(address), chain.profile.chain_id)
        outcome = await send(chain, wallet, tx, how, note)
        made = Profile(
            chain_id=chain.profile.chain_id,
            contract=outcome.created,
            scope=profile.scope,
            endpoints=profile.endpoints,
            genesis_hash=await chain.genesis(),
            deployed_at=outcome.block or 0,
            quorum=profile.quorum,
            finality=profile.finality,
        )
        async with Chain(made) as there:
            await there.identify()
        return outcome, made

    outcome, made = _on_chain(profile, work, contract=False)
    section = config_section(made)
    if write.json:
        out_json({**outcome.as_dict(), "owner": who(address), "config": section})
    else:
        out(section.rstrip())
    note(f"the contract is {who(made.contract)}, owned by {who(address)}")
    if write_config:
        path = _write_section(section)
        note(f"written to {path}; it gives nobody anything yet: add [plugins.auth_evm.roles.NAME]")
    else:
        note("put this into ww.toml (or use --write), and add [plugins.auth_evm.roles.NAME]")


def config_section(profile: Profile) -> str:
    """[plugins.auth_evm] for a contract."""
    from wetware_auth_evm.chain import finality

    lines = [
        "[plugins.auth_evm]",
        f"chain_id = {profile.chain_id}",
        f'contract = "{who(profile.contract)}"',
        f"scope = {jsons.dumps(profile.scope, ensure_ascii=False)}",
        f"endpoints = {jsons.dumps(list(profile.endpoints))}",
        f'genesis_hash = "0x{profile.genesis_hash.hex()}"',
        f"deployed_at = {profile.deployed_at}",
    ]
    count = len(profile.endpoints)
    if count < 3:
        lines.append(
            f"quorum = {profile.quorum or finality.quorum_default(count)}"
            "  # better: 3 endpoints of different operators"
        )
    elif profile.quorum:
        lines.append(f"quorum = {profile.quorum}")
    if finality.for_chain(profile.chain_id) is None:
        own = all(map(finality.is_loopback, profile.endpoints))
        named = profile.finality or ("dev" if own else "")
        named = "dev" if named == "latest" else named
        if named:
            lines.append(f'finality = "{named}"')
        else:
            lines += [
                '# finality = "finalized"  # this chain is not known: set these four for it',
                "# poll_s = 2",
                "# verified_s_max = 60",
                "# tip_age_s_max = 60",
            ]
    return "\n".join(lines) + "\n"


def _check_no_section() -> None:
    import tomllib

    from wetware.config import file_path

    path = file_path(options.config)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from None
    if "auth_evm" in found.get("plugins", {}):
        raise ConfigError(
            f"{path} has [plugins.auth_evm] already; it is never overwritten",
            hint="leave --write out, and put the section there yourself",
        )


def _write_section(section: str) -> Path:
    from wetware.config import file_path
    from wetware.identity import replace_private_file

    path = file_path(options.config)
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_private_file(path, (before + gap + section).encode())
    except OSError as exc:
        raise ConfigError(
            f"cannot write {path}: {exc.strerror}; the contract is made all the same",
            hint="put the section that was printed there yourself",
        ) from None
    return path


# --- roles ----------------------------------------------------------------------------------------


def grant(
    where: Where,
    write: Write,
    *,
    role: str,
    addresses: Sequence[str],
    expires: str,
    not_before: str,
    rights: str,
) -> None:
    """`ww auth evm grant`."""
    now = time.time()
    accounts = [parse_address(text) for text in addresses]
    if len(set(accounts)) != len(accounts):
        raise InvalidArgument("an address is named twice")
    if len(accounts) > BATCH_MAX:
        raise InvalidArgument(
            f"{len(accounts)} addresses; at most {BATCH_MAX} in one transaction",
            hint="make several of it",
        )
    word, mask = words.parse_role(role), words.parse_rights(rights)
    until = words.parse_time(expires, now, "--expires")
    since = words.parse_time(not_before, now, "--not-before") if not_before else 0

    def items(profile: Profile) -> list[tuple[Any, ...]]:
        _warn_of_role(profile, role)
        return [(_scope(profile), word, account, since, until, mask) for account in accounts]

    if len(accounts) == 1:
        _change(where, write, "grant", lambda profile: items(profile)[0])
    else:
        _change(where, write, "grantMany", lambda profile: [items(profile)])


def _warn_of_role(profile: Profile, role: str) -> None:
    """Say so where it would be on the chain, and allow nothing at the node of this machine."""
    known = profiles.roles_here(profile, options.config)
    if known is None or role in known:
        return
    from difflib import get_close_matches

    named = ", ".join(sorted(known - RESERVED)) or "none"
    near = get_close_matches(role, known, 1, 0.6)
    also = f"did you mean {near[0]}?" if near else "set it in [plugins.auth_evm.roles]"
    note(
        Styled("warning:", "yellow"),
        f" the node here does not know the role {role!r}: it allows nothing there. It knows "
        f"{named}; {also}",
    )


def revoke(where: Where, write: Write, *, role: str, address: str) -> None:
    """`ww auth evm revoke`."""
    word, account = words.parse_role(role), parse_address(address)
    _change(where, write, "revoke", lambda profile: [_scope(profile), word, account])


def revoke_all(where: Where, write: Write, *, address: str, yes: bool) -> None:
    """`ww auth evm revoke-all`."""
    account = parse_address(address)
    _change(
        where,
        write,
        "revokeAll",
        lambda _: [account],
        question=f"Take everything of {who(account)}, in every scope, for good?",
        yes=yes,
    )


def reset_scope(where: Where, write: Write, *, yes: bool) -> None:
    """`ww auth evm reset-scope`."""
    name = _profile(where).scope
    _change(
        where,
        write,
        "resetScope",
        lambda profile: [_scope(profile)],
        question=f"End every grant of everybody in the scope {name}, for good?",
        yes=yes,
    )


def renounce(where: Where, write: Write, *, role: str, yes: bool) -> None:
    """`ww auth evm renounce`."""
    account = _own_address()
    word = words.parse_role(role, any_=True) if role else None
    profile = _profile(where)
    scope = _scope(profile)
    if word is None:
        scope, word = _on_chain(profile, lambda chain: _held_by(chain, scope, account))
    _change(
        where,
        write,
        "renounceAll",
        lambda _: [scope, word],
        question=f"Give up everything of {who(account)}, in every scope, for good?",
        yes=yes,
    )


async def _held_by(chain: Chain, scope: bytes, account: bytes) -> tuple[bytes, bytes]:
    """(scope, role) of a record of the account that stands, in the scope first."""
    view = await chain.view(note)
    state, now = view.history.state, view.now
    found = [at for at in state.grants.get(account, {}) if _stands(state, at, account, now)]
    found += [
        at
        for at, admin in state.admins.get(account, {}).items()
        if now < admin.expiry and state.fresh(admin.serial, at[0], account)
    ]
    found.sort(key=lambda at: at[0] != scope)
    if not found:
        raise InvalidArgument(
            f"{who(account)} holds nothing that could be given up",
            hint="`ww auth evm list --all` shows every record",
        )
    return found[0]


def _stands(state: State, at: tuple[bytes, bytes], account: bytes, now: int) -> bool:
    grant = state.grants[account][at]
    return bool(state.held(at[0], at[1], account, max(now, grant.not_before)).rights)


def pause(where: Where, write: Write, *, yes: bool) -> None:
    """`ww auth evm pause`."""
    _change(
        where,
        write,
        "pause",
        lambda _: [],
        question="Stop every role of everybody, on every cluster of this contract?",
        yes=yes,
    )


def unpause(where: Where, write: Write) -> None:
    """`ww auth evm unpause`."""
    _change(where, write, "unpause", lambda _: [])


def set_admin(
    where: Where,
    write: Write,
    *,
    role: str,
    address: str,
    expires: str,
    rights: str,
    remove: bool,
) -> None:
    """`ww auth evm set-admin`."""
    word, account = words.parse_role(role, any_=True), parse_address(address)
    until = 0 if remove else words.parse_time(expires, time.time(), "--expires")
    mask = 0 if remove else words.parse_rights(rights)
    _change(where, write, "setAdmin", lambda p: [_scope(p), word, account, until, mask])


def _bound_key(peer: str, node: bool) -> bytes:
    from wetware.identity import Key, PeerId

    if bool(peer) == node:
        raise InvalidArgument(
            "which key?", hint="give --peer PEER_ID, or --node for this machine's"
        )
    if node:
        passphrase = paths.variable("WW_PASSPHRASE")
        path = node_data_dir() / "node.key"
        try:
            return Key.load(path, passphrase=lambda: passphrase or ask_passphrase()).public
        except KeyFileError as exc:
            if exc.code != "key.missing":
                raise
            raise KeyFileError(
                f"there is no node here yet: no key at {path}",
                hint="`ww id` makes it; --data-dir names another node",
                code=exc.code,
            ) from None
    public = PeerId.parse(peer).public_key
    if public is None:
        raise InvalidArgument(f"{peer} is not the ID of an Ed25519 key", hint="ww id")
    return public


def bind_key(
    where: Where, write: Write, *, roles: Sequence[str], peer: str, node: bool, expires: str
) -> None:
    """`ww auth evm bind-key`."""
    key = _bound_key(peer, node)
    named = _distinct(roles)
    until = words.parse_time(expires, time.time(), "--expires")
    _change(where, write, "bindKey", lambda p: [_scope(p), named, key, until])


def unbind_key(
    where: Where, write: Write, *, roles: Sequence[str], peer: str, node: bool, account: str
) -> None:
    """`ww auth evm unbind-key`."""
    key, named = _bound_key(peer, node), _distinct(roles)
    whose = parse_address(account) if account else _own_address()
    _change(where, write, "unbindKey", lambda p: [_scope(p), named, whose, key])


def _distinct(roles: Sequence[str]) -> list[bytes]:
    named = [words.parse_role(role) for role in roles]
    if len(set(named)) != len(named) or len(named) > BATCH_MAX:
        raise InvalidArgument(f"each role once, at most {BATCH_MAX}")
    return named


def transfer_owner(where: Where, write: Write, *, address: str, yes: bool) -> None:
    """`ww auth evm transfer-owner`."""
    account = NOBODY if address == "none" else parse_address(address)
    if address != "none" and not any(account):
        raise InvalidArgument("the address is zero", hint="`none` withdraws an offer")
    question = (
        f"Offer the ownership of the contract, and with it every role, to {who(account)}?"
        if any(account)
        else ""
    )
    _change(where, write, "proposeOwner", lambda _: [account], question=question, yes=yes)


def accept_owner(where: Where, write: Write) -> None:
    """`ww auth evm accept-owner`."""
    _change(where, write, "acceptOwner", lambda _: [])


# --- reading --------------------------------------------------------------------------------------


def _view(profile: Profile) -> View:
    return _on_chain(profile, lambda chain: chain.view(note))


def list_(where: Where, *, role: str, account: str, all_: bool, json: bool) -> None:
    """`ww auth evm list`."""
    profile = _profile(where)
    wanted = (
        words.parse_role(role, any_=True) if role else None,
        parse_address(account) if account else None,
    )
    rows = records(_view(profile), _scope(profile), *wanted, all_=all_)
    if json:
        out_json(rows)
        return
    if not rows:
        note("nobody holds anything here" if not (role or account) else "nothing of that kind")
        note("try: ww auth evm grant ROLE ADDRESS" if not all_ else "try: ww auth evm audit")
        return
    cells = [
        (
            row["kind"],
            row["role"],
            row["account"] + (f" {row['key']}" if row["key"] else ""),
            row["scope"],
            words.rights_text(int(row["rights"], 16)) if row["rights"] else "-",
            stamp(row["until"]),
            row["by"] or "owner",
            row["state"],
        )
        for row in rows
    ]
    styles: dict[str, Style] = {"holds": "green", "waits for finality": "yellow"}
    table(
        ("kind", "role", "account", "scope", "rights", "until", "by", "state"),
        cells,
        styles={"state": styles},
    )


def records(
    view: View, scope: bytes, role: bytes | None, account: bytes | None, *, all_: bool
) -> list[dict[str, Any]]:
    """Grants, admins and bound keys, sorted; `all_`: dead ones and other scopes, too."""
    state, now = view.history.state, view.now
    found = [*_grant_rows(view), *_admin_rows(state, now), *_key_rows(state, now)]
    kept = [
        row
        for row in found
        if (role is None or row["role"] == role_text(role))
        and (account is None or row["account"] == who(account))
        and (all_ or (row["live"] and row["scope"] in (scope_text(scope), ROOT_NAME)))
    ]
    kept.sort(key=lambda row: (row["kind"] != "grant", row["kind"], row["role"], row["account"]))
    return kept


def _row(kind: str, role: bytes, account: bytes, scope: bytes, **rest: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "role": role_text(role),
        "account": who(account),
        "scope": scope_text(scope),
        "key": None,
        "rights": None,
        "not_before": 0,
        "by": None,
        **rest,
    }


def _grant_rows(view: View) -> list[dict[str, Any]]:
    state, now = view.history.state, view.now
    rows = []
    for scope, role, account, grant in state.listing():
        reason = explain.record(state, scope, role, account, now)
        live = reason.code == explain.ALLOWS
        mask, text = reason.rights, "holds" if live else reason.code
        if live and state.paused:
            text = "paused"
        elif live and not view.final.held(scope, role, account, now).rights & mask:
            text = "waits for finality"
        row = _row(
            "grant",
            role,
            account,
            scope,
            rights=hex(mask if live else grant.rights),
            not_before=grant.not_before,
            until=grant.expiry,
            by=who(grant.by) if any(grant.by) else None,
            state=text,
            live=live or reason.code == "not-yet",
        )
        rows.append(row)
    return rows


def _admin_rows(state: State, now: int) -> list[dict[str, Any]]:
    rows = []
    for account, admins in state.admins.items():
        for (scope, role), admin in admins.items():
            live = now < admin.expiry and state.fresh(admin.serial, scope, account)
            text = "may grant" if live else "ended"
            rows.append(
                _row(
                    "admin",
                    role,
                    account,
                    scope,
                    rights=hex(admin.rights),
                    until=admin.expiry,
                    state=text,
                    live=live,
                )
            )
    return rows


def _key_rows(state: State, now: int) -> list[dict[str, Any]]:
    rows = []
    for key, bindings in state.keys.items():
        for (account, scope, role), bound in bindings.items():
            grant = state.grants.get(account, {}).get((scope, role))
            live = (
                grant is not None
                and now < bound.expiry
                and bound.serial > grant.serial
                and _stands(state, (scope, role), account, now)
            )
            rows.append(
                _row(
                    "key",
                    role,
                    account,
                    scope,
                    key=words.key_text(key),
                    until=bound.expiry,
                    by=who(account),
                    state="bound" if live else "ended",
                    live=live,
                )
            )
    return rows


def can(where: Where, *, role: str, address: str, rights: str, explain: bool, json: bool) -> None:
    """`ww auth evm can`."""
    from wetware_auth_evm.cli.explain import both

    profile = _profile(where)
    word, account = words.parse_role(role), parse_address(address)
    need = words.parse_rights(rights) if rights else 0
    view = _view(profile)
    verdict = both(view.history.state, view.final, _scope(profile), word, account, view.now, need)
    if json:
        out_json(verdict.as_dict())
    else:
        answer: Style = "green" if verdict.allowed else "red"
        out(Styled("yes" if verdict.allowed else "no", answer))
        if explain:
            for reason in verdict.reasons:
                out(f"  {reason.text}")
            out(
                f"  judged by block {view.history.block.number} at {stamp(view.now)}, event "
                f"{view.history.state.seq}"
            )
    if not verdict.allowed:
        raise SystemExit(EXIT_DENIED)


def audit(where: Where, *, account: str, last: int, json: bool) -> None:
    """`ww auth evm audit`."""
    profile = _profile(where)
    about = parse_address(account) if account else None

    async def work(chain: Chain) -> tuple[History, list[tuple[Logged, bytes]], dict[int, int]]:
        history = await chain.history(note)
        rows, owner = [], NOBODY
        for logged in history.logs:
            event = logged.event
            actor = words.event_actor(event, owner)
            if about is None or about in (event.account, actor):
                rows.append((logged, actor))
            if event.name == "OwnerChanged":
                owner = event.account
        shown = rows[-last:] if last else rows
        return history, shown, await chain.times([logged for logged, _ in shown])

    history, rows, times = _on_chain(profile, work)
    if json:
        _audit_json(history, rows, times)
    else:
        _audit_text(history, rows, times)
    for name, problem in history.problems:
        note(Styled("warning:", "yellow"), f" the logs of {name} are not the history: {problem}")
    if not history.complete:
        raise SystemExit(EXIT_FAILED)


def _audit_text(
    history: History, rows: Sequence[tuple[Logged, bytes]], times: dict[int, int]
) -> None:
    cells = [
        (
            str(logged.event.seq),
            str(logged.block),
            stamp(times[logged.block]) if logged.block in times else "?",
            who(actor) if actor else "the deployer",
            words.event_text(logged.event, 0),
        )
        for logged, actor in rows
    ]
    table(("event", "block", "time", "by", "what"), cells)
    state, contract = history.state, history.contract
    head = f"0x{contract.head.hex()}"
    if history.complete:
        out(
            Styled("complete", "green"),
            f": all {contract.seq} events, whose hash is the contract's head {head} at block "
            f"{history.block.number}",
        )
        return
    out(
        Styled("NOT COMPLETE", "red"),
        f": {state.seq} of {contract.seq} events follow each other, and their hash is not the "
        f"contract's head {head} at block {history.block.number}",
    )


def _audit_json(
    history: History, rows: Sequence[tuple[Logged, bytes]], times: dict[int, int]
) -> None:
    out_json(
        {
            "complete": history.complete,
            "seq": history.contract.seq,
            "head": "0x" + history.contract.head.hex(),
            "block": history.block.number,
            "events_found": history.state.seq,
            "problems": [{"endpoint": name, "problem": why} for name, why in history.problems],
            "events": [
                {
                    **words.event_plain(logged.event),
                    "block": logged.block,
                    "time": times.get(logged.block),
                    "tx": "0x" + logged.tx.hex(),
                    "who": who(actor) if actor else None,
                }
                for logged, actor in rows
            ],
        }
    )


# --- status ---------------------------------------------------------------------------------------


def status(where: Where, *, json: bool) -> None:
    """`ww auth evm status`."""
    profile = _profile(where)

    async def work() -> dict[str, Any]:
        async with Chain(profile) as chain:
            return await _chain_status(chain)

    found = asyncio.run(work())
    found["node"] = _node_status()
    problems = [*found["problems"], *_node_problems(found["node"], profile)]
    found["problems"] = problems
    if json:
        out_json(found)
    else:
        _print_status(found)
    if problems:
        raise SystemExit(EXIT_FAILED)


def _problem(what: str, remedy: str) -> dict[str, str]:
    return {"what": what, "try": remedy}


async def _chain_status(chain: Chain) -> dict[str, Any]:
    profile, problems = chain.profile, []
    probes = await chain.probe()
    if not all(probe.error for probe in probes):  # else what is said below says all of it
        problems += _probe_problems(chain, probes)
    found: dict[str, Any] = {
        "chain_id": profile.chain_id or None,
        "contract": who(profile.contract),
        "scope": profile.scope,
        "source": profile.source,
        "finality": str(profile.when_final),
        "quorum": chain.endpoints.quorum,
        "endpoints": [_probe_plain(probe) for probe in probes],
        "state": None,
    }
    try:
        await chain.identify()
        found["chain_id"] = chain.profile.chain_id
        tip = await chain.tip()
        state = await chain.state(tip)
        final = await chain.final(tip)
    except WetwareError as exc:
        problems.append(_problem(exc.message, exc.hint))
    else:
        now = time.time()
        found |= {
            "block": tip.number,
            "block_time": tip.time,
            "final_block": final.number if final is not None else None,
        }
        if state is not None:
            found["state"] = {
                "owner": who(state.owner),
                "paused": state.paused,
                "seq": state.seq,
                "head": "0x" + state.head.hex(),
                "changed_at_block": state.changed_at,
                "pending_owner": who(state.pending) if any(state.pending) else None,
                "owner_ready_at": state.ready_at or None,
            }
            if state.paused:
                problems.append(
                    _problem("the contract is paused: nobody holds any role", "ww auth evm unpause")
                )
        if str(profile.when_final) != "latest" and now - tip.time > CLOCK_S_TOLD:
            problems.append(
                _problem(
                    f"the newest block is {words.span(now - tip.time)} old",
                    "the endpoints are behind, or the clock here is wrong: ww doctor",
                )
            )
    found["problems"] = problems
    return found


def _probe_plain(probe: Probe) -> dict[str, Any]:
    return {
        "name": probe.name,
        "chain_id": probe.chain_id,
        "block": probe.block.number if probe.block is not None else None,
        "latency_ms": round(probe.latency_s * 1000, 1),
        "error": probe.error,
        "dissent": probe.dissent,
    }


def _probe_problems(chain: Chain, probes: Sequence[Probe]) -> list[dict[str, str]]:
    problems = []
    for probe in probes:
        if probe.error:
            problems.append(
                _problem(
                    f"{probe.name} does not answer: {probe.error}",
                    "start the node again" if chain.profile.dev else "check it, or name another",
                )
            )
        if probe.dissent:
            problems.append(
                _problem(
                    f"{probe.name} has {probe.dissent}",
                    "it is behind, on a fork, or lies: replace it if that stays",
                )
            )
    numbers = [p.block.number for p in probes if p.block is not None]
    late = [
        (probe.name, max(numbers) - probe.block.number)
        for probe in probes
        if probe.block is not None
    ]
    remedy = "it catches up, or is to be replaced"
    problems += [
        _problem(f"{name} is {blocks} blocks behind", remedy)
        for name, blocks in late
        if blocks > BEHIND_BLOCKS_TOLD
    ]
    return problems


def _node_status() -> dict[str, Any] | None:
    """What the node on this machine says of its replica; None if none runs."""
    if not (node_data_dir() / paths.RUNTIME_FILE).exists() or options.node:
        return None

    async def work(session: Any) -> dict[str, Any]:
        found: dict[str, Any] = await session.auth_evm.status()
        return found

    try:
        return run_client(work)
    except (WetwareError, AttributeError) as exc:
        return {"error": str(exc), "hint": getattr(exc, "hint", "")}


def _node_problems(node: dict[str, Any] | None, profile: Profile) -> list[dict[str, str]]:
    if node is None or "error" in node:
        return []
    problems = []
    if node["contract"].lower() != who(profile.contract).lower():
        problems.append(
            _problem(
                f"the node here is of another contract, {node['contract']}",
                "give --contract, or leave --profile out",
            )
        )
    if node["regressed"]:
        problems.append(
            _problem(
                "the node saw a block that was final disappear, and admits nobody until an "
                "operator acts",
                "find out what the chain and the endpoints did; then see `ww doctor`",
            )
        )
    elif node["suspended"]:
        problems.append(
            _problem(f"the node admits nobody: {node['suspended']}", "it resumes by itself")
        )
    problems += [
        _problem(warning, "see docs: endpoints and quorum") for warning in node["warnings"]
    ]
    return problems


def _print_status(found: dict[str, Any]) -> None:
    state = found["state"]
    now = time.time()
    lines = [
        ("chain", str(found["chain_id"] or "unknown")),
        ("contract", f"{found['contract']}, scope {found['scope']}"),
        ("from", found["source"] or "flags"),
    ]
    if "block" in found:
        final = found["final_block"]
        lines += [
            ("block", f"{found['block']}, {when(found['block_time'], now)}"),
            ("final", f"{'none yet' if final is None else final} (finality: {found['finality']})"),
        ]
    if state is not None:
        lines += [
            ("owner", state["owner"]),
            ("paused", "yes" if state["paused"] else "no"),
            ("events", f"{state['seq']}, head {state['head']}"),
        ]
        if state["pending_owner"]:
            ready = when(state["owner_ready_at"], now)
            lines.append(("offered", f"to {state['pending_owner']}, who can accept from {ready}"))
    for name, value in lines:
        out(f"{name:9} {value}")
    out("")
    table(
        ("endpoint", "chain", "block", "answers in", "state"),
        [
            (
                endpoint["name"],
                str(endpoint["chain_id"] or "-"),
                str(endpoint["block"] if endpoint["block"] is not None else "-"),
                "-" if endpoint["error"] else f"{endpoint['latency_ms']:.0f} ms",
                endpoint["error"] or endpoint["dissent"] or "agrees",
            )
            for endpoint in found["endpoints"]
        ],
        styles={"state": {"agrees": "green"}},
    )
    _print_node(found["node"])
    for problem in found["problems"]:
        note(Styled("problem:", "red"), f" {problem['what']}")
        if problem["try"]:
            note(f"try: {problem['try']}")


def _print_node(node: dict[str, Any] | None) -> None:
    out("")
    if node is None:
        out("no node runs here")
    elif "error" in node:
        out(f"a node runs here, and does not say how its replica is: {node['error']}")
        if node["hint"]:
            note(f"try: {node['hint']}")
    else:
        out(
            f"the node here is at event {node['seq']} of block {node['tip_block']} (final: event "
            f"{node['final_seq']} of block {node['final_block']}); {node['grants']} grants, "
            f"{node['admins']} admins, {node['keys']} keys"
        )


# --- login ----------------------------------------------------------------------------------------


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
    """`ww auth evm login`."""
    from wetware_auth_evm.cli import logins

    name = wallets.chosen(options.key)
    profile = _profile(where, cluster=cluster)
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
        pending = logins.load_pending(name, profile.cluster)
        if wallet_address and parse_address(wallet_address) != pending.grant.account:
            raise InvalidArgument(
                f"the text that waits for a signature is of {who(pending.grant.account)}",
                hint="run login with --wallet-address anew",
            )
        given = logins.parse_signature(signature)
        stored = _on_chain(profile, lambda chain: logins.judge(chain, pending, given))
        logins.forget_pending(name, profile.cluster)
        _keep_session(name, stored, json)
        return
    file = None if wallet_address and not sign_with_file else _wallet_file()
    account = parse_address(wallet_address) if wallet_address else _address_of(file)
    # The key is opened before: the time to type would count as the session's.
    wallet = _open(file) if file is not None else None
    asked = [part.strip() for part in roles.split(",") if part.strip()]
    if roles and not asked:
        raise InvalidArgument("--roles names none", hint="leave it out for all that you hold")
    seconds = int(hours * 3600)

    async def work(chain: Chain) -> logins.Pending | StoredSession:
        pending = await logins.prepare(chain, account, asked, seconds, text=eip4361, say=note)
        if wallet is None:
            return pending
        signed = wallet.sign(pending.digest)
        return await logins.judge(chain, pending, signed)

    found = _on_chain(profile, work)
    if isinstance(found, logins.Pending):
        logins.save_pending(name, found)
        _print_pending(name, found, json)
        return
    _keep_session(name, found, json)


def _address_of(file: WalletFile | None) -> bytes:
    if file is None:  # not reached: there is an address or a file
        raise InvalidArgument("which wallet?", hint="--wallet-address ADDRESS")
    return file.address


def _print_pending(name: str, pending: Any, json: bool) -> None:
    grant: SessionGrant = pending.grant
    if pending.text:
        if json:
            out_json({"form": "eip4361", "account": who(grant.account), "text": grant.text()})
        else:
            sys.stdout.write(grant.text() + "\n")
    else:
        out_json(grant.typed_data())
    form = "personal_sign (EIP-191)" if pending.text else "eth_signTypedData_v4 (EIP-712)"
    option = "" if name == "default" else f" --key {name}"
    note(f"let {who(grant.account)} sign this with {form}, before {stamp(grant.expires_at)}; then:")
    note(f"ww{option} auth evm login --signature 0x…")


def _keep_session(name: str, stored: StoredSession, json: bool) -> None:
    from wetware_auth_evm.login import session

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
    """`ww auth evm logout`."""
    from wetware_auth_evm.cli import logins
    from wetware_auth_evm.login import session

    name = wallets.chosen(options.key)
    wallets.wallet_path(name)
    there = [found for who_, found in session.listing() if who_ == name]
    waiting = logins.pending_clusters(name)
    wanted = [*there, *waiting] if all_ else [cluster]
    if not all_ and not cluster:
        wanted = sorted({*there, *waiting})
        if len(wanted) > 1:
            raise InvalidArgument(
                f"there are sessions in {len(wanted)} clusters: {', '.join(wanted)}",
                hint="give --cluster ID, or --all",
            )
    gone = 0
    for each in dict.fromkeys(wanted):
        gone += session.remove(name, each)
        logins.forget_pending(name, each)
    if not gone:
        note(f"{name} is logged in nowhere" + (f" in {cluster}" if cluster else ""))
        return
    note(
        f"{gone} session{'s' if gone > 1 else ''} forgotten on this machine; a copy of the file "
        "would stay good until it expires: `ww auth evm renounce`, or revoke-all, ends that"
    )


def forget(*, force: bool) -> None:
    """`ww auth evm forget`."""
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


# --- wallets and profiles -------------------------------------------------------------------------


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
    """`ww auth evm new-key`."""
    if wallets.wallet_path(name).exists():
        wallets.create(name)  # says that it is never overwritten
    _show_wallet(wallets.create(name, passphrase=_new_passphrase(passphrase)), json, made=True)


def import_key(*, file: str, name: str, passphrase: bool, json: bool) -> None:
    """`ww auth evm import-key`."""
    target = name or wallets.chosen(options.key)
    wallets.wallet_path(target)
    if file.removeprefix("0x").isalnum() and len(file.removeprefix("0x")) == 64:
        raise InvalidArgument(
            "a key on the command line stays in the shell's history",
            hint="give it on stdin: ww auth evm import-key -",
        )
    text = _read_file(file, "the key")
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
    """`ww auth evm address`."""
    _show_wallet(_wallet_file(), json)


def export_profile(where: Where, *, file: str, cluster: str) -> None:
    """`ww auth evm export-profile`."""
    from dataclasses import replace

    from wetware_auth_evm import contract as artifact
    from wetware_auth_evm.chain.finality import is_loopback

    profile = _profile(where, cluster=cluster)

    async def work(chain: Chain) -> Profile:
        return replace(
            chain.profile,
            genesis_hash=chain.profile.genesis_hash or await chain.genesis(),
            code_hash=chain.profile.code_hash or artifact.load().runtime_hash,
            nodes=chain.profile.nodes or _node_addrs(),
        )

    found = _on_chain(profile, work)
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
    """`ww auth evm use-profile`."""
    found = profiles.from_text(_read_file(file, "the profile"), file)
    if not (found.contract and found.endpoints):
        raise ConfigError(f"{file} names no contract or no endpoint", code="config.auth_evm")

    async def right(chain: Chain) -> None:
        return None

    if not offline:
        try:
            _on_chain(found, right)
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
