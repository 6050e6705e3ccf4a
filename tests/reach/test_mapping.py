"""A node behind a router that maps ports is dialled from outside, at a port that it proved."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from wetware.testing import end_with_parent, wait_for

from .cluster import Cluster
from .lab import Network, _inside, _run

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        shutil.which("miniupnpd") is None,
        reason="no command `miniupnpd` (Debian: apt install miniupnpd-nftables)",
    ),
]

DAEMON = """ext_ifname=wan
listening_ip=lan
enable_natpmp={natpmp}
enable_upnp={upnp}
secure_mode=yes
min_lifetime=10
lease_file={path}/leases
uuid=00000000-0000-0000-0000-000000000001
upnp_table_name=lab2
upnp_nat_table_name=lab2
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
allow 1024-65535 10.0.0.0/8 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
CHAINS = """
table inet lab2 {
  chain forward { type filter hook forward priority 0; policy accept; jump miniupnpd; }
  chain miniupnpd { }
  chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
  chain prerouting_miniupnpd { }
  chain postrouting { type nat hook postrouting priority 100; jump postrouting_miniupnpd; }
  chain postrouting_miniupnpd { }
}
"""


def _mapped(network: Network) -> str:
    with _inside(network.switch):
        command = ["nft", "list", "chain", "inet", "lab2", "prerouting_miniupnpd"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=["natpmp", "upnp"])
def router(
    cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Network, subprocess.Popen[bytes]]]:
    network = cluster.lab.network("port-restricted")
    kinds = {kind: "yes" if kind == request.param else "no" for kind in ("natpmp", "upnp")}
    (tmp_path / "conf").write_text(DAEMON.format(path=tmp_path, **kinds))
    (tmp_path / "leases").touch()
    command = ["miniupnpd", "-d", "-f", str(tmp_path / "conf"), "-P", str(tmp_path / "pid")]
    with _inside(network.switch), (tmp_path / "log").open("wb") as log:
        _run(["nft", "-f", "-"], CHAINS)
        daemon = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=end_with_parent)
    try:
        yield network, daemon
    finally:
        daemon.kill()
        daemon.wait()


def test_a_node_behind_a_router_that_maps_ports_is_dialled_from_outside(
    cluster: Cluster, router: tuple[Network, subprocess.Popen[bytes]]
) -> None:
    network, _ = router
    lab = cluster.lab
    lab.host("hub")
    lab.host("home", network)
    lab.host("cafe", lab.network("symmetric"))
    cluster.start("hub")
    home = cluster.start("home", join="hub")

    def status() -> str:
        return cluster.ww("home", "status", check=True).stdout

    addr = f"/ip4/{network.address}/tcp/4001"
    wait_for(lambda: f"reached directly at {addr}" in status(), "a proved port", within_s=60)
    assert "dnat" in _mapped(network)
    wait_for(
        lambda: addr in cluster.ww("hub", "ls", "--json", check=True).stdout,
        "the port in the record",
        within_s=10,
    )
    cluster.start("cafe", join="hub")
    cluster.nodes["cafe"].wait_members([home.peer_id])

    def paths() -> list[tuple[str, str]]:
        found = json.loads(cluster.ww("cafe", "status", "--json", check=True).stdout)["peers"]
        return [(p["via"], p["addr"]) for p in found if p["peer_id"] == str(home.peer_id)]

    # Between a symmetric NAT and a port-restricted one nothing can be punched.
    wait_for(
        lambda: any(not via and where.startswith(addr) for via, where in paths()),
        "a direct connection",
        within_s=30,
    )
    home.stop()
    wait_for(lambda: "dnat" not in _mapped(network), "the end of the mapping", within_s=5)
