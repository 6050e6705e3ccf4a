"""Objects that programs serve themselves: `serve`, `accept` and `reply` of the module `ww`."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import pytest

from wetware.base import cbor
from wetware.errors import InvalidArgument, LimitExceeded, WetwareError
from wetware_proc import serving
from wetware_proc.driver import Spec
from wetware_proc.functions import FunctionFailed
from wetware_proc.grants import TAG
from wetware_proc.schema import SCHEMA
from wetware_proc.served import Served

if TYPE_CHECKING:
    from plugins.proc.tests.conftest import Echo, Run

    from wetware_proc.driver import Exit

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]  # the first builds the C library


class Offered:
    """What guests offer, and a client of it over a connection of its own."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.by_name: dict[str, Any] = {}
        self._came = asyncio.Event()

    def __call__(self, name: str, what: Any) -> None:
        if name in self.by_name:
            raise InvalidArgument("taken")
        self.by_name[name] = what
        self._came.set()

    @contextlib.asynccontextmanager
    async def served(self, name: str) -> AsyncIterator[Served]:
        while name not in self.by_name:
            self._came.clear()
            await self._came.wait()
        async with self._run.granted(self.by_name[name]) as ref:
            yield Served(ref.cast(SCHEMA.Served))


@contextlib.asynccontextmanager
async def running(run: Run, guest: str, **spec: Any) -> AsyncIterator[tuple[Any, Offered]]:
    """A guest that runs, and what it offers; it is killed where it has not ended."""
    offered = Offered(run)
    run.guest(guest)  # compiled, if it is the first time
    ends: asyncio.Task[Exit] = asyncio.ensure_future(run(guest, offer=offered, **spec))
    try:
        yield ends, offered
    finally:
        ends.cancel()
        await asyncio.gather(ends, return_exceptions=True)


# --- WebAssembly ----------------------------------------------------------------------------------


async def test_a_module_serves_an_object_until_it_ends(run: Run) -> None:
    async with running(run, "serve") as (ends, offered), offered.served("counter") as counter:
        assert await counter.add(by=2) == 2
        assert await counter.add(by=40) == 42
        later = asyncio.ensure_future(counter.later())
        await run.until(lambda: b"later" in run.out)
        assert not later.done()
        assert await counter.add(by=1) == 43
        assert await later == 7  # answered after another one
        with pytest.raises(WetwareError, match="makes no sense: an answer is") as failed:
            await counter.nonsense()
        assert failed.value.code == "proc.answer"
        waiting = asyncio.ensure_future(counter.later())
        await run.until(lambda: run.out.count(b"later") == 2)
        with pytest.raises(WetwareError) as failed:
            await counter.end()
        assert failed.value.code == "proc.ended"
        with pytest.raises(WetwareError, match="has ended"):  # those before, too
            await waiting
        assert (await ends).code == 0
        with pytest.raises(WetwareError, match="has ended"):  # and those after
            await counter.add(by=1)
    assert run.lines == [
        "nothing -44", "again -28", "called -29",
        "1 1 add", "answered 0", "2 1 add", "answered 0",
        "3 1 later", "4 1 add", "answered 0", "owed 0",
        "5 1 nonsense", "refused -28 -8",
        "6 1 later", "7 1 end",
    ]  # fmt: skip


async def test_a_kill_breaks_what_it_serves(run: Run) -> None:
    async with running(run, "serve") as (ends, offered), offered.served("counter") as counter:
        waiting = asyncio.ensure_future(counter.later())
        await run.until(lambda: b"later" in run.out)
        ends.cancel()
        for broken in (waiting, counter.add(by=1)):
            with pytest.raises(WetwareError) as failed:
                await broken
            assert failed.value.code == "proc.ended"


async def test_calls_that_wait_for_it_are_bounded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "WAITING_BYTES_MAX", 1000)
    limits = {"calls_max": 4}
    async with (
        running(run, "serve", limits=limits) as (_, offered),
        offered.served("counter") as counter,
    ):
        waiting = [asyncio.ensure_future(counter.later()) for _ in range(4)]
        await run.until(lambda: run.out.count(b"later") == 4)
        with pytest.raises(LimitExceeded, match="calls_max"):
            await counter.add(by=1)
        for each in waiting:  # who leaves makes room
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(LimitExceeded, match="WAITING_BYTES_MAX"):
            await counter.add(by="x" * 1000)
        await run.until(lambda: not next(iter(offered.by_name.values()))._calls._calls)
        assert await counter.add(by=1) == 1
        await run.until(lambda: b"owed -8" in run.out)  # nobody waits for that answer


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (b"\x80", "are {parameter: value}"),
        (b"\xa1", "not CBOR"),
        (cbor.encode({"x": cbor.Tag(TAG, 0)}), "did not come with it"),
        (cbor.encode({"x": [0] * 9000}), "more than 8192 values"),
    ],
)
async def test_what_makes_no_sense_does_not_reach_it(run: Run, args: bytes, why: str) -> None:
    async with running(run, "serve") as (_, offered), offered.served("counter") as counter:
        with pytest.raises(WetwareError, match=why):
            await counter.ref.call("call", method="add", args=args, caps=[])
        with pytest.raises(InvalidArgument, match="at most 255"):
            await counter.ref.call("call", method="a" * 256, args=b"\xa0", caps=[])
        assert await counter.add(by=1) == 1
    assert "1 1 add" in run.lines


