"""What the documents of proc tell people to type works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .test_docs import _BLOCK, ROOT, Machine, Reader, machines

__all__ = ["machines"]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_how_to_of_running_programs_works_as_it_is_written(
    machines: Callable[[str], Machine], request: pytest.FixtureRequest
) -> None:
    """One node: every block, in the order of the text."""
    pytest.importorskip("ziglang", reason="needs the extra: pip install -e '.[dev]'")
    desk = machines("desk")
    desk.env["PATH"] = f"{Path(sys.executable).parent}:{desk.env['PATH']}"  # it has the compiler
    if (cache := getattr(request.config, "cache", None)) is not None:
        desk.env["ZIG_GLOBAL_CACHE_DIR"] = f"{cache.mkdir('proc-guests')}/zig"
    desk.start_node("ww node")
    reader = Reader(machines)
    blocks = _BLOCK.findall((ROOT / "docs/how-to/run-programs.md").read_text())
    for language, name, tag, text in blocks:
        reader.do(language, name, tag, text)

    # What the text promises.
    heard = reader.heard
    assert heard("hello.c <<").endswith("hello world\n")
    assert "hello you\n" in heard("ww blob put hello.wasm")
    assert heard("--dir /notes").endswith("remember the milk\n")
    assert heard("--grant out=pubsub:chat").endswith("published\n")
    assert "0 b'published\\n'" in heard("session.proc.run")
    assert "b'hello again\\n' Exit(kind='exited', code=0" in heard("session.proc.run")
    ticks = heard("ww logs -f $ID")
    assert "tick 1\ntick 2\ntick 3\n" in ticks
    assert "0, on-failure" in ticks
    assert "out=pubsub:chat" in ticks
    assert "code=0" in heard("session.proc.start")
    assert "[b'published\\n']" in heard("session.proc.start")
    assert "exited 1" in heard("ww ps")
