"""A chain that runs by the machine's clock, for real nodes: blocks as they are needed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from eth_abi.abi import encode
from plugins.auth_evm.tests.contract.chains import (
    ARTIFACT,
    INSTALL,
    calldata,
    find_anvil,
)
from plugins.auth_evm.tests.contract.people import OWNER, word
from plugins.auth_evm.tests.login.contracts_of import creation_code
from plugins.auth_evm.tests.login.world import SCOPE, Person

from wetware.testing import end_with_parent, wait_for
from wetware_auth_evm.chain.addresses import checksum
from wetware_auth_evm.login.proofs import SessionProof
from wetware_auth_evm.login.session import StoredSession, new_session, save

START_S_MAX = 30.0
CHAIN_ID = 31337


class LiveChain:
    """See the module.

    Attributes:
        url: Of its JSON-RPC.
        contract: Address, with its checksum.
    """

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process, self._port = process, port
        self.url = f"http://127.0.0.1:{port}"
        code = bytes.fromhex(ARTIFACT["bytecode"][2:]) + encode(["address"], [OWNER])
        self.contract = self.deploy(code)

    def rpc(self, method: str, *params: Any) -> Any:
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        http = HTTPConnection("127.0.0.1", self._port, timeout=20)
        with contextlib.closing(http):
            http.request("POST", "/", json.dumps(request), {"content-type": "application/json"})
            found = json.load(http.getresponse())
        assert "error" not in found, found
        return found["result"]

    def transact(self, to: str | None, data: bytes, sender: str = OWNER) -> dict[str, Any]:
        fields = {"from": sender, "data": "0x" + data.hex(), "gas": hex(8_000_000)}
        if to is not None:
            fields["to"] = to
        hash_ = self.rpc("eth_sendTransaction", {**fields, "gasPrice": "0x0"})
        receipt: dict[str, Any] = wait_for(
            lambda: self.rpc("eth_getTransactionReceipt", hash_), "a receipt"
        )
        assert receipt["status"] == "0x1", receipt
        return receipt

    def deploy(self, code: bytes) -> str:
        receipt = self.transact(None, code)
        return checksum(bytes.fromhex(receipt["contractAddress"][2:]))

    def wallet(self, owner: Person) -> str:
        """A contract wallet of one owner."""
        return self.deploy(creation_code("OwnersWallet") + encode(["address"], [owner.address]))

    def send(self, function: str, *args: Any, sender: str = OWNER) -> None:
        self.transact(self.contract, calldata(function, *args), sender)

    def grant(self, account: str, role: str = "member", rights: int = 1) -> None:
        expiry = int(time.time()) + 86_400
        self.send("grant", word(SCOPE), word(role), account, 0, expiry, rights)

    def epochs(self, account: str) -> tuple[int, int, int]:
        data = calldata("epochs", word(SCOPE), account)
        answer = self.rpc("eth_call", {"to": self.contract, "data": "0x" + data.hex()}, "latest")
        raw = bytes.fromhex(answer[2:])
        first, second, third = (int.from_bytes(raw[at : at + 32], "big") for at in (0, 32, 64))
        return first, second, third

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It does not answer meanwhile."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def session(
        self,
        person: Person,
        cluster: str,
        roles: tuple[str, ...] = ("member",),
        *,
        account: str = "",
        seconds: int = 3600,
    ) -> StoredSession:
        """What `ww auth evm login` makes."""
        from wetware_auth_evm.chain.profile import Profile

        contract = bytes.fromhex(self.contract[2:])
        profile = Profile(CHAIN_ID, contract, SCOPE, (self.url,), cluster=cluster)
        who = account or person.address
        grant, key = new_session(
            profile, bytes.fromhex(who[2:]), roles, self.epochs(who), time.time(), seconds
        )
        form: Any = "erc1271" if account else "eip712"
        signature = person.wallet.sign(SessionProof(grant, form, b"").digest)
        return StoredSession(key, grant, signature, form)

    def log_in(self, home: Path, person: Person, cluster: str, **more: Any) -> StoredSession:
        """Keep a session in a home, under the name "default"."""
        from unittest import mock

        session = self.session(person, cluster, **more)
        with mock.patch.dict("os.environ", {"WW_HOME": str(home / ".wetware")}):
            save("default", session)
        return session

    def toml(self, **more: Any) -> str:
        """[plugins.auth_evm] for it."""
        settings = {
            "endpoints": [self.url],
            "chain_id": CHAIN_ID,
            "contract": self.contract,
            "scope": SCOPE,
            "quorum": 1,
            "finality": "dev",
            "poll_s": 0.1,
            "verified_s_max": 2.0,
            "timeout_s": 0.5,
            "recheck_s": 1.0,
            **more,
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        return "\n".join(["[plugins.auth_evm]", *lines, ROLES])


ROLES = """
[plugins.auth_evm.roles.member]
services = { pubsub = ["*"] }
[plugins.auth_evm.roles.operator]
services = { "*" = ["*"] }
"""


@contextlib.contextmanager
def live_chain() -> Iterator[LiveChain]:
    """A fresh one; skips the test, with the command to run, without anvil."""
    binary = find_anvil()
    if binary is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    process = subprocess.Popen(
        [
            str(binary),
            *("--host", "127.0.0.1", "--port", "0", "--chain-id", str(CHAIN_ID)),
            *("--auto-impersonate", "--gas-price", "0", "--base-fee", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=end_with_parent,
    )
    try:
        assert process.stdout is not None
        port = 0
        for line in process.stdout:
            if "Listening on" in line:
                port = int(line.rsplit(":", 1)[1])
                break
        assert port, "anvil did not start"
        yield LiveChain(process, port)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
