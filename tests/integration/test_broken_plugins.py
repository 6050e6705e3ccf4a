"""Every way in which a third party's plugin can be broken, all at once beside a real node."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from wetware.testing import Home


def _third_party() -> ModuleType:
    path = Path(__file__).parents[1] / "packaging" / "third_party.py"
    spec = importlib.util.spec_from_file_location("third_party", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_broken_plugins_leave_the_node_working_and_are_listed(tmp_path: Path) -> None:
    third_party = _third_party()
    site = tmp_path / "site"
    site.mkdir()
    # Plugins that hang on import slow every command down by their limit; one that hangs in
    # register does so at the node's start and in `ww plugin list` only, and stands for all here.
    names = [name for name in third_party.BROKEN if name not in ("hangs", "spins")]
    third_party.install_broken(site, *names)
    with Home(tmp_path / "home", env={"PYTHONPATH": str(site)}) as home, home.node() as node:
        done = node.ww("pub", "chat", "still here", check=True)
        assert "Traceback" not in done.stderr
        status = json.loads(node.ww("status", "--json", check=True).stdout)
        working = [
            "audit",
            "auth_local",
            "blob",
            "cluster",
            "grants",
            "kv",
            "names",
            "node",
            "proc",
            "pubsub",
            "sync",
        ]
        assert status["services"] == working
        listed = json.loads(node.ww("plugin", "list", "--json", check=True, timeout=110).stdout)
        by_name = {(p["name"], p["dist"]): p for p in listed}
        for name in names:
            broken = third_party.BROKEN[name]
            found = by_name[broken.plugin or name, "ww-" + name.replace("_", "-")]
            assert found["state"] == broken.state, found
            assert broken.reason in found["reason"], found
            assert broken.remedy in found["remedy"], found
        for name in ("pubsub", "auth_local"):
            assert by_name[name, "wetware"]["state"] == "loaded"
        text = node.ww("plugin", "list", check=True, timeout=110).stdout
        assert "boom" in text
        said = node.log.read_text()
        assert "plugin.failed" in said
        assert "plugin=raises" in said
        assert node.process.poll() is None
