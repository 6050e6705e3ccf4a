"""Run the instructions of deploy/Dockerfile one by one in a bare Debian root, without Docker.

    .venv/bin/python tests/packaging/run_dockerfile.py /tmp/root

As root, with debootstrap; it takes a few minutes and 1 GB. At the end the node that the image would
start is started, asked who somebody is, and stopped. The root stays for a look. Where debootstrap
has made it before, it is taken as it is.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
MIRROR = "http://deb.debian.org/debian"
READY_S_MAX = 60.0
PROXIES = ("http_proxy", "https_proxy", "no_proxy")
AUTHORITIES = "/authorities.pem"
"""Where the root finds those that this machine trusts, if SSL_CERT_FILE names them."""


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile.

    Attributes:
        name: One of those that `Box.run` knows.
        text: All that follows.
        words: The same, taken apart.
    """

    name: str
    text: str
    words: tuple[str, ...]


def read(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile of one stage without continued lines."""
    found = []
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, text = line.partition(" ")
        words = json.loads(text) if text.startswith("[") else shlex.split(text)
        found.append(Instruction(name, text, tuple(words)))
        if name not in Box.KNOWN or (name == "RUN" and text.startswith("[")):
            raise ValueError(f"not known here: {line}")
    return found


class Box:
    """A root folder, and what the instructions so far have set.

    Args:
        root: The folder.
    """

    KNOWN = frozenset(
        ("FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD")
    )

    def __init__(self, root: Path) -> None:
        self.root, self.user, self.cwd = root, "root", "/"
        self.command: list[str] = []
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.env |= {name: os.environ[name] for name in PROXIES if name in os.environ}

    def run(self, instruction: Instruction) -> None:
        """Do what Docker would; CalledProcessError if a command fails."""
        words = instruction.words
        match instruction.name:
            case "FROM":
                self._base(*words)
            case "RUN":
                subprocess.run(self.inside("sh", "-c", instruction.text), check=True)
            case "WORKDIR":
                (self.cwd,) = words
                (self.root / self.cwd.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                assert words == (".", ".")
                self._copy(self.root / self.cwd.lstrip("/"))
            case "ENV":
                self.env |= dict(word.split("=", 1) for word in words)
            case "USER":
                (self.user,) = words
            case "ENTRYPOINT" | "CMD":
                self.command += words
            case "VOLUME" | "EXPOSE":
                pass  # says something to Docker alone

    def inside(self, *command: str) -> list[str]:
        """The command line that runs `command` in the root; what it leaves behind ends with it."""
        env = [f"{name}={value}" for name, value in self.env.items()]
        script = 'cd "$0" && exec "$@"'
        return [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
            f"--mount-proc={self.root / 'proc'}",
            *("chroot", f"--userspec={self.user}", str(self.root)),
            *("env", "-i", *env, "sh", "-c", script, self.cwd, *command),
        ]

    def _base(self, image: str) -> None:
        suite = image.removeprefix("debian:").removesuffix("-slim")
        if not (self.root / "bin/sh").exists():
            debootstrap = ["debootstrap", "--variant=minbase", suite, str(self.root), MIRROR]
            subprocess.run(debootstrap, check=True)
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        if (file := os.environ.get("SSL_CERT_FILE")) is not None:
            shutil.copy(file, self.root / AUTHORITIES.lstrip("/"))
            self.env |= {"SSL_CERT_FILE": AUTHORITIES, "PIP_CERT": AUTHORITIES}

    def _copy(self, target: Path) -> None:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def try_node(box: Box) -> None:
    """Start what the image starts, log in to it, and stop it."""
    node = subprocess.Popen(box.inside(*box.command), stderr=subprocess.PIPE, text=True)
    assert node.stderr is not None
    deadline = time.monotonic() + READY_S_MAX
    for line in node.stderr:
        sys.stdout.write(line)
        if "is running" in line:
            break
        assert time.monotonic() < deadline, "no node"
    subprocess.run(box.inside("ww", "whoami"), check=True)
    # The signal goes to the node, as from Docker: unshare passes none on.
    (child,) = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    rest = node.stderr.read()
    assert node.wait(60) == 0, rest
    assert "ww: stopped" in rest


def main() -> None:
    """Run it."""
    (root,) = sys.argv[1:]
    box = Box(Path(root).absolute())
    for instruction in read(DOCKERFILE):
        sys.stdout.write(f"=== {instruction.name} {instruction.text}\n")
        sys.stdout.flush()
        box.run(instruction)
    try_node(box)
    sys.stdout.write("=== the node started, answered and stopped\n")


if __name__ == "__main__":
    main()
