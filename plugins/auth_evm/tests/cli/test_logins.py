"""login with a wallet file, with wallets elsewhere, with contract wallets; logout."""

from __future__ import annotations

import json
import stat
import time
from typing import Any

import pytest
from eth_abi.abi import encode
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from plugins.auth_evm.tests.cli.anvils import CLUSTER, Done, World, dead_url, invoke
from plugins.auth_evm.tests.login.contracts_of import creation_code

from wetware_auth_evm.cli.words import who
from wetware_auth_evm.login import session
from wetware_auth_evm.login.proofs import FORMS
from wetware_auth_evm.login.statements import SessionGrant, recover

OTHER = "cd" * 16


def login(world: World, *args: str, key: str | None = None, cluster: str = CLUSTER) -> Done:
    return world.run("login", "--cluster", cluster, *args, key=key)


def stored(name: str = "default", cluster: str = CLUSTER) -> session.StoredSession:
    found = session.load(name, cluster)
    assert found is not None
    return found


@pytest.fixture
def holder(world: World) -> World:
    """`ada` holds a and b."""
    for role in ("a", "b"):
        world.ok("grant", role, world.address("ada"))
    return world


# --- with the key file ----------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "form"), [((), "eip712"), (("--eip4361",), "eip4361")])
def test_the_wallet_file_signs(holder: World, option: tuple[str, ...], form: str) -> None:
    before = time.time()
    done = login(holder, *option, key="ada")
    assert done.code == 0, done.says
    assert f"{holder.address('ada')} is logged in to the cluster {CLUSTER} with a, b" in done.out
    found = stored("ada")
    grant = found.grant
    assert (found.form, grant.roles) == (form, ("a", "b"))
    assert grant.epochs == holder.call("epochs", grant.scope, grant.account)
    assert abs(grant.expires_at - before - 86_400) < 60
    assert (grant.chain_id, grant.contract) == (holder.anvil.chain_id, holder.contract)
    assert recover(found.proof.digest, found.signature) == holder.person("ada").address
    assert found.key.peer_id == grant.session_key
    path = session.session_path("ada", CLUSTER)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # A second one takes its place.
    assert login(holder, "--roles", "b", "--hours", "1", key="ada").code == 0
    again = stored("ada").grant
    assert again.roles == ("b",)
    assert again.expires_at - again.issued_at == 3600
    assert again.session_key != grant.session_key


def test_the_session_carries_the_epochs_of_now(holder: World) -> None:
    holder.ok("revoke-all", holder.address("ada"), "--yes")
    holder.ok("grant", "a", holder.address("ada"))
    assert login(holder, key="ada").code == 0
    assert stored("ada").grant.epochs[2] == 4


def test_a_login_of_json(holder: World) -> None:
    found = login(holder, "--json", key="ada").json
    assert found["account"] == holder.address("ada")
    assert found["roles"] == ["a", "b"]
    assert found["form"] in FORMS


@pytest.mark.parametrize(
    ("roles", "name", "says"),
    [
        ("", "eve", "does not hold any role in the scope default"),
        ("a,c", "ada", "does not hold c in the scope default"),
        ("node", "ada", "does not hold node"),
    ],
)
def test_who_holds_nothing_cannot_log_in(holder: World, roles: str, name: str, says: str) -> None:
    holder.ok("grant", "node", holder.address("ada"))
    holder.person("eve")
    done = login(holder, *(["--roles", roles] if roles else []), key=name)
    assert done.code == 77
    assert says in done.says
    assert "ww auth evm grant" in done.says
    assert session.load(name, CLUSTER) is None


def test_while_paused_nobody_logs_in(holder: World) -> None:
    holder.ok("pause", "--yes")
    done = login(holder, key="ada")
    assert done.code == 77
    assert "unpause" in done.says


def test_what_is_missing_for_a_login_is_named(holder: World) -> None:
    assert "of which cluster" in holder.run("login", key="ada").says
    assert "not the ID of a cluster" in login(holder, key="ada", cluster="x").says
    assert "new-key" in login(holder, key="nobody").says
    assert "no cluster's scope" in login(holder, "--scope", "ROOT", key="ada").says
    assert login(holder, "--hours", "25", key="ada").code == 2
    holder.urls = [dead_url()]
    assert login(holder, key="ada").code == 69


