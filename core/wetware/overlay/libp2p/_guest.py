"""One life of py-libp2p 0.8.1: a trio guest run on the asyncio loop, in the same thread.

Only `_loading.load_guest` imports this module, and with it trio and libp2p. Of libp2p it uses the
swarm (its table of connections), the peerstore, identify's messages and Kad-DHT; it does not use
its sockets, listeners, security upgrades, muxers, auto-connector or GossipSub.

Defects of 0.8.1 that are designed out: an exception in a stream handler ends the host; the slot of
an inbound connection is never given back (250 and no more); a connection that dies while it is
added stays in the table, and one that two tasks add loses streams; plaintext is accepted; identify
reads without a bound; 12 idle DHT streams shut the DHT for everybody; the auto-connector dials
every known peer up to a watermark; peers are never forgotten; a lookup of providers asks nobody
when its own store has a record.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import trio
from libp2p.abc import INetConn, INetStream, IRawConnection
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING
from libp2p.identity.identify import identify as identify_module
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import identify_handler_for
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.identity.identify_push.identify_push import ID_PUSH as IDENTIFY_PUSH
from libp2p.identity.update import update_peerstore_from_identify
from libp2p.kad_dht.common import PROTOCOL_ID as KAD
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.records.ipns import IPNSValidator
from libp2p.records.pubkey import PublicKeyValidator
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.address_validation import expand_wildcard_address
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr as LibAddr

from wetware import __version__
from wetware.base.access import Access
from wetware.base.log import get_logger
from wetware.errors import (
    DialError,
    LimitExceeded,
    OverlayError,
    WetwareError,
)
from wetware.identity import PeerId
from wetware.overlay.libp2p import _loading
from wetware.overlay.libp2p._adapter import (
    GuestConn,
    on_host,
    to_link_addr,
)
from wetware.overlay.libp2p.contract import OverlayLimits, OverlayUnavailable, Provider

if TYPE_CHECKING:
    from wetware.identity import Key
    from wetware.overlay.link import Connection, LinkHost, Stream

log = get_logger("overlay.guest")
T = TypeVar("T")
Handler = Callable[[INetStream], Awaitable[None]]

_UNLIMITED = 1 << 30
"""For limits of libp2p that the link enforces itself, by LinkLimits."""

_loading.tame()
vars(identify_module)["AGENT_VERSION"] = f"wetware/{__version__}"  # libp2p has no setting for it


def peer_id_of(lib_id: ID) -> PeerId | None:
    """The peer ID in wetware's type; None for one that is not a hash of a key."""
    try:
        return PeerId.from_multihash(lib_id.to_bytes())
    except ValueError:
        return None


class _NoAutoConnector(AutoConnector):
    """Dials nobody and remembers nobody."""

    async def start(self) -> None:
        """Does not start: no periodic task either."""

    async def maybe_connect(self) -> None:
        """Connects to nobody."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Not recorded: the record is never forgotten."""


