"""Dataclasses as structs: what is written is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wetware.base.structs import from_struct, to_struct


@dataclass(frozen=True)
class Leaf:
    name: str
    left: int | None


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    words: tuple[str, ...]
    ends: float | None
    top: Leaf
    labels: Mapping[str, str]


TREE = Tree((Leaf("a", None), Leaf("b", 0)), ("x", "y"), None, Leaf("t", 3), {"zone": "home"})
PLAIN = {
    "leaves": [{"name": "a", "left": -1}, {"name": "b", "left": 0}],
    "words": ["x", "y"],
    "ends": -1,
    "top": {"name": "t", "left": 3},
    "labels": [{"key": "zone", "value": "home"}],
}


def test_none_is_less_than_nothing_and_tuples_are_lists() -> None:
    assert to_struct(TREE) == PLAIN
    assert from_struct(Tree, PLAIN) == TREE


def test_fields_of_a_newer_peer_are_left_out() -> None:
    assert from_struct(Leaf, {"name": "a", "left": 1, "colour": "red"}) == Leaf("a", 1)
