"""The user's sessions: a key, and the tokens that say whose it is. On disk until they log out.

`$WW_HOME/oidc/NAME.json`, 0600: whoever has the file is that person, wherever their roles count,
until the provider withdraws the tokens.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.base import paths
from wetware.errors import AuthError, InvalidArgument, KeyFileError, TimedOut
from wetware.identity import Key, read_private_file, replace_private_file

if TYPE_CHECKING:
    from wetware.client import KeyChoice

FILE_BYTES_MAX: Final = 128 << 10
LOGIN: Final = "ww auth oidc login"
RENEW_S: Final = 15.0
"""Tokens that expire sooner are renewed first."""
LOCK_S: Final = 30.0
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Account:
    """A service account.

    Attributes:
        by: "secret" or "key" of a client of the provider, or "token" of a workload.
        file: Where that is; `{node}` in a token's is the node's ID.
        audience: Whom a client's tokens are for.
        scope: What a client asks for, or "".
    """

    by: str
    file: str
    audience: str
    scope: str


@dataclass(frozen=True, slots=True)
class StoredSession:
    """What logs in.

    Attributes:
        issuer: The provider.
        client_id: The client there.
        client_secret: Of a client that has one; else "".
        seed: Of the session's key, hex; never shown.
        id_token: The latest.
        bound_token: The one that names the key, where the latest does not; else "".
        access_token: The latest.
        refresh_token: For new ones; "" where the provider gives none.
        expires_at: Of the latest, Unix time, s.
        account: Of whom it is where that is no person: `access_token` is its only token then.
    """

    issuer: str
    client_id: str
    client_secret: str = field(repr=False)
    seed: str = field(repr=False)
    id_token: str = field(repr=False)
    bound_token: str = field(repr=False)
    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    expires_at: float
    account: Account | None = None

    @property
    def key(self) -> Key:
        return Key.from_seed(bytes.fromhex(self.seed))


def chosen_name(choice: KeyChoice) -> str:
    """The session that `--key`, else WW_KEY, names, else "default"; raises AuthError for a file."""
    chosen = choice.chosen
    if not isinstance(chosen, str) or os.sep in chosen:
        raise AuthError(
            "this cluster's users log in with an account of their company, not with a key's file",
            hint=LOGIN,
            code="auth.needs_login",
        )
    return chosen


def path_of(name: str) -> Path:
    """Raises InvalidArgument for what is no name."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name[:64]!r} is not the name of a session", code="invalid.name")
    return paths.home() / "oidc" / f"{name}.json"


def load(name: str) -> StoredSession:
    """A session, expired or not; raises AuthError where there is none, KeyFileError for a bad one.

    A file that others can read is a bad one.
    """
    path = path_of(name)
    try:
        text = read_private_file(
            path, FILE_BYTES_MAX, remedy=f"it is as good as your account: remove it, then `{LOGIN}`"
        )
    except FileNotFoundError:
        raise needs_login(name, "nobody is logged in on this machine") from None
    try:
        value = json.loads(text)
        if isinstance(value, dict) and value.setdefault("account", None) is not None:
            value["account"] = Account(**value["account"])
        session = StoredSession(**{each.name: value[each.name] for each in fields(StoredSession)})
        good = all(
            isinstance(getattr(session, each.name), _kind(each.name)) for each in fields(session)
        ) and all(isinstance(text, str) for text in (asdict(session)["account"] or {}).values())
        session.key  # noqa: B018  # raises for what is no seed
    except (ValueError, KeyError, TypeError, RecursionError, InvalidArgument):
        good = False
    if not good:
        raise KeyFileError(f"{path} is damaged", hint=f"`{LOGIN}`", code="key.malformed")
    return session


def _kind(name: str) -> Any:
    return {"expires_at": (int, float), "account": (Account, type(None))}.get(name, str)


def save(name: str, session: StoredSession) -> Path:
    """Keep a session in place of the one before; returns where. Raises KeyFileError."""
    path = path_of(name)
    value = asdict(session)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_private_file(path, (json.dumps(value, indent=1) + "\n").encode())
    except OSError as exc:
        raise KeyFileError(f"cannot write {path}: {exc.strerror}") from exc
    return path


def remove(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        path_of(name).unlink()


@contextlib.asynccontextmanager
async def locked(name: str) -> AsyncIterator[None]:
    """One process at a time renews a session: raises TimedOut where another one takes LOCK_S.

    A refresh token is often good for one use; a second one would look like a theft to the
    provider, which then ends both.
    """
    import asyncio

    path = path_of(name).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise KeyFileError(f"cannot write {path}: {exc.strerror}") from exc
    try:
        async with asyncio.timeout(LOCK_S):
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                await asyncio.sleep(0.05)
        yield
    except TimeoutError:
        raise TimedOut(
            f"another process has been renewing the session {name} for {LOCK_S:g} s"
        ) from None
    finally:
        os.close(fd)


def needs_login(name: str, why: str) -> AuthError:
    """What a command says that needs a session and finds none that is good."""
    option = "" if name == "default" else f" --key {name}"
    return AuthError(why, hint=f"ww{option} auth oidc login", code="auth.needs_login")
