"""What dies with the process that started it.

Run as a program it becomes another one that does, for who cannot have that in their own code:

    python -I -S launch.py PID COMMAND…

PID is the parent's, which may be gone already.
"""

import ctypes
import os
import signal
import sys

_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(parent: int = 0) -> bool:
    """Have this process killed when the thread that started it ends, however it does. Linux only.

    Returns whether `parent`, an ID, is still the parent: it may have ended before.
    """
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


if __name__ == "__main__" and end_with_parent(int(sys.argv[1])):
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606  # that is what it is for
