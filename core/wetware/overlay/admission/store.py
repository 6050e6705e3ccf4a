"""What makes a node a member, and what it knows as one, as its data directory has it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.base import paths
from wetware.base.log import get_logger
from wetware.base.texts import ADDRS_MAX
from wetware.errors import ConfigError, KeyFileError
from wetware.identity import Key
from wetware.overlay.admission.facts import Facts
from wetware.overlay.admission.files import (
    CERTIFICATE_FILE,
    CLUSTER_FILE,
    CLUSTER_KEY_FILE,
    DOCUMENT_FILE,
    Files,
    encode_document,
)
from wetware.overlay.admission.ledger import Ledger
from wetware.overlay.admission.statements import CHAIN_BYTES_MAX, Founding
from wetware.overlay.admission.texts import parse_peer_addrs
from wetware.overlay.admission.tickets import Tickets

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr

log = get_logger("admission.store")

DOCUMENT_BYTES_MAX: Final = 512 << 10


class Store:
    """The files, read once; the data directory is this process's alone.

    Args:
        data_dir: Exists. An encrypted cluster key in it needs WW_PASSPHRASE.

    Raises ConfigError, which names the file and the remedy.

    Attributes:
        files: All of them.
        founding: Of the cluster; None before the node founded or joined one.
        addrs: Where issuers were when the node joined, with their peer IDs.
        cluster_key: Where the cluster was founded, else None.
        certificate: The node's own chain, encoded, or None.
        join_document: See PluginContext.
        tickets: That this node issued.
        ledger: Of members that this node renews.
        facts: As they were found, not judged.
    """

    def __init__(self, data_dir: Path) -> None:
        self.files = files = Files(data_dir)
        self.founding: Founding | None = None
        self.addrs: tuple[Multiaddr, ...] = ()
        self.cluster_key = _load_cluster_key(data_dir)
        self.join_document: bytes | None = None
        self._read_cluster()
        self.certificate = files.read(CERTIFICATE_FILE, CHAIN_BYTES_MAX)
        self.tickets, self.ledger = Tickets(files), Ledger(files)
        self.facts = Facts(files, self.founding)
        if self.founding is not None:
            files.reserve.fill()
        if files.unsure:
            log.error("admission.suspended", why=files.unsure, hint="`ww doctor`")

    def _read_cluster(self) -> None:
        files = self.files
        if (read := files.load(CLUSTER_FILE, _parse_cluster)) is None:
            return
        self.founding, self.addrs, digest = read
        if self.cluster_key is not None and self.cluster_key.public != self.founding.public:
            raise ConfigError(
                f"{files.directory / CLUSTER_KEY_FILE} is not the key of the cluster "
                f"{self.founding.cluster_id}",
                hint="restore both files from the same backup",
            )
        if digest is None:
            return
        self.join_document = files.read(DOCUMENT_FILE, DOCUMENT_BYTES_MAX)
        if self.join_document is None:
            raise files.damaged(DOCUMENT_FILE, "it is gone")
        if hashlib.sha256(self.join_document).hexdigest() != digest:
            raise files.damaged(DOCUMENT_FILE, "the checksum differs")

    @property
    def founded(self) -> Founding:
        """The founding; raises ConfigError before there is one."""
        if self.founding is None:
            raise ConfigError("this node belongs to no cluster yet")
        return self.founding

    def found(self, backend: str, statement: bytes) -> Founding:
        """Found a cluster here, or go on where that was interrupted.

        Raises ConfigError if this node belongs to one, or did and the founding is gone.
        """
        directory = self.files.directory
        if self.founding is not None:
            raise ConfigError(f"this node belongs to the cluster {self.founding.cluster_id}")
        if self.cluster_key is None:
            if self.certificate is not None:
                raise ConfigError(
                    f"{directory / CLUSTER_FILE} is gone, and this node has a certificate",
                    hint="restore it from a backup, or join again with `ww node --join TICKET`; to "
                    f"found a new cluster, move {CERTIFICATE_FILE} away first",
                )
            key = Key.generate()
            key.save(directory / CLUSTER_KEY_FILE, passphrase=paths.variable("WW_PASSPHRASE"))
            self.cluster_key = key
        founding = Founding(self.cluster_key.public, backend, statement)
        self._write_cluster(founding, (), None)
        return founding

    def join(
        self, founding: Founding, chain: bytes, document: bytes, addrs: Sequence[Multiaddr]
    ) -> None:
        """Keep what a node got when it joined; the founding last, which makes it a member.

        Raises ConfigError if this node belongs to another cluster or the disk fails.
        """
        self.check_same_cluster(founding)
        self.files.write(DOCUMENT_FILE, document)
        self.write_certificate(chain, must=False)
        self.join_document = document
        self._write_cluster(founding, tuple(addrs)[:ADDRS_MAX], document)
        self.facts = Facts(self.files, founding)

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
        self.files.write(CLUSTER_FILE, encode_document(data))
        self.founding, self.addrs = founding, addrs
        self.files.reserve.fill()

    def write_certificate(self, chain: bytes, *, must: bool = True) -> None:
        """Replace the node's own chain now; raises ConfigError."""
        self.files.write(CERTIFICATE_FILE, chain, must=must)
        self.certificate = chain


def founding_of(data_dir: Path) -> Founding | None:
    """What the cluster of a data directory was founded on; raises ConfigError."""
    read = Files(data_dir).load(CLUSTER_FILE, _parse_cluster)
    return None if read is None else read[0]


def _parse_cluster(data: Mapping[str, Any]) -> tuple[Founding, tuple[Multiaddr, ...], str | None]:
    """The founding, the addresses, and the digest of the join document, if there is one."""
    founding = Founding(
        bytes.fromhex(data["public"]), data["backend"], bytes.fromhex(data["founding"])
    )
    return founding, parse_peer_addrs(data["addrs"]), data["document"]


def _load_cluster_key(data_dir: Path) -> Key | None:
    passphrase = paths.variable("WW_PASSPHRASE")
    ask = (lambda: passphrase) if passphrase else None
    try:
        return Key.load(data_dir / CLUSTER_KEY_FILE, passphrase=ask)
    except KeyFileError as exc:
        if exc.code != "key.missing":
            raise
        return None
