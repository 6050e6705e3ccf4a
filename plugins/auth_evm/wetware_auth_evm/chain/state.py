"""The contract's state, folded from its events, and who may do what by it. No I/O.

The rules are those of docs/reference/auth-evm-contract.md, "What holds at time t": two levels,
owner and admins; an admin's grants are bounded by the admin's own record as long as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from wetware_auth_evm.chain.errors import BadLog
from wetware_auth_evm.chain.events import ANY_ROLE, NOBODY, ROOT, Event, fold, genesis

UNTIL_FOREVER: Final = 1 << 40
VIA_ANY_ROLE, VIA_ROOT = 1, 2
ALLOWS: Final = "allows"
_NO_ACCOUNT: Final[frozenset[bytes]] = frozenset()


class Grant(NamedTuple):
    """A role of an account in a scope: Unix seconds, a mask, and under whose record."""

    not_before: int
    expiry: int
    serial: int
    rights: int
    by: bytes
    via: int


class Admin(NamedTuple):
    """What an account may grant."""

    expiry: int
    serial: int
    rights: int


class Bound(NamedTuple):
    """A key that acts for an account in a role."""

    expiry: int
    serial: int


class Held(NamedTuple):
    """What a grant gives: a mask, and until when (Unix s); `why` says which rule decided."""

    rights: int
    expiry: int
    why: str = ALLOWS


class Standing(NamedTuple):
    """A mask in a role, from when on (Unix s)."""

    role: bytes
    not_before: int
    rights: int


_NONE, _EXPIRED, _NOT_YET, _RIGHTS, _ACCOUNT_EPOCH, _SCOPE_EPOCH = (
    Held(0, 0, why)
    for why in ("none", "expired", "not-yet", "rights", "account-epoch", "scope-epoch")
)
_ADMIN_REMOVED, _ADMIN_EXPIRED, _ADMIN_EPOCH, _ADMIN_LATER = (
    Held(0, 0, f"admin-{why}") for why in ("removed", "expired", "epoch", "later")
)
ScopeRole = tuple[bytes, bytes]
_Undo = tuple[Any, Any, Any]


def under(grant: Grant, scope: bytes, role: bytes) -> ScopeRole:
    """Of which of its admin's records a grant hangs."""
    return (
        ROOT if grant.via & VIA_ROOT else scope,
        ANY_ROLE if grant.via & VIA_ANY_ROLE else role,
    )


