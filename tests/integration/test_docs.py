"""What the README and the how-to tell people to type works."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from wetware.broker.values import Rate, parse_duration, parse_size
from wetware.broker.where import Where, kinds_for
from wetware.cli.main import build
from wetware.cli.root import LATE
from wetware.errors import EXIT_BUSY, EXIT_DENIED, EXIT_FAILED, InvalidArgument
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
    assert commands[0].strip().endswith("ww node --auth evm")
    assert commands[1].strip().endswith("pytest")


# --- the tutorial ---------------------------------------------------------------------------------

TUTORIAL = "docs/tutorials/three-nodes.md"
_BLOCK = re.compile(r"^```(sh|python) (\w+)(?: (\S+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Machine:
    """One machine of the tutorial: a home of its own, and what runs in it."""

    command_s = 90.0

    def __init__(self, home: Home, bin_dir: Path) -> None:
        self.home = home
        self.env = {**home.env, "PATH": f"{bin_dir}:{home.env['PATH']}"}
        self.node: NodeProcess | None = None
        self.background: subprocess.Popen[str] | None = None

    def sh(self, script: str) -> str:
        """What the commands print; AssertionError if one of them fails."""
        return self.run(script).stdout

    def run(self, script: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the commands up to the first that fails; AssertionError unless that is `code`."""
        done = subprocess.run(
            ["sh", "-e", "-c", script],
            env=self.env,
            cwd=self.home.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=self.command_s,
            check=False,
        )
        assert done.returncode == code, (script, done.stdout, done.stderr)
        return done

    def python(self, source: str) -> str:
        script = self.home.path / "block.py"
        script.write_text(source)
        done = subprocess.run(
            [sys.executable, script],
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


@pytest.mark.long
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
            machine.node.process.wait(60)
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
    services = [
        "audit",
        "auth_local",
        "blob",
        "cluster",
        "grants",
        "kv",
        "names",
        "node",
        "proc",
        "pubsub",
        "sync",
    ]
    assert printed == [f"{rented.peer_id} {services}\n"]
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


# --- the how-to of sharing ------------------------------------------------------------------------

SHARING = "docs/how-to/share-and-revoke.md"
_CODES = {"": 0, "busy": EXIT_BUSY, "denied": EXIT_DENIED, "failed": EXIT_FAILED}


class Reader:
    """Does what a how-to says, and remembers what was printed for its placeholders."""

    def __init__(self, machines: Callable[[str], Machine]) -> None:
        self._machines = machines
        self.known: dict[str, str] = {}
        self.said: list[tuple[str, str]] = []

    def do(self, language: str, name: str, tag: str, text: str) -> None:
        """Execute one block on its machine."""
        machine, text = self._machines(name), self.filled(text)
        if language == "python":
            self.said.append((text, machine.python(text)))
        elif tag == "node":
            machine.start_node(text)
        elif tag == "background":
            machine.start(text)
        else:
            done = machine.run(text, _CODES[tag])
            assert "Traceback" not in done.stderr
            self._remember(done.stdout, done.stderr)
            self.said.append((text, done.stdout + done.stderr))

    def filled(self, text: str) -> str:
        """With what is known for its placeholders."""
        if not self.known:
            return text
        return re.sub(rf"\b({'|'.join(self.known)})\b", lambda m: self.known[m[0]], text)

    def _remember(self, out: str, err: str) -> None:
        for name, pattern, printed in (
            ("REF", r"^ww1\S+$", out),
            ("TICKET", r"^wwt1\S+$", out),
            ("KEY", r"^12D3Koo\w+$", out),
            ("CID", r"^b\w{58}$", out),
            ("GRANT", r"ww revoke (\w{16})$", err),
            ("DECISION", r"\bd-\w+", err),
        ):
            for found in re.finditer(pattern, printed, re.MULTILINE):
                self.known[name] = found[found.re.groups]

    def heard(self, command: str) -> str:
        """What the blocks with a command printed, in their order; IndexError without one."""
        found = [said for text, said in self.said if command in text]
        return found[0] + "".join(found[1:])


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_how_to_of_sharing_works_as_it_is_written(
    machines: Callable[[str], Machine],
) -> None:
    """One node, and a machine without an account: every block, in the order of the text."""
    desk, laptop = machines("desk"), machines("laptop")
    node = desk.start_node("ww node")
    reader = Reader(machines)
    reader.known["NODE"] = node.addr
    blocks = _BLOCK.findall((ROOT / SHARING).read_text())
    assert {machine for _, machine, _, _ in blocks} == {"desk", "laptop"}
    listener: subprocess.Popen[str] | None = None
    for language, name, tag, text in blocks:
        if "ww revoke" in text:
            listener = _listening(laptop, desk, reader.known["GRANT"])
        if "audit-copy" in text and not (laptop.home.path / "audit-copy").exists():
            for source in (desk.home.path / "checkpoint.json", node.data_dir / "plugins" / "audit"):
                copy = laptop.home.path / source.name.replace("audit", "audit-copy")
                (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
        reader.do(language, name, tag, text)
        if "ww revoke" in text:
            assert listener is not None
            _, said = listener.communicate(timeout=60)
            assert listener.returncode == EXIT_DENIED
            assert "the laptop was lost" in said

    # What the text promises.
    heard = reader.heard
    assert "pubsub topic=chat" in heard("hello from the laptop")
    assert "topic=private is outside of topic=chat" in heard("pub private")
    assert "does not cover pubsub Topic.subscribe" in heard("ww why d-")
    assert "would be allowed" in heard("ww why pubsub.join")
    assert "topic=private is outside of topic=glob:chat*" in heard("session.attenuate")
    assert "was revoked: the laptop was lost" in heard("pub chat hello\n")
    assert "topic=private is outside of topic=glob:chat/*" in heard("ww --node")
    tail = heard("ww audit tail")
    for event in ("grant.shared", "share.redeemed", "grant.revoked", "call.denied", "log.opened"):
        assert event in tail, event
    assert ": whole (" in heard("ww audit verify\n")
    assert "the hashes do not fit" in heard("sed -i")
    assert len(re.findall("checkpoint", heard("ww audit verify --dir"))) > 0
    grants = {grant["id"]: grant for grant in json.loads(desk.sh("ww grants --json"))}
    shares = [grant for grant in grants.values() if grant["kind"] == "share"]
    left = {(grant["label"], grant["uses_left"]) for grant in shares}
    assert left == {("pubsub:chat", None), ("build bot", 1), ("pubsub:chat", 0)}
    (weaker,) = [grant for grant in shares if grant["uses_left"] == 0]  # the program used it
    (redeemed,) = weaker["parents"]  # by who made the weaker reference
    (above,) = grants[redeemed]["parents"]
    assert grants[above]["label"] == "build bot"
    assert not (laptop.home.path / ".wetware" / "node").exists()


def _listening(laptop: Machine, desk: Machine, share: str) -> subprocess.Popen[str]:
    """The subscription in the background, once it hears something."""
    process = laptop.background
    assert process is not None
    assert process.stdout is not None
    wait_for(
        lambda: desk.sh(f"ww audit tail --event service.opened --principal bearer:{share}"),
        "the reference is in use",
    )
    desk.sh("ww pub chat heard")
    assert process.stdout.readline() == "heard\n"
    return process


# --- the how-to of running a node -----------------------------------------------------------------

RUNNING = "docs/how-to/run-a-node.md"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_how_to_of_running_a_node_works_as_it_is_written(
    machines: Callable[[str], Machine],
) -> None:
    pytest.importorskip("eth_account", reason="needs the extra: pip install 'wetware[evm]'")
    machines("tryout").env["WW_ANVIL"] = "none"
    desk, rented = machines("desk"), machines("rented")
    reader = Reader(machines)
    for language, name, tag, text in _BLOCK.findall((ROOT / RUNNING).read_text()):
        if "rented status" in text:
            assert desk.node is not None
            assert rented.node is not None
            desk.node.wait_members([rented.node.peer_id])
        reader.do(language, name, tag, text)
        if tag == "node" and name == "desk":
            assert desk.node is not None
            reader.known["ADDRESS"] = desk.node.addr
        if "ww sub" in text:
            wait_for(
                lambda: '"pubsub"' in desk.sh("ww audit tail --event service.opened --json"),
                "the subscriber has opened pubsub",
            )

    # What the text promises.
    tryout = machines("tryout").node
    assert tryout is not None
    assert "THIS IS A TRY-OUT" in tryout.log.read_text()
    assert desk.background is not None
    assert desk.background.stdout is not None
    assert desk.background.stdout.readline() == "hello\n"
    assert rented.node is not None
    rented.node.wait_log("admission.evicted")


def test_every_block_of_a_how_to_is_executed() -> None:
    """Each names the machine that it is for; the tests of the documents execute those."""
    others = (
        "agree",
        "ask-and-answer",
        "evm-real-chain",
        "own-iam",
        "run-programs",
        "store-files",
        "three-machines-one-may-die",
    )
    executed = {RUNNING, SHARING, *(f"docs/how-to/{name}.md" for name in others)}
    for document in sorted((ROOT / "docs/how-to").glob("*.md")):
        name = str(document.relative_to(ROOT))
        fences = re.findall(
            r"^```(?:sh|python)\b.*\n(?:.*\n)*?```$", document.read_text(), re.MULTILINE
        )
        named = [fence for fence in fences if _BLOCK.match(fence)]
        unnamed = [fence for fence in fences if fence not in named]
        assert unnamed in ([], ["```sh\npip install 'wetware[evm]'\n```"]), name
        assert (name in executed) is bool(named), name


# --- docs/reference/constraints.md ----------------------------------------------------------------

CONSTRAINTS = ROOT / "docs" / "reference" / "constraints.md"


def test_the_table_of_what_can_be_constrained_is_up_to_date() -> None:
    found = re.search(
        r"<!-- begin: (.*?) -->\n\n(.*?)\n<!-- end -->", CONSTRAINTS.read_text(), re.DOTALL
    )
    assert found is not None
    made = subprocess.run(
        [sys.executable, CONSTRAINTS.with_suffix(".py")], capture_output=True, text=True, check=True
    ).stdout
    assert found[2] == made, f"put the output of `{found[1]}` between the markers"


def _rows(heading: str) -> list[list[str]]:
    """The cells of the table that follows a line."""
    lines = CONSTRAINTS.read_text().partition(heading)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---")) + 1
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_constraints_of_the_reference_are_what_it_says() -> None:
    good, bad = _rows("## Constraints"), _rows("These are refused")
    assert len(good) > 5
    assert len(bad) > 3
    for row in good:
        Where.parse(row[0].strip("`"))
    for row in bad:
        with pytest.raises(InvalidArgument):
            Where.parse(row[0].strip("`"))


def test_the_types_of_the_reference_take_the_kinds_that_it_says() -> None:
    rows = _rows("### Types")
    kinds = "text subject data int float bool enum list"
    assert [row[0] for row in rows] == kinds.split()
    for row in rows:
        assert tuple(re.findall(r"`(\w+)`", row[1])) == kinds_for(row[0]), row[0]


def test_the_rates_durations_and_sizes_of_the_reference_can_be_read() -> None:
    for row in _rows("## Rates"):
        Rate.parse(row[0].strip("`"))
    durations, *sizes = _rows("## Durations and sizes")
    for text in re.findall(r"`(.*?)`", durations[0]):
        parse_duration(text)
    for row in sizes:
        for text in re.findall(r"`(.*?)`", row[0]):
            parse_size(text)


# --- links ----------------------------------------------------------------------------------------


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for document in [*_documents(), *(ROOT / "plugins").glob("*/README.md")]:
        prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (document.parent / path).resolve() if path else document
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                wrong.append(f"{document.relative_to(ROOT)}: {target}")
    assert wrong == []


def _anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


# --- every command that a document names ----------------------------------------------------------


def _documents() -> list[Path]:
    pages = (ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))
    return [*pages, *sorted((ROOT / "docs").rglob("*.md"))]


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
            for part in re.findall(
                r"(?:^|&& |\s)(?:\.venv/bin/)?ww (.*?)(?= (?:&&|\|) |$)", command
            ):
                own = part.partition("  #")[0].partition(" -- ")[0]  # not another program's
                if (why := _unknown(root, own)) is not None:
                    wrong.append(f"{document.relative_to(ROOT)}: ww {part}: {why}")
    assert wrong == []


GLOBAL = {p.opts[0]: p for p in typer.main.get_command(build()).params if p.name in LATE}


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
            params = {**GLOBAL, **params}
            if option not in params and option not in ("--help", "-h"):
                return f"no option {option}"
            found = params.get(option)
            if found is not None and not getattr(found, "is_flag", True) and "=" not in word:
                words = words[1:]
        elif hasattr(command, "commands"):
            if not (word.isalpha() and word.islower()):
                return None  # a placeholder
            if (inner := command.commands.get(word)) is None:
                return f"no command {word!r}"
            if word == "use":  # REF, and a command of `ww` after it
                rest = [w for w in words if w != "-"]
                return _unknown(command, shlex.join(rest if "-" in words else rest[1:]))
            command = inner
    return None
