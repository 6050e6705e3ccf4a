"""The chain in Python: what it keeps, its JSON-RPC, and what is thrown at both."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("eth_tester", reason="needs the extra: pip install 'wetware[evm]'")

from wetware_auth_evm.chain.events import role_id
from wetware_auth_evm.cli import abi
from wetware_auth_evm.cli.writes import Fees, Transaction, sign
from wetware_auth_evm.contract import load as artifact
from wetware_auth_evm.dev import chain as chains
from wetware_auth_evm.dev.chain import RAW_CHARS_MAX, Chain, Refused, Reverted
from wetware_auth_evm.dev.process import call
from wetware_auth_evm.dev.server import BATCH_MAX, BODY_BYTES_MAX, REQUESTS_MAX, answer
from wetware_auth_evm.dev.tryout import CHAIN_ID
from wetware_auth_evm.login.wallets import Wallet

WALLET = Wallet.from_secret(b"\7" * 32)
NOW = 1_900_000_000
OWNER = "0x" + WALLET.address.hex()


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def _chain(path: Path, clock: Clock | None = None) -> Chain:
    return Chain(path, chain_id=CHAIN_ID, owner=WALLET.address, clock=clock or Clock())


def _signed(nonce: int, to: bytes, data: bytes, gas: int = 300_000) -> bytes:
    return sign(WALLET, Transaction(to, data, CHAIN_ID), gas, Fees(0, None), nonce)[0]


def _deploy(chain: Chain) -> bytes:
    raw = _signed(0, b"", abi.deployment(WALLET.address), 3_500_000)
    receipt = chain.methods["eth_getTransactionReceipt"](chain.send("0x" + raw.hex()))
    assert receipt["status"] == "0x1"
    return bytes.fromhex(receipt["contractAddress"][2:])


def _grant(nonce: int, contract: bytes, account: int = 1) -> str:
    data = abi.calldata(
        *("grant", role_id("default"), role_id("r"), account.to_bytes(20, "big")),
        *(0, NOW + 86_400, 1),
    )
    return "0x" + _signed(nonce, contract, data).hex()


def _hashes(chain: Chain) -> list[str]:
    newest = int(chain.methods["eth_blockNumber"](), 16)
    get = chain.methods["eth_getBlockByNumber"]
    return [get(hex(number), False)["hash"] for number in range(newest + 1)]


# --- the chain ------------------------------------------------------------------------------------


def test_blocks_survive_as_they_were(tmp_path: Path) -> None:
    chain = _chain(tmp_path / "c")
    contract = _deploy(chain)
    for nonce in range(1, 6):
        chain.send(_grant(nonce, contract, nonce))
    asked = {"fromBlock": "0x0", "toBlock": "0x63"}
    before, logs = _hashes(chain), chain.methods["eth_getLogs"](asked)
    chain.close()
    clock = Clock()
    clock.now += 10_000
    again = _chain(tmp_path / "c", clock)
    assert _hashes(again) == before
    assert again.methods["eth_getLogs"](asked) == logs
    assert len(logs) == 6
    again.send(_grant(6, contract, 6))
    newest = again.methods["eth_getBlockByNumber"]("latest", False)
    assert int(newest["timestamp"], 16) == clock.now, "it stands still between two blocks"
    again.close()


def test_a_block_of_a_crash_is_there_or_not_at_all(tmp_path: Path) -> None:
    """The files as they are between two writes of the database, and with a torn end."""
    chain = _chain(tmp_path / "c")
    contract = _deploy(chain)
    chain.send(_grant(1, contract))
    hashes, wal = _hashes(chain), (tmp_path / "c-wal").read_bytes()
    chain.send(_grant(2, contract, 2))
    all_hashes, longer = _hashes(chain), (tmp_path / "c-wal").read_bytes()
    assert longer.startswith(wal), "the log was begun anew: this shows nothing"
    shutil.copy(tmp_path / "c", tmp_path / "main")
    chain.close()
    for end in range(len(wal), len(longer) + 1, 997):
        for filler in (b"", b"\0" * 5000):
            torn = tmp_path / "torn"
            torn.mkdir()
            shutil.copy(tmp_path / "main", torn / "c")
            (torn / "c-wal").write_bytes(longer[:end] + filler)
            read = _chain(torn / "c")
            assert _hashes(read) in (hashes, all_hashes)
            if len(_hashes(read)) == len(hashes):
                read.send(_grant(2, contract, 2))
            read.close()
            shutil.rmtree(torn)


def test_the_code_is_the_one_that_ships(tmp_path: Path) -> None:
    from eth_hash.auto import keccak

    chain = _chain(tmp_path / "c")
    contract = _deploy(chain)
    code = bytes.fromhex(chain.methods["eth_getCode"]("0x" + contract.hex())[2:])
    assert keccak(code) == artifact().runtime_hash
    chain.close()


def test_a_question_about_now_sees_the_clock(tmp_path: Path) -> None:
    """A grant that expired since the last block is no grant, though no block says so."""
    clock = Clock()
    chain = _chain(tmp_path / "c", clock)
    contract = _deploy(chain)
    chain.send(_grant(1, contract))
    data = abi.calldata("rightsOf", role_id("default"), role_id("r"), (1).to_bytes(20, "big"))
    query = {"to": "0x" + contract.hex(), "data": "0x" + data.hex()}
    ask = chain.methods["eth_call"]
    assert int(ask(query, "latest"), 16) == 1
    at_that_block = {"blockHash": _hashes(chain)[-1]}
    clock.now += 86_401
    for named in ("latest", "safe", "finalized", "pending"):
        assert int(ask(query, named), 16) == 0
    assert int(ask(query, at_that_block), 16) == 1
    assert int(ask(query, "0x2"), 16) == 1
    ends = {"from": OWNER, "to": query["to"], "data": _grant_data(NOW + 86_400)}
    with pytest.raises(Reverted):
        chain.methods["eth_estimateGas"](ends)
    assert int(chain.methods["eth_estimateGas"](ends, at_that_block), 16) > 21_000
    chain.close()


def _grant_data(expiry: int) -> str:
    account = (9).to_bytes(20, "big")
    data = abi.calldata("grant", role_id("default"), role_id("r"), account, 0, expiry, 1)
    return "0x" + data.hex()


def test_an_estimate_is_enough(tmp_path: Path) -> None:
    """Also where deleting gives gas back: that comes only at the end."""
    chain = _chain(tmp_path / "c")
    contract = _deploy(chain)
    chain.send(_grant(1, contract))
    revoke = abi.calldata("revoke", role_id("default"), role_id("r"), (1).to_bytes(20, "big"))
    query = {"from": OWNER, "to": "0x" + contract.hex(), "data": "0x" + revoke.hex()}
    gas = int(chain.methods["eth_estimateGas"](query), 16)
    raw = _signed(2, contract, revoke, gas)
    receipt = chain.methods["eth_getTransactionReceipt"](chain.send("0x" + raw.hex()))
    assert receipt["status"] == "0x1", "out of gas"
    assert int(receipt["gasUsed"], 16) <= gas <= 2 * int(receipt["gasUsed"], 16)
    chain.close()


def test_a_chain_that_is_full_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk that is: what was not kept never happened."""
    chain = _chain(tmp_path / "c")
    contract = _deploy(chain)
    before = _hashes(chain)
    chain.close()
    with monkeypatch.context() as small:
        small.setattr(chains, "PAGES_MAX", 1)  # SQLite takes the size that it has
        chain = _chain(tmp_path / "c")
        said: Any = {}
        nonce = 1
        while "error" not in said:
            raw = _grant(nonce, contract, nonce)
            said = answer(chain, {"id": 1, "method": "eth_sendRawTransaction", "params": [raw]})
            nonce += 1
            assert nonce < 50, "it is never full"
        assert "full" in said["error"]["message"]
        after = _hashes(chain)
        assert len(after) == len(before) + nonce - 2
        chain.close()
    chain = _chain(tmp_path / "c")
    assert _hashes(chain) == after
    chain.send(_grant(nonce - 1, contract, nonce - 1))
    chain.close()


