"""A filter of system calls that a sandbox of namespaces leaves too much to: seccomp(2), cBPF.

What is refused has a part of the kernel that no namespace divides (keyrings, BPF, io_uring), or
serves to get out of one. A call of another architecture than the machine's is refused whole.
"""

from __future__ import annotations

import platform
import struct
from typing import Final

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7  # AUDIT_ARCH_*
_REFUSED: Final = {  # name: number on x86_64, on aarch64
    "add_key": (248, 217),
    "bpf": (321, 280),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "setns": (308, 268),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_MACHINES: Final = {"x86_64": (_X86_64, 0), "aarch64": (_AARCH64, 1)}
_X32 = 0x40000000  # the second table of system calls of x86_64 begins there

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001


def program() -> bytes | None:
    """The filter for this machine; None where its architecture has none here."""
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return None
    arch, column = machine
    numbers = [each[column] for each in _REFUSED.values()]
    count = len(numbers)

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, true, false, value)

    return b"".join(
        (
            step(_LOAD, 4),  # struct seccomp_data: nr, arch
            step(_JUMP_EQUAL, arch, 0, count + 3),
            step(_LOAD, 0),
            step(_JUMP_AT_LEAST, _X32, count + 1),
            *(step(_JUMP_EQUAL, number, count - i) for i, number in enumerate(numbers)),
            step(_RETURN, _ALLOW),
            step(_RETURN, _EPERM),
        )
    )
