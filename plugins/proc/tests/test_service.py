"""The service over real RPC, on a driver of our own: who may run what, and what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.base import cbor
from wetware.errors import (
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Unsupported,
    WetwareError,
)
from wetware.testing import plugin_context
from wetware_proc import grants
from wetware_proc import process as processes
from wetware_proc.client import Executor, Exit, Process, spec_of
from wetware_proc.config import ProcConfig
from wetware_proc.driver import CodeRefused, Image, Spec
from wetware_proc.driver import Exit as Ended
from wetware_proc.service import ExecutorServant, ProcService

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
MIB = 1 << 20


class Script(Image):
    """One program of `Scripts`."""

    def __init__(self, digest: str, act: Callable[[Spec], Awaitable[Ended]]) -> None:
        super().__init__(digest, "wasm")
        self._act = act

    async def run(self, spec: Spec) -> Ended:
        return await self._act(spec)


class Scripts:
    """A driver whose programs are the names of its own methods."""

    def __init__(self) -> None:
        self.acts: list[str] = []

    async def load(self, code: bytes) -> Image:
        if not hasattr(self, code.decode(errors="replace")):
            raise CodeRefused("no such script")
        return Script(hashlib.sha256(code).hexdigest(), getattr(self, code.decode()))

    async def cat(self, spec: Spec) -> Ended:
        while data := await spec.stdin.read(1 << 16):
            if (waiting := spec.stdout(data)) is not None:
                await waiting
        spec.stderr(b"done")
        return Ended("exited", 3, cpu_s=0.25)

    async def show(self, spec: Spec) -> Ended:
        spec.stdout(repr((spec.args, dict(spec.env), spec.limits.memory_bytes)).encode())
        return Ended("exited", 0)

    async def sleep(self, spec: Spec) -> Ended:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            self.acts.append("cleaned up")
        raise AssertionError

    async def flood(self, spec: Spec) -> Ended:
        for _ in range(64):
            self.acts.append("wrote")
            if (waiting := spec.stdout(bytes(MIB))) is not None:
                await waiting
        return Ended("exited", 0)

    async def late(self, spec: Spec) -> Ended:
        spec.stdout(b"so")
        await asyncio.sleep(0.2)
        spec.stdout(b"on")
        return Ended("exited", 0)

    async def say(self, spec: Spec) -> Ended:
        """Sends what it reads to its grant, and writes the answer."""
        handles = grants.Handles(spec.grants, 10)
        while data := await spec.stdin.read(1 << 16):
            try:
                method, params = handles.message(data)
                results = await grants.call(spec.grants["out"], method, params)
                spec.stdout(handles.answer(results))
            except WetwareError as exc:
                spec.stderr(f"{exc.code}\n".encode())
        return Ended("exited", 0)

    async def bad(self, spec: Spec) -> Ended:
        raise ValueError("of the driver's own")

    async def over(self, spec: Spec) -> Ended:
        return Ended("limit", why="memory_bytes")


class World:
    """The service, and how users reach it."""

    def __init__(
        self, service: ProcService, scripts: Scripts, socket: Path, stop: Callable[[], object]
    ) -> None:
        self.service, self.scripts, self._socket, self.stop = service, scripts, socket, stop

    @contextlib.asynccontextmanager
    async def serving(self, servant: rpc.Servant) -> AsyncIterator[rpc.Ref]:
        socket = self._socket.with_name("served")
        async with (
            rpc.serve_unix(socket, lambda peer: servant),
            await rpc.connect_unix(socket) as connection,
        ):
            yield connection.bootstrap(servant.__ww_interface__)

    @contextlib.asynccontextmanager
    async def user(self, name: str) -> AsyncIterator[Executor]:
        socket = self._socket.with_name(name)  # a path of a socket is short
        async with (
            rpc.serve_unix(socket, lambda peer: ExecutorServant(self.service, name)),
            await rpc.connect_unix(socket) as connection,
        ):
            yield Executor(connection.bootstrap(Executor.INTERFACE))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    config = ProcConfig(memory_bytes_max=512 * MIB, owner_memory_bytes_max=256 * MIB)
    scripts = Scripts()
    service = ProcService(
        plugin_context(tmp_path, config, name="proc"),
        lambda: contextlib.nullcontext({"wasm": scripts}),
    )
    async with rpc.runtime(), asyncio.TaskGroup() as tasks:
        running = asyncio.Event()

        class Status:
            def started(self) -> None:
                running.set()

        task = tasks.create_task(service.run(task_status=Status()))  # type: ignore[arg-type]
        await running.wait()
        yield World(service, scripts, tmp_path / "socket", task.cancel)
        task.cancel()


async def test_a_program_reads_writes_and_says_how_it_ended(world: World) -> None:
    async with world.user("ada") as ada:
        data = bytes(range(256)) * 20_000  # more than all buffers on the way
        ran = await ada.run(b"cat", stdin=data)
        assert (ran.exit, ran.stdout, ran.stderr) == (Exit("exited", 3, ""), data, b"done")
        (info,) = await ada.processes()
        assert (info.exit.code, info.cpu_ms, info.owner) == (3, 250, "ada")
        assert (info.hash, info.kind) == (hashlib.sha256(b"cat").hexdigest(), "wasm")
    assert not world.service.table.processes


async def begun(
    ada: Executor, script: bytes, stdin: bytes = b"", wait_s: float = 20.0, more: bool = False
) -> dict[str, Any]:
    """`Image.spawn` of proc.capnp."""
    image = await ada.load(script)
    given = {"spec": spec_of("it", (), {}, "", []), "input": stdin, "more": more}
    reply: dict[str, Any] = await image._ref.call("spawn", **given, wait_s=wait_s)
    return reply


async def test_what_ends_soon_is_told_in_one_answer(world: World) -> None:
    async with world.user("ada") as ada:
        data = bytes(100_000)
        reply = await begun(ada, b"cat", data)
        assert reply["exit"] == {"kind": "exited", "code": 3, "why": ""}
        assert (reply["output"], reply["errors"]) == (data, b"done")
        assert reply["stdout"] is reply["stderr"] is None
        with pytest.raises(LimitExceeded, match="INPUT_BYTES_MAX"):
            await begun(ada, b"cat", bytes((256 << 10) + 1))
        assert (await begun(ada, b"over"))["exit"]["why"] == "memory_bytes"


async def test_what_never_reads_and_ends_soon_is_told_in_one_answer(world: World) -> None:
    async with world.user("ada") as ada:
        reply = await begun(ada, b"show", more=True)
        assert (reply["exit"]["kind"], reply["stdin"], reply["stdout"]) == ("exited", None, None)
        process = Process(reply)
        with pytest.raises(Disconnected, match="no more input"):
            await process.stdin.send(b"x")
        assert [len(data) async for data in process.stdout] == [len(reply["output"])]
        assert [data async for data in process.stderr] == []
        for stream in (process.stdin, process.stdout, process.stderr):
            await stream.aclose()


async def test_what_waits_for_its_input_has_streams_at_once(world: World) -> None:
    async with world.user("ada") as ada:
        async with asyncio.timeout(15):  # less than `wait_s`
            process = Process(await begun(ada, b"cat", b"a", more=True))
        await process.stdin.send(b"b")
        await process.stdin.send_eof()
        assert b"".join([data async for data in process.stdout]) == b"ab"
        assert await process.wait() == Exit("exited", 3, "")


async def test_what_runs_on_or_says_much_has_streams(world: World) -> None:
    async with world.user("ada") as ada:
        for script, wait_s, size in ((b"late", 0.05, 4), (b"flood", 20.0, 64 * MIB)):
            async with asyncio.timeout(15):  # less than `wait_s`
                reply = await begun(ada, script, wait_s=wait_s)
            assert (reply["exit"]["kind"], reply["output"]) == ("", b"")
            process = Process(reply)
            assert sum([len(data) async for data in process.stdout]) == size
            assert await process.wait() == Exit("exited", 0, "")


async def test_who_cancels_or_is_gone_ends_what_it_waits_for(world: World) -> None:
    async with world.user("ada") as ada:
        waiting = asyncio.ensure_future(begun(ada, b"sleep"))
        await until(lambda: world.service.table.processes)
        waiting.cancel()
        await until(lambda: not world.service.table.processes)
        running = asyncio.ensure_future(ada.run(b"sleep"))
        await until(lambda: world.service.table.processes)
    await until(lambda: not world.service.table.processes)
    with pytest.raises(Disconnected):
        await running


async def test_one_that_is_killed_with_much_unread_is_told_of(world: World) -> None:
    async with world.user("ada") as ada:
        waiting = asyncio.ensure_future(begun(ada, b"flood"))
        process = Process(await waiting)
        (running,) = world.service.table.processes.values()
        running.kill("enough")
        assert await process.wait() == Exit("killed", 0, "enough")


async def test_a_program_has_its_arguments_and_environment_and_no_more(world: World) -> None:
    async with world.user("ada") as ada:
        ran = await ada.run(b"show", "a", "b\n", env={"X": "1=2"}, name="it", memory_bytes=2 * MIB)
        assert ran.stdout == repr((("it", "a", "b\n"), {"X": "1=2"}, 2 * MIB)).encode()
        with pytest.raises(InvalidArgument):
            await ada.run(b"show", "a\0b")
        with pytest.raises(InvalidArgument, match="255"):
            await ada.run(b"show", name="n" * 256)
        with pytest.raises(InvalidArgument, match="memory_bytes"):
            await ada.run(b"show", memory_bytes=1)
    assert not world.service.table._memory


async def test_what_is_no_program_is_refused(world: World) -> None:
    async with world.user("ada") as ada:
        with pytest.raises(WetwareError, match="no such script") as refused:
            await ada.load(b"nothing")
        assert refused.value.code == "proc.code"
        with pytest.raises(WetwareError, match="no programs of the kind 'rust'") as refused:
            await ada.load(b"cat", "rust")
        assert (refused.value.code, refused.value.hint) == ("unsupported.driver", "it runs wasm")
        with pytest.raises(InvalidArgument, match="cannot read"):
            await ada.load(Path("/nowhere/at/all"))


async def test_kill_returns_once_nothing_more_can_happen(world: World) -> None:
    async with world.user("ada") as ada, ada.spawn(b"sleep") as process:
        await process.kill()
        assert world.scripts.acts == ["cleaned up"]
        assert await process.wait() == Exit("killed", 0, "by ada")
        await process.kill()


async def test_a_second_kill_does_not_disturb_the_clean_up(world: World) -> None:
    async with world.user("ada") as ada, ada.spawn(b"sleep") as process:
        (running,) = world.service.table.processes.values()
        await asyncio.sleep(0.01)
        for why in ("first", "second"):
            running.kill(why)
            await asyncio.sleep(0.01)
        assert await process.wait() == Exit("killed", 0, "first")
        assert world.scripts.acts == ["cleaned up"]


async def test_who_lets_go_of_a_process_ends_it(world: World) -> None:
    async with world.user("ada") as ada:
        async with ada.spawn(b"sleep"):
            assert len(world.service.table.processes) == 1
        await until(lambda: not world.service.table.processes)
        (info,) = await ada.processes()
        assert info.exit.kind == "killed"


async def test_a_lost_client_ends_its_processes(world: World) -> None:
    async with world.user("ada") as ada, contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(ada.spawn(b"sleep"))
        stack.pop_all()  # nobody says goodbye
    await until(lambda: not world.service.table.processes)


async def test_a_slow_reader_holds_its_program_up_and_a_kill_does_not_wait(world: World) -> None:
    async with world.user("ada") as ada, ada.spawn(b"flood") as process:
        await asyncio.sleep(0.3)
        assert 0 < len(world.scripts.acts) < 8
        await process.kill()
        assert (await process.wait()).kind == "killed"


async def test_a_slow_reader_gets_all_before_the_end_is_told(world: World) -> None:
    async with world.user("ada") as ada, ada.spawn(b"flood") as process:
        count = 0
        async for data in process.stdout:
            assert (await process.info()).exit.kind == "" or count > 60 * MIB
            count += len(data)
        assert count == 64 * MIB
        assert await process.wait() == Exit("exited", 0, "")


async def test_an_end_at_a_limit_and_a_fault_of_ours_are_told(world: World) -> None:
    async with world.user("ada") as ada:
        assert (await ada.run(b"over")).exit == Exit("limit", 0, "memory_bytes")
        lost = (await ada.run(b"bad")).exit
        assert lost.kind == "lost"
        assert "driver's own" not in lost.why


async def test_nobody_sees_or_ends_what_is_another_ones(world: World) -> None:
    async with world.user("ada") as ada, world.user("bob") as bob, ada.spawn(b"sleep") as process:
        id_ = (await process.info()).id
        assert await bob.processes() == []
        with pytest.raises(NotFound):
            await bob.kill(id_)
        assert [each.id for each in await bob.processes(all=True)] == [id_]  # an operator's
        await bob.kill(id_, anybody=True)
        assert await process.wait() == Exit("killed", 0, "by bob")


async def test_memory_is_promised_and_given_back(world: World) -> None:
    async with world.user("ada") as ada, world.user("bob") as bob:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(ada.spawn(b"sleep", memory_bytes=128 * MIB))
            with pytest.raises(LimitExceeded) as refused:
                await ada.run(b"show")
            assert refused.value.code == "limit.proc_memory"
            await bob.run(b"show", memory_bytes=256 * MIB)
        await until(lambda: not world.service.table.processes)
        await ada.run(b"show", memory_bytes=256 * MIB)
    assert not world.service.table._memory
    assert not world.service.table.places


async def test_what_has_ended_is_forgotten_in_time_and_nobody_pushes_out_anothers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wetware_proc.table.ENDED_MAX", 4)
    async with world.user("ada") as ada, world.user("bob") as bob:
        (first,) = [await bob.run(b"over") for _ in range(1)]
        assert first.exit.kind == "limit"
        image = await ada.load(b"over")
        for number in range(6):
            async with image.spawn(str(number), name=str(number)) as process:
                await process.wait()
        assert [each.name for each in await ada.processes()] == ["5", "4", "3"]
        assert len(await bob.processes()) == 1


async def test_processes_are_told_in_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wetware_proc.service.PAGE_MAX", 3)
    async with world.user("ada") as ada:
        image = await ada.load(b"over")
        for number in range(8):
            async with image.spawn(name=str(number)) as process:
                await process.wait()
        for everybodys in (False, True):
            found = await ada.processes(all=everybodys)
            assert [each.name for each in found] == [str(number) for number in range(7, -1, -1)]
        page = await ada._ref.call("processes", skip=2, limit=1_000_000)
        assert ([each["name"] for each in page["processes"]], page["matched"]) == (
            ["5", "4", "3"], 8,
        )  # fmt: skip


async def test_a_source_that_lies_of_its_size_is_refused(world: World) -> None:
    class Liar(rpc.Servant, interface=rpc.WW.Source):
        async def stat(self) -> dict[str, int]:
            return {"size": 3}

        async def read(self, start: int, end: int) -> dict[str, object]:
            stream = rpc.ByteStream()
            asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self.send(stream)))
            return {"stream": stream.servant}

        async def send(self, stream: rpc.ByteStream) -> None:
            await stream.send(b"show")
            await stream.send_eof()

    async with world.user("ada") as ada:
        with pytest.raises(InvalidArgument, match="another length"):
            await ada._ref.call("load", code=Liar())


async def test_a_node_that_stops_ends_what_runs_and_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "FLUSH_S", 0.1)
    async with world.user("ada") as ada, ada.spawn(b"flood") as process:
        await asyncio.sleep(0.1)
        world.stop()
        assert await process.wait() == Exit("killed", 0, "the node stops")
        with pytest.raises(Disconnected):
            await ada.run(b"show")


async def test_a_kill_before_the_first_step_is_not_lost(world: World) -> None:
    image = await world.scripts.load(b"sleep")
    process = await world.service.start("ada", image, EMPTY)
    process.kill("at once")
    exit_ = await process.wait(60)
    assert exit_ is not None
    assert (exit_.kind, exit_.why) == ("killed", "at once")
    assert world.scripts.acts == []


async def test_a_source_that_never_sends_gives_its_place_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(rpc.Servant, interface=rpc.WW.Source):
        async def stat(self) -> dict[str, int]:
            return {"size": 3}

        async def read(self, start: int, end: int) -> dict[str, object]:
            return {"stream": rpc.ByteStream().servant}

    monkeypatch.setattr("wetware_proc.service.READ_S", 0.1)
    async with world.user("ada") as ada:
        async with asyncio.timeout(60):
            with pytest.raises(LimitExceeded, match="READ_S"):
                await ada._ref.call("load", code=Silent())
    assert not world.service.table.places


async def test_what_has_ended_holds_no_code_arguments_or_environment(world: World) -> None:
    async with world.user("ada") as ada:
        await ada.run(b"show", "a" * 1000, env={"X": "1"}, name="it")
    (ended,) = world.service.table.ended.values()
    assert (ended.spec.args, ended.spec.env) == (("it",), {})
    assert ended._image is None


EMPTY = {
    "name": "",
    "args": [],
    "env": [],
    "limits": {"memory_bytes": 0, "wall_s": 0.0, "cpu_s": 0.0},
    "grants": [],
    "named": [],
    "dirs": [],
    "ports": [],
    "code": "",
}


@pytest.fixture
def echo(tmp_path: Path) -> rpc.Interface:
    path = tmp_path / "echo.capnp"
    path.write_text(
        """@0xe0a4f6b3c18e2796;
        interface Echo {
          say @0 (data :Data, times :UInt8) -> (data :Data, many :List(Text));
        }"""
    )
    return rpc.load(path).Echo


async def test_a_program_calls_what_it_was_given_and_nothing_else(
    world: World, echo: rpc.Interface
) -> None:
    class EchoServant(rpc.Servant, interface=echo):
        async def say(self, data: bytes, times: int) -> dict[str, object]:
            return {"data": data * times, "many": ["a"]}

    async def ask(process: Process, message: object) -> object:
        await process.stdin.send(cbor.encode(message))
        return cbor.decode(await process.stdout.receive(), bytes_max=1000)

    async with world.user("ada") as ada, world.serving(EchoServant()) as ref:
        async with ada.spawn(b"say", grants={"out": ref}) as process:
            answer = await ask(process, ["say", {"data": b"ab", "times": 2}])
            assert answer == {"data": b"abab", "many": ["a"]}
            for message, code in (
                (["none", {}], "unsupported"),
                (["say", {"data": 5}], "invalid"),
                (["say"], "invalid"),
                ({}, "invalid"),
            ):
                await process.stdin.send(cbor.encode(message))
                assert (await process.stderr.receive()).startswith(code.encode()), message
        image = await ada.load(b"say")
        unknown = {"name": "out", "ref": ref, "interface": 5}
        with pytest.raises(Unsupported, match="does not know"):
            await image._ref.call("spawn", spec={**EMPTY, "grants": [unknown]})
        for bad in ({"": ref}, {"n" * 65: ref}):
            with pytest.raises(InvalidArgument, match="cannot name a grant"):
                await ada.run(b"say", grants=bad)
        with pytest.raises(InvalidArgument, match="no capability"):
            await ada.run(b"say", grants={"out": 5})


async def until(condition: object) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while not condition():  # type: ignore[operator]
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)
