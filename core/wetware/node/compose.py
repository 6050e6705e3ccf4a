"""A node: composes overlay, broker, auth backend and services in one task group.

Order of a start: data directory locked → ports free → key → joined, if there is a ticket → auth
backend → admission → services → listeners → "ready" → membership. What fails on the way stops the
start with one clear error, and nothing stays behind. To stop is to be cancelled; every part ends
with the task group.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from wetware import rpc
from wetware.base import paths
from wetware.base.access import Access
from wetware.base.bounds import Throttle, address_key
from wetware.base.log import get_logger
from wetware.base.version import __version__
from wetware.broker.broker import Broker
from wetware.broker.gate import GateServant
from wetware.broker.grants import SESSION_SERVICE
from wetware.broker.proposals import proposal_of
from wetware.broker.protocol import GATE_PROTOCOL
from wetware.broker.records import Records
from wetware.broker.store import GrantStore
from wetware.broker.tree import Tree
from wetware.errors import ConfigError, DialError, LimitExceeded, NotFound, OverlayError
from wetware.identity import Channel, Principal
from wetware.node.belonging import (
    cluster_of,
    end_if_evicted,
    join_with,
    judge_backend,
    judge_own,
    keep_to_itself,
    pin_further,
)
from wetware.node.clocks import judge_clock, watch_clock
from wetware.node.context import Contexts
from wetware.node.data_dir import locked, socket_path
from wetware.node.findings import check_node
from wetware.node.key import load_or_create
from wetware.node.leaving import hand_over
from wetware.node.members import Members
from wetware.node.network import watch_network
from wetware.node.parts import Parts
from wetware.node.process import bound_recursion, rss_bytes, umask, within_files
from wetware.node.services.cluster import ClusterService
from wetware.node.services.grants import GrantsService
from wetware.node.services.node import NodeService
from wetware.node.serving import recording, start_backend, start_services
from wetware.node.siblings import Siblings
from wetware.node.status import status_of
from wetware.overlay.admission.decision import Admission
from wetware.overlay.admission.service import Introductions
from wetware.overlay.admission.store import Store
from wetware.overlay.admission.texts import parse_join
from wetware.overlay.libp2p import Overlay
from wetware.overlay.link import LinkHost, Stream, check_free
from wetware.overlay.membership.config import MembershipConfig
from wetware.overlay.membership.known import State
from wetware.overlay.membership.outside import Outside
from wetware.overlay.membership.service import Membership
from wetware.overlay.membership.swim import middle
from wetware.overlay.peers import PeerDown
from wetware.overlay.relay import Relay
from wetware.overlay.rpc_pipe import RpcPipe

if TYPE_CHECKING:
    from wetware.base.interfaces import Network
    from wetware.base.multiaddr import Multiaddr
    from wetware.config import Config
    from wetware.hookspecs import Discovery, Service
    from wetware.identity import PeerId
    from wetware.loader import Plugins
    from wetware.overlay.admission.texts import Bundle, Ticket
    from wetware.overlay.link import Connection
    from wetware.overlay.peers import PeerUp

log = get_logger("node")

GATE_LINES_PER_MINUTE = 20
"""Refusals at the Gate that are logged for one address: it must not be able to fill the log."""
CLIENT_LOGIN_S_MAX = 60.0
"""For a program of this machine to log in, a person's passphrase or signature included."""
CORE_SERVICES = ("node", "cluster", "grants")
"""Every node has them: its record in the membership does not name them."""


