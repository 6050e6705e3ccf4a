"""Errors on the wire: code, message and hint, and nothing else.

pycapnp sends the text that `traceback.format_exception` makes of a servant's exception, file paths
included. `WireError` has no traceback to format, so its text is all that leaves the process.
"""

from __future__ import annotations

import secrets
from typing import Any, Final

from wetware.base.log import get_logger
from wetware.errors import (
    Disconnected,
    InternalError,
    LimitExceeded,
    Unsupported,
    WetwareError,
    from_wire,
)

log = get_logger("rpc")

MESSAGE_CHARS_MAX: Final = 2_000
"""Of a message or a hint, sent or received. An error must fit every log line and message limit."""
CODE_CHARS_MAX: Final = 100

_MARK: Final = "ww/1: "
_SEPARATOR: Final = "\x1f"


class WireError(Exception):
    """What a dispatch raises into pycapnp."""

    # What pycapnp formats: `<qualname>: <text>`, without frames.
    __traceback__ = property(lambda _self: None, lambda _self, _tb: None)  # hides BaseException's


WireError.__module__ = "builtins"
WireError.__qualname__ = _MARK[:-2]


def to_wire(error: WetwareError) -> WireError:
    """The exception whose text carries `error`."""
    parts = (error.code[:CODE_CHARS_MAX], _cut(error.message), _cut(error.hint))
    return WireError(_SEPARATOR.join(part.replace(_SEPARATOR, " ") for part in parts))


def _cut(text: str) -> str:
    # A lone surrogate or a NUL would make pycapnp fail half way through the message.
    text = text[:MESSAGE_CHARS_MAX].replace("\0", " ")
    return text.encode("utf-8", "replace").decode()


def fresh(error: WetwareError) -> WetwareError:
    """A copy to raise: one instance raised again and again would collect tracebacks."""
    return from_wire(error.code, error.message, error.hint)


def internal_error(where: str, exc: BaseException) -> InternalError:
    """Log a defect with its traceback; return the error that names the log entry, for the peer."""
    reference = secrets.token_hex(4)
    log.error("rpc.defect", id=reference, method=where, exc_info=exc)
    return InternalError(
        f"{where} failed: internal error {reference}",
        hint="the log of the other side has the details under this id",
    )


def from_kj(exc: Any, where: str) -> WetwareError:
    """The error for a failed call: `exc` is pycapnp's KjException, or what it raised instead."""
    kind = getattr(exc, "type", None)
    text = getattr(exc, "description", None)
    text = text if isinstance(text, str) else str(exc)
    head, mark, payload = text.partition(_MARK)
    if mark and "\n" not in head:
        code, _, rest = payload.rstrip("\n").partition(_SEPARATOR)
        message, _, hint = rest.partition(_SEPARATOR)
        return from_wire(
            code[:CODE_CHARS_MAX], message[:MESSAGE_CHARS_MAX], hint[:MESSAGE_CHARS_MAX]
        )
    if kind == "DISCONNECTED":
        return Disconnected(
            f"{where}: the connection ended; the call may or may not have run",
            hint="connect again",
        )
    if kind == "UNIMPLEMENTED":
        return Unsupported(
            f"{where}: the peer's capability has no such method",
            hint="the peer may run another version",
        )
    if kind == "OVERLOADED":
        return LimitExceeded(f"{where}: the peer is overloaded")
    log.debug("rpc.foreign_error", method=where, error=text[:MESSAGE_CHARS_MAX])
    return InternalError(f"{where} failed at the peer, which gave no reason that can be shown")
