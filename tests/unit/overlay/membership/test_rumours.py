from __future__ import annotations

from wetware.overlay.membership.rumours import CLAIM, ENTRY, FACT, Rumours

E45, C73, F16 = bytes(45), bytes(73), bytes(16)


def test_each_goes_out_a_limited_number_of_times() -> None:
    rumours = Rumours()
    rumours.add(ENTRY, b"a", E45)
    assert [rumours.take(1000, 3)[0] for _ in range(5)] == [E45] * 3 + [b""] * 2
    assert not len(rumours)
    assert not rumours.is_urgent


def test_newest_and_least_sent_first() -> None:
    rumours = Rumours()
    for name in (b"a", b"b", b"c"):
        rumours.add(FACT, name, name * 16)
    assert rumours.take(44, 9)[2] == b"c" * 16 + b"b" * 16
    assert rumours.take(44, 9)[2] == b"a" * 16 + b"c" * 16
    rumours.add(FACT, b"d", b"d" * 16)
    assert rumours.take(28, 9)[2] == b"d" * 16


def test_a_later_one_replaces() -> None:
    rumours = Rumours()
    rumours.add(ENTRY, b"a", b"1" * 45)
    rumours.take(1000, 4)
    rumours.add(ENTRY, b"a", b"2" * 45)
    assert [rumours.take(1000, 2)[0][:1] for _ in range(3)] == [b"2", b"2", b""]


def test_room_is_kept_to() -> None:
    rumours = Rumours()
    for n in range(50):
        rumours.add(ENTRY, b"e%d" % n, E45)
        rumours.add(CLAIM, b"c%d" % n, C73)
        rumours.add(FACT, b"f%d" % n, F16)
    for size in (0, 30, 100, 500, 3000):
        assert sum(map(len, rumours.take(size, 99))) <= size


def test_what_comes_back_dies_sooner_unless_it_is_urgent() -> None:
    rumours = Rumours()
    rumours.add(ENTRY, b"a", E45, urgent=False)
    rumours.add(ENTRY, b"b", b"\1" * 45)
    assert rumours.is_urgent
    for _ in range(3):
        rumours.came_back(ENTRY, b"a", E45)
        rumours.came_back(ENTRY, b"a", b"older")
        rumours.came_back(ENTRY, b"b", b"\1" * 45)
    assert len(rumours.take(1000, 4)[0]) == 90
    assert len(rumours.take(1000, 4)[0]) == 45
    rumours.drop(ENTRY, b"b")
    assert not len(rumours)
    assert not rumours.is_urgent
