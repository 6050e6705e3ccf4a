"""What a node remembers of its peers over a restart: where they were reached, and its incarnation.

The peer store is a cache: addresses of members that were seen, so that a restart needs no bootstrap
address and no discovery. It grants nothing: whoever answers at a remembered address has to prove
that it is a member like anybody else. A damaged one is set aside and rebuilt.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from wetware.base.log import get_logger
from wetware.base.multiaddr import ADDR_CHARS_MAX, Multiaddr
from wetware.base.threads import Threads
from wetware.errors import InvalidArgument
from wetware.identity import PEER_ID_CHARS_MAX, PeerId, replace_private_file

log = get_logger("membership.peers")

PEERS_FILE, INCARNATION_FILE = "peers.json", "incarnation"
PEERS_MAX = 4096
"""Peers in the store: the one not seen for longest makes room."""
ADDRS_MAX = 8
"""Addresses kept for a peer. The ones it names now come after those that have worked."""
HINTS_MAX = 4
"""Addresses that each discovery named for a member, beside those."""
WORKED_MAX = 2
"""Of those kept, how many that worked once are kept although the peer no longer names them."""
PEER_AGE_S_MAX = 30 * 86_400.0
"""A peer not seen for so long is forgotten: nobody should knock at its last address for ever."""
_VERSION = 1
_ADDR_BYTES = ADDR_CHARS_MAX + 8  # with quotes and a comma
_PEER_BYTES = ADDRS_MAX * _ADDR_BYTES + PEER_ID_CHARS_MAX + 128
FILE_BYTES_MAX = PEERS_MAX * _PEER_BYTES
"""A longer file is not one of ours."""
INCARNATION_MAX = 2**62
"""No clock gets there: a higher number on disk is damage, and would leave no room to refute."""
INCARNATION_RESERVE = 1024
"""Refutations count the incarnation up; so many are made durable at once."""


@dataclass(slots=True)
class KnownPeer:
    """One peer of the store.

    Attributes:
        worked: Addresses at which it answered, the latest first.
        named: Addresses that it names itself.
        seen_ms: When it was last known to be a member, Unix time.
        hints: What each discovery named, until the end of the process.
    """

    worked: tuple[Multiaddr, ...] = ()
    named: tuple[Multiaddr, ...] = ()
    seen_ms: int = 0
    hints: dict[str, tuple[Multiaddr, ...]] = field(default_factory=dict)

    @property
    def addrs(self) -> tuple[Multiaddr, ...]:
        # One that worked and is named still, before those that are only named; last what worked
        # once: a node that moved leaves the address behind, maybe to somebody else.
        current = [addr for addr in self.worked if addr in self.named]
        own = tuple(dict.fromkeys((*current, *self.named, *self.worked)))[:ADDRS_MAX]
        return tuple(dict.fromkeys((*own, *chain.from_iterable(self.hints.values()))))


class PeerStore:
    """Addresses of members by peer ID, in memory and in a file.

    Args:
        path: The file; its directory exists.
        unix_ms: The time.
        peers_max: How many peers are kept.

    Attributes:
        dirty: Whether `save` has something to write.
    """

    def __init__(
        self, path: Path, *, unix_ms: Callable[[], int], peers_max: int = PEERS_MAX
    ) -> None:
        self._path, self._unix_ms, self._peers_max = path, unix_ms, peers_max
        self._peers: dict[PeerId, KnownPeer] = {}  # the one not seen for longest first
        self._unwritable = False
        self._threads = Threads()
        self.dirty = False

    # --- the file ---------------------------------------------------------------------------------

    def load(self) -> None:
        """Read the file. A damaged one is renamed to `peers.json.damaged`, with a warning."""
        try:
            with self._path.open("rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
            self._peers = _parse(data, self._peers_max)
        except FileNotFoundError:
            return
        except (OSError, ValueError, InvalidArgument, RecursionError) as exc:
            aside = self._path.with_name(self._path.name + ".damaged")
            with contextlib.suppress(OSError):
                self._path.replace(aside)
            log.warning("peers.damaged", file=self._path, aside=aside.name, why=str(exc)[:200])
            self.dirty = True
            return
        oldest = self._unix_ms() - int(PEER_AGE_S_MAX * 1000)
        for peer in [peer for peer, known in self._peers.items() if known.seen_ms < oldest]:
            del self._peers[peer]
            self.dirty = True

    async def save(self) -> None:
        """Write the file if something changed; a failure is logged and tried again next time."""
        if not self.dirty:
            return
        self.dirty = False
        try:
            # An fsync can take a while; nobody else writes this file meanwhile.
            await self._threads.run(self._write, self._encoded())
        except BaseException:
            self.dirty = True
            raise

    def save_now(self) -> None:
        """As `save`, without leaving the loop: for the end."""
        if self.dirty:
            self.dirty = False
            self._write(self._encoded())

    def _write(self, data: bytes) -> None:
        try:
            replace_private_file(self._path, data)
            self._unwritable = False
        except OSError as exc:
            self.dirty = True
            if not self._unwritable:  # once, not every few seconds
                self._unwritable = True
                log.warning("peers.unwritable", file=self._path, why=exc)

    def _encoded(self) -> bytes:
        peers = [
            {
                "peer": peer,
                "worked": [str(addr.with_peer(None)) for addr in known.worked],
                "named": [str(addr.with_peer(None)) for addr in known.named],
                "seen_ms": known.seen_ms,
            }
            for peer, known in self._peers.items()
        ]
        return json.dumps({"version": _VERSION, "peers": peers}, indent=1).encode()

    # --- what is known ----------------------------------------------------------------------------

    def addrs(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Where to try to reach `peer`, the most promising first; empty if nothing is known."""
        known = self._peers.get(peer)
        return known.addrs if known is not None else ()

    def peers(self) -> tuple[PeerId, ...]:
        """All peers, the one seen last first."""
        return tuple(reversed(self._peers))

    def named(self, peer: PeerId, addrs: Iterable[Multiaddr]) -> None:
        """The member `peer` names these addresses as its own."""
        known = self._seen(peer)
        named = tuple(dict.fromkeys(addr.with_peer(peer) for addr in addrs))[:ADDRS_MAX]
        if named != known.named:
            known.named = named
            self.dirty = True

    def worked(self, peer: PeerId, addr: Multiaddr) -> None:
        """The member `peer` answered at `addr`."""
        known = self._seen(peer)
        addr = addr.with_peer(peer)
        if known.worked[:1] != (addr,):
            known.worked = tuple(dict.fromkeys((addr, *known.worked)))[:WORKED_MAX]
            self.dirty = True

    def hinted(self, peer: PeerId, addr: Multiaddr, source: str) -> bool:
        """The discovery `source` named `addr` for `peer`; whether that is news of a known peer."""
        known = self._peers.get(peer)
        if known is None or addr in known.addrs:
            return False
        known.hints[source] = (addr, *known.hints.get(source, ()))[:HINTS_MAX]
        return True

    def forget(self, peer: PeerId) -> None:
        """Drop a peer, e.g. one that was evicted. Idempotent."""
        if self._peers.pop(peer, None) is not None:
            self.dirty = True

    def _seen(self, peer: PeerId) -> KnownPeer:
        known = self._peers.pop(peer, None)
        if known is None:
            known = KnownPeer()
            self.dirty = True
            while len(self._peers) >= self._peers_max:
                del self._peers[next(iter(self._peers))]
        self._peers[peer] = known  # now the last
        now_ms = self._unix_ms()
        if now_ms - known.seen_ms > 3_600_000:  # not worth a write each time
            self.dirty = True
        known.seen_ms = now_ms
        return known


