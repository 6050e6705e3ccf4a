"""A child process with a port on loopback, that ends with its parent.

The child is told by the kernel when the parent ends, however that happens, kill -9 included. It is
in a session of its own, so that a Ctrl-C in the terminal is the node's alone and it stops in order.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import re

    from wetware.hookspecs import EventLogger

START_S_MAX: Final = 40.0
"""Below what a plugin's hook may take in a node: seconds on an idle machine, more on a slow one."""
STOP_S_MAX: Final = 2.0
"""From SIGTERM to SIGKILL."""
ANSWER_S_MAX: Final = 30.0
ANSWER_BYTES_MAX: Final = 256 << 20
"""The whole state of anvil is one answer."""
LINES_KEPT: Final = 20
ENV_KEPT: Final = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
    *("PYTHONPATH", "PYTHONUSERBASE", "PYTHONHOME", "VIRTUAL_ENV"),
)
"""Of the node's environment. Its passphrase and keys are nothing to its children."""

_BOUND: Final = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: outlives the exec
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


class NotStarted(Exception):
    """A child that ended, or said nothing in time; the message has what it said."""


class Child:
    """A running child. Start it from the main thread: it is bound to the thread that starts it.

    `ready` matches the line in which it says its `port`; `env` comes on top of ENV_KEPT, and `keep`
    are file descriptors that it keeps. Raises NotStarted.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        ready: re.Pattern[str],
        cwd: Path,
        env: Mapping[str, str],
        keep: Sequence[int],
        log: EventLogger,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a child that ends with its thread has to be the main thread's")
        self._ready, self._log = ready, log
        self._closing = False
        self._last: deque[str] = deque(maxlen=LINES_KEPT)
        self._found: queue.Queue[int | None] = queue.Queue()
        self.port = 0
        kept = {name: os.environ[name] for name in ENV_KEPT if name in os.environ}
        bound = [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]
        self.process = subprocess.Popen(  # noqa: S603  # what we found, with our arguments
            bound,
            cwd=cwd,
            env={**kept, **env},
            pass_fds=tuple(keep),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name="try-out chain", daemon=True)
        try:
            self._reader.start()
            self.port = self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> int:
        try:
            port = self._found.get(timeout=START_S_MAX)
        except queue.Empty:
            raise NotStarted(f"it did not start within {START_S_MAX:g} s: {self.said}") from None
        if port is None:
            raise NotStarted(f"it ended: {self.said}")
        return port

    @property
    def said(self) -> str:
        lines = [line.strip() for line in self._last if line.strip()]
        return " ".join(lines)[-400:] or "it said nothing"

    def _read(self) -> None:
        """Drain what it prints, so that it never blocks; reap it when it ends."""
        assert self.process.stdout is not None  # noqa: S101  # a pipe was asked for
        with contextlib.suppress(ValueError, OSError), self.process.stdout as lines:
            for line in lines:
                if self.port == 0 and (match := self._ready.match(line)):
                    self._found.put(int(match[1]))
                self._last.append(line[:200])
        code = self.process.wait()
        self._found.put(None)
        if not self._closing and self.port:
            self._log.error(
                "dev.chain_ended",
                code=code,
                said=self.said,
                effect="nobody is admitted any more",
                hint="start the node again",
            )

    def close(self) -> None:
        """End it and reap it. Idempotent."""
        self._closing = True
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self._reader.ident is not None:
            self._reader.join(STOP_S_MAX)


# --- JSON-RPC -------------------------------------------------------------------------------------


class RpcFailed(Exception):
    """The chain refused a request, or did not answer it."""


def call(port: int, method: str, *params: Any) -> Any:
    """One request to the child; raises RpcFailed."""
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S_MAX)
    try:
        connection.request("POST", "/", body, {"content-type": "application/json"})
        raw = connection.getresponse().read(ANSWER_BYTES_MAX)
        answer = json.loads(raw)
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise RpcFailed(f"{method}: {type(exc).__name__}") from None
    finally:
        connection.close()
    if not isinstance(answer, dict) or "result" not in answer:
        error = answer.get("error") if isinstance(answer, dict) else None
        said = error.get("message") if isinstance(error, dict) else "no answer"
        raise RpcFailed(f"{method}: {str(said)[:200]}")
    return answer["result"]
