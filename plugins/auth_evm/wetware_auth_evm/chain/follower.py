"""Keeps a replica up to date with the chain, and believes nobody alone.

At each new block a quorum states the contract's `seq` and `head`, two storage slots that commit to
its whole history. Where they changed, the logs of any one endpoint have to lead there: one that
hides, forges or reorders logs is found out and the next one is asked. A reorganisation needs no
special care: what leads to the stated hash is the history. Only what was final must not change:
then nobody is admitted until an operator says that the chain as it is now is the right one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base.log import get_logger
from wetware_auth_evm.chain.addresses import checksum
from wetware_auth_evm.chain.endpoints import Block, Endpoint, Endpoints, Reverted, data, quantity
from wetware_auth_evm.chain.errors import (
    BadLog,
    ChainError,
    ChainRegressed,
    EndpointFailed,
    NoQuorum,
    WrongChain,
)
from wetware_auth_evm.chain.events import Event, genesis
from wetware_auth_evm.chain.finality import Finality
from wetware_auth_evm.chain.identity import compare_code, compare_genesis
from wetware_auth_evm.chain.replica import STATE_CALL, parse_state, read_logs

if TYPE_CHECKING:
    from wetware_auth_evm.chain.history import History
    from wetware_auth_evm.chain.replica import Replica

__all__ = ["Finality", "Follower", "Touched"]

log = get_logger("plugin.auth_evm")

WAKE_S_MIN: Final = 0.05
"""Between two looks, however often it is woken."""

Touched = Callable[[frozenset[bytes] | None], None]


class _Reading:
    """Logs read so far: a long history survives an endpoint that fails in the middle of it."""

    __slots__ = ("events", "first", "following", "sources")

    def __init__(self, first: int) -> None:
        self.first = self.following = first
        self.events: list[Event] = []
        self.sources: set[Endpoint] = set()


class Follower:
    """Feeds a replica.

    Args:
        endpoints: Of the chain.
        replica: What is fed.
        finality: When a block is final.
        code_hash: keccak256 of the contract's code.
        genesis_hash: Of the chain's first block; None: not compared.
        deployed_at: A block at or before the contract's deployment. A history is read from there:
            0 takes one request for 10,000 blocks of the whole chain.
        poll_s: Between two looks at the newest block.
        final_poll_s: Between two looks at the newest final block.
        history: What outlives the node, loaded already; None: nothing does, for tests.
        monotonic: Seconds that never go back, for `final_poll_s`.

    Attributes:
        steps: New blocks that were verified.
        faults: Looks that failed.
        lies: Answers of logs that did not lead to the contract's state.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        replica: Replica,
        *,
        finality: Finality,
        code_hash: bytes,
        genesis_hash: bytes | None = None,
        deployed_at: int = 0,
        poll_s: float = 2.0,
        final_poll_s: float = 0.0,
        history: History | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoints, self.replica, self.finality = endpoints, replica, finality
        self._code_hash, self._genesis_hash = code_hash, genesis_hash
        self._deployed_at, self._poll_s, self._history = deployed_at, poll_s, history
        self._final_poll_s, self._monotonic = final_poll_s, monotonic
        self._final_looked_at: float | None = None
        self._wake = asyncio.Event()
        self._identified = False
        self._reading: _Reading | None = None
        self.steps = self.faults = self.lies = 0

    def wake(self) -> None:
        """Look at the chain now, for example because a new block was heard of."""
        self._wake.set()

    async def run(self, touched: Touched) -> None:
        """Follow until cancelled; tells whom changes may concern, None for everybody.

        It is told after every look, with nobody if nothing changed: time passes, too. A look that
        waits for endpoints takes a multiple of their timeout; `Replica.fit_for_s` says until when
        the replica may be used meanwhile.
        """
        while True:
            touched(await self.look())
            await asyncio.sleep(min(WAKE_S_MIN, self._poll_s))
            with anyio.move_on_after(self._poll_s):
                await self._wake.wait()
            self._wake.clear()

    async def look(self) -> frozenset[bytes] | None:
        """One step; what went wrong is the replica's `fault`. Returns whom changes may concern."""
        replica, history = self.replica, self._history
        if history is not None and history.forget_asked():
            try:
                self.forget()
            except OSError as exc:
                log.error("replica.not_forgotten", error=exc.strerror)  # noqa: TRY400
        if replica.regressed:
            return frozenset()
        before = replica.fault
        try:
            return await self.step()
        except ChainRegressed as exc:
            replica.regressed = replica.fault = exc.message
            if history is not None:
                history.save(replica)
            log.error("chain.regressed", why=exc.message)  # noqa: TRY400  # no traceback needed
            return None
        except ChainError as exc:
            replica.fault = exc.message
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            replica.fault = f"an answer that is malformed: {str(exc)[:120]}"
        self.faults += 1
        if replica.fault != before:
            log.warning("chain.not_verified", why=replica.fault)
        return frozenset()

    def forget(self) -> None:
        """Begin anew with the chain as it is now, also after a regression: an operator said so.

        Nobody is admitted before the whole history was read again.
        """
        if self._history is not None:
            self._history.forget()
        self.replica.forget()
        self._identified, self._reading, self._final_looked_at = False, None, None
        log.warning("replica.forgotten", effect="it is read anew")

    def status(self) -> dict[str, Any]:
        """What `ww auth evm status` shows of a node that runs; plain values only."""
        replica = self.replica
        return {
            "chain_id": replica.chain_id,
            "contract": "0x" + replica.contract.hex(),
            "unfit": replica.unfit(),
            "fault": replica.fault,
            "regressed": replica.regressed,
            "tip_block": replica.tip_block[0],
            "tip_time": replica.tip_time,
            "final_block": replica.final_block[0],
            "seq": replica.tip.seq,
            "final_seq": replica.final.seq,
            "paused": replica.tip.paused,
            "owner": "0x" + replica.tip.owner.hex(),
            "held": ["0x" + who.hex() if who else "everybody" for who in replica.held],
            "sizes": dict(replica.tip.summary()),
            "steps": self.steps,
            "faults": self.faults,
            "lies": self.lies,
            "quorum": self.endpoints.quorum,
            "endpoints": [
                {
                    "name": endpoint.name,
                    "available": endpoint.available,
                    "latency_s": endpoint.latency_s,
                    "failures": endpoint.failures,
                    "dissents": endpoint.dissents,
                    "error": endpoint.error,
                }
                for endpoint in self.endpoints.each
            ],
        }

    async def identify(self) -> None:
        """Compare chain ID, first block and code with what is configured.

        Raises WrongChain where a quorum says otherwise, other ChainErrors where none can be had.
        """
        replica = self.replica
        chain_id = quantity(await self.endpoints.agree("eth_chainId", key=quantity))
        if chain_id != replica.chain_id:
            raise WrongChain(
                f"the endpoints serve chain {chain_id}, and {replica.chain_id} is configured",
                hint="set [plugins.auth_evm] endpoints or chain_id",
            )
        if self._genesis_hash is not None:
            await compare_genesis(self.endpoints, chain_id, self._genesis_hash)
        await compare_code(self.endpoints, chain_id, replica.contract, self._code_hash)
        self._identified = True

    async def step(self) -> frozenset[bytes] | None:
        """Look at the newest block once; raises ChainError, ValueError, KeyError, TypeError.

        Returns whom changes may concern.
        """
        if not self._identified:
            await self.identify()
        replica = self.replica
        tip = await self.endpoints.newest("latest")
        known = (tip.number, tip.hash) == replica.tip_block and not replica.fault
        if known and not replica.held and not replica.unsettled:
            replica.verified(*_stamp(tip))  # the same block: its past is the same, too
            return frozenset()
        final = replica.final_block[0]
        if tip.number < final:
            raise NoQuorum(
                f"the newest block of the endpoints is {tip.number}, and {final} was final before",
                hint="they are behind, or they serve an old copy of the chain",
            )
        if not replica.ever_verified:
            await self._check_final()
        try:
            seq, head = await self._state(tip)
            touched = await self._bring_to(tip.number, seq, head)
        except ChainError as exc:
            # Nothing leads there from a block that is gone: then that is what is wrong.
            try:
                await self._check_final()
            except ChainRegressed:
                raise
            except ChainError:
                raise exc from None
            raise
        settled = await self._settle(tip, seq, head)
        replica.verified(*_stamp(tip))
        self.steps += 1
        if self._history is not None:
            self._history.save(replica, settled)
        # What was settled may be allowed now, and nobody loses by it.
        return touched

    async def _check_final(self) -> None:
        """The block that was final is still there."""
        number, hash_ = self.replica.final_block
        if number < 0:
            return
        block = await self.endpoints.block(number)
        if block.hash != hash_:
            raise ChainRegressed(
                f"block {number} was final, and the chain has another one in its place",
                hint="find out what happened to the chain; then `ww auth evm forget`",
            )

    async def _state(self, block: Block) -> tuple[int, bytes]:
        """(seq, head) of the contract at a block, as a quorum states it."""
        replica = self.replica
        call = {"to": checksum(replica.contract), "data": STATE_CALL}
        try:
            raw = data(await self.endpoints.agree("eth_call", call, block.reference, key=data))
        except Reverted as exc:
            raise ChainError(f"the contract does not state its history: {exc.message}") from None
        if raw:
            return parse_state(raw)
        if replica.final.seq:
            raise NoQuorum(
                f"the endpoints do not have the contract's state in block {block.number}"
            )
        return 0, genesis(replica.chain_id, replica.contract)  # it was not there yet

    async def _bring_to(self, number: int, seq: int, head: bytes) -> frozenset[bytes] | None:
        """Let the replica's tip be what the quorum stated, by the logs of any one endpoint."""
        replica = self.replica
        if (replica.tip.seq, replica.tip.head) == (seq, head):
            return replica.set_tip(number, seq, head, ())
        try:
            return await self._read_to(number, seq, head)
        except BadLog as exc:
            if replica.ever_verified or not replica.final.seq:
                raise
            # A file that somebody edited would block the node for ever.
            log.warning("replica.doubted", why=exc.message, effect="it is read anew")
        await self._check_final()
        replica.doubt()
        if self._history is not None:
            self._history.rewrite()
        await self._read_to(number, seq, head)
        return None

    async def _read_to(self, number: int, seq: int, head: bytes) -> frozenset[bytes] | None:
        replica = self.replica
        first = max(replica.final_block[0] + 1 if replica.final.seq else 0, self._deployed_at)
        failure: ChainError | None = None
        for endpoint in sorted(self.endpoints.each, key=_rank):
            try:
                return await self._read_from(endpoint, first, number, seq, head)
            except BadLog as exc:
                self.lies += 1
                endpoint.dissents += 1
                log.warning("logs.refused", endpoint=endpoint.name, why=exc.message)
                failure = exc
            except EndpointFailed as exc:
                failure = failure or exc
        raise failure or NoQuorum("no endpoint has logs")

    async def _read_from(
        self, endpoint: Endpoint, first: int, number: int, seq: int, head: bytes
    ) -> frozenset[bytes] | None:
        """By the logs of one endpoint, and of those that failed before it had all."""
        reading = self._reading
        if reading is None or reading.first != first or reading.following > number + 1:
            reading = self._reading = _Reading(first)
        mixed = reading.sources - {endpoint}
        try:
            await self._logs(endpoint, reading, number)
            touched = self.replica.set_tip(number, seq, head, reading.events)
        except BadLog:
            self._reading = None
            if not mixed:
                raise
            # What another one gave may be the lie.
            return await self._read_from(endpoint, first, number, seq, head)
        self._reading = None
        return touched

    async def _logs(self, endpoint: Endpoint, reading: _Reading, last: int) -> None:
        contract = self.replica.contract
        async for raw, until in endpoint.logs(contract, reading.following, last):
            reading.events += read_logs(raw, contract)
            reading.sources.add(endpoint)
            reading.following = until + 1
            await asyncio.sleep(0)

    async def _settle(self, tip: Block, seq: int, head: bytes) -> list[Event]:
        replica, finality = self.replica, self.finality
        now = self._monotonic()
        looked_at = self._final_looked_at
        if looked_at is not None and now - looked_at < self._final_poll_s:
            return []
        await self._check_final()
        settled: list[Event] = []
        if finality.kind == "latest":
            settled = replica.settle(tip.number, tip.hash, seq, head)
        elif (block := await self._final(tip)) is not None:
            settled = replica.settle(block.number, block.hash, *await self._state(block))
        self._final_looked_at = now
        return settled

    async def _final(self, tip: Block) -> Block | None:
        """The newest final block, if it is a newer one than before."""
        if self.finality.kind == "depth":
            number = tip.number - self.finality.depth
            # It never goes back; that it is still the same was checked.
            if number <= self.replica.final_block[0] or number < 0:
                return None
            return await self.endpoints.block(number)
        block = await self.endpoints.newest("finalized")
        if block.number <= self.replica.final_block[0] or block.number > tip.number:
            return None
        return block


def _rank(endpoint: Endpoint) -> tuple[bool, bool, int, float]:
    """Whom to ask for logs first: one answer is enough, so rather one that comes."""
    struggling = endpoint.failures > 0 or endpoint.late > 0
    return not endpoint.available, struggling, endpoint.dissents, endpoint.latency_s


def _stamp(block: Block) -> tuple[int, bytes, int]:
    return block.number, block.hash, block.time
