"""The runner of Python guests: a component that is built once on each machine, and kept.

It has CPython, its standard library and our few lines, started already. It is made in a child
process with limits, as other guests' machine code is: of our own files, by a package from PyPI.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.base.log import get_logger
from wetware.errors import InternalError
from wetware_proc.driver import DriverUnavailable
from wetware_proc.wasm.compile import Cache, ChildFailed, limit_self, made, written

if TYPE_CHECKING:
    from wetware.base.threads import Threads

STACK_BYTES: Final = 2 << 20
"""Of a guest: so much takes Python to find out itself that it recurses too deeply."""
CACHE_BYTES_MAX: Final = 256 << 20  # a runner has about 50 MB
WALL_S_MAX: Final = 900.0
CPU_S_MAX: Final = 600
MEMORY_BYTES_MAX: Final = 256 << 30
"""Of address space: what builds it reserves much, and uses about 1 GiB."""
FILES_MAX: Final = 256
_RUNNER: Final = Path(__file__).with_name("runner")
_PACKAGE: Final = "componentize_py"

log = get_logger("proc.python")


def digest() -> str:
    """Of all that the runner depends on. Raises DriverUnavailable."""
    if importlib.util.find_spec(_PACKAGE) is None:
        raise DriverUnavailable(
            "this node has no Python for programs: it lacks componentize-py",
            hint="pip install 'wetware[proc]' there",
        )
    found = hashlib.sha256(f"{version('componentize-py')} {STACK_BYTES}".encode())
    for path in sorted(_RUNNER.glob("*.*")):
        found.update(f"\n{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()


async def built(cache: Cache, threads: Threads) -> Path:
    """The compiled runner; takes half a minute where there is none yet.

    Raises DriverUnavailable, LimitExceeded, and InternalError.
    """
    wanted = await threads.run(digest)
    if (path := await threads.run(cache.find, wanted)) is not None:
        return path
    log.info("runner.building", hint="once, and again after an upgrade")
    try:
        path = await made(cache, threads, wanted, __name__, b"", WALL_S_MAX)
    except ChildFailed:
        raise InternalError("the runner of Python failed to build", hint="the node's log") from None
    except TimeoutError:
        raise InternalError(f"the runner of Python is not built in {WALL_S_MAX:g} s") from None
    log.info("runner.built")
    return path


def main() -> int:
    """In the child."""
    from componentize_py import script  # type: ignore[import-untyped]  # it has no types

    from wetware_proc.python.component import compiled

    out = os.dup(1)
    os.dup2(2, 1)  # what the package says is no part of the result
    with tempfile.TemporaryDirectory() as scratch:
        app = Path(scratch) / "app"
        shutil.copytree(_RUNNER, app, ignore=shutil.ignore_patterns("__pycache__"))
        os.environ["VIRTUAL_ENV"] = scratch  # or it looks for modules in this interpreter's
        component = app / "component.wasm"
        sys.argv = [
            _PACKAGE, "-q", "-d", str(app / "runner.wit"), "-w", "runner",
            "componentize", "-p", str(app), "app", "-o", str(component),
        ]  # fmt: skip
        try:
            script()
        except SystemExit as exc:
            if exc.code:
                return 1
        data = compiled(component.read_bytes(), STACK_BYTES)
    os.dup2(out, 1)
    return written(data)


if __name__ == "__main__":
    limit_self(int(sys.argv[1]), memory_bytes=MEMORY_BYTES_MAX, cpu_s=CPU_S_MAX, files=FILES_MAX)
    sys.exit(main())