@pytest.mark.parametrize("text", [b"hello", b"\x89PNG" * 300])
def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "c"
    path.write_bytes(text)
    with pytest.raises(sqlite3.DatabaseError):
        _chain(path)
    assert path.read_bytes() == text


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"")
    (tmp_path / "c").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        _chain(tmp_path / "c")
    assert (tmp_path / "victim").read_bytes() == b""


# --- transactions that are none -------------------------------------------------------------------


def test_hostile_transactions_change_nothing(tmp_path: Path) -> None:
    chain = _chain(tmp_path / "c")
    contract = _deploy(chain)
    good = bytes.fromhex(_grant(1, contract)[2:])
    before = _hashes(chain)
    rng = random.Random(31337)
    print("seed 31337")  # noqa: T201
    bad = [b"", b"\0", b"\xc0", b"\xff" * 9, b"\x02", b"\x04\xc0", bytes(RAW_CHARS_MAX // 2)]
    bad += [b"\xf9\xff\xff" + bytes(100), b"\xc1" * 50_000]  # a lie about a length; deep nesting
    bad += [good[:cut] for cut in range(0, len(good), 7)]
    bad += [rng.randbytes(rng.randrange(1, 300)) for _ in range(200)]
    for raw in bad:
        with pytest.raises(Refused):
            chain.send("0x" + raw.hex())
    for text in ("", "0x", "0xg", "x", "0x0"):
        with pytest.raises(Refused):
            chain.send(text)
    assert _hashes(chain) == before
    chain.send("0x" + good.hex())
    chain.close()


def test_a_transaction_of_another_chain_or_a_wrong_number_is_refused(tmp_path: Path) -> None:
    from eth_account import Account

    chain = _chain(tmp_path / "c")
    contract = _deploy(chain)

    def send(**changes: Any) -> str:
        fields = {
            "chainId": CHAIN_ID, "nonce": 1, "gas": 50_000, "gasPrice": 0, "value": 0,
            "to": contract, "data": "0x", **changes,
        }  # fmt: skip
        if fields["chainId"] is None:
            del fields["chainId"]
        raw = bytes(Account.sign_transaction(fields, WALLET.secret).raw_transaction)
        with pytest.raises(Refused) as caught:
            chain.send("0x" + raw.hex())
        return str(caught.value)

    assert "chain id: it is for 1, and" in send(chainId=1)
    assert "chain id: it is for any, and" in send(chainId=None)
    assert "nonce: Expected 1, but got 0" in send(nonce=0)
    assert "nonce: Expected 1, but got 2" in send(nonce=2)
    assert "gas limit" in send(gas=40_000_000)
    chain.close()


# --- the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """(port, process) of a server with the contract deployed."""
    path = tmp_path_factory.mktemp("server") / "c"
    chain = Chain(path, chain_id=CHAIN_ID, owner=WALLET.address)
    _deploy(chain)
    chain.close()
    process = _serve(path)
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        yield int(line.split()[1]), process
    finally:
        process.kill()
        process.communicate()


def _serve(path: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "wetware_auth_evm.dev.server", "--file", str(path),
         "--owner", WALLET.address.hex(), "--chain-id", str(CHAIN_ID), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def _post(
    port: int, body: bytes | str, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        given = {"content-type": "application/json", **(headers or {})}
        connection.request(method, "/", body, given)
        response = connection.getresponse()
        raw = response.read()
        try:
            return response.status, json.loads(raw)
        except ValueError:
            return response.status, raw.decode()
    finally:
        connection.close()


def _rpc(port: int, method: Any, params: Any = (), **more: Any) -> Any:
    return _post(port, json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": params, **more}))[1]  # fmt: skip # noqa: E501


Served = tuple[int, "subprocess.Popen[str]"]
METHODS = (
    *("web3_clientVersion", "net_version", "eth_chainId", "eth_blockNumber", "eth_gasPrice"),
    *("eth_maxPriorityFeePerGas", "eth_accounts", "eth_syncing", "eth_feeHistory"),
    *("eth_getBlockByNumber", "eth_getBlockByHash", "eth_call", "eth_estimateGas"),
    *("eth_getBalance", "eth_getTransactionCount", "eth_getCode", "eth_getStorageAt"),
    *("eth_getLogs", "eth_sendRawTransaction", "eth_getTransactionReceipt"),
)
ASK = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []})


def test_it_listens_on_loopback_only(server: Served) -> None:
    port, process = server
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                listening.append(local.rpartition(":")[0])
    assert listening == ["0100007F"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "", "[::1]"])
def test_dns_rebinding_is_refused(server: Served, host: str) -> None:
    port, _ = server
    status, said = _post(port, ASK, {"Host": host.format(port=port)})
    assert status in (400, 403), said
    assert "0x7a69" not in str(said)


def test_the_names_of_this_machine_are_accepted(server: Served) -> None:
    port, _ = server
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}"):
        assert _post(port, ASK, {"Host": host})[1]["result"] == hex(CHAIN_ID)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
)
def test_web_pages_are_refused(server: Served, headers: dict[str, str]) -> None:
    port, _ = server
    status, said = _post(port, ASK, headers)
    assert status in (403, 415), said
    assert "access-control-allow-origin" not in str(said).lower()


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "PUT", "DELETE"])
def test_other_methods_are_refused(server: Served, method: str) -> None:
    assert _post(server[0], b"", method=method)[0] == 405


