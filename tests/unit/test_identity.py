"""Keys, peer IDs, challenges: what they accept, and how they refuse."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wetware.errors import InvalidArgument, KeyFileError
from wetware.identity import (
    Challenge,
    Channel,
    Key,
    PeerId,
    Principal,
    replace_private_file,
    verify,
)
from wetware.identity.keys import _SMALL_ORDER
from wetware.identity.peer_id import base58_decode, base58_encode


@given(st.binary(max_size=80))
def test_base58_round_trip(data: bytes) -> None:
    assert base58_decode(base58_encode(data)) == data


def test_peer_id_is_the_one_libp2p_gives() -> None:
    # A fixed vector: the seed 0…31 and its peer ID, as computed by py-libp2p 0.8.1.
    key = Key.from_seed(bytes(range(32)))
    assert key.peer_id == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
    assert key.peer_id.public_key == key.public


def test_peer_id_round_trip() -> None:
    key = Key.generate()
    assert PeerId.parse(str(key.peer_id)) == key.peer_id
    assert PeerId.from_multihash(key.peer_id.multihash) == key.peer_id


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "12D3KooW", "l" * 500, "1" * 60, "QmInvalid!", "12D3KooWÄ", "12D3nonsense"],
)
def test_bad_peer_ids_are_refused_with_a_hint(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PeerId.parse(text)
    assert "ww id" in caught.value.hint


@given(st.text(max_size=70))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(InvalidArgument):
        assert PeerId.parse(text) == text


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_key_file_round_trip_is_private(tmp_path: Path, passphrase: str | None) -> None:
    key, path = Key.generate(), tmp_path / "keys" / "k"
    key.save(path, passphrase=passphrase)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Key.load(path, passphrase=lambda: passphrase or "").public == key.public
    assert [p.name for p in path.parent.iterdir()] == ["k"], "a temporary file was left behind"


def test_key_file_is_openssh(tmp_path: Path) -> None:
    key, path = Key.generate(), tmp_path / "k"
    key.save(path)
    if (ssh_keygen := shutil.which("ssh-keygen")) is None:
        pytest.skip("needs ssh-keygen (Debian: openssh-client)")
    done = subprocess.run(
        [ssh_keygen, "-y", "-f", str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("ssh-ed25519 "), done.stderr


def test_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    path = tmp_path / "k"
    Key.generate().save(path, passphrase="right")
    for ask in (None, lambda: "wrong"):
        with pytest.raises(KeyFileError) as caught:
            Key.load(path, passphrase=ask)
        assert caught.value.code == "key.passphrase"


def test_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "k"
    first = Key.generate()
    first.save(path)
    with pytest.raises(KeyFileError, match="never overwritten"):
        Key.generate().save(path)
    assert Key.load(path).public == first.public


def test_key_readable_by_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k"
    Key.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="readable by others") as caught:
        Key.load(path)
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "key.malformed"),
        (b"\xff\x00garbage" * 100, "key.malformed"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", None),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "key.malformed"),
    ],
)
def test_garbage_key_file(tmp_path: Path, content: bytes, code: str | None) -> None:
    path = tmp_path / "k"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError) as caught:
        Key.load(path, passphrase=lambda: "")
    assert code is None or caught.value.code == code


@given(st.binary(max_size=300))
def test_no_key_file_content_escapes_the_error_tree(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "k"
    path.write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError):
        Key.load(path)


def test_missing_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="no key at") as caught:
        Key.load(tmp_path / "nothing")
    assert "ww key new" in caught.value.hint


def test_key_never_shows_its_secret() -> None:
    key = Key.generate()
    assert key.seed.hex() not in repr(key)
    assert repr(key) == f"<Key {key.peer_id}>"


def test_signatures() -> None:
    key = Key.generate()
    signature = key.sign(b"data")
    assert verify(key.public, signature, b"data")
    assert not verify(key.public, signature, b"other")
    assert not verify(Key.generate().public, signature, b"data")
    assert not verify(b"short", signature, b"data")
    assert not verify(key.public, b"short", b"data")


P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def _double(point: tuple[int, int]) -> tuple[int, int]:
    """On the curve of RFC 8032, section 5.1."""
    x, y = point
    k = D * x * x * y * y
    return (
        2 * x * y * pow(1 + k, -1, P) % P,
        (y * y + x * x) * pow(1 - k, -1, P) % P,
    )


def _recover_x(y: int) -> int:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert (x * x - square) % P == 0
    return x


@pytest.mark.parametrize("encoded", sorted(_SMALL_ORDER))
@pytest.mark.parametrize("sign_bit", [0, 0x80])
def test_a_key_of_small_order_signs_nothing(encoded: bytes, sign_bit: int) -> None:
    y = int.from_bytes(encoded, "little") % P
    point = (_recover_x(y), y)
    for _ in range(3):
        point = _double(point)
    assert point == (0, 1), "eight times the point is the neutral one: anybody can sign with it"
    public = encoded[:31] + bytes((encoded[31] | sign_bit,))
    for message in range(64):  # without the check, zeros fit about every fourth message
        for r in (bytes(32), b"\x01" + bytes(31), encoded):
            assert not verify(public, r + bytes(32), bytes((message,)))


def test_replace_keeps_the_old_content_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    replace_private_file(path, b"old")

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        replace_private_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


_TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)


@given(
    nonce=st.binary(min_size=32, max_size=32),
    cluster=_TEXT,
    kind=_TEXT,
    value=st.binary(max_size=64),
    schemes=st.lists(_TEXT, min_size=1, max_size=4),
    epoch=st.integers(0, 2**64 - 1),
    not_after=st.integers(0, 2**64 - 1),
)
def test_challenge_bytes_round_trip(
    nonce: bytes,
    cluster: str,
    kind: str,
    value: bytes,
    schemes: list[str],
    epoch: int,
    not_after: int,
) -> None:
    peer = Key.from_seed(bytes(32)).peer_id
    challenge = Challenge(
        nonce, peer, cluster, Channel(kind, value), tuple(schemes), epoch, not_after
    )
    assert Challenge.from_signed_bytes(challenge.signed_bytes()) == challenge


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_challenge_or_a_value_error(data: bytes, prefixed: bool) -> None:
    if prefixed:
        data = b"wetware-login-challenge:1\n" + data
    with pytest.raises(ValueError):
        Challenge.from_signed_bytes(data)


def test_principal_forms() -> None:
    assert str(Principal("evm", "1:0xAb")) == "evm:1:0xAb"
    assert Principal.parse("evm:1:0xAb") == Principal("evm", "1:0xAb")
    for bad in ("", "x", ":x", "x:", "a b:c", "x:\n"):
        with pytest.raises(InvalidArgument):
            Principal.parse(bad)
