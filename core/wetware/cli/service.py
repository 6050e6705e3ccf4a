"""A node as a service of systemd, of the system or of a user, and a fresh machine that gets one."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from wetware.base import paths
from wetware.cli.app import confirm, note
from wetware.errors import ConfigError, WetwareError
from wetware.node.leaving import LEFT_FILE
from wetware.overlay.admission.files import CLUSTER_FILE

NAME: Final = "wetware"
"""Of the unit, and of the user that runs it for the system."""
SYSTEM_HOME: Final = Path("/var/lib/wetware")
SYSTEM_UNIT: Final = Path("/etc/systemd/system/wetware.service")
ADD_USER: Final = f"useradd --system --home-dir {SYSTEM_HOME} --shell /usr/sbin/nologin {NAME}"
_HIDDEN: Final = ("/home/", "/root/", "/run/user/")
"""From the service of the system, by ProtectHome."""

_UNIT: Final = """\
# A wetware node, as `ww node --install-service` wrote it. Its settings are in {home}/ww.toml.
[Unit]
Description=wetware node
Documentation=https://github.com/wetware/wetware-py
# One that has left its cluster would found another: not before it has joined again.
ConditionPathExists=|{home}/node/{member}
ConditionPathExists=|!{home}/node/{left}
{after}
[Service]
Type=exec
ExecStart="{ww}" node
Environment="WW_HOME={home}"
UMask=0077
LimitNOFILE=65536
Restart=on-failure
RestartSec=5
# A wrong command line, a cluster that does not let it in, wrong settings: no new try helps.
RestartPreventExitStatus=2 77 78
NoNewPrivileges=yes
# It limits the memory and processor time of native programs by control groups of its own.
Delegate=yes
{confined}
[Install]
WantedBy={target}
"""
_AFTER: Final = """\
Wants=network-online.target
After=network-online.target
"""
_CONFINED: Final = f"""\
# It needs its own directory, the network, and nothing else of the machine.
User={NAME}
StateDirectory={NAME}
StateDirectoryMode=0700
PrivateDevices=yes
PrivateTmp=yes
ProtectHome=yes
ProtectSystem=strict
"""


# The ticket comes on stdin, from the shell's own printf: no list of processes shows it. Neither '
# nor a backslash is in it, which mean other things in other shells.
_FRESH: Final = (
    "set -eu; "
    'python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" '
    '|| { echo "wetware needs Python 3.11 or newer" >&2; exit 1; }; '
    'if [ "$(id -u)" = 0 ]; then umask 022; venv=/opt/wetware user= '
    f'as="runuser -u {NAME} -- env WW_HOME={SYSTEM_HOME}"; '
    f"id {NAME} >/dev/null 2>&1 || {ADD_USER}; install -d -o {NAME} -m 700 {SYSTEM_HOME}; "
    'else venv="$HOME/.wetware/venv" user=--user as=; fi; '
    'python3 -m venv "$venv"; "$venv/bin/pip" install -q uv </dev/null; '
    'echo "fastecdsa>=3.0.1,<5" >"$venv/overrides"; '  # [tool.uv] of pyproject.toml says why
    '"$venv/bin/uv" pip install -q --python "$venv/bin/python" --overrides "$venv/overrides" '
    '"$1" </dev/null; '
    '$as "$venv/bin/ww" join -; "$venv/bin/ww" node --install-service $user --now'
)


def script(ticket: str, source: str) -> str:
    """A line for any shell of a fresh machine; pasted again, it goes on where it was.

    It installs `source`, as pip takes it, joins with the ticket, and installs the service.
    """
    return f"printf %s {shlex.quote(ticket)} | sh -c {shlex.join((_FRESH, 'sh', source))}"


def installed_from() -> str | None:
    """Where this installation of wetware is from, as pip takes it; None where others cannot get it.

    Source: PEP 610. An index is not recorded, and nobody has to own the project's name there.
    """
    with contextlib.suppress(PackageNotFoundError, ValueError, KeyError, TypeError):
        recorded = json.loads(distribution("wetware").read_text("direct_url.json") or "{}")
        url: str = recorded["url"]
        if "dir_info" in recorded or url.startswith("file:"):
            return None
        if "vcs_info" not in recorded:
            return url
        vcs, inside = recorded["vcs_info"], recorded.get("subdirectory")
        commit = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
        return f"{commit}#subdirectory={inside}" if inside else commit
    return None


def unit_path(*, user: bool) -> Path:
    """Where systemd looks for it."""
    if not user:
        return SYSTEM_UNIT
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return paths.absolute(config, "XDG_CONFIG_HOME") / "systemd/user" / SYSTEM_UNIT.name


def units(data_dir: Path) -> dict[str, bool]:
    """Of the units that are installed here, the flags of `systemctl`.

    With each, whether it is of this data directory and does not start its node once that has left.
    """
    found = {}
    for how in ("", "--user "):
        with contextlib.suppress(OSError):
            text = unit_path(user=bool(how)).read_text(errors="replace")
            found[how] = f"=|!{data_dir / LEFT_FILE}\n" in text
    return found


def unit_text(*, user: bool) -> str:
    """The unit that runs this installation of wetware; raises ConfigError.

    That of a user is not confined: a user's systemd needs user namespaces for it, which not every
    machine has, and then it starts nothing.
    """
    ww, home = Path(sys.executable).with_name("ww"), paths.home() if user else SYSTEM_HOME
    for path in (ww, home):
        if re.search(r'["\\$%\x00-\x1f]', str(path)):
            raise ConfigError(f"systemd would read {str(path)!r} as something else")
    return _UNIT.format(
        ww=ww,
        home=home,
        member=CLUSTER_FILE,
        left=LEFT_FILE,
        after="" if user else _AFTER,
        confined="" if user else _CONFINED,
        target="default.target" if user else "multi-user.target",
    )


def _check_system() -> None:
    for path in (sys.executable, os.path.realpath(sys.executable)):
        if path.startswith(_HIDDEN):
            raise ConfigError(
                f"a service of the system does not see {path}: home directories are hidden from it",
                hint="install wetware in /opt/wetware, with a Python of the system; or --user",
            )
    try:
        pwd.getpwnam(NAME)
    except KeyError:
        raise ConfigError(f"there is no user {NAME} to run the node", hint=ADD_USER) from None


def install(*, user: bool, now: bool, yes: bool) -> None:
    """Write the unit, and with `now` start it; says what is next. Raises WetwareError."""
    if not user:
        _check_system()
    unit, text = unit_path(user=user), unit_text(user=user)
    try:
        there = unit.read_text(errors="replace") if unit.exists() else None
        if there not in (None, text):
            confirm(f"{unit} is another unit. Replace it?", yes=yes)
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.unlink(missing_ok=True)  # a link to /dev/null, if it was masked
        unit.write_text(text)
    except OSError as exc:
        raise ConfigError(
            f"cannot write {unit}: {exc.strerror}",
            hint="" if user else "run it as root, or with --user for a service of your own",
        ) from exc
    note(f"{unit} is {'as it was' if there == text else 'written'}")
    systemctl = ["systemctl", *(["--user"] if user else [])]
    steps = [*systemctl, "daemon-reload"], [*systemctl, "enable", "--now", NAME]
    typed = " && ".join(map(shlex.join, steps))
    if now:
        try:
            for step in steps:
                subprocess.run(step, check=True)  # noqa: S603 - no word of it is anybody else's
        except (OSError, subprocess.CalledProcessError) as exc:
            raise WetwareError(
                f"the unit is there, and systemd does not take it: {exc}",
                hint=f"{typed}; where systemd does not run, `ww node` needs no service",
            ) from exc
    else:
        note(f"next: {typed}")
    if user:
        note("so that it runs while you are logged out, too: loginctl enable-linger")
