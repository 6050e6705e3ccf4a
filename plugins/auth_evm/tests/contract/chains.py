"""Two chains behind one interface, to run the same tests on: py-evm in this process, and anvil.

py-evm executes messages straight on a state: no signatures, no blocks, 2 ms a call, and every
branch can be watched. anvil is a real node: transactions, receipts, gas, JSON-RPC.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import itertools
import json
import platform
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eth_abi.abi import decode, encode
from eth_utils.address import to_canonical_address, to_checksum_address
from eth_utils.crypto import keccak

from wetware.testing import end_with_parent

PLUGIN = Path(__file__).resolve().parents[2]
ARTIFACT: dict[str, Any] = json.loads(
    (PLUGIN / "wetware_auth_evm/contract/WetwareACL.json").read_text()
)
CONTRACTS = PLUGIN / "contracts"
INSTALL = "npm ci --no-audit --no-fund --prefix plugins/auth_evm/contracts"
START_S_MAX = 30.0
GENESIS_S = 1_900_000_000  # an arbitrary day, the same in every run
GAS = 16_000_000  # below the cap of a transaction, 2^24 (EIP-7825)


class Reverted(Exception):
    """A transaction or call was refused: `name` and `args` of the custom error."""

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        super().__init__(name, *args)
        self.name = name
        self.values = args


@dataclass(frozen=True, slots=True)
class Log:
    """A log as the chain gives it."""

    address: str
    topics: tuple[bytes, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a transaction did; `contract` is the address of the one that it created."""

    logs: tuple[Log, ...]
    gas: int
    block: int
    contract: str | None = None


class Chain(Protocol):
    """A chain on which anybody can send from any address.

    `time` is the timestamp of the next transaction and of calls; a transaction moves it on by 1 s.
    """

    name: str
    chain_id: int
    time: int

    def send(self, to: str | None, data: bytes, sender: str, *, value: int = 0) -> Receipt:
        """Mine one transaction in a block of its own; raises Reverted."""
        ...

    def calls(self, to: str, data: list[bytes]) -> list[bytes]:
        """Read-only calls; raises Reverted for the first that is refused."""
        ...

    def storage(self, address: str, slot: int) -> bytes: ...

    def forge(self, address: str, slot: int, value: int) -> None:
        """Overwrite a slot, as no transaction could."""
        ...

    def code(self, address: str) -> bytes: ...

    def close(self) -> None: ...


ERRORS = {
    keccak(f"{e['name']}({','.join(i['type'] for i in e['inputs'])})".encode())[:4]: e
    for e in ARTIFACT["abi"]
    if e["type"] == "error"
}


def reverted(data: bytes) -> Reverted:
    """The error in what a refused call returned; `name` is "" if it returned nothing."""
    if not data:
        return Reverted("")
    if data[:4] == keccak(b"Panic(uint256)")[:4]:
        return Reverted("Panic", decode(["uint256"], data[4:]))
    entry = ERRORS[data[:4]]
    types = [i["type"] for i in entry["inputs"]]
    return Reverted(entry["name"], _plain(types, decode(types, data[4:])))


