"""Python at real nodes: `ww run`, `call`, and `map` over three of them, of which one dies."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import wetware
from wetware.errors import NotFound
from wetware.testing import Home, NodeProcess, wait_for
from wetware_proc.functions import CallEnded, FunctionFailed
from wetware_pubsub.client import PubSub

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]  # the first builds the runner

WITHIN_S = 60.0
Nodes = list[NodeProcess]


@pytest.fixture(scope="module")
def nodes(
    tmp_path_factory: pytest.TempPathFactory, python_runner: Callable[[Path], None]
) -> Iterator[Nodes]:
    names = ("a", "b", "c")
    with Home(tmp_path_factory.mktemp("home"), libp2p=False) as home, contextlib.ExitStack() as on:
        for name in names:
            for path in (home.path / name, home.path / name / "plugins"):
                path.mkdir(mode=0o700)
            python_runner(home.path / name / "plugins" / "proc")
        a = on.enter_context(home.node("a"))
        started = [a, *(home.start_node(name, join=a) for name in names[1:])]
        for node in started[1:]:
            on.callback(node.stop)
            node.wait_ready()
        for node in started:
            wait_for(
                lambda node=node: len(node.members("service=proc")) == 3, "all have the service"
            )
        a.ww("key", "new", "ada", check=True)
        a.ww("user", "add", "ada", "--key", "ada", "--role", "member", check=True)
        yield started


@contextlib.asynccontextmanager
async def at(node: NodeProcess, who: str = "") -> AsyncIterator[wetware.Session]:
    key = node.home.key(who) if who else node.home.key()
    async with wetware.connect(node.addr, key=key) as session:
        yield session


def test_a_script_is_wired_as_a_local_one(nodes: Nodes, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "print(sys.argv[1:], sys.stdin.read().upper())\n"
        "print('told', file=sys.stderr)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    done = nodes[0].ww("run", str(script), "3", "x", input="in")
    assert (done.returncode, done.stdout, done.stderr) == (3, "['3', 'x'] IN\n", "told\n")
    done = nodes[0].ww("run", "--on", "any", str(script), "bad")
    assert done.returncode == 1
    assert f'File "{script.name}", line 4, in <module>' in done.stderr
    assert "ValueError" in done.stderr
    (found,) = {
        each["kind"]
        for each in json.loads(nodes[0].ww("ps", "--json", check=True).stdout)["processes"]
    }
    assert found == "python"


async def test_a_function_is_called(nodes: Nodes, capfd: pytest.CaptureFixture[str]) -> None:
    def mix(numbers: list[int], words: dict[str, Any], data: bytes) -> object:
        import statistics

        print("said on the way")  # noqa: T201
        return [statistics.mean(numbers), sorted(words), data[::-1], None, True, 1 << 60]

    async with at(nodes[0]) as session:
        found = await session.proc.call(mix, [1, 2, 6], {"b": {}, "a": 0.5}, b"abc")
        assert found == [3, ["a", "b"], b"cba", None, True, 1 << 60]
        assert "said on the way" in capfd.readouterr().err
        async with session.proc.at("name=b") as proc:
            found = await proc.call(mix, [5], {}, b"")
            assert found == [5, [], b"", None, True, 1 << 60]


async def test_what_it_raises_comes_with_its_own_lines(nodes: Nodes) -> None:
    def fails() -> None:
        raise ValueError("no such thing")

    async with at(nodes[0]) as session:
        with pytest.raises(FunctionFailed, match="ValueError: no such thing") as failed:
            await session.proc.call(fails)
        line = fails.__code__.co_firstlineno + 1
        assert f'File "test_python_nodes.py:fails", line {line}, in fails' in failed.value.traceback
        assert 'raise ValueError("no such thing")' in failed.value.traceback


async def test_what_does_not_return_says_why(nodes: Nodes) -> None:
    def spins() -> None:
        while True:
            pass

    def leaves() -> None:
        raise SystemExit(4)

    def gives() -> object:
        return object()

    def floods() -> bytes:
        return bytes(20 << 20)

    async with at(nodes[0]) as session:
        with pytest.raises(CallEnded, match="limit: cpu_s"):
            await session.proc.call(spins, cpu_s=0.2)
        with pytest.raises(CallEnded, match="exited with 4"):
            await session.proc.call(leaves)
        with pytest.raises(FunctionFailed, match="object is none of None, bool"):
            await session.proc.call(gives)
        with pytest.raises(wetware.errors.LimitExceeded, match="VALUE_BYTES_MAX"):
            await session.proc.call(floods, memory_bytes=256 << 20)
        with pytest.raises(wetware.errors.WetwareError, match="no programs of the kind"):
            await session.proc.load(b"", "cobol")


async def test_capabilities_are_granted_and_passed(nodes: Nodes) -> None:
    def publish(topics: list[Any], text: str) -> None:
        import ww

        for topic in [ww.grant("chat"), *topics]:
            topic.publish(data=text.encode())

    async with at(nodes[0]) as session, at(nodes[1]) as other:
        heard = asyncio.Queue[bytes]()

        async def listen(name: str, ready: asyncio.Event) -> None:
            async with (await other.pubsub.join(name)).subscribe() as messages:
                ready.set()
                async for message in messages:
                    heard.put_nowait(message.data)

        tasks = []
        for name in ("chat", "more"):
            ready = asyncio.Event()
            tasks.append(asyncio.ensure_future(listen(name, ready)))
            await ready.wait()
        try:
            chat, more = await session.pubsub.join("chat"), await session.pubsub.join("more")
            for place in ("", "name=c"):
                text = f"from {place}"
                await session.proc.call(publish, [more], text, grants={"chat": chat}, on=place)
                async with asyncio.timeout(WITHIN_S):
                    assert {await heard.get(), await heard.get()} == {text.encode()}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_capabilities_come_back_and_work_as_long_as_they_are_held(nodes: Nodes) -> None:
    def opens(names: list[str], given: Any) -> object:
        import ww

        pubsub = ww.grant("pubsub")
        topics = {name: pubsub.join(topic=name) for name in names}
        return [topics, given, topics[names[0]]]

    async with at(nodes[0]) as session:
        pubsub, chat = (
            await session.open("pubsub", PubSub.INTERFACE),
            await session.pubsub.join("chat"),
        )

        async def granted() -> list[str]:
            found = await session.grants()
            return [each.id for each in found if "opens" in each.label and each.state == "live"]

        grants = {"pubsub": pubsub}
        topics, given, again = await session.proc.call(opens, ["a", "b"], chat, grants=grants)
        assert sorted(topics) == ["a", "b"]
        assert (await topics["a"].info())["name"] == (await again.info())["name"] == "a"
        assert (await given.info())["name"] == "chat"
        ended, *_ = await session.proc.processes()
        assert ended.exit.kind == "exited"
        assert len(await granted()) == 1
        del topics, given
        gc.collect()
        assert (await again.info())["name"] == "a", "one is enough"
        del again
        gc.collect()
        async with asyncio.timeout(WITHIN_S):
            while await granted():  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.05)
        async with session.proc.at("name=b") as proc:
            topics, *_ = await proc.call(opens, ["a"], chat, grants=grants)
            assert (await topics["a"].info())["name"] == "a"
        with pytest.raises(wetware.WetwareError):
            await topics["a"].info()
        topics, _, _ = await session.proc.call(opens, ["a"], chat, grants=grants)
        (grant,) = await granted()
        await session.revoke(grant)
        with pytest.raises(wetware.errors.CapabilityError):
            await topics["a"].info()


async def test_what_a_program_offers_dies_with_it_unless_it_exits(nodes: Nodes) -> None:
    program = b"import sys, ww\nww.offer('door', ww.grant('in'))\nsys.stdin.read()"
    async with at(nodes[0]) as session:
        chat = await session.pubsub.join("chat")
        async with session.proc.spawn(program, kind="python", grants={"in": chat}) as process:
            door = await process.export("door")
            assert (await door.info())["name"] == "chat"
            with pytest.raises(NotFound, match="offers nothing named 'window'"):
                await process.export("window", wait_s=0)
            await process.kill()
            with pytest.raises(wetware.errors.CapabilityError):
                await door.info()
        async with session.proc.spawn(program, kind="python", grants={"in": chat}) as process:
            door = await process.export("door")
            await process.stdin.send_eof()
            assert (await process.wait()).kind == "exited"
            assert (await door.info())["name"] == "chat"
        async with asyncio.timeout(WITHIN_S):
            while True:
                try:
                    await door.info()
                except wetware.errors.CapabilityError:
                    break


async def test_a_member_calls_what_a_function_returned_and_passes_it_on(nodes: Nodes) -> None:
    """Their role cannot name it for `proc`: the guard of who serves it judges each call."""

    def back(given: Any) -> object:
        return given

    program = b"import sys, ww\nww.offer('door', ww.grant('in'))\nsys.stdin.read()"
    async with at(nodes[0], "ada") as ada:
        assert (await ada.whoami()).roles == ("member",)
        narrow = await ada.attenuate({"proc": (), "pubsub": ("PubSub.join", "Topic.info")})
        given = await narrow.proc.call(back, await narrow.pubsub.join("chat"))
        assert (await given.info())["name"] == "chat"
        with pytest.raises(wetware.errors.Denied, match="does not cover pubsub Topic"):
            await given.publish(data=b"no")
        wide = await narrow.proc.call(back, await ada.pubsub.join("chat"))
        await wide.publish(data=b"yes")
        chat = await ada.pubsub.join("chat")
        async with ada.proc.spawn(program, kind="python", grants={"in": chat}) as process:
            await (await process.export("door")).info()
            id_ = (await process.info()).id
            ref, grant = await ada.share({f"proc:{id_}": ()})
            seen, _ = await ada.share({f"proc:{id_}": ("Process.wait", "Process.info")})
            async with wetware.connect(ref) as guest, wetware.connect(seen) as watcher:
                door = await guest.proc.detached(id_).export("door")
                assert (await door.info())["name"] == "chat"
                with pytest.raises(wetware.errors.CapabilityError):
                    await guest.pubsub.join("chat")
                assert (await watcher.proc.detached(id_).info()).id == id_
                with pytest.raises(wetware.errors.Denied, match="does not cover proc Process"):
                    await watcher.proc.detached(id_).export("door")
                await ada.revoke(grant.id)
                with pytest.raises(wetware.errors.Revoked):
                    await door.info()
            await ada.revoke((await narrow.whoami()).grant)
        for ended in (given, wide):
            with pytest.raises(wetware.errors.CapabilityError):
                await ended.info()


COUNTER = b"""
import ww
class Counter:
    sum = 0
    def add(self, by=1):
        self.sum += by
        return self.sum
    def reset(self): self.sum = 0
