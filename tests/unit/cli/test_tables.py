"""Tables on a terminal: as wide as it is, and nothing is lost."""

from __future__ import annotations

import io
import sys

import pytest

from wetware.cli import app


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


HEADER = ("name", "id", "address", "services")
ROWS = [
    ("desk *", "x" * 52, "/ip4/192.168.100.200/tcp/4001", "auth_local blob proc pubsub sync"),
    ("東京都庁", "y" * 52, "-", "-"),
    ("  indented label of a tree", "z", "", ""),
]


def shown(monkeypatch: pytest.MonkeyPatch, columns: str, rows: list[tuple[str, ...]]) -> list[str]:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    app.table(HEADER, rows)
    return terminal.getvalue().splitlines()


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120, 132])
def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    lines = shown(monkeypatch, str(columns), ROWS)
    assert max(map(app._width, lines)) <= columns
    text = "".join("".join(lines).split())
    for row in ROWS:
        for cell in row:
            for char in set(cell) - {" "}:
                wanted = sum("".join(each).count(char) for each in ROWS)
                assert text.count(char) >= wanted, "nothing is cut off"


def test_what_can_be_broken_between_words_gives_way_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("desk", "12D3KooW", "/ip4/10.0.0.1/tcp/4001", "auth_local blob proc pubsub")]
    assert shown(monkeypatch, "60", rows) == [
        "NAME  ID        ADDRESS                 SERVICES",
        "desk  12D3KooW  /ip4/10.0.0.1/tcp/4001  auth_local blob proc",
        "                                        pubsub",
    ]


def test_a_wide_terminal_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = shown(monkeypatch, "1000", ROWS)
    assert len(wide) == 1 + len(ROWS)
    assert wide[1].split() == " ".join(ROWS[0]).split()


@pytest.mark.parametrize("columns", ["0", "x", "", "7"])
def test_a_terminal_of_no_width_still_gets_it_all(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    lines = shown(monkeypatch, columns, ROWS)
    assert "NAME" in lines[0]
    assert "".join("".join(lines).split()).count("x") >= 52


def test_data_is_never_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    app.table(HEADER, ROWS)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(ROWS)


def test_a_colour_covers_each_line_of_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "24")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    cell = "alive and well so far"
    app.table(("name", "state"), [("x" * 14, cell)], styles={"state": {cell: "green"}})
    painted = [line for line in terminal.getvalue().splitlines() if "\x1b" in line]
    assert len(painted) > 1
    assert all(line.endswith("\x1b[0m") for line in painted)
