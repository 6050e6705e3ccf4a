"""Load one schema in a process of its own, as the node does: a bad file aborts the process.

Run as `python -I _check.py SYS_PATH FILE`. Exit status 0 means that the node may load the file too,
and sees for itself what it does not like about it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

CPU_S_MAX = 10
MEMORY_BYTES_MAX = 2 << 30


def main(path_of_modules: str, file: str) -> None:
    """Reflect on all that the node would; a nonzero status or an abort means that it is bad."""
    sys.path[:] = path_of_modules.split(os.pathsep)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an expected abort leaves no core file
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX, CPU_S_MAX))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    from wetware.errors import WetwareError
    from wetware.rpc.schema import parse

    with contextlib.suppress(WetwareError):
        parse(Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
