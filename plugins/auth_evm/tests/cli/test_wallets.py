"""Wallet files: who may read them, what they may hold, and that other programs understand them."""

from __future__ import annotations

import json
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coincurve", reason="needs the extra: pip install 'wetware[evm]'")

from wetware.errors import InvalidArgument, KeyFileError
from wetware_auth_evm.login import wallets
from wetware_auth_evm.login.statements import recover
from wetware_auth_evm.login.wallets import Wallet

SECRET = bytes.fromhex("7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d")
ADDRESS = "008aeeda4d805471df9b2a5b0f38a0c3bcba786b"
# The two test vectors of the web3 secret storage definition; passphrase "testpassword".
VECTORS = [
    {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": "6087dab2f9fdbbfaddc31a909735c1e6"},
        "ciphertext": "5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46",
        "kdf": "pbkdf2",
        "kdfparams": {
            "c": 262144,
            "dklen": 32,
            "prf": "hmac-sha256",
            "salt": "ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd",
        },
        "mac": "517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2",
    },
    {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": "83dbcc02d8ccb40e466191a123791e0e"},
        "ciphertext": "d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c",
        "kdf": "scrypt",
        "kdfparams": {
            "dklen": 32,
            "n": 262144,
            "p": 8,
            "r": 1,
            "salt": "ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19",
        },
        "mac": "2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097",
    },
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WW_HOME", str(tmp_path / "home"))
    for name in ("WW_KEY", "WW_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def refused(code: str, **kwargs: Any) -> Any:
    return pytest.raises(KeyFileError, check=lambda exc: exc.code == code, **kwargs)


def test_a_wallet_is_made_once_and_private() -> None:
    made = wallets.load_or_create("ada")
    assert made.made
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.path.parent.stat().st_mode) == 0o700
    again = wallets.load_or_create("ada")
    assert not again.made
    assert again.address == made.address
    assert wallets.load("ada").address == made.address
    assert not list(made.path.parent.glob(".*"))
    with refused("key.exists", match="never overwritten"):
        wallets.create("ada")


def test_a_passphrase_encrypts_and_is_not_needed_for_the_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WW_PASSPHRASE", "correct horse")
    made = wallets.load_or_create("sealed")
    assert made.encrypted
    opened = made.open()
    assert opened.secret.hex() not in made.path.read_text()
    monkeypatch.delenv("WW_PASSPHRASE")
    assert wallets.get("sealed").address == opened.address
    with refused("key.passphrase", match="no passphrase"):
        wallets.load("sealed")
    with refused("key.passphrase", match="wrong passphrase"):
        wallets.load("sealed", passphrase=lambda: "battery")
    assert wallets.load("sealed", passphrase=lambda: "correct horse") == opened


def test_a_guess_at_a_passphrase_is_dear(monkeypatch: pytest.MonkeyPatch, scrypt_n: int) -> None:
    monkeypatch.setitem(wallets.encrypt.__kwdefaults__, "n", scrypt_n)
    monkeypatch.setenv("WW_PASSPHRASE", "correct horse")
    kept = json.loads(wallets.create("sealed", passphrase="correct horse").path.read_text())
    params = kept["crypto"]["kdfparams"]
    assert (params["n"], params["r"], params["p"]) == (1 << 18, 8, 1)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_touch_is_refused(mode: int) -> None:
    made = wallets.create("open")
    made.path.chmod(mode)
    with refused("key.mode", match="readable by others"):
        wallets.get("open")


def test_a_signature_is_the_account_s_and_low() -> None:
    wallet = Wallet.from_secret(SECRET)
    assert wallet.address.hex() == ADDRESS
    for number in range(64):
        digest = bytes([number]) * 32
        assert recover(digest, wallet.sign(digest)) == wallet.address


def test_the_key_is_not_shown() -> None:
    made = wallets.create("quiet")
    wallet = made.open()
    for text in (repr(made), repr(wallet), str(wallet), f"{made}"):
        assert wallet.secret.hex() not in text
        assert repr(wallet.secret) not in text
    with pytest.raises(TypeError):
        pickle.dumps(wallet)


@pytest.mark.parametrize("vector", VECTORS, ids=["pbkdf2", "scrypt"])
def test_the_definition_s_test_vectors(vector: dict[str, Any]) -> None:
    text = json.dumps({"Crypto": vector, "version": 3})  # as the first clients wrote it
    kept = wallets.import_("theirs", text, opened_by=lambda: "testpassword")
    assert kept.address.hex() == ADDRESS
    assert wallets.load("theirs", passphrase=lambda: "testpassword").secret == SECRET


def test_keystores_are_exchanged_with_eth_account() -> None:
    from eth_account import Account

    wallet = Wallet.from_secret(SECRET)
    ours = wallets.encrypt(wallet, "pass wörd", n=1 << 12)
    assert bytes(Account.decrypt(ours, "pass wörd")) == SECRET
    theirs = Account.encrypt(SECRET, "pass wörd", kdf="scrypt", iterations=1 << 12)
    kept = wallets.import_("theirs", json.dumps(theirs), opened_by=lambda: "pass wörd")
    assert kept.open(lambda: "pass wörd") == wallet


@pytest.mark.parametrize("prefix", ["", "0x", "  0x"])
def test_hex_is_imported_and_encrypted_where_there_is_a_passphrase(prefix: str) -> None:
    clear = wallets.import_("clear", prefix + SECRET.hex() + "\n")
    assert clear.open().secret == SECRET
    sealed = wallets.import_("sealed", SECRET.hex(), passphrase="p")
    assert SECRET.hex() not in sealed.path.read_text()
    assert sealed.open(lambda: "p").secret == SECRET


def test_a_wrong_passphrase_imports_nothing() -> None:
    text = json.dumps(wallets.encrypt(Wallet.from_secret(SECRET), "a", n=2))
    with refused("key.passphrase"):
        wallets.import_("x", text, opened_by=lambda: "b")
    assert wallets.find("x") is None


def _keystore(**changes: Any) -> str:
    document = wallets.encrypt(Wallet.from_secret(SECRET), "p", n=2)
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = document
        for name in outer:
            place = place[name]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "64 hex digits"),
        ("0x1234", "64 hex digits"),
        ("zz" * 32, "64 hex digits"),
        ("00" * 32, "not a secp256k1"),
        ("ff" * 32, "not a secp256k1"),
        ("[" * 60_000, "64 hex digits"),
        ("{", "no wallet"),
        ("{}", "neither a keystore"),
        ('{"a":' * 10_000, "no wallet"),
        ('{"v": 2, "private_key": "00"}', "neither a keystore"),
        (_keystore(version=4), "version 4"),
        (_keystore(version=None), "version None"),
        (_keystore(crypto="x"), "neither a keystore"),
        (_keystore(crypto__cipher="aes-256-gcm"), "aes-256-gcm"),
        (_keystore(crypto__mac=None), "'mac' is missing"),
        (_keystore(crypto__mac="00"), "wrong length"),
        (_keystore(crypto__ciphertext="00" * 64), "wrong length"),
        (_keystore(crypto__cipherparams__iv="zz"), "no keystore"),
        (_keystore(crypto__kdf="argon2"), "argon2"),
        (_keystore(crypto__kdfparams=7), "no keystore"),
        (_keystore(crypto__kdfparams__n=1 << 30), "MiB of memory"),
        (_keystore(crypto__kdfparams__n=1 << 40), "its n"),
        (_keystore(crypto__kdfparams__n=3), "power of 2"),
        (_keystore(crypto__kdfparams__n=True), "its n"),
        (_keystore(crypto__kdfparams__p=1 << 20), "its p"),
        (_keystore(crypto__kdfparams__dklen=16), "too short"),
        (_keystore(crypto__kdf="pbkdf2"), "prf"),
    ],
)
def test_what_is_no_key_is_refused_before_it_costs_anything(text: str, says: str) -> None:
    with refused("key.malformed", match=says):
        wallets.import_("x", text, opened_by=lambda: "p")
    assert not wallets.wallet_path("x").exists()


