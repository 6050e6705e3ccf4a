"""The checker of watches finds each thing that a watch may not do."""

from __future__ import annotations

import pytest

from .watching import Asked, Read, Refused, Told, Watcher, Wrong, check

LOG = [
    Told(1, "a", "1", 0.1),
    Told(2, "b", "2", 0.2),
    Told(3, "a", None, 0.3),
    Told(4, "a", "4", 0.4),
    Told(4, "b", "4", 0.4),
    Told(5, "b", "5", 0.5),
]


def watcher(*steps: Told | Asked | Refused, prefix: str = "") -> Watcher:
    return Watcher(prefix, list(steps))


def test_what_is_right_is_right() -> None:
    happened = check(
        [
            watcher(Asked(1), *LOG),
            watcher(Asked(1), LOG[0], LOG[2], LOG[3], prefix="a"),
            watcher(Asked(1), *LOG[:3], Asked(4), *LOG[3:]),
            watcher(Asked(2), LOG[1], Refused(4), *LOG[3:]),
            watcher(Asked(1), Refused(4)),
            watcher(Asked(4), *LOG[3:], Asked(1), *LOG),  # another one, from before
        ],
        writes=LOG[1:4],
        reads=[Read(0.05, 0), Read(0.25, 2), Read(0.9, 5)],
        compacted=3,
    )
    assert happened == {(event.revision, event.key): event.value for event in LOG}


GAP = [*LOG[:1], *LOG[2:]]
WRONG = {
    "a gap": watcher(Asked(1), *GAP),
    "a gap that only writers know of": watcher(Asked(1), LOG[0], LOG[2], LOG[5]),
    "a gap where it went on": watcher(Asked(1), *LOG[:3], Asked(4), LOG[4], LOG[5]),
    "half of a revision": watcher(Asked(1), *LOG[:4], LOG[5]),
    "a duplicate": watcher(Asked(1), *LOG[:2], LOG[1], *LOG[2:]),
    "time travel": watcher(Asked(3), LOG[1], *LOG[2:]),
    "a wrong order": watcher(Asked(1), LOG[1], LOG[0], *LOG[2:]),
    "another key": watcher(Asked(1), LOG[0], LOG[1], prefix="a"),
    "another value": watcher(Asked(1), LOG[0], Told(2, "b", "x")),
    "a delete missed at the compaction point": watcher(Asked(1), *LOG[:2], *LOG[3:]),
    "a delete missed where compaction was said too late": watcher(
        Asked(3), LOG[3], LOG[4], Refused(6)
    ),
    "refused what is there": watcher(Asked(1), *LOG[:4], Refused(5)),
    "refused what is to come": watcher(Asked(5), Refused(4)),
}


@pytest.mark.parametrize("what", WRONG)
def test_each_defect_is_found(what: str) -> None:
    others = [watcher(Asked(1), *LOG)] if "writers" not in what else []
    with pytest.raises(Wrong):
        check([*others, WRONG[what]], writes=LOG if not others else [], compacted=3)


def test_an_event_of_what_a_later_read_does_not_know_is_found() -> None:
    with pytest.raises(Wrong, match="before"):
        check([watcher(Asked(1), *LOG)], reads=[Read(0.35, 2)])
