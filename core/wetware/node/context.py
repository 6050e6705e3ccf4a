"""What plugins get of a node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Coroutine
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wetware.base.log import get_logger
from wetware.base.threads import Threads
from wetware.broker.derived import Deriver
from wetware.errors import InvalidArgument, Unsupported
from wetware.hookspecs import PluginContext

if TYPE_CHECKING:
    from wetware.base.access import Access
    from wetware.identity import PeerId
    from wetware.member import Member
    from wetware.node.parts import Parts
    from wetware.overlay.link import Stream
    from wetware.overlay.peers import PeerDown, PeerUp
    from wetware.rpc import Ref

_SIGN_DOMAINS_REFUSED = (
    b"noise-libp2p-static-key:",
    b"libp2p-tls-handshake:",
    b"\x12libp2p-peer-record",  # an envelope's domain comes with its length
    b"wetware-",
)
"""Domains in which only the core signs."""


class Contexts:
    """Makes what each plugin gets of a node; its overlay is usable once the parts are composed."""

    def __init__(self, node: Parts) -> None:
        self._node, self._overlay = node, _PluginOverlay(node)
        self._threads = defaultdict[str, Threads](Threads)
        self._deriver = Deriver(lambda: node.broker)

    def __call__(self, name: str, config: object) -> PluginContext:
        """The context of a plugin with this configuration, or None."""
        node = self._node
        store = None if name in node.plugins.also else node.store
        data_dir = node.data_dir / "plugins" / name
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        return PluginContext(
            name=name,
            config=config,
            log=get_logger(f"plugin.{name}"),
            data_dir=data_dir,
            clock=node.clock,
            overlay=self._overlay,
            join_document=store.join_document if store else None,
            joined=node.store.join_document is not None,
            founding=store.founding.statement if store and store.founding else None,
            authority=store is not None,
            configured=node.config.given(f"plugins.{name}"),
            dev=node.config.node.dev and store is not None,
            evicted=lambda peer: node.admission.judge.evicted(peer) is not None,
            proposals=MappingProxyType(node.proposals),
            threads=self._threads[name],
            open_sibling=partial(self._sibling, name),
            deriver=self._deriver,
        )

    async def _sibling(self, plugin: str, peer: PeerId, name: str) -> Ref:
        """See `PluginContext.sibling`; a plugin has siblings of its own alone."""
        node = self._node
        owners = [each.name for each in node.plugins.report if name in each.services]
        if owners not in ([], [plugin]):
            raise InvalidArgument(f"{name!r} is a service of the plugin {owners[0]!r}")
        service = node.services.get(name)
        if service is None:
            raise Unsupported(
                f"the service {name!r} is not running at this node",
                hint="`ww plugin list` says why",
                code="unsupported.service",
            )
        return await node.siblings.open(peer, service)


class _PluginOverlay:
    """`wetware.overlay.peers.Overlay` over the link host, for members only."""

    def __init__(self, node: Parts) -> None:
        self._node = node

    @property
    def peer_id(self) -> PeerId:
        return self._node.key.peer_id

    @property
    def cluster(self) -> str:
        return self._node.cluster

    def addrs(self) -> tuple[str, ...]:
        return tuple(map(str, self._node.addrs))

    def peers(self) -> tuple[PeerId, ...]:
        return self._node.introductions.peers()

    def watch_peers(self, callback: Callable[[PeerUp | PeerDown], None]) -> Callable[[], None]:
        return self._node.introductions.watch(callback)

    def members(self, selector: str = "") -> tuple[Member, ...]:
        return self._node.members.list(selector)

    def founder(self) -> PeerId | None:
        return self._node.members.founder()

    def watch_members(
        self, callback: Callable[[Member], None], selector: str = ""
    ) -> Callable[[], None]:
        return self._node.members.watch(callback, selector)

    async def open_stream(self, peer: PeerId, *protocols: str) -> Stream:
        return await self._node.host.open_stream(peer, *protocols)

    def handle(
        self,
        protocol: str,
        handler: Callable[[Stream], Coroutine[Any, Any, None]],
        *,
        access: Access,
    ) -> Callable[[], None]:
        return self._node.host.handle(protocol, handler, access=access)

    async def provide(self, key: bytes) -> bool:
        return await self._node.overlay.provide(key)

    async def find_providers(self, key: bytes) -> tuple[str, ...]:
        found = await self._node.overlay.find_providers(key)
        return tuple(str(addr) for provider in found for addr in provider.addrs)

    def sign(self, domain: bytes, data: bytes) -> bytes:
        if not domain or (domain + data).startswith(_SIGN_DOMAINS_REFUSED):
            raise ValueError(f"a plugin does not sign in the domain {domain!r}")
        return self._node.key.sign(domain + data)
