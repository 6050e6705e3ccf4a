"""Contract wallets (ERC-1271): whether one holds good what it is said to have signed.

The wallet is code of a stranger. It is asked by a quorum of the endpoints, at given blocks, with
little gas and for a short answer, and few are asked at a time; what it says is about its own
account alone. It must hold good at the final block and at the newest one: an owner who was removed
is out at first sight, and one who was added waits for finality.
"""

from __future__ import annotations

import asyncio
import enum
from typing import TYPE_CHECKING, Any, Final

from eth_hash.auto import keccak

from wetware_auth_evm.chain.endpoints import REFUSED, Reverted, data, let_go
from wetware_auth_evm.chain.errors import EndpointFailed

if TYPE_CHECKING:
    from wetware_auth_evm.chain.endpoints import Endpoint, Endpoints

CHECKS_MAX: Final = 4
"""At a time: each takes two calls of every endpoint, which the replica needs more urgently."""
WAITING_MAX: Final = 64
"""Checks that wait for their turn; a login beyond them is refused."""
ANSWER_BYTES_MAX: Final = 16 << 10
"""Of an endpoint, JSON and an error text included; a right answer has 32 bytes."""
_FAILURES: Final = (
    "outofgas", "memoryoog", "memorylimit", "gasuint64overflow", "answerofmorethan",
    "invalidopcode", "opcodenotfound", "invalidjump", "badjump", "stackunderflow", "stackoverflow",
    "stacklimit", "writeprotection", "returndataoutofbounds", "evmerror", "vmexecutionerror",
)  # fmt: skip
"""What geth, reth, erigon, nethermind, besu and anvil say of code that failed without a revert."""
_CALL: Final = keccak(b"isValidSignature(bytes32,bytes)")[:4]
_MAGIC: Final = bytes.fromhex("1626ba7e").ljust(32, b"\0")


class Word(enum.Enum):
    """What comes of asking a wallet."""

    GOOD = "good"
    BAD = "bad"
    """The wallet refuses, or does not come to an answer within the bounds."""
    NO_CONTRACT = "no_contract"
    """There is none, or none that answers."""
    UNKNOWN = "unknown"
    """Too few endpoints answered, or they do not agree."""


class Busy(Exception):
    """WAITING_MAX checks wait already."""


class WalletCheck:
    """Asks contract wallets; one answer may use `gas_max` of gas."""

    def __init__(self, endpoints: Endpoints, *, gas_max: int) -> None:
        self._endpoints, self._gas = endpoints, hex(gas_max)
        self._slots = asyncio.Semaphore(CHECKS_MAX)
        self._waiting = 0

    async def ask(
        self, account: bytes, digest: bytes, signature: bytes, blocks: set[bytes]
    ) -> Word:
        """Whether the wallet holds the signature good at each of the blocks, given by hash.

        Raises Busy.
        """
        if self._waiting >= WAITING_MAX:
            raise Busy
        self._waiting += 1
        try:
            async with self._slots:
                words = await asyncio.gather(
                    *(self._ask_at(account, digest, signature, block) for block in blocks)
                )
        finally:
            self._waiting -= 1
        for word in (Word.NO_CONTRACT, Word.BAD):
            if word in words:
                return word
        return Word.GOOD if words and set(words) == {Word.GOOD} else Word.UNKNOWN

    async def _ask_at(self, account: bytes, digest: bytes, signature: bytes, block: bytes) -> Word:
        call = {
            "to": "0x" + account.hex(),
            "data": "0x" + calldata(digest, signature).hex(),
            "gas": self._gas,
        }
        at = {"blockHash": "0x" + block.hex()}
        pending = {
            asyncio.create_task(_word_of(endpoint, call, at)) for endpoint in self._endpoints.each
        }
        count = dict.fromkeys(Word, 0)
        asked = set(pending)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    count[task.result()] += 1
                for word in (Word.NO_CONTRACT, Word.BAD, Word.GOOD):
                    if count[word] >= self._endpoints.quorum:
                        return word
        finally:
            await let_go(asked)
        return Word.UNKNOWN


def calldata(digest: bytes, signature: bytes) -> bytes:
    """Of `isValidSignature(bytes32,bytes)`."""
    padded = signature.ljust(-(-len(signature) // 32) * 32, b"\0")
    offset, length = (64).to_bytes(32, "big"), len(signature).to_bytes(32, "big")
    return _CALL + digest + offset + length + padded


async def _word_of(endpoint: Endpoint, call: dict[str, Any], at: dict[str, str]) -> Word:
    """What one endpoint says that the wallet says."""
    try:
        answer = await endpoint.call("eth_call", call, at, bytes_max=ANSWER_BYTES_MAX)
    except Reverted:
        return Word.BAD
    except EndpointFailed as exc:
        # An endpoint that ran the code to its bitter end has answered; only its text says so.
        text = exc.message.removeprefix(f"{endpoint.name}: ")
        return Word.BAD if exc.code == REFUSED and _says_it_failed(text) else Word.UNKNOWN
    try:
        said = data(answer)
    except ValueError:
        return Word.UNKNOWN
    if not said:
        return Word.NO_CONTRACT
    return Word.GOOD if said == _MAGIC else Word.BAD


def _says_it_failed(text: str) -> bool:
    plain = text.lower().replace(" ", "").replace("-", "").replace("_", "")
    return any(words in plain for words in _FAILURES)
