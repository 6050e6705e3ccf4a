"""What a running node finds when it looks at itself, and asks two others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from wetware.doctor.finding import Check, Finding, error, judged, ok, span, warning
from wetware.doctor.machine import check_disk, judge_files, judge_plugins, release
from wetware.errors import LimitExceeded, WetwareError

if TYPE_CHECKING:
    from wetware.admission import Chain
    from wetware.membership.service import DialBack
    from wetware.membership.swim import Member
    from wetware.multiaddr import Multiaddr
    from wetware.node.compose import Node
    from wetware.overlay import OverlayStatus

LAG_S_MAX: Final = 0.05
"""p99 of the event loop's lag: above it probes are answered late, and others suspect the node."""
SETTLED_S: Final = 90.0
"""After a start. Loading libp2p holds the loop up once, and the meter looks back over a minute."""
PROBE_S_MAX: Final = 5.0
"""For one check."""
REACH_S_MAX: Final = 15.0
"""For the check that waits for other members to dial: three seconds for an address."""
REACH_MEMBERS_MAX, REACH_ADDRS_MAX = 2, 4
NAMED_MAX: Final = 5
"""Members that one finding names; a count stands for the others."""
OVERDUE_SHARE: Final = 2 / 3
"""Of a certificate's life. Its renewal begins after a third: by then it has failed for long."""


async def check_node(node: Node) -> list[Finding]:
    """What a running node finds when it looks at itself and asks two others. Never raises.

    The checks run at the same time; the longest takes REACH_S_MAX.
    """
    checks: list[tuple[str, Callable[[Node], Awaitable[list[Finding]]], float]] = [
        ("members", _members, PROBE_S_MAX),
        ("identity", _identity, PROBE_S_MAX),
        ("versions of members", _member_versions, PROBE_S_MAX),
        ("clock of members", _clock, PROBE_S_MAX),
        ("certificate", _certificate, PROBE_S_MAX),
        ("admission", _admission, PROBE_S_MAX),
        ("reach", _reach, REACH_S_MAX),
        ("policy", _policy, PROBE_S_MAX),
        ("audit", _audit, PROBE_S_MAX),
        ("grants", _grants, PROBE_S_MAX),
        ("loop", _loop, PROBE_S_MAX),
        ("libp2p", _overlay, PROBE_S_MAX),
        ("plugins", _plugins, PROBE_S_MAX),
        ("disk", _disk, PROBE_S_MAX),
        ("open files", _files, PROBE_S_MAX),
    ]

    def bound(check: Callable[[Node], Awaitable[list[Finding]]]) -> Check:
        return lambda: check(node)

    parts = await asyncio.gather(
        *(judged(name, bound(check), limit_s) for name, check, limit_s in checks)
    )
    return [finding for part in parts for finding in part]


def _others(node: Node) -> list[Member]:
    """The wetware nodes of the cluster: without this one, and without foreign peers."""
    own = node.key.peer_id
    return [
        member
        for member in node.membership.members()
        if member.peer != own and member.record is not None and member.state != "foreign"
    ]


def _alive(node: Node) -> list[Member]:
    return [member for member in _others(node) if member.state == "alive"]


def _called(member: Member) -> str:
    return (member.record.name if member.record else "") or member.peer[-8:]


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED_MAX])
    return f"{shown} and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else shown


async def _members(node: Node) -> list[Finding]:
    """Who is there, and who is not."""
    others = _others(node)
    now = node.clock.monotonic()
    if not others:
        return [ok("members", "this node is alone in its cluster; `ww invite` lets others join")]
    by_state: dict[str, list[Member]] = {}
    for member in others:
        by_state.setdefault(str(member.state.value), []).append(member)
    found = []
    for state in ("suspect", "dead"):
        if gone := by_state.get(state):
            names = [f"{_called(m)} ({span(now - m.since)})" for m in gone]
            remedy = f"`ww ping {_called(gone[0])}`; look at its machine"
            if state == "dead":
                remedy += f", and if it is gone for good `ww evict {_called(gone[0])}`"
            found.append(warning("members", f"{state}: {_list(names)}", remedy))
    alive = len(by_state.get("alive", ()))
    found.append(ok("members", f"{alive + 1} alive, this one included"))
    if len(others) > 1 and not alive:
        return [
            error(
                "members",
                f"none of the {len(others)} other members is alive, seen from here",
                "look at the network of this machine, then `ww ls`",
            ),
            *found[:-1],
        ]
    return found


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


async def _member_versions(node: Node) -> list[Finding]:
    import wetware

    versions = {_called(m): m.record.version for m in _alive(node) if m.record.version}
    return judge_member_versions(wetware.__version__, versions)