def test_a_huge_file_is_not_read(home: Path) -> None:
    path = wallets.wallet_path("big")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{" + b" " * (1 << 20))
    path.chmod(0o600)
    with refused("key.malformed", match="too long"):
        wallets.get("big")
    with refused("key.malformed", match="too long"):
        wallets.import_("x", " " * (1 << 20))


def test_an_edited_address_is_found_out() -> None:
    made = wallets.create("ada")
    document = json.loads(made.path.read_text()) | {"address": "0x" + "11" * 20}
    made.path.write_text(json.dumps(document))
    with refused("key.malformed", match="another address"):
        wallets.load("ada")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a" * 65, "é", "a\n"])
def test_only_names_are_names(name: str) -> None:
    with pytest.raises(InvalidArgument, match="not the name"):
        wallets.wallet_path(name)


def test_which_wallet_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wallets.chosen() == "default"
    monkeypatch.setenv("WW_KEY", "bob")
    assert wallets.chosen() == "bob"
    assert wallets.chosen("ada") == "ada"


def test_a_missing_wallet_names_the_command_that_makes_one() -> None:
    with refused("key.missing") as info:
        wallets.get("nobody")
    assert "ww auth evm new-key" in info.value.hint


def test_a_directory_that_cannot_be_written(home: Path) -> None:
    home.write_text("a file where the directory should be: root cannot write there either")
    with pytest.raises(KeyFileError, match="cannot write"):
        wallets.create("ada")
