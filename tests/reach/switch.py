"""A switch that delays: every frame leaves SECONDS after it came. `python switch.py SECONDS`.

It joins all interfaces of its network namespace, also those that come later, and prints a line
when it is up. In Python because the kernel's own means, netem, is not in every kernel.
"""

import contextlib
import select
import socket
import sys
import time
from collections import deque

SOL_PACKET, PACKET_VNET_HDR, ETH_P_ALL = 263, 15, 3
HEADER_BYTES = 10
"""Of virtio, before each frame: what of checksums and segments the sender left to its hardware."""
FRAME_BYTES_MAX = 1 << 17
FRAMES_MAX = 20_000
"""On their way; more are lost, as in a queue that is full."""


def switch(delay_s: float) -> None:
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    print("up", flush=True)  # noqa: T201  # to who started it
    ports: dict[bytes, str] = {}
    waiting: deque[tuple[float, bytes, str]] = deque()
    while True:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        if select.select([wire], [], [], left_s)[0]:
            frame, (port, _, kind, *_) = wire.recvfrom(FRAME_BYTES_MAX)
            # What this socket sent comes back as outgoing.
            if kind != socket.PACKET_OUTGOING and len(waiting) < FRAMES_MAX:
                ports[_mac(frame, 6)] = port
                waiting.append((time.monotonic() + delay_s, frame, port))
        while waiting and waiting[0][0] <= time.monotonic():
            _, frame, port = waiting.popleft()
            to = _mac(frame, 0)
            if to.startswith(b"\x01\x00\x5e"):
                continue  # multicast ends at the first router on the internet
            known = ports.get(to)
            for name in [known] if known else [name for _, name in socket.if_nameindex()]:
                if name not in (port, "lo"):
                    with contextlib.suppress(OSError):  # its cable was pulled
                        wire.sendto(frame, (name, 0))


def _mac(frame: bytes, at: int) -> bytes:
    return frame[HEADER_BYTES + at : HEADER_BYTES + at + 6]


if __name__ == "__main__":
    switch(float(sys.argv[1]))
