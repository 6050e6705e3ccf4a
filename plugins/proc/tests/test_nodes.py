"""Programs at real nodes, by `ww run` and by the client library."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import wetware
from wetware.errors import EXIT_PIPE, EXIT_USAGE, NotFound
from wetware.testing import Home, NodeProcess, wait_for
from wetware_proc.client import Exit

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]


@pytest.fixture
def program(guests: Callable[[str], bytes], tmp_path: Path) -> Callable[[str], str]:
    """The path of a guest's module."""

    def path(name: str) -> str:
        file = tmp_path / f"{name}.wasm"
        file.write_bytes(guests(name))
        return str(file)

    return path


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    with Home(tmp_path / "home", libp2p=False) as home, home.node() as node:
        yield node


@contextlib.asynccontextmanager
async def at(node: NodeProcess) -> AsyncIterator[wetware.Session]:
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        yield session


def running(node: NodeProcess) -> list[dict[str, object]]:
    found = json.loads(node.ww("ps", "--json", check=True).stdout)["processes"]
    return [each for each in found if not each["exit"]["kind"]]


def test_a_program_is_wired_as_a_local_one(
    node: NodeProcess, program: Callable[[str], str], tmp_path: Path
) -> None:
    text = "ä 1234567\n" * 300_000  # more than all buffers on the way
    done = node.ww("run", program("cat"), "told", input=text)
    assert (done.returncode, done.stdout == text, done.stderr) == (0, True, "told\n")
    missing = node.ww("run", "no-such-file.wasm")
    assert missing.returncode == EXIT_USAGE
    assert "there is no file" in missing.stderr
    (tmp_path / "bad.wasm").write_bytes(b"#!/bin/sh")
    bad = node.ww("run", str(tmp_path / "bad.wasm"))
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr
    spun = node.ww("run", "--cpu", "0.2", program("hostile"), "spin")
    assert (spun.returncode, "limit: cpu_s" in spun.stderr) == (137, True), spun.stderr


def test_a_reader_that_goes_ends_the_program(
    node: NodeProcess, program: Callable[[str], str]
) -> None:
    with open("/dev/zero") as zeros, node.start_ww("run", program("cat"), stdin=zeros) as run:
        assert run.stdout is not None
        assert len(run.stdout.read(1000)) == 1000
        run.stdout.close()
        assert run.wait(timeout=60) == EXIT_PIPE
    wait_for(lambda: not running(node), "the program has ended")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_an_end_of_the_command_ends_the_program(
    node: NodeProcess, program: Callable[[str], str], number: signal.Signals
) -> None:
    with node.start_ww("run", program("cat")) as run:
        wait_for(lambda: running(node), "it runs")
        run.send_signal(number)
        code = run.wait(timeout=60)
    assert code == (130 if number == signal.SIGINT else -number)
    wait_for(lambda: not running(node), "the program has ended")


def test_ps_and_kill(node: NodeProcess, program: Callable[[str], str]) -> None:
    with node.start_ww("run", "--name", "cat", program("cat")) as run:
        (found,) = wait_for(lambda: running(node), "it runs")
        assert (found["name"], "cat" in node.ww("ps").stdout) == ("cat", True)
        node.ww("kill", str(found["id"]), check=True)
        assert run.wait(timeout=60) == 137
    assert "killed" in node.ww("ps", "--all").stdout
    assert node.ww("kill", "0" * 16).returncode != 0


async def test_a_program_publishes_what_it_may_until_that_is_revoked(
    node: NodeProcess, guests: Callable[[str], bytes]
) -> None:
    code = guests("tell")
    async with at(node) as session, at(node) as other:
        weaker = await session.attenuate({"pubsub:chat": ()}, label="the guest's")
        topic = await weaker.pubsub.join("chat")
        async with (
            (await other.pubsub.join("chat")).subscribe() as messages,
            session.proc.spawn(code, grants={"out": topic}) as process,
        ):
            await process.stdin.send(b"from within\n")
            assert (await anext(aiter(messages))).data == b"from within"
            assert await process.stdout.receive() == b"0 \n"
            await session.revoke(weaker.identity.grant)
            await process.stdin.send(b"too late\n")
            assert (await process.stdout.receive()).startswith(b"-1 capability.revoked")
            await process.stdin.send_eof()
            assert await process.wait() == Exit("exited", 0, "")


async def test_what_came_of_a_grant_ends_with_it(
    node: NodeProcess, guests: Callable[[str], bytes]
) -> None:
    """A blob that a program opened itself, at the store that it was given."""
    async with at(node) as session:
        cid = (await session.blob.put(b"content")).cid
        weaker = await session.attenuate({"blob": ()}, label="the guest's")
        grants = {"store": await weaker.open("blob", type(session.blob).INTERFACE)}
        async with session.proc.spawn(guests("caps"), "blob", cid, grants=grants) as process:
            assert await process.stdout.receive() == b"0 \n"
            await process.stdin.send(b"\n")
            assert await process.stdout.receive() == b"0 \n"
            await session.revoke(weaker.identity.grant)
            await process.stdin.send(b"\n")
            assert await process.stdout.receive() == b"-76 capability.revoked\n"
            await process.stdin.send_eof()
            assert await process.wait() == Exit("exited", 0, "")


