"""What `ww doctor` says of a node's blobs."""

from __future__ import annotations

from wetware_blob.findings import findings
from wetware_blob.store.store import Usage

GIB = 1 << 30


def test_findings() -> None:
    assert not list(findings([], 0, 0, Usage(GIB, 10 * GIB), GIB))
    found = {f.check: f for f in findings(["bafy"], 2, 1, Usage(96 * GIB, 100 * GIB), GIB)}
    assert "bafy" in found["blob.copies"].text
    assert "2 blocks and 1 pin" in found["blob.damage"].text
    assert "96.0 GiB of 100.0 GiB" in found["blob.disk"].text
    assert [f.check for f in findings([], 0, 0, Usage(0, GIB), 1 << 20)] == ["blob.disk"]
