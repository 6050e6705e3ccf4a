"""Ports of loopback for what is to listen on a number that is known before."""

from __future__ import annotations

import secrets
import socket


def free_port() -> int:
    """A port that nobody has, and that no connection is given before it is used, or used again.

    It is below those that kernels give to connections: with one of these a node that comes back on
    its port fails now and then, as the connection of another test has it.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
