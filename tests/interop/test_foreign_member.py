"""js-libp2p as a member of a cluster of real nodes, by a certificate that it need not know of."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wetware.identity import PeerId
from wetware.testing import Home, NodeProcess

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

WITHIN_S = 60.0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[NodeProcess, NodeProcess]]:
    with Home(tmp_path, libp2p=True) as home, home.node("a") as a, home.node("b", join=a) as b:
        a.wait_members([b.peer_id])
        b.wait_members([a.peer_id])
        yield a, b


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not await condition():
        assert time.monotonic() < deadline, f"not within {WITHIN_S:g} s: {what}"
        await asyncio.sleep(0.1)


async def test_js_takes_part_in_pubsub_with_a_certificate_and_only_with_one(
    pair: tuple[NodeProcess, NodeProcess], start_js: Any
) -> None:
    a, b = pair
    js = await start_js("--gossipsub")
    peer, topic = PeerId(js.peer_id), f"/wetware/{b.info['cluster']}/chat"
    await js.ask("subscribe", topic=topic)

    async def member(node: NodeProcess) -> bool:
        done = await asyncio.to_thread(node.ww, "status", "--json", check=True)
        peers = json.loads(done.stdout)["peers"]
        return any(each["peer_id"] == peer and each["member"] for each in peers)

    async def meshed() -> bool:
        return str(b.peer_id) in (await js.ask("mesh", topic=topic))["peers"]

    # Two subscribers of the cluster's own, so that a message has somewhere to go.
    subs = [node.start_ww("sub", "chat", "--foreign", "--json") for node in pair]
    # A stranger: it may connect, and identify says what there is, and none of that is for it.
    await js.ask("dial", addr=b.addr)
    await asyncio.to_thread(b.wait_log, f"protocol.refused peer={peer} protocol=/meshsub/")
    for number in range(5):
        await asyncio.to_thread(b.ww, "pub", "chat", f"secret {number}", "--foreign", check=True)
        await js.ask("publish", topic=topic, data=b"smuggled".hex())
    assert not await meshed()
    assert not await member(b)
    assert js.events.empty()

    # The operator certifies it at a; it is connected to b alone.
    done = await asyncio.to_thread(
        a.ww, "invite", "--peer", str(peer), "--foreign", "--label", "kind=browser", check=True
    )
    assert "need not show the certificate" in done.stderr
    await until(lambda: member(b), "js is a member at b")
    await js.ask("hangup", peer=str(b.peer_id))
    await js.ask("dial", addr=b.addr)
    await until(meshed, "js and b are in one mesh")
    for node in pair:
        listed = (await asyncio.to_thread(node.members))[peer]
        assert (listed["state"], listed["labels"]) == ("foreign", {"kind": "browser"})

    async def heard() -> bool:
        await asyncio.to_thread(a.ww, "pub", "chat", "hello js", "--foreign", check=True)
        return not js.events.empty()

    await until(heard, "a message of a at js, through b")
    message = js.events.get_nowait()
    assert bytes.fromhex(message["data"]) == b"hello js"
    assert message["from"] == a.peer_id
    assert message["signed"]
    await js.ask("publish", topic=topic, data=b"hello wetware".hex())
    for sub in subs:
        message = await asyncio.wait_for(asyncio.to_thread(_from, sub, peer), WITHIN_S)
        assert message["data"] == "hello wetware", "what it said as a stranger was not heard"

    # It goes as it came.
    await asyncio.to_thread(a.ww, "evict", str(peer), "--yes", check=True)
    await asyncio.to_thread(b.wait_log, f"connection.down peer={peer}")

    async def gone() -> bool:
        return not await member(b) and peer not in await asyncio.to_thread(b.members)

    await until(gone, "js is no member at b")


def _from(sub: Any, publisher: PeerId) -> dict[str, Any]:
    """The first message of a publisher that `ww sub --json` prints."""
    for line in sub.stdout:
        message: dict[str, Any] = json.loads(line)
        if message["publisher"] == publisher:
            return message
    raise AssertionError("the subscription ended")
