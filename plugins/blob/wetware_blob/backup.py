"""A backup of what is pinned at a node: a CAR for each CID, and `pins.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import InvalidArgument, NotFound
from wetware.identity import replace_private_file
from wetware_blob import disk

if TYPE_CHECKING:
    from wetware_blob.client import BlobStore, Report, Terms

PINS_FILE: Final = "pins.json"
PINS_FILE_BYTES_MAX: Final = 64 << 20
_FIELDS: Final = {"root": str, "name": str, "copies": int, "where": str, "public": bool}

Watched = Callable[[str], AbstractContextManager["Report | None"]]
"""Shows what goes on under a name."""


async def back_up(blob: BlobStore, directory: Path, watched: Watched) -> tuple[int, list[str]]:
    """Write all that `directory` does not have yet; returns how many pins, and what nobody has."""
    pins, _ = await blob.all()
    with disk.writing(directory):
        await disk.run(partial(directory.mkdir, parents=True, exist_ok=True))
    failed: list[str] = []
    for cid in dict.fromkeys(pin.root for pin in pins):
        path = _car(directory, cid)
        if path.exists():  # a look that takes no time
            continue
        try:
            with watched(cid) as progress:
                await blob.get(cid, path, car=True, progress=progress)
        except NotFound as exc:
            failed.append(f"{cid}: {exc.message}")
    saved = [{name: getattr(pin, name) for name in ("owner", *_FIELDS)} for pin in pins]
    with disk.writing(directory):
        replace_private_file(directory / PINS_FILE, json.dumps(saved).encode())
    return len(pins), failed


async def restore(blob: BlobStore, directory: Path, watched: Watched) -> int:
    """Put and pin all that a backup has; returns how many pins."""
    saved, present = read_pins(directory), set[str]()
    for root, terms in reversed(saved):  # the newest comes last, as it did
        with watched(root) as progress:
            if root in present:
                await blob.pin(root, progress=progress, **terms)
                continue
            path = _car(directory, root)
            put = await blob.put(path, car=True, progress=progress, **terms)
            if put.cid != root:
                raise InvalidArgument(f"{path} has another root: {put.cid}")
            present.add(root)
    return len(saved)


def read_pins(directory: Path) -> list[tuple[str, Terms]]:
    """The pins of a backup, the newest first; raises InvalidArgument."""
    path = directory / PINS_FILE
    with disk.reading(path), path.open("rb") as file:
        data = file.read(PINS_FILE_BYTES_MAX + 1)
    found: list[tuple[str, Terms]] = []
    try:
        for pin in json.loads(data if len(data) <= PINS_FILE_BYTES_MAX else b""):
            terms: Any = {name: pin[name] for name in _FIELDS}
            if any(type(terms[name]) is not kind for name, kind in _FIELDS.items()):
                raise TypeError("of another type")  # noqa: TRY301  # one error for all
            root = terms.pop("root")
            _car(directory, root)
            found.append((root, terms))
    except (ValueError, LookupError, TypeError, RecursionError, InvalidArgument) as exc:
        raise InvalidArgument(
            f"{path} is not what `ww blob backup` writes", hint="ww blob backup DIR"
        ) from exc
    return found


def _car(directory: Path, cid: str) -> Path:
    if not (cid.isascii() and cid.isalnum()):
        raise InvalidArgument(f"{cid!r} is no CID", code="invalid.cid")
    return directory / f"{cid}.car"
