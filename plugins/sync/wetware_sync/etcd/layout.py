"""How the store lies in etcd: all below one prefix, so that a watch of that sees everything.

`store`: version, epoch and key; `d` + KEY: a header with the owner, who is charged, and the value;
`l` + ID: whose a lease is, which ends with that.
"""

from __future__ import annotations

from typing import Any, Final

from wetware.base import cbor
from wetware.errors import ConfigError
from wetware_sync.engine import Event, KeyValue, prefix_end

PREFIX: Final = b"ww/sync/"
END: Final = b"ww/sync0"
"""The first key above."""
STORE: Final = PREFIX + b"store"
DATA: Final = PREFIX + b"d"
LEASES: Final = PREFIX + b"l"
VERSION: Final = 1
_LENGTH_BYTES: Final = 2


def end_of(prefix: bytes) -> bytes:
    """Of the range of all that begin with a prefix of ours."""
    end = prefix_end(prefix)
    assert end is not None  # noqa: S101  # none of ours is of 0xff alone
    return end


def encode_store(epoch: int, seed: bytes) -> bytes:
    """`seed` is of the store's own key; b"" while the store is being loaded."""
    return cbor.encode([VERSION, epoch, seed])


def decode_store(value: bytes) -> tuple[int, bytes]:
    """Epoch and seed; raises ConfigError "config.store"."""
    match cbor.decode(value, bytes_max=1024):
        case [version, int(epoch), bytes(seed)] if version == VERSION:
            return epoch, seed
    raise ConfigError(
        f"what etcd has at {STORE.decode()!r} is of another release",
        hint=f"this one knows version {VERSION}",
        code="config.store",
    )


def wrap(owner: str, value: bytes) -> bytes:
    name = owner.encode()
    return len(name).to_bytes(_LENGTH_BYTES, "big") + name + value


def unwrap(value: bytes) -> tuple[str, bytes]:
    """Owner and value."""
    end = _LENGTH_BYTES + int.from_bytes(value[:_LENGTH_BYTES], "big")
    return value[_LENGTH_BYTES:end].decode(), value[end:]


def lease_key(lease: int) -> bytes:
    return LEASES + b"%d" % lease


def item_of(kv: Any) -> KeyValue:
    """Of etcd's KeyValue of a key with data."""
    _, value = unwrap(kv.value)
    return KeyValue(
        kv.key[len(DATA) :], value, kv.create_revision, kv.mod_revision, kv.version, kv.lease
    )


def event_of(event: Any) -> Event:
    """Of etcd's Event of a key with data."""
    kv, deleted = event.kv, event.type == event.DELETE
    return Event(kv.key[len(DATA) :], kv.mod_revision, None if deleted else item_of(kv))
