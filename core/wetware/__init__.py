"""wetware: a decentralized cloud that a small team runs on its own machines.

    async with wetware.connect() as session:
        topic = await session.pubsub.join("chat")

The names below are loaded at their first use, so that `import wetware` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wetware.base.version import __version__

if TYPE_CHECKING:
    from wetware.client import LoginRefused, Session, connect
    from wetware.errors import WetwareError
    from wetware.rpc import time_limit

__all__ = ["LoginRefused", "Session", "WetwareError", "__version__", "connect", "time_limit"]

_HOME = {
    "LoginRefused": "wetware.client",
    "Session": "wetware.client",
    "WetwareError": "wetware.errors",
    "connect": "wetware.client",
    "time_limit": "wetware.rpc",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})  # for help(), too


def __getattr__(name: str) -> Any:
    if (module := _HOME.get(name)) is None:
        raise AttributeError(f"module 'wetware' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(module), name)
