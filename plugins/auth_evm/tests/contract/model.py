"""WetwareACL in Python, written from its reference alone: what each transaction does and answers.

`Model` predicts for a call the events, or the error with its values. `Replay` knows no rules: it
folds logs into state and `head`, as a follower does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from eth_abi.abi import encode
from eth_utils.address import to_canonical_address
from eth_utils.crypto import keccak

from .chains import EVENTS, Event, Log, Reverted, decode_event

ROOT = ANY = bytes(32)
NOBODY = "0x" + "00" * 20
GUARDIAN = b"guardian".ljust(32, b"\0")
DAY_S = 86400
MAX_TTL_S = 400 * DAY_S
OWNER_DELAY_S = 2 * DAY_S
OWNER_WINDOW_S = 14 * DAY_S
MAX_BATCH = 100
MAX_KEYS = 1000

Name = tuple[bytes, bytes, str]  # scope, role, account


@dataclass(frozen=True, slots=True)
class Grant:
    not_before: int
    expiry: int
    serial: int
    rights: int
    by: str
    via: int


@dataclass(frozen=True, slots=True)
class Admin:
    expiry: int
    serial: int
    rights: int


@dataclass(frozen=True, slots=True)
class Key:
    expiry: int
    serial: int


def first_head(chain_id: int, address: str) -> bytes:
    name = b"WetwareACL/1".ljust(32, b"\0")
    return keccak(name + chain_id.to_bytes(32, "big") + bytes(12) + to_canonical_address(address))


def next_head(head: bytes, log: Log) -> bytes:
    return keccak(head + keccak(b"".join(log.topics) + log.data))


def admin_name(name: Name, grant: Grant) -> Name:
    scope, role, _ = name
    return (ROOT if grant.via & 2 else scope, ANY if grant.via & 1 else role, grant.by)


class State:
    """The records, and what holds at a time."""

    def __init__(self) -> None:
        self.seq = 0
        self.head = b""
        self.owner = NOBODY
        self.paused = False
        self.proposal = (NOBODY, 0)
        self.grants: dict[Name, Grant] = {}
        self.admins: dict[Name, Admin] = {}
        self.keys: dict[tuple[Name, bytes], Key] = {}
        self.key_counts: dict[str, int] = {}
        self.account_epochs: dict[str, int] = {}
        self.scope_epochs: dict[bytes, int] = {}

    def _state(self) -> tuple[Any, ...]:
        return (self.seq, self.head, self.owner, self.paused, self.proposal, *self._tables())

    def _tables(self) -> tuple[dict[Any, Any], ...]:
        return (
            self.grants,
            self.admins,
            self.keys,
            self.key_counts,
            self.account_epochs,
            self.scope_epochs,
        )

    def fresh(self, name: Name, serial: int) -> bool:
        scope, _, account = name
        return serial > max(self.account_epochs.get(account, 0), self.scope_epochs.get(scope, 0))

    def living_admin(self, name: Name, now: int) -> Admin | None:
        admin = self.admins.get(name)
        return admin if admin and now < admin.expiry and self.fresh(name, admin.serial) else None

    def standing_grant(self, name: Name, now: int) -> Grant | None:
        """The grant, cut down to what its admin's record allows now."""
        grant = self.grants.get(name)
        if grant is None or now >= grant.expiry or not self.fresh(name, grant.serial):
            return None
        if grant.by == NOBODY:
            return grant
        admin = self.living_admin(admin_name(name, grant), now)
        if admin is None or admin.serial >= grant.serial:
            return None
        return replace(
            grant, rights=grant.rights & admin.rights, expiry=min(grant.expiry, admin.expiry)
        )

    def effective(self, name: Name, now: int) -> tuple[int, int]:
        grant = self.standing_grant(name, now)
        if grant is None or now < grant.not_before:
            return 0, 0
        return grant.rights, grant.expiry

    def rights(self, name: Name, now: int) -> int:
        _, role, account = name
        everywhere = self.effective((ROOT, role, account), now)[0]
        return 0 if self.paused else self.effective(name, now)[0] | everywhere

    def key_rights(self, name: Name, key: bytes, now: int) -> int:
        if self.paused:
            return 0
        total = 0
        for place in (name, (ROOT, name[1], name[2])):
            grant, bound = self.grants.get(place), self.keys.get((place, key))
            if grant and bound and now < bound.expiry and bound.serial > grant.serial:
                total |= self.effective(place, now)[0]
        return total


