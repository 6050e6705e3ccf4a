"""Several values in one parameter of type Data: end to end, and beside it the length of each.

In a schema the one is marked `$Ww.packed` and the other `$Ww.lengths`: 4 bytes for each value,
little-endian. No lengths: it is one value, whatever is in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

from wetware.errors import InvalidArgument

LENGTH_BYTES: Final = 4
VALUES_MAX: Final = 4096
"""Values of one call: what is done for each of them at its receiver takes less than 1 ms."""


def pack(values: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The values end to end, and their lengths."""
    return b"".join(values), struct.pack(f"<{len(values)}I", *map(len, values))


def lengths_of(nbytes: int, lengths: bytes) -> tuple[int, ...]:
    """How long each value is; raises InvalidArgument unless that is `nbytes` in all."""
    count, rest = divmod(len(lengths), LENGTH_BYTES)
    if rest or count > VALUES_MAX:
        raise _bad(f"{len(lengths)} bytes of lengths; {LENGTH_BYTES} a value, of {VALUES_MAX}")
    if not count:
        return (nbytes,)
    found = struct.unpack(f"<{count}I", lengths)
    if (total := sum(found)) != nbytes:
        raise _bad(f"{count} lengths of {total} bytes in all, and {nbytes} bytes")
    return found


def unpack(data: bytes, lengths: Sequence[int], start: int = 0) -> list[bytes]:
    """The values in `data` from `start` on, as long as `lengths_of` says."""
    return [data[at:end] for at, end in pairwise(accumulate(lengths, initial=start))]


def _bad(what: str) -> InvalidArgument:
    return InvalidArgument(what, hint="pack them anew", code="invalid.packed")