def judge_member_versions(own: str, versions: Mapping[str, str]) -> list[Finding]:
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
            f"this node runs {own}, and others another minor version: {_list(other)}",
            f"bring all to {newest}: `pip install 'wetware=={newest}'`, and restart `ww node`",
        )
    ]


async def _clock(node: Node) -> list[Finding]:
    offsets = {_called(m): m.clock_offset_s for m in _alive(node) if m.clock_offset_s is not None}
    if not offsets:
        early_s = node.admission.early_s()
        offsets = {f"the issuer {issuer.short}": ahead_s for issuer, ahead_s in early_s.items()}
    others = node.membership.knows_others
    return judge_clock(offsets, node.config.admission.clock_skew_s_max, others=others)


def judge_clock(
    offsets: Mapping[str, float], skew_s_max: float, *, others: bool = True
) -> list[Finding]:
    """This clock against those of the members (name → how far theirs is ahead, s).

    `others`: whether there are any.
    """
    from wetware.membership.swim import middle

    name = "clock of members"
    median = middle(offsets.values())
    if median is None:
        text = "it is not known whether this clock is right: no living member's was compared"
        remedy = "`ww ls` shows who is alive; `ww doctor` again in a few seconds"
        return [warning(name, text, remedy)] if others else []
    bound = f"the bound is {skew_s_max:g} s (clock_skew_s_max)"
    remedy = "`timedatectl set-ntp true` or chrony on {}, then `ww doctor`"
    if abs(median) > skew_s_max / 2:
        side = "behind" if median > 0 else "ahead of"
        text = f"this clock is {abs(median):.1f} s {side} the other members'; {bound}"
        if abs(median) > skew_s_max:
            text += ": certificates and logins fail"
            return [error(name, text, remedy.format("this machine"))]
        return [warning(name, text, remedy.format("this machine"))]
    wrong = {who: off for who, off in offsets.items() if abs(off - median) > skew_s_max / 2}
    if wrong:
        names = [
            f"{who} ({abs(off):.1f} s {'ahead' if off > 0 else 'behind'})"
            for who, off in wrong.items()
        ]
        return [
            warning(name, f"clocks that differ: {_list(names)}; {bound}", remedy.format("them"))
        ]
    most_ms = max(map(abs, offsets.values())) * 1000
    return [ok(name, f"within {most_ms:.0f} ms of {_count(len(offsets), 'member')}")]


async def _certificate(node: Node) -> list[Finding]:
    return judge_certificate(node.admission.own, node.clock.time() * 1000)


def judge_certificate(chain: Chain, now_ms: float) -> list[Finding]:
    """Whether it is valid, and was renewed in time."""
    name, leaf = "certificate", chain.leaf
    rights = ", ".join(sorted(leaf.rights))
    left_s, life_s = (
        (leaf.not_after_ms - now_ms) / 1000,
        (leaf.not_after_ms - leaf.not_before_ms) / 1000,
    )
    renew = (
        "a node that can certify must be reachable: `ww ls` shows who is alive; otherwise a "
        "member gives a ticket (`ww invite`) for `ww node --join TICKET`"
    )
    if now_ms < leaf.not_before_ms:
        text = f"it becomes valid only in {span((leaf.not_before_ms - now_ms) / 1000)}"
        return [error(name, text, "the clock of this machine is wrong: `date`")]
    if left_s <= 0:
        text = f"it expired {span(-left_s)} ago: no other member admits this node"
        return [error(name, text, renew)]
    text = f"valid for {span(left_s)} more (rights: {rights})"
    if now_ms - leaf.not_before_ms > life_s * 1000 * OVERDUE_SHARE:
        return [warning(name, f"{text}, and the renewal is overdue", renew)]
    return [ok(name, text)]


# --- reachability ---


