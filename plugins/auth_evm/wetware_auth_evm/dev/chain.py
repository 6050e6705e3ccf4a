"""The try-out chain where there is no anvil: eth-tester, one block a transaction, kept in SQLite.

Gas costs nothing on it: the base fee is 0 and stays 0, so that a wallet made a minute ago can send.
`safe` and `finalized` are the newest block. What the EVM writes for a block is one transaction of
the database: a start reads it and executes nothing, and a crash takes back what nobody was told of.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from eth.chains.base import MiningChain
from eth.constants import BLANK_ROOT_HASH, POST_MERGE_NONCE, ZERO_ADDRESS
from eth.db.atomic import AtomicDB
from eth.db.backends.base import BaseDB
from eth.exceptions import Revert, VMError
from eth.exceptions import TransactionNotFound as NotIndexed
from eth.rlp.headers import BlockHeader
from eth.vm.chain_context import ChainContext
from eth.vm.forks.prague import PragueVM
from eth.vm.spoof import SpoofTransaction
from eth_tester import EthereumTester, PyEVMBackend
from eth_tester.backends.pyevm.serializers import (
    serialize_transaction,
    serialize_transaction_receipt,
)
from eth_tester.exceptions import BlockNotFound, TransactionNotFound
from eth_typing import Address, BlockNumber, Hash32

BLOCK_GAS: Final = 30_000_000
CALL_GAS_MAX: Final = 10_000_000
"""For a call that only asks: a contract that loops holds the chain up for seconds, not more."""
RAW_CHARS_MAX: Final = 512 << 10
"""Of a transaction."""
LOG_BLOCKS_MAX: Final = 500
"""In one answer; reading that many takes a second."""
FEE_BLOCKS_MAX: Final = 1024
PAGES_MAX: Final = 65_536
"""Of 4 KiB: some 50,000 changes. Then the chain is full."""
BALANCE_WEI: Final = 10**24
"""Of the owner, for wallets that insist on paying."""
NEWEST: Final = ("latest", "pending", "safe", "finalized")
NOBODY: Final = "0x" + "00" * 20


class Refused(Exception):
    """A transaction or a question that the chain does not take; the message says why."""


class Reverted(Exception):
    """A call failed; carries what it returned."""

    def __init__(self, data: bytes) -> None:
        super().__init__("execution reverted")
        self.data = data


class Store(BaseDB):
    """A SQLite file as the database of py-evm."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self.sql = sqlite3.connect(path)
        self.sql.execute("PRAGMA journal_mode = WAL")
        self.sql.execute("PRAGMA synchronous = FULL")
        self.sql.execute(f"PRAGMA max_page_count = {PAGES_MAX}")
        if self.sql.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("it is damaged")
        self.sql.execute(
            "CREATE TABLE IF NOT EXISTS state (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
        )

    def __getitem__(self, key: bytes) -> bytes:
        row = self.sql.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(key)
        value: bytes = row[0]
        return value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.sql.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value))

    def __delitem__(self, key: bytes) -> None:
        if not self.sql.execute("DELETE FROM state WHERE key = ?", (key,)).rowcount:
            raise KeyError(key)

    def _exists(self, key: bytes) -> bool:
        return self.sql.execute("SELECT 1 FROM state WHERE key = ?", (key,)).fetchone() is not None

    def is_empty(self) -> bool:
        return self.sql.execute("SELECT 1 FROM state LIMIT 1").fetchone() is None


class _Blocks(MiningChain):
    vm_configuration = ((BlockNumber(0), PragueVM),)

    def create_header_from_parent(self, parent_header: Any, **header_params: Any) -> Any:
        """As in MiningChain, with the gas limit of the parent."""
        return super().create_header_from_parent(
            parent_header, **{**header_params, "gas_limit": parent_header.gas_limit}
        )


