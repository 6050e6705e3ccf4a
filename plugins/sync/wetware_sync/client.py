"""`session.kv`: keys for applications, from any node.

await session.kv.put("/shop/price", b"12")
shop = session.kv.open("/shop/")
async for event in shop.watch():
    print(event.key, event.value)
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware import rpc
from wetware.base.backoff import Backoff
from wetware.errors import Disconnected, InvalidArgument, WetwareError
from wetware_sync import carry
from wetware_sync.engine import Closed, Compacted
from wetware_sync.errors import HomeDown
from wetware_sync.keys import check_path
from wetware_sync.lease import TTL_S, Lease
from wetware_sync.reach import AtHome
from wetware_sync.schema import SCHEMA

if TYPE_CHECKING:
    from pathlib import Path

    from wetware_sync.holding import Held

AGAIN_S: Final = 0.25
AGAIN_S_MAX: Final = 5.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A key.

    Attributes:
        key: Below the prefix that was opened.
        value: b"" where only names were asked for.
        created: The revision that made it.
        modified: The revision that wrote it last.
        version: Writes since it was made.
        lease: ID of the lease that it goes with; 0: none.
    """

    key: str
    value: bytes
    created: int
    modified: int
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a key.

    Attributes:
        key: Below the prefix that was opened.
        revision: Of the change; several changes of one transaction have the same.
        entry: What it is now; None: it was deleted.
    """

    key: str
    revision: int
    entry: Entry | None

    @property
    def value(self) -> bytes | None:
        return None if self.entry is None else self.entry.value


@dataclass(frozen=True, slots=True)
class Compare:
    """What a transaction depends on, of one key: give one of the others.

    Attributes:
        value: It has this value.
        modified: This revision wrote it last; 0: there is no such key.
        created: This revision made it.
        version: It was written so many times.
    """

    key: str
    value: bytes | None = None
    modified: int | None = None
    created: int | None = None
    version: int | None = None

    def struct(self) -> dict[str, Any]:
        terms = {
            "equal": self.value,
            "modified": self.modified,
            "created": self.created,
            "version": self.version,
        }
        given = {name: term for name, term in terms.items() if term is not None}
        if len(given) != 1:
            raise InvalidArgument(
                f"a comparison has one of value, modified, created, version, not {len(given)}"
            )
        return {"key": self.key, "has": given}


@dataclass(frozen=True, slots=True)
class Write:
    """What a transaction does to one key: sets it to `value`, or deletes it (None)."""

    key: str
    value: bytes | None
    lease: Lease | None = None

    def struct(self) -> dict[str, Any]:
        what = {"delete": None} if self.value is None else {"value": self.value}
        return {"key": self.key, "what": what, "lease": self.lease.id if self.lease else 0}


class Keys:
    """What `session.kv` does with keys, and each Tree with those below its prefix.

    A write whose answer was lost raises Unknown, and is never repeated. Raises HomeDown where the
    node that has the store is not there.
    """

    home: AtHome

    def _tree(self, *keys: str) -> tuple[Tree, int]:
        """The tree that has them, and how much of each is not their name there."""
        raise NotImplementedError

    async def get(self, key: str = "") -> Entry | None:
        """A key; None where there is no such one."""
        tree, cut = self._tree(key)
        reader = await tree.ref("reader")
        with self.home.read():
            reply = await reader.call("get", key=key[cut:])
        return Entry(**reply["entry"]) if reply["found"] else None

    async def ls(
        self, prefix: str = "", *, after: str = "", values: bool = False
    ) -> AsyncIterator[Entry]:
        """The keys that begin so, in order; those that come or go meanwhile may be missing."""
        tree, cut = self._tree(prefix)
        more = True
        while more:
            reader = await tree.ref("reader")
            with self.home.read():
                reply = await reader.call(
                    "ls", prefix=prefix[cut:], after=after, limit=0, values=values
                )
            for struct in reply["entries"]:
                yield Entry(**struct)
                after = struct["key"]
            more = reply["more"]

    async def put(
        self,
        key: str,
        value: bytes | str,
        *,
        lease: Lease | None = None,
        fence: Held | None = None,
    ) -> int:
        """Set a key; text as UTF-8. Returns the revision.

        Args:
            key: A path; of a Tree below its prefix.
            value: At most 256 KiB.
            lease: What it goes with.
            fence: Only as long as this is held: Denied "capability.denied.fenced" else.
        """
        raw = value.encode() if isinstance(value, str) else value
        tree, cut = self._tree(key)
        writer = await tree.ref("writer")
        with self.home.written():
            reply = await writer.call(
                "put", key=key[cut:], value=raw, lease=lease.id if lease else 0, fence=_hold(fence)
            )
        return int(reply["revision"])

    async def delete(self, key: str = "", *, below: bool = False, fence: Held | None = None) -> int:
        """Delete a key, or with `below` all that begin so; returns how many there were."""
        tree, cut = self._tree(key)
        writer = await tree.ref("writer")
        with self.home.written():
            reply = await writer.call("delete", key=key[cut:], below=below, fence=_hold(fence))
        return int(reply["deleted"])

    async def cas(
        self, key: str, value: bytes | str | None, *, modified: int, fence: Held | None = None
    ) -> int:
        """Set a key (None: delete it) if the revision `modified` wrote it last; 0: if it is new.

        Returns the new revision, or 0: it was not so, and nothing is changed.
        """
        raw = value.encode() if isinstance(value, str) else value
        compare = [Compare(key, modified=modified)]
        succeeded, revision = await self.txn(compare, [Write(key, raw)], fence=fence)
        return revision if succeeded else 0

    async def txn(
        self,
        compare: Iterable[Compare],
        then: Iterable[Write],
        otherwise: Iterable[Write] = (),
        *,
        fence: Held | None = None,
    ) -> tuple[bool, int]:
        """If all comparisons hold `then`, else `otherwise`; all of it at one revision.

        Returns whether they held, and the revision of the store after it.
        """
        lists: dict[str, list[Any]] = {
            "compare": [*compare],
            "then": [*then],
            "else_": [*otherwise],
        }
        tree, cut = self._tree(*(each.key for some in lists.values() for each in some))
        structs: dict[str, Any] = {
            name: [replace(each, key=each.key[cut:]).struct() for each in some]
            for name, some in lists.items()
        }
        writer = await tree.ref("writer")
        with self.home.written():
            reply = await writer.call("txn", fence=_hold(fence), **structs)
        return reply["succeeded"], int(reply["revision"])

    async def watch(self, prefix: str = "", revision: int = 0) -> AsyncIterator[Event]:
        """Every change of the keys that begin so, each once and in order.

        Args:
            prefix: A path; of a Tree below its prefix.
            revision: From which on; 0: from now.

        Raises Compacted where some of it is forgotten (its `revision`, if that can be asked for, is
        where one can go on), Closed where the store was restored or
        moved. A lost connection, and a restart of the home, are waited for by a session that
        reconnects: it goes on where it was.
        """
        tree, cut = self._tree(prefix)
        epoch, backoff = 0, Backoff(AGAIN_S, AGAIN_S_MAX, random.Random())  # noqa: S311  # no secret
        while True:
            try:
                reply = await (await tree.ref("watcher")).call(
                    "watch", prefix=prefix[cut:], revision=revision, epoch=epoch
                )
                revision, epoch = reply["revision"], reply["epoch"]
                cursor: rpc.Ref = reply["cursor"]
                backoff.reset()
                while True:
                    with rpc.time_limit(None), self.home.read():
                        batch = await cursor.call("next")
                    revision = batch["revision"]
                    for struct in batch["events"]:
                        yield _event(struct)
            except Compacted as exc:  # of which the message alone came along
                with contextlib.suppress(WetwareError):
                    exc.revision = (await self.home.call("status"))["status"]["compacted"] + 1
                raise
            except (Disconnected, HomeDown, Closed):
                if not self.home.survives:
                    raise
                await anyio.sleep(backoff.pause_s())


class KeyValues(Keys):
    """The service `kv` of a session. Keys are paths: "/shop/price".

    Args:
        here: The service as the session has it.
    """

    INTERFACE = SCHEMA.Kv

    def __init__(self, here: Any) -> None:
        self.home = AtHome(here, "kv")
        self._trees: dict[str, Tree] = {}

    def open(self, prefix: str) -> Tree:
        """The keys that begin so, "/shop/", or one key: "/shop/price", which is then called ""."""
        return Tree(self.home, prefix)

    def _tree(self, *keys: str) -> tuple[Tree, int]:
        """The directory that they have in common: what a grant of that directory permits."""
        common = os.path.commonprefix([key or "/" for key in keys])  # noqa: RUF071 of characters
        prefix = common[: common.rfind("/") + 1] if keys else "/"
        if not prefix:
            for key in keys:
                check_path(key)
        if prefix not in self._trees and len(self._trees) >= 64:
            self._trees.clear()
        return self._trees.setdefault(prefix, Tree(self.home, prefix)), len(prefix)

    def lease(self, ttl_s: float = TTL_S) -> Lease:
        """A lease, to be entered with `async with`; it is kept until then, or until it is lost."""
        return Lease(self.home, "lease", ttl_s)

    async def status(self) -> dict[str, Any]:
        """The struct Status of sync.capnp."""
        reply: dict[str, Any] = (await self.home.call("status"))["status"]
        return reply

    async def compact(self, revision: int) -> None:
        """Forget the history before a revision; keys stay."""
        await self.home.call("compact", revision=revision)

    async def backup(self, target: Path) -> int:
        """A copy of the store in a new file (0600), which has its secret key; returns its bytes."""
        reply = await self.home.call("backup")
        async with rpc.ByteStream(reply["stream"]) as stream:
            return await carry.take(stream, target)

    async def restore(self, source: Path) -> int:
        """Put a backup in the place of the store; returns its new epoch. What was held is lost."""
        reply = await self.home.call("restore")
        return int(await carry.bring(source, reply["stream"]))

    async def etcd(self) -> dict[str, Any]:
        """The members that run the store's etcd: `parts`, and `home`, as in sync.capnp."""
        reply: dict[str, Any] = await self.home.here.call("etcd")
        return reply

    def etcd_up(self, members: Sequence[str]) -> AsyncIterator[str]:
        """Move the store to an etcd of 3 or 5 members, by names or peer IDs; tells how far it is.

        Keys stay; what is held is lost, and watches end. What it raises has changed nothing.
        """
        return self._moving("up", on=list(members))

    def etcd_replace(self, member: str, by: str) -> AsyncIterator[str]:
        """Have another member in the place of one; run again it goes on."""
        return self._moving("replace", member=member, by=by)

    def etcd_down(self, to: str) -> AsyncIterator[str]:
        """Move the store from etcd to one member; as `etcd_up`."""
        return self._moving("down", to=to)

    async def _moving(self, method: str, **params: object) -> AsyncIterator[str]:
        reply = await self.home.call(method, **params)
        async with rpc.ByteStream(reply["stream"]) as stream:
            text = b""
            async for chunk in stream:
                *lines, text = (text + chunk).split(b"\n")
                for line in lines:
                    yield line.decode()


class Tree(Keys):
    """Keys below one prefix. Opened at the first use, and again after a lost connection."""

    def __init__(self, home: AtHome, prefix: str) -> None:
        self.home, self.prefix = home, prefix
        self._refs: dict[str, rpc.Ref] = {}
        self._opened: object = None  # where those are of

    def __repr__(self) -> str:
        return f"<Tree {self.prefix!r}>"

    async def ref(self, role: str) -> rpc.Ref:
        """The capability "reader", "writer" or "watcher", to pass on."""
        opened = await self.home.service()
        if opened is not self._opened or self._refs[role].closed:
            self._refs = await self.home.call("open", prefix=self.prefix)
            self._opened = opened
        return self._refs[role]

    def _tree(self, *keys: str) -> tuple[Tree, int]:
        return self, 0


def _hold(held: Held | None) -> bytes:
    return b"" if held is None else held.hold


def _event(struct: dict[str, Any]) -> Event:
    entry = struct["entry"]
    gone = struct["deleted"]
    return Event(entry["key"], entry["modified"], None if gone else Entry(**entry))
