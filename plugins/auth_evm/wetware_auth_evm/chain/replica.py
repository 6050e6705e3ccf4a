"""The contract as this node knows it: two states, decisions from memory, and what has to be held.

`final` is the contract at a block that the chain will not take back, `tip` at the newest one.
Something is allowed only if both allow it: a grant waits for finality, a withdrawal acts at first
sight, and holds until finality has passed it, whatever comes after it. So does one that a
reorganisation takes back, for it may come again. Beyond the stated bounds on the age of what was
verified, nothing is allowed.

No I/O: `Follower` feeds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from wetware_auth_evm.chain.addresses import keccak
from wetware_auth_evm.chain.errors import BadLog, ChainRegressed
from wetware_auth_evm.chain.events import ROOT, Event, decode, fold
from wetware_auth_evm.chain.finality import Bounds
from wetware_auth_evm.chain.state import Standing, State

if TYPE_CHECKING:
    from wetware.hookspecs import Clock

__all__ = ["HELD_MAX", "Bounds", "Replica"]

HELD_MAX: Final = 4096
"""Accounts whose withdrawals were taken back; beyond it everybody is held."""
COPIED_EVENTS_MIN: Final = 1000
"""From so many final events at once on, `tip` is made of `final`: the two share their records."""
_NOTHING_VERIFIED: Final = "nothing was verified yet"
_STATE_WORDS: Final = 7


_Who = bytes | tuple[bytes, bytes]
"""An account, or an account and a key that is bound to it."""


class _Step(NamedTuple):
    """An event that `tip` has and `final` has not."""

    event: Event
    head: bytes
    """Hash of the history with it."""
    mark: int
    """Where the journal of `tip` is after it."""
    withdraws: frozenset[bytes] | None
    """Whom it takes something from; None: everybody."""
    left: Mapping[_Who, Sequence[Standing]]
    """What it leaves to each of them: until it is final, no later event gives more."""


class Replica:
    """What a node knows of one contract.

    Args:
        chain_id: EIP-155.
        contract: Its address, 20 bytes.
        scope: Of this cluster, 32 bytes.
        bounds: On the age of what is known.
        clock: The node's.

    Attributes:
        final_block: (number, hash) of the block that `final` is of.
        tip_block: Likewise of `tip`.
        held: Account, or None for everybody → the block whose finality ends it: who lost something
            by an event that a reorganisation took back.
        fault: Why nothing was verified the last time, or "".
        regressed: Why nobody is admitted until an operator acts, or "".
    """

    def __init__(
        self, chain_id: int, contract: bytes, scope: bytes, *, bounds: Bounds, clock: Clock
    ) -> None:
        self.chain_id, self.contract, self.scope = chain_id, contract, scope
        self.bounds, self._clock = bounds, clock
        self.forget()

    def forget(self) -> None:
        """Know nothing, as at the first start; also what was regressed."""
        self.final = State(self.chain_id, self.contract)
        self.tip = State(self.chain_id, self.contract, journal=True)
        self.final_block: tuple[int, bytes] = (-1, b"")
        self.tip_block: tuple[int, bytes] = (-1, b"")
        self.tip_time = 0
        self._steps: list[_Step] = []
        self._seen_at = -1
        """Number of the newest block when `tip` was last stated: its events are in earlier ones."""
        self._left: dict[_Who, list[Sequence[Standing]]] = {}
        """Of all steps together."""
        self._pausing = False
        """Whether one of the steps is a pause."""
        self.held: dict[bytes | None, int] = {}
        self.fault, self.regressed = _NOTHING_VERIFIED, ""
        self._verified_at: tuple[float, float] | None = None

    @property
    def unsettled(self) -> list[Event]:
        """What `tip` has and `final` has not."""
        return [step.event for step in self._steps]

    @property
    def ever_verified(self) -> bool:
        """Whether a block was verified since the node started."""
        return self._verified_at is not None

    # --- what the follower says -------------------------------------------------------------------

    def set_tip(
        self, number: int, seq: int, head: bytes, found: Sequence[Event]
    ) -> frozenset[bytes] | None:
        """Make `tip` the contract's state as a quorum states it; returns whom it may concern.

        Args:
            number: Of the block that it is the state of.
            seq: The contract's.
            head: The contract's.
            found: All events since `final`, in their order.

        Raises BadLog, and changes nothing, if the events do not lead there.
        """
        if (self.tip.seq, self.tip.head) == (seq, head):
            self._seen_at = number
            return frozenset()
        events, heads = self._leading_to(seq, head, found)
        kept = 0
        for step, after in zip(self._steps, heads, strict=False):
            if step.head != after:
                break
            kept += 1
        gone = self._steps[kept:]
        del self._steps[kept:]
        self.tip.rollback(self._steps[-1].mark if self._steps else 0)
        bulk = self._is_bulk(len(events) - kept)
        concerned = [
            self._add(event, after, bulk=bulk)
            for event, after in zip(events[kept:], heads[kept:], strict=True)
        ]
        self._gather()
        stays = {event.leaf for event in events}
        for step in gone:
            if step.event.leaf in stays:
                continue
            concerned += [frozenset({step.event.account}), step.withdraws]
            for account in (None,) if step.withdraws is None else step.withdraws:
                # Not by the block where it was first seen: it may have moved to a later one.
                self._hold(account, self._seen_at)
        self._seen_at = number
        return union(concerned)

    def _leading_to(
        self, seq: int, head: bytes, found: Sequence[Event]
    ) -> tuple[list[Event], list[bytes]]:
        """Those of the events that lead from `final` to a state, and the hash after each.

        Raises BadLog if they do not lead there.
        """
        events = [event for event in found if self.final.seq < event.seq <= seq]
        at, folded = self.final.seq, self.final.head
        heads = []
        for event in events:
            if event.seq != at + 1:
                raise BadLog(f"event {event.seq} follows event {at}: logs are missing or forged")
            at, folded = event.seq, fold(folded, event.leaf)
            heads.append(folded)
        if at != seq:
            raise BadLog(f"the logs end at event {at}, and the contract is at {seq}")
        if folded != head:
            raise BadLog(f"the logs lead to another state than event {seq} of the contract")
        return events, heads

    def _is_bulk(self, events: int) -> bool:
        """Whether these are a long history that is read for the first time.

        What its events withdraw is not looked at: `final` is empty, so that nothing is allowed, and
        `settle` will look at those that are not final.
        """
        return self.final.seq == 0 and events >= COPIED_EVENTS_MIN

    def _add(
        self, event: Event, head: bytes | None = None, *, bulk: bool = False
    ) -> frozenset[bytes] | None:
        """One more event of `tip`; returns whom it is about."""
        here = not bulk and event.scope in (self.scope, ROOT)
        withdraws = self.tip.withdraws(event) if here else frozenset()
        about = self.tip.apply(event, head)
        left = self._what_is_left(event, withdraws) if withdraws else {}
        self._steps.append(_Step(event, self.tip.head, self.tip.mark(), withdraws, left))
        return about

    def _what_is_left(
        self, event: Event, accounts: frozenset[bytes]
    ) -> dict[_Who, Sequence[Standing]]:
        """What accounts, and the keys bound to them, have in `tip` now."""
        scope, tip, now = self.scope, self.tip, self.now()
        left: dict[_Who, Sequence[Standing]] = {
            account: tip.standing(scope, account, now) for account in accounts
        }
        bound = tip.bound_to(accounts)
        if event.name == "KeyUnbound":
            bound |= {(event.account, event.data["key"])}
        for who in bound:
            left[who] = tip.key_standing(scope, *who, now)
        return left

    def _gather(self) -> None:
        """What the steps leave to whom, after they changed."""
        self._left = {}
        self._pausing = False
        for step in self._steps:
            self._pausing |= step.withdraws is None
            for who, standing in step.left.items():
                self._left.setdefault(who, []).append(standing)

    def _hold(self, account: bytes | None, block: int) -> None:
        if account not in self.held and len(self.held) >= HELD_MAX:
            account = None
        self.held[account] = max(block, self.held.get(account, 0))

    def settle(self, number: int, hash_: bytes, seq: int, head: bytes) -> list[Event]:
        """Make `final` the contract's state at a block that is final; returns the events between.

        `tip` has to have them. Raises BadLog, and changes nothing, if they do not lead there;
        ChainRegressed if `final` knows better already.
        """
        if seq < self.final.seq or (seq == self.final.seq and head != self.final.head):
            raise ChainRegressed(
                f"the contract is at event {seq} in the final block {number}, and was at "
                f"{self.final.seq} before: what was final is not"
            )
        count = seq - self.final.seq
        bulk = self._is_bulk(len(self._steps))
        moved = self._steps[:count]
        if count:
            if len(moved) != count or moved[-1].head != head:
                raise BadLog(f"the final block {number} has other events than the newest one")
            for step in moved:
                self.final.apply(step.event, step.head)
            self._drop(moved, anew=bulk or count >= COPIED_EVENTS_MIN)
        self.final_block = (number, hash_)
        self.held = {who: block for who, block in self.held.items() if block > number}
        return [step.event for step in moved]

    def _drop(self, moved: Sequence[_Step], *, anew: bool) -> None:
        """Let `tip` begin at `final`, which has these events now."""
        rest = self._steps[len(moved) :]
        if anew:
            self._rebase((step.event, step.head) for step in rest)
            return
        mark = moved[-1].mark
        self.tip.forget(mark)
        self._steps = [step._replace(mark=step.mark - mark) for step in rest]
        self._gather()

    def _rebase(self, unsettled: Iterable[tuple[Event, bytes | None]]) -> None:
        """Make `tip` of `final` and (event, hash after it, if known) that it has not."""
        self.tip, self._steps = self.final.copy(journal=True), []
        for event, head in unsettled:
            self._add(event, head)
        self._gather()

    def restore(
        self,
        final: State,
        block: tuple[int, bytes],
        *,
        tip_block: tuple[int, bytes],
        unsettled: Sequence[Event],
        held: Mapping[bytes | None, int],
        regressed: str,
    ) -> None:
        """Go on where the node stopped. Nothing is allowed before a block was verified.

        Raises BadLog if the unsettled events do not follow `final`.
        """
        self.forget()
        self.final, self.final_block, self.tip_block = final, block, tip_block
        self.held, self.regressed, self._seen_at = dict(held), regressed, tip_block[0]
        self._rebase((event, None) for event in unsettled)

    def doubt(self) -> None:
        """Read the events anew: what was restored does not lead to the contract's state.

        The final block is kept, so that a regression is noticed, and so is what is held.
        """
        self.final = State(self.chain_id, self.contract)
        self._rebase(())

    def verified(self, number: int, hash_: bytes, time_s: int) -> None:
        self.tip_block, self.tip_time = (number, hash_), time_s
        self._verified_at, self.fault = (self._clock.monotonic(), self._clock.time()), ""

    # --- decisions --------------------------------------------------------------------------------

    def unfit(self) -> str:
        """Why nothing can be decided now; "" if it can."""
        if self.regressed:
            return self.regressed
        if self._verified_at is None:
            return self.fault
        bounds, time_s = self.bounds, self._clock.time()
        # By the wall clock, too: the other one stands still while a laptop sleeps.
        age_s = max(self._clock.monotonic() - self._verified_at[0], time_s - self._verified_at[1])
        if age_s > bounds.verified_s_max:
            why = f": {self.fault}" if self.fault else ""
            return (
                f"no block was verified for {age_s:.0f} s, {bounds.verified_s_max:g} s are "
                f"allowed{why}"
            )
        old_s = time_s - self.tip_time
        if bounds.tip_age_s_max is not None and old_s > bounds.tip_age_s_max:
            return (
                f"the newest block is {old_s:.0f} s old, {bounds.tip_age_s_max:g} s are allowed: "
                "the endpoints are behind, the chain stands still, or this clock is fast"
            )
        if bounds.tip_ahead_s_max is not None and -old_s > bounds.tip_ahead_s_max:
            return (
                f"the newest block is {-old_s:.0f} s in the future, {bounds.tip_ahead_s_max:g} s "
                "are allowed: this clock is slow"
            )
        return ""

    def fit_for_s(self) -> float:
        """Seconds until `unfit` if no further block is verified; 0 if it is already."""
        if self._verified_at is None or self.unfit():
            return 0.0
        now, time_s = self._clock.monotonic(), self._clock.time()
        age_s = max(now - self._verified_at[0], time_s - self._verified_at[1])
        left_s = self.bounds.verified_s_max - age_s
        if self.bounds.tip_age_s_max is not None:
            left_s = min(left_s, self.bounds.tip_age_s_max - (time_s - self.tip_time))
        return max(left_s, 0.0)

    def now(self) -> int:
        """Unix time, s, by which records are judged: the later of the node's and the chain's."""
        return max(int(self._clock.time()), self.tip_time)

    def rights(self, role: bytes, account: bytes) -> int:
        """The mask that an account has in a role of this cluster; 0 if that cannot be said."""
        if self.unfit() or self.is_held(account):
            return 0
        now = self.now()
        mask = self.final.rights(self.scope, role, account, now)
        mask = mask and mask & self.tip.rights(self.scope, role, account, now)
        return mask and mask & self._left_in(role, now, account)

    def roles(self, account: bytes) -> dict[bytes, int]:
        """Role → mask of all that an account has in this cluster; {} if that cannot be said."""
        return {} if self.unfit() else self.known_roles(account)

    def known_roles(self, account: bytes) -> dict[bytes, int]:
        """As `roles`, by what was known last: it decides nothing while `unfit`."""
        if self.is_held(account):
            return {}
        now = self.now()
        final = self.final.roles(self.scope, account, now)
        if not final:
            return final
        return self._allowed(final, self.tip.roles(self.scope, account, now), now, account)

    def key_roles(self, account: bytes, key: bytes) -> dict[bytes, int]:
        """Role → mask of all in which a bound key acts for an account; {} if it cannot be said."""
        return {} if self.unfit() else self.known_key_roles(account, key)

    def known_key_roles(self, account: bytes, key: bytes) -> dict[bytes, int]:
        """As `key_roles`, by what was known last: it decides nothing while `unfit`."""
        if self.is_held(account):
            return {}
        now = self.now()
        final = self.final.key_roles(self.scope, account, key, now)
        if not final:
            return final
        tip = self.tip.key_roles(self.scope, account, key, now)
        return self._allowed(final, tip, now, account, (account, key))

    def key_accounts(self, role: bytes, key: bytes) -> dict[bytes, int]:
        """Account → mask, of the accounts for which a bound key acts in a role."""
        if self.unfit():
            return {}
        accounts = self.final.key_accounts(self.scope, role, key, self.now())
        found = {a: self.known_key_roles(a, key).get(role, 0) for a in accounts}
        return {account: mask for account, mask in found.items() if mask}

    def epochs(self, account: bytes) -> tuple[int, int, int]:
        """As of the newest block: what a session has to be bound to."""
        return self.tip.epochs(self.scope, account)

    def epochs_fit(self, account: bytes, signed: tuple[int, int, int]) -> bool:
        """Whether a session of these epochs is of the present ones, final and newest."""
        return (
            signed == self.tip.epochs(self.scope, account) == self.final.epochs(self.scope, account)
        )

    def next_end(self, account: bytes, key: bytes | None = None) -> int:
        """When (Unix s) something of an account, or of a key bound to it, ends or begins next."""
        now = self.now()
        ends = [state.next_end(self.scope, account, now) for state in (self.final, self.tip)]
        if key is not None:
            ends += [state.next_key_end(account, key, now) for state in (self.final, self.tip)]
        return min(ends)

    def is_held(self, account: bytes) -> bool:
        """Whether all that an account has waits for finality.

        A withdrawal from it was taken back, and may come again; or there was a pause, and that it
        is over is not final.
        """
        if self._pausing:
            return True
        return bool(self.held) and (account in self.held or None in self.held)

    def _left_in(self, role: bytes, now: int, *whose: _Who) -> int:
        """The mask that withdrawals which are not final have left in a role.

        Else a revocation and a new grant, both newer than `final`, would together take nothing
        away, and the new grant would not have waited for finality.
        """
        mask = -1
        if self._left:
            for who in whose:
                for standing in self._left.get(who, ()):
                    left = 0
                    for what, not_before, rights in standing:
                        if what == role and not_before <= now:
                            left |= rights
                    mask &= left
        return mask

    def _allowed(
        self, final: Mapping[bytes, int], tip: Mapping[bytes, int], now: int, *whose: _Who
    ) -> dict[bytes, int]:
        found = {
            role: mask & tip.get(role, 0) & self._left_in(role, now, *whose)
            for role, mask in final.items()
        }
        return {role: mask for role, mask in found.items() if mask}


def read_logs(raw: Any, contract: bytes) -> list[Event]:
    """The answer to eth_getLogs, in the order of the events; raises BadLog."""
    from wetware_auth_evm.chain.endpoints import data, fixed

    if not isinstance(raw, list):
        raise BadLog("an answer that is not a list of logs")
    found = []
    for item in raw:
        try:
            if item.get("removed"):
                continue
            if fixed(item["address"], 20) != contract:
                raise BadLog("a log of another contract")
            topics = tuple(fixed(topic, 32) for topic in item["topics"])
            found.append(decode(topics, data(item["data"])))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise BadLog(f"a malformed log: {str(exc)[:80]}") from None
    found.sort(key=lambda event: event.seq)
    return found


STATE_CALL: Final = "0x" + keccak(b"state()")[:4].hex()


def parse_state(answer: bytes) -> tuple[int, bytes]:
    """(seq, head) of the contract's `state()`; raises ValueError."""
    if len(answer) != _STATE_WORDS * 32:
        raise ValueError("not the contract's state")
    seq = int.from_bytes(answer[:32], "big")
    if seq >> 48:
        raise ValueError("no event number")
    return seq, answer[32:64]


def union(parts: Iterable[frozenset[bytes] | None]) -> frozenset[bytes] | None:
    """Whom changes are about; None is everybody."""
    accounts: set[bytes] = set()
    for part in parts:
        if part is None:
            return None
        accounts |= part
    return frozenset(accounts)
