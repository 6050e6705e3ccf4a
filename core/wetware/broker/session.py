"""What a session can do: open services, pass parts of itself on, end them, and ask why.

A session is held by who logged in, who redeemed a sturdy reference, and who was given a part of
another session; what differs is the grant below which everything happens, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Final

from wetware import rpc
from wetware.broker.fences import Fence
from wetware.broker.grants import BEARER, SESSION_SERVICE, Grant
from wetware.broker.methods import ANY, SERVICES_MAX, known_patterns, pattern_within, patterns_of
from wetware.broker.naming import check_against, one_object
from wetware.broker.protocol import CORE
from wetware.broker.sturdy import SturdyRef
from wetware.broker.terms import Terms
from wetware.broker.values import Rate
from wetware.broker.where import WHERE_MAX, Where, typed
from wetware.errors import (
    Amplification,
    Denied,
    InvalidArgument,
    NotFound,
    Unrecorded,
    Unsupported,
)
from wetware.rpc.values import payload_bytes

if TYPE_CHECKING:
    from wetware.broker.decisions import Decision
    from wetware.broker.gate import Broker
    from wetware.broker.ports import Service
    from wetware.broker.records import Records
    from wetware.broker.tree import Tree

TERMS_CHARS_MAX: Final = 4096
"""Of all constraints of a grant that a holder makes, so that `grants_max` of them fit in memory."""
GRANTS_MAX: Final = 1000
"""Grants of one answer."""
ANSWER_BYTES_MAX: Final = 768 << 10
"""Of them together: an answer has to fit into a message."""
INFO_BYTES: Final = 256
"""What a GrantInfo costs beside its texts, at most."""
LABEL_CHARS_MAX: Final = 128
REASON_CHARS_MAX: Final = 256
EXPIRES_S_MAX: Final = 100 * 365 * 86_400.0
SEALED: Final = frozenset(
    f"Session.{name}"
    for name in (
        "whoami", "services", "open", "logout", "grants", "why", "explain", "keep", "ended"
    )
)  # fmt: skip
"""What a session can do that is not to be passed on."""


def terms_from_wire(wire: Mapping[str, Any], parent: Grant, broker: Broker) -> Terms:
    """The struct Terms for a child of `parent`.

    Raises InvalidArgument for what is malformed, and for a constraint that binds nothing.
    """
    _check_size(wire)
    services: dict[str, frozenset[str]] | None = None
    where = [Where.parse(w["text"], w["service"] or ANY) for w in wire["where"]]
    if wire["services"]:
        services = {}
        everything = any(item["name"] == ANY for item in wire["services"])
        for item in wire["services"]:
            name, colon, of = item["name"].partition(":")
            if colon and everything:
                raise InvalidArgument(
                    f"{ANY!r} is of every service, so beside it {item['name'][:80]!r} is not held "
                    "to the object",
                    hint=f"make a grant for each, or name services instead of {ANY!r}",
                    code="invalid.terms",
                )
            mine, asked = parent.patterns(name), patterns_of({name: item["methods"]})[name]
            if not mine:
                raise Amplification(
                    f"you have nothing of {name!r} to pass on", hint="`ww services` shows what"
                )
            if name in services:
                raise InvalidArgument(
                    f"{name!r} is named twice",
                    hint="make a grant for each object",
                    code="invalid.terms",
                )
            _check_known(name, asked, parent, broker)
            services[name] = asked or mine
            if colon:
                interface = _served(name, broker).interface
                services[name], held = one_object(name, interface, of, asked, mine)
                where.append(held)
    if wire["sealed"] or services is not None:
        services = dict(parent.services) if services is None else services
        keep = services.get(SESSION_SERVICE, parent.patterns(SESSION_SERVICE))
        if wire["sealed"]:
            keep = SEALED if keep & {ANY, "Session.*"} else SEALED & keep
        services[SESSION_SERVICE] = keep
    seconds = wire["expires_in_s"]
    if not 0 <= seconds <= EXPIRES_S_MAX:
        raise InvalidArgument(
            f"an end in {seconds:g} s", hint="write e.g. 1h", code="invalid.duration"
        )
    terms = Terms(
        services=services,
        where=tuple(where),
        expires_at=parent.tree.clock.time() + seconds if seconds else None,
        rate=Rate.parse(wire["rate"]) if wire["rate"] else None,
        calls=wire["calls"] or None,
        bytes=wire["bytes"] or None,
        fence=Fence.decode(wire["fence"]) if wire["fence"] else None,
    )
    _check_where(terms, parent.services if services is None else services, broker.services)
    return terms


def _check_size(wire: Mapping[str, Any]) -> None:
    """Before anything is looked at: the work, and what is kept, are bounded."""
    for what, found, limit in (
        ("services", len(wire["services"]), SERVICES_MAX),
        ("constraints", len(wire["where"]), WHERE_MAX),
        (
            "characters of constraints",
            sum(len(w["text"]) for w in wire["where"])
            + sum(len(item["name"]) for item in wire["services"]),
            TERMS_CHARS_MAX,
        ),
    ):
        if found > limit:
            raise InvalidArgument(f"{found} {what}; {limit} are allowed", code="invalid.terms")


def _served(name: str, broker: Broker) -> Service:
    """A service of this node; raises NotFound."""
    service = broker.services.get(name)
    if service is None:
        raise NotFound(
            f"this node has no service {name[:64]!r}",
            hint=f"it has {', '.join(sorted(broker.services)) or 'none'}",
        )
    return service


def _check_known(name: str, asked: frozenset[str], parent: Grant, broker: Broker) -> None:
    """What is passed on by name exists: else a typing error makes a grant of nothing."""
    if name in (ANY, SESSION_SERVICE):
        return
    known = known_patterns(_served(name, broker).interface)
    for pattern in sorted(asked - known - parent.patterns(name) - {ANY}):
        raise InvalidArgument(
            f"{pattern!r} is no method of {name}",
            hint=f"`ww services {name} --describe` shows them",
            code="invalid.methods",
        )


def _check_where(
    terms: Terms, granted: Mapping[str, frozenset[str]], services: Mapping[str, Service]
) -> None:
    """Each constraint has to bind something of what is granted."""
    named = [name for name in granted if name not in (SESSION_SERVICE, ANY)]
    names = sorted({*named, *(services if ANY in granted else ())} & services.keys())
    everywhere = granted.get(ANY, frozenset())
    for where in terms.where:
        failure: InvalidArgument | None = None
        for name in names:
            if where.service not in (ANY, name):
                continue
            try:
                patterns = granted.get(name, frozenset()) | everywhere
                check_against([where], name, services[name].interface, patterns)
            except InvalidArgument as exc:
                failure = exc
            else:
                failure = None
                break
        else:
            raise failure or InvalidArgument(
                f"{where.text!r} is about no service that is granted",
                hint="`ww services` shows them",
                code="invalid.where",
            )


def _label(text: str, otherwise: str) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in text.strip()[:LABEL_CHARS_MAX])
    return clean or otherwise


def listed(tops: Iterable[Grant], limit: int) -> tuple[list[dict[str, object]], int]:
    """(GrantInfos of some subtrees, at most `limit`; how many there are).

    Those near the top come first: who holds something below cannot push out what is above. What
    does not fit into an answer is left out.
    """
    found: dict[Grant, None] = dict.fromkeys(tops)
    todo = deque(found)
    while todo:
        for grant in todo.popleft().children:
            if grant not in found:
                found[grant] = None
                todo.append(grant)
    infos: list[dict[str, object]] = []
    size = 0
    for grant in islice(found, limit):
        info = grant.info()
        size += payload_bytes(info) + INFO_BYTES
        if size > ANSWER_BYTES_MAX:
            break
        infos.append(info)
    return infos, len(found)


async def revoke(
    audit: Records, grant: Grant, reason: str, by: str, *, operator: bool = False
) -> int:
    """End a subtree now; the record and the disk follow, and are waited for.

    What the call itself runs under ends right after its answer.
    """
    reason = _label(reason[:REASON_CHARS_MAX], f"by {by}")
    cut = end_now([grant], reason)
    record = audit.ended if operator else audit.record
    record(
        "grant.revoked",
        grant=grant.id,
        principal=grant.principal,
        label=grant.label,
        by=by,
        cut=cut,
        reason=reason,
    )
    await settle(grant.tree, audit, [grant], reason)
    return cut


def end_now(grants: Iterable[Grant], reason: str) -> int:
    """End subtrees; returns how many grants ended, `settle` has to follow.

    What the call runs under, up to what is durable, carries its answer and ends with `settle`: all
    that could come back after a crash ends now.
    """
    running = rpc.current_guard()
    lineage = running.lineage if isinstance(running, Grant) else ()
    spared = frozenset(takewhile(lambda grant: not grant.durable, lineage))

    grants = list(grants)
    # What has several roles above it is counted once.
    ending = {b for grant in grants for b in grant.subtree() if b.ended is None}

    def end(grant: Grant) -> None:
        if grant not in spared or grant.ended is not None:
            grant.revoke(reason)
            return
        for child in grant.children:
            end(child)

    for grant in grants:
        end(grant)
    return len(ending)


async def settle(tree: Tree, audit: Records, grants: Iterable[Grant], reason: str) -> None:
    """Wait until what was ended is on disk and on record, so that it can be answered.

    Raises StoreUnavailable; where the log fails, it tells of the gap itself.
    """
    store = tree.store
    try:
        recorded = asyncio.ensure_future(audit.written())
        if store is not None:
            await store.written()
        await recorded
    finally:
        for grant in grants:  # what the call runs under: in the next turn, after the answer
            asyncio.get_running_loop().call_soon(grant.revoke, reason)


def why(tree: Tree, decision: str, may_see: Callable[[Decision], bool]) -> Decision:
    """A denial that is remembered, by its ID, or the latest ("") of those that one may see.

    Raises NotFound.
    """
    for explanation in tree.decisions.newest_first():
        if decision in ("", explanation.decision) and may_see(explanation):
            return explanation
    what = f"no denial {decision[:32]!r} of yours" if decision else "no denial of yours"
    raise NotFound(
        f"{what} is remembered at this node",
        hint="the error of a denied call names its ID; older ones are in `ww audit tail`",
    )


class SessionServant(rpc.Servant, interface=CORE.Session):
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
        self._broker, self._grant, self._roles = broker, grant, roles
        self._record_login = record_login
        self._opened: dict[tuple[str, frozenset[str] | None], Grant] = {}

    async def whoami(self) -> dict[str, object]:
        return {
            "principal": str(self._grant.principal),
            "roles": sorted(self._roles),
            "node": str(self._broker.peer_id),
            "cluster": self._broker.cluster,
            "grant": self._grant.id,
        }

    async def services(self) -> dict[str, object]:
        return {
            "services": [
                {"name": name, "interface": service.interface.name, "methods": sorted(patterns)}
                for name, service in sorted(self._broker.services.items())
                if (patterns := self._grant.patterns(name))
            ]
        }

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
        return {"service": rpc.guarded(service.bootstrap(self._grant.principal), grant)}

    def _ending(self, name: str, service: Service) -> frozenset[str]:
        """What may be called of a service while that cannot be recorded: it ends things."""
        mine = self._grant.patterns(name)
        ending: frozenset[str] = service.ending
        return frozenset(method for method in ending if pattern_within(method, mine))

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
        principal = self._grant.principal
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
        added = terms_from_wire(terms, self._grant, self._broker)
        grant = self._grant.derive(
            kind="attenuated",
            label=_label(label, "attenuated"),
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
        return {"session": rpc.guarded(session, grant), "grant": grant.info()}

    async def share(self, terms: dict[str, Any], uses: int, label: str) -> dict[str, object]:
        broker = self._broker
        grant, secret = await broker.tree.share(
            self._grant,
            terms_from_wire(terms, self._grant, broker),
            label=_label(label, "share"),
            uses=uses or None,
            admit=lambda made: self._admit_grant("grant.shared", made),
        )
        ref = SturdyRef(broker.peer_id, tuple(broker.addrs()), grant.id, secret)
        return {"ref": ref.text, "grant": grant.info()}

    async def _admit(self, event: str, **fields: object) -> None:
        """Record what is about to be given, after the login; raises Unrecorded."""
        if self._record_login is not None:
            await self._record_login()
            self._record_login = None
        await self._broker.audit.admit(event, principal=self._grant.principal, **fields)

    async def _admit_grant(self, event: str, grant: Grant) -> None:
        await self._admit(
            event,
            grant=grant.id,
            parent=self._grant.id,
            label=grant.label,
            terms="; ".join(grant.terms.describe())[:1024],
        )

    # --- what was passed on -----------------------------------------------------------------------

    def _scope(self) -> list[Grant]:
        """The tops of what this session may see and end."""
        if self._grant.kind == "session":
            return self._broker.tree.roots(self._grant.principal)
        return [self._grant]

    async def grants(self) -> dict[str, object]:
        """What comes from this session, or from this login's roles."""
        infos, count = listed(self._scope(), GRANTS_MAX)
        return {"grants": infos, "more": count > len(infos)}

    async def revoke(self, id: str, reason: str) -> dict[str, object]:
        tree = self._broker.tree
        grant = tree.get(id)
        if grant is None or not set(grant.lineage) & set(self._scope()):
            if grant is None and tree.has_ended(id):
                await settle(tree, self._broker.audit, (), reason)
                return {"cut": 0}
            raise NotFound(
                f"you have no grant {id[:32]!r} at this node",
                hint="`ww grants` shows yours; an operator sees all with --all",
                code="not_found.grant",
            )
        operator = pattern_within("Grants.revoke", self._grant.patterns("grants"))
        by = str(self._grant.principal)
        return {"cut": await revoke(self._broker.audit, grant, reason, by, operator=operator)}

    # --- why --------------------------------------------------------------------------------------

    async def why(self, decision: str) -> dict[str, object]:
        """What decided a denial.

        A command line logs in, or redeems, anew each time. So who did that sees what concerns their
        principal; who was handed a part of a session, which has the same principal, what came from
        that part alone, or what they were told the ID of.
        """
        me, grant = self._grant.principal, self._grant
        above = takewhile(lambda g: g.kind != "role" and g.principal == me, grant.lineage)
        ids = {g.id for g in above} if decision else {grant.id}

        def may_see(found: Decision) -> bool:
            if grant.kind in ("session", "redeemed") and me in found.principals:
                return True
            return any(step.grant in ids for step in found.steps)

        found = why(self._broker.tree, decision, may_see)
        return {"explanation": found.wire()}

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
        return {"explanation": explanation.wire()}

    # --- references of other nodes ----------------------------------------------------------------

    async def adopt(self, ref: str) -> dict[str, object]:
        adoptions = self._broker.adoptions
        if adoptions is None:
            raise Unsupported("this node has no connection to others", code="unsupported.adopt")
        parsed = SturdyRef.parse(ref)
        adopted = await adoptions.adopt(parsed, self._grant)
        try:
            await self._admit(
                "grant.adopted",
                grant=adopted.grant.id,
                parent=self._grant.id,
                label=adopted.grant.label,
                issuer=parsed.peer,
                share=parsed.id,
            )
        except BaseException:
            adopted.grant.revoke("it could not be recorded")
            raise
        return {
            "session": adopted.session,
            "grant": adopted.grant.info(),
            "lease_s": adopted.lease_s,
        }

    async def keep(self) -> dict[str, object]:
        """A heartbeat; the guard has refused it if the session has ended."""
        return {"lease_s": self._broker.tree.limits.lease_s}

    async def ended(self) -> None:
        """Wait for the end; the guard cuts the wait with the reason."""
        await asyncio.Event().wait()

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
    for reached in service.interface.reachable():
        if interface in ("", reached.name) and method in reached.methods:
            return reached.methods[method]
    return None
