"""What the how-to of requests tells people to type works."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from .test_docs import _BLOCK, ROOT, Machine, Reader, machines

__all__ = ["machines"]

ASKING = "docs/how-to/ask-and-answer.md"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_how_to_of_requests_works_as_it_is_written(machines: Callable[[str], Machine]) -> None:
    """One node: every block, in the order of the text."""
    machines("desk").start_node("ww node")
    reader = Reader(machines)
    for language, name, tag, text in _BLOCK.findall((ROOT / ASKING).read_text()):
        # A reader's python3 is the one that has wetware.
        started = text.replace("python3", sys.executable) if tag == "background" else text
        reader.do(language, name, tag, started)

    # What the text promises.
    heard = reader.heard
    asked = heard("until ww request")
    assert "\n3\n" in f"\n{asked}"
    assert '"data": "42"' in asked
    answered, code = heard("pubsub.request(").splitlines()
    assert answered.startswith("3 from local:")
    assert code == "not_found.responder"
    *answers, complete = heard("request_many").splitlines()
    assert sorted(answers) == ["count.a 1", "count.a 1", "count.a 2", "count.a 2"]
    assert complete == "complete: True"
    assert heard("ww use").endswith("7\n")
