"""What every driver offers: code → image, image and spec → the end of a guest.

A guest is a program that runs. It has what its `Spec` names, and nothing else: no file, no network,
no clock that it could not guess, no capability beside its grants. This module knows no engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeVar

from wetware.errors import InvalidArgument, Unsupported, WetwareError

if TYPE_CHECKING:
    from wetware import rpc
    from wetware.base.threads import Threads

HASHED_BYTES_MAX: Final = 1 << 20  # of code, on the loop
PIPE_BYTES: Final = 64 << 10  # in a Pipe; whoever writes more waits
START_BYTES: Final = 1 << 20  # of arguments and environment together
START_TEXTS: Final = 4096  # arguments, variables and directories together
TIME_S_MAX: Final = 10 * 366 * 24 * 3600  # of a guest; none is meant
UNLIMITED: Final = frozenset({"memory_bytes", "cpu_s"})

T = TypeVar("T")

Output = Callable[[bytes], Awaitable[None] | None]
"""Takes a piece of what a guest writes.

None: it is taken. An awaitable: it is taken as well, and the guest waits until that is done, so a
reader that is slow holds its guest up. It is cancelled where the guest is killed meanwhile. An
OSError, raised at once or later, is what the write of the guest fails with: BrokenPipeError where
nobody reads any more.
"""


def sha256(code: bytes) -> str:
    """What a program is known by, in hex."""
    return hashlib.sha256(code).hexdigest()


async def digest_of(code: bytes, threads: Threads) -> str:
    """`sha256`, in a thread where it takes long."""
    return sha256(code) if len(code) <= HASHED_BYTES_MAX else await threads.run(sha256, code)


class CodeRefused(WetwareError):
    """What was to be loaded is no program for this driver, or costs too much to prepare."""

    code = "proc.code"


class DriverUnavailable(Unsupported):
    """This machine lacks what the driver needs to keep its promise."""

    code = "unsupported.driver"


def _limit(usual: T, low: float, high: float) -> T:
    """A field, with the smallest and the largest value that it may have."""
    return field(default=usual, metadata={"bounds": (low, high)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one guest may use. Raises InvalidArgument for what nobody may have.

    For what is in `UNLIMITED` 0 is no limit, where the driver has guests without one.
    """

    # From a page of WebAssembly to what 32 bits address.
    memory_bytes: int = _limit(64 << 20, 64 << 10, 4 << 30)
    wall_s: float = _limit(3600.0, 0.001, TIME_S_MAX)  # from start to end
    cpu_s: float = _limit(3600.0, 0.001, TIME_S_MAX)  # of one core
    # On stdout and stderr together; one that writes faster waits.
    output_bytes_s: int = _limit(256 << 20, 1 << 10, 16 << 30)
    handles_max: int = _limit(1024, 0, 65536)  # capabilities that it holds at a time
    calls_max: int = _limit(64, 1, 1024)  # calls of its capabilities that are in flight at a time
    # Added to files: in its own /tmp, and in directories it may write.
    tmp_bytes: int = _limit(64 << 20, 0, 1 << 40)
    tmp_files: int = _limit(1024, 0, 1 << 20)  # names added there; 0: there is no /tmp

    def __post_init__(self) -> None:
        for each in fields(self):
            value, (low, high) = getattr(self, each.name), each.metadata["bounds"]
            if not low <= value <= high and (value or each.name not in UNLIMITED):
                raise InvalidArgument(
                    f"the limit {each.name} is {value}: it is from {low} to {high}",
                    code="invalid.limit",
                )


@dataclass(frozen=True, slots=True)
class Exit:
    """How a guest ended. All its output was taken before.

    exited: by itself. trapped: it did what no program may. limit: it ran into one. killed, lost: by
    somebody, with its node; said by who runs drivers, never by a driver.
    """

    kind: Literal["exited", "trapped", "killed", "limit", "lost"]
    code: int = -1  # of one that exited: 0 to 255, or what the guest said above that
    why: str = ""  # in words; for `limit` the field of `Limits`, or `stack`, or `tables`
    cpu_s: float = 0.0