class State:
    """One state of the contract.

    Args:
        chain_id: EIP-155.
        contract: Its address, 20 bytes.
        journal: Keep what is needed to undo events, for a state that follows an unsettled chain.

    Attributes:
        seq: Number of the last event.
        head: Hash of the history.
    """

    __slots__ = (
        "_places",
        "account_epochs",
        "admins",
        "grants",
        "head",
        "journal",
        "keys",
        "owner",
        "paused",
        "pending",
        "scope_epochs",
        "seq",
    )

    def __init__(self, chain_id: int, contract: bytes, *, journal: bool = False) -> None:
        self.seq, self.head = 0, genesis(chain_id, contract)
        self.owner, self.pending, self.paused = NOBODY, (NOBODY, 0), False
        self.grants: dict[bytes, dict[ScopeRole, Grant]] = {}
        """Account → (scope, role) → grant."""
        self.admins: dict[bytes, dict[ScopeRole, Admin]] = {}
        self.keys: dict[bytes, dict[tuple[bytes, bytes, bytes], Bound]] = {}
        """Key → (account, scope, role) → binding."""
        self.account_epochs: dict[bytes, int] = {}
        self.scope_epochs: dict[bytes, int] = {}
        self.journal: list[_Undo] | None = [] if journal else None
        self._places: dict[ScopeRole, ScopeRole] = {}

    def copy(self, *, journal: bool) -> State:
        """The same state, with or without a journal."""
        new = object.__new__(State)
        for name in ("seq", "head", "owner", "pending", "paused"):
            setattr(new, name, getattr(self, name))
        for name in ("grants", "admins", "keys"):
            setattr(new, name, {key: dict(inner) for key, inner in getattr(self, name).items()})
        for name in ("account_epochs", "scope_epochs"):
            setattr(new, name, dict(getattr(self, name)))
        new.journal = [] if journal else None
        new._places = dict(self._places)
        return new

    # --- events -----------------------------------------------------------------------------------

    def apply(self, event: Event, head: bytes | None = None) -> frozenset[bytes] | None:
        """Fold one event in; returns the accounts that it is about, None for everybody.

        `head` is the hash of the history with it, where the caller has computed it already.
        Raises BadLog, and changes nothing then, if it is not the next one.
        """
        if event.seq != self.seq + 1:
            raise BadLog(f"event {event.seq} follows event {self.seq}")
        account, scope, data = event.account, event.scope, event.data
        touched: frozenset[bytes] | None = frozenset({account})
        match event.name:
            case "Granted":
                grant = Grant(
                    data["not_before"],
                    data["expiry"],
                    data["serial"],
                    data["rights"],
                    data["by"] if any(data["by"]) else NOBODY,
                    data["via"],
                )
                self._put(self.grants, account, self._place(scope, data["role"]), grant)
            case "Revoked":
                self._put(self.grants, account, (scope, data["role"]), None)
            case "RevokedAll":
                self._set(self.account_epochs, account, event.seq)
                if self.admins.get(account):
                    touched = None
            case "ScopeReset":
                self._set(self.scope_epochs, scope, event.seq)
                touched = None
            case "AdminSet":
                admin = Admin(data["expiry"], data["serial"], data["rights"])
                kept = admin if admin.rights else None
                self._put(self.admins, account, (scope, data["role"]), kept)
                touched = None
            case "KeyBound" | "KeyUnbound":
                self._bind(event)
            case "Paused" | "Unpaused":
                self._assign("paused", event.name == "Paused")
                touched = None
            case "OwnerProposed":
                self._assign("pending", (account, data["ready_at"]))
            case "OwnerChanged":
                self._assign("owner", account)
                self._assign("pending", (NOBODY, 0))
        self._assign("head", fold(self.head, event.leaf) if head is None else head)
        self._assign("seq", event.seq)
        return touched

    def withdraws(self, event: Event) -> frozenset[bytes] | None:
        """Whom the next event takes something from; None: everybody. To be asked before `apply`.

        A grant, an admin's record and a binding can withdraw, too: they replace what was there.
        Takes time in proportion to the grants for what is about a scope or an admin.
        """
        account, data = event.account, event.data
        match event.name:
            case "Granted":
                old = self.grants.get(account, {}).get((event.scope, data["role"]))
                if old is None or (
                    data["serial"] == old.serial  # else its bound keys ended
                    and data["by"] in (NOBODY, old.by)
                    and (data["by"] == NOBODY or data["via"] == old.via)
                    and data["not_before"] <= old.not_before
                    and data["expiry"] >= old.expiry
                    and not old.rights & ~data["rights"]
                ):
                    return _NO_ACCOUNT
                return frozenset({account})
            case "AdminSet":
                admin = self.admins.get(account, {}).get((event.scope, data["role"]))
                if admin is None or (
                    data["serial"] == admin.serial
                    and data["expiry"] >= admin.expiry
                    and not admin.rights & ~data["rights"]
                ):
                    return _NO_ACCOUNT
                return self._granted_by(account, event.scope, data["role"])
            case "KeyBound":
                at = (account, event.scope, data["role"])
                bound = self.keys.get(data["key"], {}).get(at)
                longer = bound is None or data["expiry"] >= bound.expiry
                return _NO_ACCOUNT if longer else frozenset({account})
            case "RevokedAll":
                appointed = self.admins.get(account, {})
                return frozenset({account}).union(
                    *(self._granted_by(account, where, role) for where, role in appointed)
                )
            case "Revoked" | "KeyUnbound":
                return frozenset({account})
            case "ScopeReset":
                return frozenset(
                    who
                    for scope, _, who, grant in self.listing()
                    if scope == event.scope or (event.scope == ROOT and grant.via & VIA_ROOT)
                )
            case "Paused":
                return None
        return _NO_ACCOUNT  # unpaused, and what is about owners

    def _granted_by(self, admin: bytes, where: bytes, what: bytes) -> frozenset[bytes]:
        """Who has a grant under one of an admin's records."""
        return frozenset(
            account
            for scope, role, account, grant in self.listing()
            if grant.by == admin and under(grant, scope, role) == (where, what)
        )

    def _bind(self, event: Event) -> None:
        data = event.data
        key, at = data["key"], (event.account, event.scope, data["role"])
        bound = Bound(data["expiry"], event.seq) if event.name == "KeyBound" else None
        self._put(self.keys, key, at, bound)

    def mark(self) -> int:
        """Where the journal is now, for `rollback`."""
        return len(self._journal())

    def rollback(self, mark: int) -> None:
        journal = self._journal()
        while len(journal) > mark:
            place, key, before = journal.pop()
            if place is None:
                setattr(self, key, before)
            elif before is None:
                place.pop(key, None)
            else:
                place[key] = before

    def forget(self, mark: int) -> None:
        """Drop the journal up to a mark: what is final is not undone."""
        del self._journal()[:mark]

    def _journal(self) -> list[_Undo]:
        if self.journal is None:
            raise TypeError("a state without a journal cannot be undone")
        return self.journal

    def _set(self, place: dict[Any, Any], key: Any, value: Any) -> None:
        if self.journal is not None:
            self.journal.append((place, key, place.get(key)))
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value

    def _place(self, scope: bytes, role: bytes) -> ScopeRole:
        """The same pair for the same names: there are few of them, and many records."""
        pair = (scope, role)
        return self._places.setdefault(pair, pair)

    def _put(self, table: dict[bytes, dict[Any, Any]], outer: bytes, key: Any, value: Any) -> None:
        inner = table.get(outer)
        if inner is None:
            if value is None:
                return
            inner = table[outer] = {}  # an empty one means the same as none: not journaled
        self._set(inner, key, value)

    def _assign(self, name: str, value: Any) -> None:
        if self.journal is not None:
            self.journal.append((None, name, getattr(self, name)))
        setattr(self, name, value)

    # --- decisions --------------------------------------------------------------------------------

    def fresh(self, serial: int, scope: bytes, account: bytes) -> bool:
        """Whether no epoch of the account or the scope began since."""
        return serial > self.account_epochs.get(account, 0) and serial > self.scope_epochs.get(
            scope, 0
        )

    def held(self, scope: bytes, role: bytes, account: bytes, now: int) -> Held:
        """What one grant gives now; a pause is not looked at."""
        grant = self.grants.get(account, {}).get((scope, role))
        return _NONE if grant is None else self._held(grant, scope, role, account, now)

    def _held(self, grant: Grant, scope: bytes, role: bytes, account: bytes, now: int) -> Held:
        held = self._standing(grant, scope, role, account, now)
        return _NOT_YET if now < grant.not_before and held.rights else held

    def _standing(self, grant: Grant, scope: bytes, role: bytes, account: bytes, now: int) -> Held:
        if now >= grant.expiry:
            return _EXPIRED
        if self.account_epochs.get(account, 0) >= grant.serial:
            return _ACCOUNT_EPOCH
        if self.scope_epochs.get(scope, 0) >= grant.serial:
            return _SCOPE_EPOCH
        if grant.by == NOBODY:
            return Held(grant.rights, grant.expiry)
        where, what = under(grant, scope, role)
        admin = self.admins.get(grant.by, {}).get((where, what))
        if admin is None:
            return _ADMIN_REMOVED
        if now >= admin.expiry:
            return _ADMIN_EXPIRED
        if not self.fresh(admin.serial, where, grant.by):
            return _ADMIN_EPOCH
        if admin.serial >= grant.serial:
            return _ADMIN_LATER
        rights = grant.rights & admin.rights
        return Held(rights, min(grant.expiry, admin.expiry)) if rights else _RIGHTS

    def rights(self, scope: bytes, role: bytes, account: bytes, now: int) -> int:
        """`rightsOf`: the mask that an account has in a role."""
        if self.paused:
            return 0
        mask = self.held(scope, role, account, now).rights
        return mask if scope == ROOT else mask | self.held(ROOT, role, account, now).rights

    def key_rights(self, scope: bytes, role: bytes, account: bytes, key: bytes, now: int) -> int:
        """`keyRightsOf`: the mask that a bound key has for an account in a role."""
        if self.paused:
            return 0
        mask = 0
        for where in {scope, ROOT}:
            bound = self.keys.get(key, {}).get((account, where, role))
            grant = self.grants.get(account, {}).get((where, role))
            if bound is None or grant is None or now >= bound.expiry:
                continue
            if bound.serial > grant.serial:
                mask |= self._held(grant, where, role, account, now).rights
        return mask

    def roles(self, scope: bytes, account: bytes, now: int) -> dict[bytes, int]:
        """Role → mask of all that an account holds in a scope."""
        if self.paused:
            return {}
        found: dict[bytes, int] = {}
        for (where, role), grant in self.grants.get(account, {}).items():
            if where in (scope, ROOT) and (
                mask := self._held(grant, where, role, account, now).rights
            ):
                found[role] = found.get(role, 0) | mask
        return found

    def standing(self, scope: bytes, account: bytes, now: int) -> list[Standing]:
        """What an account holds in a scope, and what has yet to begin; a pause is not looked at."""
        found = []
        for (where, role), grant in self.grants.get(account, {}).items():
            mask = self._standing(grant, where, role, account, now).rights
            if mask and where in (scope, ROOT):
                found.append(Standing(role, grant.not_before, mask))
        return found

    def key_standing(self, scope: bytes, account: bytes, key: bytes, now: int) -> list[Standing]:
        """As `standing`, of a key that is bound to the account."""
        found = []
        for (who, where, role), bound in self.keys.get(key, {}).items():
            grant = self.grants.get(account, {}).get((where, role))
            if who != account or where not in (scope, ROOT) or grant is None:
                continue
            if now < bound.expiry and bound.serial > grant.serial:
                mask = self._standing(grant, where, role, account, now).rights
                found.append(Standing(role, grant.not_before, mask))
        return found

    def bound_to(self, accounts: frozenset[bytes]) -> frozenset[tuple[bytes, bytes]]:
        """(account, key) of all bindings of some accounts, dead ones included."""
        return frozenset(
            (account, key)
            for key, bindings in self.keys.items()
            for account, _, _ in bindings
            if account in accounts
        )

    def key_accounts(self, scope: bytes, role: bytes, key: bytes, now: int) -> dict[bytes, int]:
        """Account → mask, of the accounts for which a key acts in a role."""
        accounts = {
            account
            for account, where, what in self.keys.get(key, {})
            if what == role and where in (scope, ROOT)
        }
        found = {a: self.key_rights(scope, role, a, key, now) for a in accounts}
        return {account: mask for account, mask in found.items() if mask}

    def key_roles(self, scope: bytes, account: bytes, key: bytes, now: int) -> dict[bytes, int]:
        """Role → mask of all in which a key acts for an account in a scope."""
        roles = {
            role
            for who, where, role in self.keys.get(key, {})
            if who == account and where in (scope, ROOT)
        }
        found = {role: self.key_rights(scope, role, account, key, now) for role in roles}
        return {role: mask for role, mask in found.items() if mask}

    def epochs(self, scope: bytes, account: bytes) -> tuple[int, int, int]:
        """Of the scope, of ROOT, and of the account: what a session is bound to."""
        return (
            self.scope_epochs.get(scope, 0),
            self.scope_epochs.get(ROOT, 0),
            self.account_epochs.get(account, 0),
        )

    def next_end(self, scope: bytes, account: bytes, now: int) -> int:
        """When (Unix s) the first of what an account holds in a scope ends; UNTIL_FOREVER: never.

        Also when the first that is not yet valid begins.
        """
        ends = [UNTIL_FOREVER]
        for (where, role), grant in self.grants.get(account, {}).items():
            if where not in (scope, ROOT):
                continue
            held = self._standing(grant, where, role, account, now)
            if held.rights:
                ends.append(grant.not_before if now < grant.not_before else held.expiry)
        return min(ends)

    def next_key_end(self, account: bytes, key: bytes, now: int) -> int:
        """When (Unix s) the first binding of a key to an account ends; UNTIL_FOREVER: never."""
        bindings = self.keys.get(key, {}).items()
        ends = (bound.expiry for (who, _, _), bound in bindings if who == account)
        return min((end for end in ends if end > now), default=UNTIL_FOREVER)

    def listing(self) -> Iterator[tuple[bytes, bytes, bytes, Grant]]:
        """(scope, role, account, grant) of all records, dead ones included."""
        for account, records in self.grants.items():
            for (scope, role), grant in records.items():
                yield scope, role, account, grant

    def summary(self) -> Mapping[str, int]:
        """Sizes, for `ww auth evm status`."""
        return {
            "grants": sum(map(len, self.grants.values())),
            "admins": sum(map(len, self.admins.values())),
            "keys": sum(map(len, self.keys.values())),
        }
