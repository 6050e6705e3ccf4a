from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wetware.testing import FakeOverlay
from wetware_mdns import plugin
from wetware_mdns.config import MdnsConfig

from .conftest import make_discovery


def test_disabled_means_no_discovery() -> None:
    made: Any = make_discovery(FakeOverlay())
    assert made.name == "mdns"

    class Ctx:
        config = MdnsConfig(enabled=False)

    assert plugin.ww_register_discovery(Ctx()) is None  # type: ignore[arg-type]


def test_the_config_is_checked() -> None:
    assert plugin.ww_register_config() is MdnsConfig
    check: Any = next(f for f in dataclasses.fields(MdnsConfig) if f.name == "interfaces")
    with pytest.raises(ValueError, match="'eth0' is not an IP address"):
        check.metadata["check"](("eth0",))
    with pytest.raises(ValueError, match="at most 16"):
        check.metadata["check"](("10.0.0.1",) * 17)
    check.metadata["check"](("10.0.0.1", "fd00::1"))


def test_zeroconf_is_imported_only_when_it_runs() -> None:
    code = (
        "import sys, wetware_mdns.plugin, wetware_mdns.discovery, wetware_mdns.config; "
        "print('zeroconf' in sys.modules)"
    )
    path = str(Path(plugin.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.strip() == "False"
