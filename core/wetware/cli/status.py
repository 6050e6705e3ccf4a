"""`ww status` and `ww clock`: what a node is doing, and whether its clock can be relied on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from wetware.cli.app import Json, note, options, out, out_json, pairs, run_client, table

if TYPE_CHECKING:
    from wetware.client import Session

CLOCK_S_TOLD: Final = 1.0
"""A clock that is off by more is told of; less is no trouble to anybody."""


def status_command(
    all_: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also peers that are no members, and why something failed; for operators.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what a node is doing."""
    from wetware.base.finding import size, span
    from wetware.broker.sturdy import is_ref
    from wetware.client import is_address

    status = run_client(lambda session: session.status(details=all_))
    if json:
        return out_json(status)
    node = options.node or ""
    # Over the network the command itself is one of them.
    strangers = status["strangers"] - (is_address(node) or is_ref(node))
    overlay = status["overlay_state"]
    if status["overlay_restarts"]:
        last = f", last: {status['overlay_error']}" if status["overlay_error"] else ""
        overlay += f" ({status['overlay_restarts']} restarts{last})"
    pairs(
        ("node", status["peer_id"]),
        ("cluster", status["cluster"]),
        ("version", status["version"]),
        ("up", span(status["uptime_s"])),
        ("memory", size(status["memory_bytes"])),
        ("auth", f"{status['auth']}, policy version {status['policy_epoch']}"),
        *([("and also", ", ".join(status["auth_also"]))] if status["auth_also"] else []),
        ("sessions", str(status["sessions"])),
        ("services", ", ".join(status["services"])),
        ("overlay", overlay),
        ("listens", "\n          ".join(status["addrs"])),
        *([("internet", status["reached"])] if status["reached"] else []),
    )
    offset_s, wrong = status["clock_offset_s"], status["clock_wrong"]
    if offset_s is not None and abs(offset_s) >= CLOCK_S_TOLD:
        out(f"clock     {_compared(offset_s)}; try: ww doctor")
    if wrong:
        out(f"ends      of grants cannot be judged: {wrong}; try: ww clock")
    out()
    rows = [
        (
            peer["peer_id"][-8:],
            "yes" if peer["member"] else "no",
            f"via {peer['via']}" if peer["via"] else "direct",
            peer["addr"],
            size(peer["bytes_in"]),
            size(peer["bytes_out"]),
        )
        for peer in status["peers"]
    ]
    if rows:
        table(("peer", "member", "path", "address", "in", "out"), rows)
    else:
        out("no peers are connected")
    if strangers and not all_:
        note(f"{strangers} connected that are no members; `ww status --all` shows them")
    for plugin in status["plugins"]:
        if plugin["state"] in ("failed", "unavailable"):
            why = plugin["reason"] or "`ww status --all` says why"
            note(f"plugin {plugin['name']} is {plugin['state']}: {why}")


def clock_command(
    right: Annotated[
        bool,
        typer.Option(
            "--right",
            help="The machine's clock is right now, and what it said before was a glitch: judge "
            "grants by it again. Look at it first.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show whether the node's clock can be relied on; after a glitch, say that it is right again.

    A node judges the ends of grants by a clock that never goes back. So after a glitch into the
    future it refuses grants with an end, though the machine's clock is right again. `--right` takes
    the machine's clock as it is now. What was granted in the glitch ends later by as much: `ww
    grants` shows it, `ww revoke` ends it.
    """

    async def work(session: Session) -> dict[str, Any]:
        if right:
            await session.trust_clock()
        status = await session.status()
        return {name: status[name] for name in ("time_s", "clock_offset_s", "clock_wrong")}

    clock = run_client(work)
    if json:
        return out_json(clock)
    offset_s, wrong = clock["clock_offset_s"], clock["clock_wrong"]
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(clock["time_s"]))
    out(f"clock    {stamp} UTC, of the node's machine")
    out(f"others   {_compared(offset_s)}")
    out(f"grants   with an end are refused: {wrong}" if wrong else "grants   with an end work")
    if wrong:
        note("set the machine's clock; if it is right: ww clock --right")


def _compared(offset_s: float | None) -> str:
    """The clock beside the median of the other members'."""
    if offset_s is None:
        return "no other node to compare it with"
    if abs(offset_s) < CLOCK_S_TOLD:
        return "the other nodes' clocks agree with it"
    side = "behind" if offset_s > 0 else "ahead of"
    return f"it is {abs(offset_s):.1f} s {side} the other nodes'"
