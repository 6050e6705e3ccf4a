"""Which cluster a node belongs to: one that it joins, one of its own, or none beside itself."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger
from wetware.errors import AdmissionRefused, Busy, ConfigError
from wetware.identity import replace_private_file
from wetware.node.data_dir import locked
from wetware.node.key import load_or_create
from wetware.node.process import umask
from wetware.overlay.admission.joining import join
from wetware.overlay.admission.statements import Chain
from wetware.overlay.admission.store import Store, founding_of
from wetware.overlay.admission.texts import parse_join
from wetware.overlay.link import LinkHost

if TYPE_CHECKING:
    from wetware.base.clock import Clock
    from wetware.base.multiaddr import Multiaddr
    from wetware.config import Config
    from wetware.hookspecs import AuthBackend
    from wetware.identity import Key
    from wetware.loader import Plugins
    from wetware.overlay.admission.decision import Admission
    from wetware.overlay.admission.statements import Founding
    from wetware.overlay.admission.texts import Bundle, Ticket

log = get_logger("node")

FURTHER_FILE: Final = "auth_also.json"
"""What the further auth backends of a data directory are of: plugin → digest of their founding."""


def keep_to_itself(config: Config) -> tuple[Multiaddr, ...]:
    """Where a try-out listens; raises ConfigError where it is told to meet others."""
    node = config.node
    origin = config.origin("node.listen")
    open_to_others = [str(addr) for addr in node.listen if not addr.is_loopback]
    told = [
        (node.join, "node.join", "it joins no cluster"),
        (node.peers, "node.peers", "it connects to no other node"),
        (node.announce, "node.announce", "nobody else is to dial it"),
        (
            open_to_others and origin.kind != "default",
            "node.listen",
            f"it listens on loopback only, and not on {', '.join(open_to_others)}",
        ),
    ]
    for given, setting, why in told:
        if given:
            raise ConfigError(
                f"a node that tries out its auth backend is for this machine alone: {why} "
                f"({config.origin(setting)})",
                hint="leave that out; for a node that others can reach, configure the auth "
                "backend and leave out --dev",
                code="config.try_out",
            )
    return tuple(
        addr if addr.is_loopback else replace(addr, kind="ip4", host="127.0.0.1")
        for addr in node.listen
    )


def judge_backend(founding: Founding, plugins: Plugins, config: Config) -> None:
    """Raise ConfigError where the cluster has another auth backend than is configured.

    Before that backend is asked: it would take the other one's documents for damaged ones.
    """
    if founding.backend != plugins.auth_backend:
        raise ConfigError(
            f"the cluster {founding.cluster_id} has the auth backend {founding.backend!r}, and "
            f"this node is started with {plugins.auth_backend!r} "
            f"({config.origin('node.auth')})",
            hint=f"start it with --auth {founding.backend}, or [node] auth in ww.toml; another "
            "cluster needs a data directory of its own (--data-dir)",
            code="config.cluster",
        )


async def join_with(
    invitation: Ticket | Bundle, store: Store, *, key: Key, config: Config, clock: Clock
) -> None:
    """Become a member with a ticket or a certificate, unless this node is one already.

    Raises what `join` raises.
    """
    if store.founding == invitation.founding and store.certificate is not None:
        own = Chain.open(store.certificate, invitation.founding)
        if clock.time() * 1000 < own.not_after_ms:
            log.info("cluster.joined_already", cluster=invitation.founding.cluster_id)
            return
    async with LinkHost(key, limits=config.link) as host:
        await join(host, invitation, store, key=key, clock=clock, limits=config.admission)


async def join_alone(config: Config, plugins: Plugins) -> Founding:
    """Join with the ticket that the configuration has, while no node runs here.

    Where one does, it has to be a member of that cluster already. Raises what a start raises.
    """
    invitation, data_dir = parse_join(config.node.join), config.node.data_dir
    founding = invitation.founding
    judge_backend(founding, plugins, config)
    try:
        with umask(0o077), locked(data_dir):
            key, _ = load_or_create(data_dir)
            await join_with(invitation, Store(data_dir), key=key, config=config, clock=time)
    except Busy:
        if founding_of(data_dir) != founding:
            raise
    return founding


def cluster_of(store: Store, backend: AuthBackend) -> str:
    """The cluster that a node belongs to; one of its own at its very first start.

    Raises ConfigError where that was founded on another authority than the backend's.
    """
    founding = store.founding
    if founding is None:
        founding = store.found(backend.name, backend.founding)
        log.info("cluster.founded", cluster=founding.cluster_id)
    if founding.statement != backend.founding:
        raise ConfigError(
            f"this node belongs to the cluster {founding.cluster_id}, which was founded on "
            f"another authority than the one that the auth backend {backend.name!r} is "
            "configured with",
            hint="configure it as before, or give the other cluster a data directory of its "
            "own, with --data-dir",
            code="config.cluster",
        )
    return founding.cluster_id


def pin_further(data_dir: Path, backends: Mapping[str, AuthBackend]) -> None:
    """Keep what the further auth backends (plugin → backend) are of, with their first start here.

    Raises ConfigError where one is of something else by now: its users would be taken for those
    whom services know by the same names.
    """
    known = further_of(data_dir)
    kept = dict(known)
    for plugin, backend in backends.items():
        digest = hashlib.sha256(backend.founding).hexdigest()
        if kept.setdefault(plugin, digest) != digest:
            raise ConfigError(
                f"the auth backend {backend.name!r} is configured with another authority than when "
                "this node began to take its users",
                hint="configure it as before. Other users need a data directory of their own, or "
                f"the line of {plugin!r} taken out of {data_dir / FURTHER_FILE}: then who has the "
                "same name there gets what services keep for it",
                code="config.cluster",
            )
    if kept != known:
        replace_private_file(data_dir / FURTHER_FILE, json.dumps(kept, indent=1).encode())


def further_of(data_dir: Path) -> dict[str, str]:
    """What `pin_further` kept: plugin → digest; raises ConfigError where it is damaged."""
    file = data_dir / FURTHER_FILE
    try:
        return {str(name): str(digest) for name, digest in json.loads(file.read_bytes()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as exc:
        raise ConfigError(
            f"{file} is damaged: {exc}", hint="restore it from a backup", code="config.cluster"
        ) from exc


def judge_own(admission: Admission) -> None:
    """Raise AdmissionRefused where the cluster's key has evicted this node."""
    try:
        admission.judge_own()
    except AdmissionRefused as exc:
        raise _no_member_any_more(exc) from None
    if (why := admission.own_ended()) is not None:  # by an inviter: that can be mended
        log.error("node.own_certificate_ended", why=why, next=why.hint)


async def end_if_evicted(admission: Admission) -> None:
    """Wait until that comes; raises AdmissionRefused."""
    try:
        await admission.wait_evicted()
    except AdmissionRefused as exc:
        raise _no_member_any_more(exc) from None


def _no_member_any_more(exc: AdmissionRefused) -> AdmissionRefused:
    return AdmissionRefused(
        f"this node is none of the cluster's any more: {exc.message}",
        hint="to join again it needs a new key and a new ticket: `ww node --data-dir DIR --join "
        "TICKET`",
        code=exc.code,
    )
