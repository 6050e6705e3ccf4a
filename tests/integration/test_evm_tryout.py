"""Roles in a contract, from an empty home, all through `ww`: a try-out, and a real chain."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("eth_account", reason="needs the extra: pip install 'wetware[evm]'")

from wetware.testing import Home, NodeProcess, wait_for
from wetware_auth_evm.dev.anvil import find_anvil
from wetware_auth_evm.dev.process import call

CONTRACTS = Path(__file__).parents[2] / "plugins/auth_evm/contracts"
INSTALL = "npm ci --no-audit --no-fund --prefix plugins/auth_evm/contracts"
CUT_S_MAX = 5.0
"""From the transaction's end to that of a live subscription; the poll is 0.25 s."""


def _anvil() -> Path:
    for installed in CONTRACTS.glob("node_modules/@foundry-rs/anvil-*/bin/anvil"):
        return installed
    found = find_anvil()
    if found is None:
        pytest.skip(f"anvil is not installed; run: {INSTALL}")
    return found


@pytest.fixture(params=[pytest.param("anvil", marks=pytest.mark.long), "eth-tester"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    """An empty home, with anvil and without."""
    anvil = str(_anvil()) if request.param == "anvil" else "none"
    with Home(tmp_path / "home", env={"WW_ANVIL": anvil}) as made:
        yield made


class As:
    """`ww` as one wallet, at one node."""

    def __init__(self, home: Home, node: NodeProcess, wallet: str) -> None:
        self._home = home
        self._args = ("--data-dir", str(node.data_dir), "--key", wallet)
        self._node = node

    def __call__(self, *args: str, code: int = 0) -> str:
        done = self._home.ww(*self._args, *args)
        assert done.returncode == code, (args, done.stdout, done.stderr, self._node.log.read_text())
        return done.stdout + done.stderr if code else done.stdout

    def logs_in(self, *roles: str) -> None:
        """Until the node has seen the grants, which are mined: it looks at the chain at times."""
        self("auth", "evm", "login")

        def known() -> bool:
            who = self._home.ww(*self._args, "whoami").stdout
            return all(role in who.partition("node")[0] for role in roles)

        wait_for(known, f"{roles} at the node", within_s=60)

    def subscribe(self, topic: str) -> Listener:
        return Listener(self._home.start_ww(*self._args, "sub", topic))

    def publishes_to(self, listener: Listener, topic: str, text: str) -> None:
        """Until it is heard: a subscription begins some time after its command."""
        wait_for(
            lambda: self("pub", topic, text) == "" and text in listener.lines,
            f"{text!r} on {topic}",
        )


class Listener:
    """A running `ww sub`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.strip())

    def ended(self, within_s: float) -> tuple[int, str]:
        """(exit code, what it said); AssertionError if it goes on."""
        code = self._process.wait(within_s)
        assert self._process.stderr is not None
        return code, self._process.stderr.read()

    @property
    def lives(self) -> bool:
        return self._process.poll() is None


# --- the try-out ----------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_from_an_empty_home_a_role_is_given_used_and_taken(home: Home) -> None:
    """README's command, then: log in, grant to a second wallet, it publishes, revoke, refused."""
    with home.node("n", args=("--auth", "evm", "--dev")) as node:
        owner, ada = As(home, node, "default"), As(home, node, "ada")
        owner("auth", "evm", "login")
        assert re.search(r"^roles +admin$", owner("whoami"), re.MULTILINE)
        # No key of another backend is looked for: that is not where this cluster's users are.
        added = node.ww("user", "add", "bob", "--key", "bob").stderr
        assert "auth backend is 'evm'" in added
        assert "auth evm grant ROLE ADDRESS" in added
        address = json.loads(home.ww("auth", "evm", "new-key", "ada", "--json", check=True).stdout)[
            "address"
        ]

        # Nobody yet: neither a session nor a call.
        assert "does not hold any role" in ada("auth", "evm", "login", code=77)
        ada("pub", "chat", "early", code=77)

        owner("auth", "evm", "grant", "member", address)
        owner("auth", "evm", "grant", "reader", address)
        assert address in owner("auth", "evm", "list")
        ada.logs_in("member", "reader")
        who = ada("whoami")
        assert address in who
        assert "member" in who
        assert "reader" in who

        heard, hers = owner.subscribe("chat"), ada.subscribe("chat")
        ada.publishes_to(heard, "chat", "hello from ada")
        owner.publishes_to(hers, "chat", "hello to ada")
        for beyond in (["audit", "tail"], ["invite"]):
            ada(*beyond, code=77)

        # One role is taken: what rests on it ends, live; what rests on the other one goes on.
        started = time.monotonic()
        owner("auth", "evm", "revoke", "member", address)
        code, said = hers.ended(CUT_S_MAX)
        took_s = time.monotonic() - started
        print(f"revoke, mined and final, to a dead subscription: {took_s:.2f} s")  # noqa: T201
        assert code == 77, said
        assert "revoked" in said or "withdrawn" in said or "no longer" in said, said
        ada("pub", "chat", "too late", code=77)
        hers = ada.subscribe("chat")
        owner.publishes_to(hers, "chat", "still here")

        # The other one too: her session is dead, and there is no new one.
        owner("auth", "evm", "revoke", "reader", address)
        code, said = hers.ended(CUT_S_MAX)
        assert code == 77, said
        ada("sub", "chat", "--count", "1", code=77)
        assert "does not hold any role" in ada("auth", "evm", "login", code=77)
        assert heard.lives, "the owner's subscription has nothing to do with it"
        owner("pub", "chat", "bye")
        assert "too late" not in heard.lines

        # It is in the contract's history, and in the node's log of decisions.
        history = owner("auth", "evm", "audit")
        assert history.lower().count(address.lower()) >= 4
        records = map(json.loads, owner("audit", "tail", "--lines", "200", "--json").splitlines())
        withdrawn = [r["roles"] for r in records if r["event"] == "role.withdrawn"]
        assert withdrawn == ["member", "reader"]


@pytest.mark.long
@pytest.mark.timeout(180)
def test_what_was_revoked_while_the_node_was_down_stays_dead(home: Home) -> None:
    """A session that outlives a restart does not outlive its role."""
    with home.node("n", args=("--auth", "evm", "--dev")) as node:
        owner, ada = As(home, node, "default"), As(home, node, "ada")
        owner("auth", "evm", "login")
        made = home.ww("auth", "evm", "new-key", "ada", "--json", check=True)
        address = json.loads(made.stdout)["address"]
        owner("auth", "evm", "grant", "member", address)
        ada.logs_in("member")
        ada("pub", "chat", "x")
    # The chain alone, as `ww auth evm dev` runs it.
    chain = home.start_ww("--data-dir", str(node.data_dir), "auth", "evm", "dev")
    assert chain.stdout is not None
    assert chain.stdout.readline().startswith("http://127.0.0.1:")
    owner("auth", "evm", "revoke", "member", address)
    chain.terminate()
    chain.communicate(timeout=60)
    with home.node("n", args=("--auth", "evm")) as again:
        ada = As(home, again, "ada")
        ada("pub", "chat", "x", code=77)
        As(home, again, "default")("pub", "chat", "the owner's session still holds")


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_wallet_without_a_coin_can_bind_its_key(home: Home) -> None:
    """Gas costs nothing on a try-out's chain: nobody has to find out how to fund a wallet."""
    with home.node("n", args=("--auth", "evm", "--dev")) as node:
        owner, ada = As(home, node, "default"), As(home, node, "ada")
        owner("auth", "evm", "login")
        made = home.ww("auth", "evm", "new-key", "ada", "--json", check=True)
        owner("auth", "evm", "grant", "member", json.loads(made.stdout)["address"])
        peer = home.node_id("other")
        ada("auth", "evm", "bind-key", "member", "--peer", str(peer))
        assert str(peer) in owner("auth", "evm", "list")


# --- a real configuration -------------------------------------------------------------------------


@contextlib.contextmanager
def _chain(directory: Path) -> Iterator[int]:
    """An anvil that makes a block a second, with `finalized` two behind; its port."""
    process = subprocess.Popen(
        [str(_anvil()), "--host", "127.0.0.1", "--port", "0", "--chain-id", "31337",
         "--slots-in-an-epoch", "1", "--block-time", "1", "--accounts", "1"],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    found: queue.Queue[int] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"Listening on 127\.0\.0\.1:(\d+)", line):
                found.put(int(match[1]))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield found.get(timeout=30)
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        if process.stdout is not None:
            process.stdout.close()


FUNDED = "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"
"""anvil's first account: a key that everybody knows."""
SETTINGS = """\
finality = "finalized"
poll_s = 0.25
verified_s_max = 20
tip_age_s_max = 60

[plugins.auth_evm.roles.admin]
services = { "*" = ["*"] }
[plugins.auth_evm.roles.publisher]
services = { pubsub = ["PubSub.join", "Topic.publish"] }
where = ["pubsub/topic=glob:chat/*"]
[plugins.auth_evm.roles.subscriber]
services = { pubsub = ["PubSub.join", "Topic.subscribe", "Subscription.*"] }
where = ["pubsub/topic=glob:chat/*"]
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_real_configuration_on_three_nodes(tmp_path: Path) -> None:
    """Nodes are let in by keys bound on chain; a revocation ends sessions on every one of them."""
    env = {"WW_ADMISSION_VETO_RECHECK_S": "1"}
    with _chain(tmp_path) as port, Home(tmp_path / "home", env=env) as home:
        home.ww("auth", "evm", "import-key", "-", "--name", "default", input=FUNDED, check=True)
        home.ww("auth", "evm", "new-key", "ada", check=True)
        ada_address = home.ww("--key", "ada", "auth", "evm", "address", check=True).stdout.strip()
        owner_address = home.ww("auth", "evm", "address", check=True).stdout.strip()
        # One chain under three names: quorum 2, as in production.
        urls = [f"http://127.0.0.1:{port}", f"http://localhost:{port}", f"http://127.0.0.1:{port}/"]
        done = home.ww(
            "auth", "evm", "deploy", "--chain-id", "31337", "--rpc", urls[0], "--json", check=True
        )
        contract = json.loads(done.stdout)["contract"]
        config = home.path / ".wetware/ww.toml"
        config.write_text(
            f'[plugins.auth_evm]\nchain_id = 31337\ncontract = "{contract}"\n'
            f"endpoints = {json.dumps(urls)}\n{SETTINGS}"
        )

        def chain(*args: str) -> str:
            return home.ww("auth", "evm", *args, check=True).stdout

        chain("grant", "admin", owner_address)
        chain("grant", "node", owner_address)
        chain("grant", "publisher", ada_address)
        chain("grant", "subscriber", ada_address)
        ids = {name: str(home.node_id(name)) for name in ("a", "b", "c")}
        for name in ("a", "b"):
            chain("bind-key", "node", "--peer", ids[name])

        evm = ("--auth", "evm")
        with home.node("a", args=evm) as a:
            assert "TRY-OUT" not in a.log.read_text()
            owner = As(home, a, "default")
            owner("auth", "evm", "login")

            # c has a ticket, and no account that bound its key.
            stranger = home.start_node("c", join=a, args=evm)
            assert stranger.process.wait(60) != 0
            assert "does not let" in stranger.log.read_text()

            with home.node("b", join=a, args=evm) as b:
                b.wait_members([a.peer_id])
                _sessions_end_everywhere(home, a, b, chain, ada_address)

                # What let a node in is taken back: it is a member no more.
                chain("unbind-key", "node", "--peer", ids["b"])
                a.wait_log("vetoed", within_s=60)
                wait_for(
                    lambda: a.members().get(str(b.peer_id), {}).get("state") != "alive",
                    "b is out",
                    within_s=60,
                )

                # And c comes in, once its key is bound.
                chain("bind-key", "node", "--peer", ids["c"])
                with home.node("c", join=a, args=evm) as c:
                    c.wait_members([a.peer_id], within_s=60)


def _sessions_end_everywhere(
    home: Home, a: NodeProcess, b: NodeProcess, chain: object, ada_address: str
) -> None:
    assert callable(chain)
    at_a, at_b = As(home, a, "ada"), As(home, b, "ada")
    at_a("auth", "evm", "login")  # one session for the cluster: it is good at both
    first, second = at_a.subscribe("chat/x"), at_b.subscribe("chat/x")
    at_b.publishes_to(second, "chat/x", "here")
    at_a.publishes_to(first, "chat/x", "there")
    wait_for(lambda: "here" in first.lines or "there" in second.lines, "across nodes")
    for at in (at_a, at_b):  # the role's constraint holds
        at("pub", "other", "x", code=77)

    started = time.monotonic()
    chain("revoke", "subscriber", ada_address, "--wait", "mined")
    codes = [each.ended(30)[0] for each in (first, second)]
    took_s = time.monotonic() - started
    print(f"revoke mined, to the end on both nodes: {took_s:.2f} s")  # noqa: T201
    assert codes == [77, 77]
    # A withdrawal acts at first sight: the block was not final yet. The other role goes on.
    at_a("pub", "chat/x", "still")
    at_b("pub", "chat/x", "still")
    chain("revoke-all", ada_address, "--yes", "--wait", "mined")
    for at in (at_a, at_b):
        wait_for(lambda at=at: _refused(at), "the end of ada's session", within_s=60)


def _refused(at: As) -> bool:
    with contextlib.suppress(AssertionError):
        at("pub", "chat/x", "late", code=77)
        return True
    return False


def test_the_funded_key_is_the_one_that_anvil_has(tmp_path: Path) -> None:
    """Or the test above fails for another reason than it says."""
    with _chain(tmp_path) as port:
        (account,) = call(port, "eth_accounts")
        with Home(tmp_path / "home") as home:
            home.ww("auth", "evm", "import-key", "-", input=FUNDED, check=True)
            address = home.ww("auth", "evm", "address", check=True).stdout.strip()
        assert address.lower() == account.lower()
