"""What commands read of a chain: its identity, the contract's state, and its whole history.

What decides is taken by quorum; logs may come from any endpoint, because `head` proves them.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeVar

from wetware_auth_evm import contract as artifact
from wetware_auth_evm.chain.endpoints import Block, Endpoint, Endpoints, data, fixed, quantity
from wetware_auth_evm.chain.errors import (
    BadLog,
    ChainError,
    EndpointFailed,
    Unreachable,
    WrongChain,
)
from wetware_auth_evm.chain.finality import quorum_default
from wetware_auth_evm.chain.identity import compare_code, compare_genesis
from wetware_auth_evm.chain.replica import STATE_CALL, parse_state, read_logs
from wetware_auth_evm.chain.state import State
from wetware_auth_evm.cli.words import who

TIMEOUT_S: Final = 10.0
"""For one answer of an endpoint."""
TIMES_MAX: Final = 8
"""Blocks whose time is asked for at once."""

if TYPE_CHECKING:
    from types import TracebackType

    from web3 import AsyncWeb3

    from wetware_auth_evm.chain.events import Event
    from wetware_auth_evm.chain.profile import Profile

T = TypeVar("T")
Say = Callable[[str], None]


class ContractState(NamedTuple):
    """What of the contract is one of a kind: `state()`."""

    seq: int
    head: bytes
    changed_at: int
    owner: bytes
    paused: bool
    pending: bytes
    ready_at: int

    @classmethod
    def parse(cls, answer: bytes) -> ContractState:
        """Raises ValueError. By hand: a command that reads does without a second of imports."""
        seq, head = parse_state(answer)
        words = [answer[at : at + 32] for at in range(64, len(answer), 32)]
        changed_at, owner, paused, pending, ready_at = words
        narrow = (changed_at[:27], owner[:12], paused[:31], pending[:12], ready_at[:27])
        if any(map(any, narrow)) or paused[31] > 1:
            raise ValueError("not the contract's state")
        return cls(
            seq,
            head,
            int.from_bytes(changed_at, "big"),
            owner[12:],
            bool(paused[31]),
            pending[12:],
            int.from_bytes(ready_at, "big"),
        )


class Logged(NamedTuple):
    """An event, and where one endpoint says that it is.

    Attributes:
        event: What happened; proved by `head` where the history is complete.
        block: Number.
        tx: Hash of the transaction.
        time: Of the block, Unix s, if the log says so; else None.
    """

    event: Event
    block: int
    tx: bytes
    time: int | None


@dataclass(frozen=True, slots=True)
class History:
    """The contract's events up to a block.

    Attributes:
        logs: In their order; without a gap as far as they go.
        state: What they lead to.
        contract: What a quorum says of the contract at `block`.
        block: Up to which.
        problems: Per endpoint whose logs do not lead to `contract.head`: what is wrong with them.
    """

    logs: tuple[Logged, ...]
    state: State
    contract: ContractState
    block: Block
    problems: tuple[tuple[str, str], ...]

    @property
    def complete(self) -> bool:
        """Whether the hash over the events is the contract's."""
        return (self.state.seq, self.state.head) == (self.contract.seq, self.contract.head)


@dataclass(frozen=True, slots=True)
class View:
    """The contract's state at the newest and at the newest final block, both verified.

    Attributes:
        history: Up to the newest block.
        final: The state at the newest final block; empty where nothing is final yet.
        now: Unix s, by which records are judged: the later of this machine's and the chain's.
    """

    history: History
    final: State
    now: int


@dataclass(slots=True)
class Probe:
    """What one endpoint says, for `status`; `dissent` is in what it contradicts the others."""

    name: str
    chain_id: int | None = None
    block: Block | None = None
    latency_s: float = 0.0
    error: str = ""
    dissent: str = ""


