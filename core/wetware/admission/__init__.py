"""Who belongs to the cluster, and who may speak what: one decision, in one place.

A cluster is named by its founding: the cluster's public key and the auth backend. A node is a
member by a certificate that the cluster key signed, or an inviter that the cluster key certified;
both ends of a connection show theirs and check the other's offline.

- `statements`: what is signed: certificates, chains, tombstones;  `texts`: tickets, bundles
- `store`: the files;  `decision`: `Admission`, which decides;  `limits`: `[admission]` of ww.toml
- `service`: the protocols, on a link host;  `joining`: how a node gets its first certificate

The names below are loaded at their first use: reading the configuration costs no cryptography.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wetware.access import Access
    from wetware.admission.decision import Admission, Admitted, Removed
    from wetware.admission.joining import Joined, join
    from wetware.admission.limits import AdmissionLimits
    from wetware.admission.service import Introductions
    from wetware.admission.statements import Certificate, Chain, Founding, Tombstone
    from wetware.admission.store import Store
    from wetware.admission.texts import Bundle, Ticket
    from wetware.errors import AdmissionRefused

__all__ = [
    "Access",
    "Admission",
    "AdmissionLimits",
    "AdmissionRefused",
    "Admitted",
    "Bundle",
    "Certificate",
    "Chain",
    "Founding",
    "Introductions",
    "Joined",
    "Removed",
    "Store",
    "Ticket",
    "Tombstone",
    "join",
]

_HOME = {
    "Access": "wetware.access",
    "Admission": "wetware.admission.decision",
    "AdmissionLimits": "wetware.admission.limits",
    "AdmissionRefused": "wetware.errors",
    "Admitted": "wetware.admission.decision",
    "Bundle": "wetware.admission.texts",
    "Certificate": "wetware.admission.statements",
    "Chain": "wetware.admission.statements",
    "Founding": "wetware.admission.statements",
    "Introductions": "wetware.admission.service",
    "Joined": "wetware.admission.joining",
    "Removed": "wetware.admission.decision",
    "Store": "wetware.admission.store",
    "Ticket": "wetware.admission.texts",
    "Tombstone": "wetware.admission.statements",
    "join": "wetware.admission.joining",
}


def __getattr__(name: str) -> Any:
    if (module := _HOME.get(name)) is None:
        raise AttributeError(f"module 'wetware.admission' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(module), name)