def test_an_oversized_body_is_refused(server: Served) -> None:
    port, _ = server
    status, _said = _post(port, b" " * (BODY_BYTES_MAX + 1))
    assert status == 413
    # One that lies about its length, or gives none.
    with socket.create_connection(("127.0.0.1", port), 20) as raw:
        raw.sendall(
            f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
            "transfer-encoding: chunked\r\n\r\n".encode()
        )
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        answer = b""
        try:
            for _ in range(64):
                raw.sendall(chunk)
        except OSError:
            pass  # it has closed the connection
        raw.settimeout(20)
        try:
            answer = raw.recv(1000)
        except OSError:
            answer = b"413"
    assert b"413" in answer
    assert _rpc(port, "eth_chainId")["result"] == hex(CHAIN_ID)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"null",
        b"1",
        b'"x"',
        b"[]",
        b"[1, null, [], {}]",
        b'{"method": 5}',
        b'{"method": "eth_chainId", "params": {"a": 1}, "id": 1}',
        b'{"method": "eth_chainId", "params": [], "id": {"a": 1}}',
        b'{"method": "eth_chainId", "params": [1, 2, 3], "id": 1}',
        b'{"method": "__init__", "params": [], "id": 1}',
        b'{"method": "anvil_setBalance", "params": [], "id": 1}',
        b'{"method": "eth_sendTransaction", "params": [{}], "id": 1}',
        b"NaN",
    ],
)
def test_what_is_not_json_rpc_gets_an_error(server: Served, body: bytes) -> None:
    port, _ = server
    status, said = _post(port, body)
    assert status == 200
    for each in said if isinstance(said, list) else [said]:
        assert each["error"]["code"] in (-32700, -32600, -32601, -32602), said
        assert "Traceback" not in str(each)
    assert _rpc(port, "eth_chainId")["result"] == hex(CHAIN_ID)


