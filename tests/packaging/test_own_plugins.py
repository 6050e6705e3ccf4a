"""What the tutorial and the how-to for plugin authors say works, in an environment of their own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.test_docs import Machine
from tests.packaging.conftest import ROOT, Built, new_venv

from wetware.cli.plugin import template
from wetware.errors import EXIT_DENIED, EXIT_USAGE
from wetware.testing import Home, wait_for

pytestmark = pytest.mark.timeout(400)

TUTORIAL, HOW_TO = "docs/tutorials/first-plugin.md", "docs/how-to/own-iam.md"
_BLOCK = re.compile(r"^```(\w+)(?: (\w+)(?: (\S+))?)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SCHEMA_ID = re.compile(r"^@0x\w+;", re.MULTILINE)
Block = tuple[str, str, str, str]


def blocks(document: str) -> list[Block]:
    """(language, machine or "file", tag or path, text)."""
    return _BLOCK.findall((ROOT / document).read_text())


@pytest.fixture
def desk(tmp_path: Path, built: Built) -> Iterator[Machine]:
    """A machine with a fresh environment that has the wheel."""
    new_venv(tmp_path / "venv", built.wheel)
    with Home(tmp_path / "home", {"WW_NODE_LISTEN": "/ip4/127.0.0.1/tcp/0"}) as home:
        machine = Machine(home, tmp_path / "venv" / "bin")
        yield machine
        if machine.node is not None:
            machine.node.stop()


def follow(machine: Machine, document: str) -> list[tuple[str, str]]:
    """Do all that a document says, in its order; what each command printed."""
    said = []
    for _, where, tag, text in blocks(document):
        if where == "file":
            file = machine.home.path / tag
            if file.exists():  # it was written by `ww plugin new`
                assert _SCHEMA_ID.sub("", file.read_text()) == _SCHEMA_ID.sub("", text), tag
            else:
                file.write_text(text)
        elif tag == "node":
            machine.start_node(text)
        elif tag == "denied":
            wait_for(lambda script=text: _code(machine, script) == EXIT_DENIED, f"denied: {text}")
        else:
            assert where == "desk", (where, text)
            done = machine.run(text)
            said.append((text, done.stdout))
    return said


def _code(machine: Machine, script: str) -> int:
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        env=machine.env,
        cwd=machine.home.path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=90,
        check=False,
    )
    return done.returncode


@pytest.mark.long
def test_the_tutorial_of_a_first_plugin_works_as_it_is_written(desk: Machine) -> None:
    said = dict(follow(desk, TUTORIAL))
    (listed,) = (out for text, out in said.items() if "ww plugin list" in text)
    assert re.search(r"^counter +ww-counter 0.1.0 +loaded +service counter$", listed, re.MULTILINE)
    assert re.search(r"\b8 passed\b", listed)
    (used,) = (out for text, out in said.items() if "use.py" in text)
    assert used.startswith("{'value': 2}\n{'value': 2}\n")
    assert "does not cover counter Counter.add" in used
    assert "share" in used.partition("does not cover")[2]


@pytest.mark.long
def test_the_how_to_of_an_own_auth_backend_works_as_it_is_written(desk: Machine) -> None:
    said = dict(follow(desk, HOW_TO))
    (tested,) = (out for text, out in said.items() if "pytest" in text)
    assert re.search(r"\b8 passed\b", tested)
    (ada,) = (out for text, out in said.items() if "whoami" in text)
    assert "acme:12D3Koo" in ada


def _lines(document: str) -> int:
    """Of Python that a reader writes or is given, those that are not blank."""
    python = "\n".join(text for language, _, _, text in blocks(document) if language == "python")
    return sum(bool(line.strip()) for line in python.splitlines())


def test_a_plugin_is_small() -> None:
    assert _lines(TUTORIAL) <= 40
    assert _lines(HOW_TO) <= 120
    assert len([1 for language, *_ in blocks(TUTORIAL) if language == "capnp"]) == 1


@pytest.mark.parametrize(("document", "kind"), [(TUTORIAL, "service"), (HOW_TO, "auth")])
def test_the_documents_show_what_is_written(document: str, kind: str) -> None:
    shown = {tag: text for _, where, tag, text in blocks(document) if where == "file"}
    for path, text in template(kind).items():
        found = [each for tag, each in shown.items() if tag.endswith(f"/{path}")]
        assert found == ([text] if text else []), path


@pytest.mark.parametrize("auth", [False, True])
def test_what_is_written_under_another_name_passes_its_tests(
    built: Built, tmp_path: Path, auth: bool
) -> None:
    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return built.run(*args, env={"HOME": str(tmp_path), **env}, cwd=tmp_path)

    new = ("ww", "plugin", "new", "my_thing2", *["--auth"][: int(auth)])
    made = run(*new)
    assert made.returncode == 0, made.stderr
    (folder,) = {tmp_path / path.partition("/")[0] for path in made.stdout.split()}
    assert folder.name == ("ww-auth-my-thing2" if auth else "ww-my-thing2")
    again = run(*new)
    assert again.returncode == EXIT_USAGE
    assert "cannot write" in again.stderr
    for file in folder.rglob("*.*"):
        if file.is_file():
            assert not re.search("counter|acme", file.read_text(), re.IGNORECASE), file
    tests = run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder),
        PYTHONPATH=str(folder),
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "8 passed" in tests.stdout


@pytest.mark.parametrize("name", ["2nd", "with-dash", "Upper", "../up", "a b", "enable", ""])
def test_a_name_that_no_plugin_can_have_is_refused(built: Built, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "desk"  # "../up" would come out beside it
    folder.mkdir()
    made = built.run("ww", "plugin", "new", name, env={"HOME": str(folder)}, cwd=folder)
    assert made.returncode != 0
    assert list(tmp_path.rglob("*")) == [folder]