# --- Python ---------------------------------------------------------------------------------------

COUNTER = """
import sys, ww
class Counter:
    kept = None
    secret = staticmethod(lambda: 1)
    def __init__(self): self.sum, self.hook = 0, print
    def add(self, by=1):
        "What it adds up to."
        self.sum += by
        return self.sum
    def fail(self): raise ValueError("it is wrong")
    def odd(self): return {1, 2}
    def same(self, **what): return what
    def keep(self, it): self.kept = it
    def say(self, data): return self.kept.say(data=data)
    def given(self): return [self.kept, {"me": me}]
    def end(self): sys.exit(3)
    def _hidden(self): return 1
me = ww.export("counter", Counter())
try: ww.export("counter", Counter())
except ww.Error as exc: print(exc.code)
print("up")
ww.serve()
"""


async def shout(data: bytes) -> bytes:
    return data.upper()


async def test_a_python_program_serves_an_object(python: Run) -> None:
    async with running(python, COUNTER) as (ends, offered), offered.served("counter") as counter:
        assert [await counter.add(), await counter.add(by=4)] == [1, 5]
        plain = {"a": [None, True, -1, 2**63, 1.5, "ü", b"\0", {"b": [[]]}]}
        assert await counter.same(**plain) == plain
        with pytest.raises(FunctionFailed, match="ValueError: it is wrong"):
            await counter.fail()
        with pytest.raises(FunctionFailed, match="TypeError: set is none of None"):
            await counter.odd()
        for method in ("_hidden", "__init__", "kept", "hook", "other"):
            with pytest.raises(FunctionFailed, match="there is no method"):
                await counter._call(method)
        with pytest.raises(FunctionFailed, match="unexpected keyword"):
            await counter.add(more=1)
        with pytest.raises(WetwareError) as failed:
            await counter.end()
        assert failed.value.code == "proc.ended"
        assert (await ends).code == 3
    assert python.lines == ["invalid", "up"]
    assert b'raise ValueError("it is wrong")' in python.err, "its own log has the whole"


async def test_capabilities_are_taken_and_given(python: Run, servant: Callable[..., Echo]) -> None:
    echo = servant(shout)
    async with running(python, COUNTER) as (_, offered), offered.served("counter") as counter:
        await counter.keep(it=echo)  # ours, handed in
        assert await counter.say(data=b"hello") == b"HELLO"
        kept, also = await counter.given()
        assert (await kept.call("say", data=b"back"))["data"] == b"BACK"
        me = Served(also["me"])  # what it serves itself
        assert await me.add(by=2) == 2
        assert await counter.add() == 3


async def test_one_program_calls_what_another_one_serves(python: Run) -> None:
    """By its own methods, as of any capability."""
    client = """
import ww
counter = ww.grant("counter")
print(counter.add(by=2), counter.same(a={"b": 1}), counter.same())
try: counter.fail()
except ww.Error as exc: print(exc.code, exc)
"""
    async with running(python, COUNTER) as (_, offered):
        async with offered.served("counter") as counter:
            other = another(python)
            end = await other.with_refs(client, grants={"counter": counter.ref})
        assert end.code == 0
        assert other.lines == [
            "2 {'a': {'b': 1}} {}", "proc.raised ValueError: it is wrong"
        ]  # fmt: skip


def another(run: Run) -> Run:
    """The same driver, with output of its own."""
    return type(run)(run.driver, run._guests, run._data_dir, run._sockets)


async def test_calls_that_were_left_take_no_memory() -> None:
    """Also where the program never accepts one: their callers have room for more each time."""
    offered: dict[str, Any] = {}
    serving.Calls(Spec(offer=offered.__setitem__)).serve("it")

    async def leave(times: int) -> int:
        for _ in range(times):
            call = asyncio.ensure_future(offered["it"].call("method", cbor.encode({}), []))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = await leave(100)
        assert await leave(2000) - before < 20_000
    finally:
        tracemalloc.stop()
