"""The command line without a node: help, reference, keys, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wetware.testing import Home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path) as made:
        yield made


def test_the_committed_reference_is_up_to_date(home: Home) -> None:
    folder = Path(__file__).parents[3] / "docs" / "reference"
    done = subprocess.run(
        [sys.executable, folder / "cli.py"],
        env=home.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (folder / "cli.md").read_text() == done.stdout, (
        "run: python docs/reference/cli.py > docs/reference/cli.md"
    )


def test_help_names_every_command(home: Home) -> None:
    text = home.ww("--help", check=True).stdout
    for command in [
        "node",
        "id",
        "status",
        "key",
        "user",
        "role",
        "whoami",
        "pub",
        "sub",
        "plugin",
        "config",
        "policy",
    ]:
        assert f"\n  {command} " in text


def test_no_arguments_is_help(home: Home) -> None:
    assert "Usage: ww" in home.ww().stdout + home.ww().stderr


def test_version(home: Home) -> None:
    import wetware

    assert home.ww("--version", check=True).stdout == f"ww {wetware.__version__}\n"


def test_keys(home: Home) -> None:
    made = home.ww("key", "new", check=True)
    public = made.stdout.strip()
    assert public == home.key().peer_id
    assert home.ww("key", "show", check=True).stdout.strip() == public
    listed = json.loads(home.ww("key", "list", "--json", check=True).stdout)
    assert listed == [{"name": "default", "key": public}]
    again = home.ww("key", "new")
    assert again.returncode == 78
    assert "never overwritten" in again.stderr
    assert home.key().peer_id == public


def test_encrypted_key(home: Home) -> None:
    secret = {"WW_PASSPHRASE": "correct horse"}
    public = home.ww("key", "new", "sealed", check=True, env=secret).stdout.strip()
    assert home.ww("key", "show", "sealed", check=True, env=secret).stdout.strip() == public
    refused = home.ww("key", "show", "sealed")
    assert refused.returncode == 78
    assert "WW_PASSPHRASE" in refused.stderr
    assert "encrypted" in home.ww("key", "list", check=True).stdout


def test_id_makes_the_node_s_key_once(home: Home) -> None:
    first = home.ww("id", check=True)
    assert "made a new node key" in first.stderr
    second = home.ww("id", check=True)
    assert second.stdout == first.stdout
    assert second.stderr == ""


def test_debug_shows_the_traceback(home: Home) -> None:
    plain, debug = home.ww("whoami"), home.ww("--debug", "whoami")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert plain.returncode == 69


def test_a_closed_pipe_is_no_error_message(home: Home) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "wetware", "config", "reference"],
        env=home.env,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_hostile_text_does_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from wetware.cli.app import note, out, table

    evil = "\x1b]0;owned\x07\x1b[2J\r"
    out(evil)
    note(evil)
    table(("a", "b"), [(evil, "x\ny")])
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\r" not in text
    assert "x\\ny" in said.out


def test_a_data_directory_that_others_can_write_is_refused(home: Home) -> None:
    open_to_all = home.path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    node = home.start_node("open")
    assert node.process.wait(60) == 78
    assert "others can write" in node.log.read_text()
    assert not any(open_to_all.iterdir())


@pytest.mark.parametrize("methods", ["", " ", ","])
def test_methods_that_are_named_and_empty_are_not_all_of_them(home: Home, methods: str) -> None:
    """Such as an unset variable of a shell leaves."""
    done = home.ww("share", "pubsub", "--methods", methods)
    assert done.returncode == 2
    assert "--methods" in done.stderr


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["key", "show"], "ww key new"),
        (["key", "show", "ada"], "ww key new ada"),
        (["--key", "ada", "key", "show"], "ww key new ada"),
        (["key", "show", "./my keys/ada"], "ww key new './my keys/ada'"),
        (["user", "add", "ada", "--key", "ada"], "ww key new ada"),
        (["user", "remove", "ada", "--operator-key", "chief"], "ww key new chief"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else each,
)
def test_a_missing_key_names_the_command_that_makes_it(
    home: Home, args: list[str], command: str
) -> None:
    done = home.ww(*args)
    assert done.returncode == 78
    assert f"`{command}`" in done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("acme", "the plugin 'auth_acme'"),
        ("auth_acme", "the plugin 'auth_acme'"),
        ("evn", "did you mean auth_evm?"),
    ],
)
def test_an_auth_backend_that_is_not_installed(home: Home, name: str, says: str) -> None:
    """`acme` is not like `evm`: that both plugins' names begin with `auth_` is no likeness."""
    done = home.ww("node", "--auth", name)
    assert done.returncode == 78
    assert says in done.stderr
