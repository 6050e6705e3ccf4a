"""Who somebody is: peer IDs, Ed25519 keys and their files, principals, and the words of a login.

A node has an Ed25519 key, and its peer ID is that key's name; a user has a key of their own. Both
are kept in OpenSSH's private-key format (mode 0600, optionally encrypted with a passphrase), so
that `ssh-keygen -y -f FILE` reads them and an existing `id_ed25519` can be used.

Sources: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md,
https://cvsweb.openbsd.org/src/usr.bin/ssh/PROTOCOL.key
"""

from __future__ import annotations

import base64
import contextlib
import enum
import hashlib
import os
import stat
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from wetware.errors import InvalidArgument, KeyFileError

# --- hex, base58 and peer IDs ---------------------------------------------------------------------


def from_hex(text: str) -> bytes:
    """The inverse of `bytes.hex`, of one text only; raises ValueError.

    `bytes.fromhex` takes spaces and capitals as well: what is signed or hashed would have many
    forms.
    """
    data = bytes.fromhex(text)
    if data.hex() != text:
        raise ValueError("not hex as it is written here: small letters, nothing between them")
    return data


_B58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_B58_VALUE = {char: value for value, char in enumerate(_B58)}
_ED25519_PB = b"\x08\x01\x12\x20"  # PublicKey{Type: Ed25519, Data: 32 bytes}
_IDENTITY_MULTIHASH = b"\x00\x24"  # identity, 36 bytes
_SHA256_MULTIHASH = b"\x12\x20"  # sha2-256, 32 bytes
PEER_ID_CHARS_MAX = 64


def base58_encode(data: bytes) -> str:
    """Bitcoin-alphabet base58."""
    number, out = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        out = _B58[digit] + out
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + out


def base58_decode(text: str, *, chars_max: int = 1024) -> bytes:
    """The inverse of `base58_encode`; raises ValueError on a foreign character or a long text."""
    if len(text) > chars_max:  # decoding takes time quadratic in the length
        raise ValueError(f"longer than {chars_max} characters")
    number = 0
    for char in text:
        if (digit := _B58_VALUE.get(char)) is None:
            raise ValueError(f"{char!r} is not a base58 character")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")


def _inlines_a_key(data: bytes) -> bool:
    """Whether an identity multihash holds a short PublicKey{Type, Data}, as of secp256k1."""
    return (
        6 < len(data) <= 44
        and data[0] == 0
        and data[1] == len(data) - 2
        and data[2] == 0x08
        and data[3] <= 3  # RSA, Ed25519, secp256k1, ECDSA
        and data[4] == 0x12
        and data[5] == len(data) - 6
    )


