"""An etcd of this node: started again when it ends, and gone with the node, however that ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import anyio

from wetware.base import launch
from wetware.base.backoff import Backoff
from wetware.base.log import get_logger
from wetware.errors import Unsupported, WetwareError
from wetware_sync.managed.pipes import CLIENT, Room, peer_socket

if TYPE_CHECKING:
    from wetware.identity import PeerId
    from wetware_sync.etcd.wire import Etcd

log = get_logger("sync.etcd")

AGAIN_S: Final = 0.5
AGAIN_S_MAX: Final = 30.0
"""Between the end of one etcd and the start of the next."""
STEADY_S: Final = 10.0
"""After so long it has started well, and the pauses begin anew."""
STOP_S: Final = 10.0
ANSWER_S: Final = 5.0
"""For its version."""
QUOTA_BYTES: Final = 8 << 30
"""Of etcd's database; the engine's own bounds are far below."""
_LOG: Final = "etcd.log"
_BAD: Final = (
    ((0, 0, 0), (3, 4, 22), "it may lose or corrupt what was written"),
    ((3, 5, 0), (3, 5, 5), "its members may come to differ after a crash (3.5.0 to 3.5.4)"),
)


class EtcdError(WetwareError):
    """The etcd of this node does not run, or does not do what it is told."""

    code = "sync.etcd"


def find() -> tuple[str, str]:
    """Where etcd is on this machine, and its version; raises Unsupported "unsupported.etcd"."""
    path = shutil.which("etcd")
    if path is None:
        raise Unsupported(
            "there is no etcd on this machine (not on PATH)",
            hint="apt install etcd-server, and start the node again if PATH has to change",
            code="unsupported.etcd",
        )
    try:
        shown = subprocess.run(  # noqa: S603  # the operator's etcd
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
            env={},
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unsupported(f"{path} does not run: {exc}", code="unsupported.etcd") from exc
    found = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", shown)
    if found is None:
        raise Unsupported(f"{path} does not say which etcd it is", code="unsupported.etcd")
    check_version((int(found[1]), int(found[2]), int(found[3])))
    return path, ".".join(found.groups())


def check_version(version: tuple[int, int, int]) -> None:
    """Raises Unsupported for one that is known to lose data."""
    for first, good, why in _BAD:
        if first <= version < good:
            shown = ".".join(map(str, version))
            raise Unsupported(
                f"etcd {shown} is refused: {why}",
                hint="install 3.4.22 or later of 3.4, or 3.5.5 or later",
                code="unsupported.etcd",
            )


class Child:
    """An etcd, in a directory of its own, that is a member of a cluster of them.

    Args:
        room: Its directory: sockets, data, and the log of the last run.
        me: This node.
        token: Of the cluster.
        run_sync: Runs a blocking function in a thread.

    Attributes:
        failing: Why it does not run; "" while it does.
        starts: How often it was started.
    """

    def __init__(
        self,
        room: Room,
        me: PeerId,
        token: str,
        *,
        run_sync: Callable[..., Awaitable[Any]],
    ) -> None:
        self.room, self._me, self._token, self._run_sync = room, me, token, run_sync
        self.failing = "it is not started yet"
        self.version = ""
        self.starts = 0

    def etcd(self) -> Etcd:
        """What speaks to it."""
        from wetware_sync.etcd.wire import Etcd  # here: its packages are an extra

        return Etcd([f"unix:{self.room.path(CLIENT)}"])

    async def run(self, others: tuple[PeerId, ...], *, new: bool) -> None:
        """Have it run until cancelled.

        Args:
            others: The members of its cluster when it is started for the first time, but this one.
            new: Whether they start together; else it joins those that run.
        """
        backoff = Backoff(AGAIN_S, AGAIN_S_MAX, random.Random())  # noqa: S311  # no secret
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                path, self.version = await self._run_sync(find)
                await self._once(path, others, new=new)
            except (WetwareError, OSError) as exc:
                self.failing = str(exc)
            if loop.time() - began > STEADY_S:
                backoff.reset()
            log.warning("etcd.ended", why=self.failing, failures=backoff.failures + 1)
            await anyio.sleep(backoff.pause_s())

    async def _once(self, path: str, others: tuple[PeerId, ...], *, new: bool) -> None:
        """Start it, and wait for its end."""
        mine = f"unix://{peer_socket(self._me)}"
        members = ",".join(f"{peer}=unix://{peer_socket(peer)}" for peer in (self._me, *others))
        options = {
            "name": self._me,
            "data-dir": "data",
            "listen-client-urls": f"unix://{CLIENT}",
            "advertise-client-urls": f"unix://{CLIENT}",
            "listen-peer-urls": mine,
            "initial-advertise-peer-urls": mine,
            "initial-cluster": members,
            "initial-cluster-state": "new" if new else "existing",
            "initial-cluster-token": self._token,
            "quota-backend-bytes": str(QUOTA_BYTES),
            "max-request-bytes": str(4 << 20),
            "max-txn-ops": "1024",
            "logger": "zap",
            "log-outputs": "stderr",
            "log-level": "error",  # it warns of those that are away again and again
        }
        command = [path, "--pre-vote", *(f"--{name}={value}" for name, value in options.items())]
        for name in (CLIENT, peer_socket(self._me)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.room.path(name))  # of one that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        output = os.open(self.room.directory / _LOG, flags, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), *command),
                cwd=self.room.directory,
                env={},  # it would read settings there
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl+C at the node is none of its own
            )
        finally:
            os.close(output)
        self.starts += 1
        self.failing = ""
        log.info("etcd.started", version=self.version, pid=process.pid)
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                await _stop(process)
        self.failing = f"etcd ended with {code}: {self._said()}"

    def _said(self) -> str:
        """The last error that it logged."""
        with contextlib.suppress(OSError):
            for line in reversed((self.room.directory / _LOG).read_text()[-65536:].splitlines()):
                with contextlib.suppress(ValueError, AttributeError):
                    said = json.loads(line)
                    if said.get("level") in ("error", "fatal", "panic"):
                        return f"{said.get('msg')} {said.get('error', '')}".strip()
        return f"see {self.room.directory / _LOG}"


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with anyio.CancelScope(shield=True):
        with anyio.move_on_after(STOP_S):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
