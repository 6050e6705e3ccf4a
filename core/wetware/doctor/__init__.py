"""What `ww doctor` finds: this machine (`check_machine`, without a node) and a node (`check_node`).

A check gives findings and never raises: what it cannot judge is a finding too, or nothing where
nothing can be known. Whatever is not fine says what to do next. Each check has its own time limit,
and the functions that judge take plain values, so that they are tested without a broken machine.

Heavy modules are imported inside the checks: a missing library is a finding, not a traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wetware.doctor.finding import Finding, error, level, ok, remedy_of, warning

if TYPE_CHECKING:
    from wetware.doctor.machine import Machine, check_machine
    from wetware.doctor.node import check_node

__all__ = [
    "Finding",
    "Machine",
    "check_machine",
    "check_node",
    "error",
    "level",
    "ok",
    "remedy_of",
    "warning",
]

_HOME = {"Machine": "machine", "check_machine": "machine", "check_node": "node"}


def __getattr__(name: str) -> Any:
    """The checks, at their first use: clients need `Finding` alone, and every `ww` pays for it."""
    if (module := _HOME.get(name)) is None:
        raise AttributeError(f"module 'wetware.doctor' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"wetware.doctor.{module}"), name)
