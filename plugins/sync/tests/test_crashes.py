"""Whatever a disk does, nothing acknowledged is lost, and nobody sees what might not stay.

`WW_SEEDS=10000 pytest -n4 -m "" plugins/sync/tests/test_crashes.py` for more; `WW_SEED=N` for one.
"""

from __future__ import annotations

import os

import pytest
from tests.failing_disk import SITES

from wetware_sync.embedded import store as module

from . import copies
from .copies import Copies, Unclosed
from .histories import History, Lost

PARTS = 4
PART = pytest.mark.parametrize(
    "part", [pytest.param(n, marks=pytest.mark.long if n else ()) for n in range(PARTS)]
)
"""A quarter of the seeds, and the others with the long tests."""
SEEDS = int(os.environ.get("WW_SEEDS", "1000"))


@pytest.fixture(autouse=True)
def _everything_happens_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAL_PAGES", 8)
    monkeypatch.setattr(module, "HISTORY_ROWS_MAX", 12)
    monkeypatch.setattr(module, "SWEPT_ROWS", 20)
    monkeypatch.setattr(module, "SCANNED_ROWS", 16)


def loses(seed: int, dropped: str = "", kind: type[History] = History) -> str:
    """What a history loses; "" if nothing."""
    try:
        kind(seed, dropped).run()
    except Lost as lost:
        return str(lost)
    return ""


@PART
def test_nothing_acknowledged_is_lost(part: int) -> None:
    one = os.environ.get("WW_SEED")
    for seed in [int(one)] if one else range(part, SEEDS, PARTS):
        assert not loses(seed), f"WW_SEED={seed}"


@pytest.mark.parametrize("site", [*SITES, "synchronous"])
def test_no_fsync_can_be_left_out(site: str) -> None:
    """Without it the same histories lose something."""
    assert any(loses(seed, site) for seed in range(SEEDS))


@PART
def test_a_copy_is_whole_and_a_store_is_the_old_one_or_the_copy(part: int) -> None:
    one = os.environ.get("WW_SEED")
    for seed in [int(one)] if one else range(part, SEEDS, PARTS):
        assert not loses(seed, kind=Copies), f"WW_SEED={seed}"


@pytest.mark.parametrize("site", [*copies.SITES, "synchronous"])
def test_no_fsync_of_a_copy_can_be_left_out(site: str) -> None:
    assert any(loses(seed, site, Copies) for seed in range(SEEDS))


def test_the_log_of_a_store_that_could_not_be_closed_is_none_of_the_next_one() -> None:
    assert not any(loses(seed, kind=Unclosed) for seed in range(100))
    assert any(loses(seed, copies.OF_UNCLOSED, Unclosed) for seed in range(100))


def test_these_are_all_fsyncs_of_copies() -> None:
    found = set[str]()
    for seed in range(20):
        history = Copies(seed)
        history.run()
        found |= history.sites
    assert found == {*copies.SITES, copies.OF_UNCLOSED} - {copies.RESTORED_DATABASE}
