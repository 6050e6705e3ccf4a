"""Generates cli.md: python docs/reference/cli.py > docs/reference/cli.md."""

from __future__ import annotations

import re
import sys


def cli_reference() -> str:
    """Every command and option of the core and the bundled plugins, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from wetware.cli.main import build

    command = get_command(build())
    ctx = typer.Context(command, info_name="ww", **command.context_settings)
    text = get_docs_for_click(obj=command, ctx=ctx, name="ww", title="Command line")
    return _EXAMPLES.sub(_console, text).rstrip() + "\n"


_EXAMPLES = re.compile(r"\x08\nExamples:\n((?:  .+\n)+)")


def _console(found: re.Match[str]) -> str:
    lines = [f"$ {line.strip()}" for line in found[1].splitlines()]
    return "\n".join(("**Examples**:", "", "```console", *lines, "```", ""))


if __name__ == "__main__":
    sys.stdout.write(cli_reference())
