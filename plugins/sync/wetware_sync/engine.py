"""What an engine is: an ordered map of bytes with one revision, transactions, watches and leases.

The semantics are etcd's (v3) where nothing else is said. A *prefix* stands for all keys that begin
with these bytes. Every write names its `owner`, the principal as text, who is charged for the keys.

Every error is a WetwareError. `Unwritten` says that a write has not happened, `Unknown` that nobody
knows; all others come before anything is written. Nothing is repeated by an engine.

What each request makes is a tuple with names: one costs half of a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol, TypeAlias

from wetware.errors import InvalidArgument, LimitExceeded, WetwareError

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

    from wetware.identity import Key

KEY_BYTES_MAX: Final = 1024
VALUE_BYTES_MAX: Final = 256 << 10
TXN_BYTES_MAX: Final = 1 << 20
COMPARES_MAX: Final = 128
OPERATIONS_MAX: Final = 128
"""Of each branch of a transaction."""
WRITES_MAX: Final = 128
"""Keys that one transaction writes or deletes, and that one lease may have: so many fit into the
space that is reserved for giving something up on a full disk."""
PAGE_KEYS_MAX: Final = 1000
PAGE_BYTES_MAX: Final = 1 << 20
TTL_S_MIN: Final = 2.0
TTL_S_MAX: Final = 86_400.0
ROW_BYTES: Final = 128
"""What a key is charged beside its bytes and those of its value."""


class Compacted(WetwareError):
    """The events from that revision on are not all kept any more.

    Attributes:
        revision: The first that can be watched from. What was before is read with `read`.
    """

    code = "sync.compacted"
    revision: int = 0


class Closed(WetwareError):
    """The engine has stopped; what runs afterwards may be another store (`Status.epoch`)."""

    code = "sync.closed"


class LeaseEnded(WetwareError):
    """There is no such lease (any more), or it is another owner's."""

    code = "sync.lease_ended"


class Unwritten(WetwareError):
    """The disk refused: the write has not happened, and will not."""

    code = "sync.unwritten"


class Unknown(WetwareError):
    """Whether the write has happened, or will after a restart, is not known."""

    code = "unknown.write"


class KeyValue(NamedTuple):
    """A key that exists.

    Attributes:
        create_revision: Of the write that made it, after it was absent.
        mod_revision: Of the last write.
        version: Writes since it was made: 1 for the first.
        lease: ID of the lease that it ends with; 0: none.
    """

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


class Event(NamedTuple):
    """A key was written, or deleted: then `now` is None."""

    key: bytes
    revision: int
    now: KeyValue | None


class Compare(NamedTuple):
    """`target` of the key is `operand`: bytes for "value", a number for all others.

    An absent key has 0 for each number, and no value.
    """

    key: bytes
    target: Literal["value", "version", "create_revision", "mod_revision"]
    operand: bytes | int


