"""Real `ww node` processes on loopback: without libp2p, unless the module says `LIBP2P = True`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from wetware.testing import Home, NodeProcess


@pytest.fixture
def home(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Home]:
    """An empty home; whatever still runs in it at the end is ended."""
    with Home(tmp_path, libp2p=getattr(request.module, "LIBP2P", None)) as made:
        yield made


@pytest.fixture(scope="module")
def shared_home(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Home]:
    """A home for the tests of one module."""
    libp2p = getattr(request.module, "LIBP2P", None)
    with Home(tmp_path_factory.mktemp("home"), libp2p=libp2p) as made:
        yield made


@pytest.fixture(scope="module")
def node(shared_home: Home) -> Iterator[NodeProcess]:
    """One node for the tests of one module."""
    with shared_home.node() as running:
        yield running


@pytest.fixture(scope="module")
def pair(shared_home: Home) -> Iterator[tuple[NodeProcess, NodeProcess]]:
    """Two nodes that are members of each other's cluster, connected."""
    with shared_home.node("a") as a, shared_home.node("b", join=a) as b:
        a.wait_members([b.peer_id])
        b.wait_members([a.peer_id])
        yield a, b
