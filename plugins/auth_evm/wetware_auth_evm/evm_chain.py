"""The try-out chain where there is no anvil: py-evm in this process, one block a transaction.

Gas costs nothing on it: the base fee is 0 and stays 0, so that a wallet made a minute ago can send.
`finalized` is the newest block. The state at every block is kept: blocks are few.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import wetware_auth_evm.late  # noqa: F401  # before the imports below

# isort: split
from eth._utils.address import generate_contract_address
from eth.chains.base import MiningChain
from eth.constants import BLANK_ROOT_HASH, POST_MERGE_NONCE, ZERO_ADDRESS
from eth.db.atomic import AtomicDB
from eth.db.backends.base import BaseDB
from eth.exceptions import HeaderNotFound, Revert, TransactionNotFound
from eth.rlp.headers import BlockHeader
from eth.vm.chain_context import ChainContext
from eth.vm.forks.prague import PragueVM
from eth.vm.spoof import SpoofTransaction
from eth_typing import Address, BlockNumber, Hash32
from eth_utils.exceptions import ValidationError

from wetware_auth_evm.chain.journal import Journal

if TYPE_CHECKING:
    from eth.abc import BlockHeaderAPI

BLOCK_GAS: Final = 30_000_000
CALL_GAS_MAX: Final = 10_000_000
"""For a call that only asks: a contract that loops holds the chain up for seconds, not more."""
RAW_BYTES_MAX: Final = 256 << 10
"""Of a transaction."""
LOGS_MAX: Final = 20_000
"""In one answer."""
BALANCE_WEI: Final = 10**24
"""Of the owner, for wallets that insist on paying."""


class Refused(Exception):
    """A transaction or a question that the chain does not take; the message says why."""


class CallReverted(Exception):
    """A call failed; carries what it returned."""

    def __init__(self, data: bytes) -> None:
        super().__init__("execution reverted")
        self.data = data


class _Store(BaseDB):
    """A journal as py-evm's database."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __getitem__(self, key: bytes) -> bytes:
        return self._journal.store[key]

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._journal.put(key, value)

    def __delitem__(self, key: bytes) -> None:
        self._journal.put(key, None)

    def _exists(self, key: bytes) -> bool:
        return key in self._journal.store


