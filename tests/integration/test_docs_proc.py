"""What the documents of proc tell people to type works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wetware.testing import wait_for

from .test_docs import _BLOCK, ROOT, Machine, Reader, machines

__all__ = ["machines"]


TUTORIAL = "docs/tutorials/programs.md"


def with_compiler(machine: Machine, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("ziglang", reason="needs the extra: pip install -e '.[dev]'")
    machine.env["PATH"] = f"{Path(sys.executable).parent}:{machine.env['PATH']}"
    if (cache := getattr(request.config, "cache", None)) is not None:
        machine.env["ZIG_GLOBAL_CACHE_DIR"] = f"{cache.mkdir('proc-guests')}/zig"


def _id_of(machine: Machine, name: str) -> str:
    def shown() -> str | None:
        lines = machine.sh("ww ps").splitlines()
        return next((line[:16] for line in lines if f" {name} " in line), None)

    found: str = wait_for(shown, f"{name} in `ww ps`", within_s=60)
    return found


def _ending(process: subprocess.Popen[str]) -> Callable[[], object]:
    def end() -> None:
        process.kill()
        process.communicate()

    return end


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_tutorial_works_as_it_is_written(
    machines: Callable[[str], Machine], request: pytest.FixtureRequest
) -> None:
    """Two nodes: every block, in the order of the text, on the machine that it names."""
    desk = machines("desk")
    with_compiler(desk, request)
    reader = Reader(machines)
    desk.command_s = 600.0  # the first function waits for a Python to be built
    background: list[subprocess.Popen[str]] = []
    blocks = _BLOCK.findall((ROOT / TUTORIAL).read_text())
    assert {machine for _, machine, _, _ in blocks} == {"desk", "rented"}
    for language, name, tag, text in blocks:
        if tag == "until=hello":
            wait_for(
                lambda command=text: "hello" in desk.sh(f"{command.strip()} || true"),
                "the page",
                within_s=60,
            )
            continue
        if tag.startswith("until="):  # as a reader would look again
            reader.known["ID"] = _id_of(desk, tag.partition("=")[2])
            continue
        if "--port" in text:  # as the tests of native programs: not every machine lets them run
            found = json.loads(desk.sh("ww --node rented doctor --json || true"))["findings"]
            (first, *_) = [each for each in found if each["check"] == "native programs"]
            if first["level"] == "error":
                pytest.skip(first["text"])
        if "--on" in text:
            wait_for(lambda: desk.sh("ww ls").count(" alive ") == 2, "two members")
        reader.do(language, name, tag, reader.filled(text))
        if tag == "background":
            assert desk.background is not None
            request.addfinalizer(_ending(desk.background))
            background.append(desk.background)

    # What the text promises.
    heard = reader.heard
    assert heard("factors.py").startswith("[2, 1013]\n[2, 2, 5, 5]\n[101]\n")
    assert heard("words.wasm").endswith("6 words\n6 words\n")
    alone, given = heard("spy.wasm /etc").split("/etc/passwd: nothing there\n")[1:]
    assert (alone, given) == ("/notes/today: nothing there\n", "/notes/today: read\n")
    clock, site, _ = background
    for process in (clock, site):
        out, err = process.communicate(timeout=60)
        assert ("tick 1\n" in out) == (process is clock)
        assert "killed: by local:" in err


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_how_to_of_running_programs_works_as_it_is_written(
    machines: Callable[[str], Machine], request: pytest.FixtureRequest
) -> None:
    """One node: every block, in the order of the text."""
    desk = machines("desk")
    with_compiler(desk, request)
    desk.command_s = 600.0  # the first script waits for a Python to be built
    desk.start_node("ww node")
    reader = Reader(machines)
    blocks = _BLOCK.findall((ROOT / "docs/how-to/run-programs.md").read_text())
    for language, name, tag, text in blocks:
        reader.do(language, name, tag, text)

    # What the text promises.
    heard = reader.heard
    assert heard("hello.c <<").endswith("hello world\n")
    squares = heard("squares.py <<")
    assert squares.startswith("[1, 4, 9] ['you']\n")
    assert "the node prepares the program" in squares, "the first of all took a while"
    assert "{'to': 2, 'be': 2, 'or': 1, 'not': 1}\n[0, 1, 4, 9, 16]" in heard("def square")
    assert "hello you\n" in heard("ww blob put hello.wasm")
    assert heard("--dir /notes").endswith("remember the milk\n")
    assert heard("--grant out=pubsub:chat").endswith("published\n")
    assert "0 b'published\\n'" in heard("session.proc.run")
    assert "b'hello again\\n' Exit(kind='exited', code=0" in heard("session.proc.run")
    assert "2 3\n42\n" in heard('process.served("counter")')
    ticks = heard("ww logs -f $ID")
    assert "tick 1\ntick 2\ntick 3\n" in ticks
    assert "0, on-failure" in ticks
    assert "out=pubsub:chat" in ticks
    assert "code=0" in heard("proc.start(")
    assert "[b'published\\n']" in heard("proc.start(")
    assert "exited 1" in heard("ww ps")