def test_an_encrypted_wallet_signs_with_its_passphrase(
    holder: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wetware_auth_evm.login import wallets

    wallets.save("sealed", holder.person("ada"), passphrase="p")
    refused = login(holder, key="sealed")
    assert refused.code == 78
    assert "WW_PASSPHRASE" in refused.says
    monkeypatch.setenv("WW_PASSPHRASE", "wrong")
    assert "wrong passphrase" in login(holder, key="sealed").says
    monkeypatch.setenv("WW_PASSPHRASE", "p")
    assert login(holder, key="sealed").code == 0


# --- with a wallet elsewhere ----------------------------------------------------------------------


def sign_typed(world: World, name: str, document: dict[str, Any]) -> str:
    """As another program does it, from the JSON alone."""
    message = encode_typed_data(full_message=document)
    return "0x" + bytes(Account.sign_message(message, world.person(name).secret).signature).hex()


def sign_text(world: World, name: str, text: str) -> str:
    message = encode_defunct(text=text)
    return "0x" + bytes(Account.sign_message(message, world.person(name).secret).signature).hex()


def test_typed_data_is_signed_elsewhere(holder: World) -> None:
    done = login(holder, "--wallet-address", holder.address("ada"))
    assert done.code == 0, done.says
    assert "eth_signTypedData_v4" in done.err
    assert "ww auth evm login --signature 0x…" in done.err
    assert session.load("default", CLUSTER) is None
    path = session.directory() / f"default@{CLUSTER}.pending"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    given = login(holder, "--signature", sign_typed(holder, "ada", done.json))
    assert given.code == 0, given.says
    found = stored()
    assert found.form == "eip712"
    assert found.grant.account == holder.person("ada").address
    assert not path.exists()
    again = login(holder, "--signature", "0x" + found.signature.hex())
    assert "nothing of default waits for a signature" in again.says


def test_the_text_is_signed_elsewhere(holder: World) -> None:
    done = login(holder, "--wallet-address", holder.address("ada"), "--eip4361")
    text = done.out.removesuffix("\n")
    assert SessionGrant.parse_text(text).account == holder.person("ada").address
    assert text == login_text(holder)
    given = login(holder, "--signature", sign_text(holder, "ada", text))
    assert given.code == 0, given.says
    assert stored().form == "eip4361"


def login_text(world: World) -> str:
    waits = session.load("default", CLUSTER, pending=True)
    assert waits is not None
    return waits.grant.text()


def test_a_hardware_wallet_s_v_of_0_or_1_is_taken(holder: World) -> None:
    done = login(holder, "--wallet-address", holder.address("ada"))
    signature = bytes.fromhex(sign_typed(holder, "ada", done.json)[2:])
    old = signature[:64] + bytes([signature[64] - 27])
    assert login(holder, "--signature", old.hex()).code == 0
    assert stored().signature == signature


def test_a_signature_of_something_else_is_refused_and_can_be_given_again(holder: World) -> None:
    address = holder.address("ada")
    done = login(holder, "--wallet-address", address)
    right = sign_typed(holder, "ada", done.json)
    high = bytes.fromhex(right[2:])
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    s = (order - int.from_bytes(high[32:64], "big")).to_bytes(32, "big")
    wider = json.loads(json.dumps(done.json))
    wider["message"]["roles"].append("z")
    for wrong, says in (
        (sign_typed(holder, "eve", done.json), holder.address("eve")),
        (sign_typed(holder, "ada", wider), "of another text"),
        (sign_text(holder, "ada", login_text(holder)), "of another text"),
        ((high[:32] + s + bytes([55 - high[64]])).hex(), "upper half"),
        (right[:-2], "65 bytes"),
    ):
        refused = login(holder, "--signature", wrong)
        assert refused.code == 77, refused.says
        assert says in refused.says
        assert session.load("default", CLUSTER) is None
    assert login(holder, "--signature", "0xzz").code == 2
    assert login(holder, "--signature", right).code == 0


def test_a_signature_of_an_earlier_offer_is_refused(holder: World) -> None:
    first = login(holder, "--wallet-address", holder.address("ada")).json
    login(holder, "--wallet-address", holder.address("ada"))
    assert login(holder, "--signature", sign_typed(holder, "ada", first)).code == 77


def test_what_is_given_with_a_signature_is_not_changed(holder: World) -> None:
    done = login(holder, "--wallet-address", holder.address("ada"))
    signature = sign_typed(holder, "ada", done.json)
    for option in (["--roles", "a"], ["--eip4361"], ["--wallet-address", holder.address("eve")]):
        assert login(holder, "--signature", signature, *option).code == 2
    wanted = ["--signature", signature, "--wallet-address", holder.address("ada")]
    assert login(holder, *wanted).code == 0


def test_an_expired_offer_is_refused(holder: World, monkeypatch: pytest.MonkeyPatch) -> None:
    done = login(holder, "--wallet-address", holder.address("ada"), "--hours", "1")
    signature = sign_typed(holder, "ada", done.json)
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    refused = login(holder, "--signature", signature)
    assert refused.code == 77
    assert "has expired" in refused.says


# --- contract wallets -----------------------------------------------------------------------------


def contract_wallet(world: World, kind: str, *args: Any) -> bytes:
    code = creation_code(kind) + (encode(["address"], args) if args else b"")
    receipt = world.anvil.send(world.person("default").address, None, code)
    address = bytes.fromhex(receipt["contractAddress"][2:])
    world.ok("grant", "a", who(address))
    return address


def test_a_contract_wallet_logs_in_by_its_owner_s_signature(world: World) -> None:
    safe = contract_wallet(world, "OwnersWallet", world.address("ada"))
    done = login(world, "--wallet-address", who(safe))
    given = login(world, "--signature", sign_typed(world, "ada", done.json))
    assert given.code == 0, given.says
    assert (stored().form, stored().grant.account) == ("erc1271", safe)


def test_a_contract_wallet_s_owner_signs_with_the_file(world: World) -> None:
    safe = contract_wallet(world, "OwnersWallet", world.address("ada"))
    done = login(world, "--wallet-address", who(safe), "--sign-with-file", key="ada")
    assert done.code == 0, done.says
    assert stored("ada").form == "erc1271"
    world.person("eve")
    stranger = login(world, "--wallet-address", who(safe), "--sign-with-file", key="eve")
    assert stranger.code == 77
    assert "does not hold this signature good" in stranger.says


@pytest.mark.parametrize("kind", ["SaysNo", "Loops"])
def test_a_contract_wallet_that_does_not_hold_it_good(world: World, kind: str) -> None:
    wallet = contract_wallet(world, kind)
    done = login(world, "--wallet-address", who(wallet))
    given = login(world, "--signature", sign_typed(world, "ada", done.json))
    assert given.code == 77, given.says
    assert "does not hold this signature good" in given.says
    assert session.load("default", CLUSTER) is None


def test_a_contract_wallet_signs_no_text(world: World) -> None:
    wallet = contract_wallet(world, "SaysYes")
    done = login(world, "--wallet-address", who(wallet), "--eip4361")
    assert done.code == 77
    assert "typed data (EIP-712) only" in done.says
    assert done.out == "", "its owners would sign in vain"

    account = world.address("ada")  # a wallet that is deployed after the text was printed
    world.ok("grant", "a", account)
    login(world, "--wallet-address", account, "--eip4361")
    world.anvil.rpc("anvil_setCode", account, world.anvil.rpc("eth_getCode", who(wallet), "latest"))
    given = login(world, "--signature", "0x" + "11" * 65)
    assert given.code == 77
    assert "typed data (EIP-712) only" in given.says


def test_an_account_with_delegated_code_logs_in_by_its_key(world: World) -> None:
    """EIP-7702: it has code, and its key still signs."""
    world.ok("grant", "a", world.address("ada"))
    code = "0xef0100" + world.contract.hex()
    world.anvil.rpc("anvil_setCode", world.address("ada"), code)
    assert login(world, key="ada").code == 0
    assert stored("ada").form == "eip712"
    assert login(world, "--eip4361", key="ada").code == 0
    assert stored("ada").form == "eip4361"


# --- logout ---------------------------------------------------------------------------------------


def test_logout_forgets_the_session(holder: World) -> None:
    login(holder, key="ada")
    done = invoke("logout", key="ada")
    assert "1 session forgotten" in done.err
    assert session.load("ada", CLUSTER) is None
    assert "logged in nowhere" in invoke("logout", key="ada").err


def test_logout_of_several_clusters_has_to_be_told_which(holder: World) -> None:
    for cluster in (CLUSTER, OTHER):
        assert login(holder, key="ada", cluster=cluster).code == 0
    refused = invoke("logout", key="ada")
    assert refused.code == 2
    assert CLUSTER in refused.says
    invoke("logout", "--cluster", OTHER, key="ada")
    assert session.load("ada", OTHER) is None
    stored("ada")
    login(holder, "--wallet-address", holder.address("ada"), key="ada", cluster=OTHER)
    assert invoke("logout", "--all", key="ada").code == 0
    assert not list(session.directory().glob("*"))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"v":1}', "[" * 9_000])
def test_a_damaged_offer_says_how_to_go_on(holder: World, text: str) -> None:
    login(holder, "--wallet-address", holder.address("ada"))
    path = session.directory() / f"default@{CLUSTER}.pending"
    path.write_text(text)
    done = login(holder, "--signature", "0x" + "11" * 65)
    assert done.code == 78
    assert "damaged" in done.says


def test_no_secret_is_printed(holder: World) -> None:
    secret = holder.person("ada").secret.hex()
    for done in (
        login(holder, key="ada"),
        login(holder, "--wallet-address", holder.address("ada"), key="ada"),
        login(holder, "--json", key="ada"),
    ):
        seed = stored("ada").key.seed.hex()
        assert secret not in done.says
        assert seed not in done.says
