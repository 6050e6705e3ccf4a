"""What the documents of sync tell people to type works."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from wetware.testing import wait_for

from .test_docs import _BLOCK, ROOT, Machine, Reader, machines

__all__ = ["machines"]

TUTORIAL = "docs/tutorials/one-machine-at-a-time.md"
AGREEING = "docs/how-to/agree.md"


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """To a command and what it runs, as a terminal or a lid does."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    for pid in (process.pid, *map(int, found.stdout.split())):
        os.kill(pid, number)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_tutorial_works_as_it_is_written(machines: Callable[[str], Machine]) -> None:
    """Every block, in the order of the text, on the machine that it names."""
    desk, laptop = machines("desk"), machines("laptop")
    reader = Reader(machines)
    started: list[subprocess.Popen[str]] = []
    blocks = _BLOCK.findall((ROOT / TUTORIAL).read_text())
    assert {machine for _, machine, _, _ in blocks} == {"desk", "laptop"}
    try:
        for language, name, tag, text in blocks:
            if tag.startswith("until="):  # as a reader would look again
                _wait_said(machines(name), text.strip(), tag.partition("=")[2])
            elif tag == "asleep":
                _signal(started[0], signal.SIGSTOP)
                reader.do(language, name, "", text)
                _signal(started[0], signal.SIGCONT)
                out, err = started[0].communicate(timeout=60)
                assert started[0].returncode == 1, err
                assert "what was held is lost" in err
                assert out == "deploying from laptop\n"
            elif tag == "kill":
                _signal(started[1], signal.SIGKILL)
                started[1].communicate(timeout=60)
            else:
                reader.do(language, name, tag, text)
            if tag == "background":
                background = machines(name).background
                assert background is not None
                started.append(background)
    finally:
        for process in started:
            if process.poll() is None:
                _signal(process, signal.SIGKILL)
                process.communicate(timeout=60)

    # What the text promises.
    assert desk.node is not None
    assert laptop.node is not None
    heard = reader.heard
    assert "deploying from desk" in heard("ww lock deploy -- python3")
    assert "is held by others" in heard("--wait 0")
    late = heard("time.sleep(5)")
    assert late.startswith(("capability.denied.fenced ", "sync.lease_ended "))
    assert late.endswith("b'2'\n")
    assert heard("pass_") == "[1, 2, 3]\n"
    live = heard("ww blob cat")
    assert live.startswith("<h1>two</h1>\n")
    assert live.count("bafk") == 2, "the present one, and the one before"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_how_to_of_agreeing_works_as_it_is_written(machines: Callable[[str], Machine]) -> None:
    """One node: every block, in the order of the text."""
    desk = machines("desk")
    desk.start_node("ww node")
    reader = Reader(machines)
    for language, name, tag, text in _BLOCK.findall((ROOT / AGREEING).read_text()):
        reader.do(language, name, tag, text)

    # What the text promises.
    heard = reader.heard
    assert heard("nightly.sh").count("working\n") == 1
    led = heard("leaders(").splitlines()
    assert led[-1] == "b, ready"
    assert sorted(line for line in heard("ww sem").split() if line in "12345") == list("12345")
    assert heard("at most") == "at most 3\n"
    assert heard("app.watch") == "{'colour': b'blue'}\n{'colour': b'green'}\n"
    assert heard("put_back") == "6 True\n"
    assert heard("exc.code") == "capability.denied.fenced\n"


def _wait_said(machine: Machine, command: str, text: str) -> None:
    """As a reader would look again, also where the command fails at first."""
    wait_for(
        lambda: text in machine.sh(f"{command} || true"), f"{text!r} from {command!r}", within_s=100
    )
