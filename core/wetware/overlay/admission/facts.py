"""The facts: what every member has to have, tombstones and certificates of foreign peers."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from wetware.base.bounds import less
from wetware.overlay.admission.files import FOREIGN_FILE, TOMBSTONES_FILE, File, Files
from wetware.overlay.admission.statements import (
    Fact,
    ForeignFact,
    Founding,
    Tombstone,
    decode_fact,
    fact_digest,
    refusal,
)

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.admission.limits import AdmissionLimits


class Facts:
    """Of several about the same, one is kept: every node keeps the same one.

    Attributes:
        tombstones: By peer, then by issuer.
        foreign: By peer.
        encoded: By digest, 16 bytes.
    """

    def __init__(self, files: Files, founding: Founding | None) -> None:
        self.tombstones: dict[PeerId, dict[PeerId, Tombstone]] = {}
        self.foreign: dict[PeerId, ForeignFact] = {}
        self.encoded: dict[bytes, bytes] = {}
        self._issued: Counter[tuple[type[Fact], PeerId]] = Counter()
        self.tombstones_file = File(files, TOMBSTONES_FILE, lambda: self._plain(Tombstone))
        self.foreign_file = File(files, FOREIGN_FILE, lambda: self._plain(ForeignFact))

        def parse(texts: list[str]) -> list[Fact]:
            found = [decode_fact(base64.b64decode(text, validate=True)) for text in texts]
            for fact in found:
                if founding is not None:
                    fact.check(founding)
            return found

        for name in (TOMBSTONES_FILE, FOREIGN_FILE):
            for fact in files.load(name, parse) or ():
                self.put(fact)

    def __iter__(self) -> Iterator[Fact]:
        for mine in list(self.tombstones.values()):  # the thread that writes looks at them, too
            yield from list(mine.values())
        yield from list(self.foreign.values())

    def _plain(self, kind: type[Fact]) -> list[str]:
        return [base64.b64encode(f.encoded).decode() for f in self if isinstance(f, kind)]

    def known(self, fact: Fact) -> Fact | None:
        """The one about the same as `fact`."""
        if isinstance(fact, Tombstone):
            return self.tombstones.get(fact.peer, {}).get(fact.issuer)
        return self.foreign.get(fact.peer)

    def is_superseded(self, fact: Fact) -> bool:
        """Whether one is kept that is greater: every node keeps the same of two."""
        known = self.known(fact)
        return known is not None and _rank(known) >= _rank(fact)

    def check_room(self, fact: Fact, root: PeerId, limits: AdmissionLimits) -> None:
        """Raise AdmissionRefused where a limit on new facts is reached."""
        if self.known(fact) is not None:
            return
        count, by_root = self._issued[type(fact), fact.issuer], fact.issuer == root
        if isinstance(fact, Tombstone):
            limit, name = (
                (limits.tombstones_max, "tombstones_max")
                if by_root
                else (limits.tombstones_per_inviter_max, "tombstones_per_inviter_max")
            )
            if count >= limit:
                raise refusal("full", f"{limit} evictions by {fact.issuer} are known ({name})")
            return
        if len(self.foreign) >= limits.foreign_max:
            raise refusal("full", f"{len(self.foreign)} foreign peers (foreign_max)")
        if not by_root and count >= limits.foreign_per_inviter_max:
            raise refusal(
                "full",
                f"{count} foreign peers that {fact.issuer} certified (foreign_per_inviter_max)",
            )

    def put(self, fact: Fact) -> None:
        """Keep a fact in the place of the one about the same."""
        if (known := self.known(fact)) is not None:
            self.drop(known)
        if isinstance(fact, Tombstone):
            self.tombstones.setdefault(fact.peer, {})[fact.issuer] = fact
        else:
            self.foreign[fact.peer] = fact
        self._issued[type(fact), fact.issuer] += 1
        self.encoded[fact_digest(fact.encoded)] = fact.encoded

    def drop(self, fact: Fact) -> None:
        if isinstance(fact, ForeignFact):
            del self.foreign[fact.peer]
        else:
            mine = self.tombstones[fact.peer]
            del mine[fact.issuer]
            if not mine:
                del self.tombstones[fact.peer]
        less(self._issued, (type(fact), fact.issuer))
        del self.encoded[fact_digest(fact.encoded)]

    def save_soon(self, fact: Fact) -> None:
        """Write in the background that `fact` is kept, or no more."""
        if isinstance(fact, Tombstone):
            self.tombstones_file.save_soon(ends=True)
        else:
            self.foreign_file.save_soon()


def _rank(fact: Fact) -> tuple[int, bytes]:
    return fact.not_after_ms, fact_digest(fact.encoded)
