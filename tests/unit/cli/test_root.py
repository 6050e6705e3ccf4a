"""`ww` itself, without a node: sections, examples, help, global options, contexts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from wetware.cli.app import options
from wetware.cli.main import build
from wetware.cli.root import LATE, OTHER, find, named, sections
from wetware.client.contexts import FILE
from wetware.identity import Key
from wetware.testing import Home

PEER = Key.from_seed(bytes(32)).peer_id
ADDRESS = f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}"
NAMES = {"help_option_names": ["-h", "--help"]}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path) as made:
        yield made


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(options, "given", {})
    return typer.main.get_command(build())


def _every(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    if isinstance(command, TyperGroup):
        for name, each in command.commands.items():
            yield from _every(each, (*words, name))


def test_every_command_of_ours_has_a_section_and_examples(root: Any) -> None:
    titles = {
        command.name: title for title, each in sections(root.commands.values()) for command in each
    }
    assert set(titles) == set(root.commands)
    assert OTHER not in titles.values()
    for name, command in root.commands.items():
        assert f"ww {name}" in (command.epilog or ""), name


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("ls", "ls"),
        ("--node ls status --wide ls", "status"),
        ("--data-dir ls --debug --context=x id", "id"),
        ("use ww1… ls", None),
        ("help ls", None),
        ("--help ls", None),
        ("--node ls", None),
        ("", None),
    ],
)
def test_the_command_that_a_line_names(line: str, name: str | None) -> None:
    assert named(line.split()) == name


def test_a_command_is_the_same_where_no_other_is_declared(root: Any) -> None:
    for name, command in root.commands.items():
        alone = typer.main.get_command(build([name])).commands
        everything = {"help", "use"}
        assert set(alone) == set(root.commands) if name in everything else set(alone) == {name}
        for (words, one), (_, other) in zip(_every(alone[name]), _every(command), strict=True):
            ctx = one.make_context(name, [], resilient_parsing=True)
            assert one.get_help(ctx) == other.get_help(ctx), (name, *words)


def test_the_examples_are_command_lines_that_are_taken(root: Any) -> None:
    """Each is parsed to its end, and nothing is run."""
    for words, command in _every(root):
        lines = [line.strip() for line in (command.epilog or "").splitlines()]
        for line in lines:
            if not line.startswith("ww "):
                continue
            for part in line.partition(" < ")[0].split(" | "):
                given = shlex.split(part.replace("…", ""))[1:]
                _parse(root, given)
            assert words == () or given[: len(words)] == list(words), line


def _parse(command: Any, args: list[str]) -> None:
    ctx = command.make_context("ww", args, **NAMES)
    while isinstance(command, TyperGroup):
        rest = [*ctx._protected_args, *ctx.args]
        name, command, rest = command.resolve_command(ctx, rest)
        ctx = command.make_context(name, rest, parent=ctx)


def test_help_is_short_too_and_a_command(home: Home) -> None:
    for words in ((), ("share",), ("audit", "tail"), ("auth", "evm")):
        asked = home.ww(*words, "--help", check=True).stdout
        assert "Usage: ww" in asked
        assert home.ww(*words, "-h", check=True).stdout == asked
        assert home.ww("help", *words, check=True).stdout.strip() == asked.strip()
    for words in (("nothing",), ("share", "nothing"), ("audit", "nothing")):
        done = home.ww("help", *words)
        assert done.returncode == 2
        assert "nothing" in done.stderr


@pytest.mark.parametrize("args", [["--data-dir", "x", "id"], ["id", "--data-dir", "x"]])
def test_a_global_option_before_and_after(home: Home, args: list[str]) -> None:
    done = home.ww(*args, "--json", check=True)
    assert json.loads(done.stdout)["data_dir"] == str(home.path / "x")


def test_every_command_takes_them_all(root: Any, home: Home) -> None:
    for words, _ in list(_every(root)):
        command, _ = find(root, root.make_context("ww", ["id"], **NAMES), words)
        taken = {opt for param in command.params for opt in param.opts}
        assert {f"--{name.replace('_', '-')}" for name in LATE} <= taken, words
    done = home.ww("key", "show", "--key", "nobody")
    assert "keys/nobody" in done.stderr
    done = home.ww("key", "--key", "nobody", "show")
    assert "keys/nobody" in done.stderr
    assert "Traceback" in home.ww("whoami", "--debug").stderr
    assert home.ww("key", "show", "--key", "").returncode == 2


def test_a_command_s_own_option_of_that_name_stays_its_own(home: Home) -> None:
    """`--key` of `ww user add` is the user's; the operator's stands before the command."""
    done = home.ww("--key", "nobody", "user", "add", "ada", "--key", PEER)
    assert "keys/nobody" in done.stderr


@pytest.mark.parametrize("args", [["ping", "rented"], ["evict", "rented", "--yes"]])
def test_an_argument_of_that_name_is_none(root: Any, args: list[str]) -> None:
    """`ww evict NODE` does not go to NODE."""
    _parse(root, args)
    assert options.given == {}
    _parse(root, [*args, "--node", "other"])
    assert options.given == {"node": "other"}


def test_what_was_given_last_counts(home: Home) -> None:
    done = home.ww("--data-dir", "x", "id", "--data-dir", "y", "--json", check=True)
    assert json.loads(done.stdout)["data_dir"] == str(home.path / "y")


# --- contexts -------------------------------------------------------------------------------------


def test_contexts(home: Home) -> None:
    home.ww("context", "add", "far", "--node", ADDRESS, "--key", "work", check=True)
    home.ww("--data-dir", "x", "context", "add", "near", check=True)
    file = home.path / ".wetware" / FILE
    assert file.stat().st_mode & 0o777 == 0o600
    listed = json.loads(home.ww("context", "ls", "--json", check=True).stdout)
    assert [(each["name"], each["current"]) for each in listed] == [
        ("local", True),
        ("far", False),
        ("near", False),
    ]
    assert listed[1]["node"] == ADDRESS
    assert listed[2]["data_dir"] == str(home.path / "x")
    home.ww("context", "use", "near", check=True)
    assert "near *" in home.ww("context", "ls", check=True).stdout
    assert _data_dir(home) == "x"
    assert _data_dir(home, "--data-dir", "y") == "y"
    assert _data_dir(home, "--context", "local") == ".wetware/node"
    assert _data_dir(home, env={"WW_CONTEXT": "far"}) == ".wetware/node"
    shown = json.loads(home.ww("context", "show", "--json", check=True).stdout)
    assert shown["name"] == "near"
    home.ww("context", "rm", "near", check=True)
    assert _data_dir(home) == ".wetware/node"
    assert "local *" in home.ww("context", "ls", check=True).stdout
    for args in (["use", "near"], ["rm", "near"], ["show", "near"], ["accept", "near", "1" * 40]):
        done = home.ww("context", *args)
        assert done.returncode == 1, args
        assert "there are: local, far" in done.stderr


def _data_dir(home: Home, *args: str, env: dict[str, str] | None = None) -> str:
    done = home.ww("id", "--json", *args, check=True, env=env)
    return str(Path(json.loads(done.stdout)["data_dir"]).relative_to(home.path))


def test_the_key_of_a_context(home: Home) -> None:
    home.ww("context", "add", "c", "--key", "work", check=True)

    def key(*args: str, env: dict[str, str] | None = None) -> str:
        said = home.ww(*args, "key", "show", env=env).stderr
        return said.partition("/keys/")[2].split()[0]

    assert key() == "default"
    assert key("--context", "c") == "work"
    assert key("--context", "c", "--key", "other") == "other"
    assert key(env={"WW_KEY": "mine"}) == "mine"
    assert key("--context", "c", env={"WW_KEY": "mine"}) == "work"
    assert key(env={"WW_KEY": "mine", "WW_CONTEXT": "c"}) == "mine"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["add", "local"], "cannot name"),
        (["add", PEER], "cannot name"),
        (["add", "a", "--node", "/ip4/192.0.2.1/tcp/4001"], "which node is expected"),
        (["add", "a", "--node", "192.0.2.1:4001"], "write it like"),
        (["add", "a", "--node", "=x"], "bad selector"),
        (["add", "a", "--node", "ww1abc"], "a secret"),
        (["add", "a", "--cluster", "xyz"], "40 hex digits"),
        (["add", "a", "--node", ""], "empty"),
        (["rm", "local"], "always there"),
        (["accept", "local", "1" * 40], "data directory"),
        (["accept", PEER, "xyz"], "40 hex digits"),
    ],
)
def test_what_is_refused(home: Home, args: list[str], says: str) -> None:
    done = home.ww("context", *args)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert not (home.path / ".wetware" / FILE).exists()


def test_a_damaged_file_stops_what_would_follow_it(home: Home) -> None:
    file = home.path / ".wetware" / FILE
    file.parent.mkdir()
    file.write_text("{")
    for args in (["whoami"], ["context", "ls"], ["id"]):
        done = home.ww(*args)
        assert done.returncode == 78
        assert str(file) in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--node", ADDRESS, "id"],
        ["key", "show", "--node", ADDRESS],
        ["audit", "verify", "--node", ADDRESS],
        ["node", "--node", ADDRESS],
    ],
)
def test_a_node_that_is_named_for_a_command_of_this_machine_is_refused(
    home: Home, args: list[str]
) -> None:
    done = home.ww("--data-dir", str(home.path / "n"), *args)
    assert done.returncode == 2
    assert "is about this machine" in done.stderr
    assert not (home.path / "n").exists()
