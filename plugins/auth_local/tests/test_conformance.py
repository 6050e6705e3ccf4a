"""The backend and its service keep their contracts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wetware.hookspecs import PluginContext
from wetware.identity import Key
from wetware.testing import AuthConformance, ServiceConformance
from wetware_auth_local.backend import LocalBackend, PolicyService
from wetware_auth_local.config import AuthLocalConfig
from wetware_auth_local.policy import User
from wetware_auth_local.signer import Ed25519Signer

ADA = Key.from_seed(b"a" * 32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class TestPolicyService(ServiceConformance):
    config = AuthLocalConfig(catch_up_s=0)
    examples = {"PolicyStore.get": {}, "PolicyStore.status": {}}

    def make(self, ctx: PluginContext) -> PolicyService:
        return PolicyService(LocalBackend(ctx))


class TestAuthLocal(AuthConformance):
    name = "auth_local"
    config = AuthLocalConfig(catch_up_s=0)

    @pytest.fixture(autouse=True)
    def _home(self, home: Path) -> None:
        self.home = home

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
