"""Programs that outlive who started them: kept on disk, and started again as their policy says.

A detached program has a durable grant of its node, by ID, and its code and directories by their
hashes: so it comes back after a restart of the node, also one by kill -9. No record says that a
program runs: the process of the node that runs it knows that alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio
from anyio import EndOfStream

from wetware.base.backoff import Backoff
from wetware.base.tasks import Tasks
from wetware.base.threads import to_its_end
from wetware.errors import InternalError, InvalidArgument, LimitExceeded, NotFound, WetwareError
from wetware.identity import replace_private_file
from wetware_proc.driver import TIME_S_MAX, Exit, sha256
from wetware_proc.grants import by_name
from wetware_proc.logs import Log
from wetware_proc.process import Process

if TYPE_CHECKING:
    from wetware import rpc
    from wetware.hookspecs import Derived, PluginContext
    from wetware_proc.driver import Image, Limits
    from wetware_proc.table import Table

T = TypeVar("T")


POLICIES: Final = ("never", "on-failure", "always")
"""When a program is started again: never; unless it exited with 0; however it ended."""
PAUSE_S_MIN: Final = 1.0
PAUSE_S_MAX: Final = 60.0
STEADY_S: Final = 60.0  # a program that ran so long has started well: the next pause is short again
FAILURES_MAX: Final = 10  # ends in a row that came sooner, after which a program is given up
DETACHED_MAX: Final = 1000  # of a node
DETACHED_PER_OWNER_MAX: Final = 100
STARTS_MAX: Final = 16  # at a time: a node that starts has all of them to start
ENDED_MAX: Final = 256  # that are kept with their logs, of a node
CODE_BYTES_MAX: Final = 1 << 30  # of the programs of all of them
LOG_PIECE_BYTES: Final = 256 << 10  # that are read at a time
LABEL_NAME_CHARS_MAX: Final = 80  # so that the ID behind it is seen
RECORD: Final = "record.json"
CODE: Final = "code"


class Unwritten(WetwareError):
    """The node's disk does not take what has to be kept."""

    code = "proc.disk"


class Restarts:
    """When one program is started again, by one of POLICIES."""

    def __init__(
        self, policy: str, monotonic: Callable[[], float], rng: random.Random | None = None
    ) -> None:
        self.policy, self._monotonic = policy, monotonic
        self._backoff = Backoff(PAUSE_S_MIN, PAUSE_S_MAX, rng or random.Random())  # noqa: S311  # jitter
        self.forget()
        self.started()

    def started(self) -> None:
        self._at = self._monotonic()

    def wanted(self, exit_: Exit) -> bool:
        """Whether the policy has it started again after such an end."""
        if self.policy == "on-failure":
            return (exit_.kind, exit_.code) != ("exited", 0)
        return self.policy == "always"

    def pause_s(self, *, ran: bool = True) -> float | None:
        """How long to wait after an end that came now; None: it is given up.

        One that could not be started (not `ran`) is tried for ever: that is no fault of its own.
        """
        if ran and self._monotonic() - self._at >= STEADY_S:
            self.forget()
        if ran and self._failures >= FAILURES_MAX:
            return None
        self._failures += ran
        return self._backoff.pause_s()

    def forget(self) -> None:
        self._failures = 0
        self._backoff.reset()


def grant_label(name: str, id_: str) -> str:
    """What `ww grants` calls a process's grant."""
    return f"process {name[:LABEL_NAME_CHARS_MAX] or 'program'} {id_}"


