"""Logging in with a wallet: what it is to sign, and whether what it gave is its signature."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from wetware.errors import AuthError, InvalidArgument
from wetware_auth_evm.chain.endpoints import data
from wetware_auth_evm.chain.errors import ChainError
from wetware_auth_evm.cli.words import parse_role, role_text, scope_text, stamp, who
from wetware_auth_evm.login import session
from wetware_auth_evm.login.proofs import SIGNATURE_BYTES_MAX
from wetware_auth_evm.login.session import StoredSession
from wetware_auth_evm.login.statements import recover
from wetware_auth_evm.login.wallet_check import WalletCheck, Word
from wetware_auth_evm.node.config import WALLET_GAS_DEFAULT
from wetware_auth_evm.node.roles import RESERVED

if TYPE_CHECKING:
    from wetware_auth_evm.cli.reads import Chain, Say

DELEGATED: Final = bytes.fromhex("ef0100")
"""What the code of an account begins with that has a key, and acts as a contract too (EIP-7702)."""


async def prepare(
    chain: Chain, account: bytes, roles: Sequence[str], seconds: int, *, text: bool, say: Say
) -> StoredSession:
    """A session for an account, for what it holds now, that its wallet has yet to sign.

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
    return StoredSession(key, grant, b"", "eip4361" if text else "eip712")


async def judge(chain: Chain, pending: StoredSession, signature: bytes) -> StoredSession:
    """The session, if a wallet's signature holds good; raises AuthError.

    By the account's key first; else the account has to be a contract that says so (ERC-1271).
    """
    grant, digest = pending.grant, pending.proof.digest
    if time.time() >= grant.expires_at:
        raise AuthError(
            f"what was signed has expired at {stamp(grant.expires_at)}",
            hint="ww auth evm login",
            code="auth.expired",
        )
    why = ""
    try:
        if (signer := recover(digest, signature)) == grant.account:
            return replace(pending, signature=signature, kept_digest=digest)
        why = f"it is by {who(signer)}, or of another text"
    except ValueError as exc:
        why = str(exc)
    if not await _code_of(chain, grant.account):
        raise AuthError(
            f"this is not a signature of {who(grant.account)} for what was printed: {why}",
            hint="sign exactly what `ww auth evm login` printed last, with that account",
            code="auth.signature",
        )
    if pending.form == "eip4361":
        raise _no_text(grant.account)
    await _ask_wallet(chain, grant.account, digest, signature, why)
    return replace(pending, signature=signature, form="erc1271", kept_digest=digest)


async def _code_of(chain: Chain, account: bytes) -> bytes:
    """What is deployed at an address; nothing for an account with a key alone."""
    return data(await chain.endpoints.agree("eth_getCode", who(account), "latest", key=data))


def _no_text(account: bytes) -> AuthError:
    return AuthError(
        f"{who(account)} is a contract wallet: it signs typed data (EIP-712) only",
        hint="ww auth evm login --wallet-address ADDRESS, without --eip4361",
        code="auth.signature",
    )


async def _ask_wallet(
    chain: Chain, account: bytes, digest: bytes, signature: bytes, why: str
) -> None:
    tip = await chain.tip()
    check = WalletCheck(chain.endpoints, gas_max=WALLET_GAS_DEFAULT)
    word = await check.ask(account, digest, signature, {tip.hash})
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
