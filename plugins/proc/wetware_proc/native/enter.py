"""Run as a program: makes TCP sockets in the network of a sandbox, for the node that started it.

    python -I -S enter.py PID UID FD

It becomes user UID (-1: it stays who it is), enters the user and network namespaces of the process
PID, says "." on the socket FD, and then answers each byte that comes with a socket, until it ends.
A program of its own, because entering a user namespace needs a process of one thread.
"""

import array
import ctypes
import fcntl
import os
import socket
import sys

_NS_GET_USERNS = 0xB701  # ioctl_ns(2)
_NEWUSER, _NEWNET = 0x10000000, 0x40000000  # sched.h


def main(pid: int, uid: int, fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket(fileno=fd) as node:
        if uid >= 0:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        owner = fcntl.ioctl(network, _NS_GET_USERNS)  # of the network, and not the one inside it
        for namespace, kind in ((owner, _NEWUSER), (network, _NEWNET)):
            if libc.setns(namespace, kind) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        node.send(b".")
        while node.recv(1):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
                rights = array.array("i", [made.fileno()])
                node.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
