"""Colours: at a terminal and nowhere else, and never in the way of the columns."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wetware.cli import app
from wetware.testing import Home

SGR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path) as made:
        yield made


def at_terminal(home: Home, *command: str, **env: str) -> str:
    """What a command writes, stdout and stderr, to a terminal."""
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in home.env.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**clean, "TERM": "xterm", **env},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # EIO: the other side is closed
            break
        if not data:
            break
        written += data
    process.wait(60)
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


def test_errors_are_red_at_a_terminal(home: Home) -> None:
    written = at_terminal(home, "-m", "wetware", "whoami")
    assert "\x1b[31mww:\x1b[0m no node is running here" in written


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_whoever_wants_no_colours_gets_none(home: Home, env: dict[str, str]) -> None:
    assert "\x1b" not in at_terminal(home, "-m", "wetware", "whoami", **env)


def test_an_empty_no_color_is_none(home: Home) -> None:
    assert "\x1b[31m" in at_terminal(home, "-m", "wetware", "whoami", NO_COLOR="")


def test_no_colours_in_a_file_or_pipe_unless_forced(home: Home) -> None:
    assert "\x1b" not in home.ww("whoami").stderr
    assert "\x1b[31mww:" in home.ww("whoami", env={"FORCE_COLOR": "1"}).stderr
    both = home.ww("whoami", env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert "\x1b" not in both.stderr


_TABLE = """
from wetware.cli.app import STATE_STYLES, table
rows = [("a", "alive", "x"), ("bb", "suspect", "")]
rows += [("\u6771\u4eac", "dead", "y\x1b[2J"), ("d", "left", "z")]
table(("name", "state", "more"), rows, styles={"state": STATE_STYLES})
"""


def test_a_table_keeps_its_columns_in_colour(home: Home) -> None:
    painted = at_terminal(home, "-c", _TABLE)
    plain = at_terminal(home, "-c", _TABLE, NO_COLOR="1")
    assert SGR.sub("", painted) == plain
    assert "\x1b[32malive\x1b[0m" in painted
    assert "\x1b[33msuspect\x1b[0m" in painted
    assert "\x1b[31mdead\x1b[0m" in painted
    assert "\x1b[2mleft\x1b[0m" in painted
    assert "\x1b[2J" not in painted, "what a node says does not reach the terminal as an escape"
    header, *rows = plain.splitlines()
    assert header == "NAME  STATE    MORE"
    # Two wide characters take four columns.
    assert rows == [
        "a     alive    x",
        "bb    suspect",
        "東京  dead     y\\x1b[2J",
        "d     left     z",
    ]


def test_rich_is_not_imported_for_colours(home: Home) -> None:
    code = "import sys; from wetware.cli.app import note, Styled; note(Styled('x', 'red'))\n"
    code += "assert not {m for m in sys.modules if m.startswith('rich')}"
    assert at_terminal(home, "-c", code) == "\x1b[31mx\x1b[0m\n"


def test_a_style_never_changes_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    app.out("a ", app.Styled("b\x1b[0mc", "green"), app.Styled("", "red"), app.Styled("d", None))
    assert capsys.readouterr().out == "a \x1b[32mb\\x1b[0mc\x1b[0md\n"
