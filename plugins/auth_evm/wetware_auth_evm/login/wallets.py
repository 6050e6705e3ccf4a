"""Wallet files: the user's secp256k1 keys, as keystore v3 or, for try-outs, in the clear.

`$WW_HOME/evm/wallets/NAME.json`, 0600. A keystore is what every Ethereum client writes and reads;
eth-keyfile does it here.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from wetware.base import paths
from wetware.errors import InvalidArgument, KeyFileError
from wetware.identity import read_private_file, write_new_private_file
from wetware_auth_evm.chain.addresses import keccak

FILE_BYTES_MAX: Final = 64 << 10
KDF_BYTES_MAX: Final = 512 << 20
"""Of memory that deriving a key may take: a keystore states its own cost, and may be hostile."""
KDF_ROUNDS_MAX: Final = 10_000_000
KDF_PARALLEL_MAX: Final = 16
SCRYPT_N: Final = 1 << 18
"""With r = 8 and p = 1 what geth writes: 0.7 s and 256 MiB."""
_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}\Z", re.ASCII)
_NEW: Final = "make one with `ww auth evm new-key NAME`, or bring one with `ww auth evm import-key`"

Passphrase = Callable[[], str]


@dataclass(frozen=True, slots=True)
class Wallet:
    """An account whose key is at hand.

    Attributes:
        address: 20 bytes.
        secret: The private key, 32 bytes; never shown.
    """

    address: bytes
    secret: bytes = field(repr=False)

    def __reduce__(self) -> str:
        raise TypeError("a private key is not pickled")

    @classmethod
    def from_secret(cls, secret: bytes) -> Wallet:
        """Of a private key; raises ValueError if it is none."""
        if len(secret) != 32 or not 0 < int.from_bytes(secret, "big") < _ORDER:
            raise ValueError("not a secp256k1 private key")
        public = _coincurve().PrivateKey(secret).public_key.format(compressed=False)
        return cls(keccak(public[1:])[12:], secret)

    def sign(self, digest: bytes) -> bytes:
        """65 bytes (r, s, v) over a 32-byte hash: v is 27 or 28, s the lower one."""
        signature = _coincurve().PrivateKey(self.secret).sign_recoverable(digest, hasher=None)
        return bytes(signature[:64]) + bytes([27 + signature[64]])


@dataclass(frozen=True, slots=True)
class WalletFile:
    """A wallet on disk, not opened yet.

    Attributes:
        name: What `--key` calls it.
        path: The file.
        address: 20 bytes, as the file states it; `open` compares.
        encrypted: Whether it takes a passphrase.
        made: Whether `load_or_create` made it now.
    """

    name: str
    path: Path
    address: bytes
    encrypted: bool
    document: Mapping[str, Any] = field(repr=False)
    made: bool = False

    def open(self, passphrase: Passphrase | None = None) -> Wallet:
        """The key; WW_PASSPHRASE is taken before `passphrase` is asked. Raises KeyFileError."""
        if self.encrypted:
            secret = decrypt(self.document, _ask(passphrase, str(self.path)), str(self.path))
        else:
            secret = _hex(self.document.get("private_key"), str(self.path))
        try:
            wallet = Wallet.from_secret(secret)
        except ValueError as exc:
            raise KeyFileError(f"{self.path}: {exc}", hint=_NEW, code="key.malformed") from None
        if wallet.address != self.address:
            raise KeyFileError(
                f"{self.path} states another address than its key has",
                hint="the file was changed; import the key again",
                code="key.malformed",
            )
        return wallet


def directory() -> Path:
    return paths.home() / "evm" / "wallets"


def wallet_path(name: str) -> Path:
    """The file of a wallet; raises InvalidArgument for what is no name."""
    if not _NAME.match(name):
        raise InvalidArgument(
            f"{name[:64]!r} is not the name of a wallet",
            hint="wallets are known by names, in --key or WW_KEY; bring a file with "
            "`ww auth evm import-key FILE`",
            code="invalid.wallet",
        )
    return directory() / f"{name}.json"


def chosen(key: str | None = None) -> str:
    """The name that `--key`, else WW_KEY, gives; else "default"."""
    return key or paths.variable("WW_KEY") or "default"


def find(name: str) -> WalletFile | None:
    """The wallet of a name, or None; raises KeyFileError for a file that is not to be used."""
    path = wallet_path(name)
    if (text := _read(path)) is None:
        return None
    document = _parse(text, str(path))
    encrypted = "crypto" in document
    stated = document.get("address")
    try:
        address = bytes.fromhex(str(stated).removeprefix("0x"))
    except ValueError:
        address = b""
    if len(address) != 20:
        raise KeyFileError(
            f"{path} does not say of which address it is",
            hint="move it away, and bring it with `ww auth evm import-key FILE`",
            code="key.malformed",
        )
    return WalletFile(name, path, address, encrypted, document)


def get(name: str) -> WalletFile:
    """The wallet of a name; raises KeyFileError "key.missing"."""
    found = find(name)
    if found is None:
        hint = _NEW.replace("NAME", name)
        raise KeyFileError(f"no wallet at {wallet_path(name)}", hint=hint, code="key.missing")
    return found


def load(name: str, *, passphrase: Passphrase | None = None) -> Wallet:
    """The opened wallet of a name; raises KeyFileError."""
    return get(name).open(passphrase)


def create(name: str, *, passphrase: str | None = None) -> WalletFile:
    """A wallet with a new random key; raises KeyFileError if there is one of this name."""
    while True:
        secret = secrets.token_bytes(32)
        if 0 < int.from_bytes(secret, "big") < _ORDER:
            return save(name, Wallet.from_secret(secret), passphrase=passphrase)


def load_or_create(name: str = "default") -> WalletFile:
    """The wallet of a name, made if there is none: encrypted if WW_PASSPHRASE is set.

    Its address is known without the passphrase.
    """
    found = find(name)
    if found is not None:
        return found
    made = create(name, passphrase=paths.variable("WW_PASSPHRASE"))
    return WalletFile(made.name, made.path, made.address, made.encrypted, made.document, True)


def import_(
    name: str, text: str, *, opened_by: Passphrase | None = None, passphrase: str | None = None
) -> WalletFile:
    """Keep a key under a name: a keystore v3, a wallet file of ours, or 64 hex digits.

    Args:
        name: For the new wallet.
        text: What to import.
        opened_by: The passphrase of the keystore; WW_PASSPHRASE is taken before it is asked.
        passphrase: For a key that came in the clear. A keystore is kept as it is.

    Raises KeyFileError: not a key, a wrong passphrase, or there is a wallet of this name.
    """
    if len(text) > FILE_BYTES_MAX:
        raise KeyFileError("too long for a key", code="key.malformed")
    if not text.lstrip().startswith("{"):
        return save(name, _from_secret(_hex(text.strip(), "what was given")), passphrase=passphrase)
    document = _parse(text, "the file")
    if "crypto" not in document:
        secret = _hex(document.get("private_key"), "the file")
        return save(name, _from_secret(secret), passphrase=passphrase)
    # It is opened, so that what is kept can be used, and its address be trusted.
    wallet = _from_secret(decrypt(document, _ask(opened_by, "the keystore"), "the keystore"))
    return _write(name, {**document, "address": wallet.address.hex()}, wallet.address)


def save(name: str, wallet: Wallet, *, passphrase: str | None = None) -> WalletFile:
    """Write a new wallet file: a keystore v3 with a passphrase, else in the clear, 0600.

    Raises KeyFileError if there is one of this name: a key is never overwritten.
    """
    if passphrase:
        document = encrypt(wallet, passphrase)
    else:
        from wetware_auth_evm.chain.addresses import checksum

        address = checksum(wallet.address)
        document = {"v": 1, "address": address, "private_key": wallet.secret.hex()}
    return _write(name, document, wallet.address)


def _write(name: str, document: Mapping[str, Any], address: bytes) -> WalletFile:
    path = wallet_path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_new_private_file(path, json.dumps(document, indent=1).encode())
    except FileExistsError:
        raise KeyFileError(
            f"{path} exists; a key is never overwritten",
            hint="choose another name, or move the file away",
            code="key.exists",
        ) from None
    except OSError as exc:
        raise KeyFileError(f"cannot write {path}: {exc.strerror}") from exc
    return WalletFile(name, path, address, "crypto" in document, document)


def _from_secret(secret: bytes) -> Wallet:
    try:
        return Wallet.from_secret(secret)
    except ValueError as exc:
        raise KeyFileError(str(exc), hint=_NEW, code="key.malformed") from None


def _read(path: Path) -> str | None:
    try:
        raw = read_private_file(path, FILE_BYTES_MAX)
    except FileNotFoundError:
        return None
    if len(raw) > FILE_BYTES_MAX:
        raise KeyFileError(f"{path} is too long for a wallet", code="key.malformed")
    return raw.decode("utf-8", "replace")


def _parse(text: str, what: str) -> dict[str, Any]:
    """Ours, or a keystore v3; its keys in small letters, as old clients wrote `Crypto`."""
    try:
        return _known(json.loads(text))
    except (ValueError, RecursionError) as exc:
        raise KeyFileError(
            f"{what} is no wallet: {str(exc)[:100]}", hint=_NEW, code="key.malformed"
        ) from None


def _known(found: Any) -> dict[str, Any]:
    document = {str(k).lower(): v for k, v in found.items()} if isinstance(found, dict) else {}
    if "private_key" in document and document.get("v") == 1:
        return document
    crypto = document.get("crypto")
    if not isinstance(crypto, dict):
        raise ValueError("neither a keystore nor a wallet of wetware")  # noqa: TRY004  # as bad JSON
    if document.get("version") != 3:
        raise ValueError(f"a keystore of version {str(document.get('version'))[:20]}, not 3")
    return document


def _hex(value: Any, what: str) -> bytes:
    try:
        secret = bytes.fromhex(value.removeprefix("0x")) if isinstance(value, str) else b""
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise KeyFileError(
            f"{what} holds no private key: that has 64 hex digits",
            hint="give a keystore v3 (JSON), or the key in hex",
            code="key.malformed",
        )
    return secret


def _ask(passphrase: Passphrase | None, what: str) -> str:
    if (given := paths.variable("WW_PASSPHRASE")) is not None:
        return given
    if passphrase is None:
        raise KeyFileError(
            f"{what} is encrypted and no passphrase was given",
            hint="set WW_PASSPHRASE, or run from a terminal",
            code="key.passphrase",
        )
    return passphrase()


# --- keystore v3 ----------------------------------------------------------------------------------


def _eth_keyfile() -> Any:
    """Imported where a keystore is: it takes a second, and raises the limit of recursion."""
    limit = sys.getrecursionlimit()
    import eth_keyfile

    sys.setrecursionlimit(limit)  # nested JSON would end the process
    return eth_keyfile


def encrypt(wallet: Wallet, passphrase: str, *, n: int = SCRYPT_N) -> dict[str, Any]:
    """A keystore v3 of a key: scrypt and AES-128-CTR."""
    made: dict[str, Any] = _eth_keyfile().create_keyfile_json(
        wallet.secret, passphrase.encode(), kdf="scrypt", iterations=n, salt_size=32
    )
    return made


def decrypt(document: Mapping[str, Any], passphrase: str, what: str) -> bytes:
    """The private key in a keystore v3; raises KeyFileError: wrong passphrase, malformed."""
    try:
        _check_cost(document["crypto"])
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        missing = f"{exc} is missing" if isinstance(exc, KeyError) else str(exc)
        raise KeyFileError(
            f"{what} is no keystore that can be opened: {missing[:100]}",
            hint="export it again from the program that made it (keystore v3)",
            code="key.malformed",
        ) from None
    try:
        return bytes(_eth_keyfile().decode_keyfile_json(dict(document), passphrase.encode()))
    except ValueError:
        raise KeyFileError(
            f"{what}: wrong passphrase, or the file is damaged",
            hint="WW_PASSPHRASE, where it is set, is taken before the terminal is asked",
            code="key.passphrase",
        ) from None


def _check_cost(crypto: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError for what is malformed, or dear to open."""
    if crypto["cipher"] != "aes-128-ctr":
        raise ValueError(f"its cipher is {str(crypto['cipher'])[:40]!r}, not aes-128-ctr")
    params, kdf = crypto["kdfparams"], str(crypto["kdf"])
    bytes.fromhex(params["salt"])
    for text, size in (
        (crypto["cipherparams"]["iv"], 16), (crypto["ciphertext"], 32), (crypto["mac"], 32)
    ):  # fmt: skip
        if len(bytes.fromhex(text)) != size:
            raise ValueError("a field has a wrong length")
    if _count(params, "dklen", 1024) < 32:
        raise ValueError("its derived key is too short")
    if kdf == "scrypt":
        n, r = _count(params, "n", 1 << 30), _count(params, "r", 1 << 16)
        _count(params, "p", KDF_PARALLEL_MAX)
        if 128 * n * r > KDF_BYTES_MAX:
            raise ValueError(f"it asks for {128 * n * r >> 20} MiB of memory")
        if n & (n - 1) or n < 2:
            raise ValueError("its n is no power of 2")
    elif kdf == "pbkdf2":
        if params["prf"] != "hmac-sha256":
            raise ValueError(f"its prf is {str(params['prf'])[:40]!r}, not hmac-sha256")
        _count(params, "c", KDF_ROUNDS_MAX)
    else:
        raise ValueError(f"its kdf is {kdf[:40]!r}: scrypt and pbkdf2 are supported")


def _count(params: Mapping[str, Any], name: str, most: int) -> int:
    value = params[name]
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"its {name} is not within 1..{most}")
    return value


def _coincurve() -> Any:
    try:
        import coincurve
    except ImportError:
        from wetware.errors import PluginError

        raise PluginError(
            "Ethereum keys need packages that are not installed",
            hint="pip install 'wetware[evm]'",
        ) from None
    return coincurve