class _Output:
    """What a detached program writes to: its log, in the form of a stream."""

    def __init__(self, each: Detached, ctx: PluginContext) -> None:
        self._each, self._ctx = each, ctx

    async def _write(self, function: Callable[..., None], *data: bytes) -> None:
        try:
            await self._ctx.run_sync(function, *data)
        except OSError as exc:  # a full disk holds no program up
            self._ctx.log.warning("proc.log_lost", id=self._each.id, error=exc.strerror)
        self._each.tell()

    async def receive(self, max_bytes: int = 0) -> bytes:
        raise EndOfStream

    async def send(self, item: bytes) -> None:
        await self._write(self._each.log.write, item)

    async def send_eof(self) -> None:
        await self._write(self._each.log.settle)

    async def aclose(self) -> None:
        pass

    def abort(self, error: WetwareError) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Record:
    """A detached program, as it is kept."""

    id: str
    owner: str
    kind: str
    digest: str  # SHA-256 of its code, in hex; "" where that is on the machine
    code_bytes: int  # on disk
    spec: Mapping[str, Any]  # name, arguments, environment, limits, as in Spec of proc.capnp
    policy: str
    grant: str  # ID of its durable grant
    created_at: float  # Unix time, s
    granted: bool = False  # the grant is on disk, with all below it
    started_at: float = 0.0  # of the latest start, as above
    restarts: int = 0
    exit: Exit | None = None  # the last one; None where there is none, or its node ended first
    over: bool = False  # it is not started again
    dirs: Mapping[str, str] = field(default_factory=dict)  # path → hash

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Record:
        value = json.loads(data)
        exit_ = value["exit"] and Exit(**value["exit"])
        return cls(**{**value, "exit": exit_})


class Detached:
    """One of them; it is shown and ended as a `Process` is. Made by `Supervisor`."""

    def __init__(self, record: Record, directory: Path, ctx: PluginContext) -> None:
        self.id, self.owner, self.record = record.id, record.owner, record
        self.directory, self.log = directory, Log(directory)
        self.dirs: Mapping[str, Path] = {}
        self.place = contextlib.ExitStack()  # holds them, until it is over
        self.restarts = Restarts(record.policy, ctx.clock.monotonic)
        self._run_sync = ctx.run_sync
        self.derived: Derived | None = None  # until the node has its grants again
        self.process: Process | None = None  # what runs now
        self.begun = asyncio.Event()  # set once it has run, ever, or never will
        self.refused: WetwareError | None = None  # what has kept a new one from that
        self.wish = asyncio.Event()  # set where it is to end, or to be started again now
        self.why = ""  # it is to end for good
        self.written = asyncio.Event()  # set and replaced where the log has more, or is complete
        self.over = asyncio.Event()  # set once it has ended for good, which is on disk then
        if record.over:
            self.over.set()

    @property
    def started_at(self) -> float:
        """Unix time, s, of the latest start that is known."""
        return self.record.started_at or self.record.created_at

    @property
    def exit(self) -> Exit | None:
        """How it ended the last time; None while it runs, and then alone."""
        if self.process is not None:
            return self.process.exit
        return self.record.exit or Exit("lost", why="its node has ended")

    @property
    def info(self) -> dict[str, Any]:
        """As `Process.info`."""
        record = self.record
        return {
            "name": record.spec["name"],
            "hash": record.digest,
            "kind": record.kind,
            "memory_bytes": record.spec["limits"]["memory_bytes"],
            "code": record.spec["code"],
            "policy": record.policy,
            "restarts": record.restarts,
            "waits": self.process is None and not record.over,
            "dirs": [{"path": path, "hash": hash_} for path, hash_ in record.dirs.items()],
        }

    def kill(self, why: str) -> None:
        """End it for good, unless it has; `wait` says when it is over."""
        if not self.why and not self.record.over:
            self.why = why
            self._wish(why)

    def restart(self) -> None:
        """Start it again now, whatever it does. Raises InvalidArgument where it is over."""
        if self.why or self.record.over:
            raise InvalidArgument(
                f"the process {self.id} has ended for good, and its grants with it",
                hint="run it again",
                code="invalid.process",
            )
        self._wish("to be started again")

    def _wish(self, why: str) -> None:
        self.wish.set()
        if self.process is not None:
            self.process.kill(why)

    async def wait(self, wait_s: float | None = None) -> Exit | None:
        """How it ended for good, when it has, or after so many seconds whether it has."""
        with anyio.move_on_after(wait_s):
            await self.over.wait()
        return self.exit if self.record.over else None

    async def read(self, start: int, wait_s: float) -> dict[str, Any]:
        """See `Process.logs` in proc.capnp."""
        written, over = self.written, self.record.over
        at, data = await self._run_sync(self.log.read, start, LOG_PIECE_BYTES)
        if not data and not over:
            with anyio.move_on_after(wait_s):
                await written.wait()
            over = self.record.over
            at, data = await self._run_sync(self.log.read, start, LOG_PIECE_BYTES)
        return {"data": data, "start": at, "over": over and not data}

    def tell(self) -> None:
        """There is more in the log, or nothing more."""
        self.written.set()
        self.written = asyncio.Event()


