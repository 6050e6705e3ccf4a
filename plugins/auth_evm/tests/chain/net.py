"""A real chain with the contract, endpoints in front of it that lie on demand, and what follows it.

`Net` is an anvil with WetwareACL on it and a clock that shows the chain's time. `Gateway` is an
HTTP server that passes JSON-RPC on to anvil; a test sets `twist` to change an answer, or makes it
hang, fail, or answer with bytes of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from plugins.auth_evm.tests.contract.chains import ARTIFACT, GENESIS_S, Acl, AnvilChain, anvil_chain
from plugins.auth_evm.tests.contract.people import MEMBER, OWNER, TEAM

from wetware_auth_evm.chain.endpoints import Endpoints
from wetware_auth_evm.chain.finality import Bounds, Finality
from wetware_auth_evm.chain.follower import Follower
from wetware_auth_evm.chain.history import History
from wetware_auth_evm.chain.replica import Replica

CODE_HASH = bytes.fromhex(ARTIFACT["runtimeKeccak256"].removeprefix("0x"))
BOUNDS = Bounds(verified_s_max=30.0, tip_age_s_max=120.0, tip_ahead_s_max=60.0)
FINALIZED = Finality("finalized")
DAY_S = 86400


def raw(address: str) -> bytes:
    return bytes.fromhex(address[2:])


class FakeClock:
    """Both clocks, moved by the test."""

    def __init__(self, time_s: float = float(GENESIS_S)) -> None:
        self.wall_s, self.steady_s = time_s, 1000.0

    def time(self) -> float:
        return self.wall_s

    def monotonic(self) -> float:
        return self.steady_s

    def pass_s(self, seconds: float) -> None:
        self.wall_s += seconds
        self.steady_s += seconds


Twist = Callable[[str, list[Any], dict[str, Any]], Awaitable[None] | None]


class Gateway:
    """An endpoint in front of an anvil.

    Attributes:
        twist: Called with (method, params, the JSON-RPC answer), which it may change in place.
        upstream: URL of the anvil; may be changed.
        hangs: Accept requests and never answer.
        status: Of each answer.
        body: Of each answer, in place of JSON-RPC.
        asked: Methods, in order.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.twist: Twist | None = None
        self.hangs = False
        self.status = 200
        self.body: bytes | None = None
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._http: aiohttp.ClientSession | None = None
        self._port = 0

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._http = aiohttp.ClientSession()

    async def stop(self) -> None:
        """Dead: nobody listens any more. `start` brings it back on the same port."""
        if self._runner is not None and self._http is not None:
            await self._http.close()
            await self._runner.cleanup()
            self._runner = self._http = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        query = json.loads(await request.read())
        self.asked.append(query["method"])
        if self.hangs:
            await asyncio.sleep(3600)
        if self.body is not None:
            return web.Response(body=self.body, status=self.status, headers=self.headers)
        assert self._http is not None
        async with self._http.post(self.upstream, json=query) as answer:
            document = await answer.json()
        if self.twist is not None:
            later = self.twist(query["method"], query["params"], document)
            if later is not None:
                await later
        return web.json_response(document, status=self.status, headers=self.headers)


class Freeze:
    """A twist: the node answers about the newest block as it was when this was made."""

    def __init__(self, chain: AnvilChain) -> None:
        self._blocks = {
            tag: chain.rpc("eth_getBlockByNumber", tag, False) for tag in ("latest", "finalized")
        }

    def __call__(self, method: str, params: list[Any], answer: dict[str, Any]) -> None:
        if method == "eth_getBlockByNumber" and params[0] in self._blocks:
            answer["result"] = self._blocks[params[0]]


class Net:
    """A chain with the contract, owned by OWNER. Its blocks are a second apart."""

    def __init__(self, chain: AnvilChain, acl: Acl | None = None) -> None:
        self.chain = chain
        self.acl = Acl.deploy(chain, OWNER) if acl is None else acl
        self.contract = raw(self.acl.address)
        self.clock = FakeClock()
        self.sync_clock()

    def sync_clock(self) -> None:
        """Let the node's clock show the chain's time; time passes on both of its clocks."""
        self.clock.pass_s(max(0.0, self.chain.time - self.clock.wall_s))

    def send(self, function: str, *args: Any, sender: str = OWNER) -> None:
        self.acl.send(function, *args, sender=sender)
        self.sync_clock()

    def grant(self, account: str, rights: int = 1, *, role: bytes = MEMBER, **more: Any) -> None:
        """For `ttl_s` (a day), in `scope` (TEAM), by `sender` (OWNER)."""
        scope, sender = more.get("scope", TEAM), more.get("sender", OWNER)
        end = self.chain.time + more.get("ttl_s", DAY_S)
        self.send("grant", scope, role, account, 0, end, rights, sender=sender)

    def mine(self, count: int = 1) -> None:
        for _ in range(count):
            self.chain.rpc("evm_mine", self.chain.time)
            self.chain.time += 1
        self.sync_clock()

    def reorg(self, depth: int) -> None:
        """Replace the newest blocks by as many empty ones."""
        self.chain.rpc("anvil_reorg", depth, [])

    def replica(self, bounds: Bounds = BOUNDS) -> Replica:
        return Replica(self.chain.chain_id, self.contract, TEAM, bounds=bounds, clock=self.clock)

    def block(self, tag: str) -> tuple[int, bytes]:
        block = self.chain.rpc("eth_getBlockByNumber", tag, False)
        return int(block["number"], 16), raw(block["hash"])

    @contextlib.asynccontextmanager
    async def follower(
        self,
        urls: Sequence[str] | None = None,
        *,
        quorum: int | None = None,
        timeout_s: float = 60.0,
        directory: Path | None = None,
        bounds: Bounds = BOUNDS,
        **options: Any,
    ) -> AsyncIterator[Follower]:
        """A follower of this chain that has done nothing yet, started from `directory`."""
        each = [self.chain.url] if urls is None else urls
        endpoints = Endpoints(
            each, quorum=len(each) // 2 + 1 if quorum is None else quorum, timeout_s=timeout_s
        )
        replica = self.replica(bounds)
        history = None
        if directory is not None:
            history = History(directory)
            history.load(replica)
        options = {"finality": FINALIZED, "code_hash": CODE_HASH, **options}
        try:
            yield Follower(endpoints, replica, history=history, **options)
        finally:
            await endpoints.aclose()


@contextlib.contextmanager
def net(
    *,
    final_blocks: int = 2,
    chain_id: int = 31337,
    args: Sequence[str] = (),
    deployed: Acl | None = None,
    time: int = 0,
) -> Iterator[Net]:
    """A chain whose final block lies so many (an even number) behind the newest.

    Fresh, or, with `deployed` and the `time` of its next block, one that `args` restores.
    """
    slots = str(final_blocks // 2)
    with anvil_chain(chain_id=chain_id, args=("--slots-in-an-epoch", slots, *args)) as chain:
        chain.time = max(chain.time, time)
        yield Net(chain, deployed and Acl(chain, deployed.address, deployed.last))


@contextlib.asynccontextmanager
async def gateways(upstream: str, count: int = 3) -> AsyncIterator[list[Gateway]]:
    each = [Gateway(upstream) for _ in range(count)]
    try:
        for gateway in each:
            await gateway.start()
        yield each
    finally:
        for gateway in each:
            await gateway.stop()


def urls(each: Sequence[Gateway]) -> list[str]:
    return [gateway.url for gateway in each]
