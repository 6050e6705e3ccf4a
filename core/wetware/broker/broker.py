"""The broker of a node: who has a session, and what ends all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from wetware.base.bounds import Claim, Places, Rates, address_key
from wetware.base.log import get_logger
from wetware.broker.backend import Backends
from wetware.broker.clock import NOT_YET, Comparison
from wetware.broker.grants import BEARER
from wetware.broker.limits import LoginLimits
from wetware.broker.ports import Resumed, Suspended, Withdrawn
from wetware.broker.proposals import ungranted
from wetware.broker.tree import UNKNOWN_REF, Tree
from wetware.errors import (
    CapabilityError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    WetwareError,
    stopping,
)
from wetware.identity import PeerId, Principal

if TYPE_CHECKING:
    import contextlib

    from wetware.base.clock import Clock
    from wetware.base.multiaddr import Multiaddr
    from wetware.broker.grants import Grant
    from wetware.broker.ports import AuthBackend, Service
    from wetware.broker.proposals import Proposal
    from wetware.broker.records import Records
    from wetware.broker.told import Explanation
    from wetware.rpc import Method

log = get_logger("broker")


class Broker:
    """Gives sessions to who may have them, and ends them.

    Without a `tree` it has a new one, which nothing outlives. `also` are further auth backends, for
    users of their own.

    Attributes:
        attempts: Logins that addresses have failed lately.
        addrs: Gives where this node can be reached, for sturdy references.
        proposals: What each service here proposes for the standard roles; for words alone.
        claims: Of services here, and the grant of the session that vouched for each.
        closed: Whether the node stops.
        restored: Set once what was durable before the start is back, or has ended.
        clock_trusted: Told that an operator says that the machine's clock is right.
    """

    def __init__(
        self,
        *,
        peer_id: PeerId,
        cluster: str,
        backend: AuthBackend,
        services: Mapping[str, Service],
        clock: Clock,
        audit: Records,
        limits: LoginLimits | None = None,
        tree: Tree | None = None,
        also: Sequence[AuthBackend] = (),
    ) -> None:
        self.peer_id, self.cluster = peer_id, cluster
        self.backends = Backends((backend, *also), clock)
        self.services = services
        self.clock, self.audit = clock, audit
        self.limits = limits or LoginLimits()
        attempts = self.limits.attempts_per_address_max
        self.attempts = Rates(attempts / 60, attempts, self.limits.addresses_max, clock.monotonic)
        self._places = Places()
        self.tree = tree or Tree(clock)
        self.tree.on_denied = self._denied
        self.tree.services = services
        self._sessions: Counter[Principal] = Counter()
        self._unwatch = [
            (each.name, each.watch(partial(self._changed, each.name))) for each in self.backends.all
        ]
        self.closed = False
        self._comparison = Comparison(self.tree.clock, self.tree.limits.clock_skew_s_max)
        self._clock_recorded = False  # as wrong
        self.addrs: Callable[[], Iterable[Multiaddr]] = tuple
        self.proposals: Mapping[str, Proposal] = {}
        self.clock_trusted: Callable[[], None] = lambda: None
        self.claims: dict[bytes, Grant | None] = {}
        self.restored = asyncio.Event()

    def restore(self) -> int:
        """Put back what was shared before the node stopped; the backend can decide by now."""
        shares = self.tree.restore(self.backends.profile_of)
        self.restored.set()
        return shares

    def close(self) -> None:
        """End every session and admit no other; the node is stopping. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self.tree.close()
        for name, unwatch in self._unwatch:
            try:
                unwatch()
            except Exception:  # what ended the node, maybe the backend itself, is not hidden by it
                log.exception("auth.backend_failed", backend=name)

    # --- services ---------------------------------------------------------------------------------

    def service(self, name: str) -> Service:
        """A service of this node; raises NotFound."""
        service = self.services.get(name)
        if service is None:
            raise NotFound(
                f"this node has no service {name[:64]!r}",
                hint=f"it has {', '.join(sorted(self.services)) or 'none'}",
            )
        return service

    def proposal(self, service: str) -> tuple[Proposal, str]:
        """What a service here proposes for the standard roles, and how an operator accepts it.

        The latter is what to write where, or "" where `ww role accept` signs it. Raises NotFound.
        """
        self.service(service)
        proposal = self.proposals.get(service, {})
        return proposal, self.backends.authority.how_to_accept(service, proposal)

    def ungranted(self) -> list[str]:
        """The services of this node of which `is_ungranted` is true."""
        return sorted(filter(self.is_ungranted, self.services))

    def is_ungranted(self, service: str) -> bool:
        """Whether a service of this node proposes something that no operator has accepted."""
        proposal = self.proposals.get(service, {}) if service in self.services else {}
        return ungranted(service, proposal, self.backends.authority.profile)

    # --- the clock --------------------------------------------------------------------------------

    def judge_clock(self, others_ahead_s: float | None, *, alone: bool) -> None:
        """Refuse grants with an end while this node's clock cannot judge it; see `Comparison`."""
        why = self.tree.clock_wrong = self._comparison.judge(others_ahead_s, alone=alone)
        wrong = bool(why) and why != NOT_YET
        if wrong != self._clock_recorded and (wrong or not why):
            self._clock_recorded = wrong
            self.audit.record("clock.wrong" if wrong else "clock.right", reason=why)

    async def trust_clock(
        self, others_ahead_s: Callable[[], float | None], principal: Principal
    ) -> None:
        """Take the machine's clock as right, on an operator's word; what was later was a glitch.

        Raises InvalidArgument where the other members' clocks, as measured, say that it is wrong,
        Unrecorded where it cannot be recorded, and StoreUnavailable where a restart would
        bring the later time back.
        """
        tree = self.tree
        self._refuse_other_clock(others_ahead_s())
        back_s = round(tree.clock.ahead_s, 1)
        await self.audit.admit("clock.trusted", principal=principal, set_back_s=back_s)
        self._refuse_other_clock(others_ahead_s())  # to record it may have taken a while
        self.clock_trusted()
        self._comparison.trust()
        tree.clock_wrong = ""
        if tree.store is not None:
            await tree.store.save_clock()

    def _refuse_other_clock(self, ahead_s: float | None) -> None:
        if ahead_s is not None and abs(ahead_s) > self.tree.limits.clock_skew_s_max:
            raise InvalidArgument(
                f"the other members' clocks are {ahead_s:+.0f} s from this node's",
                hint="set the machine's clock first: `timedatectl set-ntp true`",
                code="invalid.clock",
            )

    # --- sessions ---------------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        return self._sessions.total()

    def gate_slot(
        self, connection: object, address: str | None
    ) -> contextlib.AbstractContextManager[None]:
        """A place for one RPC stream from the network; entering it raises LimitExceeded.

        `address` is None for a member: strangers do not take its places, of which it has those of
        its few connections.
        """
        limits = self.limits
        claims: list[tuple[object, int, str]] = [
            (id(connection), limits.gates_per_connection_max, "per_connection_")
        ]
        if address is not None:
            claims += [
                (address_key(address), limits.gates_per_address_max, "per_address_"),
                ("all", limits.gates_max, ""),
            ]
        return self._places.hold(
            *(
                Claim(key, limit, f"{limit} connections to the Gate are open (gates_{name}max)")
                for key, limit, name in claims
            )
        )

    def open_session(
        self,
        principal: Principal,
        roles: Iterable[str],
        *,
        expires_at: float | None = None,
        local: bool = False,
    ) -> Grant:
        """The grant of a new session. Synchronous: nothing can change between verdict and grant.

        It ends at `expires_at` (Unix s), or with its connection; for the `local` ones, over the
        unix socket, a part of the sessions is reserved.

        Raises LimitExceeded, or Disconnected while the node stops.
        """
        self._check_place(principal, local=local)
        roots = [
            self.tree.root(principal, role, self.backends.profile(principal, role))
            for role in sorted(roles)
        ]
        return self._count_session(self.tree.session(principal, roots, expires_at=expires_at))

    async def redeem(self, share_id: str, secret: bytes, channel: str, *, local: bool) -> Grant:
        """The grant of a session that comes from a sturdy reference, recorded first.

        Raises as `Tree.redeem` does, LimitExceeded and Disconnected.
        """
        bearer = Principal(BEARER, share_id)
        self._check_place(bearer, local=local)

        async def admit(grant: Grant) -> None:
            await self.audit.admit(
                "share.redeemed", share=share_id, grant=grant.id, channel=channel
            )

        try:
            grant = await self.tree.redeem(share_id, secret, admit=admit)
        except WetwareError as exc:
            # The ID is chosen by callers who may not know the secret, so never aggregate by it.
            known = share_id if exc.code != UNKNOWN_REF else ""
            self.audit.denied("share.refused", key=(exc.code, known), code=exc.code, share=known)
            raise
        try:
            self._check_place(bearer, local=local)  # asked again after the wait
        except BaseException:
            grant.close("there is no place for it")
            raise
        return self._count_session(grant)

    def _check_place(self, principal: Principal, *, local: bool) -> None:
        """Raise LimitExceeded if there is no place for a session, Disconnected while stopping."""
        if self.closed:
            raise stopping()
        limits = self.limits
        reserved = 0 if local else min(limits.sessions_local_reserved, limits.sessions_max // 2)
        sessions_max = limits.sessions_max - reserved
        if self.sessions >= sessions_max:
            raise LimitExceeded(f"{sessions_max} sessions are live (sessions_max)")
        if self._sessions[principal] >= limits.sessions_per_principal_max:
            raise LimitExceeded(
                f"{principal} has {self._sessions[principal]} live sessions "
                "(sessions_per_principal_max)",
                hint="close some",
            )

    def _count_session(self, grant: Grant) -> Grant:
        """A grant that takes a place among the sessions until it ends."""
        principal = grant.principal
        self._sessions[principal] += 1
        grant.on_end(lambda _: self._session_ended(principal), holds=False)
        return grant

    def _session_ended(self, principal: Principal) -> None:
        self._sessions[principal] -= 1
        if self._sessions[principal] <= 0:
            del self._sessions[principal]

    # --- what is told -----------------------------------------------------------------------------

    def _changed(self, backend: str, event: Withdrawn | Suspended | Resumed) -> None:
        """What a backend says of its users takes effect now; the record follows."""
        match event:
            case Withdrawn(principal=principal, roles=roles, reason=reason):
                cut = self.tree.withdraw(backend, principal, roles, reason)
                self.audit.ended(
                    "role.withdrawn",
                    principal=principal or f"{backend}:*",
                    roles=",".join(sorted(roles)) if roles is not None else "*",
                    cut=cut,
                    reason=reason,
                )
            case Suspended(reason=reason):
                self.tree.suspended[backend] = CapabilityError(
                    f"the capabilities of users of {backend!r} are suspended: {reason}",
                    hint="wait until the node's auth backend can decide again; `ww doctor`",
                    code="capability.suspended",
                )
                self.audit.ended("grants.suspended", backend=backend, reason=reason)
            case Resumed():
                self.tree.suspended.pop(backend, None)
                self.audit.record("grants.resumed", backend=backend)

    def _denied(self, grant: Grant, method: Method, explanation: Explanation) -> None:
        """A call was denied: one record for each grant, method and code, then their number."""
        called = f"{method.interface.name}.{method.name}"
        self.audit.denied(
            "call.denied",
            key=(grant.id, called, explanation.code),
            principal=grant.principal,
            grant=grant.id,
            method=called,
            code=explanation.code,
            reason=explanation.reason,
            decision=explanation.decision,
        )
