"""`ww blob`: what it prints, refuses and writes, against the service in memory."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from wetware.errors import InvalidArgument, NotFound, WetwareError
from wetware_blob import backup, cli, disk

from .memory import Cluster, Tree, cid_of, served

Run = Callable[..., Result]
END = 2**64 - 1
ESCAPE = "a\x1b[2J\nb"


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `ww blob ARGS` in a directory of its own; what it raises comes out."""
    app = typer.Typer()
    cli.mount(app)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)

    def run_client(work: Callable[[Any], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with served(cluster, tmp_path / "socket") as blob:
                return await work(SimpleNamespace(blob=blob))

        return asyncio.run(main())

    monkeypatch.setattr(cli, "run_client", run_client)

    def run(*args: str, **kwargs: Any) -> Result:
        return CliRunner().invoke(app, ["blob", *args], catch_exceptions=False, **kwargs)

    return run


def test_put_and_get(run: Run, cluster: Cluster, tmp_path: Path) -> None:
    Path("photo").write_bytes(b"abc")
    done = run("put", "photo", "--replicas", "3", "--on", "zone=home", "--ack", "2", "--public")
    cid = cid_of(b"abc")
    assert done.stdout == f"{cid}\n"
    assert f"ww blob get {cid}" in done.stderr
    assert "2 copies" in done.stderr
    assert cluster.put_calls[-1]["pin"] == {
        "name": "photo", "copies": 3, "where": "zone=home", "ack": 2, "public": True,
    }  # fmt: skip
    assert json.loads(run("put", "photo", "--name", "x", "--json").stdout) == {
        "cid": cid, "bytes": 3, "copies": 1,
    }  # fmt: skip
    assert run("get", cid).exit_code == 0
    assert Path(cid).read_bytes() == b"abc"
    with pytest.raises(disk.DiskError, match="exists"):
        run("get", cid)
    assert json.loads(run("get", cid, "-o", "photo", "--force", "--json").stdout)["size"] == 3
    with pytest.raises(InvalidArgument, match="--ack 2"):
        run("put", "photo", "--ack", "2")


def test_directories(run: Run, cluster: Cluster) -> None:
    tree: Tree = {"dir": {ESCAPE: b"12345"}, "file": b"x", "link": "dir"}
    root = cluster.add(tree)
    listed = run("ls", root).stdout
    assert [line.split()[0] for line in listed.splitlines()[1:]] == ["directory", "file", "symlink"]
    shown = run("ls", f"{root}/dir").stdout
    assert "a\\x1b[2J\\nb" in shown
    assert len(shown.splitlines()) == 2
    assert json.loads(run("ls", f"{root}/dir", "--json").stdout)[0]["name"] == ESCAPE
    run("get", f"{root}/dir/{ESCAPE}")
    assert Path(ESCAPE).read_bytes() == b"12345"
    run("get", root, "-o", "copy")
    put = run("put", "copy")
    assert put.stdout.strip() == root
    with pytest.raises(InvalidArgument, match="no directory"):
        run("ls", f"{root}/file")
    with pytest.raises(InvalidArgument, match="is a symlink"):
        run("get", f"{root}/link", "-o", "y")


def test_stat_and_pins(run: Run, cluster: Cluster) -> None:
    assert "nothing is pinned" in run("ls").stderr
    Path("f").write_bytes(b"x" * 3000)
    cid = run("put", "f", "--name", ESCAPE, "--replicas", "2").stdout.strip()
    stat = run("stat", cid).stdout
    assert "size  3000 (3 KiB)" in stat
    assert "pin   a\\x1b[2J\\nb: 1 of 2 copies, at " in stat
    assert len(run("pin", "ls", cid).stdout.splitlines()) == 2
    assert "local:ada" in run("pin", "ls", "--all").stdout
    assert json.loads(run("pin", "ls", "--json").stdout)[0]["root"] == cid
    assert run("pin", "add", cid, "--name", "more").exit_code == 0
    assert "1 pin ended" in run("pin", "rm", cid, "--name", "more").stderr
    with pytest.raises(NotFound, match="no such pin") as refused:
        run("pin", "rm", cid, "--name", "more")
    assert refused.value.exit_code == 1
    assert "charged  3 KiB" in run("usage").stdout
    assert "3 blocks would be removed" in run("gc", "--dry-run").stderr
    assert json.loads(run("gc", "--json").stdout)["bytes"] == 5000
    with pytest.raises(InvalidArgument, match="no terminal to ask"):
        run("gc", "--drop-damaged")
    with pytest.raises(InvalidArgument, match="nothing goes"):
        run("gc", "--drop-damaged", "--dry-run", "--yes")
    assert "given up: 'old' of local:ada" in run("gc", "--drop-damaged", "--yes").stderr
    assert "no copies until its next start" in run("drain").stderr


def test_rm_says_what_still_pins(run: Run, cluster: Cluster) -> None:
    root, below = cluster.add({"a": b"x"}), cid_of(b"x")
    run("pin", "add", root, "--name", "holder")
    kept = run("rm", below).stderr
    assert f"it is still in {root} (holder): ww blob rm {root}" in kept
    assert "1 pin ended, 7 B freed" in run("rm", root).stderr
    with pytest.raises(NotFound):
        run("rm", root)


def test_verify_fails_if_something_stays_damaged(run: Run, cluster: Cluster) -> None:
    end = {"what": "end", "damaged": 1}
    assert run("verify").exit_code == 0
    mended = {"what": "block", "name": "b1\x1b", "mended": True}
    cluster.findings = [mended, end]
    done = run("verify")
    assert (done.exit_code, done.stdout) == (0, "mended  block b1\\x1b\n")
    cluster.findings = [mended | {"mended": False}, end]
    done = run("verify", "--json")
    assert done.exit_code == 1
    assert [json.loads(line)["what"] for line in done.stdout.splitlines()] == ["block", "end"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 2**64 - 1)),
        ("3:7", (3, 7)),
        ("3:", (3, 2**64 - 1)),
        (":7", (0, 7)),
        ("4:4", (4, 4)),
    ],
)
def test_ranges(text: str, expected: tuple[int, int]) -> None:
    assert cli.parse_range(text) == expected