class Put(NamedTuple):
    """Write a key. `lease`: ID of a lease of the same owner that it ends with; 0: none."""

    key: bytes
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Delete a key if it exists; or all keys with a prefix, at most WRITES_MAX."""

    key: bytes
    prefix: bool = False


class Order(Enum):
    """How what is read is ordered."""

    KEY = "key"
    OLDEST = "oldest"
    """By `create_revision`, the lowest first."""
    NEWEST = "newest"
    """By `create_revision`, the highest first."""


class Get(NamedTuple):
    """Read a key, or keys with a prefix.

    Attributes:
        after: Only keys above this one: the last one of the page before. With Order.KEY alone.
        limit: At most so many keys. A page ends at PAGE_BYTES_MAX as well; the pages of one
            transaction share both bounds.
        order: All but KEY look at every key of the prefix: for prefixes whose keys are few.
        created_before: Only keys with a lower `create_revision`; 0: all.
    """

    key: bytes
    prefix: bool = False
    after: bytes = b""
    limit: int = PAGE_KEYS_MAX
    order: Order = Order.KEY
    created_before: int = 0


Operation: TypeAlias = Put | Delete | Get


class Txn(NamedTuple):
    """If all `compares` hold then the operations of `then`, else those of `otherwise`; all or none.

    They take effect in their order, and what is read sees what was written before it. A branch
    writes no key twice.
    """

    then: tuple[Operation, ...]
    compares: tuple[Compare, ...] = ()
    otherwise: tuple[Operation, ...] = ()

    @property
    def only_deletes(self) -> bool:
        """It writes nothing but deletions, so it is for a full disk, too."""
        return all(type(each) is not Put for each in self.then + self.otherwise)

    def check(self) -> int:
        """Bytes of all keys and values.

        Raises InvalidArgument or LimitExceeded where an engine must not take it.
        """
        _bound("compares", len(self.compares), COMPARES_MAX)
        size = 0
        for compare in self.compares:
            check_key(compare.key)
            operand = compare.operand
            if isinstance(operand, bytes) != (compare.target == "value"):
                raise InvalidArgument("a value is compared with bytes, all else with a number")
            size += len(compare.key) + (len(operand) if isinstance(operand, bytes) else 8)
        size += _check_branch(self.then) + _check_branch(self.otherwise)
        _bound("bytes", size, TXN_BYTES_MAX)
        return size


class Page(NamedTuple):
    """What was read.

    Attributes:
        revision: Of the store when it was read: watch from the next one on, and nothing is missed.
        more: There are further keys than these.
    """

    items: tuple[KeyValue, ...]
    revision: int
    more: bool = False


class Outcome(NamedTuple):
    """Of a transaction.

    Attributes:
        succeeded: All its compares held.
        revision: Of the store after it; its own one if it has written or deleted something.
        results: Of each operation of the branch: a Page for Get, how many keys for Put and Delete.
    """

    succeeded: bool
    revision: int
    results: tuple[Page | int, ...] = ()


class Batch(NamedTuple):
    """What a watch tells: some events in their order, whole revisions.

    Attributes:
        revision: All up to this one was told: go on from the next.
    """

    events: tuple[Event, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Status:
    """Of the store.

    Attributes:
        engine: "embedded" or "etcd".
        epoch: Raised by each restore and move: revisions are compared within one epoch alone.
        revision: Of the last write.
        compacted: Watching begins above this revision.
        nbytes: Of all keys and values, as owners are charged.
        failing: Why nothing is written; "" while writes work.
        failover: What happens when a machine of it dies.
    """

    engine: str
    epoch: int
    revision: int
    compacted: int
    keys: int
    nbytes: int
    leases: int
    watches: int
    failing: str
    failover: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What one owner may take of a store, and all of them together."""

    owner_keys: int = 100_000
    owner_bytes: int = 256 << 20
    owner_leases: int = 1024
    owner_watches: int = 1024
    keys: int = 2_000_000
    nbytes: int = 4 << 30
    leases: int = 16_384
    watches: int = 16_384


class Watch(Protocol):
    """A cursor on the log. Being slow loses nothing, until the events are compacted."""

    async def next(self) -> Batch:
        """Wait for events; never an empty batch. One who is cancelled has lost nothing.

        Raises Compacted, where events that come next are not kept any more, and Closed.
        """
        ...

    def close(self) -> None:
        """End it. Idempotent."""
        ...


