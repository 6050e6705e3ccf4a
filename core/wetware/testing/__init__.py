"""What tests of wetware and of its plugins are made of.

`Home` runs real nodes; `FakeOverlay` and `FakeClock` are a plugin's surroundings in one process.
"""

from __future__ import annotations

from wetware.testing.clock import FakeClock
from wetware.testing.nodes import (
    COMMAND_S_MAX,
    START_S_MAX,
    STOP_S_MAX,
    Home,
    NodeProcess,
    end_with_parent,
    tasks_of_core,
    wait_for,
)
from wetware.testing.overlay import FakeOverlay, overlays
from wetware.testing.started import Started

__all__ = [
    "COMMAND_S_MAX",
    "START_S_MAX",
    "STOP_S_MAX",
    "FakeClock",
    "FakeOverlay",
    "Home",
    "NodeProcess",
    "Started",
    "end_with_parent",
    "overlays",
    "tasks_of_core",
    "wait_for",
]
