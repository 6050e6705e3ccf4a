"""`ww blob` between real nodes: kills, Ctrl-C, pipes and terminals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from wetware.errors import EXIT_DENIED, EXIT_FAILED, EXIT_PIPE, EXIT_USAGE
from wetware.testing import NodeProcess
from wetware.testing.nodes import wait_for

pytestmark = pytest.mark.timeout(180)
MIB = 1 << 20
NOWHERE = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"


@pytest.fixture(scope="module")
def big(pair: tuple[NodeProcess, NodeProcess], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CID of 160 random MiB, which is at the first node."""
    file = tmp_path_factory.mktemp("big") / "big"
    file.write_bytes(os.urandom(160 * MIB))
    cid = pair[0].ww("blob", "put", str(file), check=True).stdout.strip()
    file.unlink()
    return cid


def test_what_is_put_at_one_node_is_got_at_another(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, b = pair
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "sub" / "ä\n").write_bytes(os.urandom(3 * MIB))
    (tree / "none").write_bytes(b"")
    (tree / "link").symlink_to("sub/ä\n")
    cid = a.ww("blob", "put", str(tree), check=True).stdout.strip()
    b.ww("blob", "get", cid, "-o", str(tmp_path / "copy"), check=True)
    subprocess.run(["diff", "-r", "--no-dereference", tree, tmp_path / "copy"], check=True)
    assert "sub/ä\\n" not in b.ww("blob", "ls", cid, check=True).stdout
    assert "ä\\n" in b.ww("blob", "ls", f"{cid}/sub", check=True).stdout
    # The same bytes are the same CID, wherever and however they come.
    car = tmp_path / "tree.car"
    b.ww("blob", "export", "--car", cid, "-o", str(car), check=True)
    again = [
        json.loads(a.ww("blob", *what, "--json", check=True).stdout)
        for what in (("import", str(car)), ("put", str(tmp_path / "copy")))
    ]
    kind = json.loads(a.ww("blob", "stat", cid, "--json", check=True).stdout)
    assert [(put["cid"], put["bytes"]) for put in again] == [(cid, kind["size"])] * 2
    assert json.loads(a.ww("blob", "stat", f"{cid}/sub", "--json").stdout)["kind"] == "directory"


def test_what_nobody_has(pair: tuple[NodeProcess, NodeProcess], tmp_path: Path) -> None:
    a, _ = pair
    for command in ("get", "stat", "cat", "ls", "export"):
        done = a.ww("blob", command, NOWHERE, *(["--local"] if command != "get" else []))
        assert (done.returncode, done.stdout) == (EXIT_FAILED, ""), command
        assert "try: " in done.stderr
    assert a.ww("blob", "get", "nonsense").returncode == EXIT_USAGE
    assert not list(a.home.path.glob(f"*{NOWHERE}*"))


def test_who_was_given_one_blob_gets_that_alone(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, _ = pair
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "x").write_bytes(b"shared")
    cid = a.ww("blob", "put", str(tmp_path / "tree"), check=True).stdout.strip()
    other = a.ww("blob", "put", "-", input="not shared", check=True).stdout.strip()
    ref = a.ww("share", f"blob:{cid}", check=True).stdout.split()[0]

    def stranger(*args: str) -> subprocess.CompletedProcess[str]:
        return a.home.ww("--node", ref, "blob", *args)

    stat = stranger("stat", cid)
    assert (stat.returncode, "kind  directory" in stat.stdout) == (0, True)
    assert stranger("get", cid, "-o", str(tmp_path / "copy")).returncode == 0
    assert (tmp_path / "copy" / "x").read_bytes() == b"shared"
    for refused in (["cat", other], ["ls"], ["put", str(tmp_path / "tree" / "x")]):
        assert stranger(*refused).returncode == EXIT_DENIED, refused


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def part_of(directory: Path) -> Path | None:
    return next(directory.glob(".*.part"), None)