def _plain(types: list[str], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Addresses with checksums, as everywhere in the tests; in a struct too."""
    out: list[Any] = []
    for kind, value in zip(types, values, strict=True):
        if kind.startswith("("):
            out.append(_plain(kind[1:-1].split(","), value))
        else:
            out.append(to_checksum_address(value) if kind == "address" else value)
    return tuple(out)


# --- py-evm ------------------------------------------------------------------------------------


Watch = Callable[[bytes, int, bool], None]


class EvmChain:
    """py-evm in this process. `watch(code, pc, taken)` is told of every JUMPI."""

    name = "py-evm"

    def __init__(self, watch: Watch | None = None, *, chain_id: int = 31337) -> None:
        from eth.constants import BLANK_ROOT_HASH, CREATE_CONTRACT_ADDRESS
        from eth.db.atomic import AtomicDB
        from eth.vm.execution_context import ExecutionContext
        from eth.vm.forks.prague import PragueVM
        from eth.vm.message import Message

        self.chain_id = chain_id
        self.time = GENESIS_S
        self._block = 0
        self._mined = 0
        self._nonces = itertools.count()
        self._context_class: Any = ExecutionContext
        self._message_class: Any = Message
        self._no_address = CREATE_CONTRACT_ADDRESS
        state_class = PragueVM.get_state_class()
        self._state: Any = state_class(AtomicDB(), self._context(), BLANK_ROOT_HASH)
        self._computation: Any = state_class.computation_class
        if watch is not None:
            self._computation = self._watched(self._computation, watch)

    @staticmethod
    def _watched(base: Any, watch: Watch) -> Any:
        jumpi = base.opcodes[0x57]

        def watched_jumpi(computation: Any) -> None:
            pc = computation.code.program_counter - 1
            # Of (destination, condition) the condition lies below the top.
            condition = computation._stack.values[-2]
            value = condition[1] if isinstance(condition, tuple) else condition
            if isinstance(value, bytes):
                value = int.from_bytes(value, "big")
            watch(bytes(computation.msg.code), pc, value != 0)
            jumpi(computation=computation)

        watched_jumpi.mnemonic = "JUMPI"  # type: ignore[attr-defined]
        return type("Watched", (base,), {"opcodes": {**base.opcodes, 0x57: watched_jumpi}})

    def _context(self) -> Any:
        return self._context_class(
            coinbase=bytes(20),
            timestamp=self.time,
            block_number=self._block,
            difficulty=0,
            mix_hash=bytes(32),
            gas_limit=2 * GAS,
            prev_hashes=(),
            chain_id=self.chain_id,
            base_fee_per_gas=0,
            excess_blob_gas=0,
        )

    def _run(self, to: str | None, data: bytes, sender: bytes, value: int) -> Any:
        from eth.constants import ZERO_ADDRESS

        context = self._state.get_transaction_context_class()(gas_price=0, origin=sender)
        if to is None:
            created = keccak(sender + next(self._nonces).to_bytes(8, "big"))[12:]
            message = self._message_class(
                gas=GAS,
                to=self._no_address,
                sender=sender,
                value=value,
                data=b"",
                code=data,
                create_address=created,
            )
            return self._computation.apply_create_message(self._state, message, context)
        target = to_canonical_address(to)
        assert target != ZERO_ADDRESS
        message = self._message_class(
            gas=GAS,
            to=target,
            sender=sender,
            value=value,
            data=data,
            code=self._state.get_code(target),
        )
        return self._computation.apply_message(self._state, message, context)

    def send(self, to: str | None, data: bytes, sender: str, *, value: int = 0) -> Receipt:
        origin = to_canonical_address(sender)
        assert self.time > self._mined, "time went back"
        self._mined = self.time
        self._block += 1
        self._state.execution_context = self._context()
        if value:
            self._state.set_balance(origin, value)
        done = self._run(to, data, origin, value)
        self._state.lock_changes()
        self.time += 1
        if done.is_error:
            raise reverted(done.output)
        logs = tuple(
            Log(to_checksum_address(address), tuple(t.to_bytes(32, "big") for t in topics), body)
            for address, topics, body in done.get_log_entries()
        )
        made = to_checksum_address(done.msg.storage_address) if to is None else None
        return Receipt(logs, done.get_gas_used(), self._block, made)

    def calls(self, to: str, data: list[bytes]) -> list[bytes]:
        self._state.execution_context = self._context()
        return [self._call(to, item) for item in data]

    def _call(self, to: str, data: bytes) -> bytes:
        snapshot = self._state.snapshot()
        done = self._run(to, data, bytes(20), 0)
        self._state.revert(snapshot)
        if done.is_error:
            raise reverted(done.output)
        return bytes(done.output)

    def storage(self, address: str, slot: int) -> bytes:
        value: int = self._state.get_storage(to_canonical_address(address), slot)
        return value.to_bytes(32, "big")

    def forge(self, address: str, slot: int, value: int) -> None:
        self._state.set_storage(to_canonical_address(address), slot, value)

    def code(self, address: str) -> bytes:
        return bytes(self._state.get_code(to_canonical_address(address)))

    def close(self) -> None:
        pass


# --- anvil -------------------------------------------------------------------------------------


def find_anvil() -> Path | None:
    """The binary that npm installed beside the contract, else None."""
    machine = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine())
    folder = f"anvil-{platform.system().lower()}-{machine}"
    path = CONTRACTS / "node_modules/@foundry-rs" / folder / "bin/anvil"
    return path if path.is_file() else None


class AnvilChain:
    """An anvil process on a free port of loopback, ended by `close`; `args` are further options."""

    name = "anvil"

    def __init__(self, binary: Path, *, chain_id: int = 31337, args: Sequence[str] = ()) -> None:
        self.chain_id = chain_id
        self.time = GENESIS_S
        self._ids = itertools.count(1)
        self._process = subprocess.Popen(
            [
                str(binary),
                *("--host", "127.0.0.1", "--port", "0", "--chain-id", str(chain_id)),
                *("--auto-impersonate", "--no-mining", "--gas-price", "0", "--base-fee", "0"),
                *("--timestamp", str(GENESIS_S - 10)),
                *args,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=end_with_parent,
        )
        lines: queue.Queue[str] = queue.Queue()
        # The pipe is read to the end: a node that cannot write its log would stop.
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()
        port = 0
        deadline = time.monotonic() + START_S_MAX
        try:
            while not port:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
                if "Listening on" in line:
                    port = int(line.rsplit(":", 1)[1])
        except BaseException:
            self.close()
            raise
        self.url = f"http://127.0.0.1:{port}"
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def _read(self, lines: queue.Queue[str]) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self._process.stdout:
                if "Listening on" in line:
                    lines.put(line)

    def rpc(self, method: str, *params: Any) -> Any:
        """One JSON-RPC call; raises Reverted where the error carries a revert's data."""
        return self.batch([(method, params)])[0]

    def batch(self, queries: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
        """JSON-RPC calls in one request, answered in order."""
        body = [
            {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params}
            for method, params in queries
        ]
        self._http.request(
            "POST", "/", json.dumps(body), headers={"Content-Type": "application/json"}
        )
        answers = {item["id"]: item for item in json.loads(self._http.getresponse().read())}
        return [self._result(answers[query["id"]], str(query["method"])) for query in body]

    @staticmethod
    def _result(answer: dict[str, Any], method: str) -> Any:
        if error := answer.get("error"):
            data = error.get("data")
            if isinstance(data, str) and "revert" in error["message"]:
                raise reverted(bytes.fromhex(data[2:]))
            raise AssertionError(f"{method}: {error}")
        return answer["result"]

    def send(self, to: str | None, data: bytes, sender: str, *, value: int = 0) -> Receipt:
        fields = {"from": sender, "data": "0x" + data.hex(), "gas": hex(GAS), "value": hex(value)}
        fields["gasPrice"] = "0x0"
        if to is not None:
            fields["to"] = to
        if value:
            self.rpc("anvil_setBalance", sender, hex(value))
        number = self.rpc("eth_sendTransaction", fields)
        self.rpc("evm_mine", self.time)
        receipt = self.rpc("eth_getTransactionReceipt", number)
        self.time += 1
        if receipt["status"] != "0x1":
            trace = self.rpc("debug_traceTransaction", number, {"tracer": "callTracer"})
            raise reverted(bytes.fromhex(trace.get("output", "0x")[2:]))
        logs = tuple(
            Log(
                to_checksum_address(entry["address"]),
                tuple(bytes.fromhex(t[2:]) for t in entry["topics"]),
                bytes.fromhex(entry["data"][2:]),
            )
            for entry in receipt["logs"]
        )
        made = receipt["contractAddress"]
        return Receipt(
            logs,
            int(receipt["gasUsed"], 16),
            int(receipt["blockNumber"], 16),
            to_checksum_address(made) if made else None,
        )

    def calls(self, to: str, data: list[bytes]) -> list[bytes]:
        at = {"time": hex(self.time)}
        answers = self.batch(
            [("eth_call", ({"to": to, "data": "0x" + d.hex()}, "latest", {}, at)) for d in data]
        )
        return [bytes.fromhex(answer[2:]) for answer in answers]

    def storage(self, address: str, slot: int) -> bytes:
        answer: str = self.rpc("eth_getStorageAt", address, hex(slot), "latest")
        return bytes.fromhex(answer[2:])

    def forge(self, address: str, slot: int, value: int) -> None:
        self.rpc("anvil_setStorageAt", address, hex(slot), "0x" + value.to_bytes(32, "big").hex())

    def code(self, address: str) -> bytes:
        answer: str = self.rpc("eth_getCode", address, "latest")
        return bytes.fromhex(answer[2:])

    def close(self) -> None:
        if hasattr(self, "_http"):
            self._http.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


_idle: dict[tuple[object, ...], AnvilChain] = {}
"""By their options; back at their first block. They end with the process."""


@contextlib.contextmanager
def anvil_chain(*, chain_id: int = 31337, args: Sequence[str] = ()) -> Iterator[AnvilChain]:
    """An anvil at its first block; raises FileNotFoundError with the command that installs it."""
    binary = find_anvil()
    if binary is None:
        raise FileNotFoundError(f"anvil is not installed; run: {INSTALL}")
    options = (chain_id, *args)
    chain = _idle.pop(options, None) or AnvilChain(binary, chain_id=chain_id, args=args)
    try:
        first = chain.rpc("evm_snapshot")
        yield chain
        if "--state" not in args:  # which is written at its end
            chain.rpc("anvil_dropAllTransactions")
            assert chain.rpc("evm_revert", first)
            chain.time = GENESIS_S
            _idle[options] = chain
    finally:
        if options not in _idle:
            chain.close()


@atexit.register
def _close() -> None:
    for chain in _idle.values():
        chain.close()


# --- the contract ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """A decoded log of the contract."""

    name: str
    fields: dict[str, Any]


def _types(items: list[dict[str, Any]]) -> list[str]:
    """Canonical types; a tuple is written out."""
    return [
        f"({','.join(_types(i['components']))}){i['type'][5:]}"
        if i["type"].startswith("tuple")
        else i["type"]
        for i in items
    ]


FUNCTIONS = {e["name"]: e for e in ARTIFACT["abi"] if e["type"] == "function"}
EVENTS = {
    keccak(f"{e['name']}({','.join(_types(e['inputs']))})".encode()): e
    for e in ARTIFACT["abi"]
    if e["type"] == "event"
}


def calldata(function: str, *args: Any) -> bytes:
    types = _types(FUNCTIONS[function]["inputs"])
    return keccak(f"{function}({','.join(types)})".encode())[:4] + encode(types, args)


def decode_event(log: Log) -> Event:
    entry = EVENTS[log.topics[0]]
    indexed = [i for i in entry["inputs"] if i["indexed"]]
    plain = [i for i in entry["inputs"] if not i["indexed"]]
    assert len(log.topics) == 4
    fields: dict[str, Any] = {}
    for item, topic in zip(indexed, log.topics[1:], strict=True):
        fields[item["name"]] = _plain([item["type"]], decode([item["type"]], topic))[0]
    types = [i["type"] for i in plain]
    values = _plain(types, decode(types, log.data))
    fields.update(zip((i["name"] for i in plain), values, strict=True))
    return Event(entry["name"], fields)


class Acl:
    """WetwareACL at an address: `acl.send(…)`, `acl.call(…)`, and all of its logs so far."""

    def __init__(self, chain: Chain, address: str, receipt: Receipt) -> None:
        self.chain = chain
        self.address = address
        self.logs = list(receipt.logs)
        self.last = receipt

    @classmethod
    def deploy(cls, chain: Chain, owner: str, *, sender: str | None = None) -> Acl:
        """Deploy from the artifact that the package ships."""
        code = bytes.fromhex(ARTIFACT["bytecode"][2:]) + encode(["address"], [owner])
        receipt = chain.send(None, code, sender or owner)
        assert receipt.contract is not None
        return cls(chain, receipt.contract, receipt)

    def send(self, function: str, *args: Any, sender: str) -> list[Event]:
        """Run it as a transaction; returns its events. Raises Reverted."""
        return self.send_raw(calldata(function, *args), sender=sender)

    def send_raw(self, data: bytes, *, sender: str, value: int = 0) -> list[Event]:
        self.last = self.chain.send(self.address, data, sender, value=value)
        assert all(log.address == self.address for log in self.last.logs)
        self.logs += self.last.logs
        return [decode_event(log) for log in self.last.logs]

    def call(self, function: str, *args: Any) -> Any:
        """Read: a tuple, or the value where there is one."""
        return self.call_many([(function, *args)])[0]

    def call_many(self, queries: list[tuple[Any, ...]]) -> list[Any]:
        """Several reads at one time, each (function, *args)."""
        data = [calldata(function, *args) for function, *args in queries]
        answers = self.chain.calls(self.address, data)
        return [self._decode(query[0], a) for query, a in zip(queries, answers, strict=True)]

    @staticmethod
    def _decode(function: str, answer: bytes) -> Any:
        types = _types(FUNCTIONS[function]["outputs"])
        values = _plain(types, decode(types, answer))
        return values[0] if len(values) == 1 else values

    def slot(self, number: int) -> bytes:
        return self.chain.storage(self.address, number)
