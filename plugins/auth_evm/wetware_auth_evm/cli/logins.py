"""Logging in with a wallet: what it is to sign, and whether what it gave is its signature.

A wallet elsewhere signs later: meanwhile the session key waits in
`$WW_HOME/evm/sessions/NAME@CLUSTER.pending`, 0600. It is good for nothing without the signature.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from wetware.errors import AuthError, InvalidArgument, KeyFileError
from wetware.identity import Key, replace_private_file
from wetware_auth_evm.chain.endpoints import data
from wetware_auth_evm.chain.errors import ChainError
from wetware_auth_evm.cli.words import parse_role, role_text, scope_text, stamp, who
from wetware_auth_evm.login import session
from wetware_auth_evm.login.proofs import SIGNATURE_BYTES_MAX, Form
from wetware_auth_evm.login.session import StoredSession
from wetware_auth_evm.login.statements import SessionGrant, recover
from wetware_auth_evm.login.wallet_check import WalletCheck, Word

if TYPE_CHECKING:
    from wetware_auth_evm.cli.reads import Chain, Say

WALLET_GAS_MAX: Final = 500_000
"""For a contract wallet to judge a signature: the nodes' default."""
FILE_BYTES_MAX: Final = 64 << 10
DELEGATED: Final = bytes.fromhex("ef0100")
"""What the code of an account begins with that has a key, and acts as a contract too (EIP-7702)."""
RESERVED: Final = frozenset({"node", "guardian"})
"""Roles that give no session anything."""


@dataclass(frozen=True, slots=True)
class Pending:
    """What a wallet is to sign.

    Attributes:
        grant: It says that the key may act for the account.
        key: The session key; never shown.
        text: Whether as a text (EIP-4361), else as typed data (EIP-712).
    """

    grant: SessionGrant
    key: Key = field(repr=False)
    text: bool

    @property
    def digest(self) -> bytes:
        return self.grant.text_digest() if self.text else self.grant.digest()


async def prepare(
    chain: Chain, account: bytes, roles: Sequence[str], seconds: int, *, text: bool, say: Say
) -> Pending:
    """A session for an account, for what it holds now.

    Args:
        chain: Identified.
        account: Whose.
        roles: To be used; none: all that it holds.
        seconds: How long.
        text: In the form of EIP-4361.
        say: What is going on.

    Raises AuthError where the account holds none of them, or is a contract, which signs no text.
    """
    profile = chain.profile
    asked = [role_text(parse_role(role)) for role in roles]
    view = await chain.view(say)
    state = view.history.state
    held = {role_text(role) for role in state.roles(profile.scope_id, account, view.now)} - RESERVED
    if state.paused:
        raise AuthError(
            "the contract is paused: nobody holds any role",
            hint="the owner ends that with `ww auth evm unpause`",
            code="auth.no_role",
        )
    missing = sorted(set(asked) - held) if asked else []
    if missing or not held:
        what = ", ".join(missing) or "any role"
        raise AuthError(
            f"{who(account)} does not hold {what} in the scope {scope_text(profile.scope_id)}",
            hint=f"let the owner run: ww auth evm grant {missing[0] if missing else 'ROLE'} "
            f"{who(account)}",
            code="auth.no_role",
        )
    if text and (code := await _code_of(chain, account)) and not code.startswith(DELEGATED):
        raise _no_text(account)
    final = {role_text(r) for r in view.final.roles(profile.scope_id, account, view.now)}
    if waits := sorted(set(asked or held) - final):
        say(f"{', '.join(waits)} is not final yet: nodes let it in when it is")
    epochs = state.epochs(profile.scope_id, account)
    grant, key = session.new_session(
        profile, account, asked or sorted(held), epochs, time.time(), seconds
    )
    return Pending(grant, key, text)


async def judge(chain: Chain, pending: Pending, signature: bytes) -> StoredSession:
    """The session, if a wallet's signature holds good; raises AuthError.

    By the account's key first; else the account has to be a contract that says so (ERC-1271).
    """
    grant = pending.grant
    if time.time() >= grant.expires_at:
        raise AuthError(
            f"what was signed has expired at {stamp(grant.expires_at)}",
            hint="ww auth evm login",
            code="auth.expired",
        )
    why = ""
    try:
        if (signer := recover(pending.digest, signature)) == grant.account:
            form: Form = "eip4361" if pending.text else "eip712"
            return StoredSession(pending.key, grant, signature, form)
        why = f"it is by {who(signer)}, or of another text"
    except ValueError as exc:
        why = str(exc)
    if not await _code_of(chain, grant.account):
        raise AuthError(
            f"this is not a signature of {who(grant.account)} for what was printed: {why}",
            hint="sign exactly what `ww auth evm login` printed last, with that account",
            code="auth.signature",
        )
    if pending.text:
        raise _no_text(grant.account)
    await _ask_wallet(chain, pending, signature, why)
    return StoredSession(pending.key, grant, signature, "erc1271")


