"""Run as a program: becomes another one that dies with the node.

    python -I -S launch.py PID COMMAND…

PID is the node's, which may be gone already.
"""

import ctypes
import os
import signal
import sys

_SET_PDEATHSIG = 1  # prctl(2)


def main(node: int, command: list[str]) -> None:
    """See the module."""
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == node:
        os.execv(command[0], command)  # noqa: S606  # that is what it is for


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