class Replay(State):
    """The state as the logs tell it."""

    def __init__(self, chain_id: int, address: str, logs: Iterable[Log]) -> None:
        super().__init__()
        self.head = first_head(chain_id, address)
        for log in logs:
            self.fold(log)

    def fold(self, log: Log) -> None:
        event = decode_event(log)
        f = event.fields
        assert f["seq"] == self.seq + 1
        self.seq = f["seq"]
        self.head = next_head(self.head, log)
        name: Name = (f["scope"], f.get("role", ANY), f["account"])
        match event.name:
            case "Granted":
                self.grants[name] = Grant(
                    f["notBefore"], f["expiry"], f["serial"], f["rights"], f["by"], f["via"]
                )
            case "Revoked":
                del self.grants[name]
            case "RevokedAll":
                self.account_epochs[f["account"]] = self.seq
                self.key_counts.pop(f["account"], None)
            case "ScopeReset":
                self.scope_epochs[f["scope"]] = self.seq
            case "AdminSet" if f["rights"] == 0:
                del self.admins[name]
            case "AdminSet":
                self.admins[name] = Admin(f["expiry"], f["serial"], f["rights"])
            case "KeyBound":
                old = self.keys.get((name, f["key"]))
                if old is None or old.serial <= self.account_epochs.get(f["account"], 0):
                    self.key_counts[f["account"]] = self.key_counts.get(f["account"], 0) + 1
                self.keys[name, f["key"]] = Key(f["expiry"], self.seq)
            case "KeyUnbound":
                bound = self.keys.pop((name, f["key"]))
                if bound.serial > self.account_epochs.get(f["account"], 0):
                    self.key_counts[f["account"]] -= 1
            case "Paused" | "Unpaused":
                self.paused = event.name == "Paused"
            case "OwnerProposed":
                self.proposal = (f["account"], f["readyAt"])
            case "OwnerChanged":
                self.owner, self.proposal = f["account"], (NOBODY, 0)
            case _:
                raise AssertionError(event.name)


_TOPICS = {entry["name"]: (topic, entry) for topic, entry in EVENTS.items()}


def encode_event(address: str, event: Event) -> Log:
    """The log that the event must be, byte for byte."""
    topic, entry = _TOPICS[event.name]
    assert [i["name"] for i in entry["inputs"] if i["indexed"]] == ["seq", "account", "scope"]
    plain = [i for i in entry["inputs"] if not i["indexed"]]
    f = event.fields
    topics = (
        topic,
        f["seq"].to_bytes(32, "big"),
        bytes(12) + to_canonical_address(f["account"]),
        f["scope"],
    )
    return Log(address, topics, encode([i["type"] for i in plain], [f[i["name"]] for i in plain]))


