"""Real etcd, a process of the test's own on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.ports import free_port

READY_S = 60.0

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed")
"""For tests whose nodes start it themselves."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """With the next one, for modules that use etcd: one loop for all of their tests.

    gRPC's thread hands results to the loop that asked for them, which is to be open then.
    """
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
async def one_loop(anyio_backend: str) -> AsyncIterator[None]:
    yield
    await asyncio.sleep(0.5)  # what was cancelled last may be handed over yet, and nothing says so


class EtcdProcess:
    """One member of etcd. What it has written stays in `directory` for the next start.

    Args:
        directory: Of its data.
        name: In its cluster.
        ports: Of its clients and of its peers; None: any that are free.
        cluster: "NAME=http://…" of all members, comma-separated; "": it is alone.
        options: Further ones of `etcd`.
        scheme: How clients speak to it; "https": it is not waited for.
    """

    def __init__(
        self,
        directory: Path,
        name: str = "one",
        *,
        ports: tuple[int, int] | None = None,
        cluster: str = "",
        options: Sequence[str] = (),
        scheme: str = "http",
    ) -> None:
        if shutil.which("etcd") is None:
            pytest.skip("etcd is not on the PATH: `apt-get install etcd-server`")
        self.directory, self.name, self._options = directory, name, options
        self.ports = ports or (free_port(), free_port())
        self._cluster, self._scheme = cluster, scheme
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    def start(self, *, ready: bool = True) -> None:
        """Start it; with `ready` wait until it serves: of a cluster more than half have to."""
        client, peer = f"{self._scheme}://{self.endpoint}", f"http://127.0.0.1:{self.ports[1]}"
        self.directory.mkdir(parents=True, exist_ok=True)
        arguments = {
            "name": self.name,
            "data-dir": str(self.directory / "data"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": self._cluster or f"{self.name}={peer}",
            "heartbeat-interval": "50",
            "election-timeout": "500",
            "logger": "zap",
        }
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["etcd", *(f"--{k}={v}" for k, v in arguments.items()), *self._options],
                stdout=log,
                stderr=log,
            )
        if ready:
            self.wait_ready()

    def wait_ready(self) -> None:
        until = time.monotonic() + READY_S
        while True:
            assert self.process is not None
            assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
            try:
                with urlopen(f"http://{self.endpoint}/health", timeout=5) as reply:
                    if b'"true"' in reply.read():
                        return
            except OSError:
                pass
            assert time.monotonic() < until, (self.directory / "log").read_text()[-2000:]
            time.sleep(0.02)

    def ctl(self, *arguments: str) -> None:
        """Run `etcdctl` with it, once it serves."""
        until = time.monotonic() + READY_S
        command = ["etcdctl", f"--endpoints={self._scheme}://{self.endpoint}", *arguments]
        while (done := subprocess.run(command, capture_output=True, timeout=READY_S)).returncode:
            assert time.monotonic() < until, done.stderr

    def stop(self, *, kill: bool = False) -> None:
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        self.process.wait()
        self.process = None


@contextlib.contextmanager
def three_members(directory: Path) -> Iterator[list[EtcdProcess]]:
    """A cluster of three, which serves."""
    ports = [(free_port(), free_port()) for _ in range(3)]
    names = [f"m{n}" for n in range(3)]
    cluster = ",".join(f"{n}=http://127.0.0.1:{p[1]}" for n, p in zip(names, ports, strict=True))
    members = [
        EtcdProcess(directory / name, name, ports=both, cluster=cluster)
        for name, both in zip(names, ports, strict=True)
    ]
    try:
        for member in members:
            member.start(ready=False)
        for member in members:
            member.wait_ready()
        yield members
    finally:
        for member in members:
            member.stop(kill=True)


class Wire:
    """A way to a port of loopback that can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sockets: list[socket.socket] = []
        self._cut = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Whoever uses it is cut off, and nobody gets through any more."""
        self._cut = True
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._port))
                except ConnectionRefusedError:  # nobody is there now
                    near.close()
                    continue
                self._sockets += [near, far]
                if self._cut:
                    return self.cut()
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=(one, other), daemon=True).start()


def _carry(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
