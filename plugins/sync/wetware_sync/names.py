"""The service `names`: what people call things, and what each name stood for before.

Source: the seed's DNS of a cluster; IPNS and git refs, whose history is elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.base import cbor
from wetware.errors import InvalidArgument, NotFound
from wetware.hookspecs import Service
from wetware_sync.engine import (
    PAGE_KEYS_MAX,
    VALUE_BYTES_MAX,
    Delete,
    Get,
    KeyValue,
    Txn,
)
from wetware_sync.errors import Conflict
from wetware_sync.fencing import changed, guarded_by
from wetware_sync.keys import NAME, check_path, check_prefix
from wetware_sync.schema import SCHEMA

if TYPE_CHECKING:
    from wetware.identity import Principal
    from wetware_sync.home import Home

VALUE_CHARS_MAX: Final = 2048
HISTORY_MAX: Final = 16
"""Values before the present one that are kept, the newest first."""


class NamesService(Service):
    """See `hookspecs.Service`."""

    name = "names"
    interface = SCHEMA.Names
    roles = MappingProxyType(
        {
            "reader": frozenset({"Names.home", "Names.get", "Names.ls"}),
            "member": frozenset({"*"}),
        }
    )

    def __init__(self, home: Home) -> None:
        self.home = home

    def bootstrap(self, principal: Principal) -> rpc.Servant:
        return NamesServant(self.home, str(principal))


@dataclass(frozen=True, slots=True)
class Record:
    """What a name stands for.

    Attributes:
        value: As it was set.
        set_ms: When, Unix time.
        by: The principal.
        expires_ms: When it ends; 0: it does not.
        history: Of those before (value, set_ms, by), the newest first.
    """

    value: str
    set_ms: int
    by: str
    expires_ms: int
    history: tuple[tuple[str, int, str], ...]

    def encode(self) -> bytes:
        history = [list(past) for past in self.history]
        return cbor.encode([self.value, self.set_ms, self.by, self.expires_ms, history])

    @classmethod
    def of(cls, item: KeyValue) -> Record:
        value, set_ms, by, expires_ms, history = cbor.decode(item.value, bytes_max=VALUE_BYTES_MAX)
        return cls(value, set_ms, by, expires_ms, tuple(tuple(past) for past in history))


class NamesServant(rpc.Servant, interface=SCHEMA.Names):
    """See sync.capnp."""

    def __init__(self, home: Home, owner: str) -> None:
        self._home, self._owner = home, owner

    async def home(self) -> dict[str, Any]:
        return self._home.describe()

    @property
    def _now_ms(self) -> int:
        return int(self._home.ctx.clock.time() * 1000)

    async def set(
        self, path: str, value: str, ttl_ms: int, expected: int, checked: bool, fence: bytes
    ) -> dict[str, Any]:
        if not 0 < len(value) <= VALUE_CHARS_MAX or not value.isprintable():
            raise InvalidArgument(
                f"a name stands for 1 to {VALUE_CHARS_MAX} printable characters",
                code="invalid.value",
            )
        now_ms = self._now_ms

        def change(item: KeyValue | None) -> bytes:
            old = Record.of(item) if item else None
            seen = item.mod_revision if item and old and self._lives(old) else 0
            if checked and expected != seen:
                raise Conflict(f"{path} was set by the revision {seen}, not {expected}")
            past = ((old.value, old.set_ms, old.by), *old.history)[:HISTORY_MAX] if old else ()
            return Record(value, now_ms, self._owner, ttl_ms and now_ms + ttl_ms, past).encode()

        key = NAME + check_path(path).encode()
        revision, _ = await changed(self._home.engine, key, change, self._owner, fence=fence)
        return {"revision": revision}

    def _lives(self, record: Record) -> bool:
        return not record.expires_ms or self._now_ms < record.expires_ms

    async def get(self, path: str) -> dict[str, Any]:
        page = await self._home.engine.read(Get(NAME + check_path(path).encode()))
        record = Record.of(page.items[0]) if page.items else None
        if record is None or not self._lives(record):
            raise NotFound(
                f"there is no name {path}" + ("; it had an end" if record else ""),
                hint="`ww name ls` shows those that there are",
                code="not_found.name",
            )
        return {
            "value": record.value,
            "revision": page.items[0].mod_revision,
            "expires_ms": record.expires_ms,
            "history": [
                {"value": value, "set_ms": set_ms, "by": by} for value, set_ms, by in record.history
            ],
        }

    async def ls(self, path: str, after: str, limit: int) -> dict[str, Any]:
        get = Get(
            NAME + check_prefix(path).encode(),
            prefix=True,
            after=NAME + check_path(after).encode() if after else b"",
            limit=min(limit or PAGE_KEYS_MAX, PAGE_KEYS_MAX),
        )
        page = await self._home.engine.read(get)
        names = [
            {
                "path": item.key[len(NAME) :].decode(),
                "value": record.value,
                "revision": item.mod_revision,
                "expires_ms": record.expires_ms,
            }
            for item in page.items
            if self._lives(record := Record.of(item))
        ]
        last = page.items[-1].key[len(NAME) :].decode() if page.more else ""
        return {"names": names, "next": last}

    async def rm(self, path: str, fence: bytes) -> dict[str, Any]:
        txn = Txn((Delete(NAME + check_path(path).encode()),))
        outcome = await guarded_by(self._home.engine, fence, txn, self._owner)
        return {"removed": bool(outcome.results[0])}
