"""Calls of the contract as bytes, and its refusals as sentences.

By web3, from the ABI that ships with the package; imported where one of them is needed, because
that takes longer than most commands.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from wetware_auth_evm import contract as artifact
from wetware_auth_evm.cli.words import role_text, scope_text, stamp, who

_PANIC: Final = bytes.fromhex("4e487b71")
_ERROR_STRING: Final = bytes.fromhex("08c379a0")


class Refusal(NamedTuple):
    """Why the contract refused.

    Attributes:
        name: Of the error in the ABI; "" for none of it.
        sentence: What and why.
        hint: The next step, or "".
    """

    name: str
    sentence: str
    hint: str


@functools.cache
def _contract() -> Any:
    """web3's contract, without an address and a chain."""
    from wetware_auth_evm.chain.provider import Web3

    found = artifact.load()
    return Web3().eth.contract(abi=found.abi, bytecode=found.bytecode)


def calldata(function: str, *args: Any) -> bytes:
    """A call as the contract takes it: addresses and words as bytes.

    Raises TypeError and Web3Exception for what does not fit.
    """
    return bytes.fromhex(_contract().encode_abi(function, args)[2:])


def deployment(owner: bytes) -> bytes:
    """The data of the transaction that creates the contract."""
    return bytes.fromhex(_contract().constructor(owner).data_in_transaction[2:])


@functools.cache
def _entries(kind: str) -> dict[str, Any]:
    return {entry["name"]: entry for entry in artifact.load().abi if entry["type"] == kind}


def _decoded(types: Sequence[str], answer: bytes) -> tuple[Any, ...]:
    """Values; raises ValueError for bytes that do not encode them in the one way."""
    from eth_abi.exceptions import DecodingError

    codec = _contract().w3.codec
    try:
        values = codec.decode(types, answer)
    except (DecodingError, OverflowError) as exc:
        raise ValueError(str(exc)) from None
    if codec.encode(types, values) != answer:
        raise ValueError(f"{len(answer)} bytes that are not {', '.join(types)} alone")
    # With addresses, the only texts in the ABI, as bytes.
    return tuple(bytes.fromhex(v[2:]) if isinstance(v, str) else v for v in values)


# --- refusals -------------------------------------------------------------------------------------


def refusal(returned: bytes) -> Refusal:
    """What the contract said when it refused a call."""
    from eth_utils.abi import function_abi_to_4byte_selector, get_abi_input_types

    for name, entry in _entries("error").items():
        if returned[:4] == function_abi_to_4byte_selector(entry):
            try:
                values = _decoded(get_abi_input_types(entry), returned[4:])
            except ValueError:
                break
            return Refusal(name, *_sentence(name, values))
    if returned[:4] == _PANIC:
        return Refusal("", "the contract failed in itself", "is it WetwareACL? ww auth evm status")
    if returned[:4] == _ERROR_STRING:
        return Refusal("", "the contract refused for a reason of another contract", "")
    return Refusal("", "the contract refused without a reason", "ww auth evm status")


def _sentence(name: str, values: Sequence[Any]) -> tuple[str, str]:
    status = "`ww auth evm status` shows the owner"
    listing = "`ww auth evm list` shows what there is"
    match name, [*values]:
        case "NotOwner", [caller]:
            return (
                f"only the owner of the contract may do this, and {who(caller)} is not",
                f"{status}; choose its wallet with ww --key NAME, or pass --calldata to sign "
                "elsewhere (Safe, hardware wallet)",
            )
        case "NotGuardian", [caller]:
            return (
                f"only the owner or a guardian may do this, and {who(caller)} is neither",
                f"{status}; choose another wallet with ww --key NAME",
            )
        case "NotAdmin", [scope, role, caller]:
            return (
                f"{who(caller)} is no admin of {role_text(role)} in {scope_text(scope)}, or no "
                "longer",
                f"the owner appoints one: ww auth evm set-admin {role_text(role)} {who(caller)}",
            )
        case "ExceedsAdmin", [rights, expiry]:
            return (
                f"this exceeds your own admin record, which allows at most the rights "
                f"{rights:#x} until {stamp(expiry)}",
                "grant less, or ask the owner",
            )
        case "HeldByAnother", [by]:
            whose = "the owner's" if not any(by) else f"that of {who(by)}"
            return (
                f"there is a grant already, {whose}: only who made it, the owner, or the holder "
                "may end it",
                listing,
            )
        case "NoGrant", [scope, role, account]:
            return (
                f"{who(account)} holds no {role_text(role)} in {scope_text(scope)} that stands",
                listing,
            )
        case "NoAdmin", [scope, role, account]:
            return (
                f"{who(account)} is no admin of {role_text(role)} in {scope_text(scope)}",
                listing,
            )
        case "NoKey", [scope, role, account, key]:
            return (
                f"the key 0x{key.hex()} is not bound to the role {role_text(role)} of "
                f"{who(account)} in {scope_text(scope)}",
                "ww auth evm list",
            )
        case "ZeroAccount", _:
            return "the address is zero", ""
        case "ZeroRole", _:
            return "a grant needs the name of a role; `any` is for admins only", ""
        case "ZeroRights", _:
            return "the rights are 0: that would be no grant", "take it away with revoke"
        case "ZeroKey", _:
            return "the key is zero", ""
        case "ExpiryTooEarly", [expiry, after]:
            return (
                f"it would end at {stamp(expiry)}, which is not after {stamp(after)}",
                "choose a later --expires",
            )
        case "ExpiryTooLate", [expiry, most]:
            return (
                f"it would end at {stamp(expiry)}; the contract allows at most {stamp(most)}",
                "choose an earlier --expires: at most 400d",
            )
        case "BadBatch", [items]:
            return f"{items} items in one transaction: 1 to 100 are allowed", "make several of it"
        case "TooManyKeys", [account]:
            return (
                f"{who(account)} has as many bound keys as it may have (1000)",
                "end some: ww auth evm unbind-key",
            )
        case "IsPaused", _:
            return (
                "the contract is paused",
                "the owner ends that with `ww auth evm unpause`; taking away works all the same",
            )
        case "IsNotPaused", _:
            return "the contract is not paused", ""
        case "NotProposed", [caller]:
            return (
                f"the ownership was not offered to {who(caller)}",
                "the owner offers it with `ww auth evm transfer-owner ADDRESS`",
            )
        case "NotInWindow", [ready, closes]:
            return (
                f"the ownership can be taken from {stamp(ready)} until {stamp(closes)}",
                "come back then; after it the owner has to offer it again",
            )
    return f"the contract refused: {name}", ""