def _parse(data: bytes, peers_max: int) -> dict[PeerId, KnownPeer]:
    """The content of the file; raises ValueError or InvalidArgument."""
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"longer than {FILE_BYTES_MAX} bytes")
    document: Any = json.loads(data)
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ValueError("not a peer store of this version")
    entries = document.get("peers")
    if not isinstance(entries, list):
        raise ValueError("no list of peers")  # noqa: TRY004  # one kind of error for all damage
    peers: dict[PeerId, KnownPeer] = {}
    for entry in entries[-peers_max:]:
        if not isinstance(entry, dict):
            raise ValueError("an entry is not an object")  # noqa: TRY004  # as above
        text, seen_ms = entry.get("peer"), entry.get("seen_ms")
        if not isinstance(text, str) or type(seen_ms) is not int:
            raise ValueError("an entry without peer or time")
        peer = PeerId.parse(text)
        peers[peer] = KnownPeer(
            _addrs(entry.get("worked"), peer, WORKED_MAX),
            _addrs(entry.get("named"), peer, ADDRS_MAX),
            seen_ms,
        )
    return peers


def _addrs(texts: object, peer: PeerId, count_max: int) -> tuple[Multiaddr, ...]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("addresses that are not a list of text")
    return tuple(Multiaddr.parse(text).with_peer(peer) for text in texts[:count_max])


# --- incarnations ---------------------------------------------------------------------------------


class IncarnationFile:
    """Keeps a node's incarnations rising over restarts, whatever its clock does.

    An incarnation that was used before would lose against the node's own past in everybody's
    memory. The clock alone is enough until it is set back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reserved = 0

    def begin(self, unix_ms: int) -> int:
        """The incarnation of this start: above all earlier ones, and made durable."""
        incarnation = max(self._load() + 1, unix_ms)
        self._reserve(incarnation)
        return incarnation

    def used(self, incarnation: int) -> None:
        """The running node counted up to `incarnation`; makes room durable when it nears the end.

        Call it for every change: it writes once in INCARNATION_RESERVE of them.
        """
        if incarnation >= self._reserved and incarnation < INCARNATION_MAX:
            self._reserve(incarnation)

    def _load(self) -> int:
        try:
            value = int(self._path.read_bytes()[:32])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as exc:
            log.warning("incarnation.unreadable", file=self._path, why=exc)
            return 0
        if not 0 <= value < INCARNATION_MAX:
            log.warning("incarnation.unreadable", file=self._path, why="out of range")
            return 0
        return value

    def _reserve(self, incarnation: int) -> None:
        self._reserved = incarnation + INCARNATION_RESERVE
        try:
            replace_private_file(self._path, f"{self._reserved}\n".encode())
        except OSError as exc:  # the clock alone keeps them apart then
            log.warning("incarnation.unwritable", file=self._path, why=exc)
