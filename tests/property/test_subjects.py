"""Patterns of subjects against brute force: whatever passes a constraint is all within it."""

from __future__ import annotations

import re
import time
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware import rpc
from wetware.base.subjects import covers, literal, tokens_of
from wetware.broker.glob import VALUE_CHARS_MAX
from wetware.broker.naming import one_object
from wetware.broker.where import KINDS, Where
from wetware.client.installed import known_interface
from wetware.errors import InvalidArgument, SchemaError

PUBSUB = known_interface("pubsub")
assert PUBSUB is not None
JOIN = PUBSUB.methods["join"]

# One token more than patterns have, and one letter more than they know.
NAMES = [".".join(tokens) for n in range(1, 5) for tokens in product(("a", "", "c"), repeat=n)]
PATTERNS = [
    ".".join((*tokens, *last))
    for n in range(4)
    for tokens in product(("a", "", "*"), repeat=n)
    for last in ((), (">",))
    if (tokens or last) and len(tokens) + len(last) <= 3
]


@cache
def matched(pattern: str) -> frozenset[str]:
    """The names that a pattern matches, by another way: as a regular expression."""
    ways = {"*": r"[^.]*", ">": r".*"}
    expression = re.compile(r"\.".join(ways.get(t, re.escape(t)) for t in pattern.split(".")))
    return frozenset(name for name in NAMES if expression.fullmatch(name))


def tokens(text: str) -> tuple[str, ...]:
    found = tokens_of(text)
    assert found is not None
    return found


def passes(text: str, value: str) -> bool | None:
    test = Where.parse(f"topic={text}").compile(JOIN)
    return None if test is None else test({"topic": value})


def test_a_pattern_covers_another_exactly_if_it_matches_all_its_names() -> None:
    assert len(PATTERNS) > 50
    for pattern, other in product(PATTERNS, repeat=2):
        within = matched(other) <= matched(pattern)
        assert covers(tokens(pattern), tokens(other)) is within, (pattern, other)
        assert passes(f"subject:{pattern}", other) is within, (pattern, other)
    for pattern, name in product(PATTERNS, NAMES):
        assert covers(tokens(pattern), tokens(name)) is (name in matched(pattern))


_LETTERS = st.sampled_from("ac.*?>")


@st.composite
def constraints(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(KINDS))
    match kind:
        case "max":
            return f"max:{draw(st.integers(0, 4))}"
        case "range":
            low, high = sorted(draw(st.tuples(st.integers(0, 4), st.integers(0, 7))))
            return f"range:{low}..{high}"
        case "subject":
            return f"subject:{draw(st.sampled_from(PATTERNS))}"
        case "in":
            return f"in:{draw(st.text(_LETTERS, min_size=1))},a.a"
    return f"{kind}:{draw(st.text(_LETTERS, min_size=1, max_size=5))}"


@given(constraints(), st.sampled_from(PATTERNS))
def test_a_pattern_passes_no_constraint_that_one_of_its_names_does_not(
    text: str, pattern: str
) -> None:
    if passes(text, pattern):
        assert all(passes(text, name) for name in matched(pattern))


@given(constraints(), st.sampled_from(NAMES))
def test_of_a_name_constraints_say_what_they_say_of_any_text(text: str, name: str) -> None:
    assert PUBSUB is not None
    where, subject = Where.parse(f"topic={text}"), passes(text, name)
    if where.kind == "subject":
        assert subject is (name in matched(where.values[0]))
    elif subject is not None:  # else it is a pattern among names, which would match none
        plain = Where("*", "", "selector", where.kind, where.values)
        cluster = known_interface("cluster")
        assert cluster is not None
        test = plain.compile(cluster.methods["list"])
        assert test is not None
        assert subject is test({"selector": name})


@pytest.mark.parametrize(
    ("text", "allowed", "refused"),
    [
        ("glob:?", ["a"], [">", "*"]),
        ("glob:a.*", ["a.>", "a.*", "a.b.*.c", "a.b"], ["a", "*.b", ">"]),
        ("glob:a.?", ["a.b"], ["a.>", "a.*", "a.bb"]),
        ("glob:a.>", [], ["a.>", "a.b"]),
        ("glob:*", [">", "a.>", "a"], []),
        ("prefix:a.", ["a.>", "a.b.>", "a.*"], ["a", "*.>", ">"]),
        ("prefix:a.b", ["a.b.>", "a.bc"], ["a.>", "a.*"]),
        ("max:3", ["a.b"], ["a.>", "a.*", ">"]),
        ("range:1..90", ["a.b"], ["a.>"]),
        ("a.b", ["a.b"], ["a.>", "a.*", ">"]),
        ("in:a.b,a.c", ["a.c"], ["a.>", "a.*"]),
        ("subject:a.b.>", ["a.b.c", "a.b.*", "a.b.>", "a.b.c.>"], ["a.>", "a.*.>", "a.b", "a.*.c"]),
        ("subject:a.*", ["a.b", "a.*"], ["a.>", "a", "a.b.c", "a.b.>", "a*", "a.>.b"]),
        ("subject:>", [">", "a", "a.>", "*"], ["a>", ">.a", "*a"]),
        ("subject:a", ["a"], ["a.b", "*", ">"]),
    ],
)
def test_named_cases(text: str, allowed: list[str], refused: list[str]) -> None:
    assert [passes(text, value) for value in allowed] == [True] * len(allowed)
    assert [passes(text, value) for value in refused] == [False] * len(refused)


@pytest.mark.parametrize("text", ["a.>", "equals:a.*", "in:a,b.>"])
def test_a_pattern_among_names_cannot_be_judged(text: str) -> None:
    assert passes(text, "a") is None


@given(st.text(st.sampled_from("a.*>"), max_size=9))
def test_a_wildcard_is_a_whole_token(text: str) -> None:
    good = re.fullmatch(r"([^.*>]*\.|\*\.)*([^.*>]*|\*|>)", text) is not None
    assert (tokens_of(text) is not None) is good
    assert (literal(text) == text) is ("*" not in text and ">" not in text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("orders.>", "topic=subject:orders.>"),
        (">", "topic=subject:>"),
        ("a.*.>", "topic=subject:a.*.>"),
        ("chat/*", "topic=glob:chat/*"),
        ("orders.*", "topic=glob:orders.*"),
    ],
)
def test_one_object_is_a_pattern_where_it_ends_with_the_rest(name: str, text: str) -> None:
    assert PUBSUB is not None
    _, where = one_object("pubsub", PUBSUB, name, frozenset(), frozenset({"*"}))
    assert where.text == text
    with pytest.raises(InvalidArgument):  # no name has it
        one_object("pubsub", PUBSUB, "a>", frozenset(), frozenset({"*"}))


def test_a_subject_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "s.capnp").write_text(
        '@0xd7f08b6a51c9e2aa;\nusing Ww = import "/wetware/schema/ww.capnp";\n'
        "interface S { take @0 (data :Data $Ww.constrained $Ww.subject); }\n"
    )
    with pytest.raises(SchemaError, match="which is data"):
        _ = rpc.load(tmp_path / "s.capnp").S.methods


def test_it_takes_time_in_proportion_to_the_length() -> None:
    """Where it followed every way, it would never end."""
    pattern = "*." * (VALUE_CHARS_MAX // 2 - 10) + "b"
    value = "a." * (VALUE_CHARS_MAX // 2 - 10) + "a"
    started = time.process_time()
    assert not covers(tokens(pattern), tokens(value))
    assert time.process_time() - started < 5
    assert passes("subject:>", "a" * (VALUE_CHARS_MAX + 1)) is False
