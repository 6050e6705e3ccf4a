"""One object of a third party's service, whose calls each name the object that they are about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import wetware
from wetware import rpc
from wetware.errors import EXIT_USAGE, Denied
from wetware.testing import Home, NodeProcess

from ..packaging import third_party

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[NodeProcess, rpc.Interface]]:
    """A node with the service `counter`, and its interface."""
    site = tmp_path / "site"
    site.mkdir()
    files = (("counter.capnp", third_party.COUNTER_SCHEMA),)
    package = third_party.install(site, "counter", third_party.COUNTER, files=files)
    counters = rpc.load(site / package / "counter.capnp").Counters
    with Home(tmp_path / "home", env={"PYTHONPATH": str(site)}) as home, home.node() as node:
        yield node, counters


async def test_a_share_of_one_counter_is_held_to_it(
    served: tuple[NodeProcess, rpc.Interface],
) -> None:
    node, interface = served
    read = node.ww("share", "counter:a", "--methods", "Counters.get", check=True)
    whole = node.ww("share", "counter:a", check=True)
    assert "Counters.incr" not in read.stderr, "no method is added that was not asked for"
    async with wetware.connect(read.stdout.strip()) as session:
        counters = await session.open("counter", interface)
        assert await counters.get(name="a") == {"value": 0}
        for beyond in (counters.get(name="b"), counters.incr(name="a", by=1), counters.total()):
            with pytest.raises(Denied):
                await beyond
    async with wetware.connect(whole.stdout.strip()) as session:
        counters = await session.open("counter", interface)
        assert await counters.incr(name="a", by=2) == {"value": 2}
        assert await counters.get(name="a") == {"value": 2}
        for beyond in (counters.get(name="b"), counters.incr(name="b", by=1), counters.total()):
            with pytest.raises(Denied):
                await beyond
    refused = node.ww("share", "counter:a", "--methods", "Counters.total")
    assert refused.returncode == EXIT_USAGE
    assert "'Counters.total' is not about one object NAME of counter" in refused.stderr
