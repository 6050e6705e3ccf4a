"""Real `ww node` processes on machines behind real NATs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from wetware.testing import Home

from .cluster import Cluster
from .lab import Lab, missing


@pytest.fixture(scope="session", autouse=True)
def _possible() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """An internet without machines."""
    with Lab() as made:
        yield made


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without nodes on the machines of `lab`."""
    with Home(tmp_path) as home:
        yield Cluster(lab, home)
