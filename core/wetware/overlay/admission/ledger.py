"""The ledger of an issuer: the latest certificates of the members that it renews."""

from __future__ import annotations

import base64
from collections import Counter

from wetware.base.bounds import less
from wetware.identity import PeerId
from wetware.overlay.admission.files import LEDGER_FILE, File, Files
from wetware.overlay.admission.statements import Certificate, Chain


class Ledger(dict[PeerId, Certificate]):
    """By peer. What changes it is in memory; `file` makes it durable.

    Attributes:
        issued: How many are of each issuer.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files.load(LEDGER_FILE, _parse) or {})
        self.issued = Counter(leaf.issuer for leaf in self.values())
        self.file = File(files, LEDGER_FILE, self._plain)

    def __setitem__(self, peer: PeerId, leaf: Certificate) -> None:
        if peer in self:
            del self[peer]
        super().__setitem__(peer, leaf)
        self.issued[leaf.issuer] += 1

    def __delitem__(self, peer: PeerId) -> None:
        less(self.issued, self[peer].issuer)
        super().__delitem__(peer)

    def _plain(self) -> list[str]:
        return [base64.b64encode(Chain((leaf,)).encoded).decode() for leaf in list(self.values())]

    def forget(self, *, ended_before_ms: float) -> bool:
        """Forget who can renew no more; whether that made room."""
        ended = [peer for peer, leaf in self.items() if leaf.not_after_ms < ended_before_ms]
        for peer in ended:
            del self[peer]
        return bool(ended)


def _parse(texts: list[str]) -> dict[PeerId, Certificate]:
    leaves = [Chain.decode(base64.b64decode(text, validate=True)).leaf for text in texts]
    return {leaf.peer: leaf for leaf in leaves}
