"""A backend without a node: its chain is real, its clock is the test's, its looks are asked for.

`World.look()` is what the backend's own tasks do over and over; nothing happens in between, so a
test says when something is seen.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from plugins.auth_evm.tests.chain.net import DAY_S, Net
from plugins.auth_evm.tests.contract.people import OWNER, word

from wetware.base.log import get_logger
from wetware.hookspecs import (
    Accept,
    NotMine,
    Overlay,
    PluginContext,
    Reject,
    Resumed,
    Suspended,
    Withdrawn,
)
from wetware.identity import Challenge, Channel, Key, LoginStatus, PeerId, Principal, Proof
from wetware_auth_evm.chain.addresses import checksum
from wetware_auth_evm.login.proofs import SCHEMES, SESSION_SCHEME, SessionProof, session_statement
from wetware_auth_evm.login.session import StoredSession
from wetware_auth_evm.login.statements import SessionGrant
from wetware_auth_evm.login.wallets import Wallet
from wetware_auth_evm.node.backend import EvmBackend
from wetware_auth_evm.node.config import AuthEvmConfig
from wetware_auth_evm.signer import SessionSigner

CLUSTER = "c1" * 16
SCOPE = "team"
ROLES: dict[str, dict[str, Any]] = {
    "member": {"services": {"pubsub": ["*"]}},
    "editor": {
        "services": {"pubsub": ["PubSub.join", "Topic.info"]},
        "bits": {"1": {"pubsub": ["Topic.publish"]}, "3": {"blob": ["Blob.get"]}},
        "where": ["pubsub/topic=glob:chat/*"],
    },
}


class Person:
    """Somebody with a wallet of their own."""

    def __init__(self, name: str) -> None:
        self.wallet = Wallet.from_secret(name.encode().rjust(32, b"\1"))
        self.account = self.wallet.address
        self.address = checksum(self.account)


ALICE, BOB, MALLORY = Person("alice"), Person("bob"), Person("mallory")


class World:
    """See the module.

    Attributes:
        backend: What is tested.
        events: What it told the broker.
        node: The key of the node that asks.
    """

    def __init__(self, chain: Net, directory: Path, **config: Any) -> None:
        self.chain, self.directory = chain, directory
        self.config = AuthEvmConfig(
            **{
                "endpoints": (chain.chain.url,),
                "chain_id": chain.chain.chain_id,
                "contract": chain.acl.address,
                "scope": SCOPE,
                "quorum": 1,
                "finality": "finalized",
                "poll_s": 1.0,
                "verified_s_max": 60.0,
                "tip_age_s_max": 600.0,
                "timeout_s": 60.0,  # a look is asked for once: a busy machine may take its time
                "roles": ROLES,
                **config,
            }
        )
        self.events: list[Withdrawn | Suspended | Resumed] = []
        self.node = Key.generate()
        self.channel = Channel("noise", secrets.token_bytes(32))
        self.backend = self.start()

    def context(self, **changes: Any) -> PluginContext:
        directory = self.directory / "auth_evm"
        directory.mkdir(exist_ok=True)
        return PluginContext(
            **{
                "name": "auth_evm",
                "config": self.config,
                "log": get_logger("plugin.auth_evm"),
                "data_dir": directory,
                "clock": self.chain.clock,
                "overlay": cast("Overlay", None),
                "configured": frozenset({"endpoints", "chain_id", "contract"}),
                **changes,
            }
        )

    def start(self, **changes: Any) -> EvmBackend:
        """A new backend over the same data directory: the node was restarted."""
        self.backend = EvmBackend(self.context(**changes))
        self.events.clear()
        self.backend.watch(self.events.append)
        return self.backend

    async def __aenter__(self) -> World:
        await self.look()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.backend.endpoints.aclose()

    # --- the chain --------------------------------------------------------------------------------

    async def look(self) -> None:
        """One look at the chain, and what follows from it."""
        self.backend._review(await self.backend.follower.look())

    async def settle(self) -> None:
        """Everything on the chain becomes final, and is looked at."""
        self.chain.mine(2)
        await self.look()

    async def grant(
        self, account: str, role: str = "member", rights: int = 1, *, seconds: int = DAY_S
    ) -> None:
        """The owner grants a role in this cluster, and it becomes final."""
        expiry = self.chain.chain.time + seconds
        self.send("grant", word(SCOPE), word(role), account, 0, expiry, rights)
        await self.settle()

    def send(self, function: str, *args: Any, sender: str = OWNER) -> None:
        self.chain.send(function, *args, sender=sender)

    # --- logins -----------------------------------------------------------------------------------

    def challenge(self, **changes: Any) -> Challenge:
        """What this node asks now."""
        issued = Challenge(
            nonce=secrets.token_bytes(32),
            verifier=self.node.peer_id,
            cluster=CLUSTER,
            channel=self.channel,
            schemes=SCHEMES,
            policy_epoch=self.backend.epoch,
            not_after_ms=int((self.chain.clock.time() + 10) * 1000),
        )
        return dataclasses.replace(issued, **changes)

    def session_of(
        self,
        person: Person,
        roles: Sequence[str] = ("member",),
        *,
        form: Any = "eip712",
        seconds: int = 3600,
        signature: bytes | None = None,
        **changes: Any,
    ) -> StoredSession:
        """A session that somebody's wallet signed; `changes` are to the grant before it signs."""
        key = Key.generate()
        now = int(self.chain.clock.time())
        replica = self.backend.replica
        grant = SessionGrant(
            **{
                "chain_id": replica.chain_id,
                "contract": replica.contract,
                "account": person.account,
                "session_key": key.peer_id,
                "cluster": CLUSTER,
                "scope": replica.scope,
                "roles": tuple(sorted(roles)),
                "epochs": replica.epochs(changes.get("account", person.account)),
                "issued_at": now,
                "expires_at": now + seconds,
                "nonce": secrets.token_bytes(16),
                **changes,
            }
        )
        if signature is None:
            digest = SessionProof(grant, form, b"").digest
            signature = person.wallet.sign(digest)
        return StoredSession(key, grant, signature, form)

    async def login(
        self, session: StoredSession, challenge: Challenge | None = None
    ) -> Accept | Reject | NotMine:
        """What the backend makes of a session, shown by its own signer."""
        challenge = challenge or self.challenge()
        signer = SessionSigner(session, now=self.chain.clock.time)
        return await self.backend.authenticate(challenge, await signer.sign(challenge))

    async def show(
        self, session: StoredSession, *, key: Key | None = None, challenge: Challenge | None = None
    ) -> Accept | Reject | NotMine:
        """As `login`, by a signer that checks nothing, and signs with the key given."""
        challenge = challenge or self.challenge()
        proof = session.proof
        answer = (key or session.key).sign(session_statement(challenge, proof.digest))
        payload = dataclasses.replace(proof, answer=answer).encode()
        return await self.backend.authenticate(
            challenge, Proof(SESSION_SCHEME, payload, challenge.signed_bytes())
        )

    async def logs_in(
        self, person: Person, roles: Sequence[str] = ("member",), **more: Any
    ) -> Accept:
        """A login that has to succeed."""
        result = await self.login(self.session_of(person, roles, **more))
        assert isinstance(result, Accept), result
        return result

    def principal(self, person: Person) -> Principal:
        return self.backend.principal(person.account)


async def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    """Wait for what the backend's own tasks do."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0.01)


def refused(result: Accept | Reject | NotMine, status: LoginStatus, *words: str) -> None:
    """Assert a refusal of a kind, whose reason says why."""
    assert isinstance(result, Reject), result
    assert result.status is status, result
    for word_ in words:
        assert word_ in result.reason, result


__all__ = [
    "ALICE",
    "BOB",
    "CLUSTER",
    "MALLORY",
    "ROLES",
    "SCOPE",
    "LoginStatus",
    "PeerId",
    "Person",
    "World",
    "refused",
    "until",
]
