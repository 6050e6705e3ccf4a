"""What `ww doctor` says of a node's blobs."""

from __future__ import annotations

from wetware_blob.findings import findings
from wetware_blob.format.cid import RAW, Cid
from wetware_blob.replicas.duties import Copy
from wetware_blob.replicas.keeper import Seen

GIB = 1 << 30


def test_findings() -> None:
    copy = Copy(Cid(1, RAW, bytes(32)), "me", bytes(16), 3)
    assert not list(findings(Seen([], 0, 0, GIB, 10 * GIB, GIB)))
    found = {f.check: f for f in findings(Seen([copy], 2, 1, 96 * GIB, 100 * GIB, GIB))}
    assert str(copy.root) in found["blob.copies"].text
    assert "2 blocks and 1 pin" in found["blob.damage"].text
    assert "96.0 GiB of 100.0 GiB" in found["blob.disk"].text
    assert [f.check for f in findings(Seen([], 0, 0, 0, GIB, 1 << 20))] == ["blob.disk"]
