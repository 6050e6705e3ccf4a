"""The main job: a message published on one node reaches a subscriber on another."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from pathlib import Path

import pytest

import wetware
from wetware.testing import Home, NodeProcess, wait_for

pytestmark = pytest.mark.anyio


def _subscribed(node: NodeProcess, log_since: int) -> bool:
    return "service.opened" in node.log.read_text()[log_since:]


def test_ww_pub_on_a_reaches_ww_sub_on_b(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, b = pair
    sub = b.start_ww("sub", "chat", "--count", "1")
    try:
        # The subscription has to reach A before A publishes: publish until one arrives.
        for attempt in range(100):
            a.ww("pub", "chat", f"hello {attempt}", check=True)
            try:
                sub.wait(0.3)
                break
            except subprocess.TimeoutExpired:
                continue
        out, err = sub.communicate(timeout=60)
    finally:
        sub.kill()
    assert sub.returncode == 0, err
    assert out.startswith("hello ")


async def test_burst_through_sessions_arrives_complete_and_in_order(
    pair: tuple[NodeProcess, NodeProcess],
) -> None:
    a, b = pair
    key = a.home.key()
    count = 1000
    async with (
        wetware.connect(a.addr, key=key) as at_a,
        wetware.connect(b.addr, key=key) as at_b,
    ):
        sender = await at_a.pubsub.join("burst")
        receiver = await at_b.pubsub.join("burst")
        async with receiver.subscribe() as messages:
            got: list[int] = []

            async def receive() -> None:
                async for message in messages:
                    got.append(int(message.data))
                    if got[-1] == count - 1:
                        return

            reading = asyncio.create_task(receive())
            # Until B's subscription is known at A nothing can arrive: negative numbers probe.
            probe = -1
            async with asyncio.timeout(60):
                while not got:
                    await sender.publish(str(probe))
                    probe -= 1
                    await asyncio.sleep(0.1)
            for number in range(count):
                await sender.publish(str(number))
            async with asyncio.timeout(60):
                await reading
    assert [n for n in got if n >= 0] == list(range(count))


def test_stdin_json_and_count(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    mark = len(a.log.read_text())
    sub = a.start_ww("sub", "lines", "--count", "3", "--json")
    try:
        wait_for(lambda: _subscribed(a, mark), "the subscriber's session")
        lines = "".join(f"line {n}\n" for n in range(3))
        for _ in range(50):
            a.ww("pub", "lines", "-", input=lines, check=True)
            if sub.poll() is not None:
                break
        out, err = sub.communicate(timeout=60)
    finally:
        sub.kill()
    assert sub.returncode == 0, err
    messages = [json.loads(line) for line in out.splitlines()]
    assert len(messages) == 3
    assert all(m["data"].startswith("line ") for m in messages)


def test_a_file_and_a_count(pair: tuple[NodeProcess, NodeProcess], tmp_path: Path) -> None:
    a, _ = pair
    body = tmp_path / "body"
    body.write_bytes(b"\xff\0\n")
    mark = len(a.log.read_text())
    sub = a.start_ww("sub", "bodies", "--count", "3", "--json")
    try:
        wait_for(lambda: _subscribed(a, mark), "the subscriber's session")
        for _ in range(50):
            args = ("--file", str(body), "--count", "3", "--rate", "1000", "--json")
            said = a.ww("pub", "bodies", *args, check=True).stdout
            assert json.loads(said) == {"topic": "bodies", "published": 3}
            if sub.poll() is not None:
                break
        out, err = sub.communicate(timeout=60)
    finally:
        sub.kill()
    assert sub.returncode == 0, err
    assert [json.loads(line)["data_base64"] for line in out.splitlines()] == ["/wAK"] * 3

    body.write_bytes(bytes((1 << 20) + 1))
    for args, why in (
        (("bodies", "x", "--file", str(body)), "exclude each other"),
        (("bodies", "--count", "2"), "standard input has one a line"),
        (("bodies", "--file", str(tmp_path / "none")), "cannot read"),
        (("bodies", "--file", str(body)), "which no message has"),
    ):
        failed = a.ww("pub", *args)
        assert failed.returncode == 2, failed.stderr
        assert why in failed.stderr


@pytest.mark.parametrize("started_by", ["a terminal", "a background job"])
def test_sub_stops_cleanly_on_ctrl_c(
    started_by: str, pair: tuple[NodeProcess, NodeProcess]
) -> None:
    """However the tests themselves were started: a script's background jobs ignore SIGINT."""
    a, _ = pair
    mark = len(a.log.read_text())
    before = signal.getsignal(signal.SIGINT)
    signal.signal(
        signal.SIGINT,
        signal.SIG_IGN if started_by == "a background job" else signal.default_int_handler,
    )
    try:
        sub = a.start_ww("sub", "quiet")
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        wait_for(lambda: _subscribed(a, mark), "the subscriber's session")
        sub.send_signal(signal.SIGINT)
        _, err = sub.communicate(timeout=60)
    finally:
        sub.kill()
    assert "Traceback" not in err
    assert sub.returncode in (0, 130)


def test_a_stranger_node_is_no_member(
    shared_home: Home, pair: tuple[NodeProcess, NodeProcess]
) -> None:
    """A node of another cluster may connect to A, and is refused what members have."""
    a, _ = pair
    with shared_home.node("stranger", peers=[a.addr]) as stranger:
        a.wait_log(f"admission.refused peer={stranger.peer_id}")
        assert str(stranger.peer_id) not in a.members()
        assert str(a.peer_id) not in stranger.members()
        status = json.loads(a.ww("status", "--json", check=True).stdout)
        members = {p["peer_id"]: p["member"] for p in status["peers"]}
        assert members.get(str(stranger.peer_id), False) is False
        assert True in members.values()