class _Backend(PyEVMBackend):  # type: ignore[misc]
    """eth-tester's, with blocks that are kept, and what its own does not tell.

    Its chain has accounts whose keys everybody knows, and a fee; it looks for a transaction in all
    blocks; a call does not say what the contract answered when it refused.
    """

    def __init__(self, chain: _Blocks) -> None:
        self.chain = chain
        self.account_keys = ()

    def _at(self, block_number: int | str) -> Any:
        return self.chain.header if block_number == "pending" else self._block(block_number).header

    def _block(self, number: int | str) -> Any:
        newest = self.chain.get_canonical_head().block_number
        wanted = newest if number in NEWEST else 0 if number == "earliest" else number
        if not isinstance(wanted, int) or wanted > newest:
            raise BlockNotFound(f"header not found: the chain has no block {wanted}")
        return self.chain.get_canonical_block_by_number(BlockNumber(wanted))

    def _state(self, query: dict[str, Any], gas_max: int, at: int | str) -> tuple[Any, Any]:
        """(state, transaction) of a question: whoever asks it, for no fee."""
        state = self.chain.get_vm(self._at(at)).state
        builder: Any = PragueVM.get_transaction_builder()
        unsigned = builder.new_unsigned_dynamic_fee_transaction(
            chain_id=self.chain.chain_id,
            nonce=state.get_nonce(query["from"]),
            max_priority_fee_per_gas=0,
            max_fee_per_gas=0,
            gas=min(query.get("gas", gas_max), gas_max),
            to=query.get("to", b""),
            value=query.get("value", 0),
            data=query["data"],
            access_list=(),
        )
        return state, SpoofTransaction(unsigned, from_=query["from"])

    def send_raw_transaction(self, raw_transaction: bytes) -> bytes:
        transaction = PragueVM.get_transaction_builder().decode(raw_transaction)
        if transaction.chain_id != self.chain.chain_id:
            given, wanted = transaction.chain_id, self.chain.chain_id
            raise Refused(f"invalid chain id: it is for {given or 'any'}, and this is {wanted}")
        self.chain.apply_transaction(transaction)
        return bytes(transaction.hash)

    def call(self, transaction: dict[str, Any], block_number: int | str = "latest") -> bytes:
        state, spoofed = self._state(transaction, CALL_GAS_MAX, block_number)
        done = state.apply_transaction(spoofed)
        if done.is_error:
            raise _refusal(done.error)
        return bytes(done.output)

    def estimate_gas(self, transaction: dict[str, Any], block_number: int | str = "latest") -> int:
        _state, spoofed = self._state(transaction, BLOCK_GAS, block_number)
        try:
            gas: int = self.chain.estimate_gas(spoofed, self._at(block_number))
        except VMError as exc:
            raise _refusal(exc) from None
        return gas

    def _find(self, hash_: bytes) -> tuple[Any, int]:
        try:
            number, index = self.chain.get_canonical_transaction_index(Hash32(hash_))
        except NotIndexed as exc:
            raise TransactionNotFound(str(exc)) from None
        return self.chain.get_canonical_block_by_number(number), index

    def get_transaction_by_hash(self, transaction_hash: bytes) -> Any:
        block, index = self._find(transaction_hash)
        return serialize_transaction(block, block.transactions[index], index, False)

    def get_transaction_receipt(self, transaction_hash: bytes) -> Any:
        block, index = self._find(transaction_hash)
        receipts = block.get_receipts(self.chain.chaindb)
        return serialize_transaction_receipt(
            block, receipts, block.transactions[index], index, False, self.chain.get_vm()
        )


def _refusal(error: VMError) -> Exception:
    if isinstance(error, Revert):
        return Reverted(bytes(error.args[0]) if error.args else b"")
    return Refused(f"the call failed: {type(error).__name__}")


