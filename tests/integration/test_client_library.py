"""The client library inside applications that it does not own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import anyio
import pytest

import wetware
from wetware.errors import Denied, Disconnected, TimedOut, Unsupported
from wetware.testing import Home, NodeProcess

pytestmark = pytest.mark.anyio


def _program(node: NodeProcess, source: str, timeout: float = 110) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), node.addr, str(node.data_dir)],
        env=node.home.env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.long
def test_ten_thousand_failing_calls_beside_an_allocating_thread(node: NodeProcess) -> None:
    """Automatic GC runs on whichever thread allocates; capnp objects must not die there."""
    out = _program(
        node,
        """
        import asyncio, gc, sys, threading
        import wetware
        from wetware.errors import WetwareError
        before = (gc.isenabled(), gc.get_threshold())
        stop = False
        def allocate():
            while not stop:
                for _ in range(2000):
                    a = []; a.append(a)          # garbage that only the cyclic GC frees
        threads = [threading.Thread(target=allocate) for _ in range(2)]
        for t in threads: t.start()
        async def main():
            failed = 0
            async with wetware.connect(sys.argv[1]) as session:
                interface = session.pubsub._ref.interface
                async def one(n):
                    nonlocal failed
                    try:
                        await session.open(f"nothing{n}", interface)
                    except WetwareError as exc:
                        failed += 1
                        exc.keep = exc           # a cycle through the exception
                for batch in range(100):
                    await asyncio.gather(*(one(n) for n in range(100)))
                assert (await session.whoami()).principal
            return failed
        try:
            failed = asyncio.run(main())
        finally:
            stop = True
            for t in threads: t.join()
        gc.collect()
        assert (gc.isenabled(), gc.get_threshold()) == before, "the library touched gc"
        print(failed, gc.get_stats()[2]["collections"] > 0)
        """,
    )
    assert out.split() == ["10000", "True"]


def test_a_remote_client_imports_neither_libp2p_nor_trio(node: NodeProcess) -> None:
    out = _program(
        node,
        """
        import asyncio, sys, wetware
        async def main():
            async with wetware.connect(sys.argv[1]) as session:
                topic = await session.pubsub.join("chat")
                await topic.publish(b"hello")
        asyncio.run(main())
        print(sorted({"trio", "libp2p", "multiaddr", "grpc"} & set(sys.modules)))
        """,
    )
    assert out.strip() == "[]"


async def test_works_in_an_anyio_task_group(node: NodeProcess) -> None:
    seen = []
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                seen.append((await session.whoami()).principal)

            for _ in range(20):
                tasks.start_soon(ask)
        with anyio.move_on_after(0.05):
            topic = await session.pubsub.join("quiet")
            async with topic.subscribe() as messages:
                async for _ in messages:
                    pass
        assert (await session.whoami()).principal, "a cancelled wait broke the session"
    assert set(seen) == {f"local:{node.home.key().peer_id}"}


async def test_connect_twice_in_one_loop_and_again_after(node: NodeProcess) -> None:
    key = node.home.key()
    async with (
        wetware.connect(node.addr, key=key) as one,
        wetware.connect(data_dir=node.data_dir, key=key) as two,
    ):
        assert (await one.whoami()).grant != (await two.whoami()).grant
    async with wetware.connect(node.addr, key=key) as three:
        assert (await three.whoami()).roles == ("admin",)


async def test_every_call_has_a_time(node: NodeProcess) -> None:
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        assert session.timeout_s == 30
        os.kill(node.process.pid, signal.SIGSTOP)
        try:
            session.timeout_s = 0.05
            with pytest.raises(TimedOut):
                await session.pubsub.join("chat")
            with wetware.time_limit(0.02), pytest.raises(TimedOut, match=r"within 0.02 s"):
                await session.services()
        finally:
            os.kill(node.process.pid, signal.SIGCONT)
        session.timeout_s = 30
        part = await session.attenuate(label="part")
        assert part.timeout_s == 30
        with pytest.raises(TypeError, match="several texts"):
            await session.share({"pubsub": "Topic.publish"})


async def test_unknown_services(node: NodeProcess) -> None:
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        with pytest.raises(AttributeError, match="no client for a service 'nope'"):
            session.nope  # noqa: B018
        interface = session.pubsub._ref.interface
        with pytest.raises(Unsupported, match="no service 'nope'"):
            await session.open("nope", interface)
        with pytest.raises(Denied):
            await session.open("session", interface)


async def test_a_lost_node_is_disconnected(home: Home) -> None:
    node = home.start_node().wait_ready()
    async with wetware.connect(node.addr, key=home.key()) as session:
        waiting = asyncio.create_task(_call_for_ever(session))
        node.process.kill()
        node.process.wait()
        with pytest.raises(Disconnected):
            await asyncio.wait_for(waiting, 60)


async def _call_for_ever(session: wetware.Session) -> None:
    while True:
        await session.whoami()
