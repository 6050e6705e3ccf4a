"""Real nodes for tests: `ww node` processes on loopback, each with a home of its own.

with Home(tmp_path) as home, home.node() as a, home.node(join=a) as b: ...
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from wetware.errors import WetwareError
from wetware.identity import Key, PeerId

if TYPE_CHECKING:
    from wetware.client import Session

T = TypeVar("T")

START_S_MAX = 60.0
"""Of a node process on a loaded machine; it takes about two seconds on an idle one."""
STOP_S_MAX = 60.0
COMMAND_S_MAX = 60.0


def _limited(files_max: int | None) -> list[str]:
    return [] if files_max is None else ["sh", "-c", f'ulimit -n {files_max}; exec "$@"', "sh"]


def _ww() -> list[str]:
    return [sys.executable, "-m", "wetware"]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Processes started inside end at SIGINT, as those started from a terminal do.

    A shell without job control starts its background jobs with SIGINT ignored, CI runs among them;
    that is inherited, and Python leaves it so, as it should. What this process catches is the
    default again in its children.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def tasks_of_core() -> list[asyncio.Task[object]]:
    """The loop's tasks whose code is in the core: what a test of it must not leave behind."""
    core = str(Path(__file__).parents[1])
    return [
        task
        for task in asyncio.all_tasks()
        if (coro := task.get_coro()) and coro.cr_code.co_filename.startswith(core)  # type: ignore[union-attr]
    ]


def wait_for(condition: Any, what: str, *, within_s: float = 60.0) -> Any:
    """Poll `condition()` until it is truthy, and return that; AssertionError names `what`.

    A condition that costs much, e.g. a command, is asked half of the time only, and all the less
    often the longer it takes to come true.
    """
    started = time.monotonic()
    while True:
        asked = time.monotonic()
        if result := condition():
            return result
        if (now := time.monotonic()) > started + within_s:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(max(0.02, min(1.0, max(now - asked, (now - started) / 10))))


