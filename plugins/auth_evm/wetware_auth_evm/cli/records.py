"""`list` and `can`: who holds what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wetware.cli.app import Style, Styled, note, out, out_json, table
from wetware.errors import EXIT_DENIED
from wetware_auth_evm.chain.addresses import parse_address
from wetware_auth_evm.chain.state import ALLOWS
from wetware_auth_evm.cli import explain, words
from wetware_auth_evm.cli.shared import on_chain, profile_of, scope_of
from wetware_auth_evm.cli.words import role_text, scope_text, stamp, who
from wetware_auth_evm.node.config import ROOT_NAME

if TYPE_CHECKING:
    from wetware_auth_evm.chain.profile import Profile
    from wetware_auth_evm.chain.state import State
    from wetware_auth_evm.cli.given import Where
    from wetware_auth_evm.cli.reads import View


def stands(state: State, at: tuple[bytes, bytes], account: bytes, now: int) -> bool:
    grant = state.grants[account][at]
    return bool(state.held(at[0], at[1], account, max(now, grant.not_before)).rights)


def _view(profile: Profile) -> View:
    return on_chain(profile, lambda chain: chain.view(note))


def list_(where: Where, *, role: str, account: str, all_: bool, json: bool) -> None:
    profile = profile_of(where)
    wanted = (
        words.parse_role(role, any_=True) if role else None,
        parse_address(account) if account else None,
    )
    rows = records(_view(profile), scope_of(profile), *wanted, all_=all_)
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
        live = reason.code == ALLOWS
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
                and stands(state, (scope, role), account, now)
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
    from wetware_auth_evm.cli.explain import both

    profile = profile_of(where)
    word, account = words.parse_role(role), parse_address(address)
    need = words.parse_rights(rights) if rights else 0
    view = _view(profile)
    verdict = both(view.history.state, view.final, scope_of(profile), word, account, view.now, need)
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
