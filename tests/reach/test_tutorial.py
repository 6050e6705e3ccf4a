"""The tutorial of laptops and a rented machine works as it is written, behind real NATs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from tests.integration.test_docs import _BLOCK, ROOT, Machine, Reader, machines

from wetware.testing import wait_for

from .lab import Lab

__all__ = ["machines"]

TUTORIAL = "docs/tutorials/laptops-and-a-rented-machine.md"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_tutorial_works_as_it_is_written(lab: Lab, machines: Callable[[str], Machine]) -> None:
    """Every block, in the order of the text, on the machine that it names."""
    for name in ("hub", "home", "laptop", "friend"):
        lab.host(name, None if name == "hub" else lab.network("port-restricted"))
        del machines(name).env["WW_NODE_LISTEN"]
    home, reader = machines("home"), Reader(machines)
    heard: list[str] = []
    for language, name, tag, text in _BLOCK.findall((ROOT / TUTORIAL).read_text()):
        machine = machines(name)
        with lab.inside(name):
            if tag == "kill":
                assert machine.node is not None
                machine.sh(text.replace("NODE_PID", str(machine.node.process.pid)))
                machine.node.process.wait(60)
            elif tag == "elsewhere":
                lab.move(name, lab.network("symmetric"))
                _wait_said(machine, text, "via hub")
            elif tag.startswith("until="):
                _wait_said(machine, text, tag.partition("=")[2])
            else:
                reader.do(language, name, tag, text)
        if tag == "background":
            assert home.background is not None
            listening = threading.Thread(target=heard.extend, args=(home.background.stdout,))
            listening.start()
        if "ww pub" in text or "use REF pub" in text:
            said = text.split("'")[1] + "\n"
            if not heard:  # a new subscription takes a moment to be known: a reader would repeat it
                wait_for(lambda t=text: machines("laptop").sh(t) is not None and heard, said)
            wait_for(lambda s=said: s in heard, said)
    assert home.background is not None
    home.background.kill()
    listening.join(10)
    # What the text promises.
    assert home.node is not None
    assert f"node       {home.node.peer_id}" in reader.heard("--node home whoami")
    assert "printf" in reader.heard("invite --script")
    assert "0 lost" in reader.heard("hello without the hub")
    assert not (machines("friend").home.path / ".wetware" / "node").exists()


def _wait_said(machine: Machine, script: str, text: str) -> None:
    wait_for(lambda: text in machine.sh(script), f"{text!r} from {script!r}", within_s=60)
