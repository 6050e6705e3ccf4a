"""Guests that mean well: what they see, and what they can do."""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from wasmtime import wat2wasm

import wetware_proc
from wetware.errors import InvalidArgument
from wetware_proc.driver import CodeRefused, Limits, Pipe, Spec
from wetware_proc.wasm import wasi

if TYPE_CHECKING:
    from plugins.proc.tests.conftest import Run

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]  # the first builds the C library


async def test_a_program_runs_to_its_end(run: Run) -> None:
    end = await run("hello")
    assert (end.kind, end.code, end.why) == ("exited", 0, "")
    assert 0 < end.cpu_s < 1
    assert run.out == b"hello\n"


async def test_a_guest_sees_its_spec_and_nothing_else(run: Run, tmp_path: Path) -> None:
    end = await run(
        "world", "7", "größe", env={"NAME": "value=x"}, dirs={"/data": (tmp_path, False)}
    )
    assert end.code == 7
    lines = run.lines
    assert lines[:5] == ["arg world", "arg 7", "arg größe", "env NAME=value=x", "dir /data"]
    assert lines[5] == "dir /tmp"
    assert abs(int(lines[6].removeprefix("wall ")) - time.time()) < 5
    assert lines[7:] == ["slept 1", "chance 1"]


async def test_without_names_to_add_there_is_no_tmp(run: Run) -> None:
    await run("world", limits={"tmp_files": 0})
    assert not any(line.startswith("dir") for line in run.lines)


async def test_input_comes_as_it_is_written_and_ends(run: Run) -> None:
    pipe = Pipe()
    running = asyncio.ensure_future(run("cat", "ready", stdin=pipe))
    await run.until(lambda: run.err)
    for piece, all_of_it in ((b"one", b"one"), (b"two", b"onetwo")):
        await pipe.write(piece)
        await run.until(lambda so_far=all_of_it: run.out == so_far)
    pipe.close()
    assert (await running).code == 0
    assert run.out == b"onetwo"


async def test_a_slow_reader_holds_its_guest_up(run: Run) -> None:
    taken, room = [0], asyncio.Event()

    def output(data: bytes) -> object:
        taken[0] += len(data)
        return room.wait() if taken[0] >= 256 << 10 and not room.is_set() else None

    running = asyncio.ensure_future(run("cat", stdin=(pipe := Pipe()), stdout=output))
    writing = asyncio.ensure_future(pipe.write(bytes(1 << 20)))
    await asyncio.sleep(0.3)
    assert taken[0] < 400 << 10
    assert not writing.done()
    room.set()
    await writing
    pipe.close()
    assert (await running).code == 0
    assert taken[0] == 1 << 20


async def test_a_reader_that_is_gone_is_a_broken_pipe(run: Run) -> None:
    def output(data: bytes) -> None:
        raise BrokenPipeError

    assert (await run("cat", stdin=Pipe(b"x", closed=True), stdout=output)).code == 32


async def test_all_output_is_taken_before_the_end(run: Run) -> None:
    taken = bytearray()

    async def slowly(data: bytes) -> None:
        await asyncio.sleep(0.05)
        taken.extend(data)

    assert (await run("hello", stdout=slowly)).code == 0
    assert taken == b"hello\n"


async def test_output_is_no_faster_than_its_limit(run: Run) -> None:
    before = time.monotonic()
    size = 200 << 10
    pipe = Pipe()
    writing = asyncio.ensure_future(pipe.write(bytes(size)))
    writing.add_done_callback(lambda _: pipe.close())
    await run("cat", stdin=pipe, limits={"output_bytes_s": 100 << 10})
    assert len(run.out) == size
    assert time.monotonic() - before > 0.9  # one second's worth may go at once


async def test_a_thousand_guests_wait_without_a_thread(run: Run) -> None:
    pipe = Pipe()
    everybody = [asyncio.ensure_future(run("cat", stdin=pipe)) for _ in range(1000)]
    await run.until(lambda: len(pipe._changed._waiters) == 1000)
    assert len(os.listdir("/proc/self/task")) < 40
    pipe.close()
    assert {end.code for end in await asyncio.gather(*everybody)} == {0}


async def test_a_directory_is_read_and_listed(run: Run, tmp_path: Path) -> None:
    names = [f"name-{number}" for number in range(3000)]
    for name in names:
        (tmp_path / name).touch()
    await run("list", "/data", "names", dirs={"/data": (tmp_path, False)})
    *listed, count = run.lines
    assert sorted(listed) == sorted([*names, ".", ".."])
    assert count == "3002 2991"


async def test_two_guests_share_an_image_and_nothing_else(run: Run) -> None:
    ends = await asyncio.gather(*(run("world", str(code)) for code in range(20)))
    assert [end.code for end in ends] == list(range(20))


async def test_compiled_code_is_found_again(run: Run, data_dir: Path) -> None:
    await run("hello")
    before = {path.name for path in (data_dir / "compiled").iterdir()}
    run.driver._images.clear()
    assert (await run("hello")).code == 0
    assert {path.name for path in (data_dir / "compiled").iterdir()} == before


async def test_the_same_code_is_compiled_once_for_all_who_wait(run: Run, data_dir: Path) -> None:
    code = wat2wasm('(module (memory 1) (func (export "_start")) (func (result i32) i32.const 77))')
    images = await asyncio.gather(*(run.driver.load(code) for _ in range(5)))
    assert len({id(image) for image in images}) == 1


async def test_a_library_is_no_program(run: Run) -> None:
    for exported in (
        '(func (export "helper"))',
        '(global (export "_start") i32 (i32.const 7))',
        '(memory (export "_start") 1)',
        '(func (export "_start") (param i32))',
        '(func (export "_start") (result i32) (i32.const 7))',
    ):
        with pytest.raises(CodeRefused, match="_start"):
            await run(wat2wasm(f"(module {exported})"))


async def test_what_there_is_not_cannot_be_imported(run: Run) -> None:
    for module, name in (
        ("wasi_snapshot_preview1", "proc_spawn"),
        ("env", "system"),
        ("ww2", "cap"),
    ):
        code = wat2wasm(f'(module (import "{module}" "{name}" (func)) (func (export "_start")))')
        with pytest.raises(CodeRefused, match=name):
            await run(code)


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes": 1},
        {"memory_bytes": 8 << 30},
        {"wall_s": 0},
        {"wall_s": float("nan")},
        {"tmp_files": -1},
        {"calls_max": 0},
    ],
)
def test_a_limit_is_within_its_bounds(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        Limits(**wrong)  # type: ignore[arg-type]


def test_a_spec_that_no_program_can_be_given_is_refused() -> None:
    for wrong in (
        {"args": ("a\0b",)},
        {"env": {"A=B": ""}},
        {"args": ("x" * (1 << 20),)},
        {"args": ("",) * 5000},
        {"dirs": {"data": (Path("/"), False)}},
        {"dirs": {"/tmp": (Path("/"), True)}},  # noqa: S108 - the guest's
    ):
        with pytest.raises(InvalidArgument):
            Spec(**wrong)  # type: ignore[arg-type]


def test_three_modules_alone_know_the_engine() -> None:
    """A new version of it is a matter of these three."""
    package = Path(wetware_proc.__file__).parent
    importing = re.compile(r"^\s*(import|from) wasmtime\b", re.MULTILINE)
    found = [path.name for path in package.rglob("*.py") if importing.search(path.read_text())]
    assert sorted(found) == ["compile.py", "component.py", "engine.py"]


def test_what_the_driver_offers_is_all_of_preview_1() -> None:
    assert len(wasi.IMPORTS.functions) == 46
