"""`ww doctor`: what each check says of what it is shown, and that none of them raises or hangs."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.findings import ADA, OWN, levels, only

from tests.ports import free_port
from wetware.base.finding import Finding, judged
from wetware.base.multiaddr import Multiaddr
from wetware.cli import machine as on_machine
from wetware.cli.machine import check_machine
from wetware.config import load
from wetware.errors import DialError
from wetware.loader import report
from wetware.node import disk as on_disk
from wetware.node.data_dir import holder_pid
from wetware.node.process import judge_files
from wetware.overlay.admission.store import Store
from wetware.testing import Home

pytestmark = pytest.mark.anyio

# --- versions -------------------------------------------------------------------------------------


def test_libraries_that_are_missing_or_do_not_fit_are_named() -> None:
    have = {"anyio": "4.6.1", "libp2p": "0.9.0"}
    requires = ["anyio<5,>=4.6", "libp2p==0.8.1", "cbor2<7,>=6", 'web3>=7; extra == "evm"']
    found = on_machine.judge_versions("3.11.7", ">=3.11", requires, have.get)
    assert levels(found) == ["ok", "error", "error", "ok"]
    assert "libp2p 0.9.0 is installed, not ==0.8.1" in found[1].text
    assert "pip install 'libp2p==0.8.1'" in found[1].remedy
    assert "cbor2 is not installed" in found[2].text
    assert levels(on_machine.judge_versions("3.10.1", ">=3.11", [], have.get)) == ["error"]


def test_what_runs_here_is_judged() -> None:
    assert {f.check for f in on_machine.check_versions()} >= {"python"}


# --- this machine ---------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("WW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_data_directory(tmp_path: Path) -> None:
    path = tmp_path / "node"
    assert levels(on_machine.check_data_dir(path)) == ["ok"]
    path.mkdir(mode=0o700)
    assert levels(on_machine.check_data_dir(path)) == ["ok"]
    for mode, level in ((0o755, "warning"), (0o770, "error"), (0o702, "error")):
        path.chmod(mode)
        (found,) = on_machine.check_data_dir(path)
        assert found.level == level, oct(mode)
        assert f"chmod 700 {path}" in found.remedy
    file = tmp_path / "file"
    file.touch()
    assert levels(on_machine.check_data_dir(file)) == ["error"]
    assert levels(on_machine.check_data_dir(file / "below")) == ["error"]


def test_a_data_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    (found,) = on_machine.check_data_dir(tmp_path)
    assert found.level == "error"
    assert "belongs to user" in found.text


def test_free_space_and_its_thresholds(tmp_path: Path) -> None:
    for free, level in (
        (on_disk.DISK_FREE_BYTES_MIN - 1, "error"),
        (on_disk.DISK_FREE_BYTES_LOW - 1, "warning"),
        (on_disk.DISK_FREE_BYTES_LOW, "ok"),
    ):
        assert levels(on_disk.judge_space(free, tmp_path)) == [level]


def test_a_durable_write_is_measured(tmp_path: Path) -> None:
    assert 0 < on_disk.fsync_s(tmp_path) < 60
    assert list(tmp_path.iterdir()) == []
    assert levels(on_disk.judge_fsync(0.001, tmp_path)) == ["ok"]
    assert levels(on_disk.judge_fsync(0.2, tmp_path)) == ["warning"]


def test_a_disk_that_takes_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_disk, "fsync_s", full)
    found = on_disk.check_disk(tmp_path)
    assert "error" in levels(found)
    assert "No space left" in found[-1].text


def test_the_node_s_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WW_PASSPHRASE", raising=False)
    assert levels(on_machine.check_node_key(tmp_path)) == ["ok"]
    OWN.save(tmp_path / "node.key")
    (found,) = on_machine.check_node_key(tmp_path)
    assert found.level == "ok"
    assert str(OWN.peer_id) in found.text
    (tmp_path / "node.key").chmod(0o640)
    (found,) = on_machine.check_node_key(tmp_path)
    assert found.level == "error"
    assert found.remedy == f"`chmod 600 {tmp_path / 'node.key'}`"
    (tmp_path / "node.key").chmod(0o600)
    (tmp_path / "node.key").write_text("no key")
    assert levels(on_machine.check_node_key(tmp_path)) == ["error"]
    (tmp_path / "node.key").unlink()
    (tmp_path / "certificate").touch()
    (found,) = on_machine.check_node_key(tmp_path)
    assert found.level == "error"
    assert "of no use without it" in found.text


def test_an_encrypted_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OWN.save(tmp_path / "node.key", passphrase="correct horse")
    monkeypatch.delenv("WW_PASSPHRASE", raising=False)
    (found,) = on_machine.check_node_key(tmp_path)
    assert (found.level, "WW_PASSPHRASE" in found.text) == ("ok", True)
    monkeypatch.setenv("WW_PASSPHRASE", "wrong")
    assert levels(on_machine.check_node_key(tmp_path)) == ["error"]
    monkeypatch.setenv("WW_PASSPHRASE", "correct horse")
    assert levels(on_machine.check_node_key(tmp_path)) == ["ok"]


def test_the_user_s_key(home: Path) -> None:
    config = load({"node.data_dir": home / "node"})
    assert levels(on_machine.check_user_key(None, config)) == ["ok"]  # the first start makes it
    (home / "node").mkdir(parents=True)
    (found,) = on_machine.check_user_key(None, config)
    assert (found.level, "`ww key new`" in found.remedy) == ("warning", True)
    Store(home / "node").found("evm", b"x")  # by a flag: the configuration does not say it
    (found,) = on_machine.check_user_key(None, config)
    assert (found.level, "logins go by 'evm'" in found.text) == ("ok", True)
    for file in (home / "node").iterdir():
        file.unlink()
    ADA.save(home / "keys" / "default")
    assert levels(on_machine.check_user_key(None, config)) == ["ok"]
    assert levels(on_machine.check_user_key("nobody", config)) == ["warning"]
    (home / "keys" / "default").chmod(0o644)
    assert levels(on_machine.check_user_key(None, config)) == ["error"]


def test_the_kernel_s_clock() -> None:
    assert on_machine.judge_kernel_clock(None) == []
    assert levels(on_machine.judge_kernel_clock(0x2001)) == ["ok"]
    assert levels(on_machine.judge_kernel_clock(0x40)) == ["warning"]
    assert on_machine._kernel_clock() is None or on_machine._kernel_clock() >= 0  # type: ignore[operator]


def test_open_files() -> None:
    assert levels(judge_files(None, 1024)) == ["ok"]
    assert levels(judge_files(65536, 1024, 900)) == ["ok"]
    assert levels(judge_files(1024, 1024)) == ["warning"]
    assert levels(judge_files(1024, 512, 900)) == ["error"]


def test_every_problem_of_the_configuration_is_a_finding(home: Path) -> None:
    home.mkdir()
    (home / "ww.toml").write_text('[node]\nauth = "Nope!"\nnam = "x"\n[login]\nsessions_max = -1\n')
    config, found = on_machine.check_config({}, None)
    assert config is not None
    bad = [f for f in found if f.check == "config"]
    assert levels(bad) == ["error"] * len(bad)
    text = "\n".join(f.text for f in bad)
    assert len(bad) >= 3
    for part in ("node.auth", "node.nam", "login.sessions_max"):
        assert part in text
    (home / "ww.toml").write_text("[node\n")
    config, found = on_machine.check_config({}, None)
    assert config is None
    assert levels(found) == ["error"]


def test_plugins() -> None:
    def plugin(name: str, state: str, remedy: str = "") -> Any:
        return SimpleNamespace(name=name, state=state, reason="so it is", remedy=remedy)

    found = report.findings(
        [
            plugin("a", "loaded"),
            plugin("b", "failed"),
            plugin("c", "unavailable", "pip install 'wetware[c]'"),
            plugin("d", "disabled"),
        ]
    )
    assert levels(found) == ["warning", "warning", "ok"]
    assert "pip install 'wetware[c]'" in found[1].remedy


async def test_a_machine_without_a_node(home: Path) -> None:
    listen = Multiaddr("ip4", "127.0.0.1", free_port())
    seen: list[str] = []
    flags = {"node.data_dir": home / "node", "node.listen": (listen,)}
    found = await check_machine(flags, progress=seen.append)
    assert "error" not in levels(found), found
    assert only(found, "listen").text == f"{listen} is free"
    assert {"versions", "config", "data directory", "listen", "your key"} <= set(seen)
    assert not (home / "node").exists(), "the doctor leaves nothing behind"


async def test_a_port_that_is_taken(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addr = Multiaddr("ip4", "127.0.0.1", taken.getsockname()[1])
        flags = {"node.data_dir": home / "node", "node.listen": (addr,)}
        found = only(await check_machine(flags), "listen")
    assert found.level == "error"
    assert "the port is taken" in found.text
    assert f"sport = :{addr.port}" in found.remedy


async def test_another_machine_s_node_needs_no_files_here(home: Path) -> None:
    found = await check_machine({}, local=False)
    assert not {f.check for f in found} & {"data directory", "listen", "node key", "disk"}


async def test_a_running_node_is_recognised_and_its_addresses_are_dialled(home: Path) -> None:
    from wetware.overlay.link import LinkHost

    data_dir = home / "node"
    data_dir.mkdir(parents=True, mode=0o700)
    assert holder_pid(data_dir) is None
    fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, f"{os.getpid()}\n".encode())
    assert holder_pid(data_dir) is None, "a lock file without a lock is of a killed node"
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        assert holder_pid(data_dir) == os.getpid()
        flags = {"node.data_dir": data_dir}
        starting = only(await check_machine(flags), "listen")
        assert (starting.level, f"kill {os.getpid()}" in starting.remedy) == ("warning", True)
        async with LinkHost(OWN) as host:
            (good,) = await host.listen([Multiaddr("ip4", "127.0.0.1", 0)])
            nobody = Multiaddr("ip4", "127.0.0.1", free_port())
            addrs = [
                str(good.with_peer(OWN.peer_id)),
                str(good.with_peer(ADA.peer_id)),
                str(nobody.with_peer(OWN.peer_id)),
            ]
            (data_dir / "node.json").write_text(json.dumps({"addrs": addrs}))
            found = [f for f in await check_machine(flags) if f.check == "listen"]
        assert levels(found) == ["ok", "error", "error"]
        assert "refused" in found[2].text
    finally:
        os.close(fd)


async def test_a_check_that_fails_or_hangs_is_a_finding() -> None:
    async def broken() -> list[Finding]:
        raise ZeroDivisionError("by\nzero")

    async def refused() -> list[Finding]:
        raise DialError("nobody there", hint="start it")

    async def hangs() -> list[Finding]:
        await asyncio.Event().wait()
        return []

    for check, level, text in (
        (broken, "warning", "ZeroDivisionError: by zero"),
        (refused, "error", "nobody there"),
        (hangs, "warning", "0.01 s"),
    ):
        found = await judged("x", check, 0.01)
        assert levels(found) == [level]
        assert text in found[0].text


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path) as made:
        yield made


def _ww(home: Home, *args: str) -> Any:
    """With a port of its own: another test may hold the default one."""
    return home.ww(*args, env={"WW_NODE_LISTEN": f"/ip4/127.0.0.1/tcp/{free_port()}"})


def test_the_command_without_a_node(processes: Home) -> None:
    done = _ww(processes, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "no node is running here" in done.stdout
    assert "`ww node` starts one" in done.stdout
    assert "data directory" not in done.stdout  # it is fine, and folded
    *_, last = done.stdout.splitlines()
    assert "ww doctor --verbose" in last
    assert _ww(processes, "doctor", "--strict").returncode == 1
    assert not (processes.path / ".wetware").exists()


def test_the_command_s_levels_are_coloured(processes: Home) -> None:
    env = {"FORCE_COLOR": "1", "WW_NODE_LISTEN": f"/ip4/127.0.0.1/tcp/{free_port()}"}
    done = processes.ww("doctor", "--verbose", env=env)
    assert "\x1b[33mwarning\x1b[0m  node: " in done.stdout
    assert "\x1b[32mok\x1b[0m       data directory: " in done.stdout


def test_the_command_lists_what_is_fine(processes: Home) -> None:
    done = _ww(processes, "doctor", "--verbose")
    assert done.returncode == 0
    assert "ok       data directory: " in done.stdout


def test_the_command_s_errors_and_json(processes: Home) -> None:
    data_dir = processes.path / "open"
    data_dir.mkdir()
    data_dir.chmod(0o777)
    done = _ww(processes, "--data-dir", str(data_dir), "doctor", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["ok"] is False
    (found,) = [f for f in report["findings"] if f["check"] == "data directory"]
    assert found["level"] == "error"
    assert found["remedy"] == f"`chmod 700 {data_dir}`"
    text = _ww(processes, "--data-dir", str(data_dir), "doctor").stdout
    assert text.startswith("error    data directory: others can write to")


def test_the_command_with_a_broken_configuration(processes: Home) -> None:
    file = processes.path / ".wetware" / "ww.toml"
    file.parent.mkdir()
    file.write_text("[node\n")
    done = _ww(processes, "doctor")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "is not valid TOML" in done.stdout