@pytest.fixture
def getting(
    pair: tuple[NodeProcess, NodeProcess], big: str, tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    """`ww blob get` at the second node, which is stopped when more than 64 MiB are there."""
    process = pair[1].start_ww("blob", "get", big, "-o", str(tmp_path / "out"))

    def half() -> bool:
        assert process.poll() is None, process.communicate()
        part = part_of(tmp_path)
        return part is not None and size(part / "content") > 70 * MIB

    try:
        wait_for(half, "70 MiB", within_s=60)
        pair[1].process.send_signal(signal.SIGSTOP)
        assert process.poll() is None
        yield process
    finally:
        pair[1].process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def test_a_get_that_is_killed_goes_on(
    getting: subprocess.Popen[str],
    pair: tuple[NodeProcess, NodeProcess],
    big: str,
    tmp_path: Path,
) -> None:
    getting.kill()
    getting.communicate()
    pair[1].process.send_signal(signal.SIGCONT)
    part = part_of(tmp_path)
    assert part is not None
    assert os.listdir(tmp_path) == [part.name]
    with (part / "content").open(
        "r+b"
    ) as file:  # what is on disk is not asked for again, so that this stays
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    pair[1].ww("blob", "get", big, "-o", str(tmp_path / "out"), check=True)
    assert os.listdir(tmp_path) == ["out"]
    out = tmp_path / "out"
    with out.open("r+b") as file:
        assert file.read(1) == bytes([first[0] ^ 1])
        file.seek(0)
        file.write(first)
    assert pair[0].ww("blob", "put", str(out), check=True).stdout.strip() == big


def test_ctrl_c_leaves_nothing(
    getting: subprocess.Popen[str], pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    getting.send_signal(signal.SIGINT)
    pair[1].process.send_signal(signal.SIGCONT)
    assert getting.wait(60) == 130
    assert os.listdir(tmp_path) == []


def test_cat_is_a_pipe(pair: tuple[NodeProcess, NodeProcess], big: str) -> None:
    a, b = pair
    text = subprocess.run(
        [sys.executable, "-m", "wetware", "--data-dir", str(a.data_dir), "blob", "cat", big,
         "--range", "100:5000100"],
        env=a.home.env, capture_output=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert len(text) == 5_000_000
    reader = b.start_ww("blob", "cat", big)
    assert reader.stdout is not None
    reader.stdout.buffer.read(1000)
    reader.stdout.close()  # as `head` does
    assert reader.wait(60) == EXIT_PIPE


def test_standard_input(pair: tuple[NodeProcess, NodeProcess]) -> None:
    a, _ = pair
    cid = a.ww("blob", "put", "-", input="from a pipe", check=True).stdout.strip()
    assert a.ww("blob", "cat", cid, check=True).stdout == "from a pipe"
    older = ("-", "--profile", "unixfs-v0-2015")
    cid = a.ww("blob", "put", *older, input="hello world", check=True).stdout.strip()
    assert cid == "Qmf412jQZiuVUtdgnB36FXFX7xg5V6KEbSJ4dpQuhkLyfD", "as Kubo has it"
    assert a.ww("blob", "cat", cid, check=True).stdout == "hello world"
    waiting = a.start_ww("blob", "put", "-")
    assert waiting.stdin is not None
    waiting.stdin.write("a part")
    waiting.stdin.flush()
    pipe = waiting.stdin.fileno()
    unread = bytearray(4)

    def taken() -> bool:
        fcntl.ioctl(pipe, termios.FIONREAD, unread)
        return not any(unread)

    wait_for(taken, "a reader", within_s=60)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(60) == 130


def test_a_terminal_sees_how_far_it_is(
    pair: tuple[NodeProcess, NodeProcess], big: str, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    seen = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                seen.extend(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    command = ["--data-dir", str(pair[1].data_dir), "blob", "get", big, "-o", str(tmp_path / "x")]
    done = subprocess.run(
        [sys.executable, "-m", "wetware", *command],
        env=pair[1].home.env | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE, stderr=theirs, timeout=90, check=False,
    )  # fmt: skip
    os.close(theirs)
    reader.join(20)
    os.close(ours)
    text = seen.decode()
    assert (done.returncode, done.stdout) == (0, b""), text
    assert "getting" in text
    assert "MiB" in text
    assert "/s" in text
    assert re.search(r"\d:\d\d:\d\d", text), "for how long it goes on"


@pytest.mark.long
def test_a_backup_of_one_node_is_restored_at_another(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, b = pair
    cid = a.ww("blob", "put", "-", "--name", "kept", input="to keep", check=True).stdout.strip()
    a.ww("blob", "backup", str(tmp_path / "saved"), check=True, timeout=120)
    assert (tmp_path / "saved" / f"{cid}.car").exists()
    a.ww("blob", "rm", cid, check=True)
    assert cid not in a.ww("blob", "ls", check=True).stdout
    b.ww("blob", "restore", str(tmp_path / "saved"), check=True, timeout=120)
    restored = json.loads(b.ww("blob", "ls", "--json", check=True).stdout)
    assert (cid, "kept") in {(pin["root"], pin["name"]) for pin in restored}
    assert b.ww("blob", "cat", cid, "--local", check=True).stdout == "to keep"
