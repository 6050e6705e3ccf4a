"""Fixtures and policies for every test."""

from __future__ import annotations

import os
import signal
import sys

import pytest

# A shell starts background jobs with SIGINT ignored, and programs inherit that: the tests that send
# a Ctrl-C would then test the shell. What is caught here is back at its default in a child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


RECURSION_LIMIT = sys.getrecursionlimit()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each test has the interpreter's limit, as a node has: importing py-evm raises it."""
    sys.setrecursionlimit(RECURSION_LIMIT)


@pytest.fixture(autouse=True, scope="session")
def _no_home_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a login in this process remembers is not kept among the user's own things."""
    os.environ["WW_HOME"] = str(tmp_path_factory.mktemp("ww-home"))


@pytest.fixture
def anyio_backend() -> str:
    """Asyncio is the host loop of wetware; trio runs as its guest."""
    return "asyncio"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """With WW_REQUIRE_ALL=1 a skipped test is a failed one: nothing is left out silently."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("WW_REQUIRE_ALL"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped with WW_REQUIRE_ALL set: {report.longrepr}"
    return report
