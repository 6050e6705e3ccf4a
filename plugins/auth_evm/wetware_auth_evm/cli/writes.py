"""Transactions: estimated, signed here, sent to every endpoint, followed until they are final.

Requests have a time limit each. What goes wrong is said in a sentence: no funds, wrong chain, what
the contract refused and why, stuck, taken back by the chain.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from wetware.errors import EXIT_DENIED, InvalidArgument
from wetware_auth_evm.chain.addresses import parse_address
from wetware_auth_evm.chain.endpoints import Reverted, wide
from wetware_auth_evm.chain.errors import BadLog, ChainError, EndpointFailed, NoQuorum
from wetware_auth_evm.chain.events import decode
from wetware_auth_evm.cli import abi
from wetware_auth_evm.cli.words import who

if TYPE_CHECKING:
    from web3.types import TxParams, TxReceipt

    from wetware_auth_evm.chain.events import Event
    from wetware_auth_evm.cli.given import Write
    from wetware_auth_evm.cli.reads import Chain, Say
    from wetware_auth_evm.login.wallets import Wallet

MINED_S_MAX: Final = 180.0
"""Until it is in a block; 15 blocks of mainnet."""
FINAL_S_MAX: Final = 1800.0
"""Until that block is final; mainnet takes 13 to 19 minutes."""
POLL_S, POLL_S_MAX = 0.25, 4.0
TIP_WEI: Final = 1_000_000_000
"""For the validator, where the endpoints do not say what is usual: 1 gwei."""
GAS_SPARE: Final = 1.2
"""Of what was estimated: the state may differ a little when it is mined."""
FEE_BUMP: Final = 1.125
"""More than this a replacement has to pay, by what nodes ask: 10 % and some."""
GWEI: Final = 10**9


class ContractRefused(ChainError):
    """The contract would refuse, or has refused, the transaction.

    Attributes:
        name: Of the contract's error, or "".
    """

    code = "evm.contract_refused"
    exit_code = EXIT_DENIED
    name: str = ""


class NoFunds(ChainError):
    """The account cannot pay for the transaction."""

    code = "evm.no_funds"


class Stuck(ChainError):
    """A transaction was sent and is in no block after its time."""

    code = "evm.stuck"


class NotSent(ChainError):
    """Every endpoint refused the transaction."""

    code = "evm.not_sent"


@dataclass(frozen=True, slots=True)
class Transaction:
    """What is to be sent: a call of `to` (20 bytes), or with an empty one a new contract."""

    to: bytes
    data: bytes
    chain_id: int

    def as_dict(self) -> dict[str, Any]:
        """For a Safe or a hardware wallet: `--calldata`."""
        return {
            "to": who(self.to) if self.to else None,
            "data": "0x" + self.data.hex(),
            "value": "0",
            "chainId": self.chain_id,
        }

    def query(self, sender: bytes) -> TxParams:
        """As web3 takes what is to be tried."""
        found: TxParams = {"from": who(sender), "data": self.data}
        return {**found, "to": who(self.to)} if self.to else found


@dataclass(frozen=True, slots=True)
class Fees:
    """What is paid per gas, in wei; `tip` is None for a chain without EIP-1559."""

    most: int
    tip: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a transaction.

    Attributes:
        tx: Its hash.
        status: How far it got: "sent", "mined", "final".
        block: In which it is, or None.
        created: The address of the contract that it made, or empty.
        events: Of the contract, that it caused.
        gas: That it took.
        nonce: Its number.
    """

    tx: bytes
    status: Literal["sent", "mined", "final"]
    nonce: int
    block: int | None = None
    created: bytes = b""
    events: tuple[Event, ...] = ()
    gas: int = 0

    def as_dict(self) -> dict[str, Any]:
        from wetware_auth_evm.cli.words import event_plain

        return {
            "tx": "0x" + self.tx.hex(),
            "status": self.status,
            "block": self.block,
            "nonce": self.nonce,
            "gas": self.gas,
            "contract": who(self.created) if self.created else None,
            "events": [event_plain(event) for event in self.events],
        }


