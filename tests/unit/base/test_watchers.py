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
