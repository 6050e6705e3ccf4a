"""What the tests of auth_oidc have in common."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .fake import FakeProvider, fake_provider
from .nodes import Start, started


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with fake_provider() as provider:
        yield provider


@pytest.fixture
def start(fake: FakeProvider, tmp_path: Path) -> Start:
    """What runs a backend with these settings for a block."""
    return functools.partial(started, fake, tmp_path)
