"""A real anvil in real time, proxies in front of it, and a home from which commands are run."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from eth_abi.abi import decode
from eth_utils.abi import get_abi_output_types
from plugins.auth_evm.tests.contract.chains import FUNCTIONS, INSTALL, calldata, find_anvil
from typer.testing import CliRunner

from wetware.cli.app import options
from wetware.errors import WetwareError
from wetware.testing import end_with_parent
from wetware_auth_evm.cli import abi
from wetware_auth_evm.cli import mount as cli
from wetware_auth_evm.cli.words import who
from wetware_auth_evm.contract import load as artifact
from wetware_auth_evm.login import wallets
from wetware_auth_evm.login.wallets import Wallet

START_S_MAX = 30.0
ETHER = 10**18
CLUSTER = "ab" * 16
CHAIN_ID = 31337


def word(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")


class Anvil:
    """An anvil process that mines each transaction at once, ended by `close`.

    Where anvil is not installed, the test that asks for one is skipped.
    """

    def __init__(self, *args: str, chain_id: int = CHAIN_ID) -> None:
        binary = find_anvil()
        if binary is None:
            pytest.skip(f"anvil is not installed; run: {INSTALL}")
        self.chain_id = chain_id
        self._ids = itertools.count(1)
        self._process = subprocess.Popen(
            [
                str(binary),
                *("--host", "127.0.0.1", "--port", "0", "--chain-id", str(chain_id)),
                *("--auto-impersonate", "--accounts", "1", *args),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            preexec_fn=end_with_parent,
        )
        lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()
        try:
            line = lines.get(timeout=START_S_MAX)
        except BaseException:
            self.close()
            raise
        self.port = int(line.rsplit(":", 1)[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self, lines: queue.Queue[str]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # to the end: a full pipe would stop it
            if "Listening on" in line:
                lines.put(line)

    def rpc(self, method: str, *params: Any) -> Any:
        http_ = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        query = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params}
        with contextlib.closing(http_):
            http_.request("POST", "/", json.dumps(query), {"Content-Type": "application/json"})
            answer = json.loads(http_.getresponse().read())
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def fund(self, address: bytes, ether: float = 100) -> None:
        self.rpc("anvil_setBalance", who(address), hex(int(ether * ETHER)))

    def send(self, sender: bytes, to: bytes | None, data: bytes) -> dict[str, Any]:
        """A transaction of anybody, mined; its receipt. AssertionError if it is refused."""
        self.fund(sender)
        fields = {"from": who(sender), "data": "0x" + data.hex(), "gas": hex(3_000_000)}
        if to is not None:
            fields["to"] = who(to)
        number = self.rpc("eth_sendTransaction", fields)
        found: list[dict[str, Any]] = []

        def mined() -> bool:
            found[:] = [r] if (r := self.rpc("eth_getTransactionReceipt", number)) else []
            return bool(found)

        wait_until(mined)
        (receipt,) = found
        assert receipt["status"] == "0x1", receipt
        return receipt

    def deploy(self, owner: bytes) -> bytes:
        receipt = self.send(owner, None, artifact().bytecode + owner.rjust(32, b"\0"))
        return bytes.fromhex(receipt["contractAddress"][2:])

    def now(self) -> int:
        return int(self.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)

    def pass_s(self, seconds: int) -> None:
        """Let the chain's clock go ahead of this machine's."""
        self.rpc("evm_increaseTime", hex(seconds))
        self.rpc("evm_mine")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


Twist = Callable[[str, list[Any], dict[str, Any]], None]


class Proxy:
    """An endpoint in front of an anvil: `twist` may change each answer, `raw` replaces it."""

    def __init__(self, upstream: Anvil, twist: Twist | None = None) -> None:
        self.twist, self.asked = twist, []  # type: ignore[var-annotated]
        self.status, self.raw = 200, b""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                query = json.loads(body)
                proxy.asked.append(query["method"])
                answer = proxy.raw or json.dumps(proxy._answer(upstream, query)).encode()
                self.send_response(proxy.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _answer(self, upstream: Anvil, query: dict[str, Any]) -> dict[str, Any]:
        http_ = http.client.HTTPConnection("127.0.0.1", upstream.port, timeout=30)
        with contextlib.closing(http_):
            http_.request("POST", "/", json.dumps(query), {"Content-Type": "application/json"})
            answer: dict[str, Any] = json.loads(http_.getresponse().read())
        if self.twist is not None:
            self.twist(query["method"], query["params"], answer)
        return answer

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def dead_url() -> str:
    """A URL on which nobody listens."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}"


