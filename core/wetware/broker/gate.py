"""From a connection to a session: Gate → Terminal → login → Session."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from typing import TYPE_CHECKING

from wetware import rpc
from wetware.base.bounds import address_key
from wetware.base.structs import to_struct
from wetware.broker.peers import no_peer
from wetware.broker.ports import Accept, Reject
from wetware.broker.protocol import CORE
from wetware.broker.session import SessionServant
from wetware.errors import LimitExceeded, Unrecorded, WetwareError
from wetware.identity import NONCE_BYTES, Challenge, Channel, LoginStatus, Proof

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from wetware.broker.broker import Broker


class GateServant(rpc.Servant, interface=CORE.Gate):
    """The bootstrap object of one connection, without an address on the unix socket.

    `peer` gives what the other end has as a member, or raises Denied; None: nobody there is one.
    """

    def __init__(
        self,
        broker: Broker,
        channel: Channel,
        address: str | None,
        peer: Callable[[], Awaitable[rpc.Guarded]] | None = None,
    ) -> None:
        self._broker, self._channel, self._peer = broker, channel, peer
        self._address = None if address is None else address_key(address)
        self._attempts = 0

    async def terminal(self) -> dict[str, object]:
        self._count()
        return {"terminal": TerminalServant(self._broker, self._channel, self._address)}

    async def redeem(self, id: bytes, secret: bytes) -> dict[str, object]:
        self._count()
        broker, local = self._broker, self._address is None
        async with asyncio.timeout(broker.limits.deadline_s):
            grant = await broker.redeem(id.hex()[:32], secret, self._channel.kind, local=local)
        self._give_back()
        rpc.current_connection().trust()
        session = SessionServant(broker, grant, frozenset())
        return {"session": rpc.guarded(session, grant), "grant": to_struct(grant.info())}

    async def describe(self, id: bytes, secret: bytes) -> dict[str, object]:
        self._count()
        grant = self._broker.tree.peek(id.hex()[:32], secret)
        self._give_back()
        return {"grant": to_struct(grant.info())}

    async def peer(self) -> dict[str, object]:
        if self._peer is None:
            raise no_peer("a program of this machine is no node")
        peer = await self._peer()
        rpc.current_connection().trust()
        return {"peer": peer}

    def _count(self) -> None:
        """One attempt; raises LimitExceeded."""
        limits = self._broker.limits
        if self._attempts >= limits.terminals_per_connection_max:
            raise LimitExceeded(
                f"{limits.terminals_per_connection_max} login attempts on one connection "
                "(terminals_per_connection_max)",
                hint="connect again",
            )
        if self._address is not None and not self._broker.attempts.take(self._address):
            raise LimitExceeded(
                f"more than {limits.attempts_per_address_max} failed login attempts a minute "
                f"from {self._address} (attempts_per_address_max)",
                hint="wait a minute",
            )
        self._attempts += 1

    def _give_back(self) -> None:
        """An attempt that was right does not count."""
        self._attempts -= 1
        if self._address is not None:
            self._broker.attempts.give_back(self._address)


class TerminalServant(rpc.Servant, interface=CORE.Terminal):
    """See core.capnp."""

    def __init__(self, broker: Broker, channel: Channel, address: str | None) -> None:
        self._broker, self._channel, self._address = broker, channel, address
        self._used = False

    async def login(self, signer: rpc.Ref | None) -> dict[str, object]:
        """Challenge, judge, and only then make the session."""
        if self._used:
            return _refusal(Reject(LoginStatus.TOO_MANY_TRIES, "a Terminal serves one attempt"))
        self._used = True
        if signer is None:
            return _refusal(Reject(LoginStatus.MALFORMED, "no signer was given"))
        started = time.perf_counter()
        verdict = await self._attempt(signer)
        took_ms = round((time.perf_counter() - started) * 1000, 2)
        if isinstance(verdict, Reject):
            self._refused(verdict.status, verdict.reason)
            return _refusal(verdict)
        return await self._granted(verdict, took_ms)

    async def _attempt(self, signer: rpc.Ref) -> Accept | Reject:
        broker = self._broker
        deadline_s = broker.limits.deadline_s
        challenge = Challenge(
            nonce=secrets.token_bytes(NONCE_BYTES),
            verifier=broker.peer_id,
            cluster=broker.cluster,
            channel=self._channel,
            schemes=broker.backends.schemes,
            policy_epoch=broker.backends.authority.epoch,
            not_after_ms=int((broker.clock.time() + deadline_s) * 1000),
        )
        try:
            async with asyncio.timeout(deadline_s):
                reply = await signer.call("sign", challenge=challenge.signed_bytes())
                return await broker.backends.judge(challenge, Proof(**reply["proof"]))
        except WetwareError as exc:
            return Reject(LoginStatus.SIGNER_FAILED, exc.message[:256])
        except TimeoutError:
            return Reject(LoginStatus.EXPIRED, f"no proof within {deadline_s:g} s (deadline_s)")

    async def _granted(self, accepted: Accept, took_ms: float) -> dict[str, object]:
        broker, principal = self._broker, accepted.principal
        try:
            grant = broker.open_session(
                principal,
                accepted.roles,
                expires_at=accepted.expires_at,
                local=self._address is None,
            )
        except LimitExceeded as exc:
            self._refused("limit", exc.message)
            raise
        if self._address is not None:
            broker.attempts.give_back(self._address)
        record = functools.partial(
            broker.audit.admit,
            "login.granted",
            principal=principal,
            roles=",".join(sorted(accepted.roles)),
            grant=grant.id,
            channel=self._channel.kind,
            took_ms=took_ms,
        )
        record_login = None
        try:
            try:
                await record()
            except Unrecorded:
                # No log keeps anybody from ending things. What gives something is recorded first,
                # and the login before it: the session sees to that.
                record_login = record
                broker.audit.denied(
                    "login.unrecorded", key=principal, principal=principal, grant=grant.id
                )
            grant.check_live()  # a role withdrawn meanwhile has ended it
        except BaseException:
            grant.close("the login could not be recorded")
            raise
        rpc.current_connection().trust()
        session = SessionServant(broker, grant, accepted.roles, record_login)
        return {
            "status": LoginStatus.GRANTED,
            "reason": "",
            "session": rpc.guarded(session, grant),
        }

    def _refused(self, status: str, reason: str) -> None:
        # From a stranger: counted by what was wrong, so that nobody can fill the disk.
        self._broker.audit.denied(
            "login.refused",
            key=(status, self._channel.kind),
            status=status,
            reason=reason,
            channel=self._channel.kind,
        )


def _refusal(refused: Reject) -> dict[str, object]:
    return {"status": refused.status, "reason": refused.reason}
