"""What the README and the how-to tell people to type works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
