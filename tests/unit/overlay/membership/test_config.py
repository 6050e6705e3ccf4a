"""The formulas, against memberlist's own figures (util_test.go, suspicion_test.go)."""

from __future__ import annotations

import math

import pytest

from wetware.overlay.membership.config import MembershipConfig

CONFIG = MembershipConfig()


@pytest.mark.parametrize(
    ("nodes", "seconds"),
    [(5, 1000), (10, 1000), (50, 1698.97), (100, 2000), (500, 2698.97), (1000, 3000)],
)
def test_shortest_suspicion(nodes: int, seconds: float) -> None:
    config = MembershipConfig(suspicion_mult=3, probe_s=1000 / 3, probe_timeout_s=1)
    assert config.suspicion_s(nodes)[0] == pytest.approx(seconds, rel=1e-3)


@pytest.mark.parametrize(("confirmations", "seconds"), [(0, 24.0), (1, 11.38), (2, 4.0), (3, 4.0)])
def test_confirmations_shorten_it(confirmations: int, seconds: float) -> None:
    shortest, timeout, wanted = CONFIG.suspicion_s(8, confirmations)
    assert (shortest, wanted) == (4.0, 2)
    assert timeout == pytest.approx(seconds, abs=0.01)


def test_too_few_nodes_to_confirm() -> None:
    assert CONFIG.suspicion_s(3) == (4.0, 4.0, 0)
    assert CONFIG.suspicion_s(4)[2] == 2


@pytest.mark.parametrize(
    ("nodes", "times"), [(1, 4), (9, 4), (10, 8), (99, 8), (100, 12), (1000, 16)]
)
def test_transmissions(nodes: int, times: int) -> None:
    assert CONFIG.transmissions(nodes) == times


@pytest.mark.parametrize(
    ("nodes", "times"), [(1, 1), (32, 1), (33, 2), (64, 2), (65, 3), (128, 3), (1000, 6)]
)
def test_sync_period(nodes: int, times: int) -> None:
    assert CONFIG.sync_period_s(nodes) == times * CONFIG.sync_s


def test_load_updates_are_spread() -> None:
    assert CONFIG.load_period_s(3) == CONFIG.load_s
    assert 1000 / CONFIG.load_period_s(1000) == CONFIG.load_updates_per_s


@pytest.mark.parametrize(
    "changes",
    [{"probe_s": 0.0}, {"probe_s": 0.5, "probe_timeout_s": 0.5}, {"frame_bytes_max": 1024}],
)
def test_nonsense_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|is at least"):
        MembershipConfig(**changes)  # type: ignore[arg-type]


def test_expected_detection_of_the_docstring() -> None:
    assert math.e / (math.e - 1) == pytest.approx(1.58, abs=0.01)
