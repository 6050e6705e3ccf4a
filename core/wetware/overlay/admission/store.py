"""What admission keeps in the data directory: all 0600, replaced as a whole, fsynced.

    cluster.json     the founding, and where issuers were when the node joined
    cluster.key      the cluster's Ed25519 key, in OpenSSH's format; only where it was founded
    certificate      this node's own chain
    join_document    what the auth backend of the node that let it in gave
    tickets.json     tickets that this node issued: hashes, never secrets. From a backup it may not
                     know which are spent: certificates of members say it again
    ledger.json      members that this node renews the certificates of
    tombstones.json  evictions
    foreign.json     certificates of foreign peers

A file that is damaged stops the node with a remedy, and is never silently replaced.

Evictions and withdrawn tickets are written also on a full disk, with the space of a reserve
(`base.disk`). Where not even that is possible the reserve is marked: after a crash this node
lets nobody join or renew until an operator has looked.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.base import disk, paths
from wetware.base.log import get_logger
from wetware.base.texts import ADDRS_MAX
from wetware.errors import AdmissionRefused, ConfigError, InvalidArgument, KeyFileError
from wetware.identity import Key, PeerId
from wetware.overlay.admission.statements import (
    CHAIN_BYTES_MAX,
    TICKET_BYTES,
    Fact,
    Founding,
    decode_fact,
)
from wetware.overlay.admission.texts import parse_peer_addrs

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr

log = get_logger("admission.store")

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
DOCUMENT_BYTES_MAX: Final = 512 << 10
NOT_DURABLE: Final = "an eviction or the end of a ticket may not be on the disk"
RETRY_S: Final = 5.0
"""After a write in the background failed."""

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


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """A ticket as its issuer keeps it.

    Attributes:
        id: What people call it.
        digest: SHA-256 of the secret.
        not_after_ms: Unix time, ms.
        uses: How many nodes it may let in.
        spent: Those that it has let in.
        labels: Of the certificates.
        rights: Of the certificates.
        revoked: Whether it was taken back.
    """

    id: str
    digest: bytes
    not_after_ms: int
    uses: int
    spent: tuple[PeerId, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    rights: frozenset[str] = frozenset()
    revoked: bool = False

    @property
    def name(self) -> bytes:
        """What certificates call it: known to nobody before, and of no use without the secret."""
        return self.digest[:TICKET_BYTES]

    @property
    def uses_left(self) -> int:
        """How many nodes it may still let in."""
        return max(0, self.uses - len(self.spent))


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A member whose certificate this node renews.

    Attributes:
        rights: What it was granted.
        labels: What it was granted.
        not_after_ms: When its latest certificate that this node knows ends.
        inviter: Who signed that certificate.
    """

    rights: frozenset[str]
    labels: Mapping[str, str]
    not_after_ms: int
    inviter: PeerId