class Chain:
    """A chain, and the contract on it, as a command sees them.

    Args:
        profile: Where they are. Without a chain ID, that of the endpoints is taken.
        timeout_s: For one answer.

    Attributes:
        profile: With the chain ID, after `identify`.
        endpoints: For what takes a quorum.
    """

    def __init__(self, profile: Profile, *, timeout_s: float = TIMEOUT_S) -> None:
        count = len(profile.endpoints)
        self.profile = profile
        self.endpoints = Endpoints(
            profile.endpoints,
            quorum=min(profile.quorum or quorum_default(count), count),
            timeout_s=timeout_s,
        )

    @functools.cached_property
    def w3(self) -> AsyncWeb3[Any]:
        """web3 over the endpoints, for what is sent: importing it takes a second."""
        from wetware_auth_evm.chain.provider import connect

        return connect(self.endpoints)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.endpoints.aclose()

    # --- endpoints --------------------------------------------------------------------------------

    def _unreachable(self, errors: Sequence[str]) -> Unreachable:
        where = "the local chain" if self.profile.dev else "the chain"
        hint = (
            "its node has ended: start it again with `ww node --auth evm --dev`, or the chain "
            "alone with `ww auth evm dev`"
            if self.profile.dev
            else "check the URL and the network, or name another endpoint with --rpc URL"
        )
        return Unreachable(f"no endpoint of {where} answers: {'; '.join(errors)[:400]}", hint=hint)

    async def identify(self, *, contract: bool = True) -> None:
        """Compare chain ID, first block and code with the profile's; raises WrongChain.

        No endpoint may be of another chain, not one.
        """
        ids = await self._each("eth_chainId", quantity)
        expected = self.profile.chain_id
        found = {value for value, _ in ids.values() if value is not None}
        if not found:
            raise self._unreachable([error for _, error in ids.values()])
        for name, (value, _) in ids.items():
            if expected and value is not None and value != expected:
                raise WrongChain(
                    f"{name} serves chain {value}, and {self.profile.source or 'the profile'} is "
                    f"of chain {expected}",
                    hint="name an endpoint of the right chain with --rpc URL, or the other chain's "
                    "contract with --chain-id and --contract",
                )
        if not expected and len(found) > 1:
            raise WrongChain(
                f"the endpoints serve different chains: {', '.join(map(str, sorted(found)))}",
                hint="give --chain-id",
            )
        self.profile = profile = replace(self.profile, chain_id=expected or found.pop())
        if profile.genesis_hash:
            await compare_genesis(self.endpoints, profile.chain_id, profile.genesis_hash)
        if contract:
            code_hash = profile.code_hash or artifact.load().runtime_hash
            await compare_code(self.endpoints, profile.chain_id, profile.contract, code_hash)

    async def _each(
        self, method: str, parse: Callable[[Any], T], *params: Any
    ) -> dict[str, tuple[T | None, str]]:
        """Endpoint → (answer, "") or (None, why)."""

        async def ask(endpoint: Endpoint) -> tuple[T | None, str]:
            try:
                return parse(await endpoint.call(method, *params)), ""
            except ChainError as exc:
                return None, exc.message
            except (ValueError, TypeError, KeyError):
                return None, f"{endpoint.name}: a malformed answer"

        answers = await asyncio.gather(*map(ask, self.endpoints.each))
        return {e.name: answer for e, answer in zip(self.endpoints.each, answers, strict=True)}

    async def genesis(self) -> bytes:
        return (await self.endpoints.block(0)).hash

    async def probe(self) -> list[Probe]:
        """Ask every endpoint for itself; compare what they say."""
        ids = await self._each("eth_chainId", quantity)
        tips = await self._each("eth_getBlockByNumber", Block.parse, "latest", False)
        found = []
        for endpoint in self.endpoints.each:
            (chain_id, error), (block, tip_error) = ids[endpoint.name], tips[endpoint.name]
            why = (error or tip_error).removeprefix(f"{endpoint.name}: ")
            found.append(Probe(endpoint.name, chain_id, block, endpoint.latency_s, why))
        await self._compare_probes(found)
        return found

    async def _compare_probes(self, probes: Sequence[Probe]) -> None:
        """Find who contradicts the others about the newest block that all of them have."""
        there = [probe for probe in probes if probe.block is not None]
        if len(there) < 2:
            return
        lowest = min(probe.block.number for probe in there if probe.block is not None)
        hashes = await self._each("eth_getBlockByNumber", Block.parse, hex(lowest), False)
        votes = Counter(block.hash for block, _ in hashes.values() if block is not None)
        if len(votes) < 2:
            return
        (usual, count), *_ = votes.most_common(1)
        for probe in there:
            block = hashes[probe.name][0]
            if block is not None and (block.hash != usual or count * 2 <= sum(votes.values())):
                probe.dissent = f"another block {lowest} than others: 0x{block.hash.hex()[:16]}…"

    # --- the contract -----------------------------------------------------------------------------

    async def state(self, block: Block) -> ContractState | None:
        """`state()` at a block, by quorum; None where there is no contract yet."""
        query = {"to": who(self.profile.contract), "data": STATE_CALL}
        answer = data(await self.endpoints.agree("eth_call", query, block.reference, key=data))
        return ContractState.parse(answer) if answer else None

    async def tip(self) -> Block:
        return await self.endpoints.newest("latest")

    async def final(self, tip: Block) -> Block | None:
        """The newest block that is final; None where there is none yet."""
        finality = self.profile.when_final
        if finality.kind == "latest":
            return tip
        if finality.kind == "depth":
            number = tip.number - finality.depth
            return await self.endpoints.block(number) if number >= 0 else None
        return await self.endpoints.newest("finalized")

    # --- the history ------------------------------------------------------------------------------

    async def history(self, say: Say | None = None) -> History:
        """The events up to the newest block: of the first endpoint whose events are all there.

        Where none has them all: of the one that gets furthest, with what is wrong.
        """
        block = await self.tip()
        contract = await self.state(block)
        if contract is None:
            raise WrongChain(f"there is no contract in block {block.number}")
        problems: list[tuple[str, str]] = []
        best: tuple[list[Logged], State] | None = None
        for endpoint in self.endpoints.each:
            try:
                logs, problem = await self._logs(endpoint, block.number, say)
            except EndpointFailed as exc:
                problems.append((endpoint.name, exc.message.removeprefix(f"{endpoint.name}: ")))
                continue
            kept, state, gap = self._fold(logs, contract)
            if best is None or state.seq > best[1].seq or not (problem or gap):
                best = kept, state
            if not (problem or gap):
                break
            problems.append((endpoint.name, problem or gap))
        if best is None:
            raise self._unreachable([f"{name}: {why}" for name, why in problems])
        return History(tuple(best[0]), best[1], contract, block, tuple(problems))

    def _fold(
        self, logs: Sequence[Logged], contract: ContractState
    ) -> tuple[list[Logged], State, str]:
        """(the logs that follow each other from the first on, their state, what is wrong)."""
        state = State(self.profile.chain_id, self.profile.contract)
        kept: list[Logged] = []
        for logged in logs:
            if logged.event.seq > contract.seq:
                return kept, state, f"an event {logged.event.seq} that the contract does not have"
            if logged.event.seq != state.seq + 1:
                what = "is there twice" if logged.event.seq <= state.seq else "is missing"
                number = logged.event.seq if what == "is there twice" else state.seq + 1
                return kept, state, f"event {number} of {contract.seq} {what}"
            try:
                state.apply(logged.event)
            except BadLog as exc:
                return kept, state, exc.message
            kept.append(logged)
        if state.seq < contract.seq:
            return kept, state, f"event {state.seq + 1} of {contract.seq} is missing"
        if state.head != contract.head:
            return kept, state, "an event was changed: the hash over all of them is not head"
        return kept, state, ""

    async def _logs(
        self, endpoint: Endpoint, last: int, say: Say | None
    ) -> tuple[list[Logged], str]:
        """The contract's logs from one endpoint, and what is wrong with one of them, or ""."""
        found: list[Logged] = []
        problem, spoke = "", time.monotonic()
        async for raw, until in endpoint.logs(
            self.profile.contract, self.profile.deployed_at, last
        ):
            for item in raw if isinstance(raw, list) else ():
                try:
                    found += self._logged(item)
                except BadLog as exc:
                    problem = problem or exc.message
            if say is not None and time.monotonic() - spoke > 2:
                spoke = time.monotonic()
                say(f"reading logs: block {until} of {last}")
        found.sort(key=lambda logged: logged.event.seq)
        return found, problem

    def _logged(self, item: Any) -> list[Logged]:
        try:
            # Some endpoints say it, and it saves a request for each block.
            at = quantity(item["blockTimestamp"]) if item.get("blockTimestamp") else None
            block, tx = quantity(item["blockNumber"]), fixed(item["transactionHash"], 32)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadLog("a malformed log") from None
        return [Logged(e, block, tx, at) for e in read_logs([item], self.profile.contract)]

    async def view(self, say: Say | None = None) -> View:
        """The whole state, verified; raises BadLog where no endpoint has the whole history."""
        history = await self.history(say)
        if not history.complete:
            raise BadLog(
                f"no endpoint has the whole history: {history.problems[0][0]}: "
                f"{history.problems[0][1]}",
                hint="name another endpoint with --rpc URL; `ww auth evm audit` shows what is "
                "there",
            )
        final = State(self.profile.chain_id, self.profile.contract)
        block = await self.final(history.block)
        if block is not None and (at := await self.state(block)) is not None:
            for logged in history.logs[: at.seq]:
                final.apply(logged.event)
            if final.head != at.head:
                raise BadLog(
                    f"the final block {block.number} has other events than the newest one",
                    hint="the chain is being reorganised: try again in a minute",
                )
        now = max(int(time.time()), history.block.time)
        return View(history, final, now)

    async def times(self, logs: Sequence[Logged]) -> dict[int, int]:
        """Block → its time (Unix s), of the events' blocks; what nobody says is left out."""
        found = {logged.block: logged.time for logged in logs if logged.time is not None}
        slots = asyncio.Semaphore(TIMES_MAX)

        async def ask(number: int) -> None:
            async with slots:
                try:
                    raw = await self.endpoints.first(
                        "eth_getBlockByNumber", hex(number), False, key=Block.parse
                    )
                    found[number] = Block.parse(raw).time
                except (ChainError, ValueError, KeyError, TypeError):
                    return

        await asyncio.gather(*map(ask, {logged.block for logged in logs} - found.keys()))
        return found
