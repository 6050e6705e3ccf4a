"""The unit of systemd that `ww node --install-service` writes, and the line for a fresh machine."""

from __future__ import annotations

import json
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from wetware.base.multiaddr import Multiaddr
from wetware.base.texts import ADDRS_MAX
from wetware.cli import cluster, service
from wetware.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_USAGE, ConfigError, InvalidArgument
from wetware.identity import Key
from wetware.overlay.admission.statements import Founding
from wetware.overlay.admission.store import Store
from wetware.overlay.admission.texts import Ticket
from wetware.testing import Home

ROOT = Path(__file__).parents[3]
INSTALL = ("node", "--install-service", "--user")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """With a `systemctl` that writes down what it is asked; a file `broken` has it fail."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "systemctl").write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\ntest ! -e {tmp_path}/broken\n'
    )
    (tools / "systemctl").chmod(0o755)
    with Home(tmp_path, env={"PATH": f"{tools}:/usr/bin:/bin"}) as made:
        yield made


def test_a_unit_is_written_once_and_not_over_another_one(home: Home) -> None:
    unit = home.path / ".config/systemd/user/wetware.service"
    done = home.ww(*INSTALL, check=True)
    text = unit.read_text()
    assert f'Environment="WW_HOME={home.path}/.wetware"\n' in text
    assert f'ExecStart="{Path(sys.executable).with_name("ww")}" node\n' in text
    assert f"{unit} is written" in done.stderr
    next_ = "next: systemctl --user daemon-reload && systemctl --user enable --now wetware\n"
    assert next_ in done.stderr
    assert "loginctl enable-linger" in done.stderr
    assert "is as it was" in home.ww(*INSTALL, check=True).stderr
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    refused = home.ww(*INSTALL)
    assert refused.returncode == EXIT_USAGE
    assert f"{unit} is another unit" in refused.stderr
    assert "--yes" in refused.stderr
    assert "ExecStart=/bin/true" in unit.read_text()
    home.ww(*INSTALL, "--yes", check=True)
    assert unit.read_text() == text
    assert not (home.path / "asked").exists()
    assert not (home.path / ".wetware/node").exists(), "nothing was started"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_a_service_does_not_start_a_node_that_has_left(home: Home) -> None:
    home.ww(*INSTALL, check=True)
    unit = home.path / ".config/systemd/user/wetware.service"
    conditions = re.findall("^(Condition.*)$", unit.read_text(), re.MULTILINE)
    node = home.path / ".wetware/node"
    starts = ["systemd-analyze", "condition", *conditions]

    def would_start() -> bool:
        return subprocess.run(starts, capture_output=True, timeout=20).returncode == 0

    assert conditions == [
        f"ConditionPathExists=|{node}/cluster.json",
        f"ConditionPathExists=|!{node}/left",
    ]
    assert would_start(), "a new one"
    Store(node).found("local", b"operator")
    said = home.ww("--data-dir", str(node), "leave", "--yes", check=True).stderr
    assert "its service does not start it until then" in said
    assert not would_start()
    Store(node).found("local", b"operator")
    assert would_start(), "it is a member again"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    said = home.ww("--data-dir", str(node), "leave", "--yes", check=True).stderr
    assert "systemctl --user disable wetware" in said


def test_a_unit_that_is_masked_or_no_text_is_replaced_only_when_told_to(home: Home) -> None:
    unit = home.path / ".config/systemd/user/wetware.service"
    unit.parent.mkdir(parents=True)
    unit.write_bytes(b"\xff\xfe")
    assert home.ww(*INSTALL).returncode == EXIT_USAGE
    unit.unlink()
    unit.symlink_to("/dev/null")  # as `systemctl mask` leaves it
    assert home.ww(*INSTALL).returncode == EXIT_USAGE
    assert unit.is_symlink()
    home.ww(*INSTALL, "--yes", check=True)
    assert not unit.is_symlink()
    assert "ExecStart=" in unit.read_text()


def test_now_has_systemd_start_it_and_says_what_to_do_where_it_does_not(home: Home) -> None:
    done = home.ww(*INSTALL, "--now", check=True)
    asked = (home.path / "asked").read_text()
    assert asked == "--user daemon-reload\n--user enable --now wetware\n"
    assert "next:" not in done.stderr
    (home.path / "broken").touch()
    failed = home.ww(*INSTALL, "--now")
    assert failed.returncode == EXIT_FAILED
    assert "the unit is there, and systemd does not take it" in failed.stderr
    assert (
        "systemctl --user daemon-reload && systemctl --user enable --now wetware" in failed.stderr
    )


@pytest.mark.parametrize("given", [("--listen", "/ip4/127.0.0.1/tcp/0"), ("--join", "wwt1x")])
def test_what_the_unit_would_not_say_is_refused(home: Home, given: tuple[str, str]) -> None:
    refused = home.ww(*INSTALL, *given)
    assert refused.returncode == EXIT_USAGE
    assert "takes its settings from ww.toml" in refused.stderr
    assert not (home.path / ".config").exists()
    for flag in ("--user", "--now", "--yes"):
        refused = home.ww("node", flag)
        assert refused.returncode == EXIT_USAGE
        assert "are for --install-service" in refused.stderr


def test_a_path_that_systemd_reads_as_something_else_is_refused(home: Home) -> None:
    refused = home.ww(*INSTALL, env={"WW_HOME": str(home.path / "100%h")})
    assert refused.returncode == EXIT_CONFIG
    assert "systemd would read" in refused.stderr


def test_a_service_of_the_system_has_a_user_and_a_program_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service, "SYSTEM_UNIT", unit := tmp_path / "wetware.service")

    def nobody(name: str) -> object:
        raise KeyError(name)

    python = tmp_path / "venv/bin/python"
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(pwd, "getpwnam", nobody)
    with pytest.raises(ConfigError, match="there is no user wetware") as caught:
        service.install(user=False, now=False, yes=False)
    assert caught.value.hint.startswith("useradd --system")
    monkeypatch.setattr(pwd, "getpwnam", lambda _: object())
    service.install(user=False, now=False, yes=False)
    said = capsys.readouterr().err
    assert "systemctl daemon-reload && systemctl enable --now wetware" in said
    assert "linger" not in said
    assert 'Environment="WW_HOME=/var/lib/wetware"\n' in unit.read_text()
    monkeypatch.setattr(sys, "executable", "/home/ada/venv/bin/python")
    with pytest.raises(ConfigError, match="does not see /home/ada"):
        service.install(user=False, now=False, yes=True)


# --- the line for a fresh machine -----------------------------------------------------------------


def _ticket() -> str:
    """As long as one can be, nearly."""
    issuer = Key.generate().peer_id
    addr = Multiaddr.parse("/ip6/2001:db8:1111:2222:3333:4444:5555:6666/tcp/40001")
    addrs = (addr.with_peer(issuer),) * ADDRS_MAX
    return Ticket(Founding(bytes(32), "local", bytes(32)), issuer, addrs, bytes(32), 10**13).text


def test_the_line_is_one_that_a_terminal_takes_and_its_words_are_data() -> None:
    hostile = "'; touch owned; $(touch owned) `touch owned` \"\\"
    line = service.script(_ticket(), hostile)
    assert "\n" not in line
    assert len(line) < 4096, "what a terminal takes as one line"
    *head, body, name, source = shlex.split(line)
    assert head == ["printf", "%s", head[2], "|", "sh", "-c"]
    assert re.fullmatch(r"wwt1[\w-]+", head[2])
    assert (name, source) == ("sh", hostile)
    assert not {"'", "\\", "!"} & set(body), "means something else in another shell"
    assert head[2] not in body
    for shell in ("sh", "bash"):
        done = subprocess.run([shell, "-n"], input=line, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, ""), shell


def test_the_line_overrides_what_the_project_itself_overrides() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (override,) = project["tool"]["uv"]["override-dependencies"]
    assert f'echo "{override}" >"$venv/overrides"' in service.script("wwt1x", "wetware")
    low = project["project"]["requires-python"].removeprefix(">=").replace(".", ", ")
    assert f"sys.version_info < ({low})" in service.script("wwt1x", "wetware")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
GIT = {"url": "https://example.org/ww", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}


@pytest.mark.parametrize(
    ("recorded", "source"),
    [
        (GIT, f"git+https://example.org/ww@{COMMIT}"),
        (GIT | {"subdirectory": "py"}, f"git+https://example.org/ww@{COMMIT}#subdirectory=py"),
        (
            {"url": "https://example.org/ww.whl", "archive_info": {"hash": "sha256=00"}},
            "https://example.org/ww.whl",
        ),
        ({"url": "file:///tmp/ww.whl", "archive_info": {}}, None),
        (GIT | {"url": "file:///home/ada/ww"}, None),
        ({"url": "file:///home/ada/ww", "dir_info": {"editable": True}}, None),
        ({"url": "https://example.org/ww", "vcs_info": {}}, None),
        ([], None),
        (None, None),  # from an index
    ],
)
def test_the_line_installs_what_is_installed_here_where_others_can_get_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recorded: object,
    source: str | None,
) -> None:
    text = None if recorded is None else json.dumps(recorded)
    here = SimpleNamespace(read_text=lambda name: text if name == "direct_url.json" else None)
    monkeypatch.setattr(service, "distribution", lambda _: here)
    monkeypatch.setattr(cluster, "run_client", lambda _: (_ticket(), "b55a6c50", 10**13))
    if source is None:
        with pytest.raises(InvalidArgument, match="--script needs --from") as caught:
            cluster.invite_command(script=True)
        assert "git+https" in caught.value.hint
    else:
        cluster.invite_command(script=True)
        assert shlex.split(capsys.readouterr().out)[-1] == source


def test_whose_package_the_line_installs_is_said_where_a_name_alone_decides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who registers the name with an index would be root on each fresh machine."""
    monkeypatch.setattr(cluster, "run_client", lambda _: (_ticket(), "b55a6c50", 10**13))
    for source, said in (("wetware", True), ("git+https://example.org/wetware", False)):
        cluster._invite({}, False, "", 1, source, False)
        assert ("package index" in capsys.readouterr().err) is said
