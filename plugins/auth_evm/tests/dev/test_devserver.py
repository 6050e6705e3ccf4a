"""The chain in Python: its journal, its JSON-RPC, and what is thrown at both."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("eth", reason="needs the extra: pip install 'wetware[evm]'")

from wetware.errors import ConfigError
from wetware_auth_evm.chain import journal
from wetware_auth_evm.chain.events import role_id
from wetware_auth_evm.chain.journal import MAGIC, ChainFull, Journal
from wetware_auth_evm.cli import abi
from wetware_auth_evm.cli.transactions import signed
from wetware_auth_evm.contract import load as artifact
from wetware_auth_evm.dev import CHAIN_ID
from wetware_auth_evm.dev_process import call
from wetware_auth_evm.devserver import BATCH_MAX, BODY_BYTES_MAX, REQUESTS_MAX, Rpc
from wetware_auth_evm.evm_chain import RAW_BYTES_MAX, EvmChain, Refused
from wetware_auth_evm.login.wallets import Wallet

WALLET = Wallet.from_secret(b"\7" * 32)
NOW = 1_900_000_000


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def _chain(path: Path, clock: Clock | None = None) -> EvmChain:
    return EvmChain(path, chain_id=CHAIN_ID, owner=WALLET.address, clock=clock or Clock())


def _deploy(chain: EvmChain) -> bytes:
    raw = signed(
        WALLET,
        chain_id=CHAIN_ID,
        nonce=0,
        to=b"",
        data=abi.deployment(WALLET.address),
        gas=3_500_000,
    )
    receipt = chain.receipt(chain.send(raw))
    assert receipt is not None
    assert receipt["good"]
    created: bytes = receipt["created"]
    return created


def _grant(nonce: int, contract: bytes, account: int = 1) -> bytes:
    data = abi.calldata(
        *("grant", role_id("default"), role_id("r"), account.to_bytes(20, "big")),
        *(0, NOW + 86_400, 1),
    )
    return signed(WALLET, chain_id=CHAIN_ID, nonce=nonce, to=contract, data=data, gas=300_000)


def _hashes(chain: EvmChain) -> list[bytes]:
    found = []
    for number in range(chain.head.block_number + 1):
        header = chain.by_number(number)
        assert header is not None
        found.append(bytes(header.hash))
    return found


# --- the chain ------------------------------------------------------------------------------------


def test_our_signatures_are_those_of_the_library() -> None:
    """Encoding and signing by hand, against eth-account."""
    from eth_account import Account

    rng = random.Random(20)
    for _ in range(50):
        data = rng.randbytes(rng.choice([0, 1, 4, 55, 56, 57, 300]))
        nonce, gas = rng.choice([0, 1, 127, 128, 300]), rng.randrange(21_000, 1 << 24)
        to = rng.choice([b"", b"\x11" * 20])
        fields: dict[str, Any] = {
            "chainId": CHAIN_ID,
            "nonce": nonce,
            "gas": gas,
            "value": 0,
            "data": "0x" + data.hex(),
        }
        fee: dict[str, int] = {"price": rng.choice([0, 1, 300 * 10**9])}
        if rng.random() < 0.5:
            fee["tip"] = fee["price"] // 3
            fields |= {"type": 2, "maxFeePerGas": fee["price"], "maxPriorityFeePerGas": fee["tip"]}
        else:
            fields["gasPrice"] = fee["price"]
        if to:
            fields["to"] = "0x" + to.hex()
        theirs = bytes(Account.sign_transaction(fields, WALLET.secret).raw_transaction)
        ours = signed(WALLET, chain_id=CHAIN_ID, nonce=nonce, to=to, data=data, gas=gas, **fee)
        assert ours == theirs


def test_blocks_survive_as_they_were(tmp_path: Path) -> None:
    chain = _chain(tmp_path / "j")
    contract = _deploy(chain)
    for nonce in range(1, 6):
        chain.send(_grant(nonce, contract, nonce))
    before, logs = _hashes(chain), list(chain.logs(0, 99, frozenset(), []))
    chain.close()
    clock = Clock()
    clock.now += 10_000
    again = _chain(tmp_path / "j", clock)
    assert _hashes(again) == before
    assert list(again.logs(0, 99, frozenset(), [])) == logs
    assert len(logs) == 6
    again.send(_grant(6, contract, 6))
    assert again.head.timestamp == clock.now
    again.close()


def test_the_code_is_the_one_that_ships(tmp_path: Path) -> None:
    from eth_hash.auto import keccak

    chain = _chain(tmp_path / "j")
    contract = _deploy(chain)
    assert keccak(bytes(chain.state(None).get_code(contract))) == artifact().runtime_hash
    chain.close()


def test_a_question_about_now_sees_the_clock(tmp_path: Path) -> None:
    """A grant that expired since the last block is no grant, though no block says so."""
    clock = Clock()
    chain = _chain(tmp_path / "j", clock)
    contract = _deploy(chain)
    chain.send(_grant(1, contract))
    data = abi.calldata("rightsOf", role_id("default"), role_id("r"), (1).to_bytes(20, "big"))
    query = {"to": contract, "data": data}
    assert int.from_bytes(chain.call(query, None), "big") == 1
    at_that_block = chain.head
    clock.now += 86_401
    assert int.from_bytes(chain.call(query, None), "big") == 0
    assert int.from_bytes(chain.call(query, at_that_block), "big") == 1
    chain.close()


def test_an_estimate_is_enough(tmp_path: Path) -> None:
    """Also where deleting gives gas back: that comes only at the end."""
    chain = _chain(tmp_path / "j")
    contract = _deploy(chain)
    chain.send(_grant(1, contract))
    revoke = abi.calldata("revoke", role_id("default"), role_id("r"), (1).to_bytes(20, "big"))
    gas = chain.estimate({"from": WALLET.address, "to": contract, "data": revoke}, None)
    receipt = chain.receipt(
        chain.send(signed(WALLET, chain_id=CHAIN_ID, nonce=2, to=contract, data=revoke, gas=gas))
    )
    assert receipt is not None
    assert receipt["good"], "out of gas"
    assert receipt["gas_used"] <= gas <= 2 * receipt["gas_used"]
    chain.close()


def test_a_disk_that_fails_takes_the_block_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = _chain(tmp_path / "j")
    contract = _deploy(chain)
    before, size = _hashes(chain), (tmp_path / "j").stat().st_size
    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            chain.send(_grant(1, contract))
    assert _hashes(chain) == before
    assert (tmp_path / "j").stat().st_size == size, "what was not acknowledged is still there"
    chain.send(_grant(1, contract))
    after = _hashes(chain)
    assert len(after) == len(before) + 1
    chain.close()
    again = _chain(tmp_path / "j")
    assert _hashes(again) == after
    again.close()


def test_a_full_journal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = _chain(tmp_path / "j")
    contract = _deploy(chain)
    before = _hashes(chain)
    monkeypatch.setattr(journal, "JOURNAL_BYTES_MAX", (tmp_path / "j").stat().st_size + 10)
    with pytest.raises(ChainFull):
        chain.send(_grant(1, contract))
    assert _hashes(chain) == before
    answer = Rpc(chain).answer(
        {"id": 1, "method": "eth_sendRawTransaction", "params": ["0x" + _grant(1, contract).hex()]}
    )
    assert answer is not None
    assert "full" in answer["error"]["message"]
    chain.close()


# --- the journal ----------------------------------------------------------------------------------


def test_every_torn_end_leaves_the_blocks_before_it(tmp_path: Path) -> None:
    """Cut at every byte of the last record: never a half block, never one block too few."""
    path = tmp_path / "j"
    made = Journal(path)
    made.put(b"a", b"1")
    made.put(b"b", b"2")
    made.commit()
    first, whole = len(MAGIC), path.stat().st_size
    made.put(b"a", None)
    made.put(b"c", b"3")
    made.commit()
    made.close()
    data = path.read_bytes()
    for end in range(len(data) + 1):
        for filler in (b"", b"\0" * 40):
            if filler and end == len(data):
                continue
            torn = tmp_path / "torn"
            torn.write_bytes(data[:end] + filler)
            # Zeros in the place of a few bytes are no power failure, but damage.
            if filler and 0 < (whole if end < whole else len(data)) - end < 8 and end > first:
                with pytest.raises(ConfigError):
                    Journal(torn)
                continue
            read = Journal(torn)
            if end == len(data):
                assert read.store == {b"b": b"2", b"c": b"3"}
            elif end >= whole:
                assert read.store == {b"a": b"1", b"b": b"2"}
            else:
                assert read.store == {} or filler
            read.put(b"d", b"4")
            read.commit()
            read.close()
            again = Journal(torn)
            assert again.store[b"d"] == b"4", (end, filler)
            again.close()


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "j"
    made = Journal(path)
    for number in range(4):
        made.put(b"key", bytes([number]) * 50)
        made.commit()
    made.close()
    data = path.read_bytes()
    good = [bytes([number]) * 50 for number in range(4)]
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            read = Journal(path)
        except ConfigError:
            continue
        # A length that reaches beyond the end looks like a torn record: what is before it is left.
        assert read.store.get(b"key") in (None, *good)
        read.close()


@pytest.mark.parametrize("text", [b"hello", b"\x89PNG", MAGIC.replace(b"1", b"2")])
def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="something else"):
        Journal(path)
    assert path.read_bytes() == text


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"")
    (tmp_path / "j").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError):
        Journal(tmp_path / "j")
    assert (tmp_path / "victim").read_bytes() == b""


# --- transactions that are none -------------------------------------------------------------------


def test_hostile_transactions_change_nothing(tmp_path: Path) -> None:
    chain = _chain(tmp_path / "j")
    contract = _deploy(chain)
    good = _grant(1, contract)
    before = _hashes(chain)
    rng = random.Random(31337)
    print("seed 31337")  # noqa: T201
    bad = [b"", b"\0", b"\xc0", b"\xff" * 9, b"\x02", b"\x04\xc0", bytes(RAW_BYTES_MAX + 1)]
    bad += [b"\xf9\xff\xff" + bytes(100), b"\xc1" * 50_000]  # a lie about a length; deep nesting
    bad += [good[:cut] for cut in range(0, len(good), 7)]
    bad += [rng.randbytes(rng.randrange(1, 300)) for _ in range(200)]
    for raw in bad:
        with pytest.raises(Refused):
            chain.send(raw)
    assert _hashes(chain) == before
    chain.send(good)
    chain.close()


def test_a_transaction_of_another_chain_or_a_wrong_number_is_refused(tmp_path: Path) -> None:
    from eth_account import Account

    chain = _chain(tmp_path / "j")
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
            chain.send(raw)
        return str(caught.value)

    assert "chain id" in send(chainId=1)
    assert "EIP-155" in send(chainId=None)
    assert "nonce too low" in send(nonce=0)
    assert "nonce too high" in send(nonce=2)
    assert "gas limit" in send(gas=40_000_000)
    assert "nonce too low" in send(nonce=0), "the deployment, again"
    chain.close()


# --- the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """(port, process) of a server with the contract deployed."""
    path = tmp_path_factory.mktemp("server") / "j"
    chain = EvmChain(path, chain_id=CHAIN_ID, owner=WALLET.address)
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
        [sys.executable, "-P", "-m", "wetware_auth_evm.devserver", "--journal", str(path),
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
        process = _serve(tmp_path / "j", "--port", str(taken.getsockname()[1]))
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot listen" in out
    assert "Traceback" not in out


def test_a_damaged_journal_is_said(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"something else")
    process = _serve(tmp_path / "j")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert "damaged" in out
    assert "Traceback" not in out


def test_kill_9_in_the_middle_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Again and again, while transactions are sent."""
    path = tmp_path / "j"
    chain = EvmChain(path, chain_id=CHAIN_ID, owner=WALLET.address)
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
            raw = signed(
                WALLET, chain_id=CHAIN_ID, nonce=nonce, to=contract, data=data, gas=300_000
            )
            acknowledged.append(call(port, "eth_sendRawTransaction", "0x" + raw.hex()))
            nonce += 1
        process.send_signal(signal.SIGKILL)
        process.communicate()
    chain = EvmChain(path, chain_id=CHAIN_ID, owner=WALLET.address)
    assert chain.head.block_number == 1 + len(acknowledged) == 1 + 4 + 5 + 6
    chain.close()
