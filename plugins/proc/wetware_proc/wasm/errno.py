"""The error numbers of WASI preview 1."""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import Final

_IN_ORDER: Final = (
    "SUCCESS 2BIG ACCES ADDRINUSE ADDRNOTAVAIL AFNOSUPPORT AGAIN ALREADY BADF BADMSG BUSY CANCELED"
    " CHILD CONNABORTED CONNREFUSED CONNRESET DEADLK DESTADDRREQ DOM DQUOT EXIST FAULT FBIG"
    " HOSTUNREACH IDRM ILSEQ INPROGRESS INTR INVAL IO ISCONN ISDIR LOOP MFILE MLINK MSGSIZE"
    " MULTIHOP NAMETOOLONG NETDOWN NETRESET NETUNREACH NFILE NOBUFS NODEV NOENT NOEXEC NOLCK NOLINK"
    " NOMEM NOMSG NOPROTOOPT NOSPC NOSYS NOTCONN NOTDIR NOTEMPTY NOTRECOVERABLE NOTSOCK NOTSUP"
    " NOTTY NXIO OVERFLOW OWNERDEAD PERM PIPE PROTO PROTONOSUPPORT PROTOTYPE RANGE ROFS SPIPE SRCH"
    " STALE TIMEDOUT TXTBSY XDEV NOTCAPABLE"
)


class Errno(IntEnum):
    """Those that the host itself gives; the system's own are translated."""

    SUCCESS = 0
    TOOBIG = 1
    ACCES = 2
    AGAIN = 6
    BADF = 8
    DQUOT = 19
    FAULT = 21
    FBIG = 22
    ILSEQ = 25
    INVAL = 28
    IO = 29
    ISDIR = 31
    MFILE = 33
    NAMETOOLONG = 37
    NOENT = 44
    NOMEM = 48
    NOSYS = 52
    NOTDIR = 54
    NOTSOCK = 57
    PERM = 63
    PIPE = 64
    ROFS = 69
    SPIPE = 70
    NOTCAPABLE = 76

    def error(self) -> WasiError:
        return WasiError(self)


class WasiError(Exception):
    """A call of the guest fails with `number`."""

    def __init__(self, number: Errno) -> None:
        super().__init__(number.name)
        self.number = number


_OF_SYSTEM: Final = {
    getattr(errno, f"E{name}"): number
    for number, name in enumerate(_IN_ORDER.split())
    if hasattr(errno, f"E{name}")
} | {errno.EXDEV: Errno.PERM}  # openat2: the path leads out of its directory


def need(condition: object, number: Errno) -> None:
    """Raise WasiError where the condition is not met."""
    if not condition:
        raise WasiError(number)


def errno_of(exc: BaseException) -> int | None:
    """What a guest is told of an exception; None for a defect, which is not the guest's."""
    if isinstance(exc, WasiError):
        return exc.number
    if isinstance(exc, BrokenPipeError):  # made in Python, often, and then without its number
        return Errno.PIPE
    if isinstance(exc, OSError):
        return _OF_SYSTEM.get(exc.errno or 0, Errno.IO)
    if isinstance(exc, UnicodeDecodeError):
        return Errno.ILSEQ
    if isinstance(exc, (OverflowError, struct.error)):  # a number that the system has no place for
        return Errno.INVAL
    if isinstance(exc, MemoryError):
        return Errno.NOMEM
    return None