class Chain:
    """The chain, and its answers to JSON-RPC.

    Args:
        path: Its file; made if need be.
        chain_id: EIP-155.
        owner: Has a balance from the first block on; matters at the first start only.
        clock: Unix time, s.

    Attributes:
        methods: What can be asked: functions of JSON values, which raise Refused, Reverted, and
            whatever the libraries raise for values that are none.

    Raises OSError, sqlite3.Error: the file cannot be used, or is damaged.
    """

    def __init__(
        self, path: Path, *, chain_id: int, owner: bytes, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock, self._store = clock, Store(path)
        self._class: Any = type("TryOut", (_Blocks,), {"chain_id": chain_id})
        self._db = AtomicDB(self._store)
        if self._store.is_empty():
            self._begin(chain_id, owner)
        self._tester = tester = EthereumTester(_Backend(self._class(self._db)))
        self.methods: dict[str, Callable[..., Any]] = {
            "web3_clientVersion": lambda: "wetware-try-out/2",
            "net_version": lambda: str(chain_id),
            "eth_chainId": lambda: hex(chain_id),
            "eth_gasPrice": lambda: "0x0",
            "eth_maxPriorityFeePerGas": lambda: "0x0",
            "eth_accounts": list,
            "eth_syncing": lambda: False,
            "eth_blockNumber": lambda: _json(self._head()),
            "eth_feeHistory": self._fees,
            "eth_getBlockByNumber": self._block_by_number,
            "eth_getBlockByHash": _found(tester.get_block_by_hash, BlockNotFound),
            "eth_getBalance": lambda who, at="latest": _json(
                tester.get_balance(who, self._moment(at))
            ),
            "eth_getTransactionCount": lambda who, at="latest": _json(
                tester.get_nonce(who, self._moment(at))
            ),
            "eth_getCode": lambda who, at="latest": tester.get_code(who, self._moment(at)),
            "eth_getStorageAt": lambda who, slot, at="latest": (
                f"0x{tester.get_storage_at(who, slot, self._moment(at)):064x}"
            ),
            "eth_call": lambda query, at="latest": tester.call(_query(query), self._moment(at)),
            "eth_estimateGas": lambda query, at="latest": _json(
                tester.estimate_gas(_query(query), self._moment(at))
            ),
            "eth_getLogs": self._logs,
            "eth_sendRawTransaction": self.send,
            "eth_getTransactionByHash": _found(tester.get_transaction_by_hash, TransactionNotFound),
            "eth_getTransactionReceipt": _found(
                tester.get_transaction_receipt, TransactionNotFound
            ),
        }

    def _begin(self, chain_id: int, owner: bytes) -> None:
        blank = BlockHeader(difficulty=0, block_number=BlockNumber(-1), gas_limit=0)
        state = PragueVM.build_state(self._db, blank, ChainContext(chain_id))
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
        self._store.sql.commit()

    def close(self) -> None:
        self._store.sql.close()

    def _head(self) -> int:
        number: int = self._tester.backend.chain.get_canonical_head().block_number
        return number

    def _renew(self) -> None:
        """Have the next block begin now, and not when the last one was mined."""
        chain = self._tester.backend.chain
        head = chain.get_canonical_head()
        now = max(int(self._clock()), head.timestamp + 1)
        chain.header = chain.create_header_from_parent(head, timestamp=now)

    def _moment(self, at: Any) -> int | str:
        """A block that is named, by its hash too (EIP-1898); the newest one is what is next.

        So a question about now sees the clock, and not the time of a block of an hour ago.
        """
        if isinstance(at, dict) and "blockHash" in at:
            try:
                number: int = self._tester.get_block_by_hash(at["blockHash"])["number"]
            except BlockNotFound:
                raise Refused("header not found: the chain has no block of this hash") from None
            return number
        number_or_name = _number(at["blockNumber"] if isinstance(at, dict) else at)
        if number_or_name not in NEWEST:
            return number_or_name
        self._renew()
        return "pending"

    def _block_by_number(self, at: str, full: bool = False) -> Any:
        wanted = "latest" if at in NEWEST else _number(at)
        return _found(self._tester.get_block_by_number, BlockNotFound)(wanted, full)

    def _fees(self, count: str, newest: str, _percentiles: Any = None) -> Any:
        last = min(self._head() if newest in NEWEST else int(newest, 16), self._head())
        blocks = max(1, min(int(count, 16), FEE_BLOCKS_MAX, last + 1))
        return {
            "oldestBlock": hex(last - blocks + 1),
            "baseFeePerGas": ["0x0"] * (blocks + 1),
            "gasUsedRatio": [0.0] * blocks,
            "reward": [],
        }

    def _logs(self, wanted: dict[str, Any]) -> Any:
        newest = self._head()
        if "blockHash" in wanted:
            first = last = self._moment({"blockHash": wanted["blockHash"]})
        else:
            first, last = (
                newest if at in NEWEST else 0 if at == "earliest" else _number(at)
                for at in (wanted.get("fromBlock", "latest"), wanted.get("toBlock", "latest"))
            )
        assert isinstance(first, int)  # noqa: S101  # every name is replaced
        assert isinstance(last, int)  # noqa: S101
        last = min(last, newest)
        if last - first >= LOG_BLOCKS_MAX:
            raise Refused(f"more than {LOG_BLOCKS_MAX} blocks: ask for fewer")
        where, topics = wanted.get("address") or None, wanted.get("topics") or None
        return _json(self._tester.get_logs(first, last, where, topics))

    def send(self, raw: str) -> str:
        """Mine a signed transaction, in a block of its own, and put it on disk; returns its hash.

        Raises Refused, or sqlite3.Error where it cannot be kept.
        """
        if len(raw) > RAW_CHARS_MAX:
            raise Refused(f"a transaction of more than {RAW_CHARS_MAX // 2} bytes")
        self._renew()
        try:
            hash_: str = self._tester.send_raw_transaction(raw)
            self._store.sql.commit()
        except BaseException as exc:
            self._store.sql.rollback()
            self._tester.backend.chain = self._class(self._db)
            if isinstance(exc, Exception) and not isinstance(exc, sqlite3.Error | Refused):
                raise Refused(f"{type(exc).__name__}: {str(exc)[:200]}") from None
            raise
        return hash_


def _number(at: Any) -> int | str:
    return int(at, 16) if isinstance(at, str) and at.startswith("0x") else str(at)


def _query(given: dict[str, Any]) -> dict[str, Any]:
    """A call as eth-tester takes it."""
    found: dict[str, Any] = {"from": given.get("from") or NOBODY}
    found |= {name: int(given[name], 16) for name in ("gas", "value") if given.get(name)}
    if given.get("to"):
        found["to"] = given["to"]
    return found | {"data": given.get("input") or given.get("data") or "0x"}


def _found(get: Callable[..., Any], missing: type[Exception]) -> Callable[..., Any]:
    """What is there, as JSON, or null."""

    def answer(*params: Any) -> Any:
        try:
            return _json(get(*params))
        except missing:
            return None

    return answer


def _json(value: Any) -> Any:
    """An answer of eth-tester as JSON-RPC writes it."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return hex(value)
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    if isinstance(value, dict):
        found = {"miner" if k == "coinbase" else _camel(k): _json(v) for k, v in value.items()}
        if "logs_bloom" in value:
            found["logsBloom"] = f"0x{value['logs_bloom']:0512x}"
        if value.get("to") == "":
            found["to"] = None
        if "gas_price" in value:
            found["input"] = found.pop("data")
        return found
    return value


def _camel(name: str) -> str:
    return re.sub("_(.)", lambda match: match[1].upper(), name)
