"""Whatever a disk does, nothing acknowledged is lost, and nothing wrong is served.

`WW_SEEDS=10000 pytest -n4 plugins/blob/tests/store/test_crashes.py` for more; `WW_SEED=N` for one.
"""

from __future__ import annotations

import os

import pytest

from .disk import SITES
from .histories import History, Lost

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1200)]

PARTS = 4
SEEDS = int(os.environ.get("WW_SEEDS", "1000"))


@pytest.mark.parametrize("part", range(PARTS))
async def test_nothing_acknowledged_is_lost(part: int) -> None:
    one = os.environ.get("WW_SEED")
    for seed in [int(one)] if one else range(part, SEEDS, PARTS):
        assert not await loses(seed), f"WW_SEED={seed}"


@pytest.mark.parametrize("site", SITES)
async def test_no_fsync_can_be_left_out(site: str) -> None:
    """Without it the same histories lose something."""
    for seed in range(SEEDS):
        if await loses(seed, site):
            return
    pytest.fail(f"nothing was lost in {SEEDS} histories without the fsync of {site}")


async def loses(seed: int, dropped: str = "") -> str:
    """What a history loses; "" if nothing."""
    lost = ""
    try:
        await History(seed, dropped).run()
    except* Lost as group:
        lost = str(group.exceptions)
    return lost
