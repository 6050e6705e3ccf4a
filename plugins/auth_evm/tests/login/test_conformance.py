"""The backend keeps the contract of auth backends, on a real chain."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from plugins.auth_evm.tests.chain.net import DAY_S, Net
from plugins.auth_evm.tests.contract.people import word
from plugins.auth_evm.tests.login.world import CLUSTER, SCOPE, Person, World

from wetware.hookspecs import PluginContext
from wetware.identity import Challenge, Proof
from wetware.testing import AuthConformance
from wetware_auth_evm.login.proofs import SESSION_SCHEME, session_statement
from wetware_auth_evm.login.session import StoredSession

ADA, EVE = Person("ada"), Person("eve")


class Careless:
    """A signer that checks nothing: what it signs is for the backend to judge."""

    def __init__(self, session: StoredSession) -> None:
        self.session = session

    async def sign(self, challenge: Challenge) -> Proof:
        proof = self.session.proof
        answer = self.session.key.sign(session_statement(challenge, proof.digest))
        payload = dataclasses.replace(proof, answer=answer).encode()
        return Proof(SESSION_SCHEME, payload, challenge.signed_bytes())


class TestAuthEvm(AuthConformance):
    name = "auth_evm"
    cluster = CLUSTER
    blocked_s = 5.0  # for a call of the test's own to its chain
    world: World

    @pytest.fixture(autouse=True)
    def _chain(self, chain: Net) -> None:
        self.chain = chain

    def make(self, ctx: PluginContext) -> Any:
        self.world = World(self.chain, ctx.data_dir)
        return self.world.backend

    async def member(self, backend: Any) -> Careless:
        if not backend.roles(backend.principal(ADA.account)):
            expiry = self.chain.chain.time + DAY_S
            self.chain.send("grant", word(SCOPE), word("member"), ADA.address, 0, expiry, 1)
            await self.world.settle()
        return Careless(self.world.session_of(ADA))

    def stranger(self) -> Careless:
        return Careless(self.world.session_of(EVE))

    async def withdraw(self, backend: Any) -> None:
        self.chain.send("revoke", word(SCOPE), word("member"), ADA.address)
        await self.world.settle()
