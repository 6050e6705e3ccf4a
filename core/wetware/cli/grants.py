"""`ww share`, `use`, `grants`, `revoke`, `why`: capabilities from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from wetware.cli.app import (
    Json,
    Style,
    Styled,
    confirm,
    done,
    node_data_dir,
    note,
    options,
    out,
    out_json,
    pairs,
    run_client,
    stamp,
    table,
    usage,
    warn_of_loopback,
)
from wetware.cli.given import read_line

if TYPE_CHECKING:
    from wetware.client import Explanation, GrantInfo, Session

DEFAULT_EXPIRES = "24h"
_GRANT_STYLES: Final[dict[str, Style]] = {
    "live": "green",
    "suspended": "yellow",
    "closed": "dim",
    "ended": "red",
}
_VERDICTS: Final[dict[str, Style]] = {"allows": "green", "denies": "red", "-": "dim"}


# --- share and use --------------------------------------------------------------------------------


def share_command(
    what: Annotated[
        str,
        typer.Argument(metavar="SERVICE[:NAME]", help="e.g. pubsub, pubsub:chat, 'pubsub:chat/*'."),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="M,M…", help="e.g. Topic.publish or 'Topic.*'; all of yours if left out."
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PARAM=VALUE",
            help="A constraint, e.g. topic=glob:chat/* or data=max:1024; repeatable.",
        ),
    ] = None,
    expires: Annotated[
        str, typer.Option(metavar="TIME", help="90s, 15m, 12h, 7d, or never.")
    ] = DEFAULT_EXPIRES,
    uses: Annotated[
        int, typer.Option(min=0, metavar="N", help="How often it may be redeemed; 0: no limit.")
    ] = 0,
    rate: Annotated[str, typer.Option(metavar="N/s", help="e.g. 10/s, 100/m:20.")] = "",
    calls: Annotated[int, typer.Option(min=0, metavar="N", help="Calls in all; 0: no limit.")] = 0,
    bytes_: Annotated[
        str, typer.Option("--bytes", metavar="SIZE", help="Bytes in all, e.g. 10M.")
    ] = "",
    label: Annotated[str, typer.Option(metavar="TEXT", help="What it is for.")] = "",
    no_delegate: Annotated[
        bool, typer.Option("--no-delegate", help="It cannot be shared further.")
    ] = False,
    json: Json = False,
) -> None:
    """Print a reference ww1…: whoever has it can do this, without an account. It is a secret."""
    from wetware.broker.sturdy import SturdyRef, is_ref
    from wetware.broker.values import parse_duration, parse_size

    service, colon, name = what.partition(":")
    if not service or (colon and not name):
        usage(f"{what!r} is not SERVICE or SERVICE:NAME", "ww share pubsub:chat")
    expires_s = 0.0 if expires == "never" else parse_duration(expires)
    nbytes = parse_size(bytes_) if bytes_ else 0
    asked = [m.strip() for m in (methods or "").split(",") if m.strip()]
    if methods is not None and not asked:  # such as an unset variable of a shell leaves
        usage("--methods names none", "leave it out for all of yours")

    ref, grant = run_client(
        lambda session: session.share(
            {what: asked},
            where or (),
            expires_s=expires_s,
            uses=uses,
            rate=rate,
            calls=calls,
            nbytes=nbytes,
            sealed=no_delegate,
            label=label or what,
        )
    )
    warn_of_loopback("the reference", SturdyRef.parse(ref).addrs)
    if json:
        return out_json({"ref": ref, "grant": grant})
    out(ref)
    note(f"it allows: {'; '.join(grant.terms)}")
    command = "pub …" if service == "pubsub" else "COMMAND …"
    # Each command redeems anew, and a holder sees and ends what came from one redemption alone.
    who = "who gave you REF can: " if options.node and is_ref(options.node) else ""
    note(f"use it: ww use REF {command}   end it: {who}ww revoke {grant.id}")


def use_command(
    ctx: typer.Context,
    ref: Annotated[str, typer.Argument(metavar="REF", help="ww1…, or - to read it from stdin.")],
    json: Json = False,
) -> None:
    """Say what a reference allows; or with COMMAND … run that command with it.

    For example `ww use ww1… pub chat hello`, `ww use ww1… sub chat`, `ww use ww1… share pubsub`.
    Where others can see your command lines, use `-` and give the reference on stdin.
    """
    import asyncio

    from wetware.broker.sturdy import SturdyRef
    from wetware.client import describe

    if ref == "-":
        ref = read_line("a reference")
    parsed = SturdyRef.parse(ref)  # before anything else says something about it
    if ctx.args:
        options.take({"node": ref})  # instead of what was given, or is in the context
        root = ctx.find_root()
        root.command.main(args=list(ctx.args), prog_name=root.info_name)
        return
    grant = asyncio.run(describe(ref, key=options.key, data_dir=node_data_dir()))
    if json:
        return out_json({"node": parsed.peer, "grant": grant})
    left = {"uses": grant.uses_left, "calls": grant.calls_left, "bytes": grant.bytes_left}
    pairs(
        ("issued by", parsed.peer),
        ("grant", f"{grant.id}  {grant.label}  of {grant.principal}"),
        ("state", Styled(grant.state, _GRANT_STYLES.get(grant.state))),
        *(("allows", line) for line in grant.terms),
        *((f"{what} left", str(count)) for what, count in left.items() if count is not None),
    )
    note("nothing was spent; try `ww use REF services`, `ww use REF COMMAND …`")


# --- grants and revoke ----------------------------------------------------------------------------


def grants_command(
    all_: Annotated[
        bool, typer.Option("--all", help="Everybody's, on this node; for operators.")
    ] = False,
    principal: Annotated[
        str, typer.Option(metavar="PRINCIPAL", help="With --all: only of this one.")
    ] = "",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Let shares work again that a restart suspended, because the disk may not have "
            "the end of some; for operators.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what you passed on, as a tree: who, what, until when, and what is left."""
    if resume:
        shares: int = run_client(lambda session: session.grants_service.resume())
        return done(json, {"shares": shares}, f"no share is suspended: {shares} of this node work")
    grants: Sequence[GrantInfo] = run_client(
        lambda session: session.grants_service.list(principal) if all_ else session.grants()
    )
    if json:
        return out_json(grants)
    header = ("grant", "state", "principal", "terms", "left", "until")
    rows = [
        (
            f"{'  ' * depth}{grant.id}  {grant.label}",
            grant.state,
            _short(grant.principal),
            "; ".join(line for line in grant.terms if not line.startswith("until")) or "-",
            _left(grant),
            "-" if grant.expires_at is None else stamp(grant.expires_at),
        )
        for depth, grant in _tree(grants)
    ]
    table(header, rows, styles={"state": _GRANT_STYLES})
    if not rows:
        note("nothing was passed on; `ww share SERVICE` does that")


