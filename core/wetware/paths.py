"""Where things are on this machine. Everything of a user is under WW_HOME, by default ~/.wetware.

`keys/NAME` are the user's keys, `ww.toml` the configuration, `node/` the node's data directory.
"""

from __future__ import annotations

import os
from pathlib import Path

RUNTIME_FILE = "node.json"
"""In the data directory: where the running node's socket is, and its peer ID."""


def home() -> Path:
    """WW_HOME, or ~/.wetware."""
    return Path(os.environ.get("WW_HOME") or Path.home() / ".wetware").expanduser()


def keys_dir() -> Path:
    """The user's keys."""
    return home() / "keys"


def data_dir() -> Path:
    """The default node's data directory: WW_NODE_DATA_DIR, or `node` in the home."""
    return Path(os.environ.get("WW_NODE_DATA_DIR") or home() / "node").expanduser()