ww.export("counter", Counter())
ww.serve()
"""


async def test_a_member_shares_what_their_program_serves(nodes: Nodes) -> None:
    """As far as the share goes, until it is revoked, or the program ends."""
    async with at(nodes[0], "ada") as ada, ada.proc.spawn(COUNTER, kind="python") as process:
        counter = await process.served("counter")
        assert await counter.add(by=2) == 2
        id_ = (await process.info()).id
        ref, grant = await ada.share({f"proc:{id_}": ()}, {"method": "add"})
        async with wetware.connect(ref) as guest:
            theirs = await guest.proc.detached(id_).served("counter")
            assert await theirs.add() == 3
            with pytest.raises(wetware.errors.Denied, match=r"outside of method=add"):
                await theirs.reset()
            await ada.revoke(grant.id)
            with pytest.raises(wetware.errors.Revoked):
                await theirs.add()
        await counter.reset()
        assert await counter.add() == 1
        await process.kill()
        with pytest.raises(wetware.WetwareError) as ended:
            await counter.add()
        assert ended.value.code == "proc.ended"


async def test_what_a_detached_program_serves_is_found_from_any_node(nodes: Nodes) -> None:
    async with at(nodes[0]) as session:
        made = await session.proc.start(COUNTER, kind="python", restart="always")
    async with at(nodes[1]) as session, session.proc.find(made.id) as process:
        counter = await process.served("counter")
        assert [await counter.add(), await counter.add()] == [1, 2]
        await process.restart()
        with pytest.raises(wetware.WetwareError):
            await counter.add()
        async with asyncio.timeout(WITHIN_S):
            while True:  # between two runs there is none
                try:
                    counter = await process.served("counter")
                    assert await counter.add() == 1, "it is another one"
                    break
                except wetware.WetwareError:
                    await asyncio.sleep(0.05)
        await process.kill()


async def test_packages_can_be_imported(nodes: Nodes, tmp_path: Path) -> None:
    def uses() -> str:
        import greet
        from greet.deep import word

        return f"{greet.hello()} {word}"

    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as wheel:
        wheel.writestr("greet/__init__.py", "def hello(): return 'hello'")
        wheel.writestr("greet/deep.py", "word = 'you'")
    file = tmp_path / "greet-1-py3-none-any.whl"
    file.write_bytes(data.getvalue())
    async with at(nodes[0]) as session:
        assert await session.proc.call(uses, packages=[data.getvalue()]) == "hello you"
        async with session.proc.at("any") as proc:
            assert await proc.call(uses, packages=[file]) == "hello you"
        put = await session.blob.put(file)
        async with session.blob.open(str(put.cid)) as blob:
            assert await session.proc.call(uses, packages=[blob]) == "hello you"
        with pytest.raises(FunctionFailed, match="No module named 'greet'"):
            await session.proc.call(uses)


async def test_results_come_in_order_or_as_they_come(nodes: Nodes) -> None:
    def slow(item: int) -> int:
        import time

        time.sleep(1 if item == 0 else 0)
        return item * item

    async with at(nodes[0]) as session:
        found = [each async for each in session.proc.map(slow, range(20), on="any")]
        assert found == [item * item for item in range(20)]
        mixed = [
            each async for each in session.proc.map(slow, range(20), concurrency=4, ordered=False)
        ]
        assert sorted(mixed) == found
        assert mixed[0] != 0


async def test_items_are_asked_for_as_there_is_room(nodes: Nodes) -> None:
    def same(item: int) -> int:
        return item

    asked = []

    def endless() -> Iterator[int]:
        for number in range(1 << 60):
            asked.append(number)
            yield number

    async with at(nodes[0]) as session:
        async with contextlib.aclosing(session.proc.map(same, endless(), concurrency=2)) as results:
            got = [await anext(results) for _ in range(5)]
        assert got == list(range(5))
        assert len(asked) < 5 + 5 * 2
        async with asyncio.timeout(WITHIN_S):
            while any(not each.exit.kind for each in await session.proc.processes()):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.05)


async def test_what_one_raises_ends_all(nodes: Nodes) -> None:
    def picky(item: int) -> int:
        if item == 3:
            raise LookupError(f"not {item}")
        return item

    async with at(nodes[0]) as session:
        results = session.proc.map(picky, range(100), concurrency=1)
        assert [await anext(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(FunctionFailed, match="LookupError: not 3"):
            await anext(results)


@contextlib.contextmanager
def late(nodes: Nodes, python_runner: Callable[[Path], None]) -> Iterator[NodeProcess]:
    """A fourth node, which is started in the block, and is ended by it or before."""
    home = nodes[0].home
    for path in (home.path / "d", home.path / "d" / "plugins"):
        path.mkdir(mode=0o700)
    python_runner(home.path / "d" / "plugins" / "proc")
    d = home.start_node("d", join=nodes[0], args=["--label", "zone=late"])
    try:
        yield d
    finally:
        d.stop()


async def test_a_member_that_joins_takes_part_and_one_that_leaves_does_no_longer(
    nodes: Nodes, python_runner: Callable[[Path], None]
) -> None:
    def work(item: int) -> int:
        import time

        time.sleep(0.02)
        return item

    async def there(d: NodeProcess) -> int:
        with contextlib.suppress(wetware.WetwareError):
            async with asyncio.timeout(60):
                return len([each async for each in _processes(d)])
        return 0

    async with at(nodes[0]) as session, contextlib.AsyncExitStack() as stack:
        stopped, asked = asyncio.Event(), 0

        def items() -> Iterator[int]:
            nonlocal asked
            while not stopped.is_set():
                yield asked
                asked += 1

        found = []
        results = session.proc.map(work, items(), on="any", ordered=False)
        await stack.enter_async_context(contextlib.aclosing(results))
        found.append(await anext(results))  # it goes on, without a fourth
        starting = stack.enter_context(late(nodes, python_runner))

        async def joins_and_leaves() -> None:
            async with asyncio.timeout(2 * WITHIN_S):
                await asyncio.to_thread(starting.wait_ready)
                while await there(starting) < 10:  # noqa: ASYNC110  # no event tells of it
                    await asyncio.sleep(0.1)
                await asyncio.to_thread(starting.stop)
                at_the_end = len(found)
                while len(found) < at_the_end + 50:  # noqa: ASYNC110  # like above
                    await asyncio.sleep(0.1)

        watching = asyncio.ensure_future(joins_and_leaves())
        watching.add_done_callback(lambda _: stopped.set())
        async for result in results:
            found.append(result)  # noqa: PERF401  # it is looked at meanwhile
        await watching
        assert sorted(found) == list(range(asked))


@pytest.mark.long
async def test_every_result_comes_once_though_a_node_dies(nodes: Nodes) -> None:
    """1,000 items on three nodes; one is killed with SIGKILL when a fifth has come."""

    def work(item: int) -> list[int]:
        import time

        import ww

        time.sleep(0.02)
        return [item, ww.attempt()]

    a, _, c = nodes
    async with at(a) as session:
        found: list[list[int]] = []
        before = time.monotonic()
        async for result in session.proc.map(
            work, range(1000), on="any", concurrency=12, ordered=False
        ):
            found.append(result)
            if len(found) == 200:
                ran = [each async for each in _processes(c)]
                assert len(ran) > 10, "the node that is about to die takes part"
                c.process.kill()
        assert time.monotonic() - before < 300
    assert sorted(item for item, _ in found) == list(range(1000))
    assert max(attempt for _, attempt in found) > 1, "what ran there ran again"


async def _processes(node: NodeProcess) -> AsyncIterator[object]:
    async with at(node) as session:
        for each in await session.proc.processes():
            yield each
