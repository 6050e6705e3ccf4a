"""What a laptop behind a NAT gives away works for a machine that has never seen the cluster."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wetware.testing import Home, NodeProcess

from .cluster import LISTEN, Cluster
from .probe import prove

pytestmark = pytest.mark.timeout(180)

WITHIN_S = 5.0


@pytest.fixture
def laptop(cluster: Cluster) -> NodeProcess:
    """Its node; beside it there is a hub, and a fresh machine behind another NAT."""
    cluster.lab.host("hub")
    cluster.start("hub")
    for name, kind in (("laptop", "port-restricted"), ("fresh", "symmetric")):
        cluster.lab.host(name, cluster.lab.network(kind))
        prove(cluster.lab, name)
    node = cluster.start("laptop", ticket=cluster.nodes["hub"].invite("--inviter"))
    node.wait_log("relay.reserved")
    return node


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "stranger") as home:
        yield home


def test_a_reference_made_behind_a_nat_is_used_behind_another_one(
    cluster: Cluster,
    laptop: NodeProcess,
    stranger: Home,
    record_property: Callable[[str, object], None],
) -> None:
    ref = laptop.ww("share", "pubsub:chat", check=True).stdout.strip()
    listening = laptop.start_ww("sub", "chat", "--count", "1")
    began = time.monotonic()
    try:
        with cluster.lab.inside("fresh"):
            stranger.ww("use", ref, check=True)
            record_property("the first use took, s", time.monotonic() - began)
            stranger.ww("use", ref, "pub", "chat", "hello", check=True)
        assert listening.communicate(timeout=WITHIN_S)[0].strip() == "hello"
    finally:
        listening.kill()


def test_a_ticket_made_behind_a_nat_is_redeemed_behind_another_one(
    cluster: Cluster,
    laptop: NodeProcess,
    stranger: Home,
    record_property: Callable[[str, object], None],
) -> None:
    ticket = laptop.invite()
    # Whose cluster it is looks at the node from there, too.
    shutil.copytree(laptop.home.path / ".wetware", stranger.path / ".wetware")
    for again in (False, True):
        with cluster.lab.inside("fresh"):
            node = stranger.start_node("fresh", listen=LISTEN, join=None if again else ticket)
        node.wait_ready()
        began = time.monotonic()
        others = {str(other.peer_id) for other in cluster.nodes.values()}
        while others != (
            connected := {peer for peer, m in node.members().items() if m["connected"]}
        ):
            assert time.monotonic() - began < 2 * WITHIN_S, connected
        took_s = time.monotonic() - began
        record_property(f"connected to all, again={again}, s", took_s)
        assert took_s < WITHIN_S
        for other in cluster.nodes.values():
            other.wait_members([node.peer_id])
        with cluster.lab.inside("fresh"):
            node.ww("ping", "laptop", "-c", "1", check=True)
        node.stop()
