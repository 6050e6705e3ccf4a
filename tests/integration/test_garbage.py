"""What the garbage collector of a node walks, and that it frees what is made and lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wetware.testing import Home, wait_for

from ..packaging import third_party

pytestmark = pytest.mark.timeout(180)
SPY = """
import asyncio, gc
from wetware.hookspecs import hookimpl

class Spy:
    def __init__(self, ctx):
        self.name, self._log = "spy", ctx.log

    async def advertise(self, addrs):
        while True:
            await asyncio.sleep(0.1)
            self._log.info("garbage", walked=len(gc.get_objects()))

    async def find_peers(self):
        await asyncio.Event().wait()
        yield

@hookimpl
def ww_register_discovery(ctx):
    return Spy(ctx)
"""
WALKED_MAX = 40_000
"""Objects: with libp2p and what a node is made of there are 120,000 more."""


def test_what_was_imported_is_not_walked(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    third_party.install(site, "spy", SPY)
    with (
        Home(tmp_path / "home", env={"PYTHONPATH": str(site)}, libp2p=True) as home,
        home.node() as node,
    ):
        node.wait_log("overlay.up", within_s=90)

        def walked() -> list[str]:
            after = node.log.read_text().partition("overlay.up")[2]
            return re.findall(r"walked=(\d+)", after)

        seen = wait_for(walked, "a look at the collector")
        assert int(seen[0]) < WALKED_MAX