def test_a_grant_on_the_command_line(node: NodeProcess, program: Callable[[str], str]) -> None:
    with node.start_ww("sub", "chat", "-n", "1") as sub:
        node.wait_log("service=pubsub")
        given = "out=pubsub:chat"
        tell = program("tell")

        def told() -> bool:
            node.ww("run", "--grant", given, tell, input="hello\n", check=True)
            return sub.poll() is not None

        wait_for(told, "the message has come")
        assert sub.stdout is not None
        assert sub.stdout.read() == "hello\n"
    refused = node.ww("run", "--grant", "out=nothing:chat", tell, input="")
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    none = node.ww("run", tell, input="hello\n", check=True)
    assert none.stdout.startswith("-1"), "what was not given cannot be called"


async def test_a_name_of_the_cluster_is_a_program_and_a_directory(
    node: NodeProcess, program: Callable[[str], str], tmp_path: Path
) -> None:
    """Whatever files there are here, of its own name or of that of what it stands for."""
    content = tmp_path / "content"
    content.mkdir()
    (content / "x").write_text("of the blob\n")
    code = Path(program("data"))
    for name, what in (("/tools/data.wasm", code), ("/content", content)):
        cid = node.ww("blob", "put", str(what), check=True).stdout.strip()
        node.ww("name", "set", name, cid, check=True)
        for path in (node.home.path / f"name:{name}", node.home.path / cid):
            path.mkdir(parents=True)  # where commands begin
    for how in (("name:/content", "name:/tools/data.wasm"), (str(content), str(code))):
        ran = node.ww("run", "--dir", f"/data={how[0]}", how[1], "/data", check=True)
        assert ran.stdout.startswith("of the blob\n"), ran
    async with at(node) as session:
        async with session.proc.at("any", "name:/tools/data.wasm") as there:
            ran_there = await there.run(
                "name:/tools/data.wasm", "/data", dirs={"/data": "name:/content"}
            )
        assert ran_there.stdout.startswith(b"of the blob\n")
        made = await session.proc.start(
            "name:/tools/data.wasm", "/data", dirs={"/data": "name:/content"}
        )
        assert (await made.wait()).kind == "exited"
        assert [each.name for each in await session.proc.processes()] == ["data.wasm"] * 4
    none = node.ww("run", "name:/tools/none")
    assert (none.returncode, "there is no name /tools/none" in none.stderr) == (1, True)


async def test_code_of_one_node_runs_at_another_for_a_client_of_a_third(
    tmp_path: Path, guests: Callable[[str], bytes]
) -> None:
    program = guests("tell")  # compiling takes a while
    with Home(tmp_path / "home", libp2p=False) as home, contextlib.ExitStack() as stack:
        first = stack.enter_context(home.node("n0"))
        nodes = [first]
        for name in ("n1", "n2"):
            nodes.append(home.start_node(name, join=first))
            stack.callback(nodes[-1].stop)
            nodes[-1].wait_ready()
        for node in nodes:
            node.wait_members([other.peer_id for other in nodes if other is not node])
        a, b, c = nodes
        async with at(c) as session:
            cid = (await session.blob.put(program)).cid
        async with at(b) as session, session.node(str(a.peer_id)) as there:
            async with there.blob.open(cid) as code:
                topic = await there.pubsub.join("chat")
                async with (
                    at(c) as listener,
                    (await listener.pubsub.join("chat")).subscribe() as messages,
                    there.proc.spawn(code.ref, grants={"out": topic}) as process,
                ):
                    async with asyncio.timeout(60):
                        incoming = asyncio.ensure_future(anext(aiter(messages)))
                        while not incoming.done():  # the subscription has to reach A
                            await process.stdin.send(b"hello\n")
                            await process.stdout.receive()
                            await asyncio.sleep(0.1)
                    assert incoming.result().data == b"hello"
                    assert incoming.result().publisher == a.peer_id
                    (info,) = await there.proc.processes()
                    assert info.hash == hashlib.sha256(program).hexdigest()
            assert await session.proc.processes() == [], "it did not run at B"
        async with at(b) as session:
            with pytest.raises(NotFound):
                await session.proc.kill(info.id)


async def test_after_kill_9_of_the_node_nothing_is_shown_as_running(
    tmp_path: Path, guests: Callable[[str], bytes]
) -> None:
    cat, hello = guests("cat"), guests("hello")
    with Home(tmp_path / "home", libp2p=False) as home:
        with home.node("n") as node:
            async with at(node) as session, contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(session.proc.spawn(cat))
                assert len(running(node)) == 1
                node.stop(signal.SIGKILL)
                stack.pop_all()
        with home.node("n") as node:
            found = json.loads(node.ww("ps", "--json", check=True).stdout)
            assert found == {"processes": [], "missing": []}
            async with at(node) as session:
                assert (await session.proc.run(hello)).stdout == b"hello\n"