async def _code_of(chain: Chain, account: bytes) -> bytes:
    """What is deployed at an address; nothing for an account with a key alone."""
    return data(await chain.endpoints.agree("eth_getCode", who(account), "latest", key=data))


def _no_text(account: bytes) -> AuthError:
    return AuthError(
        f"{who(account)} is a contract wallet: it signs typed data (EIP-712) only",
        hint="ww auth evm login --wallet-address ADDRESS, without --eip4361",
        code="auth.signature",
    )


async def _ask_wallet(chain: Chain, pending: Pending, signature: bytes, why: str) -> None:
    account = pending.grant.account
    tip = await chain.tip()
    check = WalletCheck(chain.endpoints, gas_max=WALLET_GAS_MAX)
    word = await check.ask(account, pending.digest, signature, {tip.hash})
    if word is Word.GOOD:
        return
    if word is Word.UNKNOWN:
        raise ChainError(
            f"the endpoints do not say whether {who(account)} holds the signature good",
            hint="ww auth evm status",
        )
    raise AuthError(
        f"the contract wallet {who(account)} does not hold this signature good ({why})",
        hint="give what its owners signed for the typed data, in the wallet's own form",
        code="auth.signature",
    )


def parse_signature(text: str) -> bytes:
    """A signature as wallets print it: v of 0 or 1 is written as 27 or 28. InvalidArgument."""
    try:
        found = bytes.fromhex(text.strip().removeprefix("0x"))
    except ValueError:
        found = b""
    if not 1 <= len(found) <= SIGNATURE_BYTES_MAX:
        raise InvalidArgument(
            "--signature is not hex", hint="give 0x and what the wallet printed", code="invalid"
        )
    if len(found) == 65 and found[64] in (0, 1):
        found = found[:64] + bytes([27 + found[64]])
    return found


# --- what waits for a signature -------------------------------------------------------------------


def _path(name: str, cluster: str) -> Path:
    return session.session_path(name, cluster).with_suffix(".pending")


def save_pending(name: str, pending: Pending) -> Path:
    """Keep what is to be signed, in place of the one before; raises KeyFileError."""
    path = _path(name, pending.grant.cluster)
    grant = {
        key: value.hex() if isinstance(value, bytes) else value
        for key, value in pending.grant.plain().items()
    }
    document = {
        "v": 1, "session_key": pending.key.seed.hex(), "grant": grant, "text": pending.text
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_private_file(path, json.dumps(document).encode())
    except OSError as exc:
        raise KeyFileError(f"cannot write {path}: {exc.strerror}") from exc
    return path


_DAMAGED: Final = (
    *(ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidArgument),
)


def load_pending(name: str, cluster: str) -> Pending:
    """What waits for a signature; raises KeyFileError if nothing does."""
    path = _path(name, cluster)
    try:
        with path.open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
        return _parse(json.loads(text))
    except FileNotFoundError:
        raise KeyFileError(
            f"nothing of {name} waits for a signature in the cluster {cluster}",
            hint="ww auth evm login --wallet-address ADDRESS prints what to sign",
            code="key.missing",
        ) from None
    except (*_DAMAGED, OSError) as exc:
        raise KeyFileError(
            f"{path} is damaged", hint="ww auth evm login --wallet-address ADDRESS"
        ) from exc


def _parse(value: Any) -> Pending:
    grant = dict(value["grant"])
    for name in ("contract", "account", "scope", "nonce"):
        grant[name] = bytes.fromhex(grant[name])
    key = Key.from_seed(bytes.fromhex(value["session_key"]))
    found = Pending(SessionGrant.from_plain(grant), key, bool(value["text"]))
    if key.peer_id != found.grant.session_key:
        raise ValueError("another key")
    return found


def forget_pending(name: str, cluster: str) -> None:
    """Drop it; nothing if there is none."""
    with contextlib.suppress(FileNotFoundError):
        _path(name, cluster).unlink()


def pending_clusters(name: str) -> list[str]:
    pattern = re.compile(re.escape(name) + r"@([0-9a-f]{16,64})\.pending\Z")
    if not session.directory().is_dir():
        return []
    found = (pattern.match(path.name) for path in session.directory().iterdir())
    return sorted(match[1] for match in found if match)
