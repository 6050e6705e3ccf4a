"""What the shells complete, through a real bash and through what zsh and fish would be told."""

from __future__ import annotations

import os
import shutil
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


def _script(home: Home, shell: str) -> str:
    done = home.ww("completion", shell, check=True)
    assert "every new shell" in done.stderr
    assert f"ww completion {shell}" in done.stderr
    return done.stdout


def _bash(home: Home, *words: str, tmp_path: Path) -> list[str]:
    """What bash would offer with the cursor at the last word."""
    program = tmp_path / "bin" / "ww"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m wetware "$@"\n')
    program.chmod(0o755)
    script = tmp_path / "ww.bash"
    script.write_text(_script(home, "bash"))
    done = subprocess.run(
        ["bash", "--norc", "-c", _BASH_DRIVER, "bash", str(script), *words],
        env={**home.env, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


_BASH_DRIVER = """
set -u
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
spec=$(complete -p ww)
[[ $spec == *'-F _ww_completion ww' ]] || { echo "not registered: $spec" >&2; exit 1; }
_ww_completion ww "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
(( ${#COMPREPLY[@]} )) && printf '%s\\n' "${COMPREPLY[@]}"
exit 0
"""

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@needs_bash
@pytest.mark.parametrize(
    ("words", "there", "absent"),
    [
        (("ww", ""), {"node", "ls", "doctor", "completion", "key", "pub"}, {"--node"}),
        (("ww", "do"), {"doctor"}, {"node"}),
        (("ww", "--d"), {"--data-dir", "--debug"}, {"--node", "doctor"}),
        (("ww", "key", ""), {"new", "list", "show"}, {"node"}),
        (("ww", "doctor", "--"), {"--strict", "--verbose", "--json"}, {"--node"}),
        (("ww", "completion", ""), {"bash", "zsh", "fish"}, set()),
        (("ww", "node", "--log-level", "w"), {"warning"}, {"debug"}),
        (("ww", "--data-dir", "/x", "plugin", ""), {"list"}, {"node"}),
        (("ww", "--debug", "st"), {"status"}, set()),
    ],
)
def test_bash_completes(
    home: Home, tmp_path: Path, words: tuple[str, ...], there: set[str], absent: set[str]
) -> None:
    offered = set(_bash(home, *words, tmp_path=tmp_path))
    assert there <= offered
    assert not absent & offered


@needs_bash
def test_bash_completes_the_names_of_keys(home: Home, tmp_path: Path) -> None:
    for name in ("ada", "adele", "bob"):
        home.ww("key", "new", name, check=True)
    keys = home.path / ".wetware" / "keys"
    for evil in ("ada$(touch owned)", "ada`touch owned`", "ada;touch owned", "ada *"):
        (keys / evil).touch()
    assert _bash(home, "ww", "--key", "ad", tmp_path=tmp_path) == ["ada", "adele"]
    assert _bash(home, "ww", "--key", "=", "b", tmp_path=tmp_path) == ["bob"]
    assert _bash(home, "ww", "key", "show", "", tmp_path=tmp_path) == ["ada", "adele", "bob"]
    assert not list(tmp_path.rglob("owned"))


@needs_bash
def test_bash_is_told_nothing_where_nothing_fits(home: Home, tmp_path: Path) -> None:
    """Then it completes the names of files."""
    for words in (("ww", "--config", ""), ("ww", "pub", "'", "")):
        assert _bash(home, *words, tmp_path=tmp_path) == []


@needs_bash
def test_bash_completes_with_a_broken_configuration(home: Home, tmp_path: Path) -> None:
    file = home.path / ".wetware" / "ww.toml"
    file.parent.mkdir(parents=True)
    file.write_text("[node\n")
    assert "doctor" in _bash(home, "ww", "do", tmp_path=tmp_path)


def _answer(home: Home, *words: str) -> list[str]:
    env = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    return home.ww(check=True, env={"_WW_COMPLETE": "complete_words", **env}).stdout.splitlines()


def test_shells_are_told_values_and_their_help(home: Home) -> None:
    for shell in ("bash", "zsh", "fish"):
        script = _script(home, shell)
        assert "_WW_COMPLETE=complete_words" in script
        assert "eval " not in script
    assert _answer(home, "ww", "st") == ["status\tShow what a node is doing."]
    assert "list" in {line.partition("\t")[0] for line in _answer(home, "ww", "key", "")}
    home.ww("key", "new", "ada", check=True)
    assert _answer(home, "ww", "--key", "a") == ["ada"]
    assert _answer(home, "ww", "--data-dir", "'/a b'", "key", "sh")[0].startswith("show\t")


def test_an_unknown_shell_is_refused(home: Home) -> None:
    done = home.ww("completion", "tcsh")
    assert done.returncode == 2
    assert done.stdout == ""
    assert home.ww(env={"_WW_COMPLETE": "complete_tcsh"}).returncode == 1


def test_completion_imports_no_rich_and_no_engine(home: Home) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "wetware"],
        env={
            **home.env,
            "_WW_COMPLETE": "complete_words",
            "COMP_WORDS": "ww\n",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "status" in done.stdout
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert not loaded & {"rich", "capnp", "libp2p", "trio", "cryptography"}
