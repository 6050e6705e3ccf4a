"""A node whose disk fails under its blocks: bits flip, and it is full."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from wetware.testing import Home, NodeProcess

pytestmark = [pytest.mark.timeout(240)]

MIB = 1 << 20


def block_files(node: NodeProcess) -> list[Path]:
    store = node.data_dir / "plugins" / "blob" / "store"
    return sorted(f for f in store.glob("*/*") if f.is_file() and f.stat().st_size >= MIB)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.long
def test_a_flipped_bit_is_never_served_and_mended_from_another_member(
    pair: tuple[NodeProcess, NodeProcess], tmp_path: Path
) -> None:
    a, b = pair
    data = os.urandom(4 * MIB)
    (tmp_path / "file").write_bytes(data)
    cid = a.ww("blob", "put", str(tmp_path / "file"), check=True).stdout.strip()
    b.ww("blob", "pin", "add", cid, check=True)
    flip(block_files(b)[1])
    b.ww("blob", "get", cid, "-o", str(tmp_path / "got"), check=True)
    assert (tmp_path / "got").read_bytes() == data
    assert "blob.damaged" in b.log.read_text()

    verified = b.ww("blob", "verify")
    assert (verified.returncode, verified.stdout) == (0, ""), "reading it has mended it"
    flip(block_files(b)[2])
    verified = b.ww("blob", "verify")
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.startswith("mended  block "), verified.stdout
    assert "damaged 1, mended 1" in verified.stderr
    done = b.ww("blob", "get", cid, "--local", "-o", str(tmp_path / "local"), check=True)
    assert (tmp_path / "local").read_bytes() == data, done.stderr

    a.ww("blob", "rm", cid, check=True)  # now nobody else has it
    a.ww("blob", "gc", check=True)
    flip(block_files(b)[0])
    verified = b.ww("blob", "verify")
    assert verified.returncode != 0
    assert verified.stdout.startswith("damaged  block "), verified.stdout
    got = b.ww("blob", "get", cid, "-o", str(tmp_path / "none"))
    assert got.returncode != 0
    assert not (tmp_path / "none").exists()
    assert b.ww("blob", "put", str(tmp_path / "file"), check=True).stdout.strip() == cid
    assert b.ww("blob", "verify").returncode == 0, "putting it again has mended it"


@pytest.mark.long
def test_a_full_disk_refuses_puts_and_lets_go_of_what_it_has(
    small_disk: Any, tmp_path: Path
) -> None:
    with Home(tmp_path / "home") as home:
        env = {"WW_PLUGINS_DISABLE": "sync"}  # whose reserve would leave no room
        node = home.start_node(str(small_disk.path / "n"), env=env).wait_ready()
        cids = []
        for number in range(3):
            (tmp_path / "file").write_bytes(os.urandom(MIB // 2))
            done = node.ww("blob", "put", str(tmp_path / "file"), "--name", f"{number}")
            assert done.returncode == 0, (done.stderr, small_disk.free_bytes)
            cids.append(done.stdout.strip())
        (tmp_path / "big").write_bytes(os.urandom(16 * MIB))
        refused = node.ww("blob", "put", str(tmp_path / "big"))
        assert refused.returncode != 0
        assert "no room" in refused.stderr, refused.stderr
        assert "try: " in refused.stderr
        assert node.ww("blob", "gc").returncode == 0
        node.ww("blob", "get", cids[0], "-o", str(tmp_path / "got"), check=True)

        small_disk.fill()
        assert not small_disk.free_bytes
        refused = node.ww("blob", "put", str(tmp_path / "file"))
        assert refused.returncode != 0
        shown = node.ww("blob", "pin", "ls", "--json")
        assert shown.returncode == 0, shown.stderr
        assert len(json.loads(shown.stdout)) == 3
        for cid in cids[:2]:
            removed = node.ww("blob", "rm", cid)
            assert removed.returncode == 0, removed.stderr
            small_disk.fill()
        collected = node.ww("blob", "gc")
        assert collected.returncode == 0, collected.stderr
        assert len(json.loads(node.ww("blob", "pin", "ls", "--json", check=True).stdout)) == 1
        assert node.process.poll() is None

        node.process.kill()
        node.process.wait()
        small_disk.fill()
        node = home.start_node(str(small_disk.path / "n")).wait_ready()
        shown = node.ww("blob", "pin", "ls", "--json")
        assert [pin["root"] for pin in json.loads(shown.stdout)] == cids[2:], shown.stderr
        removed = node.ww("blob", "rm", cids[2])
        assert removed.returncode == 0, removed.stderr
        node.stop()