async def send(
    chain: Chain, wallet: Wallet, tx: Transaction, how: Write, say: Say, *, poll_s: float = POLL_S
) -> Outcome:
    """Send a transaction, and wait as `how` says; `chain` has been identified.

    Raises ContractRefused, NoFunds, NotSent, Stuck, ChainError. What was sent stays sent: an error
    after that says so.
    """
    say("estimating")
    gas = await _estimate(chain, wallet.address, tx)
    fees = await _fees(chain, how.fee_gwei)
    await _check_funds(chain, wallet.address, gas * fees.most)
    nonce = how.nonce
    if nonce is None:
        nonce = await chain.w3.eth.get_transaction_count(who(wallet.address), "pending")
    tx_hash = await _send(chain, wallet, tx, gas, fees, nonce)
    say(f"sent 0x{tx_hash.hex()}")
    outcome = Outcome(tx_hash, "sent", nonce)
    if how.wait == "none":
        return outcome
    started = time.monotonic()
    outcome = await _mined(
        chain, wallet.address, tx, outcome, fees, how.timeout or MINED_S_MAX, say, poll_s
    )
    if how.wait == "mined":
        return outcome
    left_s = FINAL_S_MAX if how.timeout is None else how.timeout - (time.monotonic() - started)
    return await _final(chain, outcome, left_s, say, poll_s)


# --- before it is sent ----------------------------------------------------------------------------


def refused(exc: Reverted) -> ContractRefused:
    why = abi.refusal(exc.returned)
    error = ContractRefused(why.sentence, hint=why.hint)
    error.name = why.name
    return error


async def _estimate(chain: Chain, sender: bytes, tx: Transaction) -> int:
    try:
        estimated = await chain.w3.eth.estimate_gas(tx.query(sender))
    except Reverted as exc:
        raise refused(exc) from None
    except EndpointFailed as exc:
        if _is_no_funds(exc.message):
            raise await _no_funds(chain, sender, None) from None
        raise
    return int(estimated * GAS_SPARE)


async def _fees(chain: Chain, fee_gwei: float | None) -> Fees:
    block = await chain.endpoints.first("eth_getBlockByNumber", "latest", False, key=_base_fee)
    base = _base_fee(block)
    if fee_gwei is not None and not 0 <= fee_gwei <= 1_000_000:
        raise InvalidArgument(f"a fee of {fee_gwei:g} gwei", hint="write a number such as 30")
    named = None if fee_gwei is None else int(fee_gwei * GWEI)
    if base is None:
        return Fees(await chain.w3.eth.gas_price if named is None else named, None)
    try:
        # A try-out's chain takes nothing; anvil proposes what is usual elsewhere all the same.
        tip = 0 if chain.profile.dev else await chain.w3.eth.max_priority_fee
    except EndpointFailed:
        tip = TIP_WEI
    most = 2 * base + tip if named is None else named
    return Fees(most, min(tip, most))


def _base_fee(block: Any) -> int | None:
    """Wei; None for a chain from before EIP-1559."""
    if not isinstance(block, dict):
        raise TypeError("no block")
    base = block.get("baseFeePerGas")
    return None if base is None else wide(base)


async def _check_funds(chain: Chain, sender: bytes, needed: int) -> None:
    if needed and await chain.w3.eth.get_balance(who(sender), "latest") < needed:
        raise await _no_funds(chain, sender, needed)


async def _no_funds(chain: Chain, sender: bytes, needed: int | None) -> NoFunds:
    there = await chain.w3.eth.get_balance(who(sender), "latest")
    takes = f", and this may take {ether(needed)}" if needed is not None else ""
    return NoFunds(
        f"{who(sender)} has {ether(there)} on chain {chain.profile.chain_id}{takes}",
        hint=f"send some to {who(sender)}, choose another wallet with ww --key NAME, or pass "
        "--calldata to let another account send it",
    )


def ether(wei: int) -> str:
    return f"{wei / 10**18:.6g} of the chain's coin" if wei else "nothing"


def _is_no_funds(text: str) -> bool:
    return "insufficient" in text.lower() or "not enough" in text.lower()


# --- sending --------------------------------------------------------------------------------------


