"""Who may speak what."""

from __future__ import annotations

import pytest

from wetware.access import Access
from wetware.admission import Admission
from wetware.identity import Key

MEMBER, STRANGER = Key.from_seed(b"m" * 32).peer_id, Key.from_seed(b"s" * 32).peer_id


@pytest.mark.parametrize(
    ("peer", "protocol", "access", "expected"),
    [
        (STRANGER, "/x/1", Access.PUBLIC, True),
        (MEMBER, "/x/1", Access.PUBLIC, True),
        (MEMBER, "/x/1", Access.MEMBER, True),
        (STRANGER, "/x/1", Access.MEMBER, False),
        (MEMBER, "/x/1", Access.OPEN, False),
        (STRANGER, "/open/1", Access.OPEN, True),
    ],
)
def test_the_whole_table(peer: str, protocol: str, access: Access, expected: bool) -> None:
    admission = Admission([MEMBER], ["/open/1"])
    assert admission(peer, protocol, access) is expected  # type: ignore[arg-type]


def test_default_admits_no_member() -> None:
    assert not Admission().is_member(MEMBER)


def test_refusals_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    admission = Admission()
    for _ in range(100):  # a peer that keeps asking does not fill the log
        assert not admission(STRANGER, "/x/1", Access.MEMBER)
    admission(STRANGER, "/y/1", Access.MEMBER)
    assert [r.getMessage() for r in caplog.records] == ["protocol.refused"] * 2
