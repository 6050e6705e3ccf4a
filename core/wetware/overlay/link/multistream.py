"""multistream-select 1.0: how both ends agree on a protocol. State machines without I/O.

A line is a varint length, a text and a newline. Each end first says `/multistream/1.0.0`; then the
dialler proposes and the listener answers with the same line, or with `na`.
Source: https://github.com/multiformats/multistream-select
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wetware.base.varint import uvarint
from wetware.errors import InvalidArgument, ProtocolRefused
from wetware.overlay.link.limits import Violation

LINE_BYTES_MAX = 1024
"""Of one line, newline included: what other implementations accept."""

HEADER = "/multistream/1.0.0"


def encode_line(text: str) -> bytes:
    """One line as it is sent; raises InvalidArgument if it cannot be one."""
    raw = text.encode() + b"\n"
    if len(raw) > LINE_BYTES_MAX or "\n" in text:
        raise InvalidArgument(
            f"{text[:40]!r} is not a protocol name",
            hint=f"one line of at most {LINE_BYTES_MAX - 1} bytes",
        )
    return uvarint(len(raw)) + raw


HELLO = encode_line(HEADER)
NA = encode_line("na")


class LineReader:
    """Cuts received bytes into lines. `rest()` is what came after the last line taken."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add received bytes."""
        self._data += data

    def line(self) -> str | None:
        """The next line without its newline, or None if it is not complete yet.

        Raises Violation: longer than LINE_BYTES_MAX, no newline, not UTF-8.
        """
        data = self._data
        if not data:
            return None
        size, start = data[0], 1
        if size > 0x7F:  # LINE_BYTES_MAX fits two bytes
            if len(data) < 2:
                return None
            size, start = size & 0x7F | data[1] << 7, 2
        if not 0 < size <= LINE_BYTES_MAX:
            raise Violation("multistream: bad line length")
        if len(data) < start + size:
            return None
        raw = bytes(data[start : start + size])
        del data[: start + size]
        if raw[-1:] != b"\n":
            raise Violation("multistream: a line without a newline")
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError:
            raise Violation("multistream: a line that is not UTF-8") from None

    def rest(self) -> bytes:
        """The bytes after the last line, once."""
        data = bytes(self._data)
        self._data.clear()
        return data


class Proposer(LineReader):
    """The dialler's side.

    Send `start()`, then what `receive` returns, until `chosen` is set; `rest()` then belongs to the
    protocol. The header and the first proposal leave together, which saves a round trip.
    """

    __slots__ = ("_left", "_said_hello", "chosen")

    def __init__(self, protocols: Sequence[str]) -> None:
        if not protocols:
            raise InvalidArgument("no protocol to propose")
        super().__init__()
        self._left = list(protocols)
        self._said_hello = False
        self.chosen: str | None = None

    def start(self) -> bytes:
        """The first bytes to send."""
        return HELLO + encode_line(self._left[0])

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take received bytes; return bytes to send, maybe none.

        Raises ProtocolRefused when the last proposal was refused, Violation on nonsense.
        """
        self.feed(data)
        while self.chosen is None and (line := self.line()) is not None:
            if not self._said_hello:
                if line != HEADER:
                    raise Violation("multistream: no header")
                self._said_hello = True
            elif line == self._left[0]:
                self.chosen = line
            elif line == "na":
                refused = self._left.pop(0)
                if not self._left:
                    raise ProtocolRefused(f"the peer does not speak {refused!r} with this node")
                return encode_line(self._left[0])
            else:
                raise Violation("multistream: the answer is neither the proposal nor na")
        return b""


class Responder(LineReader):
    """The listener's side. Send what `receive` returns until `chosen` is set.

    Args:
        agrees: Whether a proposal is agreed to; what it raises, `receive` raises.
        proposals_max: Refusals after which the negotiation is a violation.
    """

    __slots__ = ("_agrees", "_heard_hello", "_left", "chosen")

    def __init__(self, agrees: Callable[[str], bool], *, proposals_max: int) -> None:
        super().__init__()
        self._agrees, self._left = agrees, proposals_max
        self._heard_hello = False
        self.chosen: str | None = None

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take received bytes; return bytes to send, maybe none. Raises Violation on nonsense."""
        self.feed(data)
        out = b""
        while self.chosen is None and (line := self.line()) is not None:
            if not self._heard_hello:
                if line != HEADER:
                    raise Violation("multistream: no header")
                self._heard_hello = True
                out += HELLO
            elif self._agrees(line):
                self.chosen = line
                out += encode_line(line)
            else:
                self._left -= 1
                if self._left <= 0:
                    raise Violation("multistream: too many proposals")
                out += NA
        return out
