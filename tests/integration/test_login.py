"""Every way to log in that must fail, against a real node over the network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

import wetware
from wetware import rpc
from wetware.base.access import Access
from wetware.base.multiaddr import Multiaddr
from wetware.base.structs import to_struct
from wetware.broker.protocol import (
    CORE,
    GATE_PROTOCOL,
)
from wetware.client import LoginRefused
from wetware.errors import (
    AuthError,
    Disconnected,
    LimitExceeded,
    StreamReset,
    WetwareError,
)
from wetware.identity import Challenge, Channel, Key, LoginStatus, PeerId, Proof
from wetware.overlay.link import LinkHost, Stream
from wetware.overlay.rpc_pipe import RpcPipe
from wetware.testing import Home, NodeProcess
from wetware_auth_local.signer import SCHEME, Ed25519Signer

pytestmark = pytest.mark.anyio

Tamper = Callable[[Challenge], Challenge]


class CarelessSigner(rpc.Servant, interface=CORE.Signer):
    """Signs whatever `change` makes of the challenge, or answers with a given proof."""

    def __init__(
        self,
        key: Key,
        change: Tamper = lambda challenge: challenge,
        proof: Proof | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.key, self.change, self.proof, self.delay_s = key, change, proof, delay_s
        self.seen: Challenge | None = None
        self.sent: Proof | None = None

    async def sign(self, challenge: bytes) -> dict[str, object]:
        self.seen = Challenge.from_signed_bytes(challenge)
        await asyncio.sleep(self.delay_s)
        self.sent = self.proof or await Ed25519Signer(self.key).sign(self.change(self.seen))
        return {"proof": to_struct(self.sent)}


@contextlib.asynccontextmanager
async def gate_of(addr: str, key: Key | None = None) -> AsyncIterator[tuple[rpc.Ref, Channel]]:
    """The Gate of a node, over a connection of our own."""
    target = Multiaddr.parse(addr)
    async with rpc.runtime(), LinkHost(key or Key.generate()) as host:
        link = await host.dial([target], peer=target.peer)
        connection = await rpc.connect(RpcPipe(await link.open_stream(GATE_PROTOCOL)))
        try:
            yield connection.bootstrap(CORE.Gate), Channel("noise", link.channel_binding)
        finally:
            await connection.aclose()


async def attempt(gate: rpc.Ref, signer: rpc.Servant) -> LoginStatus:
    terminal = (await gate.call("terminal"))["terminal"]
    reply = await terminal.call("login", signer=signer)
    status = LoginStatus(reply["status"])
    assert (reply["session"] is not None) == (status is LoginStatus.GRANTED)
    return status


async def test_the_right_key_gets_in(node: NodeProcess) -> None:
    async with gate_of(node.addr) as (gate, channel):
        signer = CarelessSigner(node.home.key())
        assert await attempt(gate, signer) is LoginStatus.GRANTED
        assert signer.seen is not None
        assert signer.seen.verifier == node.peer_id
        assert signer.seen.channel == channel, "the challenge is not bound to this connection"


async def test_a_wrong_key_is_an_unknown_principal(node: NodeProcess) -> None:
    with pytest.raises(LoginRefused) as caught:
        async with wetware.connect(node.addr, key=Key.generate()):
            pass
    assert caught.value.status is LoginStatus.UNKNOWN_PRINCIPAL
    assert caught.value.exit_code == 77
    assert "ww user add" in caught.value.hint


async def test_a_signature_by_another_key_is_bad(node: NodeProcess) -> None:
    operator, thief = node.home.key(), Key.generate()

    class Forger(CarelessSigner):
        async def sign(self, challenge: bytes) -> dict[str, object]:
            statement = Challenge.from_signed_bytes(challenge).signed_bytes()
            payload = operator.public + thief.sign(statement)
            return {"proof": to_struct(Proof(SCHEME, payload, statement))}

    async with gate_of(node.addr) as (gate, _):
        assert await attempt(gate, Forger(thief)) is LoginStatus.BAD_SIGNATURE


async def test_a_replayed_proof(node: NodeProcess) -> None:
    async with gate_of(node.addr) as (gate, _):
        first = CarelessSigner(node.home.key())
        assert await attempt(gate, first) is LoginStatus.GRANTED
        # On the same connection, and on another.
        again = CarelessSigner(Key.generate(), proof=first.sent)
        assert await attempt(gate, again) is LoginStatus.REPLAYED
    async with gate_of(node.addr) as (gate, _):
        assert await attempt(gate, again) is LoginStatus.REPLAYED


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: replace(c, verifier=Key.from_seed(b"x" * 32).peer_id), "WRONG_VERIFIER"),
        (lambda c: replace(c, channel=Channel("noise", b"x" * 32)), "WRONG_CHANNEL"),
        (lambda c: replace(c, channel=Channel("unix", c.channel.value)), "WRONG_CHANNEL"),
        (lambda c: replace(c, cluster="other"), "WRONG_CLUSTER"),
        (lambda c: replace(c, nonce=bytes(32)), "REPLAYED"),
        (lambda c: replace(c, not_after_ms=c.not_after_ms + 60_000), "MALFORMED"),
        (lambda c: replace(c, policy_epoch=c.policy_epoch + 1), "MALFORMED"),
        (lambda c: replace(c, schemes=(*c.schemes, "none")), "MALFORMED"),
    ],
    ids=["verifier", "channel", "channel-kind", "cluster", "nonce", "deadline", "epoch", "schemes"],
)
async def test_a_proof_for_another_challenge(
    node: NodeProcess, change: Tamper, expected: str
) -> None:
    async with gate_of(node.addr) as (gate, _):
        status = await attempt(gate, CarelessSigner(node.home.key(), change))
        assert status is LoginStatus[expected]


@pytest.mark.parametrize(
    ("proof", "expected"),
    [
        (Proof("other-scheme", b"", b""), LoginStatus.UNSUPPORTED_SCHEME),
        (Proof(SCHEME, b"", b""), LoginStatus.MALFORMED),
        (Proof(SCHEME, b"x" * 96, b"\xff" * 4000), LoginStatus.MALFORMED),
        (Proof(SCHEME, b"x" * 100_000, b""), LoginStatus.MALFORMED),
    ],
)
async def test_a_malformed_proof(node: NodeProcess, proof: Proof, expected: LoginStatus) -> None:
    async with gate_of(node.addr) as (gate, _):
        assert await attempt(gate, CarelessSigner(Key.generate(), proof=proof)) is expected


async def test_a_terminal_serves_one_attempt(node: NodeProcess) -> None:
    async with gate_of(node.addr) as (gate, _):
        terminal = (await gate.call("terminal"))["terminal"]
        await terminal.call("login", signer=CarelessSigner(Key.generate()))
        reply = await terminal.call("login", signer=CarelessSigner(node.home.key()))
        assert LoginStatus(reply["status"]) is LoginStatus.TOO_MANY_TRIES
        assert reply["session"] is None


async def test_no_signer(node: NodeProcess) -> None:
    async with gate_of(node.addr) as (gate, _):
        terminal = (await gate.call("terminal"))["terminal"]
        reply = await terminal.call("login", signer=None)
        assert LoginStatus(reply["status"]) is LoginStatus.MALFORMED


async def test_terminals_are_bounded_per_connection(node: NodeProcess) -> None:
    async with gate_of(node.addr) as (gate, _):
        for _ in range(8):
            await gate.call("terminal")
        with pytest.raises(LimitExceeded, match="terminals_per_connection_max"):
            await gate.call("terminal")


async def test_an_expired_challenge(home: Home) -> None:
    slow = Home(home.path, env={"WW_LOGIN_DEADLINE_S": "0.5"})
    with slow, slow.node("slow") as node:
        async with gate_of(node.addr) as (gate, _):
            late = CarelessSigner(slow.key(), delay_s=2.0)
            assert await attempt(gate, late) is LoginStatus.EXPIRED


async def test_addresses_are_rate_limited(home: Home) -> None:
    limited = Home(home.path, env={"WW_LOGIN_ATTEMPTS_PER_ADDRESS_MAX": "3"})
    with limited, limited.node() as node:
        for _ in range(3):
            async with gate_of(node.addr) as (gate, _):
                await gate.call("terminal")
        async with gate_of(node.addr) as (gate, _):
            with pytest.raises(LimitExceeded, match="attempts_per_address_max"):
                await gate.call("terminal")
        assert node.ww("whoami").returncode == 0, "the local socket is not limited by address"


async def test_the_operator_s_own_lock_out_is_carried_out_and_said(home: Home) -> None:
    """A change that ends the session which makes it is in force, on disk and in memory."""
    with home.node("n") as node:
        done = node.ww("role", "set", "admin", "auth_local", "node")
        assert done.returncode == 77
        assert "your own session ended with the change" in done.stderr
        shown = node.ww("policy", "show", check=True).stdout
        assert "version = 2" in shown
        assert node.ww("pub", "chat", "x").returncode == 77
    with home.node("n") as node:
        assert "version = 2" in node.ww("policy", "show", check=True).stdout


# --- a malicious node in the middle ---------------------------------------------------------------


class Relay:
    """A node that victims log in to, and that passes their logins on to another node."""

    def __init__(self, target: str, rewrite: Callable[[Challenge, Channel, PeerId], Challenge]):
        self.target, self.rewrite = target, rewrite
        self.status: LoginStatus | None = None
        self.again: list[str] = []

    async def serve(self, stream: Stream) -> None:
        relay = self
        ours = Channel("noise", stream.connection.channel_binding)

        class FakeTerminal(rpc.Servant, interface=CORE.Terminal):
            async def login(self, signer: rpc.Ref | None) -> dict[str, object]:
                assert signer is not None

                class Forward(rpc.Servant, interface=CORE.Signer):
                    async def sign(self, challenge: bytes) -> dict[str, object]:
                        relay.seen = Challenge.from_signed_bytes(challenge)
                        wanted = relay.rewrite(relay.seen, ours, relay.host.peer_id)
                        reply = await signer.call("sign", challenge=wanted.signed_bytes())
                        return {"proof": dict(reply["proof"])}

                async with gate_of(relay.target) as (gate, _):
                    relay.status = await attempt(gate, Forward())
                try:
                    await Forward().sign(relay.seen.signed_bytes())
                except WetwareError as exc:
                    relay.again.append(exc.message)
                return {"status": "badSignature", "reason": "relayed"}

        class FakeGate(rpc.Servant, interface=CORE.Gate):
            async def terminal(self) -> dict[str, object]:
                return {"terminal": FakeTerminal()}

            async def redeem(self, id: bytes, secret: bytes) -> dict[str, object]:
                raise NotImplementedError

            async def describe(self, id: bytes, secret: bytes) -> dict[str, object]:
                raise NotImplementedError

            async def peer(self) -> dict[str, object]:
                raise NotImplementedError

        await rpc.serve(RpcPipe(stream), FakeGate())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async with rpc.runtime(), LinkHost(Key.generate()) as self.host:
            self.host.handle(GATE_PROTOCOL, self.serve, access=Access.PUBLIC)
            (addr,) = await self.host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
            yield str(addr.with_peer(self.host.peer_id))


async def test_relayed_challenge_is_refused_by_the_victims_client(node: NodeProcess) -> None:
    relay = Relay(node.addr, lambda challenge, ours, me: challenge)
    async with relay.running() as addr:
        with pytest.raises(AuthError) as caught:
            async with wetware.connect(addr, key=node.home.key()):
                pass
    assert caught.value.code == "auth.wrong_verifier"
    assert relay.status is LoginStatus.SIGNER_FAILED


async def test_relayed_challenge_under_the_relays_name_and_a_foreign_channel(
    node: NodeProcess,
) -> None:
    relay = Relay(node.addr, lambda challenge, ours, me: replace(challenge, verifier=me))
    async with relay.running() as addr:
        with pytest.raises(AuthError) as caught:
            async with wetware.connect(addr, key=node.home.key()):
                pass
    assert caught.value.code == "auth.wrong_channel"
    assert relay.status is LoginStatus.SIGNER_FAILED


async def test_relayed_proof_for_the_relay_is_refused_by_the_node(node: NodeProcess) -> None:
    """The victim means to log in to the relay, and signs for it; the proof is no use elsewhere."""
    relay = Relay(
        node.addr, lambda challenge, ours, me: replace(challenge, verifier=me, channel=ours)
    )
    async with relay.running() as addr:
        with pytest.raises(LoginRefused):
            async with wetware.connect(addr, key=node.home.key()):
                pass
    assert relay.status is LoginStatus.WRONG_VERIFIER
    assert relay.again == ["a signer answers one challenge"]


# --- strangers at the Gate -----------------------------------------------------------------------


async def test_streams_to_the_gate_are_bounded_per_connection(node: NodeProcess) -> None:
    target = Multiaddr.parse(node.addr)
    async with LinkHost(Key.generate()) as host:
        link = await host.dial([target], peer=target.peer)
        streams = [await link.open_stream(GATE_PROTOCOL) for _ in range(4)]

        async def fifth() -> None:
            stream = await link.open_stream(GATE_PROTOCOL)
            await stream.read()

        with pytest.raises(StreamReset):
            await asyncio.wait_for(fifth(), 60)
        for stream in streams:  # these live on
            assert stream.read_nowait() is None
    assert "gates_per_connection_max" in node.log.read_text()


async def test_a_stranger_s_messages_are_small_and_a_session_s_are_not(node: NodeProcess) -> None:
    async with gate_of(node.addr) as (gate, _):
        with pytest.raises((Disconnected, LimitExceeded)):
            await attempt(
                gate, CarelessSigner(Key.generate(), proof=Proof("x", b"", b"x" * 600_000))
            )
    async with wetware.connect(node.addr, key=node.home.key()) as session:
        topic = await session.pubsub.join("large")
        await topic.publish(b"x" * 300_000)


async def test_a_stranger_who_does_not_log_in_is_let_go(home: Home) -> None:
    hasty = Home(home.path, env={"WW_LOGIN_STRANGER_S_MAX": "1", "WW_LOGIN_DEADLINE_S": "0.1"})
    with hasty, hasty.node() as node:
        async with gate_of(node.addr) as (gate, _):
            terminal = (await gate.call("terminal"))["terminal"]
            node.wait_log("rpc.not_trusted", within_s=60)
            with pytest.raises(Disconnected):
                await terminal.call("login", signer=None)