async def _reach(node: Node) -> list[Finding]:
    """Ask up to two members to dial each address of this node by a new connection."""
    members = _alive(node)
    own = tuple(node.addrs)
    if not members:
        return [ok("reach", "alone in the cluster: nobody can say whether this node is reachable")]
    mine = node.membership.member(node.key.peer_id)
    host = mine.record.host if mine is not None and mine.record is not None else ""

    def here(member: Member) -> bool:
        return bool(host) and member.record.host == host

    # Others' machines first: what a neighbour on this one reaches says little.
    members.sort(key=lambda m: (here(m), node.host.connection(m.peer) is None, m.peer))
    asked = members[:REACH_MEMBERS_MAX]
    results: dict[Multiaddr, list[tuple[str, bool, str]]] = {a.with_peer(None): [] for a in own}

    async def ask(member: Member) -> Finding | None:
        addrs = [a for a in results if here(member) or not is_loopback(a)][:REACH_ADDRS_MAX]
        if not addrs:
            return None
        try:
            answers: Sequence[DialBack] = await node.membership.dial_back(member.peer, addrs)
        except LimitExceeded as exc:
            return warning("reach", exc.message, "`ww doctor` again in a minute")
        except WetwareError as exc:
            text = f"{_called(member)} could not be asked: {exc.message}"
            return warning("reach", text, f"`ww ping {_called(member)}`")
        for answer in answers:
            entry = results.get(answer.addr.with_peer(None))
            if entry is not None and answer.why != "unknown":
                entry.append((_called(member), answer.reached, answer.why))
        return None

    refusals = await asyncio.gather(*map(ask, asked))
    return [
        *(finding for finding in refusals if finding is not None),
        *judge_reach(results, elsewhere=any(not here(m) for m in members)),
    ]


def is_loopback(addr: Multiaddr) -> bool:
    """Whether only this machine can dial it."""
    return addr.is_loopback


def _is_private(addr: Multiaddr) -> bool:
    import ipaddress

    return not addr.kind.startswith("dns") and not ipaddress.ip_address(addr.host).is_global


def judge_reach(
    results: Mapping[Multiaddr, Sequence[tuple[str, bool, str]]], *, elsewhere: bool
) -> list[Finding]:
    """One finding for each address that somebody was asked about, and one for all together.

    Args:
        results: Address → what each member said: its name, whether it got here, and why not.
        elsewhere: Whether there are members on other machines.
    """
    found: list[Finding] = []
    outside = [addr for addr in results if not is_loopback(addr)]
    for addr, answers in results.items():
        if not answers:
            continue
        good = [who for who, reached, _ in answers if reached]
        bad = [f"{who} ({why})" for who, reached, why in answers if not reached]
        if not bad:
            found.append(ok("reach", f"{addr} is reached by {_list(good)}"))
        elif any(why == "other peer" for _, reached, why in answers if not reached):
            text = f"{addr}: another node answers there, say {_list(bad)}"
            remedy = "take the address out of `ww node --listen`, or find that node: `ww ls --wide`"
            found.append(warning("reach", text, remedy))
        else:
            also = f", but by {_list(good)}" if good else ""
            kind = "a private address; " if _is_private(addr) else ""
            found.append(
                warning(
                    "reach",
                    f"{addr} is not reached by {_list(bad)}{also}",
                    f"{kind}let TCP port {addr.port} through the firewall or router of this "
                    "machine, or `ww node --listen` an address that they can dial",
                )
            )
    if elsewhere and not outside:
        found.append(
            warning(
                "reach",
                "this node listens on loopback only: no other machine can dial it",
                "restart it with `ww node --listen /ip4/0.0.0.0/tcp/4001`",
            )
        )
    tried = [answers for addr in outside if (answers := results[addr])]
    if elsewhere and tried and not any(ok_ for answers in tried for _, ok_, _ in answers):
        found.append(
            error(
                "reach",
                "no member that was asked can dial this node; it can only dial them",
                "open its port in the firewall or router, then `ww doctor`",
            )
        )
    return found


# --- the rest of a node ---


async def _identity(node: Node) -> list[Finding]:
    """Whether another process shows itself with this node's key."""
    twin = node.membership.twin(node.key.peer_id)
    if twin is None:
        return [ok("identity", str(node.key.peer_id))]
    return [
        error(
            "identity",
            f"another process uses the key of this node, {node.key.peer_id}: {twin.name} at "
            f"{' '.join(twin.addrs) or 'no address'}",
            "stop it, or give it a data directory of its own: `ww node --data-dir DIR`; its log "
            "has `member.duplicate_identity` too",
        )
    ]


async def _policy(node: Node) -> list[Finding]:
    """The auth backend: what it finds itself."""
    backend = node.backend
    found = list(backend.findings())
    if any(finding.level != "ok" for finding in found):
        return found
    return [*found, ok("policy", f"{backend.name}, version {backend.epoch}")]


async def _audit(node: Node) -> list[Finding]:
    """The recorder: what it finds itself."""
    records = node.audit
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


async def _grants(node: Node) -> list[Finding]:
    tree = node.tree
    return judge_grants(
        len(tree.grants),
        len(tree.shares),
        failing=tree.store.failing if tree.store is not None else "",
        unsure=tree.shares_suspended.message if tree.shares_suspended is not None else "",
        clock_wrong=tree.clock_wrong,
        suspended=tree.suspended.message if tree.suspended is not None else "",
    )


