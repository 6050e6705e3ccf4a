"""What a session can do: open services, pass parts of itself on, end them, and ask why.

A session is held by who logged in, who redeemed a sturdy reference, and who was given a part of
another session; what differs is the grant below which everything happens, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from wetware import rpc
from wetware.base.structs import to_struct
from wetware.broker.asked import terms_from_struct
from wetware.broker.grants import BEARER, SESSION_SERVICE, Grant
from wetware.broker.methods import all_methods, pattern_within
from wetware.broker.protocol import CORE
from wetware.broker.sturdy import SturdyRef
from wetware.broker.subtree import SubtreeServant, clean
from wetware.broker.terms import Terms
from wetware.broker.told import Identity, ServiceInfo
from wetware.broker.where import typed
from wetware.errors import Denied, NotFound, Unrecorded, Unsupported

if TYPE_CHECKING:
    from wetware.broker.broker import Broker
    from wetware.broker.ports import Service
    from wetware.broker.told import Explanation
    from wetware.identity import Principal


class SessionServant(SubtreeServant, interface=CORE.Session):
    """See core.capnp.

    Args:
        broker: Of the node.
        grant: The session's.
        roles: That a login was granted by; empty for other sessions.
        record_login: For a login that could not be recorded: does so before anything is given.
            Until then the session shows and ends what is its principal's, and opens services for
            ending things only (`hookspecs.Service.ending`).
    """

    def __init__(
        self,
        broker: Broker,
        grant: Grant,
        roles: frozenset[str],
        record_login: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        super().__init__(broker.tree, broker.audit, grant.principal)
        self._broker, self._grant, self._roles = broker, grant, roles
        self._record_login = record_login
        self._opened: dict[tuple[str, frozenset[str] | None], Grant] = {}

    async def whoami(self) -> dict[str, object]:
        return to_struct(
            Identity(
                str(self._principal),
                tuple(sorted(self._roles)),
                str(self._broker.peer_id),
                self._broker.cluster,
                self._grant.id,
            )
        )

    async def services(self) -> dict[str, object]:
        found = [
            ServiceInfo(name, service.interface.name, tuple(sorted(patterns)))
            for name, service in sorted(self._broker.services.items())
            if (patterns := self._grant.patterns(name))
        ]
        return {"services": [to_struct(info) for info in found]}

    async def open(self, name: str) -> dict[str, object]:
        """A service's bootstrap capability under a grant of its own."""
        service = self._covered(name)
        grant = self._opened.get((name, None))
        if grant is None or grant.ended is not None:
            only: frozenset[str] | None = None
            try:
                await self._admit("service.opened", grant=self._grant.id, service=name)
            except Unrecorded:
                only = self._ending(name, service)
                if not only:
                    raise
            grant = self._service_grant(name, only)
        grant.lend()
        return {"service": rpc.guarded(service.bootstrap(self._principal), grant)}

    def _ending(self, name: str, service: Service) -> frozenset[str]:
        """What may be called of a service while that cannot be recorded: it ends things."""
        mine = self._grant.patterns(name)
        return frozenset(method for method in service.ending if pattern_within(method, mine))

    def _service_grant(self, name: str, only: frozenset[str] | None) -> Grant:
        """A service's grant, for some of its methods or for all that the session has."""
        grant = self._opened.get((name, only))
        if grant is None or grant.ended is not None:
            label, terms = f"service {name}", Terms()
            if only is not None:
                label += ", to end things: the audit log cannot be written"
                terms = Terms(services={name: only})
            grant = self._grant.derive(kind="service", label=label, service=name, terms=terms)
            self._opened[name, only] = grant
        return grant

    def _covered(self, name: str) -> Service:
        """A service that the grant covers; raises Denied or Unsupported."""
        principal = self._principal
        if name == SESSION_SERVICE or not self._grant.patterns(name):
            self._broker.audit.denied(
                "open.refused",
                key=(self._grant.id,),
                principal=principal,
                grant=self._grant.id,
                service=name[:64],
            )
            hint = "`ww whoami` shows what your roles cover"
            said = f"no grant of {principal} covers a service {name[:64]!r}"
            if principal.backend == BEARER:
                hint = "`ww use REF services` shows what the reference covers"
            elif self._grant.kind == "session" and self._broker.is_ungranted(name):
                said += ": it is installed, not granted to members yet"
                hint = f"an operator runs `ww role accept {name}`"
            raise Denied(said, hint=hint)
        service = self._broker.services.get(name)
        if service is None:
            have = ", ".join(sorted(self._broker.services)) or "none"
            raise Unsupported(
                f"this node has no service {name[:64]!r}; it has {have}",
                hint="`ww plugin list` on the node says why a plugin is not loaded",
                code="unsupported.service",
            )
        return service

    async def logout(self) -> None:
        """End the session. Runs under the grant it ends, so the end comes right after the reply."""
        asyncio.get_running_loop().call_soon(self._grant.close, "logged out")

    # --- passing on -------------------------------------------------------------------------------

    async def attenuate(self, terms: dict[str, Any], label: str) -> dict[str, object]:
        added = terms_from_struct(terms, self._grant, self._broker)
        grant = self._grant.derive(
            kind="attenuated",
            label=clean(label, "attenuated"),
            terms=added,
            service=SESSION_SERVICE,
        )
        try:
            await self._admit_grant("grant.attenuated", grant)
            grant.check_live()
        except BaseException:
            grant.revoke("it could not be recorded")
            raise
        session = SessionServant(self._broker, grant, self._roles)
        return {"session": rpc.guarded(session, grant), "grant": to_struct(grant.info())}

    async def share(self, terms: dict[str, Any], uses: int, label: str) -> dict[str, object]:
        broker = self._broker
        grant, secret = await broker.tree.share(
            self._grant,
            terms_from_struct(terms, self._grant, broker),
            label=clean(label, "share"),
            uses=uses or None,
            admit=lambda made: self._admit_grant("grant.shared", made),
        )
        ref = SturdyRef(broker.peer_id, tuple(broker.addrs()), grant.id, secret)
        return {"ref": ref.text, "grant": to_struct(grant.info())}

    async def vouch(self, claim: bytes) -> None:
        if claim in self._broker.claims:
            await self._admit("session.vouched", grant=self._grant.id)
            if claim in self._broker.claims:  # who made it may wait no more
                self._broker.claims[claim] = self._grant

    async def _admit(self, event: str, **fields: object) -> None:
        """Record what is about to be given, after the login; raises Unrecorded."""
        if self._record_login is not None:
            await self._record_login()
            self._record_login = None
        await self._broker.audit.admit(event, principal=self._principal, **fields)

    async def _admit_grant(self, event: str, grant: Grant) -> None:
        await self._admit(
            event,
            grant=grant.id,
            parent=self._grant.id,
            label=grant.label,
            terms="; ".join(grant.terms.describe())[:1024],
        )

    # --- what was passed on, and why --------------------------------------------------------------

    def _tops(self, principal: Principal | None) -> list[Grant]:
        """At a login all that comes from the principal's roles."""
        if principal not in (None, self._principal):
            return []
        if self._grant.kind == "session":
            return self._tree.roots(self._principal)
        return [self._grant]

    @property
    def _operator(self) -> bool:
        return pattern_within("Grants.revoke", self._grant.patterns("grants"))

    def _may_see(
        self, explanation: Explanation, principals: frozenset[Principal], *, named: bool
    ) -> bool:
        """A command line logs in, or redeems, anew each time.

        So who did that sees what concerns their principal; who was handed a part of a session,
        which has the same principal, what came from that part alone, or what they were told the ID
        of.
        """
        me, grant = self._principal, self._grant
        if grant.kind in ("session", "redeemed") and me in principals:
            return True
        above = takewhile(lambda g: g.kind != "role" and g.principal == me, grant.lineage)
        ids = {g.id for g in above} if named else {grant.id}
        return any(step.grant in ids for step in explanation.steps)

    async def explain(
        self, service: str, interface: str, method: str, args: list[dict[str, str]]
    ) -> dict[str, object]:
        found = self._broker.services.get(service)
        called = None if found is None else _method(found, interface, method)
        if called is None:
            asked = ".".join(part for part in (service, interface, method) if part)
            raise NotFound(
                f"this node knows no method {asked[:200]}",
                hint="`ww services --describe` shows the methods",
                code="not_found.method",
            )
        values = {item["key"]: typed(item["value"], called, item["key"]) for item in args}
        probe = self._grant.derive(kind="service", label=f"service {service}", service=service)
        try:
            explanation = probe.explain(called, values)
        finally:
            probe.close("it was only asked about")
        return {"explanation": to_struct(explanation)}

    def released(self) -> None:
        """The client let go, or its connection ended.

        What came from any but a login goes on while somebody holds it: the grant knows.
        """
        if self._grant.kind == "session":
            self._grant.close("the session was closed")
        else:
            self._grant.let_go()


def _method(service: Service, interface: str, method: str) -> rpc.Method | None:
    """A method of a service by name; of its bootstrap interface if none is named."""
    for found in all_methods(service.interface):
        if interface in ("", found.interface.name) and method == found.name:
            return found
    return None
