"""Whether a NAT of the lab does what its kind says: tried before anything rests on it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from dataclasses import dataclass

from .lab import Lab

ANSWER_S = 2.5
"""What is not answered by then, TCP's first repetition included, was dropped."""
OTHERS = ("probe 1", "probe 2", "probe 3")


@dataclass(frozen=True, kw_only=True)
class Nat:
    """What lies between a machine and the internet, as others can tell.

    Attributes:
        translated: They see another address than its own.
        one_port: All of them see the same port, for connections from one port.
        lets_in_known: To this port, who was connected to may come from another port of its own.
        lets_in_all: So may who was never connected to.
    """

    translated: bool
    one_port: bool
    lets_in_known: bool
    lets_in_all: bool


KINDS = {
    "open": Nat(translated=False, one_port=True, lets_in_known=True, lets_in_all=True),
    "full-cone": Nat(translated=True, one_port=True, lets_in_known=True, lets_in_all=True),
    "port-restricted": Nat(translated=True, one_port=True, lets_in_known=False, lets_in_all=False),
    "symmetric": Nat(translated=True, one_port=False, lets_in_known=False, lets_in_all=False),
}


def prove(lab: Lab, name: str) -> None:
    """AssertionError unless what lies before a machine does what its kind says."""
    kind, found = lab.hosts[name].network.kind, probe(lab, name)
    assert found == KINDS[kind], f"{kind}: {found}"


def probe(lab: Lab, name: str) -> Nat:
    """What lies between a machine and the internet, for TCP, by three machines there.

    Two are connected to from one port and see from where. Then the first, from another port, and
    the third, which nobody knows, try to come in there.
    """
    for other in OTHERS:
        if other not in lab.hosts:
            lab.host(other)
    with contextlib.ExitStack() as stack:

        def opened(where: str, port: int = 0) -> socket.socket:
            with lab.inside(where):
                sock = stack.enter_context(socket.socket())
            sock.settimeout(ANSWER_S)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("", port))
            return sock

        waiting = opened(name)
        waiting.listen()
        seen = []
        for other in OTHERS[:2]:
            there, here = opened(other), opened(name, waiting.getsockname()[1])
            there.listen()
            here.connect((lab.hosts[other].address, there.getsockname()[1]))
            accepted, address = there.accept()
            stack.enter_context(accepted)
            seen.append(address)
        known, stranger = callers = opened(OTHERS[0]), opened(OTHERS[2])
        let_in = []
        with selectors.DefaultSelector() as dialling:
            for caller in callers:
                caller.setblocking(False)
                caller.connect_ex(seen[0])
                dialling.register(caller, selectors.EVENT_WRITE)
            deadline = time.monotonic() + ANSWER_S
            while dialling.get_map() and (left_s := deadline - time.monotonic()) > 0:
                for key, _ in dialling.select(left_s):
                    dialling.unregister(key.fileobj)
                    if not key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        let_in.append(key.fileobj)
        return Nat(
            translated=seen[0][0] != lab.hosts[name].address,
            one_port=seen[0] == seen[1],
            lets_in_known=known in let_in,
            lets_in_all=stranger in let_in,
        )