def _tree(grants: Sequence[GrantInfo]) -> list[tuple[int, GrantInfo]]:
    """(depth, grant), each below the first of its parents that is there."""
    there = {grant.id for grant in grants}
    children: dict[str, list[GrantInfo]] = {}
    for grant in sorted(grants, key=lambda grant: grant.created):
        parent = next((p for p in grant.parents if p in there), "")
        children.setdefault(parent, []).append(grant)
    found: list[tuple[int, GrantInfo]] = []
    todo = [(0, grant) for grant in reversed(children.get("", []))]
    while todo:
        depth, grant = todo.pop()
        found.append((depth, grant))
        todo += [(depth + 1, child) for child in reversed(children.get(grant.id, []))]
    return found


def _short(principal: str) -> str:
    backend, _, subject = principal.partition(":")
    return principal if len(subject) <= 16 else f"{backend}:{subject[:8]}…{subject[-6:]}"


def _left(grant: GrantInfo) -> str:
    parts = {
        "uses": grant.uses_left,
        "calls": grant.calls_left,
        "bytes": grant.bytes_left,
        "running": grant.calls_in_flight or None,
    }
    said = [f"{count} {what}" for what, count in parts.items() if count is not None]
    if grant.kind == "share" and grant.uses_left is None:
        said.insert(0, f"used {grant.redeemed}×")
    return ", ".join(said) or "-"


