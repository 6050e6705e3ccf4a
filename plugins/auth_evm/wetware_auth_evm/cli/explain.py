"""Why somebody holds a role, or not: which record, epoch, admin or pause decided. No I/O.

`State` decides, and says by which rule; here that becomes a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wetware_auth_evm.chain.events import ROOT
from wetware_auth_evm.chain.state import ALLOWS, Grant, State, under
from wetware_auth_evm.cli.words import rights_text, role_text, scope_text, span, stamp, when, who


@dataclass(frozen=True, slots=True)
class Reason:
    """What one record says.

    Attributes:
        scope: Name of the scope in which the record is.
        code: `allows`, or why it does not: `paused`, `none`, `expired`, `not-yet`, `account-epoch`,
            `scope-epoch`, `admin-removed`, `admin-expired`, `admin-epoch`, `admin-later`, `rights`,
            `not-final`, `withdrawn`.
        text: The same as a sentence.
        rights: What it gives.
    """

    scope: str
    code: str
    text: str
    rights: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an account holds a role, and why.

    Attributes:
        allowed: Whether it has all the rights that were asked for; with none asked for, any.
        rights: The mask that it has.
        until: Unix s at which the first of it ends; 0 where there is nothing.
        reasons: Of the records that were looked at; what decided first.
    """

    allowed: bool
    rights: int
    until: int
    reasons: tuple[Reason, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "allowed": self.allowed,
            "rights": hex(self.rights),
            "until": self.until,
            "reasons": [
                {"scope": r.scope, "code": r.code, "text": r.text, "rights": hex(r.rights)}
                for r in self.reasons
            ],
        }


def explain(
    state: State, scope: bytes, role: bytes, account: bytes, now: int, need: int = 0
) -> Verdict:
    """Whether an account holds a role in a scope by one state.

    Args:
        state: Of the contract.
        scope: Of the cluster.
        role: Which.
        account: Whose.
        now: Unix s.
        need: The rights that are asked for; 0: any.
    """
    reasons = [
        record(state, where, role, account, now)
        for where in (scope, ROOT)
        if where == scope or (where, role) in state.grants.get(account, {})
    ]
    if state.paused:
        paused = Reason("", "paused", "the contract is paused: nobody holds any role")
        return Verdict(False, 0, 0, (paused, *reasons))
    mask = state.rights(scope, role, account, now)
    allowed = bool(mask) and mask & need == need
    reasons.sort(key=lambda reason: reason.code != ALLOWS)
    if mask and not allowed:
        lacking = Reason(
            "",
            "rights",
            f"{rights_text(need)} is asked for, and the grants give {rights_text(mask)}: "
            f"{hex(need & ~mask)} is lacking",
            mask,
        )
        return Verdict(False, mask, _until(state, scope, role, account, now), (lacking, *reasons))
    return Verdict(allowed, mask, _until(state, scope, role, account, now), tuple(reasons))


def both(
    tip: State,
    final: State,
    scope: bytes,
    role: bytes,
    account: bytes,
    now: int,
    need: int = 0,
) -> Verdict:
    """As a node decides: allowed is what the newest and the newest final block both allow."""
    newest = explain(tip, scope, role, account, now, need)
    settled = explain(final, scope, role, account, now, need)
    mask = newest.rights & settled.rights
    if newest.allowed and not (mask and mask & need == need):
        waits = Reason(
            "",
            "not-final",
            "the newest block allows it, the newest final one not yet: nodes wait until the grant "
            "is final",
        )
        return Verdict(False, mask, newest.until, (waits, *newest.reasons))
    if settled.allowed and not newest.allowed:
        gone = Reason(
            "",
            "withdrawn",
            "it was taken away in a block that is not final yet: that acts at once",
        )
        return Verdict(False, mask, 0, (*newest.reasons, gone))
    return Verdict(newest.allowed, mask, newest.until, newest.reasons)


def _until(state: State, scope: bytes, role: bytes, account: bytes, now: int) -> int:
    ends = [
        held.expiry
        for where in {scope, ROOT}
        if (held := state.held(where, role, account, now)).rights
    ]
    return min(ends, default=0)


def record(state: State, where: bytes, role: bytes, account: bytes, now: int) -> Reason:
    """What one record says; a pause is not looked at."""
    name = scope_text(where)
    what = f"{role_text(role)} in {name}"
    grant = state.grants.get(account, {}).get((where, role))
    if grant is None:
        return Reason(name, "none", f"there is no grant of {what}")
    held = state.held(where, role, account, now)
    if held.why == ALLOWS:
        by = f"by the admin {who(grant.by)}" if any(grant.by) else "by the owner"
        less = ""
        if held.rights != grant.rights:
            less = f", narrowed from {rights_text(grant.rights)} by the admin's own record"
        text = (
            f"granted {what} {by} in event {grant.serial}, until {stamp(held.expiry)} (in "
            f"{span(held.expiry - now)}), rights {rights_text(held.rights)}{less}"
        )
        return Reason(name, ALLOWS, text, held.rights)
    rest = ""
    match held.why:
        case "expired":
            rest = f"ended at {when(grant.expiry, now)}"
        case "not-yet":
            rest = f"begins at {when(grant.not_before, now)}"
        case "rights":
            rest = "has none of the rights of the admin's record"
        case "account-epoch":
            rest = (
                f"(of event {grant.serial}) ended when everything of the account was revoked, in "
                f"event {state.account_epochs[account]}"
            )
        case "scope-epoch":
            rest = (
                f"(of event {grant.serial}) ended when the scope {name} was reset, in event "
                f"{state.scope_epochs[where]}"
            )
        case why:
            rest = _of_admin(why, state, grant, where, role, now)
    return Reason(name, held.why, f"the grant of {what} {rest}")


def _of_admin(why: str, state: State, grant: Grant, scope: bytes, role: bytes, now: int) -> str:
    """Why the record of a grant's admin does not carry it, as the end of a sentence."""
    where, which = under(grant, scope, role)
    by, what = who(grant.by), f"admin of {role_text(which)} in {scope_text(where)}"
    admin = state.admins.get(grant.by, {}).get((where, which))
    if why == "admin-removed" or admin is None:
        return f"ended with its admin: {by} is no longer {what}"
    if why == "admin-expired":
        return f"ended with its admin: {by} was {what} until {when(admin.expiry, now)}"
    if why == "admin-epoch":
        epoch = max(state.account_epochs.get(grant.by, 0), state.scope_epochs.get(where, 0))
        return f"ended with its admin: what made {by} {what} was ended in event {epoch}"
    return (
        f"ended with its admin's former appointment: {by} was made {what} anew in event "
        f"{admin.serial}, and that revives nothing"
    )
