"""One process: a guest, from its spawn to the report of its end, and its standard streams.

The streams are the caller's, who may be slow or gone: what a guest writes waits for its reader, and
fails as a write to a pipe that nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
from anyio import ClosedResourceError, EndOfStream

from wetware import rpc
from wetware.base.log import get_logger
from wetware.errors import (
    Disconnected,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Unsupported,
    WetwareError,
)
from wetware_proc.driver import Exit, Image, Pipe, Spec
from wetware_proc.grants import NAME_BYTES_MAX

if TYPE_CHECKING:
    from wetware.hookspecs import Derived

log = get_logger("proc")

OUT_BYTES_MAX: Final = 256 << 10
"""Of what a guest wrote, on the way to the reader's stream; beyond it the guest waits."""
OFFERS_MAX: Final = 64  # capabilities, of one process to its spawner
FLUSH_S: Final = 2.0  # for the reader to take what a killed guest had written
SIGNALS: Final = ("HUP", "INT", "QUIT", "USR1", "USR2", "TERM", "KILL", "STOP", "CONT")
_READ_BYTES: Final = 64 << 10


class Stream(Protocol):
    """What is read of `rpc.ByteStream`, or else does as that does."""

    async def receive(self, max_bytes: int = 0) -> bytes: ...

    async def send(self, item: bytes) -> None: ...

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...

    def abort(self, error: WetwareError) -> None: ...


class Outlet:
    """What a guest writes, on its way to a stream. Small pieces travel together.

    `told` is called when there is no room for more.
    """

    def __init__(self, told: Callable[[], None]) -> None:
        self._told = told
        self.data = bytearray()  # what is not on the stream yet
        self._ended = self._failed = False
        self._changed, self._room = asyncio.Event(), asyncio.Event()
        self.sent = asyncio.Event()  # set once all is on the stream, or nobody reads it

    def write(self, data: bytes) -> asyncio.Future[None] | None:
        """See `driver.Output`."""
        if self._failed:
            raise BrokenPipeError("nobody reads it")
        self.data += data
        self._changed.set()
        if not self.full:
            return None
        self._room.clear()
        self._told()
        return asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        await self._room.wait()
        if self._failed:
            raise BrokenPipeError("nobody reads it")

    @property
    def full(self) -> bool:
        return len(self.data) >= OUT_BYTES_MAX

    async def run(self, stream: Stream) -> None:
        """Send it all, and wait until the reader has closed the stream, who may take its time."""
        try:
            while not (self._ended and not self.data):
                await self._changed.wait()
                self._changed.clear()
                while self.data:
                    data, self.data = bytes(self.data), bytearray()
                    await stream.send(data)
                    self._room.set()
            await stream.send_eof()
            self.sent.set()
            while True:
                await stream.receive()
        except (WetwareError, ClosedResourceError, EndOfStream):
            self._failed = True
            self.data.clear()
            self._room.set()
        finally:
            self.sent.set()
            await stream.aclose()

    def end(self) -> None:
        self._ended = True
        self._changed.set()


