"""Generates docs/reference/cli.md: python -m wetware.cli.reference > docs/reference/cli.md."""

from __future__ import annotations

import sys


def cli_reference() -> str:
    """Every command and option of the core and the bundled plugins, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from wetware.cli.main import build

    command = get_command(build())
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command, info_name="ww"), name="ww", title="Command line"
    )
    return text.rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(cli_reference())
