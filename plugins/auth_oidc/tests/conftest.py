"""What the tests of auth_oidc have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from .fake import FakeProvider, fake_provider


@pytest.fixture
async def fake() -> AsyncIterator[FakeProvider]:
    async with fake_provider() as provider:
        yield provider
