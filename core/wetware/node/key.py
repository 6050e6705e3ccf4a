"""The node's own key, in its data directory."""

from __future__ import annotations

from pathlib import Path

from wetware.base import paths
from wetware.errors import KeyFileError
from wetware.identity import Key


def load_or_create(data_dir: Path) -> tuple[Key, bool]:
    """The node's key and whether it was made now; WW_PASSPHRASE encrypts it.

    Raises KeyFileError.
    """
    file = data_dir / "node.key"
    passphrase = paths.variable("WW_PASSPHRASE")
    try:
        return Key.load(file, passphrase=(lambda: passphrase) if passphrase else None), False
    except KeyFileError as exc:
        if exc.code != "key.missing":
            raise
    key = Key.generate()
    key.save(file, passphrase=passphrase)
    return key, True
