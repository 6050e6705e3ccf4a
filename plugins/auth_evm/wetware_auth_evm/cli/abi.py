"""Calls of the contract as bytes, and what it answers: values, or errors as sentences.

From the ABI that ships with the package. Coded here: the contract takes and gives words, and lists
of words or of structs of words, and importing eth-abi takes longer than most commands. The tests
compare with it.

Source: https://docs.soliditylang.org/en/latest/abi-spec.html
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from wetware_auth_evm import contract as artifact
from wetware_auth_evm.chain.addresses import keccak
from wetware_auth_evm.cli.words import role_text, scope_text, stamp, who

WORD: Final = 32
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


def _types(items: Sequence[dict[str, Any]]) -> list[str]:
    """Canonical types; a tuple is written out."""
    return [
        f"({','.join(_types(item['components']))}){item['type'][5:]}"
        if item["type"].startswith("tuple")
        else str(item["type"])
        for item in items
    ]


@functools.cache
def _entries(kind: str) -> dict[str, dict[str, Any]]:
    return {e["name"]: e for e in artifact.load().abi if e["type"] == kind}


@functools.cache
def _selector(kind: str, name: str) -> bytes:
    return keccak(f"{name}({','.join(_types(_entries(kind)[name]['inputs']))})".encode())[:4]


def calldata(function: str, *args: Any) -> bytes:
    """A call as the contract takes it; raises ValueError for what does not fit."""
    types = _types(_entries("function")[function]["inputs"])
    return _selector("function", function) + _encode(types, args)


def deployment(owner: bytes) -> bytes:
    """The data of the transaction that creates the contract."""
    return artifact.load().bytecode + owner.rjust(32, b"\0")


def results(function: str, answer: bytes) -> tuple[Any, ...]:
    """What a call returned: addresses as 20 bytes, one struct as its fields. Raises ValueError."""
    return _decode(_types(_entries("function")[function]["outputs"]), answer)


# --- words ----------------------------------------------------------------------------------------


def _encode(types: Sequence[str], values: Sequence[Any]) -> bytes:
    """Words in place; each list behind them, with its offset in its place."""
    if len(types) != len(values):
        raise ValueError(f"{len(values)} values, and {len(types)} are taken")
    head, tail = [], b""
    for kind, value in zip(types, values, strict=True):
        if kind.endswith("[]"):
            head.append((WORD * len(types) + len(tail)).to_bytes(WORD, "big"))
            item = kind[:-2].strip("()").split(",")
            rows = [row if kind[0] == "(" else (row,) for row in value]
            tail += len(rows).to_bytes(WORD, "big")
            tail += b"".join(_encode(item, row) for row in rows)
        else:
            head.append(_word(kind, value))
    return b"".join(head) + tail


def _word(kind: str, value: Any) -> bytes:
    size = {"address": 20, "bytes32": 32}.get(kind)
    if size is not None:
        if len(value) != size:
            raise ValueError(f"{len(value)} bytes for {kind}")
        return bytes(value).rjust(WORD, b"\0")
    if not 0 <= value < 1 << int(kind.removeprefix("uint")):
        raise ValueError(f"{value} is no {kind}")
    return int(value).to_bytes(WORD, "big")


def _decode(types: Sequence[str], answer: bytes) -> tuple[Any, ...]:
    """Words; a struct's are as if they were alone. Raises ValueError for anything else."""
    kinds = ",".join(types).replace("(", "").replace(")", "").split(",") if types else []
    if len(answer) != WORD * len(kinds):
        raise ValueError(f"{len(answer)} bytes instead of {WORD * len(kinds)}")
    return tuple(_value(k, answer[i * WORD :][:WORD]) for i, k in enumerate(kinds))


def _value(kind: str, word: bytes) -> Any:
    if kind == "bytes32":
        return word
    number = int.from_bytes(word, "big")
    bits = {"address": 160, "bool": 1}.get(kind) or int(kind.removeprefix("uint"))
    if number >> bits:
        raise ValueError(f"no {kind}")
    return word[12:] if kind == "address" else bool(number) if kind == "bool" else number


# --- refusals -------------------------------------------------------------------------------------


def refusal(returned: bytes) -> Refusal:
    """What the contract said when it refused a call."""
    for name, entry in _entries("error").items():
        if returned[:4] == _selector("error", name):
            try:
                values = _decode(_types(entry["inputs"]), returned[4:])
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
