"""JSON-RPC for the try-out chain: `python -m wetware_auth_evm.devserver`, a child of the node.

On loopback, and for programs of this machine only: a request with an Origin comes from a web page,
one with a foreign Host from a name that somebody points here (DNS rebinding), and one of another
content type from a form; all three are refused. Every body, batch and answer has a limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from wetware.errors import ConfigError
from wetware_auth_evm.chain.journal import ChainFull
from wetware_auth_evm.evm_chain import CallReverted, EvmChain, Refused

BODY_BYTES_MAX: Final = 1 << 20
BODY_S_MAX: Final = 10.0
"""For a request's body to arrive."""
BRACKETS_MAX: Final = 4096
"""In a request. py-evm raises the limit of recursion so far that deep nesting ends the process."""
BATCH_MAX: Final = 100
REQUESTS_MAX: Final = 64
"""At the same time; more are told to come again."""
BLOCKS_MAX: Final = 1024
"""In one answer of eth_feeHistory."""
NEWEST: Final = ("latest", "pending", "safe", "finalized")
READY: Final = "ready "
"""Begins the line that says where it listens."""

log = logging.getLogger("devserver")


class BadRequest(Exception):
    """A request that is not JSON-RPC, or has wrong parameters."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _invalid(message: str) -> BadRequest:
    return BadRequest(-32602, message)


# --- parameters -----------------------------------------------------------------------------------


def _quantity(value: Any, bits: int = 256) -> int:
    if not isinstance(value, str) or not value.startswith("0x") or not 3 <= len(value) <= 66:
        raise _invalid("a quantity is 0x and hex digits")
    try:
        number = int(value[2:], 16)
    except ValueError:
        raise _invalid("a quantity is 0x and hex digits") from None
    if number >> bits or "_" in value or value[2] in "+-":
        raise _invalid("a quantity is out of range")
    return number


def _data(value: Any, size: int | None = None) -> bytes:
    if not isinstance(value, str) or not value.startswith("0x") or " " in value:
        raise _invalid("data is 0x and hex digits")
    try:
        found = bytes.fromhex(value[2:])
    except ValueError:
        raise _invalid("data is 0x and an even number of hex digits") from None
    if size is not None and len(found) != size:
        raise _invalid(f"{len(found)} bytes where {size} are expected")
    return found


def _query(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _invalid("a call is an object")
    found: dict[str, Any] = {}
    for name in ("from", "to"):
        if value.get(name) is not None:
            found[name] = _data(value[name], 20)
    for name, bits in (("gas", 64), ("value", 256)):
        if value.get(name) is not None:
            found[name] = _quantity(value[name], bits)
    given = value.get("input", value.get("data"))
    if given is not None:
        found["data"] = _data(given)
    return found


# --- answers --------------------------------------------------------------------------------------


def _hex(data: bytes) -> str:
    return "0x" + bytes(data).hex()


def _bloom(value: int) -> str:
    return f"0x{value:0512x}"


def _log(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "address": _hex(entry["address"]),
        "topics": [_hex(topic) for topic in entry["topics"]],
        "data": _hex(entry["data"]),
        "blockNumber": hex(entry["block"]),
        "blockHash": _hex(entry["block_hash"]),
        "transactionHash": _hex(entry["tx"]),
        "transactionIndex": hex(entry["tx_index"]),
        "logIndex": hex(entry["index"]),
        "removed": False,
    }


class Rpc:
    """The methods.

    Args:
        chain: What they are about.
    """

    def __init__(self, chain: EvmChain) -> None:
        self._chain = chain
        self._methods: dict[str, tuple[Callable[..., Any], int, int]] = {
            # name: (method, parameters at least, at most)
            "web3_clientVersion": (lambda: "wetware-try-out/1", 0, 0),
            "net_version": (lambda: str(chain.chain_id), 0, 0),
            "eth_chainId": (lambda: hex(chain.chain_id), 0, 0),
            "eth_blockNumber": (lambda: hex(chain.head.block_number), 0, 0),
            "eth_gasPrice": (lambda: "0x0", 0, 0),
            "eth_maxPriorityFeePerGas": (lambda: "0x0", 0, 0),
            "eth_accounts": (list, 0, 0),
            "eth_syncing": (lambda: False, 0, 0),
            "eth_feeHistory": (self._fee_history, 2, 3),
            "eth_getBlockByNumber": (self._block_by_number, 1, 2),
            "eth_getBlockByHash": (self._block_by_hash, 1, 2),
            "eth_call": (self._call, 1, 2),
            "eth_estimateGas": (self._estimate, 1, 2),
            "eth_getBalance": (self._balance, 1, 2),
            "eth_getTransactionCount": (self._nonce, 1, 2),
            "eth_getCode": (self._code, 1, 2),
            "eth_getStorageAt": (self._storage, 2, 3),
            "eth_getLogs": (self._get_logs, 1, 1),
            "eth_sendRawTransaction": (self._send, 1, 1),
            "eth_getTransactionReceipt": (self._receipt, 1, 1),
        }

    def answer(self, request: Any) -> dict[str, Any] | None:
        """The answer to one request; None to a notification."""
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return _error(None, -32600, "not a JSON-RPC request")
        id_ = request.get("id")
        if not isinstance(id_, str | int | float | None):
            return _error(None, -32600, "an id is a number or a text")
        found = self._answer(request["method"], request.get("params", []), id_)
        return found if "id" in request else None

    def _answer(self, name: str, params: Any, id_: Any) -> dict[str, Any]:
        try:
            return {"jsonrpc": "2.0", "id": id_, "result": self._method(name, params)(*params)}
        except BadRequest as exc:
            return _error(id_, exc.code, str(exc))
        except CallReverted as exc:
            return _error(id_, 3, str(exc), _hex(exc.data))
        except Refused as exc:
            return _error(id_, -32000, str(exc))
        except ChainFull:
            return _error(id_, -32000, "the try-out chain is full; begin a new one")
        except OSError as exc:
            log.error("the chain cannot be written: %s", exc.strerror)  # noqa: TRY400
            return _error(id_, -32000, f"the chain cannot be written: {exc.strerror}")
        except Exception:
            log.exception("a defect in %s", name)
            return _error(id_, -32603, "a defect of the try-out chain; its log says more")

    def _method(self, name: str, params: Any) -> Callable[..., Any]:
        if name not in self._methods:
            raise BadRequest(-32601, f"the try-out chain has no method {name[:60]}")
        method, least, most = self._methods[name]
        if not isinstance(params, list) or not least <= len(params) <= most:
            raise _invalid(f"{name} takes a list of {least} to {most} parameters")
        return method

    # --- blocks -----------------------------------------------------------------------------------

    def _header(self, at: Any) -> Any:
        """A block's header, or None for the newest one as a place to execute."""
        if isinstance(at, dict):
            if "blockHash" in at:
                header = self._chain.by_hash(_data(at["blockHash"], 32))
                if header is None:
                    raise Refused("header not found: the chain has no block of this hash")
                return header
            at = at.get("blockNumber")
        if at in NEWEST:
            return None
        header = self._chain.by_number(0 if at == "earliest" else _quantity(at, 64))
        if header is None:
            raise Refused("header not found: the chain is not as long")
        return header

    def _block_by_number(self, at: Any, full: Any = False) -> dict[str, Any] | None:
        header: Any = self._chain.head
        if at not in NEWEST:
            header = self._chain.by_number(0 if at == "earliest" else _quantity(at, 64))
        return None if header is None else self._block(header, full)

    def _block_by_hash(self, hash_: Any, full: Any = False) -> dict[str, Any] | None:
        header = self._chain.by_hash(_data(hash_, 32))
        return None if header is None else self._block(header, full)

    def _block(self, header: Any, full: Any) -> dict[str, Any]:
        if full:
            raise _invalid("the try-out chain gives the hashes of transactions only")
        return {
            "number": hex(header.block_number),
            "hash": _hex(header.hash),
            "parentHash": _hex(header.parent_hash),
            "nonce": _hex(header.nonce),
            "mixHash": _hex(header.mix_hash),
            "sha3Uncles": _hex(header.uncles_hash),
            "logsBloom": _bloom(header.bloom),
            "transactionsRoot": _hex(header.transaction_root),
            "stateRoot": _hex(header.state_root),
            "receiptsRoot": _hex(header.receipt_root),
            "miner": _hex(header.coinbase),
            "difficulty": hex(header.difficulty),
            "extraData": _hex(header.extra_data),
            "gasLimit": hex(header.gas_limit),
            "gasUsed": hex(header.gas_used),
            "timestamp": hex(header.timestamp),
            "baseFeePerGas": hex(header.base_fee_per_gas),
            "size": "0x0",
            "uncles": [],
            "transactions": [_hex(each) for each in self._chain.transactions(header)],
        }

    def _fee_history(self, count: Any, newest: Any, _percentiles: Any = None) -> dict[str, Any]:
        wanted = count if type(count) is int else _quantity(count, 64)
        last = (self._header(newest) or self._chain.head).block_number
        blocks = max(1, min(wanted, BLOCKS_MAX, last + 1))
        return {
            "oldestBlock": hex(last - blocks + 1),
            "baseFeePerGas": ["0x0"] * (blocks + 1),
            "gasUsedRatio": [0.0] * blocks,
            "reward": [],
        }

    # --- state ------------------------------------------------------------------------------------

    def _call(self, query: Any, at: Any = "latest") -> str:
        return _hex(self._chain.call(_query(query), self._header(at)))

    def _estimate(self, query: Any, at: Any = "latest") -> str:
        return hex(self._chain.estimate(_query(query), self._header(at)))

    def _state(self, at: Any) -> Any:
        return self._chain.state(self._header(at))

    def _balance(self, address: Any, at: Any = "latest") -> str:
        return hex(self._state(at).get_balance(_data(address, 20)))

    def _nonce(self, address: Any, at: Any = "latest") -> str:
        return hex(self._state(at).get_nonce(_data(address, 20)))

    def _code(self, address: Any, at: Any = "latest") -> str:
        return _hex(self._state(at).get_code(_data(address, 20)))

    def _storage(self, address: Any, slot: Any, at: Any = "latest") -> str:
        value = self._state(at).get_storage(_data(address, 20), _quantity(slot))
        return f"0x{value:064x}"

    def _get_logs(self, wanted: Any) -> list[dict[str, Any]]:
        if not isinstance(wanted, dict):
            raise _invalid("a filter is an object")
        newest = self._chain.head.block_number
        if "blockHash" in wanted:
            header = self._header({"blockHash": wanted["blockHash"]})
            first = last = header.block_number
        else:
            first = self._number(wanted.get("fromBlock", "latest"), newest)
            last = self._number(wanted.get("toBlock", "latest"), newest)
        given = wanted.get("address") or []
        addresses = frozenset(
            _data(each, 20) for each in (given if isinstance(given, list) else [given])
        )
        topics: list[frozenset[bytes]] = []
        for each in wanted.get("topics") or []:
            several = each if isinstance(each, list) else [each] if each is not None else []
            topics.append(frozenset(_data(topic, 32) for topic in several))
        return [_log(entry) for entry in self._chain.logs(first, last, addresses, topics)]

    def _number(self, at: Any, newest: int) -> int:
        if at in NEWEST:
            return newest
        return 0 if at == "earliest" else _quantity(at, 64)

    # --- transactions -----------------------------------------------------------------------------

    def _send(self, raw: Any) -> str:
        return _hex(self._chain.send(_data(raw)))

    def _receipt(self, hash_: Any) -> dict[str, Any] | None:
        found = self._chain.receipt(_data(hash_, 32))
        if found is None:
            return None
        header = found["header"]
        return {
            "transactionHash": _hex(found["hash"]),
            "transactionIndex": hex(found["index"]),
            "blockNumber": hex(header.block_number),
            "blockHash": _hex(header.hash),
            "from": _hex(found["from"]),
            "to": _hex(found["to"]) if found["to"] else None,
            "contractAddress": _hex(found["created"]) if found["created"] else None,
            "cumulativeGasUsed": hex(found["gas_used"]),
            "gasUsed": hex(found["gas_used"]),
            "effectiveGasPrice": "0x0",
            "logs": [_log(entry) for entry in found["logs"]],
            "logsBloom": _bloom(found["bloom"]),
            "status": "0x1" if found["good"] else "0x0",
            "type": hex(found["type"]),
        }


