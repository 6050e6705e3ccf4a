"""Guards: who may call, what is cut when they end, and the membrane around foreign references."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from wetware import rpc
from wetware.errors import CapabilityError, Denied, Expired, Revoked, Unsupported, from_wire

pytestmark = pytest.mark.anyio


class Grant:
    """A guard as a broker would make it."""

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed
        self.ended: CapabilityError | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self.callbacks: list[Callable[[CapabilityError], None]] = []
        self.log: list[tuple[str, dict[str, object]]] = []

    payer = None
    metered = False

    @property
    def blocked(self) -> CapabilityError | None:
        return self.ended

    def charge(self, method: rpc.Method, nbytes: int) -> None:
        raise AssertionError("it is not metered")

    def onward(self, method: rpc.Method, args: Mapping[str, object], passed: bool = False) -> Any:
        return self

    def enter(
        self,
        method: rpc.Method,
        args: Mapping[str, object],
        task: asyncio.Task[Any],
        passed: bool = False,
    ) -> None:
        if self.ended is not None:
            raise from_wire(self.ended.code, self.ended.message)
        if self.allowed and method.where not in self.allowed:
            raise Denied(f"no grant for {method.where}")
        self.log.append((method.where, dict(args)))
        self.tasks.add(task)

    def leave(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)

    def exported(self) -> None:
        pass

    def unexported(self) -> bool:
        return False

    def let_go(self) -> None:
        pass

    def on_end(self, callback: Callable[[CapabilityError], None]) -> Callable[[], None]:
        if self.ended is not None:
            callback(self.ended)
            return lambda: None
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback) if callback in self.callbacks else None

    def end(self, error: CapabilityError) -> None:
        self.ended = error
        for task in list(self.tasks):
            task.cancel()
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback(error)


async def test_a_guard_sees_every_call(serving: Any, servants: Any) -> None:
    grant = Grant("Zoo.data", "Zoo.nothing")
    servant = servants.Zoo()
    async with serving(rpc.guarded(servant, grant)) as zoo:
        assert await zoo.data(data=b"x", name="n") == {"data": b"x"}
        with pytest.raises(Denied, match=r"no grant for Zoo\.make"):
            await zoo.make(value=b"x")
        await zoo.nothing()
        assert grant.log == [("Zoo.data", {"data": b"x", "name": "n"}), ("Zoo.nothing", {})]
        assert grant.tasks == set()
        assert servant.guards == [grant]
    assert servant.made == []


async def test_without_a_guard_there_is_none(serving: Any, servants: Any) -> None:
    servant = servants.Zoo()
    grant = Grant()
    async with (
        serving(servant) as zoo,
        serving(rpc.guarded(servant, grant), name="g") as guarded_zoo,
    ):
        for _ in range(3):
            await guarded_zoo.nothing()
            await zoo.nothing()
    assert servant.guards == [grant, None] * 3


async def test_the_end_of_a_guard_cuts_calls_in_flight(
    serving: Any, servants: Any, tools: Any
) -> None:
    grant = Grant()
    servant = servants.Zoo()
    async with serving(rpc.guarded(servant, grant)) as zoo:
        tasks = [asyncio.create_task(zoo.hang()) for _ in range(5)]
        await tools.until(lambda: servant.running == 5)
        grant.end(Revoked("revoked by ada", hint="ask ada"))
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, Revoked)
            assert (result.message, result.hint) == ("revoked by ada", "ask ada")
        assert servant.cancelled == 5
        with pytest.raises(Revoked):
            await zoo.nothing()
    assert servant.guards == []


async def test_a_servant_that_swallows_the_cut_gives_nothing_away(
    serving: Any, servants: Any, tools: Any
) -> None:
    class Stubborn(servants.Zoo):  # type: ignore[misc, name-defined]
        async def data(self, data: bytes, name: str) -> Any:
            with contextlib.suppress(asyncio.CancelledError):
                await self.hang()
            return {"data": b"secret"}

    grant, servant = Grant(), Stubborn()
    async with serving(rpc.guarded(servant, grant)) as zoo:
        task = asyncio.create_task(zoo.data(data=b""))
        await tools.until(lambda: servant.running == 1)
        grant.end(Expired("over"))
        with pytest.raises(Expired):
            await task


async def test_results_that_wait_do_not_leave_after_the_end_of_the_guard(
    serving: Any, servants: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wetware.rpc.pipes._KERNEL_BYTES", 64 << 10)  # less than one result

    class Log(servants.Zoo):  # type: ignore[misc, name-defined]
        answers = 0

        async def big(self, bytes: int) -> Any:
            self.answers += 1
            return await super().big(bytes)

    grant, servant = Grant(), Log()
    limits = rpc.RpcLimits(result_bytes_out_max=100_000)
    async with serving(rpc.guarded(servant, grant), limits=limits) as zoo:
        await zoo.nothing()
        zoo._end.transport._pipe.pause()  # reads no more, so that results have to wait
        calls = [asyncio.create_task(zoo.big(bytes=900_000)) for _ in range(10)]
        calls.append(asyncio.create_task(zoo.make(value=b"")))
        await tools.until(lambda: servant.answers == 10 and servant.made)
        assert len(grant.tasks) >= 10  # a call is over when it is answered
        grant.end(Revoked("revoked by ada"))
        await tools.until(lambda: not grant.tasks and servant.made[0].releases == 1)
        zoo._end.transport._pipe.resume()
        results = await asyncio.gather(*calls, return_exceptions=True)
        late = [result for result in results if not isinstance(result, Revoked)]
        assert len(late) <= 1  # what was on its way before the end
        assert isinstance(results[-1], Revoked)


async def test_cancelling_a_guarded_call_leaves_the_guard(
    serving: Any, servants: Any, tools: Any
) -> None:
    grant, servant = Grant(), servants.Zoo()
    async with serving(rpc.guarded(servant, grant)) as zoo:
        task = asyncio.create_task(zoo.hang())
        await tools.until(lambda: servant.running == 1)
        assert len(grant.tasks) == 1
        task.cancel()
        await tools.until(lambda: servant.cancelled == 1 and not grant.tasks)
        assert grant.ended is None


async def test_a_defect_leaves_the_guard(serving: Any, servants: Any) -> None:
    grant = Grant()
    async with serving(rpc.guarded(servants.Zoo(), grant)) as zoo:
        with pytest.raises(Exception, match="internal error"):
            await zoo.fail(how="bug")
        assert grant.tasks == set()


async def test_returned_servants_inherit_the_guard(serving: Any, servants: Any) -> None:
    grant = Grant()
    async with serving(rpc.guarded(servants.Zoo(), grant)) as zoo:
        cell = (await zoo.make(value=b"v"))["cell"]
        cells = (await zoo.make_many(count=2))["cells"]
        assert await cell.get() == {"value": b"v"}
        assert [where for where, _ in grant.log] == ["Zoo.make", "Zoo.make_many", "Cell.get"]
        grant.end(Revoked("gone"))
        for ref in (cell, *cells):
            with pytest.raises(Revoked):
                await ref.get()


async def test_a_servant_with_a_guard_of_its_own(serving: Any, servants: Any) -> None:
    inner, outer = Grant(), Grant()

    class Zoo(servants.Zoo):  # type: ignore[misc, name-defined]
        async def make(self, value: bytes) -> Any:
            return {"cell": rpc.guarded(servants.Cell(value), inner)}

    async with serving(rpc.guarded(Zoo(), outer)) as zoo:
        cell = (await zoo.make(value=b"v"))["cell"]
        await cell.get()
        assert [where for where, _ in outer.log] == ["Zoo.make"]
        assert [where for where, _ in inner.log] == ["Cell.get"]
        outer.end(Revoked("outer"))
        assert await cell.get() == {"value": b"v"}
        inner.end(Expired("inner"))
        with pytest.raises(Expired):
            await cell.get()


# --- the membrane
# -----------------------------------------------------------------------------------


async def test_a_reference_that_came_in_dies_with_the_guard(
    serving: Any, servants: Any, tools: Any
) -> None:
    grant, servant = Grant(), servants.Zoo()
    own = servants.Cell(b"client's")
    async with serving(rpc.guarded(servant, grant)) as zoo:
        await zoo.keep(cell=own)
        assert await servant.cell.get() == {"value": b"client's"}
        grant.end(Revoked("gone"))
        with pytest.raises(Revoked):
            await servant.cell.get()
        with pytest.raises(Revoked):
            await servant.cell.set(value=b"x")
    assert own.value == b"client's"


async def test_a_call_out_in_flight_is_cut(
    serving: Any, servants: Any, schema: rpc.Schema, tools: Any
) -> None:
    started, ended = asyncio.Event(), []

    class Slow(rpc.Servant, interface=schema.Cell):
        async def get(self) -> Any:
            started.set()
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append(True)

        async def set(self, value: bytes) -> None: ...

    grant, servant = Grant(), servants.Zoo()
    async with serving(rpc.guarded(servant, grant)) as zoo:
        await zoo.keep(cell=Slow())
        call_out = asyncio.create_task(servant.cell.get())  # e.g. a pump: no call of the client's
        await started.wait()
        grant.end(Revoked("gone"))
        with pytest.raises(Revoked):
            await call_out
        assert call_out.cancelling() == 0
        await tools.until(lambda: ended == [True])  # the client's method was cancelled
        assert grant.callbacks == []


async def test_a_reference_returns_unwrapped_through_its_membrane(
    serving: Any, servants: Any, schema: rpc.Schema
) -> None:
    """What the client passed in and gets back is its own object, without a hop or a guard."""
    grant, servant = Grant(), servants.Zoo()
    own = servants.Cell(b"own")
    async with serving(rpc.guarded(servant, grant)) as zoo:
        await zoo.keep(cell=own)
        back = (await zoo.kept())["cell"]
        exports = zoo._end.exports
        assert await back.get() == {"value": b"own"}
        assert [where for where, _ in grant.log] == ["Zoo.keep", "Zoo.kept"]
        assert exports == 1  # no forwarding object anywhere
        grant.end(Revoked("gone"))
        assert await back.get() == {"value": b"own"}  # it was the client's all along


@contextlib.asynccontextmanager
async def third_party(schema: rpc.Schema, servant: Any, tmp_path: Path) -> AsyncIterator[rpc.Ref]:
    path = tmp_path / "third"
    async with (
        rpc.serve_unix(path, lambda _peer: servant),
        await rpc.connect_unix(path) as connection,
    ):
        yield connection.bootstrap(schema.Zoo)


async def test_a_foreign_reference_that_goes_out_is_wrapped(
    serving: Any, servants: Any, schema: rpc.Schema, tmp_path: Path, tools: Any
) -> None:
    grant, servant, far = Grant(), servants.Zoo(), servants.Zoo()
    async with (
        third_party(schema, far, tmp_path) as foreign,
        serving(rpc.guarded(servant, grant)) as zoo,
    ):
        servant.cell = (await foreign.make(value=b"far"))["cell"]
        cell = (await zoo.kept())["cell"]
        assert await cell.get() == {"value": b"far"}
        assert grant.log[-1][0] == "Cell.get"
        grant.end(Revoked("gone"))
        with pytest.raises(Revoked):
            await cell.get()
        assert await servant.cell.get() == {"value": b"far"}  # ours is as good as before


async def test_the_membrane_is_recursive_and_covers_every_place(
    serving: Any, servants: Any, schema: rpc.Schema, tmp_path: Path, tools: Any
) -> None:
    """A foreign zoo handed out: what it returns, and what is passed to it, is wrapped in turn."""
    grant, far = Grant(), servants.Zoo()

    class Hands(servants.Zoo):  # type: ignore[misc, name-defined]
        async def any(self, cap: Any) -> Any:
            return {"cap": foreign}

    async with (
        third_party(schema, far, tmp_path) as foreign,
        serving(rpc.guarded(Hands(), grant)) as zoo,
    ):
        got = (await zoo.any())["cap"].cast(schema.Zoo)
        cell = (await got.make(value=b"deep"))["cell"]
        cells = (await got.make_many(count=2))["cells"]
        mine = servants.Cell(b"mine")
        everything = await got.echo(
            cell=mine, cells=[mine], place={"cell": mine}, text="plain", tree={"value": 3}
        )
        assert everything["text"] == "plain"
        assert everything["tree"]["value"] == 3
        inside = far.seen[-1]
        in_refs = [inside["cell"], inside["cells"][0], inside["place"]["cell"]]
        out_refs = [cell, *cells]
        for ref in in_refs:
            assert await ref.get() == {"value": b"mine"}
        for ref in out_refs:
            assert (await ref.get())["value"] in (b"deep", b"")
        returned = [everything["cell"], everything["cells"][0], everything["place"]["cell"]]
        for ref in returned:
            assert await ref.get() == {"value": b"mine"}
        hanging = asyncio.create_task(got.hang())
        await tools.until(lambda: far.running == 1)

        grant.end(Revoked("gone"))
        with pytest.raises(Revoked):
            await hanging
        await tools.until(lambda: far.cancelled == 1)
        for ref in (*in_refs, *out_refs):
            with pytest.raises(Revoked):
                await ref.get()
        with pytest.raises(Revoked):
            await got.nothing()


async def test_an_unknown_interface_does_not_pass(
    serving: Any, servants: Any, schema: rpc.Schema, tmp_path: Path
) -> None:
    grant, far = Grant(), servants.Zoo()

    class Hands(servants.Zoo):  # type: ignore[misc, name-defined]
        async def any(self, cap: Any) -> Any:
            return {"cap": (await foreign.any(cap=servants.Cell()))["cap"]}

    async with (
        third_party(schema, far, tmp_path) as foreign,
        serving(rpc.guarded(Hands(), grant)) as zoo,
    ):
        with pytest.raises(Unsupported, match="unknown interface"):
            await zoo.any()


async def test_a_guarded_reference_does_not_escape_by_another_door(
    serving: Any, servants: Any, schema: rpc.Schema, tmp_path: Path
) -> None:
    """The servant passes what one client gave it to somebody else: the guard goes along."""
    grant, servant, far = Grant(), servants.Zoo(), servants.Zoo()
    async with (
        third_party(schema, far, tmp_path) as foreign,
        serving(rpc.guarded(servant, grant)) as zoo,
    ):
        await zoo.keep(cell=servants.Cell(b"client's"))
        await foreign.keep(cell=servant.cell)  # by a reference without a guard
        assert await far.cell.get() == {"value": b"client's"}
        grant.end(Revoked("gone"))
        with pytest.raises(Revoked):
            await far.cell.get()


async def test_a_servant_passed_out_through_a_guarded_reference_is_guarded(
    serving: Any, servants: Any, schema: rpc.Schema
) -> None:
    """A callback that the service gives to the client's object is a part of the grant."""
    grant, servant, clients = Grant(), servants.Zoo(), servants.Zoo()

    class Server(servants.Zoo):  # type: ignore[misc, name-defined]
        async def relay(self, zoo: rpc.Ref) -> Any:
            await zoo.keep(cell=servants.Cell(b"service's"))
            return {}

    servant = Server()
    async with serving(rpc.guarded(servant, grant)) as zoo:
        await zoo.relay(zoo=clients)
        assert await clients.cell.get() == {"value": b"service's"}
        assert grant.log[-1][0] == "Cell.get"
        grant.end(Revoked("gone"))
        with pytest.raises(Revoked):
            await clients.cell.get()


async def test_own_objects_that_come_back_are_still_guarded(serving: Any, servants: Any) -> None:
    grant, servant = Grant(), servants.Zoo()
    async with serving(rpc.guarded(servant, grant)) as zoo:
        cell = (await zoo.make(value=b"own"))["cell"]
        assert await zoo.use(cell=cell) == {"value": b"own"}
        await zoo.keep(cell=cell)
        assert await (await zoo.kept())["cell"].get() == {"value": b"own"}
        grant.end(Revoked("gone"))
        with pytest.raises(Revoked):
            await servant.cell.get()


def test_guarded_takes_servants_only() -> None:
    with pytest.raises(TypeError, match="takes a Servant"):
        rpc.guarded("x", None)  # type: ignore[arg-type]
