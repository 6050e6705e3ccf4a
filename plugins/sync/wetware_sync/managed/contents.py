"""The store as it moves: from the embedded engine's file into etcd, and back.

Keys go with their owners, and with the store's own key; what was held by a lease stays behind. All
of it blocks, and speaks to the etcd of this node alone.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from wetware.base.files import Files
from wetware.errors import WetwareError
from wetware.identity import Key
from wetware_sync.embedded.store import FILE, Change, Store, contents
from wetware_sync.engine import Limits, Put, Txn
from wetware_sync.etcd.layout import DATA, STORE, decode_store, encode_store, end_of, unwrap, wrap
from wetware_sync.managed.child import EtcdError, ask

BATCH_KEYS: Final = 128
BATCH_BYTES: Final = 512 << 10
PAGE_KEYS: Final = 64

Item = tuple[bytes, bytes, str]
"""A key, its value, its owner."""


def load(socket_path: str, source: Path) -> int:
    """Put a store that is closed into an etcd that is empty; returns its epoch, one higher."""
    with contextlib.closing(sqlite3.connect(f"{source.as_uri()}?immutable=1", uri=True)) as db:
        ((epoch, seed),) = db.execute("SELECT epoch, authority FROM store").fetchall()
        count = 0
        for batch in batches(contents(db)):
            puts = [
                {"requestPut": {"key": _b64(DATA + key), "value": _b64(wrap(owner, value))}}
                for key, value, owner in batch
            ]
            ask(socket_path, "kv/txn", {"success": puts})
            count += len(batch)
    there = _range(socket_path, DATA, count_only=True)
    if int(there.get("count", 0)) != count:
        raise EtcdError(f"etcd has {there.get('count', 0)} keys and not the {count} of the store")
    made = {"key": _b64(STORE), "value": _b64(encode_store(epoch + 1, bytes(seed)))}
    ask(socket_path, "kv/put", made)
    return int(epoch) + 1


def dump(socket_path: str, target: Path) -> None:
    """Make a file of what is in etcd, as `embedded.backup` makes one."""
    store = _range(socket_path, STORE, one=True)
    if not store.get("kvs"):
        raise EtcdError("etcd has no store")
    epoch, seed = decode_store(b64decode(store["kvs"][0]["value"]))
    if not seed:
        raise EtcdError("the store in etcd is being restored", hint="end that first")
    revision = int(store["header"]["revision"])
    work = target.with_name(target.name + ".work")
    work.mkdir(mode=0o700)
    try:
        make(work, epoch, seed, _items(socket_path, revision))
        (work / FILE).replace(target)
    finally:
        shutil.rmtree(work)


def _items(socket_path: str, revision: int) -> Iterator[Item]:
    start, more = DATA, True
    while more:
        page = _range(socket_path, start, revision=revision)
        for kv in page.get("kvs", ()):
            key = b64decode(kv["key"])
            start = key + b"\0"
            if not int(kv.get("lease", 0)):
                owner, value = unwrap(b64decode(kv["value"]))
                yield key[len(DATA) :], value, owner
        more = bool(page.get("more"))


def make(directory: Path, epoch: int, seed: bytes, items: Iterable[Item]) -> None:
    """An embedded store."""
    no_bounds = 1 << 62
    limits = Limits(no_bounds, no_bounds, keys=no_bounds, nbytes=no_bounds)
    store = Store(Files(directory), limits)
    try:
        for batch in batches(items):
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


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
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


def _range(
    socket_path: str,
    start: bytes,
    *,
    one: bool = False,
    revision: int = 0,
    count_only: bool = False,
) -> dict[str, Any]:
    body: dict[str, Any] = {"key": _b64(start), "limit": PAGE_KEYS, "revision": revision}
    if not one:
        body["rangeEnd"] = _b64(end_of(DATA))
    return ask(socket_path, "kv/range", {**body, "countOnly": count_only})


def _b64(data: bytes) -> str:
    return b64encode(data).decode()