def sign(wallet: Wallet, tx: Transaction, gas: int, fees: Fees, nonce: int) -> tuple[bytes, bytes]:
    """(the transaction as it is sent, its hash)."""
    from wetware_auth_evm.chain.provider import AsyncWeb3

    price = (
        {"gasPrice": fees.most}
        if fees.tip is None
        else {"maxFeePerGas": fees.most, "maxPriorityFeePerGas": fees.tip}
    )
    fields = {
        "to": who(tx.to) if tx.to else b"",
        "data": tx.data,
        "value": 0,
        "gas": gas,
        "nonce": nonce,
        "chainId": tx.chain_id,
        **price,
    }
    done = AsyncWeb3().eth.account.sign_transaction(fields, wallet.secret)
    return bytes(done.raw_transaction), bytes(done.hash)


async def _send(
    chain: Chain, wallet: Wallet, tx: Transaction, gas: int, fees: Fees, nonce: int
) -> bytes:
    raw, tx_hash = sign(wallet, tx, gas, fees, nonce)
    said = await _broadcast(chain, raw)
    if fees.tip is not None and _is_bad_type(said):
        # A chain that has base fees, and takes no transactions of type 2.
        raw, tx_hash = sign(wallet, tx, gas, replace(fees, tip=None), nonce)
        said = await _broadcast(chain, raw)
    if not said:
        return tx_hash
    if _is_no_funds(said):
        raise await _no_funds(chain, wallet.address, gas * fees.most)
    if "nonce" in said.lower():
        raise NotSent(
            f"the number {nonce} of the transaction is not the next one: {said}",
            hint="another one of this wallet was faster; run the command again, without --nonce",
        )
    if "underpriced" in said.lower():
        raise NotSent(
            f"a transaction with the number {nonce} waits already, and this one does not pay "
            f"more: {said}",
            hint=f"wait for it, or replace it with --nonce {nonce} --fee-gwei "
            f"{fees.most * FEE_BUMP / GWEI * 2:.3g}",
        )
    raise NotSent(f"no endpoint took the transaction: {said}", hint="ww auth evm status")


def _is_bad_type(text: str) -> bool:
    lower = text.lower()
    return "type" in lower and ("not supported" in lower or "unsupported" in lower)


async def _broadcast(chain: Chain, raw: bytes) -> str:
    """Give it to every endpoint; "" if one took it, else why not."""
    try:
        await chain.w3.eth.send_raw_transaction(raw)
    except ChainError as exc:
        known = "already known" in exc.message.lower() or "already imported" in exc.message
        return "" if known else exc.message
    return ""


# --- after it is sent -----------------------------------------------------------------------------


async def _until(
    condition: Callable[[], Awaitable[Any]], timeout_s: float, poll_s: float
) -> tuple[Any, str]:
    """(what `condition` gives that is not None, or None after the time; the last failure)."""
    deadline, failure = time.monotonic() + timeout_s, ""
    while True:
        try:
            if (found := await condition()) is not None:
                return found, ""
            failure = ""
        except (EndpointFailed, NoQuorum) as exc:
            failure = exc.message
        if time.monotonic() >= deadline:
            return None, failure
        await asyncio.sleep(min(poll_s, max(0.0, deadline - time.monotonic())))
        poll_s = min(poll_s * 1.3, POLL_S_MAX)


async def _receipt(chain: Chain, tx_hash: bytes) -> TxReceipt | None:
    """The receipt on which a quorum agrees; None where too few have one that is whole."""
    try:
        return await chain.w3.eth.get_transaction_receipt(tx_hash)
    except (NoQuorum, ValueError, TypeError, KeyError, AttributeError):  # web3's, of a log
        return None


async def _mined(
    chain: Chain,
    sender: bytes,
    tx: Transaction,
    sent: Outcome,
    fees: Fees,
    timeout_s: float,
    say: Say,
    poll_s: float,
) -> Outcome:
    receipt, failure = await _until(lambda: _receipt(chain, sent.tx), timeout_s, poll_s)
    if receipt is None:
        raise await _stuck(chain, sender, sent, fees, timeout_s, failure)
    number = receipt["blockNumber"]
    if receipt["status"] != 1:
        raise await _failed(chain, sender, tx, sent, number)
    made = receipt.get("contractAddress")
    created = parse_address(made) if made else b""
    say(f"mined in block {number}")
    return replace(
        sent,
        status="mined",
        block=number,
        created=created,
        events=_events(receipt, created or tx.to),
        gas=receipt["gasUsed"],
    )