class Node(Parts):
    """One node of the cluster. `run` is all of its life.

    Args:
        config: The effective configuration.
        plugins: Loaded plugins.
    """

    def __init__(self, config: Config, plugins: Plugins) -> None:
        super().__init__(config, plugins)
        self._context = Contexts(self)
        self._gate_lines = Throttle(
            GATE_LINES_PER_MINUTE, config.login.addresses_max, self.clock.monotonic
        )

    async def run(self, on_ready: Callable[[Node], None] = lambda _: None) -> None:
        """Start, call `on_ready`, and serve until cancelled.

        Raises ConfigError (Busy, KeyFileError, PluginError) where the start fails, and what `join`
        raises.
        """
        given, listen = self.config.node.join, self.config.node.listen
        invitation = parse_join(given) if given else None
        with locked(self.data_dir):
            # Before anything is made, or a ticket spent.
            path = socket_path(self.data_dir)
            if self.config.node.dev:
                listen = keep_to_itself(self.config)
            await check_free(listen)
            self.key, _ = load_or_create(self.data_dir)
            async with contextlib.AsyncExitStack() as stack:
                stack.enter_context(umask(0o077))
                await self._belong(invitation)
                if self.try_out:
                    listen = keep_to_itself(self.config)
                self._load()
                bound_recursion()
                await stack.enter_async_context(self._recorded())
                clients_max = await self._compose(stack)
                self._compose_broker(stack)
                async with self._running() as tasks:
                    await self._serve(stack, tasks, listen, path, clients_max)
                    for discovery in self._discoveries:
                        tasks.create_task(self._discover(discovery))
                    self._say_ready()
                    on_ready(self)
                    await anyio.sleep_forever()

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[asyncio.TaskGroup]:
        """The parts run, the backend decides, and the services can serve; nobody is let in yet."""
        async with asyncio.TaskGroup() as tasks, anyio.create_task_group() as serving:
            tasks.create_task(self.audit.run(), name="audit")
            tasks.create_task(self.lag.run(), name="lag")
            tasks.create_task(self.admission.run(lambda: None), name="admission")
            tasks.create_task(end_if_evicted(self.admission), name="eviction")
            for backend in (self.backend, *self.also):
                await start_backend(backend, serving)
            await start_services(self.services, serving, self.plugins.service_failed)
            try:
                yield tasks
            finally:
                # Sessions end before the services that serve them.
                self.broker.close()

    async def _belong(self, invitation: Ticket | Bundle | None) -> None:
        """The cluster that this node is of, or joins, and its auth backend."""
        self.store = Store(self.data_dir)
        if self.store.founding is not None:
            judge_backend(self.store.founding, self.plugins, self.config)
        if invitation is not None:
            judge_backend(invitation.founding, self.plugins, self.config)
            await join_with(
                invitation, self.store, key=self.key, config=self.config, clock=self.clock
            )
        self.backend = self.plugins.auth(self._context)
        if self.config.node.dev and not self.try_out:
            raise ConfigError(
                f"the auth backend {self.backend.name!r} has nothing to try out",
                hint="leave out --dev ([node] dev)",
                code="config.try_out",
            )
        self.also = self.plugins.auth_also(self._context)
        pin_further(self.data_dir, dict(zip(self.plugins.also, self.also, strict=True)))

    def _load(self) -> None:
        """What of the plugins records, serves and finds peers."""
        self.cluster = cluster_of(self.store, self.backend)
        recorder = self.plugins.recorder(self._context, self._sign_checkpoint)
        self.audit = Records(self.clock, recorder)
        self._collect_services()
        self._discoveries = () if self.try_out else self.plugins.discoveries(self._context)

    async def _compose(self, stack: contextlib.AsyncExitStack) -> int:
        """Admission, the link and who is on it: nothing runs, and nobody is let in.

        Returns how many programs of this machine may be connected.
        """
        self.admission = Admission(
            self.store,
            self.key,
            clock=self.clock,
            limits=self.config.admission,
            open_protocols=self.config.node.open_protocols,
            veto=self.backend.admit_node,
            record=self.audit.record,
        )
        judge_own(self.admission)
        stack.push_async_callback(self.store.files.flush)
        await stack.enter_async_context(rpc.runtime())
        await stack.enter_async_context(rpc.loop_gc())
        clients_max, limits = within_files(self.config.link)
        self.host = await stack.enter_async_context(
            LinkHost(
                self.key,
                limits=limits,
                admit=self.admission,
                privileged=self.admission.is_member,
            )
        )
        self.introductions = Introductions(
            self.host,
            self.admission,
            addrs=lambda: self.addrs,
            join_document=self.backend.join_document,
        )
        self.membership = Membership(
            self.host,
            self.key,
            self.admission,
            self.introductions,
            config=MembershipConfig(),
            clock=self.clock,
            describe=self._describe,
            data_dir=self.data_dir,
        )
        self.outside = Outside(
            self.membership.reach,
            self.membership.dial_backs,
            direct=lambda: self.direct_addrs,
            port=lambda: self.port_to_map,
            announce=self._mapped,
        )
        self.members = Members(
            self.membership,
            self.admission,
            self.host,
            clock=self.clock,
            clock_wrong=lambda: self.tree.clock_wrong,
            skew_s_max=self.config.admission.clock_skew_s_max,
        )
        self.overlay = Overlay(self.host, self.key)
        self.siblings = Siblings(
            self.services,
            reach=self._reach,
            admit=self.introductions.peer_of,
            record=self.audit.denied,
            spawn=self.host.spawn,
        )
        return clients_max

    def _compose_broker(self, stack: contextlib.AsyncExitStack) -> None:
        # Closed after the broker, which still writes then.
        grants = GrantStore(self.data_dir / "broker", self.clock)
        stack.callback(grants.close)
        self.tree = Tree(self.clock, store=grants, limits=self.config.broker)
        self.broker = Broker(
            peer_id=self.key.peer_id,
            cluster=self.cluster,
            backend=self.backend,
            services=self.services,
            clock=self.clock,
            audit=self.audit,
            limits=self.config.login,
            tree=self.tree,
            also=self.also,
        )
        self.broker.addrs = lambda: self.addrs
        self.broker.clock_trusted = self.admission.forget_early
        self.broker.proposals = self.proposals
        own = self._own_services()
        self.services |= {service.name: service for service in own}
        self.proposals |= {service.name: proposal_of(service) for service in own}
        stack.callback(self.broker.close)

    async def _serve(
        self,
        stack: contextlib.AsyncExitStack,
        tasks: asyncio.TaskGroup,
        listen: tuple[Multiaddr, ...],
        path: Path,
        clients_max: int,
    ) -> None:
        """Let others in: all that decides and serves is there."""
        shares = self.broker.restore()
        log.info("grants.restored", shares=shares)
        self.introductions.start()
        stack.push_async_callback(self.introductions.aclose)
        stack.callback(self.introductions.watch(self._peer_changed))
        relay = Relay(self.host, is_member=self.admission.is_member, enabled=self.config.node.relay)
        stack.callback(relay.start())
        judge_clock(self.membership, self.broker)  # before anybody is served
        self.host.handle(GATE_PROTOCOL, self._gate, access=Access.PUBLIC)
        await self.host.listen(listen)
        await stack.enter_async_context(self._local_socket(path, clients_max))
        if self.config.node.libp2p:
            # Or every full collection walks what its import has made.
            tasks.create_task(self.overlay.run(gc.freeze), name="overlay")
        self.membership.reach.bootstrap((*self.config.node.peers, *self.store.addrs))
        tasks.create_task(self.membership.run(lambda: None), name="membership")
        watch = watch_clock(
            self.membership,
            self.broker,
            own=self.key.peer_id,
            bound_s=self.config.admission.clock_skew_s_max,
        )
        tasks.create_task(watch, name="clock")
        follow = watch_network(self._network_changed, first=self.network)
        tasks.create_task(follow, name="network")
        tasks.create_task(self.outside.run(), name="outside")
        self._runtime_path = path
        stack.callback((self.data_dir / paths.RUNTIME_FILE).unlink, missing_ok=True)
        self._write_runtime_file()

    def _say_ready(self) -> None:
        log.info(
            "node.ready",
            peer=self.key.peer_id,
            cluster=self.cluster,
            addrs=" ".join(map(str, self.addrs)),
            services=",".join(sorted(self.services)),
            took_s=round(self.clock.monotonic() - self.started_at, 3),
        )

    # --- parts ------------------------------------------------------------------------------------

    def _sign_checkpoint(self, recorder: str) -> Callable[[bytes], bytes]:
        """For one recorder alone: plugins sign nothing in the domains of the core."""
        return lambda data: self.key.sign(b"wetware-%s-checkpoint:2\n" % recorder.encode() + data)

    @contextlib.asynccontextmanager
    async def _recorded(self) -> AsyncIterator[None]:
        async with recording(self.audit):
            self.audit.record("node.started", version=__version__)
            try:
                yield
            finally:
                self.audit.flush_denials()
                self.audit.record("node.stopped")

    def _describe(self) -> dict[str, Any]:
        """What the membership says of this node; asked again and again."""
        return {
            "addrs": self.direct_addrs,
            "host": socket.gethostname(),
            "name": self.name,
            "labels": dict(text.split("=", 1) for text in self.config.node.labels),
            "version": __version__,
            "services": tuple(sorted(set(self.services) - set(CORE_SERVICES))),
            "memory_bytes": rss_bytes(),
        }

    def _collect_services(self) -> None:
        """What the recorder, the backend and the plugins offer."""
        recorder = self.audit.recorder
        own = [
            *(recorder.services if recorder is not None else ()),
            *(service for each in (self.backend, *self.also) for service in each.services),
        ]
        reserved = [SESSION_SERVICE, *CORE_SERVICES, *(service.name for service in own)]
        offered = {service.name: (service, proposal_of(service)) for service in own}
        offered |= self.plugins.services(self._context, reserved)
        for name, (service, proposal) in offered.items():
            self.services[name], self.proposals[name] = service, proposal

    def _own_services(self) -> tuple[Service, ...]:
        return (
            NodeService(
                status=partial(status_of, self),
                restart_overlay=lambda: self.overlay.crash(
                    OverlayError("an operator asked for a restart")
                ),
                trust_clock=self._trust_clock,
                proposal=self.broker.proposal,
                hand_over=partial(hand_over, self),
                audit=self.audit,
            ),
            ClusterService(
                self._context("cluster", None),
                admission=self.admission,
                membership=self.membership,
                audit=self.audit,
                check=partial(check_node, self),
                limits=self.config.login,
                closed=bool(self.try_out),
            ),
            GrantsService(self.tree, self.audit, self.store.files.confirm),
        )

    async def _trust_clock(self, by: Principal) -> None:
        offsets = self.membership.swim.clock_offsets_s
        await self.broker.trust_clock(lambda: middle(offsets.values()), by)

    async def _gate(self, stream: Stream) -> None:
        """One client over the network: a stranger with little room until the broker trusts it."""
        connection, login = stream.connection, self.config.login
        address, member = connection.address, self.admission.is_member(connection.peer)
        try:
            with (
                self.broker.gate_slot(connection, None if member else address),
                self.siblings.served(connection) as peer,
            ):
                channel = Channel("noise", connection.channel_binding)
                await rpc.serve(
                    RpcPipe(stream),
                    GateServant(self.broker, channel, address, peer),
                    stranger_message_bytes_max=login.stranger_message_bytes_max,
                    trust_s=max(login.stranger_s_max, login.deadline_s + 5),
                )
        except LimitExceeded as exc:
            if (left_out := self._gate_lines.lines(address_key(address))) is not None:
                log.warning(
                    "gate.refused",
                    peer=connection.peer,
                    address=address,
                    why=exc,
                    unlogged=left_out,
                )
            stream.reset()

    @contextlib.asynccontextmanager
    async def _local_socket(self, path: Path, clients_max: int) -> AsyncIterator[None]:
        """Clients of this machine. The channel is the node itself: only its owner can connect."""
        channel = Channel("unix", self.key.peer_id.multihash)
        async with rpc.serve_unix(
            path,
            lambda _peer: GateServant(self.broker, channel, None),
            connections_max=clients_max,
            trust_s=CLIENT_LOGIN_S_MAX,
        ):
            yield

    def _write_runtime_file(self) -> None:
        data = {
            "peer_id": str(self.key.peer_id),
            "socket": str(self._runtime_path),
            "pid": os.getpid(),
            "addrs": [str(addr) for addr in self.own_addrs],
            "cluster": self.cluster,
            "auth": self.backend.name,
            "auth_also": [backend.name for backend in self.also],
            "version": __version__,
            "plugins": [p.name for p in self.plugins.report if str(p.state) == "loaded"],
        }
        file, text = self.data_dir / paths.RUNTIME_FILE, json.dumps(data, indent=1)
        self.store.files.reserve.replace(file, text.encode(), must=True)

    # --- peers ------------------------------------------------------------------------------------

    def _peer_changed(self, event: PeerUp | PeerDown) -> None:
        if isinstance(event, PeerDown):
            self.siblings.gone(event.peer)

    async def _reach(self, peer: PeerId) -> Connection:
        """A connection to another member; raises NotFound, DialError."""
        known, reach = self.membership.member(peer), self.membership.reach
        if known is None or peer == self.key.peer_id:
            raise NotFound(
                f"{peer} is no other member of the cluster",
                hint="`ww ls --wide` shows the members",
                code="not_found.member",
            )
        if known.state not in (State.ALIVE, State.SUSPECT) and reach.connected(peer) is None:
            raise DialError(
                f"{self.called(peer)} ({peer}) is {known.state}",
                hint="wait until it is back; `ww ls --all` shows since when",
                code="overlay.dial.not_alive",
            )
        return await reach.connect(peer)

    def _network_changed(self, network: Network) -> None:
        log.info("network.changed", addrs=" ".join(network.hosts))
        self.network = network
        self.host.network_changed(frozenset(network.hosts))
        self.outside.network_changed()
        self.membership.network_changed()
        try:
            self._write_runtime_file()
        except OSError as exc:
            log.warning("runtime.unwritable", why=exc)

    def _mapped(self, addr: Multiaddr | None) -> None:
        self.mapped = () if addr is None else (addr.with_peer(self.key.peer_id),)
        self.membership.refresh()

    async def _discover(self, discovery: Discovery) -> None:
        """Announce this node, and let the membership try what a discovery finds."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(discovery.advertise(tuple(map(str, self.addrs))))
                async for text in discovery.find_peers():
                    self.membership.reach.found(text, discovery.name)
                log.info("discovery.ended", discovery=discovery.name)
        except Exception:
            log.exception("discovery.failed", discovery=discovery.name)
