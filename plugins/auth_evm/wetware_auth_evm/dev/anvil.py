"""anvil as the try-out chain: where it is, how it is run, and its state on disk."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from wetware.base import paths
from wetware.errors import ConfigError
from wetware.identity import replace_private_file
from wetware_auth_evm.dev.process import RpcFailed, call

WW_ANVIL: Final = "WW_ANVIL"
"""Which anvil to run: a path, or `none` for the chain in Python."""
STATE_FILE: Final = "anvil.json"
"""Its state, written by us: whole or not at all, on disk."""
EXIT_FILE: Final = "anvil-exit.json"
"""What it writes when it ends, e.g. because its node was killed. Not whole if it is killed too."""
SAVE_S: Final = 0.5
"""Between two looks whether the state has changed: what a power failure takes back."""
STATE_BYTES_MAX: Final = 256 << 20


def find_anvil(env: Mapping[str, str] | None = None) -> Path | None:
    """WW_ANVIL, else `anvil` on PATH, else None. Raises ConfigError if WW_ANVIL is no program."""
    env = os.environ if env is None else env
    named = env.get(WW_ANVIL, "")
    if named.lower() == "none":
        return None
    if not named:
        found = shutil.which("anvil", path=env.get("PATH", ""))
        return _behind(Path(found).resolve()) if found is not None else None
    path = paths.absolute(named, WW_ANVIL)
    if path.is_file() and os.access(path, os.X_OK):
        return path
    raise ConfigError(
        f"{WW_ANVIL} names {named}, which is no program",
        hint=f"set {WW_ANVIL} to the path of anvil, to `none` for the chain in Python, or not "
        "at all",
        code="config.dev",
    )


def _behind(path: Path) -> Path:
    """The program; npm puts a script on PATH, which starts that of a package beside it."""
    if path.suffix == ".mjs":
        for packages in (path.parents[1], path.parent / "node_modules" / "@foundry-rs"):
            for program in packages.glob("anvil-*/bin/anvil"):
                return program
    return path


def command(place: Path, chain_id: int) -> list[str]:
    """The command, that goes on with the state in `place`; raises ConfigError."""
    anvil = find_anvil()
    if anvil is None:
        raise ConfigError(
            "this try-out was begun with anvil, which is not there any more",
            hint="install it again, or set WW_ANVIL to its path; or begin another try-out, with "
            "--data-dir",
            code="config.dev",
        )
    # No accounts of its own, whose keys everybody knows; gas that costs nothing.
    made = [str(anvil), "--host", "127.0.0.1", "--chain-id", str(chain_id), "--accounts", "0"]
    made += ["--block-base-fee-per-gas", "0", "--gas-price", "0", "--disable-min-priority-fee"]
    made += ["--slots-in-an-epoch", "1", "--no-cors", "--dump-state", str(place / EXIT_FILE)]
    if (began := _began(place)) is None:
        return made
    # It makes a first block at each start: the same one, if it is of the same time.
    return [*made, "--load-state", str(place / STATE_FILE), "--timestamp", str(began)]


def _began(place: Path) -> int | None:
    """Have the newest state that is whole in STATE_FILE; returns the time of its first block, s."""
    ours, its = place / STATE_FILE, place / EXIT_FILE
    there = [path for path in (ours, its) if path.exists()]
    whole = [(state, path) for path in there if (state := _read(path)) is not None]
    if there and not whole:
        raise ConfigError(
            f"the try-out chain in {place} is damaged: the state of anvil is not whole",
            hint="restore it; or begin another try-out, with --data-dir",
            code="config.dev_damaged",
        )
    if not whole:
        return None
    (_newest, began), path = max(whole, key=lambda found: found[0][0])
    if path == its:
        replace_private_file(ours, its.read_bytes())
    its.unlink(missing_ok=True)
    return began


def _read(path: Path) -> tuple[int, int] | None:
    """(newest block, time of the first one) of a state; None if it is not whole."""
    try:
        if path.stat().st_size > STATE_BYTES_MAX:
            return None
        state = json.loads(path.read_bytes())
        times = [_int(block["header"]["timestamp"]) for block in state["blocks"]]
        return _int(state["best_block_number"]), min(times)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _int(value: Any) -> int:
    return int(value, 16) if isinstance(value, str) else int(value)


_FAILS: Final = (RpcFailed, OSError, EOFError, ValueError, KeyError, TypeError)


class Keeper:
    """Saves anvil's state whenever there is a new block: anvil itself does not, or not whole."""

    def __init__(self, place: Path, port: int) -> None:
        self._path, self._port = place / STATE_FILE, port
        self._saved = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="try-out state", daemon=True)

    def __enter__(self) -> Keeper:
        call(self._port, "evm_setTime", int(time.time()))  # and not that of its first block
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(*_FAILS):
            self.save()

    def _run(self) -> None:
        while not self._stop.wait(SAVE_S):
            with contextlib.suppress(*_FAILS):
                self.save()

    def save(self) -> None:
        """Put the state on disk, if there is a new block; raises _FAILS, with the old one there."""
        newest = call(self._port, "eth_getBlockByNumber", "latest", False)["hash"]
        if newest != self._saved:
            packed = bytes.fromhex(call(self._port, "anvil_dumpState")[2:])
            replace_private_file(self._path, gzip.decompress(packed))
            self._saved = newest
