"""Whether this node can be dialled: a member tries its addresses by new connections, and says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from wetware.base.bounds import Rates
from wetware.base.multiaddr import Multiaddr
from wetware.errors import DialError, InvalidArgument, LimitExceeded, OverlayError, PeerMismatch
from wetware.identity import Key
from wetware.overlay.exchange import answering, ask
from wetware.overlay.link import LinkHost, LinkLimits
from wetware.overlay.membership.record import RECORD_BYTES_MAX, Malformed

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware.overlay.link import Stream
    from wetware.overlay.membership.reach import Reach

DIAL_BACK_PROTOCOL: Final = "/wetware/dial-back/1.0.0"
"""{addrs} → {results: [addr, why, took_s]} or {refused}."""
ADDRS_MAX: Final = 8
ADDR_S_MAX: Final = 3.0
"""For one address."""
RUNNING_MAX: Final = 4
"""Requests served at once, all peers together."""
PER_S, BURST = 0.1, 3
"""Requests of one peer: `ww doctor` needs one."""
PEERS_MAX: Final = 4096
FRAME_BYTES_MAX: Final = RECORD_BYTES_MAX + 256


@dataclass(frozen=True, slots=True)
class DialBack:
    """How one address looks from another member.

    Attributes:
        addr: The address.
        reached: Whether this node answered there, authenticated.
        why: "ok", "refused", "timeout", "other peer" or "failed"; "unknown" if it was not tried.
        took_s: How long it took.
    """

    addr: Multiaddr
    reached: bool
    why: str
    took_s: float


class DialBacks:
    """Asks others to dial back, and does it for them at the `addrs` that their records name.

    And at the public address that they are connected from, whatever the port: a
    record says nothing of a port of the router before somebody got in there.
    """

    def __init__(self, reach: Reach, addrs: Callable[[PeerId], Iterable[str]]) -> None:
        self._reach, self._addrs, self._now = reach, addrs, reach.now
        self._rates = Rates(PER_S, BURST, PEERS_MAX, reach.now)
        self._running = 0
        self.serve = answering(
            self._answer, bytes_max=FRAME_BYTES_MAX, timeout_s=(ADDRS_MAX + 1) * ADDR_S_MAX
        )

    async def ask(
        self, peer: PeerId, addrs: Iterable[Multiaddr], *, timeout_s: float = 30.0
    ) -> list[DialBack]:
        """Ask a member to reach this node at `addrs`, of which at most ADDRS_MAX are tried.

        Raises OverlayError where the peer cannot be asked, and LimitExceeded where it was asked too
        often.
        """
        question = {"addrs": [str(addr.with_peer(None)) for addr in addrs][:ADDRS_MAX]}
        opening = self._open(peer)
        try:
            answer = await ask(opening, question, bytes_max=FRAME_BYTES_MAX, timeout_s=timeout_s)
        except (TimeoutError, EOFError):
            raise OverlayError(
                f"{peer} did not answer within {timeout_s:g} s", code="overlay.timeout"
            ) from None
        if isinstance(why := answer.get("refused"), str):
            raise LimitExceeded(f"{peer} refused: {why[:200]}", hint="try again in a minute")
        try:
            return [
                DialBack(Multiaddr.parse(addr), why == "ok", str(why)[:40], float(took_s))
                for addr, why, took_s in answer["results"][:ADDRS_MAX]
            ]
        except (TypeError, KeyError, ValueError, AttributeError, InvalidArgument):
            raise OverlayError(f"{peer} gave an answer that makes no sense") from None

    async def _open(self, peer: PeerId) -> Stream:
        connection = await self._reach.connect(peer)
        return await connection.open_stream(DIAL_BACK_PROTOCOL)

    async def _answer(self, peer: PeerId, question: dict[str, Any]) -> Mapping[str, object]:
        addrs = parse_question(question)
        if self._running >= RUNNING_MAX or not self._rates.take(peer):
            return {"refused": "too many requests"}
        own = set()
        for text in self._addrs(peer):
            with contextlib.suppress(InvalidArgument):
                own.add(Multiaddr.parse(text).with_peer(None))
        connection = self._reach.connected(peer)
        # Not one with its relay's address, nor this machine, which has services of its own.
        seen = connection.remote.host if connection and connection.remote.is_global else ""
        results = []
        self._running += 1
        try:
            for addr in addrs:
                # Nobody makes this node knock at somebody else's door.
                why, took_s = "unknown", 0.0
                if addr in own or addr.host == seen:
                    why, took_s = await self._try(addr, peer)
                results.append([str(addr), why, took_s])
        finally:
            self._running -= 1
        return {"results": results}

    async def _try(self, addr: Multiaddr, peer: PeerId) -> tuple[str, float]:
        """A new connection with a handshake, by a host of its own: ours has one already."""
        started = self._now()
        async with LinkHost(Key.generate(), limits=LinkLimits(close_s=0.5)) as host:
            try:
                connection = await host.dial((addr,), peer=peer, timeout_s=ADDR_S_MAX)
            except PeerMismatch:
                why = "other peer"
            except DialError as exc:
                if "refused" in exc.message:
                    why = "refused"
                else:
                    why = "timeout" if "in time" in exc.message else "failed"
            else:
                why = "ok"
                connection.close()
        return why, self._now() - started


def parse_question(question: Mapping[str, Any]) -> list[Multiaddr]:
    """The addresses that a peer asks about; raises InvalidArgument."""
    texts = question.get("addrs")
    if not (
        isinstance(texts, list)
        and len(texts) <= ADDRS_MAX
        and all(isinstance(text, str) for text in texts)
    ):
        raise Malformed("not a request to dial back")
    return [Multiaddr.parse(text).with_peer(None) for text in texts]
