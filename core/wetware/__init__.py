"""wetware: a decentralized cloud that a small team runs on its own machines.

    async with wetware.connect() as session:
        topic = await session.pubsub.join("chat")

The names below are loaded at their first use, so that `import wetware` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wetware.client import LoginRefused, Session, connect
    from wetware.errors import WetwareError

__version__ = "0.1.0"
__all__ = ["LoginRefused", "Session", "WetwareError", "__version__", "connect"]

_HOME = {
    "LoginRefused": "wetware.client",
    "Session": "wetware.client",
    "WetwareError": "wetware.errors",
    "connect": "wetware.client",
}


def __getattr__(name: str) -> Any:
    if (module := _HOME.get(name)) is None:
        raise AttributeError(f"module 'wetware' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(module), name)
