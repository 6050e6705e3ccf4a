"""Those who want to hear of something."""

from __future__ import annotations

import pytest

from wetware.base.watchers import Watchers


def test_who_is_told_what_until_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    watchers, heard = Watchers[int](), list[int]()

    def broken(event: int) -> None:
        raise RuntimeError("a watcher's defect is its own")

    watchers.add(broken)
    end = watchers.add(heard.append, 1, 2)
    watchers.tell(3)
    end()
    end()
    watchers.tell(4)
    assert heard == [1, 2, 3]
    assert [r.getMessage() for r in caplog.records] == ["watcher.failed"] * 2


def test_what_must_be_done_is_told_to_all_and_a_failure_is_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watchers, heard = Watchers[int](), list[int]()

    def broken(event: int) -> None:
        raise RuntimeError(f"cannot {event}")

    watchers.add(broken)
    watchers.add(heard.append)
    with pytest.raises(RuntimeError, match="cannot 1"):
        watchers.tell_all(1, 2)
    assert heard == [1, 2]
    assert [r.getMessage() for r in caplog.records] == ["watcher.failed"] * 2
