"""`ww clock`: whether a node's clock can judge the ends of grants, and how to say that it can."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wetware.cli.app import CLOCK_S_TOLD, Json, note, out, out_json, run_client

if TYPE_CHECKING:
    from wetware.client import Session


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
    return (
        f"it is {abs(offset_s):.1f} s {'behind' if offset_s > 0 else 'ahead of'} the other nodes'"
    )