class Supervisor:
    """All detached programs of a node, by their IDs, those that have ended included."""

    def __init__(self, table: Table, directory: Path) -> None:
        self._table, self._ctx, self._directory = table, table.ctx, directory
        self._starting = asyncio.Semaphore(STARTS_MAX)
        self._tasks = Tasks()
        self.all: dict[str, Detached] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Those that are kept run, as they are to, while the block does."""
        records = await self._disk(self._records)
        living = [record for record in records if not record.over]
        await self._table.dirs.begin({h for each in living for h in each.dirs.values()})
        for record in records:
            each = self._add(record if record.over else replace(record, exit=None))
            each.begun.set()
            if not record.over:
                each.dirs = self._table.dirs.kept(record.owner, record.dirs, each.place)
            self._tasks.start(self._live(each))
        try:
            yield
        finally:  # what runs is ended by the table
            await self._tasks.end()

    async def detach(
        self,
        owner: str,
        image: Image,
        code: bytes | None,
        spec: Mapping[str, Any],
        policy: str,
        session: rpc.Ref | None,
    ) -> str:
        """Start a program that outlives its spawner; returns its ID when it runs, and is on disk.

        `spec` is the struct of proc.capnp; `code` is None where it is on the machine. Raises what
        keeps it from being started.
        """
        if session is None:
            raise InvalidArgument("no session is given")
        self._table.check_running()
        id_ = secrets.token_hex(8)

        async def keep(grant: str) -> None:
            given = {path: directory.name for path, directory in dirs.items()}
            now, size = self._ctx.clock.time(), len(code or b"")
            record = Record(
                id_, owner, image.kind, image.digest, size, kept, policy, grant, now, dirs=given
            )
            self._check_room(record)
            each = self._add(record)
            each.dirs, each.place = dirs, place.pop_all()
            await self._disk(self._keep, each, code)

        try:
            with contextlib.ExitStack() as place:
                asked = self._asked(spec, policy)
                dirs = await self._table.dirs.hold(owner, spec["dirs"], place)
                limits = self._table.spec(image, spec, {}, dirs, _usual(image)).limits
                kept = {name: spec[name] for name in ("args", "env", "ports", "code")}
                kept["name"] = spec["name"] or "program"
                kept["limits"] = {name: getattr(limits, name) for name in spec["limits"]}
                label = grant_label(kept["name"], id_)
                await self._ctx.derive_durable(session, label, asked, keep)
        except BaseException:
            await self._forget(id_)
            raise
        each = self.all[id_]
        living = self._tasks.start(self._live(each))
        living.add_done_callback(lambda _: each.begun.set())
        await each.begun.wait()
        if each.refused is not None:
            raise each.refused
        return id_

    def _asked(self, spec: Mapping[str, Any], policy: str) -> dict[str, tuple[str, list[str]]]:
        if policy not in POLICIES:
            raise InvalidArgument(
                f"{policy[:32]!r} is no policy of restarts", hint=f"one of {', '.join(POLICIES)}"
            )
        if spec["grants"]:
            raise InvalidArgument(
                f"the grant {spec['grants'][0]['name'][:64]!r} is a live reference, which ends "
                "with its session and cannot be kept for a detached process",
                hint='name what it is of, e.g. "pubsub:chat"',
                code="invalid.live_grant",
            )
        named = by_name(spec["named"])
        return {name: (each["what"], each["where"]) for name, each in named.items()}

    def _check_room(self, new: Record) -> None:
        living = [each.record for each in self.all.values() if not each.record.over] + [new]
        own = sum(each.owner == new.owner for each in living)
        nbytes = sum(each.code_bytes for each in living)
        for what, count, limit, name in (
            ("detached processes", len(living), DETACHED_MAX, "DETACHED_MAX"),
            (
                f"detached processes of {new.owner}",
                own, DETACHED_PER_OWNER_MAX, "DETACHED_PER_OWNER_MAX",
            ),
            ("bytes of their code", nbytes, CODE_BYTES_MAX, "CODE_BYTES_MAX"),
        ):  # fmt: skip
            if count > limit:
                raise LimitExceeded(
                    f"at most {limit} {what} are kept at this node ({name})",
                    hint="end some with `ww kill`",
                    code="limit.detached",
                )

    def _add(self, record: Record) -> Detached:
        each = self.all[record.id] = Detached(record, self._directory / record.id, self._ctx)
        return each

    # --- the life of one --------------------------------------------------------------------------

    async def _live(self, each: Detached) -> None:
        """Until it is over."""
        granted, over, new = each.record.granted, each.record.over, not each.begun.is_set()
        try:
            derived = each.derived = await self._ctx.derived(each.record.grant)
        except WetwareError as exc:  # it ended while the node was down
            each.refused = exc
            if not granted:
                await self._forget(each.id)
            elif not over:
                await self._end(each, Exit("killed", why=exc.message))
            return
        if over:  # the node ended before its grant did
            return derived.end("the process has ended")
        if not granted:
            each.record = replace(each.record, granted=True)
            if not (new and await self._save(each)):
                # The node ended while it was made, so nobody was told of it; or the disk is full.
                full = Unwritten("it cannot be kept on disk; the node's log says why")
                return await self._give_up(each, derived, full)
        derived.on_end(lambda why: each.kill(why.message))
        if not new:
            lost = Exit("lost", why="its node has ended")
            if not each.restarts.wanted(lost):
                return await self._end(each, lost)
            each.record = replace(each.record, restarts=each.record.restarts + 1)
        while (pause_s := await self._round(each, derived)) is not None:
            with anyio.move_on_after(pause_s):
                await each.wish.wait()

    async def _give_up(self, each: Detached, derived: Derived, why: WetwareError) -> None:
        """It never ran: nothing is left of it but what its spawner hears."""
        derived.end("it could not be started")
        await self._forget(each.id)
        each.refused = why

    async def _round(self, each: Detached, derived: Derived) -> float | None:
        """Run it once; returns how long to wait until the next time, None: there is none."""
        if each.wish.is_set():
            each.restarts.forget()
        each.wish.clear()
        ran = False
        try:
            exit_, ran = await self._attempt(each, derived), True
        except Exception as exc:
            if not isinstance(exc, WetwareError):
                self._ctx.log.exception("proc.start_failed", id=each.id)
                exc = InternalError("the node failed to start it; its log says why")
            if not each.begun.is_set():
                await self._give_up(each, derived, exc)
                return None
            exit_ = Exit("lost", why=f"it cannot be started: {exc.message}")
        if derived.ended is not None and not each.why:
            return None  # the node stops, and it may have ended for that
        pause_s = None
        if each.why:
            exit_ = replace(exit_, kind="killed", code=-1, why=each.why)
        elif each.wish.is_set():
            pause_s = 0.0
        elif each.restarts.wanted(exit_) and (pause_s := each.restarts.pause_s(ran=ran)) is None:
            why = f"given up after {FAILURES_MAX + 1} ends, each within {STEADY_S:g} s"
            exit_ = replace(exit_, why=f"{exit_.why}; {why}".lstrip("; "))
        if pause_s is None:
            await self._end(each, exit_)
        else:
            each.record = replace(each.record, exit=exit_, restarts=each.record.restarts + 1)
            each.process = None
            await self._save(each)
        return pause_s

    async def _attempt(self, each: Detached, derived: Derived) -> Exit:
        """Run it to its end; raises what keeps it from being started."""
        for path, hash_ in each.record.dirs.items():
            if path not in each.dirs:
                raise NotFound(
                    f"the directory {path} is not on the node's disk any more ({hash_})",
                    hint="run it again",
                    code="not_found.dir",
                )

        output = _Output(each, self._ctx)
        async with contextlib.AsyncExitStack() as stack:
            async with self._starting:
                image = await self._image(each)
                refs = await stack.enter_async_context(derived.opened())
            if each.why:
                return Exit("killed", why=each.why)
            spec = self._table.spec(image, each.record.spec, refs, each.dirs, _usual(image))
            process = Process(each.id, each.owner, image, spec)
            with contextlib.ExitStack() as place:
                self._table.launch(process, place, remember=False)
            process.open(output, output)
            each.record = replace(each.record, started_at=process.started_at)
            each.restarts.started()
            each.process = process
            each.begun.set()
            exit_ = await process.wait()
        assert exit_ is not None  # noqa: S101  # no time was given
        return exit_

    async def _image(self, each: Detached) -> Image:
        if not each.record.digest:
            return self._table.program(each.record.kind)
        try:
            code = await self._ctx.run_sync((each.directory / CODE).read_bytes)
        except OSError as exc:
            raise NotFound(f"its code cannot be read: {exc.strerror}") from None
        if await self._ctx.run_sync(sha256, code) != each.record.digest:
            raise NotFound("its code on disk is damaged")
        return await self._table.prepare(code, each.record.kind)

    async def _end(self, each: Detached, exit_: Exit) -> None:
        """It is over: on disk first, then its grants, then for those who wait."""
        each.record = replace(each.record, exit=exit_, over=True)
        each.process = None
        await self._save(each)
        if each.derived is not None:
            each.derived.end("the process has ended")
        each.place.close()
        each.over.set()
        each.tell()
        self._ctx.log.info("proc.over", id=each.id, owner=each.owner, kind=exit_.kind)
        with contextlib.suppress(OSError):  # else at the next start
            await self._disk((each.directory / CODE).unlink)
        ended = sorted(
            (other for other in self.all.values() if other.record.over),
            key=lambda other: other.started_at,
        )
        await self._forget(*(old.id for old in ended[: max(0, len(ended) - ENDED_MAX)]))

    # --- what is on disk --------------------------------------------------------------------------

    async def _disk(self, function: Callable[..., T], *args: object) -> T:
        """To its end: nothing is written behind the back of who has stopped."""
        return await to_its_end(self._ctx.run_sync(function, *args))

    async def _save(self, each: Detached) -> bool:
        path, data = each.directory / RECORD, each.record.encode()
        try:
            await self._disk(replace_private_file, path, data)
        except OSError as exc:  # its grants are ended all the same, which ends it after a restart
            self._ctx.log.warning("proc.record_lost", id=each.id, error=exc.strerror)
            return False
        return True

    async def _forget(self, *ids: str) -> None:
        """Nothing is left of these."""
        for id_ in ids:
            if (each := self.all.pop(id_, None)) is not None:
                each.place.close()
                await self._disk(shutil.rmtree, each.directory, True)

    def _records(self) -> list[Record]:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = []
        for path in self._directory.iterdir():
            try:
                found.append(record := Record.decode((path / RECORD).read_bytes()))
                Log(path).recover()
                if record.over:  # the node ended before that was removed
                    (path / CODE).unlink(missing_ok=True)
            except FileNotFoundError:  # the node ended before it was written
                shutil.rmtree(path, ignore_errors=True)
            except (OSError, ValueError, TypeError, LookupError):
                self._ctx.log.exception("proc.record_unreadable", id=path.name)
        return found

    def _keep(self, each: Detached, code: bytes | None) -> None:
        try:
            if each.record.dirs:  # what was unpacked is on disk before what says so
                os.sync()
            each.directory.mkdir(mode=0o700)
            if code is not None:
                replace_private_file(each.directory / CODE, code)
            replace_private_file(each.directory / RECORD, each.record.encode())
        except OSError as exc:
            raise Unwritten(f"it cannot be kept on disk: {exc.strerror}") from exc


def _usual(image: Image) -> Limits:
    """What a detached program may use, where its spawner does not say: of time all."""
    cpu_s = image.usual.cpu_s and TIME_S_MAX
    return replace(image.usual, wall_s=TIME_S_MAX, cpu_s=cpu_s)
