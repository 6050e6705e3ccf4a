"""Ed25519 keys and their files.

A node has a key, and its peer ID is that key's name; a user has a key of their own. Both are kept
in OpenSSH's private-key format (mode 0600, optionally encrypted with a passphrase), so that
`ssh-keygen -y -f FILE` reads them and an existing `id_ed25519` can be used.

Source: https://cvsweb.openbsd.org/src/usr.bin/ssh/PROTOCOL.key
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from wetware.base.private_files import read_private_file, write_new_private_file
from wetware.errors import KeyFileError
from wetware.identity.peer_id import PeerId

KEY_FILE_BYTES_MAX = 64 << 10

# The y coordinates of the points of order 1, 2, 4 and 8, as libsodium lists them: with one of them
# as the public key, anybody can make signatures, e.g. all zeros fits every fourth message.
_SMALL_ORDER = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


def verify(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` (64 bytes) over `data` is by the raw Ed25519 key `public` (32 bytes).

    False for a key of small order, which is nobody's.
    """
    if len(public) != 32 or public[:31] + bytes((public[31] & 0x7F,)) in _SMALL_ORDER:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


class Key:
    """An Ed25519 private key. Its repr shows the public half only."""

    __slots__ = ("_private", "peer_id", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public: bytes = private.public_key().public_bytes_raw()
        self.peer_id = PeerId.from_public_key(self.public)

    @classmethod
    def generate(cls) -> Key:
        """A new random key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Key:
        """From the 32-byte secret."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def seed(self) -> bytes:
        """The 32-byte secret. Only `overlay/` needs it, to give libp2p the node's identity."""
        return self._private.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature over `data`. The caller separates domains by a prefix."""
        return self._private.sign(data)

    def __repr__(self) -> str:
        return f"<Key {self.peer_id}>"

    def __reduce__(self) -> str:
        raise TypeError("a private key is not pickled")

    def save(self, path: Path, *, passphrase: str | None = None) -> None:
        """Write the key to a new file, mode 0600, complete or not at all.

        Raises KeyFileError if the file exists (a key is never overwritten).
        """
        algorithm: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase:
            algorithm = serialization.BestAvailableEncryption(passphrase.encode())
        text = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, algorithm
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_new_private_file(path, text)
        except FileExistsError:
            raise KeyFileError(
                f"{path} exists; a key is never overwritten",
                hint="choose another name, or move the file away",
            ) from None
        except OSError as exc:
            raise KeyFileError(
                f"cannot write {path}: {exc.strerror}",
                hint="WW_HOME names another directory for your keys, --data-dir one for a node's",
            ) from exc

    @classmethod
    def load(cls, path: Path, *, passphrase: Callable[[], str] | None = None) -> Key:
        """Read a key file.

        Args:
            path: An OpenSSH private key, Ed25519, readable by its owner alone.
            passphrase: Asked only if the file is encrypted.

        Raises KeyFileError: missing, readable by others, not a key, another key type, or a wrong
        or missing passphrase.
        """
        try:
            data = read_private_file(path, KEY_FILE_BYTES_MAX)
        except FileNotFoundError:
            raise KeyFileError(
                f"no key at {path}", hint=f"make it with `ww key new {path}`", code="key.missing"
            ) from None
        try:
            private = serialization.load_ssh_private_key(data, None)
        except TypeError:  # it is encrypted
            private = _decrypted(path, data, passphrase)
        except (ValueError, UnsupportedAlgorithm):
            raise KeyFileError(
                f"{path} is not an OpenSSH private key",
                hint="make one with `ww key new NAME`",
                code="key.malformed",
            ) from None
        if not isinstance(private, Ed25519PrivateKey):
            raise KeyFileError(
                f"{path} holds a {type(private).__name__.removesuffix('PrivateKey')} key; "
                "only Ed25519 is supported",
                hint="make one with `ww key new NAME`",
                code="key.type",
            )
        return cls(private)


def _decrypted(
    path: Path, data: bytes, passphrase: Callable[[], str] | None
) -> serialization.ssh.SSHPrivateKeyTypes:
    if passphrase is None:
        raise KeyFileError(
            f"{path} is encrypted and no passphrase was given",
            hint="set WW_PASSPHRASE, or run from a terminal",
            code="key.passphrase",
        )
    try:
        return serialization.load_ssh_private_key(data, passphrase().encode())
    except (TypeError, ValueError, UnsupportedAlgorithm):  # TypeError: an empty one
        raise KeyFileError(
            f"{path}: wrong passphrase, or the file is damaged", code="key.passphrase"
        ) from None