def judge_grants(
    live: int, shares: int, *, failing: str, unsure: str, clock_wrong: str, suspended: str
) -> list[Finding]:
    """The broker.

    `failing`, `unsure`, `clock_wrong` and `suspended` say why it refuses things, or are "".
    """
    name, found = "grants", []
    if failing:
        found.append(
            error(
                name,
                f"shares and quotas cannot be written ({failing}): none is made or redeemed",
                "free disk space under the node's data directory; `ww doctor` again",
            )
        )
    if unsure:
        found.append(
            error(
                name,
                unsure,
                "`ww grants --all` shows them; `ww revoke --all ID` what should have ended, then "
                "`ww grants --resume`",
            )
        )
    if clock_wrong:
        found.append(
            error(
                name,
                f"grants with an end are refused: this clock cannot judge it, {clock_wrong}",
                "`timedatectl set-ntp true` or chrony on this machine, then `ww doctor`; if it is "
                "right, `ww clock --right`",
            )
        )
    if suspended:
        text = f"all capabilities are suspended: {suspended}"
        found.append(
            error(name, text, "`ww status` shows the auth backend; they come back with it")
        )
    return found or [ok(name, f"{live} live, {_count(shares, 'share')}")]


async def _loop(node: Node) -> list[Finding]:
    lag, up_s = node.lag.snapshot().recent, node.clock.monotonic() - node.started_at
    if up_s < SETTLED_S:
        return [ok("loop", f"too early to say: the node started {span(up_s)} ago")]
    return judge_lag(lag.p99_s, lag.max_s)


def judge_lag(p99_s: float, max_s: float) -> list[Finding]:
    """The event loop's lag against LAG_S_MAX."""
    text = f"the event loop lags {p99_s * 1000:.1f} ms (p99), {max_s * 1000:.0f} ms at most"
    if p99_s <= LAG_S_MAX:
        return [ok("loop", text)]
    return [
        warning(
            "loop",
            f"{text}; above {LAG_S_MAX * 1000:.0f} ms others begin to suspect the node",
            "`ww status` and `top` on the node's machine: too much load, or a plugin that blocks",
        )
    ]


async def _overlay(node: Node) -> list[Finding]:
    if not node.config.node.libp2p:
        return [ok("libp2p", "off ([node] libp2p)")]
    return judge_overlay(node.overlay.status())


def judge_overlay(status: OverlayStatus) -> list[Finding]:
    """The state of the libp2p guest, and whether it had to be started again."""
    why = f", the last time: {status.last_error}" if status.last_error else ""
    times = _count(status.restarts, "restart") + why
    remedy = "calls, members and sessions go on without it; the log says why, `ww status` how often"
    if status.state == "stopped":
        return [error("libp2p", f"it is not running{why}", "restart the node: `ww node`")]
    if status.restarts or status.state == "restarting":
        return [warning("libp2p", f"{status.state}, {times}", remedy)]
    return [ok("libp2p", f"{status.state}, {_count(status.dht_peers, 'peer')} in the DHT")]


async def _plugins(node: Node) -> list[Finding]:
    found = judge_plugins(node.plugins.report)
    if lost := {name: count for name, count in node.plugins.audit_lost.items() if count}:
        found.append(
            warning(
                "plugins",
                "copies of records did not reach a plugin's ww_audit, which is too slow: "
                + ", ".join(f"{name} lacks {count}" for name, count in lost.items()),
                "the record itself has them; `ww plugin list` shows the plugins",
            )
        )
    return found


async def _disk(node: Node) -> list[Finding]:
    return await asyncio.to_thread(check_disk, node.data_dir)


async def _admission(node: Node) -> list[Finding]:
    store = node.admission.store
    whole = await asyncio.to_thread(store.reserve.fill)
    return judge_admission("" if whole else store.reserve.missing, store.unsure)


def judge_admission(missing: str, unsure: str) -> list[Finding]:
    """The space for evictions: why it is missing, and why a crash may have undone some, or ""."""
    name, found = "admission", []
    if missing:
        text = f"there is no room for what an eviction needs on a full disk ({missing})"
        remedy = "free disk space under the node's data directory; `ww doctor` again"
        found.append(error(name, text, remedy))
    if unsure:
        found.append(
            error(
                name,
                f"nobody can join or renew here since the node started: {unsure}",
                "`ww evict` and `ww invite --revoke` again where they were, then "
                "`ww grants --resume`",
            )
        )
    return found


async def _files(node: Node) -> list[Finding]:
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    used = len(os.listdir("/proc/self/fd"))
    limit = None if soft == resource.RLIM_INFINITY else soft
    link = node.config.link
    return judge_files(limit, link.connections_max + link.handshakes_max, used)