class Engine(Protocol):
    """A store that is open while `run` runs.

    Attributes:
        authority: Signs fencing tokens; it is the store's own and moves with it.
        epoch: As in Status.
    """

    authority: Key
    epoch: int

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Open the store, serve it, close it when cancelled: then all that waits raises Closed."""
        ...

    async def read(self, get: Get) -> Page:
        """What is there: linearizable, and nothing that a crash would undo."""
        ...

    async def txn(self, txn: Txn, owner: str) -> Outcome:
        """Run a transaction; returns when it is on the disk.

        If it writes or deletes anything, the store's revision rises by 1, and all its events have
        that revision.
        """
        ...

    def watch(self, key: bytes, revision: int, owner: str, *, prefix: bool = False) -> Watch:
        """Every event of a key, or of those with a prefix, of this revision or a later one.

        No gap, no duplicate, and nothing that a crash would undo.
        """
        ...

    async def grant(self, ttl_s: float, owner: str) -> int:
        """A new lease, which ends `ttl_s` after the last `keep`, or a little later.

        Returns its ID, above 0; none is used twice.
        """
        ...

    async def keep(self, lease: int, owner: str) -> float:
        """From now on the lease has its full time, which is returned in s; raises LeaseEnded."""
        ...

    async def end(self, lease: int, owner: str) -> None:
        """End a lease now: its keys are deleted in one transaction. Raises LeaseEnded."""
        ...

    async def compact(self, revision: int) -> None:
        """Forget the events up to a revision, this one included; raises InvalidArgument."""
        ...

    async def status(self) -> Status: ...


def compacted(revision: int) -> Compacted:
    """For who would watch from `revision`, up to which all is compacted, or from below."""
    error = Compacted(
        f"the events up to revision {revision} are not kept any more",
        hint=f"read what is there, and watch from {revision + 1} on",
    )
    error.revision = revision + 1
    return error


def lease_ended(lease: int) -> LeaseEnded:
    return LeaseEnded(
        f"there is no lease {lease} of yours", hint="it has ended, with its keys: begin anew"
    )


def closed() -> Closed:
    return Closed("the store has stopped", hint="connect again, and look at its epoch")


def prefix_end(prefix: bytes) -> bytes | None:
    """The first key above all that begin with `prefix`; None: there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def check_key(key: bytes, *, prefix: bool = False) -> None:
    """Raises InvalidArgument where it is no key, or no prefix: which may be empty."""
    if not (prefix or key) or len(key) > KEY_BYTES_MAX:
        raise InvalidArgument(f"a key has 1 to {KEY_BYTES_MAX} bytes, and this one {len(key)}")


def check_get(get: Get) -> None:
    """Raises InvalidArgument where an engine must not take it."""
    check_key(get.key, prefix=get.prefix)
    if not 1 <= get.limit <= PAGE_KEYS_MAX:
        raise InvalidArgument(f"a page has 1 to {PAGE_KEYS_MAX} keys, not {get.limit}")
    if get.after and get.order is not Order.KEY:
        raise InvalidArgument("only what is ordered by its keys is read page by page")
    if not 0 <= get.created_before < 1 << 62:
        raise InvalidArgument("a revision is a number from 0 to 2^62 - 1")


def check_watch(key: bytes, revision: int, *, prefix: bool) -> None:
    """Raises InvalidArgument."""
    check_key(key, prefix=prefix)
    if not 1 <= revision < 1 << 62:
        raise InvalidArgument("a revision is a number from 1 to 2^62 - 1")


def check_ttl(ttl_s: float) -> None:
    """Raises InvalidArgument."""
    if not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
        raise InvalidArgument(f"a lease lasts {TTL_S_MIN:g} to {TTL_S_MAX:g} s, not {ttl_s:g}")


def _bound(what: str, many: int, most: int) -> None:
    if many > most:
        raise LimitExceeded(f"a transaction has at most {most} {what}, and this one {many}")


def _check_branch(branch: tuple[Operation, ...]) -> int:
    """Its bytes."""
    _bound("operations", len(branch), OPERATIONS_MAX)
    keys: set[bytes] = set()
    prefixes: set[bytes] = set()
    size = writes = 0
    for operation in branch:
        size += len(operation.key)
        if type(operation) is Get:
            check_get(operation)
            continue
        prefix = type(operation) is Delete and operation.prefix
        check_key(operation.key, prefix=prefix)
        if type(operation) is Put:
            size += len(operation.value)
            if len(operation.value) > VALUE_BYTES_MAX:
                raise LimitExceeded(
                    f"a value has at most {VALUE_BYTES_MAX} bytes, and this one "
                    f"{len(operation.value)}",
                    hint="keep it as a blob, and its CID here",
                )
        (prefixes if prefix else keys).add(operation.key)
        writes += 1
    twice = len(keys) + len(prefixes) < writes
    for stem in prefixes:
        others = (*keys, *(prefixes - {stem}))
        twice = twice or any(key.startswith(stem) for key in others)
    if twice:
        raise InvalidArgument("a transaction writes no key twice")
    return size
