"""Two processes with one key: how it is noticed, and that both are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from wetware.base.bounds import Recent
from wetware.base.log import get_logger
from wetware.errors import WetwareError
from wetware.overlay.exchange import answering, ask
from wetware.overlay.frames import field
from wetware.overlay.membership.record import RECORD_BYTES_MAX, Malformed, Record

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.link import Connection
    from wetware.overlay.membership.reach import Reach

log = get_logger("membership")

PROCESS_PROTOCOL: Final = "/wetware/process/1.0.0"
"""{other} → {record}: what the process at the other end signs of itself now. `other` is the record
that another process with its key has just signed, or empty."""
TWIN_S: Final = 60.0
"""How long a second process with one key is told of after it was last heard of."""
COMPARE_S: Final = 10.0
"""Between two looks whether the same process is at the ends of a peer's connections."""
TWINS_MAX: Final = 1024
ASK_S_MAX: Final = 5.0
FRAME_BYTES_MAX: Final = RECORD_BYTES_MAX + 256


class Twins:
    """Second processes that were heard of.

    Args:
        own: This node.
        reach: Runs the comparisons.
        sign: Makes this node's record, as it is now.
        met: Told what another process with this node's key has signed; raises InvalidArgument.
    """

    def __init__(
        self,
        own: PeerId,
        reach: Reach,
        sign: Callable[[], Record],
        met: Callable[[Record], None],
    ) -> None:
        self._own, self._reach, self._sign, self._met = own, reach, sign, met
        self._seen: Recent[PeerId, Record] = Recent(TWIN_S, TWINS_MAX, reach.now)
        self._compared: Recent[PeerId, None] = Recent(COMPARE_S, TWINS_MAX, reach.now)
        self.serve = answering(self._answer, bytes_max=FRAME_BYTES_MAX, timeout_s=ASK_S_MAX)

    def of(self, peer: PeerId) -> Record | None:
        """What the second process with the key of `peer`, maybe this node's, says of itself."""
        return self._seen.get(peer)

    def seen(self, record: Record) -> None:
        """A second process has signed this."""
        peer = record.peer
        if peer not in self._seen:
            log.error(
                "member.duplicate_identity" if peer == self._own else "member.two_processes",
                peer=peer,
                addrs=" ".join(record.addrs),
                hint="two processes run with this key: stop one, or give it a key of its own",
            )
        self._seen.put(peer, record)

    def compare(self, older: Connection, newer: Connection) -> None:
        """A peer speaks on two connections: it moved, or two processes have its key."""
        peer = older.peer
        if peer not in self._compared:
            self._compared.put(peer, None)
            self._reach.spawn(self._compare(older, newer), f"processes of {peer.short}")

    async def _compare(self, older: Connection, newer: Connection) -> None:
        """Ask at the older connection first: who answers there lived when the newer one was."""
        try:
            first, second = await _ask(older), await _ask(newer)
            if first.instance != second.instance:
                self.seen(second)
                await _ask(older, second.encoded)
                await _ask(newer, first.encoded)
        except (WetwareError, EOFError, TimeoutError) as exc:  # one has gone: so there are not two
            log.debug("processes.not_asked", peer=older.peer, why=exc)

    async def _answer(self, _peer: PeerId, question: dict[str, Any]) -> Mapping[str, object]:
        if other := field(question, "other", bytes_max=RECORD_BYTES_MAX):
            self._met(Record.parse(other))
        return {"record": self._sign().encoded}


async def _ask(connection: Connection, other: bytes = b"") -> Record:
    opening, question = connection.open_stream(PROCESS_PROTOCOL), {"other": other}
    answer = await ask(opening, question, bytes_max=FRAME_BYTES_MAX, timeout_s=ASK_S_MAX)
    record = Record.open(field(answer, "record", bytes_max=RECORD_BYTES_MAX))
    if record.peer != connection.peer:
        raise Malformed(f"{connection.peer} answered with the record of {record.peer}")
    return record