def _error(id_: Any, code: int, message: str, data: str | None = None) -> dict[str, Any]:
    error: dict[str, Any] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return {"jsonrpc": "2.0", "id": id_, "error": error}


# --- HTTP -----------------------------------------------------------------------------------------


class Server:
    """JSON-RPC over HTTP on loopback.

    Args:
        rpc: What answers.
    """

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._hosts: frozenset[str] = frozenset()
        self._busy = 0
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> int:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_post("/", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        bound: int = self._runner.addresses[0][1]
        self._hosts = frozenset({f"127.0.0.1:{bound}", f"localhost:{bound}"})
        return bound

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        if request.headers.get("Host", "").lower() not in self._hosts:
            return _plain(403, "this is for programs of this machine: wrong Host")
        if "Origin" in request.headers or "Sec-Fetch-Site" in request.headers:
            return _plain(403, "this is for programs of this machine, and for no web page")
        if request.content_type != "application/json":
            return _plain(415, "send application/json")
        if self._busy >= REQUESTS_MAX:
            return _plain(503, f"{REQUESTS_MAX} requests are being answered")
        self._busy += 1
        try:
            async with asyncio.timeout(BODY_S_MAX):
                body = await request.read()
            return self._answer(body)
        except web.HTTPRequestEntityTooLarge:
            return _plain(413, f"a request has at most {BODY_BYTES_MAX} bytes")
        except TimeoutError:
            return _plain(408, f"the request did not arrive within {BODY_S_MAX:g} s")
        finally:
            self._busy -= 1

    def _answer(self, body: bytes) -> web.Response:
        if body.count(b"[") + body.count(b"{") > BRACKETS_MAX:
            return web.json_response(_error(None, -32600, "a request that is nested too deeply"))
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return web.json_response(_error(None, -32700, "not JSON"))
        if not isinstance(asked, list):
            answer: Any = self._rpc.answer(asked)
        elif not 1 <= len(asked) <= BATCH_MAX:
            answer = _error(None, -32600, f"a batch has 1 to {BATCH_MAX} requests")
        else:
            answer = [found for each in asked if (found := self._rpc.answer(each)) is not None]
        if answer is None or answer == []:
            return web.Response(status=204)
        return web.json_response(answer)


def _plain(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n")


async def serve(chain: EvmChain, port: int) -> None:
    """Serve until cancelled; says on stdout where it listens."""
    server = Server(Rpc(chain))
    bound = await server.start(port)
    try:
        print(f"{READY}{bound}", flush=True)  # noqa: T201  # the parent reads it
        await asyncio.Event().wait()
    finally:
        await server.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chain until the process is ended."""
    parser = argparse.ArgumentParser(prog="wetware_auth_evm.devserver")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--owner", type=bytes.fromhex, required=True)
    parser.add_argument("--chain-id", type=int, required=True)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        chain = EvmChain(given.journal, chain_id=given.chain_id, owner=given.owner)
    except ConfigError as exc:
        print(f"error {exc.message}", flush=True)  # noqa: T201
        return 78
    try:
        asyncio.run(serve(chain, given.port))
    except OSError as exc:
        print(f"error cannot listen on port {given.port}: {exc.strerror}", flush=True)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
