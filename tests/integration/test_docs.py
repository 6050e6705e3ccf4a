"""What the README and the how-to tell people to type works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from wetware.cli.main import build
from wetware.testing import Home, NodeProcess, wait_for

ROOT = Path(__file__).parents[2]


def _blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_readme_s_python_example(home: Home) -> None:
    (source,) = _blocks("README.md", "python")
    with home.node("node") as node:
        done = subprocess.run(
            [sys.executable, "-c", source],
            env={**home.env, "WW_NODE_DATA_DIR": str(node.data_dir)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("b'hello'")


def test_the_readme_s_first_screen_has_two_single_line_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:25])
    commands = re.findall(r"```sh\n(.*?)```", first_screen, re.DOTALL)
    assert [c.count("\n") for c in commands] == [1, 1]
    assert commands[0].strip().endswith("ww node")
    assert commands[1].strip().endswith("pytest")


def _how_to() -> list[str]:
    return [
        line.strip()
        for block in _blocks("docs/how-to/run-a-node.md", "sh")
        for line in block.splitlines()
        if line.startswith("ww ")
    ]


def test_the_how_to_s_commands_exist(node: NodeProcess) -> None:
    commands = {tuple(re.sub(r"--data-dir \S+|--node \S+", "", c).split()[1:3]) for c in _how_to()}
    assert len(commands) > 8
    for words in commands:
        group = [w for w in words if w.isalpha() and w.islower()]
        known = [g for g in group if g not in ("chat", "hello", "ada")]
        done = node.ww(*known, "--help")
        assert done.returncode == 0, (words, done.stderr)


def test_the_how_to_s_two_nodes(home: Home) -> None:
    """A ticket of one node, and `--join` at the other."""
    with home.node("a") as a, home.node("b", join=a.invite()) as b:
        b.wait_members([a.peer_id])
        sub = b.start_ww("sub", "chat", "--count", "1")
        try:
            wait_for(
                lambda: a.ww("pub", "chat", "hello", check=True) and sub.poll() is not None,
                "hello from a at b",
                within_s=60,
            )
            out, _ = sub.communicate(timeout=10)
        finally:
            sub.kill()
        assert out == "hello\n"


# --- the tutorial ---------------------------------------------------------------------------------

TUTORIAL = "docs/tutorials/three-nodes.md"
_BLOCK = re.compile(r"^```(sh|python) (\w+)(?: (\S+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Machine:
    """One machine of the tutorial: a home of its own, and what runs in it."""

    def __init__(self, home: Home, bin_dir: Path) -> None:
        self.home = home
        self.env = {**home.env, "PATH": f"{bin_dir}:{home.env['PATH']}"}
        self.node: NodeProcess | None = None
        self.background: subprocess.Popen[str] | None = None

    def sh(self, script: str) -> str:
        """What the commands print; AssertionError if one of them fails."""
        done = subprocess.run(
            ["sh", "-e", "-c", script],
            env=self.env,
            cwd=self.home.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        return done.stdout

    def python(self, source: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", source],
            env=self.env,
            cwd=self.home.path,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, (source, done.stdout, done.stderr)
        return done.stdout

    def start_node(self, command: str) -> NodeProcess:
        """`ww node …`, in its own terminal; waits until it serves."""
        words = shlex.split(command)
        assert words[:2] == ["ww", "node"]
        number = 0 if self.node is None else 1
        log = self.home.path / f"node.{number}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                words,
                env=self.env,
                cwd=self.home.path,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )
        data_dir = self.home.path / ".wetware" / "node"
        self.node = NodeProcess(self.home, data_dir, process, log)
        return self.node.wait_ready()

    def start(self, command: str) -> None:
        self.background = subprocess.Popen(
            shlex.split(command),
            env=self.env,
            cwd=self.home.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> None:
        for process in (self.background, self.node and self.node.process):
            if process is not None:
                if process.poll() is None:
                    process.kill()
                process.communicate()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """`machines("desk")`: each name is one machine, with `ww` on its path and a port of its own."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "ww").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m wetware "$@"\n')
    (bin_dir / "ww").chmod(0o755)
    made: dict[str, Machine] = {}

    def machine(name: str) -> Machine:
        if name not in made:
            env = {"WW_NODE_LISTEN": "/ip4/127.0.0.1/tcp/0"}
            made[name] = Machine(Home(tmp_path / name, env=env), bin_dir)
        return made[name]

    yield machine
    for each in made.values():
        each.end()


