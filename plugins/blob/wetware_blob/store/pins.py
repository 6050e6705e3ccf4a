"""Pins: what is kept. Each row has a checksum of its own: damaged, it is reported, not believed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from wetware_blob.format.cid import Cid

if TYPE_CHECKING:
    from wetware.base.files import Database

_CHECKSUM_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Pin:
    """A root that is kept with all that it reaches: see PinInfo in blob.capnp.

    Attributes:
        name: An owner has a root once under each.
        created_at: Unix time, s.
        lease_until: Unix time, s, until which it was promised to another member to keep it.
        charged: Bytes; the store sets it.
    """

    owner: str
    root: Cid
    name: str = ""
    kind: str = ""
    size: int = 0
    created_at: float = 0.0
    copies: int = 1
    where: str = ""
    public: bool = False
    lease_until: float = 0.0
    charged: int = 0


@dataclass(frozen=True, slots=True)
class BadPin:
    """A pin whose row is damaged: its columns as they are now, which may be others than before."""

    owner: str
    root: bytes
    name: str


def _columns(pin: Pin) -> tuple[Any, ...]:
    owner, root, name, *rest, charged = (getattr(pin, field.name) for field in fields(pin))
    columns = (owner, bytes(root), name, charged, json.dumps(rest))
    return (*columns, _checksum(columns))


def _checksum(columns: tuple[Any, ...]) -> bytes:
    return hashlib.sha256(repr(columns).encode()).digest()[:_CHECKSUM_BYTES]


def read_pin(columns: tuple[Any, ...]) -> Pin | BadPin:
    owner, root, name, charged, rest, checksum = columns
    if _checksum((owner, root, name, charged, rest)) != checksum:
        return BadPin(str(owner), root if isinstance(root, bytes) else b"", str(name))
    more: list[Any] = [*json.loads(rest), charged]
    return Pin(owner, Cid.decode(root), name, *more)


def pin_rows(
    db: Database,
    owner: str | None = None,
    root: Cid | None = None,
    name: str | None = None,
) -> list[tuple[Any, ...]]:
    """For `read_pin`: those of an owner, a root and a name, the newest first; None: of all."""
    return [tuple(columns) for _, *columns in reversed(pins_after(db, 0, -1, owner, root, name))]


def pins_after(
    db: Database,
    after: int,
    limit: int,
    owner: str | None = None,
    root: Cid | None = None,
    name: str | None = None,
) -> list[tuple[Any, ...]]:
    """So many of these rows, the oldest first, behind an ID: each with its own before its columns.

    A pin that is made anew has another ID: who reads on from the last one misses none.
    """
    where, key = _where(owner, root, name)
    sql = (
        "SELECT rowid, owner, root, name, charged, pin, checksum FROM pins "  # noqa: S608 constants
        f"WHERE {where} AND rowid > ? ORDER BY rowid LIMIT ?"
    )
    return list(db.execute(sql, (*key, after, limit)).fetchall())


def keep_pin(db: Database, pin: Pin) -> list[int]:
    """Write a pin, in place of the same; returns what that was charged, if it was there."""
    gone = remove_pins(db, pin.owner, pin.root, pin.name)
    db.execute("INSERT INTO pins VALUES (?, ?, ?, ?, ?, ?)", _columns(pin))
    return gone


def amend_pin(db: Database, pin: Pin, terms: dict[str, Any]) -> bool:
    """Change a pin where the same is there still and whole; returns whether it was."""
    there = [read_pin(row) for row in pin_rows(db, pin.owner, pin.root, pin.name)]
    for was in there:
        if isinstance(was, Pin):
            *key, _, rest, checksum = _columns(replace(was, **terms))
            sql = "UPDATE pins SET pin = ?, checksum = ? WHERE owner = ? AND root = ? AND name = ?"
            db.execute(sql, (rest, checksum, *key))
            return True
    return False


def remove_pins(db: Database, owner: str, root: Cid | bytes, name: str | None) -> list[int]:
    """Delete pins; returns what each was charged."""
    where, key = _where(owner, root, name)
    gone = db.execute(f"SELECT charged FROM pins WHERE {where}", key).fetchall()  # noqa: S608 constants
    db.execute(f"DELETE FROM pins WHERE {where}", key)  # noqa: S608 constants
    return [int(charged) for (charged,) in gone]


def remove_damaged(db: Database) -> list[tuple[BadPin, int]]:
    """Delete the pins whose rows are damaged; returns those, and what each was charged."""
    gone = []
    for id_, *columns in pins_after(db, 0, -1):
        pin, charged = read_pin(tuple(columns)), columns[3]
        if isinstance(pin, BadPin):  # what names it may be damaged, too
            db.execute("DELETE FROM pins WHERE rowid = ?", (id_,))
            gone.append((pin, charged if type(charged) is int else 0))
    return gone


def _where(
    owner: str | None, root: Cid | bytes | None, name: str | None
) -> tuple[str, tuple[str | bytes, ...]]:
    wanted = {"owner": owner, "root": None if root is None else bytes(root), "name": name}
    given = {column: value for column, value in wanted.items() if value is not None}
    return " AND ".join(f"{column} = ?" for column in given) or "1", tuple(given.values())
