"""Nodes on the machines of a lab, and what reaches whom."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from subprocess import CompletedProcess
from typing import Any

import wetware
from wetware.errors import WetwareError
from wetware.identity import PeerId
from wetware.testing import Home, NodeProcess

from .lab import Lab

LISTEN = "/ip4/0.0.0.0/tcp/4001"
LISTEN6 = "/ip6/::/tcp/4001"
RETRY_S = 0.05


class Cluster:
    """Nodes, each named as its machine, and all of one owner."""

    def __init__(self, lab: Lab, home: Home) -> None:
        self.lab = lab
        self._home = home
        self.nodes: dict[str, NodeProcess] = {}

    def node_id(self, name: str) -> PeerId:
        """Of a node that may not have run yet."""
        return self._home.node_id(name)

    def start(
        self, name: str, *, join: str = "", ticket: str = "", args: tuple[str, ...] = ()
    ) -> NodeProcess:
        """A node on the machine `name`, which joins by a ticket, or one of the node on `join`."""
        ticket = self.nodes[join].invite() if join else ticket
        if self.lab.hosts[name].address6:
            args = ("--listen", LISTEN6, *args)
        with self.lab.inside(name):
            node = self._home.start_node(name, listen=LISTEN, join=ticket or None, args=args)
        self.nodes[name] = node.wait_ready()
        return node

    def ww(self, name: str, *args: str, **kwargs: Any) -> CompletedProcess[str]:
        """`ww ARGS` on a machine, at its node."""
        with self.lab.inside(name):
            return self.nodes[name].ww(*args, **kwargs)

    @contextlib.asynccontextmanager
    async def session(self, name: str) -> AsyncIterator[wetware.Session]:
        """A login at a node.

        It is not on that machine, whose file system alone it needs: enter `lab.inside` around
        what dials, i.e. `session.node`.
        """
        node = self.nodes[name]
        async with wetware.connect(data_dir=node.data_dir, key=self._home.key()) as session:
            yield session

    async def reach(self, here: str, there: str, *, within_s: float) -> dict[str, float | str]:
        """Way → after how many seconds a node first got through to another, or why it did not.

        The ways, all tried at once and over and over: "ping", "node" (`session.node`), "tunnel"
        (the same, through the node here), and "pubsub": a message from here to there.
        """
        peer = self.nodes[there].peer_id
        # One machine for all that happens meanwhile: what dials is here, the rest are unix sockets.
        with self.lab.inside(here):
            async with self.session(here) as session, self.session(there) as far:

                async def ping() -> None:
                    await session.cluster.ping(str(peer))

                async def node(direct: bool | None) -> None:
                    async with session.node(there, direct=direct) as other:
                        assert (await other.whoami()).node == peer

                async def publish() -> None:
                    await topic.publish(here)
                    if not (await asyncio.wait([arrival], timeout=RETRY_S))[0]:
                        raise TimeoutError("no message has arrived")

                topic = await session.pubsub.join(f"{here}.{there}")
                async with (await far.pubsub.join(topic.name)).subscribe() as messages:
                    arrival = asyncio.ensure_future(anext(messages))
                    ways = {
                        "ping": ping,
                        "node": lambda: node(None),
                        "tunnel": lambda: node(False),
                        "pubsub": publish,
                    }
                    try:
                        took = [first(way, within_s) for way in ways.values()]
                        return dict(zip(ways, await asyncio.gather(*took), strict=True))
                    finally:
                        arrival.cancel()


async def first(call: Callable[[], Awaitable[None]], within_s: float) -> float | str:
    """After how many seconds it first succeeded; if not within `within_s`, its last error."""
    began, error = time.monotonic(), ""
    try:
        async with asyncio.timeout(within_s):
            while True:
                error = "no answer"
                try:
                    await call()
                except (WetwareError, TimeoutError) as exc:
                    error = str(exc) or error
                else:
                    return round(time.monotonic() - began, 2)
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        return error
