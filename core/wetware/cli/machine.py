"""What `ww doctor` finds on this machine, without a node; what a node finds is in `findings`.

A check gives findings and never raises: what it cannot judge is a finding too, or nothing where
nothing can be known. Whatever is not fine says what to do next. Each check has its own time limit,
and the functions that judge take plain values, so that they are tested without a broken machine.

Heavy modules are imported inside the checks: a missing library is a finding, not a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from wetware.base import paths
from wetware.base.finding import (
    Check,
    Finding,
    error,
    judged,
    of_error,
    ok,
    remedy_of,
    warning,
)
from wetware.base.threads import Threads
from wetware.errors import ConfigError, DialError, KeyFileError, WetwareError
from wetware.loader.report import findings
from wetware.node.data_dir import holder_pid
from wetware.node.disk import check_disk
from wetware.node.process import judge_files

if TYPE_CHECKING:
    from wetware.base.multiaddr import Multiaddr
    from wetware.config import Config

CHECK_S_MAX: Final = 10.0
"""For one check."""
DIAL_S_MAX: Final = 3.0
RUNTIME_BYTES_MAX: Final = 64 << 10
ADDRS_MAX: Final = 16

_STA_UNSYNC: Final = 0x40  # linux/timex.h


async def check_machine(
    flags: Mapping[str, object],
    config_path: Path | None = None,
    key: str | None = None,
    *,
    local: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """Everything that can be said without asking a node. Takes a second, mostly for fsync.

    Args:
        flags: Dotted settings of the command line, as `config.load` takes them.
        config_path: The configuration file that the command line names, or None.
        key: The user's key that it names, or None.
        local: Whether the node of this machine is meant; with `--node` it is not, and neither its
            files nor its addresses are looked at.
        progress: Is told of each check, before it.
    """
    found: list[Finding] = []

    async def run(name: str, check: Check) -> None:
        progress(name)
        found.extend(await judged(name, check, CHECK_S_MAX))

    await run("versions", check_versions)
    config: Config | None = None

    def configuration() -> list[Finding]:
        nonlocal config
        config, findings = check_config(flags, config_path)
        return findings

    await run("config", configuration)
    if config is not None:
        await run("your key", partial(check_user_key, key, config))
        for name, check in (_local_checks(config) if local else {}).items():
            await run(name, check)
    return found


def _local_checks(config: Config) -> dict[str, Check]:
    """The checks of the node's own files and addresses; {} if `[node]` is wrong, which is said."""
    try:
        node, link = config.node, config.link
    except ConfigError:
        return {}
    data_dir = node.data_dir
    checks: dict[str, Check] = {
        "data directory": partial(check_data_dir, data_dir),
        "disk": partial(Threads().run, check_disk, data_dir),
        "node key": partial(check_node_key, data_dir),
        "clock": lambda: judge_kernel_clock(_kernel_clock()),
    }
    if (pid := holder_pid(data_dir)) is None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        limit = None if hard == resource.RLIM_INFINITY else hard
        checks["listen"] = partial(_check_free, node.listen)
        checks["open files"] = partial(
            judge_files, limit, link.connections_max + link.handshakes_max
        )
    else:  # a running node judges its own limit of files: it raised it at its start
        checks["listen"] = partial(_check_held, data_dir, pid)
    return checks


# --- versions ---


