"""Admission on a link host: members introduce themselves, nodes join and renew.

The protocols are in `exchange`. Both are public: strangers speak them. They are bounded in time,
size and number, per connection, per address and in all.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from wetware.base.access import Access
from wetware.base.bounds import Claim, Places, Rates, Throttle, address_key
from wetware.base.log import get_logger
from wetware.base.texts import ADDRS_MAX
from wetware.base.watchers import Watchers
from wetware.errors import (
    AdmissionRefused,
    DialError,
    InvalidArgument,
    LimitExceeded,
    OverlayError,
    WetwareError,
)
from wetware.overlay.admission.exchange import (
    ANSWER_BYTES_MAX,
    CERTIFICATE_PROTOCOL,
    FRAME_BYTES_MAX,
    JOIN_PROTOCOL,
    ask_to_join,
    exchange,
    raise_refusal,
    write_refusal,
)
from wetware.overlay.admission.members import Admitted, Removed
from wetware.overlay.admission.statements import CHAIN_BYTES_MAX, INVITE, Chain, refusal
from wetware.overlay.admission.store import DOCUMENT_BYTES_MAX
from wetware.overlay.admission.texts import SECRET_BYTES
from wetware.overlay.frames import field, read_frame, write_frame
from wetware.overlay.peers import PeerDown, PeerUp

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import PeerId
    from wetware.overlay.admission.decision import Admission
    from wetware.overlay.link import Connection, LinkHost, Stream

log = get_logger("admission.service")

EXCHANGES_PER_CONNECTION_MAX: Final = 2
"""Both ends may renew at once."""
INTRODUCTIONS_MAX: Final = 3
"""Tries of who dialled, where the other end was too busy or too slow."""
RETRY_S: Final = 0.5
LOGGED_PER_ADDRESS_MAX: Final = 20
"""Lines a minute about what peers of one address do wrong, so that they cannot fill the log."""
ISSUERS_ASKED_MAX: Final = 8
"""In one attempt to renew."""
_ENDED: Final = ("admission.void", "admission.expired")


def _address(stream: Stream) -> str:
    return address_key(stream.connection.address)


class _Link:
    """Where the introduction on one connection stands."""

    __slots__ = ("error", "settled", "task", "up")

    def __init__(self) -> None:
        self.up = False
        self.error: WetwareError | None = None
        self.settled = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Introductions:
    """Introduces this node on its connections, and knows which peers are up.

    A peer is up when, on a connection to it, both sides have admitted each other; a foreign peer
    with a fact is up while it is connected. A member that is removed loses its connections.

    Args:
        host: The link host.
        admission: Decides.
        addrs: Where this node can be dialled, with its peer ID; for those who join.
        join_document: `AuthBackend.join_document`.
    """

    def __init__(
        self,
        host: LinkHost,
        admission: Admission,
        *,
        addrs: Callable[[], Sequence[Multiaddr]],
        join_document: Callable[[], Awaitable[bytes]],
    ) -> None:
        self._host, self._admission = host, admission
        self._addrs, self._join_document = addrs, join_document
        self._limits = limits = admission.limits
        monotonic, per_minute = asyncio.get_running_loop().time, limits.attempts_per_address_max
        self._places = Places()
        self._attempts = Rates(per_minute / 60, per_minute, limits.addresses_max, monotonic)
        self._lines = Throttle(LOGGED_PER_ADDRESS_MAX, limits.addresses_max, monotonic)
        self._links: dict[Connection, _Link] = {}
        self._up: dict[PeerId, None] = {}
        self._watchers = Watchers[PeerUp | PeerDown]()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ends: list[Callable[[], None]] = []
        self._hints: OrderedDict[PeerId, None] = OrderedDict()  # who to ask for a renewal first
        self._own_changed = asyncio.Event()
        self._void_at = float("-inf")
        self._closed = False

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve the protocols and introduce this node, on connections there already as well."""
        host = self._host
        self._ends = [
            self._serve(CERTIFICATE_PROTOCOL, self._answer_certificate, self._limits.exchange_s),
            self._serve(JOIN_PROTOCOL, self._answer_join, self._limits.join_s),
            host.watch(self._connected, self._disconnected),
            self._admission.members.changes.add(self._changed),
        ]
        self._admission.certificate.renew = self._renew
        for connection in host.connections():
            self._connected(connection)

    async def aclose(self) -> None:
        """Stop; connections stay. Idempotent."""
        self._closed = True
        self._admission.certificate.renew = None
        for end in self._ends:
            end()
        self._ends.clear()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for peer in tuple(self._up):
            self._set_down(peer)

    def _spawn(self, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._host.spawn(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- who is up --------------------------------------------------------------------------------

    def peers(self) -> tuple[PeerId, ...]:
        """Connected peers that this node admitted and that admitted this node."""
        return tuple(self._up)

    def watch(self, callback: Callable[[PeerUp | PeerDown], None]) -> Callable[[], None]:
        """Call back for every peer that comes up, those that are first, or goes down.

        Callbacks run on the loop and must not block. Returns a function that ends the watch.
        """
        return self._watchers.add(callback, *map(PeerUp, self._up))

    async def introduced(self, connection: Connection) -> Chain | None:
        """Wait until both ends of a connection have admitted each other; the peer's chain.

        For who was dialled it lasts until the dialler introduces itself. None for a foreign peer.

        Raises AdmissionRefused where one end refuses the other, or the peer speaks none of our
        protocols and no fact certifies it; OverlayError where the connection or the exchange fails.
        """
        link = self._links.get(connection)
        if link is None:
            raise OverlayError("the connection ended", code="overlay.closed")
        await link.settled.wait()
        if link.error is not None:
            raise link.error
        return self._admission.chain(connection.peer)

    async def peer_of(self, connection: Connection) -> PeerId:
        """The node at the other end of a connection on which both ends have admitted each other.

        The one decision on what a node is given as itself. Whoever carries the connection plays no
        part in it: the peer has proved who it is in the handshake. Waits up to `exchange_s` for the
        introduction of a member. Raises AdmissionRefused for all others: clients, foreign peers,
        and nodes that were evicted or whose certificate has ended.
        """
        peer, admission = connection.peer, self._admission
        why = "it is no member of this cluster"
        if admission.members.is_foreign(peer):
            why = "it is a foreign libp2p peer"
        elif not admission.is_member(peer):
            admission.judge.refuse_evicted(peer)  # which is told
        else:
            try:
                async with asyncio.timeout(self._limits.exchange_s):
                    await self.introduced(connection)
            except TimeoutError:
                why = "it did not introduce itself on this connection"
            except OverlayError as exc:
                why = exc.message
            else:
                link = self._links.get(connection)
                if link is not None and link.up and admission.is_member(peer):
                    return peer
        raise refusal("no_member", f"{peer}: {why}")

    def _refresh(self, peer: PeerId) -> None:
        """Decide anew whether a peer is up."""
        links = [link for connection, link in self._links.items() if connection.peer == peer]
        member = self._admission.is_member(peer)
        up = member and (
            any(link.up for link in links)
            or (bool(links) and self._admission.members.is_foreign(peer))
        )
        if up and peer not in self._up:
            self._up[peer] = None
            log.debug("peer.up", peer=peer)
            self._watchers.tell(PeerUp(peer))
        elif not up and peer in self._up:
            self._set_down(peer)

    def _set_down(self, peer: PeerId) -> None:
        del self._up[peer]
        log.debug("peer.down", peer=peer)
        self._watchers.tell(PeerDown(peer))

    def _settle(self, connection: Connection, error: WetwareError | None) -> None:
        link = self._links.get(connection)
        if link is None:
            return
        link.error = error
        if error is None:
            self._host.reconsider(connection.peer)  # it was booked before it could show anything
            link.up = not self._admission.members.is_foreign(connection.peer)
        link.settled.set()
        self._refresh(connection.peer)

    # --- connections and members ------------------------------------------------------------------

    def _connected(self, connection: Connection) -> None:
        if self._closed or connection in self._links:
            return
        link = self._links[connection] = _Link()
        if self._admission.members.is_foreign(connection.peer):
            self._settle(connection, None)
        elif connection.initiator:
            link.task = self._spawn(self._introduce_first(connection))

    def _disconnected(self, connection: Connection) -> None:
        link = self._links.pop(connection, None)
        if link is None:
            return
        if not link.settled.is_set():
            link.error = OverlayError("the connection ended", code="overlay.closed")
            link.settled.set()
        if link.task is not None:
            link.task.cancel()
        self._refresh(connection.peer)

    def _changed(self, event: Admitted | Removed) -> None:
        """Admission changed its mind about a peer."""
        if isinstance(event, Removed):
            self._refresh(event.peer)
            for connection in self._host.connections():
                if connection.peer == event.peer:
                    connection.abort(
                        refusal("removed", f"{event.peer} is no member any more: {event.reason}")
                    )
        elif event.peer == self._host.peer_id:  # this node's own certificate was renewed
            self._own_changed.set()
            self._own_changed = asyncio.Event()
            for connection, link in tuple(self._links.items()):
                if link.up or link.error is not None:
                    self._spawn(self._introduce_again(connection))
        elif self._admission.members.is_foreign(event.peer):
            for connection in tuple(self._links):
                if connection.peer == event.peer:
                    self._settle(connection, None)

    # --- introducing this node --------------------------------------------------------------------

    async def _introduce_first(self, connection: Connection) -> None:
        """Try until both ends have decided; several times where one was too busy or too slow."""
        renewed = False
        for left in reversed(range(INTRODUCTIONS_MAX)):
            shown = self._admission.own
            try:
                await self._introduce(connection)
            except AdmissionRefused as exc:
                if not renewed and left and await self._renewed(connection.peer, shown, exc):
                    renewed = True
                    continue
                self._refused(connection, exc)
                return
            except WetwareError as exc:
                if not left or connection.closed:
                    log.info("introduction.failed", peer=connection.peer, why=exc)
                    self._settle(connection, exc)
                    return
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _introduce_again(self, connection: Connection) -> None:
        try:
            await self._introduce(connection)
        except WetwareError as exc:  # what was agreed before holds
            log.info("introduction.failed", peer=connection.peer, why=exc)

    def _refused(self, connection: Connection, exc: AdmissionRefused) -> None:
        self._admission.learn_own_end(exc.fact)
        if exc.code == "admission.not_ours" and self._admission.members.is_foreign(connection.peer):
            self._settle(connection, None)
            return
        log.warning(
            "introduction.refused", peer=connection.peer, code=exc.code, why=exc, next=exc.hint
        )
        self._settle(connection, exc)

    def _doubted(self, peer: PeerId, exc: AdmissionRefused) -> bool:
        """Whether this node's certificate is said to have ended, and a renewal was begun."""
        if exc.code not in _ENDED:
            return False
        if exc.code == "admission.void":
            self._void_at = asyncio.get_running_loop().time()
        # Whoever says it may be able to help, if it is an issuer.
        self._hints[peer] = None
        self._hints.move_to_end(peer)
        while len(self._hints) > ISSUERS_ASKED_MAX:
            self._hints.popitem(last=False)
        return self._admission.certificate.doubted()

    async def _renewed(self, peer: PeerId, shown: Chain, exc: AdmissionRefused) -> bool:
        """Whether this node has a newer certificate than it showed, or gets one soon."""
        if self._admission.own is not shown:
            return exc.code in _ENDED
        if not self._doubted(peer, exc):
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.exchange_s):
                while self._admission.own is shown:
                    await self._own_changed.wait()
        return self._admission.own is not shown

    async def _introduce(self, connection: Connection) -> None:
        """One exchange; settles it unless it raises.

        Raises AdmissionRefused where the peer refuses this node, or is none of ours; OverlayError.
        """
        admission, timeout_s, verdict = self._admission, self._limits.exchange_s, None
        async with exchange(connection, CERTIFICATE_PROTOCOL, timeout_s=timeout_s) as stream:
            await write_frame(stream, {"v": 1, "chain": admission.own.encoded})
            answer = await read_frame(stream, bytes_max=ANSWER_BYTES_MAX)
            raise_refusal(answer)
            encoded = field(answer, "chain", bytes_max=CHAIN_BYTES_MAX)
            try:
                await admission.members.admit(connection.peer, encoded)
            except AdmissionRefused as exc:
                verdict = exc
                await write_refusal(stream, exc)
            else:
                await write_frame(stream, {"ack": True})
        if verdict is not None:
            self._refused(connection, verdict)
        else:
            self._settle(connection, None)

    # --- serving ----------------------------------------------------------------------------------

    def _serve(
        self, protocol: str, answer: Callable[[Stream], Awaitable[None]], timeout_s: float
    ) -> Callable[[], None]:
        """Answer within the limits; what goes wrong is told to the peer, and logged."""

        async def serve(stream: Stream) -> None:
            try:
                with self._place(stream):
                    async with asyncio.timeout(timeout_s):
                        try:
                            await answer(stream)
                        except (AdmissionRefused, LimitExceeded) as exc:
                            self._log(stream, "admission.refused", code=exc.code, why=exc)
                            self._host.refused[exc.code] += 1
                            await write_refusal(stream, exc)
            except (InvalidArgument, LimitExceeded, EOFError, TimeoutError) as exc:
                reason = "too slow" if isinstance(exc, TimeoutError) else exc
                self._host.refused["admission.exchange"] += 1
                self._log(stream, "admission.broken_off", why=reason)
                stream.reset()

        return self._host.handle(protocol, serve, access=Access.PUBLIC)

    async def _answer_certificate(self, stream: Stream) -> None:
        connection, peer, admission = stream.connection, stream.peer, self._admission
        counted = not admission.is_member(peer)
        if counted:
            self._count(stream)
        message = await read_frame(stream, bytes_max=FRAME_BYTES_MAX)
        encoded = field(message, "chain", bytes_max=CHAIN_BYTES_MAX)
        await admission.members.admit(peer, encoded)
        if counted:  # a good one does not count against its neighbours
            self._attempts.give_back(_address(stream))
        await write_frame(stream, {"v": 1, "chain": admission.own.encoded})
        answer = await read_frame(stream, bytes_max=ANSWER_BYTES_MAX)
        try:
            raise_refusal(answer)
        except AdmissionRefused as exc:
            self._log(stream, "introduction.refused", code=exc.code, why=exc, next=exc.hint)
            admission.learn_own_end(exc.fact)
            self._settle(connection, exc)
            self._doubted(peer, exc)
            return
        if answer.get("ack") is not True:
            raise InvalidArgument("a frame that is neither an ack nor a refusal")
        self._settle(connection, None)

    async def _answer_join(self, stream: Stream) -> None:
        peer, admission = stream.peer, self._admission
        self._count(stream)
        message = await read_frame(stream, bytes_max=FRAME_BYTES_MAX)
        if "renew" in message:
            encoded = field(message, "renew", bytes_max=CHAIN_BYTES_MAX)
            chain = await admission.issuer.renew(peer, encoded)
            await write_frame(stream, {"chain": chain.encoded})
            return
        # What can fail comes before the ticket is spent.
        document = await self._join_document()
        if len(document) > DOCUMENT_BYTES_MAX:
            raise refusal("document", "the auth backend's document is too large to be given")
        if "secret" in message:
            secret = field(message, "secret", bytes_max=SECRET_BYTES)
            chain = await admission.issuer.redeem(peer, secret)
        else:
            encoded = field(message, "chain", bytes_max=CHAIN_BYTES_MAX)
            chain = await admission.members.admit(peer, encoded)
        await write_frame(
            stream,
            {
                "founding": admission.founding.plain(),
                "chain": chain.encoded,
                "document": document,
                "addrs": [str(addr) for addr in self._addrs()][:ADDRS_MAX],
            },
        )

    def _count(self, stream: Stream) -> None:
        """Count an attempt of an address; raises LimitExceeded."""
        if not self._attempts.take(_address(stream)):
            raise LimitExceeded(
                f"more than {self._limits.attempts_per_address_max} attempts a minute from one "
                "address (attempts_per_address_max)",
                hint="wait a minute",
            )

    def _place(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        """Entering it raises LimitExceeded where too many exchanges are going on."""
        limits, message = self._limits, "{} exchanges of admission are going on {}"
        return self._places.hold(
            *(
                Claim(key, limit, message.format(limit, where))
                for key, limit, where in (
                    (stream.connection, EXCHANGES_PER_CONNECTION_MAX, "on this connection"),
                    (_address(stream), limits.exchanges_per_address_max, "there"),
                    ("all", limits.exchanges_max, "here"),
                )
            )
        )

    def _log(self, stream: Stream, event: str, **fields: object) -> None:
        """Log what a peer did wrong, so often for one address and no more."""
        unlogged = self._lines.lines(_address(stream))
        if unlogged is not None:
            log.warning(
                event,
                peer=stream.peer,
                address=stream.connection.address,
                protocol=stream.protocol,
                **fields,
                unlogged=unlogged,
            )

    # --- renewing this node's certificate ---------------------------------------------------------

    def _issuers(self, own: Chain) -> list[PeerId]:
        """Who may renew, the likeliest first: connected ones, then those known from joining.

        The inviter that signed comes last: where it was evicted and does not say so, its signature
        would be void again. Once somebody says that it was, it is not asked for a while; only for
        a while, since anybody can say so.
        """
        found: dict[PeerId, None] = dict.fromkeys(reversed(self._hints))
        for peer in self._host.peers():
            chain = self._admission.chain(peer)
            if chain is not None and INVITE in chain.rights:
                found[peer] = None
        for addr in self._admission.store.addrs:
            if addr.peer is not None:
                found[addr.peer] = None
        others = [peer for peer in found if peer not in (self._host.peer_id, own.leaf.issuer)]
        in_doubt_s = asyncio.get_running_loop().time() - self._void_at
        last = (
            []
            if own.inviter is None or in_doubt_s < self._limits.renew_retry_s_max
            else [own.inviter.peer]
        )
        return [*others[: ISSUERS_ASKED_MAX - 1], *last]

    async def _renew(self, own: Chain) -> bytes:
        """A new chain from an issuer; raises what the last one said."""
        error: WetwareError = refusal(
            "no_issuer",
            "no node that could renew the certificate can be reached",
            "start a node that may invite, or join again with `ww node --join TICKET`",
        )
        for peer in self._issuers(own):
            # Twice: the connection that was there may be about to end.
            for left in (1, 0):
                try:
                    return await self._renew_at(peer, own)
                except DialError as exc:
                    log.debug("renewal.unreachable", peer=peer, why=exc)
                    break
                except WetwareError as exc:
                    log.info("renewal.refused", peer=peer, why=exc)
                    error = exc
                    if isinstance(exc, AdmissionRefused):
                        self._admission.learn_own_end(exc.fact)
                        break
                    if not left:
                        break
        raise error

    async def _renew_at(self, peer: PeerId, own: Chain) -> bytes:
        connection = self._host.connection(peer)
        if connection is None:
            addrs = tuple(addr for addr in self._admission.store.addrs if addr.peer == peer)
            if not addrs:
                raise DialError(f"no address of {peer} is known")
            connection = await self._host.dial(addrs, peer=peer, timeout_s=self._limits.exchange_s)
        answer = await ask_to_join(
            connection,
            {"renew": own.encoded},
            bytes_max=ANSWER_BYTES_MAX,
            timeout_s=self._limits.exchange_s,
        )
        return field(answer, "chain", bytes_max=CHAIN_BYTES_MAX)
