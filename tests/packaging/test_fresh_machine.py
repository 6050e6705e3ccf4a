"""The line of `ww invite --script` makes a bare machine a member, as a user and as root.

systemd does not run here: a stand-in writes down what it is asked, and the tests start what the
unit says to start. What they cannot cover: that systemd starts it, confined as the unit of the
system says, and again after a crash and a boot; and lingering.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.packaging.conftest import Built

from wetware.testing import Home, NodeProcess, end_with_parent, wait_for

pytestmark = pytest.mark.timeout(600)

INSTALL_S_MAX = 300.0
LISTEN = "WW_NODE_LISTEN=/ip4/127.0.0.1/tcp/0"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[NodeProcess]:
    """The node that invites."""
    with Home(tmp_path / "desk") as home, home.node("desk") as node:
        yield node


@pytest.fixture
def line(desk: NodeProcess, built: Built) -> str:
    """What it prints for a machine that installs the wheel."""
    return desk.ww("invite", "--script", "--from", str(built.wheel), check=True).stdout


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Of a shell on a bare machine, whose index is this one's; with a `systemctl` that notes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "systemctl").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n')
    (tools / "systemctl").chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_"))}
    kept |= {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    return {
        "UV_CACHE_DIR": str(Path.home() / ".cache" / "uv"),  # what is there need not come again
        "PIP_CACHE_DIR": str(Path.home() / ".cache" / "pip"),
        **kept,
        "HOME": str(tmp_path / "home"),
        "PATH": f"{tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }


@contextlib.contextmanager
def seen_in_processes(secret: str) -> Iterator[list[str]]:
    """The command lines of this machine that have a secret in them, meanwhile."""
    found: list[str] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if secret.encode() in (data := file.read_bytes()):
                        found.append(data.decode(errors="replace"))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def paste(line: str, env: dict[str, str], cwd: Path) -> str:
    """As from `ssh HOST sh`; what it says on stderr."""
    done = subprocess.run(
        ["sh"], input=line, env=env, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_S_MAX
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.mark.long
def test_a_user_pastes_it_twice(
    desk: NodeProcess, line: str, env: dict[str, str], tmp_path: Path
) -> None:
    home, ticket = Path(env["HOME"]), shlex.split(line)[2]
    home.mkdir()
    (tmp_path / "tools" / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "tools" / "id").chmod(0o755)
    with seen_in_processes(ticket) as seen:
        said = paste(line, env, home)
    assert seen == []
    unit = home / ".config/systemd/user/wetware.service"
    assert f"this machine is a member of the cluster {desk.info['cluster']}" in said
    assert f"{unit} is written" in said
    assert "loginctl enable-linger" in said
    asked = ["--user daemon-reload", "--user enable --now wetware"]
    assert (tmp_path / "asked").read_text().splitlines() == asked
    kept = [path for path in home.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
    assert not [path for path in kept if ticket.encode() in path.read_bytes()]

    said_by = dict(each.split("=", 1) for each in unit.read_text().splitlines() if "=" in each)
    (environment,) = shlex.split(said_by["Environment"])
    command = ["env", environment, LISTEN, *shlex.split(said_by["ExecStart"])]
    with (tmp_path / "log").open("wb") as log:
        node = subprocess.Popen(
            command, env=env, cwd="/", stdout=log, stderr=log, preexec_fn=end_with_parent
        )
    try:
        wait_for(lambda: len(desk.members("state=alive")) == 2, "two members", within_s=60)
        said = paste(line, env, home)  # while the service runs
        assert "this machine is a member of the cluster" in said
        assert f"{unit} is as it was" in said
        ww = str(home / ".wetware/venv/bin/ww")
        left = subprocess.run([ww, "leave", "--yes"], env=env, capture_output=True, text=True)
        assert left.returncode == 0, left.stderr
        assert "its service does not start it until then" in left.stderr
        assert node.wait(60) == 0, (tmp_path / "log").read_text()
        wait_for(lambda: len(desk.members("state=left")) == 1, "it has left", within_s=60)
    finally:
        node.kill()
        node.wait()


ROOT_S_SHELL = """
for dir in etc opt var/lib; do
  mkdir -p "$BOX/$dir/upper" "$BOX/$dir/work"
  mount -t overlay overlay -o "lowerdir=/$dir,upperdir=$BOX/$dir/upper,workdir=$BOX/$dir/work" /$dir
done
echo mounted
sh <"$BOX/line"
sh <"$BOX/line"
start=$(sed -n 's/^ExecStart=//p' /etc/systemd/system/wetware.service)
eval "exec runuser -u wetware -- env WW_HOME=/var/lib/wetware $LISTEN $start"
"""


def test_root_pastes_it_twice(
    desk: NodeProcess, line: str, env: dict[str, str], tmp_path: Path
) -> None:
    """With layers over /etc, /opt and /var/lib, which end with it."""
    if os.getuid() != 0:
        pytest.skip("needs root")
    box, log = tmp_path / "box", tmp_path / "log"
    box.mkdir()
    (box / "line").write_text(line)
    with log.open("wb") as said:
        shell = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-euc", ROOT_S_SHELL),
            ],
            env={**env, "HOME": "/root", "BOX": str(box), "LISTEN": LISTEN},
            cwd="/root",  # where root is after a login, and the node's user may not look
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            preexec_fn=end_with_parent,
        )

    def joined() -> bool:
        assert shell.poll() is None, log.read_text()
        return len(desk.members("state=alive")) == 2

    try:
        wait_for(lambda: "mounted" in log.read_text() or shell.poll() is not None, "the layers")
        if "mounted" not in log.read_text():
            pytest.skip(f"layers cannot be mounted: {log.read_text().strip()}")
        wait_for(joined, "two members", within_s=INSTALL_S_MAX)
    finally:
        shell.send_signal(signal.SIGKILL)
        shell.wait()
    text = log.read_text()
    unit = "/etc/systemd/system/wetware.service"
    assert text.index(f"{unit} is written") < text.index(f"{unit} is as it was")
    assert (tmp_path / "asked").read_text() == "daemon-reload\nenable --now wetware\n" * 2
    users = (box / "etc/upper/passwd").read_text().splitlines()
    (entry,) = [entry for entry in users if entry.startswith("wetware:")]
    assert entry.endswith(":/var/lib/wetware:/usr/sbin/nologin")
    home = box / "var/lib/upper/wetware"
    for path in (home, home / "node", home / "node" / "certificate", home / "node" / "node.key"):
        assert path.stat().st_uid == int(entry.split(":")[2]), path
        assert path.stat().st_mode & 0o077 == 0, path
    assert (box / "opt/upper/wetware/bin/ww").stat().st_uid == 0