class Pipe:
    """Bytes on the way to a guest, at most PIPE_BYTES. Of one loop.

    Args:
        data: What is in it at the start.
        closed: Nothing follows that.
        wanted: Is called where the guest has to wait for more.
    """

    def __init__(
        self,
        data: bytes = b"",
        *,
        closed: bool = False,
        wanted: Callable[[], object] = lambda: None,
    ) -> None:
        self._data, self._closed, self._wanted = bytearray(data), closed, wanted
        self._changed = asyncio.Event()

    @property
    def available(self) -> int:
        return len(self._data)

    @property
    def ready(self) -> bool:
        """Whether `take` gives bytes, or the end."""
        return bool(self._data) or self._closed

    def take(self, bytes_max: int) -> bytes:
        """What is there; b"" is the end where `ready`."""
        data = bytes(self._data[:bytes_max])
        del self._data[:bytes_max]
        self._tell()
        return data

    async def wait(self) -> None:
        """Return when `ready`. Any number may wait; each may be cancelled."""
        while not self.ready:
            self._wanted()
            await self._changed.wait()

    async def read(self, bytes_max: int) -> bytes:
        """Wait, and take; b"" is the end."""
        await self.wait()
        return self.take(bytes_max)

    async def write(self, data: bytes) -> None:
        """Return when all is in the pipe; raises BrokenPipeError if it is closed."""
        view = memoryview(data)
        while view:
            if self._closed:
                raise BrokenPipeError("the pipe is closed")
            if room := PIPE_BYTES - len(self._data):
                self._data += view[:room]
                view = view[room:]
                self._tell()
            else:
                await self._changed.wait()

    def close(self) -> None:
        """Let the end follow what is in the pipe. Idempotent."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _closed_pipe() -> Pipe:
    return Pipe(closed=True)


def discard(data: bytes) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """All that a guest gets. Raises InvalidArgument for what no program can be given."""

    args: tuple[str, ...] = ()  # the first is its own name
    env: Mapping[str, str] = field(default_factory=dict)
    # Absolute path inside → directory of the host, and whether the guest may write in it. /tmp is
    # the guest's own, and comes by itself.
    dirs: Mapping[str, tuple[Path, bool]] = field(default_factory=dict)
    # By name, each of a known interface; not the driver's to close.
    grants: Mapping[str, rpc.Ref] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    # Name → TCP port that it listens at, on its loopback interface.
    ports: Mapping[str, int] = field(default_factory=dict)
    # Takes what the guest offers to its spawner, by name, and its ports.
    offer: Callable[[str, rpc.Ref | rpc.Servant], None] = lambda name, what: None
    code: str = ""  # what its spawner calls the program by; nothing that it sees
    owner: str = ""  # who answers for it: many guests get no more of the processors than few
    stdin: Pipe = field(default_factory=_closed_pipe)
    signals: Pipe = field(default_factory=_closed_pipe)  # of bytes: numbers, see Image.signals
    stdout: Output = discard
    stderr: Output = discard

    def __post_init__(self) -> None:
        if len(self.args) + len(self.env) + len(self.dirs) > START_TEXTS:
            raise InvalidArgument(
                f"more than {START_TEXTS} arguments, variables and directories",
                hint="give large input on stdin",
            )
        texts = [*self.args, *self.env, *self.env.values(), *self.dirs]
        if any("\0" in text for text in texts) or any("=" in name for name in self.env):
            raise InvalidArgument(
                "an argument, a variable or a path has a NUL in it, or a variable's name has a ="
            )
        if sum(len(os.fsencode(text)) + 1 for text in texts) > START_BYTES:
            raise InvalidArgument(
                f"arguments, environment and paths have more than {START_BYTES} bytes",
                hint="give large input on stdin",
            )
        if any(not path.startswith("/") or path == "/tmp" for path in self.dirs):  # noqa: S108 - the guest's
            raise InvalidArgument("a directory's path is absolute, and is not /tmp")


class Image(ABC):
    """A program that is ready to run, as often as wanted and at the same time.

    `digest` is the `sha256` of its code, and `kind` that of its driver.
    """

    usual = Limits()  # of a guest whose spawner does not say
    signals = False  # whether a guest can be sent any

    def __init__(self, digest: str, kind: str) -> None:
        self.digest, self.kind = digest, kind

    def check(self, spec: Spec) -> None:
        """Raise Unsupported for what the driver cannot do here, before anything begins."""
        if spec.ports:
            raise Unsupported(
                f"a program of the kind {self.kind} has no ports",
                hint="ww run -- PROGRAM, of the service `native`, can have some",
                code="unsupported.ports",
            )

    @abstractmethod
    async def run(self, spec: Spec) -> Exit:
        """Run it to its end.

        Cancelling kills: once `run` has ended nothing of the guest goes on, calls of its grants and
        of its outputs included. Raises what is a defect of the host: of an output, say.
        """


class Driver(Protocol):
    """Knows programs of one kind."""

    async def load(self, code: bytes) -> Image:
        """Prepare a program; quick where the same code was prepared before, on this machine.

        Raises CodeRefused; DriverUnavailable where this machine lacks what it takes.
        """
