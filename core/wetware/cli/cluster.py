"""`ww ls`, `ww ping`, `ww invite`, `ww evict`: the cluster from the command line."""

from __future__ import annotations

import contextlib
import json as json_module
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from wetware.cli.app import (
    STATE_STYLES,
    Json,
    Styled,
    confirm,
    done,
    note,
    out,
    out_json,
    run_client,
    stamp,
    table,
    usage,
    warn_of_loopback,
)
from wetware.errors import EXIT_UNREACHABLE, InvalidArgument, WetwareError

if TYPE_CHECKING:
    from wetware.client import Session
    from wetware.client.cluster import MemberList
    from wetware.identity import PeerId
    from wetware.member import Member

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
        bool,
        typer.Option(
            "--wide", help="Whole peer IDs, every address and who can dial it there, versions."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show the nodes of the cluster, as the node that is asked sees them."""
    if watch:
        return run_client(lambda session: _watch(session, selector, json), reconnect=True)

    async def work(session: Session) -> tuple[MemberList, Sequence[Member]]:
        found = await session.cluster.list(selector, limit=limit)
        ids = {str(m.peer_id) for m in found}
        unnamed = any(m.via and m.via not in ids for m in found)
        return found, await session.cluster.list() if unnamed else found

    members, named = run_client(work)
    if json:
        return out_json({"members": [*map(_plain, members)], "matched": members.matched})
    header, rows = _rows(members, {m.peer_id: m.name for m in named}, wide)
    table(header, rows, styles={"state": STATE_STYLES})
    if not members:
        note(f"no member matches {selector!r}")
    elif members.matched > len(members):
        note(f"{len(members)} of {members.matched} members; narrow the selector to see the others")


async def _watch(session: Session, selector: str, json: bool) -> None:
    async with session.cluster.watch(selector) as members:
        async for member in members:
            if json:
                out(json_module.dumps({"time": time.time(), **_plain(member)}))
                continue
            stamp = time.strftime("%H:%M:%S")
            where = member.addrs[0] if member.addrs else member.peer_id
            out(
                f"{stamp}  {member.name or member.peer_id.short}  ",
                Styled(member.state, STATE_STYLES.get(member.state)),
                f"  {where}",
            )


def _plain(member: Member) -> dict[str, Any]:
    return member.as_dict() | {"scopes": list(member.scopes)}


def _rows(
    members: Sequence[Member], names: Mapping[PeerId, str], wide: bool
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    from wetware.base.finding import size, span

    columns: dict[str, Callable[[Member], str]] = {
        "name": lambda m: (m.name or "-") + (" *" if m.is_self else ""),
        "state": lambda m: m.state,
        "for": lambda m: span(m.since_s),
        "id": lambda m: m.peer_id if wide else m.peer_id.short,
        "address": lambda m: (
            " ".join(
                f"{addr.partition('/p2p/')[0]} ({scope})"
                for addr, scope in zip(m.addrs, m.scopes, strict=True)
            )
            if wide
            else "".join(m.addrs[:1]).partition("/p2p/")[0]
        ),
        "path": lambda m: _path(m, names),
        "rtt": lambda m: f"{m.rtt_s * 1000:.1f} ms" if m.rtt_s else "",
        "load": lambda m: f"{m.load:.2f}",
        "labels": lambda m: " ".join(f"{k}={v}" for k, v in sorted(m.labels.items())),
        "services": lambda m: " ".join(m.services),
    }
    if any(m.trouble for m in members):
        columns["trouble"] = lambda m: m.trouble
    if wide:
        columns["version"] = lambda m: m.version
        columns["memory"] = lambda m: size(m.memory_bytes)
        columns["incarnation"] = lambda m: str(m.incarnation)
    return tuple(columns), [tuple(cell(m) or "-" for cell in columns.values()) for m in members]


def _path(member: Member, names: Mapping[PeerId, str]) -> str:
    """How the node that was asked reaches it."""
    from wetware.identity import PeerId

    if member.via:
        via = PeerId(member.via)
        return f"via {names.get(via) or via.short}"
    return "direct" if member.connected else ""


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
    rtts: list[float | None] = []  # None: it was lost
    path = ""

    async def work(session: Session) -> None:
        import asyncio

        nonlocal path
        member = await session.cluster.one(node)
        if not json:
            note(f"from {session.identity.node[-8:]} to {member.name} {member.peer_id}")
        while count == 0 or len(rtts) < count:
            if rtts:
                await asyncio.sleep(interval)
            try:
                rtt = await session.cluster.ping(member.peer_id)
            except WetwareError as exc:
                rtts.append(None)
                said = exc.message
            else:
                rtts.append(rtt)
                said = f"{rtt * 1000:.2f} ms"
            if not json:
                out(f"{len(rtts)}: {said}")
        members = await session.cluster.list()
        names = {each.peer_id: each.name for each in members}
        path = next((_path(m, names) for m in members if m.peer_id == member.peer_id), "")

    try:
        run_client(work)
    except KeyboardInterrupt:
        if not rtts:
            raise
    came = sorted(rtt for rtt in rtts if rtt is not None)
    stats = {"min": came[0], "p50": came[len(came) // 2], "max": came[-1]} if came else {}
    if json:
        out_json(
            {"sent": len(rtts), "lost": len(rtts) - len(came), "path": path}
            | {f"{name}_s": stats.get(name) for name in ("min", "p50", "max")}
        )
    else:
        times = [f"{name} {rtt * 1000:.2f} ms" for name, rtt in stats.items()]
        said = (f"{len(rtts)} sent", f"{len(rtts) - len(came)} lost", *times, path)
        note(", ".join(filter(None, said)))
    if not came:
        raise SystemExit(EXIT_UNREACHABLE)


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
    script: Annotated[
        bool,
        typer.Option(
            "--script",
            help="Print a command for a fresh machine instead: it installs wetware, joins, and "
            "runs the node as a service.",
        ),
    ] = False,
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="SOURCE",
            help="With --script: what pip is to install there, e.g. a wheel or git+https://…; "
            "needed where this wetware is from a directory or an index.",
        ),
    ] = "",
    tickets: Annotated[bool, typer.Option("--list", help="List the node's tickets.")] = False,
    revoke: Annotated[
        str | None, typer.Option("--revoke", metavar="ID", help="Take a ticket back.")
    ] = None,
    json: Json = False,
) -> None:
    """Let a node join: print a ticket for `ww node --join TICKET`."""
    if sum((peer is not None, script, tickets, revoke is not None)) > 1:
        usage("choose one of --peer, --script, --list and --revoke")
    if source and not script:
        usage("--from needs --script")
    if foreign and peer is None:
        usage("--foreign needs --peer PEER_ID")
    if tickets:
        _list_tickets(json)
    elif revoke is not None:
        run_client(lambda session: session.cluster.revoke_ticket(revoke))
        done(json, {"revoked": revoke}, f"ticket {revoke} lets nobody in any more")
    elif peer is not None:
        _certify(peer, foreign, parse_labels(label), inviter, json)
    else:
        install = (source or _installed_from()) if script else ""
        _invite(parse_labels(label), inviter, expires, uses, install, json)


def _installed_from() -> str:
    from wetware.cli.service import installed_from

    if (source := installed_from()) is None:
        usage(
            "--script needs --from: what another machine can install is not known here, and the "
            "package index may have something else as wetware",
            "--from git+https://…, or the path of a wheel on that machine",
        )
    return source


def _invite(
    labels: dict[str, str], inviter: bool, expires: str, uses: int, source: str, json: bool
) -> None:
    from wetware.broker.values import parse_duration
    from wetware.cli.service import script

    expires_s = int(parse_duration(expires)) if expires else 0
    rights = ("member", "invite") if inviter else ("member",)
    ticket, ticket_id, not_after_ms = run_client(
        lambda session: session.cluster.invite(
            labels=labels, rights=rights, expires_s=expires_s, uses=uses
        )
    )
    _warn_of_loopback("the ticket", ticket)
    data = {"ticket": ticket, "id": ticket_id, "not_after_ms": not_after_ms, "uses": uses}
    how, said = "on the new machine:  ww node --join TICKET", ticket
    if source:
        how = "paste it on the new machine, as root or as a user; or pipe it to `ssh HOST sh`"
        said = data["script"] = script(ticket, source)
    if json:
        return out_json(data)
    until = stamp(not_after_ms / 1000)
    who = "one node" if uses == 1 else f"{uses} nodes"
    out(said)
    note(f"lets {who} in until {until}; whoever has it can join, so pass it on as a secret")
    note(how)
    if source == "wetware":  # with root's rights, and nobody has to own that name
        note("it installs what that machine's package index has as wetware: see that it is this")
        note("project's, or name the source:  --from git+https://…, or a wheel that is there")
    note(f"to take it back:     ww invite --revoke {ticket_id}")


def _certify(peer: str, foreign: bool, labels: dict[str, str], inviter: bool, json: bool) -> None:
    rights = ("member", "invite") if inviter else ("member",)
    bundle = run_client(
        lambda session: session.cluster.certify(peer, labels=labels, rights=rights, foreign=foreign)
    )
    if not foreign:
        _warn_of_loopback("the certificate", bundle)
    if json:
        return out_json({"certificate": bundle, "peer_id": peer, "foreign": foreign})
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
        return out_json(tickets)
    table(
        ("id", "state", "uses left", "until", "spent by"),
        [
            (
                t.id,
                _ticket_state(t),
                str(t.uses_left),
                stamp(t.not_after_ms / 1000),
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


LOST: Final = (
    "What no other member has is lost to the cluster; --hand-over gives it to others first. "
)
"""Before the question whether a membership is to end."""
TOLD_S: Final = 1.0
"""Between two lines that say how far a node is with handing over."""
HandOver = Annotated[
    bool,
    typer.Option(
        "--hand-over",
        help="First it gives other members what only it has; where that fails it stays.",
    ),
]


async def handed_over(session: Session) -> None:
    """Have the session's node give other members what it alone has, and show how far that is."""
    next_s, last = 0.0, ""

    def tell(text: str) -> None:
        nonlocal next_s, last
        if text != last and time.monotonic() >= next_s:
            note(text)
            next_s, last = time.monotonic() + TOLD_S, text

    await session.hand_over(tell)


@contextlib.contextmanager
def staying(who: str) -> Iterator[None]:
    """Say of what fails that the node has not gone for it."""
    try:
        yield
    except WetwareError as exc:
        stays = f"{who} stays a member; without --hand-over it goes, and what only it has is lost"
        exc.hint = f"{exc.hint}; {stays}" if exc.hint else stays
        raise


def evict_command(
    node: Annotated[str, typer.Argument(metavar="NODE", help="A name, a host or a peer ID.")],
    hand_over: HandOver = False,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="For the record.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """End a node's membership, everywhere and for good: its key will not be let in again.

    At once, as a stolen machine has to go: what only that node has is lost to the cluster. One that
    can be reached is asked with --hand-over to give that to others first.
    """
    from wetware.identity import PeerId

    async def work(session: Session) -> str:
        peer: str
        try:
            peer = PeerId.parse(node)
        except InvalidArgument:
            peer = (await session.cluster.only(node)).peer_id
        who = peer if peer == node else f"{node} ({peer})"
        lost = "" if hand_over else LOST
        confirm(f"{lost}Evict {who} from the cluster, for good?", yes=yes)
        if hand_over:
            if peer == session.identity.node:
                usage("a node does not evict itself", "run the command against another node")
            with staying(who):
                async with session.node(peer) as there:
                    await handed_over(there)
        await session.cluster.evict(peer, reason)
        return peer

    peer = run_client(work)
    gone = f"{peer} is no member any more; the other nodes hear of it within seconds"
    done(json, {"evicted": peer}, gone)
