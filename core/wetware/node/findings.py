"""What a running node finds when it looks at itself, and asks two others: `ww doctor`.

Each part has its own findings; here they are asked for, at the same time.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from wetware.base.finding import Check, Finding, error, judged, ok, warning
from wetware.base.version import __version__
from wetware.broker import findings as grants
from wetware.loader import report
from wetware.node.disk import check_disk
from wetware.node.process import judge_files
from wetware.overlay.admission import findings as admission
from wetware.overlay.libp2p import findings as overlay
from wetware.overlay.membership import findings as membership

if TYPE_CHECKING:
    from wetware.broker.records import Records
    from wetware.hookspecs import AuthBackend
    from wetware.node.parts import Parts
    from wetware.overlay.link import LinkLimits

PROBE_S_MAX: Final = 5.0
"""For one check."""
REACH_S_MAX: Final = 15.0
"""For the check that waits for other members to dial: three seconds for an address."""


async def check_node(node: Parts) -> list[Finding]:
    """What a running node finds when it looks at itself and asks two others. Never raises.

    The checks run at the same time; the longest takes REACH_S_MAX.
    """
    members, now = node.membership, node.clock.monotonic()
    checks: dict[str, Check] = {
        "members": lambda: membership.presence(members, now),
        "identity": lambda: membership.identity(members),
        "versions of members": lambda: judge_versions(__version__, membership.versions(members)),
        "clock of members": lambda: membership.clock(
            members, node.admission.early_s, node.config.admission.clock_skew_s_max
        ),
        "certificate": lambda: admission.certificate(node.admission.own, node.clock.time() * 1000),
        "admission": lambda: admission.durable(node.admission.store.files),
        "reach": lambda: membership.reach(
            members, node.addrs, lambda peer: node.host.connection(peer) is not None
        ),
        "from outside": lambda: [ok("from outside", node.reached)] if members.knows_others else [],
        "policy": lambda: [f for each in (node.backend, *node.also) for f in policy(each)],
        "audit": lambda: audit(node.audit),
        "grants": lambda: grants.findings(node.tree),
        "loop": lambda: node.lag.findings(now - node.started_at),
        "libp2p": lambda: (
            overlay.findings(node.overlay.status())
            if node.config.node.libp2p
            else [ok("libp2p", "off ([node] libp2p)")]
        ),
        "plugins": lambda: report.findings(node.plugins.report),
        "roles": lambda: grants.roles(node.broker.ungranted()),
        "disk": lambda: node.store.files.threads.run(check_disk, node.data_dir),
        "open files": lambda: open_files(node.config.link),
    }
    for name, service in node.services.items():
        checks[f"service {name}"] = service.findings
    parts = await asyncio.gather(
        *(
            judged(name, check, REACH_S_MAX if name == "reach" else PROBE_S_MAX)
            for name, check in checks.items()
        )
    )
    return [finding for part in parts for finding in part]


def release(version: str) -> tuple[int, ...]:
    """The numbers that another node's version begins with; () for what is none."""
    numbers = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(map(int, numbers[1].split("."))) if numbers else ()


def judge_versions(own: str, versions: Mapping[str, str]) -> list[Finding]:
    """Members (name → version) whose minor version is another than ours."""
    name = "versions of members"

    def minor(version: str) -> tuple[int, ...]:
        return (*release(version), 0, 0)[:2]

    other = [
        f"{who} {version}" for who, version in versions.items() if minor(version) != minor(own)
    ]
    if not other:
        return [ok(name, f"all run {own}, or a patch of it")] if versions else []
    newest = max([own, *versions.values()], key=release)
    return [
        warning(
            name,
            f"this node runs {own}, and others another minor version: {membership.listed(other)}",
            f"bring all to {newest}: `pip install 'wetware=={newest}'`, and restart `ww node`",
        )
    ]


def policy(backend: AuthBackend) -> list[Finding]:
    """The auth backend: what it finds itself."""
    found = list(backend.findings())
    if any(finding.level != "ok" for finding in found):
        return found
    return [*found, ok("policy", f"{backend.name}, version {backend.epoch}")]


def audit(records: Records) -> list[Finding]:
    if records.recorder is None:
        return [
            warning(
                "audit",
                'decisions are not recorded: `[node] audit = "none"`',
                "take it out of ww.toml, and start the node again",
            )
        ]
    if records.failed:
        return [
            error(
                "audit",
                f"the recorder {records.recorder.name!r} has ended ({records.failed}): logins can "
                "end things only",
                "start the node again; its log has `recorder.ended`",
            )
        ]
    return list(records.recorder.findings())


def open_files(link: LinkLimits) -> list[Finding]:
    """How many files the node may open, and what it may need."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = len(os.listdir("/proc/self/fd"))
    limit = None if soft == resource.RLIM_INFINITY else soft
    return judge_files(limit, link.connections_max + link.handshakes_max, used)
