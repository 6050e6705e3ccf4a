"""What a user's machine remembers of clusters: `contexts.json` in WW_HOME, 0600.

At the first login at a node its cluster is pinned, as ssh pins the key of a host: a node is then
believed about members of that cluster only, and a later login there to another cluster is refused
until the user accepts it.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from wetware import paths
from wetware.errors import ConfigError, InvalidArgument
from wetware.identity import replace_private_file

FILE: Final = "contexts.json"
VERSION: Final = 1
FILE_BYTES_MAX: Final = 1 << 20
PINS_MAX: Final = 1024
"""Nodes whose cluster is remembered; the one pinned longest ago makes room."""
CLUSTER_CHARS: Final = 40
_NONE: Final[Mapping[str, Any]] = MappingProxyType({})


def check_cluster(text: str) -> str:
    """A cluster's ID; raises InvalidArgument."""
    if len(text) != CLUSTER_CHARS or set(text) - set("0123456789abcdef"):
        raise InvalidArgument(
            f"{text[:CLUSTER_CHARS]!r} is not the ID of a cluster: {CLUSTER_CHARS} hex digits",
            hint="`ww whoami` at one of its nodes prints it",
            code="invalid.cluster",
        )
    return text


@dataclass(frozen=True, slots=True)
class Contexts:
    """What the file holds.

    Attributes:
        clusters: A node's peer ID → the ID of its cluster, as pinned.
    """

    clusters: Mapping[str, str] = field(default_factory=lambda: _NONE)

    def pin(self, node: str, cluster: str) -> Contexts:
        """With the cluster that is expected at a node from now on."""
        clusters = {key: value for key, value in self.clusters.items() if key != node}
        clusters[node] = check_cluster(cluster)
        while len(clusters) > PINS_MAX:
            del clusters[next(iter(clusters))]
        return replace(self, clusters=clusters)


def load() -> Contexts:
    """Read the file; nothing is known where there is none.

    Raises ConfigError for one that is damaged, or that others can write.
    """
    try:
        file = paths.home() / FILE
    except ConfigError:  # no home: then nothing of this user was ever kept
        return Contexts()
    try:
        with file.open("rb") as opened:
            status, text = os.fstat(opened.fileno()), opened.read(FILE_BYTES_MAX)
    except FileNotFoundError:
        return Contexts()
    except OSError as exc:
        raise _unusable(file, exc.strerror or str(exc)) from exc
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _unusable(file, "others can write it")
    try:
        return _parse(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError, InvalidArgument) as exc:
        raise _unusable(file, str(exc)) from None


def _parse(value: Any) -> Contexts:
    """Raises many a thing for what is no such file."""
    if value["v"] != VERSION:
        raise ValueError("it is of another version of wetware")
    clusters = value["clusters"]
    return Contexts({node: check_cluster(clusters[node]) for node in clusters})


def _unusable(file: Path, why: str) -> ConfigError:
    return ConfigError(
        f"cannot use {file}: {why}",
        hint="mend it, or move it away: then the next login at a node pins its cluster anew",
        code="config.contexts",
    )


def update(change: Callable[[Contexts], Contexts]) -> Contexts:
    """Read, change and write the file, one process at a time; returns what it holds now.

    Raises ConfigError where it cannot be read or written, and what `change` raises.
    """
    home = paths.home()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            changed = change(load())
            value = {"v": VERSION, "clusters": dict(changed.clusters)}
            replace_private_file(home / FILE, json.dumps(value, indent=1).encode())
        finally:
            os.close(lock)
    except OSError as exc:
        raise _unusable(home / FILE, exc.strerror or str(exc)) from exc
    return changed