class EvmChain:
    """The chain.

    Args:
        path: Its journal.
        chain_id: EIP-155.
        owner: Has a balance from the first block on; matters at the first start only.
        clock: Unix time, s.

    Raises ConfigError: the journal is damaged.
    """

    def __init__(
        self, path: Path, *, chain_id: int, owner: bytes, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self.chain_id = chain_id
        self.journal = Journal(path)
        self._db = AtomicDB(_Store(self.journal))
        members = {
            "chain_id": chain_id,
            "vm_configuration": ((BlockNumber(0), PragueVM),),
            "create_header_from_parent": _header_from_parent,
        }
        self._class: Any = type("TryOutChain", (MiningChain,), members)
        if not self.journal.store:
            self._begin(owner)
        self._chain: Any = self._class(self._db)
        self._logs: dict[int, list[dict[str, Any]]] = {}

    def _begin(self, owner: bytes) -> None:
        blank = BlockHeader(difficulty=0, block_number=BlockNumber(-1), gas_limit=0)
        state = PragueVM.build_state(self._db, blank, ChainContext(self.chain_id))
        state.set_balance(Address(owner), BALANCE_WEI)
        state.persist()
        header = PragueVM.create_genesis_header(
            coinbase=ZERO_ADDRESS,
            difficulty=0,
            extra_data=b"wetware try-out",
            gas_limit=BLOCK_GAS,
            nonce=POST_MERGE_NONCE,
            receipt_root=BLANK_ROOT_HASH,
            state_root=state.state_root,
            timestamp=int(self._clock()),
            transaction_root=BLANK_ROOT_HASH,
        )
        # `create_genesis_header` knows the usual base fee only.
        self._class.from_genesis_header(self._db, header.copy(base_fee_per_gas=0))
        self.journal.commit()

    def close(self) -> None:
        self.journal.close()

    # --- blocks -----------------------------------------------------------------------------------

    @property
    def head(self) -> BlockHeaderAPI:
        header: BlockHeaderAPI = self._chain.get_canonical_head()
        return header

    def by_number(self, number: int) -> BlockHeaderAPI | None:
        """A block, or None if there is none yet."""
        if not 0 <= number <= self.head.block_number:
            return None
        header: BlockHeaderAPI = self._chain.get_canonical_block_header_by_number(number)
        return header

    def by_hash(self, hash_: bytes) -> BlockHeaderAPI | None:
        try:
            header: BlockHeaderAPI = self._chain.get_block_header_by_hash(Hash32(hash_))
        except (HeaderNotFound, ValidationError):
            return None
        return header

    def transactions(self, header: BlockHeaderAPI) -> list[bytes]:
        hashes = self._chain.chaindb.get_block_transaction_hashes(header)
        return [bytes(each) for each in hashes]

    # --- state ------------------------------------------------------------------------------------

    def state(self, header: BlockHeaderAPI | None) -> Any:
        """The state after a block; None: after the newest one, at this time.

        What would be mined now sees the clock, and not the time of a block of an hour ago.
        """
        if header is None:
            newest = self.head
            now = max(int(self._clock()), newest.timestamp)
            header = newest.copy(timestamp=now)
        return self._chain.get_vm(header).state

    def call(self, query: dict[str, Any], header: BlockHeaderAPI | None) -> bytes:
        """What a call returns; raises CallReverted, Refused."""
        return bytes(self._run(query, header, CALL_GAS_MAX).output)

    def estimate(self, query: dict[str, Any], header: BlockHeaderAPI | None) -> int:
        """Gas that a transaction takes, or a little more; raises CallReverted, Refused."""
        done = self._run(query, header, BLOCK_GAS - 1)
        # Of the message alone: what the transaction pays before it is not in it.
        used = int(done.get_gas_used()) + int(self._unsigned(query, 0, BLOCK_GAS - 1).intrinsic_gas)
        for percent in (100, 103, 110, 120, 150, 200):
            # A refund, or what a call within a call holds back, makes it take more than it uses.
            gas = min(used * percent // 100, BLOCK_GAS - 1)
            try:
                self._run({**query, "gas": gas}, header, BLOCK_GAS - 1)
            except (CallReverted, Refused):
                continue
            return gas
        return BLOCK_GAS - 1

    def _unsigned(self, query: dict[str, Any], nonce: int, gas_max: int) -> Any:
        builder: Any = PragueVM.get_transaction_builder()
        return builder.new_unsigned_dynamic_fee_transaction(
            chain_id=self.chain_id,
            nonce=nonce,
            max_priority_fee_per_gas=0,
            max_fee_per_gas=0,
            gas=min(query.get("gas", gas_max), gas_max),
            to=Address(query.get("to", b"")),
            value=query.get("value", 0),
            data=query.get("data", b""),
            access_list=(),
        )

    def _run(self, query: dict[str, Any], header: BlockHeaderAPI | None, gas_max: int) -> Any:
        state = self.state(header)
        sender = Address(query.get("from", bytes(20)))
        unsigned = self._unsigned(query, state.get_nonce(sender), gas_max)
        spoofed: Any = SpoofTransaction(unsigned, from_=sender)
        try:
            done = state.apply_transaction(spoofed)
        except (ValidationError, OverflowError) as exc:
            raise Refused(str(exc)[:200]) from None
        if done.is_error:
            if isinstance(done.error, Revert):
                raise CallReverted(bytes(done.output))
            raise Refused(f"the call failed: {type(done.error).__name__}")
        return done

    # --- transactions -----------------------------------------------------------------------------

    def send(self, raw: bytes) -> bytes:
        """Mine a signed transaction, in a block of its own, and put it on disk; returns its hash.

        Raises Refused: malformed, another chain's, a wrong nonce; OSError or ChainFull where it
        cannot be kept.
        """
        if not 0 < len(raw) <= RAW_BYTES_MAX:
            raise Refused(f"a transaction of {len(raw)} bytes; at most {RAW_BYTES_MAX}")
        transaction = self._decode(raw)
        parent = self.head
        self._chain.header = self._class.create_header_from_parent(
            self._chain, parent, timestamp=max(int(self._clock()), parent.timestamp + 1)
        )
        try:
            self._chain.mine_all([transaction], coinbase=ZERO_ADDRESS)
            self.journal.commit()
        except BaseException as exc:
            self.journal.rollback()
            self._chain = self._class(self._db)
            if isinstance(exc, ValidationError):
                raise Refused(str(exc)[:200]) from None
            raise
        return bytes(transaction.hash)

    def _decode(self, raw: bytes) -> Any:
        """A transaction that can be mined next; raises Refused."""
        try:
            transaction = PragueVM.get_transaction_builder().decode(raw)
            chain_id = transaction.chain_id
            transaction.validate()
            transaction.check_signature_validity()
            sender = transaction.sender
        except Exception as exc:  # of rlp, py-evm, and two libraries for signatures, each its own
            raise Refused(f"not a transaction: {type(exc).__name__}: {str(exc)[:100]}") from None
        if chain_id is None:
            raise Refused("only replay-protected transactions (EIP-155) are taken")
        if chain_id != self.chain_id:
            raise Refused(f"invalid chain id: it is for {chain_id}, and this is {self.chain_id}")
        expected = self.state(None).get_nonce(sender)
        if transaction.nonce != expected:
            low = "too low" if transaction.nonce < expected else "too high"
            raise Refused(f"nonce {low}: it is {transaction.nonce}, and {expected} is next")
        if transaction.gas > BLOCK_GAS:
            raise Refused(f"gas limit above that of a block, {BLOCK_GAS}")
        return transaction

    def receipt(self, hash_: bytes) -> dict[str, Any] | None:
        try:
            number, index = self._chain.get_canonical_transaction_index(Hash32(hash_))
        except (TransactionNotFound, ValidationError):
            return None
        header = self._chain.get_canonical_block_header_by_number(number)
        transaction = self._chain.get_canonical_transaction_by_index(number, index)
        receipt = self._chain.get_transaction_receipt_by_index(number, index)
        created = b""
        if not transaction.to:
            created = bytes(generate_contract_address(transaction.sender, transaction.nonce))
        return {
            "hash": bytes(hash_),
            "header": header,
            "index": index,
            "from": bytes(transaction.sender),
            "to": bytes(transaction.to),
            "created": created,
            "gas_used": receipt.gas_used,
            "good": receipt.state_root == b"\x01",
            "type": getattr(transaction, "type_id", None) or 0,
            "bloom": receipt.bloom,
            "logs": self._logs_of(number),
        }

    def logs(
        self, first: int, last: int, addresses: frozenset[bytes], topics: list[frozenset[bytes]]
    ) -> Iterator[dict[str, Any]]:
        """The logs of some blocks; raises Refused for more than LOGS_MAX.

        Args:
            first: A block.
            last: The last one.
            addresses: Of contracts; empty: every one.
            topics: By position, what it may be; empty: anything.
        """
        found = 0
        for number in range(max(first, 0), min(last, self.head.block_number) + 1):
            for each in self._logs_of(number):
                if addresses and each["address"] not in addresses:
                    continue
                if len(topics) > len(each["topics"]) or any(
                    wanted and topic not in wanted
                    for wanted, topic in zip(topics, each["topics"], strict=False)
                ):
                    continue
                found += 1
                if found > LOGS_MAX:
                    raise Refused(f"more than {LOGS_MAX} logs: ask for fewer blocks")
                yield each

    def _logs_of(self, number: int) -> list[dict[str, Any]]:
        if (known := self._logs.get(number)) is not None:
            return known
        block = self._chain.get_canonical_block_by_number(number)
        found: list[dict[str, Any]] = []
        for index, receipt in enumerate(block.get_receipts(self._chain.chaindb)):
            for entry in receipt.logs:
                found.append(
                    {
                        "address": bytes(entry.address),
                        "topics": [topic.to_bytes(32, "big") for topic in entry.topics],
                        "data": bytes(entry.data),
                        "block": number,
                        "block_hash": bytes(block.hash),
                        "tx": bytes(block.transactions[index].hash),
                        "tx_index": index,
                        "index": len(found),
                    }
                )
        self._logs[number] = found
        return found


def _header_from_parent(chain: Any, parent: BlockHeaderAPI, **params: Any) -> BlockHeaderAPI:
    """As in MiningChain, with the gas limit of the parent."""
    made: BlockHeaderAPI = MiningChain.create_header_from_parent(
        chain, parent, **{**params, "gas_limit": parent.gas_limit}
    )
    return made
