"""What a node finds in the membership, and asks two other members."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from wetware.base.finding import Finding, counted, error, ok, span, warning
from wetware.errors import LimitExceeded, WetwareError
from wetware.overlay.membership.swim import middle

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import PeerId
    from wetware.overlay.membership.dial_back import DialBack
    from wetware.overlay.membership.known import Known
    from wetware.overlay.membership.service import Membership

REACH_MEMBERS_MAX, REACH_ADDRS_MAX = 2, 4
NAMED_MAX: Final = 5
"""Members that one finding names; a count stands for the others."""


def _others(membership: Membership) -> list[Known]:
    return [member for member in membership.members() if member.peer != membership.peer_id]


def _alive(membership: Membership) -> list[Known]:
    return [member for member in _others(membership) if member.state == "alive"]


def _called(member: Known) -> str:
    return member.record.name or member.peer[-8:]


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    shown = ", ".join(names[:NAMED_MAX])
    return f"{shown} and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else shown


def presence(membership: Membership, now: float) -> list[Finding]:
    """Who is there, and who is not, at this monotonic time."""
    others = _others(membership)
    if not others:
        return [ok("members", "this node is alone in its cluster; `ww invite` lets others join")]
    by_state: dict[str, list[Known]] = {}
    for member in others:
        by_state.setdefault(str(member.state.value), []).append(member)
    found = []
    for state in ("suspect", "dead"):
        if gone := by_state.get(state):
            names = [f"{_called(m)} ({span(now - m.since)})" for m in gone]
            remedy = f"`ww ping {_called(gone[0])}`; look at its machine"
            if state == "dead":
                remedy += f", and if it is gone for good `ww evict {_called(gone[0])}`"
            found.append(warning("members", f"{state}: {listed(names)}", remedy))
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


def versions(membership: Membership) -> dict[str, str]:
    """Who is alive → the version of wetware that they run."""
    return {_called(m): m.record.version for m in _alive(membership) if m.record.version}


def clock(
    membership: Membership, early_s: Callable[[], Mapping[PeerId, float]], skew_s_max: float
) -> list[Finding]:
    """This clock against the others', or against what certificates say where none was compared."""
    offsets = {
        _called(m): m.clock_offset_s for m in _alive(membership) if m.clock_offset_s is not None
    } or {f"the issuer {issuer.short}": ahead_s for issuer, ahead_s in early_s().items()}
    return judge_clock(offsets, skew_s_max, others=membership.knows_others)


def judge_clock(
    offsets: Mapping[str, float], skew_s_max: float, *, others: bool = True
) -> list[Finding]:
    """This clock against those of the members (name → how far theirs is ahead, s).

    `others`: whether there are any.
    """
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
            warning(name, f"clocks that differ: {listed(names)}; {bound}", remedy.format("them"))
        ]
    most_ms = max(map(abs, offsets.values())) * 1000
    return [ok(name, f"within {most_ms:.0f} ms of {counted(len(offsets), 'member')}")]


async def reach(
    membership: Membership, own: Sequence[Multiaddr], connected: Callable[[PeerId], bool]
) -> list[Finding]:
    """Ask up to two members to dial each address of this node by a new connection."""
    members = _alive(membership)
    if not members:
        return [ok("reach", "alone in the cluster: nobody can say whether this node is reachable")]
    mine = membership.member(membership.peer_id)
    host = mine.record.host if mine is not None else ""

    def here(member: Known) -> bool:
        return bool(host) and member.record.host == host

    # Others' machines first: what a neighbour on this one reaches says little.
    members.sort(key=lambda m: (here(m), not connected(m.peer), m.peer))
    asked = members[:REACH_MEMBERS_MAX]
    results: dict[Multiaddr, list[tuple[str, bool, str]]] = {a.with_peer(None): [] for a in own}

    async def ask(member: Known) -> Finding | None:
        addrs = [a for a in results if here(member) or not a.is_loopback][:REACH_ADDRS_MAX]
        if not addrs:
            return None
        try:
            answers: Sequence[DialBack] = await membership.dial_backs.ask(member.peer, addrs)
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


def _is_private(addr: Multiaddr) -> bool:
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
    outside = [addr for addr in results if not addr.is_loopback]
    for addr, answers in results.items():
        if not answers:
            continue
        good = [who for who, reached, _ in answers if reached]
        bad = [f"{who} ({why})" for who, reached, why in answers if not reached]
        if not bad:
            found.append(ok("reach", f"{addr} is reached by {listed(good)}"))
        elif any(why == "other peer" for _, reached, why in answers if not reached):
            text = f"{addr}: another node answers there, say {listed(bad)}"
            remedy = "take the address out of `ww node --listen`, or find that node: `ww ls --wide`"
            found.append(warning("reach", text, remedy))
        else:
            also = f", but by {listed(good)}" if good else ""
            kind = "a private address; " if _is_private(addr) else ""
            found.append(
                warning(
                    "reach",
                    f"{addr} is not reached by {listed(bad)}{also}",
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


def identity(membership: Membership) -> list[Finding]:
    """Whether another process shows itself with this node's key."""
    own = membership.peer_id
    if (twin := membership.twins.of(own)) is None:
        return [ok("identity", str(own))]
    return [
        error(
            "identity",
            f"another process uses the key of this node, {own}: {twin.name} at "
            f"{' '.join(twin.addrs) or 'no address'}",
            "stop it, or give it a data directory of its own: `ww node --data-dir DIR`; its log "
            "has `member.duplicate_identity` too",
        )
    ]
