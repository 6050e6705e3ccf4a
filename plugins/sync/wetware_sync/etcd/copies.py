"""A copy of the store in etcd, as a file of the embedded engine; and a store of such a file.

Keys go with their owners, and with the store's own key. What was held by a lease stays behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from wetware.base.disk import remedy
from wetware.base.files import Files
from wetware.errors import InvalidArgument, WetwareError
from wetware.identity import Key
from wetware_sync.embedded.backup import check
from wetware_sync.embedded.store import FILE, Change, Store, contents
from wetware_sync.engine import Limits, Put, Txn
from wetware_sync.etcd.layout import (
    DATA,
    LEASES,
    STORE,
    decode_store,
    encode_store,
    end_of,
    unwrap,
    wrap,
)
from wetware_sync.etcd.wire import Call, Etcd, pb, ranged, transaction

BATCH_KEYS: Final = 128
BATCH_BYTES: Final = 512 << 10
BATCH_S: Final = 5.0
"""For a batch to be written."""
PAGE_KEYS: Final = 64

Ask = Callable[[Call], Any]
"""Blocks for etcd's answer."""
Item = tuple[bytes, bytes, str]
"""A key, its value, its owner."""


async def backup(etcd: Etcd, path: Path, run_sync: Callable[..., Awaitable[Any]]) -> None:
    """Copy the store, as it is at one revision, to a new file."""
    await run_sync(partial(_backup, _asking(etcd.read), path))


async def load(etcd: Etcd, source: Path, run_sync: Callable[..., Awaitable[Any]]) -> int:
    """Put a copy in the place of the store, if there is one; returns its epoch, above both.

    First etcd says that the store is being loaded, which ends all that uses it, at all entrances.
    If this is cut off it stays so, and nobody is served until it has been done again.
    Raises InvalidArgument where it is no copy: then nothing is changed.
    """
    return int(await run_sync(partial(_load, _asking(etcd.write), source)))


def _asking(ask: Callable[[Call], Coroutine[Any, Any, Any]]) -> Ask:
    loop = asyncio.get_running_loop()
    return lambda call: asyncio.run_coroutine_threadsafe(ask(call), loop).result()


def _backup(ask: Ask, path: Path) -> None:
    epoch, seed, revision = _store(ask)
    if not seed:
        raise InvalidArgument("there is no whole store in etcd", code="sync.backup")
    work = path.with_name(path.name + ".work")
    try:
        work.mkdir(mode=0o700)
        try:
            _make(work, epoch, seed, _items(ask, revision))
            path.touch(mode=0o600, exist_ok=False)
            (work / FILE).replace(path)
        finally:
            shutil.rmtree(work)
    except OSError as exc:
        raise WetwareError(
            f"the backup {path} cannot be written: {exc}", hint=remedy(exc), code="sync.backup"
        ) from exc


def _load(ask: Ask, source: Path) -> int:
    try:
        with contextlib.closing(sqlite3.connect(f"{source.as_uri()}?immutable=1", uri=True)) as db:
            before, seed = check(db)
            epoch = max(before, _store(ask)[0]) + 1
            _replace(ask, epoch, seed, contents(db))
    except (sqlite3.Error, ValueError) as exc:
        raise InvalidArgument(f"{source} is no backup of a store: {exc}") from exc
    return epoch


def _replace(ask: Ask, epoch: int, seed: bytes, items: Iterator[Item]) -> None:
    ask(_txn(_put(STORE, encode_store(epoch, b""))))
    ask(_txn(*(_delete(prefix) for prefix in (DATA, LEASES))))
    count = 0
    for batch in _batches(items):
        ask(_txn(*(_put(DATA + key, wrap(owner, value)) for key, value, owner in batch)))
        count += len(batch)
    request = pb.RangeRequest(key=DATA, range_end=end_of(DATA), count_only=True)
    there = ask(ranged(request)).count
    if there != count:
        raise WetwareError(
            f"etcd has {there} keys and not the {count} of the store",
            hint="is somebody else writing into it? load it again",
            code="sync.backup",
        )
    ask(_txn(_put(STORE, encode_store(epoch, seed))))


def _store(ask: Ask) -> tuple[int, bytes, int]:
    """Epoch, seed, revision; zeros where there is none."""
    reply = ask(ranged(pb.RangeRequest(key=STORE)))
    epoch, seed = decode_store(reply.kvs[0].value) if reply.kvs else (0, b"")
    return epoch, seed, reply.header.revision


def _items(ask: Ask, revision: int) -> Iterator[Item]:
    start, more = DATA, True
    while more:
        request = pb.RangeRequest(
            key=start, range_end=end_of(DATA), revision=revision, limit=PAGE_KEYS
        )
        page = ask(ranged(request))
        for kv in page.kvs:
            start = kv.key + b"\0"
            if not kv.lease:
                owner, value = unwrap(kv.value)
                yield kv.key[len(DATA) :], value, owner
        more = page.more


def _put(key: bytes, value: bytes) -> Any:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))


def _delete(prefix: bytes) -> Any:
    request = pb.DeleteRangeRequest(key=prefix, range_end=end_of(prefix))
    return pb.RequestOp(request_delete_range=request)


def _txn(*operations: Any) -> Call:
    return transaction(pb.TxnRequest(success=operations), BATCH_S)


def _make(directory: Path, epoch: int, seed: bytes, items: Iterable[Item]) -> None:
    """An embedded store."""
    no_bounds = 1 << 62
    limits = Limits(no_bounds, no_bounds, keys=no_bounds, nbytes=no_bounds)
    store = Store(Files(directory), limits)
    try:
        for batch in _batches(items):
            changes = [
                Change(partial(Store.txn, txn=Txn((Put(key, value),)), owner=owner))
                for key, value, owner in batch
            ]
            for result in store.commit(changes).results:
                if isinstance(result, WetwareError):
                    raise result
    finally:
        store.close()
    with contextlib.closing(sqlite3.connect(directory / FILE)) as db:
        db.execute("UPDATE store SET epoch = ?, authority = ?", (epoch, Key.from_seed(seed).seed))
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and (len(batch) >= BATCH_KEYS or size + len(item[1]) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item[1])
    if batch:
        yield batch