class PeerId(str):
    """A libp2p peer ID in its base58 form, e.g. `12D3KooW…`. Make one with a class method."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """Validate the text form; raises InvalidArgument."""
        try:
            return cls.from_multihash(base58_decode(text, chars_max=PEER_ID_CHARS_MAX))
        except ValueError as exc:
            raise InvalidArgument(
                f"bad peer ID {text[:PEER_ID_CHARS_MAX]!r}: {exc}",
                hint="a peer ID looks like 12D3KooW…: `ww id` prints a node's, `ww key show` yours",
                code="invalid.peer_id",
            ) from None

    @classmethod
    def from_multihash(cls, data: bytes) -> PeerId:
        """From the binary form; raises ValueError."""
        if data[:2] == _IDENTITY_MULTIHASH and len(data) == 38:
            if data[2:6] != _ED25519_PB:
                raise ValueError("the inlined key is not Ed25519")
            return cls(base58_encode(data))
        hashed = data[:2] == _SHA256_MULTIHASH and len(data) == 34
        if not (hashed or _inlines_a_key(data)):
            raise ValueError("not the multihash of a public key")
        return cls(base58_encode(data))

    @classmethod
    def from_public_key(cls, public: bytes) -> PeerId:
        """Of a raw 32-byte Ed25519 public key."""
        return cls(base58_encode(_IDENTITY_MULTIHASH + _ED25519_PB + public))

    @classmethod
    def from_public_key_pb(cls, encoded: bytes) -> PeerId:
        """Of a libp2p `PublicKey` protobuf of any key type: inlined up to 42 bytes, else hashed."""
        if len(encoded) <= 42:
            return cls(base58_encode(bytes((0, len(encoded))) + encoded))
        return cls(base58_encode(_SHA256_MULTIHASH + hashlib.sha256(encoded).digest()))

    @property
    def multihash(self) -> bytes:
        """The binary form."""
        return base58_decode(self)

    @property
    def public_key(self) -> bytes | None:
        """The raw Ed25519 key that the ID inlines, or None where the ID is a hash."""
        data = self.multihash
        return data[6:] if data[:6] == _IDENTITY_MULTIHASH + _ED25519_PB else None

    @property
    def short(self) -> str:
        """The last eight characters: the first ones are the same for every node."""
        return self[-8:]


# --- keys -----------------------------------------------------------------------------------------


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
        data = _read_private_file(path)
        secret: bytes | None = None
        if passphrase is not None and _is_encrypted(data):
            secret = passphrase().encode()
        try:
            private = serialization.load_ssh_private_key(data, secret)
        except TypeError:
            raise KeyFileError(
                f"{path} is encrypted and no passphrase was given",
                hint="set WW_PASSPHRASE, or run from a terminal",
                code="key.passphrase",
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            if secret is not None:
                raise KeyFileError(
                    f"{path}: wrong passphrase, or the file is damaged", code="key.passphrase"
                ) from None
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


KEY_FILE_BYTES_MAX = 64 << 10


def _read_private_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(KEY_FILE_BYTES_MAX)
    except FileNotFoundError:
        raise KeyFileError(
            f"no key at {path}", hint=f"make it with `ww key new {path}`", code="key.missing"
        ) from None
    except OSError as exc:
        raise KeyFileError(f"cannot read {path}: {exc.strerror}") from exc
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(
            f"{path} is readable by others (mode {stat.S_IMODE(mode):04o})",
            hint=f"chmod 600 {path}",
            code="key.mode",
        )
    return data


def _is_encrypted(data: bytes) -> bool:
    """Whether an OpenSSH key file names a cipher: the field right after the magic is not "none"."""
    with contextlib.suppress(ValueError, IndexError):
        body = b"".join(data.strip().splitlines()[1:-1])
        raw = base64.b64decode(body, validate=True)
        magic = b"openssh-key-v1\0"
        if raw.startswith(magic):
            return raw[len(magic) :][4:8] != b"none"
    return False


def write_new_private_file(path: Path, data: bytes) -> None:
    """Create `path` (0600) with `data`, fsynced, whole or not at all; FileExistsError if there."""
    _write_private(path, data, lambda temp: os.link(temp, path))


def replace_private_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` (0600), fsynced: after a crash the old or the new content is there."""
    _write_private(path, data, lambda temp: os.replace(temp, path))


def _write_private(path: Path, data: bytes, publish: Callable[[str], None]) -> None:
    fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temp)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)


# --- principals -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Principal:
    """Who is speaking: `(backend, subject)`, e.g. `local:12D3Koo…` or `evm:1:0xAb…`."""

    backend: str
    subject: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.subject}"

    @classmethod
    def parse(cls, text: str) -> Principal:
        """From the text form; raises InvalidArgument."""
        backend, colon, subject = text.partition(":")
        if not (backend.isidentifier() and colon and subject and subject.isprintable()):
            raise InvalidArgument(f"bad principal {text!r}", hint="write BACKEND:SUBJECT")
        return cls(backend, subject)


# --- the words of a login -------------------------------------------------------------------------

NONCE_BYTES = 32
_CHALLENGE_DOMAIN = b"wetware-login-challenge:1\n"
CHALLENGE_BYTES_MAX = 4096


