"""`ww`: the command line. It talks to nodes through the client library alone."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    from wetware.cli.app import guarded_main

    guarded_main(_run)


def _run() -> None:
    from wetware.cli.main import build

    if "--debug" in sys.argv[1:]:
        from wetware.cli.app import options

        options.debug = True
    build()(prog_name="ww")