class Process:
    """See Process in proc.capnp."""

    def __init__(
        self,
        id_: str,
        owner: str,
        image: Image,
        spec: Spec,
        read: bytes = b"",
        stdin: Stream | None = None,
    ) -> None:
        self.id, self.owner = id_, owner
        self.digest, self.kind, self._signals = image.digest, image.kind, image.signals
        self._image: Image | None = image
        self.started_at = time.time()
        self.exit: Exit | None = None  # while it runs
        self._news = asyncio.Event()
        self._reads = False  # it has waited for its input
        self.outlets = stdout, stderr = Outlet(self._news.set), Outlet(self._news.set)
        self._outs: asyncio.Future[Sequence[Stream]] = asyncio.Future()
        self._stdin = stdin
        self.spec = replace(
            spec,
            owner=owner,
            stdin=Pipe(read, closed=stdin is None, wanted=self._wants),
            signals=Pipe(),
            stdout=stdout.write,
            stderr=stderr.write,
            offer=self._offer,
        )
        # By name, its ports included; of one that has exited by itself what others serve, until
        # `release`.
        self.offered: dict[str, rpc.Ref | rpc.Servant] = {}
        self.grant: Derived | None = None  # of all that it has; None where that is kept for longer
        self._why = ""
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Run it to its end, once. Not to be cancelled: `kill` ends it."""
        image, self._image = self._image, None
        assert image is not None  # noqa: S101  # once
        self._sending = asyncio.ensure_future(self._send())
        feeding = asyncio.ensure_future(self._feed())
        found: list[Exit] = []

        async def work() -> None:
            found.append(await image.run(self.spec))
            await self._flush()  # a slow reader delays the report of an end, and not of a kill

        self._task = asyncio.ensure_future(work())
        if self._why:  # killed before there was a task
            self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            found.append(Exit("killed", why=self._why))
        except WetwareError as exc:
            found.append(Exit("trapped", why=exc.message))
        except Exception:
            log.exception("proc.driver_failed", process=self.id)
            found.append(Exit("lost", why="the node failed to run it; its log says why"))
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._flush()
        except TimeoutError:
            self.open()
            for stream in self._outs.result():
                stream.abort(Disconnected("the process was killed, and nobody read what it wrote"))
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        if self._stdin is not None:
            self._stdin.abort(Disconnected("the process has ended"))
        self.spec.signals.close()
        spec = self.spec
        # Who has ended is remembered for long: its machine code, arguments and grants are not.
        self.spec = Spec(args=spec.args[:1], limits=spec.limits, code=spec.code, dirs=spec.dirs)
        keeps = self.grant is not None and found[0].kind == "exited"
        self.offered = {
            name: each for name, each in self.offered.items() if keeps and isinstance(each, rpc.Ref)
        }
        self.exit = found[0]
        self._end_grant()
        self._over.set()
        self._news.set()

    def _wants(self) -> None:
        self._reads = True
        self._news.set()

    def _offer(self, name: str, what: rpc.Ref | rpc.Servant) -> None:
        if not 0 < len(name.encode()) <= NAME_BYTES_MAX or name in self.offered:
            raise InvalidArgument(
                f"what is offered has a name of its own, of at most {NAME_BYTES_MAX} bytes"
            )
        if len(self.offered) >= OFFERS_MAX:
            raise LimitExceeded(f"a process offers at most {OFFERS_MAX} capabilities (OFFERS_MAX)")
        if isinstance(what, rpc.Ref) and what.interface is not None:
            what = what.cast(what.interface)  # that one is closed with what it came by
        self.offered[name] = what
        self._news.set()

    def release(self, why: str) -> None:
        """Its spawner holds it no more: it ends, and all that it has offered."""
        self.kill(why)
        self.offered = {}
        self._end_grant()

    def _end_grant(self) -> None:
        if self.grant is not None and self.exit is not None and not self.offered:
            self.grant.end("the process has ended")

    async def exported(self, name: str, wait_s: float) -> rpc.Ref | rpc.Servant:
        """What it offers by this name, once it does. Raises NotFound where it does not."""
        with anyio.move_on_after(wait_s):
            while name not in self.offered and self.exit is None:
                self._news.clear()
                await self._news.wait()
        if (what := self.offered.get(name)) is None:
            raise NotFound(
                f"the process offers nothing named {name[:64]!r}",
                hint=f"it offers: {', '.join(sorted(self.offered)) or 'nothing'}"
                if self.exit is None
                else "it has ended",
                code="not_found.export",
            )
        return what

    def open(self, *streams: Stream) -> None:
        """What it writes goes there: to one for each outlet. Without any, nobody will read it."""
        if not self._outs.done():
            self._outs.set_result(streams)

    async def settled(self, wait_s: float) -> bool:
        """Whether it has ended within so many seconds, and `outlets` have all that it wrote.

        Otherwise it has to be given streams; also as soon as it waits for its spawner to write, or
        to read.
        """
        with anyio.move_on_after(wait_s):
            while not (self.exit or self._reads or any(outlet.full for outlet in self.outlets)):
                self._news.clear()
                await self._news.wait()
        if self._outs.done():  # it is about to
            await self.wait()
        return self.exit is not None

    async def _send(self) -> None:
        streams = await self._outs
        if streams:
            await asyncio.gather(*map(Outlet.run, self.outlets, streams))
        for outlet in self.outlets:
            outlet.sent.set()

    async def _flush(self) -> None:
        for outlet in self.outlets:
            outlet.end()
        if not any(outlet.full for outlet in self.outlets):
            self.open()
        for outlet in self.outlets:
            await outlet.sent.wait()

    async def _feed(self) -> None:
        pipe = self.spec.stdin
        if self._stdin is None:
            return
        try:
            while True:
                await pipe.write(await self._stdin.receive(_READ_BYTES))
        except (EndOfStream, WetwareError, ClosedResourceError, BrokenPipeError):
            pipe.close()

    @property
    def info(self) -> dict[str, Any]:
        """Of the struct Info of proc.capnp, what is not told of the others in the same way."""
        return {
            "name": self.spec.args[0],
            "hash": self.digest,
            "kind": self.kind,
            "memory_bytes": self.spec.limits.memory_bytes,
            "code": self.spec.code,
            "policy": "",
            "restarts": 0,
            "waits": False,
            "dirs": [
                {"path": path, "hash": directory.name}
                for path, (directory, _) in self.spec.dirs.items()
            ],
        }

    async def signal(self, name: str) -> None:
        if name not in SIGNALS:
            raise InvalidArgument(
                f"{name[:32]!r} is no signal that a process is sent",
                hint=f"one of {', '.join(SIGNALS)}",
                code="invalid.signal",
            )
        if self.exit is not None:
            raise InvalidArgument("the process has ended", hint="ww ps", code="invalid.process")
        if not self._signals:
            if name in ("TERM", "KILL"):  # what they do to who does not handle them
                return self.kill(f"by SIG{name}")
            raise Unsupported(
                f"a program of the kind {self.kind} has no signals",
                hint=f"end it: ww kill {self.id}",
                code="unsupported.signal",
            )
        with contextlib.suppress(BrokenPipeError):  # it ends just now, as any signal may find it
            await self.spec.signals.write(bytes([signal.Signals[f"SIG{name}"]]))

    def kill(self, why: str) -> None:
        """End it, unless it has; `wait` says when it is over."""
        if self.exit is None and not self._why:  # once: a driver that cleans up goes on with that
            self._why = why
            if self._task is not None:
                self._task.cancel()

    async def wait(self, wait_s: float | None = None) -> Exit | None:
        """How it ended, when it has, or after so many seconds whether it has."""
        with anyio.move_on_after(wait_s):
            await self._over.wait()
        return self.exit