def _events(receipt: TxReceipt, contract: bytes) -> tuple[Event, ...]:
    """What our contract logged; nothing where it is another one: that is told, not judged."""
    try:
        return tuple(
            decode(tuple(map(bytes, each["topics"])), bytes(each["data"]))
            for each in receipt.get("logs", [])
            if each["address"] == who(contract)
        )
    except BadLog:
        return ()


async def _failed(
    chain: Chain, sender: bytes, tx: Transaction, sent: Outcome, number: int
) -> ContractRefused:
    """Why a mined transaction changed nothing: what it says when it is run again."""
    why = "the transaction ran out of gas, or the state has changed since"
    error = ContractRefused("")
    try:
        await chain.w3.eth.call(tx.query(sender), number)
    except Reverted as exc:
        error = refused(exc)
        why = error.message
    except ChainError:
        pass
    error.message = f"0x{sent.tx.hex()} is in block {number} and changed nothing: {why}"
    error.args = (error.message,)
    error.hint = error.hint or "run the command again"
    return error


async def _stuck(
    chain: Chain, sender: bytes, sent: Outcome, fees: Fees, timeout_s: float, failure: str
) -> ChainError:
    """What to say of a transaction that is in no block."""
    name = f"0x{sent.tx.hex()}"
    try:
        used = await chain.w3.eth.get_transaction_count(who(sender), "latest") > sent.nonce
        receipt = await _receipt(chain, sent.tx) if used else None
    except ChainError as exc:
        failure, used, receipt = exc.message, False, None
    if failure:
        return Stuck(
            f"{name} was sent, and the endpoints do not say what became of it: {failure}",
            hint="it may be carried out; look with `ww auth evm audit` when they answer again",
        )
    if used and receipt is None:
        return NotSent(
            f"{name} was replaced by another transaction of {who(sender)} with the number "
            f"{sent.nonce}",
            hint="run the command again if it is still to be done",
        )
    higher = max(fees.most * FEE_BUMP * 2 / GWEI, 0.01)
    return Stuck(
        f"{name} was sent, and is in no block after {timeout_s:.0f} s",
        hint="it may still be carried out. Wait and look with `ww auth evm audit`; or replace it: "
        f"the same command with --nonce {sent.nonce} --fee-gwei {higher:.3g}",
    )


async def _final(
    chain: Chain, mined: Outcome, timeout_s: float, say: Say, poll_s: float
) -> Outcome:
    """Wait until the block is final, and the transaction is still in it."""
    where = [mined]

    async def settled() -> Outcome | None:
        now = where[0]
        final = await chain.final(await chain.tip())
        if final is None or now.block is None or final.number < now.block:
            return None
        receipt = await _receipt(chain, now.tx)
        if receipt is None:
            say("no longer in a block: the chain was reorganised; waiting for it to come back")
            where[0] = replace(now, block=None)
            return None
        if (number := receipt["blockNumber"]) != now.block:
            say(f"moved to block {number} by a reorganisation")
            where[0] = now = replace(now, block=number)
        return now if number <= final.number else None

    async def look() -> Outcome | None:
        if where[0].block is None and (receipt := await _receipt(chain, mined.tx)) is not None:
            number = receipt["blockNumber"]
            say(f"mined again in block {number}")
            where[0] = replace(where[0], block=number)
        return await settled()

    found: Outcome | None
    found, failure = await _until(look, max(0.0, timeout_s), poll_s)
    if found is not None:
        say("final")
        return replace(found, status="final")
    if where[0].block is None:
        raise Stuck(
            f"0x{mined.tx.hex()} was taken out of the chain by a reorganisation, and did not come "
            "back",
            hint="run the command again",
        )
    why = f" ({failure})" if failure else ""
    say(
        f"not final yet{why}: a grant begins when it is; what takes away acts already. "
        "`ww auth evm status` shows how far the chain is"
    )
    return where[0]
