"""Backends that run, without a node around them, and who logs in at them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from wetware.hookspecs import Accept, Reject
from wetware.identity import Challenge, Channel, Key, PeerId, Principal
from wetware.testing import plugin_context
from wetware_auth_oidc.backend import OidcBackend
from wetware_auth_oidc.config import AuthOidcConfig
from wetware_auth_oidc.session import StoredSession
from wetware_auth_oidc.signer import proof_of

from .fake import CLIENT, FakeProvider

ADA, EVE = (Key.from_seed(letter * 32) for letter in (b"a", b"e"))
PRINCIPAL = Principal("oidc", "ada")
MAY = {"pubsub": ["*"]}
ROLES = {
    "member": {"claims": ["groups=eng"], "services": MAY},
    "admin": {"claims": ["groups=ops", "sub=root"], "services": {"*": ["*"]}},
}


def config(issuer: str, **more: Any) -> AuthOidcConfig:
    return AuthOidcConfig(issuer, CLIENT, **{"roles": ROLES, **more})


class Node:
    """A backend that runs, and what it told."""

    def __init__(self, backend: OidcBackend) -> None:
        self.backend = backend
        self.peer = PeerId.from_public_key(os.urandom(32))
        self.told: list[Any] = []
        self._told = asyncio.Event()
        backend.watch(self._hear)

    def _hear(self, event: object) -> None:
        self.told.append(event)
        self._told.set()

    def challenge(self) -> Challenge:
        return Challenge(
            nonce=os.urandom(32),
            verifier=self.peer,
            cluster="ab" * 20,
            channel=Channel("noise", os.urandom(32)),
            schemes=self.backend.schemes,
            policy_epoch=1,
            not_after_ms=round(time.time() * 1000) + 10_000,
        )

    async def login(self, session: StoredSession) -> Accept | Reject:
        challenge = self.challenge()
        verdict = await self.backend.authenticate(challenge, proof_of(session, challenge))
        assert isinstance(verdict, Accept | Reject)
        return verdict

    async def hears(self, kind: type, within_s: float = 20) -> Any:
        async with asyncio.timeout(within_s):
            while not (found := [event for event in self.told if isinstance(event, kind)]):
                self._told.clear()
                await self._told.wait()
        return found[-1]


Start = Callable[..., contextlib.AbstractAsyncContextManager[Node]]


@contextlib.asynccontextmanager
async def started(fake: FakeProvider, folder: Path, **more: Any) -> AsyncIterator[Node]:
    """One with these settings for the block."""
    given = config(fake.issuer, **{"recheck_s": 1, "unreachable_s": 1, **more})
    backend = OidcBackend(plugin_context(folder, given, name="auth_oidc"))
    ready = asyncio.Event()

    class Status:
        def started(self, value: object = None) -> None:
            ready.set()

    task = asyncio.create_task(backend.run(task_status=Status()))  # type: ignore[arg-type]
    await ready.wait()
    try:
        yield Node(backend)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
