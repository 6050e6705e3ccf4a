"""Lives: of objects, calls, connections, sockets, and of pycapnp's loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pickle
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.client import LocalNode, dial
from wetware.errors import (
    Busy,
    ConfigError,
    DialError,
    Disconnected,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    TimedOut,
    WetwareError,
)
from wetware.identity import Key
from wetware.rpc import kjloop, unix

pytestmark = pytest.mark.anyio


# --- objects
# ------------------------------------------------------------------------------------------


async def test_dropping_the_last_reference_releases(
    serving: Any, servants: Any, tools: Any
) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        cell = (await zoo.make(value=b"1"))["cell"]
        twin = cell.cast(cell.interface)
        (made,) = servant.made
        await zoo.nothing()
        cell.close()
        assert cell.closed
        assert await twin.get() == {"value": b"1"}
        with pytest.raises(InvalidArgument, match="closed"):
            await cell.get()
        assert made.releases == 0
        del twin
        await tools.until(lambda: made.releases == 1)
        cell.close()


async def test_an_object_that_is_kept_elsewhere_is_not_released(
    serving: Any, servants: Any, tools: Any
) -> None:
    servant = servants.Zoo()
    shared = servants.Cell(b"shared")
    servant.cell = shared
    async with serving(servant) as one, serving(servant, name="two") as two:
        first, second = (await one.kept())["cell"], (await two.kept())["cell"]
        third = (await one.kept())["cell"]
        first.close()
        third.close()
        await one.nothing()
        assert shared.releases == 0
        assert await second.get() == {"value": b"shared"}
        second.close()
        await tools.until(lambda: shared.releases == 1)
        again = (await one.kept())["cell"]
        again.close()
        await tools.until(lambda: shared.releases == 2)


async def test_the_end_of_a_connection_releases(serving: Any, servants: Any, tools: Any) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        cell = (await zoo.make(value=b""))["cell"]
        hanging = asyncio.create_task(zoo.hang())
        await tools.until(lambda: servant.running == 1)
        zoo._end.transport.abort()
        await tools.until(lambda: servant.made[0].releases == 1 and servant.releases == 1)
        assert servant.cancelled == 1
        with pytest.raises(Disconnected):
            await hanging
        assert cell.closed


@pytest.mark.parametrize("case", ["exports", "nested", "bytes", "type", "defect"])
async def test_an_answer_that_fails_releases_what_it_held(
    serving: Any, servants: Any, tools: Any, case: str
) -> None:
    class Odd(servants.Zoo):  # type: ignore[misc, name-defined]
        def fresh(self) -> Any:
            self.made.append(servants.Cell())
            return self.made[-1]

        async def make(self, value: bytes) -> Any:
            match case:
                case "type":
                    cell = self.fresh()
                    return [cell, (cell, self.fresh())]  # told once of it
                case "bytes":
                    return {"cell": self.fresh(), "data": bytes(100)}  # no such field
                case _:
                    return {"cell": rpc.guarded(self.fresh(), None), "more": {"x": [self.fresh()]}}

        async def nothing(self) -> Any:
            return {"cell": self.fresh()} if case == "defect" and not self.made else None

        async def echo(self, **everything: Any) -> Any:
            inner = {"name": "name", "cell": self.fresh()}
            return {"cells": [self.fresh(), self.fresh()], "inner": inner, "place": {"cell": None}}

    zoo_of = servants.Zoo if case == "exports" else Odd
    servant = zoo_of()
    async with serving(servant, limits=rpc.RpcLimits(exports_max=4)) as zoo:
        call = {
            "exports": lambda: zoo.make_many(count=6),  # 3 of them are exported first
            "nested": zoo.echo,
            "defect": zoo.nothing,
        }.get(case, lambda: zoo.make(value=b""))
        with pytest.raises((LimitExceeded, InternalError)):
            await call()
        made = servant.made
        assert made
        await tools.until(lambda: all(cell.releases for cell in made))
        await zoo.nothing()
        assert [cell.releases for cell in made] == [1] * len(made)


async def test_an_answer_that_is_cancelled_while_it_waits_releases(
    serving: Any, servants: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wetware.rpc.pipes._KERNEL_BYTES", 64 << 10)  # less than two results
    servant = servants.Zoo()
    async with serving(servant, limits=rpc.RpcLimits(result_bytes_out_max=100_000)) as zoo:
        await zoo.nothing()
        zoo._end.transport._pipe.pause()  # reads no more, so that results have to wait
        (end,) = [e for e in _ends() if e is not zoo._end]
        filling = [asyncio.create_task(zoo.big(bytes=900_000)) for _ in range(2)]
        await tools.until(end.results_wait)
        calls = [asyncio.create_task(zoo.make(value=b"")) for _ in range(3)]
        await tools.until(lambda: len(servant.made) == 3)
        calls[1].cancel()
        await tools.until(lambda: servant.made[1].releases == 1)
        assert [cell.releases for cell in servant.made] == [0, 1, 0]
        zoo._end.transport._pipe.resume()
        await asyncio.gather(*filling)
        first = (await calls[0])["cell"]
        assert await first.get() == {"value": b""}
        zoo._end.transport._pipe.pause()
        filling = [asyncio.create_task(zoo.big(bytes=900_000)) for _ in range(2)]
        await tools.until(end.results_wait)
        last = asyncio.create_task(zoo.make(value=b""))
        await tools.until(lambda: len(servant.made) == 4)
        zoo._end.transport.abort()  # with the connection, too
        await asyncio.gather(*filling, calls[2], last, return_exceptions=True)
        await tools.until(lambda: all(cell.releases for cell in servant.made))
        assert [cell.releases for cell in servant.made] == [1] * 4


async def test_a_call_that_is_cancelled_at_any_moment_releases(
    serving: Any, servants: Any, tools: Any
) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        await zoo.nothing()
        for turns in range(40):
            call = asyncio.create_task(zoo.make(value=b""))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            del call
        await zoo.nothing()
        assert servant.made
        await tools.until(lambda: all(cell.releases for cell in servant.made))
        assert [cell.releases for cell in servant.made] == [1] * len(servant.made)


async def test_released_may_be_a_coroutine_and_may_fail(
    serving: Any, servants: Any, schema: rpc.Schema, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ended = []

    class Cell(servants.Cell):  # type: ignore[misc, name-defined]
        async def released(self) -> None:
            await asyncio.sleep(0)
            ended.append(self.value)
            if self.value == b"bad":
                raise ValueError("in released")

    servant = servants.Zoo()
    async with serving(servant) as zoo:
        for value in (b"good", b"bad"):
            servant.cell = Cell(value)
            (await zoo.kept())["cell"].close()
        await tools.until(lambda: len(ended) == 2)
        assert await zoo.nothing() is None
    assert [r.getMessage() for r in caplog.records] == ["servant.release_failed"]


async def test_results_do_not_pin_their_message(serving: Any, servants: Any, tools: Any) -> None:
    """A capability from a large answer does not keep the answer alive at the peer."""
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        kept = [(await zoo.make(value=b""))["cell"] for _ in range(20)]
        await zoo.nothing()
        (end,) = [e for e in _ends() if e is not zoo._end]
        await tools.until(lambda: len(end.transport._answers) <= 1)
        assert await kept[0].get() == {"value": b""}


async def test_no_garbage_is_left_by_calls(serving: Any, servants: Any) -> None:
    """Neither good nor failing calls make cycles, so that references are released at once."""
    async with serving(servants.Zoo()) as zoo:

        async def calls() -> None:
            await zoo.data(data=b"x")
            (await zoo.make(value=b""))["cell"].close()
            for bad in (zoo.fail(how="denied"), zoo.data(data=5), zoo.fail(how="code")):
                with contextlib.suppress(WetwareError, TypeError):
                    await bad
            with rpc.time_limit(0.001), contextlib.suppress(WetwareError):
                await zoo.hang()
            hanging = asyncio.ensure_future(zoo.hang())
            await zoo.nothing()
            hanging.cancel()
            await asyncio.wait([hanging])

        for _ in range(5):
            await calls()
        gc.collect()
        before = set(map(id, gc.get_objects()))  # a thread may let go of an earlier test's now
        gc.disable()
        try:
            gc.set_debug(gc.DEBUG_SAVEALL)
            for _ in range(10):
                await calls()
            await zoo.nothing()
            gc.collect()
            made_of = ("wetware.rpc", "capnp")
            made = [x for x in gc.garbage if id(x) not in before]
            ours = [x for x in made if type(x).__module__.startswith(made_of)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert ours == []


def _ends() -> list[Any]:
    return [end for runtime in kjloop._runtimes.values() for end in runtime.connections]


# --- calls
# --------------------------------------------------------------------------------------------


async def test_cancelling_a_call_cancels_the_method(
    serving: Any, servants: Any, tools: Any
) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        task = asyncio.create_task(zoo.hang())
        await tools.until(lambda: servant.running == 1)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await tools.until(lambda: servant.cancelled == 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await zoo.hang()
        await tools.until(lambda: servant.cancelled == 2 and servant.running == 0)


async def test_a_call_that_is_not_answered_in_time_ends_here_and_there(
    serving: Any, servants: Any, tools: Any
) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        zoo.connection.timeout_s = 0.02
        for count in (1, 2):
            with pytest.raises(TimedOut, match=r"Zoo.hang: no answer within 0.02 s"):
                await zoo.hang()
            await tools.until(lambda count=count: servant.cancelled == count)
        with rpc.time_limit(None):  # for ever, whatever the connection says
            waiting = asyncio.create_task(zoo.hang())
        await tools.until(lambda: servant.running == 1)
        zoo.connection.timeout_s = None
        with rpc.time_limit(0.02), pytest.raises(TimedOut):
            await zoo.hang()
        assert not waiting.done()
        servant.go.set()
        await waiting
        with rpc.time_limit(60):
            cancelled = asyncio.create_task(zoo.hang())
            cancelled.cancel()
            await asyncio.wait([cancelled])
        assert cancelled.cancelled(), "a cancellation is no end of the time"


async def test_a_call_waits_for_no_other(serving: Any, servants: Any, tools: Any) -> None:
    servant = servants.Zoo()
    async with serving(servant) as zoo:
        hanging = asyncio.create_task(zoo.hang())
        await tools.until(lambda: servant.running == 1)
        assert await zoo.data(data=b"1") == {"data": b"1"}
        servant.go.set()
        await hanging


async def test_calls_in_both_directions(serving: Any, servants: Any) -> None:
    servant, mine = servants.Zoo(), servants.Zoo()
    async with serving(servant) as zoo:
        cell = (await zoo.relay(zoo=mine))["cell"]
        assert await cell.get() == {"value": b"relayed"}
        assert len(mine.made) == 1
        assert (await zoo.use(cell=cell))["value"] == b"relayed"


async def test_a_ref_is_bound_to_its_loop(serving: Any, servants: Any) -> None:
    async with serving(servants.Zoo()) as zoo:
        caught: list[BaseException] = []

        def elsewhere() -> None:
            try:
                asyncio.run(zoo.nothing())
            except BaseException as exc:
                caught.append(exc)
            try:
                zoo.close()
            except BaseException as exc:
                caught.append(exc)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert [e.code for e in caught] == ["rpc.wrong_loop"] * 2  # type: ignore[attr-defined]
        assert await zoo.nothing() is None
        with pytest.raises(TypeError, match="cannot be copied"):
            pickle.dumps(zoo)


# --- connections and the unix socket
# -----------------------------------------------------------------


async def test_the_socket_is_private(serving: Any, servants: Any, tmp_path: Path) -> None:
    async with serving(servants.Zoo()):
        mode = (tmp_path / "s").stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert not (tmp_path / "s").exists()


async def test_bootstrap_learns_who_connects(
    schema: rpc.Schema, servants: Any, tmp_path: Path
) -> None:
    peers: list[rpc.UnixPeer] = []

    def bootstrap(peer: rpc.UnixPeer) -> rpc.Servant:
        peers.append(peer)
        return servants.Zoo()  # type: ignore[no-any-return]

    async with (
        rpc.serve_unix(tmp_path / "s", bootstrap),
        await rpc.connect_unix(tmp_path / "s") as connection,
    ):
        await connection.bootstrap(schema.Zoo).nothing()
    assert peers == [rpc.UnixPeer(os.getuid(), os.getgid(), os.getpid())]


async def test_strangers_are_refused(
    schema: rpc.Schema, servants: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = rpc.UnixPeer(uid=os.geteuid() + 4711, gid=0, pid=1)
    async with rpc.serve_unix(tmp_path / "s", lambda _peer: servants.Zoo()):
        monkeypatch.setattr(unix, "_peer_of", lambda _sock: stranger)
        with pytest.raises(DialError, match="served by another user"):
            await rpc.connect_unix(tmp_path / "s")
        monkeypatch.setattr(unix, "_trusted", lambda peer: peer.pid != 1)
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_too_many_clients(schema: rpc.Schema, servants: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with (
        rpc.serve_unix(path, lambda _peer: servants.Zoo(), connections_max=2),
        await rpc.connect_unix(path) as one,
        await rpc.connect_unix(path) as two,
    ):
        for connection in (one, two):
            await connection.bootstrap(schema.Zoo).nothing()
        async with await rpc.connect_unix(path) as three:
            with pytest.raises(LimitExceeded, match="2 programs of this machine are logged in"):
                await three.bootstrap(schema.Zoo).nothing()
        await one.bootstrap(schema.Zoo).nothing()


async def test_nobody_listens(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    for name in ("missing", "stale", "file", "file/below"):
        with pytest.raises(DialError, match="no node answers") as caught:
            await rpc.connect_unix(tmp_path / name)
        assert "ww node" in caught.value.hint
    with pytest.raises(DialError, match="too long"):
        await rpc.connect_unix(tmp_path / ("x" * 120))
    assert kjloop._runtimes == {}


async def test_the_place_is_taken(serving: Any, servants: Any, tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "s"))
    stale.close()
    async with serving(servants.Zoo()) as zoo:  # a dead process's socket is replaced
        await zoo.nothing()
        with pytest.raises(Busy, match="another process listens"):
            async with rpc.serve_unix(tmp_path / "s", lambda _peer: servants.Zoo()):
                pass
        await zoo.nothing()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        async with rpc.serve_unix(tmp_path / "file", lambda _peer: servants.Zoo()):
            pass
    assert (tmp_path / "file").read_text() == "precious"
    for path in (tmp_path / ("x" * 120), tmp_path / "no" / "folder"):
        with pytest.raises(ConfigError):
            async with rpc.serve_unix(path, lambda _peer: servants.Zoo()):
                pass
    assert kjloop._runtimes == {}


async def test_a_bootstrap_that_fails_costs_its_connection(
    schema: rpc.Schema, servants: Any, tmp_path: Path
) -> None:
    answers: list[Any] = [ValueError("no"), servants.Zoo()]

    def bootstrap(_peer: rpc.UnixPeer) -> Any:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    path = tmp_path / "s"
    async with rpc.serve_unix(path, bootstrap):
        async with await rpc.connect_unix(path) as connection:
            with pytest.raises(Disconnected):
                await connection.bootstrap(schema.Zoo).nothing()
        async with await rpc.connect_unix(path) as connection:
            assert await connection.bootstrap(schema.Zoo).nothing() is None


async def test_closing_a_connection(
    serving: Any, servants: Any, tmp_path: Path, schema: rpc.Schema
) -> None:
    async with serving(servants.Zoo()):
        connection = await rpc.connect_unix(tmp_path / "s")
        zoo = connection.bootstrap(schema.Zoo)
        hanging = asyncio.create_task(zoo.hang())
        await zoo.nothing()
        await connection.aclose()
        await connection.aclose()
        assert connection.closed
        with pytest.raises(Disconnected):
            await hanging
        with pytest.raises(Disconnected):
            await zoo.nothing()
        with pytest.raises(Disconnected):
            connection.bootstrap(schema.Zoo)
        await connection.wait_closed()


async def test_the_server_goes_away(schema: rpc.Schema, servants: Any, tmp_path: Path) -> None:
    server = rpc.serve_unix(tmp_path / "s", lambda _peer: servants.Zoo())
    await server.__aenter__()
    async with await rpc.connect_unix(tmp_path / "s") as connection:
        zoo = connection.bootstrap(schema.Zoo)
        await zoo.nothing()
        assert not connection.closed
        await server.__aexit__(None, None, None)
        async with asyncio.timeout(60):
            await connection.wait_closed()
        assert connection.closed


# --- pycapnp's loop
# -----------------------------------------------------------------------------------


async def test_the_runtime_is_counted() -> None:
    loop: Any = asyncio.get_running_loop()
    async with rpc.runtime():
        assert hasattr(loop, "_kj_loop")
        async with rpc.runtime():
            pass
        assert hasattr(loop, "_kj_loop")
    assert not hasattr(loop, "_kj_loop")
    assert kjloop._runtimes == {}


async def test_the_runtime_may_be_left_in_another_task() -> None:
    loop: Any = asyncio.get_running_loop()
    outer = rpc.runtime()

    async def enter() -> None:
        await outer.__aenter__()

    async def leave() -> None:
        await outer.__aexit__(None, None, None)

    await asyncio.create_task(enter())
    assert hasattr(loop, "_kj_loop")
    await asyncio.create_task(leave())
    assert not hasattr(loop, "_kj_loop")


async def test_the_runtime_is_left_by_a_cancelled_task(
    schema: rpc.Schema, servants: Any, tmp_path: Path
) -> None:
    async def use() -> None:
        async with (
            rpc.serve_unix(tmp_path / "s", lambda _peer: servants.Zoo()),
            await rpc.connect_unix(tmp_path / "s") as connection,
        ):
            await connection.bootstrap(schema.Zoo).hang()

    task = asyncio.create_task(use())
    while not (tmp_path / "s").exists() or len(_ends()) < 2:
        await asyncio.sleep(0.001)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([task])
    async with asyncio.timeout(60):
        while kjloop._runtimes:
            await asyncio.sleep(0.001)
    assert not hasattr(asyncio.get_running_loop(), "_kj_loop")


async def test_loop_gc_runs_here_and_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kjloop, "GC_TICK_S", 0.01)
    monkeypatch.setattr(kjloop, "GC_FULL_S", 0.05)
    seen: list[tuple[int, int]] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append((info["generation"], threading.get_ident()))

    gc.callbacks.append(note)
    try:
        async with rpc.loop_gc():
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0, "it walks what is there already"
            await asyncio.to_thread(lambda: [[[]] for _ in range(50_000)])
            async with asyncio.timeout(60):
                while {generation for generation, _ in seen} < {1, 2}:
                    keep = [[] for _ in range(5_000)]
                    await asyncio.sleep(0.01)
                    del keep
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
    finally:
        gc.callbacks.remove(note)
    assert {thread for _, thread in seen} == {threading.get_ident()}


# --- a place for who has something to do ----------------------------------------------------------


async def test_a_client_that_says_nothing_makes_room_and_one_that_is_in_does_not(
    servants: Any, schema: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Door(servants.Zoo):  # type: ignore[misc,name-defined]
        async def nothing(self) -> None:
            rpc.current_connection().trust()

    monkeypatch.setattr("wetware.rpc.unix._LOGIN_S", 0.01)
    path = tmp_path / "s"
    async with (
        rpc.serve_unix(path, lambda _peer: Door(), connections_max=2, trust_s=60),
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(10):  # ends at once if it is not served
            idle = stack.enter_context(socket.socket(socket.AF_UNIX))
            idle.connect(str(path))
        let_in = []
        for _ in range(2):
            connection = await stack.enter_async_context(await rpc.connect_unix(path))
            let_in.append(connection.bootstrap(schema.Zoo))
            await let_in[-1].nothing()
        late = await stack.enter_async_context(await rpc.connect_unix(path))
        with pytest.raises(
            LimitExceeded, match="2 programs of this machine are logged in"
        ) as found:
            await late.bootstrap(schema.Zoo).nothing()
        assert found.value.hint
        for zoo in let_in:
            await zoo.nothing()


async def test_the_socket_of_another_user_is_said_to_be_one(
    serving: Any, servants: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that no node answers, with the advice to start one."""
    node = LocalNode(Key.generate().peer_id, tmp_path / "s", 1, "ab" * 20, "local", (), frozenset())
    async with serving(servants.Zoo()), contextlib.AsyncExitStack() as stack:
        monkeypatch.setattr("wetware.rpc.unix._trusted", lambda peer: False)
        with pytest.raises(DialError, match="is served by another user") as caught:
            await dial.local(stack, node)
        assert caught.value.code == "overlay.dial.owner"
        assert "start" not in caught.value.hint
    with pytest.raises(DialError, match="no node answers") as caught:
        await dial.local(contextlib.AsyncExitStack(), node)
    assert caught.value.code == "overlay.dial.no_node"
    assert "ww node" in caught.value.hint
