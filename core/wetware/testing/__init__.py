"""What tests of wetware and of its plugins are made of.

`ServiceConformance`, `AuthConformance` and `RecorderConformance` are suites that a plugin runs;
`Home` runs real nodes; `FakeOverlay`, `FakeClock` and `plugin_context` are what surrounds a plugin,
in one process.
"""

from __future__ import annotations

from wetware.base.launch import end_with_parent
from wetware.testing.clock import FakeClock
from wetware.testing.conformance import (
    AuthConformance,
    RecorderConformance,
    ServiceConformance,
    plugin_context,
)
from wetware.testing.nodes import (
    COMMAND_S_MAX,
    START_S_MAX,
    STOP_S_MAX,
    Home,
    NodeProcess,
    tasks_of_core,
    wait_for,
)
from wetware.testing.overlay import FakeOverlay, overlays
from wetware.testing.started import Started
from wetware.testing.watched import run_watched

__all__ = [
    "COMMAND_S_MAX",
    "START_S_MAX",
    "STOP_S_MAX",
    "AuthConformance",
    "FakeClock",
    "FakeOverlay",
    "Home",
    "NodeProcess",
    "RecorderConformance",
    "ServiceConformance",
    "Started",
    "end_with_parent",
    "overlays",
    "plugin_context",
    "run_watched",
    "tasks_of_core",
    "wait_for",
]
