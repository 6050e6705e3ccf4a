"""The user's sessions: a key that a wallet let act for its account, on disk until it expires.

`$WW_HOME/evm/sessions/NAME@CLUSTER.json`, 0600: whoever has the file is the account, in that
cluster and with those roles, until the session expires or `revokeAll` ends it. What a wallet
elsewhere has yet to sign waits beside it as NAME@CLUSTER.pending, good for nothing until then.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.base import paths
from wetware.errors import AuthError, InvalidArgument, KeyFileError
from wetware.identity import Key, read_private_file, replace_private_file
from wetware_auth_evm.login.proofs import FORMS, SIGNATURE_BYTES_MAX, Form, SessionProof
from wetware_auth_evm.login.statements import NONCE_BYTES, SESSION_S_MAX, SessionGrant, known_roles

if TYPE_CHECKING:
    from wetware_auth_evm.chain.profile import Profile

FILE_BYTES_MAX: Final = 128 << 10
DIGEST_BYTES: Final = 32
LOGIN: Final = "`ww auth evm login`"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_CLUSTER = re.compile(r"[0-9a-f]{16,64}")
_BYTES: Final = ("contract", "account", "scope", "nonce")


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session that can log in, or that waits for its wallet's signature.

    Attributes:
        key: The session key; never shown.
        grant: What the wallet signed.
        signature: The wallet's; b"" while it is waited for.
        form: How it signed.
        kept_digest: The hash that the wallet signed, where it is known: computing it anew would
            cost each command the import of the hash. A wrong one makes a login fail, and no more.
    """

    key: Key = field(repr=False)
    grant: SessionGrant
    signature: bytes
    form: Form
    kept_digest: bytes = field(default=b"", repr=False, compare=False)

    @property
    def proof(self) -> SessionProof:
        """What it shows a node, without the answer to a challenge."""
        return SessionProof(self.grant, self.form, self.signature)

    @property
    def digest(self) -> bytes:
        return self.kept_digest or self.proof.digest

    def seconds_left(self, now: float) -> float:
        """Until it expires; 0 if it has."""
        return max(0.0, self.grant.expires_at - now)


def new_session(
    profile: Profile,
    account: bytes,
    roles: Sequence[str],
    epochs: tuple[int, int, int],
    now: float,
    seconds: int = SESSION_S_MAX,
) -> tuple[SessionGrant, Key]:
    """What a wallet is to sign, and a fresh session key that it names.

    The epochs are those of scope, ROOT and account by the newest block. Raises InvalidArgument, and
    BadSettings where the cluster is not known.
    """
    key = Key.generate()
    if not 0 < seconds <= SESSION_S_MAX:
        raise InvalidArgument(
            f"a session of {seconds} s", hint=f"a session lasts up to {SESSION_S_MAX // 3600} h"
        )
    grant = SessionGrant(
        chain_id=profile.chain_id,
        contract=profile.contract,
        account=account,
        session_key=key.peer_id,
        cluster=profile.need_cluster(),
        scope=profile.scope_id,
        roles=known_roles(roles),
        epochs=epochs,
        issued_at=int(now),
        expires_at=int(now) + seconds,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )
    grant.check()
    return grant, key


def directory() -> Path:
    return paths.home() / "evm" / "sessions"


def session_path(name: str, cluster: str, *, pending: bool = False) -> Path:
    """The file of a session; raises InvalidArgument for what is no name or cluster."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name[:64]!r} is not the name of a wallet", code="invalid.wallet")
    if not _CLUSTER.fullmatch(cluster):
        raise InvalidArgument(f"{cluster[:70]!r} is not a cluster's ID", code="invalid.cluster")
    return directory() / f"{name}@{cluster}.{'pending' if pending else 'json'}"


def save(name: str, session: StoredSession) -> Path:
    """Keep a session in place of the one before; returns where. Raises KeyFileError."""
    path = session_path(name, session.grant.cluster, pending=not session.signature)
    grant = {
        key: value.hex() if isinstance(value, bytes) else value
        for key, value in session.grant.plain().items()
    }
    document = {
        "v": 1,
        "session_key": session.key.seed.hex(),
        "grant": grant,
        "signature": session.signature.hex(),
        "form": session.form,
        "digest": session.digest.hex(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_private_file(path, (json.dumps(document, indent=1) + "\n").encode())
    except OSError as exc:
        raise KeyFileError(f"cannot write {path}: {exc.strerror}") from exc
    return path


def load(name: str, cluster: str, *, pending: bool = False) -> StoredSession | None:
    """A session, expired or not, or one that waits for its signature; None if there is none.

    Raises KeyFileError for a file that is damaged, or that others can read.
    """
    path = session_path(name, cluster, pending=pending)
    remedy = f"it is as good as the wallet until it expires: remove it, then {LOGIN}"
    try:
        text = read_private_file(path, FILE_BYTES_MAX, remedy=remedy)
    except FileNotFoundError:
        return None
    try:
        session = _parse(json.loads(text))
        good = session.grant.cluster == cluster and pending == (not session.signature)
        good = good and session.key.peer_id == session.grant.session_key
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidArgument):
        good = False
    if not good:
        raise KeyFileError(f"{path} is damaged", hint=LOGIN, code="key.malformed")
    return session


def _parse(value: Any) -> StoredSession:
    grant = dict(value["grant"])
    for name in _BYTES:
        grant[name] = bytes.fromhex(grant[name])
    signature = bytes.fromhex(value["signature"])
    if value["v"] != 1 or value["form"] not in FORMS:
        raise ValueError("of a later release")
    if len(signature) > SIGNATURE_BYTES_MAX:
        raise ValueError("no signature")
    digest = bytes.fromhex(value["digest"])
    if len(digest) != DIGEST_BYTES:
        raise ValueError("no digest")
    return StoredSession(
        Key.from_seed(bytes.fromhex(value["session_key"])),
        SessionGrant.from_plain(grant),
        signature,
        value["form"],
        digest,
    )


def remove(name: str, cluster: str, *, pending: bool = False) -> bool:
    """Log out here; whether there was a session. It stays good for who has a copy of the file."""
    path = session_path(name, cluster, pending=pending)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        return True
    return False


def listing() -> Iterator[tuple[str, str]]:
    """(name, cluster) of all sessions on disk, and of those that wait for a signature."""
    for path in sorted([*directory().glob("*@*.json"), *directory().glob("*@*.pending")]):
        name, _, cluster = path.stem.rpartition("@")
        if _NAME.fullmatch(name) and _CLUSTER.fullmatch(cluster):
            yield name, cluster


def needs_login(name: str, cluster: str, why: str = "") -> AuthError:
    """What a command says that needs a session and finds none."""
    option = "" if name == "default" else f" --key {name}"
    return AuthError(
        why or f"wallet {name!r} has no session in the cluster {cluster}",
        hint=f"`ww{option} auth evm login`",
        code="auth.needs_login",
    )