def test_batches_are_bounded(server: Served) -> None:
    port, _ = server
    one = {"jsonrpc": "2.0", "method": "eth_chainId", "params": []}
    many = [{**one, "id": n} for n in range(BATCH_MAX)]
    assert [a["id"] for a in _post(port, json.dumps(many))[1]] == list(range(BATCH_MAX))
    assert "error" in _post(port, json.dumps([*many, {**one, "id": 1}]))[1]
    assert _post(port, json.dumps(one))[0] == 204, "a notification gets no answer"


def test_every_method_survives_every_kind_of_parameter(server: Served) -> None:
    """An error that is one of JSON-RPC's, or a result; no defect, and the chain as before."""
    port, _ = server
    before = _rpc(port, "eth_getBlockByNumber", ["latest", False])["result"]["hash"]
    odd: list[Any] = [
        *(None, True, False, 0, -1, 1e400, 1.5, "", "0x", "0xg", "0x-1", "0x_1", "0x 1", "latest"),
        *("0x" + "f" * 64, "0x" + "f" * 65, "0x" + "11" * 20, "0x" + "11" * 32, "x" * 5000),
        *([], [[]], [None], ["0x" + "11" * 20] * 3, {}, {"to": 1}, {"blockHash": "0x"}),
        {"blockHash": "0x" + "11" * 32},
        {"blockNumber": "0x99999"},
        {"from": "0x" + "11" * 20, "to": None, "gas": "0xffffffffffffffff", "data": "0x5b600056"},
        {"from": "0x" + "11" * 20, "data": "0xfe", "value": "0x" + "f" * 64},
        {"fromBlock": "latest", "toBlock": "0x0", "topics": [[None]], "address": 5},
        {"fromBlock": "0x0", "topics": [["0x" + "11" * 32], None, 5]},
    ]
    rng = random.Random(5)
    for method in METHODS:
        for _ in range(40):
            params = [rng.choice(odd) for _ in range(rng.randrange(4))]
            said = _rpc(port, method, params)
            assert ("result" in said) != ("error" in said)
            if "error" in said:
                code = said["error"]["code"]
                assert code in (-32602, -32000, 3), (method, params, said)
    after = _rpc(port, "eth_getBlockByNumber", ["latest", False])["result"]["hash"]
    assert after == before


