"""`ww ls`, `ww ping`, `ww invite`, `ww evict`: the cluster from the command line."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wetware.cli.app import (
    STATE_STYLES,
    Styled,
    confirm,
    note,
    out,
    out_json,
    run_client,
    table,
    usage,
    warn_of_loopback,
)
from wetware.errors import InvalidArgument, WetwareError

if TYPE_CHECKING:
    from wetware.client import Session
    from wetware.member import Member

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="A label of the node; repeatable."),
]


def parse_labels(texts: Sequence[str] | None) -> dict[str, str]:
    """`key=value` texts; raises InvalidArgument."""
    labels = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise InvalidArgument(
                f"{text[:80]!r} is not a label", hint="write KEY=VALUE, e.g. zone=home"
            )
        labels[key] = value
    return labels


# --- ls -------------------------------------------------------------------------------------------


def ls_command(
    selector: Annotated[
        str,
        typer.Argument(
            metavar="[SELECTOR]",
            help="e.g. zone=home,service=pubsub,state=alive, host=db*, a name, the end of an ID.",
        ),
    ] = "",
    limit: Annotated[
        int, typer.Option("--limit", min=0, metavar="N", help="At most N; 0 is the node's limit.")
    ] = 0,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Print each change until Ctrl-C.")
    ] = False,
    wide: Annotated[
        bool, typer.Option("--wide", help="Whole peer IDs, every address, versions.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the nodes of the cluster, as the node that is asked sees them."""
    if watch:
        run_client(lambda session: _watch(session, selector, json), reconnect=True)
        return

    async def work(session: Session) -> Any:
        return await session.cluster.list(selector, limit=limit)

    members = run_client(work)
    if json:
        out_json({"members": [m.as_dict() for m in members], "matched": members.matched})
        return
    header, rows = _rows(members, wide)
    table(header, rows, styles={"state": STATE_STYLES})
    if not members:
        note(f"no member matches {selector!r}")
    elif members.matched > len(members):
        note(f"{len(members)} of {members.matched} members; narrow the selector to see the others")


async def _watch(session: Session, selector: str, json: bool) -> None:
    async with session.cluster.watch(selector) as members:
        async for member in members:
            if json:
                out(json_module.dumps({"time": time.time(), **member.as_dict()}))
                continue
            stamp = time.strftime("%H:%M:%S")
            where = member.addrs[0] if member.addrs else member.peer_id
            out(
                f"{stamp}  {member.name or member.peer_id.short}  ",
                Styled(member.state, STATE_STYLES.get(member.state)),
                f"  {where}",
            )


def _rows(members: Sequence[Member], wide: bool) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header: tuple[str, ...] = ("name", "state", "for", "id", "address", "rtt", "load", "labels")
    header += ("services",)
    troubled = any(m.trouble for m in members)
    if troubled:
        header += ("trouble",)
    if wide:
        header += ("version", "memory", "incarnation")
    rows = []
    for m in members:
        addrs = [addr.partition("/p2p/")[0] for addr in m.addrs]
        row: tuple[str, ...] = (
            (m.name or "-") + (" *" if m.is_self else ""),
            m.state,
            _span(m.since_s),
            m.peer_id if wide else m.peer_id.short,
            (" ".join(addrs) if wide else (addrs[0] if addrs else "")) or "-",
            f"{m.rtt_s * 1000:.1f} ms" if m.rtt_s else "-",
            f"{m.load:.2f}",
            " ".join(f"{k}={v}" for k, v in sorted(m.labels.items())) or "-",
            " ".join(m.services) or "-",
        )
        if troubled:
            row += (m.trouble or "-",)
        if wide:
            row += (m.version or "-", f"{m.memory_bytes >> 20} MiB", str(m.incarnation))
        rows.append(row)
    return header, rows