class _Swarm(Swarm):
    """The table of connections. Dials with the link: all addresses, no blackout after a failure.

    Every connection was secured and multiplexed by the link. There is no plaintext.
    """

    reach: Callable[[ID, list[LibAddr]], Awaitable[GuestConn]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.auto_connector = _NoAutoConnector(self)

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Live connections to the peer, or a new one; raises SwarmException."""
        live = [conn for conn in self.get_connections(peer_id) if not conn.is_closed]
        if live:
            return live
        try:
            addrs = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            addrs = []
        try:
            await self.reach(peer_id, addrs)
        except WetwareError as exc:
            raise SwarmException(str(exc)) from exc
        return [conn for conn in self.get_connections(peer_id) if not conn.is_closed]

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: LibAddr) -> NoReturn:
        raise SwarmException("libp2p accepts no connection here")

    async def upgrade_outbound_raw_conn(self, *_: object, **__: object) -> NoReturn:
        raise SwarmException("libp2p upgrades no connection here")


class _Multiselect(Multiselect):
    """The protocols that identify announces: those of the link, libp2p's among them."""

    link: LinkHost

    def get_protocols(self) -> tuple[TProtocol | None, ...]:
        return tuple(map(TProtocol, self.link.protocols))


class _Host(BasicHost):
    """BasicHost without a listener of its own, with streams that the link negotiates."""

    def __init__(self, swarm: _Swarm, link: LinkHost, limits: OverlayLimits) -> None:
        self._link, self._limits = link, limits
        self._expanded: dict[str, list[LibAddr]] = {}
        self.dht: KadDHT | None = None
        self.dht_peers: set[ID] = set()
        self._identifying = trio.CapacityLimiter(limits.identify_streams_max)
        super().__init__(swarm, disable_identify_address_discovery=True)
        self.multiselect = _Multiselect({})
        self.multiselect.link = link
        serve_identify = identify_handler_for(self, use_varint_format=True)
        self.set_stream_handler(IDENTIFY, self._bounded(serve_identify))
        self.set_stream_handler(IDENTIFY_PUSH, self._bounded(self._hear))
        self.set_stream_handler(PING, _serve_ping)
        swarm.set_stream_handler(self._serve)

    def get_transport_addrs(self) -> list[LibAddr]:
        """Where the link listens; a wildcard as the addresses of the interfaces."""
        addrs: list[LibAddr] = []
        for addr in self._link.listen_addrs:
            text = str(addr.with_peer(None))
            if text not in self._expanded:
                lib_addr = LibAddr(text)
                wild = addr.host in ("0.0.0.0", "::")  # noqa: S104  # compared, not bound
                self._expanded[text] = expand_wildcard_address(lib_addr) if wild else [lib_addr]
            addrs += self._expanded[text]
        return addrs

    def forget_interfaces(self) -> None:
        """Look at the interfaces again: a laptop moves."""
        self._expanded.clear()

    def get_connected_peers(self) -> list[ID]:
        """Those that the DHT may ask: connected, serving it, and members."""
        connections = self.get_network().connections
        return [peer for peer in self.dht_peers if peer in connections]

    # --- streams ---------------------------------------------------------------------------------

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> INetStream:
        """A stream for the first protocol that the peer speaks; dials it if it must.

        The DHT asks members only: libp2p's lookups would go to every peer that they hear of.
        """
        peer = peer_id_of(peer_id)
        if peer is None or (KAD in protocol_ids and not self._member(peer)):
            raise SwarmException(f"{peer_id} is not a member")
        for conn in await self._network.dial_peer(peer_id):
            if isinstance(conn.muxed_conn, GuestConn):
                stream = await conn.muxed_conn.open_for(tuple(map(str, protocol_ids)))
                with trio.CancelScope(shield=True):  # short; a stream must not be lost in between
                    net_stream = await conn._add_stream(stream)
                net_stream.set_protocol(TProtocol(stream.link_stream.protocol))
                return net_stream
        raise SwarmException(f"no connection to {peer_id}")

    async def _serve(self, stream: INetStream) -> None:
        """Every inbound stream. Nothing that happens in it may end more than the stream."""
        try:
            muxed = stream.muxed_stream
            protocol = TProtocol(muxed.link_stream.protocol)
            stream.set_protocol(protocol)
            await self.multiselect.handlers[protocol](stream)
            await stream.close()
        except Exception as exc:
            # Most of these are a peer's doing: it must not fill the log.
            log.debug(
                "stream.failed",
                protocol=stream.get_protocol(),
                peer=stream.muxed_conn.peer_id,
                error=repr(exc)[:200],
            )
            await stream.reset()

    def _bounded(self, handler: Handler) -> Handler:
        async def bounded(stream: INetStream) -> None:
            with trio.move_on_after(self._limits.identify_s) as scope:
                await handler(stream)
            if scope.cancelled_caught:
                await stream.reset()

        return bounded

    # --- identify --------------------------------------------------------------------------------

    async def _hear(self, stream: INetStream) -> None:
        """Take what a peer says of itself: its answer, or a push."""
        message = Identify()
        message.ParseFromString(
            await read_varint_prefixed_bytes_limited(stream, self._limits.identify_bytes)
        )
        peer_id = stream.muxed_conn.peer_id
        await update_peerstore_from_identify(self.get_peerstore(), peer_id, message)
        serves = str(KAD) in message.protocols
        peer = peer_id_of(peer_id)
        if self.dht is None or peer is None or not serves or not self._member(peer):
            self.dht_peers.discard(peer_id)
            return
        self.dht_peers.add(peer_id)
        await self.dht.add_peer(peer_id)

    def _member(self, peer: PeerId) -> bool:
        return self._link.admits(peer, str(KAD), Access.MEMBER)

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        # libp2p runs this as a system task after each connect: an exception would end the guest.
        try:
            with trio.fail_after(self._limits.identify_s):
                async with self._identifying:
                    stream = await self.new_stream(peer_id, [IDENTIFY])
                    try:
                        await self._hear(stream)
                    except BaseException:
                        await stream.reset()
                        raise
                    await stream.close()
        except Exception as exc:
            log.debug("identify.failed", peer=peer_id, error=repr(exc)[:200])

    def _on_notifee_disconnected(self, conn: INetConn) -> None:
        super()._on_notifee_disconnected(conn)
        if not self.get_network().get_connections(conn.muxed_conn.peer_id):
            self.dht_peers.discard(conn.muxed_conn.peer_id)


async def _serve_ping(stream: INetStream) -> None:
    """Answer pings until the peer closes; the link's limits bound how many streams it opens."""
    with contextlib.suppress(StreamEOF):
        while data := await stream.read(32):
            await stream.write(data)


class _Small(Validator):
    """A validator that also bounds the value."""

    def __init__(self, inner: Validator, bytes_max: int) -> None:
        self._inner, self._bytes_max = inner, bytes_max

    def validate(self, key: str, value: bytes) -> None:
        """Raise ValueError for a value that is too large, else as the inner one."""
        if len(value) > self._bytes_max:
            raise ValueError(f"a value of {len(value)} bytes (limit dht_value_bytes_max)")
        self._inner.validate(key, value)

    def select(self, key: str, values: list[bytes]) -> int:
        return self._inner.select(key, values)


def _make_dht(host: _Host, limits: OverlayLimits) -> KadDHT:
    validator = NamespacedValidator(
        {
            "pk": _Small(PublicKeyValidator(), limits.dht_value_bytes_max),
            "ipns": _Small(IPNSValidator(), limits.dht_value_bytes_max),
        },
        strict_validation=True,
    )
    dht = KadDHT(
        host,
        DHTMode.SERVER,
        validator=validator,
        validator_changed=True,
        strict_validation=True,
        # Members of a cluster often share a subnet; strangers are not admitted to the table.
        max_peers_per_subnet=0,
    )
    store, add_provider = dht.provider_store, dht.provider_store.add_provider

    def add_bounded(key: bytes, provider: Any) -> None:
        if key in store.providers or len(store.providers) < limits.dht_provider_keys_max:
            add_provider(key, provider)

    vars(store)["add_provider"] = add_bounded
    open_streams: Counter[ID] = Counter()

    async def serve(stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        if open_streams[peer] >= limits.dht_streams_per_peer_max:
            await stream.reset()
            return
        open_streams[peer] += 1
        try:
            with trio.move_on_after(limits.dht_stream_s) as scope:
                await dht.handle_stream(stream)
            if scope.cancelled_caught:
                await stream.reset()
        finally:
            open_streams[peer] -= 1
            if not open_streams[peer]:
                del open_streams[peer]

    host.set_stream_handler(KAD, serve)
    return dht


class Guest:
    """One run of libp2p on the current loop.

    Attributes:
        ready: Done when libp2p serves; fails with what ended the run before that.
        ended: Done when the run is over, with the exception that ended it, or None after `stop`.
    """

    def __init__(self, link: LinkHost, key: Key, limits: OverlayLimits) -> None:
        self._link, self._key, self._limits = link, key, limits
        loop = asyncio.get_running_loop()
        self._loop = loop
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[BaseException | None] = loop.create_future()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._swarm: _Swarm
        self._host: _Host
        self._dht: KadDHT | None = None
        self._conns: dict[Connection, GuestConn] = {}
        self._adopted: dict[Connection, int] = {}
        self._calls: set[asyncio.Future[Any]] = set()
        self._unwatch: Callable[[], None] = lambda: None
        self._dials = trio.CapacityLimiter(limits.dials_max)

    # --- lifecycle, called on the asyncio loop ---------------------------------------------------

    def start(self) -> None:
        """Begin; returns at once. Raises OverlayError if this thread runs a guest already."""
        # trio would replace the default handler of SIGINT, and raise KeyboardInterrupt in tasks.
        ours = threading.current_thread() is threading.main_thread() and (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            trio.lowlevel.start_guest_run(
                self._main,
                run_sync_soon_threadsafe=self._soon_threadsafe,
                run_sync_soon_not_threadsafe=self._soon,
                done_callback=self._done,
                host_uses_signal_set_wakeup_fd=True,
            )
        except RuntimeError as exc:
            self.ended.set_result(exc)
            raise OverlayError(
                f"cannot start libp2p: {exc}",
                hint="one overlay runs per thread",
                code="overlay.second_guest",
            ) from exc
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def _soon_threadsafe(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def _soon(self, function: Callable[[], object]) -> None:
        self._loop.call_soon(function)

    def stop(self) -> None:
        """Tell the run to end. Its streams are reset; connections stay. Idempotent."""
        self._let_go()
        if not self.ended.done():
            self._scope.cancel()

    def crash(self, error: BaseException) -> None:
        """Raise `error` inside libp2p's task tree."""

        async def boom() -> None:
            raise error

        self._spawn(boom)

    def _spawn(self, function: Callable[[], Awaitable[None]]) -> bool:
        """Start a task in the guest; False if it is not running, or is ending right now."""
        if self._nursery is None:
            return False
        try:
            self._nursery.start_soon(function)
        except RuntimeError:  # the nursery has closed, and `_done` is about to be called
            return False
        return True

    @property
    def dht_peers(self) -> int:
        return self._dht.get_routing_table_size() if self._dht else 0

    def _done(self, outcome: Any) -> None:
        error: BaseException | None = getattr(outcome, "error", None)
        self._nursery = None
        self._let_go()
        for future in tuple(self._calls):
            if not future.done():
                future.set_exception(
                    OverlayUnavailable("the libp2p guest ended meanwhile", hint="try again")
                )
        if not self.ready.done():
            self.ready.set_exception(error or OverlayError("the guest ended before it was ready"))
            self.ready.exception()
        if not self.ended.done():
            self.ended.set_result(error)

    def _let_go(self) -> None:
        """Reset libp2p's streams, and leave the connections alone."""
        self._unwatch()
        self._unwatch = lambda: None
        for conn in self._conns.values():
            conn.abandon()
        self._conns.clear()

    async def call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """From asyncio: run an async function inside the guest.

        Raises what it raises, LimitExceeded, or OverlayUnavailable when the guest ends meanwhile.
        """
        if len(self._calls) >= self._limits.calls_max:
            raise LimitExceeded(
                f"{self._limits.calls_max} calls into libp2p are under way (calls_max)"
            )
        future: asyncio.Future[T] = self._loop.create_future()
        scope = trio.CancelScope()

        async def answer() -> None:
            try:
                with scope:
                    result = await function()
                    if not future.done():
                        future.set_result(result)
            except Exception as exc:
                if not future.done():
                    future.set_exception(exc)

        self._calls.add(future)
        try:
            if not self._spawn(answer):
                raise OverlayUnavailable("the libp2p guest is not running", hint="try again")
            return await future
        finally:
            self._calls.discard(future)
            if not future.done() or future.cancelled():
                scope.cancel()

    # --- called on the asyncio loop by the link ---------------------------------------------------

    async def serve(self, stream: Stream) -> None:
        """Give an inbound stream to libp2p; returns when libp2p is done with it."""
        conn = self._conns.get(stream.connection)
        if conn is None:
            raise OverlayError("libp2p does not use this connection")
        await conn.offer(stream)

    def _on_up(self, connection: Connection) -> None:
        if self._nursery is not None and connection not in self._conns and not connection.closed:
            conn = GuestConn(connection, waiting_max=self._limits.guest_streams_max)
            self._conns[connection] = conn
            self._spawn(functools.partial(self._adopt, connection))

    def _on_down(self, connection: Connection) -> None:
        self._adopted.pop(connection, None)
        if (conn := self._conns.pop(connection, None)) is not None:
            conn.release()

    # --- inside trio -----------------------------------------------------------------------------

    async def _main(self) -> None:
        with self._scope:
            swarm = self._make_swarm()
            host = self._host = _Host(swarm, self._link, self._limits)
            async with trio.open_nursery() as nursery, host.run(listen_addrs=[]):
                self._dht = host.dht = _make_dht(host, self._limits)
                async with background_trio_service(self._dht):
                    self._nursery = nursery
                    nursery.start_soon(self._sweep)
                    for connection in self._link.connections():
                        self._on_up(connection)
                    self._unwatch = self._link.watch(self._on_up, self._on_down)
                    if not self.ready.done():
                        self.ready.set_result(None)
                    await trio.sleep_forever()

    def _make_swarm(self) -> _Swarm:
        key_pair = create_new_key_pair(self._key.seed)
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, key_pair)
        swarm = self._swarm = _Swarm(
            peer_id,
            peerstore,
            TransportUpgrader({}, {}),
            transports=[],  # it never opens a socket
            retry_config=RetryConfig(max_retries=0),
            connection_config=ConnectionConfig(
                # The link counts connections; libp2p prunes, trims and auto-connects nothing.
                max_connections=_UNLIMITED,
                high_watermark=_UNLIMITED,
                low_watermark=0,
                min_connections=0,
                max_connections_per_peer=1,
                grace_period=float(_UNLIMITED),
            ),
        )
        swarm.reach = self._reach
        return swarm

    async def _adopt(self, connection: Connection) -> None:
        """Put a link connection into libp2p's table, and take it out when it is over.

        libp2p may let go of a connection that lives (a defect, a closed peer): then it is offered
        again, a few times.
        """
        conn = self._conns.get(connection)
        if conn is None:
            return  # it ended meanwhile
        try:
            await self._register(conn)
            await conn.wait_over()
        except Exception as exc:
            log.debug("connection.not_adopted", peer=connection.peer, error=repr(exc)[:200])
            conn.release()
        if connection.closed or self._conns.get(connection) is not conn:
            return
        del self._conns[connection]
        times = self._adopted[connection] = self._adopted.get(connection, 0) + 1
        if times < self._limits.adoptions_max:
            self._on_up(connection)
        else:
            log.warning("connection.given_up", peer=connection.peer, times=times)

    async def _register(self, conn: GuestConn) -> None:
        swarm_conn = await self._swarm.add_conn(
            conn, direction="outbound" if conn.is_initiator else "inbound"
        )
        if conn.is_closed:
            # It died while it was added: libp2p has closed it and then put it into its table.
            self._swarm.remove_conn(swarm_conn)
        conn.settled.set()

    async def _reach(self, peer_id: ID, addrs: list[LibAddr]) -> GuestConn:
        """Dial with the link and wait until libp2p knows the connection; raises OverlayError."""
        peer = peer_id_of(peer_id)
        if peer is None:
            raise DialError("not a peer ID of a key")
        found = [addr for addr in map(to_link_addr, addrs) if addr is not None and addr.port]
        if not found and self._link.connection(peer) is None:
            raise DialError(f"no address of {peer} can be dialled")
        async with self._dials:
            connection = await on_host(
                self._link.dial(
                    found[: self._limits.dial_addrs_max], peer=peer, timeout_s=self._limits.dial_s
                )
            )
        # The link has told `_on_up` of a new connection; a given-up one gets no second life here.
        conn = self._conns.get(connection)
        if conn is None:
            raise DialError(f"the connection to {connection.peer} is not libp2p's")
        # Added once, by `_adopt`: libp2p drops streams of a connection that two tasks add.
        await conn.settled.wait()
        if conn.is_closed:
            raise DialError(f"the connection to {connection.peer} ended")
        return conn

    async def _sweep(self) -> None:
        """Forget peers that are gone: nothing in libp2p does."""
        store, network = self._host.get_peerstore(), self._swarm
        while True:
            await trio.sleep(self._limits.peers_sweep_s)
            self._host.forget_interfaces()
            table = set(self._dht.routing_table.get_peer_ids()) if self._dht else set()
            keep = {network.get_peer_id(), *network.connections, *table}
            strangers = [peer for peer in store.peer_ids() if peer not in keep]
            expired = [peer for peer in strangers if store.peer_data_map[peer].is_expired()]
            excess = strangers[: max(0, len(strangers) - self._limits.peers_max)]
            for peer in {*expired, *excess}:
                store.clear_peerdata(peer)

    # --- verbs, for `call` ------------------------------------------------------------------------

    async def provide(self, key: bytes) -> bool:
        assert self._dht is not None  # noqa: S101  # set before `ready`
        return bool(await self._dht.provider_store.provide(key))

    async def find_providers(self, key: bytes, count: int) -> tuple[Provider, ...]:
        assert self._dht is not None  # noqa: S101  # set before `ready`
        # An empty store, since libp2p asks nobody when its own has any record of the key.
        lookup = ProviderStore(self._host, self._dht.peer_routing)
        infos = await lookup.find_providers(key, count)
        infos += self._dht.provider_store.get_providers(key)
        found: dict[PeerId, Provider] = {}
        for info in infos:
            peer = peer_id_of(info.peer_id)
            if peer in (None, self._link.peer_id) or peer in found or len(found) >= count:
                continue
            addrs = [addr for addr in map(to_link_addr, info.addrs) if addr is not None]
            found[peer] = Provider(
                peer,
                tuple(
                    addr.with_peer(peer)
                    for addr in addrs[: self._limits.dial_addrs_max]
                    if addr.peer in (None, peer)
                ),
            )
        return tuple(found.values())
