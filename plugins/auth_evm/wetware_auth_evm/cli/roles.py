"""Commands that change the contract: roles, admins, bound keys, the owner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from wetware.base import paths
from wetware.cli.app import Styled, ask_passphrase, node_data_dir, note, options
from wetware.errors import InvalidArgument, KeyFileError
from wetware_auth_evm.chain.addresses import parse_address
from wetware_auth_evm.chain.events import NOBODY
from wetware_auth_evm.cli import profiles, words
from wetware_auth_evm.cli.records import stands
from wetware_auth_evm.cli.shared import change, on_chain, own_address, profile_of, scope_of
from wetware_auth_evm.cli.words import who
from wetware_auth_evm.node.roles import RESERVED

if TYPE_CHECKING:
    from wetware_auth_evm.chain.profile import Profile
    from wetware_auth_evm.cli.given import Where, Write
    from wetware_auth_evm.cli.reads import Chain

BATCH_MAX: Final = 100


def grant(
    where: Where,
    write: Write,
    *,
    role: str,
    address: Sequence[str],
    expires: str,
    not_before: str,
    rights: str,
) -> None:
    now = time.time()
    accounts = [parse_address(text) for text in address]
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

    profile = profile_of(where)
    _warn_of_role(profile, role)
    items = [(scope_of(profile), word, account, since, until, mask) for account in accounts]
    if len(items) == 1:
        change(profile, write, "grant", *items[0])
    else:
        change(profile, write, "grantMany", items)


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
    word, account = words.parse_role(role), parse_address(address)
    profile = profile_of(where)
    change(profile, write, "revoke", scope_of(profile), word, account)


def revoke_all(where: Where, write: Write, *, address: str, yes: bool) -> None:
    account = parse_address(address)
    question = f"Take everything of {who(account)}, in every scope, for good?"
    change(profile_of(where), write, "revokeAll", account, question=question, yes=yes)


def reset_scope(where: Where, write: Write, *, yes: bool) -> None:
    profile = profile_of(where)
    question = f"End every grant of everybody in the scope {profile.scope}, for good?"
    change(profile, write, "resetScope", scope_of(profile), question=question, yes=yes)


def renounce(where: Where, write: Write, *, role: str, yes: bool) -> None:
    account = own_address()
    word = words.parse_role(role, any_=True) if role else None
    profile = profile_of(where)
    scope = scope_of(profile)
    if word is None:
        scope, word = on_chain(profile, lambda chain: _held_by(chain, scope, account))
    question = f"Give up everything of {who(account)}, in every scope, for good?"
    change(profile, write, "renounceAll", scope, word, question=question, yes=yes)


async def _held_by(chain: Chain, scope: bytes, account: bytes) -> tuple[bytes, bytes]:
    """(scope, role) of a record of the account that stands, in the scope first."""
    view = await chain.view(note)
    state, now = view.history.state, view.now
    found = [at for at in state.grants.get(account, {}) if stands(state, at, account, now)]
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


def pause(where: Where, write: Write, *, yes: bool) -> None:
    question = "Stop every role of everybody, on every cluster of this contract?"
    change(profile_of(where), write, "pause", question=question, yes=yes)


def unpause(where: Where, write: Write) -> None:
    change(profile_of(where), write, "unpause")


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
    word, account = words.parse_role(role, any_=True), parse_address(address)
    until = 0 if remove else words.parse_time(expires, time.time(), "--expires")
    mask = 0 if remove else words.parse_rights(rights)
    profile = profile_of(where)
    change(profile, write, "setAdmin", scope_of(profile), word, account, until, mask)


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
    where: Where, write: Write, *, role: Sequence[str], peer: str, node: bool, expires: str
) -> None:
    key = _bound_key(peer, node)
    named = _distinct(role)
    until = words.parse_time(expires, time.time(), "--expires")
    profile = profile_of(where)
    change(profile, write, "bindKey", scope_of(profile), named, key, until)


def unbind_key(
    where: Where, write: Write, *, role: Sequence[str], peer: str, node: bool, account: str
) -> None:
    key, named = _bound_key(peer, node), _distinct(role)
    whose = parse_address(account) if account else own_address()
    profile = profile_of(where)
    change(profile, write, "unbindKey", scope_of(profile), named, whose, key)


def _distinct(roles: Sequence[str]) -> list[bytes]:
    named = [words.parse_role(role) for role in roles]
    if len(set(named)) != len(named) or len(named) > BATCH_MAX:
        raise InvalidArgument(f"each role once, at most {BATCH_MAX}")
    return named


def transfer_owner(where: Where, write: Write, *, address: str, yes: bool) -> None:
    account = NOBODY if address == "none" else parse_address(address)
    if address != "none" and not any(account):
        raise InvalidArgument("the address is zero", hint="`none` withdraws an offer")
    question = (
        f"Offer the ownership of the contract, and with it every role, to {who(account)}?"
        if any(account)
        else ""
    )
    change(profile_of(where), write, "proposeOwner", account, question=question, yes=yes)


def accept_owner(where: Where, write: Write) -> None:
    change(profile_of(where), write, "acceptOwner")
