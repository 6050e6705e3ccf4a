"""Log lines: one per event, and nothing that a peer sends can forge another."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from wetware.base.log import JsonFormatter, TextFormatter, get_logger


def _record(caplog: pytest.LogCaptureFixture, **fields: object) -> logging.LogRecord:
    with caplog.at_level(logging.INFO, "wetware.test"):
        get_logger("test").info("thing.happened", **fields)
    return caplog.records[-1]


def test_text_line(caplog: pytest.LogCaptureFixture) -> None:
    line = TextFormatter().format(_record(caplog, peer="12D3", count=3))
    assert line.endswith("info    thing.happened peer=12D3 count=3")


@pytest.mark.parametrize("evil", ["a\nfatal everything.lost", "a b=c", "\x1b[31m", "", 'x="y"'])
def test_a_value_stays_on_its_line_and_in_its_field(
    caplog: pytest.LogCaptureFixture, evil: str
) -> None:
    line = TextFormatter().format(_record(caplog, peer=evil))
    assert "\n" not in line
    assert "\x1b" not in line
    assert json.loads(line.partition(" peer=")[2]) == evil


def test_json_line(caplog: pytest.LogCaptureFixture) -> None:
    data = json.loads(JsonFormatter().format(_record(caplog, peer="a\nb")))
    assert (data["event"], data["peer"], data["level"]) == ("thing.happened", "a\nb", "info")


def test_exceptions_have_their_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "wetware.test"):
        get_logger("test").error("thing.failed", exc_info=ValueError("why"), part="x")
    text = TextFormatter().format(caplog.records[-1])
    assert "ValueError: why" in text
    assert "thing.failed part=x" in text


def test_a_program_that_sets_nothing_up_has_no_bare_names_on_its_stderr() -> None:
    program = (
        "from wetware.base.log import get_logger; get_logger('test').warning('endpoint.failing')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
