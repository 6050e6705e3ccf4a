"""What the how-to of three machines tells people to type works."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from wetware.testing import wait_for

from .test_docs import _BLOCK, ROOT, Machine, Reader, machines

__all__ = ["machines"]

THREE = "docs/how-to/three-machines-one-may-die.md"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed")
def test_the_how_to_of_three_machines_works_as_it_is_written(
    machines: Callable[[str], Machine],
) -> None:
    """Every block, in the order of the text, on the machine that it names."""
    reader = Reader(machines)
    blocks = _BLOCK.findall((ROOT / THREE).read_text())
    assert {machine for _, machine, _, _ in blocks} == {"desk", "attic", "rented", "spare"}
    desk = machines("desk")
    for language, name, tag, text in blocks:
        if tag == "kill":
            node = machines(name).node
            assert node is not None
            if "ww sync etcd up" in str(reader.said):  # as a reader would look first
                wait_for(lambda: _working(desk) == 3, "all three work", within_s=90)
            machines(name).sh(text.replace("NODE_PID", str(node.process.pid)))
            node.process.wait(60)
            continue
        if "etcd up" in text or "etcd replace" in text:
            alive = 4 if "replace" in text else 3
            gone = 1 if "replace" in text else 0
            wait_for(
                lambda n=alive - gone: desk.sh("ww ls").count(" alive ") == n, "members are alive"
            )
        reader.do(language, name, tag, text)
        if "etcd replace" in text:
            assert _working(desk) == 3
    assert "one of three is dead" in reader.heard("ww lock deploy")
    assert reader.heard("ww sync etcd status").count("serves") == 3
    assert "engine    etcd" in reader.heard("ww kv status")
    assert reader.heard("etcd down").startswith("12")
    assert "engine    embedded" in desk.sh("ww kv status")


def _working(machine: Machine) -> int:
    """Members of the store's etcd that say so."""
    lines = machine.sh("ww sync etcd status").splitlines()
    return sum(line.rstrip().endswith(" ok") for line in lines)
