"""Calls and answers of the contract as bytes: all of what is said, and nothing else."""

from __future__ import annotations

import random
from typing import Any

import pytest
from eth_abi.abi import encode
from eth_utils.abi import get_abi_input_types
from plugins.auth_evm.tests.contract import chains
from web3.exceptions import Web3Exception

from wetware_auth_evm.cli import abi
from wetware_auth_evm.cli.reads import ContractState
from wetware_auth_evm.contract import load

FUNCTIONS = {e["name"]: e for e in load().abi if e["type"] == "function"}


def value_of(rng: random.Random, kind: str) -> Any:
    if kind.endswith("[]"):
        return [value_of(rng, kind[:-2]) for _ in range(rng.randint(0, 4))]
    if kind.startswith("("):
        return tuple(value_of(rng, part) for part in kind[1:-1].split(","))
    if kind in ("address", "bytes32"):
        return rng.randbytes(20 if kind == "address" else 32)
    if kind == "bool":
        return rng.random() < 0.5
    bits = int(kind.removeprefix("uint"))
    return rng.choice([0, 1, (1 << bits) - 1, rng.getrandbits(bits)])


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_function_as_eth_abi_codes_it(name: str) -> None:
    rng = random.Random(name)
    inputs = get_abi_input_types(FUNCTIONS[name])
    for _ in range(50):
        values = [value_of(rng, kind) for kind in inputs]
        assert abi.calldata(name, *values) == chains.calldata(name, *values)


def test_the_contracts_state_is_read_as_eth_abi_codes_it() -> None:
    types = ["uint48", "bytes32", "uint40", "address", "bool", "address", "uint40"]
    for number in range(50):
        rng = random.Random(number)
        values = [value_of(rng, kind) for kind in types]
        assert ContractState.parse(encode(types, values)) == tuple(values)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 31,
        b"\0" * 33,
        b"\0" * (7 * 32 + 1),
        b"\xff" * 32 * 7,
        b"\0" * 32 * 3 + b"\1" + b"\0" * (32 * 4 - 1),  # an address of more than 20 bytes
        b"\0" * 32 * 4 + b"\0" * 31 + b"\2" + b"\0" * 64,  # a bool of 2
    ],
)
def test_what_is_no_answer_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError):
        ContractState.parse(answer)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("revokeAll", (b"\1" * 19,)),
        ("revokeAll", ()),
        ("resetScope", (b"\1" * 31,)),
        ("setAdmin", (bytes(32), bytes(32), bytes(20), 1 << 40, 1)),
        ("setAdmin", (bytes(32), bytes(32), bytes(20), -1, 1)),
        ("grantMany", ([(bytes(32), bytes(32), bytes(20), 0, 0)],)),
    ],
)
def test_what_does_not_fit_is_not_sent(function: str, args: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, Web3Exception)):
        abi.calldata(function, *args)
