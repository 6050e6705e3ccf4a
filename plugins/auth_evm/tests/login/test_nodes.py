"""Real nodes with a real chain: logins over the network, and what ends them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins.auth_evm.tests.contract.people import word
from plugins.auth_evm.tests.login.live import LiveChain, live_chain
from plugins.auth_evm.tests.login.world import ALICE, BOB, MALLORY, SCOPE

import wetware
from wetware import rpc
from wetware.base.multiaddr import Multiaddr
from wetware.base.structs import to_struct
from wetware.broker.protocol import (
    CORE,
    GATE_PROTOCOL,
)
from wetware.client import LoginRefused
from wetware.errors import EXIT_CONFIG, AuthError, CapabilityError, WetwareError
from wetware.hookspecs import Access
from wetware.identity import Challenge, Channel, Key, LoginStatus, PeerId, Proof
from wetware.overlay.link import LinkHost, Stream
from wetware.overlay.rpc_pipe import RpcPipe
from wetware.testing import Home, NodeProcess, wait_for
from wetware_auth_evm.client import EvmAuth
from wetware_auth_evm.login.proofs import SESSION_SCHEME, session_statement
from wetware_auth_evm.login.session import StoredSession
from wetware_auth_evm.signer import BoundKeySigner, SessionSigner

pytestmark = pytest.mark.anyio

ENDS_S = 20.0
"""From the chain to a session's end; a look takes 0.1 s."""


def configure(home: Home, text: str) -> None:
    (home.path / ".wetware").mkdir(exist_ok=True)
    (home.path / ".wetware" / "ww.toml").write_text(f'[node]\nauth = "evm"\n{text}')


@pytest.fixture(scope="module")
def chain() -> Iterator[LiveChain]:
    with live_chain() as made:
        yield made