class Model(Replay):
    """What the contract has to do: `apply` returns the events or raises Reverted."""

    def __init__(self, chain_id: int, address: str, owner: str) -> None:
        super().__init__(chain_id, address, ())
        self.address = address
        self._pending: list[Event] = []
        self._emit("OwnerChanged", owner, ROOT, previous=NOBODY)

    def apply(self, function: str, args: tuple[Any, ...], sender: str, now: int) -> list[Event]:
        scalars = (self.seq, self.head, self.owner, self.paused, self.proposal)
        tables = [dict(table) for table in self._tables()]
        self._pending = []
        try:
            rule: Callable[..., None] = getattr(self, f"_do_{function}")
            rule(sender, now, *args)
        except Reverted:
            self.seq, self.head, self.owner, self.paused, self.proposal = scalars
            for table, old in zip(self._tables(), tables, strict=True):
                table.clear()
                table.update(old)
            raise
        return self._pending

    def _emit(self, event: str, account: str, scope: bytes, **fields: Any) -> None:
        made = Event(event, {"seq": self.seq + 1, "account": account, "scope": scope, **fields})
        self._pending.append(made)
        self.fold(encode_event(self.address, made))

    # The rules, in the order in which the contract checks them.

    def _only_owner(self, sender: str) -> None:
        if sender != self.owner:
            raise Reverted("NotOwner", (sender,))

    def _only_guardian(self, sender: str, now: int) -> None:
        if sender != self.owner and not self.effective((ROOT, GUARDIAN, sender), now)[0]:
            raise Reverted("NotGuardian", (sender,))

    @staticmethod
    def _batch(items: Any) -> None:
        if not 1 <= len(items) <= MAX_BATCH:
            raise Reverted("BadBatch", (len(items),))

    @staticmethod
    def _expiry(not_before: int, expiry: int, now: int) -> None:
        if expiry <= now:
            raise Reverted("ExpiryTooEarly", (expiry, now))
        if expiry <= not_before:
            raise Reverted("ExpiryTooEarly", (expiry, not_before))
        if expiry > now + MAX_TTL_S:
            raise Reverted("ExpiryTooLate", (expiry, now + MAX_TTL_S))

    def _do_grant(self, sender: str, now: int, *item: Any) -> None:
        scope, role, account, not_before, expiry, rights = item
        for bad, error in (
            (account == NOBODY, "ZeroAccount"),
            (role == ANY, "ZeroRole"),
            (rights == 0, "ZeroRights"),
        ):
            if bad:
                raise Reverted(error)
        self._expiry(not_before, expiry, now)
        name = (scope, role, account)
        standing = self.standing_grant(name, now)
        by, via, admin_serial = NOBODY, 0, 0
        if sender != self.owner:
            if role == GUARDIAN:
                raise Reverted("NotOwner", (sender,))
            if self.paused:
                raise Reverted("IsPaused")
            own = [
                (number, self.living_admin(place, now))
                for number, place in enumerate(
                    [(scope, role, sender), (scope, ANY, sender)]
                    + ([(ROOT, role, sender), (ROOT, ANY, sender)] if scope != ROOT else [])
                )
            ]
            living = [(number, admin) for number, admin in own if admin]
            if not living:
                raise Reverted("NotAdmin", (scope, role, sender))
            covering = [
                (number, admin)
                for number, admin in living
                if rights | admin.rights == admin.rights and expiry <= admin.expiry
            ]
            if not covering:
                last = living[-1][1]
                raise Reverted("ExceedsAdmin", (last.rights, last.expiry))
            by, via, admin_serial = sender, covering[0][0], covering[0][1].serial
            if standing and standing.by != sender:
                raise Reverted("HeldByAnother", (standing.by,))
        kept = standing is not None and standing.serial > admin_serial
        self._emit(
            "Granted",
            account,
            scope,
            role=role,
            notBefore=not_before,
            expiry=expiry,
            rights=rights,
            serial=standing.serial if kept and standing else self.seq + 1,
            by=by,
            via=via,
        )

    def _do_grantMany(self, sender: str, now: int, items: list[tuple[Any, ...]]) -> None:
        self._batch(items)
        for item in items:
            self._do_grant(sender, now, *item)

    def _do_setAdmin(self, sender: str, now: int, *args: Any) -> None:
        scope, role, account, expiry, rights = args
        name = (scope, role, account)
        removes = expiry == 0 and rights == 0
        if sender != self.owner and not (removes and sender == account):
            raise Reverted("NotOwner", (sender,))
        serial = 0
        if removes:
            if name not in self.admins:
                raise Reverted("NoAdmin", name)
        else:
            if account == NOBODY:
                raise Reverted("ZeroAccount")
            if rights == 0:
                raise Reverted("ZeroRights")
            self._expiry(0, expiry, now)
            living = self.living_admin(name, now)
            serial = living.serial if living else self.seq + 1
        self._emit(
            "AdminSet",
            account,
            scope,
            role=role,
            expiry=expiry,
            rights=rights,
            serial=serial,
            by=sender,
        )

    def _do_revoke(self, sender: str, now: int, scope: bytes, role: bytes, account: str) -> None:
        name = (scope, role, account)
        if name not in self.grants:
            raise Reverted("NoGrant", name)
        if sender not in (self.owner, account):
            by = self.grants[name].by
            if by != sender:
                raise Reverted("HeldByAnother", (by,))
            if not self.standing_grant(name, now):
                raise Reverted("NotAdmin", (scope, role, sender))
        self._emit("Revoked", account, scope, role=role, by=sender)

    def _do_revokeAll(self, sender: str, now: int, account: str) -> None:
        self._only_guardian(sender, now)
        if account == NOBODY:
            raise Reverted("ZeroAccount")
        self._emit("RevokedAll", account, ROOT, by=sender)

    def _do_renounceAll(self, sender: str, now: int, scope: bytes, role: bytes) -> None:
        name = (scope, role, sender)
        if not self.standing_grant(name, now) and not self.living_admin(name, now):
            raise Reverted("NoGrant", name)
        self._emit("RevokedAll", sender, ROOT, by=sender)

    def _do_resetScope(self, sender: str, now: int, scope: bytes) -> None:
        self._only_owner(sender)
        self._emit("ScopeReset", sender, scope)

    def _do_pause(self, sender: str, now: int) -> None:
        self._only_guardian(sender, now)
        if self.paused:
            raise Reverted("IsPaused")
        self._emit("Paused", sender, ROOT)

    def _do_unpause(self, sender: str, now: int) -> None:
        self._only_owner(sender)
        if not self.paused:
            raise Reverted("IsNotPaused")
        self._emit("Unpaused", sender, ROOT)

    def _do_bindKey(
        self, sender: str, now: int, scope: bytes, roles: list[bytes], key: bytes, expiry: int
    ) -> None:
        if self.paused:
            raise Reverted("IsPaused")
        if key == bytes(32):
            raise Reverted("ZeroKey")
        self._batch(roles)
        self._expiry(0, expiry, now)
        for role in roles:
            name = (scope, role, sender)
            if not self.standing_grant(name, now):
                raise Reverted("NoGrant", name)
            bound = self.keys.get((name, key))
            counted = bound is not None and bound.serial > self.account_epochs.get(sender, 0)
            if not counted and self.key_counts.get(sender, 0) >= MAX_KEYS:
                raise Reverted("TooManyKeys", (sender,))
            self._emit("KeyBound", sender, scope, role=role, key=key, expiry=expiry)

    def _do_unbindKey(
        self, sender: str, now: int, scope: bytes, roles: list[bytes], account: str, key: bytes
    ) -> None:
        if sender != account:
            self._only_guardian(sender, now)
        self._batch(roles)
        for role in roles:
            if ((scope, role, account), key) not in self.keys:
                raise Reverted("NoKey", (scope, role, account, key))
            self._emit("KeyUnbound", account, scope, role=role, key=key, by=sender)

    def _do_proposeOwner(self, sender: str, now: int, account: str) -> None:
        self._only_owner(sender)
        ready_at = 0 if account == NOBODY else now + OWNER_DELAY_S
        self._emit("OwnerProposed", account, ROOT, readyAt=ready_at)

    def _do_acceptOwner(self, sender: str, now: int) -> None:
        account, ready_at = self.proposal
        if sender != account:
            raise Reverted("NotProposed", (sender,))
        if not ready_at <= now < ready_at + OWNER_WINDOW_S:
            raise Reverted("NotInWindow", (ready_at, ready_at + OWNER_WINDOW_S))
        self._emit("OwnerChanged", sender, ROOT, previous=self.owner)
