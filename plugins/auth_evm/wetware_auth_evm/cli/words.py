"""How commands write things: times, addresses, scopes, roles, rights, events. Cheap to import."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import InvalidArgument
from wetware_auth_evm.node.config import ROOT_NAME

if TYPE_CHECKING:
    from wetware_auth_evm.chain.events import Event

ALL_RIGHTS: Final = (1 << 128) - 1
ANY_NAME: Final = "any"


def stamp(at: int) -> str:
    """A time (Unix s) as people read it, in UTC."""
    try:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"second {at}"


def span(seconds: float) -> str:
    """A length of time, rounded: "3 days", "5 min"."""
    left = abs(seconds)
    for size, unit in ((86_400, "day"), (3600, "h"), (60, "min")):
        if left >= 2 * size or (left >= size and unit != "min"):
            count = round(left / size)
            return f"{count} {unit}{'s' if unit == 'day' and count != 1 else ''}"
    return f"{left:.0f} s"


def when(at: int, now: float) -> str:
    """A time, and how far away it is."""
    ago = now - at
    return f"{stamp(at)} ({f'{span(ago)} ago' if ago >= 0 else f'in {span(ago)}'})"


def parse_time(text: str, now: float, what: str) -> int:
    """Unix s of a span from now ("90d", "12h"), a date or time in UTC ("2027-01-31", "…T12:00")."""
    from wetware.broker.values import parse_duration

    plain = text.strip()
    if plain == "now":
        return int(now)
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d.*", plain):
            parsed = datetime.fromisoformat(plain)
            return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())
        return int(now + parse_duration(plain))
    except (ValueError, InvalidArgument, OverflowError):
        raise InvalidArgument(
            f"{what}: {text[:40]!r} is no time",
            hint="write a span (90d, 12h, 30m) or a date in UTC (2027-01-31, 2027-01-31T12:00)",
            code="invalid.time",
        ) from None


def parse_rights(text: str) -> int:
    """A mask of rights: `all`, 0x…, or a number; raises InvalidArgument."""
    try:
        mask = ALL_RIGHTS if text == "all" else int(text, 0)
    except ValueError:
        mask = -1
    if not 0 < mask <= ALL_RIGHTS:
        raise InvalidArgument(
            f"{text[:40]!r} is no mask of rights",
            hint="write all, or a number of up to 128 bits such as 0x1",
            code="invalid.rights",
        )
    return mask


def rights_text(mask: int) -> str:
    return "all" if mask == ALL_RIGHTS else hex(mask)


def parse_role(name: str, *, any_: bool = False) -> bytes:
    """A role's name as the contract has it; with `any_`, "any" is every role."""
    from wetware_auth_evm.chain.events import ANY_ROLE, role_id

    if any_ and name == ANY_NAME:
        return ANY_ROLE
    if name in (ANY_NAME, ROOT_NAME):
        raise InvalidArgument(
            f"{name!r} is not the name of a role here",
            hint="an admin record alone can be about any role",
            code="invalid.role",
        )
    try:
        return role_id(name)
    except ValueError as exc:
        raise InvalidArgument(f"{name[:40]!r}: {exc}", code="invalid.role") from None


def parse_scope(name: str) -> bytes:
    """A scope's name as the contract has it; "ROOT" is the scope of all scopes."""
    from wetware_auth_evm.chain.events import ROOT, role_id

    if name == ROOT_NAME:
        return ROOT
    try:
        return role_id(name)
    except ValueError:
        raise InvalidArgument(
            f"{name[:40]!r} is not the name of a scope: 1 to 32 bytes of UTF-8",
            hint="ROOT is the scope whose records hold in every scope",
            code="invalid.scope",
        ) from None


def name_text(word: bytes, zero: str) -> str:
    """The name in 32 bytes, or hex."""
    from wetware_auth_evm.chain.events import role_name

    if not any(word):
        return zero
    name = role_name(word) or ""
    return name if name and name.isprintable() else "0x" + word.hex()


def role_text(role: bytes) -> str:
    return name_text(role, ANY_NAME)


def scope_text(scope: bytes) -> str:
    return name_text(scope, ROOT_NAME)


def who(address: bytes) -> str:
    from wetware_auth_evm.chain.addresses import checksum

    return checksum(address)


def key_text(key: bytes) -> str:
    """A bound key: the peer ID of an Ed25519 key."""
    from wetware.identity import PeerId

    return str(PeerId.from_public_key(key))


def event_plain(event: Event) -> dict[str, Any]:
    data = {name: _plain(name, value) for name, value in event.data.items()}
    return {
        "seq": event.seq,
        "event": event.name,
        "account": who(event.account),
        "scope": scope_text(event.scope),
        **data,
    }


def _plain(name: str, value: Any) -> Any:
    if name in ("by", "previous"):
        return who(value) if any(value) else None
    if name == "role":
        return role_text(value)
    if name == "key":
        return key_text(value)
    if name == "rights":
        return hex(value)
    return value


def event_text(event: Event, now: float) -> str:
    """An event as a sentence without a subject; `event_actor` says who did it."""
    data, account = event.data, who(event.account)
    where = f"in {scope_text(event.scope)}"
    role = role_text(data["role"]) if "role" in data else ""
    match event.name:
        case "Granted":
            since = f" from {stamp(data['not_before'])}" if data["not_before"] > now else ""
            return (
                f"granted {role} to {account} {where}{since} until {stamp(data['expiry'])}, "
                f"rights {rights_text(data['rights'])}"
            )
        case "Revoked":
            return f"revoked {role} of {account} {where}"
        case "RevokedAll":
            return f"revoked everything of {account}"
        case "ScopeReset":
            return f"reset the scope {scope_text(event.scope)}: every record in it ended"
        case "AdminSet":
            if not data["rights"]:
                return f"removed the admin {account} of {role} {where}"
            return (
                f"appointed {account} admin of {role} {where} until {stamp(data['expiry'])}, "
                f"rights {rights_text(data['rights'])}"
            )
        case "KeyBound":
            return (
                f"bound {key_text(data['key'])} to {role} of {account} {where} until "
                f"{stamp(data['expiry'])}"
            )
        case "KeyUnbound":
            return f"unbound {key_text(data['key'])} from {role} of {account} {where}"
        case "Paused":
            return "paused the contract: nobody holds any role"
        case "Unpaused":
            return "unpaused the contract"
        case "OwnerProposed":
            if not any(event.account):
                return "withdrew the offer of the ownership"
            return f"offered the ownership to {account}, from {stamp(data['ready_at'])} on"
        case "OwnerChanged":
            before = data["previous"]
            return f"took over from {who(before)}" if any(before) else f"made {account} the owner"
    return event.name


def event_actor(event: Event, owner: bytes) -> bytes:
    """Who did it; `owner` is the one before the event. Empty: the deployer, whom no event names."""
    by: Mapping[str, Any] = event.data
    match event.name:
        case "OwnerChanged":
            return event.account if any(by["previous"]) else b""
        case "ScopeReset" | "Paused" | "Unpaused" | "KeyBound":
            return event.account
        case "OwnerProposed":
            return owner
        case "Granted":
            return bytes(by["by"]) if any(by["by"]) else owner
    return bytes(by["by"])
