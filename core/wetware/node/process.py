"""What a node takes of its process: files, memory, modes."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.base.finding import Finding, error, ok, warning
from wetware.base.log import get_logger

if TYPE_CHECKING:
    from wetware.overlay.link import LinkLimits

log = get_logger("node")

RECURSION_MAX = 1000
"""As Python begins with; plugins are imported by the time that it is set back to this."""
FILES_KEPT = 16
"""Files and sockets that a node opens once its link is up: databases, listeners, libp2p's."""
FILES_RESERVE = 256
"""Open files of a node beside its connections: libraries, databases, sockets of clients."""
FILES_USED_SHARE_MAX = 0.8
CLIENTS_MIN = 4
"""Programs of this machine at a time, however few files a process may open."""


def within_files(link: LinkLimits) -> tuple[int, LinkLimits]:
    """How many clients and connections there may be, by the open files that are left.

    So that peers cannot take the descriptors that the owner's client needs, or the node's files.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return rpc.CONNECTIONS_MAX, link
    left = limit - len(os.listdir("/proc/self/fd"))
    clients = max(CLIENTS_MIN, min(rpc.CONNECTIONS_MAX, left // 4))
    within = link.within(left - clients - rpc.REFUSALS_MAX - FILES_KEPT)
    if within != link:
        log.warning(
            "files.few",
            limit=limit,
            connections_max=within.connections_max,
            clients_max=clients,
            hint="raise it, with `ulimit -n` or LimitNOFILE= in a unit of systemd",
        )
    return clients, within


def bound_recursion() -> None:
    """Set the limit of recursion back, where a plugin's import has raised it.

    The parser of JSON goes as deep as that on the C stack: brackets of a peer's would end the node.
    """
    if sys.getrecursionlimit() > RECURSION_MAX:
        log.info("recursion.bounded", was=sys.getrecursionlimit(), now=RECURSION_MAX)
        sys.setrecursionlimit(RECURSION_MAX)


def rss_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """Files and sockets of a node are its owner's alone, whatever the shell's umask."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def judge_files(limit: int | None, connections: int, used: int = 0) -> list[Finding]:
    """The limit of open files (None: there is none) against what a node may need."""
    name, need = "open files", connections + FILES_RESERVE
    if limit is None:
        return [ok(name, "no limit")]
    remedy = (
        f"`ulimit -n {need}` before `ww node` (LimitNOFILE={need} in a unit of systemd), or a "
        "lower [link] connections_max"
    )
    if used > limit * FILES_USED_SHARE_MAX:
        return [error(name, f"{used} of at most {limit} are in use", remedy)]
    if limit < need:
        return [
            warning(name, f"at most {limit}; with all its connections a node needs {need}", remedy)
        ]
    return [ok(name, f"at most {limit}" + (f", {used} in use" if used else ""))]
