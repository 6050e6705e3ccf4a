"""Relays that carry strangers to a node which nobody on the internet can dial.

A node without a public address asks two members that have one, and names itself at them from then
on: in its record, in its tickets and in the references that it hands out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from wetware.base.bounds import Recent, address_key
from wetware.base.log import get_logger
from wetware.errors import WetwareError
from wetware.overlay.link.relaying import ask_to_carry
from wetware.overlay.membership.reach import is_name, is_public

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import PeerId
    from wetware.overlay.link import Connection
    from wetware.overlay.membership.reach import Reach

log = get_logger("membership.reach")

RELAYS: Final = 2
"""One may go while nobody has read the new record yet."""
ADDRS_PER_RELAY_MAX: Final = 2
"""One for each version of IP, say."""
REFUSED_S: Final = 60.0
REFUSED_MAX: Final = 64


class Reservations:
    """Of one node.

    Args:
        own: This node.
        reach: Knows who is connected, and starts tasks.
        known: Addresses of a member.
        changed: Called when `addrs` did.
    """

    def __init__(
        self,
        own: PeerId,
        reach: Reach,
        known: Callable[[PeerId], tuple[Multiaddr, ...]],
        changed: Callable[[], None],
    ) -> None:
        self._own, self._reach, self._known, self._changed = own, reach, known, changed
        self._held: dict[PeerId, tuple[Multiaddr, ...]] = {}  # nothing while it is asked
        # On which connection: a relay that has restarted is asked at once.
        self._refused: Recent[PeerId, Connection] = Recent(REFUSED_S, REFUSED_MAX, reach.now)

    @property
    def addrs(self) -> tuple[Multiaddr, ...]:
        """Where strangers are carried to this node from, with its peer ID."""
        return tuple(addr for addrs in self._held.values() for addr in addrs)

    def look_after(self) -> None:
        """Ask for what is missing, every second."""
        for peer, connection in self._reach.carriers().items():
            if len(self._held) >= RELAYS:
                return
            if peer in self._held or self._refused.get(peer) is connection:
                continue
            public = _public(connection, self._known(peer))
            addrs = tuple(
                addr.with_peer(peer).through(self._own) for addr in public[:ADDRS_PER_RELAY_MAX]
            )
            if addrs and self._reach.spawn(
                self._hold(connection, addrs), f"reserved at {peer.short}"
            ):
                self._held[peer] = ()

    async def _hold(self, connection: Connection, addrs: tuple[Multiaddr, ...]) -> None:
        peer = connection.peer
        try:
            stream = await ask_to_carry(connection, None)
            self._held[peer] = addrs
            self._changed()
            log.info("relay.reserved", relay=peer)
            await stream.read()  # until it ends
            stream.reset()
        except WetwareError as exc:
            log.debug("relay.not_reserved", relay=peer, why=exc)
        finally:
            # Also where it was granted first: else one that grants and ends it over and over makes
            # this node publish two records each time.
            self._refused.put(peer, connection)
            if self._held.pop(peer):
                self._changed()


def _public(connection: Connection, known: tuple[Multiaddr, ...]) -> list[Multiaddr]:
    """Where a stranger finds a relay; empty where none may get in."""
    local, remote = connection.local.host, connection.remote
    # At an IPv6 address it does if this node did, from another network.
    got_in = connection.initiator and remote.is_global and remote in known
    if is_public(known) or (got_in and address_key(local) != address_key(remote.host)):
        return [addr for addr in known if addr.is_global or is_name(addr)]
    return []
