"""What a user's machine remembers of clusters: `contexts.json` in WW_HOME, 0600.

A context is a name for a node and what it takes to log in there. At the first login its cluster is
pinned, as ssh pins the key of a host, and so is that of a remote node that is named by its address:
a node is then believed about members of that cluster only, and a later login there to another
cluster is refused until the user accepts it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from wetware.base import paths
from wetware.errors import ConfigError, InvalidArgument, NotFound
from wetware.identity import replace_private_file

FILE: Final = "contexts.json"
VERSION: Final = 1
FILE_BYTES_MAX: Final = 1 << 20
PINS_MAX: Final = 1024
"""Nodes whose cluster is remembered; the one pinned longest ago makes room."""
CONTEXTS_MAX: Final = 256
TEXT_CHARS_MAX: Final = 2048
"""Of an address list, a selector or a path."""
CLUSTER_CHARS: Final = 40
LOCAL: Final = "local"
"""The context that is always there: this machine's node, and the default key."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", re.ASCII)  # no peer ID is so short


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
class Context:
    """A node and what it takes to log in there; "" is the default, of each.

    Attributes:
        node: Its address (several, comma-separated), or a selector that is looked up at this
            machine's node; "" is this machine's node.
        data_dir: Of this machine's node.
        key: The user's key: a name, or a file.
        cluster: The ID of the cluster, once it is pinned.
        name: "" for one that was made for a single login.
    """

    node: str = ""
    data_dir: str = ""
    key: str = ""
    cluster: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        for text in (self.node, self.data_dir, self.key):
            if type(text) is not str or len(text) > TEXT_CHARS_MAX or not text.isprintable():
                raise InvalidArgument(f"a context's text is printable, at most {TEXT_CHARS_MAX}")
        if self.cluster:
            check_cluster(self.cluster)


@dataclass(frozen=True, slots=True)
class Contexts:
    """What the file holds.

    Attributes:
        named: The user's contexts.
        current: The name of the one that is used where none is named.
        clusters: A node's peer ID → the ID of its cluster, as pinned.
    """

    named: Mapping[str, Context] = field(default_factory=dict)
    current: str = LOCAL
    clusters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.current != LOCAL and self.current not in self.named:
            raise InvalidArgument("the context that is used is not there")

    def context(self, name: str) -> Context:
        """The context of this name; raises NotFound."""
        if name == LOCAL:
            return Context()
        if (found := self.named.get(name)) is None:
            known = ", ".join((LOCAL, *sorted(self.named)))
            raise NotFound(
                f"there is no context {name[:64]!r}; there are: {known}",
                hint="`ww context add NAME` makes one",
                code="not_found.context",
            )
        return found

    def add(self, name: str, context: Context) -> Contexts:
        """With one more; raises InvalidArgument for a name that is taken, or none."""
        if not _NAME.fullmatch(name) or name == LOCAL:
            raise InvalidArgument(
                f"{name[:64]!r} cannot name a context",
                hint="up to 40 letters, digits, '.', '_' and '-'; `local` is this machine's node",
            )
        if name in self.named:
            raise InvalidArgument(
                f"there is a context {name!r} already",
                hint=f"look at it with `ww context show {name}`, or `ww context rm {name}` first",
            )
        if len(self.named) >= CONTEXTS_MAX:
            raise InvalidArgument(f"there are {CONTEXTS_MAX} contexts already (CONTEXTS_MAX)")
        return replace(self, named={**self.named, name: replace(context, name=name)})

    def remove(self, name: str) -> Contexts:
        """Without one; if it was the current one, that is `local` again. Raises NotFound."""
        if name == LOCAL:
            raise InvalidArgument("`local` is this machine's node, and always there")
        self.context(name)
        named = {key: value for key, value in self.named.items() if key != name}
        return replace(self, named=named, current=LOCAL if self.current == name else self.current)

    def use(self, name: str) -> Contexts:
        """With another current one; raises NotFound."""
        self.context(name)
        return replace(self, current=name)

    def pin(self, name: str, cluster: str) -> Contexts:
        """With the cluster that is expected from now on in a context, or at the node of a peer ID.

        Raises InvalidArgument.
        """
        check_cluster(cluster)
        if name == LOCAL:
            raise InvalidArgument("the cluster of this machine's node is in its data directory")
        if name in self.named:
            pinned = replace(self.named[name], cluster=cluster)
            return replace(self, named={**self.named, name: pinned})
        clusters = {key: value for key, value in self.clusters.items() if key != name}
        clusters[name] = cluster
        while len(clusters) > PINS_MAX:
            del clusters[next(iter(clusters))]
        return replace(self, clusters=clusters)


def choose(name: str | None = None) -> Context:
    """The context of a name, or the one that WW_CONTEXT names, or the current one."""
    known = load()
    return known.context(name or paths.variable("WW_CONTEXT") or known.current)


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
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        InvalidArgument,
    ) as exc:
        raise _unusable(file, str(exc)) from None


def _parse(value: Any) -> Contexts:
    """Raises many a thing for what is no such file."""
    if value["v"] != VERSION:
        raise ValueError("it is of another version of wetware")
    return Contexts(
        {name: Context(**fields, name=name) for name, fields in value["contexts"].items()},
        value["current"],
        {node: check_cluster(cluster) for node, cluster in value["clusters"].items()},
    )


def _plain(known: Contexts) -> dict[str, Any]:
    contexts = {name: asdict(context) for name, context in known.named.items()}
    for fields in contexts.values():
        del fields["name"]
    return {
        "v": VERSION,
        "current": known.current,
        "contexts": contexts,
        "clusters": dict(known.clusters),
    }


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
            replace_private_file(home / FILE, json.dumps(_plain(changed), indent=1).encode())
        finally:
            os.close(lock)
    except OSError as exc:
        raise _unusable(home / FILE, exc.strerror or str(exc)) from exc
    return changed
