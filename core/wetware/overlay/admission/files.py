"""The files of admission in the data directory: all 0600, replaced as a whole, fsynced.

    cluster.json     the founding, and where issuers were when the node joined
    cluster.key      the cluster's Ed25519 key, in OpenSSH's format; only where it was founded
    certificate      this node's own chain
    join_document    what the auth backend of the node that let it in gave
    tickets.json     tickets that this node issued
    ledger.json      members that this node renews the certificates of
    tombstones.json  evictions
    foreign.json     certificates of foreign peers

A file that is damaged stops the node with a remedy, and is never silently replaced.

Evictions and withdrawn tickets are written also on a full disk, with the space of a reserve
(`base.disk`). Where not even that is possible the reserve is marked: after a crash this node
lets nobody join or renew until an operator has looked.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from wetware.base import disk
from wetware.base.log import get_logger
from wetware.base.threads import Threads
from wetware.base.writer import Write, Writer
from wetware.errors import AdmissionRefused, ConfigError, WetwareError

log = get_logger("admission.files")
T = TypeVar("T")

CLUSTER_FILE = "cluster.json"
CLUSTER_KEY_FILE = "cluster.key"
CERTIFICATE_FILE = "certificate"
DOCUMENT_FILE = "join_document"
TICKETS_FILE = "tickets.json"
LEDGER_FILE = "ledger.json"
TOMBSTONES_FILE = "tombstones.json"
FOREIGN_FILE = "foreign.json"

FILE_BYTES_MAX: Final = 64 << 20
"""The largest that the limits allow is some 30 MiB of tombstones."""
NOT_DURABLE: Final = "an eviction or the end of a ticket may not be on the disk"
RETRY_S: Final = 5.0
"""Between two tries, and between two writes of a file that nobody waits for."""

_REMEDIES: Final = {
    CLUSTER_FILE: "restore it from a backup; or move it away, and start with --join TICKET again, "
    "or, where cluster.key is, as the first time: the cluster's ID stays the same",
    CERTIFICATE_FILE: "restore it from a backup; or move it away, and join again with "
    "`ww node --join TICKET` (where cluster.key is, the node makes a new one by itself)",
    DOCUMENT_FILE: "restore it from a backup, or join again with `ww node --join TICKET`",
    TICKETS_FILE: "restore it from a backup; or move it away: tickets that this node issued are "
    "then worthless, and `ww invite` makes new ones",
    LEDGER_FILE: "restore it from a backup; or move it away: it fills again as members connect",
    TOMBSTONES_FILE: "restore it from a backup; or move it away, and the other members tell this "
    "node again who was evicted: until then it may let such a node in",
    FOREIGN_FILE: "restore it from a backup; or move it away: the other members have it too",
}


class Unwritten(AdmissionRefused):
    """Something could not be written, or not in time."""

    code = "admission.not_saved"


@dataclass(frozen=True, slots=True)
class _Change:
    """Of a file; `ends`: what was taken away must not come back."""

    file: File
    ends: bool


class Files:
    """One data directory, which is this process's alone.

    Attributes:
        directory: Exists.
        reserve: Space for what ends something, and for what is as small and must be written.
        threads: For what waits for this disk.
        unsure: Why a crash may have brought back what was ended; "" if not, or once an operator has
            looked (`confirm`).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reserve = disk.Reserve(directory)
        self.threads = Threads()
        self.unsure = self.reserve.marked
        self._owes = False  # what has ended, to the disk
        self._written_at: dict[File, float] = {}
        self._writer: Writer[_Change] | None = None

    # --- at the start -----------------------------------------------------------------------------

    def damaged(self, name: str, why: object) -> ConfigError:
        """The error for a file that cannot be used, with its remedy."""
        return ConfigError(
            f"{self.directory / name} is damaged: {why}",
            hint=_REMEDIES[name],
            code="config.damaged",
        )

    def read(self, name: str, bytes_max: int = FILE_BYTES_MAX) -> bytes | None:
        """What a file holds, None where there is none; raises ConfigError."""
        try:
            with (self.directory / name).open("rb") as file:
                data = file.read(bytes_max + 1)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ConfigError(f"cannot read {self.directory / name}: {exc.strerror}") from exc
        if len(data) > bytes_max:
            raise self.damaged(name, f"it is larger than {bytes_max} bytes")
        return data

    def load(self, name: str, parse: Callable[[Any], T]) -> T | None:
        """What `parse` makes of a document, None where there is none; raises ConfigError."""
        data = self.read(name)
        if data is None:
            return None
        try:
            return parse(_open_document(data))
        except (WetwareError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
            raise self.damaged(name, e) from None

    def write(self, name: str, data: bytes, *, must: bool = False) -> None:
        """Replace a file now; see `Reserve.replace`. Raises ConfigError."""
        try:
            self.reserve.replace(self.directory / name, data, must=must)
        except OSError as exc:
            raise ConfigError(
                f"cannot write to the data directory {self.directory}: {exc.strerror}",
                hint="make room on the disk, or choose another directory with --data-dir",
            ) from exc

    # --- while the node runs ----------------------------------------------------------------------

    @property
    def writer(self) -> Writer[_Change]:
        """Started at its first use."""
        if self._writer is None:
            self._writer = Writer(
                "admission",
                self._commit,
                lambda owed: RETRY_S if owed else None,
                unavailable=Unwritten,
            )
            self._writer.start()
        return self._writer

    def confirm(self) -> None:
        """An operator has looked, after a crash that made it `unsure`. Idempotent."""
        self.unsure = ""
        if not self._owes:
            self.reserve.unmark()

    async def flush(self) -> None:
        """Write what waits to be written, and nothing any more; failures are logged. Idempotent."""
        if self._writer is not None:
            await self.threads.run(self._writer.close)

    def _commit(self, batch: list[Write[_Change]], last: bool) -> list[Write[_Change]]:
        """On the thread: every file of the batch once; returns what is tried again."""
        again: list[Write[_Change]] = []
        for file in dict.fromkeys(write.what.file for write in batch):
            changes = [write for write in batch if write.what.file is file]
            ends = any(write.what.ends for write in changes)
            waited_for = any(write.future is not None for write in changes)
            since_s = time.monotonic() - self._written_at.get(file, float("-inf"))
            if not (ends or waited_for or last) and since_s < RETRY_S:
                again.append(changes[-1])  # members that connect one after another share a write
                continue
            error = self._replace(file, must=ends)
            if error is not None and (ends or not waited_for):
                again.append(Write(_Change(file, ends)))
            for write in changes:
                self.writer.answer(write, error=error)
        self._owes = any(write.what.ends for write in again)
        if self._owes:
            self.reserve.mark(NOT_DURABLE)
        elif not self.unsure:
            self.reserve.unmark()
        return again

    def _replace(self, file: File, *, must: bool) -> OSError | None:
        try:
            self.reserve.replace(self.directory / file.name, file.encoded(), must=must)
        except OSError as exc:
            log.warning("admission.not_saved", file=file.name, why=exc, again_s=RETRY_S)
            return exc
        self._written_at[file] = time.monotonic()
        return None


class File:
    """A document that changes while the node runs.

    Args:
        files: Where it is.
        name: Of the file.
        content: What JSON can say of it. Called on the thread that writes.
    """

    def __init__(self, files: Files, name: str, content: Callable[[], object]) -> None:
        self._files, self.name, self._content = files, name, content

    def encoded(self) -> bytes:
        return encode_document(self._content())

    async def save(self, what: str, *, ends: bool = False) -> None:
        """Make the content durable, as it is now or newer; a caller may be cancelled meanwhile.

        What `ends` something may take the reserve, and is tried again until it is written.
        Raises AdmissionRefused "admission.not_saved", which names `what`.
        """
        try:
            await self._files.writer.write(_Change(self, ends))
        except OSError as exc:
            raise Unwritten(
                f"{what} could not be written to disk: {exc.strerror}",
                hint="make room on the node's disk and try again",
            ) from exc

    def save_soon(self, *, ends: bool = False) -> None:
        """The same in the background, and again until it succeeds."""
        self._files.writer.write_soon(_Change(self, ends))


def _checksum(data: object) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _open_document(data: bytes) -> Any:
    outer = json.loads(data)
    if type(outer) is not dict or outer.keys() != {"version", "sha256", "data"}:
        raise ValueError("not a document of wetware")
    if outer["version"] != 1:
        raise ValueError(f"version {outer['version']} is not known to this release")
    if outer["sha256"] != _checksum(outer["data"]):
        raise ValueError("the checksum differs")
    return outer["data"]


def encode_document(data: object) -> bytes:
    return json.dumps({"version": 1, "sha256": _checksum(data), "data": data}).encode()
