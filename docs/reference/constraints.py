"""Prints the list in constraints.md: python docs/reference/constraints.py."""

from __future__ import annotations

import sys
from typing import Final

from wetware.broker.naming import constrainable
from wetware.broker.where import kinds_for
from wetware.client.installed import known_interface

BUNDLED: Final = (
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
)
"""Services that come with the distribution and are on every node."""


def reference() -> str:
    """What can be constrained of the bundled services, as Markdown."""
    lines = ["| service | method | parameter | type | kinds |", "|---|---|---|---|---|"]
    for service in BUNDLED:
        interface = known_interface(service)
        items = [] if interface is None else constrainable(interface)
        if not items:
            lines.append(f"| `{service}` | – | | | |")
        naming = interface and interface.naming
        for method, param in items:
            shared = f" (`{service}:{param.upper()}` in `ww share`)" if param == naming else ""
            kind = method.param_kinds[param]
            kinds = " ".join(f"`{kind}`" for kind in kinds_for(kind))
            lines.append(
                f"| `{service}` | `{method.where}` | `{param}`{shared} | {kind} | {kinds} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