def revoke_command(
    grant: Annotated[
        str, typer.Argument(metavar="[ID]", help="16 hex digits, from `ww grants`.")
    ] = "",
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Its holders are told.")] = "",
    all_: Annotated[
        bool, typer.Option("--all", help="Also a grant of somebody else; for operators.")
    ] = False,
    sessions: Annotated[
        str,
        typer.Option(
            "--sessions",
            metavar="PRINCIPAL",
            help="End all sessions and shares of a principal, or of everybody (*), at the "
            "node that is asked and no other; for operators.",
        ),
    ] = "",
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask before everybody's are ended.")
    ] = False,
    json: Json = False,
) -> None:
    """End a grant and all that comes from it, now, wherever it is held."""
    if bool(grant) == bool(sessions):
        usage("name a grant, or --sessions PRINCIPAL", "`ww grants` shows them")

    if sessions == "*":
        confirm("End all sessions and shares of everybody at this node?", yes=yes)

    async def work(session: Session) -> tuple[int, str]:
        if sessions:
            who = "" if sessions == "*" else sessions
            cut = await session.grants_service.end_sessions(who, reason)
        else:
            cut = await (session.grants_service if all_ else session).revoke(grant, reason)
        return cut, session.identity.node

    cut, node = run_client(work)
    if json:
        return out_json({"ended": cut, "node": node})
    if cut:
        out(f"ended {cut} grant{'s' * (cut != 1)}")
    else:
        out("there was none" if sessions else "it had ended before")
    if sessions:
        note(f"at {node} only: every node has sessions and shares of its own (ww --node ADDRESS …)")


# --- why ------------------------------------------------------------------------------------------


def why_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[DECISION | SERVICE.METHOD]",
            help="The ID that a denial names (d-…), or a method, e.g. pubsub.join.",
        ),
    ] = "",
    args: Annotated[
        list[str] | None, typer.Argument(metavar="[PARAM=VALUE]…", help="Its arguments.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Also a denial of somebody else; for operators.")
    ] = False,
    json: Json = False,
) -> None:
    """Say which grant, constraint or role decided a denial, or would decide a call.

    With a reference, and no node here: `ww use REF why d-…`.
    """
    values = {}
    for text in args or ():
        param, equals, value = text.partition("=")
        if not (param and equals):
            usage(f"{text!r} is not PARAM=VALUE", "ww why pubsub.join topic=chat")
        values[param] = value

    async def work(session: Session) -> Explanation:
        if what and not what.startswith("d-"):
            service, dot, method = what.partition(".")
            if not dot:
                usage(f"{what!r} is neither d-… nor SERVICE.METHOD", "ww why pubsub.join")
            return await session.explain(service, method, **values)
        source = session.grants_service if all_ else session
        explained: Explanation = await source.why(what)
        return explained

    found = run_client(work)
    if json:
        return out_json(found)
    word = "allowed" if found.allowed else "denied"
    style: Style = "green" if found.allowed else "red"
    tense = "" if found.decision else "would be "
    out(tense, Styled(word, style), f"  {found.method}")
    out(f"by {found.principal}: {found.reason}")
    if found.decision:
        out(f"{found.decision} at {stamp(found.at)}{f', {found.code}' if found.code else ''}")
    rows = [(s.verdict, f"{s.grant}  {s.label}", s.detail) for s in found.steps]
    table(("verdict", "grant", "what it says"), rows, styles={"verdict": _VERDICTS})
