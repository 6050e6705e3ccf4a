"""Where things are on this machine. Everything of a user is under WW_HOME, by default ~/.wetware.

`keys/NAME` are the user's keys, `ww.toml` the configuration, `node/` the node's data directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from wetware.errors import ConfigError

RUNTIME_FILE = "node.json"
"""In the data directory: where the running node's socket is, and its peer ID."""


def absolute(path: str | Path, what: str) -> Path:
    """The path with `~` resolved; not created. ConfigError names `what` it is."""
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError as exc:  # an unknown user, or no home at all
        raise ConfigError(f"{what}: {path}: {exc}", code="config.value") from None


def home(env: Mapping[str, str] | None = None) -> Path:
    """WW_HOME, or ~/.wetware; absolute, not created. `env` stands in for the environment."""
    env = os.environ if env is None else env
    return absolute(env.get("WW_HOME") or "~/.wetware", "WW_HOME")


def keys_dir() -> Path:
    """The user's keys."""
    return home() / "keys"


def data_dir() -> Path:
    """The default node's data directory: WW_NODE_DATA_DIR, or `node` in the home."""
    return absolute(os.environ.get("WW_NODE_DATA_DIR") or home() / "node", "WW_NODE_DATA_DIR")
