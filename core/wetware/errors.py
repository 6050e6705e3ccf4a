"""One error tree for the whole system.

Every error has a `code` (stable, dotted, machine-readable), a `message` (one sentence: what and
why) and a `hint` (the next step, or ""). The three travel over RPC as they are; a traceback or a
path never does. `from_wire` turns what a peer sent back into the same class.
"""

from __future__ import annotations

from typing import ClassVar

_BY_CODE: dict[str, type[WetwareError]] = {}

# Exit codes of the command line (sysexits.h where one fits).
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
EXIT_UNREACHABLE, EXIT_BUSY, EXIT_DENIED, EXIT_CONFIG = 69, 75, 77, 78
EXIT_PIPE = 141  # as a shell says of a program that SIGPIPE ended

LOG_IN_AGAIN = "log in again"
"""The hint where a session is over."""


class WetwareError(Exception):
    """Base of all errors that wetware raises on purpose.

    Args:
        message: One sentence that says what failed and why.
        hint: The next step for the reader; "" when there is none.
        code: Overrides the class's code with a more specific one under the same prefix.
    """

    code: str = "error"
    exit_code: ClassVar[int] = EXIT_FAILED

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" in cls.__dict__:
            _BY_CODE.setdefault(cls.code, cls)

    def __str__(self) -> str:
        return self.message


class InternalError(WetwareError):
    """A defect on the other side; its log has the details under the id in the message."""

    code = "internal"


class Unsupported(WetwareError):
    """The peer does not know this method, protocol or version."""

    code = "unsupported"


class InvalidArgument(WetwareError):
    """An argument is malformed or out of range."""

    code = "invalid"
    exit_code = EXIT_USAGE


class NotFound(WetwareError):
    """What was named does not exist."""

    code = "not_found"


class LimitExceeded(WetwareError):
    """A named limit was reached; the message names it and its value."""

    code = "limit"


class Unrecorded(WetwareError):
    """What has to be on record first cannot be recorded, so it is refused."""

    code = "audit"


class ConfigError(WetwareError):
    """The configuration is wrong; nothing was started."""

    code = "config"
    exit_code = EXIT_CONFIG


class Busy(ConfigError):
    """What the configuration names is taken, or not there yet; the same start can work later.

    Its exit code is not that of other errors of the configuration: a supervisor starts again.
    """

    code = "config.busy"
    exit_code = EXIT_BUSY


class PluginError(ConfigError):
    """A plugin that the configuration names cannot be used."""

    code = "plugin"


class SchemaError(PluginError):
    """A Cap'n Proto schema does not compile."""

    code = "plugin.schema"


class KeyFileError(ConfigError):
    """A key file is missing, malformed, readable by others, or its passphrase is wrong."""

    code = "key"


class AuthError(WetwareError):
    """A login was refused, by the verifier or by the user's own signer."""

    code = "auth"
    exit_code = EXIT_DENIED


class AdmissionRefused(WetwareError):
    """A node is not, or no longer, let into the cluster; the code says why.

    Attributes:
        fact: The signed statement that the refusal rests on, where there is one.
    """

    code = "admission"
    exit_code = EXIT_DENIED
    fact: bytes = b""


class CapabilityError(WetwareError):
    """A capability does not permit the call."""

    code = "capability"
    exit_code = EXIT_DENIED


class Denied(CapabilityError):
    """No grant covers the call."""

    code = "capability.denied"


class Revoked(CapabilityError):
    """The grant, or an ancestor of it, was revoked."""

    code = "capability.revoked"


class Expired(CapabilityError):
    """The grant, or an ancestor of it, expired."""

    code = "capability.expired"


class Amplification(CapabilityError):
    """A derivation asked for more than its parent has."""

    code = "capability.amplification"


class OverlayError(WetwareError):
    """The network between peers failed."""

    code = "overlay"
    exit_code = EXIT_UNREACHABLE


class DialError(OverlayError):
    """No address of the peer could be reached."""

    code = "overlay.dial"


class PeerMismatch(DialError):
    """The peer that answered is not the one that was dialled."""

    code = "overlay.peer_mismatch"


class ProtocolRefused(OverlayError):
    """The peer does not speak the protocol, or not with us."""

    code = "overlay.protocol_refused"


class StreamReset(OverlayError):
    """The peer, or a lost connection, ended the stream before its end."""

    code = "overlay.reset"


class Disconnected(OverlayError):
    """The RPC connection ended; the call may or may not have run."""

    code = "overlay.disconnected"


STOPPING = "node.stopping"
_BY_CODE[STOPPING] = Disconnected


def stopping() -> Disconnected:
    """What ends calls, sessions and subscriptions when their node stops: nobody revoked them."""
    return Disconnected("the node is stopping", hint="connect again", code=STOPPING)


class TimedOut(OverlayError):
    """A call was not answered in time; it may or may not have run."""

    code = "overlay.timeout"


def from_wire(code: str, message: str, hint: str = "") -> WetwareError:
    """Rebuild the error a peer sent: the class of `code`, or of its longest known prefix."""
    prefix = code
    while prefix:
        if (cls := _BY_CODE.get(prefix)) is not None:
            return cls(message, hint=hint, code=code)
        prefix = prefix.rpartition(".")[0]
    return WetwareError(message, hint=hint, code=code)
