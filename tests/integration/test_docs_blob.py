"""What the documents of blob tell people to type works."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from wetware.testing import wait_for

from .test_docs import _BLOCK, ROOT, Machine, Reader, machines

__all__ = ["machines"]

TUTORIAL = "docs/tutorials/three-machines-one-file.md"
STORING = "docs/how-to/store-files.md"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_tutorial_works_as_it_is_written(machines: Callable[[str], Machine]) -> None:
    """Every block, in the order of the text, on the machine that it names."""
    reader = Reader(machines)
    blocks = _BLOCK.findall((ROOT / TUTORIAL).read_text())
    assert {machine for _, machine, _, _ in blocks} == {"desk", "attic", "rented"}
    for language, name, tag, text in blocks:
        if tag == "kill":
            machine = machines(name)
            assert machine.node is not None
            # Nobody reads so fast: a node that is killed 5 s after it met its first member may not
            # have kept who that is.
            peers = machine.node.data_dir / "peers.json"
            wait_for(
                lambda p=peers: p.exists() and p.read_text().count("12D3") > 1, "it knows them"
            )
            machine.sh(text.replace("NODE_PID", str(machine.node.process.pid)))
            machine.node.process.wait(60)
            continue
        if tag.startswith("until="):
            _wait_said(machines(name), reader.filled(text).strip(), tag.partition("=")[2])
            continue
        if "ww blob put" in text:  # as a reader would look, who has come from the step before
            wait_for(lambda: machines("desk").sh("ww ls").count(" alive ") == 3, "three members")
            wait_for(lambda: machines("attic").sh("ww ls || true"), "the new user is known")
        reader.do(language, name, tag, text)
    # What the text promises.
    put, copy = (
        (machines(name).home.path / "holiday.tar").read_bytes() for name in ("desk", "attic")
    )
    assert put == copy
    assert "2 of 2 copies, at " in reader.heard("ww blob stat")
    assert not list(machines("attic").home.path.glob("*bafkreigh2akisca*"))
    assert "nobody has bafkreigh2akisca" in reader.heard("ww blob get bafk")
    assert reader.heard("ww blob verify").endswith("damaged 0, mended 0\n")
    assert reader.heard("ww blob rm").startswith("1 pin")
    assert json.loads(machines("desk").sh("ww blob ls --json")) == []


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_how_to_of_storing_works_as_it_is_written(machines: Callable[[str], Machine]) -> None:
    """One node, and a machine without an account: every block, in the order of the text."""
    desk, laptop = machines("desk"), machines("laptop")
    desk.start_node("ww node")
    reader = Reader(machines)
    blocks = _BLOCK.findall((ROOT / STORING).read_text())
    assert {machine for _, machine, _, _ in blocks} == {"desk", "laptop"}
    for language, name, tag, text in blocks:
        reader.do(language, name, tag, text)

    # What the text promises.
    heard = reader.heard
    assert (desk.home.path / "copy" / "2026" / "one.jpg").read_text() == "a photo\n"
    assert "10 b'some'" in heard("session.blob.put")
    assert (laptop.home.path / "letter").read_text() == "for you alone\n"
    assert heard("--range 0:3\n") == "for"
    assert "is outside of cid=" in heard("blob stat bafk")
    assert "of 50.0 GiB" in heard("ww blob usage")
    assert " freed" in heard("ww blob rm")
    assert (desk.home.path / "backup" / "pins.json").exists()
    names = {pin["name"] for pin in json.loads(desk.sh("ww blob ls --json"))}
    assert names == {"album", "album.tar", "some", "letter"}
    assert "damaged 0" in heard("ww blob verify")
    assert not (laptop.home.path / ".wetware" / "node").exists()


def _wait_said(machine: Machine, command: str, text: str) -> None:
    """As a reader would look again, also where the command fails at first."""
    wait_for(
        lambda: text in machine.sh(f"{command} || true"), f"{text!r} from {command!r}", within_s=100
    )
