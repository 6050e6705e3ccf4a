"""The backend keeps the contract of auth backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wetware.hookspecs import PluginContext
from wetware.identity import Key
from wetware.testing import AuthConformance
from wetware_auth_local.backend import LocalBackend
from wetware_auth_local.plugin import AuthLocalConfig
from wetware_auth_local.policy import User
from wetware_auth_local.signer import Ed25519Signer

ADA = Key.from_seed(b"a" * 32)


class TestAuthLocal(AuthConformance):
    name = "auth_local"
    config = AuthLocalConfig(catch_up_s=0)

    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = tmp_path / "home"
        monkeypatch.setenv("WW_HOME", str(self.home))

    def make(self, ctx: PluginContext) -> LocalBackend:
        return LocalBackend(ctx)

    async def _put(self, backend: Any, **users: User) -> None:
        operator = Key.load(self.home / "keys" / "default")
        known = {name: user for name, user in backend.policy.users.items() if name != "ada"}
        await backend.put(backend.policy.next(users={**known, **users}).sign(operator))

    async def member(self, backend: Any) -> Ed25519Signer:
        if "ada" not in backend.policy.users:
            await self._put(backend, ada=User(ADA.peer_id, frozenset({"member"})))
        return Ed25519Signer(ADA)

    def stranger(self) -> Ed25519Signer:
        return Ed25519Signer(Key.from_seed(b"e" * 32))

    async def withdraw(self, backend: Any) -> None:
        await self._put(backend)
