"""Grants for what outlives a call: a process, a job. See `hookspecs.PluginContext.derive`.

A live one is below the grant of a call, and references that came with the call are called under it.
A durable one is below a session, as a share is, but nobody has a secret of it: the service of this
node that it is for knows its ID, and gets at what it covers after a restart as well.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.broker.asked import terms_from_struct
from wetware.broker.grants import SESSION_SERVICE, Grant
from wetware.broker.naming import object_of
from wetware.broker.protocol import CORE
from wetware.broker.session import SessionServant
from wetware.broker.subtree import clean
from wetware.errors import InvalidArgument, Unsupported, WetwareError

if TYPE_CHECKING:
    from wetware.broker.broker import Broker

KIND: Final = "derived"
LABEL_CHARS_MAX: Final = 512
"""Of NAME=SERVICE:OBJECT."""
_EMPTY: Final[Mapping[str, Any]] = {
    "services": [],
    "where": [],
    "expires_in_s": 0.0,
    "rate": "",
    "calls": 0,
    "bytes": 0,
    "fence": b"",
    "sealed": False,
}

Asked = Mapping[str, tuple[str, Iterable[str]]]
"""Name → ("SERVICE" or "SERVICE:OBJECT", constraints)."""
Keep = Callable[[str], Awaitable[object]]


class Derived:
    """A grant that is held by a service of this node, until it is ended.

    It ends as well with its role, its user and every grant above, and when somebody revokes it.
    What it has by name is below it, and can be revoked by itself.
    """

    def __init__(self, grant: Grant, broker: Broker | None = None) -> None:
        self._grant, self._broker = grant, broker

    @property
    def id(self) -> str:
        """16 hex digits, as in `ww grants`; no secret."""
        return self._grant.id

    @property
    def ended(self) -> WetwareError | None:
        """Why nothing works any more; None while it lives."""
        return self._grant.ended

    def under(self, name: str, ref: rpc.Ref) -> rpc.Ref:
        """The same object as `ref`, which came with the call that this was derived for.

        Calls of what is returned end with the grant. Raises what ended that, LimitExceeded.
        """
        what = ref.interface.name if ref.interface is not None else ""
        label = clean(f"{name}={what}", name)
        return ref.under(self._grant.derive(kind=KIND, label=label, service=self._grant.service))

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[dict[str, rpc.Ref]]:
        """What a durable one has by name, for the block; without what was revoked by itself.

        Raises Unsupported where a service is not running, and what the services raise.
        """
        broker = self._broker
        assert broker is not None  # noqa: S101  # it is durable
        named: dict[str, tuple[Grant, str]] = {}
        for grant in self._grant.children:
            name, _, what = grant.label.partition("=")
            named[name] = grant, what
        found: dict[str, rpc.Ref] = {}
        async with rpc.loopback(_Sessions(broker, [grant for grant, _ in named.values()])) as here:
            sessions = here.bootstrap(CORE.Peer)
            for name, (grant, what) in named.items():
                session = (await sessions.call("open", service=grant.id))["service"]
                service, colon, of = what.partition(":")
                ref = (await session.cast(CORE.Session).call("open", name=service))["service"]
                ref = ref.cast(broker.service(service).interface)
                found[name] = await object_of(ref, of) if colon else ref
            yield found

    def on_end(self, callback: Callable[[WetwareError], None]) -> Callable[[], None]:
        """Call back once when it ends, at once if it has; returns a remover.

        Of a durable one not when the node stops: it is there again after the start.
        """
        lives_on = self._grant.durable

        def ended(error: WetwareError) -> None:
            if not (lives_on and self._broker is not None and self._broker.closed):
                callback(error)

        return self._grant.on_end(ended)

    def end(self, why: str) -> None:
        """End it, and all calls under it, now. Idempotent."""
        self._grant.revoke(why)


class _Sessions(rpc.Servant, interface=CORE.Peer):
    """Sessions of some grants, by their IDs; in this process alone."""

    def __init__(self, broker: Broker, grants: Iterable[Grant]) -> None:
        self._broker, self._grants = broker, {grant.id: grant for grant in grants}

    async def open(self, service: str) -> dict[str, object]:
        grant = self._grants[service]
        session = SessionServant(self._broker, grant, frozenset())
        return {"service": rpc.guarded(session, grant)}


class Deriver:
    """What plugins derive grants with: `hookspecs.PluginContext`.

    Args:
        broker: Gives the node's; None where there is no node, for tests: nothing is durable then.
    """

    def __init__(self, broker: Callable[[], Broker] | None = None) -> None:
        self._of_node = broker

    @property
    def _broker(self) -> Broker:
        if self._of_node is None:
            raise Unsupported("no grant outlives a call without a node")
        return self._of_node()

    def derive(self, guard: rpc.Guard, label: str) -> Derived:
        """See `hookspecs.PluginContext.derive`."""
        if not isinstance(guard, Grant):
            raise InvalidArgument("the guard of a node's own call is no grant of a principal")
        label = clean(label, KIND)
        return Derived(guard.derive(kind=KIND, label=label, service=guard.service))

    async def admit(self, guard: rpc.Guard | None, event: str, **fields: object) -> None:
        """See `hookspecs.PluginContext.admit`."""
        if isinstance(guard, Grant):
            audit = self._broker.audit
            await audit.admit(event, principal=guard.principal, grant=guard.id, **fields)

    async def derive_durable(
        self, session: rpc.Ref, label: str, asked: Asked, keep: Keep
    ) -> Derived:
        """See `hookspecs.PluginContext.derive_durable`."""
        broker = self._broker
        parent = await _vouched(broker, session)
        for name, (what, _) in asked.items():
            text = f"{name}={what}"
            if "=" in name or not text.isprintable() or len(text) > LABEL_CHARS_MAX:
                raise InvalidArgument(f"{text[:80]!r} names nothing that can be kept")
        services = {SESSION_SERVICE} | {what.partition(":")[0] for what, _ in asked.values()}
        whole = await _kept(broker, parent, clean(label, KIND), services, keep=keep)
        try:
            for name, (what, where) in asked.items():
                await _kept(broker, whole, f"{name}={what}", (what,), where)
        except BaseException:
            whole.revoke("it could not be made")
            raise
        return Derived(whole, broker)

    async def derived(self, id_: str) -> Derived:
        """See `hookspecs.PluginContext.derived`."""
        broker = self._broker
        await broker.restored.wait()
        return Derived(broker.tree.kept(id_), broker)


async def _vouched(broker: Broker, session: rpc.Ref) -> Grant:
    """The grant of a session of this node, for who was handed it.

    A reference does not tell whose object it is, and an ID is no permission: so the session itself
    says it, within this process, to who can call it with a number that nobody else knows.
    """
    claim = secrets.token_bytes(16)
    broker.claims[claim] = None
    try:
        await session.cast(CORE.Session).call("vouch", claim=claim)
    finally:
        grant = broker.claims.pop(claim)
    if grant is None:
        raise InvalidArgument(
            "what was handed in is no session of this node", hint="log in at this node"
        )
    return grant


async def _kept(
    broker: Broker,
    parent: Grant,
    label: str,
    services: Iterable[str],
    where: Iterable[str] = (),
    keep: Keep | None = None,
) -> Grant:
    wire = {
        **_EMPTY,
        "services": [{"name": name, "methods": []} for name in sorted(services)],
        "where": [{"service": "", "text": text} for text in where],
    }
    terms = terms_from_struct(wire, parent, broker)

    async def admit(grant: Grant) -> None:
        await broker.audit.admit(
            "grant.derived",
            principal=grant.principal,
            grant=grant.id,
            parent=parent.id,
            label=label,
            terms="; ".join(terms.describe())[:1024],
        )
        if keep is not None:
            await keep(grant.id)

    grant, _ = await broker.tree.share(parent, terms, kind=KIND, label=label, admit=admit)
    return grant
