from __future__ import annotations

import pytest

from wetware.errors import InvalidArgument, ProtocolRefused
from wetware.overlay.link import Violation
from wetware.overlay.link.multistream import (
    HELLO,
    LINE_BYTES_MAX,
    NA,
    LineReader,
    Proposer,
    Responder,
    encode_line,
)


def respond(data: bytes, *served: str, proposals_max: int = 4) -> tuple[Responder, bytes]:
    responder = Responder(lambda name: name in served, proposals_max=proposals_max)
    return responder, responder.receive(data)


def test_hello_is_what_the_specification_shows() -> None:
    assert HELLO == b"\x13/multistream/1.0.0\n"
    assert NA == b"\x03na\n"


def test_the_dialler_sends_header_and_proposal_together() -> None:
    proposer = Proposer(("/a", "/b"))
    assert proposer.start() == HELLO + encode_line("/a")
    assert proposer.receive(HELLO + NA) == encode_line("/b")
    assert proposer.receive(encode_line("/b") + b"data") == b""
    assert (proposer.chosen, proposer.rest()) == ("/b", b"data")


def test_the_dialler_runs_out_of_proposals() -> None:
    proposer = Proposer(("/a",))
    with pytest.raises(ProtocolRefused, match="'/a'"):
        proposer.receive(HELLO + NA)


@pytest.mark.parametrize("answer", [encode_line("/multistream/2.0.0"), HELLO + encode_line("/b")])
def test_the_dialler_takes_no_other_answer(answer: bytes) -> None:
    with pytest.raises(Violation):
        Proposer(("/a",)).receive(answer)


def test_the_listener_refuses_until_it_agrees_and_keeps_what_follows() -> None:
    responder, answer = respond(HELLO + encode_line("/a") + encode_line("/b") + b"early", "/b")
    assert answer == HELLO + NA + encode_line("/b")
    assert (responder.chosen, responder.rest()) == ("/b", b"early")


def test_the_listener_answers_the_header_at_once() -> None:
    assert respond(HELLO)[1] == HELLO


def test_too_many_proposals_are_a_violation() -> None:
    with pytest.raises(Violation, match="too many"):
        respond(HELLO + encode_line("/a") * 4, proposals_max=4)


@pytest.mark.parametrize(
    "data", [b"\x00", b"\x81\x09" + b"x" * 1200, b"\xff\xff\xff", b"\x02ab", b"\x02\xff\n"]
)
def test_bad_lines_are_violations(data: bytes) -> None:
    reader = LineReader()
    reader.feed(data)
    with pytest.raises(Violation):
        reader.line()


def test_the_longest_line_passes_and_one_more_does_not() -> None:
    longest = "/" + "x" * (LINE_BYTES_MAX - 2)
    reader = LineReader()
    reader.feed(encode_line(longest))
    assert reader.line() == longest
    for bad in (longest + "x", "/a\nb"):
        with pytest.raises(InvalidArgument):
            encode_line(bad)
