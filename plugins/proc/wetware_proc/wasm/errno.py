"""The error numbers of WASI preview 1."""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import Final


class Errno(IntEnum):
    """All of them. What the system gives is translated by its name."""

    (
        SUCCESS, TOOBIG, ACCES, ADDRINUSE, ADDRNOTAVAIL, AFNOSUPPORT, AGAIN, ALREADY, BADF, BADMSG,
        BUSY, CANCELED, CHILD, CONNABORTED, CONNREFUSED, CONNRESET, DEADLK, DESTADDRREQ, DOM,
        DQUOT, EXIST, FAULT, FBIG, HOSTUNREACH, IDRM, ILSEQ, INPROGRESS, INTR, INVAL, IO, ISCONN,
        ISDIR, LOOP, MFILE, MLINK, MSGSIZE, MULTIHOP, NAMETOOLONG, NETDOWN, NETRESET, NETUNREACH,
        NFILE, NOBUFS, NODEV, NOENT, NOEXEC, NOLCK, NOLINK, NOMEM, NOMSG, NOPROTOOPT, NOSPC, NOSYS,
        NOTCONN, NOTDIR, NOTEMPTY, NOTRECOVERABLE, NOTSOCK, NOTSUP, NOTTY, NXIO, OVERFLOW,
        OWNERDEAD, PERM, PIPE, PROTO, PROTONOSUPPORT, PROTOTYPE, RANGE, ROFS, SPIPE, SRCH, STALE,
        TIMEDOUT, TXTBSY, XDEV, NOTCAPABLE,
    ) = range(77)  # fmt: skip

    def error(self) -> WasiError:
        return WasiError(self)


class WasiError(Exception):
    """A call of the guest fails with `number`."""

    def __init__(self, number: Errno) -> None:
        super().__init__(number.name)
        self.number = number


_OF_SYSTEM: Final = {getattr(errno, f"E{each.name}", -1): each for each in Errno} | {
    errno.E2BIG: Errno.TOOBIG,
    errno.EXDEV: Errno.PERM,  # openat2: the path leads out of its directory
}


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