@dataclass
class NodeProcess:
    """A running `ww node`.

    Attributes:
        home: The home it was started in.
        data_dir: Its data directory.
        process: The process.
        log: Its stderr, a file.
    """

    home: Home
    data_dir: Path
    process: subprocess.Popen[bytes]
    log: Path
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def peer_id(self) -> PeerId:
        """Its peer ID."""
        return PeerId.parse(self.info["peer_id"])

    @property
    def addr(self) -> str:
        """Its first address, with its peer ID."""
        return str(self.info["addrs"][0])

    def wait_ready(self) -> NodeProcess:
        """Wait until it serves; AssertionError with its log if it does not."""
        file = self.data_dir / "node.json"

        def ready() -> bool:
            if (code := self.process.poll()) is not None:
                raise AssertionError(f"the node exited with {code}:\n{self.log.read_text()}")
            with contextlib.suppress(FileNotFoundError, ValueError):
                self.info = json.loads(file.read_text())
            return self.info.get("pid") == self.process.pid

        wait_for(ready, f"a ready node; its log:\n{self.log.read_text()}", within_s=START_S_MAX)
        return self

    def wait_log(self, text: str, *, within_s: float = 60.0) -> None:
        """Wait until its log contains `text`."""
        wait_for(lambda: text in self.log.read_text(), f"{text!r} in the log", within_s=within_s)

    def invite(self, *args: str) -> str:
        """A ticket, or with `--peer ID` a certificate: what `ww invite ARGS` prints."""
        if args or self._by_command:
            return self.ww("invite", *args, check=True).stdout.strip()
        return self._ask(lambda session: session.cluster.invite())[0]

    def members(self, selector: str = "") -> dict[str, dict[str, Any]]:
        """What `ww ls --json SELECTOR` says at this node: peer ID → member."""
        if self._by_command:
            done = self.ww("ls", "--json", *([selector] if selector else []), check=True)
            return {m["peer_id"]: m for m in json.loads(done.stdout)["members"]}
        found = self._ask(lambda session: session.cluster.list(selector))
        return {str(m.peer_id): m.as_dict() | {"scopes": list(m.scopes)} for m in found}

    @property
    def _by_command(self) -> bool:
        """Only commands know how to log in there."""
        return self.info.get("auth") != "local" or "WW_KEY" in self.home.env

    def _ask(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """What the home's user is told, in a session of this process.

        It takes a tenth of a command's processor time, and tests ask again and again. In a thread,
        as a loop may run in this one. Raises AssertionError where it fails, as a command does.
        """
        from wetware.client import connect
        from wetware.client.contexts import Context

        async def main() -> T:
            here = Context(data_dir=str(self.data_dir))
            async with connect(context=here, key=self.home.key()) as session:
                return await work(session)

        try:
            with ThreadPoolExecutor(1) as threads:
                return threads.submit(asyncio.run, main()).result(COMMAND_S_MAX)
        except WetwareError as exc:
            raise AssertionError(f"the node {self.data_dir.name}: {exc!r}") from exc

    def wait_members(
        self, peers: Iterable[str], state: str = "alive", *, within_s: float = 60.0
    ) -> None:
        """Wait until this node sees all of `peers` in `state`."""
        wanted = set(map(str, peers))

        def seen() -> bool:
            return wanted <= {p for p, m in self.members().items() if m["state"] == state}

        wait_for(seen, f"{len(wanted)} members {state} at {self.peer_id}", within_s=within_s)

    def ww(self, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run `ww` against this node's local socket."""
        return self.home.ww("--data-dir", str(self.data_dir), *args, **kwargs)

    def start_ww(self, *args: str, **kwargs: Any) -> subprocess.Popen[str]:
        """Start `ww` against this node's local socket; the caller ends it."""
        return self.home.start_ww("--data-dir", str(self.data_dir), *args, **kwargs)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(
                    f"the node did not stop within {STOP_S_MAX:g} s:\n{self.log.read_text()}"
                ) from None
        return self.process.returncode


class Home:
    """A WW_HOME in a test's directory, and the processes started in it.

    Args:
        path: The home; made if need be.
        env: Further environment variables of its processes.
        libp2p: Whether its nodes run libp2p, whose import is more than half of the processor time
            of a node that lives for seconds; None for the class's own.

    Attributes:
        forked: Of the class: whether its processes come from one that has imported everything, see
            `wetware.testing.forked`. On Linux it takes half of their processor time.
    """

    libp2p = True
    forked = False

    def __init__(
        self, path: Path, env: Mapping[str, str] | None = None, *, libp2p: bool | None = None
    ) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._env = dict(env or {})
        if libp2p is not None:
            self.libp2p = libp2p
        self._count = 0
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Home:
        return self

    def __exit__(self, *exc: object) -> None:
        """End every process that is left."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    @property
    def env(self) -> dict[str, str]:
        """The environment of its processes: nothing of the user's WW_*, HOME inside the test."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("WW_", "XDG_"))}
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return {
            **kept,
            "HOME": str(self.path),
            "WW_HOME": str(self.path / ".wetware"),
            "XDG_CACHE_HOME": cache,  # the verdicts on schemas; not a setting
            "PYTHONUNBUFFERED": "1",
            **self._env,
        }

    @property
    def _popen(self) -> type[subprocess.Popen[Any]]:
        if not self.forked:
            return subprocess.Popen
        from wetware.testing.forked import Forked

        return Forked

    def key(self, name: str = "default") -> Key:
        """A key of the home."""
        return Key.load(self.path / ".wetware" / "keys" / name)

    def node_id(self, data_dir: str) -> PeerId:
        """The peer ID of a node that need not have run yet: `ww id`."""
        done = self.ww("--data-dir", str(self.path / data_dir), "id", check=True)
        return PeerId.parse(done.stdout.strip())

    def start_node(
        self,
        data_dir: str | None = None,
        *,
        join: NodeProcess | str | None = None,
        peers: Iterable[str] = (),
        listen: str = "/ip4/127.0.0.1/tcp/0",
        args: Iterable[str] = (),
        files_max: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> NodeProcess:
        """Start `ww node` without waiting for it.

        Args:
            data_dir: Under the home; a new one if None.
            join: A node whose cluster it joins with a ticket of its own, or a ticket.
            peers: Addresses to connect to at the start.
            listen: Where to listen.
            args: Further arguments.
            files_max: Files that it may have open; as many as this process if None.
            env: Further environment variables of this node.
        """
        self._count += 1
        directory = self.path / (data_dir or f"node{self._count}")
        log = self.path / f"{directory.name}.{self._count}.log"
        command = [*_ww(), "--data-dir", str(directory), "node", "--listen", listen]
        command += ["--name", directory.name[:64]]
        for peer in peers:
            command += ["--peer", str(peer)]
        if join is not None:
            command += ["--join", join if isinstance(join, str) else join.invite()]
        with log.open("wb") as stderr, _interruptible():
            process = self._popen(
                [*_limited(files_max), *command, *args],
                env={"WW_NODE_LIBP2P": str(self.libp2p).lower(), **self.env, **(env or {})},
                cwd=self.path,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        self._processes.append(process)
        return NodeProcess(self, directory, process, log)

    @contextlib.contextmanager
    def node(self, data_dir: str | None = None, **kwargs: Any) -> Iterator[NodeProcess]:
        """A running node; stopped with SIGTERM at the end of the block."""
        node = self.start_node(data_dir, **kwargs)
        try:
            yield node.wait_ready()
        finally:
            node.stop()

    def ww(
        self,
        *args: str,
        check: bool = False,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = COMMAND_S_MAX,
    ) -> subprocess.CompletedProcess[str]:
        """Run `ww ARGS` to its end; with `check`, AssertionError if it fails."""
        with self._popen(
            [*_ww(), *args],
            env={**self.env, **(env or {})},
            cwd=self.path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                out, err = process.communicate(input or "", timeout=timeout)
            except BaseException:
                process.kill()
                raise
        done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        if check and done.returncode:
            raise AssertionError(
                f"ww {' '.join(args)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done

    def start_ww(
        self,
        *args: str,
        stdin: int | IO[str] | None = subprocess.PIPE,
        start_new_session: bool = False,
    ) -> subprocess.Popen[str]:
        """Start `ww ARGS` with pipes; ended with the home if it still runs.

        In a new session it has no terminal but what `stdin` is.
        """
        with _interruptible():
            process = self._popen(
                [*_ww(), *args],
                env=self.env,
                cwd=self.path,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=start_new_session,
            )
        self._processes.append(process)
        return process
