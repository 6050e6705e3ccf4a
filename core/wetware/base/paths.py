"""Where things are on this machine. Everything of a user is under WW_HOME, by default ~/.wetware.

`keys/NAME` are the user's keys, `ww.toml` the configuration, `node/` the node's data directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from wetware.errors import ConfigError, InvalidArgument

RUNTIME_FILE = "node.json"
"""In the data directory: where the running node's socket is, and its peer ID."""


def absolute(path: str | Path, what: str) -> Path:
    """The path with `~` resolved; not created. ConfigError names `what` it is."""
    try:
        return Path(os.path.abspath(Path(path).expanduser()))
    except RuntimeError as exc:  # an unknown user, or no home at all
        raise ConfigError(f"{what}: {path}: {exc}", code="config.value") from None


def variable(name: str, env: Mapping[str, str] | None = None) -> str | None:
    """A variable's value; None where it is not set. `env` stands in for the environment.

    Raises InvalidArgument for an empty one: a shell leaves that where another variable was unset,
    and whoever set it did not mean the default.
    """
    value = (os.environ if env is None else env).get(name)
    if value is not None and not value.strip():
        raise InvalidArgument(
            f"{name} is set, and empty",
            hint=f"unset {name}, or give it a value",
            code="invalid.empty",
        )
    return value


def home(env: Mapping[str, str] | None = None) -> Path:
    """WW_HOME, or ~/.wetware; absolute, not created. `env` stands in for the environment.

    Raises ConfigError where the user has no home directory, as in a container.
    """
    if (named := variable("WW_HOME", env)) is not None:
        return absolute(named, "WW_HOME")
    if (found := _user_home()) is None:
        raise ConfigError(
            "you have no home directory: HOME does not name one, nor does a passwd entry",
            hint="set WW_HOME to a directory for your keys and ww.toml; a node's --data-dir does, "
            "too",
            code="config.home",
        )
    return found / ".wetware"


def _user_home() -> Path | None:
    found = "" if os.environ.get("HOME") == "" else os.path.expanduser("~")
    return Path(found) if os.path.isabs(found) else None


def settle(data_dir: str | None) -> None:
    """Give a process without a home directory one: the node's data directory, where it is named."""
    data_dir = data_dir or variable("WW_NODE_DATA_DIR")
    if data_dir and variable("WW_HOME") is None and _user_home() is None:
        os.environ["WW_HOME"] = str(absolute(data_dir, "the data directory"))


def keys_dir() -> Path:
    return home() / "keys"


def data_dir() -> Path:
    """The default node's data directory: WW_NODE_DATA_DIR, or `node` in the home."""
    return absolute(variable("WW_NODE_DATA_DIR") or home() / "node", "WW_NODE_DATA_DIR")
