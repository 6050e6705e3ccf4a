"""The commands beside a real node: `ww node --auth evm --dev`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plugins.auth_evm.tests.contract.chains import INSTALL, find_anvil

from wetware.testing import Home, wait_for


def test_status_dev_and_profile_beside_a_node(tmp_path: Path) -> None:
    anvil = find_anvil()
    if anvil is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    with (
        Home(tmp_path, {"WW_ANVIL": str(anvil)}) as home,
        home.node(args=["--auth", "evm", "--dev"]) as node,
    ):
        before = json.loads(node.ww("auth", "evm", "status", "--json", check=True).stdout)
        assert "no session in the cluster" in before["node"]["error"]
        assert "auth evm login" in before["node"]["hint"]

        # The cluster is that of the node; nothing has to be named.
        node.ww("auth", "evm", "login", check=True)
        cluster = node.info["cluster"]
        assert json.loads(node.ww("whoami", "--json", check=True).stdout)["cluster"] == cluster

        granted = node.ww("auth", "evm", "grant", "member", "0x" + "12" * 20, "--json")
        seq = json.loads(granted.stdout)["events"][0]["seq"]

        def replica() -> bool:
            status = json.loads(node.ww("auth", "evm", "status", "--json", check=True).stdout)
            assert status["problems"] == []
            return bool(status["node"]["seq"] == status["state"]["seq"] == seq)

        wait_for(replica, "the node's replica to have the grant")
        assert "the node here is at event" in node.ww("auth", "evm", "status").stdout

        there = node.ww("auth", "evm", "dev", check=True)
        assert "runs already" in there.stderr
        profile = json.loads(node.ww("auth", "evm", "export-profile", check=True).stdout)
        assert profile["endpoints"] == [there.stdout.strip()]
        assert profile["cluster"] == cluster
        assert node.addr in profile["nodes"]

        node.ww("auth", "evm", "grant", "node", own(node), check=True)
        bound = node.ww("auth", "evm", "bind-key", "node", "--node", check=True)
        assert f"bound {node.peer_id} to node of {own(node)}" in bound.stdout


def own(node) -> str:  # type: ignore[no-untyped-def]
    return str(node.ww("auth", "evm", "address", check=True).stdout.strip())
