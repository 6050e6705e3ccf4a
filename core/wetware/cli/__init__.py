"""`ww`: the command line. It talks to nodes through the client library alone."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The console script."""
    try:
        from wetware.cli.app import guarded_main

        guarded_main(_run)
    except KeyboardInterrupt:  # before it could be guarded, or after
        raise SystemExit(130) from None


def _run() -> None:
    from wetware.base import paths
    from wetware.cli.main import build
    from wetware.cli.mount import named_option
    from wetware.config import ENV_OTHER

    if not os.access(".", os.X_OK):  # as after `runuser`; Cap'n Proto would abort the process
        os.chdir("/")
    for name in ENV_OTHER:  # an empty one is refused before anything is done
        paths.variable(name)
    paths.settle(named_option(sys.argv[1:], "--data-dir"))
    if "--debug" in sys.argv[1:]:
        from wetware.cli.app import options

        options.take({"debug": True})
    build()(prog_name="ww")