@dataclass
class Done:
    """What a command did.

    Attributes:
        code: Exit code.
        out: stdout.
        err: stderr.
        error: What it raised on purpose, or None.
    """

    code: int
    out: str
    err: str
    error: WetwareError | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def says(self) -> str:
        """Everything that a person reads, the error and its hint included."""
        error = f"{self.error.message}\n{self.error.hint}" if self.error else ""
        return f"{self.out}\n{self.err}\n{error}"


def invoke(*args: str, key: str | None = None, stdin: str = "") -> Done:
    """Run `ww --key KEY auth evm ARGS` in this process."""
    app = typer.Typer(rich_markup_mode=None)
    cli.mount(app)
    before = options.given
    options.given = {"key": key} if key else {}
    try:
        result: Any = CliRunner().invoke(app, ["auth", "evm", *args], input=stdin)
    finally:
        options.given = before
    error = result.exception
    if error is not None and not isinstance(error, WetwareError | SystemExit):
        raise error
    if isinstance(error, WetwareError):
        return Done(error.exit_code, result.stdout, result.stderr, error)
    return Done(result.exit_code, result.stdout, result.stderr)


@dataclass
class World:
    """A home, a chain, a contract owned by the wallet `default`, and people.

    Attributes:
        anvil: The chain.
        contract: 20 bytes.
        people: Name → wallet; each has a wallet file of its name, and money.
    """

    anvil: Anvil
    home: Path
    contract: bytes = b""
    people: dict[str, Wallet] = field(default_factory=dict)
    urls: Sequence[str] = ()

    def person(self, name: str, *, ether: float = 100) -> Wallet:
        if name not in self.people:
            file = wallets.find(name) or wallets.create(name)
            self.people[name] = file.open()
            self.anvil.fund(self.people[name].address, ether)
        return self.people[name]

    def address(self, name: str) -> str:
        return who(self.person(name).address)

    @property
    def where(self) -> list[str]:
        found = ["--contract", who(self.contract), "--chain-id", str(self.anvil.chain_id)]
        for url in self.urls or [self.anvil.url]:
            found += ["--rpc", url]
        return found

    def run(self, *args: str, key: str | None = None, stdin: str = "") -> Done:
        """`ww --key KEY auth evm ARGS` with the options that name the chain."""
        return invoke(args[0], *self.where, *args[1:], key=key, stdin=stdin)

    def ok(self, *args: str, key: str | None = None, stdin: str = "") -> Done:
        done = self.run(*args, key=key, stdin=stdin)
        assert done.code == 0, done.says
        return done

    def chain_send(self, sender: str, function: str, *args: Any) -> dict[str, Any]:
        """Behind the commands' back."""
        return self.anvil.send(
            self.person(sender).address, self.contract, calldata(function, *args)
        )

    def call(self, function: str, *args: Any) -> tuple[Any, ...]:
        """What the contract says."""
        query = {"to": who(self.contract), "data": "0x" + abi.calldata(function, *args).hex()}
        answer = self.anvil.rpc("eth_call", query, "latest")
        values = decode(get_abi_output_types(FUNCTIONS[function]), bytes.fromhex(answer[2:]))
        if len(values) == 1 and isinstance(values[0], tuple):
            (values,) = values
        return tuple(bytes.fromhex(v[2:]) if isinstance(v, str) else v for v in values)

    def rights(self, role: str, name: str, scope: str = "default") -> int:
        found: int
        (found,) = self.call("rightsOf", word(scope), word(role), self.person(name).address)
        return found


@contextlib.contextmanager
def proxies(anvil: Anvil, *twists: Twist | None) -> Iterator[list[Proxy]]:
    made = [Proxy(anvil, twist) for twist in twists]
    try:
        yield made
    finally:
        for proxy in made:
            proxy.close()


def wait_until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it did not happen in time")
        time.sleep(0.02)
