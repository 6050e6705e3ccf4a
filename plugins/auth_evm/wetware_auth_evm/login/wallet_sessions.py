"""Sessions that rest on a contract wallet's word: asked for at the login, and again and again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import anyio

from wetware.hookspecs import Withdrawn
from wetware_auth_evm.login.wallet_check import Busy, WalletCheck, Word

if TYPE_CHECKING:
    from wetware.hookspecs import Clock, EventLogger
    from wetware.identity import Principal
    from wetware_auth_evm.chain.replica import Replica
    from wetware_auth_evm.login.proofs import SessionProof

WALLETS_MAX: Final = 1024
"""Signatures of contract wallets that are asked about again."""
REFUSED_MAX: Final = 4096
"""Refusals that are remembered, so that strangers cannot have wallets asked all day."""
REFUSED_S: Final = 10.0
"""For so long a wallet that refused a signature is not asked about it again."""
NO_CODE_S: Final = 60.0
"""For so long an account that is no contract is not asked as one again."""
UNSURE_MAX: Final = 3
"""Times in a row that a wallet could not be asked again: then what rests on it ends."""


class Refused(Exception):
    """A contract wallet's word was not to be had.

    Attributes:
        bad: It does not hold the signature good; else it could not be asked.
    """

    def __init__(self, reason: str, *, bad: bool = False) -> None:
        super().__init__(reason)
        self.bad = bad


@dataclass(slots=True)
class _Live:
    """A signature that sessions rest on."""

    principal: Principal
    account: bytes
    digest: bytes
    signature: bytes = field(repr=False)
    expires_at: int
    next_at: float
    unsure: int = 0


class WalletSessions:
    """See the module. A wallet is asked about one signature every `recheck_s`."""

    def __init__(
        self,
        check: WalletCheck,
        replica: Replica,
        *,
        recheck_s: float,
        clock: Clock,
        tell: Callable[[Withdrawn], None],
        log: EventLogger,
    ) -> None:
        self._check, self._replica, self._recheck_s = check, replica, recheck_s
        self._clock, self._tell, self._log = clock, tell, log
        self._live: dict[bytes, _Live] = {}
        self._refused: dict[bytes, float] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._live)

    def wake(self) -> None:
        """Look now whether it is time to ask."""
        self._wake.set()

    async def ask(self, proof: SessionProof) -> None:
        """Whether the account of a session, a contract, holds its signature good: else Refused."""
        grant, at = proof.grant, _name(proof)
        if self._refused_lately(at) or self._refused_lately(grant.account):
            raise Refused("", bad=True)
        if at not in self._live and len(self._live) >= WALLETS_MAX:
            raise Refused(f"{WALLETS_MAX} sessions of contract wallets are live (WALLETS_MAX)")
        word = await self._ask(grant.account, proof.digest, proof.signature)
        if word is None:
            raise Refused("too many contract wallets are being asked")
        if word is Word.UNKNOWN:
            raise Refused("too few endpoints answered, or agree, about the contract wallet")
        if word is not Word.GOOD:
            self._remember(at, REFUSED_S)
            if word is Word.NO_CONTRACT:
                self._remember(grant.account, NO_CODE_S)
            raise Refused("", bad=True)

    async def _ask(self, account: bytes, digest: bytes, signature: bytes) -> Word | None:
        # Only where both the final and the newest block allow, as everywhere.
        blocks = {self._replica.final_block[1], self._replica.tip_block[1]} - {b""}
        try:
            return await self._check.ask(account, digest, signature, blocks)
        except Busy:
            return None

    def keep(self, proof: SessionProof, principal: Principal) -> None:
        """A session was let in by its wallet's word: ask again, until it expires."""
        self._live[_name(proof)] = _Live(
            principal,
            proof.grant.account,
            proof.digest,
            proof.signature,
            proof.grant.expires_at,
            self._clock.monotonic() + self._recheck_s,
        )

    def _refused_lately(self, what: bytes) -> bool:
        return self._clock.monotonic() < self._refused.get(what, 0.0)

    def _remember(self, what: bytes, for_s: float) -> None:
        now = self._clock.monotonic()
        if len(self._refused) >= REFUSED_MAX:
            self._refused = {known: until for known, until in self._refused.items() if until > now}
        if len(self._refused) < REFUSED_MAX:
            self._refused[what] = now + for_s

    async def run(self, roster: Container[Principal]) -> None:
        """Ask again until cancelled."""
        while True:
            await self.recheck(roster)
            with anyio.move_on_after(min(1.0, self._recheck_s)):
                await self._wake.wait()
            self._wake.clear()

    async def recheck(self, roster: Container[Principal]) -> None:
        """Ask about each signature whose time it is; what is no longer held good is withdrawn.

        Those of nobody who is in the roster, and those that expired, are forgotten.
        """
        now, unix = self._clock.monotonic(), self._clock.time()
        for at, live in tuple(self._live.items()):
            if unix >= live.expires_at or live.principal not in roster:
                del self._live[at]
        for at, live in tuple(self._live.items()):
            # One after another: logins have the other places.
            if live.next_at <= now and not self._replica.unfit():
                await self._recheck(at, live)

    async def _recheck(self, at: bytes, live: _Live) -> None:
        word = await self._ask(live.account, live.digest, live.signature)
        if self._replica.unfit():
            return  # nothing works meanwhile; it is asked again when that is over
        live.next_at = self._clock.monotonic() + self._recheck_s
        unsure = word is None or word is Word.UNKNOWN
        live.unsure = live.unsure + 1 if unsure else 0
        if word is Word.GOOD or 0 < live.unsure < UNSURE_MAX:
            return
        self._live.pop(at, None)
        why = (
            f"its contract wallet could not be asked {UNSURE_MAX} times in a row"
            if unsure
            else "its contract wallet no longer holds good what it signed"
        )
        self._log.info("wallet.withdrawn", principal=live.principal, why=why)
        # Sessions of an account cannot be told apart: those that are good log in again.
        self._tell(Withdrawn(live.principal, None, why))


def _name(proof: SessionProof) -> bytes:
    return hashlib.sha256(proof.grant.account + proof.digest + proof.signature).digest()
