"""The module `ww`: what a guest can do with capabilities, and what they are held to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
import wasmtime

from wetware.base import cbor
from wetware.errors import LimitExceeded, NotFound, Revoked
from wetware_proc import grants
from wetware_proc.driver import Exit

if TYPE_CHECKING:
    from plugins.proc.tests.conftest import Echo, Lag, Run

Kill = Callable[["asyncio.Task[Exit]"], Awaitable[float]]

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]  # the first builds the C library

LAG_P99_S = 0.025


async def same(data: bytes) -> bytes:
    await asyncio.sleep(0)
    return data


async def test_a_guest_calls_its_grants_and_nothing_else(run: Run) -> None:
    await run("caps", "ask", "one", "two", grants={"echo": same})
    assert run.lines == ["0 one", "0 two", "other -44", "forged -8", "drop 0", "dropped -8"]
    await run("caps", "ask", "one")
    assert run.lines[0] == "-8 "


OFFER = """(module (import "ww" "cap" (func $cap (param i32 i32) (result i32)))
    (import "ww" "offer" (func $offer (param i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
    (memory (export "memory") 1) (data (i32.const 0) "echothere")
    (func (export "_start")
        (call $exit (i32.sub (i32.const 0) (i32.add
            (call $offer (call $cap (i32.const 0) (i32.const 4)) (i32.const 4) (i32.const 5))
            (call $offer (i32.const 99) (i32.const 4) (i32.const 5)))))))"""


async def test_a_guest_offers_what_it_holds_to_its_spawner(run: Run) -> None:
    offered: dict[str, object] = {}
    code = bytes(wasmtime.wat2wasm(OFFER))
    end = await run(code, grants={"echo": same}, offer=offered.__setitem__)
    assert (end.code, list(offered)) == (8, ["there"])  # no such handle, and nothing else


async def test_calls_after_revocation_fail_and_the_guest_goes_on(run: Run) -> None:
    calls = 0

    async def until_revoked(data: bytes) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Revoked("grant 7f3a was revoked")
        return b"ok"

    end = await run("caps", "ask", "1", "2", "3", grants={"echo": until_revoked})
    assert end.code == 0
    assert run.lines[:5] == [
        "0 ok",
        "-76 capability.revoked", "grant 7f3a was revoked",
        "-76 capability.revoked", "grant 7f3a was revoked",
    ]  # fmt: skip


async def test_an_error_that_is_none_of_its_business_says_nothing(run: Run) -> None:
    async def broken(data: bytes) -> bytes:
        raise RuntimeError("the secret path /etc/shadow")

    await run("caps", "ask", "1", grants={"echo": broken})
    assert run.lines[0] == "-29 internal"
    assert b"shadow" not in run.out


async def test_calls_in_flight_are_bounded_and_end_before_the_guest(run: Run) -> None:
    done = 0

    said, out = asyncio.Event(), bytearray()

    async def slow(data: bytes) -> bytes:
        nonlocal done
        await said.wait()
        done += 1
        return b""

    def write(data: bytes) -> None:
        out.extend(data)
        said.set()

    given: dict[str, Any] = {"limits": {"calls_max": 10}, "stdout": write}
    assert (await run("caps", "send", grants={"echo": slow}, **given)).code == 0
    assert out == b"10 90\n"
    assert done == 10


async def test_messages_are_bounded_in_both_directions(run: Run) -> None:
    await run("caps", "large", grants={"echo": same})
    assert run.out == b"1 -1\n"

    async def too_much(data: bytes) -> bytes:
        return bytes(1 << 20)

    await run("caps", "ask", "1", grants={"echo": too_much})
    assert run.lines[0] == "-6 limit"


async def test_a_loop_of_calls_holds_nobody_up(run: Run, lag: type[Lag], kill: Kill) -> None:
    running = asyncio.ensure_future(run("caps", "loop", grants={"echo": same}))
    await run.until(lambda: run.out)
    async with lag() as measured:
        await asyncio.sleep(1)
    await kill(running)
    assert measured.p99() < LAG_P99_S


# --- capabilities in messages ---------------------------------------------------------------------


async def test_a_capability_of_an_answer_is_called_passed_on_and_dropped(
    run: Run, servant: type[Echo]
) -> None:
    echo = servant(same)
    await run("caps", "answered", grants={"echo": echo})
    assert run.lines == [
        "0 2: 1: hello",
        "0 1: round",
        "drop 0 0",
        "-29 not_found.handle", "there is no handle 2",  # as a parameter, too
        "-8 ",
    ]  # fmt: skip
    await run.until(lambda: not echo.alive)


async def test_what_is_dropped_is_released_and_so_is_all_at_the_end(
    run: Run, servant: type[Echo], kill: Kill
) -> None:
    echo = servant(same)
    async with run.granted(echo) as ref:
        handles = grants.Handles({"echo": ref}, 10)
        mine = handles.named("echo")
        numbers = []
        for _ in range(3):
            method, params = handles.message(cbor.encode(["another", {}]))
            answer = handles.answer(await grants.call(handles.get(mine), method, params))
            numbers.append(cbor.decode(answer, bytes_max=100, tag=grants.TAG)["echo"].value)
        assert len(echo.alive) == 3
        handles.drop(numbers[0])
        await run.until(lambda: len(echo.alive) == 2)
        handles.drop(mine)
        assert handles.named("echo") not in (mine, *numbers), "a number is not used again"
        handles.close()
        await run.until(lambda: not echo.alive)
        with pytest.raises(NotFound):
            handles.get(numbers[1])


async def test_ten_thousand_handles_are_too_many(run: Run) -> None:
    await run("caps", "handles", grants={"echo": same}, limits={"handles_max": 500})
    assert run.out == b"500 -33\n"


async def test_answers_do_not_fill_the_table_over_its_end(run: Run, servant: type[Echo]) -> None:
    """Nor does one half: what has no place is let go of."""
    echo = servant(same)
    end = await run("caps", "exhaust", grants={"echo": echo}, limits={"handles_max": 8})
    assert end.code == 0
    assert run.lines[:-1] == [
        "8 -33 limit.handles", "a program holds at most 8 capabilities (handles_max)",
        "drop 0",
        "-33 limit.handles", "a program holds at most 8 capabilities (handles_max)",
    ]  # fmt: skip
    assert run.lines[-1].endswith(": again")
    await run.until(lambda: not echo.alive)


async def test_what_was_sent_arrives_though_its_handles_are_dropped_at_once(run: Run) -> None:
    said = []

    async def say(data: bytes) -> bytes:
        said.append(data)
        return b""

    await run("caps", "drop after send", grants={"echo": say})
    assert run.out == b"0 0 0\n"
    assert said == [b"late"]


async def test_an_untyped_capability_is_what_is_said_beside_it(
    run: Run, servant: type[Echo]
) -> None:
    assert servant.__ww_interface__ is not None
    interface_id = servant.__ww_interface__.id
    await run("caps", "untyped", f"{interface_id:x}", grants={"echo": same})
    assert run.lines == ["0 typed"]
    await run("caps", "untyped", "5", grants={"echo": same})
    assert run.lines[0] == "-29 unsupported.interface"


async def test_a_stream_is_in_no_message(run: Run) -> None:
    await run("caps", "stream", grants={"echo": same})
    assert run.lines[0] == "-29 unsupported"


@pytest.mark.parametrize(
    "message",
    [
        ["say", {"data": cbor.Tag(grants.TAG, 1)}],  # of a wrong type
        ["say", {"data": b"", "more": cbor.Tag(grants.TAG, 99)}],  # a forged number
        ["hand_on", {"to": cbor.Tag(grants.TAG, b"x"), "data": b""}],
        ["hand_on", {"to": cbor.Tag(grants.TAG, [1]), "data": b""}],
        ["hand_on", {"to": cbor.Tag(grants.TAG, 1 << 63), "data": b""}],
        ["hand_on", {"to": cbor.Tag(40, 1), "data": b""}],
        ["hand_on", {"to": 1, "data": b""}],
        ["hand_on", {"to": None, "data": b""}],
        [cbor.Tag(grants.TAG, 1), {}],
        ["none", {}], ["say"], {}, "say",
    ],
    ids=repr,
)  # fmt: skip
async def test_a_message_that_makes_no_sense_is_an_error_of_the_guest(
    run: Run, message: object
) -> None:
    assert (await run("caps", "raw", cbor.encode(message).hex(), grants={"echo": same})).code == 0
    assert run.lines[0].startswith("-29 ")


def test_a_message_of_very_many_values_is_not_even_decoded() -> None:
    """Nine megabytes and a third of a second of the loop for one of 1 MiB."""
    handles = grants.Handles({}, 10)
    for many in ([0] * 9000, [[]] * 9000, {str(number): 0 for number in range(5000)}):
        with pytest.raises(LimitExceeded, match="ITEMS_MAX"):
            handles.message(cbor.encode(["say", {"data": many}]))
    assert handles.message(cbor.encode(["say", {"data": [0] * 8000}]))[0] == "say"
