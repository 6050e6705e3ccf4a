"""No path leads out of a directory, nothing is written where it must not be, and /tmp ends."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wetware_proc.wasm.files import remove_tree

if TYPE_CHECKING:
    from plugins.proc.tests.conftest import Run

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(400)]  # the first builds the C library

WAYS = ("read", "write", "truncate", "create", "stat", "unlink", "rename", "link")


def tries(run: Run) -> dict[str, dict[str, str]]:
    """Path → way → what it gave."""
    found: dict[str, dict[str, str]] = {}
    for line in run.lines:
        way, _, told = line.partition(" ")
        if way == "path":
            last = found[told] = {}
        else:
            last[way] = told
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that is not the guest's, beside its directory."""
    (tmp_path / "dir" / "below").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("outside")
    return secret


def check(outside: Path) -> None:
    """Nothing has changed there."""
    assert outside.read_text() == "outside"
    assert {each.name for each in outside.parent.iterdir()} == {"dir", "secret"}


@pytest.mark.parametrize("writable", [False, True])
async def test_no_path_leads_out(run: Run, outside: Path, writable: bool) -> None:
    """A link to /etc/passwd, links up and to what is absolute, `..` in all places."""
    top = outside.parent / "dir"
    (top / "passwd").symlink_to("/etc/passwd")
    (top / "up").symlink_to("../secret")
    (top / "above").symlink_to("..")
    (top / "absolute").symlink_to(outside)
    (top / "chain").symlink_to("below/chain")
    (top / "below" / "chain").symlink_to("../../secret")
    (top / "root").symlink_to("/")
    paths = [
        "passwd", "up", "absolute", "chain", "../secret", "below/../../secret", "/etc/passwd",
        "above/secret", "root/etc/passwd", "..", "below/../..", "./../secret", "//etc/passwd",
        "below/..//../secret", str(outside),
    ]  # fmt: skip
    for path in paths:  # each afresh: links may be removed, what they lead to may not
        await run("paths", path, dirs={"/": (top, writable)}, limits={"tmp_files": 100})
        told = tries(run)[path]
        assert not {"read", "write", "truncate", "create", "stat"} & {
            way for way, what in told.items() if what == "ok"
        }, (path, told)
        assert "content" not in told
        check(outside)


async def test_a_directory_that_is_read_only_stays_as_it_is(run: Run, outside: Path) -> None:
    top = outside.parent / "dir"
    (top / "file").write_text("content")
    await run("paths", "file", "new", "below", dirs={"/": (top, False)})
    told = tries(run)
    assert told["file"]["read"] == told["file"]["stat"] == "ok"
    assert told["file"]["content"] == "content"
    for path in told:
        for way in WAYS:
            if way not in ("read", "stat"):
                assert told[path][way] != "ok", (path, way)
    assert (top / "file").read_text() == "content"
    assert {each.name for each in top.iterdir()} == {"file", "below"}


async def test_what_is_no_file_is_not_opened(run: Run, outside: Path) -> None:
    """A FIFO, which nobody writes, a socket, and a device."""
    top = outside.parent / "dir"
    os.mkfifo(top / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "socket"))
        paths = ["fifo", "socket"]
        if os.geteuid() == 0:
            os.mknod(top / "null", 0o666 | 0o020000, os.makedev(1, 3))
            paths.append("null")
        await run("paths", *paths, dirs={"/": (top, False)}, limits={"wall_s": 10.0})
    for told in tries(run).values():
        assert [told[way] == "ok" for way in ("read", "write", "truncate", "create")] == [False] * 4
        assert told["stat"] == "ok"


async def test_a_link_in_a_writable_directory_cannot_bring_in_what_is_read_only(
    run: Run, outside: Path
) -> None:
    """A second name for a file would be a way to write it."""
    top = outside.parent / "dir"
    (top / "file").write_text("content")
    await run("across", dirs={"/data": (top, False)})
    assert run.out == b"link 69\nrename 69\n"  # EROFS
    assert (top / "file").read_text() == "content"


async def test_tmp_has_a_quota_of_bytes_and_names(run: Run) -> None:
    """1 MiB is 16 pages."""
    end = await run("quota", limits={"tmp_bytes": 1 << 20, "tmp_files": 12})
    assert end.code == 0, run.err
    assert run.lines == [
        "16 Quota exceeded",  # a
        "0 Quota exceeded",  # b
        "16 Quota exceeded",  # b, a is gone
        "sparse 1",
        "allocate 1",
        "seek 1",
        "0 Quota exceeded",  # d, while c has a descriptor
        "16 Quota exceeded",  # d
        "0 Quota exceeded",  # e, which replaces d
        "16 Quota exceeded",  # e
        "names 12 Quota exceeded",
        "link 1",
        "another 1",
    ]


async def test_tmp_of_any_depth_is_removed(run: Run) -> None:
    assert (await run("deep", limits={"tmp_files": 3000})).code == 0
    assert run.out == b"3000\n"  # the fixture of the driver looks whether it is gone


def test_a_tree_is_removed_and_what_its_links_lead_to_is_not(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").touch()
    (tree / "a" / "out").symlink_to(tmp_path)
    (tree / "out").symlink_to(tmp_path)
    (tmp_path / "kept").touch()
    remove_tree(tree)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


async def test_what_a_killed_node_left_is_removed(data_dir: Path) -> None:
    from wetware_proc.wasm.driver import wasm_driver

    (data_dir / "tmp" / "left" / "over").mkdir(parents=True)
    async with wasm_driver(data_dir):
        assert list((data_dir / "tmp").iterdir()) == []
