"""`ww doctor`: what is wrong with this machine and its node, and what to do about it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Final

import typer

from wetware.cli.app import Json, Style, Styled, here, options, out, out_json, run_client
from wetware.errors import EXIT_FAILED, Denied, DialError, WetwareError

if TYPE_CHECKING:
    from wetware.base.finding import Finding

LEVEL_STYLES: Final[Mapping[str, Style]] = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor_command(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what is fine, too.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Warnings make the exit code 1, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Check this machine and its node, and say what to do; exit code 1 if anything is wrong.

    Works without a running node. With `--node`, that node is checked instead of this machine's.
    """
    import asyncio

    from wetware.cli.machine import check_machine

    with _progress() as progress:
        local = asyncio.run(
            check_machine(
                {"node.data_dir": options.data_dir},
                options.config,
                options.key,
                local=options.node is None,
                progress=progress,
            )
        )
        progress("the node (it asks others, up to 20 s)")
        asked = _node()
    # What the node and this command both see is said once.
    measured = {finding.check for finding in local} & {"disk", "open files"}
    asked = [finding for finding in asked if finding.check not in measured]
    findings = list(dict.fromkeys([*local, *asked]))
    count = {level: sum(f.level == level for f in findings) for level in LEVEL_STYLES}
    bad = count["error"] or (strict and count["warning"])
    if json:
        numbers = {"errors": count["error"], "warnings": count["warning"]}
        out_json({"ok": not bad, **numbers, "findings": findings})
    else:
        _show(findings, count, verbose=verbose)
    if bad:
        raise typer.Exit(EXIT_FAILED)


def _show(findings: list[Finding], count: Mapping[str, int], *, verbose: bool) -> None:
    for finding in sorted(findings, key=lambda f: ("error", "warning", "ok").index(f.level)):
        if finding.level == "ok" and not verbose:
            continue
        text = " ".join(f"  {finding.check}: {finding.text}".split("\n"))
        if finding.remedy:
            text += f"; try: {here(finding.remedy)}"
        padding = " " * (len("warning") - len(finding.level))
        out(Styled(finding.level, LEVEL_STYLES[finding.level]), padding + text)
    words = [
        f"{number} {name}{'s' if number != 1 and name != 'ok' else ''}"
        for name, number in count.items()
        if number or name == "ok"
    ]
    folded = "" if verbose else " (`ww doctor --verbose` lists what is ok)"
    out(", ".join(words) + folded)


def _node() -> list[Finding]:
    """The node's own part; where it cannot be had, why."""
    from wetware.base.finding import error, remedy_of, warning

    try:
        return list(run_client(lambda session: session.cluster.check()))
    except Denied as exc:
        text = f"you may not ask the node to check itself: {exc.message}"
        role = "a role that covers cluster.check (`ww role set ROLE 'cluster=Cluster.check'`)"
        return [warning("node", text, f"an operator gives {role}, or runs `ww doctor`")]
    except DialError as exc:
        if exc.code == "overlay.dial.no_node":
            text = f"{exc.message}, so that its part is left out"
            return [warning("node", text, "`ww node` starts one")]
        return [error("node", exc.message, remedy_of(exc.hint, "ww doctor"))]
    except WetwareError as exc:
        text = f"it could not be asked: {exc.message}"
        return [error("node", text, remedy_of(exc.hint, "ww status"))]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being measured, on stderr: one line that is replaced, on a terminal only."""
    shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def line(text: str) -> None:
        if shown:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    try:
        yield lambda what: line(f"checking {what} …")
    finally:
        line("")