def test_a_call_that_loops_ends(server: Served) -> None:
    """Bounded by gas, and the chain answers again after it."""
    port, _ = server
    started = time.monotonic()
    loop = {"data": "0x5b600056", "gas": "0xffffffffffff"}
    said = _rpc(port, "eth_call", [loop, "latest"])
    assert "OutOfGas" in said["error"]["message"]
    assert time.monotonic() - started < 60  # other tests run beside it
    assert _rpc(port, "eth_chainId")["result"] == hex(CHAIN_ID)


def test_a_contract_can_add_points_of_bls12_381(server: Served) -> None:
    """The functions of EIP-2537 are imported when they are called."""
    port, _ = server
    infinity = "00" * 128
    call = {"to": "0x" + "0b".rjust(40, "0"), "data": "0x" + 2 * infinity}
    assert _rpc(port, "eth_call", [call, "latest"])["result"] == "0x" + infinity


def test_a_refusal_of_the_contract_is_passed_on(server: Served) -> None:
    port, _ = server
    created = _rpc(port, "eth_getLogs", [{"fromBlock": "0x0"}])["result"][0]["address"]
    query = {"to": created, "data": "0x" + abi.calldata("pause").hex(), "from": "0x" + "11" * 20}
    for method in ("eth_call", "eth_estimateGas"):
        error = _rpc(port, method, [query])["error"]
        assert error["code"] == 3
        why = abi.refusal(bytes.fromhex(error["data"][2:]))
        assert why.name == "NotGuardian"


def test_many_slow_clients_do_not_keep_others_out(server: Served) -> None:
    port, _ = server
    head = (
        f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        "content-length: 100\r\n\r\n{"
    ).encode()
    slow = []
    try:
        for _ in range(REQUESTS_MAX):
            slow.append(socket.create_connection(("127.0.0.1", port), 20))
            slow[-1].sendall(head)
        deadline = time.monotonic() + 20
        status = 0
        while status != 503 and time.monotonic() < deadline:
            status, _said = _post(port, ASK)
        assert status == 503, "nobody counts them"
        while status != 200 and time.monotonic() < deadline:
            status, _said = _post(port, ASK)
            time.sleep(0.1)
        assert status == 200, "they are never sent away"
    finally:
        for each in slow:
            each.close()


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = _serve(tmp_path / "c", "--port", str(taken.getsockname()[1]))
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot listen" in out
    assert "Traceback" not in out


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"something else")
    process = _serve(tmp_path / "c")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert "cannot use" in out
    assert "Traceback" not in out


def test_kill_9_in_the_middle_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Again and again, while transactions are sent."""
    path = tmp_path / "c"
    chain = Chain(path, chain_id=CHAIN_ID, owner=WALLET.address)
    contract = _deploy(chain)
    nonce = 1
    chain.close()
    acknowledged: list[str] = []
    for turn in range(3):
        process = _serve(path)
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[1])
        for tx in acknowledged:
            assert call(port, "eth_getTransactionReceipt", tx)["status"] == "0x1"
        nonce = int(
            call(port, "eth_getTransactionCount", "0x" + WALLET.address.hex(), "latest"), 16
        )
        data = abi.calldata(
            *("grant", role_id("default"), role_id("r"), bytes(20)[:19] + bytes([turn + 1])),
            *(0, int(time.time()) + 86_400, 1),
        )
        for _ in range(4 + turn):
            raw = _signed(nonce, contract, data)
            acknowledged.append(call(port, "eth_sendRawTransaction", "0x" + raw.hex()))
            nonce += 1
        process.send_signal(signal.SIGKILL)
        process.communicate()
    chain = Chain(path, chain_id=CHAIN_ID, owner=WALLET.address)
    assert len(_hashes(chain)) == 2 + len(acknowledged) == 2 + 4 + 5 + 6
    chain.close()
