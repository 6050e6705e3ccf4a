"""Machine code of guests: made in a child process with limits, and kept on disk.

Whoever may run code may choose what is compiled, so that parsing and compiling happen where they
can cost nothing but a bounded child. What it made is machine code: it is loaded only from a
directory of the node's own, under a name that has its hash, and never comes from another node.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import secrets
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

from wetware.base.disk import write_all
from wetware.base.launch import end_with_parent
from wetware.base.log import get_logger
from wetware.base.threads import Threads, to_its_end
from wetware.errors import InternalError, LimitExceeded
from wetware_proc.driver import CodeRefused
from wetware_proc.wasm.engine import CONFIG, new_engine

CODE_BYTES_MAX: Final = 64 << 20  # of a module
COMPILED_BYTES_MAX: Final = 512 << 20  # of its machine code
MEMORY_BYTES_MAX: Final = 4 << 30  # of the address space of the child
CPU_S_MAX: Final = 120  # of the child, on all cores together
WALL_S_MAX: Final = 180.0
CHILDREN_MAX: Final = 2  # that compile at a time; who comes later waits
CACHE_BYTES_MAX: Final = 2 << 30  # on disk; what was not used for the longest time makes room
_WORDS_MAX: Final = 300  # of what is wrong with the code

_SUFFIX: Final = ".cwasm"
_MAGIC: Final = b"\0asm"

log = get_logger("proc.compile")


class Cache:
    """Compiled modules in a directory of its own. Its methods block.

    A name says what was compiled by what, and the hash of the result: what is damaged, or of
    another version, is not found.
    """

    def __init__(self, directory: Path, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._directory, self._bytes_max = directory, bytes_max
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._by = f"{version('wasmtime')}-{CONFIG}"
        for left in directory.glob("*.part"):
            left.unlink()

    def find(self, digest: str) -> Path | None:
        """The machine code of the module with this hash, if it is there and whole."""
        for path in self._directory.glob(f"{digest}-{self._by}-*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                if path.name == self._name(digest, _hash(path)):
                    os.utime(path)
                    return path
            path.unlink(missing_ok=True)
        return None

    def part(self) -> Path:
        return self._directory / f"{secrets.token_hex(8)}.part"

    def add(self, digest: str, part: Path) -> Path:
        """Take what was written in."""
        path = self._directory / self._name(digest, _hash(part))
        part.replace(path)
        self._make_room(path)
        return path

    def _name(self, digest: str, compiled: str) -> str:
        return f"{digest}-{self._by}-{compiled}{_SUFFIX}"

    def _make_room(self, newest: Path) -> None:
        found = [(path.stat(), path) for path in self._directory.glob(f"*{_SUFFIX}")]
        size = sum(stat.st_size for stat, _ in found)
        for stat, path in sorted(found, key=lambda each: each[0].st_mtime_ns):
            if size > self._bytes_max and path != newest:
                path.unlink()  # a program that is loaded keeps its own
                size -= stat.st_size


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


class Compiler:
    """Compiles what the cache does not have."""

    def __init__(self, cache: Cache, threads: Threads) -> None:
        self._cache, self._threads = cache, threads
        self._places = asyncio.Semaphore(CHILDREN_MAX)

    async def compiled(self, code: bytes, digest: str, *, afresh: bool = False) -> Path:
        """The machine code of a module, `afresh` where what the cache has cannot be used.

        Raises CodeRefused, and LimitExceeded where the node has no room for it.
        """
        if len(code) > CODE_BYTES_MAX:
            raise CodeRefused(f"the module has {len(code)} bytes: at most {CODE_BYTES_MAX}")
        if not code.startswith(_MAGIC):  # the engine would take a text as well
            raise CodeRefused("this is no WebAssembly module")
        if not afresh and (path := await self._threads.run(self._cache.find, digest)) is not None:
            return path
        async with self._places:
            try:
                return await made(self._cache, self._threads, digest, __name__, code, WALL_S_MAX)
            except TimeoutError:
                raise CodeRefused(f"the module is not compiled within {WALL_S_MAX:.0f} s") from None
            except ChildFailed as exc:
                if exc.code == REFUSED:
                    raise CodeRefused(f"no WebAssembly module: {exc}") from None
                if exc.code < 0:
                    raise CodeRefused(
                        f"the module costs more to compile than {CPU_S_MAX} s, or "
                        f"{MEMORY_BYTES_MAX >> 30} GiB of memory "
                        f"({signal.Signals(-exc.code).name})"
                    ) from None
                raise InternalError("the compiler failed", hint="the node's log says why") from None


class ChildFailed(Exception):
    """A child made no machine code: it returned `code`, and wrote `words` to stderr."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(clean(words))
        self.code = code


async def made(
    cache: Cache, threads: Threads, digest: str, module: str, data: bytes, wall_s: float
) -> Path:
    """Have a module of ours make machine code of `data`, in a process of its own, for the cache.

    That has this process's ID as its argument, and has ended, however this returns.
    Raises TimeoutError, ChildFailed, and LimitExceeded where the node has no room for the result.
    """
    part = cache.part()
    try:
        part.touch(0o600, exist_ok=False)
        with part.open("wb") as file:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-m", module, str(os.getpid()),
                stdin=asyncio.subprocess.PIPE, stdout=file, stderr=asyncio.subprocess.PIPE,
                env={"LANG": "C.UTF-8"}, start_new_session=True,
            )  # fmt: skip
        try:
            async with asyncio.timeout(wall_s):
                _, said = await child.communicate(data)
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            returned = await to_its_end(child.wait())
        words = said.decode(errors="replace")
        if returned == NO_ROOM:
            raise LimitExceeded(
                f"the machine code cannot be written: {clean(words)}",
                hint="make room on the disk of the node",
            )
        if returned:
            if returned != REFUSED:
                log.error("compiler.failed", by=module, code=returned, words=words)
            raise ChildFailed(returned, words)
        return await to_its_end(threads.run(cache.add, digest, part))
    finally:
        part.unlink(missing_ok=True)


def clean(words: str) -> str:
    """A message in which names may be the guest's: short, and it controls no terminal."""
    lines = " ".join(words.split())
    return "".join(each if each.isprintable() else "?" for each in lines)[:_WORDS_MAX]


# --- in the child --------------------------------------------------------------------------------

REFUSED, NO_ROOM = 3, 4


def limit_self(
    parent: int, *, memory_bytes: int = MEMORY_BYTES_MAX, cpu_s: int = CPU_S_MAX, files: int = 32
) -> None:
    """Take less of the machine, and end with the parent."""
    if not end_with_parent(parent):
        sys.exit(1)
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, COMPILED_BYTES_MAX),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, files),
    ):
        resource.setrlimit(kind, (most, most))
    os.nice(10)


def main(read: Callable[[], bytes]) -> int:
    from wasmtime import Module, WasmtimeError

    code = read()
    try:
        data = Module(new_engine(), code).serialize()
    except (WasmtimeError, MemoryError) as exc:
        sys.stderr.write(clean(str(exc) or "it takes too much memory"))
        return REFUSED
    return written(data)


def written(data: bytes | bytearray) -> int:
    """Write what was made; returns the code to exit with."""
    try:
        write_all(1, data)
    except OSError as exc:
        sys.stderr.write(exc.strerror or "")
        return NO_ROOM
    return 0


if __name__ == "__main__":
    limit_self(int(sys.argv[1]))
    sys.exit(main(sys.stdin.buffer.read))