@pytest.mark.timeout(300)
def test_the_tutorial_works_as_it_is_written(machines: Callable[[str], Machine]) -> None:
    """Every block that names a machine is executed there, in the order of the text."""
    blocks = _BLOCK.findall((ROOT / TUTORIAL).read_text())
    assert {machine for _, machine, _, _ in blocks} == {"desk", "attic", "rented"}
    tickets: list[str] = []
    key, printed = "", []
    for language, name, tag, text in blocks:
        machine, command = machines(name), text
        if "TICKET" in command:
            command = command.replace("TICKET", tickets.pop(0))
        command = command.replace("--key KEY", f"--key {key}")
        if language == "python":
            printed.append(machine.python(command))
        elif tag == "node":
            machine.start_node(command)
        elif tag == "background":
            machine.start(command)
        elif tag == "kill":
            assert machine.node is not None
            machine.sh(command.replace("NODE_PID", str(machine.node.process.pid)))
            machine.node.process.wait(20)
        elif tag.startswith("until="):
            wanted = tag.partition("=")[2]
            wait_for(
                lambda m=machine, c=command, w=wanted: w in m.sh(c),
                f"{wanted!r} from {command!r}",
                within_s=60,
            )
        else:
            assert not tag, tag
            if "ww pub" in command:
                _publish_until_heard(machine, command, machines("attic"))
                continue
            if "ww ls" in command:  # as a reader would look again
                wait_for(lambda m=machine: m.sh("ww ls").count(" alive ") == 3, "three members")
            out = machine.sh(command)
            tickets += re.findall(r"^wwt1\S+$", out, re.MULTILINE)
            if "ww key show" in command:
                key = out.split()[-1]
                assert re.fullmatch(r"12D3Koo\w+", key)
    assert tickets == []
    desk, attic, rented = (machines(name).node for name in ("desk", "attic", "rented"))
    assert desk is not None
    assert attic is not None
    assert rented is not None
    # What the text promises.
    assert printed == [f"{rented.peer_id} ['auth_local', 'cluster', 'node', 'pubsub']\n"]
    members = json.loads(machines("desk").sh("ww ls --json"))["members"]
    assert {m["name"]: m["state"] for m in members} == {"desk": "alive", "attic": "alive"}
    rented.wait_log("admission.evicted")


def _publish_until_heard(sender: Machine, command: str, receiver: Machine) -> None:
    """The subscription takes a moment to be known at the other node: a reader would repeat it."""
    assert receiver.background is not None
    assert receiver.background.stdout is not None
    heard: list[str] = []
    reader = threading.Thread(
        target=lambda out: heard.append(out.readline()), args=(receiver.background.stdout,)
    )
    reader.start()

    def published() -> bool:
        assert receiver.background is not None
        assert receiver.background.poll() is None, receiver.background.communicate()
        sender.sh(command)
        reader.join(1.0)
        return bool(heard)

    wait_for(published, "the message is printed", within_s=60)
    assert heard == ["hello from the desk\n"]


# --- every command that a document names ----------------------------------------------------------


def _documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_command_in_the_documents_exists() -> None:
    """`ww WORDS` in a block or in backquotes: the command is there, and so are its options."""
    root = typer.main.get_command(build())
    wrong = []
    for document in _documents():
        text = document.read_text()
        commands = [
            line.strip()
            for block in re.findall(r"^```sh.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
            for line in block.splitlines()
        ]
        commands += re.findall(r"`((?:\.venv/bin/)?ww [^`\n]+)`", text)
        for command in commands:
            for part in re.findall(r"(?:^|&& |\s)(?:\.venv/bin/)?ww (.*?)(?= && |$)", command):
                if (why := _unknown(root, part.partition("  #")[0])) is not None:
                    wrong.append(f"{document.relative_to(ROOT)}: ww {part}: {why}")
    assert wrong == []


def _unknown(command: Any, text: str) -> str | None:
    """What a command line names that there is not; None if all of it exists."""
    try:
        words = shlex.split(text.replace("…", ""))
    except ValueError:
        return "cannot be read"
    while words:
        word = words.pop(0)
        if word.startswith("-") and word != "-":
            option = word.partition("=")[0]
            params = {name: p for p in command.params for name in (*p.opts, *p.secondary_opts)}
            if option not in params and option != "--help":
                return f"no option {option}"
            found = params.get(option)
            if found is not None and not getattr(found, "is_flag", True) and "=" not in word:
                words = words[1:]
        elif hasattr(command, "commands"):
            if not (word.isalpha() and word.islower()):
                return None  # a placeholder
            if (inner := command.commands.get(word)) is None:
                return f"no command {word!r}"
            command = inner
    return None
