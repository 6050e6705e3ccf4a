"""How a node stops being a member, for good: it stops, and what made it a member is removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.base.disk import RESERVED_FILE
from wetware.errors import Busy, ConfigError, Unsupported
from wetware.loader.report import State
from wetware.node.belonging import FURTHER_FILE, further_of
from wetware.node.data_dir import holder_pid, locked
from wetware.overlay.admission.files import (
    CERTIFICATE_FILE,
    CLUSTER_FILE,
    CLUSTER_KEY_FILE,
    DOCUMENT_FILE,
    FOREIGN_FILE,
    LEDGER_FILE,
    TICKETS_FILE,
    TOMBSTONES_FILE,
    Files,
)
from wetware.overlay.admission.ledger import Ledger
from wetware.overlay.admission.statements import CHAIN_BYTES_MAX, INVITE, Chain, refusal
from wetware.overlay.membership.peers import INCARNATION_FILE, PEERS_FILE

if TYPE_CHECKING:
    from collections.abc import Callable

    from wetware.node.parts import Parts
    from wetware.overlay.admission.statements import Founding

STOP_S_MAX: Final = 10.0
"""From the signal until the node has let its data directory go; it gives itself two seconds."""
LEFT_FILE: Final = "left"
"""Says that the node has left: its service does not start it again, or it would found a cluster."""
_OF_THE_CLUSTER: Final = (
    *(CERTIFICATE_FILE, CLUSTER_KEY_FILE, DOCUMENT_FILE, TICKETS_FILE, LEDGER_FILE),
    *(TOMBSTONES_FILE, FOREIGN_FILE, RESERVED_FILE, PEERS_FILE, "broker"),
)
_OF_THE_NODE: Final = ("plugins", "node.key", INCARNATION_FILE)
"""Gone together: members remember the log of audit by the key, and would call a new one forged."""


async def hand_over(node: Parts, tell: Callable[[str, str], object]) -> None:
    """Have each service of a running node give other members what this node alone has.

    `tell` takes a service's name, and its words on how far it is. Raises what a service raises, and
    Unsupported where one is not running: nobody knows then what it alone has.
    """
    failed = {plugin.name for plugin in node.plugins.report if plugin.state is State.FAILED}
    if lost := sorted(failed | node.proposals.keys() - node.services.keys()):
        raise Unsupported(
            f"not running at this node, so that it can hand nothing over: {', '.join(lost)}",
            hint="ww plugin list, on that machine",
            code="unsupported.service",
        )
    for name, service in sorted(node.services.items()):
        await service.hand_over(partial(tell, name))


def refuse_orphans(data_dir: Path, founding: Founding) -> None:
    """Raise AdmissionRefused where the other members could let nobody in without this node.

    As far as the certificates say that it has seen; a copy of the cluster's key is not known of.
    """
    files, now_ms = Files(data_dir), time.time() * 1000
    others = [leaf for leaf in Ledger(files).values() if leaf.not_after_ms > now_ms]
    encoded = files.read(CERTIFICATE_FILE, CHAIN_BYTES_MAX)
    if not others or encoded is None or INVITE not in Chain.open(encoded, founding).rights:
        return
    if (key := data_dir / CLUSTER_KEY_FILE).exists():
        why, next_step = "this node has the cluster's key", f"keep a copy of {key}"
    elif any(INVITE in leaf.rights for leaf in others):
        return
    else:
        why = "no other node is known that may invite"
        next_step = "make another inviter where the cluster was founded: `ww invite --inviter`"
    raise refusal(
        "last_inviter",
        f"{why}: without it the {len(others)} others cannot renew their certificates",
        f"{next_step}; to leave all the same: ww leave --yes",
    )


def leave(data_dir: Path, founding: Founding, *, purge: bool) -> None:
    """Stop the node that runs in a data directory, which says farewell, and end its membership.

    Its key and what its services keep stay, unless `purge`; what of that is the cluster's (users,
    roles, grants) goes. After an interruption it can be repeated. Raises Busy, ConfigError.
    """
    until_s: float | None = None
    while True:
        try:
            with locked(data_dir):
                return _give_up(data_dir, founding.backend, purge)
        except Busy:
            if until_s is None:
                until_s = time.monotonic() + STOP_S_MAX
                if (pid := holder_pid(data_dir)) is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            elif time.monotonic() > until_s:
                raise
            time.sleep(0.05)


def _give_up(data_dir: Path, backend: str, purge: bool) -> None:
    backends = (f"auth_{backend}", backend, *further_of(data_dir))
    of_the_backends = (*(f"plugins/{name}" for name in backends), FURTHER_FILE)
    of_the_node = _OF_THE_NODE if purge else ()
    names = (*_OF_THE_CLUSTER, *of_the_backends, *of_the_node, CLUSTER_FILE)
    path = data_dir / LEFT_FILE
    try:
        path.touch()
        for name in names:  # what names the cluster last: until then all can be done again
            path = data_dir / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as exc:
        what = "write" if path.name == LEFT_FILE else "remove"
        raise ConfigError(
            f"cannot {what} {path}: {exc.strerror or exc}", hint="ww leave, again"
        ) from exc
