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
        code = 130
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    else:
        code = 0
    # Everything is written and closed: that the interpreter frees each module takes 30 ms more.
    os._exit(code)


def _run() -> None:
    from wetware.base import paths
    from wetware.cli.main import build
    from wetware.cli.root import named_option
    from wetware.config import ENV_OTHER

    if not os.access(".", os.X_OK):  # as after `runuser`; Cap'n Proto would abort the process
        os.chdir("/")
    for name in ENV_OTHER:  # an empty one is refused before anything is done
        paths.variable(name)
    paths.settle(named_option(sys.argv[1:], "--data-dir"))
    if "--debug" in sys.argv[1:]:
        from wetware.cli.app import options

        options.take({"debug": True})
    build(sys.argv[1:])(prog_name="ww")