class Store:
    """The files, read once. Make one with `Store.open`; the data directory is this process's alone.

    Attributes:
        founding: Of the cluster; None before the node founded or joined one.
        addrs: Where issuers were when the node joined, with their peer IDs.
        cluster_key: Where the cluster was founded, else None.
        certificate: The node's own chain, encoded, or None.
        join_document: See PluginContext.
        tickets: By ID.
        ledger: By peer.
        tombstones: As they were found, not judged.
        foreign: Likewise.
        reserve: Space for evictions, withdrawn tickets, and what is as small and must be written.
        unsure: Why a crash may have brought back what was ended; "" if not, or once an operator has
            looked (`confirm`).
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.reserve = disk.Reserve(data_dir)
        self.unsure = self.reserve.marked
        self.founding: Founding | None = None
        self.addrs: tuple[Multiaddr, ...] = ()
        self.cluster_key: Key | None = None
        self.certificate: bytes | None = None
        self.join_document: bytes | None = None
        self.tickets: dict[str, TicketRecord] = {}
        self.ledger: dict[PeerId, LedgerEntry] = {}
        self.tombstones: list[Fact] = []
        self.foreign: list[Fact] = []
        self._owed: set[str] = set()  # files that something ended in, and that are not written yet
        self._locks: dict[str, asyncio.Lock] = {}
        self._next: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._soon: dict[str, tuple[asyncio.TimerHandle, Callable[[], bytes]]] = {}

    @classmethod
    def open(cls, data_dir: Path, *, passphrase: str | None = None) -> Store:
        """Read what is there.

        Args:
            data_dir: Exists.
            passphrase: Of an encrypted cluster key; WW_PASSPHRASE if None.

        Raises ConfigError, which names the file and the remedy.
        """
        store = cls(data_dir)
        passphrase = passphrase or paths.variable("WW_PASSPHRASE")
        try:
            ask = (lambda: passphrase) if passphrase else None
            store.cluster_key = Key.load(data_dir / CLUSTER_KEY_FILE, passphrase=ask)
        except KeyFileError as exc:
            if exc.code != "key.missing":
                raise
        store._read_cluster()
        store.certificate = store._read(CERTIFICATE_FILE, CHAIN_BYTES_MAX)
        store._read_tickets()
        store._read_ledger()
        store.tombstones = store._read_facts(TOMBSTONES_FILE)
        store.foreign = store._read_facts(FOREIGN_FILE)
        if store.founding is not None:
            store.reserve.fill()
        if store.unsure:
            log.error("admission.suspended", why=store.unsure, hint="`ww doctor`")
        return store

    @classmethod
    def founding_of(cls, data_dir: Path) -> Founding | None:
        """What the cluster of a data directory was founded on; raises ConfigError."""
        store = cls(data_dir)
        store._read_cluster()
        return store.founding

    # --- founding and joining ---------------------------------------------------------------------

    def found(self, backend: str, statement: bytes) -> Founding:
        """Found a cluster here, or go on where that was interrupted.

        Raises ConfigError if this node belongs to one, or did and the founding is gone.
        """
        if self.founding is not None:
            raise ConfigError(f"this node belongs to the cluster {self.founding.cluster_id}")
        if self.cluster_key is None:
            if self.certificate is not None:
                raise ConfigError(
                    f"{self.data_dir / CLUSTER_FILE} is gone, and this node has a certificate",
                    hint="restore it from a backup, or join again with `ww node --join TICKET`; to "
                    f"found a new cluster, move {CERTIFICATE_FILE} away first",
                )
            key = Key.generate()
            key.save(
                self.data_dir / CLUSTER_KEY_FILE,
                passphrase=paths.variable("WW_PASSPHRASE"),
            )
            self.cluster_key = key
        founding = Founding(self.cluster_key.public, backend, statement)
        self._write_cluster(founding, (), None)
        self.reserve.fill()
        return founding

    def join(
        self,
        founding: Founding,
        chain: bytes,
        document: bytes,
        addrs: Sequence[Multiaddr],
    ) -> None:
        """Keep what a node got when it joined; the founding last, which makes it a member.

        Raises ConfigError if this node belongs to another cluster or the disk fails.
        """
        self.check_same_cluster(founding)
        try:
            self.reserve.replace(self.data_dir / DOCUMENT_FILE, document)
            self.reserve.replace(self.data_dir / CERTIFICATE_FILE, chain)
        except OSError as exc:
            raise _not_written(self.data_dir, exc) from exc
        self.certificate, self.join_document = chain, document
        self._write_cluster(founding, tuple(addrs)[:ADDRS_MAX], document)

    def check_same_cluster(self, founding: Founding) -> None:
        """Raise ConfigError if this node belongs to another cluster."""
        if self.founding is not None and self.founding != founding:
            raise ConfigError(
                f"this node belongs to the cluster {self.founding.cluster_id}, and the invitation "
                f"is of {founding.cluster_id}",
                hint="give the other cluster a data directory of its own, with --data-dir",
                code="config.cluster",
            )

    def _write_cluster(
        self, founding: Founding, addrs: tuple[Multiaddr, ...], document: bytes | None
    ) -> None:
        data = {
            "public": founding.public.hex(),
            "backend": founding.backend,
            "founding": founding.statement.hex(),
            "cluster": founding.cluster_id,
            "addrs": [str(addr) for addr in addrs],
            "document": None if document is None else hashlib.sha256(document).hexdigest(),
        }
        try:
            self.reserve.replace(self.data_dir / CLUSTER_FILE, _document(data))
        except OSError as exc:
            raise _not_written(self.data_dir, exc) from exc
        self.founding, self.addrs = founding, addrs

    # --- reading ----------------------------------------------------------------------------------

    def _read(self, name: str, bytes_max: int = FILE_BYTES_MAX) -> bytes | None:
        try:
            with (self.data_dir / name).open("rb") as file:
                data = file.read(bytes_max + 1)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ConfigError(f"cannot read {self.data_dir / name}: {exc.strerror}") from exc
        if len(data) > bytes_max:
            raise self.damaged(name, f"it is larger than {bytes_max} bytes")
        return data

    def damaged(self, name: str, why: object) -> ConfigError:
        """The error for a file that cannot be used, with its remedy."""
        return ConfigError(
            f"{self.data_dir / name} is damaged: {why}",
            hint=_REMEDIES[name],
            code="config.damaged",
        )

    def _read_document(self, name: str) -> Any:
        data = self._read(name)
        if data is None:
            return None
        try:
            return _open_document(data)
        except (ValueError, RecursionError) as exc:
            raise self.damaged(name, exc) from None

    def _read_cluster(self) -> None:
        data = self._read_document(CLUSTER_FILE)
        if data is None:
            return
        try:
            self.founding = Founding(
                bytes.fromhex(data["public"]), data["backend"], bytes.fromhex(data["founding"])
            )
            self.addrs = parse_peer_addrs(data["addrs"])
            document = data["document"]
        except (InvalidArgument, KeyError, TypeError, ValueError) as exc:
            raise self.damaged(CLUSTER_FILE, exc) from None
        if self.cluster_key is not None and self.cluster_key.public != self.founding.public:
            raise ConfigError(
                f"{self.data_dir / CLUSTER_KEY_FILE} is not the key of the cluster "
                f"{self.founding.cluster_id}",
                hint="restore both files from the same backup",
            )
        if document is None:
            return
        self.join_document = self._read(DOCUMENT_FILE, DOCUMENT_BYTES_MAX)
        if self.join_document is None:
            raise self.damaged(DOCUMENT_FILE, "it is gone")
        if hashlib.sha256(self.join_document).hexdigest() != document:
            raise self.damaged(DOCUMENT_FILE, "the checksum differs")

    def _read_tickets(self) -> None:
        try:
            for item in self._read_document(TICKETS_FILE) or ():
                self.tickets[item["id"]] = TicketRecord(
                    id=item["id"],
                    digest=bytes.fromhex(item["digest"]),
                    not_after_ms=int(item["to"]),
                    uses=int(item["uses"]),
                    spent=tuple(map(PeerId.parse, item["spent"])),
                    labels=dict(item["labels"]),
                    rights=frozenset(item["rights"]),
                    revoked=bool(item["revoked"]),
                )
        except (InvalidArgument, KeyError, TypeError, ValueError) as exc:
            raise self.damaged(TICKETS_FILE, exc) from None

    def _read_ledger(self) -> None:
        try:
            for text, item in (self._read_document(LEDGER_FILE) or {}).items():
                self.ledger[PeerId.parse(text)] = LedgerEntry(
                    frozenset(item["rights"]),
                    dict(item["labels"]),
                    int(item["to"]),
                    PeerId.parse(item["inviter"]),
                )
        except (AttributeError, InvalidArgument, KeyError, TypeError, ValueError) as exc:
            raise self.damaged(LEDGER_FILE, exc) from None

    def _read_facts(self, name: str) -> list[Fact]:
        found: list[Fact] = []
        for text in self._read_document(name) or ():
            try:
                fact = decode_fact(base64.b64decode(text, validate=True))
                if self.founding is not None:
                    fact.check(self.founding)
            except (AdmissionRefused, TypeError, ValueError) as exc:
                raise self.damaged(name, exc) from None
            found.append(fact)
        return found

    # --- writing ----------------------------------------------------------------------------------

    def write_certificate(self, chain: bytes) -> None:
        """Replace the node's own chain now; raises OSError."""
        self.reserve.replace(self.data_dir / CERTIFICATE_FILE, chain, must=True)
        self.certificate = chain

    def tickets_document(self) -> bytes:
        """What `tickets.json` should hold now."""
        return _document(
            [
                {
                    "id": ticket.id,
                    "digest": ticket.digest.hex(),
                    "to": ticket.not_after_ms,
                    "uses": ticket.uses,
                    "spent": list(ticket.spent),
                    "labels": dict(ticket.labels),
                    "rights": sorted(ticket.rights),
                    "revoked": ticket.revoked,
                }
                for ticket in self.tickets.values()
            ]
        )

    def ledger_document(self) -> bytes:
        """What `ledger.json` should hold now."""
        return _document(
            {
                peer: {
                    "rights": sorted(entry.rights),
                    "labels": dict(entry.labels),
                    "to": entry.not_after_ms,
                    "inviter": entry.inviter,
                }
                for peer, entry in self.ledger.items()
            }
        )

    def spend(self, ticket: TicketRecord, peer: PeerId) -> None:
        """Mark a ticket, in memory; `save_tickets` makes it durable."""
        self.tickets[ticket.id] = replace(ticket, spent=(*ticket.spent, peer))

    async def save_tickets(self, *, ends: bool = False) -> None:
        """Make the tickets as they are now durable; raises OSError."""
        await self.save(TICKETS_FILE, self.tickets_document, ends=ends)

    async def save(self, name: str, content: Callable[[], bytes], *, ends: bool = False) -> None:
        """Make `content`, taken after this call, durable; raises OSError.

        What `ends` something may take the reserve, and is tried again until it is written. Writes
        of one file follow each other, and those who wait for the same one share it. A caller that
        is cancelled leaves its write going.
        """
        if ends:
            self._owed.add(name)
        task = self._next.get(name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._write(name, content))
            self._next[name] = task
            self._tasks.add(task)
            task.add_done_callback(self._written)
        await asyncio.shield(task)

    def save_soon(
        self,
        name: str,
        content: Callable[[], bytes],
        delay_s: float = 0.0,
        *,
        ends: bool = False,
    ) -> None:
        """The same in the background, and again until it succeeds. Without a loop, at once."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.reserve.replace(self.data_dir / name, content(), must=ends)
            return
        if ends:
            self._owed.add(name)
        if name in self._soon:
            return

        def begin() -> None:
            del self._soon[name]
            task = loop.create_task(self._keep_saving(name, content))
            self._tasks.add(task)
            task.add_done_callback(self._written)

        self._soon[name] = loop.call_later(delay_s, begin), content

    async def _keep_saving(self, name: str, content: Callable[[], bytes]) -> None:
        try:
            await self.save(name, content)
        except OSError as exc:
            log.warning("admission.not_saved", file=name, why=exc, again_s=RETRY_S)
            self.save_soon(name, content, RETRY_S)

    async def _write(self, name: str, content: Callable[[], bytes]) -> None:
        async with self._locks.setdefault(name, asyncio.Lock()):
            del self._next[name]  # who comes now may have changed what is being written
            ends = name in self._owed
            self._owed.discard(name)
            try:
                await asyncio.to_thread(
                    self.reserve.replace, self.data_dir / name, content(), must=ends
                )
            except BaseException:
                if ends:
                    self._owed.add(name)
                    self.reserve.mark(NOT_DURABLE)
                    self.save_soon(name, content, RETRY_S)
                raise
            if not self._owed and not self.unsure:
                self.reserve.unmark()

    def confirm(self) -> None:
        """An operator has looked, after a crash that made it `unsure`. Idempotent."""
        self.unsure = ""
        if not self._owed:
            self.reserve.unmark()

    def _written(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it gets it; a caller may be gone

    async def flush(self) -> None:
        """Write what waits to be written; failures are logged."""
        for name, (timer, content) in tuple(self._soon.items()):
            timer.cancel()
            del self._soon[name]
            try:
                await self.save(name, content)
            except OSError as exc:
                log.warning("admission.not_saved", file=name, why=exc)
        while self._tasks:
            await asyncio.wait(self._tasks)
        for timer, _content in self._soon.values():  # for another try after a failure
            timer.cancel()
        self._soon.clear()


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


def _document(data: object) -> bytes:
    return json.dumps({"version": 1, "sha256": _checksum(data), "data": data}, indent=1).encode()


def facts_document(facts: Sequence[Fact]) -> bytes:
    """The content of a file of facts."""
    return _document([base64.b64encode(fact.encoded).decode() for fact in facts])


def _not_written(data_dir: Path, exc: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write to the data directory {data_dir}: {exc.strerror}",
        hint="make room on the disk, or choose another directory with --data-dir",
    )