@pytest.fixture(scope="module")
def node(chain: LiveChain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with Home(tmp_path_factory.mktemp("evm")) as home:
        configure(home, chain.toml())
        with home.node() as node:
            yield node


@pytest.fixture
def cluster(node: NodeProcess) -> str:
    return str(node.info["cluster"])


async def logs_in(node: NodeProcess, session: StoredSession) -> bool:
    try:
        async with wetware.connect(node.addr, signer=SessionSigner(session)):
            return True
    except LoginRefused as exc:
        if exc.status is not LoginStatus.NO_ROLE:
            raise
        return False


async def gets_in(node: NodeProcess, session: StoredSession) -> None:
    """As soon as the node has seen the grant."""
    async with asyncio.timeout(ENDS_S):
        while not await logs_in(node, session):  # noqa: ASYNC110  # another process has no event
            await asyncio.sleep(0.05)


async def granted(
    chain: LiveChain, node: NodeProcess, cluster: str, person: Any = ALICE, **more: Any
) -> StoredSession:
    """A session that works."""
    chain.grant(more.get("account") or person.address)
    session = chain.session(person, cluster, **more)
    await gets_in(node, session)
    return session


async def ends(call: Callable[[], Any], within_s: float = ENDS_S) -> WetwareError:
    """Call until it is refused; the refusal."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await call()
            except WetwareError as exc:
                return exc
            await asyncio.sleep(0.02)


# --- what works, and how it ends ---


async def test_a_member_publishes_is_revoked_and_is_refused(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    session = await granted(chain, node, cluster)
    async with wetware.connect(node.addr, signer=SessionSigner(session)) as live:
        assert live.identity.principal == f"evm:31337:{ALICE.address}"
        assert live.identity.roles == ("member",)
        topic = await live.pubsub.join("chat")
        await topic.publish(b"hello")
        chain.send("revoke", word(SCOPE), word("member"), ALICE.address)
        gone = await ends(lambda: topic.publish(b"still here"))
        assert gone.code.startswith("capability.revoked"), gone
        assert "the contract withdraws member" in gone.message
    with pytest.raises(LoginRefused) as caught:
        async with wetware.connect(node.addr, signer=SessionSigner(session)):
            pass
    assert caught.value.status is LoginStatus.NO_ROLE


async def test_the_command_line_uses_the_session_on_disk(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    home = node.home
    before = home.ww("--node", node.addr, "services")
    assert before.returncode == 77
    assert "has no session in the cluster" in before.stderr
    assert "ww auth evm login" in before.stderr
    await granted(chain, node, cluster, BOB)
    chain.log_in(home.path, BOB, cluster)
    after = home.ww("--node", node.addr, "services", check=True)
    assert "pubsub" in after.stdout
    assert "auth_evm" not in after.stdout


async def test_a_session_ends_at_its_time(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    await granted(chain, node, cluster)
    short = chain.session(ALICE, cluster, seconds=3)
    started = time.monotonic()
    async with wetware.connect(node.addr, signer=SessionSigner(short)) as live:
        topic = await live.pubsub.join("chat")
        gone = await ends(lambda: topic.publish(b"x"))
        assert gone.code.startswith("capability.expired"), gone
    assert time.monotonic() - started > 1.0
    with pytest.raises(AuthError, match="has expired"):
        async with wetware.connect(node.addr, signer=SessionSigner(short)):
            pass
    never = SessionSigner(short, now=lambda: 0.0)  # a client that does not look at its clock
    with pytest.raises(LoginRefused) as caught:
        async with wetware.connect(node.addr, signer=never):
            pass
    assert caught.value.status is LoginStatus.EXPIRED


async def test_revoke_all_and_a_new_grant_end_the_live_session_and_its_key(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    session = await granted(chain, node, cluster)
    async with wetware.connect(node.addr, signer=SessionSigner(session)) as live:
        topic = await live.pubsub.join("chat")
        await topic.publish(b"x")
        chain.send("revokeAll", ALICE.address)
        chain.grant(ALICE.address)
        gone = await ends(lambda: topic.publish(b"x"))
        assert gone.code.startswith("capability.revoked"), gone
    await gets_in(node, chain.session(ALICE, cluster))
    with pytest.raises(LoginRefused) as caught:
        async with wetware.connect(node.addr, signer=SessionSigner(session)):
            pass
    assert caught.value.status is LoginStatus.EXPIRED


async def test_owners_that_rotate_end_the_live_session_of_a_contract_wallet(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    from eth_abi.abi import encode
    from eth_utils.crypto import keccak

    wallet = chain.wallet(ALICE)
    session = await granted(chain, node, cluster, account=wallet)
    async with wetware.connect(node.addr, signer=SessionSigner(session)) as live:
        assert live.identity.principal == f"evm:31337:{wallet}"
        topic = await live.pubsub.join("chat")
        await topic.publish(b"x")
        data = keccak(b"setOwner(address,bool)")[:4]
        chain.transact(wallet, data + encode(["address", "bool"], [ALICE.address, False]))
        gone = await ends(lambda: topic.publish(b"x"))
        assert "no longer holds good" in gone.message
    with pytest.raises(LoginRefused) as caught:
        async with wetware.connect(node.addr, signer=SessionSigner(session)):
            pass
    assert caught.value.status is LoginStatus.BAD_SIGNATURE


async def test_a_chain_that_is_silent_suspends_and_resumes(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    session = await granted(chain, node, cluster)
    async with wetware.connect(node.addr, signer=SessionSigner(session)) as live:
        topic = await live.pubsub.join("chat")
        await topic.publish(b"x")
        with chain.frozen():
            away = await ends(lambda: topic.publish(b"x"))
            assert away.code == "capability.suspended"
            assert "no block was verified" in away.message
            with pytest.raises(LoginRefused) as caught:
                async with wetware.connect(node.addr, signer=SessionSigner(session)):
                    pass
            assert caught.value.status is LoginStatus.BACKEND_UNAVAILABLE
        async with asyncio.timeout(60):
            while True:
                try:
                    await topic.publish(b"back")
                    break
                except CapabilityError as exc:
                    assert exc.code == "capability.suspended"  # noqa: PT017  # until it is over
                await asyncio.sleep(0.05)


async def test_a_bound_key_of_a_machine(chain: LiveChain, node: NodeProcess) -> None:
    key = Key.generate()
    chain.grant(BOB.address)
    expiry = int(time.time()) + 3600
    chain.send("bindKey", word(SCOPE), [word("member")], key.public, expiry, sender=BOB.address)
    signer = BoundKeySigner(key)
    async with asyncio.timeout(ENDS_S):
        while True:
            try:
                async with wetware.connect(node.addr, signer=signer) as live:
                    assert live.identity.principal == f"evm:31337:{BOB.address}/{key.peer_id}"
                    break
            except LoginRefused as exc:
                assert exc.status is LoginStatus.UNKNOWN_PRINCIPAL  # noqa: PT017  # not yet
            await asyncio.sleep(0.05)


async def test_an_operator_asks_what_the_node_knows(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    chain.grant(ALICE.address, "operator")
    session = chain.session(ALICE, cluster, ("operator",))
    await gets_in(node, session)
    async with wetware.connect(node.addr, signer=SessionSigner(session)) as live:
        evm = EvmAuth(await live.open("auth_evm", EvmAuth.INTERFACE))
        status = await evm.status()
        assert status["chain_id"] == 31337
        assert status["contract"] == chain.contract.lower()
        assert (status["suspended"], status["regressed"], status["fault"]) == ("", False, "")
        assert [each["name"] for each in status["endpoints"]] == [chain.url]
        assert status["endpoints"][0]["available"]
        records = await evm.list()
        mine = [r for r in records if (r["account"], r["role"]) == (ALICE.address, "operator")]
        assert len(mine) == 1
        assert (mine[0]["rights"], mine[0]["configured"], mine[0]["root"]) == ("0x1", True, False)
        allowed = await evm.explain(ALICE.address, "operator")
        assert (allowed["allowed"], allowed["role"]) == (True, "operator")
        assert allowed["services"] == ["*: *"]
        denied = await evm.explain(MALLORY.address, "operator")
        assert not denied["allowed"]
        assert any("mask is 0x0" in step for step in denied["steps"])
        unknown = await evm.explain(ALICE.address, "pilot")
        assert any("has no role 'pilot'" in step for step in unknown["steps"])
        with pytest.raises(WetwareError, match="is not an address"):
            await evm.explain("Alice", "operator")
        with pytest.raises(WetwareError, match="1 to 32 bytes"):
            await evm.explain(ALICE.address, "")


# --- over a restart ---


@pytest.mark.parametrize("anew", [False, True], ids=["as it was", "revoked and granted anew"])
async def test_what_was_shared_comes_back_with_the_role_that_it_hangs_on(
    chain: LiveChain, tmp_path: Path, anew: bool
) -> None:
    """A node that starts without its chain keeps it; one that missed a revocation does not."""
    with Home(tmp_path) as home:
        configure(home, chain.toml())
        with home.node("n") as node:
            session = await granted(chain, node, str(node.info["cluster"]), BOB)
            async with wetware.connect(node.addr, signer=SessionSigner(session)) as live:
                ref, _ = await live.share({"pubsub": ["*"]})
        if anew:
            chain.send("revoke", word(SCOPE), word("member"), BOB.address)
            chain.grant(BOB.address)
        port = node.addr.partition("/tcp/")[2].partition("/")[0]
        listen = f"/ip4/127.0.0.1/tcp/{port}"  # the reference names the address
        frozen = contextlib.nullcontext() if anew else chain.frozen()
        with frozen:
            node = home.start_node("n", listen=listen)
            node.wait_ready()
        try:

            async def redeem() -> bool:
                async with wetware.connect(ref) as shared:
                    await (await shared.pubsub.join("chat")).publish(b"x")
                return True

            if anew:
                gone = await ends(redeem)
                assert gone.code.startswith("capability.revoked"), gone
            else:
                async with asyncio.timeout(60):
                    while True:
                        try:
                            assert await redeem()
                            break
                        except CapabilityError as exc:
                            assert exc.code == "capability.suspended", exc  # noqa: PT017
                        await asyncio.sleep(0.05)
        finally:
            node.stop()


def test_an_operator_lets_a_node_forget(chain: LiveChain, tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        configure(home, chain.toml())
        none = home.ww("auth", "evm", "forget")
        assert none.returncode == 1
        assert "no node with this auth backend" in none.stderr
        with home.node("n") as node:
            refused = node.ww("auth", "evm", "forget")
            assert refused.returncode == 2
            assert "there is nothing to forget" in refused.stderr
            done = node.ww("auth", "evm", "forget", "--force", check=True)
            assert "anew" in done.stderr
            node.wait_log("replica.forgotten")
            node.wait_log("auth_evm.resumed")


# --- relay and replay ---


class Careless(rpc.Servant, interface=CORE.Signer):
    """Signs what it is asked, as `change` makes it, or shows a proof of before."""

    def __init__(
        self,
        session: StoredSession,
        change: Callable[[Challenge], Challenge] = lambda challenge: challenge,
        proof: Proof | None = None,
    ) -> None:
        self.session, self.change, self.proof = session, change, proof
        self.sent: Proof | None = None

    async def sign(self, challenge: bytes) -> dict[str, object]:
        asked = self.change(Challenge.from_signed_bytes(challenge))
        shown = self.session.proof
        answer = self.session.key.sign(session_statement(asked, shown.digest))
        payload = dataclasses.replace(shown, answer=answer).encode()
        self.sent = self.proof or Proof(SESSION_SCHEME, payload, asked.signed_bytes())
        return {"proof": to_struct(self.sent)}


@contextlib.asynccontextmanager
async def gate_of(addr: str) -> AsyncIterator[rpc.Ref]:
    target = Multiaddr.parse(addr)
    async with rpc.runtime(), LinkHost(Key.generate()) as host:
        link = await host.dial([target], peer=target.peer)
        connection = await rpc.connect(RpcPipe(await link.open_stream(GATE_PROTOCOL)))
        try:
            yield connection.bootstrap(CORE.Gate)
        finally:
            await connection.aclose()


async def attempt(gate: rpc.Ref, signer: rpc.Servant) -> LoginStatus:
    terminal = (await gate.call("terminal"))["terminal"]
    reply = await terminal.call("login", signer=signer)
    status = LoginStatus(reply["status"])
    assert (reply["session"] is not None) == (status is LoginStatus.GRANTED)
    return status


async def test_a_replayed_proof(chain: LiveChain, node: NodeProcess, cluster: str) -> None:
    session = await granted(chain, node, cluster)
    async with gate_of(node.addr) as gate:
        first = Careless(session)
        assert await attempt(gate, first) is LoginStatus.GRANTED
        assert await attempt(gate, Careless(session, proof=first.sent)) is LoginStatus.REPLAYED
    async with gate_of(node.addr) as gate:
        again = await attempt(gate, Careless(session, proof=first.sent))
        assert again is LoginStatus.REPLAYED


async def test_a_proof_that_was_relayed_from_another_node(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    """Whatever the relay makes of the challenge: what was signed for there is no use here."""
    session = await granted(chain, node, cluster)
    relay = Key.generate().peer_id
    changes: tuple[tuple[Callable[[Challenge], Challenge], LoginStatus], ...] = (
        (lambda c: dataclasses.replace(c, verifier=relay), LoginStatus.WRONG_VERIFIER),
        (
            lambda c: dataclasses.replace(c, channel=Channel("noise", bytes(32))),
            LoginStatus.WRONG_CHANNEL,
        ),
        (lambda c: dataclasses.replace(c, cluster="d2" * 16), LoginStatus.WRONG_CLUSTER),
    )
    async with gate_of(node.addr) as gate:
        for change, status in changes:
            assert await attempt(gate, Careless(session, change)) is status


async def test_a_relay_between_a_user_and_a_node(
    chain: LiveChain, node: NodeProcess, cluster: str
) -> None:
    """The user means to log in to the relay, which asks them what the node asks it."""
    session = await granted(chain, node, cluster)
    statuses: list[LoginStatus] = []

    async def serve(stream: Stream) -> None:
        class Terminal(rpc.Servant, interface=CORE.Terminal):
            async def login(self, signer: rpc.Ref | None) -> dict[str, object]:
                assert signer is not None

                class Forward(rpc.Servant, interface=CORE.Signer):
                    async def sign(self, challenge: bytes) -> dict[str, object]:
                        wanted = dataclasses.replace(
                            Challenge.from_signed_bytes(challenge),
                            verifier=host.peer_id,
                            channel=Channel("noise", stream.connection.channel_binding),
                        )
                        reply = await signer.call("sign", challenge=wanted.signed_bytes())
                        return {"proof": dict(reply["proof"])}

                async with gate_of(node.addr) as gate:
                    statuses.append(await attempt(gate, Forward()))
                return {"status": "badSignature", "reason": "relayed"}

        class Gate(rpc.Servant, interface=CORE.Gate):
            async def terminal(self) -> dict[str, object]:
                return {"terminal": Terminal()}

            async def redeem(self, id: bytes, secret: bytes) -> dict[str, object]:
                raise NotImplementedError

            async def describe(self, id: bytes, secret: bytes) -> dict[str, object]:
                raise NotImplementedError

            async def peer(self) -> dict[str, object]:
                raise NotImplementedError

        await rpc.serve(RpcPipe(stream), Gate())

    async with rpc.runtime(), LinkHost(Key.generate()) as host:
        host.handle(GATE_PROTOCOL, serve, access=Access.PUBLIC)
        (addr,) = await host.listen([Multiaddr.parse("/ip4/127.0.0.1/tcp/0")])
        with pytest.raises(LoginRefused):
            async with wetware.connect(
                str(addr.with_peer(host.peer_id)), signer=SessionSigner(session)
            ):
                pass
    assert statuses == [LoginStatus.WRONG_VERIFIER]


# --- how a node starts ---


def start_fails(home: Home, *args: str) -> str:
    node = home.start_node(args=args)
    code = node.process.wait(60)
    log = node.log.read_text()
    assert code == EXIT_CONFIG, log
    return log


@pytest.mark.parametrize(
    ("text", "said", "next_"),
    [
        ("[plugins.auth_evm]\nscope = 'team'", "is not complete", "chain_id, contract, endpoints"),
        ("[plugins.auth_evm]\nchain_id = 1", "is not complete", "contract"),
        ("[plugins.auth_evm.roles.a]\nservices = { pubsub = ['*'] }", "is not complete", "set "),
        (
            "[plugins.auth_evm]\nchain_id = 1\ncontract = '0x" + "11" * 20 + "'\n"
            "endpoints = ['https://e.example']",
            "1 endpoints, where 3",
            "set quorum = 1",
        ),
        ("[plugins.auth_evm]\nchain = 1", "chain", "chain_id"),
    ],
)
def test_a_partial_configuration_stops_the_start(
    tmp_path: Path, text: str, said: str, next_: str
) -> None:
    with Home(tmp_path) as home:
        configure(home, text)
        log = start_fails(home)
        assert said in log
        assert next_ in log
        assert not list(tmp_path.glob("**/dev.json"))  # no try-out in its place


def test_another_chain_or_contract_stops_the_start(chain: LiveChain, tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        configure(home, chain.toml(chain_id=31338))
        assert "serve chain 31337, and 31338 is configured" in start_fails(home)
        configure(home, chain.toml(contract=ALICE.address))
        assert "there is no contract at" in start_fails(home)


def test_an_earlier_configuration_is_not_replaced_by_a_try_out(
    chain: LiveChain, tmp_path: Path
) -> None:
    with Home(tmp_path) as home:
        configure(home, chain.toml())
        with home.node("n"):
            pass
        configure(home, "")
        node = home.start_node("n")
        assert node.process.wait(60) == EXIT_CONFIG
        log = node.log.read_text()
        assert "a try-out never takes its place" in log
        assert "set [plugins.auth_evm]" in log


def test_a_node_starts_suspended_without_its_chain(tmp_path: Path) -> None:
    with live_chain() as chain, Home(tmp_path) as home:
        configure(home, chain.toml())
        with home.node("n") as healthy:
            assert "auth_evm.suspended" not in healthy.log.read_text()
        with chain.frozen(), home.node("n") as node:
            node.wait_log("auth_evm.suspended")
            assert node.stop(signal.SIGTERM) == 0


async def test_nodes_are_let_in_by_the_contract(chain: LiveChain, tmp_path: Path) -> None:
    """A certificate of the cluster alone is not enough: both ends ask the contract."""
    with Home(tmp_path / "a") as one, Home(tmp_path / "b") as two, contextlib.ExitStack() as stack:
        configure(one, chain.toml())
        a = stack.enter_context(one.node("n"))
        # b needs endpoints alone; the rest comes with the ticket.
        configure(
            two,
            "[plugins.auth_evm]\n"
            f"endpoints = {json.dumps([chain.url])}\nquorum = 1\nfinality = 'dev'\npoll_s = 0.1\n"
            "[plugins.auth_evm.roles.member]\nservices = { pubsub = ['*'] }\n",
        )
        chain.grant(ALICE.address, "operator")
        operator = chain.log_in(one.path, ALICE, str(a.info["cluster"]), roles=("operator",))
        await gets_in(a, operator)
        peer = two.node_id("n")
        refused = two.start_node("n", join=a.invite())
        assert refused.process.wait(60) != 0
        assert "vetoed" in refused.log.read_text() or "auth backend" in refused.log.read_text()

        chain.grant(OPERATOR := BOB.address, "node")
        expiry = int(time.time()) + 3600
        for each in (a.peer_id, peer):
            key = PeerId.parse(each).public_key
            chain.send("bindKey", word(SCOPE), [word("node")], key, expiry, sender=OPERATOR)
        b = stack.enter_context(two.node("n", join=a.invite()))
        a.wait_members([b.peer_id])
        chain.grant(ALICE.address)
        member = chain.session(ALICE, str(a.info["cluster"]))
        await gets_in(b, member)


def test_doctor_says_what_is_wrong(chain: LiveChain, tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        configure(home, chain.toml())
        with home.node("n") as node:
            chain.grant(ALICE.address, "operator")
            chain.grant(ALICE.address, "pilot")
            chain.log_in(home.path, ALICE, str(node.info["cluster"]), roles=("operator",))

            def found() -> str:
                done = node.ww("doctor", "--json")
                return done.stdout if "pilot" in done.stdout else ""

            text = wait_for(found, "doctor's word about the role `pilot`")
            assert "any single endpoint decides" in text
            assert "does not know: pilot" in text
