"""Fixtures and policies for every test."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from wetware.testing import Home

# A shell starts background jobs with SIGINT ignored, and programs inherit that: the tests that send
# a Ctrl-C would then test the shell. What is caught here is back at its default in a child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests start hundreds of processes: they share compiled modules, whatever the environment says.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes, or to make one, depends on what else the machine does.
settings.register_profile("wetware", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("wetware")

# Most tests of nodes are about other things; those of libp2p ask for it. Half of their time.
Home.libp2p = False
# Half again. What tests a start, an import or an installed `ww` starts processes of its own.
Home.forked = sys.platform == "linux"

RECURSION_LIMIT = sys.getrecursionlimit()

LONGEST = (
    "test_never_fewer_copies_than_wanted_through",
    "test_of_two_members_one_takes_all_of_the_other",
    "test_python.py::test_a_program_has_its_arguments",  # builds the Python runner
    "test_caps.py::test_a_guest_calls_its_grants",  # compiles the C library
    "[a method ignores cancellation]",  # all that a check has, twice
)
"""Parts of the names of tests that take half a minute or more, much of it waiting."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is collected stays: to look for garbage in it takes a third of the time.

    A collection of everything is a third of a second of each worker: they are ten times rarer.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        young, middle, old = gc.get_threshold()
        gc.set_threshold(young, middle, 10 * old)
        gc.enable()


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the longest tests, then those of networks, which wait for most of their time.

    What needs the processors fills it: at the end nothing would.
    """
    items.sort(
        key=lambda item: (
            all(name not in item.nodeid for name in LONGEST),
            "/reach/" not in item.nodeid,
        )
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """With WW_REQUIRE_ALL=1 a skipped test is a failed one: nothing is left out silently."""
    report = yield
    needed = os.environ.get("WW_REQUIRE_ALL") and item.get_closest_marker("machine") is None
    if report.skipped and not hasattr(report, "wasxfail") and needed:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped with WW_REQUIRE_ALL set: {report.longrepr}"
    return report


class SmallDisk:
    """A file system of its own, which a test can fill to the last byte."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leave no room."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        """Make room again."""
        (self.path / "ballast").unlink(missing_ok=True)

    @property
    def free_bytes(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize


@pytest.fixture
def small_disk() -> Iterator[SmallDisk]:
    """16 MiB; skipped where nothing can be mounted.

    Not below `tmp_path`: what a killed run leaves mounted there would fail each later run, which
    removes the folders of old ones.
    """
    path = Path(tempfile.mkdtemp(prefix="ww-small-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
        yield SmallDisk(path)
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", str(path)], check=True)
        path.rmdir()