def check_versions() -> list[Finding]:
    """Python and the libraries against what this version of wetware declares."""
    from importlib import metadata

    try:
        dist = metadata.distribution("wetware")
    except metadata.PackageNotFoundError:
        text = "wetware is no installed distribution: the versions of its libraries are unknown"
        remedy = "`pip install wetware`, or in a checkout `pip install -e .`"
        return [warning("versions", text, remedy)]

    def installed(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    python = ".".join(map(str, sys.version_info[:3]))
    wanted = str(dist.metadata["Requires-Python"] or "")
    return judge_versions(python, wanted, dist.requires or (), installed)


def judge_versions(
    python: str,
    python_wanted: str,
    requires: Iterable[str],
    installed: Callable[[str], str | None],
) -> list[Finding]:
    """Python first, then one finding for all the libraries that fit, and one for each other.

    Args:
        python: The version that runs.
        python_wanted: As "Requires-Python".
        requires: As "Requires-Dist"; those with a marker (extras) are not ours to judge.
        installed: Name → version, or None.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    found, fitting = [], []
    if SpecifierSet(python_wanted).contains(python):
        found.append(ok("python", f"{python} at {sys.executable}"))
    else:
        make = "`python3.11 -m venv ENV && ENV/bin/pip install wetware`"
        text = f"{python}; wetware needs {python_wanted}"
        found.append(error("python", text, f"make an environment with it: {make}"))
    for need in map(Requirement, requires):
        if need.marker is not None:
            continue
        have = installed(need.name)
        remedy = f"`pip install '{need.name}{need.specifier}'` with {sys.executable}"
        if have is None:
            found.append(error("libraries", f"{need.name} is not installed", remedy))
        elif not need.specifier.contains(have, prereleases=True):
            text = f"{need.name} {have} is installed, not {need.specifier}"
            found.append(error("libraries", text, remedy))
        else:
            fitting.append(f"{need.name} {have}")
    if fitting:
        found.append(ok("libraries", ", ".join(fitting)))
    return found


# --- configuration and plugins ---


def check_config(
    flags: Mapping[str, object], path: Path | None
) -> tuple[Config | None, list[Finding]]:
    """Every problem of the configuration, and the plugins that it selects.

    Returns None for one that cannot even be read.
    """
    from wetware.cli.config import inspect

    config, plugins, problems = inspect(flags, path)
    found = [of_error("config", each, "ww config check") for each in problems]
    if config is not None and not found:
        where = str(config.path) if config.exists else f"the defaults (there is no {config.path})"
        found.append(ok("config", where))
    return config, [*found, *findings(plugins)]


# --- files and keys ---


def check_data_dir(data_dir: Path) -> list[Finding]:
    """Whether a node will accept it as its data directory, and can write there."""
    name = "data directory"
    other = "choose another one: `ww node --data-dir DIR`"
    try:
        info = data_dir.stat()
    except FileNotFoundError:
        parent = next(each for each in data_dir.parents if each.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            text = f"{data_dir} does not exist, and {parent} is not yours to write"
            return [error(name, text, other)]
        return [ok(name, f"{data_dir} does not exist yet; the first `ww node` makes it")]
    except OSError as exc:
        return [error(name, f"cannot look at {data_dir}: {exc.strerror}", other)]
    mode = stat.S_IMODE(info.st_mode)
    chmod = f"`chmod 700 {data_dir}`"
    if not stat.S_ISDIR(info.st_mode):
        return [error(name, f"{data_dir} is not a directory", other)]
    if info.st_uid != os.getuid():
        text = f"{data_dir} belongs to user {info.st_uid}, and you are {os.getuid()}"
        return [error(name, text, f"run as that user, or {other}")]
    if mode & 0o022:
        text = f"others can write to {data_dir} (mode {mode:04o}): no node starts there"
        return [error(name, text, chmod)]
    if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        return [error(name, f"{data_dir} cannot be written (mode {mode:04o})", chmod)]
    if mode & 0o055:
        return [warning(name, f"others can look into {data_dir} (mode {mode:04o})", chmod)]
    return [ok(name, f"{data_dir}, mode {mode:04o}")]


def check_node_key(data_dir: Path) -> list[Finding]:
    """Whether the node's key can be used, by its owner alone."""
    name, file = "node key", data_dir / "node.key"
    if file.exists():
        otherwise = "restore it from a backup, or start a node of its own"
        return _check_key(name, file, otherwise, "ww id")
    if not (data_dir / "certificate").exists():
        return [ok(name, "there is none yet; the first `ww node` makes it")]
    text = f"{file} is gone, and the certificate beside it is of no use without it"
    anew = "join anew with another directory: `ww node --data-dir DIR --join TICKET`"
    return [error(name, text, f"restore the key from a backup, or {anew}")]


def check_user_key(key: str | None, config: Config) -> list[Finding]:
    """Whether the key that you log in with can be used, by you alone."""
    from wetware.client import KeyChoice
    from wetware.overlay.admission.store import founding_of

    choice = KeyChoice(key, config.keys_dir, None)
    file = choice.path
    if file.exists():
        return _check_key("your key", file, "make another with `ww key new NAME`", "ww key list")
    with contextlib.suppress(ConfigError):
        if not config.node.data_dir.exists():
            return [ok("your key", f"there is no {file} yet; the first `ww node` makes it")]
        # The cluster says it where it was not the configuration but a flag that did.
        founding = founding_of(config.node.data_dir)
        auth = founding.backend if founding is not None else config.node.auth
        if auth not in ("local", "auth_local"):
            return [ok("your key", f"there is no {file}; logins go by {auth!r}")]
    remedy = f"`{choice.new_command}`, and an operator adds you: `ww user add NAME --key KEY`"
    return [warning("your key", f"there is no key at {file}", remedy)]


def _check_key(name: str, file: Path, otherwise: str, command: str) -> list[Finding]:
    from wetware.identity import Key

    try:
        info = file.stat()
        if info.st_uid != os.getuid():
            text = f"{file} belongs to user {info.st_uid}, and you are {os.getuid()}"
            return [error(name, text, f"run as its owner, or `sudo chown {os.getuid()} {file}`")]
        passphrase = paths.variable("WW_PASSPHRASE")
        key = Key.load(file, passphrase=(lambda: passphrase) if passphrase else None)
    except KeyFileError as exc:
        if exc.code == "key.passphrase":
            if passphrase:
                return [error(name, exc.message, "set WW_PASSPHRASE rightly, then `ww doctor`")]
            text = f"{file} is encrypted; `ww node` and scripts need WW_PASSPHRASE"
            return [ok(name, text)]
        if exc.code == "key.mode":
            return [error(name, exc.message, f"`{exc.hint}`")]
        return [error(name, exc.message, remedy_of(otherwise, command))]
    return [ok(name, f"{key.peer_id} in {file}, mode {stat.S_IMODE(info.st_mode):04o}")]


# --- the clock, and open files ---


def _kernel_clock() -> int | None:
    """The kernel's `status` of its clock; None where it cannot be read."""
    import ctypes

    class Timex(ctypes.Structure):
        _fields_ = (
            ("modes", ctypes.c_uint),  # 0: only read
            ("offset", ctypes.c_long),
            ("freq", ctypes.c_long),
            ("maxerror", ctypes.c_long),
            ("esterror", ctypes.c_long),
            ("status", ctypes.c_int),
            ("rest", ctypes.c_char * 256),
        )

    value = Timex()
    try:
        if ctypes.CDLL(None).adjtimex(ctypes.byref(value)) < 0:
            return None
    except (OSError, AttributeError):
        return None
    return int(value.status)


def judge_kernel_clock(status: int | None) -> list[Finding]:
    """Whether something keeps this clock right, as far as the kernel has been told.

    A host may keep the clock of its virtual machines right without telling their kernels: not
    more than a warning, and a running node compares its clock with the other members'.
    """
    if status is None:
        return []
    if not status & _STA_UNSYNC:
        return [ok("clock", "synchronised, the kernel says")]
    text = "nothing has told the kernel that the clock of this machine is synchronised"
    remedy = "`timedatectl set-ntp true`, or install chrony; in a virtual machine whose host does "
    return [warning("clock", text, remedy + "it, leave it")]


# --- the node's addresses ---


async def _check_free(addrs: Sequence[Multiaddr]) -> list[Finding]:
    """No node runs: whether one could listen where the configuration says."""
    from wetware.overlay.link import check_free

    found = []
    for addr in addrs:
        try:
            await check_free((addr,))
        except ConfigError as exc:
            show = f"`ss -ltnp 'sport = :{addr.port}'` shows it, or `ww node --listen ADDRESS`"
            found.append(error("listen", exc.message, f"{exc.hint}: {show}"))
        else:
            found.append(ok("listen", f"{addr} is free"))
    return found


async def _check_held(data_dir: Path, pid: int) -> list[Finding]:
    """A node runs: whether it answers at each address that it listens on, with its own key."""
    import json

    from wetware.base.multiaddr import Multiaddr
    from wetware.identity import Key
    from wetware.overlay.link import LinkHost

    try:
        with (data_dir / paths.RUNTIME_FILE).open("rb") as file:
            texts = json.loads(file.read(RUNTIME_BYTES_MAX))["addrs"]
        addrs = [Multiaddr.parse(str(text)) for text in texts[:ADDRS_MAX]]
    except (OSError, ValueError, KeyError, TypeError, WetwareError):
        text = f"the node (pid {pid}) has not said yet where it listens: it is starting or hangs"
        remedy = f"look at its log; `ww doctor` again, and `kill {pid}` if it stays so"
        return [warning("listen", text, remedy)]

    async def answers(addr: Multiaddr) -> Finding:
        async with LinkHost(Key.generate()) as host:
            try:
                await host.dial((addr,), timeout_s=DIAL_S_MAX)
            except DialError as exc:
                remedy = f"look at the log of the node (pid {pid}), then restart it: `ww node`"
                return error("listen", f"the node does not answer: {exc.message}", remedy)
        return ok("listen", f"the node answers at {addr.with_peer(None)}")

    return list(await asyncio.gather(*map(answers, addrs)))