def _span(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# --- ping -----------------------------------------------------------------------------------------


def ping_command(
    node: Annotated[str, typer.Argument(metavar="NODE", help="A name, a host or a peer ID.")],
    count: Annotated[
        int, typer.Option("--count", "-c", min=0, metavar="N", help="0 is until Ctrl-C.")
    ] = 4,
    interval: Annotated[
        float, typer.Option("--interval", "-i", min=0.0, metavar="SECONDS", help="Between pings.")
    ] = 1.0,
    json: Json = False,
) -> None:
    """Measure the round trip from this machine's node to another one."""
    rtts: list[float] = []
    lost = 0

    async def work(session: Session) -> None:
        nonlocal lost
        import asyncio

        member = await session.cluster.one(node)
        if not json:
            note(f"from {session.identity.node[-8:]} to {member.name} {member.peer_id}")
        sent = 0
        while count == 0 or sent < count:
            if sent:
                await asyncio.sleep(interval)
            sent += 1
            try:
                rtt = await session.cluster.ping(member.peer_id)
            except WetwareError as exc:
                lost += 1
                if not json:
                    out(f"{sent}: {exc.message}")
                continue
            rtts.append(rtt)
            if not json:
                out(f"{sent}: {rtt * 1000:.2f} ms")

    try:
        run_client(work)
    except KeyboardInterrupt:
        if not rtts and not lost:
            raise
    total = len(rtts) + lost
    rtts.sort()
    p50 = rtts[len(rtts) // 2] if rtts else None
    if json:
        out_json(
            {
                "sent": total,
                "lost": lost,
                "min_s": rtts[0] if rtts else None,
                "p50_s": p50,
                "max_s": rtts[-1] if rtts else None,
            }
        )
    elif p50 is not None:
        note(
            f"{total} sent, {lost} lost; min {rtts[0] * 1000:.2f}, p50 {p50 * 1000:.2f}, "
            f"max {rtts[-1] * 1000:.2f} ms"
        )
    if not rtts:
        note(f"{total} sent, {lost} lost")
        raise SystemExit(69)


# --- invite and evict -----------------------------------------------------------------------------


def invite_command(
    peer: Annotated[
        str | None,
        typer.Option(
            "--peer",
            metavar="PEER_ID",
            help="Make a certificate for this peer ID instead of a ticket.",
        ),
    ] = None,
    foreign: Annotated[
        bool,
        typer.Option(
            "--foreign",
            help="With --peer: a libp2p peer that is no wetware node; it need not show anything.",
        ),
    ] = False,
    label: Labels = None,
    inviter: Annotated[
        bool, typer.Option("--inviter", help="The node may invite others in turn.")
    ] = False,
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="Of the ticket: 15m, 12h, 7d. [24h]")
    ] = "",
    uses: Annotated[
        int, typer.Option("--uses", min=1, metavar="N", help="How many nodes it lets in.")
    ] = 1,
    tickets: Annotated[bool, typer.Option("--list", help="List the node's tickets.")] = False,
    revoke: Annotated[
        str | None, typer.Option("--revoke", metavar="ID", help="Take a ticket back.")
    ] = None,
    json: Json = False,
) -> None:
    """Let a node join: print a ticket for `ww node --join TICKET`."""
    if sum((peer is not None, tickets, revoke is not None)) > 1:
        usage("choose one of --peer, --list and --revoke")
    if foreign and peer is None:
        usage("--foreign needs --peer PEER_ID")
    if tickets:
        _list_tickets(json)
    elif revoke is not None:
        run_client(lambda session: session.cluster.revoke_ticket(revoke))
        if json:
            out_json({"revoked": revoke})
        else:
            note(f"ticket {revoke} lets nobody in any more")
    elif peer is not None:
        _certify(peer, foreign, parse_labels(label), inviter, json)
    else:
        _invite(parse_labels(label), inviter, expires, uses, json)


def _invite(labels: dict[str, str], inviter: bool, expires: str, uses: int, json: bool) -> None:
    from wetware.broker.terms import parse_duration

    expires_s = int(parse_duration(expires)) if expires else 0
    rights = ("member", "invite") if inviter else ("member",)
    ticket, ticket_id, not_after_ms = run_client(
        lambda session: session.cluster.invite(
            labels=labels, rights=rights, expires_s=expires_s, uses=uses
        )
    )
    _warn_of_loopback("the ticket", ticket)
    if json:
        out_json({"ticket": ticket, "id": ticket_id, "not_after_ms": not_after_ms, "uses": uses})
        return
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(not_after_ms / 1000))
    who = "one node" if uses == 1 else f"{uses} nodes"
    out(ticket)
    note(f"lets {who} in until {until}; whoever has it can join, so pass it on as a secret")
    note("on the new machine:  ww node --join TICKET")
    note(f"to take it back:     ww invite --revoke {ticket_id}")


def _certify(peer: str, foreign: bool, labels: dict[str, str], inviter: bool, json: bool) -> None:
    rights = ("member", "invite") if inviter else ("member",)
    bundle = run_client(
        lambda session: session.cluster.certify(peer, labels=labels, rights=rights, foreign=foreign)
    )
    if not foreign:
        _warn_of_loopback("the certificate", bundle)
    if json:
        out_json({"certificate": bundle, "peer_id": peer, "foreign": foreign})
        return
    out(bundle)
    if foreign:
        note(f"the cluster now knows {peer} as a member; it need not show the certificate")
    else:
        note(f"only the node with the key of {peer} can use it:  ww node --join CERTIFICATE")


def _warn_of_loopback(what: str, invitation: str) -> None:
    from wetware.overlay.admission.texts import parse_join

    warn_of_loopback(what, parse_join(invitation).addrs)


def _list_tickets(json: bool) -> None:
    tickets = run_client(lambda session: session.cluster.tickets())
    if json:
        out_json(
            [
                {
                    "id": t.id,
                    "not_after_ms": t.not_after_ms,
                    "uses_left": t.uses_left,
                    "spent_by": list(t.spent_by),
                    "labels": dict(t.labels),
                    "rights": list(t.rights),
                    "revoked": t.revoked,
                }
                for t in tickets
            ]
        )
        return
    table(
        ("id", "state", "uses left", "until", "spent by"),
        [
            (
                t.id,
                _ticket_state(t),
                str(t.uses_left),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(t.not_after_ms / 1000)),
                " ".join(peer[-8:] for peer in t.spent_by) or "-",
            )
            for t in tickets
        ],
    )


def _ticket_state(ticket: Any) -> str:
    if ticket.revoked:
        return "revoked"
    if not ticket.uses_left:
        return "spent"
    return "expired" if ticket.not_after_ms < time.time() * 1000 else "open"


def evict_command(
    node: Annotated[str, typer.Argument(metavar="NODE", help="A name, a host or a peer ID.")],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="For the record.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """End a node's membership, everywhere and for good: its key will not be let in again."""
    from wetware.identity import PeerId

    async def find(session: Session) -> str:
        try:
            return PeerId.parse(node)
        except InvalidArgument:
            member: Member = await session.cluster.only(node)
            return member.peer_id

    async def work(session: Session) -> str:
        peer = await find(session)
        who = peer if peer == node else f"{node} ({peer})"
        confirm(f"Evict {who} from the cluster, for good?", yes=yes)
        await session.cluster.evict(peer, reason)
        return peer

    peer = run_client(work)
    if json:
        out_json({"evicted": peer})
    else:
        note(f"{peer} is no member any more; the other nodes hear of it within seconds")