class LoginStatus(enum.IntEnum):
    """How a login ended. The zero value never grants. The numbers are those of `core.capnp`."""

    UNINITIALIZED = 0
    GRANTED = 1
    BAD_SIGNATURE = 2
    UNKNOWN_PRINCIPAL = 3
    EXPIRED = 4
    REPLAYED = 5
    WRONG_VERIFIER = 6
    WRONG_CHANNEL = 7
    WRONG_CLUSTER = 8
    UNSUPPORTED_SCHEME = 9
    MALFORMED = 10
    NO_ROLE = 11
    TOO_MANY_TRIES = 12
    BACKEND_UNAVAILABLE = 13
    SIGNER_FAILED = 14


@dataclass(frozen=True, slots=True)
class Channel:
    """What a connection is bound to.

    Attributes:
        kind: "noise" (the handshake hash of the connection) or "unix" (the node's peer ID).
        value: 32 bytes of handshake hash, or the peer ID's multihash.
    """

    kind: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a node asks a user's signer to sign.

    Attributes:
        nonce: 32 random bytes, used once.
        verifier: The peer ID of the node that asks.
        cluster: The cluster's ID.
        channel: What the node's end of the connection is bound to.
        schemes: Proof schemes that the node accepts, in its order of preference.
        policy_epoch: The version of the policy that will decide.
        not_after_ms: Unix time, milliseconds, by the node's clock.
    """

    nonce: bytes
    verifier: PeerId
    cluster: str
    channel: Channel
    schemes: tuple[str, ...]
    policy_epoch: int
    not_after_ms: int

    def signed_bytes(self) -> bytes:
        """The canonical bytes that are signed: a domain, then every field with its length."""
        fields = (
            self.nonce,
            self.verifier.encode(),
            self.cluster.encode(),
            self.channel.kind.encode(),
            self.channel.value,
            "\0".join(self.schemes).encode(),
            struct.pack("!QQ", self.policy_epoch, self.not_after_ms),
        )
        return _CHALLENGE_DOMAIN + b"".join(struct.pack("!I", len(f)) + f for f in fields)

    @classmethod
    def from_signed_bytes(cls, data: bytes) -> Challenge:
        """Parse what `signed_bytes` made; raises ValueError on anything else."""
        if len(data) > CHALLENGE_BYTES_MAX or not data.startswith(_CHALLENGE_DOMAIN):
            raise ValueError("not a login challenge")
        at, fields = len(_CHALLENGE_DOMAIN), []
        for _ in range(7):
            if at + 4 > len(data):
                raise ValueError("truncated")
            (length,) = struct.unpack_from("!I", data, at)
            at += 4
            if at + length > len(data):
                raise ValueError("truncated")
            fields.append(data[at : at + length])
            at += length
        nonce, verifier, cluster, kind, value, schemes, numbers = fields
        if at != len(data) or len(nonce) != NONCE_BYTES or len(numbers) != 16:
            raise ValueError("malformed")
        epoch, not_after = struct.unpack("!QQ", numbers)
        try:
            peer = PeerId.parse(verifier.decode())
        except InvalidArgument as exc:
            raise ValueError(exc.message) from None
        return cls(
            nonce,
            peer,
            cluster.decode(),
            Channel(kind.decode(), value),
            tuple(schemes.decode().split("\0")),
            epoch,
            not_after,
        )


@dataclass(frozen=True, slots=True)
class Proof:
    """A signer's answer.

    Attributes:
        scheme: e.g. "local-ed25519".
        payload: Scheme-specific: keys and signatures, never a secret.
        signed: `Challenge.signed_bytes()` as the signer saw it, so that a refusal can say which
            field differs. The verifier decides by its own copy.
    """

    scheme: str
    payload: bytes
    signed: bytes


class Signer(Protocol):
    """Answers challenges for one user. The client has checked verifier and channel before.

    It may have two attributes: `hints: Mapping[LoginStatus, str]`, what the user does about a
    refusal, and `unattended = True`: it signs without asking anybody, so a client that has lost its
    connection may log in again by it.
    """

    async def sign(self, challenge: Challenge) -> Proof:
        """Prove who the user is; raises AuthError if no offered scheme fits."""
        ...