@pytest.mark.parametrize("text", ["3", "a:b", "7:3", "1:2:3", "-1:", "²:", f"0:{2**64}", "0x1:"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        cli.parse_range(text)


def test_a_backup_is_put_back(run: Run, cluster: Cluster) -> None:
    tree, other = cluster.add({"a": b"x"}), cluster.add(b"other")
    for cid, name in ((tree, "t"), (other, "o"), (tree, "again")):
        run("pin", "add", cid, "--name", name, "--replicas", "2", "--public")
    before = [(pin["root"], pin["name"], pin["copies"], pin["public"]) for pin in cluster.pins]
    run("backup", "saved")
    assert sorted(os.listdir("saved")) == sorted([f"{tree}.car", f"{other}.car", "pins.json"])
    written = os.stat(f"saved/{tree}.car").st_mtime_ns
    run("backup", "saved")
    assert os.stat(f"saved/{tree}.car").st_mtime_ns == written
    cluster.pins, cluster.blobs = [], {}
    run("restore", "saved")
    after = [(pin["root"], pin["name"], pin["copies"], pin["public"]) for pin in cluster.pins]
    assert after == before
    assert set(cluster.blobs) == {tree, other, cid_of(b"x")}


def test_a_backup_says_what_it_could_not_have(run: Run, cluster: Cluster) -> None:
    gone, here = cluster.add(b"gone"), cluster.add(b"here")
    for cid in (gone, here):
        run("pin", "add", cid)
    del cluster.blobs[gone]
    with pytest.raises(WetwareError, match=f"not in the backup: {gone}"):
        run("backup", "saved")
    assert sorted(os.listdir("saved")) == [f"{here}.car", "pins.json"]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{}", b"[1]", b"[{}]", b"\xff", b"[" * 100_000,
        b'[{"root": "../x", "name": "", "copies": 0, "where": "", "public": false}]',
        b'[{"root": 1, "name": "", "copies": 0, "where": "", "public": false}]',
        b'[{"root": "b", "name": "", "copies": "x", "where": "", "public": false}]',
    ],
)  # fmt: skip
def test_what_is_no_backup_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "pins.json").write_bytes(text)
    if text == b"{}":
        assert backup.read_pins(tmp_path) == []
        return
    with pytest.raises(InvalidArgument, match="is not what"):
        backup.read_pins(tmp_path)


@pytest.mark.parametrize("what", ["-", "/dev/fd/{}"])
def test_a_pipe_is_put(what: str, run: Run) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"from a pipe")
    os.close(writing)
    stdin = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert run("put", what.format(reading)).stdout.strip() == cid_of(b"from a pipe")
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(reading)


def test_a_pipe_that_is_silent_does_not_keep_the_process(tmp_path: Path) -> None:
    """Its thread waits in the system for ever: for a writer, or for bytes."""
    os.mkfifo(tmp_path / "fifo")
    program = """
import asyncio, os, sys
from wetware_blob.client import _file
reading, writing = os.pipe()
async def main():
    for source in (sys.argv[1], f"/dev/fd/{reading}", reading):
        try:
            async with asyncio.timeout(0.1), _file(source) as (size, feed):
                await feed(None)
        except TimeoutError:
            print("left")
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, tmp_path / "fifo"],
        capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("left\n" * 3, "")


def test_nothing_heavy_is_imported_to_mount() -> None:
    program = """
import sys, typer
from wetware_blob import plugin
plugin.ww_register_commands(typer.Typer())
heavy = "rich.progress", "anyio.abc", "wetware_blob.client", "capnp"
print([module for module in heavy if module in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout == "[]\n"
